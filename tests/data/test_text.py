"""data/prepare.py and the sources of text: every character of a corpus ends up once in train or
val, nothing half-made is left."""

import hashlib
import os
import resource
import shutil
import signal
import tempfile
import tracemalloc
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from corpora import open_text, prepare_text
from hypothesis import example, given, settings
from hypothesis import strategies as st

from base import InputError
from data import DataConfig, TrainLoader, listing, open_data, open_dataset, prepare, tokenizers
from data.listing import path_hash
from data.prepare import TextFile, open_prepared, read_blocks, split_documents
from data.shards import ShardWriter, read_shard
from data.sources import stdlib
from data.sources.text import list_files
from runtime.corpus import load_data
from runtime.machine import World

MARK = "<|endoftext|>"
FAST = settings(deadline=None, max_examples=80)
PIECES = ["a", "bc", " ", "\n", "\r\n", "\t", "é", "中", "🙂", "\u2028", "x" * 9, "🙂" * 5]
TEXT = st.lists(st.sampled_from(PIECES), max_size=30).map("".join)
LINES = "".join(f"line {i}: the quick brown fox\n" for i in range(400))


def put(path, content):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def ids_of(folder, meta, split):
    return np.concatenate(
        [read_shard(folder / name, meta["n_vocab"]) for name in meta[f"{split}_shards"]]
    )


def prepared(source, cache, tokenizer="bytes"):
    """{split: list of documents, as str} of a prepared corpus, checking that each begins with
    eot."""
    folder, meta, tok = prepare_text(source, tokenizer, cache)
    result = {}
    for split in ("train", "val"):
        ids = ids_of(folder, meta, split)
        assert ids[0] == tok.eot and len(ids) == meta[f"{split}_tokens"]
        result[split] = [tok.decode(d) for d in np.split(ids, np.flatnonzero(ids == tok.eot))[1:]]
    return result


def refused(source, cache, tokenizer="bytes"):
    """The one line with which `source` is refused; nothing may stay in the cache."""
    with pytest.raises(InputError) as e:
        prepare_text(source, tokenizer, cache)
    assert "\n" not in str(e.value)
    assert not cache.is_dir() or os.listdir(cache) == []
    return str(e.value)


# reading blocks


def documents(blocks):
    """Blocks joined to the documents they say they make."""
    found = []
    for part, starts in blocks:
        assert part and MARK not in part
        if starts:
            found.append(part)
        else:
            found[-1] += part
    return found


def blocks_of(content, block, first=0, end=None):
    with tempfile.TemporaryDirectory() as folder:
        path = put(Path(folder) / "x", content)
        return list(read_blocks(path, first, len(content) if end is None else end, block))


@FAST
@given(TEXT, st.integers(1, 12))
@example("🙂" * 30, 1)
@example("x" * 100 + "\n", 3)
def test_blocks_join_to_the_file(whole, block):
    assert documents(blocks_of(whole.encode(), block)) == ([whole] if whole else [])


@FAST
@given(TEXT, st.integers(1, 12), st.data())
def test_two_ranges_join_to_the_file_wherever_they_meet(whole, block, data):
    """A border inside a character belongs to one of the two."""
    content = whole.encode()
    cut = data.draw(st.integers(0, len(content)))
    parts = blocks_of(content, block, 0, cut) + blocks_of(content, block, cut)
    assert "".join(part for part, _ in parts) == whole


@FAST
@given(
    st.lists(st.sampled_from([*PIECES, MARK, MARK, "<|end", "<|endoftext|"]), max_size=20).map(
        "".join
    ),
    st.integers(1, 40),
)
@example(f"abcdefghijkl{MARK}mnopqrstuvwxyz" * 3, 4)
def test_marks_divide_documents_wherever_blocks_end(whole, block):
    assert documents(blocks_of(whole.encode(), block)) == [d for d in whole.split(MARK) if d]


@FAST
@given(
    st.lists(
        st.one_of(st.binary(max_size=6), st.sampled_from([*map(str.encode, PIECES), b"\x80" * 20])),
        max_size=12,
    ).map(b"".join),
    st.integers(1, 12),
)
@example(b"\x80" * 100, 4)
@example("🙂".encode()[:3] + b"\n" + "é".encode()[:1], 1)
def test_invalid_utf8_becomes_the_replacement_character(content, block):
    """What a decoder makes of the whole file, but that long runs of stray bytes may be cut."""
    found = "".join(part for part, _ in blocks_of(content, block))
    expected = content.decode(errors="replace")
    assert found.replace("\ufffd", "") == expected.replace("\ufffd", "")
    assert ("\ufffd" in found) == ("\ufffd" in expected)


def test_blocks_end_after_a_newline_and_stay_small(tmp_path):
    """So no word is cut and memory is bounded; a line longer than two blocks ends at a space."""
    path = put(tmp_path / "x", "some words\n" * 1000)
    parts = [p for p, _ in read_blocks(path, 0, 11_000, 100)]
    assert all(p.endswith("\n") and len(p) < 200 for p in parts) and len(parts) > 90
    parts = [p for p, _ in read_blocks(put(tmp_path / "y", "some words " * 1000), 0, 11_000, 100)]
    assert all(p.endswith(" ") and len(p) <= 400 for p in parts) and len(parts) > 20
    parts = [p for p, _ in read_blocks(put(tmp_path / "z", "x" * 11_000), 0, 11_000, 100)]
    assert max(map(len, parts)) <= 600


