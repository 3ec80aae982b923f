"""Which implementation of each op a machine gets.

On a CPU all are plain PyTorch, which torch.compile fuses: the references, save that auto has a
faster form of the head with its loss. On a GPU a Triton op should be taken where it beats what
torch.compile makes of its reference: AUTO names those, by chip.
"""

import functools
import typing

import torch

from .attention import attention, choose_backend
from .cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_in_pytorch,
    linear_cross_entropy_reference,
)
from .launch import for_chip
from .mlp import relu2_mlp, relu2_mlp_reference
from .polar_express import polar_express
from .qk_norm_rope import qkv_norm_rope, qkv_norm_rope_reference
from .rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from .symmetric_matmul import symmetric_matmul, symmetric_matmul_reference

# op: (Triton, PyTorch)
OPS = dict(
    rms_norm=(rms_norm, rms_norm_reference),
    add_rms_norm=(add_rms_norm, add_rms_norm_reference),
    qkv_norm_rope=(qkv_norm_rope, qkv_norm_rope_reference),
    relu2_mlp=(relu2_mlp, relu2_mlp_reference),
    linear_cross_entropy=(linear_cross_entropy, linear_cross_entropy_reference),
    symmetric_matmul=(symmetric_matmul, symmetric_matmul_reference),
)
# Hopper: what was faster in gpt2-small's step on an H200. Not the norms: in 393,216 tokens they and
# what is around them took 6 ms more than what Inductor fuses, out of 550. The other chips are not
# measured.
AUTO = {
    80: (),
    90: ("qkv_norm_rope", "relu2_mlp", "linear_cross_entropy", "symmetric_matmul"),
    100: (),
}


class Ops(typing.NamedTuple):
    """The functions a model and its optimizer call; signatures are those in the ops' files."""

    attention: typing.Callable
    rms_norm: typing.Callable
    add_rms_norm: typing.Callable
    qkv_norm_rope: typing.Callable
    relu2_mlp: typing.Callable
    linear_cross_entropy: typing.Callable
    polar_express: typing.Callable

    def named(self):
        """{"attention": backend, op: "triton" or "pytorch", ...} for logs."""
        used = self._asdict() | dict(symmetric_matmul=self.polar_express.keywords["symmetric"])
        return dict(attention=self.attention.keywords["backend"]) | {
            name: "triton" if used[name] is triton else "pytorch"
            for name, (triton, _) in OPS.items()
        }


def choose_ops(
    device, dtype=torch.float32, head_dim=64, kernels=("auto",), say=lambda message: None
):
    """The Ops for a device. kernels: auto, reference, all, or names from OPS whose Triton form to
    use.

    Each Triton op is tried on small inputs first. One that fails or differs from its reference is
    replaced by it, saying so, if it was chosen by auto, and a ValueError if it was asked for.
    """
    device = torch.device(device)
    special = {"auto", "reference", "all"} & set(kernels)
    unknown = set(kernels) - OPS.keys() - special
    if unknown or not kernels or (special and len(kernels) > 1):
        raise ValueError(
            f"kernels {' '.join(kernels)}: expected auto, reference, all, or names out of {', '.join(OPS)}"
        )
    if kernels == ("auto",):
        wanted = automatic(device, dtype)
    else:
        wanted = {"reference": (), "all": tuple(OPS)}.get(kernels[0], kernels)
    chosen = {name: reference for name, (_, reference) in OPS.items()}
    if kernels == ("auto",) and device.type == "cpu":
        chosen["linear_cross_entropy"] = linear_cross_entropy_in_pytorch
    for name in wanted:
        error = probe(name, device, dtype, head_dim)
        if error is None:
            chosen[name] = OPS[name][0]
        elif kernels == ("auto",):
            say(
                f"{name} by its PyTorch reference, since the Triton kernel does not work here: {error}"
            )
        else:
            raise ValueError(f"the Triton kernel of {name} does not work here: {error}")
    backend = choose_backend(device, dtype, head_dim)
    return Ops(
        attention=functools.partial(attention, backend=backend),
        polar_express=functools.partial(polar_express, symmetric=chosen.pop("symmetric_matmul")),
        **chosen,
    )


def automatic(device, dtype):
    """Names of the ops that auto runs by Triton. In fp32 their kernels multiply without tensor
    cores: for tests only."""
    gpu = device.type == "cuda" and dtype != torch.float32
    return for_chip(AUTO, torch.empty(0, device=device)) if gpu else ()


def probe(name, device, dtype, head_dim):
    """None if the Triton op gives its reference's outputs and gradients on a small case, else
    what went wrong."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=g).to(device, dtype)

    angles = torch.arange(32.0, device=device)[:, None] / torch.arange(
        1, head_dim // 2 + 1, device=device
    )
    inputs, constants = dict(
        rms_norm=lambda: ([draw(64, 256)], {}),
        add_rms_norm=lambda: ([draw(64, 256), draw(64, 256)], {}),
        qkv_norm_rope=lambda: (
            [draw(2, 32, 6, head_dim)],
            dict(cos=angles.cos().to(dtype), sin=angles.sin().to(dtype)),
        ),
        relu2_mlp=lambda: ([draw(192, 128), draw(256, 128) / 11, draw(256, 128) / 16], {}),
        linear_cross_entropy=lambda: (
            [draw(64, 128), draw(1024, 128) / 11],
            dict(targets=torch.randint(1024, (64,), generator=g).to(device), cap=(23.0, 5.0, 7.5)),
        ),
        symmetric_matmul=lambda: ([draw(2, 256, 320) / 16], {}),
    )[name]()
    results = []
    for function in OPS[name]:
        leaves = [x.clone().requires_grad_(name != "symmetric_matmul") for x in inputs]
        try:
            outputs = function(*leaves, **constants)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            upstream = [
                torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).to(y.dtype)
                for y in outputs
            ]
            grads = (
                torch.autograd.grad(outputs, leaves, upstream) if outputs[0].requires_grad else ()
            )
            results.append([x.detach().float() for x in (*outputs, *grads)])
        except Exception as e:  # a compiler's errors have no common class
            return f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"
    # torch's max, which keeps a NaN, not Python's, which may lose it
    worst = (
        torch.stack([(a - r).abs().max() / r.abs().max() for a, r in zip(*results)]).max().item()
    )
    return (
        None if worst < 0.05 else f"differs from the reference by {worst:.2g} of the largest value"
    )
