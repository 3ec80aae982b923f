"""What Inductor makes of gpt2-small for an H100, where there is none:
python on_fake_hopper.py LIBRARY WHAT [FOLDER], of fake_cuda.cpp. WHAT is one of

    STEP              forward and backward of that step, with the rows of one of eight GPUs
    validation        forward of a row of the validation split
    step-RANK-of-N    what a step does behind backward, on one rank of so many: reports for the
                      guard and updates
    stages            all stages in turn, each followed by validation, twice; traced, and no code is
                      generated

The trainer's model, at its full shape and in FP8, is compiled on CUDA tensors that hold no numbers;
Inductor believes in an H100, and its Triton kernels are assembled for sm_90a. Nothing is run.
Prints JSON: for each graph what its code calls and which kernels move most bytes, for each kernel
what ptxas gave it, and the products that Inductor would have timed first. The code itself goes to
FOLDER, if one is named."""

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
from torch._inductor.scheduler import Scheduler
from torch._inductor.utils import is_view
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import train_gpt as tg
from models import gpt
from optim import Optimizer, gradient_report
from runtime import machine
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


def watch_bytes():
    """What each kernel and each call of another library reads and writes, as Inductor counts."""
    codegen = Scheduler.codegen

    def counted(self):
        found["moved"] = moved = []
        for node in self.nodes:
            ops = set()
            for part in node.get_nodes():
                for origin in part.node.origins if part.node is not None else ():
                    ops.add(str(origin.target))
            sizes = node.get_read_write_buffers_sizes()
            shapes = [str(out.node.layout) for out in node.get_outputs()]
            moved.append(dict(bytes=sizes, extern=node.is_extern(), ops=sorted(ops), out=shapes))
        return codegen(self)

    Scheduler.codegen = counted


def compile_graph(gm, inputs, **kwargs):
    """In place of Inductor's compile_fx_inner, which it calls; what comes back runs the graph as it
    was, so that fake tensors go on."""
    graph = copy.deepcopy(gm)
    backward = bool(kwargs.get("is_backward"))
    if found["traces_only"]:
        found["graphs"].append(dict(backward=backward))
        return make_boxed_func(graph.forward)
    before = len(found["kernels"])
    code = compile_fx.compile_fx_inner(gm, inputs, **kwargs).source_code
    calls = code[code.index("async_compile.wait") :]
    moved = sorted(found.pop("moved"), key=lambda kernel: -kernel["bytes"])
    found["graphs"].append(
        dict(
            backward=backward,
            kernels=len(re.findall(r"async_compile\.triton\(", code)),
            assembled=len({kernel["name"] for kernel in found["kernels"][before:]}),
            elsewhere=len(re.findall(r"async_compile\.cpp", code)),
            launches=len(re.findall(r"\btriton_\w+\.run\(", calls)),
            products=len(re.findall(r"extern_kernels\.\w+\(", calls)),
            ops=collections.Counter(re.findall(r"torch\.ops\.([\w.]+)\.\w+\(", calls)),
            most_bytes=moved[:10],
            bytes_of_kernels=sum(x["bytes"] for x in moved if not x["extern"]),
        )
    )
    if sys.argv[3:]:
        Path(sys.argv[3], f"{len(found['graphs'])}.py").write_text(code)
        Path(sys.argv[3], f"{len(found['graphs'])}.json").write_text(json.dumps(moved, indent=1))
    print(found["graphs"][-1], file=sys.stderr, flush=True)
    return make_boxed_func(graph.forward)


# --- what is compiled


