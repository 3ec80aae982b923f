"""Prepared data under faults: altered files, several processes at once, kills, and folders with odd
things in them.

FineWeb's part is in test_fineweb.py.
"""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from corpora import open_text, prepare_text

from base import InputError, files
from base.files import aside, one_at_a_time, sweep, write_text
from data import prepare
from data.shards import ShardWriter, read_shard
from data.sources import text

LINES = "".join(f"line {i}: the quick brown fox\n" for i in range(400))
FORK = multiprocessing.get_context("fork")


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(source, cache, tokenizer="bytes"):
    """The one line with which opening is refused."""
    with pytest.raises(InputError) as e:
        open_text(source, tokenizer, cache)
    assert "\n" not in str(e.value)
    return str(e.value)


def tree(folder):
    """Everything in a folder: {path: (inode, bytes, ns)}."""
    return {
        p.relative_to(folder): (s.st_ino, s.st_size, s.st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        for s in [p.lstat()]
    }


@pytest.fixture
def source(tmp_path):
    return put(tmp_path / "a.txt", LINES)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def folder(source, cache):
    """A prepared corpus."""
    return prepare_text(source, "bytes", cache)[0]


# ---- what was prepared and what is there


def flip(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin", "tokenizer.json"])
@pytest.mark.parametrize(
    "damage, found",
    [
        (None, "not there"),
        (lambda c: c[:-2], "bytes, found"),
        (lambda c: c + b"\0\0", "bytes, found"),
        (lambda c: b"", "found 0"),
        (flip, "expected sha256"),
        (lambda c: c[:1100] + flip(c[1100:1101]) + c[1101:], "found"),
    ],
)
def test_altered_files_are_refused(source, cache, folder, name, damage, found):
    """Though size and time of change are what they were."""
    path = folder / name
    before = path.stat()
    if damage:
        path.write_bytes(damage(path.read_bytes()))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        path.unlink()
    line = refused(source, cache)
    assert str(path) in line and found in line and f"delete {folder} and start again" in line
    shutil.rmtree(folder)  # what it says helps
    assert open_text(source, "bytes", cache).train == [folder / "train_000000.bin"]


def test_the_line_names_size_and_checksum(source, cache, folder):
    sums = json.loads((folder / "meta.json").read_text())["checksums"]
    path = folder / "train_000000.bin"
    size, content = path.stat().st_size, path.read_bytes()
    assert sums[path.name] == {"bytes": size, "sha256": files.sha256_of(path)}
    path.write_bytes(flip(content))
    assert f"expected sha256 {sums[path.name]['sha256']}, found {files.sha256_of(path)}" in refused(
        source, cache
    )
    path.write_bytes(content[:-1])
    assert f"expected {size} bytes, found {size - 1}" in refused(source, cache)


def test_shards_exchanged_for_one_another(source, cache, folder):
    for a, b in (
        ("train_000000.bin", "x"),
        ("val_000000.bin", "train_000000.bin"),
        ("x", "val_000000.bin"),
    ):
        (folder / a).rename(folder / b)
    assert "train_000000.bin: expected" in refused(source, cache)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b"[" * 100_000])
def test_damaged_meta(source, cache, folder, content):
    """A power cut may leave it empty."""
    (folder / "meta.json").write_bytes(content)
    line = refused(source, cache)
    assert str(folder / "meta.json") in line and "delete" in line


@pytest.mark.parametrize(
    "name",
    [
        "../../secret.bin",
        "/etc/passwd",
        "sub/train_000000.bin",
        "..",
        "",
        7,
        None,
        "train_000000.bin/../../../secret.bin",
        "train_000000.bin\n",
        "meta.json",
    ],
)
def test_names_in_meta_cannot_leave_the_folder(source, cache, folder, name, tmp_path):
    """Though the file is there and its checksum agrees."""
    for path in (tmp_path / "secret.bin", folder / "sub/train_000000.bin"):
        put(path, (folder / "train_000000.bin").read_bytes())
    meta = json.loads((folder / "meta.json").read_text())
    meta["train_shards"] = [name]
    meta["checksums"][str(name)] = meta["checksums"]["train_000000.bin"]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "is no name of a train shard" in (line := refused(source, cache)) or "TypeError" in line


