"""LoRA: matrices move by products of a low rank, and everything else stays or learns as before.

    W = W0 + s up down,   up: (rows, r), first 0;   down: (r, cols), first random;   s: alpha / r
    d loss / d up = s G down^T,   d loss / d down = s up^T G,   G = d loss / d W

As a rule of an update it needs nothing of a template: the weights of a run are the merged ones at
every step, which is what is validated, sampled and saved. A matrix's gradient is computed whole, so
a step takes as long as without; moments are those of up and down, which is little memory. up and
down move by Adam. Source: Hu et al., arXiv:2106.09685.
"""

import dataclasses
import typing

import torch

from .adam import adam_update
from .masters import choose, join, store
from .muon import Muon
from .rule import Rule


@dataclasses.dataclass(frozen=True)
class LoRA(Rule):
    """Low-rank products for the matrices of a bank (..., rows, cols), which ranks share out
    whole."""

    rank: int = 8
    scale: float = 2.0  # s
    betas: tuple = (0.9, 0.99)
    eps: float = 1e-10

    pieces: typing.ClassVar[tuple] = (adam_update,)

    def parts(self, whole):
        return whole.view(-1, *whole.shape[-2:])

    def new_state(self, own):
        n, rows, cols = own.shape
        state = {}
        # down is kept less what it was at first, so that all of the state begins at zero
        for name, shape in (("up", (n, rows, self.rank)), ("down", (n, self.rank, cols))):
            for kind in name, f"m_{name}", f"v_{name}":
                state[kind] = own.new_zeros(shape, dtype=torch.float32)
        return state

    def fixed(self, own, start):
        """down as it was at first: of each matrix by its number in the bank."""
        cols = own.size(-1)
        found = torch.empty(len(own), self.rank, cols)
        for i in range(len(own)):
            g = torch.Generator().manual_seed(start + i)
            found[i] = torch.randn(self.rank, cols, generator=g) * cols**-0.5
        return dict(down=found.to(own.device))

    def state_bytes(self, p):
        *_, rows, cols = p.shape
        return 16 * self.rank * (rows + cols) * p.numel() // max(1, rows * cols)

    def update(self, w, companion, grad, state, turn):
        g = grad.float()
        first = turn.fixed["down"]
        up, down = state["up"], first + state["down"]
        before = up @ down
        grads = dict(up=self.scale * (g @ down.mT), down=self.scale * (up.mT @ g))
        beta1, beta2 = self.betas
        corrections = [1 - beta**turn.count for beta in self.betas]
        lr = self.lr * turn.lr_scale
        hyperparameters = [*map(turn.scalar, (lr, beta1, beta2, self.eps, *corrections))]
        for name, of in grads.items():
            kinds = (state[name], None, of, state[f"m_{name}"], state[f"v_{name}"])
            flat = (x if x is None else x.view(-1) for x in kinds)
            turn.fast(adam_update)(*flat, *hyperparameters, ok=turn.ok)
        master = join(w, companion)
        moved = master + self.scale * (up @ (first + state["down"]) - before)
        store(w, companion, choose(turn.ok, moved, master))


@dataclasses.dataclass(frozen=True)
class Still(Rule):
    """A parameter that stays as it is."""

    def parts(self, whole):
        return whole.view(-1)

    def new_state(self, own):
        return {}

    def state_bytes(self, p):
        return 0

    def update(self, w, companion, grad, state, turn):
        pass


def rules_of(model, optim):
    """A template's update rules, {parameter: Rule}; with --lora-rank, LoRA's for what Muon would
    update, which are the matrices of the blocks."""
    rules = model.update_rules(optim)
    if not optim.lora_rank:
        return rules
    by_muon = model.update_rules(dataclasses.replace(optim, optimizer="muon"))
    lora = LoRA(optim.lora_lr, rank=optim.lora_rank, scale=optim.lora_alpha / optim.lora_rank)
    found = {}
    for name, rule in rules.items():
        if isinstance(by_muon[name], Muon):
            found[name] = lora
        else:
            found[name] = rule if optim.lora_rest else Still(0.0, every=rule.every)
    return found
