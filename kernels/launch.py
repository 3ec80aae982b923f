"""What every op needs to start a Triton kernel: when to, on what chip, and a few device functions.

A kernel runs in one of three ways: on a CUDA device; in Triton's interpreter (TRITON_INTERPRET=1,
any device, slow: how kernels are tested without a GPU); or it is only compiled, from meta tensors.
Without Triton (macOS, Windows) the module imports all the same, and ops run their PyTorch
reference.
"""

import os
import types

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = types.SimpleNamespace(jit=lambda fn=None, **_: fn or (lambda f: f))
    tl = types.SimpleNamespace(constexpr=lambda value: value)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it at import, so we do too
INTERPRET = tl.constexpr(INTERPRETED)  # the same for use inside kernels

# Streaming multiprocessors of A100, L40S and 4090, H100 and H200, B200; for meta tensors
SM_COUNT = {80: 108, 89: 128, 90: 132, 100: 148}


def runs_triton(x):
    """Whether an op's body given tensor x launches its kernels; otherwise it runs the reference."""
    return x.is_cuda or INTERPRETED


def chip(x):
    """Compute capability times 10 of where x is: 80, 89, 90, 100, 120. Tile shapes go by it."""
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        return 10 * major + minor
    if runs_triton(x):
        return 90
    return triton.runtime.driver.active.get_current_target().arch


def for_chip(table, x):
    """The table's entry for the newest chip that is not newer than x's."""
    here = chip(x)
    return table[max((c for c in table if c <= here), default=min(table))]


def sm_count(x):
    """Streaming multiprocessors where x is.

    It is 4 in the interpreter, so that kernels whose programs take more than one tile do so there.
    """
    if x.is_cuda:
        return torch.cuda.get_device_properties(x.device).multi_processor_count
    return 4 if runs_triton(x) else for_chip(SM_COUNT, x)


def dense_rows(x):
    """x with the elements of a row (its last dimension) side by side; x itself where they are."""
    return x if x.stride(-1) == 1 or x.size(-1) == 1 else x.contiguous()


def as_rows(x):
    """(..., N) -> (M, N) with dense rows; a view wherever there is one."""
    return dense_rows(x).reshape(-1, x.size(-1))


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 -> dtype, to nearest even. The interpreter would cut bf16 off, so there the rounding
    is spelled out."""
    if INTERPRET:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a b in fp32. The interpreter multiplies bf16 as integers, so there it is upcast;
    fp32 stays fp32, not TF32."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
