"""Triton kernels of linear_relu2, relu2_mlp and fp8_relu2_mlp: matrix products with an epilogue.

    forward:    post = relu(x w^T)^2
    backward:   dpre = (x w^T) 2 sqrt(post)

Sums are in fp32, rounded to the output's dtype before the activation. In FP8 the epilogue also
writes post in e4m3, with a scale known beforehand, and the largest post.

There are two kernels. One uses TMA, the unit of Hopper and later that copies tiles: a program per
SM walks over tiles, and each of its two warpgroups multiplies 64 x 256; it takes more shared memory
than the other chips have. On those, and for layouts that TMA cannot address, the one with pointers.

Source: the tile and the epilogue in halves from modded-nanogpt's records 59 and 87.
"""

import torch

from .launch import cast, dot, for_chip, sm_count, tl, triton
from .quantize import absolute_bits, to_fp8

# Chip -> BLOCK_M, BLOCK_N, BLOCK_K in bytes, warps, stages. The tile with pointers is small for 90,
# because rows of odd length cost registers
TMA_TILE = {80: None, 90: (128, 256, 128, 8, 4), 120: None}
TILE = {80: (128, 128, 64, 8, 4), 90: (64, 128, 64, 8, 4), 120: (128, 128, 64, 8, 4)}
# Without tensor cores, which would round the inputs: for tests, not for speed
TILE_FP32 = (64, 32, 64, 4, 2)


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
    x,  # descriptors: x (M, K), w (N, K)
    w,
    post,  # descriptor (M, N), with BACKWARD
    out,  # descriptor (M, N)
    x_scale,  # () fp32, as the next two, with FP8
    w_scale,
    out_scale,
    q,  # descriptor (M, N): out in FP8
    amax,  # (programs,) out, fp32
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BACKWARD: tl.constexpr,
    FP8: tl.constexpr,
):
    """For chips with TMA: each program walks over tiles. A descriptor reads zeros outside of its
    matrix and writes nothing there."""
    HALF: tl.constexpr = BLOCK_N // 2
    blocks_n = tl.cdiv(N, BLOCK_N)
    if FP8:
        scale = tl.load(x_scale) * tl.load(w_scale)
        inv_scale = tl.div_rn(1.0, tl.load(out_scale))
        largest = 0
    for tile in tl.range(
        tl.program_id(0), tl.cdiv(M, BLOCK_M) * blocks_n, tl.num_programs(0), flatten=True
    ):
        row = tile // blocks_n * BLOCK_M
        col = tile % blocks_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = dot(x.load([row, k]), w.load([col, k]).T, acc)
        # By halves, so that the tile on its way out takes half the shared memory
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
    x,  # (M, K)
    w,  # (N, K)
    post,  # (M, N), with BACKWARD
    out,  # (M, N) out
    x_scale,  # () fp32, as the next two, with FP8
    w_scale,
    out_scale,
    q,  # (M, N) out: out in FP8
    amax,  # (programs,) out, fp32
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
    # Rows outside read the last one, which needs no mask and leaves the maximum alone; they are not
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
        inv_scale = tl.div_rn(1.0, tl.load(out_scale))
        tl.store(q + offset, to_fp8(h.to(tl.float32) * inv_scale, q.dtype.element_ty), inside)
        largest = tl.max(absolute_bits(h.to(tl.float32)))
        tl.store(amax + tl.program_id(0), largest.to(tl.float32, bitcast=True))


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
    """x (M, K), w (N, K), dense rows -> relu(x w^T)^2 (M, N); given post (M, N), x w^T 2
    sqrt(post).

    For e4m3 x and w, scales are those of x, w and the result -> the result in bf16, the same in
    e4m3, its maximum.
    """
    M, K = x.shape
    N = w.size(0)
    backward = post is not None
    fp8 = scales is not None
    assert x.dtype == w.dtype and w.size(1) == K, (
        f"x {tuple(x.shape)} {x.dtype} and w {tuple(w.shape)} {w.dtype}"
    )
    out = x.new_empty(M, N, dtype=torch.bfloat16 if fp8 else x.dtype)
    post = post.contiguous() if backward else out  # something to point at
    q = torch.empty_like(out, dtype=x.dtype) if fp8 else None

    # Which kernel, and its tile
    tma = uses_tma(x, w, post, out, *([q] if fp8 else []))
    if x.dtype == torch.float32:
        tile = TILE_FP32
    else:
        tile = for_chip(TMA_TILE if tma else TILE, x)
    BM, BN, k_bytes, warps, stages = tile
    tiles = triton.cdiv(M, BM) * triton.cdiv(N, BN)
    programs = min(sm_count(x), tiles) if tma else tiles
    amax = x.new_empty(programs, dtype=torch.float32) if fp8 else None  # each its own: no atomics
    x_scale, w_scale, out_scale = scales or (None, None, None)
    arguments = dict(
        x_scale=x_scale,
        w_scale=w_scale,
        out_scale=out_scale,
        amax=amax,
        M=M,
        N=N,
        K=K,
        BLOCK_M=BM,
        BLOCK_N=BN,
        BLOCK_K=k_bytes // x.element_size(),
        BACKWARD=backward,
        FP8=fp8,
        num_warps=warps,
    )
    if tiles and tma:
        from triton.tools.tensor_descriptor import TensorDescriptor

        def described(a, *block):
            return None if a is None else TensorDescriptor.from_tensor(a, list(block))

        linear_relu2_tma_kernel[programs,](
            x=described(x, BM, arguments["BLOCK_K"]),
            w=described(w, BN, arguments["BLOCK_K"]),
            post=described(post, BM, BN // 2),
            out=described(out, BM, BN // 2),
            q=described(q, BM, BN // 2),
            num_stages=stages - (backward or fp8),  # one less, for the epilogue's second matrix
            **arguments,
        )
    elif tiles:
        linear_relu2_kernel[programs,](
            x=x,
            w=w,
            post=post,
            out=out,
            q=q,
            stride_x=x.stride(0),
            stride_w=w.stride(0),
            num_stages=stages,
            **arguments,
        )
    if not fp8:
        return out
    return out, q, amax.amax() if tiles else x.new_zeros((), dtype=torch.float32)
