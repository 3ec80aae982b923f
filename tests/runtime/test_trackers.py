"""--track-with: a tracker gets what metrics.jsonl gets, and its failures cost nothing."""

import json
import sys
import types

import pytest
from helpers import SMALL_MODEL, tiny, write_text

import train_gpt as tg
from base import InputError
from runtime import trackers


def numbers_of(run_dir):
    """[(step, numbers)] of metrics.jsonl."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [(row.pop("step"), row) for row in rows]


@pytest.fixture
def fake(monkeypatch):
    """A module trackio that remembers; fake.fail_at: the step at which it fails."""
    module = types.ModuleType("trackio")
    module.got, module.inits, module.ended, module.fail_at = [], [], 0, None

    def log(numbers, step):
        if step == module.fail_at:
            raise RuntimeError("no\nnetwork")
        module.got.append((step, numbers))

    def finish():
        module.ended += 1

    module.init = lambda **about: module.inits.append(about)
    module.log, module.finish = log, finish
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def train(tmp_path, **fields):
    text = write_text(tmp_path / "words.txt", 3000)
    fields = SMALL_MODEL | dict(steps=4, eval_every=2, val_tokens=200) | fields
    return tg.train(tiny(text, tmp_path, **fields))


def test_a_tracker_gets_what_the_metrics_file_gets(fake, tmp_path):
    train(tmp_path, track_with="trackio")
    assert fake.got == numbers_of(tmp_path / "run")
    assert len(fake.got) == 6 and "val_bpb" in fake.got[2][1] and "lr" in fake.got[0][1]
    [about] = fake.inits
    assert about["name"] == "run" and about["config"]["n_embd"] == 32
    assert fake.ended == 1


def test_a_tracker_that_fails_is_left_alone(fake, tmp_path, capsys):
    fake.fail_at = 2
    result = train(tmp_path, track_with="trackio")
    assert result["steps"] == 4 and [step for step, _ in fake.got] == [1]
    err = capsys.readouterr().err
    assert err.count("--track-with trackio failed") == 1
    assert "RuntimeError: no network" in err


def test_a_package_that_is_missing_is_one_line_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="--track-with wandb: .*pip install wandb"):
        train(tmp_path, track_with="wandb")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="--track-with mlflow: expected tensorboard, trackio"):
        tiny("x", tmp_path, track_with="mlflow")


@pytest.mark.slow
def test_tensorboard_has_the_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, track_with="tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for name in ("train_loss", "val_loss", "val_bpb", "lr"):
        found = [(e.step, e.value) for e in events.Scalars(name)]
        expected = [(s, row[name]) for s, row in numbers_of(tmp_path / "run") if name in row]
        assert [s for s, _ in found] == [s for s, _ in expected]
        assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=1e-6)


@pytest.mark.slow
def test_wandb_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tmp_path, track_with="wandb")
    assert [*(tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")]


@pytest.mark.slow
def test_trackio_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    said = []
    tracker = trackers.Tracker("trackio", tmp_path / "run", {"steps": 4}, said.append)
    tracker.log(dict(step=1, train_loss=2.0))
    tracker.finish()
    assert said == [] and [*(tmp_path / "trackio").glob("*stopwatch*")]
