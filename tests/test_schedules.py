"""The schedules of train_gpt.py: plain functions of progress."""

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings, strategies as st

from train_gpt import Config, by_stage, layer_windows, lr_scale, muon_momentum, stage_at

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
    """For progress = step / steps, step belongs to stage floor(n step / steps), without rounding errors."""
    for steps in (1, 7, 49, 98, 100, 500, 1000, 1774):
        for step in range(steps):
            assert by_stage(range(n), step / steps) == math.floor(Fraction(n * step, steps)), (step, steps)


@quick
@given(progresses, progresses, st.integers(1, 9))
def test_stages_never_go_back(a, b, n):
    assert by_stage(range(n), min(a, b)) <= by_stage(range(n), max(a, b))


@pytest.mark.parametrize("n, far", [(1, {0}), (2, {1}), (4, {3}), (5, {3, 4}), (8, {3, 7}), (11, {3, 7, 10})])
def test_every_fourth_layer_and_the_last_see_far(n, far):
    windows = layer_windows(Config(n_layer=n, value_embed_layers=(0,)), 5, 9)
    assert windows == tuple(9 if i in far else 5 for i in range(n))


def staged(**kwargs):
    return Config(**dict(n_layer=4, row_len=64, batch_tokens=(128, 256, 640), max_doc_len=(16, 1000),
                         short_window=(1, 2, 3), long_window=(10, 20)) | kwargs)


def test_stage_at():
    """Every tuple has its own number of stages; rows are batch_tokens over row_len; documents fit a row."""
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
        assert stage_at(c, progress) == stage


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
    windows, max_doc_len, rows = stage_at(c, progress)
    assert len(windows) == 4 and set(windows[:3]) < {1, 2, 3} and windows[3] in (10, 20)
    assert max_doc_len in (16, 64) and rows in (2, 4, 10)


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
    """There the multiplier's jump counts by the part that is not cooled down yet, and the end is the same."""
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
