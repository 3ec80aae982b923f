"""Ranks without processes: one rank at a time trains in this process, in a process group whose
collectives write themselves down. What the first rank broadcasts, the others get when their turn
comes; sums and gathers hold this rank's own numbers only, so the numbers mean nothing, and shapes,
order and bytes are those of a run."""

import contextlib
import os
import types
import typing

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future

from runtime import launch


class Call(typing.NamedTuple):
    """A collective as its caller made it."""

    kind: str  # all_reduce, reduce_scatter, all_gather, all_to_all, broadcast or barrier
    group: str  # all, node or across
    # Of the whole: what goes into a reduction or an all-to-all, what comes out of a gather
    shape: tuple
    dtype: torch.dtype
    bytes: int

    def of_all(self):
        """What is the same on all ranks: into an all-to-all each puts as many rows as it has."""
        if self.kind != "all_to_all":
            return self
        return self._replace(shape=self.shape[1:], bytes=None)


class Tape:
    """What one rank has called, and the marks between; first: the first rank's, None for its
    own."""

    def __init__(self, first=None):
        self.calls = []
        self.marks = []  # (name, number of calls before)
        self.sent = []  # tensors that were broadcast, by the first rank
        self.rows = []  # of each all-to-all, (sent to each rank, received from each)
        self.first = first
        self.groups = 0  # that have been made

    def mark(self, name):
        self.marks.append((name, len(self.calls)))

    def between(self, begin, end):
        """Lists of calls from each mark `begin` to the next mark `end`."""
        found = []
        for i, (name, at) in enumerate(self.marks):
            if name == begin:
                until = next(n for other, n in self.marks[i:] if other == end)
                found.append(self.calls[at:until])
        return found


tape = Tape()  # of the rank whose turn it is


def done(*tensors):
    future = Future()
    future.set_result(list(tensors))
    return _create_work_from_future(future)


class FakeGroup(dist.ProcessGroup):
    """A process group of one process that says it has many."""

    def __init__(self, rank, size):
        super().__init__(rank, size)
        self.place = rank
        self.many = size
        self.name = ("all", "node", "across")[0 if tape.groups == 0 else self.later()]
        tape.groups += 1

    def later(self):
        """Groups of this rank after the first: join_world() makes those of machines first."""
        return 1 if tape.groups == 1 else 2

    def size(self):
        return self.many

    def getBackendName(self):
        return "fake-ranks"

    def write_down(self, kind, whole):
        tape.calls.append(Call(kind, self.name, tuple(whole.shape), whole.dtype, whole.nbytes))

    def allreduce(self, tensors, opts=None):
        self.write_down("all_reduce", tensors[0])
        return done(*tensors)

    def broadcast(self, tensors, opts=None):
        [x] = tensors
        self.write_down("broadcast", x)
        if tape.first is None:
            tape.sent.append(x.clone())
        else:
            x.copy_(tape.first.sent[len(tape.sent)])
            tape.sent.append(x)
        return done(x)

    def barrier(self, opts=None):
        self.write_down("barrier", torch.empty(0))
        return done()

    def all_gather_single(self, out, own, opts=None):
        self.write_down("all_gather", out)
        assert len(out) == self.many * len(own)
        for part in out.chunk(self.many):
            part.copy_(own)
        return done(out)

    def reduce_scatter_single(self, out, whole, opts=None):
        self.write_down("reduce_scatter", whole)
        assert len(whole) == self.many * len(out)
        out.copy_(whole.chunk(self.many)[self.place] if len(out) else out)
        return done(out)

    def alltoall_base(self, out, x, receives, sends, opts=None):
        assert len(receives) == len(sends) == self.many
        assert (sum(receives), sum(sends)) == (len(out), len(x))
        self.write_down("all_to_all", x)
        tape.rows.append((list(sends), list(receives)))
        own = x.split(sends)[self.place]
        assert sends[self.place] == receives[self.place]
        out.zero_()
        out.split(receives)[self.place].copy_(own)
        return done(out)

    _allgather_base = all_gather_single  # their names until PyTorch 2.12
    _reduce_scatter_base = reduce_scatter_single


def make_group(store, rank, size, timeout):
    return FakeGroup(rank, size)


with contextlib.suppress(RuntimeError):  # another test file has done so
    dist.Backend.register_backend("fake_ranks", make_group, devices=["cpu", "cuda"])


@contextlib.contextmanager
def as_rank(rank, size, local_size, monkeypatch, first=None):
    """Inside, this process is that rank of so many; yields its Tape."""
    global tape
    tape = Tape(first)
    place = dict(
        RANK=rank,
        LOCAL_RANK=rank % local_size,
        WORLD_SIZE=size,
        LOCAL_WORLD_SIZE=local_size,
        MASTER_ADDR="nowhere",
        MASTER_PORT=1,
    )
    with monkeypatch.context() as patch:
        for name, value in place.items():
            patch.setitem(os.environ, name, str(value))
        patch.setattr(launch, "ctypes", types.SimpleNamespace(CDLL=lambda name: FakeLibrary()))
        begin = dist.init_process_group

        def init(backend, **kwargs):
            begin("fake_ranks", rank=rank, world_size=size, store=dist.HashStore())

        patch.setattr(dist, "init_process_group", init)
        waits = dist.distributed_c10d
        # How long a rank waits depends on how long its steps take
        patch.setattr(waits, "_set_pg_timeout", lambda timeout, group: None)
        try:
            yield tape
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


class FakeLibrary:
    """libc without prctl(): nothing is to end these tests."""

    def prctl(self, *args):
        return 0
