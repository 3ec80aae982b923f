"""Conversations to learn from: files into tokens with what counts of them, and packed rows.

A row holds whole conversations, one after the other and padded at its end; attention sees one of
them. Only what the assistant says counts in the loss. A conversation beyond the row loses its
beginning.
"""

import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from base import InputError, to_json, write_text
from base.files import aside, one_at_a_time

from .chat import START, read_conversations, render
from .dataset import Dataset
from .loader import document_starts, pack
from .shards import ShardWriter, read_shard
from .tokenizers import SPECIALS, Tokenizer, make_tokenizer

VAL_FRACTION = 0.1  # of conversations, by a hash of their text
LAYOUT = 1  # change it when what is written below changes, so old caches are not read
WHOLE = 1 << 40  # tokens of a shard: all


def open_conversations(config, cache):
    """The Dataset of a DataConfig's --conversations, prepared under `cache` if that has not been
    done before. Raises InputError."""
    if not config.conversations:
        raise InputError("--data conversations: expected --conversations with .jsonl files")
    train = [Path(path) for path in config.conversations]
    val = [Path(config.val_text)] if config.val_text else []

    def texts():
        for _, messages in each_of(train, val):
            yield from (message.text for message in messages)

    tokenizer = with_chat_tokens(make_tokenizer(config.encoder, texts))
    try:
        digests = [sha256_of(path) for path in (*train, *val)]
    except OSError as e:
        raise InputError(f"{e.filename}: cannot be read: {e.strerror or e}") from None
    key = [LAYOUT, len(train), *digests, tokenizer.to_json()]
    fingerprint = hashlib.sha256(to_json(key).encode()).hexdigest()
    folder = Path(cache) / f"conversations-{fingerprint[:16]}"
    if not (folder / "meta.json").exists():
        prepare(train, val, tokenizer, folder)
    said = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return Dataset(
        name=", ".join(map(str, train)),
        train=[folder / "train_000000.bin"],
        val=[folder / "val_000000.bin"],
        n_vocab=tokenizer.n_vocab,
        eot=tokenizer.eot,
        fingerprint=fingerprint,
        folder=folder,
        load_tokenizer=lambda: tokenizer,
        notes=[in_words(said)],
        about=said,
        conversations=True,
    )


def with_chat_tokens(tokenizer):
    """The tokenizer, with the tokens of conversations behind its own where it lacks them."""
    if START in tokenizer.specials:
        return tokenizer
    if tokenizer.kind == "chars":
        raise InputError(
            "--warm-start: a vocabulary of single characters cannot write conversations: expected "
            "a model with --tokenizer bytes, bpe:N or qwen2:N"
        )
    return Tokenizer(tokenizer.kind, tokenizer.tokens, tokenizer.pattern, SPECIALS)


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def prepare(train, val, tokenizer, folder):
    """Write conversations as shards into a folder, which appears when all of it is there."""
    os.makedirs(folder.parent, exist_ok=True)
    temp = aside(folder)
    with one_at_a_time(folder):
        if (folder / "meta.json").exists():  # another process has just prepared it
            return
        try:
            said = write_splits(train, val, tokenizer, temp)
            write_text(temp / "meta.json", to_json(said))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temp, folder)
        finally:
            shutil.rmtree(temp, ignore_errors=True)


def write_splits(train, val, tokenizer, folder):
    """Shards of both splits; returns {split: what is in it}."""
    said = dict(
        train=dict(conversations=0, tokens=0, counted=0),
        val=dict(conversations=0, tokens=0, counted=0),
    )
    shards = dict(shard_tokens=WHOLE, dtype=tokenizer.dtype)
    marks = dict(shard_tokens=WHOLE)
    with (
        ShardWriter(folder, "train", **shards) as train_tokens,
        ShardWriter(folder, "val", **shards) as val_tokens,
        ShardWriter(folder, "train-counts", **marks) as train_counts,
        ShardWriter(folder, "val-counts", **marks) as val_counts,
    ):
        writers = dict(train=(train_tokens, train_counts), val=(val_tokens, val_counts))
        for path, messages in each_of(train, val):
            split = "val" if path in val or (not val and is_held_out(messages)) else "train"
            ids, counts = render(messages, tokenizer)
            tokens_out, counts_out = writers[split]
            tokens_out.write(ids)
            counts_out.write(counts)
            said[split]["conversations"] += 1
            said[split]["tokens"] += len(ids)
            said[split]["counted"] += int(counts.sum())
    for split, files, what in (("train", train, "train"), ("val", val or train, "validate")):
        if not said[split]["conversations"]:
            names = ", ".join(map(str, files))
            raise InputError(f"{names}: no conversation to {what} on; expected more of them")
    return said


def each_of(train, val):
    """(path, messages) of every conversation, with progress."""
    bar = tqdm(desc="reading conversations", unit="", delay=2, disable=None)
    with bar:
        for path in (*train, *val):
            for messages in read_conversations(path):
                bar.update()
                yield path, messages


def is_held_out(messages):
    """Whether a conversation is for validation: by its text, so that equal ones stay together."""
    digest = hashlib.sha256(to_json(messages).encode()).digest()
    return digest[0] < 256 * VAL_FRACTION


