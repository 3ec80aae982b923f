"""The MLP with a squared ReLU: the activation is computed where its matrix product ends, and only
it is stored.

    linear_relu2:  post = relu(x w^T)^2                          x: (M, K), w: (N, K) -> (M, N)
    relu2_mlp:     y = relu(x w_up^T)^2 w_down                   x: (M, C), both w: (H, C) -> (M, C)
    backward:      dpre = dpost 2 sqrt(post),   dpost = dy w_down^T

relu(pre) is the root of post, so pre is never written, and dpre is again a matrix product with an
epilogue: the same kernel computes it, and dpost is never written either. The four other products of
the MLP are torch.matmul. FLOPs: 2 M H C for each of the six products. Bytes, at e an element: the
epilogues write post, read it and write dpre, 3 e M H. With activation and gradient in passes of
their own, which read pre and dpost, it is 7 e M H.

Numerics: sums in fp32, rounded to x's dtype before the activation, as F.linear(x,
w).relu().square() does. The root rounded to the same dtype is relu(pre) again, bit by bit: with pre
= m 2^e, m an integer in [128, 256) for bf16, rounding m^2 moves its root by less than 0.36. So dpre
rounds where eager's does and nowhere else. The exception is where the square leaves the dtype's
normal range: in fp16 relu(pre) below 2^-7 loses bits and below 2^-12 all of them.

fp8_relu2_mlp multiplies e4m3 in the forward; the epilogue also writes post in e4m3, with a scale
known beforehand, and max post for the next scale, so quantising post costs no pass. The backward is
the one above.

Source: squared ReLU from Primer (So et al., arXiv:2109.08668); storing only post, the tile and the
epilogue in halves from modded-nanogpt's records 59 and 87, post in e4m3 from its record 89.
"""

import torch
import torch.nn.functional as F

from .fp8 import (
    DelayedScale,
    absolute_bits,
    amax_reference,
    dynamic_scale,
    fp8_matmul,
    quantize,
    quantize_reference,
    to_fp8,
)
from .launch import as_rows, cast, dot, for_chip, runs_triton, sm_count, tl, triton
from .op import Op, declare

# Per chip. TMA, the unit of Hopper and later that copies tiles: one program per SM walks over
# tiles, each of its two warpgroups multiplies 64 x 256; it takes more shared memory than the other
# chips have. On those, and for layouts that TMA cannot address, the kernel with pointers; its tile
# for 90 is small because rows of odd length cost registers. BLOCK_M, BLOCK_N, BLOCK_K in bytes,
# warps, stages
TMA_TILE = {80: None, 90: (128, 256, 128, 8, 4), 120: None}
TILE = {80: (128, 128, 64, 8, 4), 90: (64, 128, 64, 8, 4), 120: (128, 128, 64, 8, 4)}
TILE_FP32 = (
    64,
    32,
    64,
    4,
    2,
)  # without tensor cores, which would round the inputs: for tests, not for speed


def linear_relu2_reference(x, w):
    """The formula in PyTorch."""
    return F.linear(x, w).relu().square()


def relu2_mlp_reference(x, w_up, w_down):
    return linear_relu2_reference(x, w_up) @ w_down


def fp8_relu2_mlp_reference(x8, w_up8, w_down8, post_scale):
    """-> y, post, both bf16, max post; no gradient. See fp8_relu2_mlp."""
    x, w_up, w_down_t = (q.float() * scale for q, scale in (x8, w_up8, w_down8))
    post = (x @ w_up.T).bfloat16().relu().square()
    q = quantize_reference(post, post_scale)[0]
    return ((q.float() * post_scale) @ w_down_t.T).bfloat16(), post, amax_reference(post)


def linear_relu2(x, w):
    """x: (..., K), w: (N, K), both fp32, bf16 or fp16 -> (..., N) in the same dtype."""
    return _linear_relu2(x, w)


def relu2_mlp(x, w_up, w_down):
    """x: (..., C); w_up, w_down: (H, C), the second as the transpose of F.linear's; all of one
    dtype -> like x."""
    return _relu2_mlp(x, w_up, w_down)[0]


