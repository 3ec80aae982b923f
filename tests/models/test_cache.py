"""Decoding with a cache gives the logits of the whole text, whatever the model looks back at."""

import dataclasses

import pytest
import torch
from helpers import EVERYTHING, PIECES, RECORD, stage_of, tiny_model

from models import cache as caches
from models import gpt

LONG = 600  # tokens of rotary tables
ALL = {f.name: EVERYTHING[f.name] for f in dataclasses.fields(gpt.Config) if f.name in EVERYTHING}

# Parts, and what a stage changes
MODELS = [
    pytest.param({}, {}, id="plain"),
    pytest.param(dict(softcap=(), n_gram=1), {}, id="laptop's head"),
    pytest.param(dict(copies=3, mtp=(1,)), {}, id="copies"),
    pytest.param(PIECES, {}, id="every piece"),
    pytest.param(ALL, {}, id="everything"),
    pytest.param(RECORD | dict(mudd=(), mudd_gates=-1), {}, id="record by numbers"),
    pytest.param(ALL | RECORD, dict(tied=False), id="everything of the record, untied"),
    pytest.param(PIECES | dict(paired_layers=(0, 3, 4)), {}, id="pairs in long layers"),
]


def model_and_stage(fields, changes, dtype=torch.float64, window=5):
    c, model = tiny_model(dtype=dtype, max_len=LONG, **fields)
    for parameter in model.parameters():
        if dtype == torch.float64:  # the small ones are fp32 otherwise
            parameter.data = parameter.data.to(dtype)
    model.enter(0.6)  # YaRN has begun
    far = [3 * window if c.sees_far(i) else window for i in range(c.n_layer)]
    return model, stage_of(c, tuple(far), max_doc_len=LONG, **changes)


