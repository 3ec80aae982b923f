"""RMSNorm over the last dimension, alone or with a residual addition in the same pass.

    rms_norm:      y = x r w,          r = 1 / sqrt(mean(x^2) + eps)
    add_rms_norm:  s = x + residual,   y = s r w with r of s;   returns y, s
    backward:      dx = r (g - x r mean(g x r)) (+ ds),   g = dy w;   dw = sum over rows of dy x r

Minimum bytes for M rows of N elements of e bytes: forward 2 e M N (with the addition 4), backward 3
(4). Several rows per program, statistics in fp32, gradients of w from a fixed grid of partial sums
(no atomics, so two runs agree bit by bit). Source: RMSNorm (Zhang & Sennrich, arXiv:1910.07467);
several rows per program as QuACK has them, the order of the backward as in Liger-Kernel.

Inductor fuses a norm without weight into its neighbours, so in the trainer this op is on only where
measured faster.
"""

import torch
import torch.nn.functional as F

from .launch import as_rows, cast, runs_triton, sm_count, tl, triton
from .op import Op, declare


def rms_norm_reference(x, weight=None, eps=1e-6):
    """The formula in PyTorch; statistics in fp32."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def add_rms_norm_reference(x, residual, weight=None, eps=1e-6):
    s = x + residual
    return rms_norm_reference(s, weight, eps), s


def rms_norm(x, weight=None, eps=1e-6):
    """x: (..., N) fp32, bf16 or fp16; weight: (N,) or None -> same shape and dtype as x."""
    return _rms_norm(x, None, weight, eps)[0]


def add_rms_norm(x, residual, weight=None, eps=1e-6):
    """x, residual: (..., N), same shape and dtype -> (normed, sum), both like x."""
    return _rms_norm(x, residual, weight, eps)[:2]


@triton.jit
def rms_norm_forward_kernel(
    x,
    residual,
    weight,
    y,
    s,
    rstd,
    M,
    stride_x,
    stride_r,
    eps,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK_N)
    inside = (row < M)[:, None] & (col < N)
    row64 = row.to(tl.int64)[:, None]
    v = tl.load(x + row64 * stride_x + col, inside, 0.0).to(tl.float32)
    if ADD:
        v += tl.load(residual + row64 * stride_r + col, inside, 0.0).to(tl.float32)
        rounded = cast(v, s.dtype.element_ty)
        tl.store(s + row64 * N + col, rounded, inside)
        v = rounded.to(tl.float32)  # the norm is of the sum that is returned
    r = tl.rsqrt(tl.sum(v * v, 1) / N + eps)
    tl.store(rstd + row, r, row < M)
    v *= r[:, None]
    if WEIGHT:
        v *= tl.load(weight + col, col < N, 0.0).to(tl.float32)
    tl.store(y + row64 * N + col, cast(v, y.dtype.element_ty), inside)


@triton.jit
def rms_norm_backward_kernel(
    dy,
    ds,
    x,
    weight,
    rstd,
    dx,
    dw,
    M,
    stride_dy,
    stride_ds,
    stride_x,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
    WEIGHT: tl.constexpr,
):
    col = tl.arange(0, BLOCK_N)
    if WEIGHT:
        w = tl.load(weight + col, col < N, 0.0).to(tl.float32)
        dw_sum = tl.zeros((BLOCK_N,), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        inside = (row < M)[:, None] & (col < N)
        row64 = row.to(tl.int64)[:, None]
        r = tl.load(rstd + row, row < M, 0.0)[:, None]
        xhat = tl.load(x + row64 * stride_x + col, inside, 0.0).to(tl.float32) * r
        g = tl.load(dy + row64 * stride_dy + col, inside, 0.0).to(tl.float32)
        if WEIGHT:
            dw_sum += tl.sum(g * xhat, 0)
            g *= w
        d = r * (g - xhat * (tl.sum(g * xhat, 1) / N)[:, None])
        if ADD:
            d += tl.load(ds + row64 * stride_ds + col, inside, 0.0).to(tl.float32)
        tl.store(dx + row64 * N + col, cast(d, dx.dtype.element_ty), inside)
    if WEIGHT:
        tl.store(dw + tl.program_id(0) * N + col, dw_sum, col < N)


def launch_forward(x, residual, weight, eps):
    """(M, N) rows -> y, s (empty without residual), rstd (M,) fp32."""
    M, N = x.shape
    y, rstd = (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(M, dtype=torch.float32),
    )
    s = torch.empty_like(y) if residual is not None else y.new_empty(0)
    rows = max(1, 4096 // triton.next_power_of_2(N))
    if M:
        rms_norm_forward_kernel[triton.cdiv(M, rows),](
            x,
            residual,
            weight,
            y,
            s,
            rstd,
            M,
            x.stride(0),
            residual.stride(0) if residual is not None else 0,
            eps,
            N,
            triton.next_power_of_2(N),
            rows,
            residual is not None,
            weight is not None,
            num_warps=4,
        )
    return y, s, rstd


def launch_backward(dy, ds, x, weight, rstd):
    """(M, N) rows -> dx, dw (empty without weight)."""
    M, N = x.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows = max(1, 4096 // triton.next_power_of_2(N))
    blocks = triton.cdiv(M, rows)
    programs = max(1, min(blocks, 4 * sm_count(x))) if weight is not None else max(1, blocks)
    dw = x.new_empty(programs if weight is not None else 0, N, dtype=torch.float32)
    rms_norm_backward_kernel[programs,](
        dy,
        ds,
        x,
        weight,
        rstd,
        dx,
        dw,
        M,
        dy.stride(0),
        ds.stride(0) if ds is not None else 0,
        x.stride(0),
        N,
        triton.next_power_of_2(N),
        rows,
        ds is not None,
        weight is not None,
        num_warps=4,
    )
    return dx, dw.sum(0).to(weight.dtype) if weight is not None else dw.flatten()


@torch.library.custom_op("stopwatch::rms_norm", mutates_args=())
def _rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if runs_triton(x):
        y, s, rstd = launch_forward(
            as_rows(x), None if residual is None else as_rows(residual), weight, eps
        )
        return y.view(x.shape), s.view(x.shape) if residual is not None else s, rstd
    s = x + residual if residual is not None else x
    rstd = (s.float().square().mean(-1) + eps).rsqrt().flatten()
    y = rms_norm_reference(s, weight, eps).contiguous()
    return y, s.contiguous() if residual is not None else x.new_empty(0), rstd


@_rms_norm.register_fake
def _(x, residual, weight, eps):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return (
        y,
        torch.empty_like(y) if residual is not None else x.new_empty(0),
        x.new_empty(x.shape[:-1].numel(), dtype=torch.float32),
    )


@torch.library.custom_op("stopwatch::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    if runs_triton(x):
        dx, dw = launch_backward(
            as_rows(dy), None if ds is None else as_rows(ds), as_rows(x), weight, rstd
        )
        return dx.view(x.shape), dw
    xhat = x.float() * rstd.view(*x.shape[:-1], 1)
    g = dy.float()
    dw = (g * xhat).flatten(0, -2).sum(0).to(weight.dtype) if weight is not None else x.new_empty(0)
    g = g * weight.float() if weight is not None else g
    dx = rstd.view(*x.shape[:-1], 1) * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    return (dx + ds if ds is not None else dx).to(x.dtype).contiguous(), dw


@_rms_norm_backward.register_fake
def _(dy, ds, x, weight, rstd):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight) if weight is not None else x.new_empty(
        0, dtype=torch.float32
    )


def _save(ctx, inputs, output):
    x, residual, weight, _ = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(output[1] if residual is not None else x, weight, output[2])


def _backward(ctx, dy, ds, _):
    s, weight, rstd = ctx.saved_tensors
    dx, dw = _rms_norm_backward(dy, ds if ctx.has_residual else None, s, weight, rstd)
    return dx, dx if ctx.has_residual else None, dw if weight is not None else None, None


_rms_norm.register_autograd(_backward, setup_context=_save)


declare(
    Op(
        "rms_norm",
        triton=rms_norm,
        reference=rms_norm_reference,
        example=lambda draw, _: ([draw(64, 256)], {}),
    )
)
declare(
    Op(
        "add_rms_norm",
        triton=add_rms_norm,
        reference=add_rms_norm_reference,
        example=lambda draw, _: ([draw(64, 256), draw(64, 256)], {}),
    )
)
