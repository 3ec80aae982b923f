"""base/options.py, runtime/options.py and the Config of train_gpt.py: what a command line may say,
and one line for what it may not."""

import dataclasses
import math
import types
import typing

import pytest
from helpers import REMEMBERED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_gpt as tg
from base import InputError
from base.command import given_path
from base.options import (
    BY_STAGE,
    COUNT,
    FRACTION,
    POSITIVE,
    RATE,
    Options,
    interval,
    option,
    seconds,
    valid,
)
from models import gpt, load_template, template_names
from runtime.options import (
    RunConfig,
    build_parts,
    defaults,
    flat,
    parse_options,
    peek,
)
from tracks import load_track, track_names

ALL = [f for cls in tg.config_classes().values() for f in dataclasses.fields(cls)]
FIELDS = {f.name: f for f in ALL if f.metadata["help"]}  # others are remembered, and no options


@dataclasses.dataclass(frozen=True)
class Small(Options):
    """The part of a program of its own."""

    name: str = option("a", "what it is called: 100% free", group="first")
    kind: str = option("x", "which one", ("x", "y", "z"))
    count: int = option(3, "how many", COUNT)
    rate: float | None = option(
        None, "how fast", (lambda x: x is None or x > 0, "a speed"), group="second"
    )
    sizes: tuple[int, ...] = option((1, 2), "how large", BY_STAGE)
    fast: bool = option(True, "in a hurry")


@dataclasses.dataclass(frozen=True)
class Program:
    small: Small
    run: RunConfig


CLASSES = dict(small=Small, run=RunConfig)


def parse(*argv, **shown):
    return parse_options(CLASSES.values(), list(argv), shown, prog="small")


# --- parsing


@pytest.mark.parametrize(
    "argv, given",
    [
        ([], {}),
        (["--name", "b", "--count", "7"], dict(name="b", count=7)),
        (["--count=7"], dict(count=7)),
        (["--count", "1", "--count", "2"], dict(count=2)),  # the last one counts
        (["--rate", "2.5"], dict(rate=2.5)),
        (["--sizes", "4", "5", "6"], dict(sizes=(4, 5, 6))),
        (["--sizes"], dict(sizes=())),
        (["--fast"], dict(fast=True)),
        (["--no-fast"], dict(fast=False)),
        (
            ["--run-dir", "there", "--keep-last", "5"],
            dict(run_dir="there", keep_last=5),
        ),  # of the other part
        (["--count", "-1"], dict(count=-1)),  # for the part to refuse
        (["--count", "1e6"], dict(count=1_000_000)),
        (["--sizes", "2.5e3", "1_000"], dict(sizes=(2500, 1000))),
        (["--name", "a~b"], dict(name="a~b")),
        (["--name", ""], dict(name="")),
    ],
)
def test_only_what_is_given_is_returned(argv, given):
    assert parse(*argv) == given


@pytest.mark.parametrize(
    "argv, said",
    [
        (
            ["--nam", "b"],
            "unknown option --nam: did you mean --name? valid are --cache-dir",
        ),  # no abbreviations
        (["stray"], "unexpected stray: options begin with --"),
        (["count"], "unexpected count: did you mean --count? options begin with --"),
        ([""], "unexpected '': "),
        (["  "], "unexpected '': "),
        (["\u2014count", "2"], "unexpected \u2014count: did you mean --count? "),  # a long dash
        (["--name", "a.txt", "b.txt"], "unexpected b.txt: "),
        (["--count", "many"], "argument --count: many: expected a whole number"),
        (["--count", "1.5"], "argument --count: 1.5: expected a whole number"),
        (["--count", "1e16"], "argument --count: 1e16: expected a whole number"),
        (["--count", "inf"], "argument --count: inf: expected a whole number"),
        (["--count"], "argument --count: expected one argument"),
        (
            ["--sizes", "1,2"],
            "argument --sizes: 1,2: expected a whole number, and spaces between several",
        ),
        (["--rate", "0,5"], "argument --rate: 0,5: expected a number"),
        (["--no-fast=yes"], "--fast takes no value: expected --fast or --no-fast"),
        (["--fast=False"], "--fast takes no value: expected --fast or --no-fast"),
        (["--fast", "False"], "unexpected False: "),
        (["--run-dir", "a" * 300], f"argument --run-dir: {'a' * 40}...: too long for a path"),
        (["--run-dir", "a/" * 2100], f"argument --run-dir: {'a/' * 20}...: too long for a path"),
    ],
)
def test_what_cannot_be_parsed_is_one_line(argv, said):
    with pytest.raises(InputError) as e:
        parse(*argv)
    assert said in str(e.value) and "\n" not in str(e.value)


