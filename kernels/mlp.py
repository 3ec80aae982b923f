"""The MLP with a squared ReLU: its activation is computed where the matrix product ends, and only
it is stored.

    linear_relu2:  post = relu(x w^T)^2                 x: (M, K), w: (N, K) -> (M, N)
    relu2_mlp:     y = relu(x w_up^T)^2 w_down          x: (M, C), both w: (H, C) -> (M, C)
    backward:      dpre = dpost 2 sqrt(post),   dpost = dy w_down^T

relu(pre) is the root of post, so pre is never written, and dpre is again a matrix product with an
epilogue: the same kernel computes it (mlp_kernels.py), and dpost is never written either. The four
other products of the MLP are torch.matmul. FLOPs: 2 M H C for each of the six products. Bytes, at e
an element: the epilogues write post, read it and write dpre, 3 e M H. With activation and gradient
in passes of their own, which read pre and dpost, it is 7 e M H.

Numerics: sums in fp32, rounded to x's dtype before the activation, as
F.linear(x, w).relu().square() does. The root rounded to the same dtype is relu(pre) again, bit by
bit: with pre = m 2^e, m an integer in [128, 256) for bf16, rounding m^2 moves its root by less than
0.36. So dpre rounds where eager's does and nowhere else. The exception is where the square leaves
the dtype's normal range: in fp16 relu(pre) below 2^-7 loses bits and below 2^-12 all of them.

Source: squared ReLU from Primer (So et al., arXiv:2109.08668); storing only post from
modded-nanogpt's records 59 and 87.
"""

import torch
import torch.nn.functional as F

from .launch import as_rows, runs_triton
from .mlp_kernels import launch_linear_relu2
from .op import Op, declare


def linear_relu2_reference(x, w):
    """linear_relu2 in plain PyTorch."""
    return F.linear(x, w).relu().square()


def relu2_mlp_reference(x, w_up, w_down):
    """relu2_mlp in plain PyTorch."""
    return linear_relu2_reference(x, w_up) @ w_down


def activation_gradient(dpost, post):
    """dpre in PyTorch. Inductor may leave the root unrounded, up to 0.36 ulp from relu(pre)."""
    return dpost * (2 * post.sqrt())


def linear_relu2(x, w):
    """x: (..., K), w: (N, K), both fp32, bf16 or fp16, any strides -> (..., N) in the same dtype.

    Raises ValueError where they do not fit.
    """
    if x.size(-1) != w.size(-1) or x.dtype != w.dtype or w.dim() != 2:
        raise ValueError(
            f"linear_relu2: x {tuple(x.shape)} {x.dtype}, w {tuple(w.shape)} {w.dtype}; expected "
            "(..., K) and (N, K) of one dtype"
        )
    return _linear_relu2(x, w)


def relu2_mlp(x, w_up, w_down):
    """x: (..., C); w_up, w_down: (H, C), the second as the transpose of F.linear's -> y like x.

    All are of one dtype, fp32, bf16 or fp16, and may have any strides. Raises ValueError where they
    do not fit.
    """
    fits = x.size(-1) == w_up.size(-1) and w_up.shape == w_down.shape and w_up.dim() == 2
    if not fits or not x.dtype == w_up.dtype == w_down.dtype:
        raise ValueError(
            f"relu2_mlp: x {tuple(x.shape)} {x.dtype}, w_up {tuple(w_up.shape)} {w_up.dtype}, "
            f"w_down {tuple(w_down.shape)} {w_down.dtype}; expected (..., C) and twice (H, C) of "
            "one dtype"
        )
    return _relu2_mlp(x, w_up, w_down)[0]


# --- ops


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
    y = x.new_empty(*x.shape[:-1], w_down.size(1))
    return y, x.new_empty(*x.shape[:-1], w_up.size(0))


@torch.library.custom_op("stopwatch::relu2_mlp_backward", mutates_args=())
def _relu2_mlp_backward(dy: torch.Tensor, w_down: torch.Tensor, post: torch.Tensor) -> torch.Tensor:
    """-> dpre, like post."""
    if runs_triton(dy):
        return launch_linear_relu2(as_rows(dy), as_rows(w_down), as_rows(post)).view(post.shape)
    return activation_gradient(F.linear(dy, w_down), post)


@_relu2_mlp_backward.register_fake
def _(dy, w_down, post):
    return torch.empty_like(post, memory_format=torch.contiguous_format)


def linear_gradients(x, w, dpre):
    """Gradients of x and w in pre = x w^T."""
    return dpre @ w, as_rows(dpre).T @ as_rows(x)


def _linear_relu2_save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output)


def _linear_relu2_gradients(ctx, dpost):
    x, w, post = ctx.saved_tensors
    return linear_gradients(x, w, activation_gradient(dpost, post))


def relu2_mlp_save(ctx, inputs, output):
    """inputs: x, w_up, w_down, and any more, which get no gradient; output: y, post, and more."""
    ctx.set_materialize_grads(False)  # only y has a gradient
    ctx.save_for_backward(*inputs[:3], output[1])
    ctx.rest = (None,) * (len(inputs) - 3)


def relu2_mlp_gradients(ctx, dy, *_):
    x, w_up, w_down, post = ctx.saved_tensors
    dpre = _relu2_mlp_backward(dy, w_down, post)
    dx, dw_up = linear_gradients(x, w_up, dpre)
    dw_down = as_rows(post).T @ as_rows(dy)
    return dx, dw_up, dw_down, *ctx.rest


_linear_relu2.register_autograd(_linear_relu2_gradients, setup_context=_linear_relu2_save)
_relu2_mlp.register_autograd(relu2_mlp_gradients, setup_context=relu2_mlp_save)


def _new_fp8():
    from .fp8_mlp import FP8ReLU2MLP  # which imports this module

    return FP8ReLU2MLP()


declare(
    Op(
        "relu2_mlp",
        triton=relu2_mlp,
        reference=relu2_mlp_reference,
        example=lambda draw, _: ([draw(80, 128), draw(160, 128) / 11, draw(160, 128) / 16], {}),
        faster_on=(90,),
        new_fp8=_new_fp8,
    )
)
