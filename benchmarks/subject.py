"""What is measured: all that benchmarks know of the trainer, in one place.

A configuration here has today's field names as attributes; a stage has rows, windows, max_doc_len,
n_targets, tied and n_sampled. Steps are numbered from 1.
"""

import dataclasses
import math
import os
import time
import types
import typing
from pathlib import Path

import torch
from torch.profiler import record_function

import train_gpt as tg
from base import InputError
from records.source import pack_source
from runtime.corpus import load_data
from runtime.machine import World, join_world, keep_freed_memory
from runtime.signals import Requests

Config = tg.Config  # for those who make one without a command line
ROOT = tg.ROOT
BY_STAGE = ("max_doc_len", "short_window", "long_window", "stage_lr", "mtp", "sampled_softmax")


# --- configurations and their schedules


def parse(options):
    """The configuration that ./run.sh makes of these options. Raises InputError."""
    return tg.parse_args([str(option) for option in options])


def change(c, **fields):
    """The configuration with other values of these fields. Raises InputError."""
    return dataclasses.replace(c, **fields)


def fields_of(c):
    """{name: value}, as in config.json."""
    return dataclasses.asdict(c)


def stage_at(c, progress):
    """The stage after this share of training."""
    return tg.stage_at(c, progress)


def schedule(c):
    """The stage of every step."""
    return [tg.stage_at(c, tg.progress_at(c, step)) for step in range(c.steps)]


def step_tokens(c):
    """Tokens of every step, on all ranks together."""
    return [stage.rows * c.row_len for stage in schedule(c)]


def at_end(c, batch_tokens):
    """The configuration that all the time does what c does at its end, in such batches."""
    last = schedule(c)[-1]
    fields = {name: getattr(c, name)[-1:] for name in BY_STAGE}
    fields |= dict(batch_tokens=batch_tokens, steps=len(batch_tokens), extension=0)
    return change(c, tied=float(last.tied), **fields)


# --- what the parameters are, without weights


class Parameter(typing.NamedTuple):
    name: str
    count: int  # of elements
    bytes: int
    units: int  # that are not divided among ranks: matrices, rows or elements
    sharded: bool
    every: int  # steps between its updates


def model_on_meta(c, n_vocab):
    with torch.device("meta"):
        return tg.GPT(c, n_vocab, torch.bfloat16)


def parameters(c, n_vocab):
    """[Parameter, ...] in the order in which the optimizer takes them."""
    tensors = dict(model_on_meta(c, n_vocab).named_parameters())
    found = []
    for name, rule in tg.parameter_table(c).items():
        p = tensors[name]
        units = p.numel()
        if rule.optim == "muon":
            units = len(p)
        elif rule.optim == "row_adam":
            units = p[..., 0].numel()
        every = 1 if rule.optim == "muon" else c.adam_every
        found.append(Parameter(name, p.numel(), p.nbytes, units, rule.sharded, every))
    return found


def has_gradient(name, c, tied):
    """Whether a parameter is used in a stage with the head tied or not."""
    if name == "embed":
        return not tied
    if name == "scalars":
        return c.smear or bool(c.skip) or c.backout >= 0
    return True


# --- where it runs


def prepare_caches(c):
    """Have compiled code kept where the trainer keeps it."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(c.cache_dir) / "inductor"))


def join():
    """This process's part of the machine, or of what torchrun started; see World."""
    return join_world(torch.cuda.device_count() if torch.cuda.is_available() else 0)


def alone():
    """The first GPU, or the CPU, with no other ranks."""
    return World(device=torch.device("cuda", 0) if torch.cuda.is_available() else CPU)


CPU = torch.device("cpu")


def open_data(c, world=None, stages=None, opener=None):
    """The corpus with its loaders; opener: what opens it, in place of data.open_dataset."""
    return load_data(c, stages or schedule(c), world or World(), opener)


def source_hash():
    """SHA-256 of all source that decides a run's numbers."""
    return pack_source(ROOT).digest


# --- a trainer


