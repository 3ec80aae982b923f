"""The machine a run finds: its processes and devices, what it computes in, how it is timed."""

import ctypes
import dataclasses
import getpass
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import time
import typing
from pathlib import Path

import torch
import torch.distributed as dist

from base import InputError, RankError
from base.options import AUTO, Options, option

from .environment import synchronize


@dataclasses.dataclass(frozen=True)
class PrecisionConfig(Options):
    """What numbers are computed in."""

    fp8: str = option(
        "off",
        "the head and the MLPs' forward products in 8-bit floats; auto: on Hopper",
        AUTO,
        group="optimizer",
    )
    dtype: str = option("auto", "of weights and activations", ("auto", "bfloat16", "float32"))


class World(typing.NamedTuple):
    """Which process this is, of how many, on what device. Processes of one machine have
    successive ranks."""

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    # Processes on this machine; all of them, where machines have different numbers
    local_size: int = 1
    node: object = None  # process group of this machine; None is all
    # process group of the processes in this one's place on each machine; None if there is one
    across: object = None


# --------------------------------------------------------------------------------------------------
# Processes


def lost_another(error):
    """Whether an error means that another process of this run has ended or cannot be reached."""
    if isinstance(error, dist.DistError):
        return True
    said = str(error).lower()
    return "gloo" in said or "nccl" in said


def wait_for_first_rank(world):
    """Nobody leaves while the first rank writes: the launcher would end it.

    Where others leave a moment earlier, Gloo may report that as a loss, but all is done then, and a
    first rank that failed says so itself.
    """
    try:
        if world.size > 1:
            dist.barrier()
    except RuntimeError as e:
        if not lost_another(e):
            raise


def first_rank_first(world, prepare):
    """Call prepare() on the first rank, then on the others, who find its work done.

    Returns what it returned here. An InputError on one rank ends all of them.
    """
    result = None
    error = None
    for first_ranks_turn in True, False:
        if (world.rank == 0) == first_ranks_turn:
            try:
                result = prepare()
            except InputError as e:
                error = e if world.rank == 0 else RankError(str(e))
        if world.size > 1:
            failed = torch.tensor(float(error is not None), device=world.device)
            dist.all_reduce(failed)
            if failed and error is None:
                error = InputError("another process could not go on; its own line says why")
        if error:
            raise error
    return result


def refuse_difference(world, what, text):
    """Raise InputError on all ranks if a text differs from the first rank's on one of them."""
    first = share_text(world, text)

    def compare():
        if text != first:
            raise RankError(
                f"rank {world.rank} has other {what} than the first: {text}, not {first}"
            )

    first_rank_first(world, compare)


def share_text(world, text):
    """The first rank's text, on all ranks."""
    if world.size == 1:
        return text
    content = text.encode() if world.rank == 0 else b""
    length = torch.tensor(len(content), device=world.device)
    dist.broadcast(length, 0)
    data = torch.zeros(int(length), dtype=torch.uint8, device=world.device)
    if content:
        data.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(data, 0)
    return data.cpu().numpy().tobytes().decode()


# --------------------------------------------------------------------------------------------------
# Devices


def choose_dtype(wanted, device):
    """torch's dtype for "bfloat16", "float32", or "auto": what the device multiplies natively."""
    return native_dtype(device) if wanted == "auto" else getattr(torch, wanted)


def native_dtype(device):
    """bfloat16 where the hardware multiplies it, else float32.

    It does on GPUs from Ampere on, and on CPUs with AVX512-BF16 or AMX.
    """
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        info = Path("/proc/cpuinfo")
        flags = info.read_text() if info.exists() else ""
        native = any(name in flags for name in ("avx512_bf16", "amx_bf16", " bf16"))
    return torch.bfloat16 if native else torch.float32


def to_device(values, device):
    """A list of numbers as an fp32 tensor there, without waiting for the device."""
    pinned = device.type == "cuda"
    x = torch.tensor(values, dtype=torch.float32, device="cpu", pin_memory=pinned)
    return x.to(device, non_blocking=True)


def keep_freed_memory():
    """Have glibc reuse large blocks.

    It returns them to the system when they are freed, and on CPUs a step then spends a quarter of
    its time on page faults: laptop 13,700 -> 17,700 tokens/s on 2 cores.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-2, 2**26)  # M_TOP_PAD


def can_compile(say):
    """Whether torch.compile finds what it needs; says what is missing."""
    compilers = os.environ.get("CXX", "g++"), "g++", "clang++"
    if not any(shutil.which(name) for name in compilers):
        missing = "a C++ compiler (g++)"
    elif not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing = "Python's headers (python3-dev)"
    elif not is_plain(torch.__file__):
        say(
            "running without torch.compile, which is slower: its compiler cannot take the path "
            f"{Path(torch.__file__).parent}; a checkout in a folder without spaces and quotes "
            "compiles"
        )
        return False
    else:
        return True
    say(
        f"running without torch.compile, which is slower: {missing} would have to be installed "
        "for it"
    )
    return False


def is_plain(path):
    """Whether PyTorch's compiler can take a path: its commands are split at spaces and quotes."""
    return re.fullmatch(r"[^\s'\"\\\\$`&;|<>()*?#]+", str(path)) is not None


def compile_cache(cache_dir):
    """Where compiled code goes: in the cache, or where the path is plain if the cache's is not."""
    folder = Path(cache_dir).absolute() / "inductor"
    if not is_plain(folder):
        folder = Path(tempfile.gettempdir(), f"stopwatch-{getpass.getuser()}", "inductor")
    return str(folder)


class Clock:
    """Training time in seconds: runs between start() and stop(), waiting for the device at both."""

    def __init__(self, device, total=0.0):
        self.device = device
        self.total = total  # until the last stop
        self.since = None  # perf_counter(), monotonic: setting the system's clock does not touch it

    def start(self):
        synchronize(self.device)
        self.since = time.perf_counter()

    def stop(self):
        synchronize(self.device)
        self.total = self.now()
        self.since = None

    def now(self):
        """Without waiting: on a GPU the host runs ahead of it."""
        if self.since is None:
            return self.total
        return self.total + time.perf_counter() - self.since
