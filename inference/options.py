"""Options that sampling and chatting share: which run, and how tokens are drawn."""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from base import InputError
from base.command import Parser, given_path
from base.places import cache_folder
from data.chat import knows_chat
from kernels.decoding import Decoding
from kernels.drawing import Drawing
from runtime.options import add_option
from runtime.saved import load_run, newest_run

from .engine import Engine
from .quantize import KINDS, quantize
from .sampling import OF_CHARACTERS, OF_WORDS, Sampling

FIXED_PROMPTS = Path(__file__).parent / "prompts.txt"  # one on each line, \n for a line end
WORTH_COMPILING = 4_000_000  # parameters, from which decoding in C saves more than a second soon
FIXED = "fixed"  # what options call them
# All but the one that a command line has no good form for
KNOBS = [f for f in dataclasses.fields(Sampling) if f.name != "logit_bias"]


def make_parser(verb, description, epilog, tokens):
    """A Parser with the shared options; tokens: default of -n."""

    def layout(prog):
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=100)

    parser = Parser(
        prog=f"./run.sh {verb}", description=description, epilog=epilog, formatter_class=layout
    )
    parser.add_argument(
        "--run", type=given_path, metavar="RUN", help="a run's folder [the newest in runs/]"
    )
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="of the weights that training kept after this step with --snapshots",
    )
    parser.add_argument(
        "--quantize", choices=KINDS, help="hold the weights in so many bits: smaller, less exact"
    )
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="the run's template, where it is a module from outside models/",
    )
    parser.add_argument(
        "-n",
        "--tokens",
        type=int,
        default=tokens,
        metavar="N",
        help=f"tokens to write at most [{tokens}]",
    )
    parser.add_argument(
        "--prompt-lookup",
        type=int,
        default=0,
        metavar="N",
        help="try N tokens at once that followed the same words before: faster where text repeats "
        "itself, and the same text [0]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws [0]")
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given again",
    )
    group = parser.add_argument_group("how tokens are drawn")
    for field in KNOBS:
        default = OF_WORDS.get(field.name, field.default)
        characters = OF_CHARACTERS.get(field.name, field.default)
        if default != characters:
            default = f"{default}; {characters} where tokens are characters"
        add_option(group, field, default)
    return parser


def check(args):
    """{field of Sampling: value} that was given. Raises InputError for options that are not
    valid."""
    if args.tokens < 1:
        raise InputError(f"--tokens {args.tokens}: expected a positive number")
    if not 0 <= args.seed < 2**62:
        raise InputError(f"--seed {args.seed}: expected zero or more")
    if args.prompt_lookup < 0:
        raise InputError(f"--prompt-lookup {args.prompt_lookup}: expected zero or more")
    if "" in args.stop:
        raise InputError("--stop: expected a text, found an empty one")
    given = {f.name: getattr(args, f.name) for f in KNOBS}
    given = {name: value for name, value in given.items() if value is not None}
    Sampling(**given)
    return given


def open_run(args, **about):
    """(what the run left, an Engine with its model). about: the engine. Raises InputError."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    saved = load_run(args.run or newest_run(), device, args.template, args.step)
    bits = use_decoding(saved.model, say, args.quantize)
    if args.quantize:
        say(f"{args.quantize}: {bits:.2f} bits a weight over all parameters")
    about["prompt_lookup"] = args.prompt_lookup
    about["drawing"] = Drawing.build(cache_folder(), say)
    return saved, Engine(saved.model, saved.stage, saved.tokenizer, saved.max_len, **about)


def use_decoding(model, say, kind=None):
    """Have a model that is worth it decode by kernels/decoding.py, on a CPU, with its weights
    quantized to a kind first. Whether it is worth it depends on the model alone: with the same seed
    it is to say the same again. Returns bits per weight of a kind, or None."""
    parameters = list(model.parameters())
    n = sum(p.numel() for p in parameters)
    compiled = None
    if parameters[0].device.type == "cpu" and n >= WORTH_COMPILING:
        compiled = Decoding.build(cache_folder(), say)
    if compiled is not None:
        model.ops = compiled.ops(model.ops)
    bits = quantize(model, kind) if kind else None
    if compiled is not None:
        compiled.in_large_pages(model.parameters())
    return bits


def is_taught(saved):
    """Whether a run's model was taught to answer; others continue text."""
    of_conversations = saved.options.get("data") in ("conversations", "preferences", "questions")
    return of_conversations and knows_chat(saved.tokenizer)


def fixed_prompts():
    """Prompts that are the same for every run and track, so that models can be compared by what
    they make of them."""
    lines = FIXED_PROMPTS.read_text(encoding="utf-8").splitlines()
    return [line.replace("\\n", "\n") for line in lines]


def say(line):
    """A line that is no text of the model's."""
    print(line, file=sys.stderr, flush=True)


def is_text(given):
    """Whether a string from the command line was UTF-8."""
    return not any("\ud800" <= c <= "\udfff" for c in given)
