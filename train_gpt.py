"""Stopwatch: train a GPT to a target loss against the clock.

One story, in reading order: configuration, schedules, evaluation, setting up, the loop, the result,
the door. What is called here is a named piece of a kit: the model is models/gpt.py, its updates are
optim/, its tokens data/, and what any program stands on is runtime/. Tracks (tracks/*.py) are named
sets of values. `./run.sh` starts it; `torchrun --nproc_per_node=N train_gpt.py` works as well.
"""

if __name__ == "__main__":  # as torchrun starts it: first what goes before the import of torch
    import sys

    import door

    sys.exit(door.main(["train", *sys.argv[1:]]))

import contextlib
import dataclasses
import functools
import math
import os
import shlex
import sys
import typing
from pathlib import Path

from base import streams, to_json
from base.clock import Parts, parts_so_far
from base.options import (
    BY_STAGE,
    COUNT,
    FRACTION,
    POSITIVE,
    RATE,
    Options,
    by_stage,
    option,
    progress_of,
    remembered,
)
from base.places import runs_folder
from data.config import DataConfig
from inference.show import show_samples
from models import DEFAULT_TEMPLATE, load_template, template_names
from optim import OptimConfig, TouchedRows
from records.metrics import METRICS, VAL_LOSS
from runtime import finish, folders, machine, memory, resume, trackers, warm_start
from runtime.announce import announce, packed
from runtime.checkpoints import open_store
from runtime.command_line import read_options
from runtime.corpus import load_data
from runtime.guard import GuardConfig
from runtime.launch import exit_status, run_on_all_gpus
from runtime.log import Log, show
from runtime.machine import PrecisionConfig, World
from runtime.options import RunConfig, build_parts, changed, flat
from runtime.policy import PolicyConfig
from runtime.preferences import TeachingConfig
from runtime.saved import step_weights
from runtime.session import Session
from runtime.setting_up import set_up
from runtime.signals import Requests
from runtime.steps import backward, batches_ahead, begin_run, n_tokens, val_stage, weights_after
from runtime.time_given import expected_bpb, expected_training, fit_to_time, within_epochs
from runtime.warming_up import make_ready

# --------------------------------------------------------------------------------------------------
# Configuration: every field of every part is a command-line option


@dataclasses.dataclass(frozen=True)
class Goal(Options):
    """What is to be reached, by which template, from which seed."""

    track: str = option("", "named set of values: data, model, schedule and target", group="goal")
    target: float | None = option(
        None,
        "stop when the validation metric reaches this",
        (lambda x: x is None or math.isfinite(x), "a number"),
    )
    target_metric: str = option(VAL_LOSS, "what the target is of", tuple(METRICS))
    seed: int = option(
        0, "of the weights and the order of the data", (lambda n: 0 <= n < 2**63, "zero or more")
    )
    template: str = option(
        DEFAULT_TEMPLATE,
        f"the model's file: {', '.join(template_names())}, or a module's dotted name",
    )


