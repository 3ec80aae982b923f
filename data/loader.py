"""Batches of documents, packed into rows.

A row holds `row_len` tokens; documents fill it one after another and attention never crosses a row,
so a row means the same whatever batch, rank or micro-batch it lands in. The global batch of a step
is a list of rows that depends on (data, seed, step) alone: 1, 3 or 8 ranks train on the same
tokens. Steps are numbered from 1.

A document longer than `max_doc_len` is cut. `long_docs="drop"` drops the rest, as the record does
with its billions of tokens, and every row begins where a document does: there the context is
complete. `long_docs="split"` keeps every token: documents are cut into pieces at a phase that
changes each epoch, the pieces are shuffled, and what a row has no room for begins the next.
Every target is the token that really follows in the data, also at cuts.
"""

import queue
import threading
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np
import torch

from base import InputError

from .shards import read_shard

SHORT = 256  # tokens of a training text, of which shorter rows can be made
IGNORE = -100  # target of padding, left out of the loss


class MicroBatch(NamedTuple):
    """B rows of T tokens, and the borders of their documents.

    inputs: (B, T) int64; targets: (B, T) int64, IGNORE where padded; cu_seqlens: (n,) int32, where
    each document starts in the flattened rows, then B * T up to a fixed n.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor


class Cursor(NamedTuple):
    """Where the next row starts: epoch, shard within it, piece within that, token within that."""

    epoch: int = 0
    shard: int = 0
    piece: int = 0
    offset: int = 0


class Pieces(NamedTuple):
    """A shard's pieces of documents, in the order in which an epoch goes through them."""

    tokens: np.ndarray  # (shard's tokens,) uint16 or uint32
    starts: np.ndarray  # (n,) int64, positions in tokens
    lengths: np.ndarray  # (n,) int64
    ends: np.ndarray  # (n,) int64, tokens up to and with each piece


def document_starts(tokens, eot):
    """Positions (n,) int64 of end-of-text tokens; a stream without any is one document starting
    at 0."""
    starts = np.flatnonzero(tokens == eot)
    return starts if len(starts) else np.zeros(1, dtype=np.int64)