def test_a_path_may_begin_at_home(monkeypatch):
    """The shell passes --run-dir=~/a as it is: no folder is to be called ~."""
    monkeypatch.setenv("HOME", "/home/me")
    assert parse("--run-dir=~/a", "--name", "~") == dict(run_dir="/home/me/a", name="/home/me")
    assert str(given_path("~/a")) == "/home/me/a"


def test_help_has_every_option_its_group_its_default_and_what_is_shown_instead(capsys):
    with pytest.raises(SystemExit) as e:
        parse("--help", count=9)
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0
    for said in (
        "--name STR what it is called: 100% free [a]",
        "--kind STR which one: x, y, z [x]",
        "--count INT how many [9]",
        "--rate FLOAT how fast [None]",
        "--sizes [INT ...] how large [1 2]",
        "--fast, --no-fast in a hurry [True]",
    ):
        assert said in text, said
    headings = (
        "first: --name",
        "second: --rate",
        "run: --run-dir",
        "machine: --gpus",
        "checkpoints: --checkpoint-every",
    )
    at = [text.index(heading) for heading in headings]
    assert at == sorted(at)  # in the order of the parts


def test_a_few_options_may_be_looked_at_before_the_others_are_known():
    argv = ["--nam", "a", "--count", "x", "stray", "--kind=z", "--rate"]
    assert peek(argv, "name", "kind", "rate") == dict(name=None, kind="z", rate=None)


# --- checking


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(kind="w"), "--kind w: expected x, y or z"),
        (dict(count=-1), "--count -1: expected zero or more"),
        (dict(rate=0.0), "--rate 0.0: expected a speed"),
        (dict(sizes=(3, 0)), "--sizes 3 0: expected one positive number per stage"),
        (dict(sizes=()), "--sizes : expected one positive number per stage"),
        (dict(keep_last=0), "--keep-last 0: expected a positive number"),
        (dict(recompute="maybe"), "--recompute maybe: expected auto, on or off"),
        (
            dict(checkpoint_every="no"),
            "--checkpoint-every no: expected a number of steps, a time such as 10m, or off",
        ),
        (dict(max_time="1d"), "--max-time 1d: expected a time such as 90s, 10m or 1.5h"),
    ],
)
def test_errors_name_option_value_and_what_is_expected(fields, said):
    with pytest.raises(InputError) as e:
        build_parts(CLASSES, fields)
    assert str(e.value) == said


def test_a_configuration_is_built_of_parts_and_flat_again():
    given = dict(
        name="", kind="z", count=0, rate=None, sizes=(1,), checkpoint_every="off", max_time="2h"
    )
    program = Program(**build_parts(CLASSES, given))
    assert program.small.kind == "z" and program.run.max_time == "2h"
    assert flat(program) == defaults(program) | given
    assert defaults(program) == flat(Program(Small(), RunConfig()))


def test_an_option_that_no_part_has():
    with pytest.raises(InputError, match="^nothing: no such option; expected of cache_dir, .* "):
        build_parts(CLASSES, dict(kind="y", nothing=1))


