"""nanoGPT and nanochat, each run from its own checkout, beside this trainer: same text, same machine, same loss.

    python -m benchmarks peers --nanogpt ../nanoGPT --nanochat ../nanochat --text tinyshakespeare.txt --rounds 3

Everything runs on the CPU, GPUs are hidden: nanoGPT's README has a command for CPUs, and its shape is small enough for
both peers to finish in minutes (4 layers, 128 wide, 4 heads, 12 windows of 64 characters a step, 2000 steps).
    nanoGPT    that command, on the text as its shakespeare_char data
    nanochat   the same shape, batch and steps by its own flags; the text as 64-byte documents, because its loader drops
               what is longer than a row; its tokenizer without merges, so that a token is a byte
Checkouts are only read: each run works in a copy in a temporary folder. Nothing is installed: a peer whose packages
--python cannot import is skipped, with a line that says what is missing. nanoGPT wants torch, numpy and requests;
nanochat torch, numpy, pyarrow, rustbpe, tiktoken, filelock, requests, psutil, wandb (imported, not used), yaml, jinja2.

A round trains a peer, then this trainer (track shakespeare-char, with the options of ./run.sh given here) until its
validation loss is the peer's, once with an empty cache folder (first start) and once with that one filled (again).
    loss       nats per character over the whole validation split, the last tenth of the text, not a peer's estimate
               from some batches: a peer's checkpoint is evaluated in windows of 64 without overlap, as it was trained.
               nanoGPT keeps the checkpoint that its estimate liked best; its steps and clock are that one's. Ours is
               its own validation, in rows of --val-row-len, longer where the track says so; it has an end-of-text token
               first, so the first character counts, as in nanochat and not in nanoGPT
    training   each trainer's own clock, without validations, start-up and compiling. nanoGPT's leaves out its first
               step, nanochat's the first 11; ours none
    process    from starting the process to its end: of the peers without preparing the text, of ours with it. nanochat
               compiles, too: it always finds an empty cache, and is compared with our first start only

Equal shape: nanoGPT's shape in both trainers, 60 steps each in turns; the median step after the first 10. nanoGPT as
in its README and with --compile=True, ours as it comes and in float32, nanoGPT's only precision on a CPU.

modded-nanogpt is no peer here: its kernels need Hopper GPUs, and its logs are compared by `python -m records`.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAINER = ROOT / "train_gpt.py"
STEPS, EVAL_EVERY, CONTEXT, BATCH = 2000, 250, 64, 12  # nanoGPT's README and config
SHAPE_STEPS, SHAPE_WARM, SHAPE_TURNS = 60, 10, 2  # equal shape; turns per round
LEAST_TEXT = 20_000  # characters: less does not fill our first batch


# --- in a process of the peer's interpreter, in the copy of its checkout: the answer is printed as JSON


def peer_modules(*names):
    """{"torch": version, "missing": what import said}"""
    import importlib
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as e:  # a package that is there may fail in ways of its own
            missing.append(f"{name} ({type(e).__name__}: {' '.join(str(e).split())[:120]})")
    return dict(missing=missing, torch=getattr(sys.modules.get("torch"), "__version__", None))


def full_loss(model, inputs, targets):
    """Mean nats over the targets (n, T) int64 that are not -1, which both peers leave out of their mean."""
    import torch
    nats = 0.0
    with torch.no_grad():
        for x, y in zip(inputs.split(256), targets.split(256)):
            out = model(x, y)
            nats += (out[1] if isinstance(out, tuple) else out).item() * (y >= 0).sum().item()
    return nats / (targets >= 0).sum().item()


def windows(ids, length):
    """Ids as (n, length) int64, the last row filled up with -1."""
    import torch
    ids = torch.as_tensor(ids, dtype=torch.int64)
    return torch.nn.functional.pad(ids, (0, -len(ids) % length), value=-1).view(-1, length)


def evaluate_nanogpt(checkpoint, val):
    """Loss of train.py's checkpoint on all of val.bin; every character but the first is a target."""
    import numpy as np
    import torch
    from model import GPT, GPTConfig
    saved = torch.load(checkpoint, map_location="cpu")
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    ids, length = np.fromfile(val, dtype=np.uint16).astype(np.int64), saved["model_args"]["block_size"]
    targets = windows(ids[1:], length)
    loss = full_loss(model.eval(), windows(ids[:-1], length).clamp(min=0), targets)
    return dict(loss=loss, steps=saved["iter_num"], params=sum(p.numel() for p in model.parameters()),
                val_characters=len(ids), val_targets=(targets >= 0).sum().item())


