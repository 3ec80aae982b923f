"""Tensors in 8-bit floats: quantising, with a transposed copy and with the largest |x|.

    q = round(clamp(x / scale)),   so that x is about q scale
    scale = max |x| / (largest number of the format), or what is known of x

e4m3 has 3 bits of mantissa and reaches from 2^-9 to 448, e5m2 has 2 and reaches from 2^-16 to
57344: weights and activations need the precision, gradients the range. What PyTorch's casts do
beyond the range depends on the format (e4m3 saturates, e5m2 becomes infinite), so x is clamped
first; infinity becomes the largest number, NaN stays NaN. x is multiplied by the rounded inverse of
scale, in fp32.

Minimum bytes for an x of n elements of e bytes: quantise (e + 1) n, with the transposed copy
(e + 2) n, and e n more where max |x| has to be found first; transpose_copy of FP8 2 n.

Source: formats as in Micikevicius et al., arXiv:2209.05433; the tile of the transposition from
modded-nanogpt's record 76.
"""

import torch

from .launch import INTERPRET, chip, dense_rows, for_chip, runs_triton, sm_count, tl, triton

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
FLOOR = 2.0**-100  # smallest scale: that of an all-zero tensor, whose inverse has to be finite

# Chip -> rows, columns, warps; both the fastest of those tried on an H200
QUANTIZE_TILE = {89: (32, 128, 4)}
TRANSPOSE_TILE = {89: (128, 128, 8)}
AMAX_TILE = (32, 256)  # rows, columns


def quantize_reference(x, scale, dtype=E4M3, transpose=False):
    """quantize in plain PyTorch."""
    largest = torch.finfo(dtype).max
    q = (x.float() * (1 / scale.float())).clamp(-largest, largest).to(dtype)
    if transpose:
        q_t = q.t().clone(memory_format=torch.contiguous_format)
    else:
        q_t = q.new_empty(0)
    return q.contiguous(), q_t


def amax_reference(x):
    """amax in plain PyTorch."""
    return x.detach().abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)


def quantize(x, scale, dtype=E4M3, transpose=False):
    """x: (M, N), any float; scale: 0-d fp32 on x's device -> q: (M, N) and q_t: (N, M), contiguous.

    dtype: float8_e4m3fn or float8_e5m2. q_t is empty unless transpose. There is no gradient. Raises
    ValueError on a GPU without FP8 (before compute capability 8.9). Under torch.compile, without
    the transposed copy, it is part of the kernel that makes x, which spares a pass over x.
    """
    if torch.compiler.is_compiling() and not transpose:
        return quantize_reference(x.detach(), scale, dtype)
    return _quantize(x.detach(), scale, dtype, transpose, False)[:2]


def quantize_and_amax(x, scale, dtype=E4M3, transpose=False):
    """As quantize -> q, q_t, max |x| (0-d fp32, NaN if there is one in x), for the scale of the
    next step."""
    return _quantize(x.detach(), scale, dtype, transpose, True)


def amax(x):
    """max |x| as a 0-d fp32 tensor; x: (M, N). 0 if empty, NaN if there is one in x."""
    return _amax(x.detach())


def dynamic_scale(x, dtype=E4M3):
    """x: (M, N) -> the scale that maps max |x| to the largest FP8 number, 0-d fp32: one read, no
    synchronisation."""
    return (amax(x) / torch.finfo(dtype).max).clamp(min=FLOOR)


def as_scale(scale, x):
    """A number or a 0-d fp32 tensor -> 0-d fp32 on x's device. It is filled there: copying a number
    there would synchronise."""
    if isinstance(scale, torch.Tensor):
        return scale
    return torch.full((), scale, dtype=torch.float32, device=x.device)


def transpose_copy(x):
    """x: (M, N) of 1, 2 or 4 bytes an element -> (N, M) contiguous, for example FP8 gradients of
    logits for the head's dw."""
    return _transpose_copy(x.detach())


