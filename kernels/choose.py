"""Which form of each op a machine gets.

On a CPU all are plain PyTorch, which torch.compile fuses: the references, or what an op declares
for CPUs; or, without torch.compile, loops in C (fused.py). On a GPU a Triton op should be taken
where it beats what torch.compile makes of its reference; each op's file says on which chips that
was measured. Products in FP8 are faster on Hopper: gpt2-small's step on an H200 takes 1.12 times as
long without.
"""

import functools
import types

import torch

from .attention import attention, choose_backend
from .decoding import linear_reference, rotate_halves_reference
from .embedding import embedding
from .gates import gated, offset
from .launch import chip
from .linear_log_prob import linear_log_prob
from .op import OPS
from .polar_express import polar_express, polar_express_by_kernels
from .stream import smeared, weighted


class Ops(types.SimpleNamespace):
    """The functions that a model and its optimizer call, each an attribute.

    rms_norm, add_rms_norm, qk_norm_rope, relu2_mlp, swiglu, linear_cross_entropy, symmetric_matmul
                    as in the ops' files, in the form that was chosen
    embedding, linear_log_prob, rotate_halves, weighted, smeared, gated, offset
                    in PyTorch or in C
    attention       with its backend bound
    products        None, or products.py's, with forms of several ops in one
    polar_express   in the form that goes with symmetric_matmul's
    linear          as in decoding.py, which also has the forms for decoding on a CPU
    attend_one      None, or in decoding as there; decoding: None, or where those forms come from
    fused           None, or where the forms in C come from
    contexts        None, or the Contexts of contexts.py
    new_mlp         () -> what one layer calls as mlp(x, w_up, w_down): relu2_mlp, or in FP8 an
                    nn.Module with scales of its own
    """

    def named(self):
        """{"attention": backend, op: "triton", "c", "pytorch" or "fp8", ...} for logs and
        estimates."""
        return dict(attention=self.attention.keywords["backend"], **self.forms)

    @property
    def fp8(self):
        """Whether products are in FP8."""
        return "fp8" in self.forms.values()

    def __deepcopy__(self, memo):
        """Functions, which a copy of a model has in common with it."""
        return self

    def replace(self, **functions):
        """A copy with other functions."""
        return Ops(**(vars(self) | functions))


def choose_ops(
    device,
    dtype=torch.float32,
    head_dim=64,
    kernels=("auto",),
    fp8="off",
    say=lambda message: None,
    shapes=(),
    fused=None,
):
    """The Ops for a device.

    kernels: auto, reference, all, or names of ops whose Triton form to use.
    fp8: on, off or auto; for the products of linear_cross_entropy and of the MLP's forward, in
    place of the form that `kernels` gives them. Without gradients, they multiply in dtype.

    shapes: what attention will be asked for, Shapes of attention.py, which are tried.
    fused: a Fused of fused.py, whose forms auto takes on a CPU.

    Every form is tried on small inputs first. One that fails or differs from its reference is
    replaced, which say(message) is told, if auto chose it. If it was asked for, that is a
    ValueError.
    """
    device = torch.device(device)
    special = {"auto", "reference", "all"} & set(kernels)
    unknown = set(kernels) - OPS.keys() - special
    if unknown or not kernels or (special and len(kernels) > 1):
        raise ValueError(
            f"kernels {' '.join(kernels)}: expected auto, reference, all, or names out of "
            f"{', '.join(OPS)}"
        )
    auto = tuple(kernels) == ("auto",)
    if auto:
        wanted = automatic(device, dtype)
    else:
        wanted = {"reference": (), "all": tuple(OPS)}.get(kernels[0], kernels)

    # Each op's form and the function itself
    forms = dict.fromkeys(OPS, "pytorch")
    functions = {name: op.reference for name, op in OPS.items()}
    if auto and device.type == "cpu":
        functions |= {name: op.on_cpu for name, op in OPS.items() if op.on_cpu}
    in_c = fused is not None and auto and device.type == "cpu"
    for name, form in (fused.forms() if in_c else {}).items():
        error = probe(name, form, device, dtype, head_dim)
        if error is None:
            forms[name] = "c"
            functions[name] = form
        else:
            say(f"{name} by PyTorch, which is slower, since its loop in C {error}")
    for name in wanted:
        error = probe(name, OPS[name].triton, device, dtype, head_dim)
        if error is None:
            forms[name] = "triton"
            functions[name] = OPS[name].triton
        elif auto:
            say(
                f"{name} by its PyTorch reference, which is slower, since the Triton kernel does "
                f"not work here: {error}"
            )
        else:
            raise ValueError(f"the Triton kernel of {name} does not work here: {error}")

    # In FP8 every layer has an MLP of its own, with scales
    mlp = functions["relu2_mlp"]
    functions["new_mlp"] = lambda: mlp
    if choose_fp8(device, dtype, fp8, say):
        forms |= dict(relu2_mlp="fp8", linear_cross_entropy="fp8")
        functions["new_mlp"] = OPS["relu2_mlp"].new_fp8
        functions["linear_cross_entropy"] = OPS["linear_cross_entropy"].new_fp8()

    polar = fused.polar_express if in_c else polar_express
    by_kernels = forms["symmetric_matmul"] == "triton"
    backend = choose_backend(device, dtype, head_dim, shapes=shapes, say=say)
    return Ops(
        forms=forms,
        attention=functools.partial(fused.attention if in_c else attention, backend=backend),
        embedding=fused.embedding if in_c else embedding,
        linear_log_prob=fused.linear_log_prob if in_c else linear_log_prob,
        polar_express=polar_express_by_kernels if by_kernels else polar,
        linear=linear_reference,
        rotate_halves=fused.rotate_halves if in_c else rotate_halves_reference,
        weighted=fused.weighted if in_c else weighted,
        smeared=fused.smeared if in_c else smeared,
        gated=fused.gated if in_c else gated,
        offset=fused.offset if in_c else offset,
        products=fused.products_for(dtype) if in_c else None,
        attend_one=None,
        decoding=None,
        fused=fused if in_c else None,
        contexts=fused.contexts if in_c else None,
        **functions,
    )


