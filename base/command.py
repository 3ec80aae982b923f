"""A command line, and one line for what is wrong with it or with what it names."""

import argparse
import os
from pathlib import Path

from . import last_resort
from .errors import InputError


class Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would print its usage and exit."""

    def error(self, message):
        raise InputError(f"{message}; {self.prog} --help shows what is valid")


def given_path(text):
    """A Path from the command line; the shell leaves a ~ that follows a = as it is."""
    return Path(os.path.expanduser(text))


def refuse(error):
    """Say what an InputError says, in one line; with --debug also where it was raised. Returns the
    exit status, 2."""
    last_resort.show_if_debugging(error)
    last_resort.say(f"error: {' '.join(str(error).splitlines())}")
    return 2