def text(rows, length, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(257, (rows, length), generator=g)


@torch.no_grad()
def whole(model, inputs, stage):
    """(B, T, V): the logits of rows that are a document each."""
    B, T = inputs.shape
    cu_seqlens = torch.arange(0, (B + 1) * T, T, dtype=torch.int32)
    return model.logits(inputs, cu_seqlens, stage)


@torch.no_grad()
def in_pieces(model, inputs, stage, sizes):
    """(B, len(sizes), V): the logits behind each of the pieces that the rows are decoded in."""
    cache = model.new_cache(len(inputs))
    logits = []
    for piece in inputs.split(sizes, dim=1):
        counts = [piece.size(1)] * len(inputs)
        logits.append(model.decode(piece, counts, cache, stage))
    return torch.stack(logits, 1)


@pytest.mark.parametrize(["fields", "changes"], MODELS)
def test_token_by_token_is_the_whole(fields, changes):
    model, stage = model_and_stage(fields, changes)
    inputs = text(2, 40)
    logits = in_pieces(model, inputs, stage, [1] * 40)
    assert logits.shape == (2, 40, 257)  # without the vocabulary's padding
    torch.testing.assert_close(logits, whole(model, inputs, stage), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(["fields", "changes"], MODELS)
def test_a_prompt_at_once_and_then_pieces_are_the_whole(fields, changes, monkeypatch):
    monkeypatch.setattr(caches, "CAPACITY", 8)  # room is made again and again
    model, stage = model_and_stage(fields, changes)
    inputs = text(2, 40)
    sizes = [17, 1, 1, 2, 9, 1, 3, 6]
    logits = in_pieces(model, inputs, stage, sizes)
    ends = torch.tensor(sizes).cumsum(0) - 1
    torch.testing.assert_close(logits, whole(model, inputs, stage)[:, ends], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(["fields", "changes"], MODELS)
@torch.no_grad()
def test_rows_of_different_lengths_do_not_know_of_each_other(fields, changes):
    model, stage = model_and_stage(fields, changes)
    lengths = [3, 11, 1, 8]
    inputs = text(4, 20)
    prompts = inputs[:, :11].clone()
    for row, length in enumerate(lengths):
        prompts[row, length:] = 99  # the padding
    cache = model.new_cache(4)
    logits = [model.decode(prompts, lengths, cache, stage)]
    for step in range(4):
        tokens = [[inputs[row, n + step]] for row, n in enumerate(lengths)]
        logits.append(model.decode(torch.tensor(tokens), [1] * 4, cache, stage))

    # Two rows end, the others change their order; then several tokens at once, padded again
    cache.keep([3, 1])
    tokens = torch.stack([inputs[3, 12:15], inputs[1, 15:18]])
    tokens[0, 1:] = 99
    two = model.decode(tokens, [1, 3], cache, stage)
    assert cache.lengths == [13, 18]

    for row, length in enumerate(lengths):
        alone = whole(model, inputs[row : row + 1], stage)[0]
        ours = torch.stack([step[row] for step in logits])
        torch.testing.assert_close(ours, alone[length - 1 : length + 4], rtol=1e-5, atol=1e-5)
        if row in (3, 1):
            row, end = {3: (0, 12), 1: (1, 17)}[row]
            torch.testing.assert_close(two[row], alone[end], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_greedy_tokens_of_a_long_text_are_those_without_a_cache():
    model, stage = model_and_stage(PIECES, {}, dtype=torch.float32, window=40)
    # Noise at each step, since a model that learnt nothing repeats a token for ever
    noise = torch.randn(501, 257, generator=torch.Generator().manual_seed(1))
    tokens = [7]
    cache = model.new_cache(1)
    for step in range(500):
        logits = model.decode(torch.tensor([tokens[-1:]]), [1], cache, stage)
        tokens.append((logits[0] + noise[step]).argmax().item())
    assert len(set(tokens)) > 50

    # Each token is the likeliest behind those before it, so without a cache it is the same one
    expected = whole(model, torch.tensor([tokens]), stage)[0] + noise
    assert expected.argmax(-1)[:-1].tolist() == tokens[1:]


def test_rounding_is_that_of_the_whole_in_the_same_dtype():
    exact_model, stage = model_and_stage(PIECES, {})
    model, _ = model_and_stage(PIECES, {}, dtype=torch.bfloat16)
    for ours, exact in zip(model.parameters(), exact_model.parameters()):
        exact.data = ours.data.double()
    exact_model.cos.copy_(model.cos)
    exact_model.sin.copy_(model.sin)
    inputs = text(2, 60)
    exact = whole(exact_model, inputs, stage)
    error = (whole(model, inputs, stage) - exact).abs()
    ours = (in_pieces(model, inputs, stage, [20] + [1] * 40) - exact[:, 19:]).abs()
    assert 0 < ours.mean() <= 1.2 * error.mean()
    assert ours.max() <= 2 * error.max()


@pytest.mark.parametrize(["fields", "changes"], MODELS)
@torch.no_grad()
def test_of_tokens_that_are_tried_as_many_stay_as_are_kept(fields, changes):
    """Each tried token has its logits, and what is not kept leaves no trace."""
    model, stage = model_and_stage(fields, changes)
    inputs = text(2, 24)
    expected = whole(model, inputs, stage)
    cache = model.new_cache(2)
    model.decode(inputs[:, :3], [3, 3], cache, stage)
    at = [3, 3]
    for kept in [4, 1], [1, 3], [2, 2], [5, 5]:
        tried = torch.randint(257, (2, 5))  # the right ones, then others
        for row, n in enumerate(kept):
            tried[row, :n] = inputs[row, at[row] : at[row] + n]
        logits = model.decode(tried, [5, 5], cache, stage, every=True)
        for row, n in enumerate(kept):
            there = expected[row, at[row] : at[row] + n]
            torch.testing.assert_close(logits[row, :n].double(), there.double())
            at[row] += n
        cache.end(kept)
        assert cache.lengths == at
