"""runtime/session.py: what a loop is told about when to validate, save and end, and what is kept of
it; with a toy for a trainer, and in whole runs."""

import contextlib
import functools
import gc
import json
import math
import signal
import threading
import time
import types

import pytest
import torch
from helpers import tiny, train_losses
from safetensors.torch import load_file

import train_gpt as tg
from base import InputError
from kernels import launch
from optim import Adam, Optimizer, gradient_report
from runtime import checkpoints, energy, machine, resume, setting_up
from runtime import session as session_module
from runtime.guard import Guard
from runtime.log import Log
from runtime.machine import World
from runtime.session import Position, Session
from runtime.signals import Interrupted, Requests
from runtime.state import State

CPU = torch.device("cpu")


class Toy:
    """A trainer of one parameter, with the loop of train_gpt.py and scripted losses.

    val_losses: {step: validation loss}, 1.0 behind other steps; seconds: how long a step takes;
    asks: {step: name}, what of Requests is asked for during the step, "stop" or "save"; fields:
    options.
    """

    def __init__(self, folder, val_losses=None, seconds=0.0, asks=None, adam_every=1, **fields):
        base = dict(track="toy", steps=10, eval_every=100, compile=False, adam_every=adam_every)
        self.config = tg.configure(**(base | fields))
        self.folder = folder
        self.val_losses = val_losses or {}
        self.seconds = seconds
        self.asks = asks or {}
        self.world = World()
        self.model = torch.nn.Linear(3, 1, bias=False)
        self.model.state = dict
        self.optimizer = Optimizer(self.model, dict(weight=Adam(0.1, every=adam_every)), World())
        self.guard = Guard(CPU, gradient_report, strict=not self.config.guard.max_skips)
        self.data = types.SimpleNamespace(dataset=types.SimpleNamespace(fingerprint="f" * 64))
        self.environment = dict(device="toy", world_size=1)
        self.stages = dict.fromkeys(range(1, self.config.schedule.steps + 1), "alike")
        self.pass_seconds = {}
        self.peak = 1e9
        self.taken = []  # steps
        self.validated = []  # steps
        self.saved = []  # steps behind which a checkpoint was due
        self.rates = {}  # step -> learning rate
        self.sleep = time.sleep

    def session(self, resume=False):
        """A new Session, which goes on from the last checkpoint where that is asked for."""
        self.requests = Requests()
        self.requests.training = True
        found = None
        if resume:
            found = checkpoints.load(checkpoints.latest(self.folder / "checkpoints"))
        at = found[1]["progress"]["step"] if found else None
        run = self.config.run
        self.log = Log(self.folder, self.config.schedule.steps, True, at)
        store = checkpoints.Checkpoints(
            self.folder / "checkpoints", run.keep_last, run.keep_best, self.log.say
        )
        self.store = None if run.checkpoint_every == "off" else store
        return Session(self, self.log, self.requests, self.store, found)

    def play(self, session):
        """The loop; returns the session."""
        with self.log, contextlib.closing(self.store or contextlib.ExitStack()):
            session.start()
            if session.missed_validation():
                self.validate(session)
                session.save()
            for step in session.steps():
                self.taken.append(step)
                self.sleep(self.seconds)
                if step in self.asks:
                    setattr(self.requests, self.asks[step], signal.SIGTERM)
                self.model(torch.ones(3)).sum().backward()
                gradients = self.optimizer.gradients()
                ok = self.guard.judge(step, torch.tensor(2.0), gradients, session.votes())
                self.optimizer.step(1.0, 0.9, ok)
                session.after_step(step, 10, 100.0, self.rates.get(step))
                if session.validation_is_due():
                    self.validate(session)
                if session.is_over():
                    break
                if session.checkpoint_is_due():
                    self.saved.append(step)
                    session.save(wait=True)
            session.end()
        return session

    def validate(self, session):
        step = session.at.step
        self.validated.append(step)
        with session.clock_stopped("validation_s"):
            session.record(dict(val_loss=self.val_losses.get(step, 1.0), val_bpb=None))
            if session.is_best():
                self.log.save_weights(dict(self.model.state_dict()), "best.safetensors")

    def run(self, resume=False):
        return self.play(self.session(resume))

    def train_times(self):
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["train_time"] for line in lines]

    def kept(self):
        """Steps of the checkpoints on the disk."""
        return kept(self.folder)


def kept(run_dir):
    return sorted(int(p.name[-6:]) for p in (run_dir / "checkpoints").glob("step-??????"))


def by_step(*losses):
    return dict(enumerate(losses, start=1))


@pytest.fixture
def clock(monkeypatch):
    """Clocks that stand still but for what is added to clock.now, as clock.sleep does."""
    clock = types.SimpleNamespace(now=1000.0)
    clocks = types.SimpleNamespace(perf_counter=lambda: clock.now, monotonic=lambda: clock.now)
    monkeypatch.setattr(machine, "time", clocks)
    monkeypatch.setattr(session_module, "time", clocks)

    def sleep(seconds):
        clock.now += seconds

    clock.sleep = sleep
    return clock


