"""Zeros in place of what does not count, where only the device knows whether it does.

    x <- x if ok, else 0,   whatever x holds

Minimum bytes for x of n bytes: none if ok, n if not. x.masked_fill_(~ok, 0) reads and writes all of
x either way.
"""

import torch

from .launch import runs_triton, sm_count, tl, triton

BLOCK = 4096  # elements that a program writes at a time
HAS_TRITON = hasattr(triton, "__version__")


@triton.jit
def clear_kernel(x, ok, n, BLOCK: tl.constexpr):
    if tl.load(ok) == 0:
        for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(n, BLOCK), tl.num_programs(0)):
            i = block * BLOCK + tl.arange(0, BLOCK)
            tl.store(x + i, tl.zeros([BLOCK], x.dtype.element_ty), i < n)


def launch_clear(x, ok):
    """x: contiguous, cleared in place unless ok, a 0-d bool tensor."""
    if x.numel():
        programs = min(triton.cdiv(x.numel(), BLOCK), 8 * sm_count(x))
        clear_kernel[programs,](x=x, ok=ok, n=x.numel(), BLOCK=BLOCK, num_warps=8)


@torch.library.custom_op("stopwatch::clear_unless", mutates_args={"x"})
def clear_unless(x: torch.Tensor, ok: torch.Tensor) -> None:
    """Fill x with zeros in place unless ok, a 0-d bool tensor on its device."""
    if HAS_TRITON and runs_triton(x) and x.is_contiguous():
        launch_clear(x, ok)
    else:
        x.masked_fill_(~ok, 0)


@clear_unless.register_fake
def _(x, ok):
    pass