def test_a_file_that_became_shorter(tmp_path):
    """Since it was listed: what is left of it, and no endless wait for the rest."""

    def fail(*_):
        raise AssertionError("still reading")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        blocks = list(read_blocks(put(tmp_path / "x", "one\ntwo"), 0, 1000, 4))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert "".join(part for part, _ in blocks) == "one\ntwo"


# a single file


@pytest.mark.parametrize("n", [*range(10, 32), 1999])
def test_val_of_a_file_is_its_last_tenth(tmp_path, n):
    whole = (LINES * 2)[:n]
    got = prepared(put(tmp_path / "a.txt", whole), tmp_path / "cache")
    assert got == {"train": [whole[: int(n * 0.9)]], "val": [whole[int(n * 0.9) :]]}


@FAST
@given(TEXT.filter(bool), st.integers(1, 12))
def test_multibyte_characters_at_the_cut(whole, block):
    """Train then val is the whole text, and val is a tenth but for the character at the cut."""
    with tempfile.TemporaryDirectory() as folder:
        put(Path(folder) / "x", whole)
        parts = {"train": "", "val": ""}
        file = TextFile("x", Path(folder) / "x", 0, len(whole.encode()))
        for split, _, path, first, end in split_documents([file])[0]:
            parts[split] += "".join(part for part, _ in read_blocks(path, first, end, block))
    assert parts["train"] + parts["val"] == whole
    size = len(whole.encode())
    assert abs(len(parts["train"].encode()) - int(size * 0.9)) < 4


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe:400"])
def test_train_and_val_tokens_decode_to_the_whole_file(tmp_path, tokenizer):
    whole = "naïve café — 中文字符 🙂\r\n\ttabs  and\nno newline at the end" * 97
    got = prepared(put(tmp_path / "a.txt", whole), tmp_path / "cache", tokenizer)
    assert "".join(got["train"] + got["val"]) == whole and len(got["train"]) == len(got["val"]) == 1


def test_every_tokenizer_splits_at_the_same_place(tmp_path):
    path = put(tmp_path / "a.txt", "é中🙂 x\n" * 333)
    found = [prepared(path, tmp_path / "cache", t) for t in ("bytes", "chars", "bpe:300")]
    assert found[0] == found[1] == found[2]


def test_marks_divide_documents(tmp_path):
    """Each begins with eot; marks at the start, the end or in a row make no empty documents."""
    docs = [f"document {i}\n" + "word " * i for i in range(40)]
    path = put(
        tmp_path / "a.txt", MARK + (MARK * 2).join(docs[:20]) + MARK + MARK.join(docs[20:]) + MARK
    )
    got = prepared(path, tmp_path / "cache")
    assert got["train"][:-1] == docs[: len(got["train"]) - 1] and len(got["train"]) > 30
    assert "".join(got["train"] + got["val"]) == "".join(docs)
    assert len(got["train"]) + len(got["val"]) == 41  # one was cut in two


@pytest.mark.parametrize("at", range(0, 16, 3))
def test_mark_at_the_cut_is_still_a_mark(tmp_path, at):
    """The last tenth begins inside of it, but neither half is learned as text."""
    before, after = "a" * (900 - at), "b" * (100 - len(MARK) + at)
    got = prepared(put(tmp_path / "x", before + MARK + after), tmp_path / "cache")
    assert got["train"][0] == before and "".join(got["train"][1:] + got["val"]) == after


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe:300"])
def test_meta_counts_tokens_and_bytes(tmp_path, tokenizer):
    folder, meta, tok = prepare_text(
        put(tmp_path / "a.txt", "é中🙂 x\n" * 500), tokenizer, tmp_path / "cache"
    )
    for split in ("train", "val"):
        ids = ids_of(folder, meta, split)
        assert (
            meta[f"{split}_tokens"] == len(ids)
            and meta[f"{split}_bytes"] == tok.token_bytes[ids].sum()
        )
    assert meta["train_bytes"] + meta["val_bytes"] == 12 * 500
    assert (meta["tokenizer"], meta["n_vocab"], meta["files"]) == (tokenizer, tok.n_vocab, 1)
    assert sorted(os.listdir(folder)) == [
        "meta.json",
        "tokenizer.json",
        "train_000000.bin",
        "val_000000.bin",
    ]


def test_several_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "ShardWriter", partial(ShardWriter, shard_tokens=1000))
    path = put(tmp_path / "a.txt", LINES)
    assert prepared(path, tmp_path / "cache")["train"] == [LINES[: int(len(LINES) * 0.9)]]
    meta = prepare_text(path, "bytes", tmp_path / "cache")[1]
    assert meta["train_shards"][:2] == ["train_000000.bin", "train_000001.bin"]
    assert len(meta["val_shards"]) == 2


