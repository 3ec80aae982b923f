"""The LM head and its cross-entropy as one op, with one buffer for logits and their gradient.

    z = h w^T;   loss of z as in cross_entropy.py;   dh = dz w,   dw = dz^T h

h: (N, C), w: (V, C). Three plain products of 2 N V C FLOPs each around a kernel that reads N V
logits and overwrites them with their gradient. In FP8, h and w are multiplied in e4m3, and the
gradient of the logits leaves the kernel in e5m2, so that all three products are in FP8.

There are no chunks: at C = 768 the products dominate, and adding up dw over chunks costs more than
logits take memory.

Source: gradient in the forward pass as in Liger-Kernel; FP8 for the head with constant scales from
modded-nanogpt's record 19, e5m2 gradients from its record 67.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .cross_entropy import (
    check,
    cross_entropy_in_pytorch,
    scale_gradient,
    sigmoid_cap,
    softcap_cross_entropy_reference,
)
from .cross_entropy_kernels import launch_cross_entropy
from .fp8_linear import fp8_matmul
from .launch import runs_triton
from .op import Op, declare
from .quantize import E4M3, E5M2, as_scale, dynamic_scale, quantize, transpose_copy


def linear_cross_entropy_reference(
    h,
    w,
    targets,
    *,
    cap,
    target_weights=None,
    sampled=None,
    ignore_index=-100,
    grad_scale=1.0,
    fp8=None,
):
    """linear_cross_entropy in plain PyTorch; never in FP8."""
    return softcap_cross_entropy_reference(
        F.linear(h, w),
        targets,
        cap=cap,
        target_weights=target_weights,
        sampled=sampled,
        ignore_index=ignore_index,
    )


def linear_cross_entropy_in_pytorch(
    h,
    w,
    targets,
    *,
    cap,
    target_weights=None,
    sampled=None,
    ignore_index=-100,
    grad_scale=1.0,
    fp8=None,
):
    """linear_cross_entropy with the gradient in the forward pass in plain PyTorch; never in FP8,
    and grad_scale changes nothing here.

    It is for torch.compile on a CPU, which cannot fuse what is inside an op. Compiled, the loss of
    4,096 rows of 1,536 bf16 logits and its gradient take 2.7 ms on 2 cores of an AMD EPYC, the
    reference's 8.7; other lengths were not measured. Not for GPUs, where exps in fp32 would go
    through memory.
    """
    if torch.is_grad_enabled():
        return _LinearInPyTorch.apply(
            h, w, targets, target_weights, sampled, sigmoid_cap(cap), ignore_index
        )
    return linear_cross_entropy_reference(
        h,
        w,
        targets,
        cap=cap,
        target_weights=target_weights,
        sampled=sampled,
        ignore_index=ignore_index,
    )


class _LinearInPyTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w, targets, target_weights, sampled, cap, ignore_index):
        loss, dlogits = cross_entropy_in_pytorch(
            F.linear(h, w), targets, target_weights, sampled, cap, ignore_index, 1.0, wanted=True
        )
        ctx.save_for_backward(dlogits.to(h.dtype), h, w)
        return loss.to(torch.promote_types(h.dtype, torch.float32))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        dlogits, h, w = ctx.saved_tensors
        dh = (dlogits @ w * dloss).to(h.dtype)
        dw = (dlogits.t() @ h * dloss).to(w.dtype)
        return dh, dw, *[None] * 5


def linear_cross_entropy(
    h,
    w,
    targets,
    *,
    cap,
    target_weights=None,
    sampled=None,
    ignore_index=-100,
    grad_scale=1.0,
    fp8=None,
):
    """softcap_cross_entropy(h @ w.T, ...): a summed loss, an fp32 scalar.

    h: (N, C), w: (V, C), same dtype; the rest as in softcap_cross_entropy. An upstream gradient
    other than grad_scale is applied to dh and dw, which are small. Without gradients, the logits
    live until the loss is known.

    fp8: None, or (h_scale, w_scale, logits_gradient_scale), numbers or 0-d fp32 tensors with value
    = fp8 number times scale: h and w in e4m3, the gradient of the logits in e5m2 (so its scale has
    to suit grad_scale), all three products in FP8.

    Raises ValueError for shapes that do not fit, and with fp8 unless V, C and, for gradients, N are
    multiples of 16.
    """
    if h.dim() != 2 or w.dim() != 2 or h.size(1) != w.size(1):
        raise ValueError(
            f"linear_cross_entropy: h {tuple(h.shape)}, w {tuple(w.shape)}; expected (N, C), (V, C)"
        )
    check(h, targets, target_weights, grad_scale)
    wanted = torch.is_grad_enabled() and (h.requires_grad or w.requires_grad)
    scales = [None] * 3
    if fp8 is not None:
        if w.size(0) % 16 or w.size(1) % 16 or wanted and h.size(0) % 16:
            raise ValueError(
                f"linear_cross_entropy: fp8 needs multiples of 16; h {tuple(h.shape)}, "
                f"w {tuple(w.shape)}"
            )
        scales = [as_scale(s, h) for s in fp8]
    return _linear_cross_entropy(
        h,
        w,
        targets,
        target_weights,
        sampled,
        *scales,
        sigmoid_cap(cap),
        ignore_index,
        grad_scale,
        wanted,
    )[0]


def fp8_linear_cross_entropy(h, w, targets, *, cap, target_weights=None, sampled=None):
    """linear_cross_entropy in FP8 on RMS-normalised h, with scales of its own.

    h cannot pass sqrt(C); w goes by its largest; and with an upstream gradient applied afterwards,
    that of a logit cannot pass the slope of the cap times the sum of the target weights, for which
    4 leaves room (a / 4c = 0.8 in the record's cap). Without gradients, it multiplies in h's dtype.
    """
    fp8 = None
    if torch.is_grad_enabled():
        fp8 = h.size(1) ** 0.5 / 448, dynamic_scale(w), 4 / 57344
    return linear_cross_entropy(
        h, w, targets, cap=cap, target_weights=target_weights, sampled=sampled, fp8=fp8
    )


# --- ops


@torch.library.custom_op("stopwatch::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    h: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    target_weights: torch.Tensor | None,
    sampled: torch.Tensor | None,
    h_scale: torch.Tensor | None,
    w_scale: torch.Tensor | None,
    g_scale: torch.Tensor | None,
    cap: Sequence[float] | None,
    ignore_index: int,
    grad_scale: float,
    wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> loss, gradient of the logits, and in FP8 h^T and w^T (the last three empty where not
    wanted)."""
    fp8 = h_scale is not None
    if fp8:
        q_h, h_t = quantize(h, h_scale, E4M3, transpose=wanted)
        q_w, w_t = quantize(w, w_scale, E4M3, transpose=wanted)
        logits = fp8_matmul(q_h, q_w, h_scale, w_scale, h.dtype, fast=True)
    else:
        h_t = h.new_empty(0)
        w_t = h.new_empty(0)
        logits = h @ w.t()

    if runs_triton(h):
        dlogits = None
        if wanted:
            dlogits = torch.empty_like(logits, dtype=E5M2) if fp8 else logits  # in its place
        loss = launch_cross_entropy(
            logits,
            targets,
            target_weights,
            sampled,
            cap,
            ignore_index,
            grad_scale,
            dlogits,
            g_scale,
        ).sum()
    else:
        loss, dlogits = cross_entropy_in_pytorch(
            logits, targets, target_weights, sampled, cap, ignore_index, grad_scale, wanted
        )
        if wanted:
            dlogits = quantize(dlogits, g_scale, E5M2)[0] if fp8 else dlogits.to(h.dtype)
    return loss.float(), dlogits if wanted else h.new_empty(0), h_t, w_t


@_linear_cross_entropy.register_fake
def _(
    h,
    w,
    targets,
    target_weights,
    sampled,
    h_scale,
    w_scale,
    g_scale,
    cap,
    ignore_index,
    grad_scale,
    wanted,
):
    fp8 = h_scale is not None
    loss = h.new_empty((), dtype=torch.float32)
    shape = (len(h), len(w)) if wanted else 0
    dlogits = h.new_empty(shape, dtype=E5M2 if fp8 and wanted else h.dtype)
    if not fp8:
        return loss, dlogits, h.new_empty(0), h.new_empty(0)
    h_t = h.new_empty(h.shape[::-1] if wanted else 0, dtype=E4M3)
    w_t = w.new_empty(w.shape[::-1] if wanted else 0, dtype=E4M3)
    return loss, dlogits, h_t, w_t


@torch.library.custom_op("stopwatch::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(
    dloss: torch.Tensor,
    dlogits: torch.Tensor,
    h: torch.Tensor,
    w: torch.Tensor,
    h_scale: torch.Tensor | None,
    w_scale: torch.Tensor | None,
    g_scale: torch.Tensor | None,
    grad_scale: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h, w: as they are, or in FP8 transposed -> dh, dw."""
    if h_scale is None:
        dh = dlogits @ w
        dw = dlogits.t() @ h
        scale_gradient(dh, dloss, grad_scale)
        scale_gradient(dw, dloss, grad_scale)
    else:
        g_scale = g_scale * (dloss / grad_scale)  # the products apply it
        dh = fp8_matmul(dlogits, w, g_scale, w_scale, dtype)
        dw = fp8_matmul(transpose_copy(dlogits), h, g_scale, h_scale, dtype)
    return dh, dw


@_linear_cross_entropy_backward.register_fake
def _(dloss, dlogits, h, w, h_scale, w_scale, g_scale, grad_scale, dtype):
    C = h.size(1) if h_scale is None else h.size(0)
    return tuple(dlogits.new_empty(rows, C, dtype=dtype) for rows in dlogits.shape)


def _save(ctx, inputs, output):
    h, w, _, _, _, *scales, _, _, ctx.grad_scale, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtype = h.dtype
    operands = (h, w) if scales[0] is None else output[2:]
    ctx.save_for_backward(output[1], *operands, *scales)


def _backward(ctx, dloss, *_):
    """The saved tensors are only read, so backward can come as often as it likes."""
    dh, dw = _linear_cross_entropy_backward(dloss, *ctx.saved_tensors, ctx.grad_scale, ctx.dtype)
    return dh, dw, *[None] * 10


_linear_cross_entropy.register_autograd(_backward, setup_context=_save)


def _example(draw, _):
    h = draw(16, 128)
    targets = torch.arange(16, device=h.device) * 13 % 1024
    return [h, draw(1024, 128) / 11], dict(targets=targets, cap=(23.0, 5.0, 7.5))


declare(
    Op(
        "linear_cross_entropy",
        triton=linear_cross_entropy,
        reference=linear_cross_entropy_reference,
        example=_example,
        faster_on=(90,),
        on_cpu=linear_cross_entropy_in_pytorch,
        new_fp8=lambda: fp8_linear_cross_entropy,
    )
)
