"""gpt2-small's model and optimizer at their full shape on CUDA tensors that hold no numbers, by the
kernels that an H100 gets: python on_fake_cuda.py LIBRARY, of fake_cuda.cpp. Prints JSON: for each
stage the ops that its forward and backward call on the GPU, with how often, and what its steps
call, alone and on ranks of eight with collectives that write themselves down."""

import ctypes
import sys

ctypes.CDLL(sys.argv[1])  # before PyTorch, which asks for it once

import collections  # noqa: E402
import functools  # noqa: E402
import json  # noqa: E402

import fake_ranks  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import train_gpt as tg  # noqa: E402
from data.loader import default_max_docs, pack  # noqa: E402
from kernels import choose_ops  # noqa: E402
from kernels.attention import attention  # noqa: E402
from kernels.op import OPS  # noqa: E402
from kernels.polar_express import polar_express_by_kernels  # noqa: E402
from models import gpt  # noqa: E402
from optim import Optimizer  # noqa: E402
from optim.masters import join  # noqa: E402
from optim.touched import Touched  # noqa: E402
from runtime.machine import World  # noqa: E402
from tracks import load_track  # noqa: E402

ROWS = 128  # of a table that each rank sends, as many to each owner
RANKS = (0, 1), (0, 8), (7, 8)  # (which, of how many); the last one's part of a bank is shorter


class Calls(TorchDispatchMode):
    """Ops of ours by name, and those of PyTorch whose results are not where the model is."""

    def __init__(self):
        super().__init__()
        self.ours = collections.Counter()
        self.elsewhere = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = str(function)
        if name.startswith("stopwatch."):
            self.ours[name.split(".")[1]] += 1
        if isinstance(out, torch.Tensor) and out.device.type != "cuda" and out.numel() > 64:
            self.elsewhere.add(name)
        return out


def ops_of_hopper(fp8=False):
    """As choose_ops() gives them on an H100 in bf16, but for the probes, which need one."""
    taken = {op.name for op in OPS.values() if 90 in op.faster_on}
    ops = choose_ops("cpu", kernels=("reference",))
    functions = {name: OPS[name].triton for name in taken}
    ops = ops.replace(**functions, attention=functools.partial(attention, backend="flash_attn_4"))
    ops.forms |= dict.fromkeys(taken, "triton")
    ops = ops.replace(polar_express=polar_express_by_kernels)
    if not fp8:
        mlp = ops.relu2_mlp
        return ops.replace(new_mlp=lambda: mlp)
    ops.forms |= dict(relu2_mlp="fp8", linear_cross_entropy="fp8")
    return ops.replace(
        new_mlp=OPS["relu2_mlp"].new_fp8,
        linear_cross_entropy=OPS["linear_cross_entropy"].new_fp8(),
    )


def batch(rows, row_len, max_doc_len):
    micro = pack([None] * rows, row_len, default_max_docs(row_len), max_doc_len)
    return [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in micro]


def touched(n):
    """{table: the Touched of one of n ranks}: they hold numbers, as what the host knows does."""
    each = ROWS // n
    mine = torch.arange(ROWS)
    found = Touched(mine, [each] * n, torch.arange(each).repeat(n), [each] * n)
    return dict(ngram_embeds=found, value_embeds=found)


def trained(config, world, rows=()):
    """A step of each stage behind its forward and backward: [dict(step, ours, elsewhere,
    exchanged)], of two steps where updates wait for a second one; rows: of touched()."""
    with torch.device("cuda"):
        model = gpt.Model(config.model, 50257, config.data.row_len, torch.bfloat16, ops_of_hopper())
    model.knows_tokens = True
    optimizer = Optimizer(model, model.update_rules(config.optim), world, skips=True)
    model.grad_rooms = optimizer.padding_rows()
    stages = tg.stages_of(config)
    found = []
    before = None
    for step, stage in stages.items():
        if before == stage:
            continue
        if before is not None:
            optimizer.copy(model.successors(before.model, stage.model))
        before = stage
        ours = collections.Counter()
        elsewhere = set()
        fake_ranks.tape = fake_ranks.Tape()
        for _ in range(2):
            weights = config.model.target_weights(config.schedule.progress(step))
            if weights is not None:
                weights = torch.empty(len(weights), device="cuda")
            inputs = batch(1, config.data.row_len, stage.model.max_doc_len)
            model(*inputs, stage=stage.model, target_weights=weights).backward()
            with Calls() as calls:
                parts = optimizer.gradients(0.9, rows)
                ok = torch.stack([p.sum() for p in parts.values() if p is not None]).isfinite()
                optimizer.step(1.0, 0.9, ok.all())
            ours += calls.ours
            elsewhere |= calls.elsewhere
        assert optimizer.is_settled()
        for name, state in optimizer.state.items():
            own = optimizer.shards[name].own
            assert join(own, state["companion"]).dtype == torch.float32
            for x in (own, *state.values()):
                assert x is None or x.device.type == "cuda", name
        exchanged = collections.Counter()
        for call in fake_ranks.tape.calls:
            exchanged[call.kind] += call.bytes
        found.append(dict(step=step, ours=ours, elsewhere=sorted(elsewhere)))
        found[-1]["exchanged"] = exchanged
    return found


def on_rank(rank, size, f):
    """f(World) as one of so many, whose collectives write themselves down."""
    device = torch.device("cuda")
    if size == 1:
        return f(World(device=device))
    fake_ranks.tape = fake_ranks.Tape()
    dist.init_process_group("fake_ranks", rank=rank, world_size=size, store=dist.HashStore())
    try:
        return f(World(rank, size, device, size))
    finally:
        dist.destroy_process_group()


def main():
    config = tg.configure(**load_track("gpt2-small"))
    row_len, val_row_len = config.data.row_len, config.data.val_row_len
    found = []
    before = None  # the stage of the step before
    rows = {n: touched(n) if n > 1 else () for _, n in RANKS}
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = gpt.Model(config.model, 50257, val_row_len, torch.bfloat16, ops_of_hopper())
        model.knows_tokens = True  # where they begin; fake as all else
        for step, stage in tg.stages_of(config).items():
            if stage == before:
                continue
            before = stage
            weights = config.model.target_weights(config.schedule.progress(step))
            if weights is not None:
                weights = torch.empty(len(weights), device="cuda")
            inputs = batch(1, row_len, stage.model.max_doc_len)
            with Calls() as calls:
                loss = model(*inputs, stage=stage.model, target_weights=weights)
                loss.backward()
            assert loss.device.type == "cuda" and loss.dtype == torch.float32
            for name, p in model.named_parameters():
                assert p.grad is None or p.grad.shape == p.shape, name
                assert p.grad is None or p.grad.device.type == "cuda", name
            without = [name for name, p in model.named_parameters() if p.grad is None and p.numel()]
            model.zero_grad()
            found.append(dict(step=step, ours=calls.ours, without=without))
            found[-1]["elsewhere"] = sorted(calls.elsewhere)
        last = config.model.val_stage(before.model, val_row_len)
        inputs = batch(1, val_row_len, val_row_len)
        with torch.no_grad(), Calls() as calls:
            total = model(*inputs, last)
        assert total.device.type == "cuda"
        found.append(dict(step="validation", ours=calls.ours, elsewhere=sorted(calls.elsewhere)))
        del model
        steps = {}
        for rank, n in RANKS:
            work = functools.partial(trained, config, rows=rows[n])
            steps[f"{rank} of {n}"] = on_rank(rank, n, work)
    print(json.dumps(dict(passes=found, steps=steps, rows=ROWS)))


if __name__ == "__main__":
    main()