@pytest.mark.parametrize(
    "expect, allowed, refused",
    [
        (POSITIVE, (1, 0.1, 10**30), (0, -1, math.nan, math.inf)),
        (COUNT, (0, 5), (-1,)),
        (RATE, (0, 0.0, 5.0), (-1e-9, math.inf, math.nan)),
        (FRACTION, (0, 0.5, 1), (-0.1, 1.1, math.nan)),
        (
            BY_STAGE,
            ((1,), (0.5, 2)),
            ((), (0,), (1, -1), (math.nan,), (1, math.nan), (math.nan, 1), (1, math.inf)),
        ),
    ],
)
def test_kinds_of_values(expect, allowed, refused):
    assert all(expect[0](x) for x in allowed) and not any(expect[0](x) for x in refused)


# --- times


@pytest.mark.parametrize(
    "text, expected", [("90s", 90), ("10m", 600), ("1.5h", 5400), (".5s", 0.5), ("1e3s", 1000)]
)
def test_seconds(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize(
    "text", ["", "s", "10", "10d", "-5s", "0m", "nanm", "infh", "1e999s", "ten m", "5ss", "m5"]
)
def test_no_seconds(text):
    with pytest.raises(ValueError):
        seconds(text)
    assert not valid(seconds, text)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("500", (500, math.inf)),
        ("1", (1, math.inf)),
        ("10m", (0, 600)),
        ("off", (0, math.inf)),
        ("007", (7, math.inf)),
    ],
)
def test_interval(text, expected):
    assert interval(text) == expected and valid(interval, text)


@given(st.text(max_size=8))
def test_an_interval_is_sound_or_refused(text):
    try:
        steps, time = interval(text)
    except ValueError:
        return
    assert steps >= 0 and time > 0 and (not steps or time == math.inf)


# --- the trainer's own


def test_every_option_says_what_it_is_and_its_default_is_valid():
    for f in FIELDS.values():
        help = f.metadata["help"]
        assert help and (help[0].islower() or help.startswith(("Muon", "Adam", "LoRA"))), f.name
    tg.configure()
    for name in track_names():
        tg.configure(**(load_track(name) | dict(text="a")))


def test_no_two_parts_have_an_option_of_the_same_name():
    assert len({f.name for f in ALL}) == len(ALL)


def test_what_is_remembered_is_no_option():
    assert {f.name for f in ALL} - FIELDS.keys() == REMEMBERED
    with pytest.raises(InputError, match="unknown option --earlier"):
        tg.parse_args(["--earlier", "3"])


def test_groups_have_one_heading_each(capsys):
    """Parts may share one; then their options stand together."""
    for cls in tg.config_classes().values():
        own = [f.metadata["group"] for f in dataclasses.fields(cls) if f.metadata["group"]]
        assert len(own) == len(set(own)) >= 1, cls
    with pytest.raises(SystemExit):
        tg.parse_args(["--track", "laptop", "--help"])
    lines = capsys.readouterr().out.splitlines()
    headings = {f.metadata["group"] for f in FIELDS.values()} - {None}
    assert len(headings) >= 5
    for heading in headings:
        assert lines.count(f"{heading}:") == 1, heading


NO_NAME = f"expected one of {', '.join(template_names())}, or a module's dotted name"


@pytest.mark.parametrize(
    "name, said",
    [
        ("nothing", NO_NAME),
        ("", NO_NAME),
        (".", NO_NAME),
        (".gpt", NO_NAME),
        ("models.nothing", "cannot be imported: No module named 'models.nothing'"),
        ("models.parts", "has no Config; models/__init__.py says what a template offers"),
    ],
)
def test_what_is_no_template_is_one_line(name, said):
    with pytest.raises(InputError) as e:
        load_template(name)
    assert str(e.value) == f"--template {name}: {said}"


def test_a_template_may_be_a_module_of_ones_own():
    assert load_template("models.gpt") is load_template("gpt") is gpt
    c = tg.parse_args(["--track", "laptop", "--template", "models.gpt"])
    assert c.goal.template == "models.gpt" and isinstance(c.model, gpt.Config)


def text_of(value):
    return [str(x) for x in value] if isinstance(value, tuple) else [str(value)]


