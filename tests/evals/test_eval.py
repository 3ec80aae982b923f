"""./run.sh eval: a table, JSON, a file beside the run, and one line for what does not work."""

import json
import shutil

import pytest

from base import InputError
from data.tokenizers import make_tokenizer
from evals import __main__ as program
from evals import loss
from runtime.saved import load_run


def run(capsys, *argv):
    """(exit status, stdout, stderr)."""
    status = program.main([*map(str, argv)])
    return status, *capsys.readouterr()


def test_the_table_and_the_json_and_the_file_say_the_same(trained, folder, capsys):
    status, out, err = run(capsys, "--run", folder, "--tasks", "val", "train", "--limit", 30)
    assert status == 0
    value = trained[1]["val_bpb"]
    [line] = [line for line in out.splitlines() if line.startswith("val    bits per byte")]
    assert line.split()[4] == f"{value:.4f}" and "pieces of 64 tokens" in line
    kept = json.loads((folder / "eval.json").read_text())
    assert kept["results"][0]["value"] == pytest.approx(value, rel=1e-6)
    assert {row["task"] for row in kept["results"]} == {"val", "train"}

    # Another evaluation adds its numbers, and replaces those that it has anew
    status, out, _ = run(
        capsys, "--run", folder, "--json", "--tasks", "order", "val", "--limit", 30, "--tokens", 500
    )
    said = json.loads(out)
    assert out.count("\n") == 1
    assert [row["metric"] for row in said["results"]].count("acc") == 1
    kept = json.loads((folder / "eval.json").read_text())
    rows = {(row["task"], row["metric"]): row["value"] for row in kept["results"]}
    assert {task for task, _ in rows} == {"val", "train", "order"}
    assert rows["val", "bits per byte"] == said["results"][0]["value"] != value

    # Of other weights they are no longer true
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    run(capsys, "--run", folder, "--tasks", "arithmetic", "--limit", 30)
    kept = json.loads((folder / "eval.json").read_text())
    assert {row["task"] for row in kept["results"]} == {"arithmetic"}


def test_a_text_of_ones_own_and_a_file_of_tasks(folder, tmp_path, capsys):
    text = tmp_path / "mine.txt"
    text.write_text("the cat sees a dog<|endoftext|>the dog sees a cat")
    file = tmp_path / "quiz.jsonl"
    rows = [dict(query="the red", choices=["cat", "qzx"], gold=0) for _ in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)))
    status, out, err = run(capsys, "--run", folder, "--text", text, "--tasks", file)
    assert status == 0 and "quiz" in out and str(text) in out
    assert "1.0000" in next(line for line in out.splitlines() if line.startswith("quiz"))
    measured = json.loads((folder / "eval.json").read_text())["results"][0]
    assert measured["n"] == 1  # 37 tokens


def test_two_runs_beside_each_other(folder, tmp_path, capsys):
    other = shutil.copytree(folder, tmp_path / "other")
    tasks = ("--tasks", "val", "order", "--limit", 30)
    status, out, _ = run(capsys, "--run", folder, "--against", other, "--json", *tasks)
    said = json.loads(out)
    pairs = list(zip(said["results"], said["against"]["results"]))
    assert pairs and all(a["value"] == b["value"] and not b["verdict"] for a, b in pairs)
    assert not (other / "eval.json").exists()
    status, out, _ = run(capsys, "--run", folder, "--against", other, *tasks)
    assert "difference" in out and "+0.0000" in out


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--tasks", "nonsense"], "--tasks nonsense: expected val, train"),
        (["--limit", "-1"], "--limit -1: expected 0 or more"),
        (["--overlap", "64"], "--overlap 64: expected less than a row, 64"),
        (["--run", "nowhere"], "nowhere"),
        (["--text", "nowhere.txt"], "nowhere.txt: no such file"),
    ],
)
def test_what_does_not_work_is_one_line(folder, capsys, argv, said):
    if "--run" not in argv:
        argv = ["--run", folder, *argv]
    status, out, err = run(capsys, *argv)
    assert status == 2 and out == ""
    assert said in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_text_that_has_changed_since_is_not_taken_for_what_it_was(folder, capsys):
    path = folder / "result.json"
    result = json.loads(path.read_text()) | dict(data_fingerprint="another")
    path.write_text(json.dumps(result))
    status, _, err = run(capsys, "--run", folder)
    assert status == 2 and "no longer the text" in err


def test_tokens_that_mean_something_else_by_now_are_not_measured(folder):
    saved = load_run(folder)
    loss.open_corpus(saved)
    learned = make_tokenizer("bpe:300", lambda: ["the cat sees a dog"] * 9)
    (folder / "tokenizer.json").write_text(learned.to_json())
    with pytest.raises(InputError, match="others in the run; name a text with --text"):
        loss.open_corpus(saved)
