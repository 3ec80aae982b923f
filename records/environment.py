"""What a result was measured on."""

import datetime
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import torch
import torch.nn.attention


def describe_environment(device):
    """Machine, versions and the state of the source, as a dict for JSON."""
    def git(*args):
        if not shutil.which("git"):
            return None
        done = subprocess.run(["git", "-C", Path(__file__).parent, *args], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    flash = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)()
    changes = git("status", "--porcelain")
    return dict(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), device=device_name(device),
        cpu_cores=os.cpu_count(), threads=torch.get_num_threads(), python=platform.python_version(),
        torch=torch.__version__, cuda=torch.version.cuda, flash_attention=flash, platform=platform.platform(),
        git_commit=git("rev-parse", "HEAD"), git_dirty=bool(changes) if changes is not None else None)


def device_name(device):
    """The GPU's or the CPU's product name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def synchronize(device):
    """Wait for the device to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device, dtype):
    """Measured FLOP/s of a large square matrix product, best of 8: what "share of peak" is a share of."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(8):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)
