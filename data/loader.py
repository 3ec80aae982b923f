"""Batches of documents, packed into rows.

A row holds `row_len` tokens; documents fill it one after another and attention never crosses a row,
so a row means the same whatever batch, rank or micro-batch it lands in. The global batch of a step
is a list of rows that depends on (data, seed, step) alone: 1, 3 or 8 ranks train on the same
tokens.

A document longer than `max_doc_len` is cut. `long_docs="drop"` drops the rest, as the record does
with its billions of tokens, and every row begins where a document does: there the context is
complete. `long_docs="split"` keeps every token: documents are cut into pieces at a phase that
changes each epoch, the pieces are shuffled, and what a row has no room for begins the next.
Every target is the token that really follows in the data, also at cuts.
"""

import queue
import threading
from typing import NamedTuple

import numpy as np
import torch

from base import InputError

from .shards import read_shard

IGNORE = -100  # target of padding, left out of the loss


class MicroBatch(NamedTuple):
    """rows x row_len tokens and the borders of their documents."""

    inputs: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, IGNORE where padded
    cu_seqlens: (
        torch.Tensor
    )  # (n,) int32 document starts in the flattened rows, then B * T to a fixed n


class Cursor(NamedTuple):
    """Where the next row starts: epoch, shard within it, piece within that, token within that."""

    epoch: int = 0
    shard: int = 0
    piece: int = 0
    offset: int = 0


def document_starts(tokens, eot):
    """Positions (n,) int64 of end-of-text tokens; a stream without any is one document starting
    at 0."""
    starts = np.flatnonzero(tokens == eot)
    return starts if len(starts) else np.zeros(1, dtype=np.int64)


