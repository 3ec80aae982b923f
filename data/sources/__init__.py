"""Sources of tokens: one file each, found by its name, with all that is particular to it.

A file NAME.py here that has a `SOURCE = Source(...)` makes `--data NAME` work, in every program and
in `./run.sh data`; nothing else needs to know it. A source of your own may also lie elsewhere:
`--data some.module` takes any module with a dotted name that Python can import. docs/data.md has an
example of ten lines.

A source can do one or both of two things: `open` gives tokens that are ready to train on (--data),
`locate` and `read_file` give documents for `./run.sh data build`. What that has built is a source
as well, by the path of its folder.
"""

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from base import InputError

MANIFEST = "manifest.json"  # of what `./run.sh data build` has made


class Document(NamedTuple):
    """A text and where it comes from. about: what is known of its date, url, title, licence and
    language, as str."""

    text: str
    id: str  # within its source
    about: dict


class Files(NamedTuple):
    """The files that a part of a recipe names, in reading order."""

    paths: list  # of Path
    names: list  # of str: what each is called, whatever folder it lies in
    about: dict  # licence, revision, url, ... of them all, as far as known
    column: str = ""  # that the text is in, unless the recipe says otherwise
    rows_are_lines: bool = False  # of WikiText: documents begin at headings


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
    locate: function of (recipe.Part, folder for what is fetched) that returns its Files, for a
        source that is named in a recipe. Raises InputError.
    endings: of the files, in lower case, that are read by its read_file.
    read_file: function of (Path, name, recipe.Part) that yields Documents. Raises InputError.
    """

    about: str
    open: Callable | None = None
    tokenizer: str = ""
    exact_val_tokens: bool = False
    network: bool = False
    download: Callable | None = None
    locate: Callable | None = None
    endings: tuple = ()
    read_file: Callable | None = None


def names():
    """Names of the sources that have a file here, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def all_of_them():
    """{name: Source} of those that have a file here."""
    return {name: find(name) for name in names()}


def trainable():
    """Names of the sources that --data takes, sorted."""
    return [name for name, source in all_of_them().items() if source.open]


def is_built(name):
    """Whether --data `name` is the folder of something that was built."""
    return name not in names() and os.path.isfile(os.path.join(name, MANIFEST))


def can_train(name):
    """Whether --data may have this value."""
    return is_built(name) or (exists(name) and find(name).open is not None)


def exists(name):
    """Whether there is a module for a source `name`; it is not imported yet."""
    if "." not in name:
        return name in names()
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def find(name):
    """The Source called `name`. Raises InputError."""
    if is_built(name):
        name = "data.built"
    if not exists(name):
        raise InputError(f"source {name}: expected {expected()}")
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


def expected():
    """What --data takes, in words."""
    return (
        f"{', '.join(trainable())}, the folder of a built corpus or the dotted name of a module "
        "with a source of yours"
    )
