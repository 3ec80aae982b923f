"""models/parts.py: documents in a row, gates, the softcap, and rotary frequencies with YaRN."""

import math

import pytest
import torch

from data.loader import IGNORE
from models import parts

# Rows of 6 tokens with documents of 2, 4, 1 and 5; empty ones at the end
CU_SEQLENS = torch.tensor([0, 2, 6, 7, 12, 12, 12], dtype=torch.int32)
INPUTS = torch.arange(12).view(2, 6)

# --- Random numbers


def test_what_is_drawn_depends_on_name_and_seed_alone():
    """And on whether it is drawn on a GPU: that is done where the parameter is."""
    small = torch.empty(3, 4)
    first = parts.draw("embed", small, 5, 1.0)
    assert torch.equal(first, parts.draw("embed", small, 5, 1.0))
    assert torch.equal(0.5 * first, parts.draw("embed", small, 5, 0.5))
    for name, seed in (("lm_head", 5), ("embed", 6)):
        assert not torch.equal(first, parts.draw(name, small, seed, 1.0))
    torch.randn(7)  # whatever was drawn elsewhere
    assert torch.equal(first, parts.draw("embed", small, 5, 1.0))
    many = parts.draw("embed", torch.empty(100, 100), 2**62, 0.3)
    assert many.std().item() == pytest.approx(0.3, rel=0.05)
    assert abs(many.mean()) < 0.01
    assert torch.equal(first, parts.draw("embed", small.to("meta"), 5, 1.0))
    if torch.cuda.is_available():
        there = small.cuda()
        first = parts.draw("embed", there, 5, 1.0)
        assert first.is_cuda and torch.equal(first, parts.draw("embed", there, 5, 1.0))


def test_numbers_stay_what_they_were():
    """Runs and their golden losses stand on them."""
    found = parts.draw("embed", torch.empty(2, 2), 0, 0.5).flatten().tolist()
    assert found == pytest.approx(
        [0.292031466960907, 0.7594886422157288, -0.44728967547416687, 0.6070046424865723]
    )


# --- Documents


