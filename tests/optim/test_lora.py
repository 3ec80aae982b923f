"""LoRA as an update rule: the same as autograd through W0 + s up down, on any number of ranks."""

import dataclasses

import pytest
import torch
from optim_helpers import optimizer_of
from torch import nn

from models import gpt, llama
from optim import LoRA, Muon, OptimConfig, rules_of
from optim.lora import Still
from optim.rule import Turn
from optim.tensors import gather, load

RULE = LoRA(0.02, rank=3, scale=2.0)


class Bank(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.bank = nn.Parameter(torch.randn(4, 6, 5, generator=g).to(dtype))
        self.table = nn.Parameter(torch.randn(7, 5, generator=g).to(dtype))


def rules(model, rule=RULE):
    return dict(table=Still(0.0), bank=rule)


def target(x, bank):
    """A loss whose gradient depends on the weights; x: (4, 5)."""
    return torch.tanh(torch.einsum("nrc,nc->nr", bank, x)).square().sum()


def inputs(k):
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(k))


def test_it_moves_as_autograd_and_adam_have_it():
    model = Bank()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizer_of(model, rules(model))
    down = optimizer.fixed["bank"]["down"].double().requires_grad_()
    up = torch.zeros(4, 6, 3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([up, down], lr=0.02, betas=RULE.betas, eps=RULE.eps)
    for k in range(30):
        loss = target(inputs(k), model.bank) + model.table.square().sum()
        loss.backward()
        optimizer.step(1.0, 0.9)
        adam.zero_grad()
        merged = before["bank"].double() + 2.0 * up @ down
        target(inputs(k).double(), merged).backward()
        adam.step()
    merged = before["bank"].double() + 2.0 * up @ down
    assert (merged - before["bank"]).abs().max() > 0.3
    torch.testing.assert_close(model.bank.double(), merged, atol=2e-5, rtol=0)
    assert torch.equal(model.table, before["table"])  # stays, whatever its gradient
    for matrix in (model.bank.detach() - before["bank"]).double():
        singular = torch.linalg.svdvals(matrix)
        assert singular[2] > 1e-3 and singular[3] < 1e-5  # of rank 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_that_was_gathered_and_loaded_goes_on_bit_for_bit(dtype):
    def steps(model, optimizer, numbers):
        for k in numbers:
            target(inputs(k).to(dtype), model.bank).backward()
            optimizer.step(1 - 0.1 * k, 0.9)

    model, other = Bank(dtype), Bank(dtype)
    optimizer, continued = optimizer_of(model, rules(model)), optimizer_of(other, rules(other))
    steps(model, optimizer, range(3))
    tensors = gather(optimizer)
    steps(other, continued, [9])
    load(continued, lambda name, like: tensors[name].view(like.shape).to(like), 3)
    steps(model, optimizer, range(3, 5))
    steps(other, continued, range(3, 5))
    assert torch.equal(model.bank, other.bank)


def test_a_rank_begins_its_own_matrices_as_one_alone_does():
    bank = torch.zeros(5, 6, 5)
    whole = RULE.fixed(bank, 0)["down"]
    assert torch.equal(RULE.fixed(bank[3:], 3)["down"], whole[3:])
    assert RULE.fixed(bank[:0], 5)["down"].shape == (0, 3, 5)
    assert len({x.sum().item() for x in whole}) == 5


def test_a_step_that_does_not_count_changes_nothing():
    model = Bank()
    optimizer = optimizer_of(model, rules(model), skips=True)
    target(inputs(0), model.bank).backward()
    optimizer.step(1.0, 0.9)
    state = optimizer.state["bank"]
    kept = [x.clone() for x in (model.bank.detach(), *state.values()) if x is not None]
    shard = optimizer.shards["bank"].own
    turn = Turn(1.0, 0.9, 2, torch.tensor(False), float, lambda f: f, optimizer.fixed["bank"])
    RULE.update(shard, None, torch.full_like(shard, float("nan")), state, turn)
    now = [x for x in (model.bank.detach(), *state.values()) if x is not None]
    assert all(map(torch.equal, kept, now))


TEMPLATES = dict(
    gpt=(gpt, gpt.Config(n_layer=2, n_embd=32, n_head=2, mlp_ratio=2, value_embed_layers=(0,))),
    llama=(llama, llama.Config(n_layer=2, n_embd=32, n_head=2, head_dim=16, ffn_dim=64)),
)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_blocks_matrices_move_and_nothing_else(name, optimizer):
    template, config = TEMPLATES[name]
    model = template.Model(config, 65, 32)
    optim = OptimConfig(optimizer=optimizer, lora_rank=4)
    rules = rules_of(model, optim)
    assert list(rules) == list(model.update_rules(optim))
    moving = {name for name, rule in rules.items() if isinstance(rule, LoRA)}
    banks = {
        "gpt": {"attn_bank", "mlp_bank"},
        "llama": {"q_bank", "kv_bank", "o_bank", "mlp_bank"},
    }
    assert banks[name] <= moving and not moving & {"embed", "lm_head", "value_embeds"}
    assert all(isinstance(rule, Still) for name, rule in rules.items() if name not in moving)
    rest = rules_of(model, dataclasses.replace(optim, lora_rest=True))
    assert not any(isinstance(rule, Still) for rule in rest.values())
    plain = rules_of(model, OptimConfig(optimizer=optimizer))
    assert any(isinstance(rule, Muon) for rule in plain.values()) == (optimizer == "muon")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_merged_weights_say_what_the_products_beside_the_first_ones_say(name):
    """To 1e-5 in the logits, after ten steps that were added up in the weights."""
    template, config = TEMPLATES[name]
    model = template.Model(config, 65, 32)
    model.init_weights(0)
    with torch.no_grad():
        for p in model.parameters():
            if not p.count_nonzero():
                p.normal_(std=0.1)
    first = {n: p.detach().clone() for n, p in model.named_parameters()}
    rules = rules_of(model, OptimConfig(lora_rank=4, lora_lr=0.02))
    optimizer = optimizer_of(model, rules)
    ids = torch.randint(65, (2, 33), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, 32, 64], dtype=torch.int32)
    stage = config.val_stage(config.stage(0.0, 32), 32)
    for _ in range(10):
        loss = model(ids[:, :-1], ids[:, 1:], cu_seqlens, stage)
        loss.backward()
        optimizer.step(1.0, 0.9)
    merged = model.logits(ids[:, :-1], cu_seqlens, stage)

    # The first weights and the products, added at once
    banks = {n for n, rule in rules.items() if isinstance(rule, LoRA)}
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(first[n])
            if n in banks and p.numel():
                fixed, state = optimizer.fixed[n], optimizer.state[n]
                product = state["up"] @ (fixed["down"] + state["down"])
                p.add_(16 / 4 * product.view(p.shape))  # alpha over the rank
    again = model.logits(ids[:, :-1], cu_seqlens, stage)
    assert (again - merged).abs().max() < 1e-5
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(first[n])
    before = model.logits(ids[:, :-1], cu_seqlens, stage)
    assert (before - merged).abs().max() > 0.1
