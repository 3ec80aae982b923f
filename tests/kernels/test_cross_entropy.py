"""kernels/cross_entropy.py against the formula in float64 and in the same dtype."""

import math

import pytest
import torch

from kernels import softcap_cross_entropy

RECORD = (23.0, 5.0, 7.5)
CAPS = [None, RECORD, (30.0, 0.0, 15.0)]


def formula(logits, targets, cap, ignore_index=-100):
    """Summed loss, in the dtype it is given."""
    z = logits
    if cap:
        a, b, c = cap
        z = a * torch.sigmoid((z + b) / c)
    counted = targets != ignore_index
    return -(z.log_softmax(1).gather(1, targets.where(counted, 0)[:, None])[:, 0] * counted).sum()


def loss_and_gradient(fn, logits, *args, **kwargs):
    logits = logits.detach().requires_grad_()
    loss = fn(logits, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def draw(N, V, dtype=torch.float32, size=5.0, seed=0):
    """Logits, and targets among which are 0 and V - 1 as far as N goes."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(V, (N,), generator=g)
    targets[:1], targets[1:2] = 0, V - 1
    return (torch.randn(N, V, generator=g) * size).to(dtype), targets


def check(logits, targets, cap, **kwargs):
    """Loss and gradient within twice the error of same-dtype eager, plus 1e-6 (of the loss, for the loss)."""
    loss, gradient = loss_and_gradient(softcap_cross_entropy, logits, targets, cap=cap, **kwargs)
    exact, exact_gradient = loss_and_gradient(formula, logits.double(), targets, cap, **kwargs)
    eager, eager_gradient = loss_and_gradient(formula, logits, targets, cap, **kwargs)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert gradient.dtype == logits.dtype and gradient.shape == logits.shape
    assert (loss - exact).abs() <= 2 * (eager - exact).abs() + 1e-6 * max(1, exact.abs().item())
    if logits.numel():
        allowed = 2 * (eager_gradient - exact_gradient).abs().max() + 1e-6
        assert (gradient - exact_gradient).abs().max() <= allowed
    return loss, gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", CAPS, ids=str)
@pytest.mark.parametrize("N, V", [(0, 41), (1, 41), (3, 41), (199, 41), (3, 1000), (199, 1000), (3, 50257)])
def test_loss_and_gradient(N, V, cap, dtype):
    check(*draw(N, V, dtype), cap)


@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_bf16_logits_are_only_rounded_once(cap):
    """From bf16 logits on, the loss is computed in fp32: 1e-6 of it, where bf16 would lose 1e-3."""
    logits, targets = draw(199, 1000, torch.bfloat16)
    exact = formula(logits.double(), targets, cap).item()
    assert softcap_cross_entropy(logits, targets, cap=cap).item() == pytest.approx(exact, rel=1e-6)


def test_a_case_by_hand():
    """Two classes with logits 0 and log 3, without a cap: probabilities 1/4 and 3/4."""
    logits = torch.tensor([[0.0, math.log(3)]] * 2)
    loss, gradient = loss_and_gradient(softcap_cross_entropy, logits, torch.tensor([0, 1]), cap=None)
    assert loss.item() == pytest.approx(math.log(4) + math.log(4 / 3))
    torch.testing.assert_close(gradient, torch.tensor([[-0.75, 0.75], [0.25, -0.25]]))


def test_the_cap_by_hand():
    """a sigmoid((z + b) / c): at z = -b it is a / 2, with slope a / 4c."""
    a, b, c = cap = 8.0, 3.0, 2.0
    logits = torch.tensor([[-b, c * math.log(3) - b]])  # a / 2 and 3 a / 4
    loss, gradient = loss_and_gradient(softcap_cross_entropy, logits, torch.tensor([0]), cap=cap)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(a / 4)))
    p = 1 / (1 + math.exp(a / 4))
    torch.testing.assert_close(gradient, torch.tensor([[(p - 1) * a / c / 4, (1 - p) * a / c * 3 / 16]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_ignored_targets_count_for_nothing(cap, dtype):
    logits, targets = draw(20, 41, dtype)
    targets[5:9] = -100
    loss, gradient = check(logits, targets, cap)
    assert not gradient[5:9].any() and gradient[4].any() and gradient[9].any()
    kept = targets != -100
    torch.testing.assert_close(loss, softcap_cross_entropy(logits[kept], targets[kept], cap=cap))


@pytest.mark.parametrize("cap", CAPS, ids=str)
@pytest.mark.parametrize("ignore_index", [-1, 0, 40])
def test_any_ignore_index(cap, ignore_index):
    logits, targets = draw(20, 41)
    targets[5:9] = ignore_index
    _, gradient = check(logits, targets, cap, ignore_index=ignore_index)
    assert not gradient[targets == ignore_index].any() and gradient[targets != ignore_index].any(1).all()


@pytest.mark.parametrize("cap", CAPS, ids=str)
@pytest.mark.parametrize("N", [0, 3])
def test_nothing_to_count_gives_zero(cap, N):
    """A rank with padding only: loss 0 and gradient 0, not 0 / 0."""
    logits, targets = draw(N, 41)
    loss, gradient = loss_and_gradient(softcap_cross_entropy, logits, targets.fill_(-100), cap=cap)
    assert loss.item() == 0 and torch.equal(gradient, torch.zeros(N, 41))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_enormous_logits(cap, dtype):
    """+-1e4: no inf, no NaN; the cap bounds the loss of a token by a + log V."""
    logits, targets = draw(6, 41, dtype)
    logits[0], logits[1] = 1e4, -1e4
    logits[2, :20], logits[2, 20:] = 1e4, -1e4
    logits[3, targets[3]] = 1e4  # certain, and right
    logits[4, targets[4]] = -1e4
    logits[5, (targets[5] + 1) % 41] = 1e4  # certain, and wrong
    loss, gradient = check(logits, targets, cap)
    assert loss.isfinite() and gradient.isfinite().all()
    if cap:
        assert loss.item() <= 6 * (cap[0] + math.log(41))
    else:
        assert loss.item() > 1e4


def test_strided_logits_and_targets():
    """Every other column of every third row, the transpose, and the first columns of a padded head."""
    whole, _ = draw(60, 90)
    targets = torch.arange(20) * 2
    for logits in (whole[::3, ::2], whole.T[:20:, :45], whole[:20, :41].T[:20, :], whole[:20, :45]):
        t = (targets % logits.size(1))[:len(logits)]
        strided = torch.stack([t, t], 1)[:, 0]
        assert not logits.is_contiguous() and not strided.is_contiguous()
        for cap in CAPS:
            loss, gradient = check(logits, strided, cap)
            other, other_gradient = check(logits.contiguous(), t, cap)
            torch.testing.assert_close(loss, other)
            torch.testing.assert_close(gradient, other_gradient)


@pytest.mark.parametrize("cap", CAPS, ids=str)
@pytest.mark.parametrize("factor", [2.0, -0.5, 0.0])
def test_upstream_gradient_is_honoured(cap, factor):
    logits, targets = draw(7, 41)
    gradient = loss_and_gradient(softcap_cross_entropy, logits, targets, cap=cap)[1]
    scaled = loss_and_gradient(lambda *x: softcap_cross_entropy(*x, cap=cap) * factor, logits, targets)[1]
    torch.testing.assert_close(scaled, gradient * factor)


@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_gradient_against_differences(cap):
    """Central differences of the float64 formula, which nothing of autograd enters."""
    logits, targets = draw(3, 11, size=3.0)
    targets[2] = -100
    gradient = loss_and_gradient(softcap_cross_entropy, logits, targets, cap=cap)[1]
    for i, j in ((0, 0), (0, 5), (1, 10), (1, 3), (2, 4)):
        step = torch.zeros(3, 11, dtype=torch.float64)
        step[i, j] = 1e-5
        more, less = (formula(logits.double() + s, targets, cap).item() for s in (step, -step))
        assert gradient[i, j].item() == pytest.approx((more - less) / 2e-5, abs=2e-6)


@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_sum_over_parts_is_the_sum(cap):
    """Summed, not averaged: chunks of the tokens add up."""
    logits, targets = draw(50, 41)
    parts = sum(softcap_cross_entropy(z, t, cap=cap) for z, t in zip(logits.split(7), targets.split(7)))
    torch.testing.assert_close(parts, softcap_cross_entropy(logits, targets, cap=cap))


def test_input_stays_as_it_was():
    logits, targets = draw(7, 41)
    copy = logits.clone()
    loss_and_gradient(softcap_cross_entropy, logits, targets, cap=RECORD)
    assert torch.equal(logits, copy)
