"""./run.sh export: see folder.py."""

import argparse
import sys

from base import InputError
from base.command import Parser

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
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