def default_max_docs(row_len):
    """Documents told apart in a row of this length: one for every 256 tokens (FineWeb's have 690),
    at least 8.

    Attention kernels start blocks for each place in cu_seqlens, filled or not, so there should not
    be many to spare.
    """
    return max(8, row_len // 256)


def pack(rows, row_len, max_docs, max_len):
    """Rows (each a list of (tokens, start, length) segments, or None for padding) -> MicroBatch.

    No document in cu_seqlens is longer than max_len. A row with more than max_docs segments keeps
    the borders of the first ones; what remains of it, padding included, is divided every max_len
    tokens.
    """
    slots = max_docs + -(-row_len // max_len)
    inputs = np.zeros((len(rows), row_len), dtype=np.int64)
    targets = np.full((len(rows), row_len), IGNORE, dtype=np.int64)
    cu_seqlens = np.full(len(rows) * slots + 1, len(rows) * row_len, dtype=np.int32)
    n = 0
    for r, row in enumerate(rows):
        at, rest = 0, 0
        for i, (tokens, start, length) in enumerate(row or ()):
            inputs[r, at : at + length] = tokens[start : start + length]
            targets[r, at : at + length] = tokens[start + 1 : start + length + 1]
            if i < max_docs:
                cu_seqlens[n] = r * row_len + at
                n, rest = n + 1, at + length
            at += length
        more = np.arange(rest, row_len, max_len)
        cu_seqlens[n : n + len(more)] = r * row_len + more
        n += len(more)
    return MicroBatch(*map(torch.from_numpy, (inputs, targets, cu_seqlens)))


class TrainLoader:
    """The training stream: `rows(step)` is the global batch, `micro_batches(step, ...)` one
    rank's part of it."""

    def __init__(
        self,
        shards,
        *,
        eot,
        n_vocab,
        row_len,
        batch_rows,
        max_doc_len,
        long_docs="drop",
        shuffle=True,
        seed=0,
        max_docs=None,
    ):
        """shards: paths; batch_rows, max_doc_len: functions of the step; shuffle: documents and
        shards in random order from the first epoch on (later epochs are always shuffled). Raises
        InputError when the data does not fill one batch."""
        self.shards, self.eot, self.n_vocab, self.row_len = list(shards), eot, n_vocab, row_len
        self.batch_rows, self.max_doc_len = batch_rows, max_doc_len
        self.split, self.shuffle, self.seed = long_docs == "split", shuffle, seed
        self.max_docs = max_docs or default_max_docs(row_len)
        self._tokens, self._starts, self._pieces_of = {}, {}, {}
        self._next = (0, Cursor())  # (step, where its batch starts)
        for path in self.shards:  # header and size now, the tokens when they are reached
            read_shard(path)
        need = len(self.rows(0))
        if self._next[1].epoch:  # the first batch went through all there is
            raise InputError(
                f"the training text has {sum(self._rows_in_epoch_0()) * row_len} tokens in rows of "
                f"{row_len}; one batch needs {need * row_len}: give more text or lower --batch-tokens"
            )

    def reseed(self, seed):
        """Begin anew in another order."""
        self.seed, self._next, self._pieces_of = seed, (0, Cursor()), {}

    def rows(self, step):
        """The global batch of `step`: a list of rows, each a list of (tokens, start, length)."""
        at, cursor = self._next
        if step < at:
            at, cursor = 0, Cursor()
        while True:  # walking past a batch touches the index only, no tokens
            max_len = self._max_len(at)
            if at and max_len != self._max_len(at - 1):
                # pieces are cut anew: documents keep their numbers, split pieces do not
                cursor = Cursor(cursor.epoch + 1) if self.split else cursor._replace(offset=0)
            rows = []
            for _ in range(self.batch_rows(at)):
                row, cursor = self._row(cursor, max_len)
                rows.append(row)
            at += 1
            if at > step:
                self._next = (at, cursor)
                return rows

    def micro_batches(self, step, rank=0, world_size=1, micro_rows=None):
        """One rank's share of the batch as equally shaped MicroBatches, padded where rows do not
        divide evenly."""
        rows = self.rows(step)
        micro_rows = micro_rows or -(-len(rows) // world_size)
        stride = micro_rows * world_size
        rows += [None] * (-len(rows) % stride)
        for i in range(rank * micro_rows, len(rows), stride):
            yield pack(rows[i : i + micro_rows], self.row_len, self.max_docs, self._max_len(step))

    def _max_len(self, step):
        return min(self.max_doc_len(step), self.row_len)

    def _rows_in_epoch_0(self):
        """Yields 1 for every row of the first epoch."""
        cursor = Cursor()
        while not (cursor := self._row(cursor, self._max_len(0))[1]).epoch:
            yield 1

    def _row(self, cursor, max_len):
        """Fill one row from the cursor on; returns (segments, cursor after it)."""
        epoch, shard, piece, offset = cursor
        for _ in range(2 * len(self.shards) + 1):
            tokens, starts, lengths, ends = self._pieces(epoch, shard, max_len)
            before = (ends[piece - 1] if piece else 0) + offset
            if piece < len(ends) and ends[-1] - before >= self.row_len:
                break
            shard, piece, offset = shard + 1, 0, 0  # what is left of a shard does not fill a row
            if shard == len(self.shards):
                epoch, shard = epoch + 1, 0
        else:
            raise InputError(
                f"no shard of the training text fills a row of {self.row_len} tokens with documents of at "
                f"most {max_len}: give more text or lower --row-len"
            )
        row, room = [], self.row_len
        while room:
            length = min(int(lengths[piece]) - offset, room)
            row.append((tokens, int(starts[piece]) + offset, length))
            room -= length
            offset += length
            if offset == lengths[piece] or not (
                room or self.split
            ):  # done with it, or its rest is dropped
                piece, offset = piece + 1, 0
        return row, Cursor(epoch, shard, piece, offset)

    def _pieces(self, epoch, shard, max_len):
        """(tokens, starts, lengths, cumulative lengths) of the pieces of the epoch's shard-th
        shard, in order."""
        key = (epoch, shard, max_len)
        if key not in self._pieces_of:
            shuffled = self.shuffle or epoch > 0
            n = len(self.shards)
            which = (
                np.random.default_rng((self.seed, epoch)).permutation(n)[shard]
                if shuffled
                else shard
            )
            rng = np.random.default_rng((self.seed, epoch, 1 + int(which)))
            tokens = self._open(which)
            starts = self._starts[which]
            ends = np.append(
                starts[1:], len(tokens) - 1
            )  # the shard's last token is only ever a target
            if self.split and starts[0] > 0:  # the end of a document that began in the shard before
                starts, ends = np.append(0, starts), np.append(starts[0], ends)
            starts, ends = starts[starts < ends], ends[starts < ends]
            if self.split:
                starts, ends = split_pieces(
                    starts, ends, max_len, int(rng.integers(max_len)) if shuffled else 0
                )
            lengths = np.minimum(ends - starts, max_len)
            if shuffled:
                order = rng.permutation(len(starts))
                starts, lengths = starts[order], lengths[order]
            self._pieces_of = {
                key: (tokens, starts, lengths, np.cumsum(lengths))
            }  # one is in use at a time
        return self._pieces_of[key]

    def _open(self, which):
        if which not in self._tokens:
            self._tokens[which] = read_shard(self.shards[which], self.n_vocab)
            self._starts[which] = document_starts(self._tokens[which], self.eot)
        return self._tokens[which]


def split_pieces(starts, ends, max_len, phase):
    """Cut [start, end) ranges at start + phase, + phase + max_len, ...; returns (starts, ends)
    of the pieces."""
    first = starts + (phase or max_len)  # where each document's second piece begins
    extra = np.maximum(0, -(-(ends - first) // max_len))  # pieces after the first
    doc = np.repeat(np.arange(len(starts)), extra + 1)
    nth = np.arange(len(doc)) - np.repeat(np.cumsum(extra + 1) - (extra + 1), extra + 1)
    begin = np.where(nth == 0, starts[doc], first[doc] + (nth - 1) * max_len)
    end = np.minimum(ends[doc], np.where(nth == 0, first[doc], first[doc] + nth * max_len))
    return begin, end


class ValLoader:
    """The fixed validation split: inputs are tokens [0, N), targets [1, N + 1), N = n_tokens or all
    there are.

    Rows follow each other without regard to documents' starts, so every target counts exactly once;
    attention is still masked at document borders. `n_targets` is N; `targets` (N,) uint16 is for
    counting bytes.
    """

    def __init__(self, shards, *, eot, n_vocab, row_len, n_tokens=None, max_docs=None):
        tokens = (
            np.concatenate([read_shard(p, n_vocab) for p in shards])
            if len(shards) > 1
            else read_shard(shards[0], n_vocab)
        )
        have = len(tokens) - 1
        if have < 1 or (n_tokens or 0) > have:
            raise InputError(
                f"{shards[0]}: expected {n_tokens or 1} validation tokens and one more, "
                f"found {len(tokens)}"
            )
        self.n_targets, self.row_len = n_tokens or have, row_len
        self.max_docs = max_docs or default_max_docs(row_len)
        self.tokens, self.targets = tokens, tokens[1 : self.n_targets + 1]
        self._starts = np.flatnonzero(tokens[: self.n_targets] == eot)

    def micro_batches(self, rank=0, world_size=1, micro_rows=1):
        """One rank's share as equally shaped MicroBatches; every rank gets the same number of
        them."""
        rows = [self._row(at) for at in range(0, self.n_targets, self.row_len)]
        stride = micro_rows * world_size
        rows += [None] * (-len(rows) % stride)
        for i in range(rank * micro_rows, len(rows), stride):
            yield pack(rows[i : i + micro_rows], self.row_len, self.max_docs, self.row_len)

    def _row(self, at):
        end = min(at + self.row_len, self.n_targets)
        inside = self._starts[
            np.searchsorted(self._starts, at + 1) : np.searchsorted(self._starts, end)
        ]
        borders = [at, *inside.tolist(), end]
        return [(self.tokens, a, b - a) for a, b in zip(borders, borders[1:])]


class Prefetcher:
    """Runs an iterator of MicroBatch lists in a thread, one or two steps ahead, in pinned memory
    for CUDA.

    Iterate over it; items come out on `device`, copied without waiting. An exception in the thread
    is raised here.
    """

    def __init__(self, batches, device, depth=2):
        self.device = torch.device(device)
        self._queue, self._stop = queue.Queue(depth), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(batches,), daemon=True)
        self._thread.start()

    def _run(self, batches):
        try:
            for batch in batches:
                if self.device.type == "cuda":
                    batch = [MicroBatch(*(t.pin_memory() for t in micro)) for micro in batch]
                if not self._put(batch):
                    return
            self._put(None)
        except BaseException as e:
            self._put(e)

    def _put(self, item):
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def __iter__(self):
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield [
                MicroBatch(*(t.to(self.device, non_blocking=True) for t in micro)) for micro in item
            ]

    def close(self):
        self._stop.set()
        self._thread.join()
