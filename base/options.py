"""Fields of a configuration that are command-line options as well: help, default, what is valid.

A part of the program (model, data, optimizer, run) has a frozen dataclass that inherits from
Options and whose fields are made by option(). runtime/options.py makes a command line of them.
"""

import dataclasses
import math

from .errors import InputError

# what an option may be: (predicate, in words)
POSITIVE = lambda x: 0 < x < math.inf, "a positive number"
COUNT = lambda n: n >= 0, "zero or more"
RATE = lambda x: 0 <= x < math.inf, "zero or more"
AUTO = "auto", "on", "off"
FRACTION = lambda x: 0 <= x <= 1, "a fraction"
PAIR = lambda xs: len(xs) in (0, 2) and all(x > 0 for x in xs), "two positive numbers, or none"
BY_STAGE = (
    lambda xs: bool(xs) and all(0 < x < math.inf for x in xs),
    "one positive number per stage",
)


def seconds(text):
    """ "90s", "10m" or "1.5h" in seconds; ValueError for anything else."""
    number, unit = float(text[:-1]), dict(s=1, m=60, h=3600).get(text[-1:])
    if unit is None or not 0 < number < math.inf:
        raise ValueError(f"{text}: expected a time such as 90s, 10m or 1.5h")
    return number * unit


def interval(text):
    """(steps, seconds) of an interval given as either: "500" -> (500, inf), "10m" -> (0, 600.0),
    "off" -> (0, inf)."""
    if text == "off":
        return 0, math.inf
    if text.isdecimal() and int(text):
        return int(text), math.inf
    return 0, seconds(text)


def valid(parse, text):
    """Whether parse takes the text."""
    try:
        return parse(text) is not None
    except ValueError:
        return False


def option(default, help, expect=None, group=None):
    """A dataclass field with help for --help. expect: (predicate, in words), or the strings that
    are valid; group: the heading it begins in --help."""
    if expect and isinstance(expect[0], str):
        help = f"{help}: {', '.join(expect)}"
        expect = (
            (lambda x, allowed=expect: x in allowed),
            f"{', '.join(expect[:-1])} or {expect[-1]}",
        )
    return dataclasses.field(default=default, metadata=dict(help=help, expect=expect, group=group))


def remembered(default):
    """A dataclass field that is no option: a program fills it in, and keeps it with the others."""
    return dataclasses.field(default=default, metadata=dict(help=None, expect=None, group=None))


def check_options(config):
    """Raises InputError for the first field that is not what its option expects."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if f.metadata["expect"]:
            is_valid, in_words = f.metadata["expect"]
            if not is_valid(value):
                refuse(f.name, value, in_words)


class Options:
    """Base of a part's dataclass: raises InputError for the first field that is not valid."""

    def __post_init__(self):
        check_options(self)

    def refuse(self, field, expected):
        """Raise InputError for the value of a field."""
        refuse(field, getattr(self, field), expected)


def refuse(field, value, expected):
    """Raise InputError for an option's value."""
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
    raise InputError(f"--{field.replace('_', '-')} {shown}: expected {expected}")


def progress_of(step, steps, extension=0, earlier=()):
    """The fraction of the scheduled steps that are taken before this one, numbered from 1.

    From 0 in the first step to 1 in the extension, the last so many steps. earlier: (step after
    which steps were added, how many there were to be until then, ...) for each time that was done;
    progress never falls there, so that no stage of training comes back.
    """
    reached = 0.0
    for after, planned, *_ in earlier:
        reached = max(reached, progress_of(min(step, after), planned, extension))
        if step <= after:
            return reached
    return max(reached, min(1.0, (step - 1) / max(1, steps - extension)))


def stage_number(values, progress):
    """Which of the equally long stages of training this progress, from 0 to 1, is in; from 0."""
    return min(int(progress * len(values)), len(values) - 1)


def by_stage(values, progress):
    """The entry for this progress of an option that has one for each stage."""
    return values[stage_number(values, progress)]
