"""A configuration made ready on a machine: model, optimizer, guard, batches; compiled if that pays.

A program's loop asks it for the forward and backward passes of a step. Stages are the program's:
each has `rows`, of the global batch, and `model`, the template's own stage.
"""

import dataclasses
import functools
import typing

import torch

from base import InputError, RankError, last_resort, to_json
from base.places import cache_folder
from data import Prefetcher
from kernels import choose_ops, fused
from kernels.attention import Shape
from models import load_template
from optim import Optimizer, TouchedRows, gradient_report, rules_of

from . import compiling, machine, memory, saved, warm_start
from .environment import best_seconds, describe_environment, machine_probe
from .evaluation import Split, evaluate, part_of
from .guard import Guard
from .machine import World
from .policy import PolicyLoss
from .preferences import PairLoss, evaluate_pairs, give_reference


@dataclasses.dataclass
class Setup:
    """A configuration on a machine, ready to train from any seed."""

    config: typing.Any  # of a program: in parts, as train_gpt.py's
    world: World
    data: typing.Any  # loaders and the data set
    model: torch.nn.Module
    eager: typing.Callable  # the loss of a batch: the model, or a PairLoss or PolicyLoss of it
    forward: typing.Callable  # the same, compiled where that is on
    measure: typing.Callable  # evaluate() or evaluate_pairs()
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
    expected_bpb: float | None = None  # bits per byte at the end, where that can be told


def set_up(config, stages, world, data, log):
    """A Setup, its weights not yet drawn. stages: step -> Stage. Raises InputError."""
    device = world.device
    dtype = machine.choose_dtype(config.precision.dtype, device)  # of weights and activations
    template = load_template(config.goal.template)
    ops = choose_kernels(config, stages, world, data, dtype, log)

    # The model, and how much goes through it at a time: that depends on the memory found
    max_len = max(config.data.row_len, config.data.val_row_len)  # of rotary tables
    n_vocab = data.dataset.n_vocab
    build = functools.partial(template.Model, config.model, n_vocab, max_len, dtype, ops)
    most, recompute, estimate = memory.fit(build, config, world)  # most: rows in a forward pass
    with device:
        model = build()  # weights are drawn when a run begins
    model.recompute = recompute
    if hasattr(model, "learn_tokens"):
        machine.first_rank_first(world, lambda: model.learn_tokens(data.dataset))

    # Passes of equal size, by stage; validation goes by about as many tokens
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
    compiled = compiling.choose(
        config.run.compile, world, log.say, for_record=config.goal.target is not None
    )
    skips = config.guard.max_skips > 0  # whether bad steps may pass
    rules = rules_of(model, config.optim)
    optimizer = Optimizer(model, rules, world, compiled, skips, config.optim.clip, ops.fused)
    if hasattr(model, "grad_rooms"):
        model.grad_rooms = optimizer.padding_rows()

    # On a CPU, compiling the gradients' report would take longer than it does
    report = gradient_report
    if compiled and device.type == "cuda":
        report = torch.compile(report, dynamic=False)
    guard = Guard(device, report, strict=not skips, spike_sigmas=config.guard.spike_sigmas)

    eager, forward = choose_loss(config, model, compiled)
    measure = evaluate_pairs if config.teaching.preference != "none" else evaluate
    flops = sum(n_tokens(config, s) * model.flops_per_token(s.model) for s in stages.values())
    return Setup(
        config=config,
        world=world,
        data=data,
        model=model,
        eager=eager,
        forward=forward,
        measure=measure,
        optimizer=optimizer,
        guard=guard,
        stages=stages,
        micro_rows=micro_rows,
        pass_seconds={},
        expected_seconds=compiling.expected_training(flops / peak, device),
        val=val,
        quick_val=quick_val,
        environment=environment,
        peak=peak,
        memory=estimate,
    )


def choose_loss(config, model, compiled):
    """(the loss of a batch, the same compiled where that is on): the model's own, or that of pairs
    or answers by its log probabilities."""
    if config.teaching.preference != "none":
        kind, options = PairLoss, config.teaching
    elif config.policy.reward:
        kind, options = PolicyLoss, config.policy
    elif compiled:
        return model, torch.compile(model, fullgraph=True, dynamic=False)
    else:
        return model, model
    eager = kind(model, options)
    return eager, kind(model, options, compiled) if compiled else eager


def choose_kernels(config, stages, world, data, dtype, log):
    """The Ops of kernels/choose.py, the same on all ranks. Raises InputError."""
    lost = []  # what works less well on this rank than it should

    def say(message):
        lost.append(message)
        log.say(message)

    head_dim = getattr(config.model, "head_dim", 64)
    shapes = ()
    if world.device.type == "cuda":  # elsewhere there is nothing to choose among
        shapes = attention_shapes(config, stages, world, data)
    loops = None
    if world.device.type == "cpu" and config.run.kernels == ("auto",):
        # Where run.sh has put it when it installed
        loops = machine.first_rank_first(world, lambda: fused.build(cache_folder(), log.say))
    try:
        ops = choose_ops(
            world.device,
            dtype,
            head_dim,
            config.run.kernels,
            config.precision.fp8,
            say,
            shapes,
            loops,
        )
    except ValueError as e:
        raise InputError(e) from None
    why = f"; {'; '.join(lost)}" if lost else ""
    machine.refuse_difference(world, "kernels", to_json(ops.named()), why)
    return ops


