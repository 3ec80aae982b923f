"""The parts of gpt2-small, each measured alone by benchmarks ablate at parity's quick shape.

What is compared are runs of ours, so that no checkout of the record is needed.
"""

import contextlib
import dataclasses
import tempfile
from pathlib import Path

import torch

from base import InputError
from base.places import cache_folder
from benchmarks import subject
from benchmarks.ablate import Place
from benchmarks.ablate.pieces import Code
from benchmarks.report import say
from models import gpt
from models.parts import later_targets
from optim.adam import Adam

from . import QUICK, REFUSED, SHRINK, shape_of, task, with_track

# What the track has of the record, in the order in which it is measured; then what is ours alone
PARTS = (
    "qkvo-scales attn-input xsa mudd mudd-gates inject sublayer-lambdas prefix-loss "
    "muon-head-pairs grow-gradients mtp smear smear-first gate-layers gate-by-value head-betas "
    "mlp-down-lr decay-by-shape extension-windows paired-near ngrams ngram-signs value-embeds "
    "key-offset row-moments masters document-ends"
).split()


# --- what is ours alone and no option


@contextlib.contextmanager
def replaced(owner, name, value):
    """An attribute with another value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def without_masters(trainer):
    """Tables and head are rounded to bf16 behind each update."""
    optimizer = trainer.setup.optimizer
    update = optimizer.update

    def rounded(name, *turn):
        update(name, *turn)
        rule = optimizer.rules[name]
        if isinstance(rule, Adam) and rule.sharded:
            own = optimizer.shards[name].own
            own.copy_(own.bfloat16())

    with replaced(optimizer, "update", rounded):
        yield


@contextlib.contextmanager
def beyond_ends(trainer):
    """Later targets cross documents' ends."""

    def crossing(targets, starts, n):
        return later_targets(targets, torch.zeros_like(starts), n)

    with replaced(gpt, "later_targets", crossing):
        yield


CODE = {
    "masters": Code(
        "tables and head have fp32 masters (without: bf16 behind each update, as the record's)",
        without_masters,
    ),
    "document-ends": Code(
        "no target lies beyond its document's end (without: as the record's)", beyond_ends
    ),
}


# --- where they are measured

COLUMNS = (
    "Losses are differences from the base of the same seed, above zero where the part helps; seeds "
    "scatter the initial weights, the tokens are the same in all runs. ± is half of a 95% interval "
    "by the scatter of all parts' differences over seeds together. CPU ratio: process CPU time of "
    "a step over the base's, which a busy machine moves by some 5%. Parameters and FLOPs of "
    "training are what the variant has more than the base."
)


@contextlib.contextmanager
def at_parity(trainer_options, step_tokens=None):
    """The Place of benchmarks parity --quick, its tokens in a folder that is removed afterwards.

    step_tokens: of a step in the first stage, which is one row; rows have 2,048 if None. Raises
    InputError.
    """
    for option in trainer_options:
        name = str(option).split("=")[0]
        if name in REFUSED and name != "--seed":
            raise InputError(f"{name}: is set by --at parity; leave it out")
    track = subject.parse(with_track(trainer_options))
    plan = dataclasses.replace(QUICK, validations=0)  # but for the one at the end
    torch.set_num_threads(1)  # as in parity
    with tempfile.TemporaryDirectory(prefix="parts-tokens-") as folder:
        say("tokens ...")
        tokens = task.Tokens(folder, Path(cache_folder()) / "data", SHRINK)
        shape = shape_of(plan, 1, tokens)
        c = task.scaled(track, shape)
        if step_tokens:
            c = shortened(c, step_tokens)
        needed, passes = tokens.write_for(c, shape.val_tokens)
        by_stage = " to ".join(f"{n:,}" for n in (c.batch_tokens[0], c.batch_tokens[-1]))
        about = (
            f"{c.n_layer} layers, width {c.n_embd}, {tokens.n_vocab:,} tokens in the vocabulary, "
            f"{by_stage} tokens a step (the text {passes} times), documents and windows {SHRINK} "
            f"times shorter than the track's; float32, one thread, {shape.val_tokens:,} tokens of "
            f"validation. {COLUMNS}"
        )

        def open_data(settings):
            return task.open_ours(settings, tokens)

        yield Place(c, open_data, PARTS, CODE, dict(shape=about))


def shortened(c, step_tokens):
    """The Settings with rows and steps shorter alike, the first stage's of step_tokens."""
    row_len = c.row_len
    most = max(c.max_doc_len)
    if row_len % step_tokens or step_tokens < most:
        raise InputError(
            f"--step-tokens {step_tokens}: expected {most} or more, and a divisor of {row_len}"
        )
    batches = tuple(n * step_tokens // row_len for n in c.batch_tokens)
    return subject.change(c, row_len=step_tokens, batch_tokens=batches)
