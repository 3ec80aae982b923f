"""From text files to shards, for every source that has files.

Documents are files (or the parts of a file between `<|endoftext|>` marks). Everything streams:
memory does not grow with the corpus. The result is a folder of train and validation shards with
`meta.json` beside them, cached under a key made of the files' paths, sizes, times and the
tokenizer, so a second start only reads it.

`meta.json` holds the size and SHA-256 of every file, and each start compares all of them: whatever
happened to the shards since they were written is noticed, but not a change of `meta.json` made to
go with it, nor one during a run.
"""

import hashlib
import json
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from base import InputError, write_text
from base.files import aside, difference, one_at_a_time, sha256_of, sweep

from .dataset import Dataset
from .shards import ShardWriter
from .tokenizers import END_OF_TEXT, Tokenizer, make_tokenizer

VAL_FRACTION = 0.1
BPE_BYTES = 200_000_000  # a BPE vocabulary settles long before this much text
LAYOUT = 6  # change it when what is written below changes, so old caches are not read
MARK = END_OF_TEXT.encode()


def open_files(name, list_files, tokenizer, cache):
    """The Dataset of text files, prepared if that has not been done before; see prepare_files."""
    folder, meta, tok = prepare_files(name, list_files, tokenizer, cache)
    return Dataset(
        name=name,
        train=[folder / shard for shard in meta["train_shards"]],
        val=[folder / shard for shard in meta["val_shards"]],
        n_vocab=tok.n_vocab,
        eot=tok.eot,
        fingerprint=meta["fingerprint"],
        folder=folder,
        load_tokenizer=lambda: tok,
    )


def prepare_files(name, list_files, tokenizer, cache):
    """Tokenize text files into shards under `cache`; returns (folder, meta dict, Tokenizer).

    name: of the source, for messages, the key and meta.json; list_files: function that returns
    (root, relative paths in training order); tokenizer: a name make_tokenizer knows; cache: folder.
    Several files are split by document: those whose hash of the relative path falls in the first
    tenth are validation. A single file is split by position, its last tenth being validation.
    Raises InputError for missing or empty text, text that changes while it is read, files that
    cannot be written, and a prepared corpus that is no longer what was written.
    """
    try:
        root, files = list_files()
        if not files:
            raise InputError(f"{name}: found no text files in this folder")
        state = _state(root, files)
        key = json.dumps([LAYOUT, name, tokenizer, *state])
        key = hashlib.sha256(key.encode()).hexdigest()[:16]
        short = re.sub(r"[^0-9a-z]", "", tokenizer)
        folder = Path(cache) / f"{Path(name).stem[:40]}-{short}-{key}"
        if not (folder / "meta.json").exists():
            _prepare(name, root, files, state, tokenizer, folder)
    except OSError as e:
        raise InputError(
            f"{e.filename or cache}: cannot prepare {name}: {e.strerror or e}; "
            "put this right and start again"
        ) from None
    meta, tok = open_prepared(folder)
    return folder, meta, tok


def open_prepared(folder):
    """(meta dict, Tokenizer) of a prepared corpus. Reads every file of it once; raises
    InputError."""
    again = f"delete {folder} and start again, which makes it anew from the text"
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        expected = _expected_files(meta)
    except Exception as e:  # whatever it holds
        raise InputError(
            f"{folder / 'meta.json'}: cannot be read ({type(e).__name__}: {e}); {again}"
        ) from None
    bar = tqdm(
        expected.items(),
        desc=f"comparing checksums of {folder.name}",
        unit="file",
        delay=2,
        disable=None,
    )
    path = folder / "tokenizer.json"
    try:
        for name, (size, sha256) in bar:
            if problem := difference(folder / name, size, sha256):
                raise InputError(f"{folder / name}: {problem}: not what was written; {again}")
        return meta, Tokenizer.from_json(path.read_bytes(), path)
    except OSError as e:
        raise InputError(
            f"{e.filename or folder}: cannot be read: {e.strerror or e}; {again}"
        ) from None


def _expected_files(meta):
    """{name: (bytes, sha256)} of the files that meta.json stands for; an exception of any kind
    where it is not as it was written."""
    names = ["tokenizer.json"]
    for split in ("train", "val"):
        shards = meta[f"{split}_shards"]
        if not (isinstance(shards, list) and shards):
            raise ValueError(f"no {split} shards")
        for name in shards:
            # A file beside meta.json: it must not lead elsewhere
            if not re.fullmatch(rf"{split}_[0-9]+\.bin", name):
                raise ValueError(f"{name!r} is no name of a {split} shard")
        names += shards
    if not isinstance(meta["fingerprint"], str):
        raise ValueError("no fingerprint")
    expected = {}
    for name in names:
        checksum = meta["checksums"][name]
        expected[name] = int(checksum["bytes"]), str(checksum["sha256"])
    return expected


