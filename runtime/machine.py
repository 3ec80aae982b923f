"""The machine a run finds: its processes and devices, what it computes in, how it is timed."""

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
import typing
from pathlib import Path

import torch
import torch.distributed as dist

from base import InputError, RankError, SaidElsewhere
from base.options import AUTO, Options, option

from . import limits
from .environment import synchronize

NVIDIA = Path("/proc/driver/nvidia/gpus")  # has an entry for each, whether it can be used or not


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


def wait_for_all(world):
    """All ranks go on from here together, their devices idle."""
    synchronize(world.device)
    if world.size > 1:
        dist.barrier()
        synchronize(world.device)


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
                error = SaidElsewhere("another process could not go on; its own line says why")
        if error:
            raise error
    return result


def refuse_difference(world, what, text, why=""):
    """Raise InputError on all ranks if a text differs from the first rank's on one of them; why:
    what is known of it here."""
    first = share(world, text)

    def compare():
        if text != first:
            raise RankError(f"it has other {what} than the first rank: {text}, not {first}{why}")

    first_rank_first(world, compare)


def share(world, value):
    """The first rank's value on all ranks: anything that JSON can hold, whose tuples are lists
    then."""
    if world.size == 1:
        return value
    content = json.dumps(value).encode() if world.rank == 0 else b""
    length = torch.tensor(len(content), device=world.device)
    dist.broadcast(length, 0)
    data = torch.zeros(int(length), dtype=torch.uint8, device=world.device)
    if content:
        data.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(data, 0)
    return json.loads(data.cpu().numpy().tobytes())


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
        flags = ""
        with contextlib.suppress(OSError):  # other systems than Linux have no such file
            flags = Path("/proc/cpuinfo").read_text()
        native = any(name in flags for name in ("avx512_bf16", "amx_bf16", " bf16"))
    return torch.bfloat16 if native else torch.float32


def to_device(values, device):
    """A list of numbers as an fp32 tensor there, without waiting for the device."""
    pinned = device.type == "cuda"
    x = torch.tensor(values, dtype=torch.float32, device="cpu", pin_memory=pinned)
    return x.to(device, non_blocking=True)


def prepare(device, cache_dir):
    """What this process needs before it trains there; cache_dir: for compiled code."""
    choose_compile_cache(cache_dir)
    use_threads()
    if device.type == "cpu":
        keep_freed_memory()


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


def use_threads():
    """Give PyTorch no more threads than control groups give processors; it sees affinity itself.

    The user's own settings stay, and what torchrun sets for its processes.
    """
    if any(name in os.environ for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")):
        return
    allowed = limits.processors()
    if allowed < torch.get_num_threads():
        threads = max(1, math.ceil(allowed))
        torch.set_num_threads(threads)
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))


def mention_unused(device, say):
    """Say what accelerator is here and not used, so that nobody waits for one in vain."""
    if device.type == "cuda":
        return
    other = torch.accelerator.current_accelerator()
    if other is not None and other.type != "cuda":
        name = dict(mps="Apple's GPU (MPS)").get(other.type, f"the {other.type} device")
        say(f"{name} is left alone: training runs on NVIDIA's GPUs or, as here, on the CPU")
    elif "CUDA_VISIBLE_DEVICES" not in os.environ and any(NVIDIA.glob("*")):
        say(
            "there is an NVIDIA GPU, but PyTorch cannot use it, so training runs on the CPU; "
            f"does the driver support CUDA {torch.version.cuda or '(this PyTorch has none)'}?"
        )


# --------------------------------------------------------------------------------------------------
# What torch.compile needs


def can_compile(say):
    """Whether torch.compile finds what it needs; says what is missing."""
    reason = lacks_for_compiling()
    if reason:
        say(f"running without torch.compile, which is slower: {reason}")
    return reason is None


