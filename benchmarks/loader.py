"""Loader throughput on one core: the batches of gpt2-small from a shard with FineWeb's document
lengths.

The floor is copying: 2 bytes read and 8 written per token, twice (inputs and targets).
"""

import statistics
import sys
import tempfile
import time

import numpy as np
import torch

from data import ShardWriter, TrainLoader
from train_gpt import Config, load_track, stage_at

EOT, N_VOCAB = 50256, 50257


def run(n_tokens=20_000_000, repeats=5):
    """Median tokens/s at each stage's batch, seconds to open and index a shard, and the copy
    floor in tokens/s."""
    torch.set_num_threads(1)
    c = Config(**load_track("gpt2-small"))
    r = np.random.default_rng(0)
    # FineWeb in GPT-2 tokens: mean 690, median 403 (log-normal: sigma^2 = 2 ln(mean / median))
    lengths = np.clip(
        r.lognormal(np.log(403), np.sqrt(2 * np.log(690 / 403)), n_tokens // 600).astype(int),
        32,
        None,
    )
    tokens = r.integers(0, EOT, lengths.sum(), dtype=np.uint16)
    tokens[np.cumsum(lengths) - lengths] = EOT
    tokens = tokens[:n_tokens]
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(folder, "train") as w:
            w.write(tokens)
        stages = [stage_at(c, p) for p in (0.0, 0.5, 0.99)]
        rows = []
        for stage in stages:
            start = time.perf_counter()
            loader = TrainLoader(
                w.paths,
                eot=EOT,
                n_vocab=N_VOCAB,
                row_len=c.row_len,
                batch_rows=lambda _: stage.rows,
                max_doc_len=lambda _: stage.max_doc_len,
                long_docs="drop",
                shuffle=False,
            )
            opened = time.perf_counter() - start
            seconds = []
            for step in range(1, repeats + 2):
                start = time.perf_counter()
                list(loader.micro_batches(step))
                seconds.append(time.perf_counter() - start)
            n = stage.rows * c.row_len
            rows.append(
                dict(
                    batch_tokens=n,
                    tokens_per_s=round(n / statistics.median(seconds[1:])),
                    open_and_index_s_per_100M=round(opened * 1e8 / len(tokens), 3),
                )
            )
            print(
                f"{n:,} tokens a batch: {rows[-1]['tokens_per_s'] / 1e6:.0f} M tokens/s",
                file=sys.stderr,
            )
    n, seconds = 1 << 18, []
    inputs, targets = np.empty(n, np.int64), np.empty(n, np.int64)
    for _ in range(9):
        start = time.perf_counter()
        inputs[:], targets[:] = tokens[:n], tokens[1 : n + 1]
        seconds.append(time.perf_counter() - start)
    return dict(cores=1, stages=rows, floor_tokens_per_s=round(n / statistics.median(seconds)))


def render(result):
    """The result in Markdown."""
    lines = [
        "# Loader: gpt2-small's batches on one core",
        "",
        f"Copying alone would be {result['floor_tokens_per_s'] / 1e6:,.0f} M tokens/s.",
        "",
        "| tokens a batch | M tokens/s | s to open and index 100M tokens |",
        "|---|---|---|",
    ]
    for stage in result["stages"]:
        lines.append(
            f"| {stage['batch_tokens']:,} | {stage['tokens_per_s'] / 1e6:.0f} | "
            f"{stage['open_and_index_s_per_100M']:.3f} |"
        )
    return "\n".join(lines) + "\n"
