"""Small configurations, corpora and runs that several tests share."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import library
from safetensors.torch import load_file
from torch import nn

import train_gpt as tg
from models import gpt
from runtime.options import flat

ROOT = Path(tg.__file__).parent
WORDS = (
    "the a cat dog sees likes chases finds and but then why who red small old tree house river moon"
).split()


REMEMBERED = {
    "earlier",
    "vocabulary",
    "yarn_windows",
}  # fields of a configuration that are no options


def compiled_decoding():
    """kernels/decoding.py's library, compiled once for all tests; skips where it cannot be."""
    found = library("Decoding")
    if found is None:
        pytest.skip("no C compiler")
    return found


def built(kind, folder):
    """A Library of this kind, compiled into the folder, and what was said meanwhile; skips where
    there is no C compiler."""
    said = []
    found = kind.build(folder, said.append)
    if found is None and "there is no C compiler" in str(said):
        pytest.skip(str(said))
    assert found, said
    return found, said


def write_text(path, n_words=20000, seed=0):
    """A text with something to learn in it: random sentences over a few words."""
    r = random.Random(seed)
    path.write_text(
        "".join(r.choice(WORDS) + (".\n" if r.random() < 0.1 else " ") for _ in range(n_words))
    )
    return path


# Of a model that trains in milliseconds, for what is about runs and not about what they learn
SMALL_MODEL = dict(
    n_layer=1, value_embed_layers=(), row_len=16, batch_tokens=(64,), sample_tokens=0
)


def tiny(text, tmp_path, **fields):
    """A Config that trains in a second or two on one core, fp32, uncompiled."""
    base = dict(
        track="tiny",
        data="text",
        text=str(text),
        tokenizer="bytes",
        cache_dir=str(tmp_path / "cache"),
        run_dir=str(tmp_path / "run"),
        n_layer=2,
        n_embd=32,
        n_head=2,
        value_embed_layers=(0, 1),
        softcap=(23.0, 5.0, 7.5),
        row_len=32,
        val_row_len=64,
        max_doc_len=(32,),
        short_window=(8,),
        long_window=(32,),
        batch_tokens=(256,),
        steps=20,
        eval_every=10,
        val_tokens=1000,
        dtype="float32",
        compile=False,
        sample_tokens=8,
        checkpoint_every="off",
    )
    return tg.configure(**(base | fields))


# every piece of the model that is off by default; layer 0 has pairs, 0 and 3 value embeddings, 2 no
# attention
PIECES = dict(
    n_layer=5,
    n_head=4,
    long_layers=(3,),
    value_embed_layers=(0, 3),
    n_gram=3,
    ngram_rows=64,
    ngram_signs=True,
    smear=True,
    attn_gate=True,
    key_offset=True,
    paired_layers=(0,),
    skip=(1, 2),
    backout=2,
    yarn=True,
)

# and with what the public record's later parts need of them
RECORD = PIECES | dict(
    attn_gate_layers=(3,),
    xsa_layers=(1, 3),
    qkvo_scales=True,
    gate_by_value=True,
    smear_first=True,
    attn_input=1,
    sublayer_lambdas=True,
    inject=True,
    backout=-1,
    mudd=(1, 3),
    mudd_gates=2,
)

# The first in fewer layers, for what compiles them
THREE_LAYERS = dict(n_layer=3, long_layers=(), value_embed_layers=(0, 2), skip=(0, 1), backout=1)

# and every other one, for a whole run of two or three stages
EVERYTHING = PIECES | dict(
    mtp=(3, 2, 1),
    tied=0.5,
    short_window=(4, 8),
    long_window=(16, 32),
    max_doc_len=(16, 32),
    stage_lr=(1.0, 1.2),
    weight_decay=1.0,
    normuon=True,
    row_moments=True,
    adam_every=2,
    extension=2,
)


def model_fields(**fields):
    """Options of a small GPT; fields: more, or others."""
    base = dict(
        n_layer=3,
        n_embd=32,
        n_head=2,
        value_embed_layers=(0, 2),
        softcap=(23.0, 5.0, 7.5),
        n_gram=3,
        ngram_rows=64,
    )
    return base | fields


