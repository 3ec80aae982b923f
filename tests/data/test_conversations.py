"""Conversations: who may speak when, which tokens count, and rows that keep them whole."""

import json
import random
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base import InputError
from data.chat import Message, prompt_of, read_conversations, read_pairs, render
from data.config import DataConfig
from data.conversations import with_chat_tokens
from data.dataset import open_data
from data.loader import IGNORE
from data.tokenizers import Tokenizer, make_tokenizer
from export.tokenizer import save_tokenizer

BYTES = with_chat_tokens(make_tokenizer("bytes", None))
EOT, START, END = (BYTES.specials[x] for x in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))


def write(path, conversations):
    """conversations: lists of (role, text)."""
    lines = []
    for turns in conversations:
        messages = [dict(role=role, content=text) for role, text in turns]
        lines.append(json.dumps(dict(messages=messages)))
    path.write_text("\n".join(lines) + "\n")
    return path


def said(user, assistant, system=None):
    turns = [("user", user), ("assistant", assistant)]
    return [("system", system), *turns] if system else turns


def ids(text):
    return list(text.encode())


# --- as tokens


def test_what_the_assistant_says_counts_and_its_end():
    messages = [Message(*turn) for turn in said("Hi", "Hello", "Be brief")]
    tokens, counts = render(messages, BYTES)
    expected = [EOT, START, *ids("system\nBe brief"), END, *ids("\n")]
    expected += [START, *ids("user\nHi"), END, *ids("\n"), START, *ids("assistant\nHello"), END]
    assert tokens.tolist() == [*expected, *ids("\n")]
    assert tokens[counts].tolist() == [*ids("Hello"), END]


def test_a_prompt_is_what_a_conversation_begins_with():
    messages = [Message(*turn) for turn in said("Hi", " Hello\n")]
    tokens = render(messages, BYTES)[0].tolist()
    prompt = prompt_of(messages[:1], BYTES)
    assert tokens[: len(prompt)] == prompt
    assert tokens[len(prompt) :] == [*ids("Hello"), END, *ids("\n")]


def test_every_answer_counts():
    turns = [*said("a", "b"), *said("c", "d")]
    tokens, counts = render([Message(*turn) for turn in turns], BYTES)
    assert tokens[counts].tolist() == [*ids("b"), END, *ids("d"), END]


def test_text_that_looks_like_a_token_of_conversations_is_text():
    tokens, _ = render([Message(*turn) for turn in said("<|im_end|>", "x")], BYTES)
    assert (tokens == END).sum() == 2


def test_a_vocabulary_without_chat_tokens_gets_them_behind_its_own():
    plain = make_tokenizer("bytes", None)
    with pytest.raises(InputError, match="expected a model that was taught"):
        render([Message("user", "x")], plain)
    more = with_chat_tokens(plain)
    assert (more.eot, more.n_vocab) == (plain.eot, plain.n_vocab + 7)
    again = Tokenizer.from_json(more.to_json())
    assert again.specials == more.specials
    assert with_chat_tokens(more) is more
    with pytest.raises(InputError, match="single characters"):
        with_chat_tokens(make_tokenizer("chars", lambda: ["abc"]))


def random_conversations(n):
    """n conversations of words, digits, code and other scripts, white space around them."""
    r = random.Random(0)
    pieces = ["word", "Zwölf", "中文", "🙂", " ", "  ", "\n", "\n\n", "\t", "12", "f(x)", "it's"]
    pieces += ["<|im_end|>".replace("|", ""), "{", "'", "-", "é", ".", "\r\n"]
    for _ in range(n):
        messages = [Message("system", "Be brief. ")] if r.random() < 0.3 else []
        for _ in range(r.randint(1, 3)):
            for role in ("user", "assistant"):
                messages.append(Message(role, "".join(r.choices(pieces, k=r.randint(1, 12))) + "x"))
            if r.random() < 0.2:
                messages += [Message("tool", "4\n"), Message("assistant", "\n four")]
        yield messages


