"""A run that begins with the weights of another one, and differences in words."""

import math
import shutil
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import rows, same

import train_gpt as tg
from base import InputError
from data.tokenizers import Tokenizer
from runtime import warm_start
from runtime.warm_start import differences, leaves


def test_warm_start_takes_the_weights_and_nothing_else(run):
    run("first")
    checkpoint = run.tmp / "first/checkpoints/step-000006"
    for name, path in (("by_run", run.tmp / "first"), ("by_checkpoint", checkpoint)):
        done = run(name, "--warm-start", path, seed=5, muon_lr=0.01, steps=4)
        assert done.status == 0, done.err
    assert rows(run.tmp / "by_run") == rows(run.tmp / "by_checkpoint")  # fp32: both have the same
    first, second = rows(run.tmp / "first"), rows(run.tmp / "by_run")
    assert [row["step"] for row in second] == [1, 2, 3, 3, 4, 4]
    assert second[0]["train_loss"] < first[0]["train_loss"] - 0.3  # where the other ended


def test_a_warm_started_run_resumes_from_its_own_work(run):
    run("first")
    start = ("--warm-start", run.tmp / "first")
    assert run("whole", *start, seed=5).status == 0
    run.stop("stopped", 3, *start, seed=5)
    assert run("stopped", "--resume", "auto", *start, seed=5).status == 0
    same(run.tmp / "stopped", run.tmp / "whole")


def test_what_a_warm_start_refuses(run):
    """In one line, and before anything is written."""
    run("first")

    def refused(path, **fields):
        done = run("other", "--warm-start", path, **fields)
        assert done.status == 2 and done.err.count("\n") == 1, done.err
        assert rows(run.tmp / "other") == [] and not (run.tmp / "other/log.txt").exists()
        return done.err

    said = refused(run.tmp / "first", n_embd=48)
    assert "does not fit this model: embed: [320, 48] here, [320, 32] in" in said
    said = refused(run.tmp / "missing")
    assert "expected a run's folder with model.safetensors, or a checkpoint" in said
    weights = run.tmp / "first/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "model.safetensors" in refused(run.tmp / "first")


# --------------------------------------------------------------------------------------------------
# The tokenizer

STILL = dict(muon_lr=0.0, adam_lr=0.0, steps=1, eval_every=1)  # only validate


@pytest.fixture
def other(run, tmp_path):
    """The run's text with a word in front, so that a new vocabulary would be another one."""
    text = run.text.read_text().replace("cat", "tomcat")
    (tmp_path / "other.txt").write_text(f"zebra quagga {text}")
    return str(tmp_path / "other.txt")


def first_run(run, name="first", **fields):
    """A run to begin with."""
    done = run(name, **dict(tokenizer="bpe:300", steps=12) | fields)
    assert done.status == 0, done.err
    return run.tmp / name


def test_ids_mean_what_they_meant_on_another_text(run, other):
    """So the loss is about that on the run's own text; it was 1.5 more with ids of its own."""
    folder = first_run(run)
    warm = dict(tokenizer="bpe:300", warm_start=str(folder), **STILL)
    own = run("own", **warm).result["val_loss"]
    done = run("again", text=other, **warm)
    assert done.status == 0, done.err
    assert done.result["val_loss"] == pytest.approx(own, abs=0.25)
    # The file counts by its content, and a run that has begun needs the other no more
    shutil.copytree(folder, run.tmp / "moved")
    prepared = sorted((run.tmp / "cache/data").iterdir())
    moved = run("moved_too", text=other, **warm | dict(warm_start=str(run.tmp / "moved")))
    assert moved.result["val_loss"] == done.result["val_loss"]
    shutil.rmtree(folder)
    more = ["--resume", run.tmp / "again", "--steps", 2, "--no-compile"]
    done = run.nursery.run([*more, "--cache-dir", run.tmp / "cache"], run.tmp / "output")
    assert done.status == 0, done.err
    assert sorted((run.tmp / "cache/data").iterdir()) == prepared


def test_another_tokenizer_than_that_of_the_weights(run):
    folder = first_run(run)
    done = run("warm", tokenizer="bytes", warm_start=str(folder))
    assert done.status == 2 and done.err.count("\n") == 1, done.err
    assert f"--warm-start {folder}: tokenizer: 'bytes' here, 'bpe:300' in the run" in done.err
    # Where none is given, it is the run's
    argv = ["--text", run.text, "--warm-start", folder / "checkpoints/step-000012"]
    assert tg.parse_args(list(map(str, argv))).data.tokenizer == "bpe:300"
    argv[2:] = ["--warm-start", run.tmp / "nowhere"]
    assert tg.parse_args(list(map(str, argv))).data.tokenizer == "bpe"


