"""8-bit floats: quantising (with a transposed copy, with the largest |x|), and a linear layer that
multiplies in fp8.

    q = round(clamp(x / scale)),  so that x is about q scale;     scale = max |x| / (largest fp8
    number)
    y = x_scale w_scale (q_x q_w^T)                               q_x: (M, K), q_w: (N, K), both
    e4m3
    backward, bf16:   dx = g w,  dw = g^T x
    backward, fp8:    the same of q_g (e5m2), q_w and q_x. The tensor cores want the summed
                      dimension last in both
                      operands, so dx takes q_w^T and dw takes q_g^T and q_x^T, written in the pass
                      that quantises.

e4m3 has 3 bits of mantissa and reaches from 2^-9 to 448, e5m2 has 2 and reaches from 2^-16 to
57344: weights and activations need the precision, gradients the range. What PyTorch's casts do
beyond the range depends on the format (e4m3 saturates, e5m2 becomes infinite), so x is clamped
first; infinity becomes the largest number, NaN stays NaN. x is multiplied by the rounded inverse of
scale, in fp32.

Minimum bytes for an x of n elements of e bytes: quantise (e + 1) n, with the transposed copy (e +
2) n, and e n more where max |x| has to be found first; transpose_copy of fp8 2 n. Products: 2 M N K
FLOPs each, at twice bf16's rate. Source: formats as in Micikevicius et al., arXiv:2209.05433;
delayed scales as in NVIDIA's Transformer Engine; fp8 for the head with constant scales from
modded-nanogpt record 19, its tile of the transposition from record 76.
"""

import torch

from .launch import INTERPRET, chip, for_chip, runs_triton, sm_count, tl, triton

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FLOOR = 2.0**-100  # smallest scale: that of an all-zero tensor, whose inverse has to be finite
QUANTIZE_TILE = {
    89: (32, 128, 4)
}  # rows, columns, warps; both the fastest of those tried on an H200
TRANSPOSE_TILE = {89: (128, 128, 8)}
AMAX_TILE = (32, 256)  # rows, columns


def quantize_reference(x, scale, dtype=E4M3, transpose=False):
    largest = torch.finfo(dtype).max
    q = (x.float() * (1 / scale.float())).clamp(-largest, largest).to(dtype)
    return q.contiguous(), q.t().clone(
        memory_format=torch.contiguous_format
    ) if transpose else q.new_empty(0)


def amax_reference(x):
    return x.detach().abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)


class _Reference(torch.autograd.Function):
    """The linear layer on rows, in fp32 (float64 for a float64 x); operands are quantised and
    restored first."""

    @staticmethod
    def restored(x, scale, dtype):
        if scale is None:
            scale = amax_reference(x) / torch.finfo(dtype).max
        scale = torch.as_tensor(scale, dtype=torch.float32, device=x.device).clamp(min=FLOOR)
        wide = torch.promote_types(x.dtype, torch.float32)
        return quantize_reference(x, scale, dtype)[0].to(wide) * scale

    @staticmethod
    def forward(ctx, x, w, x_scale, w_scale, grad_scale, fp8_backward):
        x_, w_ = _Reference.restored(x, x_scale, E4M3), _Reference.restored(w, w_scale, E4M3)
        ctx.save_for_backward(*((x_, w_) if fp8_backward else (x, w)))
        ctx.fp8_backward, ctx.grad_scale, ctx.w_dtype = fp8_backward, grad_scale, w.dtype
        return (x_ @ w_.t()).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        g_ = _Reference.restored(g, ctx.grad_scale, E5M2) if ctx.fp8_backward else g
        return (
            (g_ @ w.to(g_.dtype)).to(g.dtype),
            (g_.t() @ x).to(ctx.w_dtype),
            None,
            None,
            None,
            None,
        )


