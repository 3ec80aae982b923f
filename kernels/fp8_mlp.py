"""The MLP with a squared ReLU whose forward multiplies in 8-bit floats.

    y = relu(x w_up^T)^2 w_down,   x, post = relu(...)^2, w_up and w_down in e4m3 (quantize.py)

The epilogue of the first product also writes post in e4m3, with a scale known beforehand, and max
post for the next scale, so quantising post costs no pass. The backward is relu2_mlp's, in bf16.

FLOPs: 4 M H C in FP8, at twice bf16's rate, and 8 M H C in bf16.

Source: post in e4m3 with delayed scales from modded-nanogpt's record 89.
"""

import functools

import torch

from .fp8_linear import DelayedScale, fp8_matmul
from .launch import as_rows, runs_triton
from .mlp import relu2_mlp, relu2_mlp_gradients, relu2_mlp_save
from .mlp_kernels import launch_linear_relu2
from .quantize import (
    E4M3,
    FLOOR,
    amax_reference,
    as_scale,
    dynamic_scale,
    quantize,
    quantize_reference,
)


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


class FP8MLPs(torch.nn.Module):
    """The MLPs of all layers, as FP8ReLU2MLP is one, with their scales in one buffer and their
    weights quantised together, once a step.

        mlps = FP8MLPs(n_layer, hidden, width)
        mlps.quantize(bank)                     # before a step's forward passes
        y = mlps(layer, x, w_up, w_down)        # these are bank[2 layer] and bank[2 layer + 1]
        mlps.post.roll()                        # behind them

    Minimum bytes of quantize() for a bank of n bf16 weights: 5 n, in 4 launches whatever the number
    of layers. headroom: as in modded-nanogpt, which had activations that grew by more than a
    quarter in a step.
    """

    def __init__(self, n_layer, hidden, width):
        super().__init__()
        # Every scale begins 16 bytes, as cuBLAS may want a pointer to one
        self.post = DelayedScale(amax=32.0, headroom=1.8, shape=(n_layer, 4))
        q_up = torch.zeros(n_layer, hidden, width, dtype=E4M3)
        q_down = torch.zeros(n_layer, width, hidden, dtype=E4M3)
        for name, x in dict(
            q_up=q_up,
            q_down=q_down,  # as the product wants it, transposed
            w_scale=torch.ones(2 * n_layer, 4),
            x_scale=torch.full((), width**0.5 / 448),
        ).items():
            self.register_buffer(name, x, persistent=False)

    @torch.no_grad()
    def quantize(self, bank):
        """bank: (2 n_layer, hidden, width), up, down, up, down, ..., each by its largest."""
        function = compiled_quantize_bank() if bank.is_cuda else quantize_bank
        function(bank.data, self.q_up, self.q_down, self.w_scale)

    def forward(self, layer, x, w_up, w_down):
        if not torch.is_grad_enabled():
            return relu2_mlp(x, w_up, w_down)
        x8 = quantize(as_rows(x), self.x_scale)[0].view(x.shape)
        up_scale, down_scale = self.w_scale[2 * layer : 2 * layer + 2, 0].unbind(0)
        y, post_max = fp8_relu2_mlp(
            x,
            w_up,
            w_down,
            (x8, self.x_scale),
            (self.q_up[layer], up_scale),
            (self.q_down[layer], down_scale),
            self.post.scale[layer, 0],
        )
        amax = self.post.amax[layer, 0]
        amax.copy_(torch.maximum(amax, post_max))
        return y


def quantize_bank(bank, q_up, q_down, scale):
    """Write what FP8MLPs keeps of its weights; scale: (matrices, 4), of which the first counts.

    Plain PyTorch, of which torch.compile makes a kernel or two for the maxima and one for each of
    the copies.
    """
    largest = bank.abs().amax((1, 2)).float()
    new = (largest / torch.finfo(E4M3).max).clamp(min=FLOOR)
    scale[:, 0].copy_(new)
    inverse = (1 / new)[:, None, None]
    q_up.copy_(saturated(bank[0::2], inverse[0::2]))
    q_down.copy_(saturated(bank[1::2], inverse[1::2]).mT)


@functools.cache
def compiled_quantize_bank():
    return torch.compile(quantize_bank, fullgraph=True, dynamic=False)


def saturated(x, inverse):
    limit = torch.finfo(E4M3).max
    return (x.float() * inverse).clamp(-limit, limit).to(E4M3)


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