def test_vocabulary_is_learned_from_train_alone_but_has_every_character(tmp_path):
    path = put(tmp_path / "a.txt", "the cat sat\n" * 300 + "zqzq§" * 60)
    cache = tmp_path / "cache"
    assert prepare_text(path, "chars", cache)[2].n_vocab == len(set("the cat sat\nzq§")) + 1
    tokens = prepare_text(path, "bpe:400", cache)[2].tokens
    assert b" cat" in tokens and b"zq" not in tokens and b"\xc2\xa7" not in tokens


def test_a_vocabulary_is_learned_from_so_much_text_and_no_more(tmp_path, monkeypatch):
    """But characters from all of it."""
    monkeypatch.setattr(prepare, "BPE_BYTES", 3000)
    monkeypatch.setattr(prepare, "read_blocks", partial(read_blocks, block=100))
    path = put(tmp_path / "a.txt", "the cat sat\n" * 300 + "zqzq zqzq\n" * 300)
    tokens = prepare_text(path, "bpe:400", tmp_path / "cache")[2].tokens
    assert b" cat" in tokens and b"zq" not in tokens
    assert b"z" in tokens and prepare_text(path, "chars", tmp_path / "cache")[2].n_vocab == 11


def test_a_document_of_many_blocks_has_one_end_of_text(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "read_blocks", partial(read_blocks, block=100))
    got = prepared(put(tmp_path / "a.txt", LINES), tmp_path / "cache")
    cut = int(len(LINES) * 0.9)
    assert got == {"train": [LINES[:cut]], "val": [LINES[cut:]]}


# folders


def by_hash(rels):
    """The order of training, said again."""
    return sorted(rels, key=lambda rel: hashlib.sha256(rel.encode()).hexdigest())


def test_a_folder_is_split_by_whole_files(tmp_path):
    """Those whose hash of the path is in the first tenth, in the order of the hashes; subfolders
    have "/" in their names."""
    rels = by_hash([f"sub{i % 3}/f{i:03}.txt" for i in range(200)] + ["top.txt"])
    for rel in rels:
        put(tmp_path / "in" / rel, rel)
    got = prepared(tmp_path / "in", tmp_path / "cache")
    val = [rel for rel in rels if int(path_hash(rel)[:8], 16) / 16**8 < 0.1]
    assert got == {"train": [r for r in rels if r not in val], "val": val}
    assert 10 < len(got["val"]) < 30


def test_adding_files_moves_none_to_the_other_split(tmp_path):
    """Nor does it change the order of those there were."""
    for i in range(40):
        put(tmp_path / "in" / f"f{i}", f"f{i:02}")
    before = prepared(tmp_path / "in", tmp_path / "cache")
    for i in range(40, 80):
        put(tmp_path / "in" / f"f{i}", f"f{i:02}")
    after = prepared(tmp_path / "in", tmp_path / "cache")
    for split in before:
        assert [d for d in after[split] if d in before[split]] == before[split]
        assert len(after[split]) > len(before[split])


@pytest.mark.parametrize(
    "sizes, whole",
    [
        ([600_000, 37], False),  # a book and a note
        ([37, 600_000], False),
        ([60_000, 60_000], False),
        ([600_000, 3000], False),
        ([60_000] * 6 + [2], False),
        ([60_000] * 5 + [30_000] * 5, True),
        ([900_000] + [10_000] * 10, True),
        ([100_000] * 10, True),
        ([5] * 3, False),
    ],
)
@pytest.mark.parametrize("names", ["abcdefghijk", "zyxwvutsrqp", "kjihgfedcba"])
def test_validation_is_close_to_a_tenth_of_the_bytes(sizes, whole, names):
    """Whatever the files' sizes and names: whole files where that fits, else tails."""
    files = [TextFile(name, Path(name), 0, size) for name, size in zip(names, sizes)]
    files.sort(key=lambda file: path_hash(file.rel))
    parts, said = split_documents(files)
    val = sum(part.end - part.first for part in parts if part.split == "val")
    assert sum(part.end - part.first for part in parts) == sum(sizes)
    slack = 0 if whole else len(sizes)  # a byte of each file
    assert 0.05 * sum(sizes) <= val <= 0.15 * sum(sizes) + slack
    assert ("whole files" in said) == whole
    if not whole:
        assert {part.rel for part in parts if part.split == "val"} == {*names[: len(sizes)]}


def test_listing_order_does_not_matter(tmp_path, monkeypatch):
    for i in range(30):
        put(tmp_path / "in" / f"d{i % 4}" / f"f{i}", f"text {i}")
    folder, meta, _ = prepare_text(tmp_path / "in", "bytes", tmp_path / "cache1")
    walk = os.walk

    def backwards(top, onerror):
        for at, folders, files in walk(top, onerror=onerror):
            folders.sort(reverse=True)
            yield at, folders, sorted(files, reverse=True)

    listings = []
    for order in (walk, backwards):
        monkeypatch.setattr(os, "walk", order)
        listings.append(list_files(tmp_path / "in"))
    assert listings[0] == listings[1]
    folder2, meta2, _ = prepare_text(tmp_path / "in", "bytes", tmp_path / "cache2")
    assert meta2 == meta and folder2.name == folder.name