def fp8_linear_reference(x, w, *, x_scale=None, w_scale=None, grad_scale=None, fp8_backward=False):
    """fp8_linear in plain PyTorch; scales: None (dynamic) or a number."""
    y = _Reference.apply(x.reshape(-1, x.size(-1)), w, x_scale, w_scale, grad_scale, fp8_backward)
    return y.view(*x.shape[:-1], len(w))


def quantize(x, scale, dtype=E4M3, transpose=False):
    """x: (M, N), any float; scale: 0-d fp32 on x's device -> q: (M, N) and q_t: (N, M), both
    contiguous.

    dtype: float8_e4m3fn or float8_e5m2. q_t is empty unless transpose. No gradient flows through
    it.
    """
    return _quantize(x.detach(), scale, dtype, transpose, False)[:2]


def quantize_and_amax(x, scale, dtype=E4M3, transpose=False):
    """As quantize -> q, q_t, max |x| (0-d fp32, NaN if there is one in x), for the scale of the
    next step."""
    return _quantize(x.detach(), scale, dtype, transpose, True)


def amax(x):
    """max |x| as a 0-d fp32 tensor; x: (M, N). 0 if empty, NaN if there is one in x."""
    return _amax(x.detach())


def dynamic_scale(x, dtype=E4M3):
    """x: (M, N) -> the scale that maps max |x| to the largest fp8 number, 0-d fp32: one read, no
    synchronisation."""
    return (amax(x) / torch.finfo(dtype).max).clamp(min=FLOOR)


def transpose_copy(x):
    """x: (M, N) of 1, 2 or 4 bytes an element -> (N, M) contiguous: e.g. fp8 gradients of logits
    for the head's dw."""
    return _transpose_copy(x.detach())


def fp8_matmul(a, b, a_scale, b_scale, dtype=torch.bfloat16, fast=False):
    """a: (M, K), b: (N, K), row-major fp8, at most one of them e5m2; scales: 0-d fp32 -> a b^T: (M,
    N). No gradient.

    fast: sums in the tensor cores' own registers, a few bits short of fp32: good enough for
    activations. On CUDA, K and N have to be multiples of 16.
    """
    return _fp8_matmul(a, b, a_scale, b_scale, dtype, fast)


class DelayedScale(torch.nn.Module):
    """A scale from the largest |x| of the last step, so that quantising needs no pass over x of its
    own.

        scale = DelayedScale(amax=4.0)         # a guess, for the first step y = fp8_linear(x, w,
        x_scale=scale)    # in every micro-batch: uses the scale, records max |x| scale.roll()
        # once per optimizer step, outside the compiled graph

    headroom: how much x may grow in a step before it saturates. dtype: that of what is scaled, E5M2
    for a grad_scale. Nothing is recorded under no_grad, so that validation does not alter training.
    The buffers are the state: they go with state_dict. Ranks measure their own data; to have them
    agree, all-reduce `amax` (MAX) before roll.

    The ops return max |x| and ordinary PyTorch merges it into the buffer, in forward and in
    backward: torch.compile knows what to do with a buffer written in a graph, while an op that
    mutates can have no gradient formula. A maximum needs no order, so micro-batches and
    recomputation are all right. As a grad_scale in a compiled graph it asks for what training loops
    do: each backward before the next forward.
    """

    def __init__(self, amax, headroom=1.25, dtype=E4M3):
        super().__init__()
        self.first, self.factor = amax, headroom / torch.finfo(dtype).max
        self.register_buffer("scale", torch.empty((), dtype=torch.float32))
        self.register_buffer("amax", torch.empty((), dtype=torch.float32))
        self.reset()

    @torch.no_grad()
    def reset(self):
        """As new, in place: what a warm-up has recorded is forgotten, compiled graphs stay
        valid."""
        self.scale.fill_(self.first * self.factor)
        self.amax.zero_()

    @torch.no_grad()
    def roll(self):
        """This step's maximum makes the next scale; nothing recorded, all zero or not finite
        leaves it as it is."""
        usable = (self.amax > 0) & (self.amax < float("inf"))
        self.scale.copy_(torch.where(usable, self.amax * self.factor, self.scale).clamp(min=FLOOR))
        self.amax.zero_()


