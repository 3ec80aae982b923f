"""From text to shards: a file, a folder, or Python's own standard library.

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
import sysconfig
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from base import InputError
from base.files import aside, difference, one_at_a_time, sha256_of, sweep, write_text

from .shards import ShardWriter
from .tokenizers import END_OF_TEXT, Tokenizer, make_tokenizer

VAL_FRACTION = 0.1
BPE_BYTES = 200_000_000  # a BPE vocabulary settles long before this much text
LAYOUT = 5  # change it when what is written below changes, so old caches are not read
# Left out of the standard library: what differs between distributions and versions, and what is
# generated: a file of prose, nearly half of the validation text, and character tables, so
# predictable that the few in the split decide it.
NOT_STDLIB = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "distutils",
    "turtledemo",
    "ensurepip",
    "tkinter",
    "pydoc_data",
    "encodings",
}


def prepare_text(source, tokenizer, cache):
    """Tokenize `source` into shards under `cache`; returns (folder, meta dict, Tokenizer).

    source: path of a file or folder, or "stdlib"; tokenizer: a name make_tokenizer knows; cache:
    folder. A folder is split by document: sorted by a hash of the relative path, files whose hash
    falls in the first tenth are validation. A single file is split by position, its last tenth
    being validation. Raises InputError for missing or empty text, text that changes while it is
    read, files that cannot be written, and a prepared corpus that is no longer what was written.
    """
    try:
        root, files = list_files(source)
        state = _state(root, files)
        key = hashlib.sha256(
            json.dumps([LAYOUT, str(source), tokenizer, *state]).encode()
        ).hexdigest()[:16]
        folder = (
            Path(cache) / f"{Path(source).stem[:40]}-{re.sub(r'[^0-9a-z]', '', tokenizer)}-{key}"
        )
        if not (folder / "meta.json").exists():
            _prepare(root, files, state, str(source), tokenizer, folder)
    except OSError as e:
        raise InputError(
            f"{e.filename or cache}: cannot prepare {source}: {e.strerror or e}; "
            "put this right and start again"
        ) from None
    return folder, *open_prepared(folder)


def open_prepared(folder):
    """(meta dict, Tokenizer) of a prepared corpus. Reads every file of it once; raises
    InputError."""
    again = f"delete {folder} and start again, which makes it anew from the text"
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        names = ["tokenizer.json"]
        for split in ("train", "val"):
            shards = meta[f"{split}_shards"]
            if not (isinstance(shards, list) and shards):
                raise ValueError(f"no {split} shards")
            for name in shards:  # a file beside meta.json: it must not lead elsewhere
                if not re.fullmatch(rf"{split}_[0-9]+\.bin", name):
                    raise ValueError(f"{name!r} is no name of a {split} shard")
            names += shards
        expected = {
            name: (int(meta["checksums"][name]["bytes"]), str(meta["checksums"][name]["sha256"]))
            for name in names
        }
        if not isinstance(meta["fingerprint"], str):
            raise ValueError("no fingerprint")
    except Exception as e:  # whatever it holds
        raise InputError(
            f"{folder / 'meta.json'}: cannot be read ({type(e).__name__}: {e}); {again}"
        ) from None
    try:
        for name in tqdm(
            expected,
            desc=f"comparing checksums of {folder.name}",
            unit="file",
            delay=2,
            disable=None,
        ):
            if problem := difference(folder / name, *expected[name]):
                raise InputError(f"{folder / name}: {problem}: not what was written; {again}")
        return meta, Tokenizer.from_json(
            (folder / "tokenizer.json").read_bytes(), folder / "tokenizer.json"
        )
    except OSError as e:
        raise InputError(
            f"{e.filename or folder}: cannot be read: {e.strerror or e}; {again}"
        ) from None


def _state(root, files):
    """What tells whether a file has changed: [(relative path, bytes, ns)]."""
    return [(rel, s.st_size, s.st_mtime_ns) for rel in files for s in [(root / rel).stat()]]


def _prepare(root, files, state, source, tokenizer, folder):
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
            _write(root, files, source, tokenizer, temp)
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


def list_files(source):
    """(root, relative paths in training order) of the text files in `source`; hidden and binary
    files left out."""
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        # _sysconfigdata_* holds the paths of the machine Python was built on
        keep = lambda p: p.suffix == ".py" and not p.name.startswith("_sysconfigdata")
        skip = NOT_STDLIB
    else:
        root, keep, skip = Path(source), is_text, ()
        if not os.path.exists(root):  # unlike Path.exists, False for what cannot be a path
            raise InputError(
                f"{source}: no such file or folder; --text expects a text file or a folder of them"
            )
        if root.is_file():
            if root.stat().st_size == 0:
                raise InputError(f"{source}: the file is empty")
            root.open().close()  # a reason why it cannot be read is worth more than "binary"
            if not is_text(root):
                raise InputError(f"{source}: expected UTF-8 text, found a binary file")
            return root.parent, [root.name]
        if not root.is_dir():
            raise InputError(
                f"{source}: expected a text file or a folder of them, found a pipe or device; "
                "save the text to a file first"
            )
        os.listdir(root)  # os.walk takes a folder that cannot be read for an empty one
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            d for d in subfolders if d not in skip and not d.startswith((".", "__pycache__"))
        ]
        found += [
            p.relative_to(root).as_posix()
            for n in names
            if not n.startswith(".")
            for p in [Path(folder, n)]
            if p.is_file() and keep(p) and p.stat().st_size
        ]
    if not found:
        raise InputError(f"{source}: found no text files in this folder")
    return root, sorted(found, key=_path_hash)


def is_text(path):
    """No NUL byte in the first 8 KiB, the rule git and grep use; an unreadable file is not text."""
    try:
        with open(path, "rb") as f:
            return b"\0" not in f.read(8192)
    except OSError:
        return False


def _path_hash(rel):
    return hashlib.sha256(os.fsencode(rel)).hexdigest()


def split_documents(root, files):
    """Assign every file, or every file's head and tail, to a split: list of (split, rel, first
    byte, end byte)."""
    threshold = f"{int(VAL_FRACTION * 16**8):08x}"
    splits = [
        ("val" if _path_hash(rel)[:8] < threshold else "train", rel, 0, (root / rel).stat().st_size)
        for rel in files
    ]
    if {s for s, *_ in splits} == {"train", "val"}:
        return splits
    # Too few files to divide: the last tenth of each one is validation.
    cut = [(rel, int(size * (1 - VAL_FRACTION)), size) for _, rel, _, size in splits]
    return [("train", rel, 0, at) for rel, at, _ in cut] + [
        ("val", rel, at, size) for rel, at, size in cut
    ]


def read_blocks(path, first, end, block=1 << 20):
    """Yield bytes [first, end) of a UTF-8 file as (str, starts a document?), about `block` bytes at
    a time.

    Blocks end after a newline or space where there is one, so that no token is cut; a byte range
    that begins or ends inside a character or a mark is moved to where that begins. Invalid UTF-8
    becomes U+FFFD.
    """
    mark = END_OF_TEXT.encode()

    def boundary(data, at):
        """The last position at or before `at` that is inside neither a mark nor a character."""
        inside = data.find(mark, max(0, at - len(mark) + 1), at + len(mark) - 1)
        at = inside if 0 <= inside < at else at
        return next(
            (i for i in range(at, max(-1, at - 4), -1) if i < len(data) and data[i] & 0xC0 != 0x80),
            at,
        )

    with open(path, "rb") as f:

        def move(at):
            before = max(0, at - 16)
            f.seek(before)
            data = f.read(32)
            return before + boundary(data, at - before) if at - before < len(data) else at

        first, end = move(first), move(end)
        f.seek(first)
        data, starts, done = b"", True, False
        while not done:
            read = f.read(min(block, end - f.tell()))
            data, done = (
                data + read,
                not read or f.tell() >= end,
            )  # no read: the file became shorter
            at = len(data)
            if not done:
                at = max(data.rfind(b"\n"), data.rfind(b" ") if at > 2 * block else -1) + 1
                if not at and len(data) > max(4 * block, 64):  # one endless word
                    at = boundary(data, len(data) - 16)
            for i, part in enumerate(data[:at].decode(errors="replace").split(END_OF_TEXT)):
                starts = starts or i > 0
                if part:
                    yield part, starts
                    starts = False
            data = data[at:]


def _write(root, files, source, tokenizer_name, folder):
    """Tokenize into `folder`, meta.json last."""
    splits = split_documents(root, files)
    total = sum(end - first for *_, first, end in splits)

    def texts():  # what a tokenizer may learn from: train only, but every character must have an id
        seen = 0
        for split, rel, first, end in splits:
            if split == "train" or tokenizer_name == "chars":
                for text, _ in read_blocks(root / rel, first, end):
                    yield text
                    seen += len(text)
                    if seen > BPE_BYTES and tokenizer_name != "chars":
                        return

    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"tokenizing {source}", disable=None)
    bar.set_postfix_str("learning the vocabulary")
    tokenizer = make_tokenizer(tokenizer_name, texts)
    bar.set_postfix_str("")
    digest = hashlib.sha256()
    meta = dict(
        source=source, tokenizer=tokenizer_name, n_vocab=tokenizer.n_vocab, files=len(files)
    )
    with ShardWriter(folder, "train") as train, ShardWriter(folder, "val") as val:
        writers = dict(train=train, val=val)
        pending = []

        def flush():
            arrays = tokenizer.encode([text for _, text, _ in pending])
            for (split, text, starts), ids in zip(pending, arrays):
                if starts:
                    writers[split].write([tokenizer.eot])
                writers[split].write(ids)
                n_bytes = len(text.encode())
                meta[f"{split}_bytes"] = meta.get(f"{split}_bytes", 0) + n_bytes
                bar.update(n_bytes)
            pending.clear()

        for split, rel, first, end in splits:
            digest.update(
                f"\0{split}\0".encode() + (os.fsencode(rel) if len(files) > 1 else b"") + b"\0"
            )
            for text, starts in read_blocks(root / rel, first, end):
                digest.update((b"\0" if starts else b"") + text.encode())
                pending.append((split, text, starts))
                if sum(len(t) for _, t, _ in pending) > 4 << 20 or len(pending) >= 256:
                    flush()
        flush()
    bar.close()
    for split, writer in writers.items():
        if not writer.n_tokens:
            raise InputError(f"{source}: too little text: the {split} split is empty")
        meta[f"{split}_tokens"] = writer.n_tokens
        meta[f"{split}_shards"] = [p.name for p in writer.paths]
    meta["fingerprint"] = digest.hexdigest()
    write_text(folder / "tokenizer.json", tokenizer.to_json())
    meta["checksums"] = {
        path.name: dict(bytes=path.stat().st_size, sha256=sha256_of(path))
        for path in sorted(folder.iterdir())
    }
    write_text(folder / "meta.json", json.dumps(meta, indent=1))
