"""RMSNorm over the last dimension, alone or with a residual addition in the same pass.

    rms_norm:      y = x r w,          r = 1 / sqrt(mean(x^2) + eps)
    add_rms_norm:  s = x + residual,   y = s r w with r of s;   returns y, s
    backward:      dx = r (g - x r mean(g x r)) (+ ds),   g = dy w;   dw = sum over rows of dy x r

x r is rounded to x's dtype before the weight multiplies it, as in Hugging Face's models.

Minimum bytes for M rows of N elements of e bytes: forward 2 e M N (with the addition 4 e M N),
backward 3 e M N (4 e M N). A program takes several rows, statistics are in fp32, and the gradient
of w is added up from a fixed grid of partial sums: no atomics, so two runs agree bit by bit.

Inductor fuses a norm without weight into its neighbours. On an H200 the norms and what is around
them took 6 ms more by these kernels, in a step of gpt2-small of 393,216 tokens and 550 ms, so
`auto` leaves them to Inductor.

Source: RMSNorm (Zhang and Sennrich, arXiv:1910.07467); several rows per program as QuACK has them,
the order of the backward as in Liger-Kernel.
"""

import torch
import torch.nn.functional as F

from .launch import as_rows, cast, runs_triton, sm_count, tl, triton
from .op import Op, declare


def rms_norm_reference(x, weight=None, eps=1e-6):
    """rms_norm in plain PyTorch, which keeps statistics in fp32."""
    y = F.rms_norm(x, x.shape[-1:], eps=eps)
    return y if weight is None else (weight * y).to(x.dtype)


def add_rms_norm_reference(x, residual, weight=None, eps=1e-6):
    """add_rms_norm in plain PyTorch."""
    s = x + residual
    return rms_norm_reference(s, weight, eps), s


def rms_norm(x, weight=None, eps=1e-6):
    """x: (..., N) fp32, bf16 or fp16, any strides; weight: (N,) or None -> y like x, contiguous."""
    return _rms_norm(x, None, weight, eps)[0]


def add_rms_norm(x, residual, weight=None, eps=1e-6):
    """x, residual: (..., N), same shape and dtype -> (normed, sum), both like x, contiguous."""
    return _rms_norm(x, residual, weight, eps)[:2]


# --- kernels


@triton.jit
def rms_norm_forward_kernel(
    x,  # (M, N)
    residual,  # (M, N), with ADD
    weight,  # (N,), with WEIGHT
    y,  # (M, N) out
    s,  # (M, N) out, with ADD
    rstd,  # (M,) out, fp32
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
        v = cast(v, y.dtype.element_ty).to(tl.float32)
        v *= tl.load(weight + col, col < N, 0.0).to(tl.float32)
    tl.store(y + row64 * N + col, cast(v, y.dtype.element_ty), inside)


@triton.jit
def rms_norm_backward_kernel(
    dy,  # (M, N)
    ds,  # (M, N), with ADD
    x,  # (M, N), what was normed
    weight,  # (N,), with WEIGHT
    rstd,  # (M,) fp32
    dx,  # (M, N) out
    dw,  # (programs, N) out, fp32, with WEIGHT
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


def rows_per_program(N):
    """As many rows of N elements as make a tile of 4,096."""
    return max(1, 4096 // triton.next_power_of_2(N))


def launch_forward(x, residual, weight, eps):
    """(M, N) rows -> y, s (empty without residual), rstd (M,) fp32."""
    M, N = x.shape
    add = residual is not None
    rows = rows_per_program(N)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    s = torch.empty_like(y) if add else y.new_empty(0)
    rstd = x.new_empty(M, dtype=torch.float32)
    if M:
        rms_norm_forward_kernel[triton.cdiv(M, rows),](
            x=x,
            residual=residual,
            weight=weight,
            y=y,
            s=s,
            rstd=rstd,
            M=M,
            stride_x=x.stride(0),
            stride_r=residual.stride(0) if add else 0,
            eps=eps,
            N=N,
            BLOCK_N=triton.next_power_of_2(N),
            ROWS=rows,
            ADD=add,
            WEIGHT=weight is not None,
            num_warps=4,
        )
    return y, s, rstd


def launch_backward(dy, ds, x, weight, rstd):
    """(M, N) rows -> dx, dw (empty without weight)."""
    M, N = x.shape
    add = ds is not None
    weighted = weight is not None
    rows = rows_per_program(N)

    # With a weight each program walks over many rows and writes one partial sum
    programs = triton.cdiv(M, rows)
    if weighted:
        programs = min(programs, 4 * sm_count(x))
    programs = max(1, programs)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dw = x.new_empty(programs if weighted else 0, N, dtype=torch.float32)
    rms_norm_backward_kernel[programs,](
        dy=dy,
        ds=ds,
        x=x,
        weight=weight,
        rstd=rstd,
        dx=dx,
        dw=dw,
        M=M,
        stride_dy=dy.stride(0),
        stride_ds=ds.stride(0) if add else 0,
        stride_x=x.stride(0),
        N=N,
        BLOCK_N=triton.next_power_of_2(N),
        ROWS=rows,
        ADD=add,
        WEIGHT=weighted,
        num_warps=4,
    )
    if weighted:
        return dx, dw.sum(0).to(weight.dtype)
    return dx, dw.flatten()


# --- ops


@torch.library.custom_op("stopwatch::rms_norm", mutates_args=())
def _rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y, s (empty without residual), rstd (M,) fp32."""
    add = residual is not None
    if runs_triton(x):
        y, s, rstd = launch_forward(as_rows(x), as_rows(residual) if add else None, weight, eps)
        return y.view(x.shape), s.view(x.shape) if add else s, rstd
    s = x + residual if add else x
    rstd = (s.float().square().mean(-1) + eps).rsqrt().flatten()
    y = rms_norm_reference(s, weight, eps).contiguous()
    return y, s.contiguous() if add else x.new_empty(0), rstd


@_rms_norm.register_fake
def _(x, residual, weight, eps):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    s = torch.empty_like(y) if residual is not None else x.new_empty(0)
    rstd = x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)
    return y, s, rstd


@torch.library.custom_op("stopwatch::rms_norm_backward", mutates_args=())
def _rms_norm_backward(
    dy: torch.Tensor,
    ds: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> dx, dw (empty without weight)."""
    if runs_triton(x):
        ds_rows = None if ds is None else as_rows(ds)
        dx, dw = launch_backward(as_rows(dy), ds_rows, as_rows(x), weight, rstd)
        return dx.view(x.shape), dw
    r = rstd.view(*x.shape[:-1], 1)
    xhat = x.float() * r
    g = dy.float()
    dw = x.new_empty(0, dtype=torch.float32)
    if weight is not None:
        dw = (g * xhat).flatten(0, -2).sum(0).to(weight.dtype)
        g = g * weight.float()
    dx = r * (g - xhat * (g * xhat).mean(-1, keepdim=True))
    if ds is not None:
        dx = dx + ds
    return dx.to(x.dtype).contiguous(), dw


@_rms_norm_backward.register_fake
def _(dy, ds, x, weight, rstd):
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if weight is None:
        return dx, x.new_empty(0, dtype=torch.float32)
    return dx, torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, residual, weight, _ = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(output[1] if ctx.has_residual else x, weight, output[2])


def _backward(ctx, dy, ds, _):
    s, weight, rstd = ctx.saved_tensors
    dx, dw = _rms_norm_backward(dy, ds if ctx.has_residual else None, s, weight, rstd)
    dr = dx if ctx.has_residual else None  # the sum's gradient is both summands'
    return dx, dr, dw if weight is not None else None, None


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