def fp8_linear(x, w, *, x_scale=None, w_scale=None, grad_scale=None, fp8_backward=False):
    """x: (..., K), w: (N, K), float -> x w^T: (..., N) in x's dtype, multiplied in e4m3.

    Each scale (one per tensor, value = fp8 number times scale) is
        None             dynamic: max |x| / 448 of this very tensor, at the price of one more read
        of it
        float or tensor  static (0-d fp32): free, where the range is known, as behind a norm or for
        gradients of logits
        DelayedScale     from the last step
    fp8_backward: gradients in fp8 too, g as e5m2 with grad_scale; keeps q_x^T and q_w^T instead of
    x and w. Otherwise
    they are products in x's dtype, and grad_scale is not used.

    When it pays (computed from an H200's bytes and rates, not measured): quantising a bf16 x moves
    5 bytes an element dynamically, else 3, and a product saves time in proportion to N. So forward
    breaks even near N = 970 dynamically, near 580 with static or delayed scales: the head gains
    most, GPT-2 small's projections to 768 lose or hardly gain.

    Raises ValueError where shapes do not fit (K, N and, with fp8_backward, the number of rows must
    be multiples of 16), and on a GPU without fp8 (before compute capability 8.9).
    """
    N, K = w.shape
    if x.size(-1) != K:
        raise ValueError(
            f"fp8_linear: x {tuple(x.shape)} and w {tuple(w.shape)} differ in the last dimension"
        )
    rows = x.reshape(-1, K)
    if N % 16 or K % 16:
        raise ValueError(
            f"fp8_linear: w {tuple(w.shape)} must have multiples of 16 for both dimensions"
        )
    if fp8_backward and len(rows) % 16:
        raise ValueError(
            f"fp8_linear: x {tuple(x.shape)} has {len(rows)} rows; fp8_backward needs a multiple of 16"
        )
    transpose = fp8_backward and torch.is_grad_enabled()
    q_x, x_t, x_scale = _quantize_by(
        *_tensors(x_scale, x), rows, E4M3, transpose and w.requires_grad
    )
    q_w, w_t, w_scale = _quantize_by(*_tensors(w_scale, x), w, E4M3, transpose and x.requires_grad)
    return _fp8_linear(
        x, w, q_x, q_w, x_t, w_t, x_scale, w_scale, *_tensors(grad_scale, x), fp8_backward
    )


def _tensors(scale, x):
    """A scale of any kind -> 0-d tensor (None: dynamic) and the buffer that records max |x|
    (None: not recorded)."""
    if isinstance(scale, DelayedScale):
        return scale.scale, scale.amax if torch.is_grad_enabled() else None
    if scale is None or isinstance(scale, torch.Tensor):
        return scale, None
    return torch.full(
        (), scale, dtype=torch.float32, device=x.device
    ), None  # copied there, it would synchronise


def _quantize_by(scale, recording, x, dtype, transpose):
    """quantize with what _tensors returns -> q, q_t and the scale."""
    if scale is None:
        scale = dynamic_scale(x, dtype)
    q, q_t, seen = _quantize(x.detach(), scale, dtype, transpose, recording is not None)
    if recording is not None:
        recording.copy_(torch.maximum(recording, seen))
    return q, q_t, scale


