"""A configuration made ready on a machine: model, optimizer, guard, batches; compiled if that pays.

What a program's loop asks of it is in steps.py. Stages are the program's: each has `rows`, of the
global batch, and `model`, the template's own stage.
"""

import dataclasses
import functools
import typing

import torch

from base import InputError, to_json
from base.places import cache_folder
from kernels import choose_ops
from kernels.attention import Shape
from kernels.fused import Fused
from models import load_template
from optim import Optimizer, gradient_report, rules_of

from . import compiling, machine, memory
from .environment import describe_environment, machine_probe
from .evaluation import Split, evaluate, part_of
from .guard import Guard
from .machine import World
from .policy import PolicyLoss
from .preferences import PairLoss, evaluate_pairs
from .steps import first_steps, n_tokens


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
        loops = machine.first_rank_first(world, lambda: Fused.build(cache_folder(), log.say))
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