def default_max_docs(row_len):
    """Documents told apart in a row of this length: one for every 256 tokens, at least 8.

    Web pages have about 690. Attention kernels start blocks for each place in cu_seqlens, filled
    or not, so there should not be many to spare.
    """
    return max(8, row_len // 256)


def slots_of_pass(n_rows, row_len, max_len):
    """Documents told apart in a pass of so many rows: one for every 512 tokens and a row's share to
    spare, as in modded-nanogpt; at least 8 a row, and enough to divide all of it."""
    return max((n_rows + 1) * row_len // 512, 8 * n_rows, n_rows * -(-row_len // max_len))


def spread_borders(lengths, row_len, slots, max_len):
    """Where documents begin in rows of segments of these lengths: at most `slots` numbers.

    lengths: a list for each row, all at most max_len. Every segment has a border of its own as long
    as enough are left to divide all that comes after it every max_len tokens.
    """
    divided = -(-row_len // max_len)  # borders of a row without any of its own
    borders = []
    for r, row in enumerate(lengths):
        later_rows = (len(lengths) - r - 1) * divided
        at = 0
        for length in row:
            rest = -(-(row_len - at - length) // max_len)
            if len(borders) + 1 + rest + later_rows > slots:
                break
            borders.append(r * row_len + at)
            at += length
        borders += range(r * row_len + at, (r + 1) * row_len, max_len)
    return borders


def best_fit(sizes, row_len, most):
    """Rows of items of these sizes, each of row_len in all and `most` items at most: lists of their
    numbers.

    The largest item comes first, and each goes where it leaves the least room, or begins a row
    where there is none (best fit decreasing). Rows are in the order of their largest items, so that
    items in a random order make rows in a random order.
    """
    rows = []
    there = {}  # room -> numbers of the rows that have it
    rooms = 0  # a bit for each of these
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = rooms >> sizes[i]
        if fitting:
            room = sizes[i] + (fitting & -fitting).bit_length() - 1
            row = there[room].pop()
            if not there[room]:
                rooms ^= 1 << room
        else:
            room = row_len
            row = len(rows)
            rows.append([])
        rows[row].append(i)
        room -= sizes[i]
        if room > 0 and len(rows[row]) < most:
            there.setdefault(room, []).append(row)
            rooms |= 1 << room
    return sorted(rows)


def pack(rows, row_len, max_docs, max_len, slots=None):
    """Rows (each a list of (tokens, start, length) segments, or None for padding) -> MicroBatch.

    A segment may have a fourth part, which of all those tokens count as targets, bool.
    No document in cu_seqlens is longer than max_len. A row with more than max_docs segments keeps
    the borders of the first ones; what remains of it, padding included, is divided every max_len
    tokens. With slots, all rows together have so many borders at most, see spread_borders().
    """
    in_all = slots or len(rows) * (max_docs + -(-row_len // max_len))
    inputs = np.zeros((len(rows), row_len), dtype=np.int64)
    targets = np.full((len(rows), row_len), IGNORE, dtype=np.int64)
    cu_seqlens = np.full(in_all + 1, len(rows) * row_len, dtype=np.int32)
    n = 0  # borders so far
    for r, row in enumerate(rows):
        at = 0
        rest = 0  # where the segments that have a border of their own end
        for i, (tokens, start, length, *counts) in enumerate(row or ()):
            inputs[r, at : at + length] = tokens[start : start + length]
            following = slice(start + 1, start + length + 1)
            targets[r, at : at + length] = tokens[following]
            if counts:
                targets[r, at : at + length][~counts[0][following]] = IGNORE
            if i < max_docs and not slots:
                cu_seqlens[n] = r * row_len + at
                n += 1
                rest = at + length
            at += length
        if not slots:
            more = np.arange(rest, row_len, max_len)
            cu_seqlens[n : n + len(more)] = r * row_len + more
            n += len(more)
    if slots:
        lengths = [[segment[2] for segment in row or ()] for row in rows]
        borders = spread_borders(lengths, row_len, slots, max_len)
        cu_seqlens[: len(borders)] = borders
    return MicroBatch(
        inputs=torch.from_numpy(inputs),
        targets=torch.from_numpy(targets),
        cu_seqlens=torch.from_numpy(cu_seqlens),
    )


class TrainLoader:
    """The training stream: `rows(step)` is the global batch, `micro_batches(step, ...)` one
    rank's part of it. Steps are numbered from 1."""

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
        docs_by_pass=False,
    ):
        """shards: paths; batch_rows, max_doc_len: functions of the step; shuffle: documents and
        shards in random order from the first epoch on (later epochs are always shuffled); max_docs:
        documents told apart in a row; docs_by_pass: they are counted in a pass instead. Raises
        InputError when the data does not fill one batch."""
        self.shards = list(shards)
        self.eot = eot
        self.n_vocab = n_vocab
        self.row_len = row_len
        self.batch_rows = batch_rows
        self.max_doc_len = max_doc_len
        self.split = long_docs == "split"
        self.shuffle = shuffle
        self.max_docs = max_docs or default_max_docs(row_len)
        self.docs_by_pass = docs_by_pass
        self._tokens = {}  # shard number -> its tokens, once it has been reached
        self._starts = {}  # shard number -> where its documents start
        self._ahead = {}  # shard number -> a Future of both, while another one is in use
        self.reseed(seed)

        # Header and size now, the tokens when they are reached
        self.n_tokens = sum(len(read_shard(path)) for path in self.shards)
        need = len(self.rows(1))
        if self._next[1].epoch:  # the first batch went through all there is
            raise InputError(
                f"the training text has {self._rows_in_first_epoch() * row_len} tokens in rows of "
                f"{row_len}; one batch needs {need * row_len}: give more text or lower "
                "--batch-tokens"
            )

    def reseed(self, seed):
        """Begin anew in another order."""
        self.seed = seed
        self._next = (1, Cursor())  # (step, where its batch starts)
        self._cached = (None, None)  # (key, Pieces): one shard's pieces are in use at a time

    def rows(self, step):
        """The global batch of `step`: a list of rows, each a list of (tokens, start, length)."""
        if step < 1:
            raise ValueError(f"step {step}: steps are numbered from 1")
        at, cursor = self._next
        if step < at:
            at, cursor = 1, Cursor()

        # Walking past a batch touches the index only, no tokens
        while True:
            max_len = self._max_len(at)
            if at > 1 and max_len != self._max_len(at - 1):
                # Pieces are cut anew: documents keep their numbers, split pieces do not
                if self.split:
                    cursor = Cursor(cursor.epoch + 1)
                else:
                    cursor = cursor._replace(offset=0)
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
        yield from self.of_ranks(step, [rank], world_size, micro_rows)[0]

    def of_ranks(self, step, ranks, world_size, micro_rows=None):
        """Such lists of MicroBatches of several ranks, in going through the step's rows once."""
        rows = self.rows(step)
        self._open_ahead()
        if not micro_rows:
            micro_rows = -(-len(rows) // world_size)
        stride = micro_rows * world_size
        rows += [None] * (-len(rows) % stride)
        found = []
        for rank in ranks:
            starts = range(rank * micro_rows, len(rows), stride)
            found.append([self._pack(rows[i : i + micro_rows], step) for i in starts])
        return found

    def padding(self, step, micro_rows):
        """A MicroBatch of padding alone, as of this step."""
        return self._pack([None] * micro_rows, step)

    def _pack(self, rows, step):
        max_len = self._max_len(step)
        slots = slots_of_pass(len(rows), self.row_len, max_len) if self.docs_by_pass else None
        return pack(rows, self.row_len, self.max_docs, max_len, slots)

    def n_targets(self, step, tokens):
        """How many targets of the global batch of `tokens` count in the loss: all."""
        return tokens

    def _max_len(self, step):
        return min(self.max_doc_len(step), self.row_len)

    def _rows_in_first_epoch(self):
        """How many rows the first epoch has."""
        n = 0
        _, cursor = self._row(Cursor(), self._max_len(1))
        while cursor.epoch == 0:
            n += 1
            _, cursor = self._row(cursor, self._max_len(1))
        return n

    def _too_short(self, max_len):
        """Why no row can be filled, and what would help."""
        ends = (self._pieces(0, shard, max_len).ends for shard in range(len(self.shards)))
        most = max((int(end[-1]) for end in ends if len(end)), default=0)
        shorter = ""
        if most >= SHORT:
            fits = 2 ** (most.bit_length() - 1)
            shorter = f", or --row-len {fits} and no larger --batch-tokens"
        return (
            f"the training text is too short for a row of {self.row_len} tokens with documents of "
            f"at most {max_len}: it has {most}, or its largest part; give more text{shorter}"
        )

    def _row(self, cursor, max_len):
        """Fill one row from the cursor on; returns (segments, cursor after it)."""
        epoch, shard, piece, offset = cursor

        # Find a shard with enough left for a row; twice through them all, it will not be found
        for _ in range(2 * len(self.shards) + 1):
            pieces = self._pieces(epoch, shard, max_len)
            before = offset + (pieces.ends[piece - 1] if piece else 0)
            if piece < len(pieces.ends) and pieces.ends[-1] - before >= self.row_len:
                break
            piece = offset = 0
            shard += 1
            if shard == len(self.shards):
                epoch += 1
                shard = 0
        else:
            raise InputError(self._too_short(max_len))

        row = []
        room = self.row_len
        while room:
            length = min(int(pieces.lengths[piece]) - offset, room)
            row.append((pieces.tokens, int(pieces.starts[piece]) + offset, length))
            room -= length
            offset += length
            used_up = offset == pieces.lengths[piece]
            rest_is_dropped = room == 0 and not self.split
            if used_up or rest_is_dropped:
                piece += 1
                offset = 0
        return row, Cursor(epoch, shard, piece, offset)

    def _pieces(self, epoch, shard, max_len):
        """The Pieces of the epoch's shard-th shard."""
        key = (epoch, shard, max_len)
        if self._cached[0] != key:
            self._cached = (key, self._cut(epoch, shard, max_len))
        return self._cached[1]

    def _cut(self, epoch, shard, max_len):
        shuffled = self.shuffle or epoch > 0
        which = self._which(epoch, shard)
        rng = np.random.default_rng((self.seed, epoch, 1 + which))

        tokens = self._open(which)
        starts = self._starts[which]
        ends = np.append(starts[1:], len(tokens) - 1)  # the last token is only ever a target
        if self.split and starts[0] > 0:
            # The end of a document that began in the shard before
            ends = np.append(starts[0], ends)
            starts = np.append(0, starts)
        filled = starts < ends
        starts = starts[filled]
        ends = ends[filled]

        if self.split:
            phase = int(rng.integers(max_len)) if shuffled else 0
            starts, ends = split_pieces(starts, ends, max_len, phase)
        lengths = np.minimum(ends - starts, max_len)
        if shuffled:
            order = rng.permutation(len(starts))
            starts = starts[order]
            lengths = lengths[order]
        return Pieces(tokens, starts, lengths, ends=np.cumsum(lengths))

    def _which(self, epoch, shard):
        """The number of the epoch's shard-th shard."""
        if not self.shuffle and epoch == 0:
            return shard
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards))
        return int(order[shard])

    def _open(self, which):
        if which not in self._tokens:
            ahead = self._ahead.pop(which, None)
            found = ahead.result() if ahead else self._read(which)
            self._tokens[which], self._starts[which] = found
        return self._tokens[which]

    def _read(self, which):
        """A shard's tokens, and where its documents start: some tenths of a second for 100 million
        tokens."""
        tokens = read_shard(self.shards[which], self.n_vocab)
        return tokens, document_starts(tokens, self.eot)

    def _open_ahead(self):
        """Begin to read the shard after the one in use, in a thread of its own: when it is reached,
        nobody waits for it. What is wrong with it is told then."""
        epoch, shard = self._next[1][:2]
        later = (epoch, shard + 1) if shard + 1 < len(self.shards) else (epoch + 1, 0)
        which = self._which(*later)
        if which in self._tokens or which in self._ahead:
            return
        self._ahead[which] = future = Future()

        def read():
            try:
                future.set_result(self._read(which))
            except BaseException as e:
                future.set_exception(e)

        threading.Thread(target=read, daemon=True).start()


def split_pieces(starts, ends, max_len, phase):
    """Cut [start, end) ranges at start + phase, + phase + max_len, ...; returns (starts, ends)
    of the pieces, each (n,) int64."""
    first_cut = starts + (phase or max_len)  # where each document's second piece begins
    cuts = np.maximum(0, -(-(ends - first_cut) // max_len))
    pieces = cuts + 1

    # For every piece, its document and its number within that
    doc = np.repeat(np.arange(len(starts)), pieces)
    nth = np.arange(len(doc)) - np.repeat(np.cumsum(pieces) - pieces, pieces)

    cut = first_cut[doc] + nth * max_len  # where the piece ends, unless its document does before
    begin = np.where(nth == 0, starts[doc], cut - max_len)
    return begin, np.minimum(ends[doc], cut)


class ValLoader:
    """The fixed validation split: inputs are tokens [0, N), targets [1, N + 1).

    N is n_tokens, or all there are. Rows follow each other without regard to documents' starts, so
    every target counts exactly once; attention is still masked at document borders. `n_targets` is
    N; `targets` (N,), tokens, is for counting bytes.
    """

    def __init__(
        self, shards, *, eot, n_vocab, row_len, n_tokens=None, max_docs=None, docs_by_pass=False
    ):
        """max_docs: documents told apart in a row; docs_by_pass: all there are, which is as many as
        the row with most has. Raises InputError where there are fewer than n_tokens + 1 tokens."""
        tokens = read_shard(shards[0], n_vocab)
        if len(shards) > 1:
            tokens = np.concatenate([tokens, *(read_shard(path, n_vocab) for path in shards[1:])])
        have = len(tokens) - 1
        need = n_tokens or 1
        if have < need:
            raise InputError(
                f"{shards[0]}: expected {need} validation tokens and one more, found {len(tokens)}"
            )
        self.n_targets = n_tokens or have
        self.row_len = row_len
        self.max_docs = max_docs or default_max_docs(row_len)
        self.tokens = tokens
        self.targets = tokens[1 : self.n_targets + 1]
        self._starts = np.flatnonzero(tokens[: self.n_targets] == eot)
        self.docs_by_pass = docs_by_pass
        if docs_by_pass:
            most = max(len(self._row(at)) for at in range(0, self.n_targets, row_len))
            self.max_docs = -(-most // 64) * 64

    def micro_batches(self, rank=0, world_size=1, micro_rows=1, n_rows=None):
        """One rank's share as equally shaped MicroBatches; every rank gets the same number of
        them. n_rows: of so many rows, evenly spread over the split; None: of all."""
        places = range(0, self.n_targets, self.row_len)
        if n_rows is not None:
            places = places[:: max(1, len(places) // n_rows)][:n_rows]
        rows = [self._row(at) for at in places]
        stride = micro_rows * world_size
        rows += [None] * (-len(rows) % stride)
        for i in range(rank * micro_rows, len(rows), stride):
            slots = micro_rows * self.max_docs if self.docs_by_pass else None
            some = rows[i : i + micro_rows]
            yield pack(some, self.row_len, self.max_docs, self.row_len, slots)

    def _row(self, at):
        end = min(at + self.row_len, self.n_targets)
        first = np.searchsorted(self._starts, at + 1)
        last = np.searchsorted(self._starts, end)
        borders = [at, *self._starts[first:last].tolist(), end]
        return [(self.tokens, a, b - a) for a, b in zip(borders, borders[1:])]


class Prefetcher:
    """Runs an iterator of MicroBatch lists in a thread, one or two steps ahead, in pinned memory
    for CUDA.

    Iterate over it; items come out on `device`, copied without waiting. An exception in the thread
    is raised here.
    """

    def __init__(self, batches, device, depth=2):
        self.device = torch.device(device)
        self._queue = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(batches,), daemon=True)
        self._thread.start()

    def _run(self, batches):
        try:
            for batch in batches:
                if self.device.type == "cuda":
                    batch = [type(micro)(*(t.pin_memory() for t in micro)) for micro in batch]
                if not self._put(batch):
                    return
            self._put(None)
        except BaseException as e:
            self._put(e)

    def _put(self, item):
        """Whether the item found room before close()."""
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
            batch = []
            for micro in item:
                moved = (t.to(self.device, non_blocking=True) for t in micro)
                batch.append(type(micro)(*moved))
            yield batch

    def close(self):
        self._stop.set()
        self._thread.join()
