"""export/hub.py against a hub on this machine: what is sent, to whom it is shown, and that a token
is never written."""

import base64
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from export_helpers import export, llama_run, qwen2

from base import InputError
from export.hub import Hub

TOKENIZER = qwen2(300)
TOKENS = {"hf_writes": "write", "hf_reads": "read", "hf_powerless": "fineGrained"}


class FakeHub(ThreadingHTTPServer):
    """As much of the Hub as an upload needs."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = {}  # name -> dict(private, files)
        self.objects = {}  # SHA-256 -> bytes, of large files
        self.requests_seen = []
        self.publishes = False  # whether it makes repositories public, whatever is asked for
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)

    def answer(self, said, status=200, **headers):
        data = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def role(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return TOKENS.get(token)

    def do_GET(self):
        self.server.requests_seen.append(self.path)
        if self.path == "/api/whoami-v2":
            if not self.role():
                return self.answer(dict(error="Invalid credentials"), 401)
            auth = dict(accessToken=dict(role=self.role()))
            return self.answer(dict(name="me", type="user", orgs=[dict(name="ours")], auth=auth))
        name = re.fullmatch(r"/api/models/([\w-]+/[\w-]+)", self.path)
        if name and name[1] in self.server.repos:
            private = self.server.repos[name[1]]["private"]
            return self.answer(dict(id=name[1], private=private, siblings=[], tags=[]))
        self.answer(dict(error="not found"), 404, X_Error_Code="RepoNotFound")

    def do_PUT(self):
        self.server.objects[self.path.removeprefix("/lfs/")] = self.body()
        self.answer({})

    def do_POST(self):
        self.server.requests_seen.append(self.path)
        body = self.body()
        if self.role() != "write":
            return self.answer(dict(error="Forbidden"), 403)
        if self.path == "/api/repos/create":
            said = json.loads(body)
            name = f"{said.get('organization') or 'me'}/{said['name']}"
            private = said.get("visibility") == "private" and not self.server.publishes
            self.server.repos.setdefault(name, dict(private=private, files={}))
            return self.answer(dict(url=f"{self.server.url}/{name}", id=name, name=name))
        if self.path == "/api/validate-yaml":  # of README.md
            return self.answer(dict(errors=[], warnings=[]))
        if "/preupload/" in self.path:
            files = [
                dict(
                    path=f["path"],
                    uploadMode="lfs" if f["path"].endswith(("safetensors", "gguf")) else "regular",
                    shouldIgnore=False,
                )
                for f in json.loads(body)["files"]
            ]
            return self.answer(dict(files=files))
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                dict(o, actions=dict(upload=dict(href=f"{self.server.url}/lfs/{o['oid']}")))
                for o in json.loads(body)["objects"]
            ]
            return self.answer(dict(transfer="basic", objects=objects))
        name = re.match(r"/api/models/([\w-]+/[\w-]+)/commit/main", self.path)[1]
        files = self.server.repos[name]["files"]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        self.answer(dict(commitUrl=f"{self.server.url}/{name}/commit/1", commitOid="1"))


@pytest.fixture
def hub(monkeypatch):
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "hf_writes")
        # By the environment where it is imported only now
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield hub
        hub.shutdown()


@pytest.fixture
def run(tmp_path):
    return llama_run(tmp_path / "run", TOKENIZER)


@pytest.fixture
def push(capsys, run, tmp_path):
    """push(*options): (exit status, stdout, stderr), neither of which has the token."""

    def call(*options, to="hf"):
        result = export(capsys, run, to, tmp_path / "out", *options)
        for token in TOKENS:
            assert token not in result[1] + result[2]
        return result

    return call


def test_a_folder_arrives_whole_and_private(hub, push, tmp_path):
    status, out, err = push("--push", "me/model")
    assert (status, out) == (0, f"{tmp_path / 'out'}\n{hub.url}/me/model\n"), err
    repo = hub.repos["me/model"]
    assert repo["private"] is True
    here = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert repo["files"] == here
    assert len(here) == 6
    for content in here.values():
        assert b"hf_writes" not in content


def test_a_gguf_arrives_with_a_card(hub, push, tmp_path):
    assert push("--push", "ours/model", to="gguf")[0] == 0
    files = hub.repos["ours/model"]["files"]
    assert files["out"] == (tmp_path / "out").read_bytes()
    assert b"llama-cli -m out" in files["README.md"]
    assert files.keys() == {"out", "README.md"}


def test_public_is_said_twice(hub, push, tmp_path):
    status, _, err = push("--push", "me/model", "--public", "me/other")
    assert status == 2
    assert "expected the name of --push a second time, me/model" in err
    assert push("--public", "me/model")[0] == 2
    assert hub.requests_seen == []
    assert push("--push", "me/model", "--public", "me/model")[0] == 0
    assert hub.repos["me/model"]["private"] is False


def refused(result, tmp_path, *said):
    """One line, and neither here nor there is anything new."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    for words in said:
        assert words in err, err
    assert not (tmp_path / "out").exists()


def test_what_is_public_is_not_written_by_mistake(hub, push, tmp_path):
    hub.repos["me/shown"] = dict(private=False, files={})
    hub.repos["me/hidden"] = dict(private=True, files={})
    refused(push("--push", "me/shown"), tmp_path, "is there and public")
    given = "--push", "me/hidden", "--public", "me/hidden"
    refused(push(*given), tmp_path, "is there and private")
    assert push("--push", "me/hidden")[0] == 0
    assert "config.json" in hub.repos["me/hidden"]["files"]


def test_a_hub_that_publishes_gets_nothing(hub, push):
    hub.publishes = True
    status, _, err = push("--push", "me/model")
    assert status == 2
    assert "has been made public by the Hub, so nothing was sent" in err
    assert hub.repos["me/model"]["files"] == {}


def test_rights_are_asked_for_before_the_work(hub, push, tmp_path, monkeypatch):
    refused(push("--push", "theirs/model"), tmp_path, "the token is of me, ours, not of theirs")
    refused(push("--push", "model"), tmp_path, "expected USER/NAME")
    monkeypatch.setenv("HF_TOKEN", "hf_reads")
    refused(push("--push", "me/model"), tmp_path, "the token may only read")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(push("--push", "me/model"), tmp_path, "may not tell who it is of (401)")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    refused(push("--push", "me/model"), tmp_path, "no token in the environment", "HF_TOKEN")
    assert hub.repos == {}


def test_a_token_without_the_right_to_write(hub, push, tmp_path, monkeypatch):
    """Which only shows when the repository is made: what was written here stays."""
    monkeypatch.setenv("HF_TOKEN", "hf_powerless")
    status, out, err = push("--push", "me/model")
    assert (status, out) == (2, f"{tmp_path / 'out'}\n")
    assert "this token may not make the repository (403)" in err
    assert hub.repos == {}


def test_no_hub_there(push, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(push("--push", "me/model"), tmp_path, "the Hub could not tell who it is of")


def test_torchtitans_folder_is_not_for_the_hub(hub, push, tmp_path):
    refused(push("--push", "me/model", to="torchtitan"), tmp_path, "--push: is for --to hf")


def test_an_error_does_not_show_the_token():
    hub = object.__new__(Hub)
    hub.name = "me/model"
    hub.token = "hf_writes"
    with pytest.raises(InputError) as e:
        hub.refuse("Invalid header:\nBearer hf_writes")
    assert str(e.value) == "--push me/model: Invalid header: Bearer ***"
