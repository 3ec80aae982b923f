"""Rewards by name, and what is said of questions and functions that do not fit them."""

import pytest

from base import InputError
from data.questions import Question
from posttrain.rewards import Reward, last_number
from runtime.policy import PolicyConfig


def reward(name, *questions, **fields):
    questions = [Question(f"q.jsonl:{i}", (1,), q) for i, q in enumerate(questions, start=1)]
    return Reward(PolicyConfig(reward=name, **fields), questions)


def worth(name, answer, fields):
    judge = reward(name, fields)
    found = judge(answer, Question("q.jsonl:1", (1,), fields))
    judge.close()
    return found


@pytest.mark.parametrize(
    "name, answer, fields, expected",
    [
        ("exact", " 12\n", dict(answer="12"), 1),
        ("exact", "12.", dict(answer="12"), 0),
        ("exact", "12", dict(answer=12), 1),
        ("exact", "", dict(answer="12"), 0),
        ("exact", "", dict(answer=""), 1),
        ("number", "It is 1,200.", dict(answer="1200"), 1),
        ("number", "4 + 3 = 7", dict(answer=7), 1),
        ("number", "7\n#### 5 apples, not 8", dict(answer="#### 8"), 1),
        ("number", "-3.50", dict(answer=-3.5), 1),
        ("number", "none", dict(answer="0"), 0),
        ("number", "", dict(answer="1"), 0),
        ("regex", "so <b>yes</b>", dict(pattern="<b>(yes|no)</b>"), 1),
        ("regex", "so yes", dict(pattern="^yes"), 0),
        ("regex:^[0-9]+$", "12", {}, 1),
        ("regex:^[0-9]+$", "12a", {}, 0),
        ("regex:a:b", "a:b", {}, 1),
        ("python", "def f(x): return x + 1", dict(tests="assert f(1) == 2"), 1),
        ("python", "Well:\n```python\nf = abs\n```\n", dict(tests=["assert f(-1) == 1"]), 1),
        ("python", "def f(x): return x", dict(tests=["assert f(1) == 1", "assert f(1) == 2"]), 0),
        ("python", "", dict(tests="assert f"), 0),
        ("python", "raise SystemExit(0)", dict(tests="assert False"), 0),
    ],
)
def test_rewards_by_name(name, answer, fields, expected):
    assert worth(name, answer, fields) == expected


def test_code_without_an_end_is_worth_nothing():
    judge = reward("python", dict(tests="1"), reward_seconds=0.3)
    assert judge("while True: pass", Question("q", (1,), dict(tests="1"))) == 0
    assert judge("1", Question("q", (1,), dict(tests="1"))) == 1
    judge.close()


def test_numbers_are_read_as_people_write_them():
    assert last_number("1,234,567.5 or so") == 1234567.5
    assert last_number("a-5") == -5 and last_number("") is None


@pytest.mark.parametrize(
    "name, fields, said",
    [
        ("exact", {}, "q.jsonl:1: answer: expected a text or a number"),
        ("exact", dict(answer=None), "q.jsonl:1: answer: expected a text or a number"),
        ("exact", dict(answer=True), "q.jsonl:1: answer: expected a text or a number"),
        ("number", dict(answer="many"), "q.jsonl:1: answer: expected a number, found 'many'"),
        ("regex", dict(answer="x"), "q.jsonl:1: pattern: expected a regular expression"),
        ("regex", dict(pattern="("), "q.jsonl:1: pattern '('"),
        ("regex:(", {}, "--reward regex:(: pattern '('"),
        ("python", dict(tests=3), "q.jsonl:1: tests: expected a text of Python"),
        ("best", {}, "--reward best: expected exact, number"),
        ("nowhere.py:f", {}, "--reward nowhere.py:f: nowhere.py is no file"),
        ("nowhere.py", {}, "--reward nowhere.py: expected exact"),
    ],
)
def test_what_does_not_fit_is_one_line(name, fields, said):
    with pytest.raises(InputError) as error:
        reward(name, fields)
    assert str(error.value).startswith(said) and "\n" not in str(error.value)


def test_a_function_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def f(answer, question): return len(answer) - question['n']")
    judge = reward(f"{path}:f", dict(n=1))
    assert judge("abc", Question("q.jsonl:1", (1,), dict(n=1))) == 2.0
    with pytest.raises(InputError) as error:
        judge("abc", Question("q.jsonl:2", (1,), {}))
    judge.close()
    said = str(error.value)
    assert "raised KeyError: 'n', for the answer 'abc' to q.jsonl:2" in said and "--resume" in said
    with pytest.raises(InputError, match="has no function g; it has f; expected a function"):
        reward(f"{path}:g", dict(n=1))
    with pytest.raises(InputError, match="expected a function's name"):
        reward(f"{path}:", dict(n=1))
