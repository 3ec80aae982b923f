"""The schedules of train_gpt.py: plain functions of the step or of progress."""

import dataclasses
import math
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import train_gpt as tg
from base import InputError
from base.options import by_stage
from runtime.resume import added_steps_in_words
from tracks import load_track
from train_gpt import Schedule, lr_scale, muon_momentum, stage_at

quick = settings(deadline=None, max_examples=200, database=None)
progresses = st.floats(0, 1)
multipliers = st.lists(st.floats(0.1, 4), min_size=1, max_size=6).map(tuple)
cooldowns = st.one_of(st.just(0.0), st.floats(0.01, 1))


# --- Stages


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
            expected = math.floor(Fraction(n * step, steps))
            assert by_stage(range(n), step / steps) == expected, (step, steps)


@quick
@given(progresses, progresses, st.integers(1, 9))
def test_stages_never_go_back(a, b, n):
    assert by_stage(range(n), min(a, b)) <= by_stage(range(n), max(a, b))


def test_progress_is_the_part_of_the_scheduled_steps_that_is_behind():
    assert [Schedule(steps=4).progress(step) for step in (1, 2, 3, 4)] == [0, 0.25, 0.5, 0.75]
    assert Schedule(steps=1).progress(1) == 0


def staged(**fields):
    base = dict(
        n_layer=4,
        row_len=64,
        batch_tokens=(128, 256, 640),
        max_doc_len=(16, 1000),
        short_window=(1, 2, 3),
        long_window=(10, 20),
        steps=600,
    )
    return tg.configure(**(base | fields))


def test_the_extension_stays_where_the_schedules_end():
    c = staged(steps=12, extension=2, lr_floor=0.15, tied=1.0, mtp=(3, 2))
    found = [c.schedule.progress(step) for step in range(1, 13)]
    assert found == [*(step / 10 for step in range(10)), 1.0, 1.0]
    end = c.schedule.progress(12)
    assert lr_scale(c.schedule, end) == pytest.approx(0.15)
    assert muon_momentum(end) == pytest.approx(0.85)
    assert c.model.target_weights(end) == [1.0, 0.0]
    last = stage_at(c, 10)
    assert stage_at(c, 12) == last._replace(model=last.model._replace(tied=False))


def test_the_extension_may_have_windows_of_its_own():
    """As one stage more, of which rotary frequencies and attention's scale know; validation and
    what is taught afterwards begin with them."""
    fields = dict(steps=12, extension=2, yarn=True)
    plain = staged(**fields)
    c = staged(**fields, extension_windows=(12, 40))
    for step in range(1, 11):
        assert stage_at(c, step) == stage_at(plain, step)
    before, found = stage_at(c, 10).model, stage_at(c, 11).model
    assert set(found.windows) == {12, 40} and found.windows[-1] == 40
    assert found.attn_scale == pytest.approx(before.attn_scale * (1 + 0.2 * math.log(40 / 20)))
    assert stage_at(c, 12).model == found
    assert c.model.long_windows(1.0) == (10, 20, 40)
    assert c.model.long_windows(0.99) == (10, 20)
    assert c.model.val_stage(before, 64).windows == found.windows
    assert c.model.val_stage(found, 64) == c.model.val_stage(before, 64)
    assert c.model.val_stage(before, 64).attn_scale == found.attn_scale
    ends = c.model.at_the_end()
    assert (ends["short_window"], ends["long_window"]) == ((12,), (40,))
    assert not ends["extension_windows"]
    own = dataclasses.replace(c.model, val_windows=(3, 4))
    assert set(own.val_stage(found, 64).windows) == {3, 4}


def test_the_record_track_validates_by_one_graph():
    """Of four stages, which have a scale of attention each and two embeddings."""
    c = tg.configure(**load_track("gpt2-small"))
    stages = set(tg.stages_of(c).values())
    assert len({(stage.model.attn_scale, stage.model.tied) for stage in stages}) >= 4
    assert len({c.model.val_stage(stage.model, c.data.val_row_len) for stage in stages}) == 1


def test_stage_at():
    """Rows are batch_tokens over row_len; documents fit a row; the model's part is its own."""
    c = staged()
    expected = {  # step: rows, max_doc_len
        1: (2, 16),
        200: (2, 16),
        201: (4, 16),
        300: (4, 16),
        301: (4, 64),
        400: (4, 64),
        401: (10, 64),
        600: (10, 64),
    }
    for step, (rows, max_doc_len) in expected.items():
        stage = stage_at(c, step)
        assert stage.rows == rows
        assert stage.model == c.model.stage((step - 1) / 600, max_doc_len)


def test_stages_can_be_told_apart_and_counted():
    """The run compiles once for every different stage: equal stages must be equal and hashable."""
    c = staged()
    assert len({stage_at(c, step) for step in range(1, 601)}) == 4
    assert stage_at(c, 205) == stage_at(c, 295)
    assert stage_at(c, 295) != stage_at(c, 305)
    one = tg.configure()
    assert len({stage_at(one, step) for step in range(1, 501)}) == 1


# --- Steps that are added to a run


