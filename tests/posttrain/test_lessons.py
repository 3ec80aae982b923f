"""What teach-demo teaches: right answers, in the forms that are asked for, nothing asked twice."""

import random
import re

import pytest

from data.chat import read_conversations, read_pairs
from posttrain import lessons as L

FUNCTIONS = [(f"module.f{i}", f"Return the number {i} of something.") for i in range(40)]


@pytest.mark.parametrize("kind", ["sum", *L.KINDS])
def test_both_answers_have_the_form_that_they_are_judged_by(kind):
    for lesson in L.lessons(kind, 50, "sft", 0, FUNCTIONS):
        assert L.is_in_form(lesson, lesson.short) and L.is_in_form(lesson, lesson.long)
        if kind != "sum":
            assert L.is_short(lesson, lesson.short) and not L.is_short(lesson, lesson.long)
        assert not L.is_in_form(lesson, "") and not L.is_in_form(lesson, lesson.long + "\n")


def test_sums_are_worked_out_right():
    for lesson in L.lessons("sum", 200, "test", 1):
        a, b = map(int, re.findall(r"\d+", lesson.question))
        assert lesson.result == L.result_of(lesson.long) == a + b
        for left, right in re.findall(r"(\S+)=(\d+)", lesson.long):
            assert sum(map(int, left.split("+"))) == int(right)
        digits = [step.split("=")[1] for step in lesson.long.split(" ####")[0].split()]
        assert int("".join([digits[-1], *(x[-1] for x in digits[-2::-1])])) == a + b
    assert L.worked_out(999, 1) == "9+1=10 9+0+1=10 9+0+1=10"
    assert L.worked_out(0, 0) == "0+0=0"
    assert L.result_of("12") is None and L.result_of("#### 12 ") is None


def test_nothing_is_both_learned_and_asked():
    asked = {part: set() for part in ("sft", "grpo", "test")}
    for part, questions in asked.items():
        for kind in ("sum", *L.KINDS):
            questions |= {x.question for x in L.lessons(kind, 300, part, 0, FUNCTIONS)}
    assert not asked["sft"] & asked["test"] and not asked["grpo"] & asked["test"]
    assert not asked["sft"] & asked["grpo"]
    sums = random.Random(0).sample(range(1000), 500)
    parts = [L.part_of(f"What is {n}+{n}?") for n in sums]
    assert 240 < parts.count("sft") < 360 and 20 < parts.count("test") < 85


def test_files_are_read_by_what_learns_from_them(tmp_path):
    """And are the same for the same seed."""
    written = []
    for _ in range(2):
        L.write_conversations(tmp_path / "c.jsonl", 3, 100, 20, FUNCTIONS)
        L.write_pairs(tmp_path / "p.jsonl", 3, 20, FUNCTIONS)
        written.append([(tmp_path / name).read_bytes() for name in ("c.jsonl", "p.jsonl")])
    assert written[0] == written[1]
    conversations = list(read_conversations(tmp_path / "c.jsonl"))
    assert {len(messages) for messages in conversations} == {2, 4, 6}  # of one question and more
    turns = [m[i : i + 2] for m in conversations for i in range(0, len(m), 2)]
    sums = [answer.text for question, answer in turns if question.text.startswith("What is ")]
    assert len(turns) == 160 and len(sums) == 100
    assert 15 < sum("=" in text for text in sums) < 45  # WORKED of them
    for pair in read_pairs(tmp_path / "p.jsonl"):
        assert len(pair.chosen[-1].text) < len(pair.rejected[-1].text)


def test_sentences_are_of_functions_classes_and_methods():
    found = dict(L.documented())
    assert len(found) > 1000
    assert found["heapq.merge"] == "Merge multiple sorted inputs into a single sorted output."
    for name in "argparse.ArgumentParser", "bz2.BZ2File.read":
        assert name in found
    assert all(len(says) <= L.MOST_OF_LINE and says.endswith(".") for says in found.values())
    assert not any(part.startswith("_") for name in found for part in name.split("."))


def test_the_held_out_text_shares_no_document(tmp_path):
    L.write_base(tmp_path / "base.txt", tmp_path / "held-out.txt", 0, megabytes=0.2, sums=400)
    base, held_out = (
        set((tmp_path / name).read_text().split("<|endoftext|>"))
        for name in ("base.txt", "held-out.txt")
    )
    assert len(base) > 50 and len(held_out) > 5 and not base & held_out
    for text, part in (base, "sft"), (held_out, "test"):
        lines = [x for doc in text for x in doc.splitlines() if re.match(r"\d+\+\d+: ", x)]
        assert {L.part_of(f"What is {line.split(':')[0]}?") for line in lines} == {part}
        assert len(lines) == (400 if part == "sft" else 40)