@triton.jit
def to_fp8(x, dtype: tl.constexpr):
    """fp32 -> tl.float8e4nv or tl.float8e5, to nearest even, saturating, NaN stays NaN."""
    LARGEST: tl.constexpr = 448.0 if dtype == tl.float8e4nv else 57344.0
    x = tl.where(x > LARGEST, LARGEST, tl.where(x < -LARGEST, -LARGEST, x))
    # its casts cut subnormals off and lose NaN: first make x a multiple of the format's spacing
    # there
    if INTERPRET:
        MANTISSA: tl.constexpr = 3 if dtype == tl.float8e4nv else 2
        NORMAL: tl.constexpr = 2.0**-6 if dtype == tl.float8e4nv else 2.0**-14  # the smallest
        sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
        power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        shift = tl.maximum(power, NORMAL) * (
            1.5 * 2.0 ** (23 - MANTISSA)
        )  # fp32's spacing there is the one wanted
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
    x,
    scale,
    q,
    q_t,
    amax,
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
    row64, col64 = row.to(tl.int64)[:, None], col.to(tl.int64)[:, None]
    v = tl.load(x + row64 * stride_x + col, inside, 0.0).to(tl.float32)
    if RECORD:
        largest = tl.max(tl.max(absolute_bits(v), 1), 0)
        tl.store(amax + tl.program_id(0), largest.to(tl.float32, bitcast=True))
    v = to_fp8(v * tl.div_rn(1.0, tl.load(scale).to(tl.float32)), q.dtype.element_ty)
    tl.store(q + row64 * N + col, v, inside)
    if TRANSPOSE:
        tl.store(q_t + col64 * M + row, tl.trans(v), (col < N)[:, None] & (row < M))


