"""nanoGPT and nanochat, each run from its own checkout, beside this trainer: same text, same
machine, same loss.

    python -m benchmarks peers --nanogpt ../nanoGPT --nanochat ../nanochat --text
    tinyshakespeare.txt --rounds 3

Everything runs on the CPU, GPUs are hidden: nanoGPT's README has a command for CPUs, and its shape
is small enough for
both peers to finish in minutes (4 layers, 128 wide, 4 heads, 12 windows of 64 characters a step,
    2000 steps).
    nanoGPT    that command, on the text as its shakespeare_char data
    nanochat   the same shape, batch and steps by its own flags; its tokenizer without merges, so
    that a token is a byte

    python -m benchmarks peers --nanochat ../nanochat --laptop --rounds 3

On our track laptop instead: nanochat trains on the documents of Python's standard library that our
trainer trains on, and is validated on the text that the track validates on, in bits per byte. Its
tokenizer, trained by its tok_train on the same documents, has as many tokens as the track's and 9
special ones; shape and tokens a step are by its own flags those of the track's four layers (ours
may take fewer for an easy target), the rest its defaults. Its schedule ends with its last step, so
its time to a loss is that of the shortest run that ends there: try num-iterations until it ends
just below the track's target. --nanochat-options sets whatever its base_train offers, and
NANOCHAT_DTYPE=bfloat16 in the environment is its switch for another precision.

What nanochat is given is what its loader likes, in both comparisons: pieces of the documents that
fill a row, since the rest of what is longer is dropped, and in random order, as its own data is; in
the order of the text each batch would be neighbours (1.77 instead of 1.66 nats on Tiny
Shakespeare).

Checkouts are only read: each run works in a copy in a temporary folder. Nothing is installed: a
peer whose packages --python cannot import is skipped, with a line that says what is missing.
nanoGPT wants torch, numpy and requests; nanochat torch, numpy, pyarrow, rustbpe, tiktoken,
filelock, requests, psutil, wandb (imported, not used), yaml, jinja2.

A round trains a peer, then this trainer (track shakespeare-char or laptop, with the options of
./run.sh given here) until its validation loss is the peer's, once with an empty cache folder (first
start) and once with that one filled (again).
    loss       nats per character over the whole validation split, the last tenth of the text, or
               bits per byte over
               the track's; not a peer's estimate from some batches: a peer's checkpoint is
               evaluated in windows of the
               length it was trained with, without overlap. nanochat's windows end where documents
               do and begin with its
               token for that; it is also evaluated in windows 4 times as long, as ours is, and the
               better loss counts.
               nanoGPT keeps the checkpoint that its estimate liked best; its steps and clock are
               that one's. Ours is
               its own validation, in rows of --val-row-len; it has an end-of-text token first, so
               the first character
               counts, as in nanochat and not in nanoGPT, and in bits per byte ours pays for
               end-of-text tokens, too
    training   each trainer's own clock, without validations, start-up and compiling. nanoGPT's
               leaves out its first
               step, nanochat's the first 11; "all steps" adds a median step for each of them. Ours
               leaves out none, and
               goes on to the validation that finds the loss reached; the JSON has the time by a
               straight line between
               validations, too
    process    from starting the process to its end: of the peers without preparing the text, of
               ours with it, and none
               draws a sample. nanochat compiles, too: it always finds an empty cache, and is
               compared with our first
               start only

Equal shape: nanoGPT's shape in both trainers, 60 steps each in turns; the median step after the
first 10. nanoGPT as in its README and with --compile=True, ours as it comes and in float32,
nanoGPT's only precision on a CPU.

    python -m benchmarks peers --modded ../modded-nanogpt --rounds 3

modded-nanogpt is another matter, on Hopper GPUs and FineWeb: benchmarks/modded.py says how.
"""

import json
import math
import os
import random
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
# nanochat's flags. No sliding windows: on a CPU they are masks, and it warns against them
NANOCHAT = {
    "device-type": "cpu",
    "depth": 4,
    "window-pattern": "L",
    "core-metric-every": -1,
    "sample-every": -1,
    "model-tag": "peer",
}
SHAKESPEARE = NANOCHAT | {
    "aspect-ratio": 32,
    "head-dim": 32,
    "max-seq-len": CONTEXT,
    "device-batch-size": BATCH,
    "total-batch-size": CONTEXT * BATCH,
    "num-iterations": STEPS,
    "eval-every": EVAL_EVERY,
    "eval-tokens": 20 * CONTEXT * BATCH,
}
LAPTOP = NANOCHAT | {
    "aspect-ratio": 64,
    "head-dim": 64,
    "max-seq-len": 256,
    "device-batch-size": 32,
    "total-batch-size": 8192,
    "num-iterations": 400,
    "eval-every": 100,
    "eval-tokens": 131_072,
}
SPECIAL_TOKENS = 9  # nanochat's
LONGER = 4  # our validation rows over our training rows, in the tracks used here
SHAPE_STEPS, SHAPE_WARM, SHAPE_TURNS = 60, 10, 2  # equal shape; turns per round
LEAST_TEXT = 20_000  # characters: less does not fill our first batch


