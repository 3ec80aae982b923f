"""data/build.py and its stages: from sources to shards that train."""

import contextlib
import errno
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from near_duplicates import edited_documents

from base import InputError
from data import DataConfig, dedup, open_data, pieces, read_shard, reading, recipe, stages, words
from data.__main__ import main
from data.pieces import read_lines

zstandard = pytest.importorskip("zstandard")
pytest.importorskip("ftfy")
pytest.importorskip("py3langid")

ROOT = Path(__file__).resolve().parents[2]
SYLLABLES = "ra ne lo mi tu ka se vo pri sta lem dor gan bel ish qua zen fro hul wex".split()
SMALL = "the of and to in that with have be for on from".split()


def prose(seed, sentences=12):
    """Text of its own for each seed, which reads like English to a filter."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(sentences):
        words = []
        for _ in range(9):
            words.append("".join(SYLLABLES[i] for i in rng.integers(0, len(SYLLABLES), 3)))
            words.append(SMALL[rng.integers(0, len(SMALL))])
        lines.append(" ".join(words).capitalize() + ".")
    return "\n".join(lines) + "\n"


def lines_of(path, texts):
    path.write_text(
        "".join(json.dumps(dict(text=t, id=str(i))) + "\n" for i, t in enumerate(texts))
    )
    return path


@pytest.fixture
def three(tmp_path):
    return make_three(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder of a build of `three` by one process, what it said)."""
    folder = tmp_path_factory.mktemp("whole")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert run(make_three(folder), "--out", folder / "out", "--processes", 1) == 0
    return folder / "out", json.loads(said.getvalue())


def make_three(tmp_path):
    """A recipe of three sources in three formats, with duplicates among them."""
    books = tmp_path / "books"
    books.mkdir()
    for i in range(20):
        (books / f"{i}.txt").write_text(prose(i, 20))
    (books / "picture.png").write_bytes(b"\x89PNG\0\0")
    stories = [prose(100 + i) for i in range(40)] + [prose(3, 20), prose(100)]
    lines_of(tmp_path / "stories.jsonl", stories)
    web = "".join(json.dumps(dict(body=prose(200 + i), url=f"u{i}")) + "\n" for i in range(40))
    (tmp_path / "web.jsonl.zst").write_bytes(zstandard.compress(web.encode()))
    path = tmp_path / "recipe.toml"
    path.write_text(
        """
        tokenizer = "bpe:400"
        val_fraction = 0.1
        piece_bytes = 6000

        [[source]]
        path = "books"
        licence = "CC0-1.0"
        [[source]]
        path = "stories.jsonl"
        preset = "stories"
        [[source]]
        path = "web.jsonl.zst"
        column = "body"
        """
    )
    return path


