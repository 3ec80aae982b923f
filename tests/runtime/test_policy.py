"""The loss over a model's own answers, against Python's floats answer by answer."""

import math
import random

import pytest
import torch

from data.questions import Answer, answer_batch, rows_of
from runtime.policy import PolicyConfig, PolicyLoss, advantages, token_losses, token_weights

F64 = torch.float64


def config(**fields):
    return PolicyConfig(reward="exact", **fields)


def test_advantages_are_the_rewards_beside_those_of_their_group():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 4.0, 4.0, 6.0]], dtype=F64)
    mean = torch.tensor([[0.75, -0.25, -0.25, -0.25], [-2, 0, 0, 2]], dtype=F64)
    assert torch.equal(advantages(rewards, "mean"), mean)
    stds = torch.tensor([[0.5], [math.sqrt(8 / 3)]], dtype=F64)  # unbiased
    torch.testing.assert_close(advantages(rewards, "std"), mean / (stds + 1e-4))


@pytest.mark.parametrize("kind", ["std", "mean"])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1e12, -1 / 3])
def test_equal_rewards_teach_nothing(kind, value):
    """Nor does the rounding of their mean."""
    assert torch.equal(advantages(torch.full((2, 7), value, dtype=F64), kind), torch.zeros(2, 7))


@pytest.mark.parametrize("average", ["tokens", "answers", "constant"])
def test_weights_are_those_of_the_mean_that_is_asked_for(average):
    c = config(average=average, answer_tokens=10)
    lengths = [1, 3, 6]
    weights = token_weights(lengths, c, n_answers=3, n_tokens=10)
    expected = dict(tokens=[1 / 10] * 3, answers=[1 / 3, 1 / 9, 1 / 18], constant=[1 / 30] * 3)
    assert weights == pytest.approx(expected[average])
    assert token_weights([], c, 0, 0) == []


def by_hand(answers, log_probs, references, c):
    """The loss in Python's floats, answer by answer and token by token."""
    total = 0.0
    for answer, new, reference in zip(answers, log_probs, references):
        for lp, old, ref in zip(new, answer.logprobs, reference):
            ratio = math.exp(lp - old)
            clipped = min(max(ratio, 1 - c.clip_low), 1 + c.clip_high)
            gain = min(ratio * answer.advantage, clipped * answer.advantage)
            k3 = math.exp(ref - lp) - (ref - lp) - 1
            total += answer.weight * (c.kl * k3 - gain)
    return total


class Toy:
    """A model that gives each target the log probability in its place."""

    n_vocab = 9

    def __init__(self, values):
        self.values = values

    def log_probs(self, inputs, targets, cu_seqlens, stage, n_vocab):
        assert n_vocab == 9
        return self.values


def some_answers(seed=0):
    """(answers of several lengths, their log probabilities by now, those of a reference)."""
    r = random.Random(seed)
    answers, new, references = [], [], []
    for n_prompt, n in (2, 3), (1, 1), (4, 5), (3, 2), (5, 4):
        tokens = [r.randrange(9) for _ in range(n_prompt + n)]
        old = [-3 * r.random() for _ in range(n)]
        answers.append(Answer(tokens, n_prompt, old, r.uniform(-2, 2), r.random()))
        new.append([x + r.uniform(-0.6, 0.6) for x in old])
        references.append([x + r.uniform(-0.6, 0.6) for x in old])
    return answers, new, references


def placed(batch, rows, numbers, answers):
    """(B, T) float64 with each answer's numbers where its targets are, 7.0 elsewhere."""
    out = torch.full(batch.inputs.shape, 7.0, dtype=F64)
    for r, row in enumerate(rows):
        at = 0
        for answer in row:
            begin = at + answer.n_prompt - 1
            of = next(i for i, a in enumerate(answers) if a is answer)
            out[r, begin : begin + len(answer.logprobs)] = torch.tensor(numbers[of], dtype=F64)
            at += len(answer.tokens) - 1
    return out


@pytest.mark.parametrize(
    "fields",
    [
        dict(kl=0.3, clip_low=0.2, clip_high=0.28),
        dict(kl=0.0, clip_low=0.1, clip_high=0.1),
        dict(kl=2.0, clip_low=5.0, clip_high=5.0),
    ],
)
def test_the_loss_of_packed_rows_is_the_formula(fields):
    """Its gradients as well, by differences; whatever stands in padding and behind questions."""
    c = config(**fields)
    answers, new, references = some_answers()
    rows = rows_of(answers, 9)
    assert [len(row) for row in rows] == [3, 1, 1]
    batch = answer_batch([*rows, []], 9)
    batch = batch._replace(
        reference=placed(batch, rows, references, answers),
        old=batch.old.double(),
        advantage=batch.advantage.double(),
        weight=batch.weight.double(),
    )
    values = placed(batch, rows, new, answers).requires_grad_()
    loss = PolicyLoss(Toy(values), c)
    found = loss(*batch, stage=None)
    # What the batch holds is fp32
    assert found.item() == pytest.approx(by_hand(answers, new, references, c), rel=1e-6)
    found.backward()
    counted = batch.targets != -100
    assert (values.grad[~counted] == 0).all() and counted.sum() == 15
    eps = 1e-6
    gradients = []
    order = [next(i for i, a in enumerate(answers) if a is b) for row in rows for b in row]
    for i in order:
        for t in range(len(new[i])):
            ends = []
            for change in eps, -eps:
                other = [list(x) for x in new]
                other[i][t] += change
                ends.append(by_hand(answers, other, references, c))
            gradients.append((ends[0] - ends[1]) / (2 * eps))
    torch.testing.assert_close(
        values.grad[counted], torch.tensor(gradients, dtype=F64), atol=1e-6, rtol=1e-5
    )
    kl, clipped, tokens = loss.take().tolist()
    assert tokens == 15 and (clipped > 0) == (c.clip_low < 1) and (kl > 0) == (c.kl > 0)
    assert loss.take() is None


def test_gradients_are_those_of_the_losses():
    g = torch.Generator().manual_seed(0)
    new, old, ref, gain = torch.randn(4, 30, generator=g, dtype=F64) / 3
    c = config(kl=0.4)

    def losses(x):
        return token_losses(x, old, ref, gain, c)[0]

    assert torch.autograd.gradcheck(losses, new.requires_grad_())


def test_the_clip_holds_back_what_went_far_enough_and_nothing_else():
    c = config(kl=0.0)
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.1, 0.9], dtype=F64).log().requires_grad_()
    gain = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=F64)
    losses, _, held = token_losses(ratio, torch.zeros(6), torch.zeros(6), gain, c)
    losses.sum().backward()
    assert held.tolist() == [False, True, True, False, False, False]
    assert (ratio.grad == 0).tolist() == held.tolist()


def test_k3_is_a_distance_whose_mean_is_the_divergence():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=F64)
    _, k3, _ = token_losses(p.log(), p.log(), q.log(), torch.zeros(3), config(kl=1.0))
    assert (k3 >= 0).all()
    torch.testing.assert_close((p * k3).sum(), (p * (p / q).log()).sum())


def test_a_batch_of_nothing_costs_nothing():
    batch = answer_batch([[], []], 16)
    values = torch.full((2, 16), float("-inf"), requires_grad=True)
    loss = PolicyLoss(Toy(values), config())(*batch, stage=None)
    assert loss.item() == 0
