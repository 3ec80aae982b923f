"""Token shards on disk, in llm.c's format, so files are interchangeable with llm.c and
modded-nanogpt.

    256 x int32 little-endian header: [0] magic 20240520, [1] version, [2] token count, rest 0
    token count x token ids: uint16 in version 1, uint32 in version 2

Version 2 is for vocabularies of more than 65,536 ids and is ours; what llm.c itself writes for
Llama 3 (magic 20240801, version 7, uint32) is read as well. Every document starts with the
end-of-text token. Files are written aside and renamed, so a file under its final name is always
whole.
"""

import errno
import os
import stat
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np

from base import InputError, whole_file

MAGIC = 20240520
VERSIONS = {2: 1, 4: 2}  # bytes of a token -> version that is written
# What is read: (magic, version) -> type of tokens
READ = {(MAGIC, 1): "<u2", (MAGIC, 2): "<u4", (20240801, 7): "<u4"}
HEADER_BYTES = 256 * 4
SHARD_TOKENS = 100_000_000  # 200 MB a file


def read_shard(path, n_vocab=None):
    """Map a shard into memory, refusing anything that is not one. Where a file system does not
    map files, as some network and shared folders, it is read.

    path: file; n_vocab: if given, every token must be below it (reads the whole file once).
    Returns a read-only uint16 or uint32 array (n_tokens,). Raises InputError naming file, expected
    and found.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for a writer
            raise InputError(
                f"{path}: cannot read shard: expected a file, found a folder, pipe or device"
            )
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            header = f.read(HEADER_BYTES)
            dtype, n_tokens = _tokens_in(path, size, header)
            tokens = _map(f, dtype, n_tokens)
    except InputError:
        raise
    except (OSError, ValueError) as e:
        # ValueError: it became shorter just now, or there is a NUL in the path
        raise InputError(
            f"{path}: cannot read shard: {getattr(e, 'strerror', None) or e}"
        ) from None
    if n_vocab is not None and int(tokens.max()) >= n_vocab:
        at = int(np.argmax(tokens >= n_vocab))
        raise InputError(
            f"{path}: expected tokens below {n_vocab}, found {tokens[at]} at position {at}: "
            "was this shard made with another tokenizer?"
        )
    return tokens


def _tokens_in(path, size, header):
    """(type of tokens, their count) of a file of `size` bytes that begins with `header`; raises
    InputError where they disagree."""
    if len(header) < HEADER_BYTES:
        raise InputError(
            f"{path}: expected a {HEADER_BYTES}-byte shard header, found a file of {size} bytes"
        )
    magic, version, n_tokens = np.frombuffer(header, dtype="<i4", count=3).tolist()
    if magic not in {known for known, _ in READ}:
        raise InputError(f"{path}: expected magic {MAGIC}, found {magic}: not a token shard")
    if (magic, version) not in READ:
        known = " or ".join(str(known) for its, known in READ if its == magic)
        raise InputError(f"{path}: expected shard version {known}, found {version}")
    dtype = np.dtype(READ[magic, version])
    expected = HEADER_BYTES + dtype.itemsize * n_tokens
    if n_tokens < 1 or size != expected:
        raise InputError(
            f"{path}: expected {expected} bytes for {n_tokens} tokens, found {size}: "
            "truncated or altered; delete the file and prepare it again"
        )
    return dtype, n_tokens


def _map(f, dtype, n_tokens):
    """The tokens (n_tokens,) of an open shard, read-only. Raises OSError and ValueError."""
    try:
        return np.memmap(f, dtype=dtype, mode="r", offset=HEADER_BYTES, shape=(n_tokens,))
    except OSError as e:
        if e.errno not in (errno.ENODEV, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    f.seek(HEADER_BYTES)
    tokens = np.fromfile(f, dtype=dtype, count=n_tokens)
    if len(tokens) != n_tokens:
        raise ValueError("it became shorter")
    tokens.flags.writeable = False
    return tokens


class ShardWriter:
    """Stream tokens into `folder/prefix_000000.bin`, `_000001.bin`, ... of `shard_tokens` each.

    Used as a context manager: shards appear under their final names when whole, and an exception
    (disk full included, raised as InputError) leaves no partial file behind. `paths` lists what was
    written.
    """

    def __init__(self, folder, prefix, shard_tokens=SHARD_TOKENS, dtype=np.uint16):
        """dtype: of tokens, uint16 or uint32; a Tokenizer's says which its ids need."""
        self.folder = Path(folder)
        self.prefix = prefix
        self.shard_tokens = shard_tokens
        self.dtype = np.dtype(dtype)
        self.paths = []
        self.n_tokens = 0  # in shards that are whole
        self._file = None  # the shard being written
        self._count = 0  # tokens in it
        self._opened = ExitStack()  # to close the file and then give it its name

    def __enter__(self):
        self._final = self.folder  # what to name if the folder cannot be made
        self._guard(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        return self

    def write(self, tokens):
        """Append token ids: any integer sequence with values that fit the type of tokens."""
        tokens = np.asarray(tokens)
        most = np.iinfo(self.dtype).max
        if tokens.size and (tokens.min() < 0 or tokens.max() > most):
            bad = tokens[(tokens < 0) | (tokens > most)].flat[0]
            raise InputError(f"token {bad} does not fit the shard format's {self.dtype.name}")
        tokens = tokens.astype(self.dtype.newbyteorder("<"), copy=False)
        while len(tokens):
            if self._file is None:
                self._open()
            part = tokens[: self.shard_tokens - self._count]
            self._guard(self._file.write, part.tobytes())
            self._count += len(part)
            tokens = tokens[len(part) :]
            if self._count == self.shard_tokens:
                self._close()

    def __exit__(self, exc_type, exc, traceback):
        if self._file is None:
            return
        if exc_type is None:
            self._close()
        else:
            self._discard(exc)

    def _open(self):
        self._final = self.folder / f"{self.prefix}_{len(self.paths):06d}.bin"
        temp = self._opened.enter_context(whole_file(self._final))
        self._file = self._guard(lambda: self._opened.enter_context(open(temp, "xb")))
        self._count = 0
        self._guard(self._file.write, bytes(HEADER_BYTES))  # the header is known at the end

    def _close(self):
        header = np.zeros(256, dtype="<i4")
        header[:3] = MAGIC, VERSIONS[self.dtype.itemsize], self._count
        self._guard(self._file.seek, 0)
        self._guard(self._file.write, header.tobytes())
        self._guard(self._opened.close)
        self.paths.append(self._final)
        self.n_tokens += self._count
        self._file = None

    def _discard(self, error):
        # Closing flushes; on a full disk that fails again, and the file goes anyway
        with suppress(OSError):
            self._opened.__exit__(type(error), error, error.__traceback__)
        self._file = None

    def _guard(self, call, *args):
        """Run one file operation; on failure clean up and say it in one line."""
        try:
            return call(*args)
        except OSError as e:
            self._discard(e)
            raise InputError(
                f"{self._final}: cannot write shard: {e.strerror or e}; "
                "nothing was left under this name"
            ) from None