@dataclasses.dataclass(frozen=True)
class Schedule(Options):
    """Steps, batches and learning rate. A tuple with an entry for each stage divides training
    equally; the tuples' lengths may differ."""

    steps: int = option(500, "optimizer steps", POSITIVE, group="batch, context and schedule")
    max_epochs: float = option(
        0.0,
        "leave out steps beyond so many passes over the training text; 0 leaves out none",
        RATE,
    )
    batch_tokens: tuple[int, ...] = option((8192,), "tokens per step, by stage", BY_STAGE)
    max_doc_len: tuple[int, ...] = option(
        (256,), "documents are cut at this many tokens, by stage", BY_STAGE
    )
    stage_lr: tuple[float, ...] = option((1.0,), "learning rate multiplier, by stage", BY_STAGE)
    grow_gradients: bool = option(
        False,
        "gradients are as much larger as a stage's batch is than the first one's, so that moments "
        "weigh later steps more",
    )
    extension: int = option(0, "the last so many steps stay where the schedules end", COUNT)
    cooldown: float = option(
        0.6, "fraction of training over which the learning rate falls linearly", FRACTION
    )
    lr_floor: float = option(0.15, "where it falls to, as a fraction", FRACTION)
    momentum_warmup: float = option(
        0.2, "fraction of all steps over which Muon's momentum rises", FRACTION
    )
    # (step after which steps were added, how many there were to be until then, --extend) each time
    earlier: tuple = remembered(())

    def __post_init__(self):
        super().__post_init__()
        if self.extension >= self.steps:
            self.refuse("extension", f"fewer than steps ({self.steps})")

    def progress(self, step):
        """What stages follow: the fraction of training before a step. No stage ever comes back."""
        return progress_of(step, self.steps, self.extension, self.earlier)

    def part(self, step):
        """(step before it, last step planned, --extend) of the part between additions of steps."""
        steps = self.steps
        for after, planned, extend in reversed(self.earlier):
            if step > after:
                return after, steps, extend
            steps = planned
        return 0, steps, "replan"

    def annealing(self, step, extension=None):
        """What the rate and momentum follow: the same, but with added steps it may fall again.

        extension: in place of the schedule's.
        """
        if extension is None:
            extension = self.extension
        first, steps, extend = self.part(step)
        if extend == "cooldown":
            share = progress_of(step - first, steps - first, extension)
            return 1 - self.cooldown * (1 - share)
        return progress_of(step, steps, extension)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run is a function of, in parts. On disk it is one flat object."""

    goal: Goal
    data: DataConfig
    model: typing.Any  # the template's Config
    schedule: Schedule
    optim: OptimConfig
    guard: GuardConfig
    precision: PrecisionConfig
    teaching: TeachingConfig
    policy: PolicyConfig
    run: RunConfig

    def __post_init__(self):
        """Checks between parts."""
        row_len = self.data.row_len  # batches are whole rows
        if any(n % row_len for n in self.schedule.batch_tokens):
            self.schedule.refuse("batch_tokens", f"multiples of {row_len}, row_len")
        if self.run.micro_tokens % row_len:
            self.run.refuse("micro_tokens", f"a multiple of row_len ({row_len})")
        if self.optim.optimizer == "adamw" and self.optim.adamw_warmup >= self.schedule.steps:
            self.optim.refuse("adamw_warmup", f"fewer than steps ({self.schedule.steps})")
        if self.optim.muon_head_pairs and getattr(self.model, "n_head", 2) % 2:
            self.optim.refuse("muon_head_pairs", "only with an even n_head")
        every = self.optim.adam_every
        if self.run.keep_best and self.run.eval_every % every:
            why = "for the best checkpoint to be that of a validation"
            self.run.refuse("eval_every", f"a multiple of adam_every ({every}), {why}")
        if self.data.data == "text" and not self.data.text:
            self.data.refuse("text", f"a file or folder, which track {self.goal.track} needs")
        if self.policy.reward:  # answers take as long as they are
            if self.run.time:
                self.run.refuse("time", "nothing with grpo; --max-time ends it after a time")
            if self.run.eval_every % self.policy.reuse:
                self.run.refuse("eval_every", f"a multiple of reuse ({self.policy.reuse})")


def config_classes(template=DEFAULT_TEMPLATE):
    """{part: dataclass} of a Config with this template."""
    classes = {f.name: f.type for f in dataclasses.fields(Config)}
    return classes | dict(model=load_template(template).Config)


def configure(**fields):
    """A Config from options by name; the others have their defaults. Raises InputError."""
    classes = config_classes(fields.get("template", Goal.template))
    return Config(**build_parts(classes, fields))


DESCRIPTION = """\
Train a GPT to a target loss against the clock. Without --track: gpt2-small where there is a CUDA
GPU, else laptop-counts; own-text with --text. Brackets hold the track's values; lists have an entry
for each of the equally long stages of training, or one for all. The result is one line of JSON on
stdout. Exit status: 0 target reached, 3 out of steps before it, 2 bad input, 143 or 130 stopped by
SIGTERM or Ctrl-C, with the work saved, 1 what nobody expected, of which --debug shows all."""


def parse_args(argv, beneath=None):
    """Command line -> Config: defaults, then the track's values, then the options given; beneath:
    {option: value} below the track's. Raises InputError."""
    fields = read_options(
        argv,
        lambda template: config_classes(template).values(),
        beneath,
        prog="./run.sh train",
        usage="./run.sh [train] [--OPTION VALUE ...]",
        description=DESCRIPTION,
    )
    return configure(**fields)