def _state(root, files):
    """What tells whether a file has changed: [(relative path, bytes, ns)]."""
    state = []
    for rel in files:
        stat = (root / rel).stat()
        state.append((rel, stat.st_size, stat.st_mtime_ns))
    return state


def _prepare(name, root, files, state, tokenizer, folder):
    """Write the corpus aside and rename it into `folder`, meta.json last: without it a folder
    counts for nothing.

    However many processes do so at once, they write the same, so each rename leaves a whole file of
    the same content.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent)
    temp = aside(folder)
    try:
        with one_at_a_time(folder):
            if (folder / "meta.json").exists():  # another process has just prepared it
                return
            _write(name, root, files, tokenizer, temp)
            if changed := sorted(set(state) - set(_state(root, files))):
                raise InputError(
                    f"{root / changed[0][0]}: changed while it was read; start again when nothing "
                    "writes to it any more"
                )
            folder.mkdir(exist_ok=True)  # another process that failed may have taken it away
            for path in sorted(temp.iterdir(), key=lambda path: path.name == "meta.json"):
                os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
        with suppress(OSError):
            folder.rmdir()  # if nothing came of it


# --------------------------------------------------------------------------------------------------
# Which files, and which part of them for what


def files_under(root, keep, skip=()):
    """Relative paths, in training order, of the files under a folder for which keep(path) is true.

    Empty and hidden files are left out, and folders that are hidden or named in skip. Raises
    OSError if the folder cannot be read.
    """
    os.listdir(root)  # os.walk takes a folder that cannot be read for an empty one
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            d for d in subfolders if d not in skip and not d.startswith((".", "__pycache__"))
        ]
        for name in names:
            path = Path(folder, name)
            hidden = name.startswith(".")
            if not hidden and path.is_file() and keep(path) and path.stat().st_size:
                found.append(path.relative_to(root).as_posix())
    return sorted(found, key=_path_hash)


def _path_hash(rel):
    return hashlib.sha256(os.fsencode(rel)).hexdigest()


class Part(NamedTuple):
    """Bytes [first, end) of a file, for a split."""

    split: str
    rel: str  # path below the root
    first: int
    end: int


def split_documents(root, files):
    """Assign every file, or every file's head and tail, to a split: list of Part."""
    threshold = f"{int(VAL_FRACTION * 16**8):08x}"
    whole = []
    for rel in files:
        split = "val" if _path_hash(rel)[:8] < threshold else "train"
        whole.append(Part(split, rel, 0, (root / rel).stat().st_size))
    if {part.split for part in whole} == {"train", "val"}:
        return whole

    # Too few files to divide: the last tenth of each one is validation
    heads = []
    tails = []
    for part in whole:
        cut = int(part.end * (1 - VAL_FRACTION))
        heads.append(Part("train", part.rel, 0, cut))
        tails.append(Part("val", part.rel, cut, part.end))
    return heads + tails


# --------------------------------------------------------------------------------------------------
# Reading


def read_blocks(path, first, end, block=1 << 20):
    """Yield bytes [first, end) of a UTF-8 file as (str, starts a document?), about `block` bytes at
    a time.

    Blocks end after a newline or space where there is one, so that no token is cut; a byte range
    that begins or ends inside a character or a mark is moved to where that begins. Invalid UTF-8
    becomes U+FFFD.
    """
    with open(path, "rb") as f:
        first = _move(f, first)
        end = _move(f, end)
        f.seek(first)
        data = b""
        starts = True  # whether what comes next begins a document
        done = False
        while not done:
            read = f.read(min(block, end - f.tell()))
            data += read
            done = not read or f.tell() >= end  # nothing read: the file became shorter
            at = len(data) if done else _cut(data, block)
            for i, part in enumerate(data[:at].decode(errors="replace").split(END_OF_TEXT)):
                if i > 0:
                    starts = True
                if part:
                    yield part, starts
                    starts = False
            data = data[at:]


def _move(f, at):
    """The position in a file, moved back to where the character or mark around it begins."""
    before = max(0, at - 16)
    f.seek(before)
    data = f.read(32)
    if at - before >= len(data):  # the end of the file
        return at
    return before + _boundary(data, at - before)


