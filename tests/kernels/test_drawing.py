"""kernels/drawing.py beside a loop in float64, and beside inference/sampling.py."""

import math

import pytest
import torch
from helpers import built
from hypothesis import given, settings
from hypothesis import strategies as st

from inference.sampling import Sampling, draw, next_tokens, process
from kernels.drawing import Drawing


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return built(Drawing, tmp_path_factory.mktemp("cache"))[0]


def by_definition(logits, at, temperature, top_p, min_p):
    """(token, how near `at` is to where another token would be drawn); at counts as a share of
    those that are left."""
    x = (logits.double() / temperature).softmax(-1).tolist()
    order = sorted(range(len(x)), key=lambda i: -x[i])
    kept = []
    sum_ = 0.0
    for i in order:
        if sum_ < top_p or not kept:
            kept.append(i)
        sum_ += x[i]
    kept = [i for i in sorted(kept) if x[i] >= min_p * max(x)]
    total = sum(x[i] for i in kept)
    sum_ = 0.0
    margins = []
    token = None
    for i in kept:
        sum_ += x[i] / total
        margins.append(abs(sum_ - at))
        if token is None and sum_ > at:
            token = i
    return token, min(margins)


@given(
    st.integers(0, 9999),
    st.sampled_from([1, 2, 9, 1023, 1024, 1025, 3000]),
    st.sampled_from([0.5, 3.0, 30.0]),
    st.floats(0.2, 3.0),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.99, 1.0]),
    st.sampled_from([0.0, 0.01, 0.3]),
)
@settings(max_examples=80, deadline=None)
def test_draws_are_those_of_the_definition(compiled, seed, n, spread, temperature, top_p, min_p):
    g = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(4, n, generator=g)
    at = torch.rand(4, generator=g, dtype=torch.float64)
    found = compiled.draw(logits, at, temperature, top_p, min_p).tolist()
    for row in range(4):
        token, margin = by_definition(logits[row], at[row].item(), temperature, top_p, min_p)
        assert found[row] == token or margin < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(temperature=0.7, top_p=0.9),
        dict(top_k=40, top_p=0.8),
        dict(top_k=3, min_p=0.2),
        dict(repetition_penalty=1.3, no_repeat_ngram=2, frequency_penalty=0.5, top_p=0.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("n_vocab", [50, 5000])
def test_next_tokens_are_the_same_with_it_and_without(compiled, options, n_vocab):
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, n_vocab, generator=g)
    tokens = torch.randint(n_vocab, (200, 30), generator=g).tolist()
    found = []
    for library in None, compiled:
        generators = [torch.Generator().manual_seed(seed) for seed in range(200)]
        found.append(next_tokens(logits, Sampling(**options), tokens, tokens, generators, library))
    assert found[0] == found[1] and len(set(found[0])) > 20


def test_draws_come_as_often_as_the_softmax_says(compiled):
    """Chi-squared against the probabilities."""
    logits = torch.linspace(-1, 1, 10).expand(5000, -1)
    at = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = compiled.draw(logits, at, temperature=1.7).bincount(minlength=10)
    expected = 5000 * (logits[0].double() / 1.7).softmax(-1)
    chi2 = ((drawn - expected) ** 2 / expected).sum().item()
    assert chi2 < 9 + 4 * math.sqrt(18)


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("n", [4, 2500])
def test_what_is_ruled_out_is_not_drawn_by_the_least_or_the_largest_number(compiled, number, n):
    logits = torch.full((3, n), -math.inf)
    logits[:, n // 2] = 1.0
    logits[1, n // 2 + 1] = 2.0
    logits[2, 1] = -60.0
    found = compiled.draw(logits, torch.full((3,), number, dtype=torch.float64), top_p=0.99)
    assert found[0] == found[2] == n // 2
    assert found[1] == n // 2 + (number > 0.5)


@pytest.mark.parametrize("n", [1025, 2049, 50257])
def test_large_numbers_draw_what_has_a_weight_too(compiled, n):
    """However the sums of its parts are rounded."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(n, generator=g)
    logits[[0, -1]] = -math.inf
    at = 1 - 1e-7 * torch.rand(2000, dtype=torch.float64, generator=g)
    for top_p in 1.0, 0.9:
        found = compiled.draw(logits.expand(2000, -1), at, 0.7, top_p)
        assert (logits[found] > -math.inf).all()
        assert top_p < 1 or (found > n // 2).all()


def test_logits_are_left_as_they_are_and_may_be_a_part_of_others(compiled):
    whole = torch.randn(5, 2, 300, generator=torch.Generator().manual_seed(0))
    part = whole[:, 1]
    before = whole.clone()
    at = torch.full((5,), 0.4, dtype=torch.float64)
    found = compiled.draw(part, at, 0.5, 0.7)
    assert torch.equal(found, compiled.draw(part.contiguous(), at, 0.5, 0.7))
    assert torch.equal(whole, before)


def test_many_equal_logits(compiled):
    """All of them are as likely as the last of the fewest that have top_p."""
    at = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    found = compiled.draw(torch.zeros(1000, 100), at, top_p=0.5)
    assert found.tolist() == [i // 10 for i in range(1000)]


def test_numbers_that_are_none_end_in_some_token(compiled):
    at = torch.full((2,), 0.5, dtype=torch.float64)
    found = compiled.draw(torch.full((2, 30), math.nan), at, top_p=0.9)
    assert all(0 <= token < 30 for token in found.tolist())


def test_processed_logits_of_one_row_draw_alike(compiled):
    """process() and draw() are what it stands for, also where all but one are ruled out."""
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(5))
    sampling = Sampling(temperature=0.8, top_p=0.01)
    expected = draw(process(logits, sampling, [[]], [[]]), [torch.Generator().manual_seed(1)])
    at = torch.rand(1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert compiled.draw(logits, at, 0.8, 0.01).tolist() == expected == [logits.argmax().item()]
