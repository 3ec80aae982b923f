"""benchmarks/start.py: the parts of a process add up, a real one with empty and with filled
caches."""

import functools
import json
import sys
import time

import pytest
from helpers import options, tiny, write_text

from base import InputError
from benchmarks import process, start, synthetic
from benchmarks.__main__ import main
from runtime import corpus, machine
from runtime.finish import PARTS


@pytest.mark.slow
def test_cold_and_warm(tmp_path, capsys):
    text = write_text(tmp_path / "text.txt")
    c = tiny(text, tmp_path, tokenizer="bpe:300", target_metric="val_loss")
    out = tmp_path / "out.json"
    markdown = tmp_path / "table.md"
    before = time.perf_counter()
    assert main(["start", "--json", str(out), "--table", str(markdown), *options(c)]) == 0
    passed = time.perf_counter() - before
    result = json.loads(out.read_text())
    for state in ("cold", "warm"):
        seconds = result[state]
        assert list(seconds) == ["process_s", *PARTS, "rest_s", "cold_start_s"]
        parts = sum(seconds[name] for name in (*PARTS, "rest_s"))
        assert parts == pytest.approx(seconds["process_s"])
        assert seconds["imports_s"] > 0.3 and seconds["train_s"] > 0 and seconds["rest_s"] > 0
        assert seconds["cold_start_s"] < seconds["process_s"]
    assert result["cold"]["process_s"] + result["warm"]["process_s"] < passed
    # The tokenizer was trained in the first run only
    assert result["cold"]["data_s"] > result["warm"]["data_s"]
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    line = f"| **process** | {result['cold']['process_s']:.2f} | {result['warm']['process_s']:.2f}"
    assert line in markdown.read_text() and markdown.read_text() in capsys.readouterr().err


def test_medians_of_pairs_on_fresh_caches(monkeypatch):
    took = iter((9.0, 5.0, 20.0, 1.0, 10.0, 2.0))
    folders = []
    saved = []

    def train(what, options, folder, synthetic):
        assert (what, options, synthetic) == ("the trainer", ["--steps", "1"], True)
        folders.append(folder)
        return dict.fromkeys(PARTS, 0.5) | dict(process_s=next(took), cold_start_s=1.0)

    monkeypatch.setattr(start, "train", train)
    result = start.run(3, True, ["--steps", "1"], saved.append)
    assert result["cold"]["process_s"] == 10.0 and result["warm"]["process_s"] == 2.0
    assert result["warm"]["rest_s"] == 2.0 - 0.5 * len(PARTS)
    assert len(set(folders)) == 3 and folders[0::2] == folders[1::2] and len(saved) == 3


def test_a_trainer_that_fails_says_why(monkeypatch, capsys):
    def execute(what, command, folder, log, env, ok, limit):
        assert ok == (0, 3)  # what the trainer ends with, its target reached or not
        assert command[1:5] == [*process.TRAINER, "--n-head", "3"]
        assert command[5:9:2] == ["--cache-dir", "--run-dir"] and command[6] == folder / "cache"
        assert "TORCHINDUCTOR_CACHE_DIR" not in env
        assert env["TRITON_CACHE_DIR"] == str(folder / "cache/triton")
        raise InputError(f"{what} ended with status 2: --n-embd 128: expected a multiple of 12")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/warm")
    monkeypatch.setattr(process, "execute", execute)
    assert main(["start", "--n-head", "3"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "error: the trainer ended with status 2: --n-embd 128: expected a multiple of 12"
    )
    assert main(["start", "--repeats", "0"]) == 2
    assert "error: --repeats 0: expected 1 or more" in capsys.readouterr().err


def test_random_tokens_in_place_of_data(tmp_path, monkeypatch, capsys):
    """The trainer's process, run here, on fewer tokens."""
    c = tiny("", tmp_path, data="stdlib", tokenizer="bytes", target_metric="val_loss", steps=1)
    monkeypatch.setattr(corpus, "open_dataset", None)  # puts back what main() replaces
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    fewer = functools.partial(synthetic.synthetic, n_tokens=20_000)
    monkeypatch.setattr(synthetic, "synthetic", fewer)
    monkeypatch.setattr(sys, "argv", ["synthetic", *options(c)])
    assert process.SYNTHETIC == ["-m", synthetic.__name__]
    assert synthetic.main() in (0, 3)
    result = json.loads(capsys.readouterr().out)
    assert result["data"] == "synthetic" and result["steps"] == 1
