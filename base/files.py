"""Files that survive: written aside and renamed, compared with their checksums, prepared by one
process at a time."""

import hashlib
import os
import re
import secrets
import shutil
import sys
import time
from contextlib import contextmanager, suppress

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

ABANDONED = 24 * 3600  # seconds after which nobody can still be writing what lies aside


def aside(path):
    """A name beside `path` that no other process, on this machine or another, will choose."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")


def sweep(folder, seconds=ABANDONED):
    """Delete what killed processes left aside in `folder`, a day later; at once with seconds=None,
    for the one process that may write there."""
    for path in folder.glob("*.tmp"):
        with suppress(OSError):
            left = seconds is None or time.time() - path.lstat().st_mtime > seconds
            if left and re.fullmatch(r".+\.[0-9a-f]{8}\.tmp", path.name):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def whole_file(path):
    """Yield a path beside `path` to write to; what is there at the end becomes `path`.

    It is on the disk before it gets its name, and permissions are those of a new file. When the
    block or the disk fails nothing is left behind, and what `path` held before stays. Serves a file
    (replaced) and a folder (`path` must not exist, or be an empty folder). Raises OSError.
    """
    temp = aside(path)
    try:
        yield temp
        files = [p for p in temp.rglob("*") if p.is_file()] if temp.is_dir() else [temp]
        for file in files:
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
        os.replace(temp, path)
    finally:
        if temp.is_dir():
            shutil.rmtree(temp, ignore_errors=True)
        with suppress(OSError):
            temp.unlink()


def write_text(path, text):
    """Write a small file that is there whole, on the disk, or not at all. Raises OSError."""
    with whole_file(path) as temp:
        temp.write_text(text, encoding="utf-8")


def sha256_of(path):
    """The file's SHA-256 in hexadecimal, what `sha256sum` prints. Raises OSError."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def difference(path, size=None, sha256=None):
    """What tells `path` from a file of this size in bytes and SHA-256, cheapest test first, or
    None. Raises OSError."""
    if not path.exists():
        return "not there"
    found = path.stat().st_size
    if size is not None and found != size:
        return f"expected {size} bytes, found {found}"
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        return f"expected sha256 {sha256}, found {found}"


@contextmanager
def one_at_a_time(folder):
    """Let one of the processes that want to prepare `folder` do it while the others wait here.

    It saves work and nothing depends on it: on a network file system it may let everyone through,
    so whoever comes through looks first whether the work is done, and writes aside. The lock of a
    killed process is free.
    """
    fd = None
    try:
        with suppress(OSError, AttributeError):  # no locks on this file system, or no fcntl
            fd = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(
                    f"note: {folder}: another process is preparing this; waiting for it",
                    file=sys.stderr,
                    flush=True,
                )
                fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        if fd is not None:
            os.close(fd)
