"""From text files to shards, for every source that has files.

Documents are files (or the parts of a file between `<|endoftext|>` marks). Everything streams:
memory does not grow with the corpus. The result is a folder of train and validation shards with
`meta.json` beside them, cached under a key made of what two texts cannot share (the files' whole
paths, inodes, sizes and times of change) and of the tokenizer, so a second start only reads it.

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
from .encodings import NotText, examine, write_utf8
from .listing import named, path_hash
from .shards import ShardWriter
from .tokenizers import END_OF_TEXT, Tokenizer, make_tokenizer, on_disk

VAL_FRACTION = 0.1
LEAST_VAL, MOST_VAL = 0.05, 0.15  # the fractions that whole files may make of it
BPE_BYTES = 200_000_000  # a BPE vocabulary settles long before this much text
LAYOUT = 7  # change it when what is written below changes, so old caches are not read
MARK = END_OF_TEXT.encode()


def open_files(name, list_files, tokenizer, cache, list_val=None, encoding=""):
    """The Dataset of text files, prepared if that has not been done before; see prepare_files."""
    folder, meta, tok = prepare_files(name, list_files, tokenizer, cache, list_val, encoding)
    about = {key: meta.get(key) for key in ("tokenizer", "split", "parts", "encodings", "left_out")}
    return Dataset(
        name=name,
        train=[folder / shard for shard in meta["train_shards"]],
        val=[folder / shard for shard in meta["val_shards"]],
        n_vocab=tok.n_vocab,
        eot=tok.eot,
        fingerprint=meta["fingerprint"],
        folder=folder,
        load_tokenizer=lambda: tok,
        about=about,
        notes=meta["notes"],
    )


def prepare_files(name, list_files, tokenizer, cache, list_val=None, encoding=""):
    """Tokenize text files into shards under `cache`; returns (folder, meta dict, Tokenizer).

    name: of the source, for messages and meta.json; list_files: function that returns the Listing
    of the files; tokenizer: what make_tokenizer takes; cache: folder; list_val: the same as
    list_files for files to validate on, without which a tenth of the bytes is held out (see
    split_documents); encoding: of files without a byte-order mark, empty to find out. Raises
    InputError for missing or empty text, text that changes while it is read, files that cannot be
    written, and a prepared corpus that is no longer what was written.
    """
    try:
        listings = [list_files()]
        if list_val:
            listings.append(list_val())
        if not listings[0].files:
            _refuse_all(name, listings[0], [])
        state = _state(listings)
        tokenizer = on_disk(tokenizer)
        given = tokenizer.endswith(".json")  # by its content, wherever the file lies
        encoder = sha256_of(Path(tokenizer)) if given else tokenizer
        key = json.dumps([LAYOUT, encoder, encoding, len(listings[0].files), *state])
        key = hashlib.sha256(key.encode()).hexdigest()[:16]
        short = "given" if given else re.sub(r"[^0-9a-z]", "", tokenizer)
        folder = Path(cache) / f"{Path(name).stem[:40]}-{short}-{key}"
        if not (folder / "meta.json").exists():
            _prepare(name, listings, state, tokenizer, encoding, folder)
    except OSError as e:
        raise InputError(
            f"{e.filename or cache}: cannot prepare {name}: {e.strerror or e}; "
            "put this right and start again"
        ) from None
    meta, tok = open_prepared(folder)

    # What is left out by its name may be others today than when it was prepared
    for listing in listings:
        meta["left_out"] += listing.left_out
    if meta["left_out"]:
        meta["notes"].insert(1, left_out_line(meta["left_out"]))
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
    if not all(isinstance(meta[name], list) for name in ("parts", "left_out", "notes")):
        raise ValueError("no account of the files")
    expected = {}
    for name in names:
        checksum = meta["checksums"][name]
        expected[name] = int(checksum["bytes"]), str(checksum["sha256"])
    return expected


def _state(listings):
    """What tells whether a file has changed: [(whole path, inode, bytes, ns)].

    A program can set the time of a change back, but not ctime.
    """
    state = []
    for listing in listings:
        root = os.path.realpath(listing.root)
        for rel in listing.files:
            path = os.path.join(root, rel)
            stat = os.stat(path)
            state.append((path, stat.st_ino, stat.st_size, stat.st_ctime_ns))
    return state


def _prepare(name, listings, state, tokenizer, encoding, folder):
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
            _write(name, listings, tokenizer, encoding, temp)
            if changed := sorted(set(state) - set(_state(listings))):
                raise InputError(
                    f"{changed[0][0]}: changed while it was read; start again when nothing "
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


class TextFile(NamedTuple):
    """A file of UTF-8: its name, and the bytes of it that are text."""

    rel: str  # path below the root
    path: Path  # what to read: of another encoding, a copy
    first: int
    end: int

    @property
    def size(self):
        return self.end - self.first


class Part(NamedTuple):
    """Bytes [first, end) of a file, for a split."""

    split: str
    rel: str
    path: Path
    first: int
    end: int


def part_of(file, split):
    """All of a TextFile, for a split."""
    return Part(split, file.rel, file.path, file.first, file.end)


def split_documents(files):
    """Divide TextFiles, in the order of path_hash: (list of Part, in words what was done).

    Validation is whole files where some make between a twentieth and 15% of the bytes: those whose
    hash falls into the first tenth, so that a file stays on its side when others come and go, and
    more while there are too few. Else it is the last tenth of each file.
    """
    total = sum(file.size for file in files)
    threshold = f"{int(VAL_FRACTION * 16**8):08x}"
    val = set()
    size = 0  # of validation
    for file in files:
        wanted = path_hash(file.rel)[:8] < threshold or size < LEAST_VAL * total
        if wanted and size + file.size <= MOST_VAL * total:
            val.add(file.rel)
            size += file.size
    if size >= LEAST_VAL * total:
        parts = [part_of(file, "val" if file.rel in val else "train") for file in files]
        return parts, f"{len(val)} whole files, {size / total:.1%} of the bytes"

    heads = []
    tails = []
    for file in files:
        cut = file.first + int(file.size * (1 - VAL_FRACTION))
        heads.append(Part("train", file.rel, file.path, file.first, cut))
        tails.append(Part("val", file.rel, file.path, cut, file.end))
    each = f" of each of the {len(files)} files" if len(files) > 1 else ""
    return heads + tails, f"the last tenth{each}"


# --------------------------------------------------------------------------------------------------
# What the files are


def read_listing(listing, encoding, folder):
    """(list of TextFile, [(path, Found)], [(path, why)] of what is no text) of a Listing's files.

    Files that are not in UTF-8 are copied in UTF-8 into the folder. Raises OSError where that
    fails; files that cannot be read are left out, unless it is the only one.
    """
    files = []
    found = []
    left_out = []
    bar = tqdm(listing.files, desc=f"looking into {listing.root}", delay=2, disable=None)
    for rel in bar:
        path = listing.root / rel
        try:
            one = examine(path, encoding)
        except NotText as e:
            left_out.append((rel, str(e)))
            continue
        except OSError as e:
            if len(listing.files) == 1:
                raise
            left_out.append((rel, e.strerror))
            continue
        found.append((rel, one))
        first = 0
        if one.encoding == "utf-8-sig":
            first = 3
        elif one.encoding != "utf-8":
            folder.mkdir(parents=True, exist_ok=True)
            copy = folder / f"{len(found)}.txt"
            write_utf8(path, one.encoding, copy)
            path = copy
        end = path.stat().st_size
        if end > first:
            files.append(TextFile(rel, path, first, end))
        else:
            left_out.append((rel, "empty"))
    return files, found, left_out


def amount(files):
    """In words: how many TextFiles, and how large together."""
    size = tqdm.format_sizeof(sum(file.size for file in files), "B")
    return f"{len(files)} file{'s' * (len(files) > 1)}, {size}"


def left_out_line(left_out):
    """In words: how many files and folders are left out, the first few by name, hidden ones last.

    left_out: [(path, why)]; what is to be done about it is left out as well.
    """
    ordered = sorted(map(tuple, left_out), key=lambda item: (item[1] == "hidden", item))
    folders = sum(path.endswith("/") for path, _ in ordered)
    counts = [(len(ordered) - folders, "file"), (folders, "folder")]
    counted = [f"{n} {what}{'s' * (n > 1)}" for n, what in counts if n]
    items = [f"{path} ({why.split(';')[0]})" for path, why in ordered]
    return f"left out {' and '.join(counted)}: {named(items)}"


def remarks(found):
    """Lines about files whose encoding was guessed, and about characters that were replaced.

    found: [(path, Found)].
    """
    lines = []
    for encoding in sorted({one.encoding for _, one in found if one.remark}):
        alike = [(rel, one) for rel, one in found if one.remark and one.encoding == encoding]
        remark = alike[0][1].remark
        names = named([rel for rel, _ in alike])
        lines.append(f"{names}: {remark}; --encoding NAME says otherwise")
    damaged = [(rel, one) for rel, one in found if one.replaced]
    if damaged:
        names = named([rel for rel, _ in damaged])
        replaced = sum(one.replaced for _, one in damaged)
        share = replaced / sum(one.chars for _, one in damaged)
        lines.append(
            f"{names}: {replaced:,} characters ({share:.2%}) cannot be read and are U+FFFD"
        )
    return lines


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


def _write(name, listings, tokenizer_name, encoding, folder):
    """Tokenize into `folder`, meta.json last."""
    copies = folder / "copies"  # of files that are not in UTF-8
    read = []
    for i, listing in enumerate(listings):
        read.append(read_listing(listing, encoding, copies / str(i)))
    files = read[0][0]
    for listing, (texts, _, no_text) in zip(listings, read):
        if not texts:
            _refuse_all(name, listing, no_text)
    if len(read) == 1:
        parts, said = split_documents(files)
    else:
        parts = [part_of(file, "train") for file in files]
        parts += [part_of(file, "val") for file in read[1][0]]
        said = f"--val-text, {amount(read[1][0])}"
    total = sum(part.end - part.first for part in parts)
    n_bytes = dict(train=0, val=0)  # of text
    digest = hashlib.sha256()
    desc = f"tokenizing {name}"
    with tqdm(total=total, unit="B", unit_scale=True, desc=desc, disable=None) as bar:
        bar.set_postfix_str("learning the vocabulary")
        all_of_it = tokenizer_name == "chars"  # every character must have an id
        tokenizer = make_tokenizer(tokenizer_name, lambda: _texts(parts, all_of_it))
        bar.set_postfix_str("")

        with (
            ShardWriter(folder, "train", dtype=tokenizer.dtype) as train,
            ShardWriter(folder, "val", dtype=tokenizer.dtype) as val,
        ):
            writers = dict(train=train, val=val)
            for blocks in _batches(_blocks(parts, digest, len(files) > 1)):
                _encode(blocks, tokenizer, writers, n_bytes)
                bar.update(sum(n_bytes.values()) - bar.n)

    shutil.rmtree(copies, ignore_errors=True)

    meta = dict(source=name, tokenizer=tokenizer_name, n_vocab=tokenizer.n_vocab, files=len(files))
    meta |= _notes(name, read, said)
    meta["parts"] = [(part.split, part.rel, part.first, part.end) for part in parts]
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


def _refuse_all(name, listing, no_text):
    """Raise InputError for a Listing in which there is no text."""
    if len(no_text) == 1 and not listing.left_out:
        [(rel, why)] = no_text
        raise InputError(f"{listing.root / rel}: expected text, found a file that is {why}")
    everything = listing.left_out + no_text
    why = f"; {left_out_line(everything)}" if everything else ""
    raise InputError(f"{name}: found no text files in {listing.root}{why}")


def _notes(name, read, said):
    """What meta.json tells about the files, and the lines that a start says of them.

    read: what read_listing returned for each Listing; said: how they were split.
    """
    found = []
    left_out = []
    for _, theirs, no_text in read:
        found += theirs
        left_out += no_text
    lines = [f"{name}: {amount(read[0][0])}; validation: {said}"]
    encodings = [(rel, one.encoding) for rel, one in found if one.encoding != "utf-8"]
    return dict(split=said, left_out=left_out, encodings=encodings, notes=lines + remarks(found))


def _encode(blocks, tokenizer, writers, n_bytes):
    """Write the tokens of a list of Blocks; n_bytes counts their text."""
    arrays = tokenizer.encode([block.text for block in blocks])
    for block, ids in zip(blocks, arrays):
        if block.starts:
            writers[block.split].write([tokenizer.eot])
        writers[block.split].write(ids)
        n_bytes[block.split] += len(block.text.encode())


def _texts(parts, all_of_it):
    """Yield the text a tokenizer learns from: of the train split as much as BPE_BYTES, or all."""
    seen = 0
    for part in parts:
        if part.split == "train" or all_of_it:
            for text, _ in read_blocks(part.path, part.first, part.end):
                yield text
                seen += len(text)
                if seen > BPE_BYTES and not all_of_it:
                    return


class Block(NamedTuple):
    split: str
    text: str
    starts: bool  # a document begins with it


def _blocks(parts, digest, names):
    """Yield the corpus as Blocks; `digest` takes in all of it, with file names if names."""
    for part in parts:
        digest.update(f"\0{part.split}\0".encode())
        digest.update((os.fsencode(part.rel) if names else b"") + b"\0")
        for text, starts in read_blocks(part.path, part.first, part.end):
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
