"""What choose_ops() knows of an op. Each op's file declares it once, at its end:

    declare(Op("rms_norm", triton=rms_norm, reference=rms_norm_reference, example=...))

To add an op, write its file and import its function in kernels/__init__.py.
"""

import typing

OPS = {}  # name -> Op


class Op(typing.NamedTuple):
    """An op that has a Triton form and a PyTorch form of one signature."""

    name: str
    triton: typing.Callable
    reference: typing.Callable
    # (draw, head_dim) -> (inputs, keyword arguments) of a small call, by which forms are compared.
    # draw(*shape): normal random numbers on the device, in the dtype, that the op is chosen for.
    example: typing.Callable
    # Compute capability times 10 of the chips on which `auto` takes the Triton form, because it was
    # measured to be faster there, in the trainer's step, than what Inductor makes of the reference
    faster_on: tuple = ()
    on_cpu: typing.Callable | None = None  # what `auto` takes on a CPU, if not the reference
    # () -> the form whose products are in FP8, an nn.Module if it keeps scales
    new_fp8: typing.Callable | None = None
    has_gradient: bool = True


def declare(op):
    """Make an op one of those that choose_ops() chooses."""
    OPS[op.name] = op