# --------------------------------------------------------------------------------------------------
# Schedules: of the step, numbered from 1, or of progress, the fraction of steps taken before


class Stage(typing.NamedTuple):
    """What a step's batch and its compiled graph depend on."""

    rows: int  # of the global batch
    model: typing.NamedTuple  # the template's own stage


def stage_at(config, step):
    """The one place where a step's graph-relevant values are made."""
    schedule = config.schedule
    progress = schedule.progress(step)  # 0 to 1
    rows = by_stage(schedule.batch_tokens, progress) // config.data.row_len  # of all ranks
    max_doc_len = min(by_stage(schedule.max_doc_len, progress), config.data.row_len)
    return Stage(rows, config.model.stage(progress, max_doc_len))


def stages_of(config):
    """{step: its Stage}"""
    return {step: stage_at(config, step) for step in range(1, config.schedule.steps + 1)}


def lr_at(config, step):
    """The learning rate of a step, as a factor of its peak: each optimizer has its schedule."""
    schedule = config.schedule
    if config.optim.optimizer == "adamw":
        return warmup_cosine(config.optim, schedule, step)
    return lr_scale(schedule, schedule.progress(step), schedule.annealing(step))


def warmup_cosine(optim, schedule, step):
    """AdamW's: linearly up to 1 over the warm-up, then down to its floor by half a cosine."""
    first, steps, extend = schedule.part(step)
    begin = first if extend == "cooldown" else optim.adamw_warmup  # of the fall
    t = max(0.0, progress_of(step - begin, steps - begin, schedule.extension))  # 0 to 1
    fall = (1 - optim.adamw_floor) * (1 + math.cos(math.pi * t)) / 2
    return min(1.0, step / max(1, optim.adamw_warmup)) * (optim.adamw_floor + fall)


def lr_scale(schedule, progress, annealing=None):
    """Flat at the stage's multiplier, then linearly down to lr_floor over the cooldown.

    progress: of the stages; annealing: of the cooldown, where that is another one.
    """
    t = 0.0
    if schedule.cooldown:
        at = progress if annealing is None else annealing
        t = max(0.0, (at - (1 - schedule.cooldown)) / schedule.cooldown)
    return by_stage(schedule.stage_lr, progress) * (1 - t) + schedule.lr_floor * t


def momentum_at(config, step):
    """Muon's momentum in a step. It falls until the very last one, extension and all."""
    schedule = config.schedule
    return muon_momentum(schedule.annealing(step, extension=0), schedule.momentum_warmup)


def muon_momentum(progress, warmup=0.2):
    """0.85 -> 0.95 over the warm-up, back to 0.85 in the last 4%: fresh gradients count more at
    both ends."""
    rise = progress / warmup if warmup else 1.0
    return 0.85 + 0.10 * min(1.0, rise, (1 - progress) / 0.04)


# --------------------------------------------------------------------------------------------------
# The loop


