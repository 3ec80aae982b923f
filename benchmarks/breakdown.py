"""Where a training step's time goes: a profiler's trace divided into parts, each instant to the
first that has it.

On a GPU:
    forward, backward, guard, optimizer, other   a kernel launched from there runs (other: from
    anywhere else)
    communication                                nothing but NCCL runs: what is not hidden
    data                                         a copy of the batch runs, or nothing while the host
    waits for a batch
    gaps                                         nothing runs
The guard is what judges a step: sums of squares of all gradients, their report to the host.
On a CPU the host is the device: communication is waiting for other ranks, other is the loop itself,
gaps are none.
"""

import bisect
import contextlib
import types
from unittest import mock

import torch
import torch.distributed as dist
from torch.profiler import record_function

from optim import shards

HOST = ("forward", "backward", "guard", "optimizer")  # in these the main thread spends its time
PARTS = (*HOST, "communication", "data", "gaps", "other")
MARK = "stopwatch:"  # before a part's name in the trace


def covered(intervals, start, end):
    """Length of the union of (from, to) intervals inside [start, end]."""
    total, at = 0.0, start
    for a, b in sorted(intervals):
        a, b = max(a, at), min(b, end)
        if b > a:
            total, at = total + b - a, b
    return total


def divide(layers, start, end):
    """{part: intervals} -> {part: length}, instants in several going to the first; and the
    length in none."""
    taken, before, lengths = [], 0.0, {}
    for part, intervals in layers.items():
        taken = taken + intervals
        now = covered(taken, start, end)
        lengths[part], before = now - before, now
    return lengths, end - start - before


def trace_parts(events, cuda):
    """Events of a Chrome trace -> {part: microseconds} of the range MARK + "profiled"; they sum
    to its length."""
    ranges, launched, device = {part: [] for part in (*PARTS, "profiled")}, {}, []
    for e in events:
        category, args = e.get("cat"), e.get("args", {})
        if category == "user_annotation" and e["name"].startswith(MARK):
            ranges[e["name"][len(MARK) :]].append((e["ts"], e["ts"] + e["dur"]))
        elif category in ("cuda_runtime", "cuda_driver") and "correlation" in args:
            launched[args["correlation"]] = e["ts"]
        elif category in ("kernel", "gpu_memcpy", "gpu_memset"):
            device.append(e)
    ((start, end),) = ranges.pop("profiled")
    if not cuda:
        layers = {part: ranges[part] for part in ("communication", "data", *HOST)}
        lengths, rest = divide(layers, start, end)
        return {part: 0.0 for part in PARTS} | lengths | dict(other=rest)

    # whatever thread launched a kernel (backward has its own), the main thread was in one of these
    # meanwhile
    host = sorted((*span, part) for part in (*HOST, "data") for span in ranges[part])
    begins, ran = [a for a, _, _ in host], {part: [] for part in PARTS}
    for e in device:
        at = launched.get(e.get("args", {}).get("correlation"), e["ts"])
        i = bisect.bisect_right(begins, at) - 1
        part = host[i][2] if i >= 0 and at <= host[i][1] else "other"
        ran["communication" if "nccl" in e["name"].lower() else part].append(
            (e["ts"], e["ts"] + e["dur"])
        )
    layers = {part: ran[part] for part in (*HOST, "other", "communication")}
    lengths, rest = divide(layers | dict(data=ran["data"] + ranges["data"]), start, end)
    return {part: 0.0 for part in PARTS} | lengths | dict(gaps=rest)


@contextlib.contextmanager
def named_parts(trainer):
    """Name the parts of a step for the profiler, by wrapping what the trainer calls."""

    def named(part, function):
        def call(*args, **kwargs):
            with record_function(MARK + part):
                return function(*args, **kwargs)

        return call

    def awaited(collective):
        def call(*args, **kwargs):
            work = named("communication", collective)(*args, **kwargs)
            return work and types.SimpleNamespace(wait=named("communication", work.wait))

        return call

    with contextlib.ExitStack() as stack:

        def wrap(owner, name, wrapped):
            stack.enter_context(mock.patch.object(owner, name, wrapped))

        wrap(trainer, "forward", named("forward", trainer.forward))
        wrap(torch.Tensor, "backward", named("backward", torch.Tensor.backward))
        wrap(trainer.guard, "judge", named("guard", trainer.guard.judge))
        wrap(trainer.optimizer, "step", named("optimizer", trainer.optimizer.step))
        if trainer.world.device.type != "cuda":  # there, NCCL's kernels say so themselves
            for owner, name in (
                (shards, "reduce_scatter"),
                (shards, "all_gather"),
                (dist, "all_reduce"),
            ):
                wrap(owner, name, awaited(getattr(owner, name)))
        yield