def fp8_relu2_mlp(x, w_up, w_down, x8, w_up8, w_down8, post_scale):
    """relu2_mlp with e4m3 products in the forward -> y like x, and max post (0-d fp32, for the next
    post_scale).

    x, w_up, w_down: as in relu2_mlp, bf16; for the backward, which is relu2_mlp's.
    x8, w_up8, w_down8: (q, scale) of each, quantised by the caller, since weights serve many
    micro-batches: q (..., C) and (H, C), but that of w_down transposed, (C, H); scale 0-d fp32,
    value = q scale. post_scale: likewise, of post. C and H must be multiples of 16, and the GPU of
    compute capability 8.9 or newer.
    """
    y, _, post_max = _fp8_relu2_mlp(x, w_up, w_down, *x8, *w_up8, *w_down8, post_scale)
    return y, post_max.detach()


class FP8ReLU2MLP(torch.nn.Module):
    """relu2_mlp(x, w_up, w_down) on RMS-normalised bf16 x, with scales of its own: x cannot pass
    sqrt(C); weights go by their largest, looked up in every call; post by its largest in the last
    step (call post.roll() once a step).

    Without gradients it multiplies in bf16, so that validation measures the weights and not the
    format.
    """

    def __init__(self):
        super().__init__()
        self.post = DelayedScale(amax=32.0)

    def forward(self, x, w_up, w_down):
        if not torch.is_grad_enabled():
            return relu2_mlp(x, w_up, w_down)
        x_scale = torch.full((), x.size(-1) ** 0.5 / 448, dtype=torch.float32, device=x.device)
        x8 = quantize(as_rows(x), x_scale)[0].view(x.shape), x_scale
        up_scale, down_scale = dynamic_scale(w_up), dynamic_scale(w_down)
        w_up8 = quantize(w_up, up_scale)[0], up_scale
        w_down8 = quantize(w_down, down_scale, transpose=True)[1], down_scale
        y, post_max = fp8_relu2_mlp(x, w_up, w_down, x8, w_up8, w_down8, self.post.scale)
        self.post.amax.copy_(torch.maximum(self.post.amax, post_max))
        return y


@triton.jit
def epilogue(acc, post, dtype: tl.constexpr, BACKWARD: tl.constexpr):
    """The product's fp32 sums -> post, or in the backward dpre, given the stored post."""
    h = cast(acc, dtype).to(tl.float32)
    if BACKWARD:
        h *= 2.0 * cast(tl.sqrt(post.to(tl.float32)), dtype).to(tl.float32)
    else:
        h = tl.where(h < 0, 0.0, h)  # unlike maximum, it keeps NaN
        h *= h
    return cast(h, dtype)


@triton.jit
def linear_relu2_tma_kernel(
    x,
    w,
    post,
    out,
    x_scale,
    w_scale,
    out_scale,
    q,
    amax,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BACKWARD: tl.constexpr,
    FP8: tl.constexpr,
):
    """x (M, K), w (N, K), post, out, q (M, N) are tensor descriptors: zeros are read outside,
    nothing is written."""
    HALF: tl.constexpr = BLOCK_N // 2
    blocks_n = tl.cdiv(N, BLOCK_N)
    if FP8:
        scale = tl.load(x_scale) * tl.load(w_scale)
        inv_scale = tl.div_rn(1.0, tl.load(out_scale))
        largest = 0
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(M, BLOCK_M) * blocks_n, tl.num_programs(0), flatten=True
    ):
        row, col = tile // blocks_n * BLOCK_M, tile % blocks_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = dot(x.load([row, k]), w.load([col, k]).T, acc)
        # by halves, so that the tile on its way out takes half the shared memory
        halves = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        for i in tl.static_range(2):
            p = post.load([row, col + i * HALF]) if BACKWARD else None
            h = epilogue(halves[i] * scale if FP8 else halves[i], p, out.dtype, BACKWARD)
            out.store([row, col + i * HALF], h)
            if FP8:
                q.store([row, col + i * HALF], to_fp8(h.to(tl.float32) * inv_scale, q.dtype))
                largest = tl.maximum(largest, tl.max(absolute_bits(h.to(tl.float32))))
    if FP8:
        tl.store(amax + tl.program_id(0), largest.to(tl.float32, bitcast=True))