def rates(schedule, *steps):
    return [lr_scale(schedule, schedule.progress(step), schedule.annealing(step)) for step in steps]


def test_added_steps_do_not_change_those_before():
    plain = Schedule(steps=100)
    for earlier in ((100, 100, "replan"),), ((60, 100, "cooldown"), (90, 150, "replan")):
        longer = Schedule(steps=200, earlier=earlier)
        before = range(1, earlier[0][0] + 1)
        assert [plain.progress(s) for s in before] == [longer.progress(s) for s in before]
        assert rates(plain, *before) == rates(longer, *before)


def test_replanned_steps_have_the_rate_of_a_run_of_that_length():
    """The end of the first 100 steps is at 0.15; then it is as if 200 had been meant all along."""
    longer = Schedule(steps=200, earlier=((100, 100, "replan"),))
    planned = Schedule(steps=200)
    assert rates(longer, 100)[0] < 0.17
    for step in (101, 150, 200):
        assert longer.annealing(step) == planned.annealing(step) == (step - 1) / 200
        assert rates(longer, step) == rates(planned, step)
    # Stopped before its cooldown, and with one stage, a run is the one that was meant to be longer
    stopped = Schedule(steps=200, earlier=((40, 100, "replan"),))
    assert rates(stopped, *range(1, 201)) == rates(planned, *range(1, 201))


def test_a_new_cooldown_falls_from_the_peak_over_the_added_steps():
    longer = Schedule(steps=150, lr_floor=0.1, earlier=((100, 100, "cooldown"),))
    assert rates(longer, 101) == [pytest.approx(1.0)]
    assert rates(longer, 126) == [pytest.approx(0.55)]
    assert rates(longer, 150)[0] == pytest.approx(1 - 0.9 * 49 / 50)
    flat = Schedule(steps=150, cooldown=0.0, earlier=((100, 100, "cooldown"),))
    assert set(rates(flat, *range(1, 151))) == {1.0}


def test_no_stage_comes_back_where_steps_are_added():
    """Batches stay as large as they were, heads untied; the stages that are left come later."""
    c = staged(steps=1200, tied=0.5, earlier=((450, 600, "replan"),))
    assert stage_at(c, 450).rows == stage_at(c, 451).rows == stage_at(c, 1200).rows == 10
    early = staged(steps=1200, tied=0.5, earlier=((100, 600, "replan"),))
    rows = [stage_at(early, step).rows for step in (100, 101, 400, 401, 800, 801)]
    assert rows == [2, 2, 2, 4, 4, 10]


@quick
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), max_size=3), st.integers(0, 20))
def test_progress_never_falls(parts, extension):
    """parts: (steps taken, steps left out) before more were added, each time."""
    earlier = []
    steps = 0
    after = 0
    for taken, left_out in parts:
        after += taken
        steps = max(steps + 1, after + left_out)
        earlier.append((after, steps, "replan"))
    schedule = Schedule(steps=steps + 21, extension=extension, earlier=tuple(earlier))
    found = [schedule.progress(step) for step in range(1, schedule.steps + 1)]
    assert found == sorted(found) and found[0] == 0 and found[-1] <= 1
    assert all(0 <= schedule.annealing(step) <= 1 for step in range(1, schedule.steps + 1))


def test_what_is_said_of_added_steps():
    def words(at, **fields):
        return added_steps_in_words(tg.configure(**fields), at, tg.lr_at)

    added = dict(steps=200, earlier=((100, 100, "replan"),))
    said = words(100, **added)
    assert said.startswith("100 steps more than the 100 planned: ")
    assert "0.16 of its peak in step 100, 0.86 in the next" in said
    assert words(150, **added) is None
    assert words(100) is None


# --- Learning rate


def test_lr_is_flat_then_falls_linearly_to_the_floor():
    c = Schedule(cooldown=0.4, lr_floor=0.2)
    corners = {0: 1, 0.3: 1, 0.6: 1, 0.7: 0.8, 0.8: 0.6, 0.9: 0.4, 0.999: 0.202, 1: 0.2}
    for progress, expected in corners.items():
        assert lr_scale(c, progress) == pytest.approx(expected), progress


def test_no_cooldown_stays_flat():
    c = Schedule(cooldown=0.0, lr_floor=0.2)
    assert {lr_scale(c, step / 100) for step in range(101)} == {1.0}


def test_cooldown_over_all_of_training():
    c = Schedule(cooldown=1.0, lr_floor=0.1)
    for step in range(101):
        assert lr_scale(c, step / 100) == pytest.approx(1 - 0.9 * step / 100)


def test_floor_of_zero_ends_at_zero():
    assert lr_scale(Schedule(cooldown=0.5, lr_floor=0.0), 1.0) == pytest.approx(0, abs=1e-12)


def test_stage_multipliers_and_their_blend_with_the_floor():
    """Flat at 1, 1.5, then from the third stage's multiplier: 2 (1 - t) + floor t."""
    c = Schedule(stage_lr=(1.0, 1.5, 2.0), cooldown=1 / 3, lr_floor=0.2)
    corners = {0.2: 1, 0.3334: 1.5, 0.6: 1.5, 0.66666: 1.5, 0.66668: 2, 5 / 6: 1.1, 1: 0.2}
    for progress, expected in corners.items():
        assert lr_scale(c, progress) == pytest.approx(expected, abs=1e-3), progress


