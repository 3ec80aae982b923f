"""One thread per test process: pytest-xdist already uses every core, and small matrices lose to
thread barriers.

Where there is no GPU, Triton kernels run in Triton's interpreter, which has to be said before
triton is imported.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
from processes import Nursery  # noqa: E402

import train_gpt  # noqa: E402


@pytest.fixture(autouse=True, scope="session")
def no_probe():
    """The machine's speed, which takes half a second to measure, at the start of every run."""
    speed = dict(matmul=dict(float32=1e9, bfloat16=1e9), copy=1e9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "machine_probe", lambda device: speed)
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
