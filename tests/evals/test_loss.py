"""Bits per byte: training's own number, every token once, and how certain it is."""

import math

import numpy as np
import pytest
import torch
from helpers import tiny_model

from evals.loss import as_documents, groups, measure_text, open_corpus, training, validation
from evals.results import ratio_error
from evals.scoring import Scorer
from models import llama
from runtime.saved import Saved, load_run


@pytest.fixture(scope="module")
def saved(trained):
    return load_run(trained[0].run.run_dir)


def test_the_numbers_of_validation_are_those_of_training(trained, saved):
    _, result = trained
    text = validation(open_corpus(saved), 1000)
    bpb, nats, perplexity = measure_text(Scorer(saved), text, 64)
    assert bpb.value == pytest.approx(result["val_bpb"], rel=1e-6)
    assert nats.value == pytest.approx(result["val_loss"], rel=1e-6)
    assert perplexity.value == pytest.approx(math.exp(result["val_loss"]), rel=1e-6)
    assert nats.below.sum() == 1000  # val_tokens


class Counting(torch.nn.Module):
    """A model that gives each target a probability by how much stands before it in its document:
    nats of a token = 10 / (1 + tokens before)."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def log_probs(self, inputs, targets, cu_seqlens, stage):
        at = torch.arange(inputs.numel())
        starts = cu_seqlens[torch.searchsorted(cu_seqlens, at.int(), right=True) - 1]
        before = (at - starts + 1).view_as(inputs)
        return (-10.0 / (1 + before)).where(targets >= 0, 0.0)


class Eot:
    eot = 99
    token_bytes = np.ones(100, dtype=np.int64)


def counting(max_len=64):
    return Scorer(Saved(None, {}, Counting(), None, Eot(), max_len, {}))


@pytest.mark.parametrize("overlap", [0, 3, 7])
def test_each_token_counts_once_with_what_stands_before_it(overlap):
    n, row = 50, 8
    tokens = np.arange(n, dtype=np.uint16)
    tokens[20] = 99  # a document begins
    nats = counting().windows([tokens], row, overlap)
    expected = []
    begin, end = 0, row
    for target in range(1, n):
        if target > end:  # the next row
            begin = end - overlap
            end = min(begin + row, n - 1)
        first = max(begin, 20 if target > 20 else 0)  # of what it sees
        expected.append(10 / (1 + target - first))
    assert nats == pytest.approx(np.array(expected))


def test_several_streams_are_measured_one_by_one():
    streams = [np.arange(n, dtype=np.uint16) for n in (9, 3, 20)]
    together = counting().windows(streams, 8)
    alone = [counting().windows([tokens], 8) for tokens in streams]
    assert together == pytest.approx(np.concatenate(alone))


def test_a_text_counts_by_document_where_there_are_many_else_by_pieces():
    few = np.zeros(100, dtype=np.uint16)
    group, unit = groups([few], 99, 10)
    assert unit == "pieces of 10 tokens" and group.max() == 9 and len(group) == 99
    many = few.copy()
    many[::4] = 99
    group, unit = groups([many], 99, 10)
    assert unit == "documents" and group.max() == 24
    assert (np.bincount(group) == [4] * 24 + [3]).all()
    group, unit = groups([few[:11]] * 30, 99, 10)
    assert unit == "pieces of 10 tokens" and (np.bincount(group) == 10).all()


def test_the_standard_error_is_that_of_many_samples():
    """Of a ratio whose parts go together, as nats and bytes of documents do."""
    r = np.random.default_rng(0)

    def draw():
        below = r.integers(50, 500, 60)
        return below * r.normal(2, 0.3, 60), below

    values, errors = [], []
    for _ in range(2000):
        above, below = draw()
        values.append(above.sum() / below.sum())
        errors.append(ratio_error(above, below))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.05)
    assert ratio_error(np.ones(1), np.ones(1)) is None


def test_pieces_of_the_training_text_are_of_it_and_spread_over_it(saved):
    dataset = open_corpus(saved)
    text = training(dataset, 64, 640)
    whole = np.concatenate([np.fromfile(path, np.uint16)[512:] for path in dataset.train])
    assert sum(len(piece) - 1 for piece in text.streams) == 640
    places = []
    for piece in text.streams:
        windows = np.lib.stride_tricks.sliding_window_view(whole, len(piece))
        [found] = np.flatnonzero((windows == piece).all(1))
        places.append(int(found))
    assert places == sorted(places) and places[0] == 0 and places[-1] > len(whole) - 70


def test_documents_are_what_was_written(trained, saved):
    text = validation(open_corpus(saved), 1000)
    documents = as_documents(text.streams[0], saved.tokenizer)
    assert documents[0].startswith(("the ", "a ")) or documents[0].split()[0].isalpha()
    assert "".join(documents) == saved.tokenizer.decode(text.streams[0])


def test_llamas_log_probs_are_those_of_its_loss_and_logits():
    c = llama.Config(n_layer=1, n_embd=32, n_head=2, head_dim=16, ffn_dim=64)
    model = llama.Model(c, 128, 24)  # a multiple of 64
    model.init_weights(0)
    inputs = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    targets = inputs.roll(-1, 1)
    targets[0, 3] = -100
    cu_seqlens = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
    with torch.no_grad():
        found = model.log_probs(inputs, targets, cu_seqlens, c.stage(1.0, 24))
        logits = model.logits(inputs, cu_seqlens, c.stage(1.0, 24)).log_softmax(-1)
        loss = model(inputs, targets, cu_seqlens, c.stage(1.0, 24))
    expected = logits.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    expected[0, 3] = 0
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(-found.sum(), loss, atol=1e-3, rtol=1e-6)


@pytest.mark.parametrize("copies", [0, 2])
def test_log_probs_of_targets_are_those_of_the_logits(copies):
    c, model = tiny_model(n_vocab=256, copies=copies)  # a multiple of 64: no padded columns
    g = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 9, (2, 12), generator=g)
    targets = inputs.roll(-1, 1)
    cu_seqlens = torch.tensor([0, 5, 12, 24], dtype=torch.int32)
    stage = c.val_stage(c.stage(1.0, 24), 24)
    with torch.no_grad():
        found = model.log_probs(inputs, targets, cu_seqlens, stage)
        logits = model.logits(inputs, cu_seqlens, stage).log_softmax(-1)
        loss = model(inputs, targets, cu_seqlens, stage)
    expected = logits.gather(2, targets[..., None])[..., 0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(-found.sum(), loss, atol=1e-3, rtol=1e-5)
    targets[0, 3] = -100
    assert model.log_probs(inputs, targets, cu_seqlens, stage)[0, 3] == 0