def write_nanochat(text):
    """The text's two splits as the parquet files nanochat expects, the last one being validation."""
    import pyarrow
    from nanochat.dataset import DATA_DIR
    from pyarrow import parquet
    text = Path(text).read_text(encoding="utf-8")
    os.makedirs(DATA_DIR)
    for name, part in zip(("shard_00000", "shard_00001"), split(text)):
        table = pyarrow.Table.from_pydict(dict(text=list(documents(part))))
        parquet.write_table(table, Path(DATA_DIR, f"{name}.parquet"), row_group_size=1000)
    return {}


def evaluate_nanochat(folder, step):
    """Loss of base_train's checkpoint on the whole validation file, in nats per character; every byte is a target, a
    window begins with nanochat's own token for that."""
    import torch
    from nanochat.checkpoint_manager import build_model
    from nanochat.dataset import parquets_iter_batched
    model, tokenizer, meta = build_model(folder, int(step), torch.device("cpu"), phase="eval")
    text = "".join(piece for batch in parquets_iter_batched("val") for piece in batch)
    targets = windows(tokenizer.encode(text), meta["model_config"]["sequence_len"])
    first = torch.full((len(targets), 1), tokenizer.get_bos_token_id())
    inputs = torch.cat([first, targets[:, :-1].clamp(min=0)], 1)
    n = (targets >= 0).sum().item()
    return dict(loss=full_loss(model, inputs, targets) * n / len(text), steps=int(step), val_characters=len(text),
                params=sum(p.numel() for p in model.parameters()), val_targets=n)


# --- here


def split(text):
    """(train, validation) as nanoGPT divides: the last tenth of the characters is validation."""
    at = int(len(text) * 0.9)
    return text[:at], text[at:]


def documents(text, size=CONTEXT):
    """Pieces of at most `size` bytes of UTF-8, no character divided."""
    data, at = text.encode(), 0
    while at < len(data):
        end = min(at + size, len(data))
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end -= 1
        yield data[at:end].decode()
        at = end


def fail(message):
    from data import InputError
    raise InputError(message)


def say(message):
    print(message, file=sys.stderr, flush=True)


def execute(what, command, folder, log, env, ok=(0,), every=10.0):
    """Run a command in a folder with its output in the file `log`, and a line of it on stderr every so many seconds;
    returns its seconds. Raises InputError, saying why, for an exit status other than ok."""
    started = shown = time.perf_counter()
    with open(log, "w", encoding="utf-8") as f, subprocess.Popen(
            [*map(str, command)], cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, encoding="utf-8", errors="replace") as child:
        try:
            for line in child.stdout:
                f.write(line)
                now = time.perf_counter()
                if now - shown >= every and line.strip():
                    say(f"    {now - started:.0f} s  {line.strip()[:100]}")
                    shown = now
            status = child.wait()
        except BaseException:
            child.kill()
            raise
    seconds = time.perf_counter() - started
    if status not in ok:
        said = [line.strip() for line in Path(log).read_text(encoding="utf-8").splitlines() if line.strip()]
        for line in said[-12:]:
            say(f"    {line[:200]}")
        errors = [line for line in said if re.match(r"([\w.]+(Error|Exception)|error)\b", line)]
        reason = (errors or said or ["it said nothing"])[-1].removeprefix("error: ")[:300]
        fail(f"{what} ended with status {status}: {reason}")
    return seconds


