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
import time
import typing
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file

from base import InputError, RankError, last_resort, streams, to_json
from base.clock import START, Parts
from base.options import (
    BY_STAGE,
    COUNT,
    FRACTION,
    POSITIVE,
    Options,
    by_stage,
    option,
    progress_of,
    remembered,
)
from base.places import runs_folder
from data import Prefetcher, pack
from data.config import DataConfig
from data.loader import IGNORE
from inference.engine import Engine, Request
from inference.sampling import default_sampling
from kernels import choose_ops
from models import load_template, option_names, outline, template_names
from optim import OptimConfig, Optimizer, gradient_report
from records.metrics import METRICS, VAL_LOSS, Evaluation, measure
from runtime import compiling, folders, machine, memory, resume, saved, warm_start
from runtime.announce import announce
from runtime.checkpoints import Checkpoints
from runtime.corpus import load_data
from runtime.environment import best_seconds, describe_environment, machine_probe
from runtime.guard import Guard, GuardConfig
from runtime.launch import exit_status, run_on_all_gpus
from runtime.log import Log, show
from runtime.machine import PrecisionConfig, World
from runtime.options import RunConfig, build_parts, flat, parse_options, peek
from runtime.session import Session
from runtime.signals import Requests
from tracks import load_track, track_names

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
        "gpt", f"the model's file: {', '.join(template_names())}, or a module's dotted name"
    )


@dataclasses.dataclass(frozen=True)
class Schedule(Options):
    """Steps, batches and learning rate. A tuple with an entry for each stage divides training
    equally; the tuples' lengths may differ."""

    steps: int = option(500, "optimizer steps", POSITIVE, group="batch, context and schedule")
    batch_tokens: tuple[int, ...] = option((8192,), "tokens per step, by stage", BY_STAGE)
    max_doc_len: tuple[int, ...] = option(
        (256,), "documents are cut at this many tokens, by stage", BY_STAGE
    )
    stage_lr: tuple[float, ...] = option((1.0,), "learning rate multiplier, by stage", BY_STAGE)
    extension: int = option(0, "the last so many steps stay where the schedules end", COUNT)
    cooldown: float = option(
        0.6, "fraction of training over which the learning rate falls linearly", FRACTION
    )
    lr_floor: float = option(0.15, "where it falls to, as a fraction", FRACTION)
    # (step after which steps were added, how many there were to be until then, --extend) each time
    earlier: tuple = remembered(())

    def __post_init__(self):
        super().__post_init__()
        if self.extension >= self.steps:
            self.refuse("extension", f"fewer than steps ({self.steps})")

    def progress(self, step):
        """What stages follow: the fraction of training before a step. No stage ever comes back."""
        return progress_of(step, self.steps, self.extension, self.earlier)

    def annealing(self, step):
        """What learning rate and momentum follow: the same, but where steps were added the rate
        may rise again, to fall once more until the new end."""
        first, steps, extend = 0, self.steps, "replan"
        for after, planned, how in reversed(self.earlier):
            if step > after:
                first, extend = after, how
                break
            steps = planned
        if extend == "cooldown":
            share = progress_of(step - first, steps - first, self.extension)
            return 1 - self.cooldown * (1 - share)
        return progress_of(step, steps, self.extension)


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
    run: RunConfig

    def __post_init__(self):
        """Checks between parts."""
        row_len = self.data.row_len  # batches are whole rows
        if any(n % row_len for n in self.schedule.batch_tokens):
            self.schedule.refuse("batch_tokens", f"multiples of {row_len}, row_len")
        if self.run.micro_tokens % row_len:
            self.run.refuse("micro_tokens", f"a multiple of row_len ({row_len})")
        every = self.optim.adam_every
        if self.run.keep_best and self.run.eval_every % every:
            why = "for the best checkpoint to be that of a validation"
            self.run.refuse("eval_every", f"a multiple of adam_every ({every}), {why}")
        if self.data.data == "text" and not self.data.text:
            self.data.refuse("text", f"a file or folder, which track {self.goal.track} needs")


# What may differ between a run and its continuation; another text is found by its fingerprint
FREE = {f.name for f in dataclasses.fields(RunConfig)}
FREE |= {"target", "target_metric", "text", "val_text", "encoding", "vocabulary", "max_skips"}


def config_classes(template="gpt"):
    """{part: dataclass} of a Config with this template."""
    classes = {f.name: f.type for f in dataclasses.fields(Config)}
    return classes | dict(model=load_template(template).Config)


