"""The schedules of train_gpt.py: plain functions of progress."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from train_gpt import (
    Config,
    by_stage,
    layer_windows,
    lr_scale,
    muon_momentum,
    progress_at,
    rope_frequencies,
    stage_at,
    stage_number,
    target_weights,
    val_stage,
)

quick = settings(deadline=None, max_examples=200, database=None)
progresses = st.floats(0, 1)
multipliers = st.lists(st.floats(0.1, 4), min_size=1, max_size=6).map(tuple)
cooldowns = st.one_of(st.just(0.0), st.floats(0.01, 1))


# --- stages


def test_by_stage_borders():
    """A stage begins exactly at its border; the last one includes progress 1."""
    progress = (0, 0.2499, 0.25, 0.4999, 0.5, 0.75, 0.9999, 1.0)
    assert [by_stage("abcd", x) for x in progress] == list("aabbcddd")
    assert by_stage((7,), 0.0) == by_stage((7,), 0.5) == by_stage((7,), 1.0) == 7


@pytest.mark.parametrize("n", range(1, 8))
def test_every_stage_gets_its_steps(n):
    """For progress = step / steps, step belongs to stage floor(n step / steps), without rounding
    errors."""
    for steps in (1, 7, 49, 98, 100, 500, 1000, 1774):
        for step in range(steps):
            assert by_stage(range(n), step / steps) == math.floor(Fraction(n * step, steps)), (
                step,
                steps,
            )


@quick
@given(progresses, progresses, st.integers(1, 9))
def test_stages_never_go_back(a, b, n):
    assert by_stage(range(n), min(a, b)) <= by_stage(range(n), max(a, b))


@pytest.mark.parametrize(
    "n, long, far",
    [(1, (), {0}), (2, (), {1}), (4, (3,), {3}), (8, (3, 0), {0, 3, 7}), (11, (3, 10), {3, 10})],
)
def test_long_layers_and_the_last_see_far(n, long, far):
    windows = layer_windows(Config(n_layer=n, long_layers=long, value_embed_layers=(0,)), 5, 9)
    assert windows == tuple(9 if i in far else 5 for i in range(n))


def test_the_extension_stays_where_the_schedules_end():
    c = Config(
        steps=12,
        extension=2,
        short_window=(1, 2),
        batch_tokens=(256, 512),
        lr_floor=0.15,
        tied=1.0,
        mtp=(3, 2),
    )
    assert [progress_at(c, step) for step in range(12)] == [
        *(step / 10 for step in range(10)),
        1.0,
        1.0,
    ]
    assert lr_scale(c, progress_at(c, 11)) == pytest.approx(0.15)
    assert muon_momentum(progress_at(c, 11)) == pytest.approx(0.85)
    assert target_weights(c, progress_at(c, 11)) == [1.0, 0.0]
    assert stage_at(c, progress_at(c, 11)) == stage_at(c, progress_at(c, 9))._replace(tied=False)
    assert [progress_at(Config(steps=4), step) for step in range(4)] == [0, 0.25, 0.5, 0.75]


def staged(**kwargs):
    return Config(
        **dict(
            n_layer=4,
            row_len=64,
            batch_tokens=(128, 256, 640),
            max_doc_len=(16, 1000),
            short_window=(1, 2, 3),
            long_window=(10, 20),
        )
        | kwargs
    )


def test_stage_at():
    """Every tuple has its own number of stages; rows are batch_tokens over row_len; documents
    fit a row."""
    c = staged()
    expected = {  # progress: windows, max_doc_len, rows
        0.0: ((1, 1, 1, 10), 16, 2),
        0.3333: ((1, 1, 1, 10), 16, 2),
        0.3334: ((2, 2, 2, 10), 16, 4),
        0.5: ((2, 2, 2, 20), 64, 4),
        0.6667: ((3, 3, 3, 20), 64, 10),
        1.0: ((3, 3, 3, 20), 64, 10),
    }
    for progress, stage in expected.items():
        assert stage_at(c, progress)[:3] == stage
        assert stage_at(c, progress)[3:] == (1.36 / 8, False, 1, 0)


def test_stages_can_be_told_apart_and_counted():
    """The run compiles once for every different stage: equal stages must be equal and hashable."""
    c = staged()
    assert len({stage_at(c, step / 600) for step in range(600)}) == 4
    assert stage_at(c, 0.34) == stage_at(c, 0.49) != stage_at(c, 0.51)
    assert len({stage_at(Config(), step / 600) for step in range(600)}) == 1


@quick
@given(progresses)
def test_stage_values_are_among_those_configured(progress):
    c = staged()
    windows, max_doc_len, rows, *_ = stage_at(c, progress)
    assert len(windows) == 4 and set(windows[:3]) < {1, 2, 3} and windows[3] in (10, 20)
    assert max_doc_len in (16, 64) and rows in (2, 4, 10)


@pytest.mark.parametrize("n_layer", range(1, 12))
def test_validation_sees_the_last_windows_or_its_own(n_layer):
    """Whatever the stage; documents are as long as its rows, scale and head are the stage's."""
    c = staged(
        n_layer=n_layer,
        value_embed_layers=(),
        yarn=True,
        tied=0.5,
        mtp=(3, 2),
        sampled_softmax=(64,),
        val_row_len=100,
    )
    for progress in (0.0, 0.4, 0.6, 1.0):
        stage = stage_at(c, progress)
        last, own = (
            val_stage(c, stage),
            val_stage(staged(**{**vars(c), "val_windows": (5, 7)}), stage),
        )
        assert last.windows == layer_windows(c, 3, 20) and own.windows == layer_windows(c, 5, 7)
        for val in (last, own):
            assert val[1:] == (100, 0, stage.attn_scale, stage.tied, 1, 0)


