"""What training will need, by part, against what is free: decided before it starts."""

import math
from pathlib import Path

import torch
import torch.distributed as dist

from base import InputError

CPU_MICRO_TOKENS = 16384  # more bring no speed there
SHARE = 0.9  # of the free memory; the rest is for the allocator's gaps and libraries


def estimate(c, model, shards, rows, recompute, cuda=False):
    """Bytes by part for passes of `rows` rows. model: a GPT, may be on meta; shards: ranks that
    share the optimizer.

    Saved for backward are about 12 widths a layer besides the MLP's, 4 a value embedding; with
    recompute one width a layer, and one layer's while it is computed again. Logits are there once,
    with their gradient in the same buffer where a kernel writes it there, in fp8 with one of a
    byte, else with a gradient and in passing in fp32; with recompute, for 4,096 tokens. On an H200
    gpt2-small's passes of 4, 6 and 12 rows took 94 to 97% of this.
    """
    size, tokens, n_params = (
        model.embed.element_size(),
        rows * c.row_len,
        sum(p.numel() for p in model.parameters()),
    )
    layer = (12 + c.mlp_ratio) * c.n_embd
    widths = (
        c.n_layer * c.n_embd + layer
        if recompute
        else c.n_layer * layer + 4 * len(c.value_embed_layers) * c.n_embd
    )
    ops = model.ops.named()
    if ops["linear_cross_entropy"] == "fp8":
        per_logit = 3
    elif ops["linear_cross_entropy"] == "triton":
        per_logit = size
    else:
        per_logit = 2 * size + 4
    V = len(model.embed)
    columns = max(min(n or V, V) for n in c.sampled_softmax)  # of logits
    scores = 0  # which attention by PyTorch's plain means keeps
    if ops["attention"] in ("blockwise", "sdpa"):
        far = len({*c.long_layers, c.n_layer - 1})  # layers with the long window
        kept = [max(c.long_window)] * far + [max(c.short_window)] * (c.n_layer - far)
        scores = (
            4
            * tokens
            * c.n_head
            * sum(min(2 * w, c.row_len) for w in kept[: 1 if recompute else None])
        )
    tables = [model.value_embeds, model.ngram_embeds] + [model.embed] * (not c.tied)
    moments = 8 * (n_params - c.row_moments * sum(p.numel() for p in tables))
    return dict(
        weights=n_params * size,
        gradients=n_params * size,
        optimizer=(moments + n_params * (4 - size) * (1 if cuda else 2)) // shards,
        activations=tokens * size * widths + scores,
        logits=(min(tokens, 4096) if recompute else tokens) * columns * per_logit,
    )


def free_memory(device, local_size=1):
    """Bytes one process may use; None where it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return (
            int(next(x for x in lines if x.startswith("MemAvailable")).split()[1])
            * 1024
            // local_size
        )
    except (OSError, StopIteration, ValueError):
        return None


def describe(parts, free):
    """One line: the parts, their sum and what is free, in GB."""
    listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
    return f"{sum(parts.values()) / 1e9:.2f} GB ({listed})" + (
        f" of {free / 1e9:.2f} GB free" if free else ""
    )


def fit(c, model, world):
    """(rows in a forward pass, whether blocks are recomputed, the estimate in words), the same on
    all ranks.

    As many rows as fit, without recomputing if one does. Raises InputError when not even one fits
    with it.
    """
    free = free_memory(world.device, world.local_size)
    most = CPU_MICRO_TOKENS if world.device.type == "cpu" else math.inf
    wanted = c.micro_tokens // c.row_len or max(1, min(max(c.batch_tokens), most) // c.row_len)

    def parts(rows, recompute):
        return estimate(c, model, world.local_size, rows, recompute, world.device.type == "cuda")

    rows, recompute = 0, c.recompute == "on"
    while not rows:
        rows = wanted
        while free and rows and sum(parts(rows, recompute).values()) > SHARE * free:
            rows = 0 if c.micro_tokens else rows - 1
        if not rows and (recompute or c.recompute == "off"):
            rows = -1
        recompute = recompute or not rows
    chosen = torch.tensor([-rows, int(recompute)], device=world.device)
    if world.size > 1:  # ranks that disagreed would train on some rows twice and on others never
        dist.all_reduce(chosen, op=dist.ReduceOp.MAX)
    rows, recompute = -chosen[0].item(), bool(chosen[1])
    if rows < 0:
        need = parts(c.micro_tokens // c.row_len or 1, recompute)
        raise InputError(
            f"not enough memory on {world.device}: {describe(need, free)}; lower --micro-tokens (now "
            f"{c.micro_tokens or 'chosen to fit'}) or --row-len ({c.row_len}), allow --recompute auto, or "
            "take a smaller model"
        )
    return rows, recompute, describe(parts(rows, recompute), free)


def equal_passes(rows, most):
    """Rows per pass, all passes being alike: at most `most`, more than half of it, such that few
    are padding."""
    return min(range(min(most, rows), min(most, rows) // 2, -1), key=lambda n: -(-rows // n) * n)


def ran_out(error):
    """Whether memory did, on a GPU or a CPU, whose allocator raises a RuntimeError like others."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def advice(c, estimate, error):
    """One line for when memory ran out all the same."""
    return (
        f"out of memory; the estimate was {estimate}. Lower --micro-tokens, a multiple of {c.row_len}, or give "
        f"--recompute on ({' '.join(str(error).split())[:120]})"
    )