def attention_shapes(config, stages, world, data):
    """Shapes of the attention that training and validation ask for, those with the least and the
    widest windows."""
    attention = getattr(config.model, "attention", lambda stage: [(1, stage.max_doc_len)])

    def shapes(stage, cu_seqlens, row_len):
        return [
            Shape(n * row_len, len(cu_seqlens) - 1, n * stage.max_doc_len, n * window)
            for n, window in attention(stage)
        ]

    training = []
    for stage, step in first_steps(stages).items():
        padding = data.train.padding(step, -(-stage.rows // world.size))
        training += shapes(stage.model, padding.cu_seqlens, config.data.row_len)
    last = config.model.val_stage(stages[max(stages)].model, config.data.val_row_len)
    micro = next(iter(data.val.micro_batches(world.rank, world.size, 1)))
    validation = shapes(last, micro.cu_seqlens, config.data.val_row_len)
    found = []
    for some in training, validation:
        by_window = sorted(some, key=lambda shape: (shape.window, shape.places))
        found += [by_window[0], by_window[-1]]
    return found


def first_steps(stages):
    """{stage: the step it begins with}"""
    found = {}
    for step, stage in stages.items():
        found.setdefault(stage, step)
    return found


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


def n_tokens(config, stage):
    """Of a step's batch, over all ranks."""
    return stage.rows * config.data.row_len


def batches_ahead(setup, touched, first):
    """A Prefetcher of this rank's micro-batches of the steps from `first` on, to be closed.

    touched: TouchedRows, which see them first.
    """

    def of_steps():
        for step in range(first, setup.config.schedule.steps + 1):
            rows = setup.micro_rows[setup.stages[step]]
            yield touched.batch(setup.data.train, step, rows)

    return Prefetcher(of_steps(), setup.world.device)


def backward(setup, step, batch):
    """Forward and backward over this rank's micro-batches of a step.

    Returns this rank's share of the mean loss, 0-d, on the device.
    """
    config = setup.config
    device = setup.world.device
    stage = setup.stages[step]
    n_targets = setup.data.train.n_targets(step, n_tokens(config, stage))
    weights = config.model.target_weights(config.schedule.progress(step))
    if weights is not None:
        weights = machine.to_device(weights, device)
    total = torch.zeros((), device=device)
    if hasattr(setup.model, "before_step"):
        setup.model.before_step()
    # Gradients of the mean over the step's targets, or as much larger as its batch is than that of
    # the first step
    growth = 1.0
    if config.schedule.grow_gradients:
        growth = n_tokens(config, stage) / n_tokens(config, setup.stages[1])
    for micro in batch:
        tensors = (t.to(device) for t in micro)
        loss = setup.forward(*tensors, stage=stage.model, target_weights=weights) / n_targets
        (growth * loss).backward()  # adds to .grad
        total += loss.detach()
    return total


def begin_run(setup, log, begins):
    """Everything as it is before the first step from the configuration's seed.

    begins: no checkpoint is there, whose weights and moments come in place of these.
    """
    config = setup.config
    setup.data.train.reseed(config.goal.seed)  # the order of documents
    setup.guard.reset()  # no bad step yet
    setup.model.reset_state()
    if begins:
        setup.model.init_weights(config.goal.seed)
        refuse_other_weights(setup)
        if config.run.warm_start:
            warm_start.copy_weights(config.run.warm_start, setup.model)
    saved.keep_tables(setup.model, log, config.run.warm_start, begins)
    give_reference(setup, val_stage(setup, 1), log.folder, begins)
    setup.optimizer.reset()  # moments at zero


def refuse_other_weights(setup):
    """Raise InputError where ranks have drawn other initial weights, as GPUs of two kinds might."""
    world = setup.world
    if world.size > 1 and world.device.type == "cuda":
        sums = [p.detach().float().sum() for p in setup.model.parameters()]
        text = f"{torch.stack(sums).double().sum().item():.12g} in all"
        machine.refuse_difference(world, "initial weights", text, "; give it GPUs of one kind")


def is_compiled(setup):
    return setup.forward is not setup.eager


def val_stage(setup, step):
    """The template's stage for validation after a step."""
    config = setup.config
    return config.model.val_stage(setup.stages[step].model, config.data.val_row_len)


def weights_after(setup, step):
    """{name: CPU tensor} as they are to be kept after a step: not those of its stage."""
    weights = saved.weights_of(setup.model)
    heirs = setup.model.successors(setup.stages[step].model, None)
    return weights | {name: weights[source].clone() for name, source in heirs.items()}