# --- in a process of the peer's interpreter, in the copy of its checkout: the answer is printed as


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


def total_loss(model, inputs, targets):
    """Summed nats over the targets (n, T) int64 that are not -1, which both peers leave out of
    their mean."""
    import torch

    nats, rows = 0.0, max(1, 2**14 // inputs.shape[1])
    with torch.no_grad():
        for i in range(0, len(inputs), rows):
            x, y = inputs[i : i + rows], targets[i : i + rows]
            out = model(x, y)
            nats += (out[1] if isinstance(out, tuple) else out).item() * (y >= 0).sum().item()
            print(f"evaluated {i + len(x)} of {len(inputs)} windows")
    return nats


def windows(ids, length):
    """Ids as (n, length) int64, the last row filled up with -1."""
    import torch

    ids = torch.as_tensor(ids, dtype=torch.int64)
    return torch.nn.functional.pad(ids, (0, -len(ids) % length), value=-1).view(-1, length)


def evaluate_nanogpt(checkpoint, val):
    """Loss of train.py's checkpoint on all of val.bin; every character but the first is a
    target."""
    import numpy as np
    import torch
    from model import GPT, GPTConfig

    saved = torch.load(checkpoint, map_location="cpu")
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    ids, length = (
        np.fromfile(val, dtype=np.uint16).astype(np.int64),
        saved["model_args"]["block_size"],
    )
    targets = windows(ids[1:], length)
    n = (targets >= 0).sum().item()
    nats = total_loss(model.eval(), windows(ids[:-1], length).clamp(min=0), targets)
    return dict(
        loss=nats / n,
        steps=saved["iter_num"],
        params=sum(p.numel() for p in model.parameters()),
        val_units=len(ids),
        val_targets=n,
    )


def pieces(text, tokenizer, size):
    """Parts of at most `size` of the tokenizer's tokens, no character divided."""
    while text:
        ids, n = tokenizer.encode(text[: 8 * size]), size
        while not text.startswith(piece := tokenizer.decode(ids[:n])):  # it ends inside a character
            n -= 1
        yield piece
        text = text[len(piece) :]


def write_nanochat(corpus, size=None):
    """A corpus, a JSON file of documents by split, as the parquet files nanochat expects, the
    last one being validation. With a size, which needs its tokenizer, in pieces that fill a row,
    those to train on in random order."""
    import pyarrow
    from nanochat.dataset import DATA_DIR
    from pyarrow import parquet

    parts = json.loads(Path(corpus).read_text(encoding="utf-8"))
    if size:
        from nanochat.tokenizer import get_tokenizer

        tokenizer = get_tokenizer()
        parts = {
            split: [piece for text in texts for piece in pieces(text, tokenizer, int(size))]
            for split, texts in parts.items()
        }
        random.Random(0).shuffle(parts["train"])
    os.makedirs(DATA_DIR, exist_ok=True)
    for name, split in (("shard_00000", "train"), ("shard_00001", "val")):
        table = pyarrow.Table.from_pydict(dict(text=parts[split]))
        parquet.write_table(table, Path(DATA_DIR, f"{name}.parquet"), row_group_size=1000)
    return {split: len(texts) for split, texts in parts.items()}


def evaluate_nanochat(folder, step, corpus, metric):
    """Loss of base_train's checkpoint on all of the corpus's validation documents, in nats per
    character (val_loss) or bits per byte (val_bpb); a window begins with nanochat's own token
    for that."""
    import torch
    from nanochat.checkpoint_manager import build_model

    model, tokenizer, meta = build_model(folder, int(step), torch.device("cpu"), phase="eval")
    texts = json.loads(Path(corpus).read_text(encoding="utf-8"))["val"]
    documents, nats = [tokenizer.encode(text) for text in texts], {}
    for length in (meta["model_config"]["sequence_len"] * k for k in (1, LONGER)):
        targets = torch.cat([windows(ids, length) for ids in documents])
        first = torch.full((len(targets), 1), tokenizer.get_bos_token_id())
        nats[length] = total_loss(
            model, torch.cat([first, targets[:, :-1].clamp(min=0)], 1), targets
        )
    units = sum(len(text.encode() if metric == "val_bpb" else text) for text in texts)
    losses = {
        length: x / units / (math.log(2) if metric == "val_bpb" else 1)
        for length, x in nats.items()
    }
    return dict(
        loss=min(losses.values()),
        loss_by_window=losses,
        steps=int(step),
        val_units=units,
        params=sum(p.numel() for p in model.parameters()),
        val_targets=sum(map(len, documents)),
    )


# --- here


def split(text):
    """(train, validation) as nanoGPT divides: the last tenth of the characters is validation."""
    at = int(len(text) * 0.9)
    return text[:at], text[at:]


def fail(message):
    from base import InputError

    raise InputError(message)


def say(message):
    print(message, file=sys.stderr, flush=True)


def execute(what, command, folder, log, env, ok=(0,), every=10.0):
    """Run a command in a folder with its output in the file `log`, and a line of it on stderr
    every so many seconds; returns its seconds. Raises InputError, saying why, for an exit status
    other than ok."""
    started = shown = time.perf_counter()
    with (
        open(log, "w", encoding="utf-8") as f,
        subprocess.Popen(
            [*map(str, command)],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as child,
    ):
        try:
            for line in child.stdout:
                f.write(line)
                now = time.perf_counter()
                if now - shown >= every and line.strip():
                    say(f"    {now - started:.0f} s  {line.strip()[:100]}")
                    shown = now
            status = child.wait()
        except BaseException:
            # torchrun takes its workers with it; killed, it would leave them behind
            child.terminate()
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
            raise
    seconds = time.perf_counter() - started
    if status not in ok:
        said = [
            line.strip()
            for line in Path(log).read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
        for line in said[-12:]:
            say(f"    {line[:200]}")
        errors = [line for line in said if re.match(r"([\w.]+(Error|Exception)|error)\b", line)]
        reason = (errors or said or ["it said nothing"])[-1].removeprefix("error: ")[:300]
        fail(f"{what} ended with status {status}: {reason}")
    return seconds


def environment(**more):
    """Environment of every process: no GPU, no caches that outlive it."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("TORCHINDUCTOR_CACHE_DIR", "RANK", "WORLD_SIZE")
    }
    return kept | dict(CUDA_VISIBLE_DEVICES="", PYTHONUTF8="1", PYTHONUNBUFFERED="1") | more


def read_times(path):
    """(Run, its median ms per step without the first SHAPE_WARM) of a log or a run's folder."""
    from base import InputError
    from records.read import read_runs

    try:
        run = read_runs(path)[-1]
    except InputError as e:
        fail(e)
    seconds = [p.seconds for p in run.train if p.seconds is not None]
    steps = [1e3 * (b - a) for a, b in zip(seconds, seconds[1:]) if b > a]
    return run, statistics.median(steps[SHAPE_WARM:] or steps) if steps else None


class TextFile:
    """The task on a text, a file of one's own: nats per character, on track shakespeare-char."""

    metric, unit, target, tokens = (
        "val_loss",
        "character",
        None,
        256,
    )  # of nanochat's tokenizer, without special ones

    def __init__(self, text, folder):
        """Raises InputError for text that cannot be used; folder: to work in."""
        try:
            self.text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            fail(
                f"--text {text}: {getattr(e, 'strerror', None) or 'not UTF-8'}; expected a file of text"
            )
        if len(self.text) < LEAST_TEXT:
            fail(f"--text {text}: {len(self.text):,} characters; expected {LEAST_TEXT:,} or more")
        self.name, self.path = Path(text).name, Path(folder) / Path(text).name
        self.path.write_text(
            self.text, encoding="utf-8", newline="\n"
        )  # line ends as nanoGPT makes them, for all
        self.train, self.val = ([part] for part in split(self.text))
        self.options = ["--track", "shakespeare-char", "--text", self.path]

    def our_validation(self):
        """(characters our trainer validates on, whether they are those of the peers)"""
        own = our_split(self.path)
        return len(own), own == self.val[0]


class Laptop:
    """The task of track laptop: bits per byte, on the documents of Python's standard library."""

    name, metric, unit, options = (
        "Python's standard library",
        "val_bpb",
        "byte",
        ["--track", "laptop"],
    )

    def __init__(self, trainer_options, folder):
        """Prepares the corpus as our trainer does. Raises InputError; folder: to work in."""
        import train_gpt as tg
        from runtime.corpus import load_data
        from runtime.machine import World

        c = tg.parse_args(
            [str(o) for o in (*trainer_options, *self.options, "--cache-dir", folder)]
        )
        bpe = re.fullmatch(r"bpe:(\d+)", c.tokenizer)
        if c.data != "stdlib" or c.target_metric != self.metric or not bpe:
            fail(
                f"--laptop: expected our trainer on stdlib with --tokenizer bpe:N and --target-metric {self.metric}; "
                f"found {c.data}, {c.tokenizer} and {c.target_metric}"
            )
        self.tokens, self.target = int(bpe[1]), c.target
        data = load_data(
            c, [tg.stage_at(c, tg.progress_at(c, step)) for step in range(c.steps)], World()
        )
        self.own, dataset = data.val_bytes, data.dataset
        self.train = [text for path in dataset.train for text in documents(path, dataset)]
        self.val = documents(data.val.targets, dataset)

    def our_validation(self):
        """(bytes our trainer validates on, whether they are those of the peer)"""
        return self.own, self.own == size_of(
            self.val, self.unit
        )  # a character cut at the end is more to the peer


def documents(ids, dataset):
    """The texts of a shard, or of ids (n,)."""
    import numpy as np

    from data import read_shard

    ids = read_shard(ids) if isinstance(ids, Path) else ids
    return [
        text
        for part in np.split(ids, np.flatnonzero(ids == dataset.eot))
        if (text := dataset.tokenizer.decode(part.tolist()))
    ]


def size_of(texts, unit):
    return sum(len(text.encode() if unit == "byte" else text) for text in texts)


class Peer:
    """One peer: its checkout, copied into a folder, and how to run it there."""

    needs, modules = (), ()  # files of a checkout; packages
    module, left_behind = (
        "benchmarks.peers",
        (),
    )  # where ask() finds its functions; what is not copied of a checkout
    compiled = False  # whether starting again would be faster than the first start
    unclocked = 1  # first steps that its clock leaves out

    def __init__(self, checkout, python, scale):
        self.given = checkout, python, scale
        self.checkout, self.python, self.scale = Path(checkout), python, scale
        self.eval_every = max(2, EVAL_EVERY // scale)
        self.steps = STEPS // EVAL_EVERY * self.eval_every
        missing = [name for name in self.needs if not (self.checkout / name).is_file()]
        if missing:
            fail(
                f"--{self.name} {checkout}: has no {missing[0]}: expected a checkout of {self.name}"
            )

    def commit(self):
        """Of the checkout; None where git cannot tell."""
        if not (self.checkout / ".git").exists():
            return None
        try:
            done = subprocess.run(
                ["git", "-C", self.checkout, "rev-parse", "HEAD"], capture_output=True, text=True
            )
        except OSError:
            return None
        return done.stdout.strip() or None

    def copy(self, folder):
        """Begin anew in this folder, with a copy of the checkout and empty caches."""
        self.folder, self.copied = Path(folder), Path(folder) / "copy"
        ignore = shutil.ignore_patterns(".git", "__pycache__", *self.left_behind)
        shutil.copytree(self.checkout, self.copied, ignore=ignore)
        self.env = environment(
            TORCHINDUCTOR_CACHE_DIR=str(self.folder / "inductor"),
            NANOCHAT_BASE_DIR=str(self.folder / "base"),
        )

    def run(self, what, *args, log="log.txt"):
        return execute(
            f"{self.name}: {what}", [self.python, *args], self.copied, self.folder / log, self.env
        )

    def ask(self, function, *args):
        """One of the functions above, in the peer's interpreter; returns its dict."""
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        log = self.folder / f"{function}.txt"
        execute(
            f"{self.name}: {function}",
            [self.python, "-m", self.module, function, *map(str, args)],
            self.copied,
            log,
            self.env | dict(PYTHONPATH=path),
        )
        answers = [
            line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith("{")
        ]
        return json.loads(answers[-1])

    def available(self):
        """What --python has: dict(missing, torch)."""
        with tempfile.TemporaryDirectory(prefix="peers-") as folder:
            self.copy(folder)
            return self.ask("peer_modules", *self.modules)

    def train(self, task, folder):
        """Prepare the text, train, evaluate: one run's numbers."""
        self.copy(folder)
        started = time.perf_counter()
        self.prepare(task)
        prepared = time.perf_counter() - started
        process = self.run("training", *self.command())
        found = self.evaluate(task)
        run, ms = read_times(self.folder / "log.txt")
        there = [p for p in run.val if p.step == found["steps"]]
        if not there or there[-1].seconds is None:
            fail(
                f"{self.name}: its log has no validation with a time at step {found['steps']}, its checkpoint's"
            )
        clock = there[-1].seconds
        return found | dict(
            train_time_s=clock,
            process_s=process,
            prepare_s=prepared,
            ms_per_step=ms,
            all_steps_s=clock + min(self.unclocked, found["steps"]) * (ms or 0.0) / 1e3,
            own_metric=run.metric,
            own_estimate=there[-1].loss,
            own_estimates={p.step: p.loss for p in run.val},
        )


class NanoGPT(Peer):
    name = "nanogpt"
    needs = (
        "train.py",
        "model.py",
        "configurator.py",
        "config/train_shakespeare_char.py",
        "data/shakespeare_char/prepare.py",
    )
    modules = ("torch", "numpy", "requests")

    def prepare(self, task):
        (self.copied / "data/shakespeare_char/input.txt").write_text(task.text, encoding="utf-8")
        self.run("prepare.py", "data/shakespeare_char/prepare.py", log="prepare.txt")

    def command(self, *more):
        """Its README's for CPUs; what comes later overrides."""
        return (
            "train.py",
            "config/train_shakespeare_char.py",
            "--device=cpu",
            "--compile=False",
            "--eval_iters=20",
            "--log_interval=1",
            f"--block_size={CONTEXT}",
            f"--batch_size={BATCH}",
            "--n_layer=4",
            "--n_head=4",
            "--n_embd=128",
            f"--max_iters={self.steps}",
            f"--lr_decay_iters={self.steps}",
            "--dropout=0.0",
            *([f"--eval_interval={self.eval_every}"] if self.eval_every != EVAL_EVERY else ()),
            *more,
        )

    def evaluate(self, task):
        checkpoint = self.copied / "out-shakespeare-char/ckpt.pt"
        if not checkpoint.exists():
            fail(
                "nanogpt: training left no checkpoint: its estimate of the validation loss never fell"
            )
        return self.ask(
            "evaluate_nanogpt", checkpoint, self.copied / "data/shakespeare_char/val.bin"
        )

    def shape_ms(self, compiled):
        """ms of a step, in a short run."""
        self.run(
            "equal shape",
            *self.command(
                f"--max_iters={SHAPE_STEPS - 1}",
                "--eval_interval=1000000",
                "--eval_iters=1",
                f"--compile={compiled}",
            ),
            log="shape.txt",
        )
        return read_times(self.folder / "shape.txt")[1]


class Nanochat(Peer):
    name = "nanochat"
    needs = (
        "scripts/base_train.py",
        "scripts/tok_train.py",
        "nanochat/checkpoint_manager.py",
        "nanochat/dataset.py",
    )
    modules = (
        "torch",
        "numpy",
        "pyarrow",
        "rustbpe",
        "tiktoken",
        "filelock",
        "requests",
        "psutil",
        "wandb",
        "yaml",
        "jinja2",
    )
    compiled, unclocked = True, 11

    def __init__(self, checkout, python, scale, flags=SHAKESPEARE, options=()):
        """flags: of its base_train, by name; options: others, or other values of these, as
        NAME=VALUE."""
        super().__init__(checkout, python, scale)
        source = (self.checkout / "scripts/base_train.py").read_text(encoding="utf-8")
        given = dict(flags)
        for option in options:
            name, equals, value = option.partition("=")
            if not equals or f'"--{name}"' not in source:
                fail(
                    f"--nanochat-options {option}: expected NAME=VALUE with an option of its scripts/base_train.py, "
                    "such as matrix-lr=0.04"
                )
            given[name] = value
        for name, least in {"num-iterations": 1, "eval-every": 1, "max-seq-len": 8}.items():
            if not re.fullmatch(r"\d{1,9}", str(given[name]), re.ASCII) or int(given[name]) < least:
                fail(
                    f"--nanochat-options {name}={given[name]}: expected a number of {least} or more"
                )
        self.steps = max(1, int(given["num-iterations"]) // scale)
        self.eval_every = max(2, int(given["eval-every"]) // scale)
        self.flags = given | {"num-iterations": self.steps, "eval-every": self.eval_every}

    def prepare(self, task):
        """Its tokenizer learns from whole documents, then they are cut."""
        self.corpus = self.folder / "corpus.json"
        self.corpus.write_text(json.dumps(dict(train=task.train, val=task.val)), encoding="utf-8")
        self.ask("write_nanochat", self.corpus)
        self.run(
            "tok_train",
            "-m",
            "scripts.tok_train",
            f"--vocab-size={task.tokens + SPECIAL_TOKENS}",
            f"--doc-cap={10**9}",
            log="prepare.txt",
        )
        self.ask("write_nanochat", self.corpus, self.flags["max-seq-len"])

    def command(self):
        return (
            "-m",
            "scripts.base_train",
            *(f"--{name}={value}" for name, value in self.flags.items()),
        )

    def evaluate(self, task):
        found = self.ask(
            "evaluate_nanochat",
            self.folder / "base/base_checkpoints" / self.flags["model-tag"],
            self.steps,
            self.corpus,
            task.metric,
        )
        log = (self.folder / "log.txt").read_text(encoding="utf-8")
        dtype = re.search(r"^COMPUTE_DTYPE: torch\.(\w+)", log, re.M)
        return found | dict(dtype=dtype and dtype[1])


def our_options(task, loss, trainer_options):
    """What train_gpt.py is given to reach this loss; no sample at the end, since the peers'
    commands draw none."""
    return [*trainer_options, *task.options, "--target", f"{loss:.6f}", "--sample-tokens", 0]


def our_shape(text, trainer_options, *more):
    """What train_gpt.py is given to be of nanoGPT's shape."""
    return [
        *trainer_options,
        "--track",
        "shakespeare-char",
        "--text",
        text,
        "--n-layer",
        4,
        "--n-embd",
        128,
        "--n-head",
        4,
        "--mlp-ratio",
        4,
        "--value-embed-layers",
        "--n-gram",
        1,
        "--row-len",
        CONTEXT,
        "--max-doc-len",
        CONTEXT,
        "--short-window",
        CONTEXT,
        "--long-window",
        CONTEXT,
        "--batch-tokens",
        CONTEXT * BATCH,
        "--val-row-len",
        CONTEXT,
        "--val-tokens",
        CONTEXT * BATCH,
        "--eval-every",
        SHAPE_STEPS,
        "--steps",
        SHAPE_STEPS,
        "--sample-tokens",
        0,
        *more,
    ]


def ours(what, options, folder, cache):
    """Our trainer in a process of its own; returns what matters of its result, with process_s
    and ms_per_step."""
    run_dir = Path(folder) / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [
        sys.executable,
        TRAINER,
        *options,
        "--cache-dir",
        cache,
        "--run-dir",
        run_dir,
        "--repeat",
        1,
    ]
    process = execute(
        f"our trainer, {what}", command, folder, Path(folder) / "log.txt", environment(), ok=(0, 3)
    )
    result = json.loads((run_dir / "result.json").read_text())
    run, ms = read_times(run_dir)
    keys = ("target", "reached", "steps", "params", "train_time_s", "cold_start_s")
    loss, target = result[result["target_metric"]], result["target"]
    return {key: result[key] for key in keys} | dict(
        loss=loss,
        time_to_loss_s=None if target is None else run.time_to(target),
        all_steps_s=result["train_time_s"],
        process_s=process,
        ms_per_step=ms,
        dtype=run.environment.get("dtype"),
    )


def our_split(path):
    """The text of our validation split, as our trainer prepares it."""
    import numpy as np

    from data import DataConfig, open_dataset, read_shard

    with tempfile.TemporaryDirectory(prefix="peers-") as cache:
        config = DataConfig(data="text", text=str(path), tokenizer="chars")
        dataset = open_dataset(config, Path(cache))
        return dataset.tokenizer.decode(np.concatenate([read_shard(path) for path in dataset.val]))


def summarise(rounds, compiled):
    """Medians over the rounds of what is a number, and how many times as long the peer takes,
    None where one of our runs missed its loss, and for our later starts where the peer's would
    be faster, too."""

    def median(key, *sides):
        return statistics.median(
            r[side][key] for r in rounds for side in sides if r[side][key] is not None
        )

    medians = {
        side: {k: median(k, side) for k, v in rounds[0][side].items() if type(v) in (int, float)}
        for side in ("peer", "first", "again")
    }
    if not all(r[side]["reached"] for r in rounds for side in ("first", "again")):
        ratios = dict.fromkeys(("training", "interpolated", "first", "again"))
    else:
        clock = median("train_time_s", "peer")
        ratios = dict(
            training=clock / median("train_time_s", "first", "again"),
            interpolated=clock / median("time_to_loss_s", "first", "again"),
        )
        ratios |= {
            side: median("process_s", "peer") / median("process_s", side)
            for side in ("first", "again")
        }
    return dict(medians=medians, ratios=ratios | (dict(again=None) if compiled else {}))


def one_round(peer, task, options):
    """Train the peer, then ours twice to its loss."""
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        row = dict(peer=peer.train(task, folder))
        found = row["peer"]
        say(
            f"{peer.name}: loss {found['loss']:.4f} on its {found['val_units']:,} {task.unit}s of validation, "
            f"process {found['process_s']:.1f} s"
        )
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        for side in ("first", "again"):
            say(
                f"--- ours, {'empty caches' if side == 'first' else 'again'}, to {found['loss']:.4f}"
            )
            row[side] = ours(
                f"to {peer.name}'s loss",
                our_options(task, found["loss"], options),
                folder,
                Path(folder) / "cache",
            )
            say(
                f"ours: loss {row[side]['loss']:.4f}, training {row[side]['train_time_s']:.2f} s, "
                f"process {row[side]['process_s']:.1f} s"
            )
    return row


class EqualShape:
    """Step times of nanoGPT's shape, from short runs in turns. A way of running that fails is
    left out."""

    def __init__(self, peer, task, options):
        """peer: a NanoGPT of its own; task: a TextFile, in whose folder to work."""
        self.ms, self.errors, folder = {}, {}, task.path.parent
        peer.copy(folder / "shape")
        peer.prepare(task)

        def our_ms(*more):
            return ours(
                "equal shape", our_shape(task.path, options, *more), folder, folder / "cache"
            )["ms_per_step"]

        self.ways = {
            "nanoGPT": lambda: peer.shape_ms(False),
            "ours": our_ms,
            "nanoGPT, --compile=True": lambda: peer.shape_ms(True),
            "ours, float32": lambda: our_ms("--dtype", "float32"),
        }

    def turn(self):
        from base import InputError

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
        return dict(
            tokens=CONTEXT * BATCH,
            steps=SHAPE_STEPS,
            warm=SHAPE_WARM,
            ms=self.ms,
            errors=self.errors,
            median_ms=medians,
            us_per_token={way: 1e3 * ms / (CONTEXT * BATCH) for way, ms in medians.items()},
        )


def run(
    text=None,
    nanogpt=None,
    nanochat=None,
    modded=None,
    laptop=False,
    nanochat_options=(),
    python=sys.executable,
    rounds=1,
    scale=1,
    trainer_options=(),
    save=lambda result: None,
):
    """dict(text, split, ..., peers={name: dict(rounds=[...], medians, ratios) or dict(skipped)},
    equal_shape); save is given the same as it grows. Of modded-nanogpt, what
    benchmarks/modded.py gives."""
    for name, value in (("rounds", rounds), ("scale", scale)):
        if value < 1:
            fail(f"--{name} {value}: expected 1 or more")
    if not (nanogpt or nanochat or modded):
        fail(
            "nothing to run: give the checkout of a peer, --nanogpt PATH, --nanochat PATH or --modded PATH"
        )
    if nanochat_options and not nanochat:
        fail("--nanochat-options: expected --nanochat PATH, too")
    if modded:
        if nanogpt or nanochat or text or laptop:
            fail(
                "--modded runs by itself, on GPUs and FineWeb: leave out --text, --nanogpt, --nanochat and --laptop"
            )
        if not shutil.which(python):
            fail(f"--python {python}: no such program; expected the interpreter for the peers")
        from benchmarks import modded as module

        return module.run(modded, python, rounds, scale, trainer_options, save)
    if laptop and (nanogpt or text):
        fail(
            "--laptop compares with nanochat, on Python's standard library: leave out --nanogpt and --text"
        )
    if not (text or laptop):
        fail(
            "--text FILE is missing: expected what all are to train on, or --laptop for our track of that name"
        )
    peers = [NanoGPT(nanogpt, python, scale)] if nanogpt else []
    if nanochat:
        peers.append(
            Nanochat(nanochat, python, scale, LAPTOP if laptop else SHAKESPEARE, nanochat_options)
        )
    if not shutil.which(python):
        fail(f"--python {python}: no such program; expected the interpreter for the peers")
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        task = Laptop(trainer_options, folder) if laptop else TextFile(text, folder)
        result = measure(peers, task, rounds, list(trainer_options), save)
    say(f"\n{render(result)}")
    return result


def measure(peers, task, rounds, options, save):
    """run()'s result."""
    import torch

    from base import InputError

    theirs, (own, same) = size_of(task.val, task.unit), task.our_validation()
    say(
        f"validation: {theirs:,} {task.unit}s, "
        + (
            "the same in all trainers"
            if same
            else f"not the same as our {own:,}: losses compare roughly"
        )
    )
    result = dict(
        text=dict(name=task.name, unit=task.unit, train=size_of(task.train, task.unit), val=theirs),
        metric=task.metric,
        target=task.target,
        device="cpu",
        threads=torch.get_num_threads(),
        split=dict(peers=theirs, ours=own, same=same),
        rounds=rounds,
        scale=peers[0].scale,
        options=options,
        torch=dict(ours=torch.__version__),
        peers={},
        equal_shape=None,
    )

    def give_up(name, reason):
        say(f"{name}: {reason}")
        result["peers"].setdefault(name, {})["skipped"] = reason

    for peer in peers:
        try:
            there = peer.available()
        except InputError as e:
            there = dict(missing=[str(e)])
        if there["missing"]:
            give_up(
                peer.name,
                f"skipped, because {peer.python} cannot import {', '.join(there['missing'])}",
            )
        else:
            result["torch"][peer.name] = there["torch"]
            result["peers"][peer.name] = dict(
                commit=peer.commit(), command=" ".join(["python", *peer.command()]), rounds=[]
            )
    shape = None
    for n in range(rounds):
        for peer in peers:
            there = result["peers"][peer.name]
            if "skipped" in there:
                continue
            say(
                f"--- {peer.name}, {peer.steps} steps"
                + (f", round {n + 1} of {rounds}" if rounds > 1 else "")
            )
            try:
                there["rounds"].append(one_round(peer, task, options))
                there |= summarise(there["rounds"], peer.compiled)
                save(result)
                if isinstance(peer, NanoGPT):
                    shape = shape or EqualShape(NanoGPT(*peer.given), task, options)
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
    if "modded" in result:
        from benchmarks import modded

        return modded.render(result)

    def number(value, form=",.1f"):
        return "–" if value is None else format(value, form)

    text, parts = result["text"], result["split"]
    head = "nats/char" if result["metric"] == "val_loss" else "bits/byte"
    lines = [
        f"# Peers on {text['name']}, {result['threads']} CPU threads",
        "",
        f"{text['train']:,} {text['unit']}s to train on, {parts['peers']:,} for validation"
        + (
            ", the same in all trainers. "
            if parts["same"]
            else f" ({parts['ours']:,} others in ours). "
        )
        + "torch "
        + ", ".join(f"{v} ({k})" for k, v in result["torch"].items())
        + ".",
    ]
    if result["scale"] > 1:
        lines += [
            "",
            f"**Tried out with the peers' steps divided by {result['scale']}: not a measurement.**",
        ]
    if result["options"]:
        lines += ["", f"Our options: `{' '.join(map(str, result['options']))}`"]
    for name, there in result["peers"].items():
        lines += ["", f"## {name}", ""]
        if there.get("commit"):
            lines += [f"Commit {there['commit'][:12]}: `{there['command']}`", ""]
        if there.get("medians"):
            lines += [
                f"| | {head} | steps | parameters | ms/step | training s | all steps s | process s |",
                "|---|---|---|---|---|---|---|---|",
            ]
            for side, label in dict(
                peer=name, first="ours, first start", again="ours, again"
            ).items():
                m = there["medians"][side]
                missed = side != "peer" and not all(r[side]["reached"] for r in there["rounds"])
                lines.append(
                    f"| {label} | {m['loss']:.4f}{' (not reached)' if missed else ''} | {m['steps']:,.0f} | "
                    f"{m['params'] / 1e6:.2f}M | {number(m.get('ms_per_step'))} | "
                    f"{number(m.get('train_time_s'))} | {number(m.get('all_steps_s'))} | "
                    f"{number(m['process_s'])} |"
                )
            r, row = there["ratios"], there["rounds"][0]
            later = f", {number(r['again'])} against later ones" if r["again"] else ""
            theirs = (
                f"{name} in {row['peer']['dtype']}, ours" if row["peer"].get("dtype") else "Ours"
            )
            lines += [
                "",
                f"Rounds: {len(there['rounds'])}, medians. {theirs} in {row['first']['dtype']}. {name} takes "
                f"this many times as long: training {number(r['training'])} ({number(r['interpolated'])} by a "
                f"line between our validations), process {number(r['first'])} against our first "
                f"start{later}.",
            ]
            loss = there["medians"]["peer"]["loss"]
            if result["target"] is not None:
                lines += [
                    "",
                    f"The track's target is {result['target']:g}: {name} ended "
                    + (
                        f"{result['target'] - loss:.4f} below it."
                        if loss <= result["target"]
                        else f"{loss - result['target']:.4f} above it. The times are to its loss; --nanochat-options "
                        "num-iterations=N gives it more steps."
                    ),
                ]
        if "skipped" in there:
            lines += [*([""] if lines[-1] else ()), there["skipped"]]
    if shape := result["equal_shape"]:
        lines += [
            "",
            "## Equal shape",
            "",
            f"4 layers, 128 wide, 4 heads, {shape['tokens']} tokens a step, in turns.",
            "",
            "| | ms/step | us/token | of ours |",
            "|---|---|---|---|",
        ]
        base = shape["median_ms"].get("ours")
        lines += [
            f"| {way} | {ms:.2f} | {shape['us_per_token'][way]:.1f} | {number(base and ms / base, '.2f')} |"
            for way, ms in shape["median_ms"].items()
        ]
        lines += ["", *(f"{way}: {error}" for way, error in shape["errors"].items())]
    return "\n".join(lines).rstrip() + "\n"


def add_arguments(parser):
    parser.add_argument(
        "--text", metavar="FILE", help="what all train on, such as Tiny Shakespeare"
    )
    parser.add_argument("--nanogpt", metavar="PATH", help="checkout of github.com/karpathy/nanoGPT")
    parser.add_argument(
        "--nanochat", metavar="PATH", help="checkout of github.com/karpathy/nanochat"
    )
    parser.add_argument(
        "--laptop",
        action="store_true",
        help="compare with nanochat on our track laptop, on the CPU; takes no --text",
    )
    parser.add_argument(
        "--nanochat-options",
        nargs="+",
        default=(),
        metavar="NAME=VALUE",
        help="of its base_train, such as num-iterations=300 matrix-lr=0.04",
    )
    parser.add_argument(
        "--modded",
        metavar="PATH",
        help="checkout of github.com/KellerJordan/modded-nanogpt; needs "
        "Hopper GPUs and takes no --text",
    )
    parser.add_argument(
        "--python",
        default=sys.executable,
        metavar="PATH",
        help="interpreter for the peers, with their packages [this one]",
    )
    parser.add_argument(
        "--rounds", type=int, default=1, metavar="N", help="repeat everything, for medians [1]"
    )
    parser.add_argument(
        "--scale",
        type=int,
        default=1,
        metavar="N",
        help="for trying out: divide the peers' steps by N [1]",
    )


if __name__ == "__main__":  # a process of the peer's interpreter
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
