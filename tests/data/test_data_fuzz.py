"""Whatever is in a file, its reader gives what it says or one InputError: shards, tokenizers,
meta.json, checked.json.

The same mutations run under hypothesis, which shrinks what fails, and many more times in the slow
test.
"""

import json
import os
import random
import shutil
import struct
import time
import tracemalloc

import numpy as np
import pytest
from corpora import prepare_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from base import InputError
from base.files import sha256_of
from data import shards
from data.prepare import open_prepared
from data.shards import HEADER_BYTES, MAGIC, ShardWriter, read_shard
from data.sources import fineweb10B as fineweb
from data.tokenizers import PATTERN, Tokenizer, make_tokenizer

FAST = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
RANDOM = st.randoms(use_true_random=False)


def one_line(e, name):
    assert "\n" not in str(e) and str(name) in str(e)


# ---- shards


def mutated_shard(r):
    """Bytes of a shard in which nothing, or any of header, size and single bits, is wrong."""
    n = r.choice([0, 1, 2, 3, r.randrange(600)])
    words = [MAGIC, 1, n] + [0] * 253
    for i in range(3):
        if r.random() < 0.15:
            words[i] = r.choice(
                [0, 1, -1, n - 1, n + 1, 2**31 - 1, -(2**31), MAGIC, r.randrange(-(2**31), 2**31)]
            )
    if r.random() < 0.1:
        words[r.randrange(3, 256)] = r.randrange(-(2**31), 2**31)
    content = bytearray(struct.pack("<256i", *words) + r.randbytes(2 * n))
    if r.random() < 0.2:
        del content[r.randrange(len(content) + 1) :]
    if r.random() < 0.2:
        content += r.randbytes(r.choice([1, 2, 7, 1024]))
    for _ in range(r.choice([0, 0, 0, 1, 8])):
        if content:
            content[r.randrange(min(len(content), r.choice([12, 2000])))] ^= 1 << r.randrange(8)
    return bytes(content)


class Shard:
    """One temporary file for many contents; notes what read_shard maps of it."""

    def __init__(self, path, monkeypatch):
        self.path, self.fd = path, os.open(path, os.O_RDWR | os.O_CREAT)
        self.mapped, self.accepted, memmap = [], 0, np.memmap

        def noted(file, *args, **kwargs):
            size = np.dtype(kwargs["dtype"]).itemsize
            self.mapped.append(kwargs["offset"] + size * kwargs["shape"][0])
            return memmap(file, *args, **kwargs)

        monkeypatch.setattr(shards.np, "memmap", noted)

    def check(self, content, n_vocab):
        """Read `content` back: exactly the tokens of a whole shard, else one line; nothing else
        is ever mapped."""
        os.pwrite(self.fd, content, 0)
        os.ftruncate(self.fd, len(content))
        self.mapped.clear()
        words = struct.unpack("<3i", content[:12]) if len(content) >= HEADER_BYTES else None
        size, kind = {(MAGIC, 1): (2, "H"), (MAGIC, 2): (4, "I")}.get((words or ())[:2], (0, ""))
        whole = size and words[2] > 0 and len(content) == HEADER_BYTES + size * words[2]
        good = whole and (
            n_vocab is None
            or max(struct.unpack(f"<{words[2]}{kind}", content[HEADER_BYTES:])) < n_vocab
        )
        try:
            tokens = read_shard(self.path, n_vocab)
        except InputError as e:
            one_line(e, self.path)
            assert not good
        else:
            assert good and tokens.tobytes() == content[HEADER_BYTES:] and len(tokens) == words[2]
            self.accepted += 1
        assert self.mapped == ([len(content)] if whole else [])


@pytest.fixture
def shard(tmp_path, monkeypatch):
    shard = Shard(tmp_path / "x.bin", monkeypatch)
    yield shard
    os.close(shard.fd)


@settings(FAST, max_examples=200)
@given(RANDOM, st.sampled_from([None, 1, 30_000, 65_536]))
def test_shards(shard, r, n_vocab):
    shard.check(mutated_shard(r), n_vocab)


@pytest.mark.slow
def test_shards_120_000_times(shard):
    start, r = time.perf_counter(), random.Random(0)
    for _ in range(120_000):
        shard.check(mutated_shard(r), r.choice([None, 1, 30_000, 65_536]))
    print(
        f"120,000 inputs, {shard.accepted:,} of them shards, in {time.perf_counter() - start:.0f} s"
    )
    assert 10_000 < shard.accepted < 80_000


