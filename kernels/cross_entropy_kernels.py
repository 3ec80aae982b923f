"""Triton kernels of softcap_cross_entropy and linear_cross_entropy, and which of two a chip gets.

    two-pass  Here; everywhere. A row is read for the sum of exp and read again for the gradient,
              the second time from L2, if what all the chip's rows in flight take fits there: many
              warps to a row, so few rows in flight.
    resident  cross_entropy_resident.py. The row stays in shared memory, two blocks to an SM.

The cap keeps logits in (0, a), which makes the maximum pass of logsumexp unnecessary: shifted by
a / 2, exp stays in fp32's range as long as a / 2 + log V < 80. Beyond that, and without a cap, the
maximum is taken along. Everything is fp32 between load and store. bf16 logits that need a gradient
go through the hardware's tanh (relative error 2^-11, below the logits' own rounding); all others,
and validation, through an fp32 sigmoid. The target's column is computed apart, because p - 1
cancels.
"""

import math

import torch

from .cross_entropy_resident import resident_cross_entropy_kernel
from .launch import INTERPRETED, cast, for_chip, sm_count, tl, triton
from .quantize import to_fp8

# Chip -> kernel, logits of a step, warps to a row. 90 is the fastest of 15 tried on an H200 (49,152
# rows of 50,304, e5m2 gradients): 2.36 ms, the best two-pass 2.99. Others are not measured:
# registers allow an A100 2 or 3 rows of 100 kB to an SM, which leaves half of L2 to the gradients
# on their way out; L40S and B200 have the L2 for more.
CONFIG = {
    80: ("two-pass", 8192, 16),
    89: ("two-pass", 4096, 16),
    90: ("resident", 4096, 8),
    100: ("two-pass", 4096, 16),
}


@triton.jit
def softcap(z, a, b, c, CAP: tl.constexpr, FAST: tl.constexpr):
    """z', shifted into (-a/2, a/2), and the slope dz'/dz."""
    if not CAP:
        return z, tl.full((1,), 1.0, tl.float32)
    elif FAST:
        u = (z + b) * (0.5 / c)
        t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )
        return t * (0.5 * a), (0.25 * a / c) * (1 - t * t)
    else:
        p = 1 / (1 + tl.exp2((z + b) * (-1.4426950408889634 / c)))
        return (p - 0.5) * a, (a / c) * (p * (1 - p))


@triton.jit
def to_gradient(x, dtype: tl.constexpr):
    return to_fp8(x, dtype) if dtype == tl.float8e5 else cast(x, dtype)


