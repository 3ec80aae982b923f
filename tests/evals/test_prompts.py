"""Prompt sets: each check passes for what it should, and a lost prompt is named."""

import json
import shutil

import pytest

from base import InputError
from evals import __main__ as program
from evals import prompts
from evals.results import accuracy, changed_prompts
from evals.scoring import Scorer
from inference.engine import Engine
from runtime.saved import load_run


@pytest.fixture(scope="module")
def asked(trained):
    """passes() of a row by the run's model."""
    saved = load_run(trained[0].run.run_dir)
    scorer = Scorer(saved, quiet=True)
    engine = Engine(saved.model, saved.stage, saved.tokenizer, saved.max_len)
    return lambda row: prompts.passes(scorer, engine, saved.tokenizer, row, {"the"}, 0)


def test_a_pair_passes_where_the_good_one_is_likelier(asked):
    assert asked(dict(prompt="the cat", good=" sees", bad=" qzxj"))
    assert not asked(dict(prompt="the cat", good=" qzxj", bad=" sees"))


def test_what_is_expected_passes_where_it_is_written(asked):
    assert asked(dict(prompt="the cat", expect=["Paris", "e", "a", "o", " "]))
    assert not asked(dict(prompt="the cat", expect=["Paris"]))


def test_coherence_by_its_three_rules():
    words = [f"w{i}" for i in range(100)]
    text = " ".join(words)
    known = set(words)
    assert prompts.is_coherent(text, known)
    assert not prompts.is_coherent("", known)
    assert not prompts.is_coherent(" ".join(words[:8] * 6), known)
    assert not prompts.is_coherent(text + "\nsome w1 line\n" * 3, known | {"some", "line"})
    assert not prompts.is_coherent(text, set(words[:85]))
    assert prompts.is_coherent(text.upper(), set(words[:95]))


def test_the_sets_of_ours_can_be_read():
    assert prompts.own_sets() == ["english", "python"]
    for name in prompts.own_sets():
        rows = prompts.read_prompts(name)
        assert {row["check"] for row in rows} == {"grammar", "facts", "coherence"}
        assert all(row["good"] != row["bad"] for row in rows if "good" in row)


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"prompt": "a"}', '{"check": "c", "prompt": 1}']
    + [
        '{"check": "c", "prompt": "a", "good": "b"}',
        '{"check": "c", "prompt": "a", "expect": [1]}',
    ],
)
def test_a_line_that_is_none_is_named(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text('{"check": "c", "prompt": "a"}\n' + line + "\n")
    with pytest.raises(InputError, match="p.jsonl:2: expected an object"):
        prompts.read_prompts(path)


def test_a_lost_prompt_is_named():
    one = accuracy("prompts", "facts", [1, 0, 1], None, items=("a", "b", "c"))
    other = accuracy("prompts", "facts", [1, 1, 0], None, items=("a", "b", "c"))
    assert changed_prompts([one], [other]) == ["lost: facts: 'b'", "gained: facts: 'c'"]
    assert changed_prompts([one], [one]) == []


def test_the_command_asks_them_of_both_runs(folder, tmp_path, capsys):
    other = shutil.copytree(folder, tmp_path / "other")
    rows = [
        dict(check="mine", prompt="the cat", good=" sees", bad=" qzxj"),
        dict(check="mine", prompt="the", expect=["Paris"]),
        dict(check="free", prompt="the "),
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    argv = ["--run", folder, "--against", other, "--tasks", "prompts", "--prompts", path, "--json"]
    assert program.main(list(map(str, argv))) == 0
    said = json.loads(capsys.readouterr().out)
    mine = {row["metric"]: (row["value"], row["n"]) for row in said["results"]}
    assert mine["mine"] == (0.5, 2) and mine["free"][1] == 1
    assert said["results"][0]["value"] == said["against"]["results"][0]["value"]
