"""The documents of a part of a recipe: which files they are in, and reading them in order."""

import dataclasses
import glob
import itertools
import os
from functools import cache, partial
from pathlib import Path

from base import InputError

from . import sources
from .clean import join_rows
from .encodings import NotText, examine
from .listing import files_under
from .sources import Files, text
from .sources.text import list_files, sign_of, why_not_file, why_not_folder


@cache
def readers():
    """{ending: read_file} of every source that reads files."""
    found = {}
    for source in sources.all_of_them().values():
        found |= dict.fromkeys(source.endings, source.read_file)
    return found


def reader_of(path):
    """The function that reads a file, by the end of its name; text where there is no other."""
    name = path.name.lower()
    fits = [ending for ending in readers() if name.endswith(ending)]
    return readers()[max(fits, key=len, default=".txt")]


def locate(part, cache):
    """The Files of a part; cache: folder for what is fetched. Raises InputError."""
    if part.hub:
        files = sources.find("hub").locate(part, cache)
    elif part.source:
        source = sources.find(part.source) if sources.exists(part.source) else None
        if source is None or source.locate is None:
            can = [name for name, found in sources.all_of_them().items() if found.locate]
            raise InputError(f"source {part.source}: expected {', '.join(can)}, or a path")
        files = source.locate(part, cache)
    else:
        files = files_of_path(part)
    if not files.paths:
        raise InputError(f"{part.name}: no files in {part.path or part.hub or part.source}")
    return files


def files_of_path(part):
    """The Files of a path: one, those of a folder, or those that fit a pattern; sorted by name.

    Of several, those that are no text are left out, and about["left_out"] says why. Equal files are
    all read: that is for deduplication to find and to count.
    """
    path = Path(part.base, os.path.expanduser(part.path))
    if not os.path.exists(path) and glob.has_magic(str(path)):
        paths = [Path(found) for found in glob.glob(str(path), recursive=True)]
        paths = sorted(found for found in paths if not why_not_file(found))
        if not paths:
            raise InputError(f"{path}: no file fits this pattern")
        root = Path(os.path.commonpath([found.parent for found in paths]))
        names = [found.relative_to(root).as_posix() for found in paths]
        left_out = []
    elif path.is_dir():
        if what := sign_of(path):
            raise InputError(f"{path}: expected a folder of text, found {what}")
        listing = files_under(path, partial(why_not_folder, cache=Path()), why_not_file)
        root, names, left_out = path, sorted(listing.files), listing.left_out
    else:
        listing = list_files(path, option="a source")
        return Files([listing.root / name for name in listing.files], listing.files, {})

    kept = []
    for name in names:
        why = None
        if reader_of(root / name) is text.read_file:
            why = why_no_text(root / name, part.encoding)
        if why:
            left_out.append((name, why))
        else:
            kept.append(name)
    if not kept:
        why = f": {left_out[0][0]} is {left_out[0][1]}" if left_out else ""
        raise InputError(f"{path}: no files that can be read{why}")
    about = dict(left_out=sorted(map(list, left_out))) if left_out else {}
    return Files([root / name for name in kept], kept, about)


def why_no_text(path, encoding):
    try:
        examine(path, encoding)
    except NotText as e:
        return str(e)
    except OSError as e:
        return e.strerror


def documents(part, files):
    """Yield the Documents of a part in order. Raises InputError."""
    found = itertools.chain.from_iterable(
        reader_of(path)(path, name, part_with(part, files))
        for path, name in zip(files.paths, files.names)
    )
    by_rows = files.rows_are_lines if part.rows_are_lines is None else part.rows_are_lines
    if by_rows:
        found = join_rows(found)
    return itertools.islice(found, part.limit)


def part_with(part, files):
    """The part with the column that its source has the text in, unless it says so itself."""
    return dataclasses.replace(part, column=part.column or files.column)
