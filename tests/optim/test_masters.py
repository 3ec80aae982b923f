"""bf16 weights and what is missing from their masters, bit for bit; steps that are too small for
bf16; cautious decay."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from kernel_checks import DEVICE, draw
from optim_helpers import KINDS, bits, flag, start_at

from optim import adam_update, muon_update
from optim.masters import average, descend, join, new_companion, split, store
from optim.muon import new_second_moment


def from_bits(patterns):
    return torch.tensor(patterns, dtype=torch.int32, device=DEVICE).view(torch.float32)


# --- p and the 16 bits


def check_split(x):
    """Of any fp32 numbers: their halves give back every bit, and p is the nearest bf16."""
    p, low = split(x)
    assert p.dtype == torch.bfloat16
    assert low.dtype == torch.int16
    nan = x.isnan()
    assert torch.equal(p.isnan(), nan)
    assert join(p, low)[nan].isnan().all()
    x = x[~nan]
    p = p[~nan]
    low = low[~nan]
    assert torch.equal(bits(join(p, low)), bits(x))

    # Halfway cases go away from zero: to the next one up in magnitude
    halfway = bits(x) & 0xFFFF == 0x8000
    assert torch.equal(bits(p)[~halfway], bits(x.bfloat16())[~halfway])
    away = ((bits(x)[halfway] >> 16) + 1).to(torch.int16)
    assert torch.equal(bits(p)[halfway], away)
    assert (low[halfway] == -(2**15)).all()


def test_every_upper_half_with_every_kind_of_lower_half():
    """All signs, exponents and leading bits, so zeros, subnormals, infinities and NaN too."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=DEVICE)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32, device=DEVICE)
    check_split((upper | lower).flatten().view(torch.float32))


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=200))
def test_any_bits(patterns):
    check_split(from_bits(patterns))


@pytest.mark.parametrize(
    "pattern, p, low",
    [
        (0x3F800000, 1.0, 0),
        (0x3F800001, 1.0, 1),
        (0x3F80FFFF, 1.0078125, -1),
        (-(2**31), -0.0, 0),
        (1, 0.0, 1),
        (0x7F7FFFFF, float("inf"), -1),  # the largest fp32, beyond the largest bf16
        (0x7F7F7FFF, float.fromhex("0x1.fep127"), 2**15 - 1),
        (0x7F800000, float("inf"), 0),
        (-0x800000, -float("inf"), 0),
    ],
)
def test_values_by_hand(pattern, p, low):
    high, rest = split(from_bits([pattern]))
    assert high.item() == p
    assert str(high.item())[0] == str(p)[0]  # the sign of zero
    assert rest.item() == low


@pytest.mark.parametrize("pattern", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0x7F807FFF, -1, -0x7FFFFF])
def test_nan_is_seen_in_the_weight(pattern):
    """0x7FFFFFFF is what CUDA makes: rounded up it would be -0; 0x7F800001, rounded down,
    infinity."""
    p, low = split(from_bits([pattern]))
    assert p.isnan().all()
    assert join(p, low).isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_update_reaches_the_weight(kind):
    p, companion = start_at(kind, torch.ones(4, device=DEVICE))
    update = torch.tensor([0.0, float("nan"), 1.0, 0.0], device=DEVICE)
    descend(p, companion, update, 0.1)
    assert p.isnan().tolist() == [False, True, False, False]
    assert join(p, companion).isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("kind", KINDS)
def test_join_gives_what_was_stored(kind):
    p, companion = start_at(kind, draw(100))
    master = draw(100, seed=1)
    store(p, companion, master)
    assert torch.equal(join(p, companion), master)
    assert torch.equal(p, master.to(p.dtype))


def test_new_companions():
    """Fresh weights are their own masters; fp32 ones need nothing."""
    assert new_companion(draw(5)) is None
    for dtype in (torch.bfloat16, torch.float16):
        p = draw(3, 5, dtype=dtype)
        companion = new_companion(p)
        assert companion.shape == p.shape
        assert companion.data_ptr() != p.data_ptr()
        assert torch.equal(join(p, companion), p.float())
    dtype = torch.int16 if DEVICE.type == "cuda" else torch.float32
    assert new_companion(draw(5, dtype=torch.bfloat16)).dtype == dtype