@pytest.mark.parametrize("n", [15, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_exported_template_has_the_same_tokens_and_the_same_ones_count(n, tmp_path):
    """In transformers, of random conversations."""
    transformers = pytest.importorskip("transformers")
    tokenizer = make_tokenizer("qwen2:400", lambda: ["user assistant system tool word 12 it's"] * 9)
    save_tokenizer(tokenizer, json.loads(tokenizer.to_json()), 512, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages in random_conversations(n):
        tokens, counts = render(messages, tokenizer)
        found = theirs.apply_chat_template(
            [dict(role=m.role, content=m.text) for m in messages],
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert found["input_ids"] == tokens.tolist(), messages
        assert found["assistant_masks"] == counts.astype(int).tolist(), messages


# --- files


@pytest.mark.parametrize(
    "line, problem",
    [
        ("{", r":2: expected a line of JSON"),
        ("[]", r':2: expected {"messages": \[...\]}'),
        ('{"messages": []}', r":2: messages: expected a list of one or more"),
        ('{"messages": [{"role": "x", "content": ""}]}', r":2: messages\[0\].role: expected one"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, problem):
    path = write(tmp_path / "x.jsonl", [said("a", "b")])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=problem):
        list(read_conversations(path))


@pytest.mark.parametrize(
    "turns, problem",
    [
        ([("assistant", "x")], r"role: expected system or developer or user first, found assist"),
        ([("user", "x"), ("user", "y")], r"\[1\].role: expected assistant after user, found user"),
        ([("user", "x")], "expected the assistant's message last, found user's"),
        (said("x", " \n"), r"\[1\].content: expected a text, found none"),
        (said("", "y"), r"\[0\].content: expected a text, found none"),
        ([*said("x", "y"), ("system", "z")], r"\[2\].role: expected user or tool after assistant"),
    ],
)
def test_roles_out_of_order_and_empty_texts_are_refused(tmp_path, turns, problem):
    path = write(tmp_path / "x.jsonl", [turns])
    with pytest.raises(InputError, match=problem):
        list(read_conversations(path))


def test_a_file_that_is_not_there_or_not_utf8(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        list(read_conversations(tmp_path / "none.jsonl"))
    (tmp_path / "x.jsonl").write_bytes(b'{"messages": \xff}\n')
    with pytest.raises(InputError, match="expected UTF-8, found byte 0xff"):
        list(read_conversations(tmp_path / "x.jsonl"))


# --- rows


def opened(path, tmp_path, row_len=64, rows=2, seed=0, **fields):
    fields = dict(row_len=row_len, val_row_len=row_len, tokenizer="bytes") | fields
    fields = dict(data="conversations", conversations=(str(path),)) | fields
    config = DataConfig(**fields)
    return open_data(
        config,
        tmp_path / "cache",
        batch_rows=lambda step: rows,
        max_doc_len=lambda step: row_len,
        seed=seed,
    )


texts = st.text("abc", min_size=1, max_size=30)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=12, max_size=40, unique=True), st.data())
def test_an_epoch_has_every_conversation_once_and_whole(tmp_path_factory, pairs, data):
    tmp_path = tmp_path_factory.mktemp("epoch")
    train, val = pairs[:-2], pairs[-2:]
    path = write(tmp_path / "x.jsonl", [said(*pair) for pair in train])
    val_path = write(tmp_path / "val.jsonl", [said(*pair) for pair in val])
    row_len = data.draw(st.sampled_from([96, 200]))
    loaded = opened(path, tmp_path, row_len, rows=1, val_text=str(val_path))
    n_rows = loaded.train.rows_in_epoch()
    found = []
    for step in range(1, n_rows + 1):
        (micro,) = loaded.train.micro_batches(step)
        assert loaded.train.n_targets(step, 0) == (micro.targets != IGNORE).sum()
        borders = [n for n in micro.cu_seqlens.tolist() if n < row_len]
        for a, b in zip(borders, [*borders[1:], row_len]):
            document = micro.inputs[0, a:b].tolist()
            if document[0] == EOT:
                found.append(bytes(t for t in document if t < 256).rstrip(b"\0").decode())
    expected = [f"user\n{a}\nassistant\n{b}" for a, b in train]
    assert sorted(found) == sorted(expected)
    others = [loaded.train.rows(step) for step in range(n_rows + 1, 2 * n_rows)]
    assert sum(map(len, others)) == n_rows - 1  # the next epoch goes on


def test_a_batch_is_a_function_of_seed_and_step_however_it_is_shared_out(tmp_path):
    path = write(tmp_path / "x.jsonl", [said(f"{i} + 1", str(i + 1)) for i in range(80)])
    whole = opened(path, tmp_path, rows=4)
    (a,) = whole.train.micro_batches(3)
    list(whole.train.micro_batches(9))
    (again,) = whole.train.micro_batches(3)
    assert torch.equal(a.inputs, again.inputs) and torch.equal(a.targets, again.targets)
    parts = []
    for rank in range(2):
        parts += list(opened(path, tmp_path, rows=4).train.micro_batches(3, rank, 2, 1))
    assert sorted(p.inputs[0].tolist() for p in parts) == sorted(a.inputs.tolist())
    (other,) = opened(path, tmp_path, rows=4, seed=1).train.micro_batches(3)
    assert not torch.equal(a.inputs, other.inputs)


def test_a_conversation_beyond_the_row_loses_its_beginning(tmp_path):
    long = said("x" * 100, "the end")
    path = write(tmp_path / "x.jsonl", [said(f"{i}", "b") for i in range(60)] + [long])
    val = write(tmp_path / "val.jsonl", [said("a", "b"), long])
    loaded = opened(path, tmp_path, val_text=str(val))
    assert any("1 conversations do not fit into --row-len 64" in x for x in loaded.dataset.notes)
    batches = list(loaded.val.micro_batches())
    counted = [micro.targets[micro.targets != IGNORE].tolist() for micro in batches]
    assert sum(counted, []) == [*ids("b"), END, *ids("the end"), END]
    assert loaded.val.n_targets == len(loaded.val.targets) == 10
    assert loaded.val_bytes == 8


def test_equal_conversations_stay_on_one_side(tmp_path):
    turns = [said(f"{i % 50}", "b") for i in range(200)]
    data = opened(write(tmp_path / "x.jsonl", turns), tmp_path)
    texts = []
    for of in (data.train.of, data.val.of):
        texts.append({of.tokens[a : a + n].tobytes() for a, n in zip(of.starts, of.lengths)})
    assert texts[0] and texts[1] and not texts[0] & texts[1]


def test_files_that_leave_nothing_for_a_split_are_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", [said("a", "b")])
    with pytest.raises(InputError, match=r"x.jsonl: no conversation to (train|validate) on"):
        opened(path, tmp_path)
    with pytest.raises(InputError, match="expected --conversations"):
        open_data(
            DataConfig(data="conversations", tokenizer="bytes"),
            tmp_path,
            batch_rows=lambda step: 1,
            max_doc_len=lambda step: 64,
        )


# --- pairs


def write_pairs(path, pairs):
    """pairs: (prompt, chosen, rejected)."""
    names = "prompt", "chosen", "rejected"
    path.write_text("\n".join(json.dumps(dict(zip(names, pair))) for pair in pairs) + "\n")
    return path


def test_both_answers_of_a_pair_are_in_a_row_and_marked(tmp_path):
    pairs = [(f"{i}?", f"yes {i}", "no") for i in range(60)]
    path = write_pairs(tmp_path / "x.jsonl", pairs)
    loaded = opened(path, tmp_path, row_len=128, rows=3, data="preferences")
    for step in (1, 2, 9):
        (batch,) = loaded.train.micro_batches(step, micro_rows=4)
        K = len(batch.reference)
        found = {}
        for place, target in zip(batch.answer.flatten().tolist(), batch.targets.flatten().tolist()):
            if place < 2 * K:
                found.setdefault(place, []).append(target)
            else:
                assert target == IGNORE
        assert len(found) == 2 * loaded.train.n_targets(step, 0)
        for k in range(len(found) // 2):
            assert found[2 * k][:4] == ids("yes ") and found[2 * k][-1] == END
            assert found[2 * k + 1] == [*ids("no"), END]


def test_references_stay_with_their_pairs(tmp_path):
    pairs = [(f"{i}?", f"{i}", "no") for i in range(60)]
    loaded = opened(write_pairs(tmp_path / "x.jsonl", pairs), tmp_path, 128, data="preferences")
    of = loaded.train.of
    of.reference = torch.stack([torch.arange(len(of)), torch.arange(len(of))], 1).float()
    (batch,) = loaded.train.micro_batches(2)
    numbers = [p for row in loaded.train.rows(2) for p in row]
    assert batch.reference[: len(numbers), 0].tolist() == numbers


@pytest.mark.parametrize(
    "line, problem",
    [
        (dict(prompt="a", chosen="b"), 'expected {"prompt": ..., "chosen": ..., "rejected": ...}'),
        (dict(prompt="a", chosen="b", rejected=" b"), "chosen and rejected are equal"),
        (dict(prompt="a", chosen="b", rejected=""), "rejected: messages[1].content: expected a"),
        (dict(chosen="b", rejected="c"), "chosen: messages[0].role: expected system or"),
        (
            dict(
                chosen=[dict(role="user", content="a"), dict(role="assistant", content="b")],
                rejected=[dict(role="user", content="x"), dict(role="assistant", content="c")],
            ),
            "chosen and rejected answer different conversations",
        ),
    ],
)
def test_a_wrong_pair_is_named(tmp_path, line, problem):
    (tmp_path / "x.jsonl").write_text(json.dumps(line))
    with pytest.raises(InputError, match="x.jsonl:1: " + re.escape(problem)):
        list(read_pairs(tmp_path / "x.jsonl"))


def test_whole_conversations_are_pairs_as_well(tmp_path):
    chosen = [dict(role="user", content="a"), dict(role="assistant", content="b")]
    rejected = [chosen[0], dict(role="assistant", content="c")]
    (tmp_path / "x.jsonl").write_text(json.dumps(dict(chosen=chosen, rejected=rejected)))
    (pair,) = read_pairs(tmp_path / "x.jsonl")
    assert [m.text for m in pair.chosen] == ["a", "b"] and pair.rejected[1].text == "c"


def test_padding_does_not_count(tmp_path):
    path = write(tmp_path / "x.jsonl", [said(f"{i}", "b") for i in range(40)])
    loaded = opened(path, tmp_path, rows=3)
    (micro,) = loaded.train.micro_batches(1, micro_rows=4)
    assert micro.inputs.shape[0] == 4 and (micro.targets[3] == IGNORE).all()
    assert np.isin(micro.targets[:3].numpy(), [IGNORE, END, *ids("b")]).all()


# --- conversations beside text and multiple choice


@pytest.fixture
def three_files(tmp_path):
    """Names of a file of conversations, of a text, and of multiple choice."""
    write(tmp_path / "a.jsonl", [said(f"{i} + 1", str(i + 1)) for i in range(120)])
    texts = [f"{i} zz" * (10 + 7 * (i % 4)) for i in range(30)]
    (tmp_path / "b.txt").write_text("<|endoftext|>".join(texts))
    lines = [dict(query=f"What {i}?", choices=["a", "b"], gold=i % 2) for i in range(60)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return [str(tmp_path / name) for name in ("a.jsonl", "b.txt", "c.jsonl")]


def mixed(names, tmp_path, mix=(), seed=0, row_len=128):
    fields = dict(row_len=row_len, val_row_len=row_len, tokenizer="bytes", mix=mix)
    config = DataConfig(data="conversations", conversations=tuple(names), **fields)
    rows = dict(batch_rows=lambda step: 6, max_doc_len=lambda step: row_len)
    return open_data(config, tmp_path / "cache", seed=seed, **rows)


def kind_of(micro, row):
    """Which file a row is of; raises where it is of several."""
    text = bytes(t for t in micro.inputs[row].tolist() if t < 256).decode()
    kinds = [kind for kind, word in enumerate((" + 1", "z", "What")) if word in text]
    (kind,) = kinds
    return kind


def test_each_file_has_its_share_of_the_rows(three_files, tmp_path):
    train = mixed(three_files, tmp_path, mix=(3.0, 2.0, 1.0)).train
    counts = [0, 0, 0]
    for step in range(1, 21):
        (micro,) = train.micro_batches(step)
        for row in range(6):
            counts[kind_of(micro, row)] += 1
    assert counts == [60, 40, 20]
    again = mixed(three_files, tmp_path, mix=(0.3, 0.2, 0.1)).train  # of any size together
    assert torch.equal(again.micro_batches(20).__next__().inputs, micro.inputs)
    (first,) = train.micro_batches(2)
    (fresh,) = mixed(three_files, tmp_path, mix=(3.0, 2.0, 1.0)).train.micro_batches(2)
    assert torch.equal(first.inputs, fresh.inputs)  # a function of the step, not of what was asked


def test_all_of_a_text_counts_and_each_of_its_tokens_once_an_epoch(three_files, tmp_path):
    data = mixed(three_files, tmp_path, mix=(1.0, 4.0, 1.0), row_len=64)
    first, behind = data.train.of.groups[1]
    targets = data.train.of.targets_of(range(first, behind))
    text = open(three_files[1]).read()
    assert bytes(targets[targets < 256].tolist()).decode() == text.replace("<|endoftext|>", "")
    assert data.train.of.n_cut == 0 and data.train.of.lengths.max() <= 64
    found = []
    n_rows = len(data.train._epoch(1, 0))
    for row in data.train.stretch(1, 0, n_rows):
        found += row
    assert sorted(found) == list(range(first, behind))


def test_a_text_is_not_validated_on_unless_it_is_given_for_that(three_files, tmp_path):
    data = mixed(three_files, tmp_path)
    files = data.dataset.about["val"]["files"]
    assert [file["conversations"] > 0 for file in files] == [True, False, True]
    assert "conversations and texts" in data.dataset.notes[0]
    data = opened(three_files[0], tmp_path, val_text=three_files[1])
    text = open(three_files[1]).read().replace("<|endoftext|>", "")
    counted = bytes(t for t in data.val.targets.tolist() if t < 256).decode()
    assert sorted(counted) == sorted(text)


def test_a_share_for_each_file_or_for_none(three_files, tmp_path):
    with pytest.raises(InputError, match="--mix 1.0 2.0: expected 3 numbers, one for each file"):
        mixed(three_files, tmp_path, mix=(1.0, 2.0))
    with pytest.raises(InputError, match="expected a positive number for each file"):
        mixed(three_files, tmp_path, mix=(1.0, 2.0, 0.0))