# --- the time that is left


@pytest.mark.parametrize("max_time", ["", "20s"])
def test_the_time_that_is_shown_is_that_of_the_steps_to_come(max_time, tmp_path, clock):
    """20 steps of 0.2 s and 20 of 3 s, of which 0.1 and 2.9 s are in passes that were timed a
    little wrong. At 15 steps, 61.0 s are left, where 15 steps took 3.0."""
    toy = Toy(tmp_path, steps=40, max_time=max_time)
    toy.stages = {step: "small" if step <= 20 else "large" for step in range(1, 41)}
    toy.pass_seconds = dict(small=0.09, large=3.2)
    seconds = dict(small=0.2, large=3.0)
    toy.sleep = lambda _: clock.sleep(seconds[toy.stages[toy.taken[-1]]])
    session = toy.session()
    shown = {}
    toy.log.progress = shown.__setitem__
    toy.play(session)
    for step in range(10, toy.taken[-1]):
        truth = sum(seconds[toy.stages[s]] for s in range(step + 1, 41))
        if max_time:
            done = sum(seconds[toy.stages[s]] for s in range(1, step + 1))
            truth = min(truth, max(0, 20 - done))
        hours, minutes, secs = shown[step].split("  ")[-1].removesuffix(" left at most").split(":")
        left = 3600 * int(hours) + 60 * int(minutes) + int(secs)
        assert left == pytest.approx(truth, rel=0.25, abs=1)


# --- steps and validations


def test_steps_are_numbered_from_1_to_the_last(tmp_path):
    toy = Toy(tmp_path, steps=7, eval_every=3)
    session = toy.run()
    assert toy.taken == [1, 2, 3, 4, 5, 6, 7]
    assert toy.validated == [3, 6, 7]  # always at the end
    at = session.at
    assert (at.step, at.tokens, at.flops, at.validated) == (7, 70, 700.0, 7)
    assert at.metrics == dict(val_loss=1.0, val_bpb=None)


def test_the_clock_starts_when_all_ranks_are_there_and_nothing_is_left_to_look_through(
    tmp_path, monkeypatch
):
    """What is there before the first step is out of the garbage collector's way until the end."""
    seen = []

    def wait(world):
        seen.append((world, gc.get_freeze_count() > 10_000, toy_session.clock.since))

    monkeypatch.setattr("runtime.session.wait_for_all", wait)
    toy = Toy(tmp_path)
    toy_session = toy.session()
    before = gc.get_freeze_count()
    toy.play(toy_session)
    assert seen[0] == (toy.world, True, None)
    assert len(seen) == 2  # and after the validation, for which the clock stood still
    assert gc.get_freeze_count() <= before


def test_the_target_ends_the_run(tmp_path):
    losses = by_step(5.0, 4.0, 3.0, 2.0)
    toy = Toy(tmp_path, losses, eval_every=1, target=3.0)
    session = toy.run()
    assert toy.taken == [1, 2, 3] and session.reached() is True
    assert session.result()["reached"] is True and session.result()["val_loss"] == 3.0
    toy = Toy(tmp_path / "not", losses, steps=2, eval_every=1, target=3.0)
    assert toy.run().reached() is False
    toy = Toy(tmp_path / "none", losses, steps=2)
    assert toy.run().reached() is None


@pytest.mark.parametrize("target, said", [(3.0, "target reached"), (1.5, "target not reached")])
def test_the_time_to_the_target_is_known_before_anything_slow_follows(
    tmp_path, monkeypatch, capfd, target, said
):
    """On the screen and in the folder, before the last checkpoint; a run that is killed from there
    on has not finished."""
    toy = Toy(tmp_path, by_step(5.0, 4.0, 3.0, 2.0), eval_every=1, steps=4, target=target)
    seen = []

    def save(self, *args, **kwargs):
        seen.append((json.loads((tmp_path / "result.json").read_text()), capfd.readouterr().err))
        return False

    monkeypatch.setattr(checkpoints.Checkpoints, "save", save)
    session = toy.run()
    [(early, err)] = seen
    assert f"{said} after {len(toy.taken)} steps and " in err and "val_loss" in err
    assert early == session.result() | dict(finishing=True)
    assert resume.left_by(tmp_path).result is None
    toy.log.finish(session.result())
    assert resume.left_by(tmp_path).result == session.result()


def test_a_signal_leaves_no_result(tmp_path):
    toy = Toy(tmp_path, asks={3: "stop"})
    with pytest.raises(Interrupted):
        toy.run()
    assert not (tmp_path / "result.json").exists()