def environment(**more):
    """Environment of every process: no GPU, no caches that outlive it."""
    kept = {k: v for k, v in os.environ.items() if k not in ("TORCHINDUCTOR_CACHE_DIR", "RANK", "WORLD_SIZE")}
    return kept | dict(CUDA_VISIBLE_DEVICES="", PYTHONUTF8="1", PYTHONUNBUFFERED="1") | more


def read_times(path):
    """(Run, its median ms per step without the first SHAPE_WARM) of a log or a run's folder."""
    from records.read import InputError, read_runs
    try:
        run = read_runs(path)[-1]
    except InputError as e:
        fail(e)
    seconds = [p.seconds for p in run.train if p.seconds is not None]
    steps = [1e3 * (b - a) for a, b in zip(seconds, seconds[1:]) if b > a]
    return run, statistics.median(steps[SHAPE_WARM:] or steps) if steps else None


class Peer:
    """One peer: its checkout, copied into a folder, and how to run it there."""
    needs, modules = (), ()  # files of a checkout; packages
    compiled = False  # whether starting again would be faster than the first start

    def __init__(self, checkout, python, scale):
        self.given = checkout, python, scale
        self.checkout, self.python, self.scale = Path(checkout), python, scale
        self.eval_every = max(2, EVAL_EVERY // scale)
        self.steps = STEPS // EVAL_EVERY * self.eval_every
        missing = [name for name in self.needs if not (self.checkout / name).is_file()]
        if missing:
            fail(f"--{self.name} {checkout}: has no {missing[0]}: expected a checkout of {self.name}")

    def commit(self):
        """Of the checkout; None where git cannot tell."""
        if not (self.checkout / ".git").exists():
            return None
        try:
            done = subprocess.run(["git", "-C", self.checkout, "rev-parse", "HEAD"], capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() or None

    def copy(self, folder):
        """Begin anew in this folder, with a copy of the checkout and empty caches."""
        self.folder, self.copied = Path(folder), Path(folder) / "copy"
        shutil.copytree(self.checkout, self.copied, ignore=shutil.ignore_patterns(".git", "__pycache__"))
        self.env = environment(TORCHINDUCTOR_CACHE_DIR=str(self.folder / "inductor"),
                               NANOCHAT_BASE_DIR=str(self.folder / "base"))

    def run(self, what, *args, log="log.txt"):
        return execute(f"{self.name}: {what}", [self.python, *args], self.copied, self.folder / log, self.env)

    def ask(self, function, *args):
        """One of the functions above, in the peer's interpreter; returns its dict."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        log = self.folder / f"{function}.txt"
        execute(f"{self.name}: {function}", [self.python, "-m", "benchmarks.peers", function, *map(str, args)],
                self.copied, log, self.env | dict(PYTHONPATH=path))
        answers = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
        return json.loads(answers[-1])

    def available(self):
        """What --python has: dict(missing, torch)."""
        with tempfile.TemporaryDirectory(prefix="peers-") as folder:
            self.copy(folder)
            return self.ask("peer_modules", *self.modules)

    def train(self, text, folder):
        """Prepare the text, train, evaluate: one run's numbers."""
        self.copy(folder)
        started = time.perf_counter()
        self.prepare(text)
        prepared = time.perf_counter() - started
        process = self.run("training", *self.command())
        found = self.evaluate()
        run, ms = read_times(self.folder / "log.txt")
        there = [p for p in run.val if p.step == found["steps"]]
        if not there or there[-1].seconds is None:
            fail(f"{self.name}: its log has no validation with a time at step {found['steps']}, its checkpoint's")
        return found | dict(train_time_s=there[-1].seconds, process_s=process, prepare_s=prepared, ms_per_step=ms,
                            own_metric=run.metric, own_estimate=there[-1].loss)


class NanoGPT(Peer):
    name = "nanogpt"
    needs = ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py",
             "data/shakespeare_char/prepare.py")
    modules = ("torch", "numpy", "requests")

    def prepare(self, text):
        (self.copied / "data/shakespeare_char/input.txt").write_text(text, encoding="utf-8")
        self.run("prepare.py", "data/shakespeare_char/prepare.py", log="prepare.txt")

    def command(self, *more):
        """Its README's for CPUs; what comes later overrides."""
        return ("train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20",
                "--log_interval=1", f"--block_size={CONTEXT}", f"--batch_size={BATCH}", "--n_layer=4", "--n_head=4",
                "--n_embd=128", f"--max_iters={self.steps}", f"--lr_decay_iters={self.steps}", "--dropout=0.0",
                *([f"--eval_interval={self.eval_every}"] if self.eval_every != EVAL_EVERY else ()), *more)

    def evaluate(self):
        checkpoint = self.copied / "out-shakespeare-char/ckpt.pt"
        if not checkpoint.exists():
            fail("nanogpt: training left no checkpoint: its estimate of the validation loss never fell")
        return self.ask("evaluate_nanogpt", checkpoint, self.copied / "data/shakespeare_char/val.bin")

    def shape_ms(self, compiled):
        """ms of a step, in a short run."""
        self.run("equal shape", *self.command(f"--max_iters={SHAPE_STEPS - 1}", "--eval_interval=1000000",
                                              "--eval_iters=1", f"--compile={compiled}"), log="shape.txt")
        return read_times(self.folder / "shape.txt")[1]


class Nanochat(Peer):
    name = "nanochat"
    needs = ("scripts/base_train.py", "scripts/tok_train.py", "nanochat/checkpoint_manager.py", "nanochat/dataset.py")
    modules = ("torch", "numpy", "pyarrow", "rustbpe", "tiktoken", "filelock", "requests", "psutil", "wandb", "yaml",
               "jinja2")
    compiled = True

    def prepare(self, text):
        path = self.folder / "text.txt"
        path.write_text(text, encoding="utf-8")
        self.ask("write_nanochat", path)
        self.run("tok_train", "-m", "scripts.tok_train", "--vocab-size=265", log="prepare.txt")  # 256 and its specials

    def command(self):
        return ("-m", "scripts.base_train", "--device-type=cpu", "--depth=4", "--aspect-ratio=32", "--head-dim=32",
                "--window-pattern=L", f"--max-seq-len={CONTEXT}", f"--device-batch-size={BATCH}",
                f"--total-batch-size={CONTEXT * BATCH}", f"--num-iterations={self.steps}",
                f"--eval-every={self.eval_every}", f"--eval-tokens={20 * CONTEXT * BATCH}", "--core-metric-every=-1",
                "--sample-every=-1")

    def evaluate(self):
        return self.ask("evaluate_nanochat", self.folder / "base/base_checkpoints/d4", self.steps)


def our_options(text, loss, trainer_options):
    """What train_gpt.py is given to reach this loss."""
    return [*trainer_options, "--track", "shakespeare-char", "--text", text, "--target", f"{loss:.6f}"]


def our_shape(text, trainer_options, *more):
    """What train_gpt.py is given to be of nanoGPT's shape."""
    return [*trainer_options, "--track", "shakespeare-char", "--text", text, "--n-layer", 4, "--n-embd", 128,
            "--n-head", 4, "--mlp-ratio", 4, "--value-embed-layers", "--n-gram", 1, "--row-len", CONTEXT,
            "--max-doc-len", CONTEXT, "--short-window", CONTEXT, "--long-window", CONTEXT, "--batch-tokens",
            CONTEXT * BATCH, "--val-row-len", CONTEXT, "--val-tokens", CONTEXT * BATCH, "--eval-every", SHAPE_STEPS,
            "--steps", SHAPE_STEPS, "--sample-tokens", 0, *more]


def ours(what, options, folder, cache):
    """Our trainer in a process of its own; returns what matters of its result, with process_s and ms_per_step."""
    run_dir = Path(folder) / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, TRAINER, *options, "--cache-dir", cache, "--run-dir", run_dir, "--repeat", 1]
    process = execute(f"our trainer, {what}", command, folder, Path(folder) / "log.txt", environment(), ok=(0, 3))
    result = json.loads((run_dir / "result.json").read_text())
    run, ms = read_times(run_dir)
    keys = ("val_loss", "target", "reached", "steps", "params", "train_time_s", "cold_start_s")
    return {key: result[key] for key in keys} | dict(process_s=process, ms_per_step=ms,
                                                     dtype=run.environment.get("dtype"))