def model_config(**fields):
    """The gpt.Config of a small GPT."""
    return gpt.Config(**model_fields(**fields))


def stage_of(c, windows=None, max_doc_len=24, **fields):
    """The Stage that a gpt.Config begins with; with windows by layer, or other fields, of one's
    own."""
    if windows:
        fields["windows"] = windows
    return c.stage(0.0, max_doc_len)._replace(**fields)


def tiny_model(n_vocab=257, seed=0, dtype=torch.float32, ops=None, max_len=24, **fields):
    """(Config, Model) with every parameter random, so that nothing is hidden behind a zero."""
    c = model_config(**fields)
    model = gpt.Model(c, n_vocab, max_len, dtype, ops)
    model.init_weights(seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return c, model


def run_trainer(*args, launcher=(), env=None, timeout=300):
    """Start train_gpt.py as a user would; returns the finished process (stdout, stderr as text)."""
    if launcher:  # more processes than there may be GPUs
        env = (os.environ if env is None else env) | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, str(ROOT / "train_gpt.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout)


def kill_verb(argv, run_dir, step):
    """Start `./run.sh *argv` as a user would, and kill it (-9) once its folder has a checkpoint of
    this step or a later one; for a run that would go on for long."""
    command = [sys.executable, str(ROOT / "door.py"), *map(str, argv)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while time.monotonic() < until and process.poll() is None:
        there = [path.parent.name for path in Path(run_dir, "checkpoints").glob("step-*/complete")]
        steps = [name.removeprefix("step-") for name in there]
        if any(name.isdigit() and int(name) >= step for name in steps):
            break
        time.sleep(0.02)
    process.kill()
    process.wait()


def same_weights(one, other):
    """Two taught runs have the same weights, and had the same reference."""
    for file in "model.safetensors", "reference.safetensors":
        a, b = load_file(one / file), load_file(other / file)
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


def options(config):
    """A Config as command-line options, on top of the laptop track."""
    args = ["--track", "laptop"]
    for name, value in flat(config).items():
        option = f"--{name.replace('_', '-')}"
        if name in ("track", *REMEMBERED) or value is None:
            continue
        if isinstance(value, bool):
            args.append(option if value else f"--no-{option[2:]}")
        else:
            values = value if isinstance(value, tuple) else [value]
            args += [option, *map(str, values)]
    return args


def train_losses(run_dir):
    """Training losses of a finished run, by step."""
    rows = map(json.loads, (Path(run_dir) / "metrics.jsonl").read_text().splitlines())
    return [r["train_loss"] for r in rows if "train_loss" in r]


class Runner:
    """Runs of one configuration, each in its folder."""

    def __init__(self, nursery, text, tmp, **fields):
        self.nursery = nursery
        self.text = text
        self.tmp = tmp
        self.fields = fields

    def argv(self, name, **fields):
        fields = dict(text=str(self.text), run_dir=str(self.tmp / name)) | self.fields | fields
        return options(tiny(fields.pop("text"), self.tmp, **fields))

    def __call__(self, name, *more, job=(), **fields):
        return self.nursery.run(
            [*self.argv(name, **fields), *more], self.tmp / "output", **dict(job)
        )

    def stop(self, name, step, *more, job=(), **fields):
        """Run until a signal, asking for it before this step, has stopped it; returns the step
        after which it did."""
        done = self(name, *more, job=dict(job) | dict(at=(step - 1, signal.SIGTERM)), **fields)
        assert done.status == 143, done.err
        stopped = int(re.search("stopped at step ([0-9]+) by a signal", done.err)[1])
        assert 0 <= stopped - step < {**self.fields, **fields}.get("adam_every", 1)
        return stopped


def padded_left(texts):
    """Texts (T,) int64 each -> (B, T) int64, as models/copies.py and counts.py want them."""
    return nn.utils.rnn.pad_sequence(texts, True, -1, padding_side="left")


def of_each_length(followers, rows, n_vocab):
    """(rows, n_vocab, n): the probabilities of each length alone, of Followers."""
    found = []
    for share in torch.eye(followers.there.size(1)):
        sums = torch.zeros(rows, n_vocab)
        followers.add_to(sums, share.expand(rows, -1))
        found.append(sums)
    return torch.stack(found, dim=-1)
