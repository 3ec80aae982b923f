"""models/copies.py beside loops over the definition, and as part of a model."""

import math

import pytest
import torch
from helpers import of_each_length, padded_left, tiny, train_losses, write_text

import train_gpt as tg
from base import InputError
from models import copies, gpt


def by_definition(tokens, targets, n):
    """[(seen, hits)] at each place of one document, for contexts of 0 to n - 1 tokens."""
    found = []
    for t in range(len(tokens)):
        row = []
        for length in range(n):
            context = tokens[t + 1 - length : t + 1]
            seen = 0
            hits = 0
            if len(context) == length:
                for before in range(t):
                    if tokens[before + 1 - length : before + 1] == context and (
                        before + 1 >= length
                    ):
                        seen += 1
                        hits += targets[before] == targets[t]
            row.append((seen, hits))
        found.append(row)
    return found


@pytest.fixture(scope="module")
def batch():
    """Two rows of two documents each, of few tokens, so that much is repeated, with padding."""
    g = torch.Generator().manual_seed(0)
    stream = torch.randint(3, (2, 41), generator=g)
    inputs = stream[:, :-1].contiguous()
    targets = stream[:, 1:].clone()
    targets[1, 35:] = -100
    starts = torch.zeros_like(inputs, dtype=torch.bool)
    starts[:, 0] = True
    starts[0, 13] = True
    starts[1, 30] = True
    return inputs, targets, starts


def documents(starts):
    """[(row, first, end)]"""
    found = []
    for row, marks in enumerate(starts):
        at = [*marks.nonzero().flatten().tolist(), len(marks)]
        found += [(row, first, end) for first, end in zip(at, at[1:])]
    return found


@pytest.mark.parametrize("n", [1, 2, 4])
def test_counts_are_those_of_the_definition(batch, n):
    inputs, targets, starts = batch
    seen, hits = copies.earlier(inputs, targets, starts, n)
    for row, first, end in documents(starts):
        wanted = by_definition(inputs[row, first:end].tolist(), targets[row, first:end].tolist(), n)
        for t, counts in enumerate(wanted, first):
            assert seen[row, t].tolist() == [c[0] for c in counts]
            if targets[row, t] >= 0:
                assert hits[row, t].tolist() == [c[1] for c in counts]


def test_targets_that_do_not_count_have_followed_all_the_same(batch):
    """As those of a question before its answer."""
    inputs, targets, starts = batch
    seen, hits = copies.earlier(inputs, targets, starts, 3)
    masked = targets.clone()
    masked[:, :20] = -100
    again = copies.earlier(inputs, masked, starts, 3)
    counts = masked >= 0
    assert torch.equal(again[0], seen) and torch.equal(again[1][counts], hits[counts])


def test_nothing_depends_on_what_comes_later(batch):
    inputs, targets, starts = batch
    seen, hits = copies.earlier(inputs, targets, starts, 3)
    half = 20
    first = copies.earlier(inputs[:, :half], targets[:, :half], starts[:, :half], 3)
    assert torch.equal(first[0], seen[:, :half]) and torch.equal(first[1], hits[:, :half])


def test_what_followed_has_every_tokens_counts():
    """Those of a whole vocabulary are those of earlier() with each token as the target, whatever
    stands beside them."""
    n, n_vocab = 4, 3
    g = torch.Generator().manual_seed(1)
    texts = [torch.randint(n_vocab, (length,), generator=g) for length in (1, 2, 3, 17, 9)]
    followers = copies.Followers(padded_left(texts), n)
    found = of_each_length(followers, len(texts), n_vocab)
    assert found[3:].sum() > 6
    for row, tokens in enumerate(texts):
        starts = torch.zeros(1, len(tokens), dtype=torch.bool)
        starts[0, 0] = True
        for token in range(n_vocab):
            targets = torch.cat([tokens[1:], torch.tensor([token])])
            counted = copies.earlier(tokens[None], targets[None], starts, n)
            told, there, probs = (x[0, -1] for x in copies.predictions(*counted))
            assert torch.equal(found[row, token], probs), (row, token)
            assert torch.equal(followers.told[row], told)
            assert torch.equal(followers.there[row], there)


def mixed(own, gates, seen, hits):
    _, there, probs = copies.predictions(seen, hits)
    return copies.mixture(own, gates, there, probs.to(own.dtype))


