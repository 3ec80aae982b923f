"""data/emit.py: a recipe as a script for datatrove, which keeps what a build keeps."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from near_duplicates import edited_documents

from data.__main__ import main
from data.pieces import read_lines

for module in ("zstandard", "ftfy", "py3langid"):
    pytest.importorskip(module)

ROOT = Path(__file__).resolve().parents[2]
# A Python that has datatrove[io,processing] and what requirements-data.txt names
DATATROVE = os.environ.get("STOPWATCH_DATATROVE", sys.executable)


@pytest.fixture
def recipe(tmp_path):
    """Three sources with exact and near duplicates within and across them."""
    texts = edited_documents(150, seed=5)
    (tmp_path / "files").mkdir()
    for i, text in enumerate(texts[:50] + texts[:5]):
        (tmp_path / "files" / f"{i:03d}.txt").write_text(text)
    for name, some in (("rows", texts[40:100]), ("held", texts[90:])):
        lines = [json.dumps(dict(text=text, id=f"{name}{i}")) for i, text in enumerate(some)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    path = tmp_path / "recipe.toml"
    path.write_text(
        """
        tokenizer = "bytes"
        val_fraction = 0.1
        [decontaminate]
        validation = false
        [[source]]
        path = "files"
        preset = "code"
        [[source]]
        path = "rows.jsonl"
        preset = "none"
        [source.filters]
        words = { least = 150 }
        [[source]]
        path = "held.jsonl"
        preset = "none"
        split = "val"
        """
    )
    return path


def test_the_script_has_the_thresholds(tmp_path, recipe):
    script = tmp_path / "cluster.py"
    assert main(["build", str(recipe), "--emit", "datatrove", str(script)]) == 0
    text = script.read_text()
    compile(text, script, "exec")
    for said in ("'code_mean_line': {'most': 100}", "'least': 150", "'threshold': 0.8", str(ROOT)):
        assert said in text
    assert f"'path': '{tmp_path}/files'" in text and "$" not in text


@pytest.mark.parametrize(
    "kind, line, why",
    [
        ("datatrove", "[dedup]\nparts = 'lines'\n", "not with parts"),
        ("datatrove", "limit = 5\n", "not with a limit"),
        ("spark", "", "expected datatrove"),
    ],
)
def test_what_it_cannot_do_is_refused(tmp_path, capsys, recipe, kind, line, why):
    recipe.write_text(recipe.read_text() + line)
    assert main(["build", str(recipe), "--emit", kind, str(tmp_path / "x.py")]) == 2
    assert why in capsys.readouterr().err and not (tmp_path / "x.py").exists()


@pytest.mark.slow
def test_datatrove_keeps_what_a_build_keeps(tmp_path, recipe):
    there = subprocess.run([DATATROVE, "-c", "import datatrove, orjson, ftfy, zstandard"])
    if there.returncode:
        pytest.skip("no datatrove; STOPWATCH_DATATROVE names a Python that has it")
    out = tmp_path / "out"
    assert main(["build", str(recipe), "--out", str(out), "--processes", "1"]) == 0
    built = {}
    for path in sorted((out / "text").glob("*.zst")):
        built |= {(line["source"], line["id"]): line["text"] for line in read_lines(path)}
    read = json.loads((out / "manifest.json").read_text())["documents"]
    assert 50 < len(built) < read - 50  # many are copies, or short

    script = tmp_path / "cluster.py"
    assert main(["build", str(recipe), "--emit", "datatrove", str(script)]) == 0
    for tasks in 1, 4:
        folder = tmp_path / f"with-{tasks}"
        command = [DATATROVE, script, "--out", folder, "--tasks", str(tasks), "--workers", "2"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        kept = {}
        for path in (folder / "documents").glob("*.jsonl.gz"):
            for line in gzip.open(path, "rt", encoding="utf-8"):
                said = json.loads(line)
                kept[said["metadata"]["source"], said["id"]] = said["text"]
        assert kept == built
        shutil.rmtree(folder)
