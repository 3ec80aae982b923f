"""Loader throughput on one core: the batches of gpt2-small from a shard of documents as long as
web pages.

The floor is copying: 2 bytes read and 8 written per token, twice (inputs and targets).
"""

import statistics
import tempfile
import time

import numpy as np
import torch

from benchmarks import subject
from benchmarks.report import document, say, table
from benchmarks.synthetic import synthetic
from data import DataConfig, TrainLoader, read_shard


def run(n_tokens=20_000_000, repeats=5):
    """Median tokens/s at each stage's batch, seconds to open and index a shard, and the copy
    floor in tokens/s."""
    torch.set_num_threads(1)
    c = subject.parse(["--track", "gpt2-small"])
    with tempfile.TemporaryDirectory() as folder:
        dataset = synthetic(DataConfig(data="fineweb10B"), folder, n_tokens)
        tokens = np.array(read_shard(dataset.train[0]))
        rows = []
        # other stages of the schedule load the same batches
        stages = {(stage.rows, stage.model.max_doc_len): stage for stage in subject.schedule(c)}
        for stage in stages.values():
            rows.append(measure(dataset, stage, c.row_len, repeats))
            say(
                f"{rows[-1]['batch_tokens']:,} tokens a batch: "
                f"{rows[-1]['tokens_per_s'] / 1e6:.0f} M tokens/s"
            )
    n = 1 << 18
    inputs = np.empty(n, np.int64)
    targets = np.empty(n, np.int64)
    seconds = []
    for _ in range(9):
        start = time.perf_counter()
        inputs[:] = tokens[:n]
        targets[:] = tokens[1 : n + 1]
        seconds.append(time.perf_counter() - start)
    return dict(cores=1, stages=rows, floor_tokens_per_s=round(n / statistics.median(seconds)))


def measure(dataset, stage, row_len, repeats):
    """dict(batch_tokens, tokens_per_s, open_and_index_s_per_100M) of one stage's batches."""
    start = time.perf_counter()
    loader = TrainLoader(
        dataset.train,
        eot=dataset.eot,
        n_vocab=dataset.n_vocab,
        row_len=row_len,
        batch_rows=lambda _: stage.rows,
        max_doc_len=lambda _: stage.model.max_doc_len,
        long_docs="drop",
        shuffle=False,
    )
    opened = time.perf_counter() - start
    seconds = []
    for step in range(1, repeats + 2):  # the first one warms up
        start = time.perf_counter()
        list(loader.micro_batches(step))
        seconds.append(time.perf_counter() - start)
    n = stage.rows * row_len
    shard_tokens = len(read_shard(dataset.train[0]))
    return dict(
        batch_tokens=n,
        tokens_per_s=round(n / statistics.median(seconds[1:])),
        open_and_index_s_per_100M=round(opened * 1e8 / shard_tokens, 3),
    )


def render(result):
    """The result in Markdown."""
    rows = []
    for stage in result["stages"]:
        speed = f"{stage['tokens_per_s'] / 1e6:.0f}"
        rows.append(
            [f"{stage['batch_tokens']:,}", speed, f"{stage['open_and_index_s_per_100M']:.3f}"]
        )
    return document(
        "# Loader: gpt2-small's batches on one core",
        f"Copying alone would be {result['floor_tokens_per_s'] / 1e6:,.0f} M tokens/s.",
        table(["tokens a batch", "M tokens/s", "s to open and index 100M tokens"], rows),
    )