@pytest.mark.parametrize("n_tokens", [2**31 - 1, 2**30, -1])
def test_a_lying_header_allocates_nothing(tmp_path, n_tokens):
    path = tmp_path / "x.bin"
    path.write_bytes(struct.pack("<256i", MAGIC, 1, n_tokens, *[0] * 253) + bytes(2000))
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            read_shard(path, 50257)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_the_largest_shard_is_mapped_not_read(tmp_path):
    """4 GB, of which the file system stores a page."""
    path = tmp_path / "x.bin"
    path.write_bytes(struct.pack("<256i", MAGIC, 1, 2**31 - 1, *[0] * 253))
    os.truncate(path, HEADER_BYTES + 2 * (2**31 - 1))
    tokens = read_shard(path)
    assert len(tokens) == 2**31 - 1 and tokens[-1] == 0


def test_a_shard_that_becomes_shorter_while_it_is_opened(tmp_path, monkeypatch):
    with ShardWriter(tmp_path, "t") as writer:
        writer.write(range(5000))
    counted = shards._tokens_in

    def shorten(*args):
        os.truncate(writer.paths[0], 2000)
        return counted(*args)

    monkeypatch.setattr(shards, "_tokens_in", shorten)
    with pytest.raises(InputError) as e:
        read_shard(writer.paths[0])
    one_line(e.value, writer.paths[0])


def test_what_is_no_file(tmp_path):
    """Nothing is waited for, nothing endless is read; links to shards are shards."""
    with ShardWriter(tmp_path, "t") as writer:
        writer.write([1, 2, 3])
    for name, target in dict(
        good=writer.paths[0],
        self="self",
        dangling="nowhere",
        folder=".",
        zero="/dev/zero",
        null="/dev/null",
    ).items():
        (tmp_path / name).symlink_to(target)
    os.mkfifo(tmp_path / "pipe")
    assert read_shard(tmp_path / "good").tolist() == [1, 2, 3]
    for path in (
        "self",
        "dangling",
        "folder",
        "zero",
        "null",
        "pipe",
        "t_000000.bin/below",
        "x" * 300,
        "nul\0byte",
    ):
        with pytest.raises(InputError, match="cannot read shard") as e:
            read_shard(tmp_path / path)
        one_line(e.value, tmp_path)


# ---- JSON

JUNK = [
    None,
    True,
    0,
    -1,
    7,
    2**70,
    1.5,
    float("inf"),
    float("nan"),
    "",
    "x",
    "../../x",
    "/etc/passwd",
    "\ud800",
    "é" * 99,
    "YQ==",
    "bytes",
    "chars",
    "gpt2",
    "bpe:300",
    "bpe:-1",
    "(",
    "x*",
    "val_000000.bin",
    [],
    {},
    [[]],
    [None],
    {"x": 1},
]


def mutated_json(r, value):
    """A value somewhere in it replaced, left out, added or moved."""
    if isinstance(value, (dict, list)) and value and r.random() < 0.9:
        value, keys = value.copy(), list(value) if isinstance(value, dict) else range(len(value))
        key = r.choice(keys)
        action = r.random()
        if action < 0.75:
            value[key] = mutated_json(r, value[key])
        elif action < 0.85:
            del value[key]
        elif action < 0.95:
            value[key] = value[r.choice(keys)]
        elif isinstance(value, list):
            value.insert(key, r.choice(JUNK))
        else:
            value[r.choice(["x", "kind", "checksums"])] = r.choice(JUNK)
        return value
    return r.choice(JUNK)


def mutated_text(r, value):
    """JSON of `value`, mutated once or twice as a value or as bytes."""
    for _ in range(r.choice([0, 1, 1, 2])):
        value = mutated_json(r, value)
    text = bytearray(json.dumps(value).encode())
    for _ in range(r.choice([0, 0, 0, 1, 3])):
        if text:
            at, action = r.randrange(len(text)), r.random()
            if action < 0.5:
                text[at] ^= 1 << r.randrange(8)
            elif action < 0.75:
                del text[at : at + r.choice([1, 5, len(text)])]
            else:
                text[at:at] = r.choice([b"[" * 5000, b"1" * 5000, b"\0", b"\xff", b",", b'"'])
    return bytes(text)


@pytest.fixture(scope="module")
def tokenizers():
    def texts():
        return iter(["the cat sat on the mat, naïve 中文 🙂\n" * 20])

    return [
        json.loads(make_tokenizer(name, texts).to_json()) for name in ("bytes", "chars", "bpe:300")
    ]


@FAST
@given(RANDOM)
def test_tokenizers(tokenizers, r):
    text = mutated_text(r, r.choice(tokenizers))
    try:
        tok = Tokenizer.from_json(text, "here.json")
    except InputError as e:
        one_line(e, "here.json")
    else:
        assert tok.n_vocab == tok.eot + 1 == len(tok.token_bytes) <= 65536
        tok.decode(range(tok.n_vocab))
        assert Tokenizer.from_json(tok.to_json()).token_bytes.tolist() == tok.token_bytes.tolist()


def changed(value, path, new):
    """A copy of parsed JSON with what is at the path, names and indices, replaced."""
    value = json.loads(json.dumps(value))
    at = value
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return value


