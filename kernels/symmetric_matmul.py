"""Symmetric products of matrices for about half the work: no tiles above the diagonal.

    alpha X X^T + beta C + diagonal I,    X: (..., m, k),  C symmetric: (..., m, m)

X^T X is symmetric_matmul(X.mT), and b A + c A A of a symmetric A is
symmetric_matmul(A, A, alpha=c, beta=b). FLOPs per matrix with tiles of t rows: m (m + t) k, where a
full product has 2 m^2 k. Minimum bytes at e an element: e (m k + m^2), with C another e m^2 / 2.

One program per tile, all matrices of a batch in one launch. A tile below the diagonal is stored
twice, as it is and transposed, and one on the diagonal is given its lower half's mirror image, so
the result is symmetric bit for bit. Sums are in fp32 and rounded once. Only the optimizer uses it,
so it has no gradient.

normalised_polynomial() is that second product with a division by a norm in it, which so takes
neither a launch nor a pass over memory: |Y|_F^2 is the trace of A = Y Y^T, which is there already.
Each program adds up the diagonal of its A, 2 m bytes beside the 4 m t that it multiplies.

Source: mirrored tiles as in modded-nanogpt (whose programs above the diagonal start and leave) and
QuACK's gemm_symmetric; the triangular grid is ours.
"""

import torch

from .launch import cast, dot, for_chip, runs_triton, tl, triton
from .op import Op, declare

# Chip -> rows of a tile, bytes of a row of X at a time, warps, stages; modded-nanogpt's for k = 768
TILES = {80: (128, 128, 8, 4)}

# Matrices are divided by SAFETY |Y|_F + EPS: a norm of 1 after rounding must not exceed 1
SAFETY = 1.02
EPS = 1e-6
# Of |Y|_F^2: beyond this A A would soon overflow in fp32
MOST = 1e18


def symmetric_matmul_reference(X, C=None, *, alpha=1.0, beta=0.0, diagonal=0.0):
    """symmetric_matmul in plain PyTorch; symmetric up to rounding."""
    if diagonal:  # in at least fp32, since rounding before it is added as well would show
        wide = torch.promote_types(X.dtype, torch.float32)
        C_ = None if C is None else C.to(wide)
        product = symmetric_matmul_reference(X.to(wide), C_, alpha=alpha, beta=beta)
        product.diagonal(dim1=-2, dim2=-1).add_(diagonal)
        return product.to(X.dtype)
    if C is None:
        product = X @ X.mT
        return product if alpha == 1 else alpha * product
    X = as_batch(X)
    return torch.baddbmm(as_batch(C), X, X.mT, beta=beta, alpha=alpha).view(C.shape)


def symmetric_matmul(X, C=None, *, alpha=1.0, beta=0.0, diagonal=0.0):
    """alpha X X^T + beta C + diagonal I: (..., m, m) in X's dtype, contiguous.

    X: (..., m, k) fp32, bf16 or fp16, any strides. C: None or (..., m, m), symmetric; only its
    lower half counts. As with torch.baddbmm, beta 0 means no C. The kernel's result is symmetric
    bit for bit, the reference's up to rounding. Raises ValueError for a C that does not fit.
    """
    if C is not None and (C.shape != (*X.shape[:-1], X.size(-2)) or C.dtype != X.dtype):
        raise ValueError(
            f"C is {tuple(C.shape)} {C.dtype} for an X of {tuple(X.shape)} {X.dtype}: "
            f"expected {(*X.shape[:-1], X.size(-2))} and the same dtype"
        )
    return _symmetric_matmul(X, C if beta else None, alpha, beta, diagonal)


def normalised_polynomial(A, a, b, c):
    """s (a I + b S + c S S) with S = s^2 A and s = 1 / (1.02 |Y|_F + 1e-6), of A = Y Y^T.

    A: (..., m, m) fp32, bf16 or fp16, symmetric; |Y|_F^2 is its trace. So the result times Y is one
    step of a polynomial on Y divided by its norm. Zero for a Y of |Y|_F above 1e9, NaN for a NaN.
    """
    return _symmetric_matmul(A, A, c, b, a, True)


def normalised_polynomial_reference(A, a, b, c):
    """normalised_polynomial in plain PyTorch; symmetric up to rounding."""
    wide = torch.promote_types(A.dtype, torch.float32)
    trace = A.to(wide).diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    s = 1 / (SAFETY * trace.sqrt() + EPS)
    S = s * s * A.to(wide)
    B = b * S + c * (S @ S)
    B.diagonal(dim1=-2, dim2=-1).add_(a)
    return (s * B).masked_fill(trace > MOST, 0).to(A.dtype)


def as_batch(X):
    """(..., m, k) -> (batch, m, k); a view wherever there is one."""
    return X.flatten(0, -3) if X.dim() > 2 else X[None]


# --- kernels

SCALE = tl.constexpr(SAFETY)
FLOOR = tl.constexpr(EPS)
LIMIT = tl.constexpr(MOST)


@triton.jit
def triangle(i, n):
    """The i-th tile on or below the diagonal of n x n tiles -> its row, its column. Integers only.

    The first row with the last one, the second with the last but one, and so on fill a rectangle
    n + 1 wide, if n is even; if it is odd, a row of no tiles comes before the first, and the width
    is n.
    """
    odd = n % 2
    pair = i // (n + 1 - odd)
    place = i % (n + 1 - odd)
    short = pair + 1 - odd  # tiles in the shorter row of the pair
    row = tl.where(place < short, short - 1, n - 1 - pair)
    col = tl.where(place < short, place, place - short)
    return row, col