def test_characters_that_the_run_has_not_seen(run, tmp_path):
    folder = first_run(run, tokenizer="chars")
    (tmp_path / "russian.txt").write_text("река утро камень свет мост дом " * 400)
    warm = dict(tokenizer="chars", warm_start=str(folder), **STILL)
    done = run("warm", text=str(tmp_path / "russian.txt"), **warm)
    assert done.status == 2 and done.err.count("\n") == 1, done.err
    assert "is not among the" in done.err and "the tokenizer knows" in done.err


def test_a_run_from_before_runs_kept_their_tokenizer(run, other):
    """What is the same for every text may be used on any, a vocabulary that was learned may not."""
    folder = first_run(run)
    (folder / "tokenizer.json").unlink()
    warm = dict(tokenizer="bpe:300", warm_start=str(folder), **STILL)
    done = run("warm", text=other, **warm)
    assert done.status == 2 and done.err.count("\n") == 1, done.err
    assert "has no tokenizer.json, and its vocabulary is of another text" in done.err
    assert run("same", **warm).status == 0
    assert run("bytes", steps=2).status == 0
    (run.tmp / "bytes/tokenizer.json").unlink(missing_ok=True)
    done = run("warm", text=other, warm_start=str(run.tmp / "bytes"), **STILL)
    assert done.status == 0, done.err


def test_tokens_that_are_not_those_of_the_weights(tmp_path):
    """A source that brings its own tokens cannot take others."""
    tokens = [bytes([i]) for i in range(256)]
    (tmp_path / "tokenizer.json").write_text(Tokenizer("bytes", tokens).to_json())
    dataset = types.SimpleNamespace(name="shards", tokenizer=Tokenizer("bytes", tokens))
    warm_start.check_vocabulary(tmp_path, dataset)
    dataset.tokenizer = Tokenizer("chars", ["a", "b"])
    with pytest.raises(InputError, match="vocabulary: 3 tokens here, 257 others in the run, so"):
        warm_start.check_vocabulary(tmp_path, dataset)


def test_a_vocabulary_that_was_learned_otherwise_is_noticed_on_resuming(run):
    """By another version of the library, say: the same text and name, and other tokens."""
    run.stop("stopped", 3, tokenizer="bpe:300")
    path = run.tmp / "stopped/tokenizer.json"
    other = Tokenizer("bytes", [bytes([i]) for i in range(256)]).to_json()
    before = path.read_text()
    path.write_text(other)
    done = run("stopped", "--resume", "auto", tokenizer="bpe:300")
    assert done.status == 2 and "vocabulary: 300 tokens here, 257 others in the run" in done.err
    path.write_text(before)
    assert run("stopped", "--resume", "auto", tokenizer="bpe:300").status == 0


# --------------------------------------------------------------------------------------------------
# Differences

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(
    "ours, theirs, lines",
    [
        ({}, {}, []),
        (dict(a=(1, 2.5)), dict(a=[1, 2.5]), []),
        (dict(a=1), dict(a=1.0), []),
        (dict(a=math.nan, b=math.inf), dict(a=math.nan, b=math.inf), []),
        (
            dict(n_layer=4, lr=0.1),
            dict(lr=0.1, n_layer=6),
            ["n_layer: 4 here, 6 in the run"],
        ),
        (
            dict(a="x"),
            dict(b=None),
            ['a: "x" here, nothing in the run', "b: nothing here, null in the run"],
        ),
        (dict(a="nothing"), {}, ['a: "nothing" here, nothing in the run']),
        (
            dict(a=dict(b=1, c=dict(d=2))),
            dict(a=dict(b=1, c=dict(d=3))),
            ["a.c.d: 2 here, 3 in the run"],
        ),
        (
            dict(a={}),
            dict(a=dict(b=1)),
            ["a: {} here, nothing in the run", "a.b: nothing here, 1 in the run"],
        ),
    ],
)
def test_differences(ours, theirs, lines):
    assert differences(ours, theirs) == lines


def test_differences_of_long_values_are_shown_where_they_part():
    (line,) = differences(dict(a=[0] * 500 + [1]), dict(a=[0] * 500 + [2] * 200))
    assert " 1] here, " in line and " 2, 2" in line and len(line) < 180


@given(
    st.dictionaries(st.text(max_size=3), JSON, max_size=3),
    st.dictionaries(st.text(max_size=3), JSON, max_size=3),
)
def test_differences_name_what_differs(ours, theirs):
    assert differences(ours, ours) == []
    assert bool(differences(ours, theirs)) == bool(differences(theirs, ours))
    names = [name for name, _ in [*leaves(ours), *leaves(theirs)]]
    if "" not in names and not any("." in name for name in names):
        assert bool(differences(ours, theirs)) == (ours != theirs)
