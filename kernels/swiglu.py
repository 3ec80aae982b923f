"""SwiGLU's gate: what one half of a projection lets through of the other.

    a = g sigmoid(g);   y = a u                      x: (M, 2 F) = [g, u] -> (M, F)
    backward:   du = dy a,   dg = dy u s (1 + g (1 - s)),   s = sigmoid(g)

Gate and value come from one product with the two matrices side by side, so x is what that product
writes, and dx what its backward reads: nothing is put together or taken apart. Only x is kept for
the backward, a is computed again.

Minimum bytes at e an element: forward 3 e M F, backward 5 e M F. Arithmetic is in fp32, and a is
rounded to x's dtype before it is multiplied, as Hugging Face's models have it. Two runs agree bit
by bit. On GPUs Inductor makes one kernel of the reference as well, so `auto` leaves it to Inductor
until this one has been timed in the trainer's step.

Source: Shazeer, arXiv:2002.05202; computing the gate again in the backward as in Liger-Kernel.
"""

import torch
import torch.nn.functional as F

from .launch import as_rows, cast, runs_triton, tl, triton
from .op import Op, declare


def swiglu_reference(x):
    """swiglu in plain PyTorch."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu_backward_reference(dy, x):
    """What the backward kernel computes, in PyTorch; float64 stays float64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    gate, up = x.to(wide).chunk(2, dim=-1)
    s = gate.sigmoid()
    a = (gate * s).to(x.dtype)
    d = dy.to(wide)
    dgate = d * up * (s * (1 + gate * (1 - s)))
    dup = d * a.to(wide)
    return torch.cat([dgate, dup], dim=-1).to(x.dtype)


def swiglu(x):
    """x: (..., 2 F) fp32, bf16 or fp16, any strides, gates in its first half -> (..., F),
    contiguous. Raises ValueError for an odd last dimension."""
    if x.size(-1) % 2:
        raise ValueError(f"swiglu: x {tuple(x.shape)}: expected (..., 2 F), gates and values")
    return _swiglu(x)


# --- kernels


@triton.jit
def locate(M, N: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """This program's rows (int64) and columns, and which of them are inside (M, N)."""
    blocks: tl.constexpr = (N + BLOCK - 1) // BLOCK  # of a row
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = (row < M)[:, None] & (col < N)[None, :]
    return row.to(tl.int64)[:, None], col[None, :], inside


@triton.jit
def swiglu_forward_kernel(
    x,  # (M, 2 N)
    y,  # (M, N) out, contiguous
    M,
    stride_x,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, col, inside = locate(M, N, BLOCK, ROWS)
    gate = tl.load(x + row * stride_x + col, inside, 0.0).to(tl.float32)
    up = tl.load(x + row * stride_x + N + col, inside, 0.0).to(tl.float32)
    a = cast(gate / (1 + tl.exp(-gate)), y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * N + col, cast(a * up, y.dtype.element_ty), inside)


@triton.jit
def swiglu_backward_kernel(
    dy,  # (M, N)
    x,  # (M, 2 N)
    dx,  # (M, 2 N) out, contiguous
    M,
    stride_dy,
    stride_x,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, col, inside = locate(M, N, BLOCK, ROWS)
    gate = tl.load(x + row * stride_x + col, inside, 0.0).to(tl.float32)
    up = tl.load(x + row * stride_x + N + col, inside, 0.0).to(tl.float32)
    d = tl.load(dy + row * stride_dy + col, inside, 0.0).to(tl.float32)
    s = 1 / (1 + tl.exp(-gate))
    a = cast(gate * s, dx.dtype.element_ty).to(tl.float32)
    dgate = d * up * (s * (1 + gate * (1 - s)))
    dx += row * (2 * N) + col
    tl.store(dx, cast(dgate, dx.dtype.element_ty), inside)
    tl.store(dx + N, cast(d * a, dx.dtype.element_ty), inside)


def tile(M, N):
    """Columns and rows of a program, together about 2,048 elements, and how many programs."""
    block = min(1024, triton.next_power_of_2(N))
    rows = max(1, 2048 // block)
    return block, rows, triton.cdiv(M, rows) * triton.cdiv(N, block)


def launch_forward(x):
    """(M, 2 N) rows -> (M, N)."""
    M = len(x)
    N = x.size(1) // 2
    y = x.new_empty(M, N)
    block, rows, programs = tile(M, N)
    if y.numel():
        swiglu_forward_kernel[programs,](
            x=x,
            y=y,
            M=M,
            stride_x=x.stride(0),
            N=N,
            BLOCK=block,
            ROWS=rows,
            num_warps=4,
        )
    return y


def launch_backward(dy, x):
    """(M, N), (M, 2 N) rows -> (M, 2 N)."""
    M, N = dy.shape
    dx = x.new_empty(M, 2 * N)
    block, rows, programs = tile(M, N)
    if dy.numel():
        swiglu_backward_kernel[programs,](
            dy=dy,
            x=x,
            dx=dx,
            M=M,
            stride_dy=dy.stride(0),
            stride_x=x.stride(0),
            N=N,
            BLOCK=block,
            ROWS=rows,
            num_warps=4,
        )
    return dx


# --- ops


@torch.library.custom_op("stopwatch::swiglu", mutates_args=())
def _swiglu(x: torch.Tensor) -> torch.Tensor:
    if runs_triton(x):
        return launch_forward(as_rows(x)).view(*x.shape[:-1], x.size(-1) // 2)
    return swiglu_reference(x)


@_swiglu.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.size(-1) // 2)


@torch.library.custom_op("stopwatch::swiglu_backward", mutates_args=())
def _swiglu_backward(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """-> dx, like x."""
    if runs_triton(x):
        return launch_backward(as_rows(dy), as_rows(x)).view(x.shape)
    return swiglu_backward_reference(dy, x)


@_swiglu_backward.register_fake
def _(dy, x):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, dy):
    return _swiglu_backward(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_gradients, setup_context=_save)


declare(
    Op(
        "swiglu",
        triton=swiglu,
        reference=swiglu_reference,
        example=lambda draw, _: ([draw(80, 384)], {}),
    )
)