def test_a_target_that_comes_on_resuming_waits_for_a_validation(tmp_path):
    """An earlier step has met it, whose weights are gone."""
    toy = Toy(tmp_path, {2: 3.0}, steps=8, eval_every=4, target=0.5, asks={5: "stop"})
    toy.val_losses[4] = 3.0
    with pytest.raises(Interrupted):
        toy.run()
    other = Toy(tmp_path, {8: 3.5}, steps=8, eval_every=4, target=4.0)
    session = other.run(resume=True)
    assert other.taken == [6, 7, 8] and session.result()["val_loss"] == 3.5


def test_a_metric_that_was_not_measured_reaches_nothing(tmp_path):
    toy = Toy(tmp_path, steps=2, target=9.0, target_metric="val_bpb")
    assert toy.run().reached() is False and toy.taken == [1, 2]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_is_refused(tmp_path, loss):
    toy = Toy(tmp_path, {4: loss}, eval_every=2)
    with pytest.raises(InputError, match=f"^step 4: the validation loss is {loss}"):
        toy.run()
    assert toy.taken == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "losses, patience, last, best",
    [
        ((5, 4, 6, 6, 3), 2, 4, 4),  # two in a row that are no better
        ((5, 4, 6, 3, 6, 6, 2), 2, 6, 3),  # a better one begins the count anew
        ((5, 5, 4), 1, 2, 5),  # an equal one is no better
        ((5, 6, 7, 8), 0, 4, 5),  # without patience there is no end
        ((4, 3, 2, 1), 1, 4, 1),
    ],
)
def test_patience_counts_validations_without_a_better_one(tmp_path, losses, patience, last, best):
    toy = Toy(tmp_path, by_step(*losses), steps=len(losses), eval_every=1, patience=patience)
    session = toy.run()
    assert toy.taken == list(range(1, last + 1))
    assert session.at.best == best


def test_patience_begins_when_the_learning_rate_falls(tmp_path):
    """Before that a loss may rise for a while."""
    losses = by_step(5, 6, 7, 8, 9, 9)
    rates = dict(zip(range(1, 7), (0.5, 1.0, 1.0, 0.9, 0.8, 0.8)))
    toy = Toy(tmp_path, losses, steps=6, eval_every=1, patience=2)
    toy.rates = rates
    toy.asks = {4: "stop"}
    with pytest.raises(Interrupted):
        toy.run()
    assert toy.taken == [1, 2, 3, 4]
    toy.asks = {}
    toy.run(resume=True)
    assert toy.taken == [1, 2, 3, 4, 5]

    steady = Toy(tmp_path / "steady", losses, steps=6, eval_every=1, patience=2)
    steady.rates = dict.fromkeys(range(1, 7), 1.0)
    steady.run()
    assert steady.taken == [1, 2, 3, 4, 5, 6]


def test_patience_goes_on_where_a_run_was_stopped(tmp_path):
    losses = by_step(5, 6, 6, 6, 6)
    toy = Toy(tmp_path, losses, eval_every=1, patience=3, asks={3: "stop"})
    with pytest.raises(Interrupted):
        toy.run()
    assert toy.validated == [1, 2]
    toy.asks = {}
    session = toy.run(resume=True)
    assert toy.validated == [1, 2, 3, 4] and session.at.since_best == 3


# --- time


def test_the_maximum_time_is_seen_in_every_step_and_then_validated(tmp_path, clock):
    toy = Toy(tmp_path, seconds=0.125, steps=1000, max_time="0.3s")
    toy.sleep = clock.sleep
    session = toy.run()
    assert toy.taken == [1, 2, 3]
    assert toy.validated == [3] and session.clock.total == 0.375
    assert session.result()["train_time_s"] == 0.375


def test_a_run_ends_early_by_time(text, tmp_path):
    """Long before a validation is due, with a result."""
    result = tg.train(tiny(text, tmp_path, steps=20_000, eval_every=20_000, max_time="0.3s"))
    assert 0 < result["steps"] < 20_000
    assert 0.3 < result["train_time_s"] < 30
    assert math.isfinite(result["val_loss"]) and result["reached"] is None


def test_the_clock_stands_still_in_validations(tmp_path, clock):
    toy = Toy(tmp_path, seconds=1.0, steps=4, eval_every=2, checkpoint_every="off")
    toy.sleep = clock.sleep
    validate = toy.validate

    def slow(session):
        validate(session)
        clock.now += 50  # outside: the clock runs again
        with session.clock_stopped("validation_s"):
            clock.now += 1000

    toy.validate = slow
    session = toy.run()
    assert session.clock.total == 4 + 2 * 50


def test_the_clock_of_a_resumed_run_goes_on(tmp_path, clock):
    toy = Toy(tmp_path, seconds=2.0, asks={4: "stop"}, eval_every=2)
    toy.sleep = clock.sleep
    with pytest.raises(Interrupted):
        toy.run()
    clock.now += 10_000  # nobody trains
    toy.asks = {}
    session = toy.run(resume=True)
    times = toy.train_times()
    assert times == sorted(times) and times[-1] == session.clock.total == 20
    result = session.result()
    assert result["train_time_s"] == 20 and result["resumed_at"] == [4]
    assert result["tokens"] == 100 and result["tokens_per_s"] == 5
    assert result["peak_share"] == round(1000 / 20 / 1e9, 3)


