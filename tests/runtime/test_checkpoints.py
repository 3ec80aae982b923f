"""runtime/checkpoints.py: what is loaded is what was saved, bit for bit, or it is refused;
whatever kills or fails a writer, what was there before or what it wrote is there afterwards, and
nothing else after the next start."""

import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from base import InputError
from runtime import checkpoints as module
from runtime.checkpoints import (
    COMPLETE,
    DTYPES,
    STATE,
    TENSORS,
    Checkpoints,
    complete,
    latest,
    load,
    load_meta,
    open_store,
)
from runtime.options import RunConfig

ROOT = Path(module.__file__).resolve().parent.parent


def small(n=0):
    """A few tensors that tell which n they were made with."""
    return dict(
        weight=torch.full((3, 5), float(n)),
        low=torch.full((7,), n % 1000, dtype=torch.int16),
        step=torch.tensor(n),
        none=torch.empty(0, 4, dtype=torch.bfloat16),
    )


def save(folder, *steps, **options):
    """Write small checkpoints of these steps; returns the path of the last."""
    checkpoints = Checkpoints(folder, **dict(keep_last=100) | options)
    for step in steps:
        assert checkpoints.save(step, small(step), dict(n=step), wait=True)
    return Path(folder) / f"step-{steps[-1]:06d}"


def names(folder):
    """What lies in the folder, without the lock."""
    return sorted(set(os.listdir(folder)) - {".lock"})


def bits(t):
    return t.dtype, list(t.shape), t.detach().contiguous().reshape(-1).view(torch.uint8).tolist()


def check(path, n):
    """The checkpoint loads and is that of small(n)."""
    tensors, meta = load(path)
    assert meta == dict(n=n) and {k: bits(t) for k, t in tensors.items()} == {
        k: bits(t) for k, t in small(n).items()
    }


def resign(path):
    """Make `complete` fit what the files hold now."""
    lines = [
        module.write_file(path / "aside", [(path / name).read_bytes()])
        for name in (STATE, TENSORS)
        if not (path / "aside").unlink(missing_ok=True)
    ]
    (path / "aside").unlink()
    (path / COMPLETE).write_bytes(
        b"".join(
            line.replace(b"aside", name.encode()) for line, name in zip(lines, (STATE, TENSORS))
        )
    )


# --- what is loaded is what was saved


def of_bits(dtype, raw):
    return (raw & 1).bool() if dtype is torch.bool else raw.view(dtype)


TENSOR = st.builds(
    lambda dtype, shape, seed: of_bits(
        dtype,
        torch.randint(
            0,
            256,
            (math.prod(shape) * dtype.itemsize,),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(seed),
        ),
    ).reshape(shape),
    st.sampled_from(list(DTYPES)),
    st.lists(st.integers(0, 5), max_size=3),
    st.integers(0, 2**31),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=12).filter(lambda name: name != "__metadata__"), TENSOR, max_size=8
    ),
    st.dictionaries(st.text(max_size=5), JSON, max_size=4),
    st.integers(0, 10**9),
)
def test_round_trip(tensors, meta, step):
    with tempfile.TemporaryDirectory() as folder:
        assert Checkpoints(folder).save(step, tensors, meta, wait=True)
        assert (path := latest(folder)).name == f"step-{step:06d}"
        back, found = load(path)
        assert {name: bits(t) for name, t in back.items()} == {
            name: bits(t) for name, t in tensors.items()
        }
        assert found == meta and json.dumps(found, sort_keys=True) == json.dumps(
            meta, sort_keys=True
        )


def test_every_dtype_keeps_the_bits_of_its_nans(tmp_path):
    every = torch.arange(65536).to(torch.int16).view(torch.uint8)
    tensors = {name: of_bits(dtype, every) for dtype, name in DTYPES.items()}
    nans = tensors["BF16"][tensors["BF16"].isnan()]
    assert len(nans) == nans.view(torch.int16).unique().numel() == 254
    Checkpoints(tmp_path).save(1, tensors, {}, wait=True)
    back, _ = load(latest(tmp_path))
    assert {name: bits(t) for name, t in back.items()} == {
        name: bits(t) for name, t in tensors.items()
    }


