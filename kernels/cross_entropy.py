"""Cross-entropy of softcapped logits, with its gradient computed in the forward pass.

    z' = a sigmoid((z + b) / c)
    loss = sum over rows and k of w_k (logsumexp(z') - z'[y_k])
    dloss/dz_j = dz'_j/dz_j (W p_j - (sum of w_k with y_k = j)),
                 p = softmax(z'),   W = sum of the row's w_k

z: (N, V) logits; y: (N, K) targets, K of them per row (multi-token prediction), each of which can
be ignored. The cap steadies training. In a sampled softmax (sampled_softmax.py), a column j may
stand for m_j tokens: its logit is z'_j + log m_j.

Minimum bytes for bf16 logits: 2 N V read, 2 N V written (N V in e5m2). The kernels, of which a
table picks one for a chip, are in cross_entropy_kernels.py; linear_cross_entropy.py has the head
and its loss as one op.

Source: Gemma 2's tanh softcap (a tanh is a sigmoid of twice the argument), in the record's
asymmetric form 23 sigmoid((z + 5) / 7.5) (modded-nanogpt record 54); its multi-token targets (53)
and e5m2 gradients (67). Gradient in the forward pass, and the target's column computed apart
because p - 1 cancels: Liger-Kernel.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .cross_entropy_kernels import columns, launch_cross_entropy, launch_scale
from .launch import as_rows, runs_triton
from .sampled_softmax import stands_for


def softcap_cross_entropy_reference(
    logits, targets, *, cap, target_weights=None, sampled=None, ignore_index=-100, grad_scale=1.0
):
    """softcap_cross_entropy in plain PyTorch, which torch.compile fuses; grad_scale changes
    nothing here."""
    z = final_logits(logits, cap, sampled)
    losses = [
        F.cross_entropy(z, y, ignore_index=ignore_index, reduction="sum")
        for y in columns(targets).unbind(1)
    ]
    if target_weights is not None:
        losses = [w * loss for w, loss in zip(target_weights.unbind(0), losses)]
    return sum(losses)


def final_logits(logits, cap, sampled):
    """(N, V) in at least fp32: logits with the cap, and with what sampled columns stand for."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if cap is not None:
        a, b, c = sigmoid_cap(cap)
        z = a * torch.sigmoid((z + b) / c)
    if sampled is not None:
        z = z + stands_for(sampled, z.size(1))
    return z


