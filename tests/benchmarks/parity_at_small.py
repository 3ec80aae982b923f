"""A shape at which both sides of parity take seconds, and tokens for it."""

import types

import numpy as np

from benchmarks.parity import record
from data import ShardWriter

SHAPE = record.Shape(
    width=24,
    n_vocab=64,
    eot=63,
    shrink=8,
    rows=1,
    steps=12,
    extension=1,
    eval_every=5,
    val_tokens=1024,
    val_row_len=512,
)


def made_up_source(folder, every, stride=1):
    """A Dataset for parity's Tokens, in which each token follows from the one before; every: so
    many tokens a document begins."""
    source = types.SimpleNamespace(train=[], val=[], name="made up", fingerprint="made up")
    source.n_vocab = SHAPE.n_vocab
    source.eot = SHAPE.eot
    for name, size in ("train", 9000), ("val", 3000):
        with ShardWriter(folder, name) as writer:
            stream = np.arange(size) * stride % 61
            stream[::every] = SHAPE.eot
            writer.write(stream)
        setattr(source, name, writer.paths)
    texts = [*(bytes([i]) for i in range(62)), b"", bytes([0, 1])]
    source.tokenizer = types.SimpleNamespace(
        tokens=texts, token_bytes=np.ones(64, dtype=np.int64), prefixes=lambda: np.full(64, -1)
    )
    return source