def test_views_transposes_and_parameters(tmp_path):
    buffer = torch.arange(24.0)
    tensors = dict(
        part=buffer[3:9],
        transposed=buffer.view(4, 6).t(),
        shared=buffer,
        step=buffer[5].detach(),
        parameter=torch.nn.Parameter(torch.randn(3, 4)),
        expanded=torch.tensor(1.5).expand(2, 3),
    )
    Checkpoints(tmp_path).save(1, tensors, {}, wait=True)
    back, _ = load(latest(tmp_path))
    assert {name: bits(t) for name, t in back.items()} == {
        name: bits(t) for name, t in tensors.items()
    }
    assert all(t.is_contiguous() and not t.requires_grad for t in back.values())


def test_what_is_loaded_is_the_readers_own(tmp_path):
    tensors, _ = load(path := save(tmp_path, 1))
    tensors["weight"].add_(1)
    check(path, 1)
    shutil.rmtree(path)
    assert tensors["weight"].eq(2).all()


def test_files_are_the_formats_own_and_have_the_users_mode(tmp_path):
    mask = os.umask(0o027)
    try:
        path = save(tmp_path, 7)
    finally:
        os.umask(mask)
    with safe_open(path / TENSORS, "pt") as f:
        dtypes = {name: f.get_slice(name).get_dtype() for name in f.keys()}
    assert dtypes == dict(weight="F32", low="I16", step="I64", none="BF16")
    state = json.loads((path / STATE).read_text())
    assert (state["version"], state["step"], state["meta"]) == (1, 7, dict(n=7))
    assert names(path) == sorted([COMPLETE, STATE, TENSORS])
    assert {stat.S_IMODE((path / name).stat().st_mode) for name in names(path)} == {0o640}
    for line in (path / COMPLETE).read_text().splitlines():
        digest, size, name = line.split()
        assert (path / name).stat().st_size == int(size)
        if shutil.which("sha256sum"):
            assert (
                subprocess.check_output(["sha256sum", path / name], text=True).split()[0] == digest
            )


def test_the_tensors_are_aligned(tmp_path):
    sizes = {
        f"{name}{n}": torch.zeros(n, dtype=dtype) for dtype, name in DTYPES.items() for n in (1, 3)
    }
    Checkpoints(tmp_path).save(1, sizes, {}, wait=True)
    content = (latest(tmp_path) / TENSORS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8 : 8 + length]).items():
        assert (8 + length + entry["data_offsets"][0]) % sizes[name].element_size() == 0


@pytest.mark.parametrize(
    "tensors, meta, error",
    [
        (dict(a=torch.zeros(2, dtype=torch.complex64)), {}, KeyError),
        (dict(a=torch.zeros(2, device="meta")), {}, Exception),
        (small(), dict(a=object()), TypeError),
    ],
)
def test_what_cannot_be_written_is_the_callers_error(tmp_path, tensors, meta, error):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(error):
        checkpoints.save(1, tensors, meta)
    assert not checkpoints.busy and latest(tmp_path) is None


# --- what is refused


def refusal(path):
    with pytest.raises(InputError) as e:
        load(path)
    message = str(e.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", [STATE, TENSORS, COMPLETE])
def test_every_altered_byte_is_refused(tmp_path, name):
    path = save(tmp_path, 1, 2)
    content = (path / name).read_bytes()
    for at in range(len(content)):
        for flip in (1, 32, 128):
            (path / name).write_bytes(
                content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :]
            )
            assert refusal(path).endswith(f"; choose an earlier one: {tmp_path}/step-000001")
    (path / name).write_bytes(content)
    check(path, 2)


