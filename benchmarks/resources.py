"""What every Triton kernel takes of a chip: registers, spilled bytes, shared memory, and which
instructions it uses.

    ./run.sh benchmarks resources           the table, and what differs from the committed one
    ./run.sh benchmarks resources --write   replace benchmarks/results/kernel_resources.{json,md}

Needs no GPU. Kernels are compiled through their real launchers, from meta tensors with the shapes
of the tracks, for A100 (sm_80), L40S and 4090 (sm_89), H100 and H200 (sm_90a), B200 (sm_100a), and
assembled by Triton's ptxas.
"""

import collections
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


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


# --- what is compiled: name -> (the oldest chip, a function that launches the kernels)

CASES = {}


def case(name, oldest=80):
    return lambda fn: CASES.setdefault(name, (oldest, fn))[1]


@case("rms_norm")
def _():
    op = importlib.import_module("kernels.rms_norm")

    x = meta(TOKENS, WIDTH)
    rstd = meta(TOKENS, dtype=torch.float32)
    op.launch_forward(x, None, None, 1e-6)
    op.launch_backward(x, None, x, None, rstd)


@case("add_rms_norm, weight")
def _():
    op = importlib.import_module("kernels.rms_norm")

    x = meta(TOKENS, WIDTH)
    w = meta(WIDTH)
    rstd = meta(TOKENS, dtype=torch.float32)
    op.launch_forward(x, x, w, 1e-6)
    op.launch_backward(x, x, x, w, rstd)


@case("relu2_mlp")
def _():
    from kernels import mlp_kernels as op

    x = meta(TOKENS, WIDTH)
    w = meta(2, HIDDEN, WIDTH)[1]
    post = meta(TOKENS, HIDDEN)
    op.launch_linear_relu2(x, w)
    op.launch_linear_relu2(x, w, post)


@case("relu2_mlp, rows not of 16 bytes")
def _():
    from kernels import mlp_kernels as op

    x = meta(TOKENS, 100)
    w = meta(300, 100)
    post = meta(TOKENS, 300)
    op.launch_linear_relu2(x, w)
    op.launch_linear_relu2(x, w, post)


@case("fp8_relu2_mlp", oldest=89)
def _():
    from kernels import mlp_kernels as op

    x, w = (meta(n, WIDTH, dtype=torch.float8_e4m3fn) for n in (TOKENS, HIDDEN))
    scale = meta(dtype=torch.float32)
    op.launch_linear_relu2(x, w, scales=(scale, scale, scale))


@case("qk_norm_rope")
def _():
    op = importlib.import_module("kernels.qk_norm_rope")

    H = 6
    D = 128
    qkv = meta(3, TOKENS // 3, 3 * H, D)
    cos = meta(TOKENS // 3, 1, D // 2)
    q, k, v = qkv.split(H, dim=2)
    dq, dk = op.launch_forward(q, k, cos, cos, 1e-6)
    op.launch_backward(dq, dk, dq, q, k, cos, cos, 1e-6, *torch.empty_like(qkv).split(H, dim=2))


@case(
    "fp8: quantize x; head gradient with transposed copy; head weight with both and amax", oldest=89
)
def _():
    from kernels import quantize as op

    scale = meta(dtype=torch.float32)
    op.launch_quantize(meta(TOKENS, WIDTH), scale, op.E4M3, False, False)
    op.launch_quantize(meta(TOKENS, VOCAB), scale, op.E5M2, True, False)
    op.launch_quantize(meta(VOCAB, WIDTH), scale, op.E4M3, True, True)


@case("fp8: transpose_copy of logit gradients, amax of x", oldest=89)
def _():
    from kernels import quantize as op

    op.launch_transpose(meta(TOKENS, VOCAB, dtype=op.E5M2))
    op.launch_amax(meta(TOKENS, WIDTH))


@case("symmetric_matmul: X X^T, b A + c A A, X^T X of the banks")
def _():
    from kernels.symmetric_matmul import launch_symmetric_matmul

    square = meta(48, WIDTH, WIDTH)
    tall = meta(24, HIDDEN, WIDTH)
    launch_symmetric_matmul(square, None, 1.0, 0.0)
    launch_symmetric_matmul(square, square, 0.5, -2.7)
    launch_symmetric_matmul(tall.mT, None, 1.0, 0.0)


def cross_entropy(gradient, cap=(23.0, 5.0, 7.5), targets=1, config=None, sampled=0):
    from kernels import cross_entropy_kernels as op

    logits = meta(TOKENS, sampled or VOCAB)
    y = meta(TOKENS, targets, dtype=torch.int64)
    weights = meta(targets, dtype=torch.float32) if targets > 1 else None
    dlogits = None if gradient is None else meta(*logits.shape, dtype=gradient)
    fp8_scale = meta(dtype=torch.float32) if gradient == torch.float8_e5m2 else None
    op.launch_cross_entropy(
        logits,
        y,
        weights,
        meta(2, dtype=torch.float32) if sampled else None,
        cap,
        -100,
        1 / TOKENS,
        dlogits,
        fp8_scale,
        config,
    )


@case("cross_entropy: bf16 gradient, loss only, no cap")
def _():
    cross_entropy(torch.bfloat16)
    cross_entropy(None)
    cross_entropy(torch.bfloat16, cap=None)


@case("cross_entropy: e5m2 gradient, of three targets too")
def _():
    cross_entropy(torch.float8_e5m2)
    cross_entropy(torch.float8_e5m2, targets=3)


@case(
    "cross_entropy: row in shared memory; bf16 gradient, e5m2 gradient of three targets", oldest=90
)
def _():
    cross_entropy(torch.bfloat16, config=("resident", 2048, 8))
    cross_entropy(torch.float8_e5m2, targets=3, config=("resident", 2048, 8))


@case("cross_entropy: among 16,384 tokens; two passes")
def _():
    cross_entropy(torch.bfloat16, sampled=16384, config=("two-pass", 4096, 16))


@case(
    "cross_entropy: among 16,384 tokens; row in shared memory, e5m2 gradient of three targets",
    oldest=90,
)
def _():
    cross_entropy(torch.float8_e5m2, targets=3, config=("resident", 4096, 8), sampled=16384)


@case("cross_entropy: scaling by the upstream gradient")
def _():
    from kernels import cross_entropy_kernels as op

    op.launch_scale(meta(VOCAB, WIDTH), meta(dtype=torch.float32), 1 / TOKENS)


# --- compiling without the chip


class offline:
    """with offline(90) as compiled: launches compile for that chip instead of running; compiled
    collects them."""

    def __init__(self, capability):
        self.capability = capability
        self.compiled = []

    def __enter__(self):
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        target = GPUTarget("cuda", self.capability, 32)
        stub = types.SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: self.capability,
            get_current_stream=lambda device=None: 0,
            get_active_torch_device=lambda: torch.device("cpu"),
        )
        self.driver = driver
        self.active = driver._active
        self.jit = JITFunction
        self.run = JITFunction.run
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
    for name, (oldest, launch_case) in CASES.items():
        if capability < oldest:
            continue
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
