"""JSON lines, one document each, plain or compressed: .jsonl, .ndjson, .json, with .zst or .gz."""

import gzip
import io
import json
import zlib
from contextlib import contextmanager

from base import InputError
from data.sources import Document, Source

ID = ("id", "doc_id", "uuid", "url", "path")  # fields that name a document, the first there is
ABOUT = ("date", "timestamp", "url", "title", "licence", "license", "language")


class Unzstd(io.RawIOBase):
    """What is compressed in a file; EOFError where that is cut short, which a stream reader of the
    library takes for the end."""

    def __init__(self, raw):
        import zstandard

        # Some sets are packed with --long=31
        self.unpacker = zstandard.ZstdDecompressor(max_window_size=2**31)
        self.raw = raw
        self.frame = None  # that is being unpacked
        self.packed = b""
        self.waiting = memoryview(b"")

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.waiting:
            self.packed = self.packed or self.raw.read(1 << 17)
            if not self.packed:
                if self.frame is not None:
                    raise EOFError("the compressed data ends too early")
                return 0
            self.frame = self.frame or self.unpacker.decompressobj()
            self.waiting = memoryview(self.frame.decompress(self.packed))
            self.packed = b""
            if self.frame.eof:
                self.packed = self.frame.unused_data
                self.frame = None
        n = min(len(buffer), len(self.waiting))
        buffer[:n] = self.waiting[:n]
        self.waiting = self.waiting[n:]
        return n


@contextmanager
def opened(path):
    """A file, or what is compressed in it, as text of UTF-8."""
    name = path.name.lower()
    with open(path, "rb") as raw:
        if name.endswith(".zst"):
            unpacked = io.BufferedReader(Unzstd(raw), 1 << 20)
        elif name.endswith(".gz"):
            unpacked = gzip.open(raw)
        else:
            unpacked = raw
        with io.TextIOWrapper(unpacked, encoding="utf-8-sig", errors="strict", newline="\n") as f:
            yield f


def read_file(path, name, part):
    """Yield the Documents of a file. Raises InputError."""
    column = part.column or "text"
    number = 0
    try:
        with opened(path) as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield document(json.loads(line), column, f"{name}:{number}")
    except KeyError as e:
        raise InputError(f"{path}: line {number}: no field {column}; found {e.args[0]}") from None
    except (json.JSONDecodeError, TypeError, RecursionError) as e:
        raise InputError(
            f"{path}: line {number}: expected JSON lines with a text as {column}: {e}"
        ) from None
    except ValueError as e:
        raise InputError(f"{path}: after line {number}: expected text in UTF-8: {e}") from None
    except (OSError, EOFError, zlib.error) as e:
        raise InputError(f"{path}: corrupt or cut short after line {number}: {e}") from None
    except Exception as e:
        if type(e).__name__ != "ZstdError":
            raise
        raise InputError(f"{path}: corrupt or cut short after line {number}: {e}") from None


def document(said, column, where):
    """A Document of a parsed line or row. KeyError names the columns that there are."""
    if not isinstance(said, dict):
        raise TypeError(f"found {type(said).__name__}, expected an object")
    if column not in said:
        raise KeyError(", ".join(map(str, said)) or "none")
    text = said[column]
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise TypeError(f"{column} is {type(text).__name__}, expected text")
    about = {}
    for key in ABOUT:
        if said.get(key) is not None:
            key, value = dict(timestamp="date", license="licence").get(key, key), said[key]
            about.setdefault(key, str(value))
    found = [str(said[key]) for key in ID if said.get(key) is not None]
    return Document(text, found[0] if found else where, about)


SOURCE = Source(
    "JSON lines, plain or compressed",
    endings=(".jsonl", ".ndjson", ".jsonlines")
    + tuple(
        f".{kind}.{packed}" for kind in ("jsonl", "ndjson", "json") for packed in ("zst", "gz")
    ),
    read_file=read_file,
)
