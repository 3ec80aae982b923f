"""benchmarks/checkpoint.py: what it measures, what it leaves behind, bad input."""

import json
import os
import time

import pytest
from helpers import options, tiny, write_text

import runtime.checkpoints
from base import InputError
from benchmarks import checkpoint as benchmark
from benchmarks.__main__ import main


def tiny_training(tmp_path, monkeypatch):
    """Options that make the benchmark's training part short."""
    monkeypatch.setattr(benchmark, "STEPS", 6)
    monkeypatch.setattr(benchmark, "EVERY", 2)
    c = tiny(
        write_text(tmp_path / "words.txt", 4000),
        tmp_path,
        run_dir="",
        sample_tokens=0,
        checkpoint_every="10m",
    )
    return options(c)


def test_the_benchmark(tmp_path, monkeypatch):
    small = tiny_training(tmp_path, monkeypatch)
    result = benchmark.run(megabytes=2, folder=tmp_path / "new", repeats=2, trainer_options=small)
    t = result["training"]
    assert len(t["pairs"]) == 2 and t["bytes"] > 10_000
    prices = [(p["with_checkpoints"] - p["without"]) / 2 for p in t["pairs"]]
    assert t["seconds_per_checkpoint"] == sorted(prices)
    assert t["share_at_default"] == pytest.approx(sum(prices) / 2 / 600)
    assert f"{t['share_at_default']:.2%} of the time" in benchmark.render(result)
    r = result["store"]
    assert json.loads(json.dumps(result)) == result and os.listdir(tmp_path / "new") == []
    assert (
        r["tensor_bytes"] == 256 * 1024 * 8 + 4096 < r["bytes_on_disk"] < r["tensor_bytes"] + 2000
    )
    assert (
        set(r["seconds"]) == {"copy", "floor", "write", "read", "load"}
        and min(r["seconds"].values()) > 0
    )
    assert f"| load a checkpoint | {r['seconds']['load']:.3f} |" in benchmark.render(result)
    # the first round, which has nothing to delete, does not count
    plainly = benchmark.write_plainly
    calls = []

    def slow_at_first(*args):
        calls.append(args)
        time.sleep(0.5 if len(calls) == 1 else 0)
        plainly(*args)

    monkeypatch.setattr(benchmark, "write_plainly", slow_at_first)
    slow = benchmark.load
    monkeypatch.setattr(benchmark, "load", lambda path: (time.sleep(0.2), slow(path))[1])
    r = benchmark.store(2, tmp_path, 1)
    assert r["seconds"]["floor"] < 0.25 and len(calls) == 2
    assert r["seconds"]["load"] > 0.2 > r["seconds"]["write"] and r["load_over_read"] > 10


def test_what_is_wrong_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(benchmark, "training", lambda *_: pytest.fail("started"))
    with monkeypatch.context() as m:
        m.setattr(runtime.checkpoints, "sync", lambda _: os.stat(tmp_path / "none"))
        with pytest.raises(InputError, match="could not be written, see above"):
            benchmark.run(megabytes=1, folder=tmp_path)
    with pytest.raises(InputError, match="choose one on a disk"):
        benchmark.run(folder=tmp_path / "file", megabytes=1)
    for option in (["--megabytes", "0"], ["--repeats", "0"]):
        assert main(["checkpoint", *option]) == 2
        assert f"error: {' '.join(option)}: expected 1 or more" in capsys.readouterr().err