def our_split(path):
    """The text of our validation split, as our trainer prepares it."""
    import numpy as np
    from data import open_dataset, read_shard
    with tempfile.TemporaryDirectory(prefix="peers-") as cache:
        dataset = open_dataset(path, "chars", Path(cache))
        return dataset.tokenizer.decode(np.concatenate([read_shard(path) for path in dataset.val]))


def summarise(rounds, compiled):
    """Medians over the rounds of what is a number, and how many times as long the peer takes, None where one of our
    runs missed its loss, and for our later starts where the peer's would be faster, too."""
    def median(key, *sides):
        return statistics.median(r[side][key] for r in rounds for side in sides if r[side][key] is not None)
    medians = {side: {k: median(k, side) for k, v in rounds[0][side].items() if type(v) in (int, float)}
               for side in ("peer", "first", "again")}
    ratios = dict(training=median("train_time_s", "peer") / median("train_time_s", "first", "again"))
    ratios |= {side: median("process_s", "peer") / median("process_s", side) for side in ("first", "again")}
    if not all(r[side]["reached"] for r in rounds for side in ("first", "again")):
        ratios = dict.fromkeys(ratios)
    return dict(medians=medians, ratios=ratios | (dict(again=None) if compiled else {}))


def one_round(peer, text, path, options):
    """Train the peer, then ours twice to its loss."""
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        row = dict(peer=peer.train(text, folder))
        found = row["peer"]
        say(f"{peer.name}: loss {found['loss']:.4f} on its {found['val_characters']:,} validation characters, "
            f"process {found['process_s']:.1f} s")
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        for side in ("first", "again"):
            say(f"--- ours, {'empty caches' if side == 'first' else 'again'}, to {found['loss']:.4f}")
            row[side] = ours(f"to {peer.name}'s loss", our_options(path, found["loss"], options), folder,
                             Path(folder) / "cache")
            say(f"ours: loss {row[side]['val_loss']:.4f}, training {row[side]['train_time_s']:.2f} s, "
                f"process {row[side]['process_s']:.1f} s")
    return row


