"""A training run as its logs tell it, whoever wrote them: what read.py gives and all commands
take."""

import bisect
import dataclasses
import functools
import math
from typing import NamedTuple

from base.options import progress_of, stage_number

from .metrics import VAL_LOSS, meets

# Fields of the configuration that are not the recipe: where a run is kept, how it is kept alive,
# how its work is divided
APART = (
    "seed",
    "run_dir",
    "cache_dir",
    "text",
    "gpus",
    "repeat",
    "micro_tokens",
    "recompute",
    "sample_tokens",
    "sample_every",
    "sample_prompts",
    "resume",
    "extend",
    "vocabulary",
    "checkpoint_every",
    "keep_last",
    "keep_best",
    "max_restarts",
)


class Point(NamedTuple):
    """One measurement, of a validation or of a training step."""

    step: int  # optimizer steps done
    tokens: int | None  # seen in training so far; None if the log does not tell
    seconds: float | None  # of the training clock; None where the log has none
    # Of a validation in the run's metric, of a training step in nats per token; None where the
    # line has only a time
    loss: float | None


@dataclasses.dataclass
class Run:
    """One training run. What its log does not tell is None, or empty."""

    path: str  # the log, or the folder of the run, as given
    dialect: str  # stopwatch, modded-nanogpt, llm.c, nanoGPT or nanochat
    line: int = 1  # where in the log the run begins: a file may hold several
    name: str = ""  # of the run's folder or file
    track: str | None = None
    seed: int | None = None
    metric: str = VAL_LOSS  # what the losses of val are, by its name in metrics.py
    target: float | None = None
    steps: int = 0  # optimizer steps done
    total_steps: int | None = None  # optimizer steps planned
    # Whether it came to its last step or its target; None: the log does not say where it would end
    finished: bool | None = False
    time_s: float | None = None  # training clock at the last validation
    final_loss: float | None = None  # of the last validation
    tokens: int | None = None  # seen in training
    hardware: str | None = None  # product name of one device
    world_size: int | None = None
    data: str | None = None  # fingerprint
    # This machine's measured rates: {"matmul": {dtype: FLOP/s}, "copy": bytes/s}, of one device
    probe: dict | None = None

    # Of our runs alone
    sources: list = dataclasses.field(default_factory=list)  # [name of the archive, digest] each
    resumed_at: list = dataclasses.field(default_factory=list)  # steps of the checkpoints
    config: dict = dataclasses.field(default_factory=dict)
    environment: dict = dataclasses.field(default_factory=dict)

    val: list[Point] = dataclasses.field(default_factory=list)
    train: list[Point] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)  # to know before believing a number

    @property
    def where(self):
        """path, or path:line where the run is not at the top of its file."""
        return self.path if self.line == 1 else f"{self.path}:{self.line}"

    @property
    def stopped_early(self):
        """Whether it ended at a validation before its last planned step: ours do when the target
        is met."""
        if not self.total_steps or not 0 < self.steps < self.total_steps:
            return False
        if self.dialect == "stopwatch":
            return bool(self.finished)
        return bool(self.val) and self.val[-1].step == self.steps

    @property
    def usable(self):
        """Whether its last loss is that of its end. A log that does not say where its run would end
        has to be believed."""
        if self.final_loss is None:
            return False
        return self.finished is not False or self.stopped_early

    @property
    def ending(self):
        """What kept it from being usable, in words."""
        if self.final_loss is None:
            return f"{self.where} has no validation"
        return f"{self.where} did not end (last step {self.steps} of {self.total_steps})"

    @property
    def matmul_rate(self):
        """Measured FLOP/s of all its devices in matrix products, in the run's dtype; None if it
        was not measured."""
        rates = (self.probe or {}).get("matmul")
        if not isinstance(rates, dict):
            return None
        rate = rates.get(text(self.environment.get("dtype")) or "bfloat16")
        if number(rate) is None or not rate > 0:
            return None
        return rate * (self.world_size or 1)

    def time_to(self, loss):
        """Training seconds until the validation loss was first at or below `loss`, by straight
        lines between validations; None if it never was, or the log has no clock there."""
        before = None
        for point in self.val:
            if not meets(point.loss, loss, self.metric):
                before = point
                continue

            # Here it is met. Where exactly between this validation and the one before?
            if point.seconds is None or point.loss == loss or before is None:
                return point.seconds
            if before.seconds is None:
                return None
            share = 1.0
            if math.isfinite(before.loss):
                share = (before.loss - loss) / (before.loss - point.loss)
            return before.seconds + share * (point.seconds - before.seconds)
        return None


