"""What is measured: all that benchmarks know of the trainer, in one place.

A configuration is a Settings here, read by the names of options. A stage of the schedule has rows
and .model, which has windows, max_doc_len, n_targets, tied and n_sampled. Steps are numbered from
1.
"""

import dataclasses
import os
import types
from pathlib import Path

import torch
from torch.profiler import record_function

import train_gpt as tg
from base import InputError
from base.clock import Parts
from benchmarks.breakdown import MARK
from models import load_template
from optim import TouchedRows
from records.source import pack_source
from runtime import corpus
from runtime.collectives import parameters_of
from runtime.launch import join_world
from runtime.machine import World, keep_freed_memory
from runtime.options import flat
from runtime.signals import Requests
from runtime.steps import is_compiled
from runtime.warming_up import warm_up

ROOT = Path(tg.__file__).resolve().parent
BY_STAGE = ("max_doc_len", "short_window", "long_window", "stage_lr", "mtp", "sampled_softmax")


# --- configurations and their schedules


class Settings:
    """A trainer's configuration; every option is an attribute, whatever part has it."""

    def __init__(self, config):
        self.config = config
        self.fields = flat(config)

    def __getattr__(self, name):
        if name == "fields" or name not in self.fields:
            raise AttributeError(name)
        return self.fields[name]

    def __eq__(self, other):
        return self.config == other.config


def parse(options):
    """The Settings that ./run.sh makes of these options. Raises InputError."""
    return Settings(tg.parse_args([str(option) for option in options]))


def configure(**fields):
    """The Settings of some options; the others have their defaults. Raises InputError."""
    return Settings(tg.configure(**fields))


def change(c, **fields):
    """The Settings with other values of these options. Raises InputError."""
    return Settings(tg.changed(c.config, **fields))


def help_of(option):
    """What --help says of an option of the trainer."""
    for part in dataclasses.fields(tg.configure()):
        for f in dataclasses.fields(getattr(tg.configure(), part.name)):
            if f.name == option:
                return f.metadata["help"]
    raise KeyError(option)


def schedule(c):
    """The stage of every step."""
    return [tg.stage_at(c.config, step) for step in range(1, c.steps + 1)]


def at_end(c, batch_tokens):
    """The Settings that all the time do what c does at its end, in such batches."""
    last = schedule(c)[-1]
    fields = {name: getattr(c, name)[-1:] for name in BY_STAGE}
    fields |= dict(batch_tokens=batch_tokens, steps=len(batch_tokens), extension=0)
    return change(c, tied=float(last.model.tied), **fields)


# --- what the parameters are, without weights


def parameters(c, n_vocab):
    """[Parameter, ...] of the model in bf16, in the order in which the optimizer takes them."""
    max_len = max(c.row_len, c.val_row_len)
    template = load_template(c.template)
    with torch.device("meta"):
        model = template.Model(c.config.model, n_vocab, max_len, torch.bfloat16, None)
    return parameters_of(model, model.update_rules(c.config.optim))


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
    if torch.cuda.is_available():
        return World(device=torch.device("cuda", 0))
    return World()


def open_data(c, world=None, stages=None, opener=None):
    """The corpus with its loaders.

    stages: of every batch, where they are not the schedule's; opener: what opens the corpus, in
    place of data.open_dataset.
    """

    def stage_of(step):
        return stages[step - 1] if stages else tg.stage_at(c.config, step)

    return corpus.load_data(c.config, stage_of, world or World(), opener)


def source_hash():
    """SHA-256 of all source that decides a run's numbers."""
    return pack_source(ROOT).digest


# --- a trainer


class Subject:
    """A trainer for one configuration, built once; for whole runs, or step by step."""

    def __init__(self, c, world, log, data=None):
        """log: Log, or anything with say(); data: of open_data(), opened here if not given."""
        if world.device.type == "cpu":
            keep_freed_memory()
        self.c = c
        self.world = world
        self.setup = tg.set_up(
            c.config, tg.stages_of(c.config), world, data or open_data(c, world), log
        )
        self.model = self.setup.model
        self.params = sum(p.numel() for p in self.model.parameters())
        self.compiled = is_compiled(self.setup)
        self.environment = self.setup.environment
        self.peak = self.setup.peak  # FLOP/s of all ranks
        self.at = 1  # the step of the schedule that is taken again and again

    def warm_up(self, log):
        """Compile what is compiled."""
        if self.compiled:
            log.say("compiling ...")
            warm_up(self.setup)

    # whole runs

    def run(self, log, seed=None, checkpoints=None, every="off"):
        """Train from a seed to the last step; returns the result as a dict.

        checkpoints: Checkpoints to write to, one every so many steps, or such a time.
        """
        seed = self.c.seed if seed is None else seed
        self.setup.config = change(self.c, seed=seed, checkpoint_every=every).config
        return tg.run_once(self.setup, log, Requests(), checkpoints, None, Parts())

    def shared_choices(self):
        """dict(rows of a micro-batch, at most, recompute) as fitted to the memory."""
        rows = max(self.setup.micro_rows.values())
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
        """Draw weights (products of zeros take less power and time), empty the optimizer; from now
        on a profiler sees forward passes by name."""
        self.model.init_weights(self.c.seed)
        self.setup.optimizer.reset()
        self.touched = TouchedRows(self.setup.optimizer, self.model)
        self.taken = 0  # steps
        forward = self.setup.forward

        def named(*args, **more):
            with record_function(f"{MARK}forward"):
                return forward(*args, **more)

        self.setup.forward = named

    def passes(self, stage):
        """Micro-batches of a step on each rank."""
        rows = self.setup.micro_rows[stage] * self.world.size
        return -(-stage.rows // rows)

    def batches(self, stages):
        """This rank's micro-batches for each of these stages, one after the other."""
        loader = self.setup.data.train
        for step, stage in enumerate(stages, start=1):
            yield self.touched.batch(loader, step, self.setup.micro_rows[stage])

    def enter(self, step):
        """Make ready for the stage of this step of the schedule."""
        setup = self.setup
        self.at = step
        before = setup.stages[max(step - 1, 1)].model
        self.model.enter(self.c.config.schedule.progress(step))
        if setup.stages[step].model != before:
            successors = self.model.successors(before, setup.stages[step].model)
            setup.optimizer.copy(successors)
        setup.guard.reset()

    def step(self, batch, number):
        """Forward, backward, guard, update, as in training; number: 1 after enter().

        Raises InputError for a step that does not count.
        """
        setup = self.setup
        loss = tg.backward(setup, self.at, batch)
        momentum = tg.momentum_at(self.c.config, self.at)
        with record_function(f"{MARK}optimizer"):  # which begins with sums over ranks
            self.taken += 1
            gradients = setup.optimizer.gradients(momentum, self.touched.rows(self.taken))
        with record_function(f"{MARK}guard"):
            ok = setup.guard.judge(number, loss, gradients)
        with record_function(f"{MARK}optimizer"):
            lr = tg.lr_at(self.c.config, self.at)
            setup.optimizer.step(lr, momentum, ok)
        self.model.after_step()
        for report in setup.guard.reports(number):
            if report.complaint:
                raise InputError(
                    f"{report.complaint}: expected steps that count; lower --muon-lr and --adam-lr"
                )

    def flops(self, stage):
        """Of a token."""
        return self.model.flops_per_token(stage.model)

    def mean_flops(self):
        """Of a token, over the whole schedule."""
        stages = schedule(self.c)
        total = sum(stage.rows * self.flops(stage) for stage in stages)
        return total / sum(stage.rows for stage in stages)