def test_energy_and_money_of_a_run_that_was_stopped_add_up(tmp_path, clock, monkeypatch):
    toy = Toy(tmp_path, seconds=360.0, asks={4: "stop"}, usd_per_hour=0.5)
    toy.sleep = clock.sleep
    counters = [energy.Counter(lambda: 50 * clock.now)]  # 50 W, also while nobody trains
    monkeypatch.setattr(energy, "counters_of", lambda world: counters)
    meter = functools.partial(energy.Meter, clock=lambda: clock.now)
    monkeypatch.setattr(energy, "Meter", meter)
    with pytest.raises(Interrupted):
        toy.run()
    clock.now += 10_000
    counters[0].since()  # of a new process
    toy.asks = {}
    result = toy.run(resume=True).result()
    # 10 steps of a tenth of an hour
    assert result["energy_kwh"] == pytest.approx(0.050) and result["usd"] == 0.5


def test_train_time_never_falls_across_a_resume(text, tmp_path, monkeypatch):
    judge = Guard.judge

    def slow(guard, step, *args):
        time.sleep(0.3)
        requests.stop = signal.SIGTERM
        return judge(guard, step, *args)

    requests = Requests()
    config = tiny(text, tmp_path, steps=4, eval_every=2, checkpoint_every="10m")
    with monkeypatch.context() as m, pytest.raises(Interrupted):
        m.setattr(Guard, "judge", slow)
        tg.train(config, requests=requests)
    result = tg.train(tg.changed(config, resume="auto"))
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    times = [json.loads(line)["train_time"] for line in lines]
    assert result["resumed_at"] == [2]
    assert times == sorted(times) and times[0] > 0.3
    assert result["train_time_s"] == pytest.approx(times[-1], abs=0.001)


# --- checkpoints


def test_checkpoints_by_steps(tmp_path):
    toy = Toy(tmp_path, steps=8, checkpoint_every="3", keep_last=9)
    toy.run()
    assert toy.saved == [3, 6] and toy.kept() == [3, 6, 8]


def test_checkpoints_by_time(tmp_path, clock):
    """Counted from the last one, whatever asked for that."""
    toy = Toy(tmp_path, seconds=0.0625, steps=16, checkpoint_every="0.2s", keep_last=99)
    toy.sleep = clock.sleep
    toy.asks = {6: "save"}
    toy.run()
    assert toy.saved == [4, 6, 10, 14] and toy.kept() == [4, 6, 10, 14, 16]


def test_a_run_leaves_checkpoints_by_time(text, tmp_path, monkeypatch):
    judge = Guard.judge

    def slow(*args):
        time.sleep(0.05)
        return judge(*args)

    monkeypatch.setattr(Guard, "judge", slow)
    tg.train(tiny(text, tmp_path, steps=16, checkpoint_every="0.2s", keep_last=99))
    assert len(kept(tmp_path / "run")) >= 3


def test_without_a_time_or_steps_there_is_one_at_the_end(tmp_path):
    toy = Toy(tmp_path, eval_every=2)
    toy.run()
    assert toy.saved == [] and toy.kept() == [10]


def test_off_is_never(tmp_path):
    toy = Toy(tmp_path, checkpoint_every="off", asks={2: "save", 5: "stop"})
    with pytest.raises(Interrupted):
        toy.run()
    assert toy.taken == [1, 2, 3, 4, 5] and toy.kept() == []


@pytest.mark.parametrize("keep_best, expected", [(1, [8, 12]), (0, [12]), (2, [4, 8, 12])])
def test_the_best_is_saved_though_no_checkpoint_was_due(tmp_path, keep_best, expected):
    """Once, and not in the steps that follow."""
    losses = {2: 5.0, 4: 4.0, 6: 6.0, 8: 3.0, 10: 6.0, 12: 6.0}
    toy = Toy(tmp_path, losses, steps=12, eval_every=2, keep_last=1, keep_best=keep_best)
    toy.run()
    assert toy.kept() == expected
    assert toy.saved == ([2, 4, 8] if keep_best else [])


def test_the_best_is_not_lost_while_another_is_written(tmp_path, monkeypatch):
    """The disk is slow: each new best waits for its turn, in place of the one before it."""
    losses = {2: 5.0, 4: 4.0, 6: 3.0, 8: 6.0, 10: 6.0}
    toy = Toy(tmp_path, losses, steps=10, eval_every=2, keep_last=1, keep_best=1)
    session = toy.session()
    store, opened = toy.store, threading.Event()
    write = store._write

    def slow(*args):
        assert opened.wait(20)
        write(*args)

    def validate(session, validate=toy.validate):
        validate(session)
        if session.at.step == 8:
            opened.set()

    monkeypatch.setattr(store, "_write", slow)
    toy.validate = validate
    save = session.save
    session.save = lambda wait=False: save(wait and session.at.step == 10)
    toy.play(session)
    assert toy.saved == [2, 4, 6] and toy.kept() == [6, 10]