@pytest.mark.parametrize("name", FIELDS)
def test_every_option_reaches_its_field(name):
    """Its default by name on the command line gives the default, which the laptop track need not
    have."""
    f = FIELDS[name]
    flag = f"--{name.replace('_', '-')}"
    if f.default is None or name in ("track", "text", "data", "value_embed_layers"):
        return
    if f.type is bool:
        given = [flag if f.default else f"--no-{flag[2:]}"]
    else:
        given = [flag, *text_of(f.default)]
    value = flat(tg.parse_args(["--track", "laptop", *given]))[name]
    assert value == f.default and type(value) is type(f.default)


JUNK = st.one_of(
    st.sampled_from(
        [
            "auto",
            "on",
            "off",
            "10m",
            "text",
            "laptop",
            "gpt",
            ".",
            "a.b",
            "os.path",
            "shakespeare-char",
            "bytes",
            "nan",
            "inf",
            "-1",
            "0",
            "2",
            "0.5",
            "",
            " ",
            "-",
            "--",
            "-h5",
            "--help",
            "1e400",
            "9" * 5000,
            "\0",
            "\n",
            "²",
            "٣",
            "é",
            "\ud800",
            "%",
            "{}",
            "[1]",
        ]
    ),
    st.text(max_size=6),
)
OF_TYPE = {
    int: st.one_of(
        st.integers(-2, 9), st.integers(-10, 10**7), st.sampled_from([128, 256, 512, 8192])
    ).map(str),
    float: st.one_of(st.floats(0, 1), st.floats()).map(str),
    str: st.sampled_from(["auto", "on", "off", "5m", "7", "a"]),
}


def words(f):
    """What may stand on a command line for a field: mostly of its type."""
    kind = typing.get_args(f.type)[0] if typing.get_args(f.type) else f.type
    names = [f"--{f.name.replace('_', '-')}", f"--no-{f.name.replace('_', '-')}"]
    if kind is bool:
        return st.lists(st.sampled_from(names), min_size=1, max_size=1)
    value = st.one_of(*[OF_TYPE[kind]] * 9, JUNK)
    most = 4 if typing.get_origin(f.type) is tuple else 1
    return st.lists(value, min_size=1, max_size=most).map(lambda values: [names[0], *values])


ARGV = st.lists(
    st.one_of(*map(words, FIELDS.values()), st.lists(JUNK, max_size=1)), max_size=6
).map(lambda parts: sum(parts, []))


def try_command(argv):
    """A Config whose schedules work, or an error of one readable kind; --help ends with status
    0."""
    try:
        c = tg.parse_args(argv)
    except InputError as e:
        assert str(e)
        return
    except SystemExit as e:
        assert e.code == 0 and any(x.startswith(("--help", "-h")) for x in argv)
        return
    if max(c.model.n_layer, *c.model.mtp) < 1000:
        for step in (1, c.schedule.steps // 2 + 1, c.schedule.steps):
            progress = c.schedule.progress(step)
            stage = tg.stage_at(c, step)
            val_stage = c.model.val_stage(stage.model, c.data.val_row_len)
            assert stage.rows > 0
            assert len(stage.model.windows) == len(val_stage.windows) == c.model.n_layer
            assert 0 <= tg.lr_scale(c.schedule, progress) < math.inf
            assert 0.8 < tg.muon_momentum(progress) < 1
            one_target = stage.model.n_targets == 1 and not stage.model.prefix
            assert (c.model.target_weights(progress) is None) == one_target
        model = types.SimpleNamespace(c=c.model, ops=types.SimpleNamespace(polar_express=None))
        rules = gpt.Model.update_rules(model, c.optim)
        assert all(rule.lr >= 0 for rule in rules.values())


loose = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))


@settings(max_examples=500, **loose)
@given(ARGV)
def test_no_command_line_raises_anything_else(argv):
    try_command(argv)


@pytest.mark.slow
@settings(max_examples=20_000, **loose)
@given(ARGV)
def test_no_command_line_of_very_many_raises_anything_else(argv):
    try_command(argv)