class EqualShape:
    """Step times of nanoGPT's shape, from short runs in turns. A way of running that fails is left out."""

    def __init__(self, peer, text, path, options):
        """peer: a NanoGPT of its own; path: a file with the text, in a folder to work in."""
        self.ms, self.errors, folder = {}, {}, path.parent
        peer.copy(folder / "shape")
        peer.prepare(text)

        def our_ms(*more):
            return ours("equal shape", our_shape(path, options, *more), folder, folder / "cache")["ms_per_step"]
        self.ways = {"nanoGPT": lambda: peer.shape_ms(False), "ours": our_ms,
                     "nanoGPT, --compile=True": lambda: peer.shape_ms(True),
                     "ours, float32": lambda: our_ms("--dtype", "float32")}

    def turn(self):
        from data import InputError
        for way, measure in self.ways.items():
            if way not in self.errors:
                say(f"--- equal shape: {way}")
                try:
                    self.ms.setdefault(way, []).append(measure())
                    say(f"{way}: {self.ms[way][-1]:.2f} ms a step")
                except InputError as e:
                    self.errors[way] = str(e)
                    say(f"{way}: {e}")

    def result(self):
        medians = {way: statistics.median(ms) for way, ms in self.ms.items() if ms}
        return dict(tokens=CONTEXT * BATCH, steps=SHAPE_STEPS, warm=SHAPE_WARM, ms=self.ms, errors=self.errors,
                    median_ms=medians, us_per_token={way: 1e3 * ms / (CONTEXT * BATCH) for way, ms in medians.items()})


