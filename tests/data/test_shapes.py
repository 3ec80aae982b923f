"""Lines of well-known data sets as conversations, pairs and questions; the Hub's by name."""

import json

import pytest

from base import InputError
from data.chat import Message, read_conversations, read_pairs
from data.config import DataConfig
from data.dataset import open_data
from data.questions import read_questions
from data.sources import Files, hub

GSM8K = dict(question="Two and 1,016?", answer="It is 2+1016=<<2+1016=1018>>1018.\n#### 1,018")
MESSAGES = [dict(role="user", content="Hi"), dict(role="assistant", content="Hello")]
LETTERS = "Which?\nA. red\nB. blue\nAnswer with a letter."


def conversation(tmp_path, said):
    (tmp_path / "x.jsonl").write_text(json.dumps(said))
    (messages,) = read_conversations(tmp_path / "x.jsonl")
    return [tuple(m) for m in messages]


@pytest.mark.parametrize(
    "said, expected",
    [
        (dict(messages=MESSAGES, source="x"), [("user", "Hi"), ("assistant", "Hello")]),
        (
            GSM8K,
            [("user", "Two and 1,016?"), ("assistant", "It is 2+1016=1018.\n#### 1,018")],
        ),
        (dict(query="Which?", choices=["red", " blue"], gold=1), "B"),
        (dict(ctx="Which?", endings=["red", "blue"], label="0"), "A"),
        (dict(question="Which? ", choices=["red", "blue"], answer=1, subject="x"), "B"),
        (
            dict(question="Which?", choices=dict(text=["red", "blue"], label="12"), answerKey="2"),
            None,
        ),
        (
            dict(
                question="Which?",
                choices=dict(text=["red", "blue"], label=["1", "2"]),
                answerKey="2",
            ),
            "B",
        ),
    ],
)
def test_lines_of_many_forms_are_conversations(said, expected, tmp_path):
    if expected is None:
        with pytest.raises(InputError, match=r"x.jsonl:1: expected the number of the right choice"):
            conversation(tmp_path, said)
        return
    if isinstance(expected, str):
        expected = [("user", LETTERS), ("assistant", expected)]
    assert conversation(tmp_path, said) == expected


@pytest.mark.parametrize(
    "said, problem",
    [
        (dict(text="x"), "GSM8K's question and answer, or multiple choice"),
        (dict(query="Which?", choices=["red"], gold=0), "expected 2 to 26 choices, found 1"),
        (dict(query="Which?", choices=["red", "blue"], gold=2), "from 0 to 1, found 2"),
        (dict(query="Which?", choices=["red", 3], gold=0), "or multiple choice"),
        (dict(query=None, choices=["red", "blue"], gold=0), "or multiple choice"),
        ([1], "expected {"),
    ],
)
def test_other_lines_are_refused_with_their_number(said, problem, tmp_path):
    with pytest.raises(InputError, match="x.jsonl:1: ") as e:
        conversation(tmp_path, said)
    assert problem in str(e.value)


def test_pairs_of_whole_conversations_beside_their_prompt(tmp_path):
    """As UltraFeedback has them."""
    other = [MESSAGES[0], dict(role="assistant", content="Go away")]
    line = dict(prompt="Hi", chosen=MESSAGES, rejected=other, score_chosen=8.0)
    (tmp_path / "x.jsonl").write_text(json.dumps(line))
    (pair,) = read_pairs(tmp_path / "x.jsonl")
    assert pair.chosen == [Message("user", "Hi"), Message("assistant", "Hello")]
    assert pair.rejected == [Message("user", "Hi"), Message("assistant", "Go away")]


def test_questions_know_the_answer_alone(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(GSM8K))
    ((where, messages, fields),) = read_questions(tmp_path / "x.jsonl")
    assert messages == [Message("user", "Two and 1,016?")] and fields["answer"] == "1018"
    (tmp_path / "x.jsonl").write_text(
        json.dumps(dict(query="Which?", choices=["red", "blue"], gold=1))
    )
    ((where, messages, fields),) = read_questions(tmp_path / "x.jsonl")
    assert messages == [Message("user", LETTERS)] and fields["answer"] == "B"