def test_a_link_to_a_folder_is_left_out_and_said(tmp_path):
    """It may lead back to where it stands."""
    put(tmp_path / "in" / "a.txt", "a")
    put(tmp_path / "elsewhere" / "b.txt", "b")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "other").symlink_to(tmp_path / "elsewhere")
    listing = list_files(tmp_path / "in")
    assert listing.files == ["a.txt"]
    why = "a link to a folder"
    assert listing.left_out == [("loop/", why), ("other/", why)]


def test_what_is_left_out_is_said(tmp_path):
    """Once each, with the reason, the first few by name."""
    put(tmp_path / "in" / "sub" / "kept.txt", "kept")
    put(tmp_path / "in" / "no_suffix", "kept too")
    for rel in (".hidden", ".git/config", "__pycache__/x.txt", "sub/.x/y.txt"):
        put(tmp_path / "in" / rel, "hidden")
    put(tmp_path / "in" / "image.txt", b"PNG\0\1\2")
    put(tmp_path / "in" / "late.txt", b"x" * 8191 + b"\0")
    put(tmp_path / "in" / "empty.txt", "")
    (tmp_path / "in" / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "in" / "pipe")
    _, meta, _ = prepare_text(tmp_path / "in", "bytes", tmp_path / "cache")
    assert sorted({rel for _, rel, *_ in meta["parts"]}) == ["no_suffix", "sub/kept.txt"]
    why = {rel: why.split(";")[0] for rel, why in meta["left_out"]}
    assert why == {
        ".hidden": "hidden",
        ".git/": "hidden",
        "sub/.x/": "hidden",
        "__pycache__/": "a cache",
        "image.txt": "binary",
        "late.txt": "binary",
        "empty.txt": "empty",
        "dangling": "a link to nothing",
        "pipe": "a pipe or device",
    }
    line = meta["notes"][1]
    assert line.startswith("left out 6 files and 3 folders: __pycache__/ (a cache), dangling (a ")
    assert line.endswith(" and 6 more")
    assert meta["notes"][0].endswith(
        "in: 2 files, 12.0B; validation: the last tenth of each of the 2 files"
    )


FOLDERS = {
    "a run": ["log.txt", "metrics.jsonl"],
    "a model": ["config.json", "model.safetensors"],
    "a checkpoint": ["state.json", "state.safetensors"],
    "prepared data": ["meta.json", "train_000000.bin"],
    "a cache": ["CACHEDIR.TAG"],
    "a virtual environment": ["pyvenv.cfg"],
}


@pytest.mark.parametrize("what", FOLDERS)
def test_folders_that_hold_no_text_are_left_out(tmp_path, what):
    """Inside of a text, at any depth; one that is named outright is refused."""
    put(tmp_path / "in" / "a.txt", LINES)
    folder = tmp_path / "in" / "deep" / "it"
    for name in FOLDERS[what]:
        put(folder / name, "not a text to train on")
    _, files, left_out = list_files(tmp_path / "in")
    assert (files, left_out) == (["a.txt"], [("deep/it/", what)])
    assert f"expected a folder of text, found {what}" in refused(folder, tmp_path / "cache")
    (folder / FOLDERS[what][-1]).unlink()
    assert "deep/it/" not in dict(list_files(tmp_path / "in")[2])