def test_the_mixture_is_a_distribution():
    """Over the vocabulary it sums to one, whatever the gates are."""
    g = torch.Generator().manual_seed(2)
    n, n_vocab = 3, 5
    tokens = torch.randint(n_vocab, (12,), generator=g)
    followers = copies.Followers(tokens[None], n)
    seen = followers.seen.expand(n_vocab, n)
    hits = of_each_length(followers, 1, n_vocab)[0] * seen
    own = torch.randn(n_vocab, generator=g, dtype=torch.float64).log_softmax(-1)
    gates = torch.randn(n + 1, generator=g, dtype=torch.float64).expand(n_vocab, -1)
    log_prob = mixed(own, gates, seen, hits)
    assert log_prob.exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    none = torch.zeros_like(hits)
    assert torch.equal(mixed(own, gates, none, none), own)


def test_the_mixture_by_hand():
    own = torch.tensor(0.5).log()
    gates = torch.tensor([0.0, math.log(2.0), 7.0])  # the last has not been seen
    seen = torch.tensor([4, 0])
    hits = torch.tensor([1, 0])
    assert mixed(own, gates, seen, hits).exp().item() == pytest.approx((1 * 0.5 + 2 * 0.25) / 3)


def test_gradients_are_finite_where_nothing_was_hit():
    own = torch.tensor([-1.0, -2.0], requires_grad=True)
    gates = torch.zeros(2, 3, requires_grad=True)
    seen = torch.tensor([[0, 0], [5, 0]])
    mixed(own, gates, seen, torch.zeros_like(seen)).sum().backward()
    assert own.grad.tolist() == [1.0, 1.0] and gates.grad.isfinite().all()
    assert gates.grad[0].abs().sum() == 0 and gates.grad[1, 1] < 0


def test_what_is_chosen_is_where_of_any_numbers():
    """Also of those whose difference is beyond 64 bits."""
    x = torch.tensor([0, -1, 2**63 - 1, -(2**63), 5])
    y = torch.tensor([7, 2**63 - 1, -(2**63), 2**63 - 1, -(2**63)])
    for condition in torch.arange(5) % 2 == 0, torch.arange(5) % 2 == 1:
        assert torch.equal(copies.chosen(condition, x, y), torch.where(condition, x, y))


# --- in a model


@pytest.fixture(scope="module")
def model():
    """Of 64 tokens, so that the head has no padding, with gates that differ."""
    config = gpt.Config(n_layer=1, n_embd=16, n_head=2, value_embed_layers=(), copies=3)
    model = gpt.Model(config, 64, 64)
    model.init_weights(0)
    with torch.no_grad():
        g = torch.Generator().manual_seed(3)
        for p in model.lm_head, model.mix_gates, model.mix_counts:
            p.copy_(torch.randn(p.shape, generator=g))
    return model


@pytest.fixture(scope="module")
def packed():
    """(inputs, targets, cu_seqlens): two rows, the first of two documents, with padding."""
    stream = torch.randint(4, (2, 25), generator=torch.Generator().manual_seed(4))
    targets = stream[:, 1:].clone()
    targets[1, 20:] = -100
    cu_seqlens = torch.tensor([0, 10, 24, 48], dtype=torch.int32)
    return stream[:, :-1].contiguous(), targets, cu_seqlens


@torch.no_grad()
def test_the_loss_is_that_of_the_distributions(model, packed):
    inputs, targets, cu_seqlens = packed
    stage = model.c.val_stage(model.c.stage(0.0, 24), 24)
    log_prob = model.logits(inputs, cu_seqlens, stage)
    torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones(2, 24))
    counted = targets >= 0
    of_targets = log_prob.gather(-1, targets.where(counted, 0)[..., None])[..., 0]
    loss = model(inputs, targets, cu_seqlens, stage)
    torch.testing.assert_close(loss, -of_targets[counted].sum(), rtol=1e-5, atol=1e-4)
    last = model.logits(inputs, cu_seqlens, stage, last_only=True)
    torch.testing.assert_close(last, log_prob[:, -1:])


def test_they_learn_what_a_model_alone_has_to_learn(tmp_path):
    """A text that repeats itself is predicted from the first steps on."""
    text = write_text(tmp_path / "text", 20000)
    fields = dict(steps=6, adam_lr=0.02)
    alone = tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "alone"), **fields))
    with_copies = tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "with"), copies=4, **fields))
    assert with_copies["val_loss"] < alone["val_loss"] - 0.3


def test_a_stopped_run_goes_on_as_if_it_had_not(tmp_path):
    text = write_text(tmp_path / "text", 20000)
    fields = dict(steps=6, copies=3, checkpoint_every="3")
    tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "whole"), **fields))
    half = fields | dict(max_time="0.000001s")
    tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "parts"), **half))
    (tmp_path / "parts" / "result.json").unlink()
    tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "parts"), resume="auto", **fields))
    assert train_losses(tmp_path / "parts") == train_losses(tmp_path / "whole")


def test_several_targets_are_refused():
    with pytest.raises(InputError, match="copies"):
        gpt.Config(copies=2, mtp=(2, 1))