def configure(**fields):
    """A Config from options by name; the others have their defaults. Raises InputError."""
    classes = config_classes(fields.get("template", Goal.template))
    return Config(**build_parts(classes, fields))


def known(fields, template):
    """Those of these options that a Config with this template has."""
    names = set()
    for cls in config_classes(template).values():
        names |= {f.name for f in dataclasses.fields(cls)}
    return {name: value for name, value in fields.items() if name in names}


def changed(config, **fields):
    """The Config with some of its options changed. Raises InputError."""
    return configure(**(flat(config) | fields))


def expanded(path):
    """A path that peek() gives, with its ~ as parse_options() has it."""
    return os.path.expanduser(path or "")


def parse_args(argv):
    """Command line -> Config: defaults, then the track's values, then the options given."""
    # The track and the template come first, since they say which other options there are
    first = peek(argv, "track", "template", "text", "resume", "warm_start")  # None if not given
    run = resume.options_of(expanded(first["resume"]))  # of the run to go on with, if it is named
    if first["track"]:
        track = first["track"]
    elif run:
        track = run["track"]
    elif first["text"]:
        track = "own-text"
    else:
        track = "gpt2-small" if torch.cuda.is_available() else "laptop"
    fields = run or load_track(track)  # {option: value}
    template = first["template"] or fields.get("template", Goal.template)
    # Another template than the track's has no use for options that it does not know
    foreign = option_names(fields.get("template", Goal.template)) - option_names(template)
    fields = {name: value for name, value in fields.items() if name not in foreign}
    if run:  # of another version, it may have options that this one lacks
        fields = known(fields, template)

    given = parse_options(
        config_classes(template).values(),
        argv,
        fields,
        prog="./run.sh train",
        usage="./run.sh [train] [--OPTION VALUE ...]",
        description=DESCRIPTION,
        epilog=f"Tracks: {', '.join(track_names())}.",
    )
    # Own text on a track made for other data: no target, and every token is kept
    if "text" in given and fields.get("data") != "text":
        fields |= dict(data="text", target=None, tokenizer=DataConfig.tokenizer)
        fields |= dict(long_docs="split", shuffle=True, sample_prompts=())
    # Weights to begin with stand for their own tokens
    if first["warm_start"]:
        name = warm_start.tokenizer_name(expanded(first["warm_start"]))
        fields["tokenizer"] = name or fields.get("tokenizer", DataConfig.tokenizer)
    return configure(**(fields | given | dict(track=track)))


DESCRIPTION = """\
Train a GPT to a target loss against the clock. Without --track: gpt2-small where there is a CUDA
GPU, else laptop; own-text with --text. Brackets hold the track's values; lists have an entry for
each of the equally long stages of training, or one for all. The result is one line of JSON on
stdout. Exit status: 0 target reached, 3 out of steps before it, 2 bad input, 143 or 130 stopped by
SIGTERM or Ctrl-C, with the work saved, 1 what nobody expected, of which --debug shows all."""


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


def n_tokens(config, stage):
    """Of a step's batch, over all ranks."""
    return stage.rows * config.data.row_len


def lr_scale(schedule, progress, annealing=None):
    """Flat at the stage's multiplier, then linearly down to lr_floor over the cooldown.

    progress: of the stages; annealing: of the cooldown, where that is another one.
    """
    t = 0.0
    if schedule.cooldown:
        at = progress if annealing is None else annealing
        t = max(0.0, (at - (1 - schedule.cooldown)) / schedule.cooldown)
    return by_stage(schedule.stage_lr, progress) * (1 - t) + schedule.lr_floor * t


def added_steps_in_words(schedule, at):
    """What happens to the learning rate of a run that goes on after step `at`, if it is there that
    steps were added to it; else None."""
    if not schedule.earlier or schedule.earlier[-1][0] != at:
        return None
    _, planned, extend = schedule.earlier[-1]
    before, after = (
        lr_scale(schedule, schedule.progress(step), schedule.annealing(step))
        for step in (max(at, 1), at + 1)
    )
    how = dict(
        replan=f"the learning rate is that of a run of {schedule.steps} steps from here on",
        cooldown="the learning rate falls from its peak over the added steps",
    )
    others = dict(replan="cooldown", cooldown="replan")
    return (
        f"{schedule.steps - planned} steps more than the {planned} planned: {how[extend]}, "
        f"{before:.2f} of its peak in step {at}, {after:.2f} in the next (--extend {extend}; the "
        f"other choice is {others[extend]})"
    )


