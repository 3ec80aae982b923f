"""The Python files of the standard library: text that every machine has, so it needs no network."""

import sysconfig
from pathlib import Path

from data.prepare import files_under, open_files
from data.sources import Source

# Left out: what differs between distributions and versions, and what is generated: a file of prose,
# nearly half of the validation text, and character tables, so predictable that the few in the split
# decide it.
LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "distutils",
    "turtledemo",
    "ensurepip",
    "tkinter",
    "pydoc_data",
    "encodings",
}


def is_source(path):
    """_sysconfigdata_* holds the paths of the machine that Python was built on."""
    return path.suffix == ".py" and not path.name.startswith("_sysconfigdata")


def list_files():
    """(root, relative paths in training order)."""
    root = Path(sysconfig.get_path("stdlib"))
    return root, files_under(root, is_source, skip=LEFT_OUT)


def open_stdlib(config, cache):
    return open_files("stdlib", list_files, config.tokenizer, cache)


SOURCE = Source("the Python files of Python's standard library", open_stdlib)
