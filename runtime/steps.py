"""What a loop asks of a Setup: a run's beginning, the batches and passes of its steps, the weights
after one."""

import torch

from data import Prefetcher

from . import machine, saved, warm_start
from .preferences import give_reference


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


def weights_after(setup, step):
    """{name: CPU tensor} as they are to be kept after a step: not those of its stage."""
    weights = saved.weights_of(setup.model)
    heirs = setup.model.successors(setup.stages[step].model, None)
    return weights | {name: weights[source].clone() for name, source in heirs.items()}


def n_tokens(config, stage):
    """Of a step's batch, over all ranks."""
    return stage.rows * config.data.row_len


def first_steps(stages):
    """{stage: the step it begins with}"""
    found = {}
    for step, stage in stages.items():
        found.setdefault(stage, step)
    return found


def val_stage(setup, step):
    """The template's stage for validation after a step."""
    config = setup.config
    return config.model.val_stage(setup.stages[step].model, config.data.val_row_len)


def is_compiled(setup):
    return setup.forward is not setup.eager