def test_a_validation_that_is_made_up_for_counts_for_its_checkpoint(tmp_path):
    """A signal came before the validation of step 4, the best one."""
    losses = {2: 5.0, 4: 3.0, 6: 6.0, 8: 6.0}
    fields = dict(steps=8, eval_every=2, keep_last=1, keep_best=1, asks={4: "stop"})
    toy = Toy(tmp_path, losses, **fields)
    with pytest.raises(Interrupted):
        toy.run()
    toy.asks = {}
    toy.run(resume=True)
    assert toy.validated == [2, 4, 6, 8] and toy.kept() == [4, 8]
    state = json.loads((tmp_path / "checkpoints/step-000004/state.json").read_text())
    assert state["metric"] == 3.0 and state["meta"]["progress"]["validated"] == 4


def test_a_run_leaves_the_best_steps_folder(text, tmp_path, monkeypatch):
    losses = iter([2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(
        setting_up, "evaluate", lambda *args: dict(val_loss=next(losses), val_bpb=None)
    )
    fields = dict(steps=8, eval_every=2, checkpoint_every="10m", keep_best=1, keep_last=1)
    tg.train(tiny(text, tmp_path, **fields))
    assert kept(tmp_path / "run") == [2, 8]


def test_a_checkpoint_knows_the_metric_of_its_own_step_only(tmp_path):
    toy = Toy(tmp_path, {2: 3.5}, steps=4, eval_every=2, checkpoint_every="1", keep_last=9)
    toy.run()

    def metric(step):
        path = tmp_path / f"checkpoints/step-{step:06d}/state.json"
        return json.loads(path.read_text())["metric"]

    assert [metric(step) for step in toy.kept()] == [None, 3.5, None, 1.0]


def test_what_a_checkpoint_says_is_where_the_run_is(tmp_path, clock):
    options = dict(steps=3, eval_every=2, checkpoint_every="2", keep_last=9)
    toy = Toy(tmp_path, {2: 3.5}, seconds=1.0, **options)
    toy.sleep = clock.sleep
    toy.run()
    tensors, meta = checkpoints.load(tmp_path / "checkpoints/step-000002")
    at = Position(**meta["progress"])
    assert (at.step, at.tokens, at.best, at.since_best, at.validated) == (2, 20, 3.5, 0, 2)
    assert at.metrics == dict(val_loss=3.5, val_bpb=None) and at.train_time == 2
    assert meta["config"]["checkpoint_every"] == "2" and meta["data_fingerprint"] == "f" * 64
    assert sorted(tensors) == ["m/weight", "other/recent_losses", "v/weight", "weights/weight"]
    assert tensors["m/weight"].shape == toy.model.weight.shape


def test_a_state_is_what_it_was(tmp_path):
    """Weights, moments and what the guard knows."""
    toy = Toy(tmp_path, steps=3)
    toy.run()
    other = Toy(tmp_path / "other", steps=3)
    with torch.no_grad():
        other.model.weight.fill_(7.0)
    tensors, meta = checkpoints.load(tmp_path / "checkpoints/step-000003")
    State(other.model, other.optimizer, other.guard, World()).restore(tensors, 3)
    assert torch.equal(other.model.weight, toy.model.weight)
    for name in ("m", "v"):
        ours, theirs = (t.optimizer.state["weight"][name] for t in (toy, other))
        assert torch.equal(ours, theirs) and ours.any()
    assert other.optimizer.step_count == 3


def test_weights_alone_begin_with_moments_at_zero(tmp_path):
    """Of a run whose checkpoints are gone."""
    toy = Toy(tmp_path, steps=3)
    toy.run()
    assert all(toy.optimizer.state["weight"][name].any() for name in ("m", "v"))
    weights = torch.full_like(toy.model.weight, 7.0)
    State(toy.model, toy.optimizer, toy.guard, World()).restore({"weights/weight": weights}, 3)
    assert torch.equal(toy.model.weight, weights) and toy.optimizer.step_count == 3
    assert not any(toy.optimizer.state["weight"][name].any() for name in ("m", "v"))
    with pytest.raises(AttributeError):  # a checkpoint has all of them
        tensors = {"weights/weight": weights, "m/weight": weights}
        State(toy.model, toy.optimizer, toy.guard, World()).restore(tensors, 3)


# --- what is asked for by signals


def test_stopping_and_going_on_takes_every_step_once(tmp_path):
    toy = Toy(tmp_path, asks={4: "stop"}, eval_every=5)
    with pytest.raises(Interrupted) as e:
        toy.run()
    assert e.value.code == 143 and toy.taken == [1, 2, 3, 4] and toy.kept() == [4]
    toy.asks = {7: "stop"}
    with pytest.raises(Interrupted):
        toy.run(resume=True)
    toy.asks = {}
    session = toy.run(resume=True)
    assert toy.taken == list(range(1, 11)) and toy.validated == [5, 10]
    assert session.at.resumed_at == [4, 7] and session.at.tokens == 100


def test_a_validation_that_a_signal_came_before_is_made_up_for(tmp_path):
    losses = by_step(9, 9, 9, 5, 9, 9)
    toy = Toy(tmp_path, losses, steps=6, eval_every=4, asks={4: "stop"})
    with pytest.raises(Interrupted):
        toy.run()
    assert toy.taken == [1, 2, 3, 4] and toy.validated == []
    toy.asks = {}
    session = toy.run(resume=True)
    assert toy.taken == [1, 2, 3, 4, 5, 6] and toy.validated == [4, 6]
    assert session.at.best == 5


def test_no_validation_is_missed_that_was_made_or_not_due(tmp_path):
    toy = Toy(tmp_path, steps=6, eval_every=2, checkpoint_every="1", keep_last=9)
    session = toy.session()
    assert not session.missed_validation()  # before the first step
    toy.play(session)
    for step, validated, missed in ((2, 2, False), (3, 2, False), (4, 2, True), (6, 4, True)):
        session.at.step = step
        session.at.validated = validated
        assert session.missed_validation() == missed, step


def test_a_run_makes_up_for_a_missed_validation(text, tmp_path, monkeypatch):
    """The same metrics at the same steps as in a run that nobody stopped."""

    def validations(run_dir):
        rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        return [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]

    judge = Guard.judge

    def stop(guard, step, *args):
        if step == 3:
            requests.stop = signal.SIGTERM
        return judge(guard, step, *args)

    fields = dict(steps=6, eval_every=4, checkpoint_every="10m")
    tg.train(tiny(text, tmp_path, **fields))
    config = tiny(text, tmp_path, run_dir=str(tmp_path / "stopped"), **fields)
    requests = Requests()
    with monkeypatch.context() as m, pytest.raises(Interrupted):
        m.setattr(Guard, "judge", stop)
        tg.train(config, requests=requests)
    assert validations(tmp_path / "stopped") == []
    result = tg.train(tg.changed(config, resume="auto"))
    assert result["resumed_at"] == [4]
    assert validations(tmp_path / "stopped") == validations(tmp_path / "run")
    assert len(validations(tmp_path / "run")) == 2
    state = json.loads((tmp_path / "stopped/checkpoints/step-000004/state.json").read_text())
    assert state["metric"] == validations(tmp_path / "run")[0][1]


def test_a_signal_waits_for_gradients_that_wait(tmp_path):
    """They would not be saved."""
    toy = Toy(tmp_path, adam_every=3, asks={4: "stop"}, eval_every=9)
    with pytest.raises(Interrupted):
        toy.run()
    assert toy.taken == [1, 2, 3, 4, 5, 6] and toy.kept() == [6]


def test_a_checkpoint_waits_for_gradients_that_wait(tmp_path):
    toy = Toy(tmp_path, adam_every=3, asks={4: "save"}, eval_every=9, steps=9, keep_last=9)
    toy.run()
    assert toy.saved == [6] and toy.kept() == [6, 9]


def test_asking_to_save_is_answered_once(tmp_path):
    toy = Toy(tmp_path, asks={3: "save", 7: "save"}, keep_last=9)
    toy.run()
    assert toy.saved == [3, 7] and toy.kept() == [3, 7, 10]


# --- over


@pytest.mark.parametrize(
    "fields, losses",
    [
        (dict(steps=4), {}),
        (dict(steps=9, target=2.0), by_step(5, 4, 3, 2)),
        (dict(steps=9, patience=1), by_step(5, 4, 3, 6)),
    ],
    ids=["last step", "target", "patience"],
)
def test_a_run_that_is_over_takes_no_step(tmp_path, clock, fields, losses):
    """Killed between its last checkpoint and its result, it only has to say the result."""
    toy = Toy(tmp_path, losses, seconds=1.0, eval_every=1, checkpoint_every="1", **fields)
    toy.sleep = clock.sleep
    before = toy.run()
    assert toy.taken == [1, 2, 3, 4] and list(before.steps()) == []
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*/*")}
    session = toy.session(resume=True)
    assert list(session.steps()) == []
    toy.play(session)
    assert toy.taken == [1, 2, 3, 4] and toy.validated == [1, 2, 3, 4]
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "checkpoints").rglob("*/*")}
    ours, theirs = session.result(), before.result()
    assert ours.pop("resumed_at") == [4] and theirs.pop("resumed_at") == []
    assert ours == theirs


def test_skipped_steps_are_counted_across_a_resume(tmp_path):
    toy = Toy(tmp_path, max_skips=2, asks={4: "stop"})
    poison = {2, 6, 8}
    judge = toy.guard.judge

    def bad(step, loss, *args):
        return judge(step, loss * (math.nan if step in poison else 1), *args)

    toy.guard.judge = bad
    with pytest.raises(Interrupted):
        toy.run()
    toy.asks = {}
    with pytest.raises(InputError, match="^step 8: the training loss is nan"):
        toy.run(resume=True)
    said = (tmp_path / "log.txt").read_text()
    assert "step 2 does not count: the training loss is nan (1 of 2)" in said
    assert "step 6 does not count: the training loss is nan (2 of 2)" in said


# --- seeds


@pytest.mark.slow
def test_the_second_seed_in_fp8_is_that_seed_alone(text, tmp_path, monkeypatch):
    """Scales of activations are those of a new run, not where the first one left them.

    They matter in the first step, whose MLPs must not be zero for it: hence the warm start.
    """
    monkeypatch.setattr(launch, "INTERPRETED", False)  # the ops as a CPU's run has them
    fields = dict(steps=4, eval_every=4, dtype="bfloat16", fp8="on")
    tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "first"), **fields))
    fields["warm_start"] = str(tmp_path / "first")
    both = tiny(text, tmp_path, repeat=2, run_dir=str(tmp_path / "both"), **fields)
    results = []
    tg.train(both, report=results.append)
    alone = tg.train(tiny(text, tmp_path, seed=1, run_dir=str(tmp_path / "alone"), **fields))
    assert train_losses(results[1]["run_dir"]) == train_losses(alone["run_dir"])
    assert results[1]["val_loss"] == alone["val_loss"]