@pytest.mark.parametrize("name", [STATE, TENSORS, COMPLETE])
def test_what_is_cut_or_grown_is_refused_and_passed_over(tmp_path, name):
    path = save(tmp_path, 1, 2)
    content = (path / name).read_bytes()
    for other in [content[:n] for n in (0, 1, 8, 70, 100, len(content) // 2, len(content) - 1)] + [
        content + b"\n"
    ]:
        (path / name).write_bytes(other)
        if name != COMPLETE:
            assert (
                f"{name}: expected {len(content)} bytes, found {len(other)}: truncated or altered"
                in refusal(path)
            )
        elif not module.LINES.fullmatch(other.decode()):
            assert f"no valid file '{COMPLETE}'" in refusal(path)
        else:
            assert len(other) < len(content) and refusal(path)
        assert latest(tmp_path) == tmp_path / "step-000001" or name == COMPLETE and refusal(path)
    (path / name).unlink()
    assert refusal(path) and latest(tmp_path) == tmp_path / "step-000001"


def test_a_later_one_is_not_offered(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "step-000001" / TENSORS).unlink()
    assert "no earlier one" in refusal(tmp_path / "step-000001")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    nothing = "there is no earlier one beside it, so choose one from elsewhere or start without"
    expected = "expected the folder of a complete checkpoint, found"
    assert refusal(tmp_path / "x" / "step-000001") == f"{expected} nothing; {nothing}"
    (tmp_path / "step-000001").write_text("")
    assert refusal(tmp_path / "step-000001") == f"{expected} a file; {nothing}"
    (tmp_path / "step-000002").mkdir()
    assert (
        refusal(tmp_path / "step-000002") == f"{expected} no valid file 'complete' in it; {nothing}"
    )
    assert refusal(tmp_path / "\0") and refusal(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda s: s.update(version=2), "expected format version 1, found 2"),
        (
            lambda s: s["tensors"].update(low="I16 [8]"),
            "expected low to be I16 [8] as state.json says, found I16 [7]",
        ),
        (
            lambda s: s["tensors"].pop("low"),
            "expected low to be absent as state.json says, found I16 [7]",
        ),
        (
            lambda s: s["tensors"].update(more="F32 []"),
            "expected more to be F32 [] as state.json says, found nothing",
        ),
        (lambda s: s.pop("version"), "not written by this program"),
        (lambda s: s.pop("meta"), "not written by this program"),
        (lambda s: s.update(tensors=[1]), "not written by this program"),
    ],
)
def test_state_that_does_not_fit_is_refused(tmp_path, change, said):
    path = save(tmp_path, 1, 2)
    state = json.loads((path / STATE).read_text())
    change(state)
    (path / STATE).write_text(json.dumps(state))
    resign(path)
    assert said in (message := refusal(path)) and message.endswith(
        f"choose an earlier one: {tmp_path}/step-000001"
    )


def test_another_format_under_valid_checksums_is_refused(tmp_path):
    path = save(tmp_path, 1)
    for name, content in ((TENSORS, b"x" * 50), (STATE, b"[]"), (STATE, b"{"), (STATE, b"\xff")):
        (path / name).write_bytes(content)
        resign(path)
        assert "not written by this program" in refusal(path)


