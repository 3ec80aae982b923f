"""Tensors whose rows (dim 0) are shared out over the ranks of a machine, the same way on every
machine.

Gradients are reduce-scattered inside a machine and each part is then summed across machines, so
that the slow links between them carry 1 / ranks of it; what its owner has updated is gathered
inside each machine. All of it is started and waited for apart, so that it overlaps between tensors.
Rows that ranks do not divide get padding.
"""

import typing

import torch
import torch.distributed as dist

# PyTorch 2.13 renamed these
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
all_to_all = dist.all_to_all_single


class Shard:
    """One tensor's place: `whole` is all of it, `own` this rank's rows, a view. With sharded=False
    all ranks own all.

    The n rows of a part may be more than are left for the last ranks: `own` is shorter there, or
    empty. room: `whole` with the rows of padding behind it, as make_room() gives it; then weights
    are gathered right into it.
    """

    def __init__(self, whole, world, sharded=True, room=None):
        self.whole = whole
        self.world = world
        self.ranks = world.local_size if sharded else 1
        self.n = -(-len(whole) // self.ranks)  # rows of a part
        self.start = 0
        if self.ranks > 1:
            place = world.rank % world.local_size  # among the ranks of this machine
            self.start = min(place * self.n, len(whole))
        self.own = whole[self.start : self.start + self.n]
        self.room = whole if len(whole) == self.n * self.ranks else room

    def reduce(self, grad):
        """Start summing over ranks; returns (work or None, n rows, of which this rank's come
        first). grad: of as many elements; where there is memory behind it for what makes equal
        parts, it is not copied."""
        grad = grad.view(self.whole.shape)
        if self.world.size == 1:
            return None, grad
        if self.ranks == 1:
            return dist.all_reduce(grad, async_op=True), grad
        grad = with_room_behind(grad, self.n * self.ranks)
        part = torch.empty_like(grad[: self.n])
        return reduce_scatter(part, grad, group=self.world.node, async_op=True), part

    def reduce_rows(self, grad, rows):
        """The same as reduce() of a table, of which ranks exchange only what is not zero anyway.
        rows: a Touched."""
        width = grad.size(-1)
        sent = grad.view(-1, width)[rows.mine]
        got = grad.new_empty(len(rows.theirs), width)
        node = self.world.node
        work = all_to_all(got, sent, rows.receives, rows.sends, group=node, async_op=True)
        part = grad.new_zeros(self.n, *self.whole.shape[1:])
        return RowSum(work, sent, got, rows, part.view(-1, width)), part

    def reduce_across(self, work, part):
        """Start the sum over machines of what reduce() gave; returns the same pair."""
        if self.world.across is None or self.ranks == 1:
            return work, part
        work.wait()
        return dist.all_reduce(part, group=self.world.across, async_op=True), part

    def gather(self):
        """Start collecting all ranks' own rows in `whole`; returns what waits for it."""
        if self.ranks == 1:
            return lambda: None
        out = self.room
        if out is None:
            out = self.own.new_empty(self.n * self.ranks, *self.own.shape[1:])
        if out is self.room and out.is_cuda:  # NCCL may read a part where it is to be
            at = self.world.rank % self.world.local_size * self.n
            own = out[at : at + self.n]
        else:
            own = padded(self.own.clone(), self.n)
        work = all_gather(out, own, group=self.world.node, async_op=True)

        def finish():
            work.wait()
            if out is not self.room:
                self.whole.copy_(out[: len(self.whole)])

        return finish

    def collect(self, part):
        """All ranks' rows of something that is shared out like this tensor, waiting for it."""
        if self.ranks == 1:
            return part
        out = part.new_empty(self.n * self.ranks, *part.shape[1:])
        all_gather(out, padded(part, self.n), group=self.world.node)
        return out[: len(self.whole)]


class RowSum(typing.NamedTuple):
    """Rows on their way to their owner."""

    work: typing.Any
    sent: torch.Tensor  # to be kept until then
    got: torch.Tensor
    rows: typing.Any  # a Touched
    part: torch.Tensor  # (rows, width) of the owner, zeros

    def wait(self):
        """Add them up, rank by rank: within one no row comes twice, so each run sums alike."""
        self.work.wait()
        counts = self.rows.receives
        for index, x in zip(self.rows.theirs.split(counts), self.got.split(counts)):
            self.part.index_add_(0, index, x)


def make_room(p, rows, world):
    """Give a parameter's data memory for as many of its `rows` as make equal parts, with zeros
    behind it -> the rows with these, a view of it, or None where there are no more."""
    n = -(-rows // world.local_size) * world.local_size
    if not rows or n == rows:
        return None
    each = p.numel() // rows
    room = p.data.new_zeros(n * each)
    room[: p.numel()] = p.data.flatten()
    p.data = room[: p.numel()].view(p.shape)
    return room


def with_room_behind(x, n):
    """x of length n along dim 0: with what is in memory behind it, or else a copy with zeros."""
    more = (n - len(x)) * x[:1].numel()
    there = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset() - x.numel()
    if not more or there < more or not x.is_contiguous():
        return padded(x, n)
    return x.as_strided((n, *x.shape[1:]), x.stride(), x.storage_offset())


def padded(x, n):
    """With zeros to length n along dim 0."""
    if len(x) == n:
        return x
    return torch.cat([x, x.new_zeros(n - len(x), *x.shape[1:])])
