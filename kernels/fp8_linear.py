"""A linear layer that multiplies in 8-bit floats, and scales that follow what it multiplies.

    y = x_scale w_scale (q_x q_w^T)     q_x: (M, K), q_w: (N, K), both e4m3; see quantize.py
    backward, bf16:   dx = g w,  dw = g^T x
    backward, FP8:    the same of q_g (e5m2), q_w and q_x

The tensor cores want the summed dimension last in both operands, so in FP8 dx takes q_w^T, and dw
takes q_g^T and q_x^T, written in the pass that quantises.

FLOPs: 2 M N K for each product, at twice bf16's rate. When it pays (computed from an H200's bytes
and rates, not measured): quantising a bf16 x moves 5 bytes an element dynamically, else 3, and a
product saves time in proportion to N. So the forward breaks even near N = 970 dynamically, near 580
with static or delayed scales: the head gains most, GPT-2 small's projections to 768 lose or hardly
gain.

Source: Micikevicius et al., arXiv:2209.05433; delayed scales as in NVIDIA's Transformer Engine;
FP8 for the head with constant scales from modded-nanogpt's record 19.
"""

import torch

from .quantize import (
    E4M3,
    E5M2,
    FLOOR,
    _quantize,
    amax_reference,
    as_scale,
    dynamic_scale,
    quantize_reference,
)


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
        x_ = _Reference.restored(x, x_scale, E4M3)
        w_ = _Reference.restored(w, w_scale, E4M3)
        ctx.save_for_backward(*((x_, w_) if fp8_backward else (x, w)))
        ctx.fp8_backward = fp8_backward
        ctx.grad_scale = grad_scale
        ctx.w_dtype = w.dtype
        return (x_ @ w_.t()).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        g_ = _Reference.restored(g, ctx.grad_scale, E5M2) if ctx.fp8_backward else g
        dx = (g_ @ w.to(g_.dtype)).to(g.dtype)
        dw = (g_.t() @ x).to(ctx.w_dtype)
        return dx, dw, None, None, None, None


def fp8_linear_reference(x, w, *, x_scale=None, w_scale=None, grad_scale=None, fp8_backward=False):
    """fp8_linear in plain PyTorch; scales: None (dynamic) or a number."""
    y = _Reference.apply(x.reshape(-1, x.size(-1)), w, x_scale, w_scale, grad_scale, fp8_backward)
    return y.view(*x.shape[:-1], len(w))


