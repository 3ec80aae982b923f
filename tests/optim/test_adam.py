"""Adam against float64, PyTorch's and its own definition; the rule's learning rate, decay and
count of steps."""

import pytest
import torch
from kernel_checks import DEVICE, draw
from optim_helpers import (
    KINDS,
    RULES,
    SHAPES,
    Parameters,
    cautious,
    give,
    gradients,
    optimizer_of,
    single,
    start_at,
    weights,
)

from optim import Adam, adam_update
from optim.masters import join


def adam_reference(w, grads, lrs, betas, eps, shrink):
    """In float64, from the papers."""
    w = w.double()
    m = 0
    v = 0
    for t, (g, lr) in enumerate(zip(grads, lrs), start=1):
        g = g.double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        step = lr * m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        w = cautious(w, step, shrink)
    return w


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "betas, eps, shrink",
    [((0.9, 0.99), 1e-8, 0.0), ((0.75, 0.95), 1e-10, 0.01), ((0.0, 0.9), 1e-2, 0.0)],
)
def test_adam_is_float64s_adam(kind, betas, eps, shrink):
    """200 steps with changing learning rates and gradients of very different size."""
    p, companion = start_at(kind, draw(300))
    grads = [draw(300, seed=i, scale=10.0 ** (i % 5 - 3)).to(p.dtype) for i in range(200)]
    lrs = [0.01 * (1 - i / 250) for i in range(200)]
    expected = adam_reference(join(p, companion), grads, lrs, betas, eps, shrink)
    m, v = torch.zeros(2, 300, device=DEVICE)
    for t, (grad, lr) in enumerate(zip(grads, lrs), start=1):
        corrections = [1 - beta**t for beta in betas]
        adam_update(p, companion, grad, m, v, lr, *betas, eps, *corrections, shrink or None)
    torch.testing.assert_close(join(p, companion).double(), expected, atol=2e-5, rtol=0)
    assert torch.equal(p, join(p, companion).to(p.dtype))


def test_the_rule_is_torchs_adam():
    """20 steps with changing learning rates and very different gradient sizes, to 1e-6."""
    shapes = {}
    for name, rule in RULES.items():
        if isinstance(rule, Adam) and not rule.weight_decay:
            shapes[name] = SHAPES[name]
    model = Parameters(shapes)
    reference = Parameters(shapes)
    optimizer = optimizer_of(model, {name: RULES[name] for name in shapes})
    groups = []
    for name, p in reference.named_parameters():
        groups.append(dict(params=[p], betas=RULES[name].betas, eps=RULES[name].eps))
    torchs = torch.optim.Adam(groups)
    for step in range(20):
        scale = 1 - step / 25
        size = 10.0 ** (step % 5 - 2)
        grads = {name: g * size for name, g in gradients(step, shapes).items()}
        give(model, grads)
        give(reference, grads)
        optimizer.step(scale, 0.9)
        for name, group in zip(shapes, torchs.param_groups):
            group["lr"] = RULES[name].lr * scale
        torchs.step()
        expected = weights(reference)
        for name, w in weights(model).items():
            torch.testing.assert_close(w, expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e5])
def test_the_first_step_is_the_learning_rate(size):
    """Whatever the gradient's size: lr times its sign. No gradient, no step."""
    model, optimizer = single(Adam(0.1, betas=(0.9, 0.99)), torch.zeros(3))
    model.w.grad = torch.tensor([size, -size, 0.0])
    optimizer.step(0.5, 0.9)
    expected = torch.tensor([-0.05, 0.05, 0.0])
    torch.testing.assert_close(model.w.detach(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("lr_scale", [1.0, 0.5])
def test_decay_is_cautious_and_times_the_squared_learning_rate(lr_scale):
    """A weight shrinks by lr^2 decay where its step goes towards zero as well, and else not at
    all."""
    start = torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0])
    grad = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0])
    model, optimizer = single(Adam(0.1, betas=(0.0, 0.0), weight_decay=4.0), start)
    model.w.grad = grad.clone()
    optimizer.step(lr_scale, 0.9)
    lr = 0.1 * lr_scale
    shrunk = 4 * lr**2 * torch.tensor([2.0, 0, 0, -2, 0])
    torch.testing.assert_close(model.w.detach(), start - lr * grad - shrunk)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, 5])
def test_gradients_keep_their_values_and_empty_shards_are_no_problem(kind, n):
    p, companion = start_at(kind, draw(n))
    grad = draw(n, seed=1).to(p.dtype)
    before = grad.clone()
    moments = torch.zeros(2, n, device=DEVICE)
    adam_update(p, companion, grad, *moments, 0.1, 0.9, 0.99, 1e-8, 0.1, 0.01)
    assert torch.equal(grad, before)


def test_an_average_for_each_element():
    model, optimizer = single(Adam(0.1), torch.zeros(3, 4), torch.bfloat16)
    state = optimizer.state["w"]
    assert state["m"].shape == state["v"].shape == (12,)
    assert state["m"].dtype == state["v"].dtype == torch.float32
    assert state["m"].data_ptr() != state["v"].data_ptr()
    assert Adam(0.1).state_bytes(model.w) == state["m"].nbytes + state["v"].nbytes
