"""The 1B on 8 GPUs that are not there: a fake process group and fake tensors say what a rank keeps
and what it exchanges, beside what the plan says."""

import collections

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import choose_ops
from models import load_template
from optim import Optimizer
from plan import estimate, published
from runtime import memory
from runtime.collectives import collectives_of, parameters_of
from runtime.machine import World

RANKS = 8
KINDS = dict(_reduce_scatter_base_="reduce_scatter", _allgather_base_="all_gather")


class Exchanged(TorchDispatchMode):
    """What is handed to the process group: {(kind, bytes of the whole): times}."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name.split("::")[1]
            kind = KINDS.get(name, "all_reduce")
            tensors = args[:2] if kind != "all_reduce" else args[0]
            self.found[kind, max(x.nbytes for x in tensors)] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=[0, RANKS - 1])
def rank(request):
    dist.init_process_group("fake", rank=request.param, world_size=RANKS, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def test_a_step_of_the_1b_on_eight_ranks(rank):
    c = estimate.configured(published.MYLLM)
    place = estimate.place_of("8xh100")
    plan = estimate.make_plan(c, place, "27.54B", n_vocab=65536)
    assert plan["params"] == 1_055_231_744 and plan["fits"]

    with FakeTensorMode(allow_non_fake_inputs=True):
        template = load_template("llama")
        model = template.Model(c.model, 65536, 8192, torch.bfloat16, choose_ops("cpu"))
        rules = model.update_rules(c.optim)
        optimizer = Optimizer(model, rules, World(rank, RANKS, torch.device("cpu"), RANKS))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        with Exchanged() as exchanged:
            optimizer.step(1.0, 0.9)

    # What goes between ranks is what the plan counts, but for the guard's few bytes
    *expected, report = collectives_of(parameters_of(model, rules), RANKS, RANKS)
    assert exchanged.found == collections.Counter((x.kind, x.bytes) for x in expected)
    assert report.bytes < 1000

    # What a rank keeps: at most what the estimate says. That adds a copy of Muon's moments for
    # the products on the way, which is not kept; the last rank has 7 of 84 matrices, others 11
    kept = 0
    for state in optimizer.state.values():
        kept += sum(x.nbytes for x in state.values() if x is not None)
    allowed = memory.estimate(model, rules, 1, 8192, True, RANKS)["optimizer"]
    on_the_way = 4 * sum(p.numel() for name, p in model.named_parameters() if "bank" in name)
    assert kept <= allowed
    if rank == 0:
        assert kept > 0.95 * (allowed - on_the_way / RANKS)
