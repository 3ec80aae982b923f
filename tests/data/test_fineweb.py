"""data/sources/fineweb10B.py against a small Hub on this machine: tiny shards, real HTTP, the real
huggingface_hub.

huggingface_hub reads HF_ENDPOINT when imported, so real downloads run as a command in a process of
their own, about 1 s each (`run`). What ends with the listing, and what no server can play, runs in
this one (`here`).
"""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs

import numpy as np
import pytest

from base import InputError
from data.__main__ import main
from data.shards import MAGIC
from data.sources import fineweb10B as fineweb

ROOT = Path(__file__).resolve().parents[2]
VAL, TRAIN_1, TRAIN_2 = NAMES = [fineweb.VAL, *fineweb.TRAIN[:2]]
LISTING = fineweb.REVISION  # the last part of the listing's URL; for a file it is the file's name
PINNED = fineweb.KNOWN_SHA256
DOWNLOAD = "download", "fineweb10B"
COMMAND = """
import sys
from data.__main__ import main
from data.sources import fineweb10B as fineweb
assert "huggingface_hub" not in sys.modules, "importing a source must stay quick"
fineweb.KNOWN_SHA256 = {fineweb.VAL: sys.argv.pop(1)}
sys.exit(main(["download", "fineweb10B", *sys.argv[1:]]))
"""


def shard(seed, n_tokens=1000):
    """The bytes of a valid shard."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, 1, n_tokens
    return (
        header.tobytes()
        + np.random.default_rng(seed).integers(0, 50257, n_tokens).astype("<u2").tobytes()
    )


def flipped(body):
    """The same number of bytes, one of them wrong."""
    return body[:-1] + bytes([body[-1] ^ 1])


def sha256(body):
    return hashlib.sha256(body).hexdigest()


class Hub(ThreadingHTTPServer):
    """The three requests a download makes: POST paths-info (the listing), then HEAD and GET of
    each file."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.files = {name: shard(seed) for seed, name in enumerate(NAMES)}
        self.seen = []  # (method, last part of the path, Range header)
        self.status = {}  # method: the HTTP status to fail with
        self.corrupt = {}  # name: how many more downloads get a wrong byte
        self.cut = {}  # name: drop the connection, once, after so many bytes
        self.awake = threading.Event()  # while cleared, listings wait
        self.awake.set()

    def gets(self, name):
        return [range_ for method, last, range_ in self.seen if (method, last) == ("GET", name)]


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def start(self):
        """Note the request and return the last part of its path, or fail it and return None."""
        hub, last = self.server, self.path.rsplit("/", 1)[-1]
        hub.seen.append((self.command, last, self.headers.get("Range")))
        right = self.path in (
            f"/api/datasets/{fineweb.REPO}/paths-info/{fineweb.REVISION}",
            f"/datasets/{fineweb.REPO}/resolve/{fineweb.REVISION}/{last}",
        )
        status = hub.status.get(self.command, 200 if right else 404)
        if status == 200:
            return last
        self.reply(status, b"", [("X-Error-Message", "made up for a test")])

    def reply(self, status, body, headers=(), send=None):
        self.send_response(status)
        for key, value in [("Content-Length", len(body)), *headers]:
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:send])

    def do_POST(self):
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        if self.start():
            self.server.awake.wait(20)
            listing = [
                {
                    "type": "file",
                    "path": name,
                    "oid": "0" * 40,
                    "size": len(body),
                    "lfs": {"oid": sha256(body), "size": len(body), "pointerSize": 134},
                }
                for name, body in self.server.files.items()
                if name in asked
            ]
            self.reply(200, json.dumps(listing).encode())

    def do_HEAD(self):
        if name := self.start():
            body = self.server.files[name]
            etag = f'"{sha256(body)}"'
            self.reply(
                200,
                body,
                [
                    ("ETag", etag),
                    ("X-Linked-Etag", etag),
                    ("X-Linked-Size", len(body)),
                    ("X-Repo-Commit", fineweb.REVISION),
                ],
            )

    def do_GET(self):
        if name := self.start():
            hub, body, status, headers = self.server, self.server.files[name], 200, []
            if hub.corrupt.get(name, 0):
                hub.corrupt[name] -= 1
                body = flipped(body)
            if asked := self.headers.get("Range"):
                first = int(asked.removeprefix("bytes=").removesuffix("-"))
                status, headers = (
                    206,
                    [("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")],
                )
                body = body[first:]
            self.reply(status, body, headers, send=hub.cut.pop(name, None))


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.awake.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def nowhere():
    """The address of a port that refuses connections."""
    with socket.socket() as s:  # bound but not listening: nobody else gets the port meanwhile
        s.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{s.getsockname()[1]}"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "shards"


