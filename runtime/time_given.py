"""How long a run takes and how far it gets, by trying before it begins, and how many steps a time
or a text allows."""

import dataclasses
import time

from base import InputError
from base.options import seconds

from .environment import best_seconds
from .evaluation import part_of
from .machine import share
from .options import changed
from .steps import backward, first_steps, is_compiled, n_tokens, val_stage

TRIED = 4.0  # seconds of a step beyond which no step is tried
AFTERWARDS = 1.5  # seconds for samples and weights at the end
LOOKED_AT = 16384  # tokens of the validation split
TRAINED = 0.85  # of the bits per byte before the first step are left: 0.77 to 0.90 on four texts
SLOWER = 1.05  # steps of a run over those tried before: there are logs, and caches are cold


def expected_training(setup):
    """Seconds that all steps will take: by a few of them at learning rate 0, which change nothing
    since a run begins with new weights and moments; where trying takes long, or others have to
    wait, by their FLOPs (setup.expected_seconds)."""
    world = setup.world
    steps = len(setup.stages)
    quick = setup.expected_seconds / steps < TRIED
    if world.size > 1 or world.device.type != "cpu" or not quick:
        return setup.expected_seconds

    compiled = is_compiled(setup)  # then later: what is tried is not compiled yet
    plain = dataclasses.replace(setup, forward=setup.eager)
    taken = {}  # stage -> seconds of a step
    for stage, step in first_steps(setup.stages).items():
        setup.model.enter(setup.config.schedule.progress(step))
        batch = list(setup.data.train.micro_batches(step, micro_rows=setup.micro_rows[stage]))

        def try_step(step=step, batch=batch):
            loss = backward(plain, step, batch)
            ok = setup.guard.judge(0, loss, setup.optimizer.gradients(0.0))
            if compiled:
                setup.optimizer.reset()
            else:
                setup.optimizer.step(0.0, 0.0, ok)

        taken[stage] = least_seconds(try_step)
    return SLOWER * sum(taken[stage] for stage in setup.stages.values())


def least_seconds(work):
    """Seconds of the fastest of four calls, of fewer where they take a second."""
    seconds = []
    while len(seconds) < 4 and sum(seconds) < 1.0:
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def validation_seconds(setup):
    """Seconds of one validation of the whole split, by its first batch."""
    stage = val_stage(setup, setup.config.schedule.steps)
    one = setup.val._replace(batches=setup.val.batches[:1])

    def validate():
        setup.measure(setup.eager, stage, one, setup.world)

    return len(setup.val.batches) * best_seconds(setup.world.device, validate, 2)


def expected_bpb(setup):
    """Bits per byte that training may end at. Of models that count the training text, which says
    most of it before the first step; None for others, and where tokens have no bytes."""
    tables = getattr(setup.model, "tables", dict)()
    if not tables or setup.val.n_bytes is None:
        return None
    setup.model.init_weights(setup.config.goal.seed)
    setup.model.enter(setup.config.schedule.progress(1))
    part = part_of(setup.val, LOOKED_AT // setup.world.size, setup.data, setup.world)
    found = setup.measure(setup.eager, val_stage(setup, 1), part, setup.world)
    return TRAINED * found["val_bpb"]


def fit_to_time(setup, stages_of, elapsed):
    """The configuration with which the process takes --time in all, of which `elapsed` seconds are
    over: its steps, and how far validations are apart, of which there are as many as before.

    The Setup has it and its stages afterwards. stages_of: configuration -> {step: stage}. Raises
    InputError where not even a step fits.
    """
    schedule = setup.config.schedule
    run = setup.config.run
    n_validations = max(1, schedule.steps // run.eval_every)
    others = n_validations * validation_seconds(setup) + AFTERWARDS
    left = seconds(run.time) - elapsed - others
    steps = int(schedule.steps * left / expected_training(setup))
    steps = share(setup.world, steps)
    if steps < n_validations:
        raise InputError(
            f"--time {run.time}: {elapsed:.0f} s are over, and {n_validations} validations and "
            f"samples take {others:.0f} s more; give more time, or a smaller --track"
        )
    every = max(1, round(steps / n_validations))
    config = changed(setup.config, steps=steps, eval_every=every)
    config = within_epochs(config, stages_of(config), setup.data.train.n_tokens)
    setup.config = config
    setup.stages = stages_of(config)
    return config


def within_epochs(config, stages, there):
    """The configuration without the steps that --max-epochs leaves out, and with as many
    validations.

    stages: {step: stage}; there: tokens of the training text.
    """
    schedule = config.schedule
    if not schedule.max_epochs:
        return config
    left = schedule.max_epochs * there
    steps = 0
    while steps < schedule.steps and (left > 0 or not steps):
        steps += 1
        left -= n_tokens(config, stages[steps])
    if steps == schedule.steps:
        return config
    adam_every = config.optim.adam_every
    every = config.run.eval_every * steps / schedule.steps
    every = round(every / adam_every) * adam_every
    extension = min(schedule.extension, steps - 1)
    return changed(config, steps=steps, eval_every=max(adam_every, every), extension=extension)