@triton.jit
def softcap_cross_entropy_kernel(
    logits,  # (N, V)
    targets,  # (N, K) int64
    weights,  # (K,) fp32 or None
    sampled,  # (2,) fp32 or None
    losses,  # (N,) out, fp32
    dlogits,  # (N, V) out, with GRADIENT; may be logits
    fp8_scale,  # () fp32 or None: dlogits is divided by it
    stride_z,
    stride_y,
    stride_k,
    stride_d,
    ignore_index,
    scale,  # the upstream gradient
    a,
    b,
    c,
    V: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAP: tl.constexpr,
    MAXIMUM: tl.constexpr,
    FAST: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program: the loss, and the gradient in a second pass over the row."""
    LOG2E: tl.constexpr = 1.4426950408889634
    # z' in powers of two from the start, otherwise as it is until the maximum is taken off, exactly
    if not MAXIMUM:
        a *= LOG2E
        scale /= LOG2E

    # The row's targets, and their logits
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_z
    k = tl.arange(0, BLOCK_K)
    y = tl.load(targets + row * stride_y + k * stride_k, k < K, ignore_index)
    counted = y != ignore_index
    w = tl.load(weights + k, k < K, 0.0).to(tl.float32) if weights is not None else 1.0
    w = tl.where(counted, w, 0.0)
    total = tl.sum(w)
    z_y = tl.load(logits + y, counted & (y >= 0) & (y < V), float("nan")).to(tl.float32)
    z_y, slope_y = softcap(z_y, a, b, c, CAP, FAST)
    if sampled is not None:
        first = tl.load(sampled)
        log_many = tl.load(sampled + 1)
        if not MAXIMUM:
            log_many *= LOG2E

    # First pass: the sum of exp
    KEEP: tl.constexpr = "evict_last" if GRADIENT else "evict_first"
    exps = tl.zeros((BLOCK,), tl.float32)
    largest = -1.0e38  # finite, so that a logit of -inf is harmless
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = tl.load(logits + col, col < V, 0.0, eviction_policy=KEEP).to(tl.float32)
        z, _ = softcap(z, a, b, c, CAP, FAST)
        if sampled is not None:
            z += tl.where(col < first, 0.0, log_many)
        z = tl.where(col < V, z, float("-inf"))
        if MAXIMUM:
            larger = tl.maximum(largest, tl.max(z))
            exps *= tl.exp2((largest - larger) * LOG2E)
            largest = larger
            z = (z - largest) * LOG2E
        exps += tl.exp2(z)
    lse = tl.log2(tl.sum(exps))
    if MAXIMUM:
        z_y = (z_y - largest) * LOG2E
    tl.store(losses + row, tl.sum(tl.where(counted, w * (lse - z_y), 0.0)) / LOG2E)

    # Second pass: the gradient
    if GRADIENT:
        dlogits += row * stride_d
        if fp8_scale is not None:
            scale /= tl.load(fp8_scale)
        # the targets' columns apart, where p - 1 has to be taken in fp32; a token can be the target
        # more than once
        w_y = tl.sum(tl.where(y[:, None] == y[None, :], w[None, :], 0.0), 1)
        g_y = (tl.exp2(z_y - lse) * total - w_y) * slope_y * scale
        tl.debug_barrier()  # dlogits may be logits: all threads have read the targets' logits
        for start in range(0, V, BLOCK):
            col = start + tl.arange(0, BLOCK)
            z = tl.load(logits + col, col < V, 0.0, eviction_policy="evict_first").to(tl.float32)
            z, slope = softcap(z, a, b, c, CAP, FAST)
            if sampled is not None:
                z += tl.where(col < first, 0.0, log_many)
            if MAXIMUM:
                z = (z - largest) * LOG2E
            g = tl.exp2(z - lse) * slope * (total * scale)
            tl.store(
                dlogits + col,
                to_gradient(g, dlogits.dtype.element_ty),
                col < V,
                eviction_policy="evict_first",
            )
        tl.debug_barrier()  # the targets' columns now, over what the loop has stored there
        # read again: cheaper than to keep
        y = tl.load(targets + row * stride_y + k * stride_k, k < K, -1)
        tl.store(
            dlogits + y,
            to_gradient(g_y, dlogits.dtype.element_ty),
            (y != ignore_index) & (y >= 0) & (y < V),
        )


@triton.jit
def scale_kernel(x, upstream, expected, n, BLOCK: tl.constexpr):
    """x *= upstream / expected, or nothing at all where the two agree to the last bits of fp32."""
    factor = tl.load(upstream).to(tl.float32) / expected
    if not tl.abs(factor - 1) <= 3e-7:  # also where it is NaN
        for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(n, BLOCK), tl.num_programs(0)):
            i = block * BLOCK + tl.arange(0, BLOCK)
            v = tl.load(x + i, i < n).to(tl.float32)
            tl.store(x + i, cast(v * factor, x.dtype.element_ty), i < n)


def launch_cross_entropy(
    logits,
    targets,
    target_weights,
    sampled,
    cap,
    ignore_index,
    grad_scale,
    dlogits,
    fp8_scale=None,
    config=None,
):
    """Rows of logits (N, V), targets (N,) or (N, K) -> losses (N,) fp32.

    cap: [a, b, c] or None. dlogits: where the gradient goes, may be logits itself, or None.
    config: as in CONFIG, to measure others. What the resident kernel cannot do falls to the other.
    """
    N, V = logits.shape
    targets = columns(targets)
    K = targets.size(1)
    kernel, block, warps = config or for_chip(CONFIG, logits)
    losses = logits.new_empty(N, dtype=torch.float32)
    if N == 0:
        return losses

    a, b, c = cap or (0.0, 0.0, 1.0)
    maximum = needs_maximum(cap, V)
    gradient = dlogits is not None
    fast = logits.dtype == torch.bfloat16 and gradient and not INTERPRETED
    out = dlogits if gradient else losses
    arguments = dict(
        logits=logits,
        targets=targets,
        weights=None if target_weights is None else target_weights.contiguous(),
        sampled=sampled,
        losses=losses,
        dlogits=out,
        fp8_scale=fp8_scale,
        stride_z=logits.stride(0),
        stride_y=targets.stride(0),
        stride_k=targets.stride(1),
        stride_d=out.stride(0),
        ignore_index=ignore_index,
        scale=grad_scale,
        a=a,
        b=b,
        c=c,
        V=V,
        K=K,
        BLOCK_K=triton.next_power_of_2(K),
        GRADIENT=gradient,
    )
    aligned = all(
        x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 for x in (logits, out)
    )
    if kernel == "resident" and fast and not maximum and aligned and V % 16 == 0 and V <= 110_000:
        resident_cross_entropy_kernel[N,](
            **arguments, BLOCK=block, CHUNKS=triton.cdiv(V, block), num_warps=warps
        )
    else:
        block = min(block, triton.next_power_of_2(V))
        softcap_cross_entropy_kernel[N,](
            **arguments,
            CAP=cap is not None,
            MAXIMUM=maximum,
            FAST=fast,
            BLOCK=block,
            num_warps=min(warps, max(1, block // 256)),
        )
    return losses


def columns(targets):
    """(N,) or (N, K) -> (N, K)"""
    return targets if targets.dim() == 2 else targets[:, None]


def needs_maximum(cap, V):
    """Whether exp of V logits below the cap [a, b, c], shifted by a / 2, could leave fp32's
    range."""
    return cap is None or abs(cap[0]) / 2 + math.log(V) > 80


def launch_scale(x, upstream, expected):
    """x, contiguous, times upstream / expected, in place."""
    if x.numel():
        programs = min(triton.cdiv(x.numel(), 4096), 8 * sm_count(x))
        scale_kernel[programs,](
            x=x, upstream=upstream, expected=expected, n=x.numel(), BLOCK=4096, num_warps=8
        )