@pytest.fixture
def endpoint(hub, monkeypatch):
    """Points the client in this process to the small Hub, or to another address when called."""
    from huggingface_hub import constants

    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
        "HF_HUB_ETAG_TIMEOUT": 5,
        "HF_HUB_DOWNLOAD_TIMEOUT": 5,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setattr(fineweb, "KNOWN_SHA256", {VAL: sha256(hub.files[VAL])})

    def endpoint(url):
        template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setenv("HF_ENDPOINT", url)

    find_address = socket.getaddrinfo

    def here_only(host, *args, **kwargs):
        assert host in ("127.0.0.1", b"127.0.0.1"), f"{host}: these tests are offline"
        return find_address(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", here_only)
    endpoint(hub.url)
    return endpoint


def options(folder):
    return ["--folder", str(folder), "--train-shards", "2"]


def checked(status, stdout, stderr):
    """What a command did: stdout, stderr and its error line, None for success."""
    assert "Traceback" not in stderr, stderr
    error = None
    if status:
        error = stderr.splitlines()[-1]
        assert status == 2 and error.startswith("error: ") and not stdout, (stdout, stderr)
        assert stderr.count("error: ") == 1
    return SimpleNamespace(stdout=stdout, stderr=stderr, error=error)


@pytest.fixture
def run(endpoint, folder, capsys):
    """Run the command for two training shards in this process, with the real client."""

    def run():
        capsys.readouterr()
        status = main([*DOWNLOAD, *options(folder)])
        return checked(status, *capsys.readouterr())

    return run


@pytest.fixture
def start(hub, folder, tmp_path):
    """The same in a process of its own, which takes seconds."""

    def start(*command):
        env = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith("HF_") and "proxy" not in k.lower()
        }
        env |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, *command, *options(folder)],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return checked(done.returncode, done.stdout, done.stderr)

    return start


