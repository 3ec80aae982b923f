"""The tokens that both sides train on, and our trainer on them, scaled down by the same rule."""

import re
from pathlib import Path

import numpy as np

from base import InputError
from benchmarks import subject
from data import DataConfig, Dataset, ShardWriter, open_dataset, read_shard
from runtime.machine import World

from .record import HEADS, LEAST_DOCUMENT, PADDED, WIDTH

TOKENIZER = "bpe:4096"
MEAN, MEDIAN = 690, 403  # tokens of a web page in FineWeb
SPARE = 1.15  # tokens there are for each that is trained on: rows cut their last document


# --- tokens


def pieces(text, shrink, seed):
    """[tokens, ...]: text (n,) without its end-of-text tokens, cut as long as web pages are, but
    `shrink` times shorter, and shuffled."""
    draw = np.random.default_rng(seed)
    sigma = np.sqrt(2 * np.log(MEAN / MEDIAN))
    many = 2 * shrink * len(text) // MEAN + 16
    lengths = draw.lognormal(np.log(MEDIAN / shrink), sigma, many)
    lengths = np.maximum(LEAST_DOCUMENT - 1, lengths).astype(int)  # and the end-of-text token
    cuts = np.cumsum(lengths)
    found = np.split(text, cuts[cuts < len(text)])
    if len(found[-1]) < LEAST_DOCUMENT - 1:
        found.pop()
    return [found[i] for i in draw.permutation(len(found))]


def write(folder, prefix, documents, eot):
    with ShardWriter(folder, prefix) as writer:
        for document in documents:
            writer.write(np.append(eot, document))
    return writer.paths


class Tokens:
    """Python's standard library, cut into documents, in two training shards and one to validate
    on: in a folder, once write() has been called."""

    def __init__(self, folder, cache, shrink):
        self.folder = Path(folder)
        self.cache = Path(cache)
        self.source = open_dataset(DataConfig(data="stdlib", tokenizer=TOKENIZER), Path(cache))
        self.shrink = shrink
        self.n_vocab = self.source.n_vocab
        self.eot = self.source.eot
        self.bytes = self.source.tokenizer.tokens

    def text(self, paths):
        tokens = np.concatenate([read_shard(path) for path in paths])
        return tokens[tokens != self.eot]

    def write(self, needed, longest, val_tokens):
        """needed: [tokens, ...] of successive steps in all; longest: document that is kept whole.

        The text is gone through as often as that takes, each time cut in other places; returns how
        often. Raises InputError where there are too few tokens to validate on.
        """
        text = self.text(self.source.train)
        documents = []
        kept = passes = 0
        while kept < SPARE * needed:
            new = pieces(text, self.shrink, passes)
            kept += sum(min(len(document) + 1, longest) for document in new)
            documents += new
            passes += 1
        last = documents.pop()  # the record asks for a second file before it has read the first
        write(self.folder, "train_0", documents, self.eot)
        write(self.folder, "train_1", [last], self.eot)
        held_out = pieces(self.text(self.source.val), self.shrink, 0)
        there = len(read_shard(write(self.folder, "val", held_out, self.eot)[0]))
        if there <= val_tokens:
            raise InputError(f"{there} tokens to validate on, expected more than {val_tokens}")
        return passes

    def write_for(self, c, val_tokens):
        """What the runs of these Settings need; returns how many tokens those are, and how often
        the text is gone through. Raises InputError as write() does."""
        stages = subject.schedule(c)
        needed = sum(stage.rows for stage in stages) * c.row_len
        longest = min(stage.model.max_doc_len for stage in stages)
        return needed, self.write(needed, longest, val_tokens)

    def dataset(self, *ignored):
        """In place of open_dataset()."""
        return Dataset(
            f"{self.source.name} in short documents",
            sorted(self.folder.glob("train_*.bin")),
            sorted(self.folder.glob("val_*.bin")),
            self.n_vocab,
            self.eot,
            self.source.fingerprint,
            self.folder,
            load_tokenizer=lambda: self.source.tokenizer,
        )


# --- our side

# What both sides must have alike: options of the trainer that parity sets
SET = (
    "data tokenizer n_embd steps extension batch_tokens row_len val_row_len val_tokens eval_every "
    "dtype fp8 target compile shuffle long_docs"
).split()


def scaled(c, shape):
    """The Settings of a track as the record is scaled: fewer tokens in rows, documents and windows,
    narrower, float32, uncompiled. All else is as the track has it. Raises InputError."""
    if c.n_head != HEADS or c.n_embd != WIDTH:
        raise InputError(
            f"--track {c.track}: expected {HEADS} heads and a width of {WIDTH}, as the record has, "
            f"found {c.n_head} and {c.n_embd}"
        )

    def shorter(value):
        if isinstance(value, tuple):
            return tuple(map(shorter, value))
        return max(1, value // shape.shrink)

    fields = {}
    for name, value in c.fields.items():
        if re.fullmatch(r"(.*_)?windows?|max_doc_len|row_len|val_row_len", name) and value:
            fields[name] = shorter(value)
    fields |= dict(
        batch_tokens=tuple(map(shape.tokens, c.batch_tokens)),
        n_embd=shape.width,
        ngram_rows=max(1, c.ngram_rows * shape.n_vocab // PADDED),
        steps=shape.steps,
        extension=shape.extension,
        eval_every=shape.eval_every,
        val_tokens=shape.val_tokens,
        val_row_len=shape.val_row_len,
        docs_by_pass=False,  # all documents are told apart, see open_ours()
        dtype="float32",
        fp8="off",
        target=None,
        compile=False,
        checkpoint_every="off",
        sample_tokens=0,
    )
    return subject.change(c, **fields)


def open_ours(c, tokens):
    """Loaders over the same tokens that tell all documents of a row apart, as the record does."""
    opened = subject.open_data(c, opener=tokens.dataset)
    for loader in opened.train, opened.val:
        loader.max_docs = loader.row_len // LEAST_DOCUMENT + 2
    return opened


def train(c, tokens, seed, log):
    """[(step, validation loss)] of one run; log: with say() and val, as ablate's Points."""
    trainer = subject.Subject(c, World(), log, open_ours(c, tokens))
    trainer.run(log, seed)
    return [(point["step"], point["val_loss"]) for point in log.val]
