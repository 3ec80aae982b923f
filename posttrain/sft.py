"""./run.sh sft: supervised fine-tuning, which teaches a run's model to answer as conversations do.

It is training on other tokens: the loop is train_gpt.py's, which begins with the run's weights and
vocabulary, and counts only what the assistant says in the loss (data/conversations.py). So
everything that training has is here as well: resuming, seeds, validation, best weights, several
GPUs. tracks/sft.py has the recipe.
"""

import argparse
import dataclasses
import sys

import train_gpt
from base import InputError
from base.command import given_path, refuse
from models import load_template
from runtime import warm_start

DESCRIPTION = """\
Teach a run's model to answer: fine-tune it on conversations, lines of
{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}. Only what
the assistant says counts in the loss. The options of ./run.sh train work here as well; the result
is a run of its own. A part of the conversations is held out to validate on, and the best weights
are kept."""

EXAMPLES = """\
examples:
  ./run.sh sft --from runs/base --data conversations.jsonl
  ./run.sh sft --from runs/base --data a.jsonl b.jsonl --steps 300 --stage-lr 0.2
  ./run.sh chat                                       # with the newest run's model"""


def parse(argv):
    """(own options, those of training)."""
    parser = argparse.ArgumentParser(
        prog="./run.sh sft",
        usage="./run.sh sft --from RUN --data FILE ... [--OPTION VALUE ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--from", dest="run", type=given_path, metavar="RUN", help="the run that is taught"
    )
    parser.add_argument(
        "--data", nargs="+", default=(), type=given_path, metavar="FILE", help="conversations"
    )
    parser.add_argument(
        "--val-data", type=given_path, metavar="FILE", help="to validate on, instead of a tenth"
    )
    return parser.parse_known_args(argv)


def at_the_end(run):
    """{option: value} of a finished run's model, as it was when its training ended."""
    said = warm_start.configuration(run)
    if not said:
        raise InputError(f"--from {run}: expected a run's folder, with its config.json")
    template = said.get("template", "gpt")
    fields = {}
    for f in dataclasses.fields(load_template(template).Config):
        value = said.get(f.name, f.default)
        fields[f.name] = tuple(value) if isinstance(value, list) else value
    config = load_template(template).Config(**fields)
    ends = config.at_the_end() if hasattr(config, "at_the_end") else {}
    return fields | ends | dict(template=template)


def options_of_training(args, rest):
    """The command line of train_gpt.py, and the values below it."""
    argv = ["--track", "sft", *rest]
    if args.run:
        argv += ["--warm-start", str(args.run)]
    if args.data:
        argv += ["--conversations", *map(str, args.data)]
    if args.val_data:
        argv += ["--val-text", str(args.val_data)]
    return argv


def main(argv=None):
    """Parse, teach, print the result. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args, rest = parse(argv)
        going_on = any(option.split("=")[0] == "--resume" for option in rest)
        if not going_on and not (args.run and args.data):
            raise InputError(
                "sft: expected --from RUN and --data FILE ...: whom to teach, and what; "
                "--help has examples"
            )
        model = at_the_end(args.run) if args.run else {}
    except InputError as e:
        return refuse(e)
    return train_gpt.main(options_of_training(args, rest), beneath=model)