def test_an_error_of_the_disk_is_a_refusal(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    (path / TENSORS).unlink()
    (path / TENSORS).mkdir()
    assert "state.safetensors cannot be read: Is a directory" in refusal(path)
    shutil.rmtree(path)
    path = save(tmp_path, 1)

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(module.hashlib, "file_digest", fail)
    assert "cannot be read: Input/output error" in refusal(path)


# --- which is the latest


def test_latest_is_the_highest_step_that_is_complete(tmp_path):
    assert latest(tmp_path / "none") is None and latest(tmp_path) is None
    save(tmp_path, 999_999, 2, 1_000_000, 30)
    assert latest(str(tmp_path)) == tmp_path / "step-1000000"
    for name in (
        "step-2000000.aside",
        "step-2000000.trash",
        "step-2000000.old2",
        "step-2000000 (copy)",
        "step-x",
        "step-02000000",
        "step-7",
        "xstep-2000000",
        "best",
    ):
        shutil.copytree(tmp_path / "step-1000000", tmp_path / name)
    (tmp_path / "step-2000000").mkdir()
    (tmp_path / "step-2000001").write_text("a file")
    assert latest(tmp_path) == tmp_path / "step-1000000"
    shutil.copytree(tmp_path / "step-1000000", tmp_path / "step-2000000.old")
    assert latest(tmp_path) == tmp_path / "step-2000000.old"
    shutil.copytree(tmp_path / "step-1000000", tmp_path / "step-2000000", dirs_exist_ok=True)
    assert latest(tmp_path) == tmp_path / "step-2000000"


def test_a_folder_that_cannot_be_read(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: cannot look for checkpoints: Not a directory"):
        latest(tmp_path / "file")


def test_a_start_removes_remains_and_nothing_else(tmp_path):
    save(tmp_path, 1, 2)
    for name in ("step-000003.aside", "step-000001.trash", "step-000002.old", "step-000004.old"):
        shutil.copytree(tmp_path / "step-000002", tmp_path / name)
    (tmp_path / "step-000005.old").mkdir()
    for name in (
        "mine",
        "step-000002.bak",
        "step-000006",
    ):  # foreign, and incomplete: perhaps just being copied
        (tmp_path / name).mkdir()
    Checkpoints(tmp_path)
    assert names(tmp_path) == [
        "mine",
        "step-000001",
        "step-000002",
        "step-000002.bak",
        "step-000004",
        "step-000006",
    ]


def test_an_old_one_takes_the_place_of_an_incomplete_new_one(tmp_path):
    save(tmp_path, 1).rename(tmp_path / "step-000001.old")
    (tmp_path / "step-000001").mkdir()
    (tmp_path / "step-000001" / TENSORS).write_text("half")
    Checkpoints(tmp_path)
    assert names(tmp_path) == ["step-000001"]
    check(latest(tmp_path), 1)


# --- which ones are kept


def kept(saved, keep_last, keep_best):
    """Plain specification: the steps kept after these (step, metric)."""
    here = {}
    for step, metric in saved:
        here[step] = metric
        newest = sorted(here)[-keep_last:]
        with_metric = [s for s in here if here[s] is not None and not math.isnan(here[s])]
        best = sorted(
            with_metric, key=lambda s: -s
        )  # the later first, and sorting keeps that among equals
        best = sorted(best, key=lambda s: here[s])[:keep_best]
        here = {s: m for s, m in here.items() if s in newest or s in best or s == step}
    return sorted(here)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 9),
            st.sampled_from([None, math.nan, 0.0, 0.5, 1.0, -math.inf]),
            st.booleans(),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_those_kept_are_the_newest_and_the_best(sequence, keep_last, keep_best):
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, keep_last, keep_best)
        for n, (step, metric, restart) in enumerate(sequence, 1):
            if restart:
                checkpoints = Checkpoints(folder, keep_last, keep_best)
            assert checkpoints.save(step, dict(n=torch.tensor(n)), dict(n=n), metric, wait=True)
            steps = kept([s[:2] for s in sequence[:n]], keep_last, keep_best)
            assert names(folder) == [f"step-{s:06d}" for s in steps]
            assert load(Path(folder) / f"step-{step:06d}")[1] == dict(n=n)
            assert latest(folder) == Path(folder) / f"step-{steps[-1]:06d}"


def test_what_is_of_another_version_or_unreadable_is_not_deleted(tmp_path):
    path = save(tmp_path, 1, 2, 3)
    for step, content in ((1, dict(version=2, metric=0.0)), (2, [])):
        (tmp_path / f"step-{step:06d}" / STATE).write_text(json.dumps(content))
        resign(tmp_path / f"step-{step:06d}")
    (tmp_path / "step-000000").mkdir()
    save(tmp_path, 4, 5, keep_last=1)
    assert (
        names(tmp_path) == ["step-000000", "step-000001", "step-000002", "step-000005"]
        and not path.exists()
    )


