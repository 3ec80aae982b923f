"""data/sources, data/config.py and data/dataset.py: a source is one file, found by its name."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import train_gpt as tg
from base import InputError
from data import DataConfig, Dataset, ShardWriter, Tokenizer, open_data, open_dataset, sources
from data.__main__ import main
from data.sources import Source, fineweb10B

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--steps 3 --n-layer 1 --n-embd 32 --n-head 2 --value-embed-layers 0 --row-len 64 "
    "--max-doc-len 64 --val-row-len 64 --batch-tokens 256 --no-compile --dtype float32 "
    "--kernels reference --checkpoint-every off"
)


@pytest.fixture
def example(tmp_path):
    """The file that docs/data.md shows, in a folder of its own."""
    page = (ROOT / "docs/data.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    path = tmp_path / "mine" / "counting.py"
    path.parent.mkdir()
    path.write_text(code)
    return path


@pytest.fixture
def counting(example, monkeypatch):
    """--data mine.counting."""
    monkeypatch.syspath_prepend(example.parents[1])
    return "mine.counting"


@pytest.mark.parametrize("dotted", [True, False])
def test_a_new_source_is_one_file(tmp_path, monkeypatch, capsys, counting, example, dotted):
    """The trainer trains on it, by its dotted name or from among the sources."""
    name = counting
    if not dotted:
        name = "counting"
        folder = tmp_path / "among"  # as if it were data/sources
        folder.mkdir()
        shutil.copy(example, folder)
        monkeypatch.setattr(sources, "__path__", [*sources.__path__, str(folder)])
        with pytest.raises(SystemExit):
            main(["--help"])
        assert "counting    sequences that count up" in capsys.readouterr().out
    goal = "--target-metric val_loss --target 9 --quick-val 0"
    argv = f"--track laptop --data {name} {goal} {SMALL}".split()
    argv += ["--cache-dir", str(tmp_path / "cache"), "--run-dir", str(tmp_path / "run")]
    status = tg.main(argv)
    out, err = capsys.readouterr()
    assert status == 0, err
    result = json.loads(out)
    assert (result["data"], result["data_fingerprint"]) == ("counting", "counting-1")
    assert result["val_loss"] < 4.7 and result["val_bpb"] is None and result["steps"] == 3


def test_a_metric_of_bytes_needs_a_text(tmp_path, counting):
    config = DataConfig(data=counting, row_len=64)
    stages = dict(batch_rows=lambda step: 2, max_doc_len=lambda step: 64)
    assert open_data(config, tmp_path, **stages).val_bytes is None
    with pytest.raises(InputError, match="counting: these tokens have no text"):
        open_data(config, tmp_path, **stages, need_bytes=True)


def test_val_bytes_are_those_of_the_targets(tmp_path):
    """All but the first token, which is end-of-text: in UTF-8, the last tenth of the file."""
    path = tmp_path / "a.txt"
    path.write_text("x" * 900 + "y" * 97 + "é\n", encoding="utf-8")
    config = DataConfig(data="text", text=str(path), tokenizer="chars", row_len=64)
    stages = dict(batch_rows=lambda step: 2, max_doc_len=lambda step: 64)
    assert open_data(config, tmp_path / "cache", **stages).val_bytes == 100
    config = dataclasses.replace(config, val_tokens=98)
    assert open_data(config, tmp_path / "cache", **stages).val_bytes == 99


def test_names_and_what_each_source_says():
    built = {"hub", "jsonl", "parquet"}  # which only a build reads
    assert built <= set(sources.names()) and not built & set(sources.trainable())
    found = {name: sources.find(name) for name in ("fineweb10B", "stdlib", "text")}
    assert found.keys() <= set(sources.trainable())
    assert [name for name in found if found[name].network] == ["fineweb10B"]
    assert [name for name in found if found[name].exact_val_tokens] == ["fineweb10B"]
    assert {name: found[name].tokenizer for name in found} == dict(
        fineweb10B="gpt2", stdlib="", text=""
    )


@pytest.mark.parametrize("name", ["nope", "Stdlib", "", "..", "no.such.module", "json.nope", "a."])
def test_a_source_that_is_not_there(name):
    with pytest.raises(InputError) as e:
        DataConfig(data=name)
    assert str(e.value) == (
        f"--data {name}: expected {', '.join(sources.trainable())}, the folder of a built corpus "
        "or the dotted name of a module with a source of yours"
    )
    with pytest.raises(
        InputError, match="expected .*stdlib, text, the folder of a built corpus or"
    ):
        sources.find(name)


@pytest.mark.parametrize(
    "code, found",
    [
        ("SOURCE = 3", "expected SOURCE = Source.* found 3"),
        ("x = 3", "expected SOURCE = Source.* found None"),
        ("import no_such_module", "cannot be imported: No module named 'no_such_module'"),
    ],
)
def test_a_module_without_a_source(tmp_path, monkeypatch, code, found):
    (tmp_path / "bad").mkdir()
    name = f"source{abs(hash(code))}"
    (tmp_path / "bad" / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=f"source bad.{name}: .*{found}"):
        sources.find(f"bad.{name}")


def test_text_without_a_path(tmp_path):
    with pytest.raises(InputError, match="expected --text"):
        open_dataset(DataConfig(data="text"), tmp_path)


def test_fineweb_is_what_it_says(tmp_path, monkeypatch):
    """Vocabulary, fingerprint and number of shards; no tokenizer is loaded before it is needed."""
    asked = []

    def download(folder, train_shards):
        asked.append((folder, train_shards))
        return ["a", "b"], ["c"]

    monkeypatch.setattr(fineweb10B, "download", download)
    monkeypatch.setattr(fineweb10B, "gpt2_tokenizer", lambda: "GPT-2's")
    dataset = open_dataset(DataConfig(data="fineweb10B", train_shards=2), tmp_path)
    assert asked == [(tmp_path / "fineweb10B", 2)]
    assert (dataset.train, dataset.val) == (["a", "b"], ["c"])
    assert (dataset.n_vocab, dataset.eot) == (50257, 50256)
    assert dataset.fingerprint == ("kjj0/fineweb10B-gpt2@889765ea1f903759787add96995d81171b632d0c")
    assert dataset.tokenizer == "GPT-2's"


def test_downloads_lie_where_the_trainer_looks(monkeypatch, capsys):
    asked = []

    def download(folder, train_shards, verify=False):
        asked.append((folder, train_shards, verify))
        return ["a"] * train_shards, ["b"]

    monkeypatch.setattr(fineweb10B, "download", download)
    assert main(["download", "fineweb10B"]) == 0
    cache = Path(tg.parse_args([]).run.cache_dir) / "data"
    open_dataset(DataConfig(data="fineweb10B"), cache)
    assert asked == [(ROOT / ".cache/data/fineweb10B", 9, False)] * 2
    assert "9 training shards and 1 validation shard are ready" in capsys.readouterr().out


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """Opens a source of 1,000 training and 101 validation tokens, whose --val-tokens may be part of
    its task."""

    def opened(exact, **fields):
        def open_numbers(config, cache):
            with ShardWriter(cache, "train") as train, ShardWriter(cache, "val") as val:
                train.write(np.arange(1000) % 50)
                val.write(np.arange(101) % 50)
            return Dataset("numbers", train.paths, val.paths, 50, 0, "1", cache)

        source = Source("numbers", open_numbers, exact_val_tokens=exact)
        monkeypatch.setattr(sources, "find", lambda name: source)
        return open_data(
            DataConfig(row_len=20, val_row_len=40, **fields),
            tmp_path,
            batch_rows=lambda step: step,
            max_doc_len=lambda step: 10 * step,
            seed=3,
        )

    return opened


@pytest.mark.parametrize("val_tokens, n", [(0, 100), (1, 1), (99, 99), (100, 100), (101, 100)])
def test_validation_is_as_long_as_asked_or_as_there_is(opened, val_tokens, n):
    data = opened(False, val_tokens=val_tokens)
    assert data.val.n_targets == n and data.val.row_len == 40


def test_validation_that_is_part_of_the_task_is_not_cut(opened):
    assert opened(True, val_tokens=100).val.n_targets == 100
    with pytest.raises(InputError, match="expected 101 validation tokens and one more, found 101"):
        opened(True, val_tokens=101)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("long_docs", ["split", "drop"])
def test_the_loader_gets_what_was_configured(opened, shuffle, long_docs):
    train = opened(False, shuffle=shuffle, long_docs=long_docs).train
    assert (train.row_len, train.seed, train.shuffle) == (20, 3, shuffle)
    assert (train.eot, train.n_vocab, train.split) == (0, 50, long_docs == "split")
    rows = train.rows(2)
    assert len(rows) == 2 and max(n for row in rows for *_, n in row) <= 20


def test_whoever_opens_may_say_how_the_dataset_is_made(tmp_path):
    """So that one of several processes prepares it."""
    calls = []

    def stand_in(config, cache):
        calls.append((config, cache))
        with ShardWriter(tmp_path, "x") as writer:
            writer.write(np.arange(200) % 50)
        return Dataset("other", writer.paths, writer.paths, 50, 0, "1", tmp_path)

    config = DataConfig(row_len=20)
    data = open_data(
        config,
        "cache",
        batch_rows=lambda step: 1,
        max_doc_len=lambda step: 20,
        open_dataset=stand_in,
    )
    assert calls == [(config, "cache")] and data.dataset.name == "other"


@pytest.mark.parametrize(
    "argv, line",
    [
        ("", "the following arguments are required: COMMAND; ./run.sh data --help"),
        ("fetch", "invalid choice: 'fetch'"),
        ("download", "required: SOURCE"),
        ("download nope", "stdlib, text, the folder of a built corpus or"),
        ("download stdlib", "stdlib: there is nothing to download.*one of: fineweb10B$"),
        ("download fineweb10B --train-shards x", "--train-shards: invalid int value: 'x'"),
        ("download fineweb10B --shards 3", "unrecognized arguments: --shards 3"),
    ],
)
def test_bad_commands_are_one_line(argv, line, capsys):
    assert main(argv.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(line, err)


@pytest.mark.parametrize("argv", ["--help", "download --help", "download fineweb10B --help"])
def test_help(argv, capsys):
    with pytest.raises(SystemExit) as e:
        main(argv.split())
    out = capsys.readouterr().out
    assert e.value.code == 0 and f"./run.sh data {argv}"[: -len(" --help")] in out


def test_texts_that_documents_of_validation_begin_with(tmp_path):
    """Spread over the split, without a character that is cut, and never beyond a document."""
    tokenizer = Tokenizer("bytes", [bytes([i]) for i in range(256)])
    documents = ["first words", "a", "three", "é" * 9, "x🙂yz", "the last one"]

    def open_documents(documents):
        with ShardWriter(tmp_path / str(len(documents)), "val") as val:
            for text in documents:
                val.write(np.array([tokenizer.eot, *text.encode()]))
        return Dataset("bytes", [], val.paths, 257, 256, "1", tmp_path, lambda: tokenizer)

    dataset = open_documents(documents)
    assert dataset.beginnings(3, 5) == ["first", "three", "the l"]
    assert dataset.beginnings(6, 5) == ["first", "a", "three", "éé", "x🙂", "the l"]
    assert dataset.beginnings(9, 4)[4] == "x"
    assert open_documents(documents[:1]).beginnings() == ["first wo"]