@triton.jit
def linear_relu2_kernel(
    x,
    w,
    post,
    out,
    x_scale,
    w_scale,
    out_scale,
    q,
    amax,
    M,
    N,
    K,
    stride_x,
    stride_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BACKWARD: tl.constexpr,
    FP8: tl.constexpr,
):
    """The same for any layout and chip: one tile per program, plain pointers."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # rows outside read the last one, which needs no mask and leaves the maximum alone; they are not
    # stored
    x += tl.minimum(row, M - 1).to(tl.int64)[:, None] * stride_x + k
    w += tl.minimum(col, N - 1).to(tl.int64)[None, :] * stride_w + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(x + start, (k < K - start)[None, :], 0.0)
        b = tl.load(w + start, (k < K - start)[:, None], 0.0)
        acc = dot(a, b, acc)
    if FP8:
        acc *= tl.load(x_scale) * tl.load(w_scale)
    inside = (row < M)[:, None] & (col < N)
    offset = row.to(tl.int64)[:, None] * N + col
    p = tl.load(post + offset, inside, 0.0) if BACKWARD else None
    h = epilogue(acc, p, out.dtype.element_ty, BACKWARD)
    tl.store(out + offset, h, inside)
    if FP8:
        tl.store(
            q + offset,
            to_fp8(h.to(tl.float32) * tl.div_rn(1.0, tl.load(out_scale)), q.dtype.element_ty),
            inside,
        )
        tl.store(
            amax + tl.program_id(0),
            tl.max(absolute_bits(h.to(tl.float32))).to(tl.float32, bitcast=True),
        )


def uses_tma(*matrices):
    """Whether the chip has TMA, and shared memory for its tile, and TMA can address the
    matrices."""
    return for_chip(TMA_TILE, matrices[0]) is not None and all(
        a.element_size() <= 2
        and a.stride(0) >= a.size(1) > 0
        and a.stride(0) * a.element_size() % 16 == 0
        and a.data_ptr() % 16 == 0
        for a in matrices
    )


def launch_linear_relu2(x, w, post=None, scales=None):
    """x (M, K), w (N, K), rows contiguous -> relu(x w^T)^2 (M, N); given post (M, N), x w^T 2
    sqrt(post).

    For e4m3 x and w, scales are those of x, w and the result -> the result in bf16, the same in
    e4m3, its maximum.
    """
    (M, K), N, backward, fp8 = x.shape, w.size(0), post is not None, scales is not None
    assert x.dtype == w.dtype and w.size(1) == K, (
        f"x {tuple(x.shape)} {x.dtype} and w {tuple(w.shape)} {w.dtype}"
    )
    scales = scales or (None, None, None)
    out = x.new_empty(M, N, dtype=torch.bfloat16 if fp8 else x.dtype)
    post = post.contiguous() if backward else out
    q = torch.empty_like(out, dtype=x.dtype) if fp8 else None
    tma = uses_tma(x, w, post, out, *([q] if fp8 else []))
    BM, BN, k_bytes, warps, stages = (
        TILE_FP32 if x.dtype == torch.float32 else for_chip(TMA_TILE if tma else TILE, x)
    )
    BK, tiles = k_bytes // x.element_size(), triton.cdiv(M, BM) * triton.cdiv(N, BN)
    programs = min(sm_count(x), tiles) if tma else tiles
    amax = (
        x.new_empty(programs, dtype=torch.float32) if fp8 else None
    )  # one per program: no atomics
    if tiles and tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        def described(a, *block):
            return None if a is None else TensorDescriptor.from_tensor(a, list(block))

        linear_relu2_tma_kernel[programs,](
            described(x, BM, BK),
            described(w, BN, BK),
            described(post, BM, BN // 2),
            described(out, BM, BN // 2),
            *scales,
            described(q, BM, BN // 2),
            amax,
            M,
            N,
            K,
            BM,
            BN,
            BK,
            backward,
            fp8,
            num_warps=warps,
            num_stages=stages - (backward or fp8),
        )  # a stage less, for the epilogue's second matrix
    elif tiles:
        linear_relu2_kernel[programs,](
            x,
            w,
            post,
            out,
            *scales,
            q,
            amax,
            M,
            N,
            K,
            x.stride(0),
            w.stride(0),
            BM,
            BN,
            BK,
            backward,
            fp8,
            num_warps=warps,
            num_stages=stages,
        )
    if not fp8:
        return out
    return out, q, amax.amax() if tiles else x.new_zeros((), dtype=torch.float32)


@torch.library.custom_op("stopwatch::linear_relu2", mutates_args=())
def _linear_relu2(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    if runs_triton(x):
        return launch_linear_relu2(as_rows(x), as_rows(w)).view(*x.shape[:-1], w.size(0))
    return linear_relu2_reference(x, w)


@_linear_relu2.register_fake
def _(x, w):
    return x.new_empty(*x.shape[:-1], w.size(0))


@torch.library.custom_op("stopwatch::relu2_mlp", mutates_args=())
def _relu2_mlp(
    x: torch.Tensor, w_up: torch.Tensor, w_down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> y, post (both of x's leading shape)."""
    post = _linear_relu2(x, w_up)
    return post @ w_down, post


