"""What a file is, before it is trained on: text in which encoding, or why it is none.

A byte-order mark decides; else what --encoding says; else it is UTF-8 if it is valid as such, and
otherwise what charset-normalizer takes it for. What cannot be decoded becomes U+FFFD: that is
counted, and more than one in a hundred characters are not trained on.
"""

import codecs
import json
from pathlib import Path
from typing import NamedTuple

MOST_REPLACED = 0.01  # of a file's characters
BLOCK = 1 << 20
SAMPLE = 1 << 14  # bytes that an encoding is guessed from
COMMON = ("cp1252", "cp1251")  # the encodings of text beside UTF-8 that are met most
HEAD = 8192  # a NUL byte in there says binary, the rule git and grep use

MARKS = [  # those of UTF-32 first: they begin like those of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
]

# Files that hold text which has to be taken out first: (first bytes, endings, what it is)
NOT_YET = [
    (b"%PDF-", (".pdf",), "a PDF; save its text to a file first, for example with pdftotext"),
    (b"PK\3\4", (".zip",), "a zip archive, as .docx, .odt and .epub are; save its text to a file"),
    (b"\x1f\x8b", (".gz", ".tgz"), "compressed; unpack it first, with gunzip"),
    (b"\x28\xb5\x2f\xfd", (".zst",), "compressed; unpack it first, with unzstd"),
    (b"\xfd7zXZ\0", (".xz", ".txz"), "compressed; unpack it first, with unxz"),
    (b"BZh", (".bz2",), "compressed; unpack it first, with bunzip2"),
    (b"\x04\x22\x4d\x18", (".lz4",), "compressed; unpack it first, with unlz4"),
    (b"7z\xbc\xaf", (".7z",), "compressed; unpack it first, with 7z"),
    (b"PAR1", (".parquet",), "a parquet file; save the column with the text to a file first"),
    (b"{\\rtf", (".rtf",), "a document with markup; save it as plain text first"),
]
JSON_LINES = "JSON lines; save the field with the text to a file first"


class NotText(Exception):
    """Why a file is not trained on, in a few words; what comes after a semicolon is what to do."""


class Found(NamedTuple):
    encoding: str  # Python's name of it
    chars: int
    replaced: int  # of them U+FFFD
    remark: str = ""  # what the user should know besides


def known(name):
    """Whether --encoding may have this value: Python has a codec of text by that name."""
    try:
        return not name or "".encode(name) is not None
    except (LookupError, ValueError):
        return False


def examine(path, encoding=""):
    """Found of a file; encoding: what --encoding says. Raises NotText and OSError."""
    with open(path, "rb") as f:
        head = f.read(HEAD)
    refuse_formats(path, head)
    marked = [name for mark, name in MARKS if head.startswith(mark)]
    if marked or encoding:
        found = decoded_as(path, (marked or [encoding])[0])
        if not marked and encoding and not same_codec(encoding, "utf-8"):
            if not found.replaced and is_utf8_beyond_ascii(path):
                found = found._replace(remark=f"read as {encoding}, but is valid UTF-8")
        return within_bounds(found)
    if b"\0" in head:
        raise NotText(
            "binary; text in UTF-16 without a byte-order mark takes --encoding utf-16-le or -be"
        )
    try:
        return within_bounds(decoded_as(path, "utf-8", "strict"))
    except UnicodeDecodeError:
        return guessed(path)


def refuse_formats(path, head):
    """Raises NotText for a file whose text has to be taken out of it first."""
    name = Path(path).name.lower()
    for first, endings, what in NOT_YET:
        if head.startswith(first) or name.endswith(endings):
            raise NotText(what)
    if name.endswith((".jsonl", ".ndjson", ".jsonlines")):
        raise NotText(JSON_LINES)
    if name.endswith(".json") and len(head.splitlines()) > 1:
        try:
            objects = [json.loads(line) for line in head.splitlines()[:2]]
        except (ValueError, RecursionError):
            return  # a file of JSON is text like any source
        if all(isinstance(value, dict) for value in objects):
            raise NotText(JSON_LINES)


