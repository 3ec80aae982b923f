"""Where a run is and what is asked of it: the bookkeeping around the loop in train_gpt.py."""

import dataclasses
import datetime
import math
import signal
import time

from base import InputError
from base.options import interval, seconds
from records.metrics import VAL_LOSS, better, meets

from . import state
from .machine import Clock, wait_for_first_rank
from .signals import Interrupted


class Run:
    """One run of a Trainer: where it is (at: Position), and what ranks have voted for (wanted):
    to stop, to save, to end because time is over. A vote counts in the same step on all of
    them."""

    def __init__(self, trainer, log, requests, store, at):
        """log: Log; requests: what signals ask for; store: Checkpoints, on the first rank."""
        self.trainer, self.c, self.log, self.requests, self.store = (
            trainer,
            trainer.c,
            log,
            requests,
            store,
        )
        self.at, self.first, self.wanted, self.first_rank = (
            at,
            at.step,
            set(),
            trainer.world.rank == 0,
        )
        self.clock = Clock(trainer.world.device, at.train_time)
        self.save_steps, self.save_seconds = interval(self.c.checkpoint_every)
        self.save_at = time.monotonic() + self.save_seconds
        self.max_time = seconds(self.c.max_time) if self.c.max_time else math.inf

    def start(self):
        self.clock.start()
        if (
            self.at.step and self.validation_due() and self.at.validated != self.at.step
        ):  # a signal came first
            self.validate()

    def votes(self):
        """This rank's: to stop, to save, to end. When a checkpoint is due by time, the first
        rank's clock says."""
        due = self.first_rank and time.monotonic() > self.save_at
        save_now, self.requests.save = self.requests.save or due, False
        return self.requests.stop > 0, save_now, self.clock.now() > self.max_time

    def after(self, step, tokens, flops_per_token):
        """This step is behind us: learn what it reported, validate and save if that is due.
        Whether it was the last."""
        c, at, wanted = self.c, self.at, self.wanted
        at.step = step
        at.tokens += tokens
        at.flops += tokens * flops_per_token
        self.receive(step)
        improved = self.validation_due() and "stop" not in wanted and self.validate()
        if self.done() or step == c.steps:
            return True
        if improved and c.keep_best or self.save_steps and step % self.save_steps == 0:
            wanted.add("save")
        if (
            wanted and step % c.adam_every == 0
        ):  # else gradients wait for Adam, and would not be saved
            if "stop" in wanted:
                return True
            wanted.discard("save")
            self.save()
        return False

    def end(self):
        """The last checkpoint. Raises Interrupted when a signal ended the run."""
        self.clock.stop()
        saved = self.save(wait=True) if self.at.step > self.first else False
        if "stop" in self.wanted:
            then = f"; --resume {self.log.folder} goes on from there" if saved else ""
            self.log.say(f"stopped at step {self.at.step} by a signal{then}")
            wait_for_first_rank(self.trainer.world)
            raise Interrupted(128 + (self.requests.stop or signal.SIGTERM))

    def receive(self, step):
        """Look at what the steps up to this one have reported, log and show it."""
        c, at = self.c, self.at
        for report in self.trainer.guard.reports(step):
            self.wanted.update(
                name for name, votes in zip(("stop", "save", "end"), report.votes) if votes
            )
            if report.complaint:
                at.skipped += 1
                if at.skipped > c.max_skips:
                    raise InputError(report.refusal())
                self.log.say(
                    f"step {report.step} does not count: {report.complaint} ({at.skipped} of {c.max_skips})"
                )
            elapsed = self.clock.now()
            self.log.step(report.step, c.steps, "train", report.loss, elapsed)
            left = datetime.timedelta(seconds=int(elapsed / report.step * (c.steps - report.step)))
            self.log.progress(
                report.step,
                f"loss {report.loss:.3f}  {at.tokens / elapsed:,.0f} tok/s  "
                f"{at.flops / elapsed / self.trainer.peak:.0%} of peak  {left} left at most",
            )

    def validation_due(self):
        return (
            self.at.step == self.c.steps
            or self.at.step % self.c.eval_every == 0
            or "end" in self.wanted
        )

    def validate(self):
        """Outside the training clock; returns whether it was the best so far."""
        at = self.at
        self.clock.stop()
        self.receive(math.inf)
        at.metrics, at.validated = self.trainer.validate(at.step), at.step
        self.log.validation(at.step, self.c.steps, at.metrics, self.clock.total)
        loss = at.metrics[VAL_LOSS]
        improved = better(loss, at.best)
        at.best, at.since_best = (loss, 0) if improved else (at.best, at.since_best + 1)
        self.clock.start()
        return improved

    def done(self):
        c, at = self.c, self.at
        reached = at.metrics and c.target is not None
        reached = reached and meets(at.metrics[c.target_metric], c.target)
        return reached or "end" in self.wanted or c.patience and at.since_best >= c.patience

    def save(self, wait=False):
        """Checkpoint; the training clock goes on, if it runs. Returns whether one was begun,
        with wait written."""
        c, at, trainer = self.c, self.at, self.trainer
        if c.checkpoint_every == "off":
            return False
        self.receive(math.inf)
        at.train_time, self.save_at = self.clock.now(), time.monotonic() + self.save_seconds
        tensors = state.gather(trainer)  # all ranks take part
        if not self.store:
            return False
        meta = dict(
            config=dataclasses.asdict(c),
            progress=dataclasses.asdict(at),
            data_fingerprint=trainer.data.dataset.fingerprint,
            environment=trainer.environment,
        )
        metric = at.metrics[VAL_LOSS] if at.validated == at.step else None
        saved = self.store.save(at.step, tensors, meta, metric, wait)
        if not saved and not wait:
            self.log.say(
                f"step {at.step}: no checkpoint, since the last one is still being written"
            )
        return saved
