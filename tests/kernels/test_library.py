"""The folder kernels/ alone: what it exports, what importing it costs, and the examples in
docs/kernels.md."""

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import kernels
from kernels.op import OPS

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = (
    "add_rms_norm attention embedding fp8_linear linear_cross_entropy linear_log_prob linear_relu2 "
    "polar_express qk_norm_rope relu2_mlp rms_norm softcap_cross_entropy swiglu "
    "symmetric_matmul"
).split()


def examples():
    text = (ROOT / "docs/kernels.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_public_ops_are_functions_with_docstrings():
    """That say what shapes they take and give; docs/kernels.md names them all."""
    assert set(kernels.__all__) == {"Ops", "choose_ops", *PUBLIC}
    table = (ROOT / "docs/kernels.md").read_text().split("## Use")[0]
    for name in PUBLIC:
        function = getattr(kernels, name)
        assert inspect.isfunction(function) and function.__doc__ and f"`{name}`" in table
    for op in OPS.values():
        assert getattr(kernels, op.name) is op.triton
        assert inspect.signature(op.triton) == inspect.signature(op.reference)


# Every way to ask CUDA for something is mined before the import, so that this holds on any build
IMPORT = """
import sys
import torch

def mine(*args, **kwargs):
    raise AssertionError("kernels asked for CUDA on import")

saved = {}
for name in ("is_available", "device_count", "get_device_capability", "get_device_properties",
             "init", "_lazy_init", "current_device", "mem_get_info"):
    saved[name] = getattr(torch.cuda, name)
    setattr(torch.cuda, name, mine)
before = set(sys.modules)
import kernels
heavy = ("torch._dynamo", "torch._inductor", "sympy", "flash_attn", "flash_attn_interface")
new = [m for m in set(sys.modules) - before if m.startswith(heavy)]
assert not new, new
assert not torch.cuda.is_initialized()
assert {m.partition(".")[0] for m in sys.modules}.isdisjoint({"base", "data", "models", "runtime"})
for name, function in saved.items():
    setattr(torch.cuda, name, function)
"""


def test_a_copy_of_the_folder_runs_the_examples_and_imports_little(tmp_path):
    """In a folder with nothing else of the project; without the interpreter, as a CPU's user has
    it. Importing compiles nothing, looks at no device and loads no compiler of PyTorch's."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    check = "assert loss > 0 and w_head.grad.isfinite().all() and w_head.grad.any()\n"
    block, chosen = examples()
    (tmp_path / "use.py").write_text(f"{IMPORT}\n{block}\n{check}\n{chosen}")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "use.py"],
        cwd=tmp_path,
        env=env | dict(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "'attention': 'sdpa'" in done.stdout and "'relu2_mlp': 'pytorch'" in done.stdout
