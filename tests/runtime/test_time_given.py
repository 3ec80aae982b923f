"""How many steps a time allows, and what trying them leaves behind: nothing."""

import json

import pytest
from helpers import SMALL_MODEL, tiny, train_losses, write_text

import train_gpt as tg
from base import InputError, clock
from runtime import resume, time_given


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture
def measured(monkeypatch):
    """Steps of half a second, and batches of validation of a fifth."""

    def step(work):
        work()
        return 0.5

    monkeypatch.setattr(time_given, "least_seconds", step)
    monkeypatch.setattr(time_given, "best_seconds", lambda device, work, repeats: 0.2)
    monkeypatch.setattr(tg, "expected_training", time_given.expected_training)
    monkeypatch.setattr(clock, "_taken", [True])  # tests have been running for a while


def small(text, tmp_path, **fields):
    return tiny(text, tmp_path, **SMALL_MODEL | fields)


class Stop(Exception):
    pass


def planned(c, monkeypatch):
    """(steps, eval_every, expected seconds) of a run that does not begin."""
    found = {}

    def stop(log, setup):
        found.update(setup=setup)
        raise Stop

    monkeypatch.setattr(tg, "announce", stop)
    with pytest.raises(Stop):
        tg.train(c)
    setup = found["setup"]
    return setup.config.schedule.steps, setup.config.run.eval_every, setup


def test_steps_fill_the_time_that_is_left(text, tmp_path, monkeypatch, measured):
    c = small(text, tmp_path, steps=40, eval_every=10, time="600s", val_tokens=640)
    steps, every, setup = planned(c, monkeypatch)
    others = 4 * len(setup.val.batches) * 0.2 + time_given.AFTERWARDS
    taken = steps * 0.5 * time_given.SLOWER
    assert 590 < taken + others < 600
    assert (every, len(setup.stages)) == (steps // 4, steps)
    assert setup.expected_seconds == pytest.approx(taken)


def test_a_time_that_not_even_validations_fit_is_refused(text, tmp_path, measured):
    c = small(text, tmp_path, steps=40, eval_every=10, time="2s")
    with pytest.raises(InputError, match=r"--time 2s: \d+ s are over, and 4 validations"):
        tg.train(c)
    # Nothing is in the way of another try
    assert not resume.is_run(tmp_path / "run")
    with pytest.raises(InputError, match="--time 2s"):
        tg.train(c)


def test_trying_steps_changes_nothing(text, tmp_path, monkeypatch):
    """A run of so many steps is the same whether they were given or found."""
    given = small(text, tmp_path, steps=6, eval_every=3, run_dir=str(tmp_path / "given"))
    tg.train(given)
    monkeypatch.setattr(tg, "expected_training", time_given.expected_training)
    tried = small(text, tmp_path, steps=6, eval_every=3, run_dir=str(tmp_path / "tried"))
    result = tg.train(tried)
    assert train_losses(tmp_path / "given") == train_losses(tmp_path / "tried")
    assert result["steps"] == 6


def test_the_steps_that_were_found_are_the_runs(text, tmp_path, measured):
    """Its configuration has them, and whoever resumes goes on to them."""
    c = small(text, tmp_path, steps=8, eval_every=4, val_tokens=640, time="600s", max_time="0.01s")
    result = tg.train(c)
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["steps"] > 500 and result["steps"] < 500


def test_time_and_resume_exclude_each_other(text, tmp_path):
    with pytest.raises(InputError, match="--time 10m: expected nothing with --resume"):
        tg.parse_args(["--time", "10m", "--resume", "auto"])
    with pytest.raises(InputError, match="--time 10: expected a time such as 90s"):
        tg.parse_args(["--time", "10"])


def test_large_steps_are_not_tried(text, tmp_path, monkeypatch):
    def refuse(*args, **more):
        raise AssertionError("a step was tried")

    monkeypatch.setattr(time_given, "least_seconds", refuse)
    monkeypatch.setattr(tg, "expected_training", time_given.expected_training)
    monkeypatch.setattr(time_given, "TRIED", 0.0)
    steps, _, setup = planned(small(text, tmp_path, steps=4), monkeypatch)
    assert steps == 4


# --- Passes over a text


def within(config, tokens):
    """The configuration for a training text of so many tokens."""
    return time_given.within_epochs(config, tg.stages_of(config), tokens)


def test_steps_beyond_max_epochs_are_left_out():
    """As many as three passes need, no fewer, with as many validations as before."""
    config = tg.configure(steps=400, eval_every=25, batch_tokens=(4096,), max_epochs=3.0)
    fitted = within(config, 100_000)
    assert fitted == tg.changed(config, steps=74, eval_every=5)  # 74 * 4,096 = 303,104
    assert within(fitted, 100_000) == fitted
    assert within(config, 10**6) == config
    assert within(config, 5).schedule.steps == 1
    assert within(config, 4096).schedule.steps == 3  # to the last token and no further
    endless = tg.changed(config, max_epochs=0.0)
    assert within(endless, 5) == endless
    everything = tg.changed(config, extension=100, adam_every=10, eval_every=100)
    expected = tg.changed(everything, steps=74, eval_every=20, extension=73)
    assert within(everything, 100_000) == expected


def test_batches_that_grow_count_as_they_are():
    config = tg.configure(steps=90, batch_tokens=(4096, 8192, 16384), max_epochs=1.0)
    steps = within(config, 200_000).schedule.steps
    rows = [tg.stage_at(config, step).rows for step in range(1, steps + 1)]
    assert sum(rows[:-1]) * 256 < 200_000 <= sum(rows) * 256