# --- kernels


@triton.jit
def to_fp8(x, dtype: tl.constexpr):
    """fp32 -> tl.float8e4nv or tl.float8e5, to nearest even, saturating, NaN stays NaN."""
    LARGEST: tl.constexpr = 448.0 if dtype == tl.float8e4nv else 57344.0
    x = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))
    # The interpreter's casts cut subnormals off and lose NaN, so there x is first made a multiple
    # of the format's spacing
    if INTERPRET:
        MANTISSA: tl.constexpr = 3 if dtype == tl.float8e4nv else 2
        # The smallest normal number
        NORMAL: tl.constexpr = 2.0**-6 if dtype == tl.float8e4nv else 2.0**-14
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        # fp32's spacing at this number is the one wanted
        shift = tl.maximum(power, NORMAL) * (1.5 * 2.0 ** (23 - MANTISSA))
        bits = ((x + shift) - shift).to(dtype).to(tl.uint8, bitcast=True).to(tl.int32) & 0x7F
        return (tl.where(x == x, bits, 0x7F) | sign).to(tl.uint8).to(dtype, bitcast=True)
    return x.to(dtype)


@triton.jit
def absolute_bits(x):
    """fp32 -> |x| as int32: ordered alike, with NaN on top, which a maximum of floats would
    drop."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def quantize_kernel(
    x,  # (M, N)
    scale,  # () fp32
    q,  # (M, N) out
    q_t,  # (N, M) out, with TRANSPOSE
    amax,  # (programs,) out, fp32, with RECORD
    M,
    N,
    stride_x,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    RECORD: tl.constexpr,
):
    tiles = tl.cdiv(N, COLUMNS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < M)[:, None] & (col < N)
    row64 = row.to(tl.int64)[:, None]
    col64 = col.to(tl.int64)[:, None]
    v = tl.load(x + row64 * stride_x + col, inside, 0.0).to(tl.float32)
    if RECORD:
        largest = tl.max(tl.max(absolute_bits(v), 1), 0)
        tl.store(amax + tl.program_id(0), largest.to(tl.float32, bitcast=True))
    v = to_fp8(v * tl.div_rn(1.0, tl.load(scale).to(tl.float32)), q.dtype.element_ty)
    tl.store(q + row64 * N + col, v, inside)
    if TRANSPOSE:
        tl.store(q_t + col64 * M + row, tl.trans(v), (col < N)[:, None] & (row < M))


@triton.jit
def transpose_kernel(
    x,  # (M, N)
    y,  # (N, M) out
    M,
    N,
    stride_x,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(N, COLUMNS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    v = tl.load(x + row.to(tl.int64)[:, None] * stride_x + col, (row < M)[:, None] & (col < N))
    tl.store(y + col.to(tl.int64)[:, None] * M + row, tl.trans(v), (col < N)[:, None] & (row < M))


@triton.jit
def amax_kernel(
    x,  # (M, N)
    amax,  # (programs,) out, fp32
    M,
    N,
    stride_x,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(N, COLUMNS)
    largest = tl.zeros((ROWS, COLUMNS), tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(M, ROWS) * tiles, tl.num_programs(0)):
        row = tile // tiles * ROWS + tl.arange(0, ROWS)
        col = tile % tiles * COLUMNS + tl.arange(0, COLUMNS)
        v = tl.load(
            x + row.to(tl.int64)[:, None] * stride_x + col, (row < M)[:, None] & (col < N), 0.0
        )
        largest = tl.maximum(largest, absolute_bits(v.to(tl.float32)))
    tl.store(amax + tl.program_id(0), tl.max(tl.max(largest, 1), 0).to(tl.float32, bitcast=True))


def launch_quantize(x, scale, dtype, transpose, record):
    """(M, N) with dense rows -> q, q_t (empty unless transpose), max |x| (empty unless record)."""
    M, N = x.shape
    rows, columns, warps = for_chip(QUANTIZE_TILE, x)
    tiles = triton.cdiv(M, rows) * triton.cdiv(N, columns)
    q = x.new_empty(M, N, dtype=dtype)
    # Apart for fp32, whose transposition within the kernel Triton 3.6 garbles on Hopper
    within = transpose and x.element_size() < 4
    q_t = x.new_empty((N, M) if within else 0, dtype=dtype)
    partial = x.new_empty(tiles if record else 0, dtype=torch.float32)
    if tiles:
        quantize_kernel[tiles,](
            x=x,
            scale=scale,
            q=q,
            q_t=q_t,
            amax=partial,
            M=M,
            N=N,
            stride_x=x.stride(0),
            ROWS=rows,
            COLUMNS=columns,
            TRANSPOSE=within,
            RECORD=record,
            num_warps=warps,
        )
    if transpose and not within:
        q_t = launch_transpose(q)
    if not record:
        return q, q_t, partial
    return q, q_t, partial.amax() if tiles else partial.new_zeros(())


def launch_transpose(x):
    """(M, N) with dense rows -> (N, M) contiguous."""
    M, N = x.shape
    rows, columns, warps = for_chip(TRANSPOSE_TILE, x)
    tiles = triton.cdiv(M, rows) * triton.cdiv(N, columns)
    y = x.new_empty(N, M)
    # Elements are moved, not looked at
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    if tiles:
        transpose_kernel[tiles,](
            x=x.view(bits),
            y=y.view(bits),
            M=M,
            N=N,
            stride_x=x.stride(0),
            ROWS=rows,
            COLUMNS=columns,
            num_warps=warps,
        )
    return y


def launch_amax(x):
    """(M, N) with dense rows -> max |x|, 0-d fp32."""
    M, N = x.shape
    rows, columns = AMAX_TILE
    programs = min(triton.cdiv(M, rows) * triton.cdiv(N, columns), 4 * sm_count(x))
    if programs == 0:
        return x.new_zeros((), dtype=torch.float32)
    partial = x.new_empty(programs, dtype=torch.float32)
    amax_kernel[programs,](
        x=x,
        amax=partial,
        M=M,
        N=N,
        stride_x=x.stride(0),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=8,
    )
    return partial.amax()


# --- ops


@torch.library.custom_op("stopwatch::quantize", mutates_args=())
def _quantize(
    x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, transpose: bool, record: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> q, q_t (empty unless transpose), max |x| (empty unless record)."""
    if runs_triton(x):
        if chip(x) < 89:
            raise ValueError(
                "fp8 needs a GPU of compute capability 8.9 or newer (L40S, 4090, H100, ...), this "
                f"one has {chip(x) / 10}: use bf16 there"
            )
        return launch_quantize(dense_rows(x), scale, dtype, transpose, record)
    seen = amax_reference(x) if record else x.new_empty(0, dtype=torch.float32)
    return *quantize_reference(x, scale, dtype, transpose), seen


@_quantize.register_fake
def _(x, scale, dtype, transpose, record):
    q = x.new_empty(x.shape, dtype=dtype)
    q_t = x.new_empty(x.shape[::-1] if transpose else 0, dtype=dtype)
    return q, q_t, x.new_empty(() if record else 0, dtype=torch.float32)


@torch.library.custom_op("stopwatch::amax", mutates_args=())
def _amax(x: torch.Tensor) -> torch.Tensor:
    return launch_amax(dense_rows(x)) if runs_triton(x) else amax_reference(x)


@_amax.register_fake
def _(x):
    return x.new_empty((), dtype=torch.float32)


@torch.library.custom_op("stopwatch::transpose_copy", mutates_args=())
def _transpose_copy(x: torch.Tensor) -> torch.Tensor:
    if runs_triton(x):
        return launch_transpose(dense_rows(x))
    return x.t().clone(memory_format=torch.contiguous_format)


@_transpose_copy.register_fake
def _(x):
    return x.new_empty(x.shape[::-1])