def train(config, model, forward, step):
    """A step's forward and backward passes, of the rows that one of eight GPUs has."""
    rows, stage = tg.stage_at(config, step)
    weights = config.model.target_weights(config.schedule.progress(step))
    if weights is not None:
        weights = torch.empty(len(weights), device="cuda")
    inputs = on_fake_cuda.batch(rows // 8, config.data.row_len, stage.max_doc_len)
    model.before_step()  # FP8 copies of weights
    forward(*inputs, stage=stage, target_weights=weights).backward()


def validate(config, model, forward, step):
    stage = config.model.val_stage(tg.stage_at(config, step).model, config.data.val_row_len)
    inputs = on_fake_cuda.batch(1, config.data.val_row_len, config.data.val_row_len)
    with torch.no_grad():
        forward(*inputs, stage)


def go_through_stages(config, model, forward):
    """Writes down which graphs each stage brings, the first time and the second."""
    found["stages"] = []
    first = {}  # Stage -> its first step
    for step, stage in tg.stages_of(config).items():
        first.setdefault(stage.model, step)
    for _ in range(2):
        for step in first.values():
            before = len(found["graphs"])
            train(config, model, forward, step)
            validate(config, model, forward, step)
            backward = [graph["backward"] for graph in found["graphs"][before:]]
            found["stages"].append(dict(step=step, backward=backward))


def update(config, model, world, touched=()):
    """Two steps of the optimizer, and what the guard looks at before; touched: rows of tables, as
    for Optimizer.gradients()."""
    optimizer = Optimizer(model, model.update_rules(config.optim), world, compile=True, skips=True)
    model.grad_rooms = optimizer.padding_rows()
    report = torch.compile(gradient_report, dynamic=False)  # as the trainer does

    def judge():
        for name, p in model.named_parameters():
            if p.numel() and p.grad is None:
                p.grad = with_room(p, model.grad_rooms.get(name, 0))
        parts = [x for x in optimizer.gradients(0.9, touched).values() if x is not None]
        return report(parts).isfinite().all()

    for _ in range(2):  # of which the second one has Adam's turn
        ok = judge()
        optimizer.step(1.0, 0.9, ok)

    # Two more, for what is not compiled
    eager = Eager()
    optimizer.fast = eager.once
    report = eager.once(gradient_report)
    for _ in range(2):
        with eager:
            ok = judge()
            optimizer.step(1.0, 0.9, ok)
    found["eager"] = eager.calls
    found["compiled"] = eager.compiled


class Eager(TorchDispatchMode):
    """Ops on the GPU, by name, outside of functions that are compiled."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()
        self.compiled = collections.Counter()
        self.inside = False

    def once(self, function):
        def call(*args, **kwargs):
            self.compiled[function.__name__] += 1
            self.inside = True
            result = function(*args, **kwargs)
            self.inside = False
            return result

        return call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        first = out[0] if isinstance(out, (tuple, list)) and out else out
        if out is None:  # an op that writes to its first argument
            first = args[0]
        on_gpu = isinstance(first, torch.Tensor) and first.is_cuda
        launches = function._schema.is_mutable or not is_view(function)
        if on_gpu and not self.inside and launches:
            self.calls[str(function)] += 1
        return out


def with_room(p, rows):
    """A gradient as backward leaves it, with rows of zeros behind."""
    return torch.empty(len(p) + rows, *p.shape[1:], dtype=p.dtype, device=p.device)[: len(p)]


def main():
    pretend_to_pytorch()
    pretend_to_triton()
    keep_off_the_gpu()
    machine.leave_products_unpadded()  # as the trainer does
    watch_kernels()
    watch_bytes()
    inductor.compile_threads = 1  # in this process
    inductor.fx_graph_cache = False
    inductor.use_static_triton_launcher = False
    torch._functorch.config.enable_autograd_cache = False
    compile_fx.compile_fx = functools.partial(compile_fx.compile_fx, inner_compile=compile_graph)

    config = tg.configure(**load_track("gpt2-small"))
    n_stages = len(set(tg.stages_of(config).values()))
    torch._dynamo.config.recompile_limit = 2 * n_stages + 16  # as the trainer does
    what = sys.argv[2]
    found["traces_only"] = what == "stages"
    FakeTensorMode.avoid_device_init = True  # what torch.tensor() makes comes from the CPU
    ops = on_fake_cuda.ops_of_hopper(fp8=True)
    if what.startswith("step-"):
        _, rank, _, size = what.split("-")
        rank, size = int(rank), int(size)
        touched = on_fake_cuda.touched(size) if size > 1 else ()  # with numbers, unlike the rest
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = gpt.Model(config.model, 50257, config.data.val_row_len, torch.bfloat16, ops)
        model.knows_tokens = True
        forward = torch.compile(model, fullgraph=True, dynamic=False)  # as the trainer does
        if what == "stages":
            go_through_stages(config, model, forward)
        elif what == "validation":
            validate(config, model, forward, config.schedule.steps)
        elif what.startswith("step-"):
            work = functools.partial(update, config, model, touched=touched)
            on_fake_cuda.on_rank(rank, size, work)
        else:
            train(config, model, forward, int(what))
    found["timed"] = list(found["timed"].values())
    found["targets"] = sorted(found["targets"])
    found["graph_breaks"] = sum(counters["graph_break"].values())
    print(json.dumps(found))


if __name__ == "__main__":
    main()
