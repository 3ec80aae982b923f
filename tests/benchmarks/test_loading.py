"""benchmarks/loader.py: each stage's batch once, the first step and opening apart from the rest."""

import time

import torch

from benchmarks import loader
from benchmarks.__main__ import run
from data import TrainLoader


def test_every_batch_of_the_schedule(monkeypatch):
    threads = torch.get_num_threads()
    steps = []
    rows = TrainLoader.rows

    def slow_at_first(self, step):
        steps.append(step)
        if step == 1:
            time.sleep(0.3)  # which opening pays for, and the step that warms up
        return rows(self, step)

    monkeypatch.setattr(TrainLoader, "rows", slow_at_first)
    result = run("loader", None, n_tokens=3_000_000, repeats=2)
    torch.set_num_threads(threads)
    assert [s["batch_tokens"] for s in result["stages"]] == [131072, 262144, 393216]
    assert steps == 3 * [1, 1, 2, 3]
    for stage in result["stages"]:
        assert stage["tokens_per_s"] > 4 * stage["batch_tokens"]  # less than 0.3 s a batch
        assert stage["open_and_index_s_per_100M"] > 0.3 * 1e8 / 3e6
    assert result["floor_tokens_per_s"] > result["stages"][0]["tokens_per_s"]
    text = loader.render(result)
    assert f"| 131,072 | {result['stages'][0]['tokens_per_s'] / 1e6:.0f} |" in text
