"""./run.sh data tokenizer: train and report."""

import json
import re

import pytest

from data import tokenizer_report
from data.__main__ import main
from data.tokenizers import SPECIALS, load_tokenizer, make_tokenizer

WORDS = "one two three four five six seven eight nine ten eleven twelve".split()
TEXT = "".join(f"{a} {b} {c}, {a}{b}.\n" for a in WORDS for b in WORDS for c in WORDS) * 4


def run(capsys, *argv):
    status = main(["tokenizer", *map(str, argv)])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    import tiktoken

    def fail(name):
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)


def test_train_writes_exactly_so_many_ids(capsys, tmp_path, text):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(dict(body="zzyzx zzyzx zzyzx " * 20)) + "\n")
    out = tmp_path / "tokenizer.json"
    status, said, _ = run(capsys, "train", text, "--size", 400, "--out", out)
    said = json.loads(said)
    tok = load_tokenizer(tmp_path)
    assert status == 0 and tok.n_vocab == said["n_vocab"] == 400 and [*tok.specials] == [*SPECIALS]
    assert said["bytes"] == len(TEXT) and said["specials"] == tok.specials
    assert tok.to_json() == make_tokenizer("qwen2:400", lambda: iter([TEXT])).to_json()

    both = ["train", text, rows, "--column", "body", "--size", 400, "--out", out]
    assert run(capsys, *both)[0] == 0
    assert b" zzyzx" in load_tokenizer(tmp_path).tokens and out.read_text() != tok.to_json()


@pytest.mark.parametrize(
    "options, why",
    [
        (["--size", 100_000], "has pairs for [0-9]+ ids only"),
        (["--size", 100], "expected 264 to"),
        (["--size", 400, "--out", "no/where/t.json"], "there is no folder"),
    ],
)
def test_train_refuses_in_one_line(capsys, tmp_path, text, options, why):
    out = tmp_path / "t.json"
    status, said, err = run(capsys, "train", text, "--out", out, *options)
    last = err.splitlines()[-1]
    assert status == 2 and said == "" and last.startswith("error: ") and not out.exists()
    assert re.search(why, last)


def test_report(capsys, tmp_path, text):
    file = tmp_path / "given.json"
    run(capsys, "train", text, "--size", 300, "--out", file)
    names = ["qwen2:300", "qwen2:400", "bytes", file, "gpt2"]
    status, said, err = run(capsys, "report", text, "--tokenizers", *names)
    assert status == 0 and "without gpt2" in err
    lines = said.splitlines()
    rows = {line.split()[0]: line.split() for line in lines[2:6]}
    assert rows["bytes"][1:3] == ["257", "1.000"] and rows["qwen2:400"][1] == "400"
    assert float(rows["qwen2:400"][2]) > float(rows["qwen2:300"][2]) > 1.5
    assert "qwen2:400 takes" in said and "tokens than bytes" in said
    assert "400 ids squared" in said and "a rule of thumb" in said
    assert "1|2|3|4|5|6|7" in said and "·" in said and r"\n" in said


def test_counts(tmp_path):
    tok = make_tokenizer("bytes", lambda: iter([]))
    row = tokenizer_report.count(tok, ["abc"], {"x": ["ab ab"], "y": ["é"]})
    assert row["bytes_per_token"] == dict(x=1.0, y=1.0) and row["tokens_per_word"] == 7 / 3
    assert (row["tokens"], row["all_tokens"]) == (7, 10)
    assert (row["n_text"], row["unused"], row["never"]) == (256, 251, 250)


def test_the_rule_in_words():
    rows = dict(gpt2=dict(tokens=1000), mine=dict(tokens=840), other=dict(tokens=860))
    mine, other = tokenizer_report.comparisons(rows)
    assert "mine takes 16.0% fewer tokens than gpt2" in mine and " is worth it" in mine
    assert "14.0% fewer" in other and "not worth it" in other
    [nothing] = tokenizer_report.comparisons({"qwen2:400": dict(tokens=1)})
    assert "not at hand" in nothing


def test_too_little_text(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("short")
    status, _, err = run(capsys, "report", tmp_path / "a.txt", "--tokenizers", "bytes")
    assert status == 2 and "expected ten or more" in err
