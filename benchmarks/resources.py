"""What every Triton kernel takes of a chip: registers, spilled bytes, shared memory, and which instructions it uses.

    python -m benchmarks resources              compare with the committed table
    python -m benchmarks resources --write      write benchmarks/results/kernel_resources.{json,md}

Needs no GPU. Kernels are compiled through their real launchers, from meta tensors with the shapes of the tracks, for
A100 (sm_80), L40S and 4090 (sm_89), H100 and H200 (sm_90a), B200 (sm_100a), and assembled by Triton's ptxas.
"""

import collections
import pathlib
import re
import subprocess
import tempfile
import types

import torch

from kernels import launch

ARCH = {80: "sm_80", 89: "sm_89", 90: "sm_90a", 100: "sm_100a"}
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes a block can have
TOKENS, WIDTH, HIDDEN, VOCAB = 49152, 768, 3072, 50304  # gpt2-small, last stage


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


# --- what is compiled: name -> (the oldest chip, a function that launches the kernels)

CASES = {}


def case(name, oldest=80):
    return lambda fn: CASES.setdefault(name, (oldest, fn))[1]


@case("rms_norm")
def _():
    from kernels import rms_norm as op
    x, rstd = meta(TOKENS, WIDTH), meta(TOKENS, dtype=torch.float32)
    op.launch_forward(x, None, None, 1e-6)
    op.launch_backward(x, None, x, None, rstd)


@case("add_rms_norm, weight")
def _():
    from kernels import rms_norm as op
    x, w, rstd = meta(TOKENS, WIDTH), meta(WIDTH), meta(TOKENS, dtype=torch.float32)
    op.launch_forward(x, x, w, 1e-6)
    op.launch_backward(x, x, x, w, rstd)


# --- compiling without the chip


class offline:
    """with offline(90) as compiled: launches compile for that chip instead of running; compiled collects them."""

    def __init__(self, capability):
        self.capability, self.compiled = capability, []

    def __enter__(self):
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction
        target = GPUTarget("cuda", self.capability, 32)
        stub = types.SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: self.capability,
            get_current_stream=lambda device=None: 0, get_active_torch_device=lambda: torch.device("cpu"))
        self.driver, self.active = driver, driver._active
        self.jit, self.run = JITFunction, JITFunction.run
        driver.set_active(stub)

        def run(fn, *args, grid, warmup=False, **kwargs):
            compiled = self.run(fn, *args, grid=grid, warmup=True, **kwargs)
            self.compiled.append(compiled)
            return compiled

        JITFunction.run = run
        return self.compiled

    def __exit__(self, *_):
        self.jit.run = self.run
        self.driver._active = self.active  # set_active refuses None


def measure(kernel, capability):
    """Assemble a compiled kernel; returns its row of the table."""
    import triton
    bin = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"
    ptx = kernel.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(ptx)
        f.flush()
        assembled = subprocess.run(
            [bin / ("ptxas" if capability < 100 else "ptxas-blackwell"), "-v", f"-arch={ARCH[capability]}", f.name,
             "-o", "/dev/null"], capture_output=True, text=True, check=True)

    def number(pattern):
        return sum(map(int, re.findall(pattern, assembled.stderr)))

    return dict(
        kernel=kernel.metadata.name, arch=ARCH[capability], warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages, registers=number(r"Used (\d+) registers"),
        spilled=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        shared=kernel.metadata.shared, wgmma=ptx.count("wgmma.mma_async"), tcgen05=ptx.count("tcgen05.mma"),
        bulk_copies=ptx.count("cp.async.bulk.tensor"))


def table(capability):
    """[row, ...] for every case that this chip can run."""
    assert not launch.INTERPRETED, "TRITON_INTERPRET=1 leaves nothing to compile; unset it"
    rows = []
    for name, (oldest, launch_case) in CASES.items():
        if capability >= oldest:
            with offline(capability) as compiled:
                launch_case()
            seen = collections.Counter()
            for kernel in compiled:
                row = measure(kernel, capability)
                seen[row["kernel"]] += 1
                if seen[row["kernel"]] > 1:
                    row["kernel"] += f" #{seen[row['kernel']]}"
                rows.append(dict(case=name) | row)
    return rows
