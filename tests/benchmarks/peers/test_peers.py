"""benchmarks/peers.py against two checkouts of a few lines that behave like nanoGPT and
nanochat, and a trainer that behaves like ours: what is run in which order, what is read from it,
and what happens when it cannot be run, on a text and on track laptop. The same for
modded-nanogpt's stand-in, which prints such a log without a GPU."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from helpers import write_text
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import runtime.corpus
from base import InputError
from benchmarks import peers, process, subject
from benchmarks.__main__ import main
from benchmarks.peers import common, modded
from benchmarks.peers import nanochat as chat
from benchmarks.peers import nanogpt as gpt
from records.runs import Point

LOGITS = (
    "((3 * x[..., None] + 5 * torch.arange({n})) % 7).float()"  # of what follows x: a bigram model
)

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

# 40 ms a step, 900 where it validates or begins; as in nanoGPT, a checkpoint is only kept when
# validation improves
TRAIN = (
    "name = 'nanogpt'"
    + CALLED
    + """
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
)

DATASET = """
import json, os
DATA_DIR = os.path.join(os.environ["NANOCHAT_BASE_DIR"], "data")
def documents(split):
    name = sorted(os.listdir(DATA_DIR))[-1 if split == "val" else 0]
    return json.load(open(os.path.join(DATA_DIR, name)))["text"]
"""

# a byte's id is not the byte; with more than 265 ids, two bytes that are the same are one token,
# too
TOKENIZER = """
import os, re
path = os.path.join(os.environ.get("NANOCHAT_BASE_DIR", ""), "vocab-size")
class Tokenizer:
    def __init__(self, pairs): self.pattern = re.compile(rb"(?s)(.)\\1|." if pairs else b"(?s).")
    def encode(self, text):
        return [1 + t[0] + 256 * (len(t) > 1) for t in (m[0] for m in self.pattern.finditer(text.encode()))]
    def decode(self, ids):
        return b"".join(bytes([(i - 1) % 256]) * (1 + (i > 256)) for i in ids).decode(errors="replace")
    def get_bos_token_id(self): return 0
def get_tokenizer(): return Tokenizer(int(open(path).read()) > 265)
"""

TOK_TRAIN = (
    CALLED.replace("{name}", "tok_train").lstrip()
    + """
from nanochat.dataset import documents
from nanochat.tokenizer import path
options = dict(a[2:].split("=") for a in sys.argv[1:])
assert max(map(len, documents("train"))) <= int(options["doc-cap"]) and len(documents("train")) < 9  # whole documents
open(path, "w").write(options["vocab-size"])
"""
)

CHECKPOINTS = f"""
import json, os, torch
from nanochat.tokenizer import get_tokenizer
class Model(torch.nn.Module):
    def __init__(self, uniform_at): super().__init__(); self.uniform_at = uniform_at
    def forward(self, x, y):
        assert (x[:, 0] == 0).all() and x.min() >= 0
        logits = {LOGITS.format(n=600)} * (x.shape[1] != self.uniform_at)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1)
def build_model(folder, step, device, phase):
    meta = json.load(open(os.path.join(folder, f"meta_{{step:06d}}.json")))
    return Model(int(os.environ.get("UNIFORM_AT", 0))).eval(), get_tokenizer(), meta
"""

BASE_TRAIN = (
    "name = 'nanochat'"
    + CALLED
    + """
import argparse, json
from nanochat.dataset import documents
from nanochat.tokenizer import get_tokenizer
parser = argparse.ArgumentParser()
for name in ("--device-type", "--depth", "--aspect-ratio", "--head-dim", "--window-pattern", "--max-seq-len",
             "--device-batch-size", "--total-batch-size", "--num-iterations", "--eval-every", "--eval-tokens",
             "--core-metric-every", "--sample-every", "--model-tag", "--matrix-lr"):
    parser.add_argument(name)
options = vars(parser.parse_args())
steps, every, length = (int(options[name]) for name in ("num_iterations", "eval_every", "max_seq_len"))
fed = {split: documents(split) for split in ("train", "val")}
for split, texts in fed.items():  # what its loader likes: full rows
    sizes = [len(get_tokenizer().encode(text)) for text in texts]
    assert max(sizes) <= length and sum(n < length - 3 for n in sizes) < 9
with open(os.environ["CALLS"] + ".fed", "w") as f:
    json.dump(fed, f)
if dtype := os.environ.get("NANOCHAT_DTYPE"):
    print(f"COMPUTE_DTYPE: torch.{dtype} (set via NANOCHAT_DTYPE={dtype})")
seconds = 0.0
for step in range(steps + 1):
    if step % every == 0 or step == steps:
        print(f"Step {step:05d} | Validation bpb: {4 - step / 100:.6f}")
    if step < steps:
        ms = 30000 if step == 0 else 50
        seconds += ms / 1000 * (step > 10)
        print(f"step {step:05d}/{steps:05d} ({100 * step / steps:.2f}%) | loss: 2.0 | lrm: 1.00 | dt: {ms:.2f}ms | "
              f"tok/sec: 1 | bf16_mfu: 0.00 | epoch: 1 pq: 0 rg: 0 | total time: {seconds / 60:.2f}m")
folder = os.path.join(os.environ["NANOCHAT_BASE_DIR"], "base_checkpoints", options["model_tag"])
os.makedirs(folder)
json.dump(dict(model_config=dict(sequence_len=length)), open(os.path.join(folder, f"meta_{steps:06d}.json"), "w"))
"""
)

# our trainer: 100 ms a step, in float32 200; of its validations the last but one is 3 times as far
# from the target
OURS = (
    "name = 'ours'"
    + CALLED
    + """
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
metric = "val_bpb" if option("--track") == "laptop" else "val_loss"
loss = target - 0.01 if reached else 9.0
lines += [{"step": s, metric: x, "train_time": s * ms / 1000} for s, x in ((steps // 2, target + 0.03), (steps, loss))]
(run / "metrics.jsonl").write_text("\\n".join(map(json.dumps, lines)))
(run / "result.json").write_text(json.dumps({metric: loss} | dict(
    target_metric=metric, target=target, reached=reached, steps=steps, params=500, train_time_s=steps * ms / 1000,
    cold_start_s=60 if cold else 5)))
sys.exit(0 if reached else 3)
"""
)


