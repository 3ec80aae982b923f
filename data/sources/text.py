"""A text file of your own, or a folder of them: --text says which, --val-text which to validate on.

Documents are files, or the parts of a file between `<|endoftext|>` marks.
"""

import os
import stat
import tempfile
from functools import partial
from pathlib import Path

from base import InputError
from data.encodings import NotText, examine, write_utf8
from data.listing import Listing, files_under, once_each, without
from data.prepare import open_files, read_blocks
from data.sources import Document, Source

# What a folder holds that is not to be read, all of these files -> what the folder is
SIGNS = [
    (("log.txt", "metrics.jsonl"), "a run"),
    (("model.safetensors",), "a model"),
    (("model.safetensors.index.json",), "a model"),
    (("state.json", "state.safetensors"), "a checkpoint"),
    (("meta.json", "train_000000.bin"), "prepared data"),
    (("CACHEDIR.TAG",), "a cache"),
    (("pyvenv.cfg",), "a virtual environment"),
]
BY_NAME = {"node_modules": "node_modules", "__pycache__": "a cache"}


def sign_of(folder):
    """What a folder is instead of text, or None."""
    for names, what in SIGNS:
        if all(os.path.isfile(folder / name) for name in names):  # False where it may not look
            return what


def why_not_folder(folder, cache):
    """Why a subfolder is left out, or None; cache: the program's own."""
    if folder.name.startswith("."):
        return "hidden"
    if folder.resolve() == cache:
        return "a cache"
    return BY_NAME.get(folder.name) or sign_of(folder)


def why_not_file(path):
    if path.name.startswith("."):
        return "hidden"
    try:
        found = path.stat()
    except FileNotFoundError:
        return "a link to nothing"
    except OSError as e:
        return e.strerror
    if not stat.S_ISREG(found.st_mode):
        return "a pipe or device"
    if not found.st_size:
        return "empty"


def list_files(path, cache=Path(".cache"), option="--text"):
    """The Listing of a file or a folder; cache: the folder that is not read though it is inside;
    option: that gave the path. Raises InputError and OSError."""
    if not os.path.exists(path):  # unlike Path.exists, False for what cannot be a path
        raise InputError(
            f"{path}: no such file or folder; {option} expects a text file or a folder of them"
        )
    if path.is_file():
        if path.stat().st_size == 0:
            raise InputError(f"{path}: the file is empty")
        return Listing(path.parent, [path.name], [])
    if not path.is_dir():
        raise InputError(
            f"{path}: expected a text file or a folder of them, found a pipe or device; "
            "save the text to a file first"
        )
    if what := sign_of(path):
        raise InputError(f"{path}: expected a folder of text, found {what}; name the text itself")
    return once_each(files_under(path, partial(why_not_folder, cache=cache), why_not_file))


def open_text(config, cache):
    if not config.text:
        raise InputError("--data text: expected --text with a text file or a folder of them")
    # --cache-dir has compiled code beside the prepared data
    whole_cache = (cache.parent if cache.name == "data" else cache).resolve()
    text = Path(config.text)
    list_val = None
    list_text = partial(list_files, text, whole_cache)
    if config.val_text:
        list_val = partial(list_files, Path(config.val_text), whole_cache, "--val-text")

        def list_text():
            kept = without(list_files(text, whole_cache), list_val())
            if not kept.files:
                raise InputError(
                    f"--val-text {config.val_text}: holds all of --text {text}; nothing is left "
                    "to train on"
                )
            return kept

    return open_files(str(text), list_text, config.encoder, cache, list_val, config.encoding)


MOST_CHARS = 1 << 20  # of one document in a build: longer ones are divided at the ends of lines


def read_file(path, name, part):
    """Yield the Documents of a file, for a build. Raises InputError."""
    try:
        found = examine(path, part.encoding)
    except (NotText, OSError) as e:
        raise InputError(f"{path}: expected text, found a file that is {e}") from None
    number = 0
    whole = []
    size = 0
    for text, starts in decoded(path, found.encoding):
        if whole and (starts or size + len(text) > MOST_CHARS):
            number += 1
            yield Document("".join(whole), f"{name}:{number}", {})
            whole = []
            size = 0
        whole.append(text)
        size += len(text)
    if whole:
        # A file that is one document is called as the file
        yield Document("".join(whole), f"{name}:{number + 1}" if number else name, {})


def decoded(path, encoding):
    """Yield (str, starts a document?) of a file in any encoding, as read_blocks() does."""
    if encoding in ("utf-8", "utf-8-sig"):
        yield from read_blocks(path, 3 if encoding == "utf-8-sig" else 0, path.stat().st_size)
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "utf-8.txt")
        write_utf8(path, encoding, copy)
        yield from read_blocks(copy, 0, copy.stat().st_size)


SOURCE = Source(
    "a text file or folder of your own, which --text names",
    open_text,
    endings=(".txt",),
    read_file=read_file,
)
