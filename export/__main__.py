"""./run.sh export: see folder.py."""

import argparse

from base import InputError
from base.command import Parser, refuse

from . import folder


def main(argv=None):
    """Parse, export. Returns the exit status."""
    parser = Parser(
        prog="./run.sh export",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
    )
    folder.add_arguments(parser)
    try:
        return folder.run(parser.parse_args(argv))
    except InputError as e:
        return refuse(e)
