"""A command line that says in one line what is wrong with it."""

import argparse

from .errors import InputError


class Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would print its usage and exit."""

    def error(self, message):
        raise InputError(f"{message}; {self.prog} --help shows what is valid")
