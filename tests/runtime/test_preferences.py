"""Losses over pairs of answers, against formulas in float64 and against trl."""

import decimal
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.preferences import PairLoss, TeachingConfig, log1mexp, pair_losses

F64 = torch.float64


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def numbers(K=5, seed=0):
    """(sums, lengths, reference) of K pairs."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (K, 2), generator=g).to(F64)
    sums = -lengths * torch.rand(K, 2, generator=g, dtype=F64)
    return sums, lengths, sums + torch.randn(K, 2, generator=g, dtype=F64)


def by_hand(kind, sums, lengths, reference, c):
    """The same, pair by pair in Python's floats."""
    losses = []
    rewards = [[c.beta * (a - r) for a, r in zip(x, y)] for x, y in zip(sums, reference)]
    flat = [r for pair in rewards for r in pair]
    z = max(0.0, sum(flat) / len(flat))
    for (lw, ll), (nw, nl), (rw, rl) in zip(sums, lengths, rewards):
        mw, ml = lw / nw, ll / nl
        if kind == "dpo":
            s = c.label_smoothing
            loss = -(1 - s) * math.log(sigmoid(rw - rl)) - s * math.log(sigmoid(rl - rw))
        elif kind == "kto":
            loss = 1 - sigmoid(rw - z) + 1 - sigmoid(z - rl)
        elif kind == "simpo":
            loss = -math.log(sigmoid(c.beta * (mw - ml) - c.gamma))
        else:
            odds = [m - math.log1p(-math.exp(m)) for m in (mw, ml)]
            loss = -mw - c.beta * math.log(sigmoid(odds[0] - odds[1]))
        losses.append(loss - c.sft_weight * mw)
    return losses


@pytest.mark.parametrize("kind", ["dpo", "kto", "simpo", "orpo"])
@pytest.mark.parametrize("beta, sft_weight", [(0.1, 0.0), (2.0, 0.3)])
def test_losses_are_the_formulas(kind, beta, sft_weight):
    c = TeachingConfig(preference=kind, beta=beta, label_smoothing=0.1, sft_weight=sft_weight)
    sums, lengths, reference = numbers()
    losses, _ = pair_losses(sums, lengths, reference, c)
    expected = by_hand(kind, sums.tolist(), lengths.tolist(), reference.tolist(), c)
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=F64))


@pytest.mark.parametrize("kind", ["dpo", "simpo", "orpo"])
@pytest.mark.parametrize("sft_weight", [0.0, 0.3])
def test_gradients_are_those_of_the_losses(kind, sft_weight):
    c = TeachingConfig(preference=kind, beta=0.7, sft_weight=sft_weight)
    sums, lengths, reference = numbers()

    def loss(sums):
        return pair_losses(sums, lengths, reference, c)[0]

    assert torch.autograd.gradcheck(loss, sums.requires_grad_())


def test_a_likelihood_beside_it_holds_the_chosen_answer_up():
    """It pulls at the chosen answer alone, by the inverse of its length, and changes no reward."""
    sums, lengths, reference = numbers()
    gradients, rewards = [], []
    for weight in (0.0, 0.3):
        x = sums.clone().requires_grad_()
        c = TeachingConfig(preference="dpo", beta=0.7, sft_weight=weight)
        losses, said = pair_losses(x, lengths, reference, c)
        losses.sum().backward()
        gradients.append(x.grad)
        rewards.append(said.detach())
    assert torch.equal(*rewards)
    expected = torch.stack([-0.3 / lengths[:, 0], torch.zeros(len(sums), dtype=F64)], 1)
    torch.testing.assert_close(gradients[1] - gradients[0], expected)


def test_dpo_begins_at_ln_2():
    sums, lengths, _ = numbers()
    losses, rewards = pair_losses(sums, lengths, sums, TeachingConfig(preference="dpo"))
    assert torch.equal(rewards, torch.zeros_like(rewards))
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))


@given(st.floats(-60, -1e-6))
def test_log1mexp_is_exact_near_zero_and_far_from_it(x):
    with decimal.localcontext(prec=60):
        expected = float((1 - decimal.Decimal(x).exp()).ln())
    found = log1mexp(torch.tensor(x, dtype=F64)).item()
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("kind", ["dpo", "orpo"])
def test_no_answer_is_too_likely_for_a_gradient(kind):
    sums = torch.tensor([[0.0, -1e-12], [-1e4, 0.0]], dtype=torch.float32, requires_grad=True)
    lengths = torch.tensor([[1.0, 5.0], [9.0, 1.0]])
    losses, _ = pair_losses(sums, lengths, sums.detach(), TeachingConfig(preference=kind))
    losses.sum().backward()
    assert losses.isfinite().all() and sums.grad.isfinite().all()


class Toy:
    """A model that gives every target the log probability that stands in its place."""

    def __init__(self, values):
        self.values = values

    def log_probs(self, inputs, targets, cu_seqlens, stage):
        return self.values.where(targets != -100, 0)


def test_a_batch_is_the_sum_over_its_pairs_and_nothing_else():
    """Padding, and targets that do not count, however likely the model finds them."""
    values = -torch.arange(1.0, 13).view(2, 6) / 10
    targets = torch.tensor([[1, 1, -100, 1, 1, -100], [-100, 1, 1, 1, -100, -100]])
    answer = torch.tensor([[0, 0, 8, 1, 1, 8], [8, 2, 3, 3, 8, 8]])
    reference = torch.zeros(4, 2)
    reference[:2] = torch.tensor([[-0.2, -0.9], [-0.5, -1.0]])
    c = TeachingConfig(preference="dpo", beta=0.5)
    found = PairLoss(Toy(values), c)(None, targets, None, answer, reference, None)
    margins = [0.5 * ((-0.3 + 0.2) - (-0.9 + 0.9)), 0.5 * ((-0.8 + 0.5) - (-1.9 + 1.0))]
    expected = sum(-math.log(sigmoid(m)) for m in margins)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_losses_are_trls():
    """trl's own loss functions on the same log probabilities."""
    pytest.importorskip("trl")
    from trl.experimental.orpo import ORPOTrainer

    sums, lengths, reference = numbers(8)
    c = TeachingConfig(preference="orpo", beta=0.3)
    ours, _ = pair_losses(sums, lengths, reference, c)
    means = sums / lengths
    trainer = type("T", (), dict(beta=0.3))()
    losses, *_ = ORPOTrainer.odds_ratio_loss(trainer, means[:, 0], means[:, 1])
    torch.testing.assert_close(ours, -means[:, 0] - losses, atol=1e-5, rtol=1e-5)
