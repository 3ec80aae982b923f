"""What the tests of optim/ share: weights of every kind, toy parameters with a rule each."""

import dataclasses

import torch
from kernel_checks import DEVICE
from torch import nn

from optim import Adam, LoRA, Muon, Optimizer, RowAdam
from optim.masters import join
from runtime.machine import World

# --- One tensor and its companion

KINDS = ["fp32", "bf16 and 16 bits", "bf16 and a whole master"]
BAD = [float("nan"), float("inf"), -float("inf")]


def start_at(kind, start):
    """(p, companion) of weights that start at these fp32 numbers, rounded to bf16 if they are
    bf16."""
    if kind == "fp32":
        return start.clone(), None
    p = start.bfloat16()
    if kind == KINDS[1]:
        return p, torch.zeros_like(p, dtype=torch.int16)
    return p, p.float()


def bits(x):
    """As integers: equal only where every bit is."""
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def flag(value):
    return torch.tensor(value, device=DEVICE)


def cautious(w, step, shrink):
    """w after a step with cautious decay, in float64: written twice, here and in descend."""
    return w - step - shrink * w * (step * w > 0)


# --- Toy parameters

# Odd sizes, so that no world size but 1 divides them all
SHAPES = dict(
    scalars=(5,),
    gates=(3, 1),
    embed=(13, 7),
    head=(9, 11),
    tables=(3, 5, 4),
    tall=(5, 12, 4),
    wide=(3, 4, 10),
    one=(1, 6, 6),
    pairs=(7, 8, 5),
    low=(5, 6, 4),
)
RULES = dict(
    scalars=Adam(0.04, betas=(0.9, 0.99), eps=0.1, sharded=False),
    gates=Adam(0.02, betas=(0.9, 0.99)),
    embed=Adam(0.05, betas=(0.75, 0.95)),
    head=Adam(0.01, betas=(0.5, 0.9), weight_decay=300),
    tables=RowAdam(0.03, beta2=0.9, weight_decay=20),
    tall=Muon(0.05, weight_decay=10),
    wide=Muon(0.03),
    one=Muon(0.02, weight_decay=40),
    pairs=Muon(
        0.02,
        weight_decay=30,
        factors=(1.0, 2.5),
        decay_by_shape=True,
        paired=(True, False, True),
        heads=4,
    ),
    low=LoRA(0.02, rank=2),
)
ADAMS = {name for name, rule in RULES.items() if not isinstance(rule, Muon)}


def rules(every=1, normuon=False):
    """RULES with Adam at each so many steps, or with NorMuon."""
    changed = {}
    for name, rule in RULES.items():
        if name in ADAMS:
            changed[name] = dataclasses.replace(rule, every=every)
        else:
            changed[name] = dataclasses.replace(rule, normuon=normuon)
    return changed


class Parameters(nn.Module):
    """Named parameters with random weights and nothing else."""

    def __init__(self, shapes=SHAPES, dtype=torch.float32, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=g).to(dtype)))


def optimizer_of(model, rules=RULES, world=None, **options):
    """Its Optimizer, alone on the CPU unless a World is given."""
    return Optimizer(model, rules, world or World(), **options)


def single(rule, start, dtype=torch.float32):
    """A model of one parameter `w` with the given start, and its optimizer."""
    model = nn.Module()
    model.w = nn.Parameter(start.to(dtype, copy=True))
    return model, optimizer_of(model, {"w": rule})


def gradients(seed, shapes=SHAPES):
    """Multiples of 1/8 up to 1, so that sums over ranks are exact in every dtype and order."""
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randint(-8, 9, shape, generator=g) / 8 for name, shape in shapes.items()}


def summed(parts):
    """Gradients of several, added up."""
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def give(model, grads):
    """Set the gradients."""
    for name, p in model.named_parameters():
        p.grad = grads[name].to(p.dtype, copy=True)


def accumulate(model, grads):
    """Add to the gradients that are there, as backward does."""
    for name, p in model.named_parameters():
        grad = grads[name].to(p.dtype, copy=True)
        p.grad = grad if p.grad is None else p.grad + grad


def train(optimizer, model, steps, seed=0):
    for k in range(steps):
        give(model, gradients(seed + k))
        optimizer.step(1 - 0.1 * k, 0.85 + 0.02 * k)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def master_of(optimizer, name):
    """The fp32 master of the rows that this rank owns."""
    return join(optimizer.shards[name].own, optimizer.state[name]["companion"])


def assert_equal(a, b):
    """Dicts of tensors, bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
