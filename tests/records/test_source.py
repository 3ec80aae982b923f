"""records/source.py: an archive of everything that training stands on, the same bytes for the same
source, and a digest that ties it to a log."""

import ast
import bz2
import os
import subprocess

import pytest
from processes import ROOT

from base import InputError
from records import source
from records.source import ARCHIVE, digest_of, files_in, header_line, named_in, source_of

FILES = {"train_gpt.py": b"print(1)\n", "run.sh": b"exit 0\n", "data/a.py": b"", "base/b.py": b"x"}


def write(root, files=FILES, mtime=1e9):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
        os.utime(root / name, (mtime, mtime))
    return root


def test_what_was_packed_comes_back():
    packed = source_of(FILES)
    assert packed == source_of(dict(reversed(FILES.items())))
    assert packed.digest != source_of(FILES | {"data/a.py": b" "}).digest
    assert packed.digest != source_of(FILES | {"data/c.py": b""}).digest


def test_the_same_files_give_the_same_bytes(tmp_path):
    """Whatever their dates and modes, and whatever lies beside them."""
    first = source.pack_source(write(tmp_path / "a"))
    other = write(tmp_path / "b", mtime=2e9)
    (other / "train_gpt.py").chmod(0o600)
    beside = {".cache/x.py": b"1", "runs/y.py": b"1", "data/.copies/a.py": b"1", "data/a.bin": b"1"}
    write(other, beside)
    assert source.pack_source(other) == first == source_of(FILES)


def test_standard_tools_read_it_and_compute_its_digest(tmp_path):
    packed = source_of(FILES)
    (tmp_path / ARCHIVE).write_bytes(packed.archive)
    line = f"cd {tmp_path} && tar xjf {ARCHIVE} && bzip2 -dc {ARCHIVE} | sha256sum"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs tar, bzip2 and sha256sum: {done.stderr}")
    assert done.stdout.split()[0] == packed.digest
    assert all((tmp_path / name).read_bytes() == content for name, content in FILES.items())
    assert os.access(tmp_path / "run.sh", os.X_OK)


def test_the_digest_does_not_depend_on_the_compression(tmp_path):
    packed = source_of(FILES)
    (tmp_path / "a").write_bytes(bz2.compress(bz2.decompress(packed.archive), 1))
    assert digest_of(tmp_path / "a") == packed.digest
    assert files_in(tmp_path / "a") == FILES


def imported(name, code):
    """Files of ours that a file imports, those inside functions too, as far as names tell."""
    folder = name.split("/")[:-1]
    for node in ast.walk(ast.parse(code)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1] if node.level else []
            base = base + (node.module or "").split(".") if node.module else base
            modules = [base, *([*base, alias.name] for alias in node.names)]
        for parts in modules:
            for path in ("/".join(parts) + ".py", "/".join([*parts, "__init__.py"])):
                if (ROOT / path).is_file():
                    yield path


def test_it_holds_everything_that_training_imports(tmp_path):
    (tmp_path / ARCHIVE).write_bytes(source.pack_source(ROOT).archive)
    files = files_in(tmp_path / ARCHIVE)
    for name in ("train_gpt.py", "run.sh", "requirements.txt", "tracks/laptop.py"):
        assert files[name] == (ROOT / name).read_bytes()
    lacking = set()
    for name, code in files.items():
        if name.endswith(".py"):
            lacking |= {(name, path) for path in imported(name, code) if path not in files}
    assert not lacking


def test_header_lines():
    packed = source_of(FILES)
    assert named_in(header_line(packed)) == (ARCHIVE, packed.digest)
    assert named_in(header_line(packed, "source-ab.tar.bz2"))[0] == "source-ab.tar.bz2"
    for line in ("", "source: x", header_line(packed) + "0", header_line(packed, "../source")):
        assert named_in(line) is None


def test_a_log_and_its_archive(tmp_path):
    packed = source_of(FILES)
    seed = tmp_path / "seed0"
    seed.mkdir()
    assert source.check(seed, ARCHIVE, packed.digest) is None
    (tmp_path / ARCHIVE).write_bytes(packed.archive)
    assert source.check(seed, ARCHIVE, packed.digest) == tmp_path / ARCHIVE
    with pytest.raises(InputError, match="is not the source that the run was made from"):
        source.check(seed, ARCHIVE, "0" * 64)
    (seed / ARCHIVE).write_bytes(packed.archive)  # its own comes first
    assert source.check(seed, ARCHIVE, packed.digest) == seed / ARCHIVE


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "folder"])
def test_damaged_archives(tmp_path, damage):
    path = tmp_path / ARCHIVE
    content = source_of(FILES).archive
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(dict(cut=content[:-9], empty=b"", text=b"text")[damage])
    with pytest.raises(InputError, match="cannot be read|cut short"):
        digest_of(path)


def test_no_tar_inside(tmp_path):
    (tmp_path / ARCHIVE).write_bytes(bz2.compress(b"x" * 1000))
    with pytest.raises(InputError, match="no archive of source files"):
        files_in(tmp_path / ARCHIVE)


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MOST_BYTES", 5000)
    (tmp_path / ARCHIVE).write_bytes(bz2.compress(bytes(5001)))
    with pytest.raises(InputError, match="more than 5,000 bytes"):
        digest_of(tmp_path / ARCHIVE)
