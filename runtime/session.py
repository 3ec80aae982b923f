"""Where a run is, what is asked of it, and what it leaves behind: everything around a loop.

A program's loop asks a Session in words: which step comes next, is a validation due, is it over, is
a checkpoint due. The loop does the work and tells the Session what came of it.

What ranks ask for (to stop, to save, to end because time is over) travels with the guard's report
of a step as votes, so that all of them act on it in the same step.
"""

import contextlib
import dataclasses
import datetime
import gc
import math
import shlex
import signal
import time

from base import InputError
from base.clock import Parts
from base.options import interval, seconds
from records.metrics import VAL_LOSS, better, lower_is_better, meets

from . import energy
from .machine import Clock, wait_for_all, wait_for_first_rank
from .options import flat
from .signals import Interrupted
from .state import State
from .time_left import TimeLeft
from .watch import Watch

# How far from the target, as a fraction of it, a part of the validation split makes all of it due:
# before it is known how the two differ, and after
FIRST_MARGIN = 0.03
MARGIN = 0.01

VOTES = ("stop", "save", "end")


@dataclasses.dataclass
class Position:
    """How far a run is: what a checkpoint keeps besides tensors."""

    step: int = 0  # the last one that was taken
    tokens: int = 0
    flops: float = 0.0
    train_time: float = 0.0  # seconds
    metrics: dict = dataclasses.field(default_factory=dict)  # of the last validation
    validated: int = -1  # its step
    looked: int = -1  # the step of the last look at a part of the validation split
    gap: float | None = None  # what the target's metric was higher on all of it, when last known
    best: float | None = None  # lowest validation loss
    best_step: int = 0  # the step it came after
    best_metrics: dict = dataclasses.field(default_factory=dict)
    since_best: int = 0  # validations since, from when on the learning rate falls
    lr: float | None = None  # of the step, as a fraction of its peak, where there is one
    falls: bool = True  # whether it has begun to
    skipped: int = 0  # steps whose update did not count
    seconds: float = 0.0  # from the first step on, in all processes, validations and all
    joules: float | None = None  # that the devices took in them
    resumed_at: list = dataclasses.field(default_factory=list)


