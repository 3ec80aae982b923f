"""benchmarks/start.py: phases add up, a real start with empty and with
filled caches."""

import json
import time
from unittest.mock import ANY

import pytest
import torch
from helpers import options, tiny, write_text

from base import InputError
from benchmarks import start, subject
from benchmarks.__main__ import main
from runtime import machine


class Now:
    def __init__(self):
        self.t = 0.0

    def __call__(self):
        return self.t


def test_a_phase_does_not_count_those_inside_it():
    now = Now()
    phases = start.Phases(now)

    def spend(seconds, *then):
        now.t += seconds
        for function in then:
            function()
        now.t += seconds
        return seconds

    inner = phases.timed(lambda: spend(2), "inner")
    outer = phases.timed(lambda: spend(10, inner, inner), lambda: "outer")
    now.t += 1
    outer(), inner()
    now.t += 100
    phases.switch()
    assert (
        phases.seconds == dict(other=101, outer=20, inner=12)
        and sum(phases.seconds.values()) == now.t
    )
    assert list(phases.seconds) == ["other", "outer", "inner"]


def test_a_phase_that_raises_ends():
    now = Now()
    phases, waited = start.Phases(now), []

    def fail():
        now.t += 3
        raise ValueError

    with pytest.raises(ValueError):
        phases.timed(fail, "failing", wait=lambda: waited.append(now.t))()
    now.t += 4
    phases.switch()
    assert (
        phases.seconds == dict(other=4, failing=3) and waited == [3] and phases.stack == ["other"]
    )


def test_cold_and_warm(tmp_path, monkeypatch, capsys):
    c = tiny(
        write_text(tmp_path / "text.txt"), tmp_path, tokenizer="bpe:300", target_metric="val_loss"
    )
    before, out, table = time.perf_counter(), tmp_path / "out.json", tmp_path / "table.md"
    assert main(["start", "--json", str(out), "--table", str(table), *options(c)]) == 0
    result = json.loads(out.read_text())
    assert sum(sum(t) for t in result["totals"].values()) < time.perf_counter() - before
    for state in ("cold", "warm"):
        phases = result[state]
        assert {
            "interpreter",
            "imports",
            "arguments",
            "data",
            "model",
            "kernels",
            "probe",
            "log",
            "first step",
            "other",
        } == set(phases)
        assert min(phases.values()) >= 0 and sum(phases.values()) == pytest.approx(
            result["totals"][state][0]
        )
        assert phases["imports"] > 0.3 and phases["first step"] > 0 and phases["probe"] > 0
    assert (
        result["cold"]["data"] > result["warm"]["data"]
    )  # the tokenizer was trained in the first run only
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    assert "| first step |" in table.read_text() and table.read_text() in capsys.readouterr().err


def test_compiled_graphs_are_phases_of_their_own(tmp_path, monkeypatch):
    """The trainer's process, run here, with torch.compile handing back what it is given."""
    c = tiny(
        write_text(tmp_path / "text.txt"),
        tmp_path,
        compile=True,
        batch_tokens=(256, 512),
        mtp=(2, 1),
        tied=0.5,
    )
    wrapped = [(owner, name) for owner, name, _ in subject.phases(bool)]
    for owner, name in [*wrapped, subject.TRAINING, subject.STEP_ENDS]:
        monkeypatch.setattr(owner, name, getattr(owner, name))  # puts back what trace() replaces
    monkeypatch.setattr(machine, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(machine, "can_compile", lambda say: True)
    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *args, **kwargs: f(*args, **kwargs))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    result = tmp_path / "phases.json"
    assert start.trace(str(result), time.monotonic(), options(c), synthetic=False) == 130
    phases = json.loads(result.read_text())
    assert {
        "graph of 256 tokens, 2 targets, tied",
        "graph of 512 tokens",
        "graph of the optimizer",
        "graph of validation",
        "first step",
    } <= set(phases)
    assert phases["first step"] < 5 and not (tmp_path / "run" / "result.json").exists()


def test_a_trainer_that_fails_says_why(monkeypatch, capsys):
    def execute(what, command, folder, log, env, ok, every):
        assert ok == (130,)  # how the trainer ends after its first step
        assert command[-8:-2] == ["--n-head", "3", "--cache-dir", ANY, "--run-dir", ANY]
        assert "TORCHINDUCTOR_CACHE_DIR" not in env and env["TRITON_CACHE_DIR"]
        raise InputError(f"{what} ended with status 2: --n-embd 128: expected a multiple of 12")

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/warm")
    monkeypatch.setattr(start, "execute", execute)
    assert main(["start", "--n-head", "3"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == (
        "error: before its first step the trainer ended with status 2: --n-embd 128: "
        "expected a multiple of 12"
    )
    assert main(["start", "--repeats", "0"]) == 2
    assert "error: --repeats 0: expected 1 or more" in capsys.readouterr().err