def automatic(device, dtype):
    """Names of the ops that auto runs by Triton. In fp32 their kernels multiply without tensor
    cores: for tests only."""
    if device.type != "cuda" or dtype == torch.float32:
        return ()
    here = chip(torch.empty(0, device=device))
    return tuple(name for name, op in OPS.items() if here in op.faster_on)


def choose_fp8(device, dtype, fp8, say=lambda message: None):
    """Whether products are in FP8; fp8 and say as in choose_ops, where the errors are as well."""
    if fp8 not in ("on", "off", "auto"):
        raise ValueError(f"fp8 {fp8}: expected on, off or auto")
    if fp8 == "off" or fp8 == "auto" and not fp8_pays(device, dtype):
        return False
    if dtype != torch.bfloat16 or not has_fp8(device):
        raise ValueError(
            f"fp8 on: expected bfloat16 on compute capability 8.9 or later, found {dtype} on "
            f"{device}"
        )
    for name, op in OPS.items():
        if op.new_fp8 is None:
            continue
        with device:
            form = op.new_fp8()
        # Numbers have 3 bits, so that gradients differ by some percent of the largest value
        error = probe(name, form, device, dtype, allowed=0.25)
        if error and fp8 == "on":
            raise ValueError(f"fp8 on: {name} does not work here: {error}")
        if error:
            say(
                f"products in {dtype}, since {name} in FP8 does not work here, which is slower: "
                f"{error}"
            )
            return False
    return True


def has_fp8(device):
    """Whether it multiplies 8-bit floats; a CPU emulates that."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)


def fp8_pays(device, dtype):
    """Where FP8 was measured to be faster than bf16: on Hopper, 1.12 times."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return hopper and dtype == torch.bfloat16


def probe(name, form, device, dtype, head_dim=64, allowed=0.05):
    """None if a form of the op gives the reference's outputs and gradients on a small case, else
    what went wrong.

    allowed: the largest difference, as a part of the largest value of a result.
    """
    op = OPS[name]
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=g, device="cpu").to(device, dtype)

    inputs, constants = op.example(draw, head_dim)
    results = []
    for function in (form, op.reference):
        leaves = [x.clone().requires_grad_(op.has_gradient) for x in inputs]
        try:
            with torch.enable_grad():
                results.append(outputs_and_gradients(function, leaves, constants))
        except Exception as e:  # a compiler's errors have no common class
            return f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"
    # torch's max, which keeps a NaN, not Python's, which may lose it
    differences = [(a - r).abs().max() / r.abs().max() for a, r in zip(*results)]
    worst = torch.stack(differences).max().item()
    if worst < allowed:
        return None
    return f"differs from the reference by {worst:.2g} of the largest value"


def outputs_and_gradients(function, leaves, constants):
    """[outputs, then gradients of the leaves for an upstream gradient from -1 to 1], in fp32."""
    outputs = function(*leaves, **constants)
    if not isinstance(outputs, tuple):
        outputs = (outputs,)
    results = [*outputs]
    if outputs[0].requires_grad:
        # Of one number: with upstream gradients of its own autograd would import sympy, half a
        # second
        total = 0
        for y in outputs:
            upstream = torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype)
            total = total + (y * upstream).sum(dtype=torch.float32)
        results += torch.autograd.grad(total, leaves)
    return [x.detach().float() for x in results]