def lacks_for_compiling():
    """Why torch.compile cannot work here, as far as can be seen at once, or None."""
    for name in "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE":
        if os.environ.get(name, "0") not in ("", "0"):
            return f"{name} in the environment turns it off"
    compilers = os.environ.get("CXX", "g++"), "g++", "clang++"
    headers = sysconfig.get_path("include")
    if not any(shutil.which(name) for name in compilers):
        return "a C++ compiler (g++) would have to be installed for it"
    if not Path(headers, "Python.h").exists():
        return "Python's headers (python3-dev) would have to be installed for it"
    for folder in Path(torch.__file__).parent, headers:
        if not is_plain(folder):
            return (
                f"its compiler cannot take the path {folder}; a checkout in a folder without "
                "spaces and quotes compiles"
            )
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        return "no folder can be written for compiled code; --cache-dir names one"


def is_plain(path):
    """Whether PyTorch's compiler can take a path: its commands are split at spaces and quotes."""
    return re.fullmatch(r"[^\s'\"\\\\$`&;|<>()*?#]+", str(path)) is not None


def choose_compile_cache(cache_dir):
    """Have compiled code kept where the user said, or in the cache, or else in a temporary folder:
    in the first whose path the compiler can take and that can be written.

    In there are also the graphs of AOTAutograd, among them those with autograd functions of ours
    (kernels/), which have no state; kernels of ours that Triton compiles; and FlashAttention 4's,
    which keeps none unless told to. What the user has set stays.
    """
    leave_products_unpadded()
    if not os.access(os.path.expanduser("~"), os.W_OK):
        os.environ.setdefault("TRITON_HOME", str(Path(cache_dir).absolute()))
    name = "TORCHINDUCTOR_CACHE_DIR"
    wanted = Path(os.environ.pop(name, None) or Path(cache_dir) / "inductor").absolute()
    for choose in lambda: wanted, temporary_folder:
        with contextlib.suppress(OSError):
            folder = choose()
            if not is_plain(folder):
                continue
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                os.environ[name] = str(folder)
                os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
                os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
                flash = str(folder / "flash_attention")
                os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", flash)
                allow = "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD"
                allowed = os.environ.setdefault(allow, "1") == "1"
                if read := sys.modules.get("torch._functorch.config"):  # which it was by then
                    read.autograd_cache_allow_custom_autograd_functions = allowed
                return


def leave_products_unpadded():
    """Keep torch.compile from timing products with padded sides and without, unless the user wants
    it to.

    It does so where arithmetic may be what limits them. PyTorch 2.13 takes an H100's for a
    thousandth of what it is, by the name that it looks up, so at a cold start each rank would time
    all narrow products, of MUDD and of gates; and ranks and starts might find different answers,
    and with them other last bits.
    """
    padding = os.environ.setdefault("TORCHINDUCTOR_SHAPE_PADDING", "0") == "1"
    if read := sys.modules.get("torch._inductor.config"):  # which it was by then
        read.shape_padding = padding


def temporary_folder():
    """A folder that outlives this process and belongs to this user alone, since code that lies in
    it is run. Raises OSError."""
    if not hasattr(os, "getuid"):  # Windows, where the temporary folder is the user's
        return Path(tempfile.gettempdir(), "stopwatch")
    parents = [tempfile.gettempdir(), "/tmp", "/var/tmp"]
    parent = next((p for p in parents if is_plain(p) and os.access(p, os.W_OK)), parents[0])
    folder = Path(parent, f"stopwatch-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
        return folder
    return Path(tempfile.mkdtemp(prefix="stopwatch-", dir=parent))  # somebody took the name


def compiler_failed(error):
    """Whether an error is torch.compile's and not the program's that it compiled: of the C++ or
    Triton compiler, of a cache, of a library that is missing.

    What its tracing does not support is the program's.
    """
    from torch._dynamo.exc import TorchDynamoException, Unsupported
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    if isinstance(error, Unsupported):
        return False
    kinds = TorchDynamoException, CppCompileError, InvalidCxxCompiler, OSError, ImportError
    return isinstance(error, (*kinds, subprocess.SubprocessError))


def compiler_said(error):
    """The line of a compiler's error that says why, of at most 200 characters."""
    said = str(error)
    reason = re.search(r"(?<!\w)error: .*", said)
    lines = [reason[0]] if reason else said.split("\n")
    return lines[0].strip()[:200]


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
