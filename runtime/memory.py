"""What training will need, by part, against what is free: decided before it starts."""

import contextlib
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist

from base import InputError, RankError, one_line
from optim import rules_of

from . import limits

CPU_MICRO_TOKENS = 16384  # more bring no speed there
SHARE = 0.9  # of the free memory; the rest is for the allocator's gaps and libraries


def estimate(model, rules, rows, row_len, recompute, shards=1, cuda=False):
    """Bytes by part for forward passes of so many rows.

    model: a template's Model, may be on meta; rules: its update rules; shards: ranks that share the
    optimizer. On an H200 gpt2-small's passes of 4, 6 and 12 rows took 94 to 97% of this. On a CPU
    PyTorch's own attention and loss keep scores and logits that a GPU's kernels do not, in bf16
    some of them in fp32: up to 1.5 times as much in all, in bf16 up to 2.3 times.
    """
    weights = 0
    optimizer = 0
    for name, p in model.named_parameters():
        weights += p.numel() * model.dtype.itemsize
        # What makes masters of 2-byte weights: their lower bits on a GPU, whole ones on a CPU
        missing = 4 - model.dtype.itemsize
        masters = missing if cuda else 2 * missing
        optimizer += rules[name].state_bytes(p) + masters * p.numel()
    passes = model.activation_bytes(rows, row_len, recompute)
    if not cuda:
        halves = 3 if model.dtype == torch.float32 else 5
        passes = {name: size * halves // 2 for name, size in passes.items()}
    return dict(weights=weights, gradients=weights, optimizer=optimizer // shards, **passes)


def free_memory(device, local_size=1):
    """Bytes that one of local_size processes may use; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = min(system_memory(), limits.memory_left())
    return None if free == math.inf else int(free) // local_size


def system_memory():
    """Bytes that the system can give; where it does not say that, as macOS, all it has."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return math.inf


def describe(parts, free):
    """One line: the parts, their sum and what is free, in GB."""
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    line = f"{sum(parts.values()) / 1e9:.2f} GB ({listed})"
    return line if free is None else f"{line} of {free / 1e9:.2f} GB free"


def choose(model, config, free, shards=1, cuda=False):
    """(rows in a forward pass, whether blocks are recomputed, the estimate by part) for so many
    free bytes, None for any number; as many rows as fit, without recomputing if one does.

    model: a template's Model, may be on meta; config: a trainer's configuration. rows is 0 where
    not even one fits; the estimate then is what one would need.
    """
    rules = rules_of(model, config.optim)
    row_len = config.data.row_len
    micro_tokens = config.run.micro_tokens
    recompute = config.run.recompute
    if micro_tokens:
        wanted = micro_tokens // row_len
    else:
        most = math.inf if cuda else CPU_MICRO_TOKENS
        wanted = max(1, min(max(config.schedule.batch_tokens), most) // row_len)

    def parts(rows, recompute):
        return estimate(model, rules, rows, row_len, recompute, shards, cuda)

    def most_rows(recompute):
        """The most rows that fit, 0 if none does; only the given number if one was given."""
        for rows in [wanted] if micro_tokens else range(wanted, 0, -1):
            if free is None or sum(parts(rows, recompute).values()) <= SHARE * free:
                return rows
        return 0

    recomputed = recompute == "on"
    rows = most_rows(recomputed)
    if not rows and recompute == "auto":
        recomputed = True
        rows = most_rows(recomputed)
    return rows, recomputed, parts(rows or micro_tokens // row_len or 1, recomputed)


def fit(build, config, world):
    """(rows in a forward pass, whether blocks are recomputed, the estimate in words), the same on
    all ranks.

    What choose() says of this machine. build: () -> a template's Model; config: a trainer's
    configuration. Raises InputError when not even one row fits.
    """
    with torch.device("meta"):
        model = build()
    row_len = config.data.row_len
    micro_tokens = config.run.micro_tokens
    free = free_memory(world.device, world.local_size)
    cuda = world.device.type == "cuda"
    rows, recomputed, _ = choose(model, config, free, world.local_size, cuda)

    def parts(rows, recompute):
        rules = rules_of(model, config.optim)
        return estimate(model, rules, rows, row_len, recompute, world.local_size, cuda)

    # Ranks that disagreed would train on some rows twice and on others never
    chosen = torch.tensor([-rows, int(recomputed)], device=world.device)
    if world.size > 1:
        dist.all_reduce(chosen, op=dist.ReduceOp.MAX)
    rows = -chosen[0].item()
    recomputed = bool(chosen[1])
    if rows < 1:
        need = parts(micro_tokens // row_len or 1, recomputed)
        raise InputError(
            f"not enough memory on {world.device}: {describe(need, free)}; lower --micro-tokens "
            f"(now {micro_tokens or 'chosen to fit'}) or --row-len ({row_len}), allow --recompute "
            "auto, or take a smaller model"
        )
    return rows, recomputed, describe(parts(rows, recomputed), free)


def equal_passes(rows, most):
    """Rows per pass, all passes being alike: at most `most`, more than half of it, such that few
    are padding."""
    largest = min(most, rows)
    return min(range(largest, largest // 2, -1), key=lambda n: -(-rows // n) * n)


def ran_out(error):
    """Whether memory did, on a GPU or a CPU, whose allocator raises a RuntimeError like others."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def explained(row_len, get_setup):
    """Inside, running out of memory is a RankError of one line: others may have enough.

    get_setup: () -> what has the estimate in words as .memory, or None as long as there is none.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        if not ran_out(e):
            raise
        setup = get_setup()
        estimate = setup.memory if setup else "unknown"
        said = one_line(e, 120)
        raise RankError(
            f"out of memory; the estimate was {estimate}. Lower --micro-tokens, a multiple of "
            f"{row_len}, or give --recompute on ({said})"
        ) from None