def test_where_documents_start():
    starts = parts.document_starts(INPUTS, CU_SEQLENS)
    assert starts.int().tolist() == [[1, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]


def test_the_value_before_within_a_document():
    starts = parts.document_starts(INPUTS, CU_SEQLENS)
    before = parts.previous(INPUTS, starts, torch.full_like(INPUTS, -1))
    assert before.tolist() == [[-1, 0, -1, 2, 3, 4], [-1, -1, 7, 8, 9, 10]]

    vectors = torch.stack([INPUTS, 100 * INPUTS], -1)  # (B, T, 2)
    before = parts.previous(vectors, starts[..., None], vectors)
    assert before[0].tolist() == [[0, 0], [0, 0], [2, 200], [2, 200], [3, 300], [4, 400]]


def test_later_targets_end_with_their_document():
    starts = parts.document_starts(INPUTS, CU_SEQLENS)
    targets = INPUTS + 1
    later = parts.later_targets(targets, starts, 3)
    assert torch.equal(later[..., 0], targets)  # each document's last one belongs to the loader
    assert later[0, :, 1].tolist() == [2, IGNORE, 4, 5, 6, IGNORE]
    assert later[1, :, 1].tolist() == [IGNORE, 9, 10, 11, 12, IGNORE]
    assert later[0, :, 2].tolist() == [IGNORE, IGNORE, 5, 6, IGNORE, IGNORE]
    assert later[1, :, 2].tolist() == [IGNORE, 10, 11, 12, IGNORE, IGNORE]
    assert torch.equal(parts.later_targets(targets, starts, 1), targets[..., None])


# --- Gates and the softcap


def test_a_gate_is_between_0_and_2_and_sees_the_first_dimensions_only():
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    w = torch.randn(4, parts.GATE_INPUTS, generator=torch.Generator().manual_seed(1))
    found = parts.gate(x, w)
    assert found.shape == (2, 3, 4)
    expected = 2 / (1 + torch.exp(-x[..., :12].double() @ w.double().T))
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
    x[..., 12:] = 7.0
    assert torch.equal(parts.gate(x, w), found)
    assert (parts.gate(x, torch.zeros_like(w)) == 1).all()
    assert parts.gate(x.bfloat16(), w).dtype == torch.bfloat16


def test_the_softcap():
    z = torch.tensor([-100.0, -5.0, 0.0, 100.0])
    assert parts.softcap(z, ()) is z
    capped = parts.softcap(z, (23.0, 5.0, 7.5))
    assert capped.tolist() == pytest.approx([23 / (1 + math.exp(-(x + 5) / 7.5)) for x in z])


# --- Rotary frequencies


def test_frequencies_without_yarn():
    for n, base in ((1, 10.0), (2, 100.0), (32, 1024.0)):
        expected = [base ** -(k / max(1, n - 1)) for k in range(n)]
        for windows in ((), (5,)):
            assert parts.rope_frequencies(base, n, windows).tolist() == pytest.approx(expected)


def yarn_by_the_formula(freqs, old, new, alpha=1.0, beta=32.0):
    """Peng et al.: g(lambda) = (1 - ramp) g / s + ramp g, ramp by how many turns a wave makes in
    the old context."""
    s = new / old
    result = []
    for g in freqs:
        wavelength = 2 * math.pi / g
        turns = old / wavelength
        ramp = min(1, max(0, (turns - alpha) / (beta - alpha)))
        result.append((1 - ramp) * g / s + ramp * g)
    return result


@pytest.mark.parametrize("windows", [(384,), (384, 896), (384, 896, 1408)], ids=str)
def test_yarn_is_the_published_formula_at_each_change(windows):
    freqs = [1024 ** -(k / 31) for k in range(32)]
    for old, new in zip(windows, windows[1:]):
        freqs = yarn_by_the_formula(freqs, old, new)
    assert parts.rope_frequencies(1024.0, 32, windows).tolist() == pytest.approx(freqs, rel=1e-5)


def test_yarn_keeps_what_turns_often_and_stretches_what_does_not():
    before = parts.rope_frequencies(1024.0, 32, (384,))
    after = parts.rope_frequencies(1024.0, 32, (384, 896))
    turns = 384 * before / (2 * math.pi)
    quick = turns >= 32
    assert quick.any()
    assert torch.equal(after[quick], before[quick])
    slow = turns <= 1
    assert slow.any()
    torch.testing.assert_close(after[slow], before[slow] * 384 / 896)
    assert (after <= before).all()
    assert (after.diff() < 0).all()
    # No change of the window, no change
    assert torch.equal(parts.rope_frequencies(1024.0, 32, (384, 384)), before)


def test_yarns_scale_is_the_records():
    """0.100, 0.117, 0.128 at windows 384, 896, 1408."""
    scales = [parts.yarn_scale((384, 896, 1408)[:n]) for n in (0, 1, 2, 3)]
    assert [0.1 * s for s in scales] == pytest.approx([0.1, 0.1, 0.117, 0.128], abs=5e-4)


# --- Targets that count


def test_only_what_counts_is_computed():
    """Of targets with several columns, each row with one that counts; all where nearly all do."""
    targets = torch.full((20,), IGNORE)
    assert parts.counted(targets) is None  # nothing to compute
    targets[[3, 7]] = 5
    kept = parts.counted(targets)
    assert kept.tolist() == [3, 7]
    assert parts.counted(torch.stack([torch.full((20,), IGNORE), targets], 1)).tolist() == [3, 7]
    x = torch.arange(40.0).view(20, 2)
    assert [n.tolist() for n in parts.only(kept, x, targets)] == [[[6, 7], [14, 15]], [5, 5]]
    back = parts.spread(kept, torch.tensor([1.5, 2.5]), 20)
    assert back[[3, 7]].tolist() == [1.5, 2.5] and back.count_nonzero() == 2
    targets[:19] = 5
    assert parts.counted(targets) is None
    assert parts.only(None, x)[0] is x and parts.spread(None, x, 20) is x


def test_many_counted_targets_are_filled_up_with_others():
    """So that their number is one of few; each is there once, and those that count all are."""
    targets = torch.full((2000,), IGNORE)
    counting = torch.arange(0, 2000, 3)  # 667
    targets[counting] = 5
    kept = parts.counted(targets)
    assert len(kept) == len(kept.unique()) == 768
    assert set(counting.tolist()) <= set(kept.tolist())
    assert (targets[kept] == 5).sum() == 667