def cross_entropy_in_pytorch(
    logits, targets, target_weights, sampled, cap, ignore_index, grad_scale, wanted
):
    """What a CPU computes -> loss, gradient of the logits in at least fp32 (None unless wanted).

    One exp for a logit, which serves loss and gradient. The maximum of bf16 logits is taken in
    bf16: half the time.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    slope = 1  # dz'/dz
    V = logits.size(1)
    if cap is not None:
        a, b, c = cap
        p = torch.sigmoid((z + b) / c)
        z = a * p
        slope = a / c * p * (1 - p)
    most = (logits if cap is None else z).amax(1, keepdim=True).to(z.dtype)
    if sampled is not None:
        z = z + stands_for(sampled, V)

    # The loss; a target that is not counted has weight 0
    targets = columns(targets)
    counted = targets != ignore_index
    w = counted.to(z.dtype) * (1.0 if target_weights is None else target_weights)
    targets = targets.where(counted, 0)
    target = z.gather(1, targets) - most
    e = (z - most).exp_()
    del z
    total = e.sum(1, keepdim=True)
    loss = (w * (total.log() - target)).sum()
    if not wanted:
        return loss, None

    # The gradient: the probabilities, less the weight of each target
    g = e.mul_(w.sum(1, keepdim=True) / total)
    if torch.compiler.is_compiling():  # in the same loop; a scatter would need one of its own
        for y, weight in zip(targets.split(1, 1), w.split(1, 1)):
            g = torch.where(torch.arange(V, device=y.device) == y, g - weight, g)
    else:
        g.scatter_add_(1, targets, -w)
    return loss, g.mul_(slope * grad_scale)


def softcap_cross_entropy(
    logits, targets, *, cap, target_weights=None, sampled=None, ignore_index=-100, grad_scale=1.0
):
    """Summed loss, an fp32 scalar.

    logits: (N, V) fp32, bf16 or fp16.
    targets: (N,) or (N, K) int64, ignore_index where not counted; any other number outside 0..V-1
        makes the loss NaN (off the GPU: an error).
    cap: (a, b, c) for a sigmoid((z + b) / c); a number s for s tanh(z / s); None for none.
    target_weights: (K,) fp32 or None (ones); it gets no gradient.
    sampled: (2,) fp32 or None: the first column that stands for more than one token, as all after
        it, and the logarithm of how many; targets are columns before it. It gets no gradient.
    grad_scale: the upstream gradient to expect. If logits require grad, their gradient is computed
        right away, for this one. Give the one that will come (1 / n_tokens for a mean): backward
        then has nothing to do. For any other it scales the gradient. Under torch.compile, backward
        copies the gradient first; linear_cross_entropy never does.

    Raises ValueError for shapes, dtypes and scales that do not fit.
    """
    check(logits, targets, target_weights, grad_scale)
    wanted = torch.is_grad_enabled() and logits.requires_grad
    return _softcap_cross_entropy(
        logits, targets, target_weights, sampled, sigmoid_cap(cap), ignore_index, grad_scale, wanted
    )[0]


def sigmoid_cap(cap):
    """(a, b, c), s or None -> [a, b, c] or None.

    s tanh(z / s) is 2s sigmoid(2z / s) - s; the - s changes no loss.
    """
    if cap is None:
        return None
    a, b, c = cap if isinstance(cap, Sequence) else (2 * cap, 0, cap / 2)
    if c == 0:
        raise ValueError(f"softcap {cap}: its last number divides and cannot be 0")
    return [float(a), float(b), float(c)]


def check(x, targets, target_weights, grad_scale):
    """Raise ValueError for what does not fit rows x: logits, or what the head multiplies."""
    fits = targets.dim() in (1, 2) and len(targets) == len(x) and targets.dtype == torch.int64
    if x.dim() != 2 or not fits:
        raise ValueError(
            "cross-entropy: targets have to be int64, (N,) or (N, K), one row for each of the "
            f"{len(x)}; got {tuple(targets.shape)} {targets.dtype} for {tuple(x.shape)}"
        )
    if target_weights is not None and target_weights.shape != columns(targets).shape[1:]:
        raise ValueError(
            f"cross-entropy: target_weights {tuple(target_weights.shape)}, targets "
            f"{tuple(targets.shape)}"
        )
    if grad_scale == 0:
        raise ValueError("cross-entropy: grad_scale 0 would lose the gradient")


# --- ops


@torch.library.custom_op("stopwatch::softcap_cross_entropy", mutates_args=())
def _softcap_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    target_weights: torch.Tensor | None,
    sampled: torch.Tensor | None,
    cap: Sequence[float] | None,
    ignore_index: int,
    grad_scale: float,
    wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> loss, gradient of the logits for an upstream gradient of grad_scale (empty unless
    wanted)."""
    if not runs_triton(logits):
        loss, dlogits = cross_entropy_in_pytorch(
            logits, targets, target_weights, sampled, cap, ignore_index, grad_scale, wanted
        )
        return loss.float(), dlogits.to(logits.dtype) if wanted else logits.new_empty(0)
    dlogits = None
    if wanted:
        dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    rows = as_rows(logits)
    losses = launch_cross_entropy(
        rows, targets, target_weights, sampled, cap, ignore_index, grad_scale, dlogits
    )
    return losses.sum(), dlogits if wanted else logits.new_empty(0)


@_softcap_cross_entropy.register_fake
def _(logits, targets, target_weights, sampled, cap, ignore_index, grad_scale, wanted):
    loss = logits.new_empty((), dtype=torch.float32)
    return loss, logits.new_empty(logits.shape if wanted else 0)


@torch.library.custom_op("stopwatch::scale_gradient", mutates_args={"x"})
def scale_gradient(x: torch.Tensor, upstream: torch.Tensor, expected: float) -> None:
    """x times upstream / expected, in place."""
    if runs_triton(x):
        launch_scale(x, upstream, expected)
    else:
        x.mul_(upstream / expected)


@scale_gradient.register_fake
def _(x, upstream, expected):
    pass


def _save(ctx, inputs, output):
    ctx.grad_scale = inputs[-2]
    ctx.mark_non_differentiable(output[1])
    # or autograd makes gigabytes of zeros, as the gradient of dlogits
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward(ctx, dloss, _):
    """Hand out the saved gradient itself, scaled in place where the upstream gradient is not the
    expected one.

    That is safe if this is the only time: nobody else has seen the tensor, and autograd is about to
    drop it. A copy is made if the graph is kept (retain_graph, create_graph), since backward can
    come again and the receiver may by then have changed what it got; and under torch.compile, which
    traces with tensors of its own type, and whose graphs may not write to what they are given.
    """
    (dlogits,) = ctx.saved_tensors
    if torch._C._autograd._get_current_graph_task_keep_graph() or type(dlogits) is not torch.Tensor:
        dlogits = dlogits.clone()
    scale_gradient(dlogits, dloss, ctx.grad_scale)
    return dlogits, *[None] * 7


_softcap_cross_entropy.register_autograd(_backward, setup_context=_save)