def texts(path, encoding, errors="replace"):
    """Yield the decoded text of a file, a block at a time. Raises UnicodeDecodeError if errors is
    "strict"."""
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    with open(path, "rb") as f:
        while data := f.read(BLOCK):
            yield decoder.decode(data)
    yield decoder.decode(b"", final=True)


def decoded_as(path, encoding, errors="replace"):
    chars = 0
    replaced = 0
    for text in texts(path, encoding, errors):
        chars += len(text)
        replaced += text.count("\ufffd")
    return Found(encoding, chars, replaced)


def within_bounds(found):
    """The same, unless too much of it is replaced. Raises NotText."""
    if too_many_replaced(found):
        raise NotText(
            f"{found.replaced / found.chars:.0%} of its characters cannot be read as "
            f"{found.encoding}; give its --encoding"
        )
    return found


def too_many_replaced(found):
    return found.replaced > MOST_REPLACED * found.chars


def guessed(path):
    """Found of a file that is not valid UTF-8. Raises NotText."""
    as_utf8 = decoded_as(path, "utf-8")
    sample = telling_part(path)
    # A few bad bytes among valid characters beyond ASCII: damaged UTF-8, not another encoding
    text = sample.decode(errors="replace")
    bad = text.count("\ufffd")
    beyond_ascii = sum(c > "\x7f" for c in text)
    if beyond_ascii > 2 * bad:
        return within_bounds(as_utf8)

    import charset_normalizer  # late: few texts need it

    matches = list(charset_normalizer.from_bytes(sample))
    if matches:
        encoding = likeliest(matches)
        found = decoded_as(path, encoding)
        if not looks_binary(sample, encoding) and not too_many_replaced(found):
            words = sample.decode(encoding, errors="replace").split()
            words = [word for word in words if not word.isascii()]
            return found._replace(remark=f"read as {encoding} ({' '.join(words[:3])[:40]})")
    if looks_binary(sample, "latin-1"):
        raise NotText("binary")
    if not too_many_replaced(as_utf8):
        return as_utf8
    raise NotText("in an encoding that was not recognized; give its --encoding")


def likeliest(matches):
    """The encoding of charset-normalizer's matches, which come best first.

    On a short text its statistics do not tell some from the commonest ones: those win a tie. Of
    several that make the same of the sample, the rest of the file may be different in one.
    """
    best = matches[0]
    for name in COMMON:
        for match in matches:
            tied = match.chaos <= best.chaos + 0.1 and match.coherence >= best.coherence - 0.05
            if tied and name in match.could_be_from_charset:
                return name
    return best.encoding


def telling_part(path):
    """Some lines of a file that are not ASCII, as bytes."""
    found = b""
    with open(path, "rb") as f:
        for line in iter(lambda: f.readline(SAMPLE), b""):
            if not line.isascii():
                found += line
                if len(found) >= SAMPLE:
                    break
    return found


def looks_binary(sample, encoding):
    """Whether there are control characters that text does not have."""
    text = sample.decode(encoding, errors="replace")
    control = sum(c < " " and c not in "\t\n\v\f\r\x1b" for c in text)
    return control > 0.005 * len(text)


def same_codec(a, b):
    return codecs.lookup(a).name == codecs.lookup(b).name


def is_utf8_beyond_ascii(path):
    """Whether a file is valid UTF-8 and not only ASCII."""
    beyond = False
    try:
        for text in texts(path, "utf-8", "strict"):
            beyond = beyond or not text.isascii()
    except UnicodeDecodeError:
        return False
    return beyond


def write_utf8(path, encoding, to):
    """Write a file's text as UTF-8, without a byte-order mark. Raises OSError."""
    with open(to, "w", encoding="utf-8", errors="replace", newline="") as f:
        for text in texts(path, encoding):
            f.write(text)