# --- a part of the validation split says when all of it is due


class Looks(Toy):
    """A Toy that looks at a part of the split first, which has other losses than the whole.

    gap: what the whole's are higher.
    """

    def __init__(self, folder, gap, eval_every=1, **fields):
        fields |= dict(eval_every=eval_every, quick_val=1, target_metric="val_loss")
        super().__init__(folder, **fields)
        self.gap = gap
        self.looks = []  # steps

    def validate(self, session):
        step = session.at.step
        loss = self.val_losses.get(step, 9.0)
        with session.clock_stopped("validation_s"):
            if self.config.goal.target is not None and session.may_look_first():
                self.looks.append(step)
                quick = dict(val_loss=loss - self.gap, val_bpb=None)
                if not session.look(quick):
                    return
            self.validated.append(step)
            session.record(dict(val_loss=loss, val_bpb=None))


@pytest.mark.parametrize("gap", [-0.03, 0.0, 0.1])
def test_the_whole_split_is_validated_on_when_the_target_is_near(tmp_path, gap):
    losses = {1: 5.0, 2: 4.0, 3: 3.1, 4: 3.07, 5: 3.05, 6: 3.02, 7: 2.99, 8: 2.0}
    toy = Looks(tmp_path, gap, val_losses=losses, target=3.0)
    at = toy.run().at
    assert at.step == 7 and at.metrics["val_loss"] == 2.99  # all of the split's, not the part's
    assert toy.looks == [1, 2, 3, 4, 5, 6, 7]
    # Once to learn how the two differ, then only within the margin of 1%
    assert toy.validated[0] in (3, 4, 5) and toy.validated[1:] == [6, 7]
    assert at.gap == pytest.approx(gap)