class Session:
    """One run of a program, from its first step or the one where it was stopped."""

    def __init__(self, setup, log, requests, store=None, found=None, parts=None):
        """setup: a trainer's Setup, with config, world, data, model, optimizer, guard, stages,
        pass_seconds, environment and peak; log: Log; requests: what signals ask for; store:
        Checkpoints, on the first rank, or None; found: (tensors, meta) of a checkpoint to go on
        from, or None; parts: Parts of the process."""
        config = setup.config
        self.goal = config.goal
        self.options = config.run
        self.max_skips = config.guard.max_skips
        self.steps_in_all = config.schedule.steps
        self.state = State(setup.model, setup.optimizer, setup.guard, setup.world)
        self.peak = setup.peak
        self.log = log
        self.requests = requests
        self.store = store
        self.about = dict(  # what a checkpoint's meta says besides the position
            config=flat(config),
            data_fingerprint=setup.data.dataset.fingerprint,
            environment=setup.environment,
        )
        self.at = Position()
        if found:
            tensors, meta = found
            self.at = Position(**meta["progress"])
            self.at.resumed_at.append(self.at.step)
            self.state.restore(tensors, self.at.step)
        weights = (log.folder / name for name in ("best.safetensors", "model.safetensors"))
        if found and not any(path.exists() for path in weights):  # it goes on in another folder
            self.forget_best()
        self.parts = parts or Parts()
        self.first = self.at.step
        self.quick = None  # the target's metric on a part of the split, at the last look
        self.wanted = set()  # what is asked of the run: out of VOTES
        patience = self.options.hang_timeout
        self.watch = Watch(setup.world, math.inf if patience == "off" else seconds(patience))
        self.clock = Clock(setup.world.device, self.at.train_time)
        self.meter = None  # of energy and time, from the first step of this process on
        self.save_steps, self.save_seconds = interval(self.options.checkpoint_every)
        self.save_at = time.monotonic() + self.save_seconds
        self.max_time = seconds(self.options.max_time) if self.options.max_time else math.inf
        self.time_left = TimeLeft(setup.stages, setup.pass_seconds)
        self.time_left.forget(self.first)
        self.kept = {}  # step -> {name: number} of it, until that is logged
        self.reported = self.at.train_time  # the clock at the last report
        self.earlier_time = self.at.train_time  # of processes before this one

    # ----------------------------------------------------------------------------------------------
    # What the loop asks

    def steps(self):
        """Yield the numbers of the steps to take: 1, 2, ... or from where the run was stopped."""
        if not self.is_over():
            yield from range(self.at.step + 1, self.steps_in_all + 1)

    def votes(self):
        """This rank's votes, for the guard's report of this step.

        When a checkpoint is due by time, the first rank's clock says so.
        """
        self.watch.beat()  # what comes next waits for the other ranks
        due = self.state.world.rank == 0 and time.monotonic() > self.save_at
        save = self.requests.save or due
        self.requests.save = False
        return self.requests.stop > 0, save, self.clock.now() > self.max_time

    def validation_is_due(self):
        """Whether a validation is due after this step."""
        if "stop" in self.wanted:
            return False
        return self.is_validation_step()

    def missed_validation(self):
        """Whether a signal stopped the run in a step before its validation."""
        at = self.at
        if at.step in (at.validated, at.looked):
            return False
        return at.step > 0 and self.is_validation_step()

    def is_validation_step(self):
        due = self.at.step % self.options.eval_every == 0
        return due or self.is_last_step() or self.is_early_look()

    def is_early_look(self):
        """Whether a part of the split is looked at after step 2, 4, 8, ..., before validations
        begin: an easy target is reached before the first of them."""
        step = self.at.step
        if not self.options.quick_val or self.goal.target is None:
            return False
        early = 1 < step < self.options.eval_every and step & (step - 1) == 0
        return early and self.state.optimizer.is_settled()

    def is_last_step(self):
        """Whether the run is over after this step, whatever a validation says."""
        return self.at.step == self.steps_in_all or "end" in self.wanted

    def may_look_first(self):
        """Whether a part of the split may say that a validation of the whole is not due yet: one
        whose loss has to be known, for patience, always is."""
        return not self.is_last_step() and (not self.options.patience or self.is_early_look())

    def look(self, quick):
        """Take over the metrics of a part of the split; returns whether the target may have been
        reached.

        The part and the whole differ by about as much from step to step, so what they differed by
        at the last validation of the whole says what to expect; before the first one there is a
        margin. A run that is near pays for a validation or two too many, one that is not near goes
        on without.
        """
        at = self.at
        name = self.goal.target_metric
        target = self.goal.target
        self.quick = quick[name]
        at.looked = at.step
        self.log.quick(at.step, self.steps_in_all, name, self.quick, self.clock.total)
        missing = self.quick + (at.gap or 0.0) - target
        if not lower_is_better(name):
            missing = -missing
        known = at.gap is not None or self.is_early_look()  # which is a try
        margin = MARGIN if known else FIRST_MARGIN
        return missing <= margin * abs(target)

    def is_over(self):
        """Whether the step that was taken was the last."""
        at = self.at
        if self.reached():
            return True
        if "end" in self.wanted:
            return True  # the time is over
        if self.options.patience and at.since_best >= self.options.patience:
            return True  # no better validation for too long
        if at.step >= self.steps_in_all:
            return True
        # A signal; while gradients wait for a later step they would not be saved
        return "stop" in self.wanted and self.state.optimizer.is_settled()

    def reached(self):
        """Whether the last validation reached the target; None without a target."""
        if self.goal.target is None:
            return None
        if self.at.validated != self.at.step:
            return False  # that was of other weights, before a target that came on resuming
        value = self.at.metrics.get(self.goal.target_metric)
        return value is not None and meets(value, self.goal.target, self.goal.target_metric)

    def samples_are_due(self):
        """Whether samples are asked for after this step, before training is over."""
        every = self.options.sample_every
        return every > 0 and self.at.step % every == 0

    def checkpoint_is_due(self):
        """Whether one has been asked for, and no gradient waits that would not be saved."""
        return "save" in self.wanted and self.state.optimizer.is_settled()

    def snapshot_is_due(self):
        """Whether the weights of this step are to be kept for whoever studies the training."""
        return is_snapshot(self.at.step, self.options.snapshots)

    # ----------------------------------------------------------------------------------------------
    # What the loop tells

    def start(self):
        """The training clock runs from here, on all ranks at once, and the meter on the first."""
        world = self.state.world
        # What is there by now stays until the end: looking through all of it for garbage in the
        # middle of training would take some tenths of a second
        if world.device.type == "cuda":
            gc.collect()
        gc.freeze()
        wait_for_all(world)
        counters = energy.counters_of(world) if world.rank == 0 else ()
        self.meter = energy.Meter(counters, self.at.joules, self.at.seconds)
        self.watch.begin()
        self.clock.start()

    def after_step(self, step, tokens, flops, lr=None, **kept):
        """This step, of so many tokens and FLOPs over all ranks, was taken, at this fraction of the
        peak learning rate; kept: what else metrics.jsonl is to have of it."""
        self.at.step = step
        if lr is not None:
            self.at.falls = self.at.lr is not None and (self.at.falls or lr < self.at.lr)
            self.at.lr = lr
        self.kept[step] = dict(lr=lr, **kept)
        self.watch.step()
        self.at.tokens += tokens
        self.at.flops += flops
        self.read_meter()
        self.receive(step)
        if self.save_steps and step % self.save_steps == 0:
            self.wanted.add("save")

    def read_meter(self, now=False):
        """Take over what was used so far; now: not only if the last time is a while ago."""
        if self.meter:
            self.meter.look(now)
            self.at.seconds = self.meter.seconds
            self.at.joules = self.meter.joules

    def receive(self, step):
        """Look at what the steps up to this one have reported, log and show it."""
        at = self.at
        for report in self.state.guard.reports(step):
            for name, votes in zip(VOTES, report.votes):
                if votes:
                    self.wanted.add(name)
            if report.complaint:
                at.skipped += 1
                if at.skipped > self.max_skips:
                    raise InputError(report.refusal())
                self.log.say(
                    f"step {report.step} does not count: {report.complaint} "
                    f"({at.skipped} of {self.max_skips})"
                )
            elapsed = self.clock.now()
            kept = self.kept.pop(report.step, {})
            if self.state.world.size == 1:  # else it is of each rank's own gradients
                kept["grad_norm"] = report.grad_norm
            self.log.step(report.step, self.steps_in_all, "train", report.loss, elapsed, kept)
            self.time_left.add(report.step, elapsed - self.reported)
            self.reported = elapsed
            left = min(self.time_left.seconds(), max(0.0, self.max_time - elapsed))
            self.log.progress(
                report.step,
                f"{self.how_it_goes(report.loss, kept)}  {at.tokens / elapsed:,.0f} tok/s  "
                f"{at.flops / elapsed / self.peak:.0%} of peak  "
                f"{datetime.timedelta(seconds=int(left))} left at most",
            )

    def how_it_goes(self, loss, kept):
        """A step's loss in words, or its reward where there is one."""
        return f"reward {kept['reward']:.3f}" if "reward" in kept else f"loss {loss:.3f}"

    @contextlib.contextmanager
    def clock_stopped(self, part):
        """Training time stands still inside, which is time of this part of the process; all reports
        are in before."""
        self.clock.stop()
        self.receive(math.inf)
        self.watch.rest()
        with self.parts.part(part):
            yield
        wait_for_all(self.state.world)
        self.watch.begin()
        self.clock.start()

    def record(self, metrics):
        """Take over the metrics of a validation after this step, {name: value or None}."""
        at = self.at
        loss = metrics[VAL_LOSS]
        if not math.isfinite(loss):
            raise InputError(
                f"step {at.step}: the validation loss is {loss}: the run stopped there"
            )
        at.metrics = metrics
        at.validated = at.step
        if at.looked == at.step and self.quick is not None:
            at.gap = metrics[self.goal.target_metric] - self.quick
        self.log.validation(at.step, self.steps_in_all, metrics, self.clock.total)
        if better(loss, at.best):
            at.best = loss
            at.best_step = at.step
            at.best_metrics = metrics
            at.since_best = 0
            if self.options.keep_best:
                self.wanted.add("save")
        elif at.falls:  # before that a loss may well rise for a while
            at.since_best += 1

    def is_best(self):
        """Whether the last validation was the best so far, where that is what the run is for.

        With a target, it is for the weights that reach it.
        """
        return self.goal.target is None and self.at.best_step == self.at.step

    def forget_best(self):
        """The best validation's weights are not there: the result is the last one's."""
        self.at.best_metrics = {}

    def save(self, wait=False):
        """Write a checkpoint; the training clock goes on, if it runs.

        Returns whether one was begun, or waits for its turn as that of a new best does; with wait,
        whether it was written.
        """
        at = self.at
        self.wanted.discard("save")
        if self.options.checkpoint_every == "off":
            return False
        self.receive(math.inf)
        at.train_time = self.clock.now()
        self.read_meter(now=True)
        self.save_at = time.monotonic() + self.save_seconds
        tensors = self.state.gather()  # all ranks take part
        if not self.store:
            return False
        meta = dict(self.about, progress=dataclasses.asdict(at))
        metric = at.metrics[VAL_LOSS] if at.validated == at.step else None
        is_best = metric is not None and at.since_best == 0
        queue = self.options.keep_best > 0 and is_best
        saved = self.store.save(at.step, tensors, meta, metric, wait, queue)
        if not saved and not wait:
            self.log.say(
                f"step {at.step}: no checkpoint, since the last one is still being written"
            )
        return saved

    def end(self):
        """Stop the clock, say what came of it, and write the last checkpoint. Raises Interrupted
        when a signal ended the run."""
        self.clock.stop()
        gc.unfreeze()
        self.watch.end()
        self.read_meter(now=True)
        self.parts.seconds["train_s"] = self.clock.total - self.earlier_time
        saved = False
        if self.at.step > self.first:
            if "stop" not in self.wanted:
                self.announce_result()
            saved = self.save(wait=True)
        if "stop" in self.wanted:
            folder = shlex.quote(str(self.log.folder))
            then = f"; --resume {folder} goes on from there" if saved else ""
            self.log.say(f"stopped at step {self.at.step} by a signal{then}")
            wait_for_first_rank(self.state.world)
            raise Interrupted(128 + (self.requests.stop or signal.SIGTERM))

    def announce_result(self):
        """The time to the target, on the screen and in result.json, before anything slow follows:
        checkpoint, weights, samples. Until they are there, the file says `finishing`."""
        self.receive(math.inf)
        result = self.result()
        after = f"after {result['steps']:,} steps and {result['train_time_s']:.3f} s of training"
        name = self.goal.target_metric
        target = self.goal.target
        found = result.get(name)
        if result["reached"]:
            self.log.say(f"target reached {after}: {name} {found:.4f}, target {target:g}")
        elif target is not None:
            there = "not known" if found is None else f"{found:.4f}"
            self.log.say(f"target not reached {after}: {name} {there}, target {target:g}")
        self.log.finish(result | dict(finishing=True))

    def cost(self):
        """dict(energy_kwh, usd) of the run so far; None for what nobody knows."""
        at = self.at
        device = self.about["environment"]["device"]
        kwh = None if at.joules is None else round(at.joules / energy.KWH, 6)
        usd = energy.cost(at.seconds, self.state.world, device, self.options.usd_per_hour)
        return dict(energy_kwh=kwh, usd=None if usd is None else round(usd, 4))

    def result(self):
        """What became of the run, for its JSON line."""
        at = self.at
        environment = self.about["environment"]
        train_time = self.clock.total
        metrics = at.metrics
        best_step = at.step
        if self.goal.target is None and at.best_metrics:
            metrics = at.best_metrics
            best_step = at.best_step
        return dict(
            track=self.goal.track,
            target_metric=self.goal.target_metric,
            target=self.goal.target,
            reached=self.reached(),
            **metrics,
            best_step=best_step,
            last_val_loss=at.metrics.get(VAL_LOSS),
            train_time_s=round(train_time, 3),
            steps=at.step,
            tokens=at.tokens,
            tokens_per_s=round(at.tokens / train_time),
            peak_share=round(at.flops / train_time / self.peak, 3),
            **self.cost(),
            device=environment["device"],
            world_size=environment["world_size"],
            seed=self.goal.seed,
            data_fingerprint=self.about["data_fingerprint"],
            run_dir=str(self.log.folder),
            resumed_at=at.resumed_at,
        )


def is_snapshot(step, every):
    """Whether a step is one of 1, 2, 4, 8, ... below `every`, or a multiple of it; 0 is never."""
    if not every:
        return False
    return step % every == 0 or (step < every and step.bit_count() == 1)