def fp8_linear(x, w, *, x_scale=None, w_scale=None, grad_scale=None, fp8_backward=False):
    """x: (..., K), w: (N, K), float -> x w^T: (..., N) in x's dtype, multiplied in e4m3.

    Each scale (one per tensor, value = FP8 number times scale) is
        None             dynamic: max |x| / 448 of this very tensor, which is read once more
        float or tensor  static (0-d fp32): free, where the range is known, as behind a norm or for
                         gradients of logits
        DelayedScale     from the last step
    fp8_backward: gradients in FP8 too, g as e5m2 with grad_scale; it keeps q_x^T and q_w^T instead
    of x and w. Otherwise they are products in x's dtype, and grad_scale is not used.

    Raises ValueError where shapes do not fit (K, N and, with fp8_backward, the number of rows must
    be multiples of 16), and on a GPU without FP8 (before compute capability 8.9).
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
            f"fp8_linear: x {tuple(x.shape)} has {len(rows)} rows; fp8_backward needs a multiple "
            "of 16"
        )

    # Quantising records the largest |x| where a DelayedScale asks for it
    x_scale, x_amax = scale_and_amax(x_scale, x)
    w_scale, w_amax = scale_and_amax(w_scale, x)
    grad_scale, grad_amax = scale_and_amax(grad_scale, x)
    transpose = fp8_backward and torch.is_grad_enabled()
    q_x, x_t, x_scale = quantize_by(x_scale, x_amax, rows, E4M3, transpose and w.requires_grad)
    q_w, w_t, w_scale = quantize_by(w_scale, w_amax, w, E4M3, transpose and x.requires_grad)
    return _fp8_linear(
        x, w, q_x, q_w, x_t, w_t, x_scale, w_scale, grad_scale, grad_amax, fp8_backward
    )


def fp8_matmul(a, b, a_scale, b_scale, dtype=torch.bfloat16, fast=False):
    """a: (M, K), b: (N, K), row-major FP8, at most one of them e5m2; scales: 0-d fp32 -> a b^T in
    dtype: (M, N). No gradient.

    fast: sums in the tensor cores' own registers, a few bits short of fp32: good enough for
    activations. On CUDA, K and N have to be multiples of 16.
    """
    return _fp8_matmul(a, b, a_scale, b_scale, dtype, fast)


class DelayedScale(torch.nn.Module):
    """A scale from the largest |x| of the last step, so that quantising needs no pass over x of its
    own.

        scale = DelayedScale(amax=4.0)        # a guess, for the first step
        y = fp8_linear(x, w, x_scale=scale)   # in every micro-batch: uses it, records max |x|
        scale.roll()                          # once per optimizer step, outside the compiled graph

    headroom: how much x may grow in a step before it saturates. dtype: that of what is scaled, E5M2
    for a grad_scale. shape: of many such scales, which roll together. Nothing is recorded under
    no_grad, so that validation does not alter training.
    The buffers are the state: they go with state_dict. Ranks measure their own data; to have them
    agree, all-reduce `amax` (MAX) before roll.

    The ops return max |x| and ordinary PyTorch merges it into the buffer, in forward and in
    backward: torch.compile knows what to do with a buffer written in a graph, while an op that
    mutates can have no gradient formula. A maximum needs no order, so micro-batches and
    recomputation are all right. As a grad_scale in a compiled graph it asks for what training loops
    do: each backward before the next forward.
    """

    def __init__(self, amax, headroom=1.25, dtype=E4M3, shape=()):
        super().__init__()
        self.first = amax
        self.factor = headroom / torch.finfo(dtype).max
        self.register_buffer("scale", torch.empty(shape, dtype=torch.float32))
        self.register_buffer("amax", torch.empty(shape, dtype=torch.float32))
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


def scale_and_amax(scale, x):
    """A scale of any kind -> 0-d tensor (None: dynamic) and the buffer that records max |x|
    (None: not recorded)."""
    if isinstance(scale, DelayedScale):
        return scale.scale, scale.amax if torch.is_grad_enabled() else None
    return None if scale is None else as_scale(scale, x), None


def quantize_by(scale, recording, x, dtype, transpose):
    """quantize with what scale_and_amax returns -> q, q_t and the scale."""
    if scale is None:
        scale = dynamic_scale(x, dtype)
    q, q_t, seen = _quantize(x.detach(), scale, dtype, transpose, recording is not None)
    if recording is not None:
        recording.copy_(torch.maximum(recording, seen))
    return q, q_t, scale


# --- ops


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
    ctx.x_shape = x.shape
    ctx.w_dtype = w.dtype
    ctx.save_for_backward(*((x_t, w_t, *scales) if ctx.fp8_backward else (x, w)))


def _backward(ctx, g):
    dx = None
    dw = None
    rows = g.reshape(-1, g.size(-1))
    x_wanted, w_wanted = ctx.needs_input_grad[:2]
    if ctx.fp8_backward:
        x_t, w_t, x_scale, w_scale, grad_scale = ctx.saved_tensors
        q, q_t, grad_scale = quantize_by(grad_scale, ctx.grad_amax, rows, E5M2, w_wanted)
        if x_wanted:
            dx = fp8_matmul(q, w_t, grad_scale, w_scale, g.dtype).view(ctx.x_shape)
        if w_wanted:
            dw = fp8_matmul(q_t, x_t, grad_scale, x_scale, ctx.w_dtype)
    else:
        x, w = ctx.saved_tensors
        if x_wanted:
            dx = g @ w.to(g.dtype)
        if w_wanted:
            dw = (rows.t() @ x.reshape(-1, x.size(-1))).to(w.dtype)
    return dx, dw, *[None] * 9


_fp8_linear.register_autograd(_backward, setup_context=_save)