@pytest.mark.parametrize("key", ["train_shards", "val_shards", "checksums", "fingerprint"])
@pytest.mark.parametrize(
    "value", [..., None, [], {}, 7, {"train_000000.bin": {"bytes": None, "sha256": None}}]
)
def test_meta_without_what_is_needed(source, cache, folder, key, value):
    meta = json.loads((folder / "meta.json").read_text()) | {key: value}
    if value is ...:
        del meta[key]
    (folder / "meta.json").write_text(json.dumps(meta))
    assert "meta.json: cannot be read" in refused(source, cache)


def test_folders_from_before_there_were_checksums_are_left_alone(source, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "LAYOUT", 4)
        old, meta, _ = prepare_text(source, "bytes", cache)
    del meta["checksums"]
    (old / "meta.json").write_text(json.dumps(meta))
    before = tree(old)
    dataset = open_text(source, "bytes", cache)
    assert (
        dataset.folder != old and dataset.fingerprint == meta["fingerprint"] and tree(old) == before
    )


def test_a_start_on_prepared_data_writes_nothing(source, cache, folder, monkeypatch):
    """So the cache may be on a read-only disk."""

    def fail(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    before = tree(cache)
    for owner, name in (
        (os, "replace"),
        (os, "mkdir"),
        (os, "unlink"),
        (os, "rmdir"),
        (files, "write_text"),
    ):
        monkeypatch.setattr(owner, name, fail)
    assert open_text(source, "bytes", cache).folder == folder
    assert tree(cache) == before


def test_read_only_cache_is_one_line(source, cache, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(30, "Read-only file system", str(cache))

    monkeypatch.setattr(os, "mkdir", fail)
    assert f"{cache}: cannot prepare {source}: Read-only file system" in refused(source, cache)


def test_cache_where_nobody_can_write(source):
    assert "/proc/nothing" in refused(source, Path("/proc/nothing"))


# ---- several processes at once


def at_once(n, work):
    """Run work(i) in n processes that start together; returns their exit codes (0, or that of a
    fault)."""
    barrier = FORK.Barrier(n)

    def child(i):
        barrier.wait(20)
        work(i)

    workers = [FORK.Process(target=child, args=(i,)) for i in range(n)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    return [worker.exitcode for worker in workers]


@pytest.mark.parametrize("locks", [True, False])
def test_several_processes_prepare_the_same(source, cache, monkeypatch, locks):
    """One works and the others wait; where a file system has no locks all work, and none reads
    or destroys a half."""
    write, replace = prepare._write, os.replace
    note = source.with_name("written")

    def noted(*args):
        with open(note, "a") as f:
            f.write("x")
        time.sleep(0.2)
        write(*args)

    def slow(a, b):
        time.sleep(0.02)
        replace(a, b)

    def no_locks(*_):
        raise OSError(37, "No locks available")

    def work(i):
        for _ in range(30):
            dataset = open_text(source, "bytes", cache)  # compares every checksum
            assert len(read_shard(dataset.train[0])) > 10_000

    monkeypatch.setattr(prepare, "_write", noted)
    monkeypatch.setattr(os, "replace", slow)
    if not locks:
        monkeypatch.setattr(files.fcntl, "flock", no_locks)
    assert at_once(4, work) == [0] * 4
    assert len(note.read_text()) == (1 if locks else 4)
    (folder,) = cache.iterdir()
    assert sorted(os.listdir(folder)) == [
        "meta.json",
        "tokenizer.json",
        "train_000000.bin",
        "val_000000.bin",
    ]


def test_a_process_that_fails_does_not_disturb_the_others(source, cache, monkeypatch):
    """Nor does it take away the folder that another is about to fill."""
    write = prepare._write

    def failing(*args):
        if os.environ.get("FAIL"):
            raise InputError("as asked")
        write(*args)

    def work(i):
        if i % 2:
            os.environ["FAIL"] = "1"
        try:
            open_text(source, "bytes", cache)
        except InputError as e:
            assert i % 2 and str(e) == "as asked"

    monkeypatch.setattr(prepare, "_write", failing)
    assert at_once(4, work) == [0] * 4
    assert open_text(source, "bytes", cache)


def test_waiting_is_said_and_ends_with_the_other_process(tmp_path, capfd):
    """Also when that one is killed."""
    ready = FORK.Event()

    def hold():
        with one_at_a_time(tmp_path):
            ready.set()
            time.sleep(60)

    holder = FORK.Process(target=hold)
    holder.start()
    assert ready.wait(20)

    def free():
        with one_at_a_time(tmp_path):
            pass

    waiter = FORK.Process(target=free)
    waiter.start()
    waiter.join(0.3)
    assert waiter.is_alive()
    os.kill(holder.pid, signal.SIGKILL)
    holder.join(10)
    waiter.join(10)
    assert waiter.exitcode == 0
    assert (
        capfd.readouterr().err
        == f"note: {tmp_path}: another process is preparing this; waiting for it\n"
    )


@pytest.mark.parametrize(
    "owner, name, nth",
    [
        (ShardWriter, "write", 1),
        (ShardWriter, "write", 4),
        (os, "fsync", 1),
        *((os, "replace", n) for n in range(1, 9)),
    ],
)
def test_a_kill_at_any_moment_costs_nothing_but_the_work(source, cache, owner, name, nth):
    other = prepare_text(source, "chars", cache)[0]
    before = tree(other)

    def killed():
        calls, call = [], getattr(owner, name)

        def count(*args):
            calls.append(args)
            if len(calls) == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)

        setattr(owner, name, count)
        open_text(source, "bytes", cache)

    worker = FORK.Process(target=killed)
    worker.start()
    worker.join(60)
    assert worker.exitcode == -signal.SIGKILL
    dataset = open_text(source, "bytes", cache)
    assert (
        dataset.tokenizer.decode(read_shard(dataset.train[0], 257))
        == LINES[: int(0.9 * len(LINES))]
    )
    assert tree(other) == before


def test_what_killed_processes_left_goes_after_a_day(tmp_path):
    keep = [
        put(tmp_path / name, "x")
        for name in ("mine.tmp", "x.0123abcd.bin", "shard.bin", "notes.zzzzzzzz.tmp")
    ]
    new, old_file, old_folder, link = (
        aside(tmp_path / name) for name in ("new", "old", "folder", "link")
    )
    put(new, "x"), put(old_file, "x"), put(old_folder / "deep" / "x", "x")
    put(tmp_path / "elsewhere" / "x", "x")
    link.symlink_to(tmp_path / "elsewhere")
    for path in (*keep, old_file, old_folder, link):
        os.utime(path, (1, 1), follow_symlinks=False)
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [new.name, "elsewhere", *(p.name for p in keep)]
    )
    assert (tmp_path / "elsewhere" / "x").exists()


def test_preparing_sweeps_the_cache(source, cache):
    left = aside(cache / "a-bytes-0123456789abcdef")
    put(left / "train_000000.bin.89abcdef.tmp", "half")
    os.utime(left, (1, 1))
    prepare_text(source, "bytes", cache)
    assert not left.exists()


def test_names_aside_differ(tmp_path):
    """Process numbers would not do: machines and containers that share a folder may have the
    same."""
    assert len({aside(tmp_path / "x") for _ in range(100)}) == 100
    assert {aside(tmp_path / "x").parent for _ in range(3)} == {tmp_path}


def test_write_text_leaves_the_old_or_the_new(tmp_path, monkeypatch):
    path = put(tmp_path / "x", "old")
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        with pytest.raises(OSError):
            write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]
    write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["x"]


