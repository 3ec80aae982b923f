"""Conversations to learn from: files into tokens with what counts of them, and packed rows.

A row holds whole conversations, as many as fit, and is padded at its end; attention sees one of
them. Only what the assistant says counts in the loss. A conversation beyond the row loses its
beginning. Running text can stand beside them: all of it counts, and it is cut into rows.
"""

import functools
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from base import InputError, to_json, write_text
from base.files import aside, one_at_a_time, sha256_of

from .chat import START, read_conversations, read_pairs, render, render_pair
from .dataset import Dataset
from .encodings import NotText, examine
from .loader import best_fit, document_starts, pack, split_pieces
from .shards import ShardWriter, read_shard
from .sources import hub
from .tokenizers import SPECIALS, Tokenizer, make_tokenizer

VAL_FRACTION = 0.1  # of conversations, by a hash of their text
LAYOUT = 2  # change it when what is written below changes, so old caches are not read
WHOLE = 1 << 40  # tokens of a shard: all


class Given(NamedTuple):
    """What one name of --conversations stands for."""

    name: str
    paths: list  # of Path
    text: bool  # documents of running text, all of which counts
    from_hub: bool  # rows that cannot be learned from are left out, where ours are refused


def locate(names, cache):
    """[Given, ...] of --conversations or --val-text; a data set of the Hub is fetched into `cache`
    where it is not there yet. Raises InputError."""
    found = []
    for name in map(str, names):
        if name in hub.TAUGHT and not os.path.exists(name):
            from .recipe import Part

            found.append(Given(name, hub.locate(Part(hub=name), cache).paths, False, True))
        else:
            found.append(Given(name, [Path(name)], name.lower().endswith(".txt"), False))
    return found


def digests_of(given):
    """SHA-256 of all files. Raises InputError."""
    try:
        return [sha256_of(path) for one in given for path in one.paths]
    except OSError as e:
        raise InputError(f"{e.filename}: cannot be read: {e.strerror or e}") from None


