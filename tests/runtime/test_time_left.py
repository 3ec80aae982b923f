"""runtime/time_left.py: the time that is left, counted in work."""

import pytest

from runtime.time_left import TimeLeft


def stages_of(*counts):
    """{step: number of its stage}: so many steps of each."""
    stages = {}
    for stage, count in enumerate(counts):
        for _ in range(count):
            stages[len(stages) + 1] = stage
    return stages


@pytest.mark.parametrize(
    "passes, besides, timed",
    [
        ((0.001, 0.001, 0.5), 0.01, (0.8, 1.0, 1.2)),
        ((0.1, 0.4, 2.0), 0.2, (0.8, 1.0, 1.2)),
        ((0.1, 0.1, 0.1), 0.0, (0.8, 1.0, 1.2)),
        ((2.0, 1.0, 0.1), 0.3, (0.9, 1.0, 1.1)),
    ],
)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_it_is_right_from_the_tenth_step_on(passes, besides, timed, which):
    """Within 25%, whatever batches do later, although passes were timed too short or long."""
    timed = timed[which]
    stages = stages_of(20, 20, 20)
    took = {step: passes[stage] + besides for step, stage in stages.items()}
    for first, factor in (1, 50), (21, 2), (41, 2):
        took[first] *= factor  # where things are set up
    expected = {stage: timed * seconds for stage, seconds in enumerate(passes)}
    left = TimeLeft(stages, expected)
    for step in range(1, 61):
        left.add(step, took[step])
        if step >= 10:
            # Steps that set things up are not foreseen
            truth = sum(passes[stages[s]] + besides for s in range(step + 1, 61))
            assert left.seconds() == pytest.approx(truth, rel=0.25, abs=1e-9)
    assert left.seconds() == 0


def test_of_one_stage_nothing_need_be_known_before():
    left = TimeLeft(stages_of(100), {})
    assert left.seconds() == 0  # nothing is known yet
    left.add(1, 9.0)
    assert left.seconds() == 99 * 9.0
    left.add(2, 1.0)
    left.add(3, 2.0)
    assert left.seconds() == pytest.approx(97 * 1.5)


def test_of_stages_that_were_not_timed_the_average_counts():
    left = TimeLeft(stages_of(3, 7), {})
    for step in 1, 2, 3:
        left.add(step, 2.0)
    assert left.seconds() == pytest.approx(7 * 2.0)


def test_a_run_that_goes_on_has_only_its_rest_to_do():
    left = TimeLeft(stages_of(10, 10), {0: 1.0, 1: 3.0})
    left.forget(12)
    left.add(13, 3.5)
    assert left.seconds() == pytest.approx(7 * 3.5)