def test_tied_for_its_fraction_of_training():
    for tied, steps in ((0.0, 0), (0.25, 5), (0.66, 14), (1.0, 20)):
        c = Config(tied=tied)
        assert [stage_at(c, step / 20).tied for step in range(20)] == [True] * steps + [False] * (
            20 - steps
        )


# --- the next tokens' weights


RECORD = Config(mtp=(3, 2, 1))


@pytest.mark.parametrize(
    "progress, weights",
    [
        (0.0, [1, 0.5, 0.25]),
        (1 / 6, [1, 0.5, 0.125]),
        (1 / 3 - 1e-9, [1, 0.5, 0]),
        (1 / 3 + 1e-9, [1, 0.5]),
        (1 / 2, [1, 0.25]),
        (2 / 3 - 1e-9, [1, 0]),
        (2 / 3 + 1e-9, None),
        (1.0, None),
    ],
)
def test_target_weights_are_the_records(progress, weights):
    """Stage 1: 1, .5, .25 -> 0; stage 2: 1, .5 -> 0; stage 3: 1."""
    assert target_weights(RECORD, progress) == (weights and pytest.approx(weights, abs=1e-7))


@quick
@given(progresses, st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple))
def test_target_weights_of_any_schedule(progress, mtp):
    """As many as the stage has targets, which is what is compiled for; falling, and all but the
    last fixed."""
    c = Config(mtp=mtp)
    n, weights = stage_at(c, progress).n_targets, target_weights(c, progress)
    assert n == by_stage(mtp, progress)
    if n == 1:
        assert weights is None
    else:
        assert (
            len(weights) == n
            and weights[:-1] == [0.5**k for k in range(n - 1)]
            and 0 <= weights[-1] <= 0.5 ** (n - 1)
        )


# --- rotary frequencies


YARN = Config(
    n_embd=512, n_head=4, row_len=64, batch_tokens=(64,), yarn=True, long_window=(384, 896, 1408)
)


def test_rotary_frequencies_without_yarn():
    for n, base in ((1, 10.0), (2, 100.0), (32, 1024.0)):
        expected = [base ** -(k / max(1, n - 1)) for k in range(n)]
        for windows in ((), (5,), (5, 7, 9)):
            assert rope_frequencies(Config(rope_base=base), n, windows).tolist() == pytest.approx(
                expected
            )


def yarn_by_the_formula(freqs, old, new, alpha=1.0, beta=32.0):
    """Peng et al.: g(lambda) = (1 - ramp) g / s + ramp g, ramp by how many turns a wave makes in
    the old context."""
    s, result = new / old, []
    for g in freqs:
        wavelength = 2 * math.pi / g
        r = old / wavelength
        ramp = 0 if r < alpha else 1 if r > beta else (r - alpha) / (beta - alpha)
        result.append((1 - ramp) * g / s + ramp * g)
    return result


def test_yarn_is_the_published_formula_at_each_change():
    for upto in (1, 2, 3):
        freqs, windows = [1024 ** -(k / 31) for k in range(32)], YARN.long_window[:upto]
        for old, new in zip(windows, windows[1:]):
            freqs = yarn_by_the_formula(freqs, old, new)
        assert rope_frequencies(YARN, 32, windows).tolist() == pytest.approx(freqs, rel=1e-5)


def test_yarn_keeps_what_turns_often_and_stretches_what_does_not():
    before, after = rope_frequencies(YARN, 32, (384,)), rope_frequencies(YARN, 32, (384, 896))
    turns = 384 * before / (2 * math.pi)
    assert torch.equal(after[turns >= 32], before[turns >= 32]) and (turns >= 32).any()
    slow = turns <= 1
    torch.testing.assert_close(after[slow], before[slow] * 384 / 896)
    assert slow.any() and (after <= before).all() and (after.diff() < 0).all()
    assert torch.equal(
        rope_frequencies(YARN, 32, (384, 384)), before
    )  # no change of the window, no change


def test_yarns_scale_is_the_records():
    """0.100, 0.117, 0.128 at windows 384, 896, 1408."""
    scales = [stage_at(YARN, progress).attn_scale for progress in (0.0, 0.5, 1.0)]
    assert scales[0] == pytest.approx(1.36 / math.sqrt(128))
    assert [0.1 * s / scales[0] for s in scales] == pytest.approx([0.100, 0.117, 0.128], abs=5e-4)
    assert {
        stage_at(Config(**{**vars(YARN), "yarn": False}), p).attn_scale for p in (0.0, 0.5, 1.0)
    } == {scales[0]}