def test_the_last_step_is_validated_on_the_whole_split(tmp_path):
    toy = Looks(tmp_path, 0.0, target=1.0)
    at = toy.run().at
    assert toy.validated == [10] and at.metrics["val_loss"] == 9.0
    assert toy.looks == list(range(1, 10))


@pytest.mark.parametrize("adam_every, early", [(1, [2, 4]), (4, [4])])
def test_an_easy_target_is_seen_before_the_first_validation(tmp_path, adam_every, early):
    fields = dict(eval_every=8, target=3.0, adam_every=adam_every)
    toy = Looks(tmp_path / "a", 0.0, **fields)
    toy.run()
    assert (toy.looks, toy.validated) == ([*early, 8], [10])
    toy = Looks(tmp_path / "b", 0.0, val_losses={4: 2.9}, **fields)
    assert (toy.run().at.step, toy.validated) == (4, [4])
    toy = Toy(tmp_path / "c", eval_every=8, target=0.5, target_metric="val_loss")  # no part
    toy.run()
    assert toy.validated == [8, 10]
    toy = Looks(tmp_path / "d", 0.0, **fields | dict(target=None))
    toy.run()
    assert toy.validated == [8, 10]


def test_with_patience_every_validation_is_of_the_whole_split_but_for_early_looks(tmp_path):
    toy = Looks(tmp_path, 0.0, eval_every=4, patience=1, target=1.0)
    assert toy.run().at.step == 8  # no better than at 4
    assert (toy.looks, toy.validated) == ([2], [4, 8])