def muon_momentum(progress):
    """0.85 -> 0.95 over the first fifth, back to 0.85 in the last 4%: fresh gradients count more
    at both ends."""
    return 0.85 + 0.10 * min(1.0, progress / 0.2, (1 - progress) / 0.04)


# --------------------------------------------------------------------------------------------------
# Evaluation


class Split(typing.NamedTuple):
    """A validation split, or a part of it."""

    batches: list  # this rank's micro-batches
    n_targets: int  # over all ranks
    n_bytes: int | None  # of UTF-8 that these targets stand for; None if not to be known


def part_of(split, tokens, data, world):
    """Batches of a Split, evenly spread, of about this many tokens a rank, as a Split."""
    n = max(1, tokens // split.batches[0].inputs.numel())
    batches = split.batches[:: max(1, len(split.batches) // n)]
    targets = torch.cat([micro.targets[micro.targets != IGNORE] for micro in batches])
    n_bytes = 0
    if split.n_bytes is not None:
        n_bytes = int(data.dataset.tokenizer.token_bytes[targets.numpy()].sum())
    counts = torch.tensor([len(targets), n_bytes], device=world.device)
    if world.size > 1:
        dist.all_reduce(counts)
    n_targets, n_bytes = counts.tolist()
    return Split(batches, n_targets, n_bytes or None)


@torch.no_grad()
def evaluate(forward, stage, split, world):
    """Metrics by name over all ranks' batches of a Split; stage: the template's."""
    total = torch.zeros((), dtype=torch.float64, device=world.device)  # nats
    for micro in split.batches:
        inputs, targets, cu_seqlens = (t.to(world.device, non_blocking=True) for t in micro)
        total += forward(inputs, targets, cu_seqlens, stage)
    if world.size > 1:
        dist.all_reduce(total)
    return measure(Evaluation(total.item(), split.n_targets, split.n_bytes))


# --------------------------------------------------------------------------------------------------
# Setting up: once for all seeds of a configuration


@dataclasses.dataclass
class Setup:
    """A configuration on a machine, ready to train from any seed."""

    config: Config
    world: World
    data: typing.Any  # loaders and the data set
    model: torch.nn.Module
    forward: typing.Callable  # the model, compiled where that is on
    optimizer: Optimizer
    guard: Guard
    stages: dict  # step -> Stage
    micro_rows: dict  # Stage -> rows in a forward pass
    pass_seconds: dict  # Stage -> seconds of a step's passes, timed beforehand; empty if all alike
    expected_seconds: float  # of all training
    val: Split
    quick_val: Split | None  # a part that says when all of it is due
    environment: dict
    peak: float  # FLOP/s of all ranks in large matrix products, measured
    memory: str  # the estimate, in words


def set_up(config, world, data, log):
    """A Setup, its weights not yet drawn. Raises InputError."""
    device = world.device
    dtype = machine.choose_dtype(config.precision.dtype, device)  # of weights and activations
    template = load_template(config.goal.template)
    head_dim = getattr(config.model, "head_dim", 64)
    try:
        ops = choose_ops(device, dtype, head_dim, config.run.kernels, config.precision.fp8, log.say)
    except ValueError as e:
        raise InputError(e) from None
    machine.refuse_difference(world, "kernels", to_json(ops.named()))

    # The model, and how much goes through it at a time: that depends on the memory found
    max_len = max(config.data.row_len, config.data.val_row_len)  # of rotary tables
    n_vocab = data.dataset.n_vocab
    build = functools.partial(template.Model, config.model, n_vocab, max_len, dtype, ops)
    most, recompute, estimate = memory.fit(build, config, world)  # most: rows in a forward pass
    with device:
        model = build()  # weights are drawn in run_once()
    model.recompute = recompute

    # Passes of equal size, by stage; validation goes by about as many tokens
    stages = {step: stage_at(config, step) for step in range(1, config.schedule.steps + 1)}
    micro_rows = {}
    for stage in set(stages.values()):
        micro_rows[stage] = memory.equal_passes(-(-stage.rows // world.size), most)
    val_tokens = min(micro_rows[stages[config.schedule.steps]] * config.data.row_len, 16384)
    val_rows = max(1, val_tokens // config.data.val_row_len)
    val_batches = list(data.val.micro_batches(world.rank, world.size, val_rows))
    val = Split(val_batches, data.val.n_targets, data.val_bytes)
    quick_val = None
    if config.run.quick_val and config.goal.target is not None:
        quick_val = part_of(val, config.run.quick_val // world.size, data, world)

    environment = describe_environment(device)
    environment |= dict(dtype=str(dtype).removeprefix("torch."), kernels=ops.named())
    environment |= dict(world_size=world.size, probe=machine_probe(device))
    peak = environment["probe"]["matmul"][environment["dtype"]] * world.size

    # The optimizer and the guard; what of all this is compiled
    flops = sum(n_tokens(config, s) * model.flops_per_token(s.model) for s in stages.values())
    compiled = compiling.choose(
        config.run.compile, graph_options(config), flops / peak, world, log.say
    )
    skips = config.guard.max_skips > 0  # whether bad steps may pass
    optimizer = Optimizer(model, model.update_rules(config.optim), world, compiled, skips)

    # On a CPU, compiling the gradients' report would take longer than it does
    report = gradient_report
    if compiled and device.type == "cuda":
        report = torch.compile(report, dynamic=False)
    guard = Guard(device, report, strict=not skips, spike_sigmas=config.guard.spike_sigmas)

    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    return Setup(
        config=config,
        world=world,
        data=data,
        model=model,
        forward=forward,
        optimizer=optimizer,
        guard=guard,
        stages=stages,
        micro_rows=micro_rows,
        pass_seconds={},
        expected_seconds=compiling.expected_training(flops / peak, compiled, device),
        val=val,
        quick_val=quick_val,
        environment=environment,
        peak=peak,
        memory=estimate,
    )


def graph_options(config):
    """{option: value} of what compiled code may depend on."""
    elsewhere = {"text", "val_text", "encoding", "shuffle"}
    for part in RunConfig, Goal, GuardConfig:
        elsewhere |= {f.name for f in dataclasses.fields(part)}
    return {name: value for name, value in flat(config).items() if name not in elsewhere}


def warm_up(setup):
    """Compile everything on batches of padding, whose loss and gradients are zero."""
    config = setup.config
    # A stage may have a graph for validation, an update one for each size
    limit = 2 * len(setup.micro_rows) + 16
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    for step, padding in padding_by_stage(setup):
        loss = backward(setup, step, [padding])  # compiles forward and backward
        ok = setup.guard.judge(0, loss, setup.optimizer.gradients())
    for _ in range(max(rule.every for rule in setup.optimizer.rules.values())):
        setup.optimizer.step(0.0, 0.0, ok)  # at learning rate 0

    # One validation for each of its graphs
    graphs = {}
    for step in setup.stages:
        if step % config.run.eval_every == 0 or step == config.schedule.steps:
            graphs[val_stage(setup, step)] = setup.val._replace(batches=setup.val.batches[:1])
    for stage, split in graphs.items():
        evaluate(setup.forward, stage, split, setup.world)


def padding_by_stage(setup):
    """[(a step, a micro-batch of padding), ...] for every stage."""
    first_step = {}
    for step, stage in setup.stages.items():
        first_step.setdefault(stage, step)
    found = []
    for stage in sorted(setup.micro_rows):
        rows = [None] * setup.micro_rows[stage]
        max_docs = setup.data.train.max_docs
        padding = pack(rows, setup.config.data.row_len, max_docs, stage.model.max_doc_len)
        found.append((first_step[stage], padding))
    return found


def warm_up_or_go_without(setup, log):
    """warm_up(). Returns the Setup; where the compiler does not work, one that does without."""
    try:
        warm_up(setup)
        return setup
    except Exception as e:
        if not machine.compiler_failed(e):
            raise
        last_resort.show_if_debugging(e)
        why = f"torch.compile failed ({machine.compiler_said(e)})"
        if setup.world.size > 1:  # the others may have compiled, and wait for this one
            raise RankError(f"{why}; --no-compile trains without it") from None
        report = last_resort.write_report(e, log.folder)
        log.say(f"running without torch.compile, which is slower: {why}; the report is in {report}")
    return set_up(changed(setup.config, compile=False), setup.world, setup.data, log)


def time_passes(setup):
    """Measure how long each stage's forward and backward passes take, for the time that is left."""
    if len(setup.micro_rows) == 1:
        return  # the first steps show it
    for step, padding in padding_by_stage(setup):
        stage = setup.stages[step]
        passes = -(-stage.rows // (setup.micro_rows[stage] * setup.world.size))
        work = functools.partial(backward, setup, step, [padding])
        setup.pass_seconds[stage] = passes * best_seconds(setup.world.device, work, 3, budget=0.1)


# --------------------------------------------------------------------------------------------------
# The loop


def train_to_the_end(setup, session):
    """Train from where the session is to the target or the last step. Raises Interrupted when a
    signal ended the run."""
    config, world = setup.config, setup.world
    model, optimizer, guard = setup.model, setup.optimizer, setup.guard
    first = session.at.step + 1
    before = max(session.at.step, 1)  # the step that was taken last
    model.enter(config.schedule.progress(before))
    session.start()
    if session.missed_validation():
        validate(setup, session)
        session.save()  # the checkpoint of this step learns how good it is

    def micro_batches():
        for step in range(first, config.schedule.steps + 1):
            rows = setup.micro_rows[setup.stages[step]]
            yield list(setup.data.train.micro_batches(step, world.rank, world.size, rows))

    with contextlib.closing(Prefetcher(micro_batches(), world.device)) as batches:
        for step, batch in zip(session.steps(), batches):
            stage = setup.stages[step]
            progress = config.schedule.progress(step)
            annealing = config.schedule.annealing(step)

            # A new stage: rotary tables and perhaps a head of its own, losses of another kind
            if stage.model != setup.stages[before].model:
                model.enter(progress)
                optimizer.copy(model.successors(setup.stages[before].model, stage.model))
                if config.model.is_new_loss(setup.stages[before].model, stage.model):
                    guard.forget()
            before = step

            # Forward and backward; gradients add up in the parameters
            loss = backward(setup, step, batch)

            # The update counts if loss and gradients are finite, on all ranks
            ok = guard.judge(step, loss, optimizer.gradients(), session.votes())
            lr = lr_scale(config.schedule, progress, annealing)
            optimizer.step(lr, muon_momentum(annealing), ok)
            model.after_step()

            # Log what is known by now, validate, stop or save, each when it is due
            tokens = n_tokens(config, stage)
            session.after_step(step, tokens, tokens * model.flops_per_token(stage.model))
            if session.validation_is_due():
                validate(setup, session)
            if session.is_over():
                break
            if session.samples_are_due():
                with session.clock_stopped(), session.parts.part("sample_s"):
                    show_samples(setup, step, session.log)
            if session.checkpoint_is_due():
                session.save()
        session.end()  # stops the clock before the prefetcher's thread is waited for

    # The weights as they are saved do not depend on the stage in which training ended
    optimizer.copy(model.successors(setup.stages[before].model, None))


def backward(setup, step, batch):
    """Forward and backward over this rank's micro-batches of a step.

    Returns this rank's share of the mean loss, 0-d, on the device.
    """
    config = setup.config
    device = setup.world.device
    stage = setup.stages[step]
    tokens = n_tokens(config, stage)
    weights = config.model.target_weights(config.schedule.progress(step))
    if weights is not None:
        weights = machine.to_device(weights, device)
    total = torch.zeros((), device=device)
    for micro in batch:
        inputs, targets, cu_seqlens = (t.to(device) for t in micro)
        loss = setup.forward(inputs, targets, cu_seqlens, stage.model, weights) / tokens
        loss.backward()  # adds to .grad
        total += loss.detach()
    return total


def val_stage(setup, step):
    """The template's stage for validation after a step."""
    config = setup.config
    return config.model.val_stage(setup.stages[step].model, config.data.val_row_len)


def validate(setup, session):
    stage = val_stage(setup, session.at.step)
    with session.clock_stopped(), session.parts.part("validation_s"):
        # A part of the split says whether the target may have been reached
        if setup.quick_val and not session.is_last_step():
            quick = evaluate(setup.forward, stage, setup.quick_val, setup.world)
            if not session.is_near(quick):
                return
        session.record(evaluate(setup.forward, stage, setup.val, setup.world))
        if session.is_best():
            session.log.save_weights(weights_after(setup, session.at.step), "best.safetensors")


def weights_after(setup, step):
    """{name: CPU tensor} as they are to be kept after a step: not those of its stage."""
    weights = {name: p.detach().cpu() for name, p in setup.model.named_parameters()}
    heirs = setup.model.successors(setup.stages[step].model, None)
    return weights | {name: weights[source].clone() for name, source in heirs.items()}


# --------------------------------------------------------------------------------------------------
# A run and its result


def run_once(setup, log, requests, store, found, parts):
    """Train from the configuration's seed, or from what was found; returns the result, a dict.

    store: Checkpoints, on the first rank; found: (tensors, meta) of a checkpoint, the tensors on
    the first rank only, or None; parts: Parts of the process since this run began.
    """
    config = setup.config
    setup.data.train.reseed(config.goal.seed)  # the order of documents
    setup.guard.reset()  # no bad step yet
    setup.model.reset_state()
    if not found:
        setup.model.init_weights(config.goal.seed)
    if config.run.warm_start and not found:
        warm_start.copy_weights(config.run.warm_start, setup.model)
    setup.optimizer.reset()  # moments at zero
    session = Session(setup, log, requests, store, found, parts)
    cold_start = parts.elapsed()
    requests.training = True  # from now on signals wait for the end of a step
    train_to_the_end(setup, session)
    return dict(
        session.result(),
        cold_start_s=round(cold_start, 2),
        params=sum(p.numel() for p in setup.model.parameters()),
        data=setup.data.dataset.name,
    )


PARTS = "imports_s", "data_s", "compile_s", "train_s", "validation_s", "sample_s", "save_s"


def time_by_part(parts):
    """{process_s and a name for each part: seconds}; what is in none of them is start-up."""
    found = {name: round(parts.seconds.get(name, 0.0), 2) for name in PARTS}
    return dict(process_s=round(parts.elapsed(), 2), **found)


def in_words(result):
    """The parts of the process's time in a line."""
    others = result["process_s"] - sum(result[name] for name in PARTS)
    parts = [f"{name.removesuffix('_s')} {result[name]:.1f}" for name in PARTS if result[name]]
    return f"{result['process_s']:.1f} s: {', '.join(parts)}, the rest {others:.1f}"


def save_result(setup, result, log, parts):
    """The weights and the result into the run's folder, and samples of text on the screen."""
    with parts.part("save_s"):
        save_weights(setup, result, log)
    with parts.part("sample_s"):
        shown = show_samples(setup, result["best_step"], log)
    if shown:
        log.say(f'more: ./run.sh sample --run {shlex.quote(str(log.folder))} --prompt "..."')
    result |= time_by_part(parts)
    log.say(in_words(result))
    log.finish(result)


def save_weights(setup, result, log):
    """model.safetensors, which is the best validation's where there is no target; then the last
    step's are last.safetensors. The model has the former afterwards."""
    last = {name: p.detach().cpu() for name, p in setup.model.named_parameters()}
    if result["best_step"] == result["steps"]:
        log.save_weights(last)
        log.remove("best.safetensors", "last.safetensors")
        return
    # A run that went on without getting better has its best weights under that name already
    log.rename("best.safetensors", "model.safetensors")
    log.save_weights(last, "last.safetensors")
    if log.active:
        try:
            with torch.no_grad():
                saved.fill(setup.model, load_file(log.folder / "model.safetensors"))
        except (OSError, SafetensorError, ValueError) as e:  # the disk was full, say
            log.say(f"the best weights cannot be read ({e}); those of the last step are kept")
            log.save_weights(last)
            return
    log.say(
        f"the weights are those of step {result['best_step']}, the best validation's; the last "
        "step's are in last.safetensors"
    )


def show_samples(setup, step, log):
    """What the model makes of the track's prompts, or of how documents of validation begin.

    Returns whether there was something to show: one rank speaks for all, and of a text.
    """
    run = setup.config.run
    if setup.world.rank or not setup.data.val_bytes or not run.sample_tokens:
        return False
    dataset = setup.data.dataset
    stage = val_stage(setup, step)
    engine = Engine(setup.model, stage, dataset.tokenizer, setup.config.data.val_row_len)
    sampling = default_sampling(dataset.tokenizer)
    requests = []
    try:
        for prompt in run.sample_prompts or dataset.beginnings() or ("",):
            seed = setup.config.goal.seed + len(requests)
            requests.append(Request(prompt, run.sample_tokens, sampling, seed))
        for done in engine.generate(requests):
            log.say(f"--- a sample after step {step}\n{done.request.prompt}{done.text}\n---")
    except InputError as e:  # such as a prompt with characters that the tokenizer has not seen
        log.say(f"no samples: {e}")
        return False
    except Exception as e:  # whatever it is, the training and its result are worth more
        report = last_resort.write_report(e, log.folder)
        log.say(f"no samples: {last_resort.explain(e)}; the full report is in {report}")
        return False
    return True


def train(config, world=None, requests=None, report=lambda result: None):
    """Train as configured, config.run.repeat times from successive seeds.

    world: this process among others, alone on the CPU if None; requests: what signals ask for;
    report: called with the result after each run. Returns the last result, a dict: the JSON line.
    Raises InputError for what a user can mend, Interrupted after a signal.
    """
    world = world or World()  # alone, on the CPU
    options = config.run
    machine.choose_compile_cache(options.cache_dir)
    machine.use_threads()
    resume.refuse_other_options(config, FREE, world)
    folder, resuming = folders.choose_run_dir(config, world)
    if world.device.type == "cpu":
        machine.keep_freed_memory()
    vocabulary = warm_start.choose_vocabulary(config, world, folder, resuming)
    config = changed(config, vocabulary=vocabulary)
    parts = Parts(START, imports_s=time.perf_counter() - START)  # of the process, later of the run
    with parts.part("data_s"):
        # Prepared if need be; its rows are those of the seed in turn, and of steps added to it
        data = load_data(config, lambda step: stage_at(config, step), world)
    if folder is None:
        fingerprint = data.dataset.fingerprint  # a run goes on with the same data only
        folder = folders.find_run_dir(config, FREE, world, runs_folder(), resuming, fingerprint)
    setup = None  # made once, for all seeds
    for seed, run_dir in folders.by_seed(folder, config.goal.seed, options.repeat):
        config = changed(config, seed=seed, earlier=())
        with contextlib.ExitStack() as closing:
            # What is there already: a result, a checkpoint, or nothing
            result, found = resume.begin(
                config, FREE, world, run_dir, resuming, data.dataset, closing
            )
            if not result:
                if options.warm_start and not found:  # do they fit? before anything is written
                    warm_start.check_vocabulary(options.warm_start, data.dataset)
                    model = outline(config, data.dataset.n_vocab)
                    warm_start.copy_weights(options.warm_start, model)
                at = 0
                if found:
                    at = found[1]["progress"]["step"]
                    config = changed(config, earlier=resume.added_steps(config, found[1]))
                log = Log(run_dir, config.schedule.steps, not world.rank, at if resuming else None)
                closing.enter_context(log)
                closing.enter_context(memory.explained(config.data.row_len, lambda: setup))
                if added := added_steps_in_words(config.schedule, at):
                    log.say(added)
                if setup and setup.config.schedule != config.schedule:
                    setup = None  # steps were added to one seed's run and not to another's
                new = setup is None  # then everything has to be compiled
                setup = setup or set_up(config, world, data, log)
                setup.config = config  # of this seed
                announce(log, setup)
                if new and setup.forward is not setup.model:
                    log.say("compiling ... (minutes the first time, seconds from then on)")
                    with parts.part("compile_s"):
                        setup = warm_up_or_go_without(setup, log)
                    if setup.forward is not setup.model:
                        compiling.remember(graph_options(config), parts.seconds["compile_s"])
                    setup.config = config
                if new:
                    time_passes(setup)
                store = None  # of checkpoints, on the first rank
                if options.checkpoint_every != "off" and world.rank == 0:
                    keep = options.keep_last, options.keep_best
                    store = Checkpoints(run_dir / "checkpoints", *keep, log.say)
                    closing.enter_context(contextlib.closing(store))
                result = run_once(setup, log, requests or Requests(), store, found, parts)
                if world.rank == 0:
                    save_result(setup, result, log, parts)
            if world.rank == 0:
                report(result)
            machine.wait_for_first_rank(world)
        parts = Parts()
    return result


# --------------------------------------------------------------------------------------------------
# The door


def main(argv=None):
    """Parse, train in a process for each GPU, print the results. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    reached = []  # of each run: True, False, or None without a target

    def report(result):
        reached.append(result["reached"])
        why = streams.put(to_json(result))
        if why is not None:
            path = Path(result["run_dir"], "result.json")
            show(f"the result cannot be written to stdout ({why}); it is in {path}")

    def program():
        config = parse_args(argv)
        body = functools.partial(train, config, report=report)
        status = run_on_all_gpus(__file__, argv, body, config.run.gpus, config.run.max_restarts)
        # Where torchrun would start again, 3 would count as a failure
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
        return 3 if False in reached and not restarts else status

    return exit_status(program)
