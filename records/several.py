"""What several runs say together: lines for the screen, and tables."""

import math
import statistics
from collections import Counter


def notes(runs):
    """The notes of all runs, each once, with the number of runs that have it."""
    lines = []
    found = Counter()
    for r in runs:
        found.update(dict.fromkeys(r.notes, 1))
    for note, count in found.items():
        lines.append(f"{note} ({count} runs)" if count > 1 else note)
    return lines


def differences(groups, names):
    """A line for each of these in which the runs of the groups differ, or are not known to
    agree."""
    found = []
    for name in names:
        first = {}  # value -> where it is first met
        for label, runs in groups.items():
            for r in runs:
                value = getattr(r, name) if hasattr(r, name) else r.environment.get(name)
                first.setdefault("unknown" if value is None else str(value), label)
        if len(first) > 1:
            said = ", ".join(f"{value} in {label}" for value, label in list(first.items())[:3])
            more = " ..." if len(first) > 3 else ""
            found.append(f"{name.replace('_', ' ')} differs: {said}{more}")
    return found


def spread(values, form):
    """Mean and, of several that differ, standard deviation."""
    if not values:
        return "-"
    said = f"{math.fsum(values) / len(values):{form}}"
    if len(values) > 1 and max(values) > min(values):
        said += f" +- {statistics.stdev(values):{form}}"
    return said


def table(rows):
    """Rows of strings in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
