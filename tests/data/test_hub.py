"""data/sources/hub.py against a small hub in this process."""

import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from base import InputError
from data import reading
from data.recipe import from_table
from data.sources import hub as source

REPO = "someone/stories"
REVISIONS = ["a" * 40, "b" * 40]  # the second is the newest


def lines(*texts):
    return "".join(json.dumps(dict(story=text)) + "\n" for text in texts).encode()


class Hub(ThreadingHTTPServer):
    """What a set of the Hub takes: the description of a revision, then HEAD and GET of files."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = {
            "data/train-0.jsonl": lines("one", "two") * 3000,
            "data/train-1.jsonl": lines("three"),
            "data/test-0.jsonl": lines("a test"),
            "README.md": b"# Stories",
        }
        self.seen = []  # (method, path, Range header)
        self.cut = {}  # name: drop the connection, once, after so many bytes
        self.corrupt = {}  # name: how many more downloads get a wrong byte


class Answer(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status, body, headers=(), send=None):
        self.send_response(status)
        for key, value in [("Content-Length", len(body)), *headers]:
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:send])

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server
        path = self.path.split("?")[0]
        hub.seen.append((self.command, path, self.headers.get("Range")))
        if path.startswith(f"/api/datasets/{REPO}"):
            asked = path.partition("/revision/")[2] or REVISIONS[-1]
            return self.reply(200, json.dumps(self.described(asked)).encode())
        for name, body in hub.files.items():
            if path.endswith(f"/{name}") and path.split("/resolve/")[-1].split("/")[0] in REVISIONS:
                return self.file(name, body, path.split("/resolve/")[1].split("/")[0])
        self.reply(404, b"", [("X-Error-Message", "there is no such thing")])

    def described(self, revision):
        siblings = [
            dict(
                rfilename=name,
                size=len(body),
                lfs=dict(sha256=hashlib.sha256(body).hexdigest(), size=len(body), pointerSize=1),
            )
            for name, body in self.server.files.items()
        ]
        card = dict(license="cdla-sharing-1.0")
        return dict(id=REPO, sha=revision, siblings=siblings, cardData=card, tags=[])

    def file(self, name, body, revision):
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        headers = [("ETag", etag), ("X-Repo-Commit", revision)]
        status = 200
        send = None
        if self.command == "GET":
            if self.server.corrupt.get(name, 0):
                self.server.corrupt[name] -= 1
                body = body[:-2] + b"?\n"
            if asked := self.headers.get("Range"):
                first = int(asked.removeprefix("bytes=").removesuffix("-"))
                status = 206
                headers.append(("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}"))
                body = body[first:]
            send = self.server.cut.pop(name, None)
        self.reply(status, body, headers, send)


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
        "HF_HUB_ETAG_TIMEOUT": 5,
        "HF_HUB_DOWNLOAD_TIMEOUT": 5,
        "DOWNLOAD_CHUNK_SIZE": 1000,  # what is resumed is whole ones
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "ENDPOINT": url,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setenv("NO_PROXY", "*")
    find_address = socket.getaddrinfo

    def here_only(host, *args, **kwargs):
        assert host in ("127.0.0.1", b"127.0.0.1"), f"{host}: these tests are offline"
        return find_address(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", here_only)
    yield server
    server.shutdown()
    server.server_close()


def part(**keys):
    return from_table(dict(source=[dict(hub=REPO, column="story") | keys]), "a test").source[0]


def fetched(hub):
    return [path.split("/resolve/")[1] for method, path, _ in hub.seen if method == "GET"
            and "/resolve/" in path]  # fmt: skip


def test_files_that_fit_are_fetched_once_at_the_newest_revision(tmp_path, hub):
    wanted = part(files="data/train-*.jsonl")
    files = reading.locate(wanted, tmp_path)
    assert files.names == ["data/train-0.jsonl", "data/train-1.jsonl"]
    assert files.about["revision"] == REVISIONS[-1]
    assert files.about["licence"] == "cdla-sharing-1.0" and files.about["repository"] == REPO
    texts = [document.text for document in reading.documents(wanted, files)]
    assert texts[:3] == ["one", "two", "one"] and texts[-1] == "three" and len(texts) == 6001
    assert fetched(hub) == [f"{REVISIONS[-1]}/data/train-{i}.jsonl" for i in (0, 1)]

    hub.shutdown()  # what is there needs no network
    assert reading.locate(wanted, tmp_path) == files


def test_a_pinned_revision_is_the_one_that_is_fetched(tmp_path, hub):
    files = reading.locate(part(files="data/train-1*", revision=REVISIONS[0]), tmp_path)
    assert files.about["revision"] == REVISIONS[0]
    assert fetched(hub) == [f"{REVISIONS[0]}/data/train-1.jsonl"]


def test_an_interrupted_download_is_resumed(tmp_path, hub):
    name = "data/train-0.jsonl"
    hub.cut[name] = 10_000
    files = reading.locate(part(files=name), tmp_path)
    assert files.paths[0].read_bytes() == hub.files[name]
    ranges = [asked for method, path, asked in hub.seen if method == "GET" and path.endswith(name)]
    assert ranges[0] is None and ranges[-1] == "bytes=10000-"


def test_a_corrupt_download_is_fetched_again_and_a_second_one_refused(tmp_path, hub):
    name = "data/train-1.jsonl"
    hub.corrupt[name] = 1
    files = reading.locate(part(files=name), tmp_path)
    assert files.paths[0].read_bytes() == hub.files[name]
    hub.corrupt[name] = 2
    with pytest.raises(InputError, match="expected sha256 .* in two downloads"):
        reading.locate(part(files=name, revision=REVISIONS[0]), tmp_path)
    assert not Path(tmp_path, "hub", "someone--stories", REVISIONS[0], name).exists()


def test_no_file_fits_or_there_is_no_such_set(tmp_path, hub):
    with pytest.raises(InputError, match="no file fits nothing; there are README.md, data/test-0"):
        reading.locate(part(files="nothing"), tmp_path)
    with pytest.raises(InputError, match="answered HTTP 404"):
        reading.locate(part(hub="someone/else"), tmp_path)


def test_every_known_set_names_its_files_or_what_it_needs():
    for name, known in source.KNOWN.items():
        assert bool(known.files) != bool(known.needs), name
        assert known.repo.count("/") == 1
