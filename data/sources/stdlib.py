"""The Python files of the standard library: text that every machine has, so it needs no network."""

import platform
import sysconfig
from pathlib import Path

from data.listing import Listing, files_under
from data.prepare import open_files
from data.sources import Files, Source

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


def why_not_folder(path):
    """What keeps a folder out: a reason or None."""
    if path.name in LEFT_OUT or path.name.startswith((".", "__pycache__")):
        return "not for training"


def why_not_file(path):
    """The same; _sysconfigdata_* holds the paths of the machine that Python was built on."""
    if path.suffix != ".py" or path.name.startswith((".", "_sysconfigdata")):
        return "not for training"
    if not path.is_file() or not path.stat().st_size:
        return "empty"


def list_files():
    """The Listing of the sources; what is left out of it is nobody's concern."""
    root = Path(sysconfig.get_path("stdlib"))
    return Listing(root, files_under(root, why_not_folder, why_not_file).files, [])


def open_stdlib(config, cache):
    return open_files("stdlib", list_files, config.encoder, cache)


def locate(part, cache):
    """The Files of it, for a build."""
    listing = list_files()
    paths = [listing.root / rel for rel in listing.files]
    about = dict(licence="PSF-2.0", revision=f"Python {platform.python_version()}")
    return Files(paths, listing.files, about)


SOURCE = Source("the Python files of Python's standard library", open_stdlib, locate=locate)