# --- Many steps


def test_all_kinds_have_the_same_masters():
    """Bit for bit, with everything on: 16 bits beside a bf16 weight are as good as fp32 weights.
    30 rounds of Adam, Muon and NorMuon, of which the guard drops some."""
    start = draw(6, 5, 8).bfloat16().float()
    found = []
    for kind in KINDS:
        p, companion = start_at(kind, start)
        m = torch.zeros_like(start)
        v = new_second_moment(p)
        adams = torch.zeros(2, start.numel(), device=DEVICE)
        flat = p.view(-1), None if companion is None else companion.view(-1)
        for i in range(30):
            g = draw(6, 5, 8, seed=i).bfloat16()
            adam_update(*flat, g.view(-1), *adams, 0.01, 0.9, 0.99, 1e-8, 0.1, 0.01, shrink=0.001)
            muon_update(p, companion, g, m, 0.02, 0.9, shrink=0.001)
            muon_update(p, companion, g, m, 0.02, 0.9, v, shrink=0.001, ok=flag(i % 7 != 3))
            # The weight is as near its master as any number of its dtype
            master = join(p, companion)
            nearest = (master.to(p.dtype).float() - master).abs()
            assert ((p.float() - master).abs() <= nearest).all()
        found.append(master)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_updates_too_small_for_bf16(kind):
    """At 1.0 bf16 cannot take off 1e-5; the master loses nothing, and the weight follows it."""
    p, companion = start_at(kind, torch.ones(64, device=DEVICE))
    master = torch.ones(64, device=DEVICE)
    update = torch.linspace(0.5, 1.0, 64, device=DEVICE).to(p.dtype)
    for _ in range(1000):
        descend(p, companion, update, 1e-5, 1e-6)
        master = master * (1 - 1e-6) - 1e-5 * update.float()
    assert torch.equal(join(p, companion), master)
    assert torch.equal(p, master.to(p.dtype))
    assert (master < 0.995).all()
    assert torch.ones(1).bfloat16() - 1e-5 == 1


def test_an_average_leaves_every_bit_where_the_guard_says_so():
    x = draw(20)
    before = x.clone()
    average(x, 0.9, torch.full_like(x, float("nan")), flag(False))
    assert torch.equal(bits(x), bits(before))
    for ok in (None, True, flag(True)):
        x.copy_(before)
        average(x, 0.9, torch.ones_like(x), ok)
        assert torch.equal(x, before * 0.9 + 1)


# --- Cautious decay

NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 1e-3, -3e4]) | st.floats(
    -10, 10, width=32
).filter(lambda x: x == 0 or abs(x) > 1e-6)  # far from eps, and products that fp32 has


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=50), st.floats(0, 0.5))
def test_decay_only_where_step_and_decay_agree(pairs, shrink):
    """Each weight by itself, in float64."""
    start, update = torch.tensor(pairs, device=DEVICE).unbind(1)
    p = start.clone()
    descend(p, None, update, 0.1, shrink)
    # With no gradient, Adam steps along the sign of its average
    q = start.clone()
    zero = torch.zeros_like(q)
    m = update.clone()
    adam_update(q, None, zero, m, m.square(), 0.1, 1.0, 1.0, 1e-12, 1.0, 1.0, shrink)
    for (w, u), by_descend, by_adam in zip(pairs, p.tolist(), q.tolist()):
        sign = (u > 0) - (u < 0)
        decay = shrink * w if u * w > 0 else 0
        assert by_descend == pytest.approx(w - 0.1 * u - decay, rel=1e-5, abs=1e-5)
        assert by_adam == pytest.approx(w - 0.1 * sign - decay, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_decay_where_there_is_no_step(kind):
    """Rows that no token used keep their weights."""
    p, companion = start_at(kind, draw(20))
    before = join(p, companion).clone()
    zero = torch.zeros_like(p)
    descend(p, companion, zero, 0.1, 0.5)
    assert torch.equal(join(p, companion), before)
    moments = torch.zeros(2, 20, device=DEVICE)
    adam_update(p, companion, zero, *moments, 0.1, 0.9, 0.99, 1e-8, 0.1, 0.01, shrink=0.5)
    assert torch.equal(join(p, companion), before)
