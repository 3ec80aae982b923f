"""benchmarks/peers.py against two checkouts of a few lines that behave like nanoGPT and nanochat, and a trainer that
behaves like ours: what is run in which order, what is read from it, and what happens when it cannot be run."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given, strategies as st

import train_gpt as tg
from benchmarks import peers
from benchmarks.__main__ import main
from data import InputError
from helpers import write_text

LOGITS = "((3 * x[..., None] + 5 * torch.arange({n})) % 7).float()"  # of what follows x: a bigram model

MODEL = f"""
import torch
class GPTConfig:
    def __init__(self, **kw): self.__dict__.update(kw)
class GPT(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, self.w = c, torch.nn.Parameter(torch.zeros(1000))
    def forward(self, x, y):
        assert not self.training and x.shape[1] == self.c.block_size and x.min() >= 0
        logits = {LOGITS.format(n="self.c.vocab_size")} + 0 * self.w[0]
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
"""

PREPARE = """
import os, numpy as np
here = os.path.dirname(__file__)
text = open(os.path.join(here, "input.txt")).read()
ids = np.array(list(map(sorted(set(text)).index, text)), dtype=np.uint16)
ids[int(len(ids) * 0.9):].tofile(os.path.join(here, "val.bin"))
"""

CALLED = """
import os, sys
with open(os.environ["CALLS"], "a") as f:
    f.write(f"{name} {' '.join(sys.argv[1:])} gpu={os.environ['CUDA_VISIBLE_DEVICES']!r}\\n")
"""

# 40 ms a step, 900 where it validates or begins; as in nanoGPT, a checkpoint is only kept when validation improves
TRAIN = "name = 'nanogpt'" + CALLED + """
options = dict(a[2:].split("=") for a in sys.argv[1:] if a.startswith("--"))
steps, every, step = int(options["max_iters"]), int(options.get("eval_interval", 250)), 0
print(f"Overriding: max_iters = {steps}")
for step in range(steps + 1):
    if step % every == 0:
        print(f"step {step}: train loss 2.0000, val loss {3 - step / 100 if step < steps else 9:.4f}")
    if options["compile"] == "True" and os.environ.get("NO_COMPILER"):
        raise RuntimeError("no compiler")
    print(f"iter {step}: loss 2.0000, time {900 if step % every == 0 else 40:.2f}ms, mfu 0.01%")
if every < 1000 and not os.environ.get("NO_TORCH"):
    import torch
    os.makedirs("out-shakespeare-char")
    args = dict(block_size=int(options["block_size"]), vocab_size=30)
    torch.save(dict(model=dict(w=torch.ones(1000)), model_args=args, iter_num=steps - every),
               "out-shakespeare-char/ckpt.pt")
"""

DATASET = """
import json, os
DATA_DIR = os.path.join(os.environ["NANOCHAT_BASE_DIR"], "data")
def parquets_iter_batched(split):
    name = sorted(os.listdir(DATA_DIR))[-1 if split == "val" else 0]
    yield json.load(open(os.path.join(DATA_DIR, name)))["text"]
"""

CHECKPOINTS = f"""
import json, os, torch
class Tokenizer:  # a byte's id is not the byte
    def encode(self, text): return [b + 1 for b in text.encode()]
    def get_bos_token_id(self): return 0
class Model(torch.nn.Module):
    def forward(self, x, y):
        assert x.shape[1] == 64 and (x[:, 0] == 0).all() and x.min() >= 0
        logits = {LOGITS.format(n=265)}
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
def build_model(folder, step, device, phase):
    return Model().eval(), Tokenizer(), json.load(open(os.path.join(folder, f"meta_{{step:06d}}.json")))
"""

BASE_TRAIN = "name = 'nanochat'" + CALLED + """
import json
from nanochat.dataset import parquets_iter_batched
assert all(0 < len(text.encode()) <= 64 for split in ("train", "val") for text in next(parquets_iter_batched(split)))
options = dict(a[2:].split("=") for a in sys.argv[1:])
steps, every, seconds = int(options["num-iterations"]), int(options["eval-every"]), 0.0
for step in range(steps + 1):
    if step % every == 0:
        print(f"Step {step:05d} | Validation bpb: {4 - step / 100:.6f}")
    if step < steps:
        ms = 30000 if step == 0 else 50
        seconds += ms / 1000 * (step > 10)
        print(f"step {step:05d}/{steps:05d} ({100 * step / steps:.2f}%) | loss: 2.0 | lrm: 1.00 | dt: {ms:.2f}ms | "
              f"tok/sec: 1 | bf16_mfu: 0.00 | epoch: 1 pq: 0 rg: 0 | total time: {seconds / 60:.2f}m")
folder = os.path.join(os.environ["NANOCHAT_BASE_DIR"], "base_checkpoints/d4")
os.makedirs(folder)
json.dump(dict(model_config=dict(sequence_len=64)), open(os.path.join(folder, f"meta_{steps:06d}.json"), "w"))
"""

# our trainer: 100 ms a step, in float32 200
OURS = "name = 'ours'" + CALLED + """
import json, pathlib
def option(name, default=None):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default
cache, run = pathlib.Path(option("--cache-dir")), pathlib.Path(option("--run-dir"))
if os.environ.get("OURS_FAILS"):
    sys.exit(print("error: --text FILE: has no text in it", file=sys.stderr) or 2)
cold = not cache.exists()
cache.mkdir(exist_ok=True), run.mkdir()
steps, target, reached = int(option("--steps", 20)), float(option("--target", 0)), not os.environ.get("OURS_MISSES")
(run / "config.json").write_text(json.dumps(dict(environment=dict(dtype="bfloat16"), config=dict(steps=steps))))
ms = 200 if option("--dtype") == "float32" else 100
warm = 1.0 if "--value-embed-layers" in sys.argv else 0.0  # what the first 10 steps of a short run take more
lines = [dict(step=s, train_loss=2.0, train_time=s * ms / 1000 + warm * min(s, 10)) for s in range(1, steps + 1)]
lines.append(dict(step=steps, val_loss=target, train_time=steps * ms / 1000))
(run / "metrics.jsonl").write_text("\\n".join(map(json.dumps, lines)))
(run / "result.json").write_text(json.dumps(dict(
    val_loss=target - 0.01 if reached else 9.0, target=target, reached=reached, steps=steps, params=500,
    train_time_s=steps * ms / 1000, cold_start_s=60 if cold else 5)))
sys.exit(0 if reached else 3)
"""


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def nanogpt(folder):
    return write_files(folder, {"train.py": TRAIN, "model.py": MODEL, "configurator.py": "", "README.md": "",
                                "config/train_shakespeare_char.py": "", "data/shakespeare_char/prepare.py": PREPARE})


def nanochat(folder):
    return write_files(folder, {
        "nanochat/__init__.py": "", "nanochat/dataset.py": DATASET, "nanochat/checkpoint_manager.py": CHECKPOINTS,
        "scripts/tok_train.py": "", "scripts/base_train.py": BASE_TRAIN, "rustbpe.py": "", "wandb.py": "",
        "pyarrow/__init__.py": "class Table:\n    from_pydict = staticmethod(lambda columns: columns)\n",
        "pyarrow/parquet.py": "import json\ndef write_table(table, path, row_group_size):\n"
                              "    json.dump(table, open(path, 'w'))\n"})


@pytest.fixture
def around(tmp_path, monkeypatch):
    """A folder with a text, our trainer's double and a record of what was called."""
    write_text(tmp_path / "text.txt")
    (tmp_path / "ours.py").write_text(OURS)
    monkeypatch.setattr(peers, "TRAINER", tmp_path / "ours.py")
    monkeypatch.setattr(peers.NanoGPT, "modules", ("torch", "numpy"))
    monkeypatch.setattr(peers.Nanochat, "modules", ("torch", "pyarrow", "rustbpe", "wandb"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path


@pytest.fixture
def quick(around, monkeypatch):
    """The same without starting torch: nanoGPT's loss is 5."""
    found = dict(loss=5.0, steps=35, params=804096, val_characters=9726, val_targets=9725)
    monkeypatch.setattr(peers.NanoGPT, "evaluate", lambda self: found)
    monkeypatch.setattr(peers.NanoGPT, "modules", ())
    monkeypatch.setattr(peers.Nanochat, "modules", ("pyarrow", "rustbpe", "wandb"))
    monkeypatch.setattr(peers, "SHAPE_TURNS", 1)
    monkeypatch.setenv("NO_TORCH", "1")
    return around


def calls(folder):
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def bigram_loss(inputs, targets, n):
    """Mean nats of the fakes' model, one by one."""
    def nats(x, y):
        logits = [(3 * x + 5 * k) % 7 for k in range(n)]
        return math.log(sum(map(math.exp, logits))) - logits[y]
    pairs = list(zip(inputs, targets))
    known = {pair: nats(*pair) for pair in set(pairs)}
    return sum(known[pair] for pair in pairs) / len(pairs)


def test_nanogpt_and_ours_in_turns(around, capsys):
    checkout, out, table = nanogpt(around / "checkout"), around / "out.json", around / "table.md"
    before = {p: p.read_bytes() for p in checkout.rglob("*") if p.is_file()}
    text = (around / "text.txt").read_text()
    (around / "text.txt").write_bytes(text.replace("\n", "\r\n").encode())  # nanoGPT reads line ends as one character
    assert main(["peers", "--nanogpt", str(checkout), "--text", str(around / "text.txt"), "--rounds", "2", "--scale",
                 "50", "--n-layer", "3", "--json", str(out), "--table", str(table)]) == 0
    result = json.loads(out.read_text())
    assert {p: p.read_bytes() for p in checkout.rglob("*") if p.is_file()} == before  # the checkout is only read

    # everything in the order of the rounds, without GPUs
    made = calls(around)
    kinds = [line.split()[0] + (" shape" if "--value-embed-layers" in line or "eval_iters=1 " in line else "")
             for line in made]
    assert kinds == 2 * (["nanogpt", "ours", "ours"] + 4 * ["nanogpt shape", "ours shape"])
    assert all(line.endswith("gpu=''") for line in made)
    assert "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=40 --lr_decay_iters=40" \
        in made[0] and "--eval_interval=5" in made[0]

    # its loss on every character but the first, and that loss for us
    there, ids = result["peers"]["nanogpt"], list(map(sorted(set(text)).index, text))
    val = ids[int(len(ids) * 0.9):]
    loss = bigram_loss(val[:-1], val[1:], 30)
    for row in there["rounds"]:
        assert row["peer"]["loss"] == pytest.approx(loss, rel=1e-5) and row["peer"]["val_targets"] == len(val) - 1
        assert row["peer"]["val_characters"] == len(val)
        assert row["first"]["cold_start_s"] == 60 and row["again"]["cold_start_s"] == 5  # caches empty, then filled
        assert row["first"]["target"] == pytest.approx(loss, abs=1e-5) and row["again"]["dtype"] == "bfloat16"
        # of its 40 steps the clock takes the 35 up to the checkpoint, less the first
        assert row["peer"]["steps"] == 35 and row["peer"]["train_time_s"] == pytest.approx(34 * 0.040)
        assert row["peer"]["ms_per_step"] == pytest.approx(40) and row["peer"]["own_estimate"] == 2.65
    assert result["split"] == dict(peers=len(val), ours=len(val), same=True)
    assert there["ratios"]["training"] == pytest.approx(34 * 0.040 / 2.0)  # 20 of our steps take 2 s
    assert there["ratios"]["again"] == pytest.approx(
        sum(r["peer"]["process_s"] for r in there["rounds"]) / sum(r["again"]["process_s"] for r in there["rounds"]))

    shape = result["equal_shape"]
    assert {way: len(ms) for way, ms in shape["ms"].items()} == dict.fromkeys(
        ("nanoGPT", "ours", "nanoGPT, --compile=True", "ours, float32"), 4)
    assert shape["median_ms"] == pytest.approx({"nanoGPT": 40, "ours": 100, "nanoGPT, --compile=True": 40,
                                                "ours, float32": 200})
    assert shape["us_per_token"]["ours"] == pytest.approx(1e5 / 768) and not shape["errors"]
    err = capsys.readouterr().err
    assert table.read_text() in err and "training 0.7, process" in err and "| ours, float32 | 200.00 |" in err
    assert "not a measurement" in err and "`--n-layer 3`" in err and "round 2 of 2" in err


def test_nanochat_and_ours(around):
    text = (around / "text.txt").read_text() + "Wörter, größer, über; " * 50  # in the validation split
    (around / "text.txt").write_text(text)
    result = peers.run(around / "text.txt", nanochat=nanochat(around / "checkout"), scale=10)
    there, val = result["peers"]["nanochat"], text[int(len(text) * 0.9):]
    row, data = there["rounds"][0], val.encode()
    inputs = [0 if i % 64 == 0 else data[i - 1] + 1 for i in range(len(data))]
    expected = bigram_loss(inputs, [b + 1 for b in data], 265) * len(data) / len(val)
    assert row["peer"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert row["peer"]["val_characters"] == len(val) < row["peer"]["val_targets"] == len(data)
    assert row["peer"]["steps"] == 200 and row["peer"]["train_time_s"] == pytest.approx(189 * 0.050, abs=1e-6)
    assert row["peer"]["own_metric"] == "val_bpb" and row["peer"]["own_estimate"] == 2.0
    assert there["ratios"]["training"] == pytest.approx(189 * 0.050 / 2.0)
    assert there["ratios"]["first"] > 0 and there["ratios"]["again"] is None  # it would start faster the next time
    assert result["equal_shape"] is None and [line.split()[0] for line in calls(around)] == ["nanochat", "ours", "ours"]
    assert result["torch"] == dict(ours=torch.__version__, nanochat=torch.__version__)
    # ours divides by bytes, theirs by characters
    assert not result["split"]["same"] and "others in ours" in peers.render(result)


def test_a_missing_package_skips_that_peer_only(quick, monkeypatch, capsys):
    (nanochat(quick / "chat") / "rustbpe.py").unlink()
    monkeypatch.setenv("NO_COMPILER", "1")  # and a way of running the shape that fails is left out
    result = peers.run(quick / "text.txt", nanogpt=nanogpt(quick / "gpt"), nanochat=quick / "chat", scale=50)
    reason = result["peers"]["nanochat"]["skipped"]
    assert reason == (f"skipped, because {sys.executable} cannot import rustbpe (ModuleNotFoundError: "
                      "No module named 'rustbpe')")
    assert result["peers"]["nanogpt"]["ratios"]["training"] and reason in peers.render(result)
    assert "nanoGPT, --compile=True" not in result["equal_shape"]["median_ms"]
    assert result["equal_shape"]["errors"]["nanoGPT, --compile=True"].endswith("status 1: RuntimeError: no compiler")

    assert main(["peers", "--nanochat", str(quick / "chat"), "--text", str(quick / "text.txt")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: nanochat: {reason}"


@pytest.mark.parametrize("break_it, message", [
    (lambda checkout, env: (checkout / "train.py").write_text("print(1)\nraise ValueError('too deep')\n"),
     "nanogpt: training ended with status 1: ValueError: too deep"),
    (lambda checkout, env: (checkout / "train.py").write_text("print('step 0: train loss 2.0, val loss 9.0')"),
     "nanogpt: its log has no validation with a time at step 35"),
    (lambda checkout, env: (checkout / "train.py").write_text("print('hello')"), "it begins with 'hello'"),
    (lambda checkout, env: (checkout / "data/shakespeare_char/prepare.py").write_text("import sys; sys.exit(5)"),
     "nanogpt: prepare.py ended with status 5: it said nothing"),
    (lambda checkout, env: env("OURS_FAILS", "1"),
     "our trainer, to nanogpt's loss ended with status 2: --text FILE: has no text in it"),
])
def test_what_fails_says_why(quick, monkeypatch, capsys, break_it, message):
    break_it(nanogpt(quick / "checkout"), monkeypatch.setenv)
    assert main(["peers", "--nanogpt", str(quick / "checkout"), "--text", str(quick / "text.txt"), "--scale",
                 "50"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: nanogpt: ") and message in last


def test_a_loss_that_we_miss_has_no_ratio(quick, monkeypatch):
    monkeypatch.setenv("OURS_MISSES", "1")
    result = peers.run(quick / "text.txt", nanogpt=nanogpt(quick / "checkout"), scale=50)
    assert result["peers"]["nanogpt"]["ratios"] == dict(training=None, first=None, again=None)
    assert "9.0000 (not reached)" in peers.render(result) and "training –, process –" in peers.render(result)


def test_ratios_of_medians():
    def side(process, training=1.0, reached=True):
        return dict(process_s=process, train_time_s=training, reached=reached, ms_per_step=None)
    rounds = [dict(peer=side(p, 10.0), first=side(f, 2.0), again=side(a, 4.0))
              for p, f, a in ((10, 5, 1), (30, 6, 2), (20, 1, 90))]
    got = peers.summarise(rounds, compiled=False)
    assert got["ratios"] == dict(training=10 / 3, first=4.0, again=10.0)
    assert got["medians"]["again"] == dict(process_s=2, train_time_s=4.0)
    assert peers.summarise(rounds, compiled=True)["ratios"] == dict(training=10 / 3, first=4.0, again=None)
    rounds[1]["again"]["reached"] = False  # one is enough
    assert set(peers.summarise(rounds, compiled=False)["ratios"].values()) == {None}


def test_a_training_that_never_improves_has_no_checkpoint(around, monkeypatch):
    monkeypatch.setenv("NO_TORCH", "1")
    peer = peers.NanoGPT(nanogpt(around / "checkout"), sys.executable, 50)
    with pytest.raises(InputError, match="nanogpt: training left no checkpoint"):
        peer.train((around / "text.txt").read_text(), around / "work")


def test_a_failure_keeps_the_rounds_before_it(quick, monkeypatch):
    saved, one_round = [], peers.one_round

    def once(peer, *args):
        if saved:
            raise InputError("out of luck")
        return one_round(peer, *args)
    monkeypatch.setattr(peers, "one_round", once)
    result = peers.run(quick / "text.txt", nanogpt=nanogpt(quick / "checkout"), rounds=3, scale=50, save=saved.append)
    there = result["peers"]["nanogpt"]
    assert len(there["rounds"]) == 1 and there["ratios"]["training"] and there["skipped"] == "out of luck"
    assert len(saved) == 2 and "out of luck" in peers.render(result) and len(result["equal_shape"]["ms"]["ours"]) == 1


@pytest.mark.parametrize("wrong, message", [
    ("", "nothing to run: give the checkout of a peer"),
    ("--nanogpt .", "--nanogpt .: has no train.py: expected a checkout of nanogpt"),
    ("--nanochat CHECKOUT", "has no scripts/base_train.py: expected a checkout of nanochat"),
    ("--nanogpt CHECKOUT --rounds 0", "--rounds 0: expected 1 or more"),
    ("--nanogpt CHECKOUT --scale 0", "--scale 0: expected 1 or more"),
    ("--nanogpt CHECKOUT --python no-such-python", "--python no-such-python: no such program"),
    ("--nanogpt CHECKOUT --text missing.txt", "--text missing.txt: No such file or directory; expected a file of text"),
    ("--nanogpt CHECKOUT --text SHORT", "19,999 characters; expected 20,000 or more"),
    ("--nanogpt CHECKOUT --text LATIN", "not UTF-8; expected a file of text"),
])
def test_bad_input_is_refused_before_anything_runs(around, monkeypatch, capsys, wrong, message):
    monkeypatch.setattr(peers, "execute", lambda *_, **__: pytest.fail("ran something"))
    monkeypatch.chdir(around)
    (around / "short.txt").write_text("x" * 19_999)
    (around / "latin.txt").write_bytes("ä".encode("latin-1") * 30_000)
    for name, path in (("CHECKOUT", nanogpt(around / "checkout")), ("SHORT", around / "short.txt"),
                       ("LATIN", around / "latin.txt")):
        wrong = wrong.replace(name, str(path))
    assert main(["peers", "--text", str(around / "text.txt"), *wrong.split()]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not calls(around)


@given(st.text(max_size=300))
def test_documents_are_whole_characters_and_all_of_the_text(text):
    pieces = [piece.encode() for piece in peers.documents(text)]
    assert b"".join(pieces).decode() == text
    assert all(len(p) <= 64 for p in pieces) and all(len(p) > 60 for p in pieces[:-1]) and all(pieces)


@given(st.integers(1, 200), st.integers(1, 70))
def test_windows_lose_nothing(n, length):
    rows = peers.windows(range(n), length)
    assert rows.shape == (math.ceil(n / length), length)
    assert rows.flatten().tolist() == [*range(n)] + [-1] * (-n % length)


def test_the_split_is_nanogpts(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(30_007))
    (tmp_path / "text.txt").write_text(text)
    assert peers.our_split(tmp_path / "text.txt") == peers.split(text)[1] == text[27_006:]


def test_our_trainer_takes_the_options(tmp_path):
    text = write_text(tmp_path / "text.txt")
    c = tg.parse_args([str(a) for a in peers.our_options(text, 1.9, ["--n-head", "2", "--no-compile"])])
    assert (c.track, c.text, c.target, c.target_metric, c.n_head) == ("shakespeare-char", str(text), 1.9, "val_loss", 2)
    assert c.tokenizer == "chars" and not c.compile
    c = tg.parse_args([str(a) for a in peers.our_shape(text, ["--no-compile", "--n-layer", "9"], "--dtype", "float32")])
    assert (c.n_layer, c.n_embd, c.n_head, c.mlp_ratio, c.row_len, c.batch_tokens) == (4, 128, 4, 4, 64, (768,))
    assert (c.steps, c.max_doc_len, c.long_window, c.short_window) == (60, (64,), (64,), (64,)) and not c.compile
    assert c.dtype == "float32" and c.value_embed_layers == () and c.n_gram == 1


def test_a_command_that_is_interrupted_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "say", lambda line: (_ for _ in ()).throw(KeyboardInterrupt))
    child = "import time\nprint('begun', flush=True)\ntime.sleep(60)"
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with pytest.raises(KeyboardInterrupt):
        peers.execute("child", [sys.executable, "-c", child], tmp_path, tmp_path / "log", None, every=0)
    assert started[0].poll() is not None


def test_commit(tmp_path):
    peer = peers.NanoGPT(nanogpt(tmp_path / "checkout"), sys.executable, 1)
    assert peer.commit() is None
    if shutil.which("git"):
        git = ["git", "-C", str(tmp_path / "checkout"), "-c", "user.name=n", "-c", "user.email=e"]
        for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "m"]):
            subprocess.run(git + command, check=True)
        assert re.fullmatch(r"[0-9a-f]{40}", peer.commit())
    assert peer.steps == 2000 and not any("eval_interval" in a for a in peer.command())  # as in its README
    with pytest.raises(InputError, match="has no train.py"):
        peers.NanoGPT(tmp_path, sys.executable, 1)
