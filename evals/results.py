"""What an evaluation finds: numbers with their standard errors, compared between two runs.

A Measure keeps what each document or item contributed, so that two runs on the same items are
compared item by item: their difference is known better than either number.
"""

import math
from typing import NamedTuple

import numpy as np


class Measure(NamedTuple):
    """A ratio of two sums over items: nats over bytes, or right answers over answers."""

    task: str
    metric: str
    above: np.ndarray  # (n,) of each item
    below: np.ndarray  # (n,) the same
    lower_is_better: bool = False
    chance: float | None = None  # what guessing gives
    unit: str = "items"  # what n counts
    note: str = ""
    log: bool = False  # whether the number is e to the power of the ratio, as perplexity is
    items: tuple = ()  # what each item is called, where that is of interest
    error: float | None = None  # the standard error, where it is not that over items

    @property
    def value(self):
        ratio = self.above.sum() / self.below.sum()
        return float(np.exp(ratio) if self.log else ratio)

    @property
    def stderr(self):
        """Standard error of the value over items; None for fewer than two."""
        if self.error is not None:
            return self.error
        error = ratio_error(self.above, self.below)
        if error is not None and self.log:
            error *= self.value
        return error

    @property
    def centered(self):
        """The accuracy with chance at 0 and all right at 1, as DCLM has it."""
        if self.chance is None:
            return None
        return (self.value - self.chance) / (1 - self.chance)

    def as_row(self):
        """What JSON says of it."""
        row = dict(task=self.task, metric=self.metric, value=self.value, stderr=self.stderr)
        row |= dict(n=len(self.above), unit=self.unit)
        if self.chance is not None:
            row |= dict(chance=self.chance, centered=self.centered)
        if self.note:
            row["note"] = self.note
        return row


def accuracy(task, metric, right, chance, **more):
    """The Measure of answers that are right or wrong; right: (n,) bool."""
    right = np.asarray(right, dtype=float)
    return Measure(task, metric, right, np.ones_like(right), chance=chance, **more)


def ratio_error(above, below):
    """Standard error of sum(above) / sum(below) over n independent items, by linearising the ratio;
    None where n is below 2."""
    n = len(above)
    if n < 2:
        return None
    off = above - above.sum() / below.sum() * below
    return float(math.sqrt(n / (n - 1) * np.square(off).sum()) / below.sum())


def difference(one, other):
    """(one's value less the other's, its standard error or None).

    Item by item where both had the same items, else as of independent numbers.
    """
    change = one.value - other.value
    if len(one.below) == len(other.below) and np.array_equal(one.below, other.below):
        error = ratio_error(one.above - other.above, one.below)
        if error is not None and one.log:
            error *= one.value
        return change, error
    errors = [m.stderr for m in (one, other)]
    if None in errors:
        return change, None
    return change, math.hypot(*errors)


def verdict(one, other):
    """better, worse, or nothing where the difference is within two standard errors."""
    change, error = difference(one, other)
    if error is None or abs(change) <= 2 * error:
        return ""
    return "better" if (change < 0) == one.lower_is_better else "worse"


# --------------------------------------------------------------------------------------------------
# Tables


def table(measures):
    """Lines for a terminal."""
    head = ["task", "measure", "value", "±", "chance", "centered", "of"]
    rows = []
    for m in measures:
        of = f"{len(m.above):,} {m.unit}"
        rows.append(
            [m.task, m.metric, number(m.value), number(m.stderr)]
            + [number(m.chance), number(m.centered), of]
        )
    return aligned(head, rows)


def comparison(measures, others, names):
    """The same for two runs beside each other; others: in the same order."""
    head = ["task", "measure", *names, "difference", "±", ""]
    rows = []
    for one, other in zip(measures, others):
        change, error = difference(one, other)
        rows.append(
            [one.task, one.metric, number(one.value), number(other.value)]
            + [f"{change:+.4f}", number(error), verdict(one, other)]
        )
    return aligned(head, rows)


def changed_prompts(measures, others):
    """Lines that name each prompt which one run passes and the other does not."""
    lines = []
    for one, other in zip(measures, others):
        if one.task != "prompts" or one.items != other.items:
            continue
        for name, mine, theirs in zip(one.items, one.above, other.above):
            if mine != theirs:
                how = "gained" if mine else "lost"
                lines.append(f"{how}: {one.metric}: {name!r}")
    return lines


def number(value):
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def aligned(head, rows):
    """Columns of text: the first two and the last to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = []
    for row in [head, *rows]:
        cells = []
        for i, (cell, width) in enumerate(zip(row, widths)):
            left = i < 2 or i == len(row) - 1
            cells.append(cell.ljust(width) if left else cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return lines
