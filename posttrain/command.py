"""What the commands of teaching share: whom to teach, and by what."""

import argparse
import dataclasses
import sys

import door
import train_gpt
from base import InputError
from base.command import given_path, refuse
from base.options import progress_of
from models import DEFAULT_TEMPLATE, load_template
from runtime import warm_start
from runtime.options import as_option
from runtime.resume import read_result


def make_parser(verb, description, examples):
    """A parser of --from, --data and --val-data; what it does not know are options of training."""
    parser = argparse.ArgumentParser(
        prog=f"./run.sh {verb}",
        usage=f"./run.sh {verb} --from RUN --data FILE ... [--OPTION VALUE ...]",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--from", dest="run", type=given_path, metavar="RUN", help="the run that is taught"
    )
    parser.add_argument(
        "--data", nargs="+", default=(), type=given_path, metavar="FILE", help="what it learns"
    )
    parser.add_argument(
        "--val-data", type=given_path, metavar="FILE", help="to validate on, instead of a tenth"
    )
    return parser


def at_the_end(run):
    """{option: value} of a finished run's model, as it was when its training ended."""
    said = warm_start.configuration(run)
    if not said:
        raise InputError(f"--from {run}: expected a run's folder, with its config.json")
    template = said.get("template", DEFAULT_TEMPLATE)
    fields = {}
    for f in dataclasses.fields(load_template(template).Config):
        fields[f.name] = as_option(said.get(f.name, f.default))
    config = load_template(template).Config(**fields)
    ends = config.at_the_end(progress_of_end(run, said)) if hasattr(config, "at_the_end") else {}
    return fields | ends | dict(template=template)


def progress_of_end(run, said):
    """Where in training a run's weights are from, as load_run() has it; said: its options. Of one
    that has not finished, all of it."""
    result = read_result(warm_start.run_folder(run)) or {}
    step = result.get("best_step", result.get("steps"))
    if step is None:
        return 1.0
    return progress_of(step, said["steps"], said["extension"], said.get("earlier", ()))


def options_of_training(track, args, rest):
    """The command line of train_gpt.py."""
    argv = ["--track", track, *rest]
    if args.run:
        argv += ["--warm-start", str(args.run)]
    if args.data:
        argv += ["--conversations", *map(str, args.data)]
    if args.val_data:
        argv += ["--val-text", str(args.val_data)]
    return argv


def teach(verb, track, parser, argv, open_loop=None):
    """Parse, teach, print the result. Returns the exit status.

    open_loop: as for train_gpt.train().
    """
    argv = sys.argv[1:] if argv is None else argv
    args, rest = parser.parse_known_args(argv)
    going_on = any(option.split("=")[0] == "--resume" for option in rest)
    try:
        if not going_on and not (args.run and args.data):
            raise InputError(
                f"{verb}: expected --from RUN and --data FILE ...: whom to teach, and what; "
                "--help has examples"
            )
        model = at_the_end(args.run) if args.run else {}
    except InputError as e:
        return refuse(e)
    options = options_of_training(track, args, rest)
    again = door.__file__, [verb, *argv]  # as each process of several begins
    return train_gpt.main(options, model, open_loop, again)