@triton.jit
def transpose_kernel(x, y, M, N, stride_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    tiles = tl.cdiv(N, COLUMNS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    v = tl.load(x + row.to(tl.int64)[:, None] * stride_x + col, (row < M)[:, None] & (col < N))
    tl.store(y + col.to(tl.int64)[:, None] * M + row, tl.trans(v), (col < N)[:, None] & (row < M))


@triton.jit
def amax_kernel(x, amax, M, N, stride_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
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
    """(M, N) with elements of a row side by side -> q, q_t (empty unless transpose), max |x|
    (empty unless record)."""
    M, N = x.shape
    rows, columns, warps = for_chip(QUANTIZE_TILE, x)
    tiles = triton.cdiv(M, rows) * triton.cdiv(N, columns)
    q = x.new_empty(M, N, dtype=dtype)
    # apart for fp32, whose transposition within the kernel Triton 3.6 garbles on Hopper
    within = transpose and x.element_size() < 4
    q_t = x.new_empty((N, M) if within else 0, dtype=dtype)
    partial = x.new_empty(tiles if record else 0, dtype=torch.float32)
    if tiles:
        quantize_kernel[tiles,](
            x,
            scale,
            q,
            q_t,
            partial,
            M,
            N,
            x.stride(0),
            rows,
            columns,
            within,
            record,
            num_warps=warps,
        )
    if transpose and not within:
        q_t = launch_transpose(q)
    return q, q_t, (partial.amax() if tiles else partial.new_zeros(())) if record else partial


def launch_transpose(x):
    M, N = x.shape
    rows, columns, warps = for_chip(TRANSPOSE_TILE, x)
    tiles = triton.cdiv(M, rows) * triton.cdiv(N, columns)
    y = x.new_empty(N, M)
    if tiles:
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[
            x.element_size()
        ]  # moved, not looked at
        transpose_kernel[tiles,](
            x.view(bits), y.view(bits), M, N, x.stride(0), rows, columns, num_warps=warps
        )
    return y


def launch_amax(x):
    M, N = x.shape
    programs = min(triton.cdiv(M, AMAX_TILE[0]) * triton.cdiv(N, AMAX_TILE[1]), 4 * sm_count(x))
    if programs == 0:
        return x.new_zeros((), dtype=torch.float32)
    partial = x.new_empty(programs, dtype=torch.float32)
    amax_kernel[programs,](x, partial, M, N, x.stride(0), *AMAX_TILE, num_warps=8)
    return partial.amax()


def _rows_in_order(x):
    """Elements of a row side by side."""
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


@torch.library.custom_op("stopwatch::quantize", mutates_args=())
def _quantize(
    x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, transpose: bool, record: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if runs_triton(x):
        if chip(x) < 89:
            raise ValueError(
                f"fp8 needs a GPU of compute capability 8.9 or newer (L40S, 4090, H100, ...), this "
                f"one has {chip(x) / 10}: use bf16 there"
            )
        return launch_quantize(_rows_in_order(x), scale, dtype, transpose, record)
    return *quantize_reference(x, scale, dtype, transpose), amax_reference(
        x
    ) if record else x.new_empty(0, dtype=torch.float32)


@_quantize.register_fake
def _(x, scale, dtype, transpose, record):
    q_t = x.new_empty(x.shape[::-1] if transpose else 0, dtype=dtype)
    return (
        x.new_empty(x.shape, dtype=dtype),
        q_t,
        x.new_empty(() if record else 0, dtype=torch.float32),
    )


@torch.library.custom_op("stopwatch::amax", mutates_args=())
def _amax(x: torch.Tensor) -> torch.Tensor:
    return launch_amax(_rows_in_order(x)) if runs_triton(x) else amax_reference(x)


@_amax.register_fake
def _(x):
    return x.new_empty((), dtype=torch.float32)


@torch.library.custom_op("stopwatch::transpose_copy", mutates_args=())
def _transpose_copy(x: torch.Tensor) -> torch.Tensor:
    if runs_triton(x):
        return launch_transpose(_rows_in_order(x))
    return x.t().clone(memory_format=torch.contiguous_format)


@_transpose_copy.register_fake
def _(x):
    return x.new_empty(x.shape[::-1])


@torch.library.custom_op("stopwatch::fp8_matmul", mutates_args=())
def _fp8_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    dtype: torch.dtype,
    fast: bool,
) -> torch.Tensor:
    if not (a.numel() and b.numel()):
        return a.new_zeros(len(a), len(b), dtype=dtype)
    return torch._scaled_mm(
        a, b.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=dtype, use_fast_accum=fast
    )


@_fp8_matmul.register_fake
def _(a, b, a_scale, b_scale, dtype, fast):
    return a.new_empty(len(a), len(b), dtype=dtype)


@torch.library.custom_op("stopwatch::fp8_linear", mutates_args=())
def _fp8_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    q_x: torch.Tensor,
    q_w: torch.Tensor,
    x_t: torch.Tensor,
    w_t: torch.Tensor,
    x_scale: torch.Tensor,
    w_scale: torch.Tensor,
    grad_scale: torch.Tensor | None,
    grad_amax: torch.Tensor | None,
    fp8_backward: bool,
) -> torch.Tensor:
    """The product q_x q_w^T with the gradients of x w^T; the arguments it does not read are for
    backward."""
    return fp8_matmul(q_x, q_w, x_scale, w_scale, x.dtype, fast=True).view(*x.shape[:-1], len(w))


@_fp8_linear.register_fake
def _(x, w, *_):
    return x.new_empty(*x.shape[:-1], len(w))


def _save(ctx, inputs, output):
    x, w, _, _, x_t, w_t, *scales, ctx.grad_amax, ctx.fp8_backward = inputs
    ctx.x_shape, ctx.w_dtype = x.shape, w.dtype
    ctx.save_for_backward(*((x_t, w_t, *scales) if ctx.fp8_backward else (x, w)))


def _backward(ctx, g):
    dx = dw = None
    rows = g.reshape(-1, g.size(-1))
    if ctx.fp8_backward:
        x_t, w_t, x_scale, w_scale, grad_scale = ctx.saved_tensors
        q, q_t, grad_scale = _quantize_by(
            grad_scale, ctx.grad_amax, rows, E5M2, ctx.needs_input_grad[1]
        )
        if ctx.needs_input_grad[0]:
            dx = fp8_matmul(q, w_t, grad_scale, w_scale, g.dtype).view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            dw = fp8_matmul(q_t, x_t, grad_scale, x_scale, ctx.w_dtype)
    else:
        x, w = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            dx = g @ w.to(g.dtype)
        if ctx.needs_input_grad[1]:
            dw = (rows.t() @ x.reshape(-1, x.size(-1))).to(w.dtype)
    return dx, dw, *[None] * 9


_fp8_linear.register_autograd(_backward, setup_context=_save)
