"""RMSNorm and rotary embedding of queries and keys, in one pass from the projection.

For each token and head, over its D dimensions:

    x^ = x r,   r = 1 / sqrt(mean(x^2) + eps)
    y  = [x^1 cos + x^2 sin,  x^2 cos - x^1 sin],   where x^ = [x^1, x^2]: halves rotate
    backward:   g^ = [g1 cos - g2 sin,  g1 sin + g2 cos],   dx = r (g^ - x^ mean(g^ x^))

Queries and keys are written in attention's layout; values stay where they are.

Bytes, in units of the size of q (k and v being as large): forward 4, backward 8. Nothing is saved
but the input, since r is known again once x is read. The backward writes the one gradient of the
projection, v's share passed on. If q, k and v were ops' inputs of their own, their gradients would
have to be put together: 12 instead of 8. At 49,152 tokens of width 768 in bf16 the 4 saved are
302 MB a layer. Several (token, head) pairs per program; q, k and v side by side in the grid;
arithmetic in fp32; two runs agree bit by bit.

Source: RMSNorm (arXiv:1910.07467), rotary embedding (arXiv:2104.09864), norms on q and k
(arXiv:2302.05442); rotation by halves as in GPT-NeoX.
"""

import torch
import torch.nn.functional as F

from .launch import cast, dense_rows, runs_triton, tl, triton
from .op import Op, declare


def qk_norm_rope_reference(qkv, cos, sin, n_head=None, eps=1e-6):
    """qk_norm_rope in plain PyTorch, each step in the inputs' dtype."""
    q, k, v = split(qkv, n_head)

    def norm_rope(x):
        x1, x2 = F.rms_norm(x, x.shape[-1:], eps=eps).chunk(2, dim=-1)
        c = of_positions(cos, x)
        s = of_positions(sin, x)
        return torch.cat([x1 * c + x2 * s, x2 * c - x1 * s], dim=-1)

    return norm_rope(q), norm_rope(k), v


def qk_norm_rope_backward_reference(gq, gk, gv, qkv, cos, sin, eps):
    """What the backward kernel computes, in PyTorch."""
    q, k, _ = split(qkv, gq.size(2))

    def backward(dy, x):
        c = of_positions(cos, x).float()
        s = of_positions(sin, x).float()
        r = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
        xhat = x.float() * r
        g1, g2 = dy.float().chunk(2, dim=-1)
        g = torch.cat([g1 * c - g2 * s, g1 * s + g2 * c], dim=-1)
        return (r * (g - xhat * (g * xhat).mean(-1, keepdim=True))).to(x.dtype)

    return torch.cat([backward(gq, q), backward(gk, k), gv], dim=2)


def qk_norm_rope(qkv, cos, sin, n_head=None, eps=1e-6):
    """Queries and keys of a projection normed and rotated, and its values.

    qkv: (B, T, H + 2 H', D), the heads of q, of k, of v, any strides, D even; fp32, bf16 or fp16.
    cos, sin: (T', D / 2) or (T', 1, D / 2), T' >= T, of the angle at each position; no gradient.
    n_head: H; without it all three have the same number of heads.
    -> q (B, T, H, D), k (B, T, H', D), contiguous, and v (B, T, H', D), a view of qkv. Raises
    ValueError for shapes that do not fit.
    """
    B, T, _, D = qkv.shape
    if D % 2:
        raise ValueError(f"qkv {tuple(qkv.shape)}: expected (B, T, heads, D) with an even D")
    n_rest = qkv.size(2) % 3 if n_head is None else (qkv.size(2) - n_head) % 2
    if n_rest or n_head is not None and not 0 < n_head < qkv.size(2):
        raise ValueError(
            f"qkv {tuple(qkv.shape)}, n_head {n_head}: expected as many heads of keys as of values"
        )
    if cos.shape != sin.shape or cos.size(0) < T or cos.shape[1:].numel() != D // 2:
        raise ValueError(
            f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)}: expected at least {T} rows of "
            f"{D // 2}"
        )
    q, _, _ = split(qkv, n_head)
    return _QKNormRope.apply(qkv, cos, sin, q.size(2), eps)


