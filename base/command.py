"""A command line, and one line for what is wrong with it or with what it names."""

import argparse
import errno
import os
from pathlib import Path

from . import last_resort
from .errors import InputError, RankError


class Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would print its usage and exit."""

    def error(self, message):
        raise InputError(f"{message}; {self.prog} --help shows what is valid")


def path_text(text):
    """A path as it is on the command line, but for a ~ that follows a =, which the shell leaves as
    it is. Raises ArgumentTypeError for what is too long for a path."""
    text = os.path.expanduser(text)
    try:
        os.lstat(text)
    except OSError as e:
        if e.errno == errno.ENAMETOOLONG:
            raise argparse.ArgumentTypeError(f"{text[:40]}...: too long for a path") from None
    except ValueError:  # a NUL, of which no shell makes an argument
        raise argparse.ArgumentTypeError(f"{text}: expected a path") from None
    return text


def given_path(text):
    """The same as a Path."""
    return Path(path_text(text))


def refuse(error):
    """Say what an InputError says, in one line; with --debug also where it was raised. Returns the
    exit status, 2."""
    last_resort.show_if_debugging(error)
    said = str(error).replace("\n", " ")
    rank = last_resort.rank_in_words()
    if rank == "rank 0: " and not isinstance(error, RankError):
        rank = ""  # it speaks for all
    last_resort.say(f"error: {rank}{said}")
    return 2
