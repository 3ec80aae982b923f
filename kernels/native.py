"""C files of this folder, compiled on the machine that runs them and loaded.

A file is compiled once with the machine's own compiler, for the instructions that its processor
has. Where there is no compiler, build() says so and gives None: every op has a PyTorch form.

Their loops share PyTorch's threads: both ask the OpenMP library by the same name, and the one that
is loaded already answers.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import secrets
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

HERE = Path(__file__).parent
COMPILERS = "cc", "gcc", "clang"
# Nobody asks for floating-point errors: without these floorf() and sqrtf() are calls
OPTIONS = ["-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"]
NATIVE = ["-march=native", "-fopenmp"]
WIDEST = ["-mprefer-vector-width=512"]  # x86 only: a softmax in 0.7 of the time of 256 bits
LONG, INT, POINTER = ctypes.c_long, ctypes.c_int, ctypes.c_void_p
FLOAT, DOUBLE = ctypes.c_float, ctypes.c_double


def build(name, folder, say=lambda message: None):
    """NAME.c of this folder as a ctypes library, compiled into `folder` unless it is there; None
    where that is not possible, which say(message) is told."""
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    source = HERE / f"{name}.c"
    sources = [source, *sorted(HERE.glob("*.h")), Path(__file__)]
    text = b"".join(f.read_bytes() for f in sources)
    # A folder may be shared by machines that have other processors
    key = hashlib.sha256(text + processor().encode()).hexdigest()[:16]
    path = Path(folder) / f"{name}-{key}.so"
    if not os.path.exists(path):  # unlike the Path's it raises nothing
        if compiler is None:
            say(f"without kernels/{name}.c, which is slower: there is no C compiler")
            return None
        say(f"compiling kernels/{name}.c (once) ...")
        failed = compile_to(path, source, compiler)
        if failed:
            say(f"without kernels/{name}.c, which is slower: {failed}")
            return None
    try:
        return ctypes.CDLL(str(path))
    except OSError as e:
        say(f"without kernels/{name}.c, which is slower: {e}")
        return None


class Library:
    """A compiled C file, with methods that take tensors. A subclass has the file's name and what
    its functions take, as declare() does."""

    name: str
    signatures: dict

    def __init__(self, library):
        self.c = declare(library, self.signatures)

    def __deepcopy__(self, memo):
        return self  # copies of a model share it: it has no state

    def call(self, name, *args):
        """A function of the library; tensors are passed by address, and have to be there until it
        returns. The number of threads comes last."""
        given = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]
        getattr(self.c, name)(*given, torch.get_num_threads())

    @classmethod
    def build(cls, folder, say=lambda message: None):
        """That of this machine; None where that is not possible, or not for it. As build()."""
        library = build(cls.name, folder, say) if is_for_here(cls.name) else None
        return None if library is None else cls(library)


def build_all(folder, say=lambda message: None):
    """Compile every C file that is for this machine, side by side, ahead of its first use."""
    names = sorted(path.stem for path in HERE.glob("*.c"))
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda name: build(name, folder, say), filter(is_for_here, names)))


def has_eight():
    """Whether this machine's vectors have 8 numbers of fp32: AVX2, not AVX-512."""
    flags = processor().split()
    return {"avx2", "fma"} <= set(flags) and "avx512f" not in flags


def has_tiles():
    """Whether this processor multiplies bf16 in tiles (Intel's AMX)."""
    return {"amx_bf16", "avx512_bf16"} <= set(processor().split())


def is_for_here(name):
    """Whether a C file is for this processor."""
    if name == "products":
        return has_eight()
    return has_tiles() if name == "tiled" else True


def declare(library, signatures):
    """Tell ctypes what the functions take; {name: [type, ...]}. None of them returns anything."""
    for name, types in signatures.items():
        function = getattr(library, name)
        function.argtypes = types
        function.restype = None
    return library


def strides_of(*tensors):
    """Of row, position and head, of (B, T, H, D) each."""
    return torch.tensor([s for x in tensors for s in x.stride()[:3]])


def compile_to(path, source, compiler):
    """Compile the library; what went wrong in one line, or None."""
    temp = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
    plain = [compiler, *OPTIONS, str(source), "-o", str(temp), "-lm"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for options in (NATIVE + WIDEST, NATIVE, NATIVE[:1], []):
            done = subprocess.run(
                plain + options, capture_output=True, text=True, errors="replace", timeout=120
            )
            if done.returncode == 0:
                os.replace(temp, path)
                return None
    except (OSError, subprocess.TimeoutExpired) as e:
        return f"{compiler}: {e}"
    finally:
        with contextlib.suppress(OSError):  # it is not there, or nothing can be
            temp.unlink()
    lines = done.stderr.strip().splitlines() or ["it said nothing"]
    return f"{compiler}: {lines[-1][:200]}"


def processor():
    """What tells processors apart that have other instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "") + (
        platform.machine()
    )