def test_a_look_is_no_validation_in_the_logs(tmp_path):
    Looks(tmp_path, 0.0, val_losses={3: 1.02, 4: 0.9}, target=1.0).run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [3, 4]
    assert [row["step"] for row in rows if "part_val_loss" in row] == [1, 2, 3, 4]
    log = (tmp_path / "log.txt").read_text()
    assert "step:2/10 part_val_loss:9.0000 train_time:" in log
    assert log.count(" val_loss:") == 2


def test_after_a_resume_the_difference_is_known(tmp_path):
    losses = {1: 3.1, 2: 3.05, 3: 3.05, 4: 2.9}
    fields = dict(val_losses=losses, target=3.0, checkpoint_every="1")
    toy = Looks(tmp_path, 0.1, asks={2: "stop"}, **fields)
    with pytest.raises(Interrupted):
        toy.run()
    assert toy.validated == [1]
    again = Looks(tmp_path, 0.1, **fields)
    at = again.run(resume=True).at
    assert again.validated == [4] and at.gap == pytest.approx(0.1)


# --- the best weights are the result where there is no target


def test_without_a_target_the_result_is_the_best_validations(tmp_path):
    losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.4, 10: 2.2}
    session = Toy(tmp_path, val_losses=losses, eval_every=2).run()
    result = session.result()
    assert result["val_loss"] == 2.0 and result["best_step"] == 4
    assert result["last_val_loss"] == 2.2 and result["steps"] == 10


def test_with_a_target_the_result_is_the_last_validations(tmp_path):
    losses = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.4, 10: 2.2}
    toy = Toy(tmp_path, val_losses=losses, eval_every=2, target=1.0, target_metric="val_loss")
    session = toy.run()
    result = session.result()
    assert result["val_loss"] == 2.2 and result["best_step"] == 10
    assert not (tmp_path / "best.safetensors").exists()


@pytest.fixture
def gets_worse(monkeypatch):
    """Validations are worse from the fourth on; returns the weights at each of them."""
    weights = []
    real = setting_up.evaluate

    def evaluate(forward, *args):
        weights.append({name: p.detach().clone() for name, p in forward.named_parameters()})
        found = real(forward, *args)
        return found | dict(val_loss=found["val_loss"] + (5.0 if len(weights) > 3 else 0.0))

    monkeypatch.setattr(setting_up, "evaluate", evaluate)
    return weights


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_weights_of_the_best_validation_are_kept(text, tmp_path, gets_worse):
    """Beside them are the last ones."""
    run = tmp_path / "run"
    result = tg.train(tiny(text, tmp_path, run_dir=str(run), steps=10, eval_every=2, target=None))
    assert result["best_step"] == 6 and result["val_loss"] < result["last_val_loss"] - 4
    assert same(load_file(run / "model.safetensors"), gets_worse[2])
    assert same(load_file(run / "last.safetensors"), gets_worse[4])
    assert not (run / "best.safetensors").exists()
    assert "the weights are those of step 6" in (run / "log.txt").read_text()


def test_a_run_that_never_gets_worse_has_one_file_of_weights(text, tmp_path):
    run = tmp_path / "run"
    result = tg.train(tiny(text, tmp_path, run_dir=str(run), steps=4, eval_every=2, target=None))
    assert result["best_step"] == 4 and result["val_loss"] == result["last_val_loss"]
    assert [p.name for p in run.glob("*.safetensors")] == ["model.safetensors"]


def test_best_weights_that_cannot_be_written_cost_the_best_only(
    text, tmp_path, gets_worse, monkeypatch
):
    save = Log.save_weights

    def on_a_full_disk(log, weights, name="model.safetensors"):
        return name != "best.safetensors" and save(log, weights, name)

    monkeypatch.setattr(Log, "save_weights", on_a_full_disk)
    run = tmp_path / "run"
    result = tg.train(tiny(text, tmp_path, run_dir=str(run), steps=10, eval_every=2, target=None))
    assert same(load_file(run / "model.safetensors"), gets_worse[4])
    assert result["best_step"] == 10 and result["val_loss"] == result["last_val_loss"]
    assert not (run / "last.safetensors").exists()


def test_a_run_that_goes_on_elsewhere_forgets_weights_that_are_not_there(tmp_path):
    losses = {2: 1.0, 4: 3.0, 6: 2.9, 8: 2.8, 10: 2.7}
    first = Toy(tmp_path / "first", val_losses=losses, eval_every=2, asks={4: "stop"})
    with pytest.raises(Interrupted):
        first.run()
    second = Toy(tmp_path / "second", val_losses=losses, eval_every=2)
    (tmp_path / "second").mkdir()
    (tmp_path / "first" / "checkpoints").rename(tmp_path / "second" / "checkpoints")
    result = second.run(resume=True).result()
    assert result["best_step"] == 10 and result["val_loss"] == 2.7