# ---- text that moves


def on_reading(monkeypatch, nth, act):
    """Call act() before the nth file is opened for its text."""
    read, calls = prepare.read_blocks, []

    def reading(*args, **kwargs):
        calls.append(args)
        if len(calls) == nth:
            act()
        return read(*args, **kwargs)

    monkeypatch.setattr(prepare, "read_blocks", reading)


@pytest.mark.parametrize(
    "act, found",
    [
        (lambda p: p.unlink(), "No such file"),
        (lambda p: p.write_text(LINES + "more"), "changed while it was read"),
        (lambda p: p.write_text("less"), "changed while it was read"),
        (lambda p: p.write_text(p.read_text().upper()), "changed while it was read"),
        (lambda p: (p.unlink(), p.mkdir()), "p5"),
    ],
)
@pytest.mark.parametrize("nth", [1, 3, 12])
def test_a_file_that_vanishes_or_changes_while_reading(
    tmp_path, cache, monkeypatch, nth, act, found
):
    for i in range(12):
        os.utime(put(tmp_path / "in" / f"p{i}", f"{LINES}{i}"), ns=(10**18, 10**18))
    victim = tmp_path / "in" / "p5"
    with monkeypatch.context() as patch:
        on_reading(patch, nth, lambda: act(victim))
        line = refused(tmp_path / "in", cache)
    assert str(victim) in line and found in line and list(cache.iterdir()) == []
    assert victim.is_dir() or open_text(tmp_path / "in", "bytes", cache)


