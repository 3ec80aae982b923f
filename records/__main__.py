"""What was achieved: take finished runs into the records, test their losses against a target,
compare and draw them. The field's logs (modded-nanogpt's, llm.c's, nanoGPT's, nanochat's) are read
as well as ours.

  ./run.sh records check RUN ...               is the mean loss below the target, beyond chance?
  ./run.sh records compare BEFORE AFTER        what did a change win?
  ./run.sh records plot RUN ... -o loss.png    loss against time and tokens
  ./run.sh records add RUN ... --name WORDS    keep finished runs as a record
  ./run.sh records leaderboard                 write the records' page anew

Exit status: 0 done (check: passed), 1 check failed, 2 bad input.
"""

import argparse
import importlib
import os
import sys

from base import InputError
from base.command import Parser, refuse

COMMANDS = {  # module with add_arguments(parser) and run(args) -> exit status: help
    "check": "test the losses of a recipe's runs against its target",
    "compare": "runs or groups of runs side by side, with speed-ups",
    "plot": "draw loss against time and tokens",
    "add": "take finished runs into the records",
    "leaderboard": "write the records' page and chart anew",
}


def layout(prog):
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=24, width=100)


def main(argv=None):
    """Parse, run the command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="./run.sh records", description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    try:
        for name, help in COMMANDS.items():
            command = commands.add_parser(name, help=help, formatter_class=layout)
            # Only what is needed: the others' libraries take seconds to load
            if argv[:1] == [name]:
                module = importlib.import_module(f".{name}", __package__)
                module.add_arguments(command)
                command.set_defaults(run=module.run)
        args = parser.parse_args(argv)
        return args.run(args)
    except InputError as e:
        return refuse(e)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