def train_to_the_end(setup, session):
    """Train from where the session is to the target or the last step. Raises Interrupted when a
    signal ended the run."""
    config = setup.config
    model, optimizer, guard = setup.model, setup.optimizer, setup.guard
    last = session.at.step  # that was taken; 0 in a new run
    before = setup.stages[max(last, 1)]
    model.enter(config.schedule.progress(max(last, 1)))
    session.start()
    if session.missed_validation():
        validate(setup, session)
        session.save()  # the checkpoint of this step learns how good it is

    touched = TouchedRows(optimizer, model)  # of token tables, known from the batches
    with contextlib.closing(batches_ahead(setup, touched, last + 1)) as batches:
        for step, batch in zip(session.steps(), batches):
            # A new stage: rotary tables and perhaps a head of its own, losses of another kind
            stage = setup.stages[step]
            if stage.model != before.model:
                model.enter(config.schedule.progress(step))
                optimizer.copy(model.successors(before.model, stage.model))
                if config.model.is_new_loss(before.model, stage.model):
                    guard.forget()
            before = stage

            # Forward and backward; gradients add up in the parameters
            loss = backward(setup, step, batch)

            # The update counts if loss and gradients, summed over ranks, are finite
            lr = lr_at(config, step)
            momentum = momentum_at(config, step)
            votes = session.votes()
            gradients = optimizer.gradients(momentum, touched.rows(step))
            ok = guard.judge(step, loss, gradients, votes)
            optimizer.step(lr, momentum, ok)
            model.after_step()

            # Log what is known by now, validate, stop or save, each when it is due
            tokens = n_tokens(config, stage)
            session.after_step(step, tokens, tokens * model.flops_per_token(stage.model), lr)
            if session.snapshot_is_due():
                with session.clock_stopped("save_s"):
                    session.log.save_weights(weights_after(setup, step), step_weights(step))
            if session.validation_is_due():
                validate(setup, session)
            if session.is_over():
                break
            if session.samples_are_due():
                with session.clock_stopped("sample_s"):
                    show_samples(setup, step, session.log)
            if session.checkpoint_is_due():
                session.save()
        session.end()  # stops the clock before the prefetcher's thread is waited for

    # The weights as they are saved do not depend on the stage in which training ended
    optimizer.copy(model.successors(before.model, None))


def validate(setup, session):
    """Validate after the step that was taken, and keep the weights if they are the best."""
    stage = val_stage(setup, session.at.step)
    with session.clock_stopped("validation_s"):
        # A part of the split says whether the target may have been reached
        if setup.quick_val and session.may_look_first():
            quick = setup.measure(setup.forward, stage, setup.quick_val, setup.world)
            if not session.look(quick):
                return
        session.record(setup.measure(setup.forward, stage, setup.val, setup.world))
        finish.keep_best(setup, session)


# --------------------------------------------------------------------------------------------------
# A run and its result


def run_once(setup, log, requests, store, found, parts, loop=train_to_the_end):
    """Train from the configuration's seed, or from what was found; returns the result, a dict.

    store: Checkpoints, on the first rank; found: (tensors, meta) of a checkpoint, the tensors on
    the first rank only, or None; parts: Parts of the process since this run began.
    """
    begin_run(setup, log, begins=not found)
    session = Session(setup, log, requests, store, found, parts)
    cold_start = parts.elapsed()
    requests.training = True  # from now on signals wait for the end of a step
    loop(setup, session)
    return dict(
        session.result(),
        cold_start_s=round(cold_start, 2),
        params=sum(p.numel() for p in setup.model.parameters()),
        data=setup.data.dataset.name,
    )


def save_result(setup, result, log, parts):
    """The weights and the result into the run's folder, and samples of text on the screen."""
    with parts.part("save_s"):
        finish.save_weights(setup, result, log)
    with parts.part("validation_s"):
        result["train_bpb"] = finish.train_bpb(setup, result["best_step"])
    with parts.part("sample_s"):
        shown = show_samples(setup, result["best_step"], log)
    if shown:
        log.say(f'more: ./run.sh sample --run {shlex.quote(str(log.folder))} --prompt "..."')
    result |= finish.time_by_part(parts)
    log.say(finish.in_words(result) + finish.cost_in_words(result))
    log.finish(result)


