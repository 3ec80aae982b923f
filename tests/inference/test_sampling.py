"""What sampling does to logits is what transformers does, and draws come as often as expected."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base import InputError
from inference import sampling
from inference.sampling import Sampling, process, top_p

V = 50


def logits_and_tokens(seed, rows=3, length=40):
    """Logits with ties, and rows of tokens that repeat n-grams."""
    g = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(rows, V, generator=g)).round(decimals=1)
    tokens = torch.randint(V // 5, (rows, length), generator=g).tolist()
    return logits, tokens


def theirs(tokens, logits, **options):
    """transformers' processors for sampling with these options, one after the other."""
    from transformers.generation import logits_process as hf

    made = []  # in the order of its GenerationMixin._get_logits_processor
    if "logit_bias" in options:
        bias = {(token,): float(x) for token, x in options["logit_bias"]}
        made.append(hf.SequenceBiasLogitsProcessor(bias))
    if "repetition_penalty" in options:
        made.append(hf.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "no_repeat_ngram" in options:
        made.append(hf.NoRepeatNGramLogitsProcessor(options["no_repeat_ngram"]))
    if "temperature" in options:
        made.append(hf.TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        made.append(hf.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        made.append(hf.TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        made.append(hf.MinPLogitsWarper(options["min_p"]))
    logits = logits.clone()
    for processor in made:
        logits = processor(torch.tensor(tokens), logits)
    return logits


ALONE = [
    dict(temperature=0.3),
    dict(temperature=2.5),
    dict(top_k=1),
    dict(top_k=7),
    dict(top_k=1000),
    dict(top_p=0.3),
    dict(top_p=0.95),
    dict(min_p=0.01),
    dict(min_p=0.5),
    dict(repetition_penalty=1.3),
    dict(repetition_penalty=0.8),
    dict(no_repeat_ngram=1),
    dict(no_repeat_ngram=2),
    dict(no_repeat_ngram=3),
    dict(no_repeat_ngram=60),
    dict(logit_bias=((3, 5.0), (4, -100.0), (49, 0.5))),
]


@pytest.mark.parametrize("options", ALONE, ids=str)
def test_each_is_transformers(options):
    for seed in range(5):
        logits, tokens = logits_and_tokens(seed)
        ours = process(logits, Sampling(**options), tokens, tokens)
        torch.testing.assert_close(ours, theirs(tokens, logits, **options), rtol=0, atol=0)


@given(
    st.fixed_dictionaries(
        {},
        optional=dict(
            temperature=st.floats(0.1, 3.0),
            top_k=st.integers(1, V),
            top_p=st.floats(0.05, 0.99),
            min_p=st.floats(0.01, 0.9),
            repetition_penalty=st.floats(0.5, 2.0),
            no_repeat_ngram=st.integers(1, 4),
            logit_bias=st.just(((7, -3.0), (12, 4.0))),
        ),
    ),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_together_they_are_transformers_in_its_order(options, seed):
    logits, tokens = logits_and_tokens(seed)
    ours = process(logits, Sampling(**options), tokens, tokens)
    torch.testing.assert_close(ours, theirs(tokens, logits, **options), rtol=1e-6, atol=1e-6)


def test_the_logits_given_are_left_as_they_are():
    logits, tokens = logits_and_tokens(0)
    before = logits.clone()
    everything = Sampling(0.5, 20, 0.9, 0.01, 1.2, 2, 0.5, 0.5, ((1, 1.0),))
    process(logits, everything, tokens, tokens)
    assert torch.equal(logits, before)


def test_rows_have_lengths_of_their_own():
    logits, tokens = logits_and_tokens(1)
    tokens = [[], tokens[1][:3], tokens[2]]
    options = Sampling(repetition_penalty=1.3, no_repeat_ngram=2)
    together = process(logits, options, tokens, tokens)
    for row in range(3):
        alone = process(logits[row : row + 1], options, tokens[row : row + 1], [[]])
        assert torch.equal(together[row], alone[0])
    assert torch.equal(together[0], logits[0])


def test_frequency_and_presence_count_what_was_written():
    """As OpenAI has it: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    logits, _ = logits_and_tokens(2, rows=2)
    options = Sampling(frequency_penalty=0.5, presence_penalty=-1.5)
    written = [[3, 3, 3, 8], []]
    ours = process(logits, options, [[1, 2, 3], [5]], written)
    expected = logits.clone()
    expected[0, 3] -= 3 * 0.5 - 1.5
    expected[0, 8] -= 0.5 - 1.5
    assert torch.equal(ours, expected)


def test_where_every_token_would_repeat_none_is_ruled_out():
    logits = torch.randn(2, 4)
    tokens = [[0, 1, 2, 3], [0, 1, 2]]
    ours = process(logits, Sampling(no_repeat_ngram=1), tokens, tokens)
    assert torch.equal(ours[0], logits[0])
    assert (ours[1] == -math.inf).tolist() == [True, True, True, False]


def test_temperature_zero_is_the_likeliest():
    logits, tokens = logits_and_tokens(3)
    logits += torch.arange(V) / 1e4  # no ties
    ours = process(logits, Sampling(temperature=0.0), tokens, tokens)
    assert sampling.draw(ours, [None] * len(ours)) == logits.argmax(-1).tolist()
    tokens = [[token] for token in logits.argmax(-1).tolist()]
    options = Sampling(temperature=0.0, repetition_penalty=9.0, top_p=0.5, top_k=3)
    generators = [None] * len(ours)
    found = sampling.next_tokens(logits, options, tokens, tokens, generators)
    assert found == sampling.draw(process(logits, options, tokens, tokens), generators)
    assert found != logits.argmax(-1).tolist()


@pytest.mark.parametrize("n_vocab, spread", [(501, 3.0), (4000, 1.0), (4000, 3.0), (20000, 1.0)])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.9, 0.999, 1.0])
def test_top_p_of_large_vocabularies(n_vocab, spread, p):
    """Where it looks among the likeliest first."""
    from transformers.generation.logits_process import TopPLogitsWarper

    logits = spread * torch.randn(3, n_vocab, generator=torch.Generator().manual_seed(0))
    assert torch.equal(top_p(logits, p), TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("options", [{}, dict(temperature=1.7), dict(top_p=0.8), dict(min_p=0.2)])
def test_draws_come_as_often_as_the_softmax_says(options):
    """Chi-squared against the probabilities."""
    logits = torch.linspace(-1, 1, 10)[None]
    processed = process(logits, Sampling(**options), [[]], [[]])[0]
    n = 5000
    g = torch.Generator().manual_seed(0)
    drawn = torch.tensor(sampling.draw(processed.expand(n, -1), [g] * n)).bincount(minlength=10)
    expected = n * processed.double().softmax(-1)
    assert drawn[expected == 0].sum() == 0
    possible = expected > 0
    chi2 = ((drawn - expected) ** 2 / expected)[possible].sum().item()
    degrees = possible.sum().item() - 1
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees)  # one in 10,000 is beyond


@pytest.mark.parametrize("number", [0.0, 1 - 2.0**-53])
def test_what_is_ruled_out_is_not_drawn_by_the_least_or_the_largest_number(monkeypatch, number):
    monkeypatch.setattr(
        sampling.torch, "rand", lambda n, generator, dtype: torch.full((n,), number, dtype=dtype)
    )
    logits = torch.tensor([[sampling.NEVER, 1.0, 2.0, sampling.NEVER]])
    assert sampling.draw(logits, [None])[0] in (1, 2)


def test_a_generator_of_the_same_seed_draws_the_same():
    logits = torch.zeros(1000)
    draws = [
        sampling.draw(logits.expand(5, -1), [g] * 5)
        for g in (torch.Generator().manual_seed(seed) for seed in (1, 1, 2))
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(
    "option", [dict(temperature=-1.0), dict(top_p=1.5), dict(top_k=-1), dict(presence_penalty=3.0)]
)
def test_values_that_mean_nothing_are_refused(option):
    [name] = option
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} .*expected"):
        Sampling(**option)