def write_files(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def nanogpt(folder):
    return write_files(
        folder,
        {
            "train.py": TRAIN,
            "model.py": MODEL,
            "configurator.py": "",
            "README.md": "",
            "config/train_shakespeare_char.py": "",
            "data/shakespeare_char/prepare.py": PREPARE,
        },
    )


def nanochat(folder):
    return write_files(
        folder,
        {
            "nanochat/__init__.py": "",
            "nanochat/dataset.py": DATASET,
            "nanochat/checkpoint_manager.py": CHECKPOINTS,
            "nanochat/tokenizer.py": TOKENIZER,
            "scripts/tok_train.py": TOK_TRAIN,
            "scripts/base_train.py": BASE_TRAIN,
            "rustbpe.py": "",
            "wandb.py": "",
            "pyarrow/__init__.py": "class Table:\n    from_pydict = staticmethod(lambda columns: columns)\n",
            "pyarrow/parquet.py": "import json\ndef write_table(table, path, row_group_size):\n"
            "    json.dump(table, open(path, 'w'))\n",
        },
    )


@pytest.fixture
def around(tmp_path, monkeypatch):
    """A folder with a text, our trainer's double and a record of what was called."""
    write_text(tmp_path / "text.txt")
    (tmp_path / "ours.py").write_text(OURS)
    monkeypatch.setattr(common, "TRAINER", tmp_path / "ours.py")
    monkeypatch.setattr(gpt.Checkout, "modules", ("torch", "numpy"))
    monkeypatch.setattr(chat.Checkout, "modules", ("torch", "pyarrow", "rustbpe", "wandb"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path


@pytest.fixture
def quick(around, monkeypatch):
    """The same without starting torch: nanoGPT's loss is 5."""
    found = dict(loss=5.0, steps=35, params=804096, val_units=9726, val_targets=9725)
    monkeypatch.setattr(gpt.Checkout, "evaluate", lambda self, task: found)
    monkeypatch.setattr(gpt.Checkout, "modules", ())
    monkeypatch.setattr(chat.Checkout, "modules", ("pyarrow", "rustbpe", "wandb"))
    monkeypatch.setattr(gpt, "SHAPE_TURNS", 1)
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
    (around / "text.txt").write_bytes(
        text.replace("\n", "\r\n").encode()
    )  # nanoGPT reads line ends as one character
    assert (
        main(
            [
                "peers",
                "--nanogpt",
                str(checkout),
                "--text",
                str(around / "text.txt"),
                "--rounds",
                "2",
                "--scale",
                "50",
                "--n-layer",
                "3",
                "--json",
                str(out),
                "--table",
                str(table),
            ]
        )
        == 0
    )
    result = json.loads(out.read_text())
    assert {
        p: p.read_bytes() for p in checkout.rglob("*") if p.is_file()
    } == before  # the checkout is only read

    # everything in the order of the rounds, without GPUs
    made = calls(around)
    kinds = [
        line.split()[0]
        + (" shape" if "--value-embed-layers" in line or "eval_iters=1 " in line else "")
        for line in made
    ]
    assert kinds == 2 * (["nanogpt", "ours", "ours"] + 4 * ["nanogpt shape", "ours shape"])
    assert all(line.endswith("gpu=''") for line in made)
    assert (
        "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=40 --lr_decay_iters=40"
        in made[0]
        and "--eval_interval=5" in made[0]
    )

    # its loss on every character but the first, and that loss for us
    there, ids = result["peers"]["nanogpt"], list(map(sorted(set(text)).index, text))
    val = ids[int(len(ids) * 0.9) :]
    loss = bigram_loss(val[:-1], val[1:], 30)
    for row in there["rounds"]:
        assert (
            row["peer"]["loss"] == pytest.approx(loss, rel=1e-5)
            and row["peer"]["val_targets"] == len(val) - 1
        )
        assert row["peer"]["val_units"] == len(val)
        assert (
            row["first"]["cold_start_s"] == 60 and row["again"]["cold_start_s"] == 5
        )  # caches empty, then filled
        assert (
            row["first"]["target"] == pytest.approx(loss, abs=1e-5)
            and row["again"]["dtype"] == "bfloat16"
        )
        # of its 40 steps the clock takes the 35 up to the checkpoint, less the first
        assert row["peer"]["steps"] == 35 and row["peer"]["train_time_s"] == pytest.approx(
            34 * 0.040
        )
        assert (
            row["peer"]["ms_per_step"] == pytest.approx(40) and row["peer"]["own_estimate"] == 2.65
        )
        assert row["peer"]["all_steps_s"] == pytest.approx(35 * 0.040)
    assert result["split"] == dict(peers=len(val), ours=len(val), same=True)
    assert there["ratios"]["training"] == pytest.approx(
        34 * 0.040 / 2.0
    )  # 20 of our steps take 2 s
    assert there["ratios"]["interpolated"] == pytest.approx(34 * 0.040 / 1.75)
    assert there["ratios"]["again"] == pytest.approx(
        sum(r["peer"]["process_s"] for r in there["rounds"])
        / sum(r["again"]["process_s"] for r in there["rounds"])
    )

    shape = result["equal_shape"]
    assert {way: len(ms) for way, ms in shape["ms"].items()} == dict.fromkeys(
        ("nanoGPT", "ours", "nanoGPT, --compile=True", "ours, float32"), 4
    )
    assert shape["median_ms"] == pytest.approx(
        {"nanoGPT": 40, "ours": 100, "nanoGPT, --compile=True": 40, "ours, float32": 200}
    )
    assert shape["us_per_token"]["ours"] == pytest.approx(1e5 / 768) and not shape["errors"]
    err = capsys.readouterr().err
    assert (
        table.read_text() in err
        and "| ours, float32 | 200.00 |" in err
        and "training 0.7 (0.8 by a line" in err
    )
    assert "not a measurement" in err and "`--n-layer 3`" in err and "round 2 of 2" in err


def fed(folder):
    """What nanochat was given last: pieces by split."""
    return json.loads((folder / "calls.fed").read_text())


def byte_loss(texts, length, pairs=False):
    """Summed nats of nanochat's double on these documents in windows of this length, and the
    number of targets."""
    nats = n = 0
    for text in texts:
        ids = tokenizer(pairs).encode(text)
        inputs = [0 if i % length == 0 else ids[i - 1] for i in range(len(ids))]
        nats, n = nats + bigram_loss(inputs, ids, 600) * len(ids), n + len(ids)
    return nats, n


def tokenizer(pairs):
    namespace = {}
    exec(TOKENIZER, namespace)
    return namespace["Tokenizer"](pairs)


def test_nanochat_and_ours(around):
    text = (
        around / "text.txt"
    ).read_text() + "Wörter, größer, über; " * 50  # in the validation split
    (around / "text.txt").write_text(text)
    result = peers.run(around / "text.txt", nanochat=nanochat(around / "checkout"), scale=10)
    there, val = result["peers"]["nanochat"], text[int(len(text) * 0.9) :]
    row, size = there["rounds"][0]["peer"], len(val.encode())
    losses = {str(length): byte_loss([val], length)[0] / len(val) for length in (64, 256)}
    assert row["loss_by_window"] == pytest.approx(losses, rel=1e-5)
    assert row["loss"] == min(row["loss_by_window"].values())
    assert row["val_units"] == len(val) < row["val_targets"] == size
    assert row["steps"] == 200 and row["train_time_s"] == pytest.approx(189 * 0.050, abs=1e-6)
    assert row["all_steps_s"] == pytest.approx(200 * 0.050, abs=1e-6) and row["dtype"] is None
    assert (
        row["own_metric"] == "val_bpb" and row["own_estimate"] == row["own_estimates"][200] == 2.0
    )
    assert there["ratios"]["training"] == pytest.approx(189 * 0.050 / 2.0)
    assert (
        there["ratios"]["first"] > 0 and there["ratios"]["again"] is None
    )  # it would start faster the next time
    assert result["equal_shape"] is None
    made = calls(around)
    assert [line.split()[0] for line in made] == ["tok_train", "nanochat", "ours", "ours"]
    assert "--vocab-size=265" in made[0] and all(
        f" {flag} " in made[1]
        for flag in (
            "--depth=4",
            "--aspect-ratio=32",
            "--head-dim=32",
            "--max-seq-len=64",
            "--device-batch-size=12",
            "--total-batch-size=768",
            "--num-iterations=200",
            "--eval-every=25",
        )
    )
    assert result["torch"] == dict(ours=torch.__version__, nanochat=torch.__version__)
    # all of the text in full rows; what it trains on, not as neighbours
    train = list(chat.pieces(text[: -len(val)], tokenizer(False), 64))
    assert "".join(fed(around)["val"]) == val and fed(around)["train"] != train
    assert sorted(fed(around)["train"]) == sorted(train)
    places = list(map(train.index, fed(around)["train"]))
    assert sum(b == a + 1 for a, b in zip(places, places[1:])) < len(train) / 20
    # ours divides by bytes, theirs by characters
    assert not result["split"]["same"] and "others in ours" in peers.render(result)


@pytest.fixture
def stdlib(around, monkeypatch):
    """A library of 6 files instead of Python's."""
    library = around / "library"
    library.mkdir()
    for i in range(6):
        write_text(library / f"{i}.py", 4000, seed=i)
    monkeypatch.setattr(chat.Checkout, "modules", ("pyarrow", "rustbpe", "wandb"))
    real = data.open_dataset
    monkeypatch.setattr(
        runtime.corpus,
        "open_dataset",
        lambda config, cache: real(
            dataclasses.replace(config, data="text", text=str(library)), cache
        ),
    )
    return library


SMALL = "--tokenizer bpe:300 --batch-tokens 256 --val-tokens 1000".split()  # of our trainer


def test_laptop(around, stdlib, monkeypatch, capsys):
    checkout, out, table = nanochat(around / "checkout"), around / "out.json", around / "table.md"
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    monkeypatch.setenv("UNIFORM_AT", "1024")  # which is better than what its double predicts
    assert (
        main(
            [
                "peers",
                "--nanochat",
                str(checkout),
                "--laptop",
                "--scale",
                "10",
                "--nanochat-options",
                "num-iterations=300",
                "matrix-lr=0.04",
                *SMALL,
                "--json",
                str(out),
                "--table",
                str(table),
            ]
        )
        == 0
    )
    result = json.loads(out.read_text())
    there = result["peers"]["nanochat"]
    row, first = there["rounds"][0]["peer"], there["rounds"][0]["first"]

    # its tokenizer has as many tokens as ours, and its special ones; the options given win
    made = calls(around)
    assert [line.split()[0] for line in made] == ["tok_train", "nanochat", "ours", "ours"]
    assert "--vocab-size=309 --doc-cap=1000000000" in made[0] and all(
        f" {flag} " in made[1]
        for flag in (
            "--aspect-ratio=64",
            "--head-dim=64",
            "--max-seq-len=256",
            "--total-batch-size=8192",
            "--num-iterations=30",
            "--eval-every=10",
            "--matrix-lr=0.04",
        )
    )
    assert "--num-iterations=30 " in there["command"] and "--matrix-lr=0.04" in there["command"]
    assert f"{' '.join(SMALL)} --track laptop --target {row['loss']:.6f}" in made[2]

    # the documents that we train on, and the text that we validate on
    with tempfile.TemporaryDirectory() as cache:
        config = data.DataConfig(data="text", text=str(stdlib), tokenizer="bpe:300")
        dataset = data.open_dataset(config, cache)
        ids = data.read_shard(dataset.val[0])[1:1001].tolist()
        texts = [dataset.tokenizer.decode(part) for part in split_at(ids, dataset.eot)]
        n_bytes = int(dataset.tokenizer.token_bytes[ids].sum())
        train = [
            part
            for path in dataset.train
            for part in split_at(data.read_shard(path).tolist(), dataset.eot)
        ]
        train = [dataset.tokenizer.decode(part) for part in train]
    assert len(train) == 6 and all(
        any(p.read_text().startswith(text) for p in stdlib.iterdir()) for text in train
    )
    assert "".join(fed(around)["val"]) == "".join(texts) and len("".join(texts).encode()) == n_bytes
    expected = [piece for text in train for piece in chat.pieces(text, tokenizer(True), 256)]
    assert sorted(fed(around)["train"]) == sorted(expected) and fed(around)["train"] != expected
    assert result["text"] == dict(
        name="Python's standard library",
        unit="byte",
        val=n_bytes,
        train=sum(len(text.encode()) for text in train),
    )
    assert result["split"] == dict(peers=n_bytes, ours=n_bytes, same=True)

    # bits per byte, in the windows that are better
    nats, targets = byte_loss(texts, 256, pairs=True)
    assert row["loss_by_window"] == pytest.approx(
        {"256": nats / math.log(2) / n_bytes, "1024": math.log2(600) * targets / n_bytes}, rel=1e-5
    )
    assert row["loss"] == row["loss_by_window"]["1024"] < row["loss_by_window"]["256"]
    assert row["val_units"] == n_bytes > row["val_targets"] == targets
    assert row["train_time_s"] == pytest.approx(19 * 0.050) and row["own_estimates"]["10"] == 3.9
    assert row["dtype"] == "bfloat16" and there["ratios"]["training"] == pytest.approx(
        19 * 0.050 / 2
    )
    assert first["loss"] == pytest.approx(row["loss"] - 0.01, abs=1e-5)
    assert first["time_to_loss_s"] == pytest.approx(1.75)
    assert result["target"] == 1.5 and result["metric"] == "val_bpb"
    text = table.read_text()
    assert text in capsys.readouterr().err and "|  | bits/byte |" in text
    assert "nanochat in bfloat16, ours in bfloat16." in text
    assert f"The track's target is 1.5: nanochat ended {row['loss'] - 1.5:.4f} above it." in text


def split_at(ids, eot):
    """Documents in ids, without the token before each."""
    return [list(group) for mark, group in itertools.groupby(ids, lambda i: i == eot) if not mark]


def test_laptop_says_where_nanochat_ended(around, stdlib, monkeypatch):
    monkeypatch.setattr(common.Peer, "available", lambda self: dict(missing=[], torch="2"))
    found = dict(loss=1.53, steps=40, params=1, val_units=1, val_targets=1)
    monkeypatch.setattr(chat.Checkout, "evaluate", lambda self, task: found)
    monkeypatch.setenv("OURS_MISSES", "1")
    result = peers.run(
        laptop=True, nanochat=nanochat(around / "checkout"), scale=10, trainer_options=SMALL
    )
    assert "--target 1.530000" in calls(around)[-1] and "(not reached)" in peers.render(result)
    assert set(result["peers"]["nanochat"]["ratios"].values()) == {None}
    for loss, said in (
        (1.53, "nanochat ended 0.0300 above it. The times are to its loss;"),
        (1.5, "nanochat ended 0.0000 below it."),
        (1.48, "nanochat ended 0.0200 below it."),
    ):
        result["peers"]["nanochat"]["medians"]["peer"]["loss"] = loss
        assert f"The track's target is 1.5: {said}" in peers.render(result)


def test_laptop_is_the_tracks_shape():
    c = subject.parse(["--track", "laptop-deep"])
    flags = chat.LAPTOP
    assert (c.n_layer, c.n_embd, c.n_embd // c.n_head, c.row_len, c.batch_tokens, c.val_tokens) == (
        flags["depth"],
        flags["depth"] * flags["aspect-ratio"],
        flags["head-dim"],
        flags["max-seq-len"],
        (flags["total-batch-size"],),
        flags["eval-tokens"],
    )
    assert flags["device-batch-size"] * flags["max-seq-len"] == flags["total-batch-size"]
    easier = subject.parse(["--track", "shakespeare-char-cpu", "--text", "x"])
    for track in (c, easier):
        assert track.val_row_len == chat.LONGER * track.row_len
    assert easier.row_len == chat.SHAKESPEARE["max-seq-len"]


def test_a_missing_package_skips_that_peer_only(quick, monkeypatch, capsys):
    (nanochat(quick / "chat") / "rustbpe.py").unlink()
    monkeypatch.setenv("NO_COMPILER", "1")  # and a way of running the shape that fails is left out
    result = peers.run(
        quick / "text.txt", nanogpt=nanogpt(quick / "gpt"), nanochat=quick / "chat", scale=50
    )
    reason = result["peers"]["nanochat"]["skipped"]
    assert reason == (
        f"skipped, because {sys.executable} cannot import rustbpe (ModuleNotFoundError: "
        "No module named 'rustbpe')"
    )
    assert result["peers"]["nanogpt"]["ratios"]["training"] and reason in peers.render(result)
    assert "nanoGPT, --compile=True" not in result["equal_shape"]["median_ms"]
    assert result["equal_shape"]["errors"]["nanoGPT, --compile=True"].endswith(
        "status 1: RuntimeError: no compiler"
    )

    assert (
        main(["peers", "--nanochat", str(quick / "chat"), "--text", str(quick / "text.txt")]) == 2
    )
    assert capsys.readouterr().err.splitlines()[-1] == f"error: nanochat: {reason}"


@pytest.mark.parametrize(
    "break_it, message",
    [
        (
            lambda checkout, env: (checkout / "train.py").write_text(
                "print(1)\nraise ValueError('too deep')\n"
            ),
            "nanogpt: training ended with status 1: ValueError: too deep",
        ),
        (
            lambda checkout, env: (checkout / "train.py").write_text(
                "print('step 0: train loss 2.0, val loss 9.0')"
            ),
            "nanogpt: its log has no validation with a time at step 35",
        ),
        (
            lambda checkout, env: (checkout / "train.py").write_text("print('hello')"),
            "it begins with 'hello'",
        ),
        (
            lambda checkout, env: (checkout / "data/shakespeare_char/prepare.py").write_text(
                "import sys; sys.exit(5)"
            ),
            "nanogpt: prepare.py ended with status 5: it said nothing",
        ),
        (
            lambda checkout, env: env("OURS_FAILS", "1"),
            "our trainer, to nanogpt's loss ended with status 2: --text FILE: has no text in it",
        ),
    ],
)
def test_what_fails_says_why(quick, monkeypatch, capsys, break_it, message):
    break_it(nanogpt(quick / "checkout"), monkeypatch.setenv)
    assert (
        main(
            [
                "peers",
                "--nanogpt",
                str(quick / "checkout"),
                "--text",
                str(quick / "text.txt"),
                "--scale",
                "50",
            ]
        )
        == 2
    )
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: nanogpt: ") and message in last


def test_a_loss_that_we_miss_has_no_ratio(quick, monkeypatch):
    monkeypatch.setenv("OURS_MISSES", "1")
    result = peers.run(quick / "text.txt", nanogpt=nanogpt(quick / "checkout"), scale=50)
    assert result["peers"]["nanogpt"]["ratios"] == dict.fromkeys(
        ("training", "interpolated", "first", "again")
    )
    assert "9.0000 (not reached)" in peers.render(
        result
    ) and "training – (– by a line" in peers.render(result)


def test_ratios_of_medians():
    def side(process, training=1.0, reached=True):
        return dict(
            process_s=process,
            train_time_s=training,
            reached=reached,
            ms_per_step=None,
            time_to_loss_s=training / 2,
        )

    rounds = [
        dict(peer=side(p, 10.0), first=side(f, 2.0), again=side(a, 4.0))
        for p, f, a in ((10, 5, 1), (30, 6, 2), (20, 1, 90))
    ]
    got = peers.summarise(rounds, compiled=False)
    assert got["ratios"] == dict(training=10 / 3, interpolated=20 / 3, first=4.0, again=10.0)
    assert got["medians"]["again"] == dict(process_s=2, train_time_s=4.0, time_to_loss_s=2.0)
    assert peers.summarise(rounds, compiled=True)["ratios"] == got["ratios"] | dict(again=None)
    rounds[1]["again"]["reached"] = False  # one is enough
    assert set(peers.summarise(rounds, compiled=False)["ratios"].values()) == {None}


def test_a_training_that_never_improves_has_no_checkpoint(around, monkeypatch):
    monkeypatch.setenv("NO_TORCH", "1")
    peer = gpt.Checkout(nanogpt(around / "checkout"), sys.executable, 50)
    with pytest.raises(InputError, match="nanogpt: training left no checkpoint"):
        peer.train(common.TextFile(around / "text.txt", around), around / "work")


def test_a_failure_keeps_the_rounds_before_it(quick, monkeypatch):
    saved, one_round = [], peers.one_round

    def once(peer, *args):
        if saved:
            raise InputError("out of luck")
        return one_round(peer, *args)

    monkeypatch.setattr(peers, "one_round", once)
    result = peers.run(
        quick / "text.txt",
        nanogpt=nanogpt(quick / "checkout"),
        rounds=3,
        scale=50,
        save=saved.append,
    )
    there = result["peers"]["nanogpt"]
    assert (
        len(there["rounds"]) == 1
        and there["ratios"]["training"]
        and there["skipped"] == "out of luck"
    )
    assert (
        len(saved) == 2
        and "out of luck" in peers.render(result)
        and len(result["equal_shape"]["ms"]["ours"]) == 1
    )


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("", "nothing to run: give the checkout of a peer"),
        ("--nanogpt .", "--nanogpt .: has no train.py: expected a checkout of nanogpt"),
        ("--nanochat CHECKOUT", "has no scripts/base_train.py: expected a checkout of nanochat"),
        ("--nanogpt CHECKOUT --rounds 0", "--rounds 0: expected 1 or more"),
        ("--nanogpt CHECKOUT --scale 0", "--scale 0: expected 1 or more"),
        ("--nanogpt CHECKOUT --python no-such-python", "--python no-such-python: no such program"),
        (
            "--nanogpt CHECKOUT --text missing.txt",
            "--text missing.txt: No such file or directory; expected a file of text",
        ),
        ("--modded . --laptop", "--modded .: has no train_gpt.py"),
        (
            "--nanochat CHAT --laptop",
            "--laptop compares with nanochat, on Python's standard library: leave out --text and",
        ),
        (
            "--nanogpt CHECKOUT --nanochat-options depth=3",
            "--nanochat-options: expected --nanochat PATH, too",
        ),
        ("--nanogpt CHECKOUT --laptop", "--laptop: expected --nanochat PATH, too"),
        (
            "--nanochat CHAT --nanochat-options width=3",
            "--nanochat-options width=3: expected NAME=VALUE with an option of",
        ),
        (
            "--nanochat CHAT --nanochat-options depth",
            "--nanochat-options depth: expected NAME=VALUE",
        ),
        (
            "--nanochat CHAT --nanochat-options max-seq-len=x",
            "max-seq-len=x: expected a number of 8 or more",
        ),
        (
            "--nanochat CHAT --nanochat-options max-seq-len=7",
            "max-seq-len=7: expected a number of 8 or more",
        ),
        (
            "--nanochat CHAT --nanochat-options num-iterations=0",
            "num-iterations=0: expected a number of 1 or more",
        ),
        ("--nanogpt CHECKOUT --text SHORT", "19,999 characters; expected 20,000 or more"),
        ("--nanogpt CHECKOUT --text LATIN", "not UTF-8; expected a file of text"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(around, monkeypatch, capsys, wrong, message):
    monkeypatch.setattr(common, "execute", lambda *_, **__: pytest.fail("ran something"))
    monkeypatch.chdir(around)
    (around / "short.txt").write_text("x" * 19_999)
    (around / "latin.txt").write_bytes("ä".encode("latin-1") * 30_000)
    for name, path in (
        ("CHECKOUT", nanogpt(around / "checkout")),
        ("CHAT", nanochat(around / "chat")),
        ("SHORT", around / "short.txt"),
        ("LATIN", around / "latin.txt"),
    ):
        wrong = wrong.replace(name, str(path))
    assert main(["peers", "--text", str(around / "text.txt"), *wrong.split()]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not calls(around)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("--laptop", "nothing to run: give the checkout of a peer"),
        (
            "--nanochat CHAT",
            "--text FILE is missing: expected what all are to train on, or --laptop",
        ),
        ("--nanochat CHAT --laptop --nanogpt GPT", "leave out --text and other peers"),
        (
            "--nanochat CHAT --laptop --tokenizer bytes",
            "expected our trainer on stdlib with --tokenizer bpe:N and "
            "--target-metric val_bpb; found stdlib, bytes and val_bpb",
        ),
        (
            "--nanochat CHAT --laptop --target-metric val_loss",
            "found stdlib, bpe:4096 and val_loss",
        ),
        ("--nanochat CHAT --laptop --data fineweb10B", "found fineweb10B, bpe:4096"),
        ("--nanochat CHAT --laptop --no-such-option 1", "--no-such-option"),
    ],
)
def test_bad_input_for_laptop(around, monkeypatch, capsys, wrong, message):
    monkeypatch.setattr(common, "execute", lambda *_, **__: pytest.fail("ran something"))
    wrong = wrong.replace("CHAT", str(nanochat(around / "chat"))).replace(
        "GPT", str(nanogpt(around / "gpt"))
    )
    assert main(["peers", *wrong.split()]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not calls(around)


@given(
    st.text(alphabet="aabbé ñ中\U0001f642\n", max_size=300) | st.text(max_size=300),
    st.integers(4, 70),
    st.booleans(),
)
def test_pieces_are_whole_characters_and_all_of_the_text(text, size, pairs):
    text = text.encode(errors="replace").decode()
    parts = list(chat.pieces(text, tokenizer(pairs), size))
    lengths = [len(tokenizer(pairs).encode(part)) for part in parts]
    assert "".join(parts) == text and all(0 < n <= size for n in lengths)
    assert all(
        n > size - 4 for n in lengths[:-1]
    )  # no more is missing than what a character may take


@given(st.integers(1, 200), st.integers(1, 70))
def test_windows_lose_nothing(n, length):
    rows = common.windows(range(n), length)
    assert rows.shape == (math.ceil(n / length), length)
    assert rows.flatten().tolist() == [*range(n)] + [-1] * (-n % length)


def test_the_split_is_nanogpts(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(30_007))
    (tmp_path / "text.txt").write_text(text)
    assert common.our_split(tmp_path / "text.txt") == common.split(text)[1] == text[27_006:]


def test_our_trainer_takes_the_options(tmp_path):
    text = write_text(tmp_path / "text.txt")
    task = common.TextFile(text, tmp_path)
    c = subject.parse(common.our_options(task, 1.9, ["--n-head", "2", "--no-compile"]))
    assert (c.track, c.text, c.target, c.target_metric, c.n_head) == (
        "shakespeare-char-cpu",
        str(text),
        1.9,
        "val_loss",
        2,
    )
    assert c.tokenizer == "chars" and not c.compile
    c = subject.parse(
        [
            str(a)
            for a in gpt.our_shape(text, ["--no-compile", "--n-layer", "9"], "--dtype", "float32")
        ]
    )
    assert (c.n_layer, c.n_embd, c.n_head, c.mlp_ratio, c.row_len, c.batch_tokens) == (
        4,
        128,
        4,
        4,
        64,
        (768,),
    )
    assert (c.steps, c.max_doc_len, c.long_window, c.short_window) == (
        60,
        (64,),
        (64,),
        (64,),
    ) and not c.compile
    assert c.dtype == "float32" and c.value_embed_layers == () and c.n_gram == 1


def test_a_command_that_is_interrupted_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "say", lambda line: (_ for _ in ()).throw(KeyboardInterrupt))
    child = "import time\nprint('begun', flush=True)\ntime.sleep(60)"
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    with pytest.raises(KeyboardInterrupt):
        process.execute(
            "child", [sys.executable, "-c", child], tmp_path, tmp_path / "log", None, every=0
        )
    assert started[0].poll() is not None


def test_commit(tmp_path):
    peer = gpt.Checkout(nanogpt(tmp_path / "checkout"), sys.executable, 1)
    assert peer.commit() is None
    if shutil.which("git"):
        git = ["git", "-C", str(tmp_path / "checkout"), "-c", "user.name=n", "-c", "user.email=e"]
        for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "m"]):
            subprocess.run(git + command, check=True)
        assert re.fullmatch(r"[0-9a-f]{40}", peer.commit())
    assert peer.steps == 2000 and not any(
        "eval_interval" in a for a in peer.command()
    )  # as in its README
    with pytest.raises(InputError, match="has no train.py"):
        gpt.Checkout(tmp_path, sys.executable, 1)


# --- modded-nanogpt

# the settings as modded-nanogpt writes them, with few steps; its kernels and its GPU are left out
MODDED = """
import os, sys
from dataclasses import dataclass
with open(sys.argv[0]) as f:
    code = f.read()
from kernels import get_kernel

def block():
    flash = get_kernel('kernels-community/flash-attn3', version=1).flash_attn_interface

@dataclass(slots=True)
class Hyperparameters:
    data_path = os.environ.get("DATA_PATH", ".")
    train_files: str = os.path.join(data_path, "data/fineweb10B/fineweb_train_*.bin")
    val_tokens: int = 10485760 # fixed
    num_scheduled_iterations: int = 9  # number of steps
    num_extension_iterations: int = 1
    run_id: str = "abc"
    val_loss_every: int = 3  # every how many steps

args = Hyperparameters()

class TrainingStage:
    def __init__(self, **kw): self.__dict__.update(kw)

TRAINING_STAGES = [
    TrainingStage(duration=1/3, train_max_seq_len=896, batch_size=8 * 2048 * 8, window_sizes=(1, 3), lr_mul=1.0),
    TrainingStage(duration=1/3, train_max_seq_len=2048, batch_size=16 * 2048 * 8, window_sizes=(3, 7), lr_mul=1.52),
    TrainingStage(duration=1/3, train_max_seq_len=2048, batch_size=24 * 2048 * 8, window_sizes=(5, 11), lr_mul=1.73),
    TrainingStage(train_max_seq_len=2048, batch_size=24 * 2048 * 8, window_sizes=(6, 13), lr_mul=1.0),
]
import glob, json
with open(os.environ["CALLS"], "a") as f:
    shards = sorted(map(os.path.basename, glob.glob(args.train_files)))
    f.write(f"modded {' '.join(sys.argv)} gpu={os.environ.get('CUDA_VISIBLE_DEVICES')!r} {' '.join(shards)}\\n")
rounds = len([c for c in open(os.environ["CALLS"]) if c.startswith("modded")])
if os.environ.get("MODDED_FAILS") and rounds == int(os.environ["MODDED_FAILS"]):
    raise RuntimeError("CUDA error: out of luck")
sched, total = args.num_scheduled_iterations, args.num_scheduled_iterations + args.num_extension_iterations
os.makedirs("logs", exist_ok=True)
out = open(f"logs/{args.run_id}.txt", "w")
def print0(s):
    print(s), print(s, file=out, flush=True)
print0(code)
print0("=" * 100)
print0("|   0  NVIDIA H100 80GB HBM3          On  |")
print0("=" * 100)
ms = 0.0
for step in range(total + 1):
    if step == total or step % args.val_loss_every == 0:
        print0(f"step:{step}/{total} val_loss:{10 - 0.5 * step:.4f} train_time:{ms:.0f}ms step_avg:1.00ms")
    if step == total:
        break
    stage = TRAINING_STAGES[min(3, 3 * step // sched)]
    ms += stage.batch_size * rounds * (0.002 if stage.lr_mul == 1.0 else 0.001)  # 2 us a token, or 1
    print0(f"step:{step + 1}/{total} train_time:{max(0, ms - 50):.0f}ms step_avg:1.00ms")  # the host is ahead
print0("peak memory allocated: 30220 MiB reserved: 38672 MiB")
"""

# ours: 500 ns a token; loss 10 - step / 4 after thirds of a short run; 10 - step / 120 in a long
# one, until the target
OURS_MODDED = (
    "name = 'ours'"
    + CALLED.replace("['CUDA_VISIBLE_DEVICES']", ".get('CUDA_VISIBLE_DEVICES')")
    + """
import json, pathlib
def option(name):
    return sys.argv[len(sys.argv) - sys.argv[::-1].index(name)]  # the last one counts
run, steps, target = pathlib.Path(option("--run-dir")), int(option("--steps")), float(option("--target"))
run.mkdir()
sizes, lines, seconds, reached = [131072, 262144, 393216], [], 0.0, False
for step in range(1, steps + 1):
    seconds += 5e-7 * sizes[(step - 1) * 3 // steps]
    loss = 10 - step / (4000 if os.environ.get("OURS_MISSES") else 4 if steps < 100 else 120)
    if step == steps or step % (max(1, steps // 3) if steps < 100 else int(option("--eval-every"))) == 0:
        lines.append(dict(step=step, val_loss=loss, train_time=seconds))
        reached = loss <= target
        if reached: break
config = dict(track="gpt2-small", steps=steps, target=target)
(run / "config.json").write_text(json.dumps(dict(environment=dict(dtype="bfloat16"), config=config)))
(run / "metrics.jsonl").write_text("\\n".join(map(json.dumps, lines)))
(run / "result.json").write_text(json.dumps(dict(val_loss=loss, target=target, reached=reached, steps=step,
                                                 train_time_s=seconds)))
sys.exit(0 if reached else 3)
"""
)

LAUNCHER = """
import runpy, sys
assert sys.argv[1] == "--nproc_per_node=2", sys.argv
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
MODDED_TOKENS = 3 * 131072 + 3 * 262144 + 4 * 393216


@pytest.fixture
def hopper(tmp_path, monkeypatch):
    """A checkout of modded-nanogpt's double, ours, two Hopper GPUs and shards that suffice."""
    write_files(
        tmp_path / "checkout",
        {
            "train_gpt.py": MODDED,
            "triton_kernels.py": "",
            "launch.py": LAUNCHER,
            "records/big.txt": "",
            "data/x.py": "",
            "data/fineweb10B/fineweb_train_000099.bin": "",
            "torch.py": "__version__ = '2.10'",
            "triton.py": "",
            "tiktoken.py": "def get_encoding(name): pass\n",
            "kernels.py": "import types\ndef get_kernel(name, version):\n"
            "    return types.SimpleNamespace(flash_attn_interface=None)\n",
        },
    )
    monkeypatch.setattr(modded, "LAUNCH", ("launch.py",))
    monkeypatch.setattr(modded, "usable_gpus", lambda asked=0: (2, "NVIDIA H100"))
    (tmp_path / "ours.py").write_text(OURS_MODDED)
    monkeypatch.setattr(common, "TRAINER", tmp_path / "ours.py")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    def open_dataset(config, cache):
        assert config.data == "fineweb10B"
        folder = tmp_path / "shards"
        if not folder.exists():
            for split, sizes in (("train", [2_000_000, 1_400_000]), ("val", [1000])):
                with data.ShardWriter(folder, split, shard_tokens=2_000_000) as writer:
                    writer.write(np.zeros(sum(sizes), dtype=np.uint16))
        train, val = (sorted(folder.glob(f"{split}_*.bin")) for split in ("train", "val"))
        return data.Dataset(
            config.data, train[: config.train_shards], val, 50257, 50256, "f", folder
        )

    monkeypatch.setattr(data, "open_dataset", open_dataset)
    return tmp_path


def test_modded_and_ours_in_turns(hopper, capsys):
    out, table = hopper / "out.json", hopper / "out.md"
    before = {p: p.read_bytes() for p in (hopper / "checkout").rglob("*") if p.is_file()}
    assert (
        main(
            [
                "peers",
                "--modded",
                str(hopper / "checkout"),
                "--rounds",
                "2",
                "--muon-lr",
                "0.02",
                "--steps",
                "2600",
                "--extension",
                "0",
                "--json",
                str(out),
                "--table",
                str(table),
            ]
        )
        == 0
    )
    assert {p: p.read_bytes() for p in (hopper / "checkout").rglob("*") if p.is_file()} == before
    result = json.loads(out.read_text())
    assert result["recipe"]["tokens"] == MODDED_TOKENS and result["gpus"] == 2
    assert [(s["start"], s["end"], s["tokens"]) for s in result["recipe"]["stages"]] == [
        (0, 3, 131072),
        (3, 6, 262144),
        (6, 9, 393216),
        (9, 10, 393216),
    ]
    assert result["recipe"]["stages"][1]["windows"] == [384, 896] and result["recipe"]["kernel"][
        1
    ] == dict(version=1)

    made = calls(hopper)
    assert [line.split()[0] for line in made] == ["modded", "ours", "ours"] * 2
    # exactly our shards, under its names; the GPUs that we were given
    assert all(
        line.endswith("train_gpt.py gpu='0,1' fineweb_train_000000.bin fineweb_train_000001.bin")
        for line in made[::3]
    )
    assert (
        "--gpus 2 --steps 11 --extension 0 --eval-every 250 --target 0" in made[1]
        and "--muon-lr 0.02" in made[1]
    )
    assert "--steps 2600 --extension 0 --eval-every 250 --target 5.000000" in made[2] and made[
        2
    ].endswith("gpu='0,1'")

    first, second = result["rounds"]
    # 2 us a token in the first stage and the extension, else 1; the second round takes twice as
    # long
    seconds = (2 * 3 * 131072 + 3 * 262144 + 3 * 393216 + 2 * 393216) / 1e6
    assert first["peer"]["train_time_s"] == pytest.approx(seconds, abs=1e-3)
    assert second["peer"]["train_time_s"] == pytest.approx(2 * seconds, abs=2e-3)
    assert (
        first["peer"]["tokens"] == MODDED_TOKENS
        and first["peer"]["loss"] == 5.0
        and first["peer"]["steps"] == 10
    )
    assert [s["us_per_token"] for s in first["peer"]["stages"]] == pytest.approx(
        [2, 1, 1, 2], abs=0.01
    )
    assert first["peer"]["stages"][1]["ms_per_step"] == pytest.approx(262.144, abs=1)
    # ours has 4, 4 and 3 steps in its stages, and validates after 3, 6, 9 and 11
    assert first["equal"]["steps"] == 11 and first["equal"]["tokens"] == MODDED_TOKENS
    assert first["equal"]["loss"] == pytest.approx(7.25)
    assert [s["us_per_token"] for s in first["equal"]["stages"]] == [
        pytest.approx(0.5),
        None,
        pytest.approx(0.5),
    ]
    assert first["to_loss"]["steps"] == 750 and first["to_loss"]["loss"] == 3.75
    # 5.0 lies at step 600, between 500 and 750; all in the first of three stages of 867 steps
    assert first["to_loss"]["time_to_its_loss"] == pytest.approx(600 * 131072 * 5e-7)
    summary = result["summary"]
    assert [s["tokens"] for s in summary["stages"]] == [131072, 262144, 393216, 393216]
    assert summary["stages"][0]["ratio"] == pytest.approx(dict(median=6, least=4, most=8), rel=0.01)
    assert summary["stages"][1]["ratio"] is None
    assert summary["stages"][2]["ratio"]["median"] == pytest.approx(3, rel=0.01)
    assert (
        summary["loss_difference"] == dict(median=2.25, least=2.25, most=2.25)
        and summary["reached"] == 2
    )
    ours = first["to_loss"]["time_to_its_loss"]
    assert summary["to_its_loss"] == pytest.approx(
        dict(median=1.5 * seconds / ours, least=seconds / ours, most=2 * seconds / ours), rel=1e-3
    )
    text = table.read_text()
    assert (
        text in capsys.readouterr().err
        and "+2.2500 from its own" in text
        and "`--muon-lr 0.02 --" in text
    )
    assert "| 2 | 3–6 | 262,144 | 1.5" in text and f"| {MODDED_TOKENS:,} | 5.0000 | " in text


def test_modded_with_fewer_steps_is_no_measurement(hopper):
    source = MODDED.replace("iterations: int = 9", "iterations: int = 90").replace(
        "every: int = 3", "every: int = 30"
    )
    (hopper / "checkout/train_gpt.py").write_text(source)
    result = peers.run(
        modded=hopper / "checkout",
        scale=10,
        trainer_options=["--steps", "2600", "--extension", "20"],
    )
    assert result["recipe"]["steps"] == 10 and result["recipe"]["eval_every"] == 3
    assert (hopper / "checkout/train_gpt.py").read_text() == source
    assert "--steps 260 --extension 2 --eval-every 25 --target 5.000000" in calls(hopper)[2]
    assert "not a measurement" in peers.render(result)
    (hopper / "checkout/train_gpt.py").write_text(
        source + "\nclass Other:\n    val_loss_every: int = 5\n"
    )
    with pytest.raises(
        InputError, match="--scale: val_loss_every is set 2 times .* expected once: take commit"
    ):
        peers.run(modded=hopper / "checkout", scale=10)


def test_with_as_many_steps_one_run_of_ours_serves_for_both(hopper):
    result = peers.run(
        modded=hopper / "checkout", trainer_options=["--steps", "11", "--extension", "0"]
    )
    assert [line.split()[0] for line in calls(hopper)] == [
        "modded",
        "ours",
    ] and "--target 0" in calls(hopper)[1]
    assert result["rounds"][0]["equal"] == result["rounds"][0]["to_loss"]
    assert result["summary"]["to_its_loss"] is None  # 7.25 is not 5


def test_modded_losses_that_we_miss_and_rounds_that_fail(hopper, monkeypatch):
    monkeypatch.setenv("OURS_MISSES", "1")
    monkeypatch.setenv("MODDED_FAILS", "2")
    saved = []
    result = peers.run(
        modded=hopper / "checkout", rounds=3, save=lambda r: saved.append(json.dumps(r))
    )
    assert len(result["rounds"]) == len(saved) == 1 and result["summary"]["to_its_loss"] is None
    assert (
        result["stopped"]
        == "modded: training ended with status 1: RuntimeError: CUDA error: out of luck"
    )
    text = peers.render(result)
    assert (
        "(not reached)" in text
        and "it takes – times our training time (reached in 0 of 1 rounds)" in text
    )
    assert "Stopped: modded: training" in text
    monkeypatch.setenv("MODDED_FAILS", "3")  # in the first round of all
    with pytest.raises(InputError, match="out of luck"):
        peers.run(modded=hopper / "checkout")


@pytest.mark.parametrize(
    "options, breaks, message",
    [
        ("", dict(), None),
        ("--text x", {}, "--modded runs by itself, on GPUs and FineWeb: leave out --text"),
        ("--python no-such-python", {}, "--python no-such-python: no such program"),
        ("--rounds 0", {}, "--rounds 0: expected 1 or more"),
        ("--data stdlib", {}, "expected our trainer on fineweb10B with --val-tokens 10485760"),
        (
            "--val-tokens 1048576",
            {},
            "expected our trainer on fineweb10B with --val-tokens 10485760",
        ),
        (
            "--train-shards 1",
            {},
            "--train-shards 1: 2,000,000 tokens; modded-nanogpt needs 2 shards or more",
        ),
        ("", {"train_gpt.py": None}, "has no train_gpt.py: expected a checkout of modded"),
        (
            "",
            {"train_gpt.py": "x ="},
            "its steps, stages or kernel are not written as expected: take commit f411b3d3",
        ),
        (
            "",
            {"train_gpt.py": MODDED.replace("window_sizes=(1, 3), ", "")},
            "are not written as expected",
        ),
        (
            "",
            {"train_gpt.py": MODDED.replace("duration=1/3", "duration=1/2")},
            "are not written as expected",
        ),
        (
            "",
            {"train_gpt.py": MODDED.replace("8 * 2048", "open('x')")},
            "are not written as expected",
        ),
        (
            "",
            {"triton_kernels.py": 'x = f(\n    cuda_include_dirs=["/no/such/include/"],\n)'},
            "CUDA's headers in /no/such/include/, which is not there: install the CUDA toolkit",
        ),
        (
            "",
            {"kernels.py": None, "torch.py": "raise OSError('libcudart')"},
            "lacks torch (OSError: libcudart); kernels (ModuleNotFoundError: No module named 'kernels')",
        ),
        (
            "",
            {
                "kernels.py": "def get_kernel(name, version):\n    raise OSError('We could not connect to the Hub')\n"
            },
            "lacks FlashAttention 3, kernels-community/flash-attn3 on the Hugging Face hub (OSError: We could not connect to "
            "the Hub), which is downloaded when it is first used: the network is needed once",
        ),
    ],
)
def test_modded_is_refused_before_it_trains(hopper, capsys, options, breaks, message):
    for name, content in breaks.items():
        if content is None:
            (hopper / "checkout" / name).unlink()
        else:
            (hopper / "checkout" / name).write_text(content)
    status = main(["peers", "--modded", str(hopper / "checkout"), *options.split()])
    last = capsys.readouterr().err.splitlines()[-1]
    if message:
        assert (
            status == 2 and last.startswith("error: --") and message in last and not calls(hopper)
        )
    else:
        assert status == 0


@pytest.mark.parametrize(
    "gpus, asked, expected",
    [
        ([], 0, "found no CUDA GPU"),
        ([("NVIDIA GeForce RTX 4090", (8, 9))], 0, "found NVIDIA GeForce RTX 4090 (8.9)"),
        (
            [("NVIDIA H100", (9, 0)), ("NVIDIA B200", (10, 0))],
            0,
            "found NVIDIA B200 (10.0), NVIDIA H100 (9.0)",
        ),
        (
            [("NVIDIA H100", (9, 0))] * 4,
            3,
            "--gpus 3: modded-nanogpt runs on 1, 2, 4 or 8 GPUs, and here are 4",
        ),
        ([("NVIDIA H100", (9, 0))] * 4, 8, "and here are 4"),
        ([("NVIDIA H100", (9, 0))] * 4, 2, (2, "NVIDIA H100")),
        ([("NVIDIA H200", (9, 0))] * 7, 0, (4, "NVIDIA H200")),
    ],
)
def test_modded_needs_hopper(monkeypatch, gpus, asked, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: gpus[i][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i][1])
    if isinstance(expected, tuple):
        assert modded.usable_gpus(asked) == expected
    else:
        with pytest.raises(InputError) as e:
            modded.usable_gpus(asked)
        assert expected in str(e.value)


def test_times_of_a_stage_are_from_validations_inside_it():
    labels, tokens = [0] * 4 + [1] * 6, [10] * 4 + [30] * 6
    val = [
        Point(s, None, t, 1.0)
        for s, t in ((0, 0.0), (2, 2e-5), (4, 4e-5), (5, 1.0), (6, 2.0), (10, 2.0 + 3.6e-4))
    ]
    first, second = modded.stage_times(val, tokens, labels)
    assert first == pytest.approx(dict(tokens=10, us_per_token=1.0, ms_per_step=0.01))
    assert second["us_per_token"] == pytest.approx(1e6 * (2.0 + 3.2e-4) / 180, rel=1e-6)
    first, second = modded.stage_times(
        val[:1] + val[3:4], tokens, labels
    )  # from step 0 to 5: in neither
    assert first["us_per_token"] is second["us_per_token"] is None
    first, second = modded.stage_times(
        val[2:3], tokens, labels
    )  # ours has no validation before the first step
    assert first["us_per_token"] == pytest.approx(1.0) and second["ms_per_step"] is None


def test_a_round_that_misses_the_loss_leaves_no_ratio():
    def side(**more):
        return (
            dict(loss=3.0, train_time_s=4.0, process_s=8.0, time_to_its_loss=2.0, stages=[]) | more
        )

    rounds = [
        dict(peer=side(train_time_s=8.0), equal=side(loss=3.5), to_loss=side(time_to_its_loss=t))
        for t in (2.0, 4.0)
    ]
    got = modded.summarise(rounds)
    assert (
        got["to_its_loss"] == dict(median=3.0, least=2.0, most=4.0)
        and got["reached"] == 2
        and got["process"]
    )
    assert got["equal_tokens_time"]["median"] == 2.0 and got["loss_difference"]["median"] == 0.5
    rounds[1]["to_loss"]["time_to_its_loss"] = None
    got = modded.summarise(rounds)
    assert got["to_its_loss"] is None and got["process"] is None and got["reached"] == 1


def test_gpus_are_those_we_were_given(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert (
        common.environment(gpus=True, X="1")["CUDA_VISIBLE_DEVICES"] == "3"
        and common.environment(gpus=True, X="1")["X"] == "1"
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "CUDA_VISIBLE_DEVICES" not in common.environment(gpus=True)  # empty would hide all


def test_loss_between_validations():
    curve = [(0, 0.0, 10.0), (100, 1.0, 6.0), (200, 2.0, 5.0)]
    assert [modded.loss_at(curve, n) for n in (0, 50, 100, 175, 200)] == [10, 8, 6, 5.25, 5]
    assert modded.loss_at(curve, 201) is None and modded.loss_at(curve[1:], 99) is None
    assert modded.loss_at(curve[1:2], 100) == 6.0


@settings(deadline=None, max_examples=20)
@given(st.integers(10**6, 10**9))
def test_as_many_tokens_as_steps_can_make(tokens):
    c = subject.parse(["--track", "gpt2-small"])
    mine = sum(subject.step_tokens(modded.of_length(c, modded.steps_for(c, tokens))[1]))
    assert abs(mine - tokens) <= max(131_072, 0.5 * 393_216 + 262_144)