def run(text, nanogpt=None, nanochat=None, python=sys.executable, rounds=1, scale=1, trainer_options=(),
        save=lambda result: None):
    """dict(text, split, ..., peers={name: dict(rounds=[...], medians, ratios) or dict(skipped)}, equal_shape); save is
    given the same as it grows."""
    for name, value in (("rounds", rounds), ("scale", scale)):
        if value < 1:
            fail(f"--{name} {value}: expected 1 or more")
    if not (nanogpt or nanochat):
        fail("nothing to run: give the checkout of a peer, --nanogpt PATH or --nanochat PATH")
    peers = [kind(checkout, python, scale) for kind, checkout in ((NanoGPT, nanogpt), (Nanochat, nanochat)) if checkout]
    if not shutil.which(python):
        fail(f"--python {python}: no such program; expected the interpreter for the peers")
    try:
        content = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        fail(f"--text {text}: {getattr(e, 'strerror', None) or 'not UTF-8'}; expected a file of text")
    if len(content) < LEAST_TEXT:
        fail(f"--text {text}: {len(content):,} characters; expected {LEAST_TEXT:,} or more")
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        path = Path(folder) / Path(text).name
        path.write_text(content, encoding="utf-8", newline="\n")  # line ends as nanoGPT makes them, for all
        result = measure(peers, content, path, rounds, list(trainer_options), save)
    say(f"\n{render(result)}")
    return result


def measure(peers, text, path, rounds, options, save):
    """run()'s result; path: a file with the text, in a folder to work in."""
    import torch
    from data import InputError
    theirs, own = split(text)[1], our_split(path)
    say(f"validation: {len(theirs):,} characters, " + (
        "the same in all trainers" if own == theirs else f"not the same as our {len(own):,}: losses compare roughly"))
    result = dict(text=dict(name=path.name, characters=len(text)), device="cpu", threads=torch.get_num_threads(),
                  split=dict(peers=len(theirs), ours=len(own), same=own == theirs), rounds=rounds, scale=peers[0].scale,
                  options=options, torch=dict(ours=torch.__version__), peers={}, equal_shape=None)

    def give_up(name, reason):
        say(f"{name}: {reason}")
        result["peers"].setdefault(name, {})["skipped"] = reason

    for peer in peers:
        try:
            there = peer.available()
        except InputError as e:
            there = dict(missing=[str(e)])
        if there["missing"]:
            give_up(peer.name, f"skipped, because {peer.python} cannot import {', '.join(there['missing'])}")
        else:
            result["torch"][peer.name] = there["torch"]
            result["peers"][peer.name] = dict(commit=peer.commit(), command=" ".join(["python", *peer.command()]),
                                              rounds=[])
    shape = None
    for n in range(rounds):
        for peer in peers:
            there = result["peers"][peer.name]
            if "skipped" in there:
                continue
            say(f"--- {peer.name}, {peer.steps} steps" + (f", round {n + 1} of {rounds}" if rounds > 1 else ""))
            try:
                there["rounds"].append(one_round(peer, text, path, options))
                there |= summarise(there["rounds"], peer.compiled)
                save(result)
                if isinstance(peer, NanoGPT):
                    shape = shape or EqualShape(NanoGPT(*peer.given), text, path, options)
                    for _ in range(SHAPE_TURNS):
                        shape.turn()
                    result["equal_shape"] = shape.result()
                    save(result)
            except InputError as e:
                give_up(peer.name, str(e))
    if not any(there.get("rounds") for there in result["peers"].values()):
        fail("; ".join(f"{name}: {there['skipped']}" for name, there in result["peers"].items()))
    return result


