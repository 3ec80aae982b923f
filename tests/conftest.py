"""One thread per test process: pytest-xdist already uses every core, and small matrices lose to
thread barriers.

Where there is no GPU, Triton kernels run in Triton's interpreter, which has to be said before
triton is imported.
"""

import getpass
import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where PyTorch has it by itself, but for all tests, and both workers: what one of them, or an
# earlier start of the tests, has compiled is not compiled again
cache = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)
# What the CPU says of itself is believed: trying it out takes 13 s where nothing is cached
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
from processes import Nursery, compiled_once  # noqa: E402

import train_gpt  # noqa: E402
from runtime import machine, setting_up  # noqa: E402
from runtime.machine import lacks_for_compiling  # noqa: E402

# Files of ten seconds and more, the longest first: none is left to one worker at the end
LONG = (
    "test_train test_resume test_cross_entropy test_resources test_checkpoints test_signals "
    "test_rules test_distributed test_fp8 test_attention test_run_faults test_peers test_gpt "
    "test_mlp test_ablate test_trainer test_training test_hosts"
).split()


@pytest.hookimpl(tryfirst=True)  # before those that are not asked for are left out
def pytest_collection_modifyitems(items):
    for item in items:
        if takes_half(item) and not torch.cuda.is_available():
            item.add_marker(pytest.mark.slow)
    place = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))
    if why := lacks_for_compiling():
        for item in items:
            if item.get_closest_marker("compiles"):
                item.add_marker(pytest.mark.skip(reason=why))


def takes_half(item):
    """Kernels in fp16, in which nothing is trained: in the interpreter a fifth of the suite."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return any(value is torch.float16 for value in values)


@pytest.fixture(autouse=True, scope="session")
def no_probe():
    """The machine's speed, which takes half a second to measure, at the start of every run, and
    other things that take long."""
    speed = dict(matmul=dict(float32=1e12, bfloat16=1e12), copy=1e10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setting_up, "machine_probe", lambda device: speed)
        # And steps that are tried before a run begins
        patch.setattr(train_gpt, "expected_training", lambda setup: setup.expected_seconds)
        patch.setattr(setting_up, "Fused", compiled_once())
        # Of a process with tests of 8 GB in it, which it would never give back
        patch.setattr(machine, "keep_freed_memory", lambda: None)
        yield


@pytest.fixture(scope="session")
def nursery():
    """A parent to fork trainers from, started where a test first asks for it."""
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(autouse=True, scope="module")
def graphs_from_none():
    """PyTorch limits the graphs of a function in a process, and files share processes."""
    torch._dynamo.reset()


def pytest_terminal_summary(terminalreporter):
    """A line for each room: how many tests, and their seconds over all workers."""
    seconds = {}
    tests = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if not isinstance(report, pytest.TestReport):
                continue
            # tests/ROOM/test_x.py, or tests/test_x.py
            parts = report.nodeid.split("::")[0].split("/")
            room = parts[1] if len(parts) > 2 else "whole"
            seconds[room] = seconds.get(room, 0.0) + report.duration
            if report.when == "call":
                tests[room] = tests.get(room, 0) + 1
    terminalreporter.write_line("")
    for room in sorted(seconds, key=seconds.get, reverse=True):
        n = tests.get(room, 0)
        terminalreporter.write_line(f"{room:12} {n:5} tests {seconds[room]:7.1f} s")
