"""What a validation measures: every metric of the project, each declared once, here.

From METRICS follow --target-metric, the lines of log.txt and metrics.jsonl, result.json, and what
the commands of records read, check, compare and draw. To add a metric, write a function of an
Evaluation and give it a line in METRICS.

Whether lower or higher is better is said there as well, and asked for by meets() and better().
"""

import math
from collections.abc import Callable
from typing import NamedTuple

TRAIN_LOSS = "train_loss"  # of a training step, in nats per token
VAL_LOSS = "val_loss"  # the metric that every validation has; the field's step lines begin with it


class Evaluation(NamedTuple):
    """What a pass over the validation split counts."""

    nats: float  # the cross-entropies of all targets, summed
    targets: int
    n_bytes: int | None  # of UTF-8 in the text of the targets; None where that is not known
    # Of pairs of answers, which are the targets then: how many are the right way round, rewards of
    # the chosen ones and of the rejected ones, summed
    pairs: tuple | None = None
    # Of questions, which are the targets then: rewards of the answers, those that were cut, and
    # tokens of all, summed
    answers: tuple | None = None


class Metric(NamedTuple):
    unit: str  # stands behind numbers and on axes
    compute: Callable  # Evaluation -> float, or None where the evaluation lacks what it needs
    format: str  # of its values in log.txt
    lower_is_better: bool = True
    of: str = "text"  # or pairs, or answers


def nats_per_token(e):
    """Of answers, what they lack of a reward of 1."""
    return e.nats / e.targets


def bits_per_byte(e):
    return e.nats / math.log(2) / e.n_bytes if e.n_bytes else None


def of_pairs(compute):
    """The same function of the means of Evaluation.pairs; None for text."""
    return lambda e: compute(*(x / e.targets for x in e.pairs)) if e.pairs else None


def of_answers(compute):
    """The same of Evaluation.answers; None for text."""
    return lambda e: compute(*(x / e.targets for x in e.answers)) if e.answers else None


METRICS = {
    VAL_LOSS: Metric("nats per token", nats_per_token, ".4f"),
    "val_bpb": Metric("bits per byte", bits_per_byte, ".4f"),
    "val_accuracy": Metric("of pairs", of_pairs(lambda right, c, r: right), ".3f", False, "pairs"),
    "val_margin": Metric("reward", of_pairs(lambda right, c, r: c - r), ".4f", False, "pairs"),
    "val_chosen": Metric("reward", of_pairs(lambda right, c, r: c), ".4f", False, "pairs"),
    "val_rejected": Metric("reward", of_pairs(lambda right, c, r: r), ".4f", True, "pairs"),
    "val_reward": Metric("reward", of_answers(lambda r, c, n: r), ".3f", False, "answers"),
    "val_cut": Metric("of answers", of_answers(lambda r, c, n: c), ".3f", True, "answers"),
    "val_answer_tokens": Metric("tokens", of_answers(lambda r, c, n: n), ".1f", True, "answers"),
}


def measure(evaluation):
    """{name: value} of every metric of text, and of pairs or answers where it is one of those;
    None for those that this evaluation cannot tell."""
    kinds = {"text"}
    if evaluation.pairs:
        kinds.add("pairs")
    if evaluation.answers:
        kinds.add("answers")
    metrics = {name: m for name, m in METRICS.items() if m.of in kinds}
    return {name: metric.compute(evaluation) for name, metric in metrics.items()}


def needs_bytes(name):
    """Whether a metric needs the bytes of the text, which not every tokenizer knows."""
    return METRICS[name].compute(Evaluation(1.0, 1, None)) is None


def lower_is_better(name):
    """Of a metric by name; logs may have one that is not known here, which is taken for a loss."""
    return METRICS[name].lower_is_better if name in METRICS else True


def meets(value, target, name=VAL_LOSS):
    """Whether a value of a metric meets its target."""
    return value <= target if lower_is_better(name) else value >= target


def better(value, best, name=VAL_LOSS):
    """Whether a value improves on the best one so far, which is None before the first."""
    if best is None:
        return True
    return value < best if lower_is_better(name) else value > best


def unit(name):
    """Of a metric by name: the unit, or the name itself where logs have a metric not known here."""
    return METRICS[name].unit if name in METRICS else name