def in_words(said):
    train, val = said["train"], said["val"]
    share = train["counted"] / train["tokens"]
    return (
        f"{train['conversations']:,} conversations, {train['tokens']:,} tokens, of which the "
        f"assistant's {share:.0%} count; validation: {val['conversations']:,}"
    )


class Conversations:
    """Packed rows of a split's conversations. Shared by the loaders of both splits."""

    def __init__(self, shard, n_vocab, row_len):
        self.tokens = read_shard(shard, n_vocab)
        counts = shard.with_name(shard.name.replace("_", "-counts_"))
        self.counts = np.asarray(read_shard(counts), dtype=bool)
        eot = int(self.tokens[0])
        starts = document_starts(self.tokens, eot)
        ends = np.append(starts[1:], len(self.tokens)) - 1  # the last token is only a target
        self.row_len = row_len
        self.starts = np.maximum(starts, ends - row_len)
        self.lengths = ends - self.starts
        self.n_cut = int((self.starts > starts).sum())
        # Short ones are many in a row, and each has borders of its own
        self.max_docs = max(8, row_len // 16)

    def packed(self, order):
        """Rows of whole conversations in this order: lists of segments, as pack() takes them."""
        rows = []
        room = 0
        for i in order:
            length = int(self.lengths[i])
            if length > room or len(rows[-1]) == self.max_docs:
                rows.append([])
                room = self.row_len
            rows[-1].append((self.tokens, int(self.starts[i]), length, self.counts))
            room -= length
        return rows


def counted(rows):
    """How many targets of rows count."""
    return sum(
        int(counts[start + 1 : start + length + 1].sum())
        for row in rows
        for _, start, length, counts in row
    )


class ConversationLoader:
    """Batches of conversations for training, as data.loader.TrainLoader has them of text: a pure
    function of (data, seed, step). Every epoch is packed anew from another order."""

    def __init__(self, shard, *, n_vocab, row_len, batch_rows, seed=0):
        self.of = Conversations(shard, n_vocab, row_len)
        self.row_len = row_len
        self.batch_rows = batch_rows
        self.n_tokens = len(self.of.tokens)
        self.max_docs = self.of.max_docs
        self.reseed(seed)

    def reseed(self, seed):
        """Begin anew in another order."""
        self.seed = seed
        self._epoch = functools.lru_cache(maxsize=2)(self._pack_epoch)
        self._targets = functools.lru_cache(maxsize=8)(lambda step: counted(self.rows(step)))

    def _pack_epoch(self, epoch):
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.of.starts))
        return self.of.packed(order)

    def rows_in_epoch(self):
        return len(self._epoch(0))

    def rows(self, step):
        """The global batch of `step`: a list of rows."""
        if step < 1:
            raise ValueError(f"step {step}: steps are numbered from 1")
        at = sum(self.batch_rows(s) for s in range(1, step))
        epoch = 0
        rows = []
        while len(rows) < self.batch_rows(step):
            there = self._epoch(epoch)
            if at < len(there):
                rows += there[at : at + self.batch_rows(step) - len(rows)]
            at = max(0, at - len(there))
            epoch += 1
        return rows

    def n_targets(self, step):
        """How many targets of the global batch count in the loss, 1 or more."""
        return max(1, self._targets(step))

    def micro_batches(self, step, rank=0, world_size=1, micro_rows=None):
        """One rank's share of the batch as equally shaped MicroBatches."""
        yield from shared_out(self.of, self.rows(step), rank, world_size, micro_rows)


class ConversationValLoader:
    """The validation split's conversations in their order. n_targets: how many targets count;
    targets: these, for counting bytes."""

    def __init__(self, shard, *, n_vocab, row_len):
        self.of = Conversations(shard, n_vocab, row_len)
        self._rows = self.of.packed(range(len(self.of.starts)))
        self.n_targets = counted(self._rows)
        found = []
        for row in self._rows:
            for tokens, start, length, counts in row:
                following = slice(start + 1, start + length + 1)
                found.append(tokens[following][counts[following]])
        self.targets = np.concatenate(found)

    def micro_batches(self, rank=0, world_size=1, micro_rows=1, n_rows=None):
        """One rank's share as equally shaped MicroBatches; n_rows: of so many rows, evenly
        spread."""
        rows = self._rows
        if n_rows is not None:
            rows = rows[:: max(1, len(rows) // n_rows)][:n_rows]
        yield from shared_out(self.of, rows, rank, world_size, micro_rows)


def shared_out(conversations, rows, rank, world_size, micro_rows):
    """One rank's rows as MicroBatches, padded where they do not divide evenly."""
    if not micro_rows:
        micro_rows = -(-len(rows) // world_size)
    stride = micro_rows * world_size
    rows = rows + [None] * (-len(rows) % stride)
    row_len, max_docs = conversations.row_len, conversations.max_docs
    for i in range(rank * micro_rows, len(rows), stride):
        yield pack(rows[i : i + micro_rows], row_len, max_docs, row_len)
