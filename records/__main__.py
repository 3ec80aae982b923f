"""What was achieved: take runs into the records, test their losses, compare and draw them, hand
their weights over.

Exit status: 0 done (check: passed), 1 check failed, 2 bad input. `python -m records COMMAND --help`
says more.
"""

import argparse
import importlib
import os
import sys

from base import InputError

COMMANDS = {  # name -> module, prefix of its add_arguments and run, help
    "add": ("add", "", "take finished runs into the records"),
    "check": (
        "compare",
        "check_",
        "is the mean loss of these runs below the target, beyond chance?",
    ),
    "compare": ("compare", "", "runs or groups of runs side by side, with speed-ups"),
    "plot": ("plot", "", "draw loss against time and tokens"),
    "leaderboard": ("leaderboard", "", "the records as a table"),
}


class Parser(argparse.ArgumentParser):
    """One line for an error."""

    def error(self, message):
        raise InputError(f"{message}; {self.prog} --help shows what is valid")


def main(argv=None):
    """Parse, run the command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def layout(prog):
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=24, width=110)

    parser = Parser(prog="./run.sh records", description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    try:
        for name, (module, prefix, help) in COMMANDS.items():
            command = commands.add_parser(name, help=help, formatter_class=layout)
            if argv[:1] == [
                name
            ]:  # only what is needed: the others' libraries take seconds to load
                module = importlib.import_module(f".{module}", __package__)
                command.description = module.__doc__
                getattr(module, f"{prefix}add_arguments")(command)
                command.set_defaults(run=getattr(module, f"{prefix}run"))
        args = parser.parse_args(argv)
        return args.run(args)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
