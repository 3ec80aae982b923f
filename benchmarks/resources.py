"""What every Triton kernel takes of a chip: registers, spilled bytes, shared memory, and which
instructions it uses.

    ./run.sh benchmarks resources           the table, and what differs from the committed one
    ./run.sh benchmarks resources --write   replace benchmarks/results/kernel_resources.{json,md}

Needs no GPU. Kernels are compiled through their real launchers, from meta tensors with the shapes
of the tracks, for A100 (sm_80), L40S and 4090 (sm_89), H100 and H200 (sm_90a), B200 (sm_100a), and
assembled by Triton's ptxas.
"""

import collections
import contextlib
import importlib
import json
import re
import subprocess
import tempfile
import types
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.report import document, say
from kernels import launch

ARCH = {80: "sm_80", 89: "sm_89", 90: "sm_90a", 100: "sm_100a"}
# bytes of shared memory that a block can have
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
COMMITTED = Path(__file__).parent / "results/kernel_resources.json"
# gpt2-small's shapes, in its last stage
TOKENS = 49152
WIDTH = 768
HIDDEN = 3072
VOCAB = 50304
BF16 = torch.bfloat16
FP32 = torch.float32
E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


# --- what is compiled. The modules of kernels/ are named as their ops are: hence import_module


def rms_norm(residual, weight):
    op = importlib.import_module("kernels.rms_norm")
    x = meta(TOKENS, WIDTH)
    rstd = meta(TOKENS, dtype=FP32)
    added = x if residual else None
    w = meta(WIDTH) if weight else None
    op.launch_forward(x, added, w, 1e-6)
    op.launch_backward(x, added, x, w, rstd)


def relu2_mlp(width, hidden):
    op = importlib.import_module("kernels.mlp_kernels")
    x = meta(TOKENS, width)
    w = meta(2, hidden, width)[1]
    op.launch_linear_relu2(x, w)
    op.launch_linear_relu2(x, w, meta(TOKENS, hidden))


def swiglu():
    op = importlib.import_module("kernels.swiglu")
    op.launch_backward(op.launch_forward(meta(TOKENS, 4096)), meta(TOKENS, 4096))


def fp8_relu2_mlp():
    op = importlib.import_module("kernels.mlp_kernels")
    x = meta(TOKENS, WIDTH, dtype=E4M3)
    w = meta(HIDDEN, WIDTH, dtype=E4M3)
    scale = meta(dtype=FP32)
    op.launch_linear_relu2(x, w, scales=(scale, scale, scale))


