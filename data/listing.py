"""Which files of a folder are read, and which are left out and why."""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from base.files import sha256_of


class Listing(NamedTuple):
    root: Path
    files: list  # paths below the root as str, in training order
    left_out: list  # (path below the root, why), of folders with a slash at the end


def files_under(root, why_not_folder, why_not_file):
    """The Listing of a folder. Its order depends on the paths alone.

    why_not_folder, why_not_file: functions of a Path that say why it is left out, or None. Raises
    OSError if the folder itself cannot be read; folders in it that cannot be are left out.
    """
    os.listdir(root)
    files = []
    left_out = []

    def leave_out(path, why, end=""):
        left_out.append((path.relative_to(root).as_posix() + end, why))

    def unreadable(error):
        leave_out(Path(error.filename), error.strerror, "/")

    for folder, subfolders, names in os.walk(root, onerror=unreadable):
        for name in list(subfolders):
            path = Path(folder, name)
            why = "a link to a folder" if path.is_symlink() else why_not_folder(path)
            if why:
                leave_out(path, why, "/")
                subfolders.remove(name)  # os.walk does not go there
        for name in names:
            path = Path(folder, name)
            if why := why_not_file(path):
                leave_out(path, why)
            else:
                files.append(path.relative_to(root).as_posix())
    return Listing(root, sorted(files, key=path_hash), sorted(left_out))


def path_hash(rel):
    return hashlib.sha256(os.fsencode(rel)).hexdigest()


def once_each(listing):
    """The same without files that are there already under another name, as a link or as a copy:
    neither must bring into validation what is trained on."""
    names = {}  # file -> its paths
    for rel in listing.files:
        names.setdefault(identity(listing.root / rel), []).append(rel)
    twice = []
    kept = []
    for paths in names.values():
        first, *others = sorted(paths, key=lambda rel: ((listing.root / rel).is_symlink(), rel))
        twice += [(rel, f"the same file as {first}") for rel in others]
        kept.append(listing.root / first)
    for paths in equal_files(kept):
        first, *others = sorted(path.relative_to(listing.root).as_posix() for path in paths)
        twice += [(rel, f"a copy of {first}") for rel in others]
    left = {rel for rel, _ in twice}
    files = [rel for rel in listing.files if rel not in left]
    return Listing(listing.root, files, sorted(listing.left_out + twice))


def without(listing, others):
    """The same without the files of another Listing, and copies of them, which are for
    validation."""
    theirs = {identity(others.root / rel) for rel in others.files}
    why = {rel: "is validation" for rel in listing.files if identity(listing.root / rel) in theirs}
    validation = [others.root / rel for rel in others.files]
    rest = {listing.root / rel: rel for rel in listing.files if rel not in why}
    for paths in equal_files([*rest, *validation]):
        if not rest.keys() >= set(paths):  # one of them is for validation
            why |= {rest[path]: "a copy of validation" for path in paths if path in rest}
    files = [rel for rel in listing.files if rel not in why]
    return Listing(listing.root, files, sorted([*listing.left_out, *why.items()]))


def identity(path):
    """What tells a file from any other, whatever its names are."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino


def equal_files(paths):
    """Groups of two or more files that are equal byte for byte, as lists of Paths.

    Sizes and beginnings are compared first, since they tell most files apart. What cannot be read
    is equal to nothing.
    """
    groups = [paths]
    for trait in size_of, beginning_of, sha256_of:
        finer = []
        for group in groups:
            alike = {}  # trait -> paths
            for path in group:
                with contextlib.suppress(OSError):
                    alike.setdefault(trait(path), []).append(path)
            finer += [found for found in alike.values() if len(found) > 1]
        groups = finer
    return groups


def size_of(path):
    return path.stat().st_size


def beginning_of(path):
    """Its first 4 KiB."""
    with open(path, "rb") as f:
        return f.read(4096)


def named(paths, most=3):
    """ "a, b, c and 4 more"."""
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    first = ", ".join(paths[:most])
    return first.encode(errors="backslashreplace").decode() + more  # old names are not UTF-8