class Subject:
    """A trainer for one configuration, built once; for whole runs, or step by step."""

    def __init__(self, c, world, log, data=None):
        """log: Log, or anything with say(); data: of open_data(), with a stage for each of its
        batches; opened here where it is not given."""
        c = tg.settle(c, world.device)
        if world.device.type == "cpu":
            keep_freed_memory()
        self.c = c
        self.world = world
        self.stages = schedule(c)
        self.data = data or open_data(c, world)
        self.trainer = tg.Trainer(c, world, self.data, self.stages, log)
        self.compiled = self.trainer.compiled
        self.params = self.trainer.params
        self.environment = self.trainer.environment
        self.peak = self.trainer.peak  # FLOP/s of all ranks
        self.model = self.trainer.model

    def warm_up(self, log):
        """Compile what is compiled."""
        if self.compiled:
            self.trainer.warm_up(log)

    # whole runs

    def run(self, log, seed=None, checkpoints=None, every="off"):
        """Train from a seed to the last step; returns the result as a dict.

        checkpoints: Checkpoints to write to, one every so many steps, or such a time.
        """
        seed = self.c.seed if seed is None else seed
        self.trainer.c = change(self.c, seed=seed, checkpoint_every=every)
        self.model.zero_grad(set_to_none=True)  # what a run that failed left
        return self.trainer.run(log, time.perf_counter(), Requests(), checkpoints)

    def shared_choices(self):
        """dict(rows of a micro-batch, at most, recompute) as fitted to the memory."""
        rows = max(self.trainer.micro_rows.values())
        return dict(rows=rows, recompute="on" if self.model.recompute else "off")

    def own_code(self):
        """Give the model a forward() of its own: torch.compile keeps graphs by code object, and
        refuses more than a few."""
        kind = type(self.model)
        old = kind.forward
        forward = types.FunctionType(
            old.__code__.replace(), old.__globals__, "forward", old.__defaults__, old.__closure__
        )
        forward.__kwdefaults__ = old.__kwdefaults__
        self.model.__class__ = type(kind.__name__, (kind,), dict(forward=forward))

    # step by step

    def begin(self):
        """Draw weights (products of zeros take less power and time), empty the optimizer."""
        self.model.init_weights(self.c.seed)
        self.trainer.optimizer.reset()

    def passes(self, stage):
        """Micro-batches of a step on each rank."""
        return math.ceil(stage.rows / (self.trainer.micro_rows[stage] * self.world.size))

    def batches(self, stages):
        """This rank's micro-batches for each of these stages, one after the other."""
        for step, stage in enumerate(stages, start=1):
            rows = self.trainer.micro_rows[stage]
            loader = self.data.train
            yield list(loader.micro_batches(step, self.world.rank, self.world.size, rows))

    def enter(self, step):
        """Make ready for the stage of this step of the track; what `step` wants back."""
        self.trainer.guard.reset()
        return self.trainer.enter(step)

    def step(self, batch, number, entered):
        """Forward, backward, guard, update; number: 1 for the first step after enter().

        Raises InputError for a step that does not count.
        """
        stage, progress = entered
        self.trainer.step(batch, number, stage, progress)
        for report in self.trainer.guard.reports(number):
            if report.complaint:
                raise InputError(
                    f"{report.complaint}: expected steps that count; lower --muon-lr and --adam-lr"
                )

    def flops(self, stage):
        """Of a token."""
        return self.trainer.flops_per_token[stage]

    def name_parts(self, prefix):
        """Have the profiler name forward, guard and optimizer, from now on."""
        trainer = self.trainer
        trainer.forward = named(f"{prefix}forward", trainer.forward)
        trainer.guard.judge = named(f"{prefix}guard", trainer.guard.judge)
        trainer.optimizer.step = named(f"{prefix}optimizer", trainer.optimizer.step)


def named(name, function):
    """The function, as a range of that name in a profiler's trace."""

    def call(*args, **kwargs):
        with record_function(name):
            return function(*args, **kwargs)

    return call


# --- a start of the trainer, phase by phase


def phases(graphs):
    """[(owner, attribute, phase)]: the functions that a start of the trainer spends its time in.

    phase: a name, or a function of the arguments that makes one. graphs: whether a call is one
    that compiles, since what compiles before training steps in it.
    """

    def during(what):
        return lambda *args: what(*args) if graphs() else "first step"

    def graph(trainer, batch, step, stage, progress):
        targets = f", {stage.n_targets} targets" if stage.n_targets > 1 else ""
        tied = ", tied" if stage.tied else ""
        return f"graph of {stage.rows * trainer.c.row_len:,} tokens{targets}{tied}"

    return [
        (tg, "parse_args", "arguments"),
        (tg, "load_data", "data"),
        (tg, "choose_ops", "kernels"),
        (tg.Trainer, "__init__", "model"),
        (tg.GPT, "init_weights", "model"),
        (tg.Optimizer, "reset", "model"),
        (tg, "describe_environment", "probe"),
        (tg, "machine_probe", "probe"),
        (tg.Trainer, "describe", "log"),
        (tg.Trainer, "run", "first step"),
        (tg.Trainer, "accumulate", during(graph)),
        (tg.Optimizer, "step", during(lambda *_: "graph of the optimizer")),
        (tg, "evaluate", "graph of validation"),
    ]


TRAINING = (tg.Trainer, "run")  # training begins when it is called
STEP_ENDS = (tg.Optimizer, "step")  # a step is over when it returns


def use_data(opener):
    """Have this process's trainer open its corpus with opener, in place of data.open_dataset."""
    from runtime import corpus

    corpus.open_dataset = opener


def main(argv):
    return tg.main(argv)
