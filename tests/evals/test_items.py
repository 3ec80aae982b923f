"""Multiple choice and completion: the forms of files, and what is counted as right."""

import json
import random

import numpy as np
import pytest
import torch

from base import InputError
from evals import generated
from evals.items import Item, Task, judged, measure_task, read_task
from evals.results import Measure, accuracy, comparison, difference, verdict
from evals.scoring import Scored, Scorer
from runtime.saved import load_run

HELLASWAG = dict(
    activity_label="Baking",
    ctx_a="A man [substeps] sits. [title] Then",
    ctx_b="the oven",
    endings=["is hot.", "sings [step] loudly."],
    label="1",
)
CHOICE = dict(query="Two and two are", choices=["four", "five", "six"], gold=0)
SCHEMA = dict(context_options=["The cat", "The dog"], continuation="barked", gold=1)
COMPLETION = dict(context="Paris is in ", continuation="France")


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def scorer(trained):
    return Scorer(load_run(trained[0].run.run_dir), quiet=True)


# --- Files


def test_the_forms_of_files(tmp_path):
    [item] = read_task(write(tmp_path / "a.jsonl", HELLASWAG)).items
    context = "Baking: A man sits.. Then The oven"
    assert item.pairs == ((context, " is hot."), (context, " sings loudly."))
    assert item.gold == 1

    task = read_task(write(tmp_path / "b.jsonl", CHOICE))
    assert task.items[0].pairs[2] == ("Two and two are", " six")
    assert task.chance == pytest.approx(1 / 3) and task.items[0].gold == 0
    task = read_task(write(tmp_path / "c.jsonl", SCHEMA))
    assert task.items[0].pairs == (("The cat", " barked"), ("The dog", " barked"))
    task = read_task(write(tmp_path / "d.jsonl", COMPLETION))
    assert task.items[0].pairs == (("Paris is in", " France"),)
    assert task.chance == 0 and task.items[0].gold is None


def test_examples_are_solved_and_others_than_the_item(tmp_path):
    rows = [dict(CHOICE, query=f"Number {i}", gold=i % 3) for i in range(9)]
    task = read_task(write(tmp_path / "a.jsonl", *rows), most=5, examples=2)
    assert len(task.items) == 5 and "2 examples" in task.note
    for item in task.items:
        *shown, last = item.pairs[0][0].split("\n\n")
        assert len(shown) == 2 and last not in [text.rsplit(" ", 1)[0] for text in shown]
        for text in shown:
            number = int(text.split()[1])
            assert text == f"Number {number} {CHOICE['choices'][number % 3]}"


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"query": 1}', "expected the fields"),
        ("{", "not JSON"),
        ("[]", "no object"),
        (json.dumps(CHOICE | dict(gold=3)), "expected the fields"),
        (json.dumps(CHOICE | dict(choices=["one"], gold=0)), "expected the fields"),
    ],
)
def test_a_line_of_another_form_is_named(tmp_path, line, said):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(CHOICE) + "\n" + line + "\n")
    with pytest.raises(InputError, match=f"a.jsonl:2: .*{said}"):
        read_task(path)


def test_files_that_hold_nothing_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(InputError, match="empty"):
        read_task(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="several forms"):
        read_task(write(tmp_path / "a.jsonl", CHOICE, COMPLETION))
    with pytest.raises(InputError, match="more than 1 examples"):
        read_task(write(tmp_path / "a.jsonl", CHOICE), examples=1)


# --- Scores


def test_what_likeliest_means():
    item = Item((("a", " bb"), ("a", " cccccccc")), 0)
    pairs = [([1], [2]), ([1], [3, 4, 5])]
    found = [Scored(np.array(x), None, 0) for x in ([-4.0], [-2.0, -3.0, -3.0])]
    assert judged(item, pairs, found) == {
        "acc": True,  # -4 above -8
        "acc_norm by characters": False,  # -2 below -1
        "acc_norm by tokens": False,  # -4 below -2.67
    }
    # The first two tokens are the same: only -3 counts, of 5 tokens' mean that is -2.67
    item = Item((("a", " bbb"), ("a", " ccc")), 0, from_difference=True)
    pairs = [([1], [2, 3]), ([1], [2, 4, 5])]
    found = [Scored(np.array(x), None, 0) for x in ([-1.0, -2.9], [-1.0, -3.0, -3.0])]
    assert judged(item, pairs, found)["acc_norm by tokens"]


def test_continuations_are_scored_as_the_loss_has_them(scorer):
    """Padding, order and batches change nothing."""
    texts = [("the cat ", "sees a dog and"), ("a", " b"), ("the old tree", " but then why who")] * 9
    pairs = []
    for context, continuation in texts:
        before, after = scorer.encode_pair(context, continuation)
        pairs.append(([scorer.tokenizer.eot, *before], after))
    random.Random(0).shuffle(pairs)
    for pair, scored in zip(pairs, scorer.continuations(pairs, greedy=True)):
        before, after = pair
        nats = scorer.windows([np.array(before + after)], 64)
        assert -scored.log_probs == pytest.approx(nats[-len(after) :], abs=1e-5)
        assert scored.n_cut == 0 and scored.is_greedy in (True, False)


