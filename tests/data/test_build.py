"""data/build.py and its stages: from sources to shards that train."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from data import read_shard
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


def test_three_sources_become_tokens(tmp_path, three, capsys):
    out = tmp_path / "out"
    assert run(three, "--out", out, "--processes", 1) == 0
    said = json.loads(capsys.readouterr().out)
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


def test_the_shards_are_the_texts_in_an_order_that_has_the_mix_everywhere(tmp_path, three):
    from data.built import load_tokenizer

    out = tmp_path / "out"
    assert run(three, "--out", out, "--processes", 1) == 0
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


def test_the_same_bytes_on_any_number_of_processes(tmp_path, three):
    for n in 1, 2:
        assert run(three, "--out", tmp_path / str(n), "--processes", n) == 0
    one = contents(tmp_path / "1")
    assert len(one) > 5 and one == contents(tmp_path / "2")


def test_a_second_build_finds_it_done_and_a_changed_source_is_noticed(tmp_path, three, capsys):
    out = tmp_path / "out"
    assert run(three, "--out", out, "--processes", 1) == 0
    before = contents(out)
    assert run(three, "--out", out, "--processes", 1) == 0
    assert "is built already" in capsys.readouterr().err
    assert contents(out) == before

    (tmp_path / "books" / "4.txt").write_text(prose(1000))
    assert run(three, "--out", out, "--processes", 1) == 2
    assert "books: 4.txt: changed since it was built" in capsys.readouterr().err
    assert contents(out) == before
    assert run(three, "--out", out, "--processes", 1, "--seed", 5, "--replace") == 0
    assert contents(out) != before


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
