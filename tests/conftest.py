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


@pytest.fixture(autouse=True, scope="module")
def graphs_from_none():
    """PyTorch limits the graphs of a function in a process, and files share processes."""
    torch._dynamo.reset()