def train(config, world=None, requests=None, report=lambda result: None, open_loop=None):
    """Train as configured, config.run.repeat times from successive seeds.

    world: this process among others, alone on the CPU if None; requests: what signals ask for;
    report: called with the result after each run; open_loop: function of (config, data) that
    returns what to do in place of train_to_the_end(). Returns the last result, a dict: the JSON
    line. Raises InputError for what a user can mend, Interrupted after a signal.
    """
    world = world or World()  # alone, on the CPU
    machine.prepare(world.device, config.run.cache_dir)
    resume.refuse_other_options(config, world)
    trackers.check(config.run.track_with)
    if world.rank == 0:
        packed()  # begins, in a thread
    folder, resuming = folders.choose_run_dir(config, world)
    vocabulary = warm_start.choose_vocabulary(config, world, folder, resuming)
    config = changed(config, vocabulary=vocabulary)

    # The data, prepared if need be; its rows are those of `config` as it is at the time: of the
    # seed in turn, and of steps that are added or left out
    parts = parts_so_far()  # of the process, later of the run
    with parts.part("data_s"):
        data = load_data(config, lambda step: stage_at(config, step), world)
    loop = open_loop(config, data) if open_loop else train_to_the_end
    config = within_epochs(config, stages_of(config), data.train.n_tokens)
    if folder is None:
        fingerprint = data.dataset.fingerprint  # a run goes on with the same data only
        folder = folders.find_run_dir(config, world, runs_folder(), resuming, fingerprint)

    setup = None  # made once, for all seeds
    for seed, run_dir in folders.by_seed(folder, config.goal.seed, config.run.repeat):
        config = changed(config, seed=seed, earlier=())
        with contextlib.ExitStack() as closing:
            # What is there already: a result, a checkpoint, or nothing
            result, found = resume.begin(config, world, run_dir, resuming, data.dataset, closing)
            if not result:
                if not found:
                    warm_start.check(config, data.dataset)  # before anything is written
                config = changed(config, earlier=resume.added_steps(config, found))
                at = resume.step_of(found)
                log = Log(run_dir, config.schedule.steps, not world.rank, at if resuming else None)
                closing.enter_context(log)
                trackers.attach(log, config.run.track_with, flat(config))
                closing.enter_context(memory.explained(config.data.row_len, lambda: setup))
                if added := resume.added_steps_in_words(config, at, lr_at):
                    log.say(added)

                # Model, optimizer and batches, of the seed before if no steps were added to it
                if setup and setup.config.schedule != config.schedule:
                    setup = None
                new = setup is None
                if new:
                    setup = set_up(config, stages_of(config), world, data, log)
                    if config.run.time:
                        config = fit_to_time(setup, stages_of, parts.elapsed())
                        log.expect(config.schedule.steps)
                    if config.run.time or (config.goal.target is None and not open_loop):
                        setup.expected_seconds = expected_training(setup)
                        setup.expected_bpb = expected_bpb(setup)
                setup.config = config  # of this seed
                announce(log, setup)
                if new:
                    setup = make_ready(setup, log, parts)

                store = closing.enter_context(open_store(config.run, log))
                result = run_once(setup, log, requests or Requests(), store, found, parts, loop)
                if world.rank == 0:
                    save_result(setup, result, log, parts)
            if world.rank == 0:
                report(result)
            machine.wait_for_first_rank(world)
        parts = Parts()
    return result


# --------------------------------------------------------------------------------------------------
# The door


def main(argv=None, beneath=None, open_loop=None, again=None):
    """Parse, train in a process for each GPU, print the results. Returns the exit status.

    beneath, open_loop: as for parse_args() and train(); again: (file, argv) that starts each of
    several processes, in place of this file.
    """
    argv = sys.argv[1:] if argv is None else argv
    reached = []  # of each run: True, False, or None without a target

    def report(result):
        reached.append(result["reached"])
        why = streams.put(to_json(result))
        if why is not None:
            path = Path(result["run_dir"], "result.json")
            show(f"the result cannot be written to stdout ({why}); it is in {path}")

    def program():
        config = parse_args(argv, beneath)
        body = functools.partial(train, config, report=report, open_loop=open_loop)
        start = again or (__file__, argv)
        status = run_on_all_gpus(*start, body, config.run.gpus, config.run.max_restarts)
        # Where torchrun would start again, 3 would count as a failure
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        return 3 if False in reached and not restarts else status

    return exit_status(program)