def split(qkv, n_head):
    """(B, T, H + 2 H', D) -> views q, k, v."""
    n_kv = qkv.size(2) // 3 if n_head is None else (qkv.size(2) - n_head) // 2
    return qkv.split([qkv.size(2) - 2 * n_kv, n_kv, n_kv], dim=2)


def of_positions(table, x):
    """The rows of cos or sin for x's positions: (T, 1, D / 2)."""
    return table[: x.size(1)].reshape(x.size(1), 1, x.size(3) // 2)


# --- kernels


@triton.jit
def locate(T, H: tl.constexpr, ROWS: tl.constexpr):
    """This program's (token, head) pairs: int64 columns of row in the batch, position in the
    row, head, and pair."""
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token = pair // H
    b = (token // T).to(tl.int64)
    t = (token % T).to(tl.int64)
    h = (pair % H).to(tl.int64)
    return b, t, h, pair.to(tl.int64)


@triton.jit
def norm_rope_rows(
    x,  # (B, T, H, D)
    stride,  # of x, four
    y,  # (B, T, H, D) out, contiguous
    cos,  # (T, D / 2)
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
    x1 = tl.load(x, inside, 0.0).to(tl.float32)
    x2 = tl.load(x + half, inside, 0.0).to(tl.float32)
    c = tl.load(cos + t * half + col, inside, 0.0).to(tl.float32)
    s = tl.load(sin + t * half + col, inside, 0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / D + eps)[:, None]
    x1 *= r
    x2 *= r
    y += pair * D + col
    tl.store(y, cast(x1 * c + x2 * s, y.dtype.element_ty), inside)
    tl.store(y + half, cast(x2 * c - x1 * s, y.dtype.element_ty), inside)


@triton.jit
def norm_rope_backward_rows(
    dy,  # (B, T, H, D)
    stride_dy,
    x,  # (B, T, H, D)
    stride_x,
    dx,  # (B, T, H, D) out
    stride_dx,
    cos,  # (T, D / 2)
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
    x1 = tl.load(x, inside, 0.0).to(tl.float32)
    x2 = tl.load(x + half, inside, 0.0).to(tl.float32)
    g1 = tl.load(dy, inside, 0.0).to(tl.float32)
    g2 = tl.load(dy + half, inside, 0.0).to(tl.float32)
    c = tl.load(cos + t * half + col, inside, 0.0).to(tl.float32)
    s = tl.load(sin + t * half + col, inside, 0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / D + eps)[:, None]
    x1 *= r
    x2 *= r
    g1, g2 = g1 * c - g2 * s, g1 * s + g2 * c
    m = (tl.sum(g1 * x1 + g2 * x2, 1) / D)[:, None]
    dx += b * stride_dx[0] + t * stride_dx[1] + h * stride_dx[2] + col
    tl.store(dx, cast(r * (g1 - x1 * m), dx.dtype.element_ty), inside)
    tl.store(dx + half, cast(r * (g2 - x2 * m), dx.dtype.element_ty), inside)


@triton.jit
def copy_rows(
    x,  # (B, T, H, D)
    stride_x,
    y,  # (B, T, H, D) out
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
    q,  # (B, T, HQ, D)
    q_stride,
    k,  # (B, T, HK, D)
    k_stride,
    q_out,
    k_out,
    cos,  # (T, D / 2)
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
    gq,  # (B, T, HQ, D), gradients of the outputs; gk and gv (B, T, HK, D)
    gq_stride,
    gk,
    gk_stride,
    gv,
    gv_stride,
    q,  # (B, T, HQ, D)
    q_stride,
    k,  # (B, T, HK, D)
    k_stride,
    dq,  # slices of one gradient, out
    dq_stride,
    dk,
    dk_stride,
    dv,
    dv_stride,
    cos,  # (T, D / 2)
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


def tile(q, k):
    """Half a head's width as a power of two, (token, head) pairs per program, programs for q (or
    k, if it has more)."""
    B, T, H, D = q.shape
    block = triton.next_power_of_2(D // 2)
    rows = max(1, 2048 // block)
    return block, rows, triton.cdiv(B * T * max(H, k.size(2)), rows)


def launch_forward(q, k, cos, sin, eps):
    """(B, T, H, D), (B, T, H', D) -> both normed and rotated, contiguous."""
    B, T, H, D = q.shape
    q = dense_rows(q)
    k = dense_rows(k)
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    block, rows, programs = tile(q, k)
    if programs:
        qk_norm_rope_forward_kernel[programs, 2](
            q=q,
            q_stride=q.stride(),
            k=k,
            k_stride=k.stride(),
            q_out=q_out,
            k_out=k_out,
            cos=cos.contiguous(),
            sin=sin.contiguous(),
            B=B,
            T=T,
            eps=eps,
            HQ=H,
            HK=k.size(2),
            D=D,
            BLOCK=block,
            ROWS=rows,
            num_warps=4,
        )
    return q_out, k_out


def launch_backward(gq, gk, gv, q, k, cos, sin, eps, dq, dk, dv):
    """From gq, gk, gv, the gradients of the outputs, fills dq, dk, and dv as a copy. All may be
    strided."""
    B, T, H, D = q.shape
    gq, gk, gv, q, k = (dense_rows(x) for x in (gq, gk, gv, q, k))
    block, rows, programs = tile(q, k)
    if programs:
        qk_norm_rope_backward_kernel[programs, 3](
            gq=gq,
            gq_stride=gq.stride(),
            gk=gk,
            gk_stride=gk.stride(),
            gv=gv,
            gv_stride=gv.stride(),
            q=q,
            q_stride=q.stride(),
            k=k,
            k_stride=k.stride(),
            dq=dq,
            dq_stride=dq.stride(),
            dk=dk,
            dk_stride=dk.stride(),
            dv=dv,
            dv_stride=dv.stride(),
            cos=cos.contiguous(),
            sin=sin.contiguous(),
            B=B,
            T=T,
            eps=eps,
            HQ=H,
            HK=k.size(2),
            D=D,
            BLOCK=block,
            ROWS=rows,
            num_warps=4,
        )


# --- ops


@torch.library.custom_op("stopwatch::qk_norm_rope", mutates_args=())
def _qk_norm_rope(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, n_head: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> q, k"""
    if runs_triton(qkv):
        q, k, _ = split(qkv, n_head)
        return launch_forward(q, k, cos, sin, eps)
    return qk_norm_rope_reference(qkv, cos, sin, n_head, eps)[:2]


@_qk_norm_rope.register_fake
def _(qkv, cos, sin, n_head, eps):
    q, k, _ = split(qkv, n_head)
    return q.new_empty(q.shape), k.new_empty(k.shape)


@torch.library.custom_op("stopwatch::qk_norm_rope_backward", mutates_args=())
def _qk_norm_rope_backward(
    gq: torch.Tensor,
    gk: torch.Tensor,
    gv: torch.Tensor,
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """-> the gradient of qkv"""
    if not runs_triton(qkv):
        return qk_norm_rope_backward_reference(gq, gk, gv, qkv, cos, sin, eps)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    q, k, _ = split(qkv, gq.size(2))
    launch_backward(gq, gk, gv, q, k, cos, sin, eps, *split(dqkv, gq.size(2)))
    return dqkv


@_qk_norm_rope_backward.register_fake
def _(gq, gk, gv, qkv, cos, sin, eps):
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


class _QKNormRope(torch.autograd.Function):
    """Not an op of its own, because v is a view of the input, which an op must not return."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, n_head, eps):
        ctx.eps = eps
        ctx.save_for_backward(qkv, cos, sin)
        _, _, v = split(qkv, n_head)
        return *_qk_norm_rope(qkv, cos, sin, n_head, eps), v

    @staticmethod
    def backward(ctx, gq, gk, gv):
        dqkv = _qk_norm_rope_backward(gq, gk, gv, *ctx.saved_tensors, ctx.eps)
        return dqkv, None, None, None, None


def _example(draw, head_dim):
    qkv = draw(2, 32, 6, head_dim)
    frequencies = 1 / torch.arange(1, head_dim // 2 + 1, device=qkv.device)
    angles = torch.arange(32, device=qkv.device)[:, None] * frequencies  # (T, D / 2)
    return [qkv], dict(cos=angles.cos().to(qkv.dtype), sin=angles.sin().to(qkv.dtype))


declare(
    Op(
        "qk_norm_rope",
        triton=qk_norm_rope,
        reference=qk_norm_rope_reference,
        example=_example,
        faster_on=(90,),
    )
)
