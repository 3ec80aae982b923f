"""From text to shards: a file, a folder, or Python's own standard library.

Documents are files (or the parts of a file between `<|endoftext|>` marks). Everything streams: memory does not
grow with the corpus. The result is a folder of train and validation shards with `meta.json` beside them,
cached under a key made of the files' paths, sizes, times and the tokenizer, so a second start only looks.
"""

import hashlib
import json
import os
import shutil
import sysconfig
from pathlib import Path

from tqdm import tqdm

from .shards import InputError, ShardWriter
from .tokenizers import END_OF_TEXT, Tokenizer, make_tokenizer

VAL_FRACTION = 0.1
BPE_BYTES = 200_000_000  # a BPE vocabulary settles long before this much text
LAYOUT = 4  # change it when what is written below changes, so old caches are not read
# Left out of the standard library: what differs between distributions and versions, and what is generated: a file of
# prose, nearly half of the validation text, and character tables, so predictable that the few in the split decide it.
NOT_STDLIB = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "distutils", "turtledemo",
              "ensurepip", "tkinter", "pydoc_data", "encodings"}


def prepare_text(source, tokenizer, cache):
    """Tokenize `source` into shards under `cache`; returns (folder, meta dict, Tokenizer).

    source: path of a file or folder, or "stdlib"; tokenizer: a name make_tokenizer knows; cache: folder.
    A folder is split by document: sorted by a hash of the relative path, files whose hash falls in the first
    tenth are validation. A single file is split by position, its last tenth being validation.
    Raises InputError for missing or empty text.
    """
    root, files = list_files(source)
    signature = [LAYOUT, str(source), tokenizer]
    signature += [(rel, s.st_size, s.st_mtime_ns) for rel in files for s in [(root / rel).stat()]]
    key = hashlib.sha256(json.dumps(signature).encode()).hexdigest()[:16]
    folder = Path(cache) / f"{Path(source).stem}-{tokenizer.replace(':', '')}-{key}"
    if not (folder / "meta.json").exists():
        aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        try:
            _write(root, files, str(source), tokenizer, aside)
            if not (folder / "meta.json").exists():  # else another process has just prepared the same
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(aside, folder)
        except OSError as e:
            raise InputError(f"{aside}: cannot prepare {source}: {e.strerror or e}") from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    meta = json.loads((folder / "meta.json").read_text())
    return folder, meta, Tokenizer.from_json((folder / "tokenizer.json").read_text())


def list_files(source):
    """(root, relative paths in training order) of the text files in `source`; hidden and binary files left out."""
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        # _sysconfigdata_* holds the paths of the machine Python was built on
        keep = lambda p: p.suffix == ".py" and not p.name.startswith("_sysconfigdata")
        skip = NOT_STDLIB
    else:
        root, keep, skip = Path(source), is_text, ()
        if not os.path.exists(root):  # unlike Path.exists, False for what cannot be a path
            raise InputError(f"{source}: no such file or folder; --text expects a text file or a folder of them")
        if root.is_file():
            if root.stat().st_size == 0:
                raise InputError(f"{source}: the file is empty")
            if not is_text(root):
                raise InputError(f"{source}: expected UTF-8 text, found a binary file")
            return root.parent, [root.name]
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [d for d in subfolders if d not in skip and not d.startswith((".", "__pycache__"))]
        found += [p.relative_to(root).as_posix() for n in names if not n.startswith(".")
                  for p in [Path(folder, n)] if p.is_file() and keep(p) and p.stat().st_size]
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
    """Assign every file, or every file's head and tail, to a split: list of (split, rel, first byte, end byte)."""
    threshold = f"{int(VAL_FRACTION * 16**8):08x}"
    splits = [("val" if _path_hash(rel)[:8] < threshold else "train", rel, 0, (root / rel).stat().st_size)
              for rel in files]
    if {s for s, *_ in splits} == {"train", "val"}:
        return splits
    # Too few files to divide: the last tenth of each one is validation.
    cut = [(rel, int(size * (1 - VAL_FRACTION)), size) for _, rel, _, size in splits]
    return [("train", rel, 0, at) for rel, at, _ in cut] + [("val", rel, at, size) for rel, at, size in cut]


def read_blocks(path, first, end, block=1 << 20):
    """Yield bytes [first, end) of a UTF-8 file as (str, starts a document?), about `block` bytes at a time.

    Blocks end after a newline or space where there is one, so that no token is cut; a byte range that begins or ends
    inside a character or a mark is moved to where that begins. Invalid UTF-8 becomes U+FFFD.
    """
    mark = END_OF_TEXT.encode()

    def boundary(data, at):
        """The last position at or before `at` that is inside neither a mark nor a character."""
        inside = data.find(mark, max(0, at - len(mark) + 1), at + len(mark) - 1)
        at = inside if 0 <= inside < at else at
        return next((i for i in range(at, max(-1, at - 4), -1) if i < len(data) and data[i] & 0xC0 != 0x80), at)

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
            data, done = data + read, not read or f.tell() >= end  # no read: the file became shorter
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

    bar = tqdm(total=total, unit="B", unit_scale=True, desc=f"tokenizing {source}",
               disable=None)
    bar.set_postfix_str("learning the vocabulary")
    tokenizer = make_tokenizer(tokenizer_name, texts)
    bar.set_postfix_str("")
    digest = hashlib.sha256()
    meta = dict(source=source, tokenizer=tokenizer_name, n_vocab=tokenizer.n_vocab, files=len(files))
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
            digest.update(f"\0{split}\0".encode() + (os.fsencode(rel) if len(files) > 1 else b"") + b"\0")
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
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    (folder / "meta.json").write_text(json.dumps(meta, indent=1))