def test_the_cache_in_the_text_folder_is_no_text(tmp_path):
    """Compiled code and prepared data in it; so a second start finds what the first prepared."""
    put(tmp_path / "a.txt", LINES)
    put(tmp_path / "cache" / "inductor" / "x.py", "compiled")
    config = DataConfig(data="text", text=str(tmp_path), tokenizer="bytes")
    first = open_dataset(config, tmp_path / "cache" / "data")
    again = open_dataset(config, tmp_path / "cache" / "data")
    assert first.fingerprint == again.fingerprint and first.folder == again.folder
    assert first.about["left_out"] == again.about["left_out"] == [("cache/", "a cache")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_in_a_folder_is_left_out(tmp_path):
    for rel in ("a.txt", "b.txt", "sub/c.txt"):
        put(tmp_path / "in" / rel, LINES)
    shut = [tmp_path / "in" / "b.txt", tmp_path / "in" / "sub"]
    for path in shut:
        path.chmod(0)
    try:
        meta = prepare_text(tmp_path / "in", "bytes", tmp_path / "cache")[1]
    finally:
        for path in shut:
            path.chmod(0o700)
    assert dict(meta["left_out"]) == {"b.txt": "Permission denied", "sub/": "Permission denied"}


def test_a_file_that_cannot_be_read_is_left_out(tmp_path, monkeypatch):
    for rel in ("a.txt", "b.txt"):
        put(tmp_path / "in" / rel, LINES + rel)
    examine = prepare.examine

    def denied(path, encoding):
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return examine(path, encoding)

    monkeypatch.setattr(prepare, "examine", denied)
    meta = prepare_text(tmp_path / "in", "bytes", tmp_path / "cache")[1]
    assert dict(meta["left_out"]) == {"b.txt": "Permission denied"}
    assert "b.txt: cannot prepare" in refused(tmp_path / "in" / "b.txt", tmp_path / "cache2")


def test_a_file_under_two_names_is_read_once(tmp_path):
    """Or validation would have what is trained on."""
    put(tmp_path / "in" / "b.txt", LINES)
    os.link(tmp_path / "in" / "b.txt", tmp_path / "in" / "c.txt")
    (tmp_path / "in" / "a.txt").symlink_to("b.txt")
    _, files, left_out = list_files(tmp_path / "in")
    assert files == ["b.txt"]
    assert left_out == [(name, "the same file as b.txt") for name in ("a.txt", "c.txt")]


def test_copies_of_a_file_are_read_once(tmp_path):
    """Equal to the last byte; what only begins like it, or is as long, is another text."""
    long = LINES[:5000]
    contents = dict(b=long, c=long, d=long[:-1] + "!", e="?" + long[1:], f=long[:-1])
    for name, content in contents.items():
        put(tmp_path / "in" / name, content)
    put(tmp_path / "in/more/a", long)
    _, files, left_out = list_files(tmp_path / "in")
    assert sorted(files) == ["b", "d", "e", "f"]
    assert left_out == [("c", "a copy of b"), ("more/a", "a copy of b")]


def test_a_file_that_cannot_be_compared_is_a_copy_of_none(tmp_path, monkeypatch):
    for name in "ab":
        put(tmp_path / "in" / name, LINES)

    def refused(path):
        raise PermissionError

    monkeypatch.setattr(listing, "sha256_of", refused)
    assert sorted(list_files(tmp_path / "in").files) == ["a", "b"]


@pytest.mark.parametrize("size, there", [(600, 60), (640, 64)])
def test_too_little_to_validate_on(tmp_path, size, there):
    """A loss over a handful of tokens says nothing."""
    config = DataConfig(
        data="text", text=str(put(tmp_path / "a.txt", LINES[:size])), tokenizer="bytes", row_len=64
    )
    stages = dict(batch_rows=lambda step: 2, max_doc_len=lambda step: 64)
    if there < 64:
        with pytest.raises(InputError, match=f"a.txt: {there} tokens to validate on .*64 or more"):
            open_data(config, tmp_path / "cache", **stages)
    else:
        assert open_data(config, tmp_path / "cache", **stages).val.n_targets == there


# a text to validate on


def val_of(tmp_path, text, val, tokenizer="bytes"):
    config = DataConfig(data="text", text=str(text), val_text=str(val), tokenizer=tokenizer)
    dataset = open_dataset(config, tmp_path / "cache")
    tok = dataset.tokenizer
    texts = [
        "".join(tok.decode(read_shard(path)) for path in paths)
        for paths in (dataset.train, dataset.val)
    ]
    return dataset, *texts


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe:300"])
def test_a_text_of_ones_own_to_validate_on(tmp_path, tokenizer):
    """Then no part of the other is held out, and the vocabulary covers both."""
    text, val = put(tmp_path / "a.txt", LINES), put(tmp_path / "b.txt", "zwölf §\n" * 30)
    dataset, *texts = val_of(tmp_path, text, val, tokenizer)
    assert texts == [LINES, "zwölf §\n" * 30]
    assert ": 1 file, 11.9kB; validation: --val-text, 1 file, 300B" in dataset.notes[0]
    plain = open_dataset(
        DataConfig(data="text", text=str(text), tokenizer=tokenizer), tmp_path / "cache"
    )
    assert plain.folder != dataset.folder and plain.fingerprint != dataset.fingerprint


def test_a_text_held_out_is_told_from_one_trained_on(tmp_path):
    """The same two files in the same order: a folder, and one with the other to validate on."""
    first, second = by_hash("ab")
    for name in "ab":
        put(tmp_path / "in" / name, f"{name} {LINES}")
    whole = open_text(tmp_path / "in", "bytes", tmp_path / "cache")
    apart = val_of(tmp_path, tmp_path / "in" / first, tmp_path / "in" / second)[0]
    assert whole.folder.name.rsplit("-")[-1] != apart.folder.name.rsplit("-")[-1]
    assert whole.fingerprint != apart.fingerprint


def test_what_is_validated_on_is_not_trained_on(tmp_path):
    """Though it lies in the same folder, or is linked to from there, or was copied there."""
    for i in range(4):
        put(tmp_path / "in" / f"{i}.txt", f"text {i}\n" * 50)
    os.link(tmp_path / "in" / "3.txt", tmp_path / "val.txt")
    for val in ("in/3.txt", "val.txt"):
        dataset, train, held_out = val_of(tmp_path, tmp_path / "in", tmp_path / val)
        assert held_out == "text 3\n" * 50 and "text 3" not in train and len(train) == 3 * 350
        assert ("3.txt", "is validation") in dataset.about["left_out"]
    copied = put(tmp_path / "copy.txt", "text 3\n" * 50)
    dataset, train, _ = val_of(tmp_path, tmp_path / "in", copied)
    assert len(train) == 3 * 350
    assert ("3.txt", "a copy of validation") in dataset.about["left_out"]
    with pytest.raises(InputError, match="nothing is left to train on"):
        val_of(tmp_path, tmp_path / "in", tmp_path / "in")


def test_validation_text_that_is_not_there(tmp_path):
    text = put(tmp_path / "a.txt", LINES)
    with pytest.raises(InputError, match="nowhere: no such file or folder; --val-text expects"):
        val_of(tmp_path, text, tmp_path / "nowhere")
    with pytest.raises(InputError, match="b.txt: expected text, found a file that is binary"):
        val_of(tmp_path, text, put(tmp_path / "b.txt", b"\0"))


@pytest.mark.parametrize("option", [dict(val_text="x"), dict(encoding="cp1252")])
def test_options_of_text_are_refused_for_other_sources(option):
    with pytest.raises(InputError, match="only with --text, not with --data stdlib"):
        DataConfig(**option)


def test_a_hidden_folder_named_outright_is_read(tmp_path):
    put(tmp_path / ".in" / "a.txt", "text")
    assert list_files(tmp_path / ".in") == (tmp_path / ".in", ["a.txt"], [])


def test_of_two_files_the_last_tenths_are_validation(tmp_path):
    for name in "ab":
        put(tmp_path / "in" / name, f"{name:10}" * 10)
    got = prepared(tmp_path / "in", tmp_path / "cache")
    files = by_hash("ab")
    assert got == {"train": [f"{f:10}" * 9 for f in files], "val": [f"{f:10}" for f in files]}


def test_file_names_that_are_not_utf8(tmp_path):
    """Old archives hold Latin-1 names; their text is as good as any."""
    put(tmp_path / "in" / "a.txt", "text")
    try:
        put(tmp_path / "in" / os.fsdecode(b"caf\xe9.txt"), "more text")
    except OSError:
        pytest.skip("this file system wants UTF-8 names")
    got = prepared(tmp_path / "in", tmp_path / "cache")
    assert len("".join(got["train"] + got["val"])) == len("text" + "more text")


def test_stdlib(tmp_path):
    """Python's own library without its tests, what was installed beside it, or the builder's
    paths."""
    root, files, _ = stdlib.list_files()
    assert {"os.py", "json/decoder.py", "typing.py"} <= set(files) and len(files) > 300
    parts = {part for rel in files for part in rel.split("/")}
    assert not parts & {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"}
    assert all(rel.endswith(".py") and "_sysconfigdata" not in rel for rel in files)
    dataset = open_dataset(DataConfig(data="stdlib", tokenizer="bytes"), tmp_path / "cache")
    folder, tok = dataset.folder, dataset.tokenizer
    meta = open_prepared(folder)[0]
    total = sum((root / rel).stat().st_size for rel in files)
    assert (
        abs(meta["train_bytes"] + meta["val_bytes"] - total) < 1000
    )  # invalid UTF-8 on purpose, marks
    assert 0.03 < meta["val_bytes"] / total < 0.2 and meta["files"] == len(files)
    val = tok.decode(ids_of(folder, meta, "val"))
    assert all((root / rel).read_text(errors="replace") in val for rel in files[:3])
    assert "stdlib-bytes-" in folder.name


# the cache


def forbid_work(monkeypatch):
    monkeypatch.setattr(prepare, "make_tokenizer", lambda *_: pytest.fail("tokenized again"))


def test_second_call_only_looks(tmp_path, monkeypatch):
    path = put(tmp_path / "a.txt", LINES)
    first = prepare_text(path, "bpe:300", tmp_path / "cache")
    forbid_work(monkeypatch)
    second = prepare_text(path, "bpe:300", tmp_path / "cache")
    assert second[:2] == first[:2] and second[2].to_json() == first[2].to_json()
    assert os.listdir(tmp_path / "cache") == [first[0].name]


@pytest.mark.parametrize(
    "change",
    ["content", "time", "exchanged", "tokenizer", "added", "removed", "renamed", "cache"],
)
def test_any_change_is_noticed(tmp_path, monkeypatch, change):
    for name in "abc":
        put(tmp_path / "in" / name, LINES)
    tokenizer, cache = "bytes", tmp_path / "cache"
    prepare_text(tmp_path / "in", tokenizer, cache)
    if change == "content":
        os.utime(
            put(tmp_path / "in" / "a", LINES + "x"),
            ns=(0, (tmp_path / "in" / "b").stat().st_mtime_ns),
        )
    elif change == "time":
        os.utime(put(tmp_path / "in" / "a", LINES.upper()), ns=(0, 10**18))
    elif change == "exchanged":  # for another of the same size and times
        times = (tmp_path / "in" / "a").stat()
        put(tmp_path / "new", LINES.upper())
        os.utime(tmp_path / "new", ns=(times.st_atime_ns, times.st_mtime_ns))
        os.replace(tmp_path / "new", tmp_path / "in" / "a")
    elif change == "tokenizer":
        tokenizer = "chars"
    elif change == "added":
        put(tmp_path / "in" / "d", "d")
    elif change == "removed":
        (tmp_path / "in" / "a").unlink()
    elif change == "renamed":
        (tmp_path / "in" / "a").rename(tmp_path / "in" / "z")
    else:
        cache = tmp_path / "other"

    class Noticed(Exception):
        pass

    def notice(*_):
        raise Noticed

    monkeypatch.setattr(prepare, "make_tokenizer", notice)
    with pytest.raises(Noticed):
        prepare_text(tmp_path / "in", tokenizer, cache)


def test_texts_of_one_name_size_and_time_are_told_apart(tmp_path, monkeypatch):
    """Under the same relative path, in two folders that share a cache."""
    found = []
    for name, content in ("a", LINES), ("b", LINES.upper()):
        os.utime(put(tmp_path / name / "novel.txt", content), ns=(10**18, 10**18))
        monkeypatch.chdir(tmp_path / name)
        found.append(prepared("novel.txt", tmp_path / "cache")["train"][0])
    assert found[0].upper() == found[1] != found[0]


def test_unfinished_folder_is_made_anew(tmp_path):
    """A folder without meta.json is not trusted."""
    path = put(tmp_path / "a.txt", LINES)
    folder, meta, _ = prepare_text(path, "bytes", tmp_path / "cache")
    (folder / "meta.json").unlink()
    (folder / "train_000000.bin").write_bytes(b"junk")
    assert prepared(path, tmp_path / "cache")["train"][0] == LINES[: meta["train_bytes"]]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("where", ["ShardWriter.write", "Tokenizer.to_json", "Tokenizer.encode"])
def test_failure_midway_leaves_nothing(tmp_path, monkeypatch, error, where):
    """Neither a folder under the final name nor one aside; the next try works."""
    path = put(tmp_path / "a.txt", LINES)
    owner = {"ShardWriter": ShardWriter, "Tokenizer": tokenizers.Tokenizer}[where.split(".")[0]]
    calls, method = [], getattr(owner, where.split(".")[1])

    def fail(self, *args):
        calls.append(args)
        if len(calls) == (3 if where == "ShardWriter.write" else 1):
            raise error("midway")
        return method(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where.split(".")[1], fail)
        with pytest.raises(InputError if error is OSError else error, match="midway"):
            prepare_text(path, "bytes", tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or os.listdir(tmp_path / "cache") == []
    assert prepared(path, tmp_path / "cache")["val"] == [LINES[int(len(LINES) * 0.9) :]]


@pytest.mark.parametrize(
    "n, limit, what", [(10_000, 5000, "train_000000.bin"), (100, 1400, "prepare")]
)
def test_full_disk(tmp_path, n, limit, what):
    """The system refuses the tokens, or only the vocabulary after them."""
    path = put(tmp_path / "a.txt", LINES[:n])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        line = refused(path, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert what in line


@pytest.mark.parametrize("name", ["train_000000.bin", "meta.json"])
def test_failing_rename(tmp_path, monkeypatch, name):
    """The last act of all: without meta.json, which comes last, a folder counts for nothing."""
    path, replace = put(tmp_path / "a.txt", LINES), os.replace

    def fail(source, target):
        if Path(target).name == name and not Path(target).parent.name.endswith(".tmp"):
            raise OSError("device busy")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(InputError, match="device busy"):
            prepare_text(path, "bytes", tmp_path / "cache")
    assert not [*(tmp_path / "cache").glob("*/meta.json"), *(tmp_path / "cache").glob("*.tmp")]
    assert prepared(path, tmp_path / "cache")["val"] == [LINES[int(len(LINES) * 0.9) :]]


def test_cache_that_cannot_be_made(tmp_path):
    put(tmp_path / "cache", "a file")
    line = refused(put(tmp_path / "a.txt", LINES), tmp_path / "cache")
    assert str(tmp_path / "cache") in line


# fingerprint


def fingerprint(source, cache, tokenizer="bytes"):
    return prepare_text(source, tokenizer, cache)[1]["fingerprint"]


def test_fingerprint_is_of_the_text_not_the_place(tmp_path):
    for i in range(20):
        put(tmp_path / "in" / f"s{i % 2}" / f"f{i}", f"text {i} é\n" * 9)
    shutil.copytree(tmp_path / "in", tmp_path / "elsewhere")
    cache = tmp_path / "cache"
    one = fingerprint(tmp_path / "in", cache)
    assert (
        one
        == fingerprint(tmp_path / "elsewhere", cache)
        == fingerprint(tmp_path / "in", cache, "chars")
    )
    assert one != fingerprint(tmp_path / "in" / "s0", cache)
    put(tmp_path / "elsewhere" / "s1" / "f3", "text 3 é\n" * 8 + "text 3 e\n")
    assert one != fingerprint(tmp_path / "elsewhere", cache)


def test_fingerprint_of_a_file_does_not_depend_on_its_name_or_block_borders(tmp_path, monkeypatch):
    one = fingerprint(put(tmp_path / "a.txt", LINES), tmp_path / "cache")
    assert one == fingerprint(put(tmp_path / "b" / "c.md", LINES), tmp_path / "cache")
    monkeypatch.setattr(prepare, "read_blocks", partial(read_blocks, block=100))
    assert one == fingerprint(tmp_path / "a.txt", tmp_path / "other")


@pytest.mark.parametrize(
    "other",
    [
        ["xyz" * 10 + "p", "q" + "pq" * 9],  # moved from one file to the next
        ["xyz" * 10 + "pq" * 10],
        ["xyz" * 5 + MARK + "xyz" * 5, "pq" * 10],  # documents divided
        ["xyz" * 10 + "\n", "pq" * 10],
        ["xyz" * 9 + "xyy", "pq" * 10],
    ],
)
def test_fingerprint_tells_corpora_apart(tmp_path, other):
    """Different train tokens with the same val file."""
    found = []
    for i, contents in enumerate([["xyz" * 10, "pq" * 10], other]):
        put(tmp_path / "val", "validation")
        for name, content in zip("ab", contents):
            put(tmp_path / str(i) / name, content)
        found.append(val_of(tmp_path, tmp_path / str(i), tmp_path / "val")[0].fingerprint)
    assert found[0] != found[1]


# bad input


@pytest.mark.parametrize(
    "content, reason",
    [
        ("", "is empty"),
        (b"\x89PNG\r\n\0\0", "binary"),
        ("text".encode("utf-16-le"), "binary"),
        ("a", "train split is empty"),
        ("🙂", "split is empty"),
        (MARK * 50, "too little"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe:300"])
def test_bad_files(tmp_path, content, reason, tokenizer):
    path = put(tmp_path / "a.txt", content)
    line = refused(path, tmp_path / "cache", tokenizer)
    assert str(path) in line and (reason in line or "too little" in reason and "empty" in line)


def test_missing_paths(tmp_path):
    assert "no such file" in refused(tmp_path / "no", tmp_path / "cache")
    assert "no such file" in refused(str(tmp_path / "no"), tmp_path / "cache")
    assert refused(put(tmp_path / "file", "x") / "below", tmp_path / "cache")


def test_text_in_place_of_its_path(tmp_path):
    """The system says "name too long" and not "no such file"."""
    assert "x" * 300 in refused("x" * 300, tmp_path / "cache")


def test_empty_folders(tmp_path):
    (tmp_path / "in").mkdir()
    assert "no text files" in refused(tmp_path / "in", tmp_path / "cache")
    put(tmp_path / "in" / ".hidden", "x")
    put(tmp_path / "in" / "binary", b"\0")
    put(tmp_path / "in" / "empty", "")
    (tmp_path / "in" / "sub").mkdir()
    line = refused(tmp_path / "in", tmp_path / "cache")
    assert "no text" in line and "binary (binary), empty (empty)" in line


@pytest.mark.parametrize("tokenizer", ["nonsense", "bpe:12", "../x", "bpe:"])
def test_bad_tokenizers(tmp_path, tokenizer):
    assert tokenizer in refused(put(tmp_path / "a.txt", LINES), tmp_path / "cache", tokenizer)


def test_a_folder_of_one_byte_files(tmp_path):
    for name in "ab":
        put(tmp_path / "in" / name, "x")
    assert "train split is empty" in refused(tmp_path / "in", tmp_path / "cache")


@pytest.mark.parametrize("character", [" ", "x"])
def test_megabytes_of_one_character_are_encoded(tmp_path, character):
    """A table padded with spaces, say. In val, because learning from it is another matter."""
    text, val = put(tmp_path / "a", LINES), put(tmp_path / "b", character * 1_500_000 + "end")
    assert val_of(tmp_path, text, val, "bpe:300")[2] == character * 1_500_000 + "end"


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    peaks = []
    for megabytes in (4, 24):
        whole = "It was the best of times, it was the age\n" * (25_000 * megabytes)
        path = put(tmp_path / f"{megabytes}.txt", whole)
        tracemalloc.start()
        prepare_text(path, "bytes", tmp_path / "cache")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] and peaks[1] < 100e6, peaks


# the way in for the trainer


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe:300"])
def test_open_dataset(tmp_path, tokenizer):
    path = put(tmp_path / "a.txt", LINES)
    dataset = open_text(path, tokenizer, tmp_path / "cache")
    tok = dataset.tokenizer
    assert (dataset.name, dataset.eot, dataset.n_vocab) == (str(path), tok.eot, tok.n_vocab)
    assert dataset.fingerprint == fingerprint(path, tmp_path / "cache")
    (train,), (val,) = dataset.train, dataset.val
    assert (
        tok.decode(read_shard(train, tok.n_vocab)) + tok.decode(read_shard(val, tok.n_vocab))
        == LINES
    )
    loader = TrainLoader(
        dataset.train,
        eot=dataset.eot,
        n_vocab=dataset.n_vocab,
        row_len=64,
        batch_rows=lambda step: 4,
        max_doc_len=lambda step: 64,
        long_docs="split",
    )
    assert all(tok.decode(t[s : s + n]) in LINES for row in loader.rows(3) for t, s, n in row)


def test_open_dataset_refuses_what_prepare_refuses(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        open_text(tmp_path / "no", "bytes", tmp_path / "cache")


def test_a_cache_of_another_run_is_known_by_its_tag(tmp_path):
    """Wherever it lies; the folder around it is not tagged, which may hold more than a cache."""
    text = put(tmp_path / "in" / "a.txt", LINES)
    config = SimpleNamespace(
        data=DataConfig(data="text", text=str(text), tokenizer="bytes", row_len=64),
        run=SimpleNamespace(cache_dir=str(tmp_path / "in")),
        goal=SimpleNamespace(seed=0, target_metric="val_loss"),
        policy=SimpleNamespace(questions=1, answer_tokens=1),
    )
    stage = SimpleNamespace(rows=2, model=SimpleNamespace(max_doc_len=64))
    load_data(config, lambda step: stage, World())
    put(tmp_path / "in" / "inductor" / "compiled.py", "code")
    assert list_files(tmp_path / "in")[1:] == (
        ["a.txt"],
        [("data/", "a cache"), ("inductor/", "a cache")],
    )
