"""AdamW against PyTorch's, what it leaves out of the decay, and clipping against PyTorch's and over
ranks."""

import math

import pytest
import torch
from helpers import model_config
from optim_helpers import (
    KINDS,
    Parameters,
    give,
    gradients,
    optimizer_of,
    single,
    start_at,
    weights,
)

from kernels import choose_ops
from models import gpt, llama
from optim import AdamW, OptimConfig, adamw_update
from optim.masters import join

SHAPES = dict(norms=(5,), embed=(13, 7), bank=(3, 4, 10))
RULES = dict(
    norms=AdamW(0.02, sharded=False),
    embed=AdamW(0.02, weight_decay=0.3),
    bank=AdamW(0.02, weight_decay=0.3),
)


@pytest.mark.parametrize("clip", [0.0, 3.0])
def test_it_is_torchs_adamw(clip):
    """20 steps with changing learning rates and gradients of very different length."""
    model = Parameters(SHAPES)
    reference = Parameters(SHAPES)
    optimizer = optimizer_of(model, RULES, clip=clip)
    groups = []
    for name, p in reference.named_parameters():
        groups.append(dict(params=[p], weight_decay=RULES[name].weight_decay))
    torchs = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    shortened = 0
    for step in range(20):
        size = 10.0 ** (step % 3 - 2)
        grads = {name: g * size for name, g in gradients(step, SHAPES).items()}
        give(model, grads)
        give(reference, grads)
        optimizer.step(1 - step / 25, 0.9)
        if clip:
            length = torch.nn.utils.clip_grad_norm_(reference.parameters(), clip)
            shortened += bool(length > clip)
        for group in torchs.param_groups:
            group["lr"] = 0.02 * (1 - step / 25)
        torchs.step()
    assert not clip or 0 < shortened < 20
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, reference.get_parameter(name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_masters_are_exact(kind):
    """100 steps of weights in bf16 end where those in fp32 do, but for the gradient's rounding."""
    start = torch.randn(300, generator=torch.Generator().manual_seed(0))
    p, companion = start_at(kind, start)
    expected = join(p, companion).clone()
    state = torch.zeros(4, 300)
    for t in range(1, 101):
        grad = torch.randn(300, generator=torch.Generator().manual_seed(t)).bfloat16()
        hyperparameters = 0.01, 0.9, 0.95, 1e-8, 1 - 0.9**t, 1 - 0.95**t, 1 - 0.01 * 0.1
        adamw_update(p, companion, grad, state[0], state[1], *hyperparameters)
        adamw_update(expected, None, grad, state[2], state[3], *hyperparameters)
    assert torch.equal(join(p, companion), expected)


def test_a_step_that_does_not_count_changes_nothing():
    model, optimizer = single(AdamW(0.1, weight_decay=0.5), torch.ones(8))
    model.w.grad = torch.full((8,), math.nan)
    state = optimizer.state["w"]
    rule = optimizer.rules["w"]
    before = weights(model)
    adamw_update(
        model.w.data, None, model.w.grad, state["m"], state["v"], 0.1, 0.9, 0.95, 1e-8, 0.1, 0.05,
        1 - 0.1 * rule.weight_decay, ok=torch.tensor(False),
    )  # fmt: skip
    assert torch.equal(model.w, before["w"])
    assert not state["m"].any() and not state["v"].any()


def test_no_gradient_at_all_is_not_divided_by():
    model, optimizer = single(AdamW(0.1), torch.ones(8))
    optimizer.clip = 1.0
    model.w.grad = torch.zeros(8)
    optimizer.step(1.0, 0.9)
    assert torch.equal(model.w, torch.ones(8))


@pytest.mark.parametrize("template", [gpt, llama])
def test_the_switch_is_for_every_parameter_and_norms_do_not_decay(template):
    optim = OptimConfig(optimizer="adamw", adamw_lr=2e-4, adamw_decay=0.2, adamw_clip=0.5)
    c = model_config() if template is gpt else llama.Config(qk_norm=True)
    with torch.device("meta"):
        model = template.Model(c, 257, 1, torch.bfloat16, choose_ops("cpu"))
    rules = model.update_rules(optim)
    assert rules.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert type(rules[name]) is AdamW and rules[name].lr == 2e-4
        small = p.dtype == torch.float32
        assert rules[name].weight_decay == (0 if small else 0.2), name
    assert optim.clip == 0.5
    assert OptimConfig(adamw_clip=0.5).clip == 0.0
