"""A corpus that is ready to train on, and the loaders over it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from base import InputError

from . import sources
from .shards import read_shard

LEAST_VAL_TOKENS = 64  # of a whole validation split
SEARCHED = 1_000_000  # tokens of the validation split, for how documents begin


@dataclass
class Dataset:
    """Train and validation shards of one corpus, with what is needed to read and name them."""

    name: str  # in logs and results
    train: list  # shard paths, in training order
    val: list
    n_vocab: int
    eot: int  # the end-of-text token, which starts every document
    fingerprint: str  # tells this corpus from any other, such as a sha256 of its text in order
    folder: Path
    load_tokenizer: Callable | None = None  # returns its Tokenizer; None if no text is behind it
    notes: list = field(default_factory=list)  # lines that whoever trains on it should see
    about: dict = field(default_factory=dict)  # what else its source says of it, for manifest()
    rows: str = "text"  # what they hold: text, conversations, pairs of them, or questions

    @cached_property
    def tokenizer(self):
        """The Tokenizer; loaded late because one may come over the network. Raises InputError."""
        if self.load_tokenizer is None:
            raise InputError(
                f"{self.name}: these tokens have no text; expected a --target-metric that needs "
                "none, such as val_loss"
            )
        return self.load_tokenizer()

    def prefixes(self):
        """(n_vocab,) int64: the longest other token that each one begins with, -1 for none. Raises
        InputError."""
        from .tokenizers import longest_prefixes

        return longest_prefixes(self.tokenizer.tokens, self.n_vocab)

    def manifest(self):
        """What a run keeps of the data it was trained on, as JSON can hold it: data.json."""
        splits = {}
        for name, shards in ("train", self.train), ("val", self.val):
            shards = [Path(path) for path in shards]
            tokens = sum(len(read_shard(path)) for path in shards)
            splits[name] = dict(tokens=tokens, shards=[path.name for path in shards])
        return dict(
            name=self.name,
            fingerprint=self.fingerprint,
            n_vocab=self.n_vocab,
            eot=self.eot,
            splits=splits,
            **self.about,
        )

    def beginnings(self, n=3, length=8):
        """Texts that n documents of the validation split begin with, of so many tokens each; fewer
        where there are fewer documents. Raises InputError."""
        tokens = read_shard(self.val[0])[:SEARCHED]
        starts = np.flatnonzero(tokens == self.eot)
        places = np.linspace(0, len(starts) - 1, min(n, len(starts)))
        texts = []
        for start in starts[places.astype(int)]:
            document = tokens[start + 1 : start + 1 + length]
            ends = np.flatnonzero(document == self.eot)
            document = document[: ends[0]] if len(ends) else document
            # What is left of a character that was cut is no text
            texts.append(self.tokenizer.decode(document).rstrip("\ufffd"))
        return texts


class Data(NamedTuple):
    """What a run trains and validates on."""

    dataset: Dataset
    train: Any  # a TrainLoader
    val: Any  # a ValLoader
    val_bytes: int | None  # UTF-8 bytes the validation targets stand for; None if not to be known


def open_dataset(config, cache):
    """The Dataset of a DataConfig, prepared under the folder `cache` if that has not been done
    before. Raises InputError."""
    return sources.find(config.data).open(config, Path(cache))


def open_data(
    config,
    cache,
    *,
    batch_rows,
    max_doc_len,
    seed=0,
    need_bytes=False,
    open_dataset=open_dataset,
    questions=(1, 1),
):
    """Open a corpus and the loaders over it; returns Data.

    config: DataConfig; cache: folder for prepared data; batch_rows, max_doc_len: functions of the
    step, from 1; seed: of the training order; need_bytes: raise where val_bytes cannot be known;
    open_dataset: function of (config, cache), for programs of several processes, one of which
    prepares, and for benchmarks without data; questions: how many of them a step has, and tokens of
    an answer, for a corpus of questions. Raises InputError.
    """
    from .loader import TrainLoader, ValLoader  # late: what makes data needs no torch

    dataset = open_dataset(config, cache)
    if dataset.rows == "questions":
        return open_questions(dataset, questions, seed, config)
    if dataset.rows != "text":
        return open_conversations(dataset, config, batch_rows, seed)
    train = TrainLoader(
        dataset.train,
        eot=dataset.eot,
        n_vocab=dataset.n_vocab,
        row_len=config.row_len,
        batch_rows=batch_rows,
        max_doc_len=max_doc_len,
        long_docs=config.long_docs,
        shuffle=config.shuffle,
        seed=seed,
        docs_by_pass=config.docs_by_pass,
    )

    n_tokens = config.val_tokens
    if not sources.find(config.data).exact_val_tokens:
        there = sum(len(read_shard(path)) for path in dataset.val) - 1
        if there < LEAST_VAL_TOKENS:
            raise InputError(
                f"{dataset.name}: {there} tokens to validate on say nothing, expected "
                f"{LEAST_VAL_TOKENS} or more; give more text, or a text to validate on by "
                "--val-text"
            )
        n_tokens = min(n_tokens, there)
    val = ValLoader(
        dataset.val,
        eot=dataset.eot,
        n_vocab=dataset.n_vocab,
        row_len=config.val_row_len,
        n_tokens=n_tokens,
        docs_by_pass=config.docs_by_pass,
    )

    # A vocabulary may be out of reach; only bits per byte and the sample of text need it
    val_bytes = None
    try:
        val_bytes = int(dataset.tokenizer.token_bytes[val.targets].sum())
    except InputError:
        if need_bytes:
            raise
    return Data(dataset, train, val, val_bytes)


def open_conversations(dataset, config, batch_rows, seed):
    """The Data of a corpus of conversations, or of pairs of them."""
    from .conversations import ConversationLoader, Conversations, ConversationValLoader
    from .preferences import Pairs

    kind = dict(conversations=Conversations, pairs=Pairs)[dataset.rows]
    files = dataset.about["train"]["files"]
    train = kind(dataset.train[0], dataset.n_vocab, config.row_len, files)
    files = dataset.about["val"]["files"]
    val = kind(dataset.val[0], dataset.n_vocab, config.val_row_len, files)
    if train.n_cut:
        dataset.notes.append(
            f"{train.n_cut} conversations do not fit into --row-len {config.row_len} and lose "
            "their beginning"
        )
    val = ConversationValLoader(val)
    val_bytes = None
    if dataset.rows == "conversations":
        val_bytes = int(dataset.tokenizer.token_bytes[val.targets].sum())
    return Data(dataset, ConversationLoader(train, batch_rows, seed, config.mix), val, val_bytes)


def open_questions(dataset, questions, seed, config):
    """The Data of a corpus of questions; questions: of a step, and tokens of an answer."""
    from .questions import QuestionLoader, QuestionValLoader, check_lengths, load_questions

    per_step, most = questions
    train = load_questions(dataset.train[0], dataset.n_vocab)
    val = load_questions(dataset.val[0], dataset.n_vocab)
    check_lengths(train, config.row_len - most)
    check_lengths(val, config.val_row_len - most)
    train = QuestionLoader(train, per_step, config.row_len, seed)
    return Data(dataset, train, QuestionValLoader(val), None)