@pytest.fixture
def here(hub, folder, endpoint, monkeypatch):
    """download() of two shards in this process; a stand-in for hf_hub_download notes what it
    `fetched`."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)

    def fetch(repo, name, *, revision, local_dir, **_):
        here.fetched.append((name, revision))
        (local_dir / name).write_bytes(hub.files[name])

    def here(train_shards=2, **kwargs):
        return fineweb.download(folder, train_shards, **kwargs)

    def error(**kwargs):
        with pytest.raises(InputError) as e:
            here(**kwargs)
        assert "\n" not in str(e.value)
        return str(e.value)

    def client(name, replacement):
        owner = huggingface_hub.HfApi if name == "get_paths_info" else huggingface_hub
        monkeypatch.setattr(owner, name, replacement)

    here.fetched = []
    here.error = error
    here.client = client
    here.endpoint = endpoint
    client("hf_hub_download", fetch)
    return here


def fill(folder, files):
    """Put files there as if copied by hand."""
    folder.mkdir(exist_ok=True)
    for name, body in files.items():
        (folder / name).write_bytes(body)


def on_disk(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


# ---- downloading


def test_download_then_second_start_without_any_request(start, run, hub, folder):
    """The first in a process of its own, to see all of what it asks for and what it imports."""
    first = start("-c", COMMAND, sha256(hub.files[VAL]))
    assert first.error is None and first.stdout.count("\n") == 1, first
    assert on_disk(folder) == hub.files
    assert {last for _, last, _ in hub.seen} == {LISTING, *NAMES}  # nothing else: no telemetry
    assert all(len(hub.gets(name)) == 1 for name in NAMES)
    hub.seen.clear()
    second = run()
    assert second.error is None and second.stdout == first.stdout and second.stderr == ""
    assert hub.seen == []


def test_lost_connection_is_resumed(run, hub, folder):
    hub.files[TRAIN_1] = shard(
        7, n_tokens=6_000_000
    )  # 12 MB, because the client writes 10 MiB at a time
    hub.cut[TRAIN_1] = 11 << 20
    assert run().error is None
    assert on_disk(folder) == hub.files
    assert hub.gets(TRAIN_1) == [None, f"bytes={10 << 20}-"]


def test_corrupt_download_is_fetched_once_more(run, hub, folder):
    hub.corrupt[TRAIN_1] = 1
    done = run()
    assert done.error is None and on_disk(folder) == hub.files
    assert len(hub.gets(TRAIN_1)) == 2
    assert f"{TRAIN_1}: corrupt download 1 of 2, deleted" in done.stderr


def test_corrupt_twice_is_an_error(run, hub, folder):
    hub.corrupt[TRAIN_1] = 99
    error = run().error
    assert len(hub.gets(TRAIN_1)) == 2
    body = hub.files[TRAIN_1]
    for part in TRAIN_1, f"expected sha256 {sha256(body)}", f"found {sha256(flipped(body))}":
        assert part in error
    assert set(on_disk(folder)) == {VAL}, "what came whole is kept, what did not is gone"


def test_second_download_goes_past_the_cache_of_the_client(here, hub, folder):
    def fetch(repo, name, *, local_dir, force_download, **_):
        (local_dir / name).write_bytes(
            hub.files[name] if force_download else flipped(hub.files[name])
        )

    here.client("hf_hub_download", fetch)
    here()
    assert on_disk(folder) == hub.files


def test_what_is_no_shard_is_refused(here, hub, folder):
    hub.files[TRAIN_2] = b"<html>" * 1000
    error = here.error()
    assert TRAIN_2 in error and f"expected magic {MAGIC}" in error
    assert set(on_disk(folder)) == {VAL, TRAIN_1}


def test_pinned_checksum_outranks_the_hub(run, hub, folder, monkeypatch):
    """The real constant, which this Hub's file cannot match."""
    monkeypatch.setattr(fineweb, "KNOWN_SHA256", PINNED)
    error = run().error
    assert "fineweb_val_000000.bin: expected sha256 5b95c8e0966f0861" in error
    assert on_disk(folder) == {}


def test_another_revision_is_asked_for_and_has_no_pin(here, hub, folder):
    def listing(self, repo, names, *, repo_type, revision):
        asked.append(revision)
        return [
            SimpleNamespace(
                path=name,
                size=len(hub.files[name]),
                lfs=SimpleNamespace(sha256=sha256(hub.files[name])),
            )
            for name in names
        ]

    asked = []
    here()
    hub.files = {name: shard(100 + seed) for seed, name in enumerate(NAMES)}
    here.client("get_paths_info", listing)
    here.fetched.clear()
    here(revision="main")  # notes of one revision say nothing about another
    assert asked == ["main"] and here.fetched == [(name, "main") for name in NAMES]
    assert on_disk(folder) == hub.files


def test_paths_are_train_then_val(here, folder):
    assert here() == ([folder / TRAIN_1, folder / TRAIN_2], [folder / VAL])
    assert here(1) == ([folder / TRAIN_1], [folder / VAL])


# ---- files that are already there