@pytest.mark.parametrize(
    "options, said",
    [
        (dict(keep_last=0), "last 0 checkpoints: expected 1 or more"),
        (dict(keep_best=-1), "best -1 checkpoints: expected 0 or more"),
    ],
)
def test_numbers_to_keep(tmp_path, options, said):
    with pytest.raises(InputError, match=said):
        Checkpoints(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


# --- the thread


class Gate:
    """Stops the writer at its first fsync until opened."""

    def __init__(self, monkeypatch):
        self.reached, self.open, fsync = threading.Event(), threading.Event(), os.fsync

        def wait(fd):
            self.priority = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
            self.reached.set()
            assert self.open.wait(20)
            fsync(fd)

        monkeypatch.setattr(os, "fsync", wait)


def test_while_one_is_written_another_is_skipped_or_waits(tmp_path, monkeypatch):
    gate, checkpoints = Gate(monkeypatch), Checkpoints(tmp_path)
    assert not checkpoints.busy
    meta = dict(n=1)
    assert checkpoints.save(1, small(1), meta) and gate.reached.wait(20)
    meta["n"] = "changed by the caller"
    assert (
        checkpoints.busy
        and not checkpoints.save(2, small(2), dict(n=2))
        and latest(tmp_path) is None
    )
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert gate.priority == min(own + 10, 19) or sys.platform != "linux"
    threading.Timer(0.1, gate.open.set).start()
    assert checkpoints.save(3, small(3), dict(n=3), wait=True) and not checkpoints.busy
    assert gate.priority == own  # nobody trains who could be disturbed
    assert names(tmp_path) == ["step-000001", "step-000003"]
    check(tmp_path / "step-000001", 1)
    check(tmp_path / "step-000003", 3)


def test_one_that_must_not_be_lost_waits_for_its_turn(tmp_path, monkeypatch):
    """The last of those that wait: it is better than those before."""
    gate, checkpoints = Gate(monkeypatch), Checkpoints(tmp_path)
    assert checkpoints.save(1, small(1), dict(n=1)) and gate.reached.wait(20)
    assert checkpoints.save(2, small(2), dict(n=2), queue=True)
    assert checkpoints.save(3, small(3), dict(n=3), queue=True)
    assert not checkpoints.save(4, small(4), dict(n=4))
    gate.open.set()
    checkpoints.close()
    assert not checkpoints.busy and names(tmp_path) == ["step-000001", "step-000003"]
    check(tmp_path / "step-000003", 3)


def test_the_last_one_comes_after_one_that_waits(tmp_path, monkeypatch):
    gate, checkpoints = Gate(monkeypatch), Checkpoints(tmp_path)
    assert checkpoints.save(1, small(1), dict(n=1)) and gate.reached.wait(20)
    assert checkpoints.save(2, small(2), dict(n=2), queue=True)
    threading.Timer(0.1, gate.open.set).start()
    assert checkpoints.save(3, small(3), dict(n=3), wait=True)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_what_a_checkpoint_says_is_read_without_its_tensors(tmp_path):
    path = save(tmp_path, 1)
    assert load_meta(path) == dict(n=1)
    (path / TENSORS).write_bytes(b"not read")
    assert load_meta(path) == dict(n=1)
    with pytest.raises(InputError, match="truncated or altered"):
        load(path)
    (path / STATE).write_bytes((path / STATE).read_bytes().replace(b'"n": 1', b'"n": 2'))
    with pytest.raises(InputError, match="altered since it was written"):
        load_meta(path)


def test_close_waits_and_says_so(tmp_path, monkeypatch):
    gate, said = Gate(monkeypatch), []
    checkpoints = Checkpoints(tmp_path, say=said.append)
    checkpoints.close()
    checkpoints.save(1, small(1), dict(n=1))
    threading.Timer(2.3, gate.open.set).start()
    checkpoints.close()
    assert (
        said == [f"waiting for a checkpoint to be written to {tmp_path} ..."]
        and not checkpoints.busy
    )
    check(latest(tmp_path), 1)


def test_the_end_of_the_program_waits_for_the_writer(tmp_path):
    code = (
        "from runtime.checkpoints import *\n"
        f"Checkpoints({str(tmp_path)!r}).save(1, dict(a=torch.ones(9)), {{}})"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert load(latest(tmp_path))[0]["a"].sum() == 9


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    save(tmp_path, 1)
    done, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd)),
    )
    monkeypatch.setattr(
        os, "rename", lambda a, b: (done.append((Path(a).name, Path(b).name)), rename(a, b))
    )
    save(tmp_path, 1)
    assert done == [
        STATE,
        TENSORS,
        COMPLETE,
        "step-000001.aside",
        ("step-000001", "step-000001.old"),
        ("step-000001.aside", "step-000001"),
        tmp_path.name,
        ("step-000001.old", "step-000001.trash"),
    ]


