"""What Inductor makes of gpt2-small's forward and backward for an H100, where there is none:
python on_fake_hopper.py LIBRARY [STEP], of fake_cuda.cpp. The trainer's model, at its full shape
and in FP8, is compiled on CUDA tensors that hold no numbers; Inductor believes in an H100, and its
Triton kernels are assembled for sm_90a. Nothing is run. Prints JSON: for each graph what its code
calls, for each kernel what ptxas gave it, and the products that Inductor would have timed first."""

import collections
import copy
import functools
import json
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import on_fake_cuda  # before PyTorch: it loads the library
import torch
import triton
from functorch.compile import make_boxed_func
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from torch._inductor import config as inductor
from torch._inductor.fx_passes import joint_graph, pad_mm
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import train_gpt as tg
from models import gpt
from tracks import load_track

SHARED = 232448  # bytes that a block can have
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=85_000_000_000,
    warp_size=32,
    max_threads_per_block=1024,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=SHARED,
    L2_cache_size=52_428_800,
)
# As Triton has it; rate in kHz, width in bits: 3.35 TB/s
PROPERTIES = dict(
    max_shared_mem=SHARED,
    mem_clock_rate=2_619_000,
    mem_bus_width=5120,
    multiprocessor_count=132,
)
found = dict(graphs=[], kernels=[], timed={}, targets=set(), tried=0)


def constant(value):
    return lambda *args, **kwargs: value


# --- answers of PyTorch and of Triton's driver as on an H100


def pretend_to_pytorch():
    for name, value in dict(
        is_available=True,
        is_initialized=True,
        device_count=1,
        get_device_capability=(9, 0),
        get_device_name=H100.name,
        is_bf16_supported=True,
        _get_device_properties=H100,
        _lazy_init=None,
        _exchange_device=0,
        _maybe_exchange_device=0,
        get_rng_state=torch.zeros(16, dtype=torch.uint8),
        set_rng_state=None,
    ).items():
        setattr(torch.cuda, name, constant(value))
    for name in "getDevice", "setDevice", "exchangeDevice", "getCurrentRawStream":
        setattr(torch._C, f"_cuda_{name}", constant(0))
    torch.version.cuda = "12.8"
    torch._utils_internal.max_clock_rate = constant(1980)  # MHz, as nvidia-smi says
    # It has kept what torch.cuda had before
    CudaInterface.exchange_device = CudaInterface.maybe_exchange_device = staticmethod(constant(0))


def pretend_to_triton():
    driver.set_active(
        types.SimpleNamespace(
            get_current_target=constant(GPUTarget("cuda", 90, 32)),
            get_current_device=constant(0),
            get_current_stream=constant(0),
            get_active_torch_device=constant("cuda"),
            get_device_interface=constant(torch.cuda),
            launcher_cls=constant(None),
            utils=types.SimpleNamespace(
                get_device_properties=constant(PROPERTIES),
                load_binary=load_binary,
            ),
        )
    )
    triton_helpers.set_driver_to_gpu = constant(None)  # which looks for libcuda


def load_binary(name, cubin, shared, device):
    """Where a driver would load it, what it takes is written down."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        said = subprocess.run([tool, "-res-usage", f.name], capture_output=True, check=True)
    registers, stack, local = (
        int(re.search(rb"%b:(\d+)" % word, said.stdout + said.stderr)[1])
        for word in (b"REG", b"STACK", b"LOCAL")
    )
    spilled = stack + local  # bytes
    found["kernels"].append(dict(name=name, registers=registers, spilled=spilled, shared=shared))
    module = function = name  # None would be loaded again
    return module, function, registers, spilled // 4, 1024


# --- what Inductor would compute or time on the GPU while it compiles


class OnCPU(TorchDispatchMode):
    """Constants, which would be made on the GPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        args = [torch.device("cpu") if isinstance(x, torch.device) else x for x in args]
        return function(*args, **kwargs)