def test_a_file_that_vanishes_after_listing(tmp_path, cache, monkeypatch):
    listing = text.list_files
    for i in range(3):
        put(tmp_path / "in" / f"p{i}", f"{LINES}{i}")

    def list_files(*args):
        result = listing(*args)
        (tmp_path / "in" / "p1").unlink()
        return result

    monkeypatch.setattr(text, "list_files", list_files)
    assert str(tmp_path / "in" / "p1") in refused(tmp_path / "in", cache)


# ---- odd text, odd things in folders


def decoded(source, cache, tokenizer="bytes"):
    dataset = open_text(source, tokenizer, cache)
    return "".join(
        dataset.tokenizer.decode(read_shard(p, dataset.n_vocab))
        for p in dataset.train + dataset.val
    )


@pytest.mark.parametrize("tokenizer", ["bytes", "chars", "bpe:300"])
def test_only_whitespace_is_text(tmp_path, cache, tokenizer):
    whole = " \n\t\r\n\u3000" * 500
    assert decoded(put(tmp_path / "a.txt", whole), cache, tokenizer) == whole


def test_invalid_utf8_and_late_nul_bytes(tmp_path, cache):
    content = "naïve café ".encode() * 2000 + b"\xff\0\0 end\n" * 10
    assert decoded(put(tmp_path / "a.txt", content), cache, "chars") == content.decode(
        errors="replace"
    )


def test_a_nul_byte_at_the_beginning_is_refused(tmp_path, cache):
    assert "binary" in refused(put(tmp_path / "a.txt", "x\0" + LINES), cache)


def test_links_pipes_and_devices_in_a_folder(tmp_path, cache):
    """A link to a file is read; links to folders, among them loops, are not followed; nothing
    waits for a pipe."""
    put(tmp_path / "in" / "sub" / "a.txt", LINES)
    put(tmp_path / "outside" / "b.txt", "not this\n" * 100)
    put(tmp_path / "one.txt", "this one\n" * 100)
    for name, target in dict(
        loop=".",
        self="self",
        up="..",
        folder="../outside",
        file="../one.txt",
        null="/dev/null",
        zero="/dev/zero",
        dangling="nowhere",
    ).items():
        (tmp_path / "in" / name).symlink_to(target)
    (tmp_path / "in" / "sub" / "loop").symlink_to(tmp_path / "in")
    os.mkfifo(tmp_path / "in" / "pipe")
    _, files, left_out = text.list_files(tmp_path / "in")
    assert sorted(files) == ["file", "sub/a.txt"]
    why = dict(left_out)
    assert {why[f"{name}/"] for name in ("loop", "up", "folder", "sub/loop")} == {
        "a link to a folder"
    }
    assert why["dangling"] == "a link to nothing" and "symbolic links" in why["self"]
    assert why["pipe"] == why["null"] == why["zero"] == "a pipe or device"
    assert len(decoded(tmp_path / "in", cache)) == len(LINES) + 900


def test_a_link_that_leads_to_itself(tmp_path, cache):
    (tmp_path / "self").symlink_to("self")
    assert "no such file" in refused(tmp_path / "self", cache)


@pytest.mark.parametrize("source", ["pipe", "/dev/zero", "/dev/null"])
def test_pipes_and_devices_in_place_of_text(tmp_path, cache, source):
    """As `--text <(zcat novel.gz)` gives."""
    os.mkfifo(tmp_path / "pipe")
    assert "save the text to a file first" in refused(tmp_path / source, cache)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("what", ["a.txt", "."])
def test_what_may_not_be_read(tmp_path, cache, what):
    put(tmp_path / "in" / "a.txt", LINES)
    path = tmp_path / "in" / what
    path.chmod(0)
    try:
        assert "Permission denied" in refused(path, cache)
    finally:
        path.chmod(0o700)


def test_a_long_name(tmp_path, cache):
    assert decoded(put(tmp_path / ("é" * 100 + "x" * 51 + ".txt"), LINES), cache) == LINES


@pytest.mark.parametrize("tokenizer", ["../../x", "a/b/c", "../b", "/abs", "bpe:400/../../x", ""])
def test_names_of_tokenizers_cannot_leave_the_cache(tmp_path, source, cache, tokenizer):
    before = set(tmp_path.iterdir())
    assert "unknown tokenizer" in refused(source, cache, tokenizer)
    assert set(tmp_path.iterdir()) - before <= {cache} and list(cache.iterdir()) == []