@_relu2_mlp.register_fake
def _(x, w_up, w_down):
    return x.new_empty(*x.shape[:-1], w_down.size(1)), x.new_empty(*x.shape[:-1], w_up.size(0))


@torch.library.custom_op("stopwatch::relu2_mlp_backward", mutates_args=())
def _relu2_mlp_backward(dy: torch.Tensor, w_down: torch.Tensor, post: torch.Tensor) -> torch.Tensor:
    """-> dpre, like post."""
    if runs_triton(dy):
        return launch_linear_relu2(as_rows(dy), as_rows(w_down), as_rows(post)).view(post.shape)
    return activation_gradient(F.linear(dy, w_down), post)


@_relu2_mlp_backward.register_fake
def _(dy, w_down, post):
    return torch.empty_like(post, memory_format=torch.contiguous_format)


@torch.library.custom_op("stopwatch::fp8_relu2_mlp", mutates_args=())
def _fp8_relu2_mlp(
    x: torch.Tensor,
    w_up: torch.Tensor,
    w_down: torch.Tensor,
    q_x: torch.Tensor,
    x_scale: torch.Tensor,
    q_up: torch.Tensor,
    up_scale: torch.Tensor,
    q_down_t: torch.Tensor,
    down_scale: torch.Tensor,
    post_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y, post (bf16), max post."""
    if not runs_triton(x):
        return fp8_relu2_mlp_reference(
            (q_x, x_scale), (q_up, up_scale), (q_down_t, down_scale), post_scale
        )
    post, q, post_max = launch_linear_relu2(
        as_rows(q_x), as_rows(q_up), scales=(x_scale, up_scale, post_scale)
    )
    y = fp8_matmul(q, q_down_t, post_scale, down_scale, torch.bfloat16, fast=True)
    return y.view(*x.shape[:-1], len(q_down_t)), post.view(*x.shape[:-1], len(q_up)), post_max


@_fp8_relu2_mlp.register_fake
def _(x, w_up, w_down, *_):
    y, post = (
        x.new_empty(*x.shape[:-1], n, dtype=torch.bfloat16) for n in (w_down.size(1), w_up.size(0))
    )
    return y, post, x.new_empty((), dtype=torch.float32)


def activation_gradient(dpost, post):
    """dpre by PyTorch. Inductor may leave the root unrounded, up to 0.36 ulp from relu(pre)."""
    return dpost * (2 * post.sqrt())


def linear_gradients(x, w, dpre):
    """Gradients of x and w in pre = x w^T."""
    return dpre @ w, as_rows(dpre).T @ as_rows(x)


def _linear_relu2_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


def _linear_relu2_gradients(ctx, dpost):
    x, w, post = ctx.saved_tensors
    return linear_gradients(x, w, activation_gradient(dpost, post))


def _relu2_mlp_save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # only y has a gradient
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.rest = (None,) * (len(inputs) - 3)


def _relu2_mlp_gradients(ctx, dy, *_):
    x, w_up, w_down, post = ctx.saved_tensors
    dpre = _relu2_mlp_backward(dy, w_down, post)
    return *linear_gradients(x, w_up, dpre), as_rows(post).T @ as_rows(dy), *ctx.rest


_linear_relu2.register_autograd(_linear_relu2_gradients, setup_context=_linear_relu2_save)
_relu2_mlp.register_autograd(_relu2_mlp_gradients, setup_context=_relu2_mlp_save)
_fp8_relu2_mlp.register_autograd(_relu2_mlp_gradients, setup_context=_relu2_mlp_save)


declare(
    Op(
        "relu2_mlp",
        triton=relu2_mlp,
        reference=relu2_mlp_reference,
        example=lambda draw, _: ([draw(192, 128), draw(256, 128) / 11, draw(256, 128) / 16], {}),
        faster_on=(90,),
        new_fp8=FP8ReLU2MLP,
    )
)