def keep_off_the_gpu():
    # Patterns are traced on examples, of which one is a number
    patterns = joint_graph.lazy_init
    joint_graph.lazy_init = lambda device=None: patterns(torch.device("cpu"))

    fold = joint_graph.UniformValueConstantFolder.run

    def fold_on_cpu(self, *args, **kwargs):
        with OnCPU():
            return fold(self, *args, **kwargs)

    joint_graph.UniformValueConstantFolder.run = fold_on_cpu

    # Products whose widths GPUs do not like are timed, padded and not, if arithmetic may limit them
    should_pad = pad_mm._should_pad

    def write_down(match, a, b, op, *args):
        def timed(key):
            found["timed"][key] = f"{op} {tuple(a.shape)} {tuple(b.shape)}"
            return False  # as if it were no faster padded

        pad_mm.get_cached_should_pad = timed
        return should_pad(match, a, b, op, *args)

    pad_mm._should_pad = write_down


# --- compiling


def watch_kernels():
    """Count configurations: those that do not compile Inductor leaves out without a word."""
    precompile = CachingAutotuner._precompile_config

    def counted(self, *args, **kwargs):
        found["tried"] += 1
        result = precompile(self, *args, **kwargs)
        found["targets"] |= set(re.findall(r"\.target (\w+)", result.kernel.asm["ptx"]))
        return result

    CachingAutotuner._precompile_config = counted


def compile_graph(gm, inputs, **kwargs):
    """In place of Inductor's compile_fx_inner, which it calls; what comes back runs the graph as it
    was, so that fake tensors go on."""
    graph = copy.deepcopy(gm)
    before = len(found["kernels"])
    code = compile_fx.compile_fx_inner(gm, inputs, **kwargs).source_code
    calls = code[code.index("async_compile.wait") :]
    found["graphs"].append(
        dict(
            backward=bool(kwargs.get("is_backward")),
            kernels=len(re.findall(r"async_compile\.triton\(", code)),
            assembled=len({kernel["name"] for kernel in found["kernels"][before:]}),
            elsewhere=len(re.findall(r"async_compile\.cpp", code)),
            launches=len(re.findall(r"\btriton_\w+\.run\(", calls)),
            products=len(re.findall(r"extern_kernels\.\w+\(", calls)),
            ops=collections.Counter(re.findall(r"torch\.ops\.([\w.]+)\.\w+\(", calls)),
        )
    )
    print(found["graphs"][-1], file=sys.stderr, flush=True)
    return make_boxed_func(graph.forward)


def main():
    pretend_to_pytorch()
    pretend_to_triton()
    keep_off_the_gpu()
    watch_kernels()
    inductor.compile_threads = 1  # in this process
    inductor.fx_graph_cache = False
    inductor.use_static_triton_launcher = False
    torch._functorch.config.enable_autograd_cache = False
    compile_fx.compile_fx = functools.partial(compile_fx.compile_fx, inner_compile=compile_graph)

    config = tg.configure(**load_track("gpt2-small"))
    step = int(sys.argv[2]) if sys.argv[2:] else 1
    stage = tg.stage_at(config, step)
    row_len, val_row_len = config.data.row_len, config.data.val_row_len
    ops = on_fake_cuda.ops_of_hopper(fp8=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = gpt.Model(config.model, 50257, val_row_len, torch.bfloat16, ops)
        model.knows_tokens = True
        weights = config.model.target_weights(config.schedule.progress(step))
        if weights is not None:
            weights = torch.empty(len(weights), device="cuda")
        inputs = on_fake_cuda.batch(1, row_len, stage.model.max_doc_len)
        model.before_step()  # FP8 copies of weights
        forward = torch.compile(model, fullgraph=True, dynamic=False)  # as the trainer does
        forward(*inputs, stage=stage.model, target_weights=weights).backward()
    found["timed"] = list(found["timed"].values())
    found["targets"] = sorted(found["targets"])
    found["graph_breaks"] = sum(counters["graph_break"].values())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