def open_conversations(config, cache):
    """The Dataset of a DataConfig's --conversations, prepared under `cache` if that has not been
    done before. Raises InputError."""
    if not config.conversations:
        raise InputError(f"--data {config.data}: expected --conversations with .jsonl files")
    pairs = config.data == "preferences"
    train = locate(config.conversations, cache)
    val = locate([config.val_text] if config.val_text else [], cache)

    def texts():
        for _, said in each_of(train + val, pairs, []):
            if isinstance(said, str):
                yield said
                continue
            for messages in said if pairs else [said]:
                yield from (message.text for message in messages)

    tokenizer = with_chat_tokens(make_tokenizer(config.encoder, texts))
    shape = [[len(one.paths), one.text] for one in (*train, *val)]
    digests = digests_of(train + val)
    key = [LAYOUT, config.data, len(train), shape, *digests, tokenizer.to_json()]
    fingerprint = hashlib.sha256(to_json(key).encode()).hexdigest()
    folder = Path(cache) / f"{config.data}-{fingerprint[:16]}"
    said = prepared(folder, functools.partial(write_splits, train, val, pairs, tokenizer))
    return Dataset(
        name=", ".join(one.name for one in train),
        train=[folder / "train_000000.bin"],
        val=[folder / "val_000000.bin"],
        n_vocab=tokenizer.n_vocab,
        eot=tokenizer.eot,
        fingerprint=fingerprint,
        folder=folder,
        load_tokenizer=lambda: tokenizer,
        notes=in_words(said, pairs),
        about=said,
        rows="pairs" if pairs else "conversations",
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
    if tokenizer.kind == "foreign":
        raise InputError(
            f"--warm-start: its tokenizer is another program's and has no {START}: expected a "
            "model with one that has, or with --tokenizer bytes, bpe:N or qwen2:N"
        )
    return Tokenizer(tokenizer.kind, tokenizer.tokens, tokenizer.pattern, SPECIALS)


def prepared(folder, write):
    """What write(a folder) says of what it writes, which it does where `folder` is not there yet:
    that appears when all of it is."""
    meta = folder / "meta.json"
    if not meta.exists():
        os.makedirs(folder.parent, exist_ok=True)
        temp = aside(folder)
        with one_at_a_time(folder):
            try:
                if not meta.exists():  # another process may just have prepared it
                    write_text(temp / "meta.json", to_json(write(temp)))
                    shutil.rmtree(folder, ignore_errors=True)
                    os.replace(temp, folder)
            finally:
                shutil.rmtree(temp, ignore_errors=True)
    return json.loads(meta.read_text(encoding="utf-8"))


def write_splits(train, val, pairs, tokenizer, folder):
    """Shards of both splits; returns {split: what is in it, left_out: how many rows are not}."""
    said = {}
    for split in "train", "val":
        said[split] = dict(conversations=0, tokens=0, counted=0, files=[])
    left_out = []
    shards = dict(shard_tokens=WHOLE, dtype=tokenizer.dtype)
    marks = dict(shard_tokens=WHOLE)
    with (
        ShardWriter(folder, "train", **shards) as train_tokens,
        ShardWriter(folder, "val", **shards) as val_tokens,
        ShardWriter(folder, "train-counts", **marks) as train_counts,
        ShardWriter(folder, "val-counts", **marks) as val_counts,
    ):
        writers = dict(train=(train_tokens, train_counts), val=(val_tokens, val_counts))
        for split in said:
            said[split]["files"] = [
                dict(name=one.name, conversations=0, text=one.text) for one in (*train, *val)
            ]
        for i, messages in each_of(train + val, pairs, left_out):
            text = isinstance(messages, str)
            split = "val" if i >= len(train) else "train"
            if not val and not text and is_held_out(messages):
                split = "val"
            if text:
                (ids,) = tokenizer.encode([messages])
                ids = np.append(np.array([tokenizer.eot], dtype=tokenizer.dtype), ids)
                counts = np.ones(len(ids), dtype=bool)
            else:
                ids, counts = (render_pair if pairs else render)(messages, tokenizer)
            tokens_out, counts_out = writers[split]
            tokens_out.write(ids)
            counts_out.write(counts)
            said[split]["files"][i]["conversations"] += 1
            said[split]["conversations"] += 1
            said[split]["tokens"] += len(ids)
            said[split]["counted"] += int(counts.sum())
    for split, files, what in (("train", train, "train"), ("val", val or train, "validate")):
        if not said[split]["conversations"]:
            names = ", ".join(one.name for one in files)
            raise InputError(f"{names}: no conversation to {what} on; expected more of them")
    for one in said["train"]["files"][: len(train)]:
        if not one["conversations"]:
            raise InputError(f"{one['name']}: nothing to learn from; expected more of it")
    return said | dict(left_out=len(left_out), why=str(left_out[0]) if left_out else "")


def each_of(given, pairs=False, left_out=None):
    """(number of a Given, messages) of every conversation, or its Pair, or a text; with progress.

    left_out: a list for what cannot be learned from, of the Hub's data sets.
    """
    bar = tqdm(desc="reading conversations", unit="", delay=2, disable=None)
    with bar:
        for i, one in enumerate(given):
            for path in one.paths:
                if one.text:
                    found = documents(path)
                else:
                    read = read_pairs if pairs else read_conversations
                    found = read(path, left_out if one.from_hub else None)
                for messages in found:
                    bar.update()
                    yield i, messages


def documents(path):
    """Yield the documents of a text file, str. Raises InputError."""
    from .sources.text import decoded

    try:
        encoding = examine(path, "").encoding
        whole = []
        for text, starts in decoded(path, encoding):
            if starts and whole:
                yield "".join(whole)
                whole = []
            whole.append(text)
    except (NotText, OSError) as e:
        raise InputError(f"{path}: expected text, found a file that is {e}") from None
    if whole:
        yield "".join(whole)


def is_held_out(messages):
    """Whether a conversation is for validation: by its text, so that equal ones stay together."""
    digest = hashlib.sha256(to_json(messages).encode()).digest()
    return digest[0] < 256 * VAL_FRACTION


def in_words(said, pairs=False):
    """Lines for whoever trains on it."""
    train, val = said["train"], said["val"]
    share = train["counted"] / train["tokens"]
    what = "pairs" if pairs else "conversations"
    if any(file["text"] for file in train["files"]):
        what += " and texts"
    lines = [
        f"{train['conversations']:,} {what}, {train['tokens']:,} tokens, of which {share:.0%} "
        f"count; validation: {val['conversations']:,}"
    ]
    if said["left_out"]:
        lines.append(f"{said['left_out']:,} rows are left out, the first one: {said['why']}")
    return lines


class Conversations:
    """A split's conversations, and rows of whole ones."""

    parts = 1  # conversations that stay together

    def __init__(self, shard, n_vocab, row_len, files=()):
        """files: dicts of what was given, in order: how many conversations (or pairs), and whether
        they are running text, which is cut into pieces."""
        self.tokens = read_shard(shard, n_vocab)
        counts = shard.with_name(shard.name.replace("_", "-counts_"))
        self.counts = np.asarray(read_shard(counts), dtype=bool)
        starts = document_starts(self.tokens, int(self.tokens[0]))
        ends = np.append(starts[1:], len(self.tokens)) - 1  # the last token is only a target
        self.row_len = row_len
        self.n_cut = 0
        self.groups = []  # (first, behind the last) number of each file's
        pieces = []  # (starts, ends) of each file's
        at = 0
        n_before = 0
        for file in files or [dict(conversations=len(starts) // self.parts, text=False)]:
            of_file = slice(at, at + self.parts * file["conversations"])
            at = of_file.stop
            first, last = starts[of_file], ends[of_file]
            if file["text"]:
                first, last = split_pieces(first, last, row_len, 0)
            else:
                cut = np.maximum(first, last - row_len // self.parts)
                self.n_cut += int((cut > first).sum())
                first = cut
            pieces.append((first, last))
            n = len(first) // self.parts
            self.groups.append((n_before, n_before + n))
            n_before += n
        self.starts = np.concatenate([first for first, _ in pieces])
        self.lengths = np.concatenate([last for _, last in pieces]) - self.starts
        # Short ones are many in a row, and each has borders of its own
        self.max_docs = max(8, row_len // 16)

    def __len__(self):
        return len(self.starts) // self.parts

    def segments(self, i):
        """What pack() takes of the i-th, or of all that stay together with it."""
        return [
            (self.tokens, int(self.starts[j]), int(self.lengths[j]), self.counts)
            for j in range(self.parts * i, self.parts * (i + 1))
        ]

    def packed(self, order):
        """Rows of whole conversations, as best_fit() makes them of this order: lists of their
        numbers."""
        order = np.asarray(order)
        sizes = self.lengths.reshape(-1, self.parts).sum(1)[order]
        rows = best_fit(sizes.tolist(), self.row_len, self.max_docs // self.parts)
        return [order[row].tolist() for row in rows]

    def batch(self, rows):
        """A MicroBatch of rows, lists of numbers or None for padding."""
        segments = []
        for row in rows:
            segments.append(None if row is None else sum(map(self.segments, row), []))
        return pack(segments, self.row_len, self.max_docs, self.row_len)

    def targets_of(self, row):
        """Those that count, (n,)."""
        found = []
        for i in row:
            for tokens, start, length, counts in self.segments(i):
                following = slice(start + 1, start + length + 1)
                found.append(tokens[following][counts[following]])
        return np.concatenate(found)

    def counted(self, rows):
        """How many numbers the loss is a mean of: targets that count."""
        return sum(len(self.targets_of(row)) for row in rows)


def shared_out(of, rows, rank, world_size, micro_rows):
    """One rank's rows as batches, padded where they do not divide evenly."""
    if not micro_rows:
        micro_rows = -(-len(rows) // world_size)
    stride = micro_rows * world_size
    rows = rows + [None] * (-len(rows) % stride)
    for i in range(rank * micro_rows, len(rows), stride):
        yield of.batch(rows[i : i + micro_rows])


class ConversationLoader:
    """Batches of conversations for training, as data.loader.TrainLoader has them of text: a pure
    function of (data, seed, step). Every epoch is packed anew from another order.

    With shares, each file has so large a part of the rows, and epochs of its own.
    """

    def __init__(self, of, batch_rows, seed=0, shares=()):
        """of: Conversations, or Pairs; batch_rows: function of the step; shares: a number for each
        file, of any size; empty: all files are one."""
        self.of = of
        self.row_len = of.row_len
        self.batch_rows = batch_rows
        self.n_tokens = len(of.tokens)
        self.groups = of.groups if shares else [(0, len(of))]
        self.shares = np.array(shares or [1.0]) / sum(shares or [1.0])
        self.turns = []  # the file of each row of training, as far as they are known
        self.taken = np.zeros(len(self.groups), dtype=np.int64)  # rows of each file in them
        self.reseed(seed)

    def reseed(self, seed):
        """Begin anew in another order."""
        self.seed = seed
        self._epoch = functools.lru_cache(maxsize=2 * len(self.groups))(self._pack_epoch)
        self._counted = functools.lru_cache(maxsize=8)(
            lambda step: self.of.counted(self.rows(step))
        )

    def _pack_epoch(self, group, epoch):
        first, behind = self.groups[group]
        key = (self.seed, epoch, group) if group else (self.seed, epoch)
        return self.of.packed(first + np.random.default_rng(key).permutation(behind - first))

    def rows_in_epoch(self):
        """Of all files."""
        return sum(len(self._epoch(group, 0)) for group in range(len(self.groups)))

    def turns_until(self, n):
        """The file of each of the first n rows: always one that is farthest behind its share."""
        while len(self.turns) < n:
            behind = self.shares * (len(self.turns) + 1) - self.taken
            group = int(behind.argmax())
            self.taken[group] += 1
            self.turns.append(group)
        return np.array(self.turns[:n], dtype=np.int64)

    def rows(self, step):
        """The global batch of `step`: a list of rows."""
        if step < 1:
            raise ValueError(f"step {step}: steps are numbered from 1")
        begin = sum(self.batch_rows(s) for s in range(1, step))
        turns = self.turns_until(begin + self.batch_rows(step))
        rows = []
        for group in range(len(self.groups)):
            of_group = turns == group
            rows += self.stretch(group, int(of_group[:begin].sum()), int(of_group[begin:].sum()))
        return rows

    def stretch(self, group, at, n):
        """n rows of a file, from its at-th on, through as many epochs as that takes."""
        epoch = 0
        rows = []
        while len(rows) < n:
            there = self._epoch(group, epoch)
            if at < len(there):
                rows += there[at : at + n - len(rows)]
            at = max(0, at - len(there))
            epoch += 1
        return rows

    def n_targets(self, step, tokens):
        """How many numbers the loss of the global batch is a mean of, 1 or more; tokens: in it."""
        return max(1, self._counted(step))

    def micro_batches(self, step, rank=0, world_size=1, micro_rows=None):
        """One rank's share of the batch as equally shaped MicroBatches."""
        yield from shared_out(self.of, self.rows(step), rank, world_size, micro_rows)

    def padding(self, step, micro_rows):
        """A batch of padding alone."""
        return self.of.batch([None] * micro_rows)


class ConversationValLoader:
    """The validation split's conversations in their order. n_targets: how many numbers the loss is
    a mean of."""

    def __init__(self, of):
        self.of = of
        self._rows = of.packed(range(len(of)))
        self.n_targets = of.counted(self._rows)

    @functools.cached_property
    def targets(self):
        """Those that count, for counting bytes: (n,)."""
        return np.concatenate([self.of.targets_of(row) for row in self._rows])

    def micro_batches(self, rank=0, world_size=1, micro_rows=1, n_rows=None):
        """One rank's share as equally shaped MicroBatches; n_rows: of so many rows, evenly
        spread."""
        rows = self._rows
        if n_rows is not None:
            rows = rows[:: max(1, len(rows) // n_rows)][:n_rows]
        yield from shared_out(self.of, rows, rank, world_size, micro_rows)
