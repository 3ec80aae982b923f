"""What is about to run: all of it into the log, the gist on the screen."""

import functools
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from base import InputError, to_json
from base.places import elsewhere
from records.source import pack_source

from .machine import mention_unused
from .options import flat

ROOT = Path(__file__).resolve().parent.parent


def command_line(argv):
    """What a shell starts this run with; None where it is not a command that was typed."""
    if Path(argv[0]).name not in ("door.py", "train_gpt.py"):
        return None
    return shlex.join(["./run.sh", *argv[1:]])


@functools.cache
def packed():
    """The Source of this run, as a future: packed beside data and model from the first call on."""
    return ThreadPoolExecutor(1).submit(pack_source, ROOT)


def announce(log, setup):
    """log: Log; setup: a trainer's Setup."""
    config = setup.config
    data = setup.data
    environment = setup.environment
    log.header(
        packed().result() if log.active else None,
        beside=about_data(data.dataset) if log.active else None,
        environment=environment,
        config=flat(config),
        data=data.dataset.fingerprint,
        n_vocab=data.dataset.n_vocab,
        command=command_line(sys.argv),
    )

    goal = config.goal
    kernels = environment["kernels"]
    by = {how: [name for name in kernels if kernels[name] == how] for how in ("triton", "c")}
    loops = f"Triton for {', '.join(by['triton']) or 'nothing'}"
    if by["c"]:
        loops = f"C for {', '.join(by['c'])}"
    params = sum(p.numel() for p in setup.model.parameters())
    log.say(
        f"{goal.track}: {params / 1e6:.1f}M parameters, {environment['dtype']}, attention "
        f"{kernels['attention']}, {loops}, "
        f"{environment['world_size']} x {environment['device']}, {setup.peak / 1e12:.2f} TFLOP/s "
        "in matrix products"
    )
    mention_unused(setup.world.device, log.say)
    if line := elsewhere():
        log.say(line)
    recomputed = ", blocks recomputed" if setup.model.recompute else ""
    log.say(f"memory by estimate: {setup.memory}{recomputed}")
    for line in data.dataset.notes:
        log.say(line)
    log.say(plan(setup))
    until = "to the last step"
    if goal.target is not None:
        until = f"until {goal.target_metric} reaches {goal.target}"
    log.say(
        f"training on {data.dataset.name} {until}, at most {config.schedule.steps} steps, seed "
        f"{goal.seed}; log in {log.folder}"
    )
    if data.val_bytes is None and data.dataset.rows == "text":
        log.say(
            "no bits per byte and no sample: these tokens have no text, or their vocabulary is out "
            "of reach"
        )


def plan(setup):
    """What the whole training takes, in a line."""
    if setup.data.dataset.rows == "questions":
        policy = setup.config.policy
        return (
            f"plan: {setup.config.schedule.steps} steps, each from {policy.answers} answers to "
            f"{policy.questions} questions, judged by {policy.reward}"
        )
    there = setup.data.train.n_tokens
    tokens = sum(stage.rows for stage in setup.stages.values()) * setup.config.data.row_len
    seconds = setup.expected_seconds
    time = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"
    loss = setup.expected_bpb
    until = f", to about {loss:.2f} bits per byte" if loss else ""
    most = setup.config.schedule.max_epochs
    if setup.config.run.time and most and tokens > 0.9 * most * there:
        until += f"; a text is read {most:g} times at most, whatever the time (--max-epochs)"
    return (
        f"plan: {setup.config.schedule.steps} steps of training on {tokens:,} tokens, "
        f"{tokens / there:.1f} times the {there:,} there are; about {time}{until}"
    )


def about_data(dataset):
    """{name: content} of what a run's folder holds of its Dataset, so that it can be read where
    the prepared data is gone: data.json, and tokenizer.json if there is a text."""
    files = {"data.json": to_json(dataset.manifest(), indent=1).encode()}
    try:
        files["tokenizer.json"] = dataset.tokenizer.to_json().encode()
    except InputError:
        pass  # no text, or its vocabulary is out of reach
    return files