# --- the Hub's, by name: a few made-up rows in the shape of each


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    """Names of data sets -> rows; a copy of each lies here, as if it had been fetched."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    sets = {}

    def ask(repo, revision):
        name = next(name for name in hub.TAUGHT if hub.KNOWN[name].repo == repo)
        folder = tmp_path / "cache" / "hub" / repo.replace("/", "--") / ("a" * 40)
        file = hub.KNOWN[name].files.replace("*", "00000-of-00001")
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(sets[name]), folder / file)
        size = (folder / file).stat().st_size
        files = {file: [size, None], "README.md": [1, None]}
        return dict(revision="a" * 40, licence="mit", files=files)

    monkeypatch.setattr(hub, "ask", ask)
    return sets


def opened(tmp_path, data, *names, **fields):
    fields = dict(row_len=256, val_row_len=256, tokenizer="bytes") | fields
    config = DataConfig(data=data, conversations=names, **fields)
    return open_data(config, tmp_path / "cache", batch_rows=lambda s: 4, max_doc_len=lambda s: 256)


def test_smoltalk(local_hub, tmp_path):
    rows = []
    for i in range(60):
        messages = [dict(role="user", content=f"{i}?"), dict(role="assistant", content=f"{i}!")]
        rows.append(dict(messages=messages, source="everyday"))
    without = [dict(role="user", content="?"), dict(role="assistant", content="")]
    rows.append(dict(messages=without, source=""))
    local_hub["smoltalk"] = rows
    data = opened(tmp_path, "conversations", "smoltalk")
    said = data.dataset.about
    assert said["train"]["conversations"] + said["val"]["conversations"] == 60
    assert said["left_out"] == 1 and "1 rows are left out" in data.dataset.notes[1]
    assert ".parquet:61: messages[1].content: expected a text" in data.dataset.notes[1]


def test_ultrafeedback(local_hub, tmp_path):
    rows = []
    for i in range(60):
        ask = dict(role="user", content=f"{i}?")
        sides = [[ask, dict(role="assistant", content=text)] for text in ("good", "bad")]
        row = dict(prompt=f"{i}?", prompt_id="x", chosen=sides[0], rejected=sides[1])
        rows.append(row | dict(score_chosen=9.0))
    rows[7]["rejected"] = rows[7]["chosen"]  # there are such
    local_hub["ultrafeedback"] = rows
    said = opened(tmp_path, "preferences", "ultrafeedback").dataset.about
    assert said["train"]["conversations"] + said["val"]["conversations"] == 59
    assert said["left_out"] == 1 and "are equal" in said["why"]


def test_gsm8k_is_conversations_and_questions(local_hub, tmp_path):
    local_hub["gsm8k"] = [
        dict(question=f"{i} and 1?", answer=f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}")
        for i in range(60)
    ]
    said = opened(tmp_path, "conversations", "gsm8k").dataset.about
    assert said["train"]["conversations"] + said["val"]["conversations"] == 60
    data = opened(tmp_path, "questions", "gsm8k")
    for question in data.train.of:
        n = int(question.fields["question"].split()[0])
        assert question.fields["answer"] == str(n + 1)


def test_a_file_of_that_name_is_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = []
    for i in range(60):
        lines.append(json.dumps(dict(question=f"{i}?", answer="x")))
    (tmp_path / "gsm8k").write_text("\n".join(lines))
    said = opened(tmp_path, "conversations", "gsm8k").dataset.about
    assert said["train"]["conversations"] + said["val"]["conversations"] == 60


EMPTY = dict(role="assistant", content=" ")
BAD_ROWS = dict(
    conversations=(
        dict(messages=MESSAGES),
        dict(messages=[MESSAGES[0], EMPTY]),
        r"messages\[1\].content: expected a text, found none",
    ),
    preferences=(
        dict(prompt="1?", chosen="good", rejected="bad"),
        dict(prompt="1?", chosen="same", rejected="same"),
        "chosen and rejected are equal",
    ),
    questions=(
        dict(messages=MESSAGES[:1], answer="1"),
        dict(messages=MESSAGES, answer="1"),
        "expected the user's message last",
    ),
)


@pytest.mark.parametrize("vocabulary", ["bytes", "bpe:300"])
@pytest.mark.parametrize("data", list(BAD_ROWS))
def test_a_bad_line_in_a_file_of_ones_own_is_refused_with_its_number(data, vocabulary, tmp_path):
    """Where a row of the Hub's is left out: whether it is learned from or validated on, nothing is
    prepared from a part of the file. bpe:300 reads the texts before."""
    good, bad, problem = BAD_ROWS[data]
    lines = [json.dumps(good)] * 40
    (tmp_path / "good.jsonl").write_text("\n".join(lines))
    lines[2] = json.dumps(bad)
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    files = [str(tmp_path / name) for name in ("x.jsonl", "good.jsonl")]
    for train, val in (files, files[::-1]):
        with pytest.raises(InputError, match=rf"x\.jsonl:3: {problem}"):
            opened(tmp_path, data, train, val_text=val, tokenizer=vocabulary)
        assert not list((tmp_path / "cache").glob(f"{data}-*"))


def test_what_is_no_file_of_parquet_is_refused(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(InputError, match=r"x.parquet: cannot be read after row 0"):
        list(read_conversations(tmp_path / "x.parquet"))


def test_files_lie_where_a_part_of_a_recipe_has_them(local_hub, tmp_path):
    from data.recipe import Part

    local_hub["gsm8k"] = [dict(question="1?", answer="#### 1")]
    found = hub.locate(Part(hub="gsm8k"), tmp_path / "cache")
    assert isinstance(found, Files) and [p.suffix for p in found.paths] == [".parquet"]