def test_a_stage_may_change_within_the_cooldown():
    """There the multiplier's jump counts by the part that is not cooled down yet, and the end is
    the same."""
    c = Schedule(stage_lr=(1.0, 3.0), cooldown=0.8, lr_floor=0.1)
    t = (0.5 - 0.2) / 0.8
    assert lr_scale(c, 0.5) - lr_scale(c, 0.5 - 1e-9) == pytest.approx(2 * (1 - t), abs=1e-6)
    assert lr_scale(c, 1.0) == pytest.approx(0.1)


@quick
@given(progresses, multipliers, cooldowns, st.floats(0, 1))
def test_lr_stays_between_the_floor_and_the_multipliers(progress, stage_lr, cooldown, floor):
    values = [floor, *stage_lr]
    lr = lr_scale(Schedule(stage_lr=stage_lr, cooldown=cooldown, lr_floor=floor), progress)
    assert min(values) - 1e-9 <= lr <= max(values) + 1e-9
    if progress < 1 - cooldown:
        assert lr == by_stage(stage_lr, progress)


@quick
@given(progresses, progresses, cooldowns, st.floats(0, 1))
def test_lr_of_one_stage_never_rises(a, b, cooldown, floor):
    c = Schedule(cooldown=cooldown, lr_floor=floor)
    assert lr_scale(c, max(a, b)) <= lr_scale(c, min(a, b)) + 1e-9


@quick
@given(progresses, cooldowns)
def test_lr_of_one_stage_has_no_jumps(progress, cooldown):
    assume(cooldown > 0 and progress < 1 - 1e-6)
    c = Schedule(cooldown=cooldown, lr_floor=0.0)
    assert abs(lr_scale(c, progress + 1e-6) - lr_scale(c, progress)) <= 1.01e-6 / cooldown


# --- Momentum


def test_muon_momentum_at_its_corners():
    corners = {0: 0.85, 0.1: 0.9, 0.2: 0.95, 0.5: 0.95, 0.96: 0.95, 0.98: 0.9, 1: 0.85}
    for progress, expected in corners.items():
        assert muon_momentum(progress) == pytest.approx(expected), progress


def test_momentum_falls_until_the_last_step():
    """The extension's as well; its warm-up is an option."""
    c = staged(steps=1000, extension=100, momentum_warmup=0.5)
    for step, expected in ((1, 0.85), (251, 0.9), (501, 0.95), (961, 0.95), (981, 0.9)):
        assert tg.momentum_at(c, step) == pytest.approx(expected), step
    assert tg.momentum_at(c, 1000) == pytest.approx(0.8525)
    assert tg.momentum_at(staged(momentum_warmup=0.0), 1) == pytest.approx(0.95)


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


# --- AdamW's


def adamw(**fields):
    base = dict(optimizer="adamw", steps=100, adamw_warmup=20, adamw_floor=0.1)
    return tg.configure(**(base | fields))


def test_adamw_warms_up_and_falls_by_a_cosine():
    c = adamw()
    found = [tg.lr_at(c, step) for step in range(1, 101)]
    assert found[:20] == pytest.approx([step / 20 for step in range(1, 21)])
    assert found[20] == pytest.approx(1.0)  # the first step behind the warm-up is at the peak
    assert found[60] == pytest.approx(0.1 + 0.9 / 2)  # half of the way
    assert found[20:] == sorted(found[20:], reverse=True)
    assert found[-1] == pytest.approx(0.1, abs=1e-3)
    assert tg.lr_at(adamw(adamw_warmup=0), 1) == 1.0
    # What is Muon's changes nothing
    other = adamw(cooldown=0.1, lr_floor=0.9, stage_lr=(2.0, 3.0))
    assert [tg.lr_at(other, step) for step in range(1, 101)] == found


def test_adamw_may_begin_anew_where_steps_are_added():
    c = adamw(steps=200, earlier=((100, 100, "cooldown"),))
    assert [tg.lr_at(c, s) for s in (5, 20, 100)] == [tg.lr_at(adamw(), s) for s in (5, 20, 100)]
    assert tg.lr_at(c, 101) == pytest.approx(1.0)  # without another warm-up
    assert tg.lr_at(c, 200) == pytest.approx(0.1, abs=1e-3)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(InputError, match="--adamw-warmup 20: expected fewer than steps .20."):
        adamw(steps=20)
    tg.configure(steps=20, adamw_warmup=20)  # with muon there is none


def test_steps_that_are_asked_for_are_taken(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some words " * 100)
    assert tg.parse_args(["--text", str(text)]).schedule.max_epochs == 3.0
    assert tg.parse_args(["--text", str(text), "--steps", "900"]).schedule.max_epochs == 0.0
    both = ["--text", str(text), "--steps", "900", "--max-epochs", "2"]
    assert tg.parse_args(both).schedule.max_epochs == 2.0