# --------------------------------------------------------------------------------------------------
# What JSON says, if it is what was expected


def number(value):
    """A JSON number as float, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def whole(value):
    """A JSON integer that can be a count, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value < 10**15 else None


def text(value):
    """A string that is not empty, None for anything else."""
    return value if isinstance(value, str) and value else None


def dictionary(value):
    """A JSON object, {} for anything else."""
    return value if isinstance(value, dict) else {}


# --------------------------------------------------------------------------------------------------
# What follows from a configuration, and from the points


def describe(run, header):
    """Fill in what config.json, or the header of log.txt, says about a run of ours."""
    run.config = dictionary(header.get("config"))
    run.environment = dictionary(header.get("environment"))
    run.track = text(run.config.get("track"))
    run.seed = whole(run.config.get("seed"))
    run.target = number(run.config.get("target"))
    run.metric = text(run.config.get("target_metric")) or run.metric
    run.total_steps = whole(run.config.get("steps"))
    run.data = text(header.get("data"))
    run.hardware = text(run.environment.get("device"))
    run.world_size = whole(run.environment.get("world_size"))
    run.probe = dictionary(run.environment.get("probe")) or None


def tokens_at(run, step):
    """Tokens seen after `step` steps of a run of ours, from its batch_tokens by stage; None if
    they are not known."""
    batches = run.config.get("batch_tokens")
    if not run.total_steps or not isinstance(batches, list) or not all(map(whole, batches)):
        return None
    extension = whole(run.config.get("extension")) or 0
    try:
        earlier = tuple((int(a), int(n)) for a, n, *_ in run.config.get("earlier", ()))
    except (TypeError, ValueError):
        return None
    tokens = 0
    start = 0
    ends = stage_ends(run.total_steps, extension, len(batches), earlier)
    for batch, end in zip(batches, ends):
        tokens += batch * max(0, min(step, end) - start)
        start = end
    return tokens


@functools.lru_cache(maxsize=16)
def stage_ends(steps, extension, n_stages, earlier=()):
    """The last step of each stage of a run.

    Stages divide training equally, but for the last `extension` steps: those stay in the last
    stage. earlier: where steps were added, see progress_of. Rounding is the trainer's, which asks
    in every step how much of training was before it.
    """

    def stage(before):  # of the step that has so many before it
        return stage_number(range(n_stages), progress_of(before + 1, steps, extension, earlier))

    return [bisect.bisect_left(range(steps), n, key=stage) for n in range(1, n_stages + 1)]


def conclude(run):
    """Fill in what follows from the points: steps, time, final loss, tokens, and whether the run
    came to its end."""
    if run.val:
        last = run.val[-1]
        run.final_loss = last.loss
    elif run.train:
        last = run.train[-1]
        run.final_loss = None
    else:
        last = Point(0, None, None, None)
        run.final_loss = None
    run.time_s = last.seconds
    run.tokens = last.tokens
    run.steps = max([last.step, *(points[-1].step for points in (run.train, run.val) if points)])

    if run.total_steps is None:
        run.finished = None
        return
    # A run that was killed after a validation has training steps behind it
    at_end = last.step >= run.steps
    ended = run.steps >= run.total_steps
    if run.dialect == "stopwatch" and run.val and run.target is not None:
        ended = ended or meets(
            run.final_loss, run.target, run.metric
        )  # only ours stop at their target
    run.finished = at_end and ended