LATIN = {chr(0x100 + i): i for i in range(256)}  # 256 letters, of which not all are bytes


@pytest.mark.parametrize(
    "path, new",
    [
        (["model", "type"], "WordLevel"),
        (["model", "vocab"], None),
        (["model", "vocab"], {}),
        (["model", "vocab"], ["a"]),
        (["model", "vocab"], {"a": 0}),
        (["model", "vocab"], {"a": 0, "b": 0}),
        (["model", "vocab"], LATIN),
        (["model", "vocab", "a"], 5000),
        (["model", "vocab", "a"], "0"),
        (["normalizer"], {"type": "Lowercase"}),
        (["added_tokens"], []),
        (["added_tokens", 0, "id"], 3),
        (["added_tokens", 0, "content"], "<unk>"),
        (["pre_tokenizer"], None),
        (["pre_tokenizer", "pretokenizers", 0], {"type": "Digits"}),
        (["pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"], "("),
        (["pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"], "x*"),
        (["pre_tokenizer", "pretokenizers", 0, "pattern"], {"String": " "}),
    ],
)
def test_tokenizers_that_would_not_work(tokenizers, path, new):
    """Some of these end tiktoken with a panic of Rust, which no `except Exception` catches."""
    assert Tokenizer.from_json(json.dumps(tokenizers[2])).pattern == PATTERN
    with pytest.raises(InputError, match="not a tokenizer") as e:
        Tokenizer.from_json(json.dumps(changed(tokenizers[2], path, new)), "here.json")
    one_line(e.value, "here.json")


def test_vocabularies_that_would_not_work(tokenizers):
    as_bytes, chars, _ = tokenizers
    swapped = as_bytes["model"]["vocab"] | {"a": 98, "b": 97}
    ends = {"added_tokens": [chars["added_tokens"][0] | {"id": 1}]}  # end-of-text after one token
    for said in (
        changed(as_bytes, ["model", "vocab"], swapped),
        changed(chars | ends, ["model", "vocab"], {"ab": 0}),
        changed(chars | ends, ["model", "vocab"], {"\ud800": 0}),
    ):
        with pytest.raises(InputError, match="not a tokenizer"):
            Tokenizer.from_json(json.dumps(said))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    path = tmp_path_factory.mktemp("meta") / "a.txt"
    path.write_text("some words\n" * 100)
    folder, meta, _ = prepare_text(path, "bytes", path.parent / "cache")
    shutil.copy(folder / "val_000000.bin", folder.parent)  # to be found by ../val_000000.bin
    return folder, meta


@FAST
@given(RANDOM)
def test_meta(prepared, r):
    """What is read leads to shards in the folder whose checksums are those in meta.json, and
    otherwise is refused."""
    folder, meta = prepared
    (folder / "meta.json").write_bytes(mutated_text(r, meta))
    try:
        found, tok = open_prepared(folder)
    except InputError as e:
        one_line(e, folder)
    else:
        assert tok.n_vocab == 257 and isinstance(found["fingerprint"], str)
        for split in ("train", "val"):
            assert found[f"{split}_shards"] and set(found[f"{split}_shards"]) <= set(
                os.listdir(folder)
            )
            for name in found[f"{split}_shards"]:
                assert found["checksums"][name]["sha256"] == sha256_of(folder / name)


@pytest.fixture(scope="module")
def fineweb_folder(tmp_path_factory):
    """A validation and a training shard with their notes, and no Hub."""
    folder = tmp_path_factory.mktemp("fineweb")
    for i, split in enumerate(("val", "train")):
        with ShardWriter(folder, f"fineweb_{split}") as writer:
            writer.paths = [None] * i  # so that the number is the index
            writer.write(range(100))
    patch = pytest.MonkeyPatch()
    patch.setattr(fineweb, "KNOWN_SHA256", {})
    patch.setattr(fineweb, "_ask_hub", lambda *_: (_ for _ in ()).throw(InputError("no network")))
    fineweb.download(folder, 1, revision="0" * 40)
    notes = json.loads((folder / "checked.json").read_text())
    yield folder, {name: note | {"revision": "0" * 40} for name, note in notes.items()}
    patch.undo()


@FAST
@given(RANDOM)
def test_notes_of_checked_files(fineweb_folder, r):
    """Damaged notes cost a comparison, or a refusal where they hold another checksum; the shards
    stay."""
    folder, notes = fineweb_folder
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    (folder / "checked.json").write_bytes(mutated_text(r, notes))
    try:
        train, val = fineweb.download(folder, 1, revision="0" * 40)
    except InputError as e:
        one_line(e, folder)
        assert "expected" in str(e)
    else:
        assert [path.name for path in train + val] == [fineweb.TRAIN[0], fineweb.VAL]
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")} == before
    assert set(os.listdir(folder)) == {*before, "checked.json"}
