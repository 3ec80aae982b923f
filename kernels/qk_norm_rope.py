"""RMSNorm and rotary embedding of queries and keys, in one pass from the projection into
attention's layout.

    x^ = x r,   r = 1 / sqrt(mean(x^2) + eps)                            for each token and head,
    over its D dimensions y  = [x^1 cos + x^2 sin,  x^2 cos - x^1 sin],   [x^1, x^2] = x^
    halves rotate against each other backward:   g^ = [g1 cos - g2 sin,  g1 sin + g2 cos],   dx = r
    (g^ - x^ mean(g^ x^))

Bytes, in units of the size of q (k being as large): forward 4, backward 6; nothing is saved but the
inputs, since r is known again once x is read. Where q, k and v are slices of one projection,
autograd then puts their gradients together, which reads and writes them all once more, 6.
qkv_norm_rope takes the projection whole: its backward writes the one gradient, v's share passed on:
8 instead of 12. At 49,152 tokens of width 768 in bf16 the 4 saved are 302 MB a layer.

Inductor also fuses the reference into one kernel each way, and what it computes itself it can write
into the joined gradient, so that it too may move 4 and 8. Both functions are therefore off in the
trainer until measured faster there. Several (token, head) pairs per program; q, k and v side by
side in the grid; arithmetic in fp32; two runs agree bit by bit. Sources: RMSNorm
(arXiv:1910.07467), rotary embedding (arXiv:2104.09864), norms on q and k (arXiv:2302.05442);
rotation by halves as in GPT-NeoX.
"""

import torch
import torch.nn.functional as F

from .launch import cast, runs_triton, tl, triton
from .op import Op, declare


def qk_norm_rope_reference(q, k, cos, sin, eps=1e-6):
    """The formula in PyTorch, each step in the inputs' dtype."""

    def norm_rope(x):
        x1, x2 = F.rms_norm(x, x.shape[-1:], eps=eps).chunk(2, dim=-1)
        c, s = _of_positions(cos, x), _of_positions(sin, x)
        return torch.cat([x1 * c + x2 * s, x2 * c - x1 * s], dim=-1)

    return norm_rope(q), norm_rope(k)