def render(result):
    """A table for each peer, ours below it; the step times of the equal shape."""
    def number(value, form=",.1f"):
        return "–" if value is None else format(value, form)
    text, parts = result["text"], result["split"]
    lines = [f"# Peers on {text['name']}, {result['threads']} CPU threads", "",
             f"{text['characters']:,} characters, the last {parts['peers']:,} are validation"
             + (", the same in all trainers. " if parts["same"] else f" ({parts['ours']:,} others in ours). ")
             + "torch " + ", ".join(f"{v} ({k})" for k, v in result["torch"].items()) + "."]
    if result["scale"] > 1:
        lines += ["", f"**Tried out with the peers' steps divided by {result['scale']}: not a measurement.**"]
    if result["options"]:
        lines += ["", f"Our options: `{' '.join(map(str, result['options']))}`"]
    for name, there in result["peers"].items():
        lines += ["", f"## {name}", ""]
        if there.get("commit"):
            lines += [f"Commit {there['commit'][:12]}: `{there['command']}`", ""]
        if there.get("medians"):
            lines += ["| | nats/char | steps | parameters | ms/step | training s | process s |",
                      "|---|---|---|---|---|---|---|"]
            for side, label in dict(peer=name, first="ours, first start", again="ours, again").items():
                m = there["medians"][side]
                missed = side != "peer" and not all(r[side]["reached"] for r in there["rounds"])
                lines.append(f"| {label} | {m['loss' if side == 'peer' else 'val_loss']:.4f}"
                             f"{' (not reached)' if missed else ''} | {m['steps']:,.0f} | {m['params'] / 1e6:.2f}M | "
                             f"{number(m.get('ms_per_step'))} | {number(m.get('train_time_s'))} | "
                             f"{number(m['process_s'])} |")
            r, dtype = there["ratios"], there["rounds"][0]["first"]["dtype"]
            later = f", {number(r['again'])} against later ones" if r["again"] else ""
            lines += ["", f"Rounds: {len(there['rounds'])}, medians. Ours in {dtype}. {name} takes this many times as "
                      f"long: training {number(r['training'])}, process {number(r['first'])} against our first start"
                      f"{later}."]
        if "skipped" in there:
            lines += [*([""] if lines[-1] else ()), there["skipped"]]
    if shape := result["equal_shape"]:
        lines += ["", "## Equal shape", "", f"4 layers, 128 wide, 4 heads, {shape['tokens']} tokens a step, in turns.",
                  "", "| | ms/step | us/token | of ours |", "|---|---|---|---|"]
        base = shape["median_ms"].get("ours")
        lines += [f"| {way} | {ms:.2f} | {shape['us_per_token'][way]:.1f} | {number(base and ms / base, '.2f')} |"
                  for way, ms in shape["median_ms"].items()]
        lines += ["", *(f"{way}: {error}" for way, error in shape["errors"].items())]
    return "\n".join(lines).rstrip() + "\n"


def add_arguments(parser):
    parser.add_argument("--text", required=True, metavar="FILE", help="what all train on, such as Tiny Shakespeare")
    parser.add_argument("--nanogpt", metavar="PATH", help="checkout of github.com/karpathy/nanoGPT")
    parser.add_argument("--nanochat", metavar="PATH", help="checkout of github.com/karpathy/nanochat")
    parser.add_argument("--python", default=sys.executable, metavar="PATH",
                        help="interpreter for the peers, with their packages [this one]")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="repeat everything, for medians [1]")
    parser.add_argument("--scale", type=int, default=1, metavar="N",
                        help="for trying out: divide the peers' 2000 steps by N [1]")


if __name__ == "__main__":  # a process of the peer's interpreter
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