# --- failures


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(small_disk):
    said = []
    checkpoints = Checkpoints(small_disk, say=said.append)
    assert checkpoints.save(1, small(1), dict(n=1), wait=True)
    assert not checkpoints.save(2, dict(large=torch.zeros(10**6)), {}, wait=True)
    assert said == [
        f"{small_disk}: could not write the checkpoint of step 2 (4.0 MB): No space left on "
        "device; training goes on and the others are kept: see to the disk before the next one "
        "is due"
    ]
    assert names(small_disk) == ["step-000001"]
    check(latest(small_disk), 1)
    assert checkpoints.save(3, small(3), dict(n=3), wait=True) and len(said) == 1
    check(latest(small_disk), 3)


def test_a_disk_that_becomes_read_only(small_disk):
    said = []
    checkpoints = Checkpoints(small_disk, say=said.append)
    assert checkpoints.save(1, small(1), dict(n=1), wait=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert not checkpoints.save(2, small(2), {}, wait=True)
    (line,) = said
    assert "step 2" in line and "Read-only file system" in line
    check(latest(small_disk), 1)
    with pytest.raises(
        InputError,
        match="cannot hold checkpoints: Read-only file system; choose a folder that can be",
    ):
        Checkpoints(small_disk)
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert checkpoints.save(2, small(2), dict(n=2), wait=True)
    check(latest(small_disk), 2)


def test_a_limit_on_file_sizes(tmp_path):
    said = []
    checkpoints = Checkpoints(tmp_path, say=said.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert not checkpoints.save(1, dict(large=torch.zeros(10**6)), {}, wait=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in said[0] and names(tmp_path) == []


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        InputError, match="file: cannot hold checkpoints: File exists; choose a folder"
    ):
        Checkpoints(tmp_path / "file")


def test_a_folder_deleted_meanwhile_is_made_again(tmp_path):
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run")
    assert checkpoints.save(1, small(1), dict(n=1), wait=True)
    check(latest(tmp_path / "run" / "checkpoints"), 1)


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_any_call_that_fails_once(tmp_path, monkeypatch, call):
    """Whichever it is, training goes on, a checkpoint is never lost, and the next save cleans up
    and succeeds."""
    function, failures = getattr(os, call), 0
    for n in range(20):
        folder, said, calls = tmp_path / str(n), [], []
        save(folder, 1, 2)
        checkpoints = Checkpoints(folder, keep_last=1, say=said.append)

        def fail(*args, **kwargs):
            calls.append(args)
            if len(calls) == n + 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return function(*args, **kwargs)

        with monkeypatch.context() as m:
            m.setattr(os, call, fail)
            written = checkpoints.save(2, small(12), dict(n=12), wait=True)
        assert (len(said) == 1 and "Input/output error" in said[0]) == (len(calls) > n)
        check(latest(folder), load(latest(folder))[1]["n"])
        assert latest(folder).name == "step-000002" and (
            not written or load(latest(folder))[1]["n"] == 12
        )
        failures += len(calls) > n
        assert checkpoints.save(3, small(3), dict(n=3), wait=True) and len(said) <= 1
        assert names(folder) == ["step-000003"]
        if len(calls) <= n:
            break
    assert failures >= dict(fsync=5, rename=4)[call]


def test_an_unexpected_error_is_one_line_too(tmp_path, monkeypatch):
    said = []
    checkpoints = Checkpoints(tmp_path, say=said.append)

    def fail(_):
        raise RuntimeError("a surprise")

    with monkeypatch.context() as m:
        m.setattr(module, "sync", fail)
        assert not checkpoints.save(1, small(1), {}, wait=True)
    assert "RuntimeError: a surprise" in said[0] and names(tmp_path) == []
    assert checkpoints.save(1, small(1), dict(n=1), wait=True)


# --- processes that are killed, and several of them (this file, run as a program, is those processe


def fork(work):
    """Run work() in a forked process; returns its id."""
    if pid := os.fork():
        return pid
    try:
        work()
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def check_after_kill(folder, cleaned):
    """Every checkpoint that counts loads; cleaned: and nothing else is there. Returns the
    latest's n, or 0."""
    whole = complete(folder)
    for path in whole.values():
        check(path, load(path)[1]["n"])
    if cleaned:
        assert names(folder) == [f"step-{step:06d}" for step in sorted(whole)], names(folder)
    return load(latest(folder))[1]["n"] if whole else 0


def kill_everywhere(folder):
    """Kill a process before each of the calls by which it changes anything: while it saves a new
    checkpoint, replaces one of the same step, deletes others, and cleans up after that."""
    changes = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "open"}

    def killed_at(k):
        """In this process: die before the k-th change."""
        count = 0

        def hook(event, args):
            nonlocal count
            if (
                event in changes
                and (event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR))
                or event == "fsync"
            ):
                count += 1
                if count == k:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        fsync = os.fsync
        os.fsync = lambda fd: (hook("fsync", ()), fsync(fd))

    def dies(work):
        _, status = os.waitpid(fork(work), 0)
        assert status == 0 or os.WTERMSIG(status) == signal.SIGKILL, status
        return status != 0

    save(folder / "start", 1, 2)
    k, seen, left = 0, set(), set()
    while True:
        k += 1
        here, progress = folder / "here", folder / "progress"
        shutil.copytree(folder / "start", here)

        def work():
            said = os.open(progress, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            checkpoints = Checkpoints(here, keep_last=2)
            killed_at(k)
            for n, step in ((3, 3), (4, 3), (5, 4)):
                assert checkpoints.save(step, small(n), dict(n=n), wait=True)
                os.write(said, b"x")

        died = dies(work)
        done = 2 + progress.stat().st_size
        n = check_after_kill(here, cleaned=False)
        assert n == done or n == done + 1, (k, done, n, names(here))
        seen.add((n - done, *(name.partition(".")[2] for name in names(here))))
        remains = tuple(sorted(str(path.relative_to(here)) for path in here.rglob("*")))
        j = 0
        while remains not in left and dies(lambda: (killed_at(j + 1), Checkpoints(here))):
            j += 1
            assert check_after_kill(here, cleaned=False) == n, (k, j)
        left.add(remains)
        Checkpoints(here)
        assert check_after_kill(here, cleaned=True) == n
        save(here, 9, keep_last=1)
        assert check_after_kill(here, cleaned=True) == 9
        shutil.rmtree(here)
        if not died:
            break
    endings = {ending for _, *endings in seen for ending in endings}
    assert k > 40 and endings == {"", "aside", "old", "trash"}, (k, seen)


def kill_at_random(folder):
    """Kill a process that saves as fast as it can, 30 times."""
    r, before, killed = random.Random(0), 0, 0
    for _ in range(30):
        progress = folder.parent / "progress"
        progress.write_text("")

        def work():
            said = os.open(progress, os.O_WRONLY | os.O_APPEND)
            checkpoints = Checkpoints(folder, keep_last=2, keep_best=1)
            for n in range(before + 1, before + 10_000):  # every step twice
                tensors = small(n)
                assert checkpoints.save(n // 2, tensors, dict(n=n), metric=n % 7, wait=True)
                os.write(said, b"x")

        pid = fork(work)
        while not progress.stat().st_size:
            time.sleep(0.001)
        time.sleep(r.uniform(0, 0.06))
        os.kill(pid, signal.SIGKILL)
        killed += os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        done = before + progress.stat().st_size
        n = check_after_kill(folder, cleaned=False)
        assert done <= n <= done + 1, (before, done, n)
        assert len(names(folder)) - len(complete(folder)) <= 2, names(folder)
        Checkpoints(folder)
        assert check_after_kill(folder, cleaned=True) == n
        before = n
    assert killed == 30 and before >= 30, before


def write_together(folder):
    """Two processes save the same steps into one folder."""

    def work(own):
        said = []
        checkpoints = Checkpoints(folder, keep_last=2, say=said.append)
        for step in range(1, 41):
            assert checkpoints.save(
                step, small(100 * own + step), dict(n=100 * own + step), wait=True
            ), said
            if step % 10 == 0:
                checkpoints = Checkpoints(folder, keep_last=2, say=said.append)
        assert not said

    pids = [fork(lambda own=own: work(own)) for own in (1, 2)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]
    assert check_after_kill(folder, cleaned=True) in (140, 240) and len(complete(folder)) <= 3


def hold(folder):
    """Begin to write step 2, say so, and stay there."""
    fsync = os.fsync
    os.fsync = lambda fd: (print("writing", flush=True), sys.stdin.read(), fsync(fd))
    save(folder, 2)


def start(work, folder, **options):
    return subprocess.Popen(
        [sys.executable, __file__, work.__name__, str(folder)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        **options,
    )


@pytest.mark.parametrize(
    "work", [kill_everywhere, pytest.param(kill_at_random, marks=pytest.mark.slow), write_together]
)
def test_processes(tmp_path, work):
    process = start(work, tmp_path / "checkpoints")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error


@pytest.mark.parametrize("end", ["kill", "let go"])
def test_the_work_of_a_living_writer_is_left_alone(tmp_path, monkeypatch, end):
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.1)
    save(tmp_path, 1)
    with start(hold, tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == "writing\n"
        said = []
        checkpoints = Checkpoints(tmp_path, say=said.append)
        assert names(tmp_path) == ["step-000001", "step-000002.aside"]
        assert (
            not checkpoints.save(3, small(3), {}, wait=True)
            and "another process is writing there" in said[0]
        )
        check(latest(tmp_path), 1)
        if end == "kill":
            writer.kill()
        else:
            writer.stdin.close()
        writer.wait()
    Checkpoints(tmp_path)
    assert names(tmp_path) == (["step-000001"] if end == "kill" else ["step-000001", "step-000002"])
    assert checkpoints.save(3, small(3), dict(n=3), wait=True) and len(said) == 1


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(module.fcntl, "flock", fail)
    check(save(tmp_path, 1, 2), 2)


def test_a_run_has_a_store_on_its_first_rank_only(tmp_path):
    """As its options say; what is being written is there when the run ends."""
    log = types.SimpleNamespace(folder=tmp_path, active=True, say=print)
    options = RunConfig(keep_last=1, keep_best=3)
    with open_store(options, log) as store:
        assert (store.keep_last, store.keep_best, store.say) == (1, 3, print)
        assert store.save(5, small(5), dict(n=5))
    check(tmp_path / "checkpoints/step-000005", 5)
    with open_store(RunConfig(checkpoint_every="off"), log) as store:
        assert store is None
    log.active = False
    with open_store(options, log) as store:
        assert store is None


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
