"""Adam with a moment a row against float64, and rows that get no gradient."""

import pytest
import torch
from kernel_checks import DEVICE, draw
from optim_helpers import KINDS, accumulate, cautious, single, start_at

from optim import RowAdam, adam_update, row_update
from optim.masters import join


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps, shrink", [(1e-10, 0.0), (1e-10, 0.01), (1e-2, 0.01)])
def test_row_moments_are_float64s(kind, eps, shrink):
    """A row's step is its gradient over the root of the average of its mean square."""
    R = 40
    C = 24
    beta = 0.9
    p, companion = start_at(kind, draw(R, C))
    w = join(p, companion).double()
    v = torch.zeros(R, 1, device=DEVICE)
    mean_square = 0
    for t in range(1, 101):
        lr = 0.01 * (1 - t / 125)
        grad = draw(R, C, seed=t, scale=10.0 ** (t % 5 - 3)).to(p.dtype)
        row_update(p, companion, grad, v, lr, beta, eps, 1 - beta**t, shrink or None)
        g = grad.double()
        mean_square = beta * mean_square + (1 - beta) * (g * g).mean(1, keepdim=True)
        step = lr * g / ((mean_square / (1 - beta**t)).sqrt() + eps)
        w = cautious(w, step, shrink)
    torch.testing.assert_close(join(p, companion).double(), w, atol=2e-5, rtol=0)
    torch.testing.assert_close(v.double(), mean_square, atol=0, rtol=1e-5)


@pytest.mark.parametrize("every", [1, 2])
def test_the_rule_is_float64s(every):
    """With its learning rate, beta and eps, its own count of steps, and cautious decay."""
    start = draw(2, 6, 5, seed=1).cpu()
    rule = RowAdam(0.05, beta2=0.9, eps=0.01, weight_decay=20.0, every=every)
    model, optimizer = single(rule, start)
    w = start.double().view(12, 5)
    v = 0
    waiting = 0
    for step in range(1, 9):
        grad = draw(2, 6, 5, seed=10 + step).cpu()
        accumulate(model, {"w": grad})
        optimizer.step(1 - step / 10, 0.9)
        waiting = waiting + grad.double().view(12, 5)
        if step % every == 0:
            lr = 0.05 * (1 - step / 10)
            v = 0.9 * v + 0.1 * waiting.square().mean(1, keepdim=True)
            update = lr * waiting / ((v / (1 - 0.9 ** (step // every))).sqrt() + 0.01)
            w = cautious(w, update, lr**2 * 20)
            waiting = 0
    torch.testing.assert_close(model.w.detach().double().view(12, 5), w, atol=1e-5, rtol=0)
    assert optimizer.state["w"]["v"].shape == (12, 1)
    assert rule.state_bytes(model.w) == optimizer.state["w"]["v"].nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_gradient_keep_every_bit(kind):
    """However often and late they had one: there is no momentum. Adam's flat tensors go on
    moving."""
    p, companion = start_at(kind, draw(30, 8))
    v = torch.zeros(30, 1, device=DEVICE)
    used = torch.arange(30, device=DEVICE) % 3 == 0
    for t in range(1, 6):
        before = join(p, companion).clone()
        grad = draw(30, 8, seed=t).to(p.dtype)
        if t > 1:
            grad *= used[:, None]
        row_update(p, companion, grad, v, 0.1, 0.9, 1e-10, 1 - 0.9**t, 0.1)
        same = (join(p, companion) == before).all(1)
        assert same.tolist() == ((~used).tolist() if t > 1 else [False] * 30)
    assert (v > 0).all()


@pytest.mark.parametrize("rows", [0, 5])
def test_no_rows_and_one_column(rows):
    """A rank may have no row of a table. One column is Adam without momentum."""
    grad = draw(rows, 1, seed=1)
    p = draw(rows, 1)
    row_update(p, None, grad, torch.zeros(rows, 1, device=DEVICE), 0.1, 0.9, 1e-10, 0.1)
    flat = draw(rows, 1).view(-1)
    moments = torch.zeros(2, rows, device=DEVICE)
    adam_update(flat, None, grad.view(-1), *moments, 0.1, 0.0, 0.9, 1e-10, 1.0, 0.1)
    torch.testing.assert_close(p.view(-1), flat)
