"""What a result was measured on."""

import datetime
import functools
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

# Variables by which git is told of another repository than that of the folder it is started in
GIT_ELSEWHERE = {"GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE"}


def describe_environment(device):
    """Machine, versions and the state of the source, as a dict for JSON."""
    changes = git("status", "--porcelain")
    return dict(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        device=device_name(device),
        cpu_cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        flash_attention=flash_attention(),
        platform=platform.platform(),
        git_commit=git("rev-parse", "HEAD"),
        git_dirty=None if changes is None else bool(changes),
    )


@functools.cache
def flash_attention():
    """The installed packages of FlashAttention with their versions, None without any."""
    found = set()
    for folder in sys.path:  # to look at all packages takes a tenth of a second
        for about in Path(folder).glob("flash*.dist-info"):
            package = metadata.Distribution.at(about)
            found.add(f"{package.name} {package.version}")
    return ", ".join(sorted(found)) or None


def git(*args):
    """What git prints for this checkout, None where there is no git or no repository."""
    if not shutil.which("git"):
        return None
    # Of this checkout: neither the repository that a hook or a shell has named, nor one that this
    # folder was copied into
    here = Path(__file__).resolve().parent
    env = {name: value for name, value in os.environ.items() if name not in GIT_ELSEWHERE}
    env["GIT_CEILING_DIRECTORIES"] = str(here.parent.parent)
    command = ["git", "-C", here, *args]
    text = dict(encoding="utf-8", errors="replace")  # names in other encodings too
    done = subprocess.run(command, capture_output=True, env=env, **text)
    return done.stdout.strip() if done.returncode == 0 else None


def device_name(device):
    """The GPU's or the CPU's product name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("model name"))
        return line.split(":", 1)[1].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def synchronize(device):
    """Wait for the device to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --------------------------------------------------------------------------------------------------
# What the machine was measured to do


LONG = 0.3  # seconds that no single product of a probe should take


def best_seconds(device, work, repeats=8, budget=0.05):
    """Seconds of the fastest of `repeats` calls of work(), of fewer where those after the first
    (which may load a library) take more than `budget` seconds."""
    seconds = []
    while len(seconds) < repeats and sum(seconds[1:]) < budget:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def matmul_rate(device, dtype):
    """Measured FLOP/s of a large square matrix product, best of 8: what "share of peak" is a
    share of."""
    if device.type == "cuda":
        return rate_at(device, dtype, 8192)
    if dtype != torch.float32:
        small = rate_at(device, dtype, 256)
        if 2 * 1024**3 / small > LONG:  # emulated: of bf16 with AVX2 alone 2 seconds
            return small
    return rate_at(device, dtype, 1024)


def rate_at(device, dtype, n):
    """Measured FLOP/s of a product of n x n matrices."""
    if device.type == "cuda":
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    else:  # which takes as long for any numbers
        a, b = (torch.ones(n, n, dtype=dtype) for _ in range(2))
    if dtype == torch.float8_e4m3fn:
        # It has no @, and the second factor must be column-major, which for a rate is all one
        one = torch.ones((), device=device)

        def multiply():
            return torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16)
    else:

        def multiply():
            return a @ b

    return 2 * n**3 / best_seconds(device, multiply)


def copy_rate(device):
    """Measured bytes/s, read and written, of a copy, best of 8.

    It is of more than a GPU's caches hold. On a CPU it is of 32 MB, which some keep in their
    caches: a probe must not be what a container's memory ends at.
    """
    n = 2**30 if device.type == "cuda" else 2**24
    # Ones, so that the pages are really there
    source, target = (torch.ones(n, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * n / best_seconds(device, lambda: target.copy_(source))


def machine_probe(device):
    """What this device was measured to do, in under a second: dict(matmul={dtype: FLOP/s},
    copy=bytes/s).

    float32 is as torch is set (TF32 is off unless asked for). The fastest call counts: a probe is a
    floor, and whatever else ran meanwhile lowers it.
    """
    dtypes = [torch.float32, torch.bfloat16]
    if device.type == "cuda":
        dtypes.append(torch.float16)
        if torch.cuda.get_device_capability(device) >= (8, 9):
            dtypes.append(torch.float8_e4m3fn)
    rates = {str(d).removeprefix("torch."): matmul_rate(device, d) for d in dtypes}
    return dict(matmul=rates, copy=copy_rate(device))