def run(*argv):
    return main(["build", *map(str, argv)])


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def contents(folder):
    """{path: bytes} of what a build leaves, but for how long it took."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "timings.json"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_three_sources_become_tokens(whole):
    out, said = whole
    manifest = manifest_of(out)
    assert said["documents"] == manifest["documents"] == 102
    # Two duplicates, one across sources
    assert said["documents_kept"] == manifest["documents_kept"] == 100
    assert manifest["sources"]["books"]["licence"] == "CC0-1.0"
    [[name, why]] = manifest["sources"]["books"]["left_out"]
    assert name == "picture.png" and why.startswith("binary")
    assert manifest["sources"]["web"]["licence"] == "not stated"
    assert not (out / "work").exists()

    for split in "train", "val":
        tokens = np.concatenate([read_shard(out / n) for n in manifest["splits"][split]["shards"]])
        assert len(tokens) == manifest["splits"][split]["tokens"]
        assert (tokens == manifest["eot"]).sum() == manifest["splits"][split]["documents"]
        assert tokens[0] == manifest["eot"] and tokens.max() < manifest["n_vocab"]
    documents = [line for path in sorted((out / "text").iterdir()) for line in read_lines(path)]
    assert len(documents) == 100
    assert {line["source"] for line in documents} == {"books", "stories", "web"}
    assert {line["licence"] for line in documents if line["source"] == "books"} == {"CC0-1.0"}
    assert (
        sum(line["split"] == "val" for line in documents)
        == (manifest["splits"]["val"]["documents"])
    )
    assert {line["url"] for line in documents if line["source"] == "web"} <= {
        f"u{i}" for i in range(40)
    }


def test_the_shards_are_the_texts_in_an_order_that_has_the_mix_everywhere(whole):
    from data.built import load_tokenizer

    out, _ = whole
    manifest = manifest_of(out)
    tokenizer = load_tokenizer(out)
    documents = [line for path in sorted((out / "text").iterdir()) for line in read_lines(path)]
    source_of = {line["text"]: line["source"] for line in documents}
    tokens = np.array(read_shard(out / "train_000000.bin"))
    texts = [tokenizer.decode(part) for part in np.split(tokens, np.flatnonzero(tokens == 399))[1:]]
    expected = [line["text"] for line in documents if line["split"] == "train"]
    assert sorted(texts) == sorted(expected)
    owners = [source_of[text] for text in texts]
    half = owners[: len(owners) // 2]
    for name in "books", "stories", "web":
        assert abs(half.count(name) - owners.count(name) / 2) <= 1.5
    assert manifest["eot"] == 399


def test_the_same_bytes_on_any_number_of_processes(tmp_path, three, whole):
    assert run(three, "--out", tmp_path / "2", "--processes", 2) == 0
    one = contents(whole[0])
    assert len(one) > 5 and one == contents(tmp_path / "2")


@pytest.mark.slow
def test_the_same_bytes_on_three(tmp_path, three, whole):
    assert run(three, "--out", tmp_path / "3", "--processes", 3) == 0
    assert contents(whole[0]) == contents(tmp_path / "3")


def test_texts_are_compared_by_all_processes(tmp_path, monkeypatch):
    """The same documents stay with one process, two and three, and those that stay without any
    files; also with a source for validation, which comes first, and one that is a single part."""
    texts = edited_documents(250)
    sources = []
    for name, some in (("a", texts[:120]), ("b", texts[120:122]), ("c", texts[122:])):
        lines_of(tmp_path / f"{name}.jsonl", some)
        sources.append(dict(path=str(tmp_path / f"{name}.jsonl"), preset="none"))
    sources[2]["split"] = "val"
    todo = recipe.from_table(dict(source=sources, piece_bytes=100_000), "here")
    monkeypatch.setattr(pieces, "FRAME", 10_000)  # several parts in a piece
    monkeypatch.setattr(dedup, "TEXTS_AT_ONCE", 2)
    read = tmp_path / "read"
    read.mkdir()
    files = {part.name: reading.locate(part, tmp_path) for part in todo.source}
    stages.read(todo, files, read, pieces.Workers(1))
    n_tasks = []
    fates = []
    for processes in 1, 2, 3:
        folder = tmp_path / str(processes)
        folder.mkdir()
        with pieces.workers(processes) as crew:
            crew_map = crew.map

            def counted(function, tasks, crew_map=crew_map):
                tasks = list(tasks)
                n_tasks.append(len(tasks))
                return crew_map(function, tasks)

            monkeypatch.setattr(crew, "map", counted)
            stages.find_duplicates(todo, read, folder, crew)
            assert (crew.pool is not None) == (processes > 1)
        assert [path.name for path in folder.iterdir()] == ["fate.npz"]
        fates.append((folder / "fate.npz").read_bytes())
    assert fates[0] == fates[1] == fates[2] and max(n_tasks) > 3

    cleaned = [line["text"] for path in sorted(read.glob("*.zst")) for line in read_lines(path)]
    there = stages.Pieces(read)
    wanted = np.array([0, 1, 2, 50, 119, 120, 121, 122, 249])
    found = [(i, line["text"]) for i, line in there.documents(wanted)]
    assert found == [(i, cleaned[i]) for i in wanted.tolist()]
    order = np.roll(np.arange(250), 250 - 122)  # those for validation first
    by_rank = [cleaned[i] for i in order]
    config = dedup.MinHash()

    def compare(left, right):
        return dedup.similarities(lambda rows: [by_rank[i] for i in rows], left, right, config)

    first = dedup.near_duplicates(dedup.signatures(by_rank, config), config, compare)
    found = pieces.read_arrays(tmp_path / "1" / "fate.npz")["first"]
    np.testing.assert_array_equal(found[order], order[first])


def test_what_takes_much_memory_is_alone():
    with pieces.workers(2) as crew:
        list(crew.map(abs, [(1,), (2,)]))
        assert crew.pool is not None
        assert crew.alone(os.getpid) != os.getpid() and crew.pool is None
    with pieces.workers(1) as crew:
        assert crew.alone(os.getpid) == os.getpid()


def test_pairs_for_a_process_are_few_and_not_much_text(monkeypatch):
    monkeypatch.setattr(stages, "COMPARED", 100)
    monkeypatch.setattr(dedup, "TEXTS_AT_ONCE", 3)
    sizes = np.array([60, 40, 1, 500, 1, 1, 1, 1, 99])
    assert stages.bounds_of(sizes) == [0, 2, 3, 4, 7, 9]


def test_a_second_build_finds_it_done_and_a_changed_source_is_noticed(
    tmp_path, three, whole, capsys
):
    out = shutil.copytree(whole[0], tmp_path / "out")
    before = contents(out)
    (out / "work").mkdir()
    (out / "work" / "left.json").write_text("{}")  # by a build that was killed while it cleaned up
    assert run(three, "--out", out, "--processes", 1) == 0
    assert "is built already" in capsys.readouterr().err
    assert contents(out) == before

    (tmp_path / "books" / "4.txt").write_text(prose(1000))
    assert run(three, "--out", out, "--processes", 1) == 2
    assert "books: 4.txt: changed since it was built" in capsys.readouterr().err
    assert contents(out) == before
    assert run(three, "--out", out, "--processes", 1, "--seed", 5, "--replace") == 0
    assert contents(out) != before


class Killed(BaseException):
    """Stands for a kill -9: nothing of ours catches it."""


def test_a_build_that_is_killed_again_and_again_makes_the_same_bytes(
    tmp_path, three, whole, monkeypatch
):
    """At every ninth file that gets its name, in all stages; the file does not get it then. The
    longest stage that begins anew names fewer."""
    replace = os.replace
    left = 0
    stages = set()

    def replace_or_die(*args):
        nonlocal left
        left -= 1
        if left < 0:
            stages.update(path.name.split("-")[0] for path in (tmp_path / "out/work").iterdir())
            raise Killed
        return replace(*args)

    monkeypatch.setattr(os, "replace", replace_or_die)
    kills = 0
    while kills < 40:
        left = 8
        try:
            assert run(three, "--out", tmp_path / "out", "--processes", 1) == 0
            break
        except Killed:
            kills += 1
            assert not (tmp_path / "out" / "manifest.json").exists()
    assert kills >= 10 and stages >= {
        "read",
        "dedup",
        "decontaminate",
        "tokenizer",
        "encode",
        "mix",
    }
    assert contents(tmp_path / "out") == contents(whole[0])


@pytest.mark.slow
def test_kill_9_at_any_time_with_several_processes(tmp_path, three, whole):
    command = [sys.executable, "door.py", "data", "build", three, "--processes", "3", "--out"]
    out = tmp_path / "out"
    seconds = 0.5
    kills = 0
    while True:
        process = subprocess.Popen([*command, out], cwd=ROOT, stderr=subprocess.PIPE)
        try:
            assert process.wait(seconds) == 0, process.stderr.read()
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            process.stderr.read()  # is at its end when the last process has gone
            kills += 1
            seconds *= 1.15
            if (out / "manifest.json").exists():  # killed while it cleaned up
                assert contents(whole[0]).items() <= contents(out).items()
    assert kills >= 3
    assert contents(out) == contents(whole[0])


def test_weights_and_epochs(tmp_path, three, capsys):
    """Stories make up half of the tokens, books a quarter, at most twice over."""
    said = three.read_text().replace("[[source]]", "[[source]]\nmax_epochs = 2.0\nweight = 1.0", 3)
    said = said.replace('path = "stories', 'weigt\npath = "stories').replace(
        "weight = 1.0\n        weigt", "weight = 2.0"
    )
    three.write_text(said)
    out = tmp_path / "out"
    assert run(three, "--out", out, "--processes", 1) == 0
    manifest = manifest_of(out)
    sources = {name: source["mix"] for name, source in manifest["sources"].items()}
    tokens = {name: source["tokens"] for name, source in sources.items()}
    total = sum(tokens.values())
    assert total == manifest["splits"]["train"]["tokens"]
    assert tokens["stories"] / total == pytest.approx(0.5, abs=0.03)
    assert tokens["books"] / total == pytest.approx(0.25, abs=0.03)
    assert max(source["epochs"] for source in sources.values()) == 2.0
    three.write_text(said + "\n[mix]\ntotal = 1000000\n")
    assert run(three, "--out", tmp_path / "more", "--processes", 1) == 2
    err = capsys.readouterr().err
    assert "[mix] total 1,000,000:" in err and "max_epochs of 2; lower the total" in err


def test_what_is_for_validation_is_no_longer_trained_on(tmp_path, monkeypatch):
    """A source of its own for validation, an evaluation set, and copies of both among the rest."""
    texts = [prose(i) for i in range(60)]
    exam = [prose(1000), prose(1001)]
    near = texts[0].replace(texts[0].split()[40], "another")
    quoting = prose(2000) + exam[1].split("\n")[3] + "\n" + prose(2001)
    lines_of(tmp_path / "web.jsonl", [*texts, near, quoting])
    lines_of(tmp_path / "held.jsonl", [texts[5], prose(3000)])
    lines_of(tmp_path / "exam.jsonl", exam)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        """
        tokenizer = "bytes"
        preset = "none"
        [[source]]
        path = "web.jsonl"
        split = "train"
        [[source]]
        path = "held.jsonl"
        split = "val"
        [decontaminate]
        sets = {exam = "exam.jsonl"}
        """
    )
    batches = words.batches
    monkeypatch.setattr(words, "batches", lambda texts: batches(texts, 2000))  # several in a piece
    out = tmp_path / "out"
    assert run(recipe, "--out", out, "--processes", 1) == 0
    stages = manifest_of(out)["stages"]
    counts = {n: c["documents"] for n, c in stages["decontaminate"]["counts"]["web"].items()}
    assert counts == {
        "train": 59, "exact duplicates": 1, "near duplicates": 1, "contaminated": 1
    }  # fmt: skip
    assert stages["decontaminate"]["sets"] == {"exam": 1, "validation": 0}
    assert manifest_of(out)["splits"]["val"]["documents"] == 2
    kept = [line["id"] for p in sorted((out / "text").iterdir()) for line in read_lines(p)]
    assert kept == [*(str(i) for i in range(60) if i != 5), "0", "1"]


def test_a_commonplace_is_no_contamination(tmp_path):
    """A licence over every file, which validation has as well, drops none of them; a sentence that
    one of them shares does."""
    licence = "Permission is hereby granted to anyone who has a copy of this to do with it " * 2
    texts = [f"{licence}\n{prose(i)}" for i in range(40)]
    held = f"{licence}\n{prose(100)}"
    texts[7] += held.split("\n")[4]
    lines_of(tmp_path / "web.jsonl", texts)
    lines_of(tmp_path / "held.jsonl", [held])
    recipe = tmp_path / "recipe.toml"
    sources = "[[source]]\npath = 'web.jsonl'\nsplit = 'train'\n"
    sources += "[[source]]\npath = 'held.jsonl'\nsplit = 'val'\n"
    recipe.write_text(f"tokenizer = 'bytes'\npreset = 'none'\n{sources}")
    assert run(recipe, "--out", tmp_path / "out", "--processes", 1) == 0
    said = manifest_of(tmp_path / "out")["stages"]["decontaminate"]
    assert said["sets"] == {"validation": 1} and said["commonplaces"] > 10


def test_training_opens_what_was_built(tmp_path, whole):
    out = shutil.copytree(whole[0], tmp_path / "out")
    config = DataConfig(data=str(out), row_len=64)
    stages = dict(batch_rows=lambda step: 2, max_doc_len=lambda step: 64)
    data = open_data(config, tmp_path / "cache", **stages)
    manifest = manifest_of(out)
    assert data.dataset.n_vocab == 400 and data.dataset.eot == manifest["eot"]
    assert data.val_bytes == manifest["splits"]["val"]["bytes"]
    assert data.train.rows(1) is not None

    path = out / "train_000000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="train_000000.bin: expected sha256 .* not what was built"):
        open_data(config, tmp_path / "cache", **stages)
    (out / "manifest.json").write_text('{"splits": {}}')
    with pytest.raises(InputError, match="not the manifest of a built corpus"):
        open_data(config, tmp_path / "cache", **stages)


def test_where_a_string_is_from(tmp_path, whole, capsys):
    out, _ = whole
    line = prose(7, 20).split("\n")[3]
    where = ["where", "--data", str(out), "--text", line.upper().replace(" ", "\n ", 1)]
    assert main(where) == 0
    assert json.loads(capsys.readouterr().out) == dict(found=0, text=where[-1])
    assert main([*where, "--any-case"]) == 0
    hit, total = map(json.loads, capsys.readouterr().out.splitlines())
    assert (hit["source"], hit["id"], hit["licence"]) == ("books", "7.txt", "CC0-1.0")
    assert total["found"] == 1 and hit["times"] == 1
    assert main(["where", "--data", str(tmp_path), "--text", "x"]) == 2
    assert main(["where", "--text", "x"]) == 2


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, three, monkeypatch, capsys):
    out = tmp_path / "out"
    replace = os.replace

    def full(source, target):
        if "encode-" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        return replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert run(three, "--out", out, "--processes", 1) == 2
    err = capsys.readouterr().err
    assert "No space left on device; put this right and start the same command again" in err
    assert not (out / "manifest.json").exists() and not list(out.glob("*.bin"))
    monkeypatch.undo()
    assert run(three, "--out", out, "--processes", 1) == 0


def test_a_dry_run_writes_nothing_and_shows_what_goes(tmp_path, three, capsys):
    text = three.read_text().replace('preset = "stories"', "filters = {gopher_words = true}")
    three.write_text(text.replace("piece_bytes = 6000", "piece_bytes = 100_000"))
    lines_of(tmp_path / "stories.jsonl", [prose(1), "the of", "the and of"])
    before = contents(tmp_path)
    assert run(three, "--dry-run") == 0
    said = capsys.readouterr().out
    assert "books: 20 files; of the first 20 documents" in said
    assert "gopher_words (least 50, most 100000): 2 dropped\n      1: the of\n" in said
    assert contents(tmp_path) == before


def test_parquet(tmp_path, capsys):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    texts = [prose(i) for i in range(30)]
    table = pa.table(dict(body=texts, id=[f"p{i}" for i in range(30)], score=[1.0] * 30))
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=7)
    out = tmp_path / "out"
    options = ["--processes", 1, "--val-fraction", 0.1, "--tokenizer", "bytes"]
    assert run(path, "--out", out, "--column", "body", *options) == 0
    assert manifest_of(out)["documents_kept"] == 30
    found = [line for p in sorted((out / "text").iterdir()) for line in read_lines(p)]
    assert [line["id"] for line in found] == [f"p{i}" for i in range(30)]
    assert run(path, "--out", tmp_path / "b", *options) == 2
    assert "a.parquet: no column text; found body, id, score" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-100])
    assert run(path, "--out", tmp_path / "c", "--column", "body", *options) == 2
    assert "a.parquet: corrupt or cut short" in capsys.readouterr().err
    assert not (tmp_path / "c" / "manifest.json").exists()


@pytest.mark.parametrize(
    "name, content, found",
    [
        ("a.jsonl", '{"text": "x"}\n{"text": ', "a.jsonl: line 2: expected JSON"),
        ("a.jsonl", '{"body": "x", "n": 1}\n', "a.jsonl: line 1: no field text; found body, n"),
        ("a.jsonl", '{"text": 3}\n', "text is int, expected text"),
        ("a.jsonl", "[1, 2]\n", "expected an object"),
        ("a.jsonl", "\n", "there are no documents in it"),
        ("a.txt", "", "the file is empty"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "x"}\n' * 9999)[:-9], "corrupt or cut short"),
        ("a.jsonl.zst", b"no zstd at all", "corrupt or cut short"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9999)[:-9], "corrupt or cut short"),
        ("a.jsonl", b'{"text": "\xff"}\n', "after line 0: expected text in UTF-8"),
    ],
)
def test_bad_sources(tmp_path, capsys, name, content, found):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "out"
    assert run(path, "--out", out, "--processes", 1) == 2
    err = capsys.readouterr().err
    assert found in err and str(tmp_path) in err + str(tmp_path) and err.count("\n") == 1
    assert not (out / "manifest.json").exists() and not list(out.glob("*.bin"))


@pytest.mark.parametrize(
    "said, found",
    [
        ("val_fractoin = 0.1", "unknown key val_fractoin; did you mean val_fraction?"),
        ("[[source]]\npaht = 'x'", "[[source]] 1: unknown key paht; did you mean path?"),
        ("[dedup]\nexakt = true", "[dedup]: unknown key exakt; did you mean exact?"),
        ("[[source]]\npath = 'x'\nhub = 'y'", "expected path, hub or source, found path and hub"),
        ("[[source]]\npath = 'x'\npreset = 'wab'", "preset wab: did you mean web?"),
        ("[[source]]\npath = 'x'\nfilters = {c4_curly = true}", "did you mean c4_curly_bracket?"),
        (
            "[[source]]\npath = 'x'\nfilters = {gopher_words = {min = 3}}",
            "gopher_words has no threshold min; expected of least, most",
        ),
        ("[[source]]\npath = 'x'\nlimit = 'all'", "limit: expected int, found 'all'"),
        ("val_fraction = 1.5\n[[source]]\npath = 'x'", "expected a fraction between 0 and 1"),
        ("", "no [[source]]"),
        ("a = ", "not a recipe in TOML"),
        ("[[source]]\npath = 'x'\nweight = 1\n[[source]]\npath = 'y'", "a weight for some"),
        ("[[source]]\npath = 'nowhere'", "no such file or folder"),
        ("[[source]]\nhub = 'the-stack-v2'", "ids of files only"),
        ("[[source]]\nhub = 'nonsense'", "expected OWNER/REPOSITORY or one of fineweb"),
        ("[[source]]\nsource = 'nonsense'", "source nonsense: expected"),
    ],
)
def test_bad_recipes(tmp_path, capsys, said, found):
    path = tmp_path / "recipe.toml"
    path.write_text(said)
    assert run(path, "--out", tmp_path / "out", "--processes", 1) == 2
    err = capsys.readouterr().err
    assert found in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "parts, kept", [("paragraphs", "own 1\nfooter of all"), ("lines", "own 1")]
)
def test_repeated_parts_go_from_all_but_the_first(tmp_path, parts, kept):
    head = "A header that every page of the site has."
    pages = [f"{head}\n\nown {i}\nfooter of all" for i in range(8)] + [f"{head}\n\n{head}"]
    lines_of(tmp_path / "web.jsonl", [f"{page}\n\n{prose(i)}" for i, page in enumerate(pages)])
    lines_of(tmp_path / "more.jsonl", [head])
    recipe = tmp_path / "recipe.toml"
    sources = "[[source]]\npath = 'web.jsonl'\n[[source]]\npath = 'more.jsonl'\n"
    recipe.write_text(
        "tokenizer = 'bytes'\npreset = 'none'\nval_fraction = 0.3\npiece_bytes = 3000\n"
        f"{sources}[dedup]\nparts = '{parts}'\n"
    )
    out = tmp_path / "out"
    assert run(recipe, "--out", out, "--processes", 1) == 0
    found = [line for p in sorted((out / "text").iterdir()) for line in read_lines(p)]
    assert found[0]["text"].startswith(head)
    assert found[1]["text"] == f"{kept}\n\n{prose(1)}".strip()
    assert len(found) == 9 and not any(head in line["text"] for line in found[1:])
    counts = manifest_of(out)["stages"]["decontaminate"]["counts"]
    assert counts["more"] == {"repeated parts": {"documents": 1, "bytes": 0}}