def test_damaged_files_are_replaced(run, hub, folder):
    fill(
        folder,
        {**hub.files, TRAIN_1: hub.files[TRAIN_1][:-2], TRAIN_2: flipped(hub.files[TRAIN_2])},
    )
    done = run()
    assert done.error is None and on_disk(folder) == hub.files
    assert [len(hub.gets(name)) for name in NAMES] == [0, 1, 1]
    assert f"{TRAIN_1}: expected 3024 bytes, found 3022; downloading it again" in done.stderr


def test_change_after_the_check_is_noticed(here, hub, folder):
    here()
    body, path = hub.files[TRAIN_1], folder / TRAIN_1
    for changed, later_ns in (
        (flipped(body), 1),
        (shard(9, 900), 0),
    ):  # one shows by its time, one by its size
        mtime_ns = path.stat().st_mtime_ns
        path.write_bytes(changed)
        os.utime(path, ns=(mtime_ns, mtime_ns + later_ns))
        here.fetched.clear()
        here()
        assert here.fetched == [(TRAIN_1, fineweb.REVISION)] and on_disk(folder) == hub.files


@pytest.mark.parametrize("notes", ["{", "[]", f'{{"{VAL}": 3}}', f'{{"{VAL}": {{}}}}'])
def test_damaged_notes_only_cost_a_comparison(here, hub, folder, notes):
    fill(folder, hub.files)
    (folder / "checked.json").write_text(notes)
    here()
    assert here.fetched == [] and len(hub.seen) == 1
    here()
    assert len(hub.seen) == 1


def test_notes_do_not_outlive_the_pin(here, hub, folder, monkeypatch):
    here()
    hub.files[VAL] = shard(9)
    monkeypatch.setattr(fineweb, "KNOWN_SHA256", {VAL: sha256(hub.files[VAL])})
    here()
    assert on_disk(folder) == hub.files


def test_notes_that_cannot_be_written_are_no_error(here, hub, folder, capsys):
    fill(folder, hub.files)
    (folder / "checked.json").mkdir()
    here()
    assert capsys.readouterr().err.count("the next start will compare the shards again") == 1
    assert not list(folder.glob("*.tmp"))


def test_hand_copies_are_accepted_offline_and_verified_online(run, endpoint, hub, folder, nowhere):
    fill(folder, hub.files)
    endpoint(nowhere)
    offline = run()
    assert offline.error is None and "2 training shards" in offline.stdout
    assert offline.stderr.count("\n") == 1
    assert "checksums not verified for 2 shards" in offline.stderr
    endpoint(hub.url)
    assert run().error is None and [method for method, *_ in hub.seen] == ["POST"]
    endpoint(nowhere)
    assert run().stderr == "", "verified by now"


@pytest.mark.parametrize(
    "name, damage, found",
    [
        (VAL, flipped, "expected sha256"),  # the pinned one needs no Hub
        (TRAIN_1, lambda body: body[:-2], "expected 3024 bytes for 1000 tokens, found 3022"),
        (TRAIN_2, lambda body: b"", "found a file of 0 bytes"),
    ],
)
def test_bad_hand_copies_are_refused_offline_and_kept(
    here, hub, folder, nowhere, name, damage, found
):
    files = {**hub.files, name: damage(hub.files[name])}
    fill(folder, files)
    here.endpoint(nowhere)
    error = here.error()
    for part in str(folder / name), found, "cannot reach the Hub":
        assert part in error
    assert on_disk(folder) == files


