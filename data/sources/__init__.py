"""Sources of tokens: one file each, found by its name, with all that is particular to it.

A file NAME.py here that has a `SOURCE = Source(...)` makes `--data NAME` work, in every program and
in `./run.sh data`; nothing else needs to know it. A source of your own may also lie elsewhere:
`--data some.module` takes any module with a dotted name that Python can import. docs/data.md has an
example of ten lines.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from base import InputError


@dataclass(frozen=True)
class Source:
    """What the rest of the program knows about a source.

    about: one line for --help.
    open: function of (DataConfig, folder for prepared data) that returns a Dataset; it prepares or
        fetches what is not there yet, and raises InputError.
    tokenizer: what its tokens were made with, for a source that brings tokens; empty where
        --tokenizer decides.
    exact_val_tokens: --val-tokens is part of the task, so that fewer tokens are an error. Otherwise
        a validation split that is shorter is used whole.
    network: whether opening it for the first time needs the network.
    download: main(argv) of `./run.sh data download NAME`, for a source that can be fetched ahead of
        time; returns the exit status.
    """

    about: str
    open: Callable
    tokenizer: str = ""
    exact_val_tokens: bool = False
    network: bool = False
    download: Callable | None = None


def names():
    """Names of the sources that have a file here, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def exists(name):
    """Whether there is a module for --data `name`; it is not imported yet."""
    if "." not in name:
        return name in names()
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def find(name):
    """The Source called `name`. Raises InputError."""
    if not exists(name):
        raise InputError(f"source {name}: expected {EXPECTED[1]}")
    try:
        module = importlib.import_module(name if "." in name else f"{__name__}.{name}")
    except ImportError as e:
        raise InputError(f"source {name}: this module cannot be imported: {e}") from e
    source = getattr(module, "SOURCE", None)
    if not isinstance(source, Source):
        raise InputError(
            f"source {name}: expected SOURCE = Source(...) in this module, found {source!r}; "
            "docs/data.md has an example"
        )
    return source


DOTTED = "the dotted name of a module with a source of yours"
EXPECTED = exists, f"{', '.join(names())} or {DOTTED}"  # of the option --data