def test_the_tables_and_the_scale_change_at_the_same_steps():
    """enter() fills the tables for the windows up to a step's stage; the stage holds the scale."""
    steps = 100
    for step in range(steps):
        windows = YARN.long_window[: stage_number(YARN.long_window, step / steps) + 1]
        assert windows[-1] == stage_at(YARN, step / steps).windows[-1]
        assert stage_at(YARN, step / steps).attn_scale / stage_at(
            YARN, 0
        ).attn_scale == pytest.approx(
            math.prod(1 + 0.2 * math.log(b / a) for a, b in zip(windows, windows[1:]))
        )


# --- learning rate


def test_lr_is_flat_then_falls_linearly_to_the_floor():
    c = Config(cooldown=0.4, lr_floor=0.2)
    corners = {0: 1, 0.3: 1, 0.6: 1, 0.7: 0.8, 0.8: 0.6, 0.9: 0.4, 0.999: 0.202, 1: 0.2}
    for progress, expected in corners.items():
        assert lr_scale(c, progress) == pytest.approx(expected), progress


def test_no_cooldown_stays_flat():
    c = Config(cooldown=0.0, lr_floor=0.2)
    assert {lr_scale(c, step / 100) for step in range(101)} == {1.0}


def test_cooldown_over_all_of_training():
    c = Config(cooldown=1.0, lr_floor=0.1)
    for step in range(101):
        assert lr_scale(c, step / 100) == pytest.approx(1 - 0.9 * step / 100)


def test_floor_of_zero_ends_at_zero():
    assert lr_scale(Config(cooldown=0.5, lr_floor=0.0), 1.0) == pytest.approx(0, abs=1e-12)


def test_stage_multipliers_and_their_blend_with_the_floor():
    """Flat at 1, 1.5, then from the third stage's multiplier: 2 (1 - t) + floor t."""
    c = Config(stage_lr=(1.0, 1.5, 2.0), cooldown=1 / 3, lr_floor=0.2)
    corners = {0.2: 1, 0.3334: 1.5, 0.6: 1.5, 0.66666: 1.5, 0.66668: 2, 5 / 6: 1.1, 1: 0.2}
    for progress, expected in corners.items():
        assert lr_scale(c, progress) == pytest.approx(expected, abs=1e-3), progress


def test_a_stage_may_change_within_the_cooldown():
    """There the multiplier's jump counts by the part that is not cooled down yet, and the end is
    the same."""
    c = Config(stage_lr=(1.0, 3.0), cooldown=0.8, lr_floor=0.1)
    t = (0.5 - 0.2) / 0.8
    assert lr_scale(c, 0.5) - lr_scale(c, 0.5 - 1e-9) == pytest.approx(2 * (1 - t), abs=1e-6)
    assert lr_scale(c, 1.0) == pytest.approx(0.1)


@quick
@given(progresses, multipliers, cooldowns, st.floats(0, 1))
def test_lr_stays_between_the_floor_and_the_multipliers(progress, stage_lr, cooldown, floor):
    values = [floor, *stage_lr]
    lr = lr_scale(Config(stage_lr=stage_lr, cooldown=cooldown, lr_floor=floor), progress)
    assert min(values) - 1e-9 <= lr <= max(values) + 1e-9
    if progress < 1 - cooldown:
        assert lr == by_stage(stage_lr, progress)


@quick
@given(progresses, progresses, cooldowns, st.floats(0, 1))
def test_lr_of_one_stage_never_rises(a, b, cooldown, floor):
    c = Config(cooldown=cooldown, lr_floor=floor)
    assert lr_scale(c, max(a, b)) <= lr_scale(c, min(a, b)) + 1e-9


@quick
@given(progresses, cooldowns)
def test_lr_of_one_stage_has_no_jumps(progress, cooldown):
    assume(cooldown > 0 and progress < 1 - 1e-6)
    c = Config(cooldown=cooldown, lr_floor=0.0)
    assert abs(lr_scale(c, progress + 1e-6) - lr_scale(c, progress)) <= 1.01e-6 / cooldown


# --- momentum


def test_muon_momentum_at_its_corners():
    corners = {0: 0.85, 0.1: 0.9, 0.2: 0.95, 0.5: 0.95, 0.96: 0.95, 0.98: 0.9, 1: 0.85}
    for progress, expected in corners.items():
        assert muon_momentum(progress) == pytest.approx(expected), progress


@quick
@given(progresses, progresses)
def test_muon_momentum_rises_stays_and_falls(a, b):
    a, b = sorted((a, b))
    at_a, at_b = muon_momentum(a), muon_momentum(b)
    assert 0.85 - 1e-12 <= at_a <= 0.95 + 1e-12
    if b <= 0.2:
        assert at_a <= at_b
    if a >= 0.2 and b <= 0.96:
        assert at_a == pytest.approx(at_b) == pytest.approx(0.95)
    if a >= 0.96:
        assert at_a >= at_b
    assert abs(at_a - at_b) <= 2.5 * (b - a) + 1e-12  # no jumps