def test_a_file_altered_and_its_time_set_back_is_noticed(here, hub, folder, nowhere):
    """Programs may set mtime, but not ctime. Offline what the Hub listed is still known."""
    here()
    path = folder / TRAIN_1
    before = path.stat()
    path.write_bytes(flipped(hub.files[TRAIN_1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    here.endpoint(nowhere)
    error = here.error()
    for part in (
        str(path),
        f"expected sha256 {sha256(hub.files[TRAIN_1])}",
        f"found {sha256(flipped(hub.files[TRAIN_1]))}",
        "cannot reach the Hub",
    ):
        assert part in error
    assert path.read_bytes() == flipped(hub.files[TRAIN_1])
    here.endpoint(hub.url)
    here.fetched.clear()
    here()
    assert here.fetched == [(TRAIN_1, fineweb.REVISION)] and on_disk(folder) == hub.files


def test_a_copied_folder_is_hashed_but_needs_no_hub(here, hub, folder, nowhere, capfd, monkeypatch):
    """Copies have other times."""
    here()
    for name in NAMES:
        os.utime(folder / name)
    here.endpoint(nowhere)
    capfd.readouterr()
    here()
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(fineweb, "sha256_of", lambda path: pytest.fail("hashed again"))
    here()


def test_hand_copies_are_remembered_as_they_were_first_seen(here, hub, folder, nowhere):
    """Without the Hub nobody knows whether they are right, but a change shows."""
    fill(folder, hub.files)
    here.endpoint(nowhere)
    here()
    here()
    (folder / TRAIN_2).write_bytes(flipped(hub.files[TRAIN_2]))
    error = here.error()
    for part in str(folder / TRAIN_2), "expected sha256", "unlike when first seen", "checked.json":
        assert part in error
    (folder / "checked.json").unlink()  # what it says helps
    here()


def test_verify_hashes_what_looks_untouched(here, hub, folder, capsys):
    """What the disk itself has changed has the size and times that were noted."""
    here()
    (folder / TRAIN_1).write_bytes(flipped(hub.files[TRAIN_1]))
    notes = json.loads((folder / "checked.json").read_text())
    notes[TRAIN_1] |= fineweb._stamp(folder / TRAIN_1)
    (folder / "checked.json").write_text(json.dumps(notes))
    here.fetched.clear()
    here()
    assert here.fetched == [], "a start takes the times' word, as the docstring says"
    assert main([*DOWNLOAD, "--folder", str(folder), "--train-shards", "2", "--verify"]) == 0
    assert here.fetched == [(TRAIN_1, fineweb.REVISION)] and on_disk(folder) == hub.files


def test_notes_of_before_have_no_ctime_and_are_completed(here, hub, folder, nowhere):
    here()
    notes = json.loads((folder / "checked.json").read_text())
    old = {name: {k: v for k, v in note.items() if k != "ctime_ns"} for name, note in notes.items()}
    (folder / "checked.json").write_text(json.dumps(old))
    here.endpoint(nowhere)
    here()
    assert json.loads((folder / "checked.json").read_text()) == notes


# ---- nothing lost, nothing outside the folder


def test_a_failing_download_keeps_what_was_there(here, hub, folder):
    """Also the damaged file it was to replace, until there is a whole one."""
    here()
    (folder / TRAIN_1).write_bytes(b"damaged")
    before = on_disk(folder)

    def half(repo, name, *, local_dir, **_):
        (local_dir / name).write_bytes(hub.files[name][:1500])
        raise KeyboardInterrupt

    here.client("hf_hub_download", half)
    with pytest.raises(KeyboardInterrupt):
        here()
    assert on_disk(folder) == before and sorted(os.listdir(folder)) == sorted(
        [*NAMES, "checked.json"]
    )


@pytest.mark.parametrize("locks", [True, False])
def test_several_processes_download_at_once(here, hub, folder, tmp_path, monkeypatch, locks):
    """Each file once where the file system has locks; where not, nobody reads or deletes a half."""

    def listing(self, repo, names, **_):
        return [
            SimpleNamespace(
                path=name,
                size=len(hub.files[name]),
                lfs=SimpleNamespace(sha256=sha256(hub.files[name])),
            )
            for name in names
        ]

    def slowly(repo, name, *, local_dir, **_):
        with open(tmp_path / "fetched", "a") as f:
            f.write(name + "\n")
        with open(local_dir / name, "wb") as f:
            for at in range(0, len(hub.files[name]), 500):
                f.write(hub.files[name][at : at + 500])
                f.flush()
                time.sleep(0.01)

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    def work():
        barrier.wait(20)
        for _ in range(20):
            train, val = here()
            assert [len(fineweb.read_shard(path)) for path in train + val] == [1000] * 3

    here.client("get_paths_info", listing)
    here.client("hf_hub_download", slowly)
    if not locks:
        monkeypatch.setattr("base.files.fcntl.flock", no_locks)
    fill(folder, {TRAIN_2: flipped(hub.files[TRAIN_2])})
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(3)
    workers = [fork.Process(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 3
    assert on_disk(folder) == hub.files and sorted(os.listdir(folder)) == sorted(
        [*NAMES, "checked.json"]
    )
    assert len((tmp_path / "fetched").read_text().split()) in ([3] if locks else range(4, 10))


EVIL = [
    "../evil.bin",
    "/tmp/evil.bin",
    "sub/../../evil.bin",
    f"../{TRAIN_1}",
    "checked.json",
    "",
    "..",
    "C:\\evil",
]


def test_a_listing_cannot_name_files_elsewhere(here, hub, folder, tmp_path):
    """Only the names that were asked for are taken from it."""

    def listing(self, repo, names, **_):
        lfs = SimpleNamespace(sha256=sha256(hub.files[TRAIN_1]))
        return [
            SimpleNamespace(path=path, size=len(hub.files[TRAIN_1]), lfs=lfs) for path in EVIL
        ] + [
            SimpleNamespace(
                path=name,
                size=len(hub.files[name]),
                lfs=SimpleNamespace(sha256=sha256(hub.files[name])),
            )
            for name in names
        ]

    before = set(tmp_path.iterdir())
    here.client("get_paths_info", listing)
    here()
    assert sorted(name for name, _ in here.fetched) == sorted(NAMES)
    assert set(tmp_path.iterdir()) - before == {folder}
    assert sorted(os.listdir(folder)) == sorted([*NAMES, "checked.json"])


@pytest.mark.parametrize("size", [None, "3024", -1, 2**80])
def test_a_listing_with_impossible_sizes(here, hub, folder, size):
    here.client(
        "get_paths_info",
        lambda self, repo, names, **_: [
            SimpleNamespace(path=name, size=size, lfs=SimpleNamespace(sha256="0" * 64))
            for name in names
        ],
    )
    assert here.error() and on_disk(folder) == {}


def test_links_are_read_but_not_written_through(here, hub, folder, tmp_path):
    """A damaged or missing target is replaced by a file in the folder; what lies elsewhere stays
    as it is."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(hub.files[VAL])
    bad.write_bytes(b"not ours")
    folder.mkdir()
    for name, target in {VAL: good, TRAIN_1: bad, TRAIN_2: tmp_path / "nowhere"}.items():
        (folder / name).symlink_to(target)
    here()
    assert [name for name, _ in here.fetched] == [TRAIN_1, TRAIN_2]
    assert (
        (folder / VAL).is_symlink()
        and not (folder / TRAIN_1).is_symlink()
        and not (folder / TRAIN_2).is_symlink()
    )
    assert (
        bad.read_bytes() == b"not ours"
        and not (tmp_path / "nowhere").exists()
        and on_disk(folder) == hub.files
    )


def test_a_pipe_in_a_shards_place_is_not_waited_for(here, hub, folder, nowhere):
    folder.mkdir()
    os.mkfifo(folder / VAL)
    here.endpoint(nowhere)
    assert str(folder / VAL) in here.error()


# ---- what can go wrong


def test_unreachable_hub_is_one_line_that_says_what_to_do(run, endpoint, folder, nowhere):
    endpoint(nowhere)
    start = time.monotonic()
    done = run()
    assert time.monotonic() - start < 15
    assert done.stderr == done.error + "\n"
    for part in [
        str(folder / VAL),
        "cannot reach the Hub",
        nowhere,
        "refused",
        "check the network",
        "HF_ENDPOINT",
        "by hand",
    ]:
        assert part in done.error
    assert not folder.exists()


def test_silent_hub_is_given_up_on(here, hub):
    hub.awake.clear()
    start = time.monotonic()
    assert "timed out" in here.error()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "status, advice",
    [
        (401, "HF_TOKEN"),
        (403, "HF_TOKEN"),
        (404, "check the revision"),
        (429, "wait a few minutes"),
        (500, "try again later"),
        (503, "try again later"),
    ],
)
def test_http_errors_of_the_listing(here, hub, status, advice):
    hub.status["POST"] = status
    error = here.error()
    for part in VAL, f"HTTP {status} (made up for a test)", advice, "by hand":
        assert part in error
    assert len(hub.seen) == 1, "no retry: the user should not wait for this line"


@pytest.mark.parametrize(
    "method, status, advice", [("HEAD", 403, "HF_TOKEN"), ("GET", 503, "try again later")]
)
def test_http_errors_of_a_file(run, hub, folder, method, status, advice):
    hub.status[method] = status
    error = run().error
    for part in str(folder / VAL), f"HTTP {status} (made up for a test)", advice:
        assert part in error
    assert on_disk(folder) == {}


def test_unlisted_file(here, hub):
    del hub.files[TRAIN_2]
    error = here.error()
    assert f"the Hub has no {TRAIN_2}" in error and fineweb.REVISION in error and here.fetched == []


LISTS, FETCHES = "get_paths_info", "hf_hub_download"


@pytest.mark.parametrize(
    "client, raised, parts",
    [
        (
            LISTS,
            socket.gaierror(-3, "Temporary failure in name resolution"),
            ["reach", "name resolution"],
        ),
        (LISTS, ValueError("not JSON:\n a login page"), ["reach", "(not JSON: a login page)"]),
        (LISTS, TimeoutError(), ["reach", "(TimeoutError)"]),
        (FETCHES, ConnectionResetError(errno.ECONNRESET, "Connection reset"), ["reach", "reset"]),
        (
            FETCHES,
            OSError(errno.ENOSPC, "Kein Platz"),
            ["cannot write", "Kein Platz", "free some space"],
        ),
        (FETCHES, OSError(errno.EDQUOT, "Disk quota exceeded"), ["cannot write", "quota"]),
        (
            FETCHES,
            RuntimeError("xet: No space left on device"),
            ["cannot write", "free some space"],
        ),
        (
            FETCHES,
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            ["cannot write", "/a/b"],
        ),
    ],
)
def test_errors_of_the_client(here, client, raised, parts):
    def fail(*_, **__):
        raise raised

    here.client(client, fail)
    error = here.error()
    for part in VAL, *parts:
        assert part in error


def test_short_disk_is_refused_before_downloading(here, hub, folder, monkeypatch):
    fill(folder, {VAL: hub.files[VAL]})
    need = len(hub.files[TRAIN_1]) + len(
        hub.files[TRAIN_2]
    )  # the file already there does not count
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need - 1))
    error = here.error()
    assert (
        f"expected {need:,} bytes" in error
        and f"found {need - 1:,}" in error
        and here.fetched == []
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=need))
    here()
    assert on_disk(folder) == hub.files


def test_folder_that_cannot_be_one(here, folder):
    folder.write_text("a file is in the way")
    assert str(folder) in here.error() and here.fetched == []


def test_path_that_cannot_be_a_file(here, hub, folder):
    (folder / VAL).mkdir(parents=True)
    assert str(folder / VAL) in here.error() and here.fetched == []


@pytest.mark.parametrize("train_shards", [-1, 0, 104])
def test_train_shards_out_of_range(here, hub, folder, capsys, train_shards):
    assert main([*DOWNLOAD, "--folder", str(folder), "--train-shards", str(train_shards)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"error: train_shards: expected 1 to 103, found {train_shards}\n"
    assert hub.seen == [] and not folder.exists()


def test_names_of_all_shards():
    assert (fineweb.TRAIN[0], fineweb.TRAIN[-1]) == (
        "fineweb_train_000001.bin",
        "fineweb_train_000103.bin",
    )