def qk_norm_rope():
    op = importlib.import_module("kernels.qk_norm_rope")
    H = 6
    D = 128
    qkv = meta(3, TOKENS // 3, 3 * H, D)
    cos = meta(TOKENS // 3, 1, D // 2)
    q, k, v = qkv.split(H, dim=2)
    dq, dk = op.launch_forward(q, k, cos, cos, 1e-6)
    op.launch_backward(dq, dk, dq, q, k, cos, cos, 1e-6, *torch.empty_like(qkv).split(H, dim=2))


def quantize():
    op = importlib.import_module("kernels.quantize")
    scale = meta(dtype=FP32)
    op.launch_quantize(meta(TOKENS, WIDTH), scale, E4M3, False, False)
    op.launch_quantize(meta(TOKENS, VOCAB), scale, E5M2, True, False)
    op.launch_quantize(meta(VOCAB, WIDTH), scale, E4M3, True, True)


def transpose_copy():
    op = importlib.import_module("kernels.quantize")
    op.launch_transpose(meta(TOKENS, VOCAB, dtype=E5M2))
    op.launch_amax(meta(TOKENS, WIDTH))


def symmetric_matmul():
    op = importlib.import_module("kernels.symmetric_matmul")
    square = meta(48, WIDTH, WIDTH)
    tall = meta(24, HIDDEN, WIDTH)
    op.launch_symmetric_matmul(square, None, 1.0, 0.0)
    op.launch_symmetric_matmul(square, square, 0.5, -2.7)
    op.launch_symmetric_matmul(tall.mT, None, 1.0, 0.0)
    op.launch_symmetric_matmul(square, square, 15.9, -22.5, 8.2, True)


def cross_entropy(gradient, cap=(23.0, 5.0, 7.5), targets=1, config=None, sampled=0):
    op = importlib.import_module("kernels.cross_entropy_kernels")
    logits = meta(TOKENS, sampled or VOCAB)
    y = meta(TOKENS, targets, dtype=torch.int64)
    weights = meta(targets, dtype=FP32) if targets > 1 else None
    sample = meta(2, dtype=FP32) if sampled else None
    dlogits = None if gradient is None else meta(*logits.shape, dtype=gradient)
    scale = meta(dtype=FP32) if gradient == E5M2 else None
    op.launch_cross_entropy(
        logits, y, weights, sample, cap, -100, 1 / TOKENS, dlogits, scale, config
    )


def scale_gradient():
    op = importlib.import_module("kernels.cross_entropy_kernels")
    op.launch_scale(meta(VOCAB, WIDTH), meta(dtype=FP32), 1 / TOKENS)


def clear():
    op = importlib.import_module("kernels.clear")
    op.launch_clear(meta(VOCAB, WIDTH), meta(dtype=torch.bool))


# name -> (the oldest chip, functions that launch the kernels)
CASES = {
    "rms_norm": (80, lambda: rms_norm(False, False)),
    "add_rms_norm, weight": (80, lambda: rms_norm(True, True)),
    "relu2_mlp": (80, lambda: relu2_mlp(WIDTH, HIDDEN)),
    "relu2_mlp, rows not of 16 bytes": (80, lambda: relu2_mlp(100, 300)),
    "fp8_relu2_mlp": (89, fp8_relu2_mlp),
    "swiglu": (80, swiglu),
    "qk_norm_rope": (80, qk_norm_rope),
    "fp8: quantize x; head gradient with transposed copy; head weight with both and amax": (
        89,
        quantize,
    ),
    "fp8: transpose_copy of logit gradients, amax of x": (89, transpose_copy),
    "symmetric_matmul: X X^T, b A + c A A, X^T X of the banks": (80, symmetric_matmul),
    "cross_entropy: bf16 gradient, loss only, no cap": (
        80,
        lambda: cross_entropy(BF16),
        lambda: cross_entropy(None),
        lambda: cross_entropy(BF16, cap=None),
    ),
    "cross_entropy: e5m2 gradient, of three targets too": (
        80,
        lambda: cross_entropy(E5M2),
        lambda: cross_entropy(E5M2, targets=3),
    ),
    "cross_entropy: row in shared memory; bf16 gradient, e5m2 gradient of three targets": (
        90,
        lambda: cross_entropy(BF16, config=("resident", 2048, 8)),
        lambda: cross_entropy(E5M2, targets=3, config=("resident", 2048, 8)),
    ),
    "cross_entropy: among 16,384 tokens; two passes": (
        80,
        lambda: cross_entropy(BF16, sampled=16384, config=("two-pass", 4096, 16)),
    ),
    "cross_entropy: among 16,384 tokens; row in shared memory, e5m2 gradient of three targets": (
        90,
        lambda: cross_entropy(E5M2, targets=3, config=("resident", 4096, 8), sampled=16384),
    ),
    "cross_entropy: scaling by the upstream gradient": (80, scale_gradient),
    "clear_unless: a gradient that waits": (80, clear),
}


# --- compiling without the chip


@contextlib.contextmanager
def offline(capability):
    """with offline(90) as compiled: launches compile for that chip instead of running; compiled
    collects them."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    target = GPUTarget("cuda", capability, 32)
    stub = types.SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: capability,
        get_current_stream=lambda device=None: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    compiled = []
    active = driver._active
    launch_kernel = JITFunction.run

    def run(fn, *args, grid, warmup=False, **kwargs):
        kernel = launch_kernel(fn, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    driver.set_active(stub)
    JITFunction.run = run
    try:
        yield compiled
    finally:
        JITFunction.run = launch_kernel
        driver._active = active  # set_active refuses None


def measure(kernel, capability):
    """Assemble a compiled kernel; returns its row of the table."""
    import triton

    ptx = kernel.asm["ptx"]
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin"
    ptxas /= "ptxas" if capability < 100 else "ptxas-blackwell"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as f:
        f.write(ptx)
        f.flush()
        command = [ptxas, "-v", f"-arch={ARCH[capability]}", f.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def number(pattern):
        return sum(map(int, re.findall(pattern, said)))

    return dict(
        kernel=kernel.metadata.name,
        arch=ARCH[capability],
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        registers=number(r"Used (\d+) registers"),
        spilled=number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        shared=kernel.metadata.shared,
        wgmma=ptx.count("wgmma.mma_async"),
        tcgen05=ptx.count("tcgen05.mma"),
        bulk_copies=ptx.count("cp.async.bulk.tensor"),
    )


def table(capability):
    """[row, ...] for every case that this chip can run."""
    assert not launch.INTERPRETED, "TRITON_INTERPRET=1 leaves nothing to compile; unset it"
    rows = []
    for name, (oldest, *launches) in CASES.items():
        if capability < oldest:
            continue
        with offline(capability) as compiled:
            for launch_kernels in launches:
                launch_kernels()
        seen = collections.Counter()
        for kernel in compiled:
            row = measure(kernel, capability)
            seen[row["kernel"]] += 1
            if seen[row["kernel"]] > 1:
                row["kernel"] += f" #{seen[row['kernel']]}"
            rows.append(dict(case=name) | row)
    return rows


# --- the committed table


def worse(rows, committed):
    """What rows need more of than the committed table has for the same kernel and chip: one line
    each."""
    before = {(r["case"], r["kernel"], r["arch"]): r for r in committed}
    lines = []
    for row in rows:
        old = before.get((row["case"], row["kernel"], row["arch"]))
        name = f"{row['case']}: {row['kernel']} on {row['arch']}"
        if old is None:
            lines.append(f"{name}: not in the table")
            continue
        for what in ("registers", "spilled", "shared"):
            if row[what] > old[what]:
                lines.append(f"{name}: {row[what]} {what}, {old[what]} in the table")
    return lines


def cell(row):
    """What a kernel takes of one chip, in the table."""
    parts = [f"{row['registers']} r"]
    if row["shared"]:
        parts.append(f"{row['shared'] / 1024:.1f} KB")
    if row["spilled"]:
        parts.append(f"{row['spilled']} B spilled")
    parts.append(f"{row['warps']} w")
    marks = dict(wgmma="W", tcgen05="5", bulk_copies="B")
    uses = "".join(mark for what, mark in marks.items() if row[what])
    if uses:
        parts.append(f"**{uses}**")
    return ", ".join(parts)


def render(result):
    """The table in Markdown: a line for each kernel, a column for each chip."""
    cells = collections.defaultdict(dict)
    for r in result["rows"]:
        cells[r["case"], r["kernel"]][r["arch"]] = cell(r)
    rows = []
    for (name, kernel), row in cells.items():
        rows.append([name, f"`{kernel}`", *(row.get(arch, "–") for arch in ARCH.values())])
    return document(
        "# What each kernel takes of a chip",
        f"Compiled for the shapes of `gpt2-small` by Triton {result['triton']} and its ptxas; "
        "nothing here was run. Registers per thread, shared memory of a block, bytes spilled if "
        "any, warps; **W** wgmma, **5** tcgen05, **B** bulk tensor copies. Made by "
        "`./run.sh benchmarks resources --write`.",
        report.table(["op", "kernel", *ARCH.values()], rows),
    )


def add_arguments(parser):
    parser.flag("--write", "replace the committed table")
    about = "this one only, 80, 89, 90 or 100; all by default"
    parser.add_argument("--chip", type=int, choices=ARCH, help=about)


def run(write=False, chip=None):
    """dict(triton, rows); see measure() for the columns."""
    import triton

    rows = []
    for capability in [chip] if chip else ARCH:
        say(f"compiling {len(CASES)} cases for {ARCH[capability]} ...")
        rows += table(capability)
    result = dict(triton=triton.__version__, rows=rows)
    if write:
        lines = ",\n".join(json.dumps(row) for row in rows)
        text = f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n'
        COMMITTED.parent.mkdir(exist_ok=True)
        COMMITTED.write_text(text)
        COMMITTED.with_suffix(".md").write_text(render(result))
    elif COMMITTED.exists():
        for line in worse(rows, json.loads(COMMITTED.read_text())["rows"]):
            say(line)
    return result