def _of_positions(table, x):
    return table[: x.size(1)].reshape(x.size(1), 1, x.size(3) // 2)  # (T, 1, D / 2)


def qkv_norm_rope_reference(qkv, cos, sin, n_head=None, eps=1e-6):
    q, k, v = _split(qkv, n_head)
    return *qk_norm_rope_reference(q, k, cos, sin, eps), v


def qk_norm_rope(q, k, cos, sin, eps=1e-6):
    """q: (B, T, H, D), k: (B, T, H', D), any strides, D even; fp32, bf16, fp16 -> both normed and
    rotated, contiguous.

    cos, sin: (T', D / 2) or (T', 1, D / 2), T' >= T, of the angle at each position; they get no
    gradient.
    """
    _check(q, k, cos, sin)
    return _qk_norm_rope(q, k, cos, sin, eps)


def qkv_norm_rope(qkv, cos, sin, n_head=None, eps=1e-6):
    """qkv: (B, T, H + 2 H', D), the heads of q, of k, of v -> q, k as qk_norm_rope gives them, and
    v, a view of qkv.

    n_head: H; without it all three have the same number of heads. The gradient of qkv is written in
    one pass.
    """
    q, k, _ = _split(qkv, n_head)
    _check(q, k, cos, sin)
    return _QKVNormRope.apply(qkv, cos, sin, q.size(2), eps)


def _check(q, k, cos, sin):
    B, T, _, D = q.shape
    if D % 2 or k.shape[:2] != (B, T) or k.size(3) != D or k.dtype != q.dtype:
        raise ValueError(
            f"q {tuple(q.shape)} {q.dtype}, k {tuple(k.shape)} {k.dtype}: expected (B, T, H, D) with "
            "an even D, alike but for H"
        )
    if cos.shape != sin.shape or cos.size(0) < T or cos.shape[1:].numel() != D // 2:
        raise ValueError(
            f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}: expected at least {T} rows of {D // 2}"
        )


def _split(qkv, n_head):
    n_kv = qkv.size(2) // 3 if n_head is None else (qkv.size(2) - n_head) // 2
    return qkv.split([qkv.size(2) - 2 * n_kv, n_kv, n_kv], dim=2)


@triton.jit
def locate(T, H: tl.constexpr, ROWS: tl.constexpr):
    """This program's (token, head) pairs: int64 columns of row in the batch, position in the
    row, head, and pair."""
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token = pair // H
    return (
        (token // T).to(tl.int64),
        (token % T).to(tl.int64),
        (pair % H).to(tl.int64),
        pair.to(tl.int64),
    )


@triton.jit
def norm_rope_rows(
    x,
    stride,
    y,
    cos,
    sin,
    B,
    T,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    half: tl.constexpr = D // 2
    b, t, h, pair = locate(T, H, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    inside = (b < B) & (col < half)
    x += b * stride[0] + t * stride[1] + h * stride[2] + col
    x1, x2 = tl.load(x, inside, 0.0).to(tl.float32), tl.load(x + half, inside, 0.0).to(tl.float32)
    c = tl.load(cos + t * half + col, inside, 0.0).to(tl.float32)
    s = tl.load(sin + t * half + col, inside, 0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / D + eps)[:, None]
    x1, x2 = x1 * r, x2 * r
    y += pair * D + col
    tl.store(y, cast(x1 * c + x2 * s, y.dtype.element_ty), inside)
    tl.store(y + half, cast(x2 * c - x1 * s, y.dtype.element_ty), inside)


@triton.jit
def norm_rope_backward_rows(
    dy,
    stride_dy,
    x,
    stride_x,
    dx,
    stride_dx,
    cos,
    sin,
    B,
    T,
    eps,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    half: tl.constexpr = D // 2
    b, t, h, _ = locate(T, H, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    inside = (b < B) & (col < half)
    x += b * stride_x[0] + t * stride_x[1] + h * stride_x[2] + col
    dy += b * stride_dy[0] + t * stride_dy[1] + h * stride_dy[2] + col
    x1, x2 = tl.load(x, inside, 0.0).to(tl.float32), tl.load(x + half, inside, 0.0).to(tl.float32)
    g1, g2 = tl.load(dy, inside, 0.0).to(tl.float32), tl.load(dy + half, inside, 0.0).to(tl.float32)
    c = tl.load(cos + t * half + col, inside, 0.0).to(tl.float32)
    s = tl.load(sin + t * half + col, inside, 0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / D + eps)[:, None]
    x1, x2 = x1 * r, x2 * r
    g1, g2 = g1 * c - g2 * s, g1 * s + g2 * c
    m = (tl.sum(g1 * x1 + g2 * x2, 1) / D)[:, None]
    dx += b * stride_dx[0] + t * stride_dx[1] + h * stride_dx[2] + col
    tl.store(dx, cast(r * (g1 - x1 * m), dx.dtype.element_ty), inside)
    tl.store(dx + half, cast(r * (g2 - x2 * m), dx.dtype.element_ty), inside)


@triton.jit
def copy_rows(
    x,
    stride_x,
    y,
    stride_y,
    B,
    T,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    b, t, h, _ = locate(T, H, ROWS)
    col = tl.arange(0, 2 * BLOCK)[None, :]
    inside = (b < B) & (col < D)
    row = tl.load(x + b * stride_x[0] + t * stride_x[1] + h * stride_x[2] + col, inside)
    tl.store(y + b * stride_y[0] + t * stride_y[1] + h * stride_y[2] + col, row, inside)


@triton.jit
def qk_norm_rope_forward_kernel(
    q,
    q_stride,
    k,
    k_stride,
    q_out,
    k_out,
    cos,
    sin,
    B,
    T,
    eps,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    if tl.program_id(1) == 0:
        norm_rope_rows(q, q_stride, q_out, cos, sin, B, T, eps, HQ, D, BLOCK, ROWS)
    else:
        norm_rope_rows(k, k_stride, k_out, cos, sin, B, T, eps, HK, D, BLOCK, ROWS)


@triton.jit
def qk_norm_rope_backward_kernel(
    gq,
    gq_stride,
    gk,
    gk_stride,
    gv,
    gv_stride,
    q,
    q_stride,
    k,
    k_stride,
    dq,
    dq_stride,
    dk,
    dk_stride,
    dv,
    dv_stride,
    cos,
    sin,
    B,
    T,
    eps,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    if tl.program_id(1) == 0:
        norm_rope_backward_rows(
            gq, gq_stride, q, q_stride, dq, dq_stride, cos, sin, B, T, eps, HQ, D, BLOCK, ROWS
        )
    elif tl.program_id(1) == 1:
        norm_rope_backward_rows(
            gk, gk_stride, k, k_stride, dk, dk_stride, cos, sin, B, T, eps, HK, D, BLOCK, ROWS
        )
    else:
        copy_rows(gv, gv_stride, dv, dv_stride, B, T, HK, D, BLOCK, ROWS)


def _tile(q, k):
    """Half a head's width as a power of two, (token, head) pairs per program, programs for q (or
    k, if it has more)."""
    B, T, H, D = q.shape
    block = triton.next_power_of_2(D // 2)
    rows = max(1, 2048 // block)
    return block, rows, triton.cdiv(B * T * max(H, k.size(2)), rows)


def _dense_heads(x):
    """x with the elements of a head side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def launch_forward(q, k, cos, sin, eps):
    """(B, T, H, D), (B, T, H', D) -> both normed and rotated, contiguous."""
    B, T, H, D = q.shape
    q, k, cos, sin = _dense_heads(q), _dense_heads(k), cos.contiguous(), sin.contiguous()
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    block, rows, programs = _tile(q, k)
    if programs:
        qk_norm_rope_forward_kernel[programs, 2](
            q,
            q.stride(),
            k,
            k.stride(),
            q_out,
            k_out,
            cos,
            sin,
            B,
            T,
            eps,
            H,
            k.size(2),
            D,
            block,
            rows,
            num_warps=4,
        )
    return q_out, k_out


def launch_backward(gq, gk, gv, q, k, cos, sin, eps, dq, dk, dv):
    """From gq, gk, the gradients of the outputs, fills dq, dk; with gv also dv, as a copy. All
    may be strided."""
    B, T, H, D = q.shape
    gq, gk, q, k, cos, sin = *map(_dense_heads, (gq, gk, q, k)), cos.contiguous(), sin.contiguous()
    three = gv is not None
    gv, dv = (_dense_heads(gv), dv) if three else (gk, dk)  # something to point at
    block, rows, programs = _tile(q, k)
    if programs:
        qk_norm_rope_backward_kernel[programs, 3 if three else 2](
            gq,
            gq.stride(),
            gk,
            gk.stride(),
            gv,
            gv.stride(),
            q,
            q.stride(),
            k,
            k.stride(),
            dq,
            dq.stride(),
            dk,
            dk.stride(),
            dv,
            dv.stride(),
            cos,
            sin,
            B,
            T,
            eps,
            H,
            k.size(2),
            D,
            block,
            rows,
            num_warps=4,
        )


def _reference_backward(gq, gk, q, k, cos, sin, eps):
    """What the kernels compute, in PyTorch."""

    def backward(dy, x):
        c, s = _of_positions(cos, x).float(), _of_positions(sin, x).float()
        r = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        xhat, (g1, g2) = x.float() * r, dy.float().chunk(2, dim=-1)
        g = torch.cat([g1 * c - g2 * s, g1 * s + g2 * c], dim=-1)
        return (r * (g - xhat * (g * xhat).mean(-1, keepdim=True))).to(x.dtype)

    return backward(gq, q), backward(gk, k)


@torch.library.custom_op("stopwatch::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        launch_forward(q, k, cos, sin, eps)
        if runs_triton(q)
        else qk_norm_rope_reference(q, k, cos, sin, eps)
    )


@_qk_norm_rope.register_fake
def _(q, k, cos, sin, eps):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))


@torch.library.custom_op("stopwatch::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    gq: torch.Tensor,
    gk: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not runs_triton(q):
        return _reference_backward(gq, gk, q, k, cos, sin, eps)
    dq, dk = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    launch_backward(gq, gk, None, q, k, cos, sin, eps, dq, dk, None)
    return dq, dk


@_qk_norm_rope_backward.register_fake
def _(gq, gk, q, k, cos, sin, eps):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))


@torch.library.custom_op("stopwatch::qkv_norm_rope_backward", mutates_args=())
def _qkv_norm_rope_backward(
    gq: torch.Tensor,
    gk: torch.Tensor,
    gv: torch.Tensor,
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    q, k, _ = _split(qkv, gq.size(2))
    if not runs_triton(qkv):
        return torch.cat([*_reference_backward(gq, gk, q, k, cos, sin, eps), gv], dim=2)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    launch_backward(gq, gk, gv, q, k, cos, sin, eps, *_split(dqkv, gq.size(2)))
    return dqkv


@_qkv_norm_rope_backward.register_fake
def _(gq, gk, gv, qkv, cos, sin, eps):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, gq, gk):
    return *_qk_norm_rope_backward(gq, gk, *ctx.saved_tensors, ctx.eps), None, None, None


_qk_norm_rope.register_autograd(_backward, setup_context=_save)


class _QKVNormRope(torch.autograd.Function):
    """Not an op of its own, because v is a view of the input, which an op must not return."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, n_head, eps):
        ctx.eps = eps
        ctx.save_for_backward(qkv, cos, sin)
        q, k, v = _split(qkv, n_head)
        return *_qk_norm_rope(q, k, cos, sin, eps), v

    @staticmethod
    def backward(ctx, gq, gk, gv):
        return (
            _qkv_norm_rope_backward(gq, gk, gv, *ctx.saved_tensors, ctx.eps),
            None,
            None,
            None,
            None,
        )


def _example(draw, head_dim):
    qkv = draw(2, 32, 6, head_dim)
    frequencies = 1 / torch.arange(1, head_dim // 2 + 1, device=qkv.device)
    angles = torch.arange(32, device=qkv.device)[:, None] * frequencies  # (T, D / 2)
    return [qkv], dict(cos=angles.cos().to(qkv.dtype), sin=angles.sin().to(qkv.dtype))


declare(
    Op(
        "qkv_norm_rope",
        triton=qkv_norm_rope,
        reference=qkv_norm_rope_reference,
        example=_example,
        faster_on=(90,),
    )
)
