"""A text file of your own, or a folder of them: --text says which.

Documents are files, or the parts of a file between `<|endoftext|>` marks.
"""

import os
from functools import partial
from pathlib import Path

from base import InputError
from data.prepare import files_under, open_files
from data.sources import Source


def is_text(path):
    """No NUL byte in the first 8 KiB, the rule git and grep use; an unreadable file is not text."""
    try:
        with open(path, "rb") as f:
            return b"\0" not in f.read(8192)
    except OSError:
        return False


def list_files(path):
    """(root, relative paths in training order) of the text in a file or folder; hidden, empty and
    binary files are left out. Raises InputError and OSError."""
    if not os.path.exists(path):  # unlike Path.exists, False for what cannot be a path
        raise InputError(
            f"{path}: no such file or folder; --text expects a text file or a folder of them"
        )
    if path.is_file():
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")
        path.open().close()  # a reason why it cannot be read is worth more than "binary"
        if not is_text(path):
            raise InputError(f"{path}: expected UTF-8 text, found a binary file")
        return path.parent, [path.name]
    if not path.is_dir():
        raise InputError(
            f"{path}: expected a text file or a folder of them, found a pipe or device; "
            "save the text to a file first"
        )
    return path, files_under(path, is_text)


def open_text(config, cache):
    if not config.text:
        raise InputError("--data text: expected --text with a text file or a folder of them")
    path = Path(config.text)
    return open_files(str(path), partial(list_files, path), config.tokenizer, cache)


SOURCE = Source("a text file or folder of your own, which --text names", open_text)