@triton.jit
def symmetric_matmul_kernel(
    X,  # (batch, M, K), any strides
    C,  # (batch, M, M), any strides, with ADD
    out,  # (batch, M, M), contiguous
    M,
    K,
    alpha,
    beta,
    diagonal,
    stride_xb,
    stride_xm,
    stride_xk,
    stride_cb,
    stride_cm,
    stride_cn,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ADD: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    tiles = tl.cdiv(M, TILE)
    per_matrix = tiles * (tiles + 1) // 2
    matrix = (tl.program_id(0) // per_matrix).to(tl.int64)
    tile_row, tile_col = triangle(tl.program_id(0) % per_matrix, tiles)
    row = tile_row * TILE + tl.arange(0, TILE)
    col = tile_col * TILE + tl.arange(0, TILE)
    row64 = row.to(tl.int64)
    col64 = col.to(tl.int64)

    # The product of the tile's rows of X with the rows that its columns stand for
    k = tl.arange(0, BLOCK_K)
    step = tl.cast(stride_xk, tl.int64)
    x = X + matrix * stride_xb + row64[:, None] * stride_xm + k * step  # (TILE, BLOCK_K) both
    y = X + matrix * stride_xb + col64[:, None] * stride_xm + k * step
    acc = tl.zeros((TILE, TILE), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        rest = k < K - k0
        x_rows = tl.load(x, (row < M)[:, None] & rest, 0.0)
        y_rows = tl.load(y, (col < M)[:, None] & rest, 0.0)
        acc = dot(x_rows, tl.trans(y_rows), acc)
        x += BLOCK_K * step
        y += BLOCK_K * step

    # The tile, and its mirror image above the diagonal
    inside = (row < M)[:, None] & (col < M)
    acc *= alpha
    if NORMALISE:  # as if C, which is X, had been divided by its trace first
        sums = tl.zeros((BLOCK_K,), tl.float32)
        on_diagonal = C + matrix * stride_cb + k.to(tl.int64) * (stride_cm + stride_cn)
        for k0 in range(0, M, BLOCK_K):
            sums += tl.load(on_diagonal, k < M - k0, 0.0).to(tl.float32)
            on_diagonal += BLOCK_K * (tl.cast(stride_cm, tl.int64) + stride_cn)
        trace = tl.sum(sums, 0)
        s = 1.0 / (SCALE * tl.sqrt(trace) + FLOOR)
        square = s * s
        acc = acc * square * square
        beta = beta * square
    if ADD:
        c = C + matrix * stride_cb + row64[:, None] * stride_cm + col64 * stride_cn
        acc += beta * tl.load(c, inside, 0.0).to(tl.float32)
    acc += tl.where(row[:, None] == col, diagonal, 0.0)
    if NORMALISE:
        acc = tl.where(trace > LIMIT, 0.0, s * acc)
    tile = cast(acc, out.dtype.element_ty)
    out += matrix * M * M
    if tile_row == tile_col:
        tile = tl.where(row[:, None] >= col, tile, tl.trans(tile))
    else:
        tl.store(out + col64[:, None] * M + row, tl.trans(tile), (col < M)[:, None] & (row < M))
    tl.store(out + row64[:, None] * M + col, tile, inside)


def launch_symmetric_matmul(X, C, alpha, beta, diagonal=0.0, normalise=False):
    """(batch, m, k), (batch, m, m) or None -> (batch, m, m). normalise: see
    normalised_polynomial."""
    batch, M, K = X.shape
    out = X.new_empty(batch, M, M)
    rows, k_bytes, warps, stages = for_chip(TILES, X)
    tiles = triton.cdiv(M, rows)
    stride_cb, stride_cm, stride_cn = (0, 0, 0) if C is None else C.stride()
    if out.numel():
        symmetric_matmul_kernel[batch * tiles * (tiles + 1) // 2,](
            X=X,
            C=C,
            out=out,
            M=M,
            K=K,
            alpha=alpha,
            beta=beta,
            diagonal=diagonal,
            stride_xb=X.stride(0),
            stride_xm=X.stride(1),
            stride_xk=X.stride(2),
            stride_cb=stride_cb,
            stride_cm=stride_cm,
            stride_cn=stride_cn,
            TILE=rows,
            BLOCK_K=k_bytes // X.element_size(),
            ADD=C is not None,
            NORMALISE=normalise,
            num_warps=warps,
            num_stages=stages,
        )
    return out


# --- ops


@torch.library.custom_op("stopwatch::symmetric_matmul", mutates_args=())
def _symmetric_matmul(
    X: torch.Tensor,
    C: torch.Tensor | None,
    alpha: float,
    beta: float,
    diagonal: float = 0.0,
    normalise: bool = False,
) -> torch.Tensor:
    if runs_triton(X):
        batch = None if C is None else as_batch(C)
        out = launch_symmetric_matmul(as_batch(X), batch, alpha, beta, diagonal, normalise)
        return out.view(*X.shape[:-1], X.size(-2))
    if normalise:
        return normalised_polynomial_reference(X, diagonal, beta, alpha).contiguous()
    out = symmetric_matmul_reference(X, C, alpha=alpha, beta=beta, diagonal=diagonal)
    return out.contiguous()


@_symmetric_matmul.register_fake
def _(X, C, alpha, beta, diagonal=0.0, normalise=False):
    return X.new_empty(*X.shape[:-1], X.size(-2))


declare(
    Op(
        "symmetric_matmul",
        triton=symmetric_matmul,
        reference=symmetric_matmul_reference,
        example=lambda draw, _: ([draw(2, 160, 96) / 16], {}),
        faster_on=(90,),
        has_gradient=False,
    )
)
