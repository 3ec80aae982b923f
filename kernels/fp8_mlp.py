"""The MLP with a squared ReLU whose forward multiplies in 8-bit floats.

    y = relu(x w_up^T)^2 w_down,   x, post = relu(...)^2, w_up and w_down in e4m3 (quantize.py)

The epilogue of the first product also writes post in e4m3, with a scale known beforehand, and max
post for the next scale, so quantising post costs no pass. The backward is relu2_mlp's, in bf16.

FLOPs: 4 M H C in FP8, at twice bf16's rate, and 8 M H C in bf16.

Source: post in e4m3 with delayed scales from modded-nanogpt's record 89.
"""

import torch

from .fp8_linear import DelayedScale, fp8_matmul
from .launch import as_rows, runs_triton
from .mlp import relu2_mlp, relu2_mlp_gradients, relu2_mlp_save
from .mlp_kernels import launch_linear_relu2
from .quantize import amax_reference, as_scale, dynamic_scale, quantize, quantize_reference


def fp8_relu2_mlp_reference(x8, w_up8, w_down8, post_scale):
    """-> y, post, both bf16, max post; no gradient. Arguments as in fp8_relu2_mlp."""
    x, w_up, w_down_t = (q.float() * scale for q, scale in (x8, w_up8, w_down8))
    post = (x @ w_up.T).bfloat16().relu().square()
    q = quantize_reference(post, post_scale)[0]
    return ((q.float() * post_scale) @ w_down_t.T).bfloat16(), post, amax_reference(post)


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
    """relu2_mlp(x, w_up, w_down) on RMS-normalised bf16 x, with scales of its own.

    x cannot pass sqrt(C); weights go by their largest, looked up in every call; post by its largest
    in the last step (call post.roll() once a step). Without gradients it multiplies in bf16, so
    that validation measures the weights and not the format.
    """

    def __init__(self):
        super().__init__()
        self.post = DelayedScale(amax=32.0)

    def forward(self, x, w_up, w_down):
        if not torch.is_grad_enabled():
            return relu2_mlp(x, w_up, w_down)
        x_scale = as_scale(x.size(-1) ** 0.5 / 448, x)
        up_scale = dynamic_scale(w_up)
        down_scale = dynamic_scale(w_down)
        x8 = quantize(as_rows(x), x_scale)[0].view(x.shape)
        w_up8 = quantize(w_up, up_scale)[0]
        w_down8 = quantize(w_down, down_scale, transpose=True)[1]
        y, post_max = fp8_relu2_mlp(
            x,
            w_up,
            w_down,
            (x8, x_scale),
            (w_up8, up_scale),
            (w_down8, down_scale),
            self.post.scale,
        )
        self.post.amax.copy_(torch.maximum(self.post.amax, post_max))
        return y


# --- op


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
    y = x.new_empty(*x.shape[:-1], w_down.size(1), dtype=torch.bfloat16)
    post = x.new_empty(*x.shape[:-1], w_up.size(0), dtype=torch.bfloat16)
    return y, post, x.new_empty((), dtype=torch.float32)


_fp8_relu2_mlp.register_autograd(relu2_mlp_gradients, setup_context=relu2_mlp_save)
