"""What the documents say can be done: every ./run.sh command has options that its verb takes, and
every link leads to a file."""

import argparse
import importlib
import re
import shlex

import pytest
from helpers import ROOT

import door
import train_gpt
from base import InputError
from benchmarks import __main__ as benchmarks
from posttrain import command as teaching

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDERS = {
    "COMMAND",
    "DIR",
    "NAME",
    "OPTIONS",
    "SOURCE",
    "VERB",
}  # stand for a word of one's choice


def commands_in(text):
    """Every ./run.sh command in a document, as its list of arguments."""
    found = []
    spans = re.findall(r"`([^`\n]*\./run\.sh[^`\n]*)`", text)
    lines = re.sub(r"\\\n", " ", text).splitlines()
    spans += [line for line in lines if re.match(r"\s*(\w+=\S+ )*\./run\.sh", line)]
    for span in spans:
        command = span[span.index("./run.sh") :]
        command = re.split(r"\s#|\\?\||&|;|\d?>|…|\.\.\.", command)[0]
        arguments = shlex.split(command)[1:]
        if not PLACEHOLDERS & set(re.findall(r"\w+", " ".join(arguments))):
            found.append(arguments)
    return found


COMMANDS = [
    pytest.param(arguments, id=f"{page.name}: {' '.join(arguments)}")
    for page in PAGES
    for arguments in commands_in(page.read_text(encoding="utf-8"))
]


class Parsed(BaseException):
    """The command line was taken; what would follow is the work."""


def check(arguments, monkeypatch):
    """Raises InputError for options that the verb does not take."""
    if "--help" in arguments:
        arguments = [argument for argument in arguments if argument != "--help"]
        if len(arguments) < 2:
            return  # the verb's own help
    verb = "train"
    if arguments and not arguments[0].startswith("-"):
        verb, *arguments = arguments
    if verb == "train":
        train_gpt.parse_args(arguments)
    elif verb == "benchmarks":
        *_, options_of_training = benchmarks.parse(arguments)
        train_gpt.parse_args(options_of_training)
    elif verb in ("sft", "dpo", "orpo", "grpo"):
        args, rest = teaching.make_parser(verb, "", "").parse_known_args(arguments)
        train_gpt.parse_args(teaching.options_of_training(verb, args, rest))
    elif verb != "test":  # whose options are pytest's
        parse_only(verb, arguments, monkeypatch)


def parse_only(verb, arguments, monkeypatch):
    """main() of a verb's package up to where its arguments are parsed."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser, *args, **kwargs):
        options = parse_args(parser, *args, **kwargs)
        if not getattr(options, "options", None):  # what a command of the verb parses itself
            raise Parsed
        return options

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    module = door.MODULES.get(verb, f"{verb}.__main__")
    try:
        status = importlib.import_module(module).main(arguments)
    except Parsed:
        return
    raise InputError(f"{verb} {' '.join(arguments)} ended with status {status}")


@pytest.mark.parametrize("arguments", COMMANDS)
def test_every_command_is_one(arguments, monkeypatch):
    check(arguments, monkeypatch)


def test_commands_are_found():
    text = "Run `./run.sh --steps 3`, or\n```\nX=1 ./run.sh records check a \\\n  b  # two\n```\n"
    assert commands_in(text) == [["--steps", "3"], ["records", "check", "a", "b"]]
    assert commands_in("`./run.sh --track NAME` `./run.sh test 2>&1 | tee x`") == [["test"]]
    verbs = {arguments.values[0][0] for arguments in COMMANDS if arguments.values[0]}
    assert {"benchmarks", "data", "export", "test"} <= verbs and len(COMMANDS) > 40


@pytest.mark.parametrize(
    "wrong",
    [
        "--stepz 3",
        "--track nowhere",
        "benchmarks loader --only x",
        "benchmarks trainer --stepz 3",
        "benchmarks nothing",
        "data download fineweb10B --shards x",
        "export --run runs/a --too hf b",
        "sample --promt x",
        "records chekc a",
    ],
)
def test_commands_that_are_none_are_noticed(wrong, monkeypatch, capsys):
    with pytest.raises(InputError):
        check(wrong.split(), monkeypatch)


def test_verbs_are_those_of_the_door():
    usage = (ROOT / "run.sh").read_text(encoding="utf-8").split("END")[1]
    listed = re.findall(r"^  ([\w-]+) {2,}\S", usage, re.M)
    for arguments in (parameter.values[0] for parameter in COMMANDS):
        if arguments and not arguments[0].startswith("-"):
            assert arguments[0] in listed, arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
