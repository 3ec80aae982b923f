"""CORE's bundle: tasks as its files say, and the mean of what is centered."""

import json
import zipfile

import numpy as np
import pytest

from base import InputError
from evals import __main__ as program
from evals import core

YAML = """
icl_tasks:
- {label: pick, dataset_uri: a/pick.jsonl, num_fewshot: [2], icl_task_type: multiple_choice}
- label: go_on
  dataset_uri: go_on.jsonl
  num_fewshot: [0]
  icl_task_type: language_modeling
  continuation_delimiter: "\\n"
"""


@pytest.fixture
def bundle(tmp_path):
    """A bundle as the network has it."""
    root = tmp_path / "down" / "eval_bundle"
    (root / "eval_data" / "a").mkdir(parents=True)
    (root / "core.yaml").write_text(YAML)
    (root / "eval_meta_data.csv").write_text("Eval Task,Random baseline\npick,25\ngo_on,0.0\n")
    rows = [dict(query=f"the {i}", choices=["cat", "qzx"], gold=i % 2) for i in range(8)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "eval_data" / "a" / "pick.jsonl").write_text(text)
    row = dict(context="the ", continuation="cat")
    (root / "eval_data" / "go_on.jsonl").write_text(json.dumps(row) + "\n")
    return root


def test_tasks_are_as_the_files_say(bundle):
    pick, go_on = core.read_bundle(bundle.parent)
    assert (pick.name, pick.chance, len(pick.items)) == ("pick", 0.25, 8)
    assert pick.items[0].pairs[0][0].count("\n\n") == 2
    assert go_on.chance == 0 and go_on.items[0].pairs == (("the", "\ncat"),)
    assert len(core.read_bundle(bundle, 4)[0].items) == 4


def test_core_is_the_mean_of_the_centered(bundle, folder, capsys):
    assert program.main(["--run", str(folder), "--tasks", str(bundle), "--json"]) == 0
    rows = {r["task"]: r for r in json.loads(capsys.readouterr().out)["results"]}
    assert rows["pick"]["metric"] == "acc_norm by tokens" and rows["go_on"]["metric"] == "exact"
    right = rows["pick"]["value"]
    expected = ((right - 0.25) / 0.75 + rows["go_on"]["value"]) / 2
    assert rows["CORE"]["value"] == pytest.approx(expected)
    assert rows["CORE"]["stderr"] == pytest.approx(rows["pick"]["stderr"] / 0.75 / 2)
    answers = np.arange(8) < round(8 * right)
    assert rows["pick"]["stderr"] == pytest.approx(np.std(answers, ddof=1) / 8**0.5)


def test_it_is_fetched_once(bundle, tmp_path, monkeypatch):
    archive = tmp_path / "eval_bundle.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in bundle.rglob("*.*"):
            file.write(path, path.relative_to(bundle.parent))
    monkeypatch.setattr(core, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(core, "BUNDLE", archive.as_uri())
    path = core.fetched("core")
    assert len(core.read_bundle(path)) == 2
    archive.unlink()
    assert core.fetched("core") == path
    monkeypatch.setattr(core, "HELLASWAG", (tmp_path / "gone.jsonl").as_uri())
    with pytest.raises(InputError, match="--tasks hellaswag: file:.*could not be fetched"):
        core.fetched("hellaswag")
    assert not [p for p in (tmp_path / "cache" / "evals").iterdir() if p != path]


def test_what_is_no_bundle_is_one_line(bundle, tmp_path):
    with pytest.raises(InputError, match="expected CORE's bundle"):
        core.read_bundle(tmp_path / "down" / "eval_bundle" / "eval_data")
    (bundle / "eval_meta_data.csv").write_text("Eval Task,Random baseline\npick,25\n")
    with pytest.raises(InputError, match="not CORE's bundle .KeyError: 'go_on'"):
        core.read_bundle(bundle)