def _boundary(data, at):
    """The last position at or before `at` that is inside neither a mark nor a character."""
    inside = data.find(MARK, max(0, at - len(MARK) + 1), at + len(MARK) - 1)
    if 0 <= inside < at:
        at = inside
    # Bytes 10xxxxxx continue a character, three of them at most
    for i in range(at, max(-1, at - 4), -1):
        if i < len(data) and data[i] & 0xC0 != 0x80:
            return i
    return at


def _cut(data, block):
    """How much of the data can be passed on before more is read; 0 if it takes more to tell."""
    at = data.rfind(b"\n") + 1
    if len(data) > 2 * block:  # a long line
        at = max(at, data.rfind(b" ") + 1)
    if at == 0 and len(data) > max(4 * block, 64):  # one endless word
        at = _boundary(data, len(data) - 16)
    return at


# --------------------------------------------------------------------------------------------------
# Writing


def _write(name, root, files, tokenizer_name, folder):
    """Tokenize into `folder`, meta.json last."""
    parts = split_documents(root, files)
    total = sum(part.end - part.first for part in parts)
    n_bytes = dict(train=0, val=0)  # of text
    digest = hashlib.sha256()
    with (
        tqdm(
            total=total, unit="B", unit_scale=True, desc=f"tokenizing {name}", disable=None
        ) as bar,
        ShardWriter(folder, "train") as train,
        ShardWriter(folder, "val") as val,
    ):
        bar.set_postfix_str("learning the vocabulary")
        all_of_it = tokenizer_name == "chars"  # every character must have an id
        tokenizer = make_tokenizer(tokenizer_name, lambda: _texts(root, parts, all_of_it))
        bar.set_postfix_str("")

        writers = dict(train=train, val=val)
        for blocks in _batches(_blocks(root, parts, digest, len(files) > 1)):
            _encode(blocks, tokenizer, writers, n_bytes)
            bar.update(sum(n_bytes.values()) - bar.n)

    meta = dict(source=name, tokenizer=tokenizer_name, n_vocab=tokenizer.n_vocab, files=len(files))
    for split, writer in writers.items():
        if not writer.n_tokens:
            raise InputError(f"{name}: too little text: the {split} split is empty")
        meta[f"{split}_bytes"] = n_bytes[split]
        meta[f"{split}_tokens"] = writer.n_tokens
        meta[f"{split}_shards"] = [path.name for path in writer.paths]
    meta["fingerprint"] = digest.hexdigest()
    write_text(folder / "tokenizer.json", tokenizer.to_json())
    meta["checksums"] = {
        path.name: dict(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in sorted(folder.iterdir())
    }
    write_text(folder / "meta.json", json.dumps(meta, indent=1))


def _encode(blocks, tokenizer, writers, n_bytes):
    """Write the tokens of a list of Blocks; n_bytes counts their text."""
    arrays = tokenizer.encode([block.text for block in blocks])
    for block, ids in zip(blocks, arrays):
        if block.starts:
            writers[block.split].write([tokenizer.eot])
        writers[block.split].write(ids)
        n_bytes[block.split] += len(block.text.encode())


def _texts(root, parts, all_of_it):
    """Yield the text a tokenizer learns from: of the train split as much as BPE_BYTES, or all."""
    seen = 0
    for part in parts:
        if part.split == "train" or all_of_it:
            for text, _ in read_blocks(root / part.rel, part.first, part.end):
                yield text
                seen += len(text)
                if seen > BPE_BYTES and not all_of_it:
                    return


class Block(NamedTuple):
    split: str
    text: str
    starts: bool  # a document begins with it


def _blocks(root, parts, digest, names):
    """Yield the corpus as Blocks; `digest` takes in all of it, with file names if names."""
    for part in parts:
        digest.update(f"\0{part.split}\0".encode())
        digest.update((os.fsencode(part.rel) if names else b"") + b"\0")
        for text, starts in read_blocks(root / part.rel, part.first, part.end):
            digest.update((b"\0" if starts else b"") + text.encode())
            yield Block(part.split, text, starts)


def _batches(blocks):
    """Yield lists of Blocks to encode at once: 256, or 4 Mi characters. A list is good until the
    next one is asked for."""
    batch = []
    size = 0
    for block in blocks:
        batch.append(block)
        size += len(block.text)
        if size > 4 << 20 or len(batch) >= 256:
            yield batch
            batch.clear()  # for the sake of memory
            size = 0
    if batch:
        yield batch