def test_greedy_is_what_sampling_would_write(scorer):
    tokens = [scorer.tokenizer.eot, *b"the "]
    cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32)
    logits = scorer.model.logits(torch.tensor([tokens]), cu_seqlens, scorer.stage)[0, -1]
    likeliest = int(logits.argmax())
    pairs = [(tokens, [likeliest]), (tokens, [(likeliest + 1) % 256])]
    assert [s.is_greedy for s in scorer.continuations(pairs, greedy=True)] == [True, False]


def test_a_context_that_is_too_long_loses_its_beginning(scorer):
    context = [scorer.tokenizer.eot, *b"the cat sees " * 20]
    [scored] = scorer.continuations([(context, list(b"a dog"))])
    assert scored.n_cut == len(context) + 5 - 1 - scorer.max_len
    [same] = scorer.continuations([(context[scored.n_cut :], list(b"a dog"))])
    assert same.log_prob == pytest.approx(scored.log_prob) and same.n_cut == 0
    with pytest.raises(InputError, match="shorter text"):
        scorer.continuations([(context, list(b"x" * 100))])


def test_spaces_go_to_the_continuation(scorer):
    before, after = scorer.encode_pair("the  ", "cat")
    assert bytes(before) == b"the" and bytes(after) == b"  cat"


def test_items_with_unknown_characters_are_left_out_and_counted(trained, scorer):
    class Picky:
        def __getattr__(self, name):
            return getattr(scorer, name)

        def encode_pair(self, context, continuation):
            if "é" in continuation:
                raise InputError("é")
            return scorer.encode_pair(context, continuation)

    items = [Item((("a", " b"), ("a", answer)), 0) for answer in (" c", " é", " d")]
    measures = measure_task(Picky(), Task("t", items, 0.5))
    assert len(measures[0].above) == 2 and "1 items have characters" in measures[0].note
    assert measure_task(Picky(), Task("t", items[1:2], 0.5)) == []


# --- Generated


def test_generated_items_have_one_true_answer_and_it_is_anywhere():
    words = [f"w{i}" for i in range(4000)]
    text = "a" + " ".join(words)
    for name, make in generated.TASKS.items():
        task = make([text], 40, seed=1)
        assert task.note == "generated" and task.chance == 0.25 and len(task.items) == 40
        assert {item.gold for item in task.items} == {0, 1, 2, 3}
        for item in task.items:
            assert len({answer for _, answer in item.pairs}) == 4
            context, answer = item.pairs[item.gold]
            if name == "arithmetic":
                a, _, b, _ = context.splitlines()[-1].split()
                assert int(a) + int(b) == int(answer)
            elif name == "repeat":
                first, second = context.split("\n")
                assert first == second + answer or first.strip() == (second + answer).strip()
            else:
                assert (context + answer).strip() in text
        assert make([text], 40, seed=1) == task != make([text], 40, seed=2)


def test_a_model_that_copies_knows_how_a_passage_ends(scorer, monkeypatch):
    monkeypatch.setattr(generated, "CONTEXT", 10)  # the model looks back at 64 bytes
    r = random.Random(0)
    text = " ".join("".join(r.choices("abcdefgh", k=2)) for _ in range(3000))
    [acc, *_] = measure_task(scorer, generated.repeat([text], 40))
    assert acc.value > 0.5


# --- Numbers


def test_centered_accuracy_is_dclms():
    assert accuracy("t", "acc", [1, 1, 1, 0], 0.25).centered == pytest.approx((0.75 - 0.25) / 0.75)
    assert accuracy("t", "acc", [0, 0], 0.5).centered == -1
    assert accuracy("t", "acc", [1, 0, 1, 1, 0], 0.5).stderr == pytest.approx(
        np.std([1, 0, 1, 1, 0], ddof=1) / 5**0.5
    )


def test_two_runs_are_compared_item_by_item():
    one = accuracy("t", "acc", [1] * 60 + [0] * 40, 0.5)
    other = accuracy("t", "acc", [1] * 50 + [0] * 50, 0.5)
    change, error = difference(one, other)
    assert change == pytest.approx(0.1)
    assert error == pytest.approx(np.std([1] * 10 + [0] * 90, ddof=1) / 10)  # not 0.07
    assert verdict(one, other) == "better" and verdict(other, one) == "worse"
    assert verdict(one, one) == ""
    fewer = accuracy("t", "acc", [1] * 25 + [0] * 25, 0.5)
    assert difference(one, fewer)[1] == pytest.approx(np.hypot(one.stderr, fewer.stderr))
    loss = Measure("t", "bits", np.full(9, 2.0), np.ones(9), lower_is_better=True)
    lower = loss._replace(above=np.full(9, 1.0))
    assert verdict(lower, loss) == "better"
    assert "better" in "\n".join(comparison([lower], [loss], ["a", "b"]))
