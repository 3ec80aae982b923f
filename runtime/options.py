"""A configuration of several parts, each a dataclass of options, and its command line."""

import argparse
import dataclasses
import difflib
import re
import typing

from base import InputError
from base.command import path_text
from base.options import AUTO, COUNT, POSITIVE, RATE, Options, interval, option, seconds, valid
from base.places import cache_folder

from .trackers import PACKAGES


@dataclasses.dataclass(frozen=True)
class RunConfig(Options):
    """How and where a run is kept, and on what it runs.

    A run that goes on from a checkpoint may have other values than the one before.
    """

    run_dir: str = option(
        "", "where log, metrics and weights go; empty is runs/<utc>-<track>", group="run"
    )
    cache_dir: str = option(str(cache_folder()), "prepared data and compiled code")
    eval_every: int = option(
        125, "steps between validations; there is always one at the end", POSITIVE
    )
    quick_val: int = option(
        0,
        "with a target: tokens of a fixed part of the validation split that say when the target "
        "is near enough to validate on all of it, after step 2, 4, 8, ... as well, before "
        "--eval-every; 0: every validation is on all of it",
        COUNT,
    )
    train_eval: int = option(
        0,
        "measure the weights that are kept on about so many tokens of the training text as well, "
        "as validation measures them: train_bpb in the result",
        COUNT,
    )
    repeat: int = option(
        1, "runs from this many successive seeds, one after the other in one process", POSITIVE
    )
    time: str = option(
        "",
        "what the whole process may take, such as 90s, 10m or 1.5h: so many steps are taken, in "
        "place of --steps",
        (lambda text: not text or valid(seconds, text), "a time such as 90s, 10m or 1.5h"),
    )
    max_time: str = option(
        "",
        "end after this much training, such as 90s, 10m or 1.5h",
        (lambda text: not text or valid(seconds, text), "a time such as 90s, 10m or 1.5h"),
    )
    patience: int = option(
        0,
        "end after so many validations without a better one, counted from when the learning rate "
        "begins to fall; 0 goes on",
        COUNT,
    )
    sample_tokens: int = option(120, "length of each text sample at the end; 0 is none", COUNT)
    sample_every: int = option(
        0, "steps between samples in the course of training; 0 is only at the end", COUNT
    )
    sample_prompts: tuple[str, ...] = option(
        (),
        "what samples begin with; empty: as documents of the validation split do; fixed: the same "
        "for every run, those of inference/prompts.txt",
    )
    track_with: str = option(
        "",
        "send the metrics to this tracker as well, if its package is installed: tensorboard, "
        "trackio or wandb; empty: to none",
        (lambda name: name in ("", *PACKAGES), "tensorboard, trackio or wandb"),
    )
    usd_per_hour: float = option(
        0.0,
        "price of one GPU, or of the machine where there is none, for the cost in the result; 0: "
        "by runtime/hardware.toml, if it knows the GPU",
        RATE,
    )
    gpus: int = option(0, "how many GPUs; 0 is all there are", COUNT, group="machine")
    micro_tokens: int = option(0, "tokens per forward pass; 0 fits them to the memory found", COUNT)
    recompute: str = option(
        "auto",
        "compute blocks again in backward instead of keeping them; auto: if memory is short",
        AUTO,
    )
    kernels: tuple[str, ...] = option(
        ("auto",), "auto, reference (PyTorch only), all, or names of ops to run by Triton"
    )
    compile: bool | None = option(
        None, "torch.compile; None: on a GPU. On a CPU loops in C are as fast without the wait"
    )
    checkpoint_every: str = option(
        "10m",
        "so many steps, or such a time; also at the end and on SIGTERM, SIGINT and "
        "SIGUSR1; off is never",
        (lambda text: valid(interval, text), "a number of steps, a time such as 10m, or off"),
        group="checkpoints",
    )
    keep_last: int = option(2, "checkpoints to keep, the newest", POSITIVE)
    keep_best: int = option(
        0,
        "checkpoints to keep besides, those of the lowest validation loss; then there is one at "
        "each new best",
        COUNT,
    )
    snapshots: int = option(
        0,
        "keep the weights after steps 1, 2, 4, 8, ..., and from here on after each so many steps, "
        "in steps/ of the run's folder; 0 is none",
        COUNT,
    )
    resume: str = option(
        "",
        "go on from a run's folder or a checkpoint in it, with its options where others are not "
        "given; auto: from --run-dir or the newest run of this recipe and data that has something "
        "left to do, or begin if there is none",
    )
    extend: str = option(
        "replan",
        "the learning rate where --steps grows on resuming; replan: that of a run of so many "
        "steps, cooldown: from its peak straight down over the added ones",
        ("replan", "cooldown"),
    )
    warm_start: str = option(
        "", "take weights and tokenizer of a run or checkpoint, and nothing else"
    )
    max_restarts: int = option(
        0, "with several GPUs: how often they may begin again after a failure, resuming", COUNT
    )
    hang_timeout: str = option(
        "40s",
        "with several processes: one that takes no step for so long ends all of them and is named; "
        "longer where steps take over 2 s, ten times as long for all else than steps; off: never",
        (lambda text: text == "off" or valid(seconds, text), "a time such as 40s or 10m, or off"),
    )

    def __post_init__(self):
        super().__post_init__()
        if self.time and self.resume:
            self.refuse("time", "nothing with --resume, which takes the steps its run has left")


