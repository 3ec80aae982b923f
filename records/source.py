"""The source that a run was made from, packed once and named by its digest.

A run's folder has an archive of every file of ours that training stands on. Its digest, which is
the SHA-256 of the tar in it before compression, stands in the header of log.txt and in config.json:
    bzip2 -dc source.tar.bz2 | sha256sum
The same files give the same tar, whatever their dates, owners and modes. Of this source bzip2 makes
an archive in 40 ms that is 5% smaller than what xz makes in 220, so that a run need not wait for it
and a record can have the same bytes.
"""

import bz2
import functools
import hashlib
import io
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from base import InputError

ARCHIVE = "source.tar.bz2"
# Of these folders every .py file is packed: tracks, templates and sources of data are found by
# their names, so imports alone do not tell what a run needs
ROOMS = ("base", "data", "inference", "kernels", "models", "optim", "runtime", "tracks")
FILES = (
    "train_gpt.py",
    "door.py",
    "run.sh",
    "requirements*.txt",
    "runtime/hardware.toml",
    "kernels/*.c",
    "kernels/*.h",
    # What training takes from this folder; the rest of it only reads results
    "records/__init__.py",
    "records/metrics.py",
    "records/source.py",
)
MOST_BYTES = 50_000_000  # of an unpacked archive; ours have half a million
NAMED = re.compile(r"source: (source[\w.-]*), sha256 ([0-9a-f]{64})")


class Source(NamedTuple):
    digest: str  # SHA-256 of the tar, in hexadecimal
    archive: bytes  # the tar, compressed


@functools.cache
def pack_source(root):
    """The Source in `root`, as it is when this is first called in a process. Raises OSError."""
    files = {}
    for pattern in (*FILES, *(f"{room}/**/*.py" for room in ROOMS)):
        for path in Path(root).glob(pattern):
            name = path.relative_to(root).as_posix()
            if "/." not in name:  # no editor's copies in hidden folders
                files[name] = path.read_bytes()
    return source_of(files)


def source_of(files):
    """The Source of {name: content as bytes}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(files):
            entry = tarfile.TarInfo(name)  # of nobody, in 1970
            entry.size = len(files[name])
            entry.mode = 0o755 if name.endswith(".sh") else 0o644
            tar.addfile(entry, io.BytesIO(files[name]))
    content = buffer.getvalue()
    return Source(hashlib.sha256(content).hexdigest(), bz2.compress(content))


def header_line(source, name=ARCHIVE):
    """How a log names its source; name: of the archive beside the log."""
    return f"source: {name}, sha256 {source.digest}"


def named_in(line):
    """(name of the archive, digest) if this line of a log is a header_line, else None."""
    match = NAMED.fullmatch(line)
    return match and match.groups()


def unpacked(path, most):
    """The content of a .bz2 file, as bytes. Raises InputError where it is none, or more than
    `most` bytes."""
    try:
        unpacker = bz2.BZ2Decompressor()
        content = unpacker.decompress(path.read_bytes(), most)
    except (OSError, ValueError) as e:
        raise InputError(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    if not unpacker.eof:
        raise InputError(f"{path}: cut short, or more than {most:,} bytes; restore it")
    return content


def digest_of(path):
    """What a log that belongs to this archive says. Raises InputError where it is none."""
    return hashlib.sha256(unpacked(path, MOST_BYTES)).hexdigest()


def files_in(path):
    """{name: content as bytes} of an archive. Raises InputError where it is none."""
    files = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(unpacked(path, MOST_BYTES))) as tar:
            for entry in tar:
                if entry.isfile():
                    files[entry.name] = tar.extractfile(entry).read()
    except tarfile.TarError as e:
        raise InputError(f"{path}: no archive of source files: {e}") from None
    return files


def beside(folder, name=ARCHIVE):
    """The archive of the run in `folder`: in it, or above it where a record keeps one for all its
    seeds. None if there is none."""
    for place in (folder, folder.parent):
        if (place / name).is_file():
            return place / name
    return None


def check(folder, name, digest):
    """The archive that the log in `folder` names, or None where it is not there. Raises InputError
    where it is not the source that the log tells of."""
    path = beside(folder, name)
    if path is None:
        return None
    found = digest_of(path)
    if found != digest:
        raise InputError(
            f"{path}: its digest is {found}, and {folder / 'log.txt'} names {digest}: "
            "this is not the source that the run was made from; restore it"
        )
    return path
