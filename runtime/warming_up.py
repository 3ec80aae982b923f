"""A Setup before its first step: compiled on batches of padding, its passes timed."""

import dataclasses
import functools

import torch

from base import InputError, RankError, last_resort
from optim import TouchedRows

from . import machine
from .environment import best_seconds
from .setting_up import set_up
from .steps import backward, first_steps, is_compiled, val_stage


def make_ready(setup, log, parts):
    """Compile a Setup, if that is on, and time its passes; parts: Parts of the process. Returns the
    Setup to train with."""
    if is_compiled(setup):
        log.say("compiling ... (minutes the first time, seconds from then on)")
        with parts.part("compile_s"):
            setup = warm_up_or_go_without(setup, log)
    time_passes(setup)
    return setup


def warm_up(setup):
    """Compile everything on batches of padding, whose loss and gradients are zero."""
    config = setup.config
    # A stage may have a graph for validation, an update one for each size
    limit = 2 * len(setup.micro_rows) + 16
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    turns = max(rule.every for rule in setup.optimizer.rules.values())
    touched = TouchedRows(setup.optimizer, setup.model)
    for step, padding in padding_by_stage(setup):
        for _ in range(turns):  # the guard judges other gradients where some wait for their turn
            loss = backward(setup, step, [padding])  # compiles forward and backward
            # With rows of tables exchanged as in training, for which ranks connect
            rows = touched.note([[padding]] * setup.world.local_size)
            ok = setup.guard.judge(0, loss, setup.optimizer.gradients(0.0, rows))
            setup.optimizer.step(0.0, 0.0, ok)  # at learning rate 0

    # One validation for each of its graphs
    graphs = {}
    for step in setup.stages:
        if step % config.run.eval_every == 0 or step == config.schedule.steps:
            graphs[val_stage(setup, step)] = setup.val._replace(batches=setup.val.batches[:1])
    for stage, split in graphs.items():
        setup.measure(setup.forward, stage, split, setup.world)


def padding_by_stage(setup):
    """[(a step, a micro-batch of padding), ...] for every stage."""
    first_step = first_steps(setup.stages)
    found = []
    for stage in sorted(setup.micro_rows):
        step = first_step[stage]
        found.append((step, setup.data.train.padding(step, setup.micro_rows[stage])))
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
        if setup.world.device.type == "cuda" and setup.config.goal.target is not None:
            raise InputError(f"{why}; --no-compile trains without it, which is slower") from None
        report = last_resort.write_report(e, log.folder)
        log.say(f"running without torch.compile, which is slower: {why}; the report is in {report}")
    run = dataclasses.replace(setup.config.run, compile=False)
    config = dataclasses.replace(setup.config, run=run)
    without = set_up(config, setup.stages, setup.world, setup.data, log)
    without.config = setup.config  # what was asked for
    return without


def time_passes(setup):
    """Measure how long each stage's forward and backward passes take, for the time that is left."""
    if len(setup.micro_rows) == 1:
        return  # the first steps show it
    for step, padding in padding_by_stage(setup):
        stage = setup.stages[step]
        passes = -(-stage.rows // (setup.micro_rows[stage] * setup.world.size))
        work = functools.partial(backward, setup, step, [padding])
        setup.pass_seconds[stage] = passes * best_seconds(setup.world.device, work, 3, budget=0.1)