# --------------------------------------------------------------------------------------------------
# Configurations of parts


def flat(config):
    """{option: value} of a configuration whose fields are dataclasses, whose names differ."""
    fields = {}
    for part in dataclasses.fields(config):
        fields |= dataclasses.asdict(getattr(config, part.name))
    return fields


def defaults(config):
    """{option: default} of the same."""
    fields = {}
    for part in dataclasses.fields(config):
        for f in dataclasses.fields(getattr(config, part.name)):
            fields[f.name] = f.default
    return fields


def as_option(value):
    """A value that JSON or a command line has as a list, as options have it."""
    return tuple(value) if isinstance(value, list) else value


def changed(config, **fields):
    """The same with other values of some options. Raises InputError."""
    classes = {f.name: type(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return type(config)(**build_parts(classes, flat(config) | fields))


def build_parts(classes, fields):
    """{part: instance} from {part: dataclass} and values for some of the options.

    Raises InputError for an option that no part has, or a value that is not valid.
    """
    known = set()
    parts = {}
    for name, cls in classes.items():
        own = {f.name for f in dataclasses.fields(cls)}
        known |= own
        parts[name] = cls(**{key: value for key, value in fields.items() if key in own})
    unknown = sorted(fields.keys() - known)
    if unknown:
        raise InputError(f"{unknown[0]}: no such option; expected of {', '.join(sorted(known))}")
    return parts


# --------------------------------------------------------------------------------------------------
# The command line


class Parser(argparse.ArgumentParser):
    """One line for an error, with the nearest valid name."""

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            given = (message.split(": ", 1)[1].split() or ["''"])[0]
            message = self.unknown(given)
        on_off = re.match(r"argument (--\S+)/(--no-\S+): ignored explicit argument", message)
        if on_off:
            message = f"{on_off[1]} takes no value: expected {on_off[1]} or {on_off[2]}"
        raise InputError(message)

    def unknown(self, given):
        """What is wrong with a word that no option takes."""
        valid = sorted(s for a in self._actions for s in a.option_strings if s.startswith("--"))
        near = difflib.get_close_matches(given, valid, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        if given.startswith("-"):
            return f"unknown option {given}: {hint}valid are {' '.join(valid)}"
        # Such as the second of two files, or False behind an option that is on or off
        return (
            f"unexpected {given}: {hint}options begin with --; all but lists take one value, and "
            "what is on or off takes none, but has a --no- form"
        )


def peek(argv, *names):
    """{name: value or None} of a few options, before it is known which others there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", nargs="?")
    return vars(parser.parse_known_args(argv)[0])


def parse_options(classes, argv, shown, **texts):
    """argv -> {option: value} for the options given.

    classes: dataclasses, whose fields become options: names with hyphens; a bool has its --no-
    form, a tuple takes any number of values. shown: options whose value in --help differs from the
    default; texts: prog, usage, description, epilog. Raises InputError.
    """

    def layout(prog):
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=100)

    parser = Parser(allow_abbrev=False, **texts, formatter_class=layout)
    groups = {}
    heading = "options"
    for cls in classes:
        for f in dataclasses.fields(cls):
            if f.metadata["help"] is None:
                continue  # remembered, and no option
            heading = f.metadata["group"] or heading
            if heading not in groups:
                groups[heading] = parser.add_argument_group(heading)
            add_option(groups[heading], f, shown.get(f.name, f.default))
    values = {}
    for name, value in vars(parser.parse_args(argv)).items():
        if value is not None:
            values[name] = as_option(value)
    return values


def add_option(group, f, default):
    """The option of one dataclass field; default: what --help says it is."""
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    kwargs = dict(dest=f.name, default=None)
    kwargs["help"] = f"{f.metadata['help']} [{default}]".replace("%", "%%")
    name = "--" + f.name.replace("_", "-")
    arguments = typing.get_args(f.type)
    kind = arguments[0] if arguments else f.type
    if f.type in (bool, bool | None):
        group.add_argument(name, action=argparse.BooleanOptionalAction, **kwargs)
        return
    several = typing.get_origin(f.type) is tuple
    if several:
        kwargs["nargs"] = "*"
    parse = parser_of(kind, several)
    group.add_argument(name, type=parse, metavar=kind.__name__.upper(), **kwargs)


def parser_of(kind, several):
    """The function that makes a value of this type of a word on the command line.

    several: whether more of them may follow, for the message.
    """
    if kind is str:
        return str if several else path_text  # a single one is a path, or is none and stays
    parse = whole_number if kind is int else kind
    expected = "a whole number" if kind is int else "a number"
    if several:
        expected += ", and spaces between several"

    def parse_or_explain(text):
        try:
            return parse(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}") from None

    return parse_or_explain


def whole_number(text):
    """An int; 1e6 is one, too. Raises ValueError."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
    # Beyond 2**53 a float is not exact
    if not number.is_integer() or abs(number) > 2**53:
        raise ValueError(text)
    return int(number)
