"""Options of the benchmarks: how they are declared, and one line for what is wrong with them."""

import argparse
import math
import re

from base.command import Parser as OneLineParser


class Parser(OneLineParser):
    """A parser whose errors are InputErrors of one line."""

    def __init__(self, **texts):
        texts.setdefault("formatter_class", layout)
        super().__init__(allow_abbrev=False, **texts)

    def option(self, name, kind, default, metavar, help, **more):
        """An option with a value; its default stands behind the help."""
        if default not in (None, ()):
            help = f"{help} [{default}]"
        help = help.replace("%", "%%")
        self.add_argument(name, type=kind, default=default, metavar=metavar, help=help, **more)

    def flag(self, name, help, **more):
        """An option without a value."""
        self.add_argument(name, action="store_true", help=help, **more)

    def error(self, message):
        found = re.fullmatch(r"argument (--[\w-]+): (.*)", message)
        if found and found[2].startswith("expected"):
            message = f"{found[1]}: {found[2]}"
        elif found:
            message = f"{found[1]} {found[2]}"
        super().error(message)


def layout(prog):
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=26, width=100)


def value(kind, valid, expected):
    """A type for options: what kind makes of the text, where valid says yes."""

    def parse(text):
        try:
            x = kind(text)
            fine = valid(x)
        except ValueError:
            fine = False
        if not fine:
            raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
        return x

    return parse


COUNT = value(int, lambda n: n >= 1, "1 or more")
POSITIVE = value(float, lambda x: 0 < x < math.inf, "a number above 0")
