"""A command line that says in one line what is wrong with it."""

import argparse
import os
from pathlib import Path

from .errors import InputError


class Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would print its usage and exit."""

    def error(self, message):
        raise InputError(f"{message}; {self.prog} --help shows what is valid")


def given_path(text):
    """A Path from the command line; the shell leaves a ~ that follows a = as it is."""
    return Path(os.path.expanduser(text))
