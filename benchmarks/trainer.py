"""The trainer's step, stage by stage: time, tokens/s, share of peak, memory, and where the time
goes.

    python -m benchmarks trainer                                         this machine's track python
    -m benchmarks trainer --track gpt2-small --synthetic          with no data and no network
    python -m benchmarks trainer --synthetic --tokens 16384 32768 49152  what a step costs, and what
    a token adds torchrun --nproc_per_node=8 -m benchmarks trainer                    on several
    GPUs

Options other than those below are the trainer's own (./run.sh --help). Steps are real ones: batches
come from the loader's thread, every micro-batch goes forward and backward, the guard judges, the
optimizer updates. Each stage is entered as in training. After 3 steps to warm up, --steps are
timed; then 3 run under torch.profiler, whose step is divided into the parts of
benchmarks/breakdown.py. The parts sum to it; it is slower than the timed step where launching is
what limits. With --adam-every N these are groups of N steps, and a step is their mean.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import resource
import statistics
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

import train_gpt as tg
from base import InputError
from benchmarks.breakdown import MARK, PARTS, named_parts, trace_parts
from benchmarks.timing import CudaClock, HostClock, summary
from data import Dataset, Prefetcher, ShardWriter, sources
from runtime import corpus

WARM, PROFILED = 3, 3  # groups of adam_every steps


# --- data, where there is none


class Synthetic(Dataset):
    """Token ids without a text."""

    @property
    def tokenizer(self):
        raise InputError("synthetic tokens have no text: expected --target-metric val_loss")


def vocabulary(source, tokenizer):
    """How many tokens there are, without the data; of characters, those of Tiny Shakespeare."""
    tokenizer = sources.find(source).tokenizer or tokenizer
    bpe = re.fullmatch(r"bpe:(\d+)", tokenizer)
    if bpe:
        return int(bpe[1])
    return dict(chars=66, bytes=257, gpt2=50257)[tokenizer]


def synthetic(config, cache, n_tokens=12_000_000):
    """In place of open_dataset(): tokens that are Zipf's by rank, in documents as long as web
    pages."""
    n_vocab = vocabulary(config.data, config.tokenizer)
    folder = Path(cache) / f"synthetic-{n_vocab}-{n_tokens}"
    if not (folder / "train_000000.bin").exists():
        r = np.random.default_rng(0)
        share = np.cumsum(1 / np.arange(3, n_vocab + 2))
        tokens = np.searchsorted(share / share[-1], r.random(n_tokens)).astype(np.uint16)
        # lengths in GPT-2's tokens: mean 690, median 403 (log-normal: sigma^2 = 2 ln(mean /
        # median))
        lengths = np.maximum(
            32, r.lognormal(np.log(403), np.sqrt(2 * np.log(690 / 403)), n_tokens // 100)
        ).astype(int)
        starts = np.cumsum(lengths) - lengths
        tokens[starts[starts < n_tokens]] = n_vocab - 1
        with ShardWriter(folder, "train") as writer:
            writer.write(tokens)
    shards = [folder / "train_000000.bin"]
    return Synthetic("synthetic", shards, shards, n_vocab, n_vocab - 1, "synthetic", folder)


# --- measuring


def measure(trainer, batches, stage, progress, repeats):
    """One stage: {ms, p20, p80, tokens_per_s, ...}; batches: iterator over this rank's
    micro-batches by step; progress: of the track in this stage; repeats: how many groups of
    adam_every steps are timed."""
    c, world = trainer.c, trainer.world
    cuda = world.device.type == "cuda"
    clock, numbers = CudaClock() if cuda else HostClock(), itertools.count(1)
    trainer.guard.reset()

    def group():
        for n in itertools.islice(numbers, c.adam_every):
            with record_function(MARK + "data"):
                batch = next(batches)
            trainer.step(batch, n, stage, progress)
            for report in trainer.guard.reports(n):
                if report.complaint:
                    raise InputError(
                        f"{report.complaint}: expected steps that count; lower --muon-lr and --adam-lr"
                    )

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM):
        group()
    clock.wait()
    marks = [clock.mark()]
    for _ in range(repeats):
        group()
        marks.append(clock.mark())
    clock.wait()
    times = summary([clock.between(a, b) / 1e3 / c.adam_every for a, b in zip(marks, marks[1:])])
    memory = (
        torch.cuda.max_memory_allocated()
        if cuda
        else (
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            * (1 if sys.platform == "darwin" else 1024)
        )
    )

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=activities) as profiler:
            group()  # the profiler's own start, and none of the host's lead from before
            clock.wait()
            with record_function(MARK + "profiled"):
                for _ in range(PROFILED):
                    group()
                clock.wait()
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        parts = trace_parts(json.loads(path.read_text())["traceEvents"], cuda)
    parts = {part: duration / (PROFILED * c.adam_every) / 1e3 for part, duration in parts.items()}

    tokens, ms = stage.rows * c.row_len, times["median_us"]
    return dict(
        tokens=tokens,
        tokens_per_rank=tokens // world.size,
        windows=sorted(set(stage.windows)),
        max_doc_len=stage.max_doc_len,
        n_targets=stage.n_targets,
        tied=stage.tied,
        n_sampled=stage.n_sampled,
        passes=-(-stage.rows // (trainer.micro_rows[stage] * world.size)),
        ms=ms,
        p20=times["p20_us"],
        p80=times["p80_us"],
        steps=repeats * c.adam_every,
        tokens_per_s=1e3 * tokens / ms,
        peak_share=1e3 * tokens * trainer.flops_per_token[stage] / ms / trainer.peak,
        peak_memory_bytes=memory,
        profiled_ms=sum(parts.values()),
        parts=parts,
    )


def fit(stages):
    """Least squares of ms = fixed_ms + us_per_token * tokens on a rank; None from fewer than two
    sizes."""
    x = [s["tokens_per_rank"] for s in stages]
    if len(set(x)) < 2:
        return None
    slope, intercept = statistics.linear_regression(x, [s["ms"] for s in stages])
    return dict(
        fixed_ms=intercept,
        us_per_token=1e3 * slope,
        optimizer_ms=statistics.mean(s["parts"]["optimizer"] for s in stages),
    )


def at_end(c, batch_tokens):
    """The Config of a track that all the time does what c does at its end, in such batches."""
    last = tg.stage_at(c, tg.progress_at(c, c.steps - 1))
    by_stage = ("max_doc_len", "short_window", "long_window", "stage_lr", "mtp", "sampled_softmax")
    return dataclasses.replace(
        c,
        batch_tokens=batch_tokens,
        steps=len(batch_tokens),
        extension=0,
        tied=float(last.tied),
        **{name: getattr(c, name)[-1:] for name in by_stage},
    )


def run(steps=10, tokens=(), synthetic_data=False, trainer_options=(), save=lambda result: None):
    """dict(track, ..., stages=[see measure()], fit=see fit()); save is given the same as it
    grows."""
    c = tg.parse_args(list(trainer_options))
    wrong = [n for n in tokens if n < 1 or n % c.row_len]
    if wrong or steps < 1:
        raise InputError(
            f"--tokens {wrong[0]}: expected a multiple of row_len ({c.row_len})"
            if wrong
            else f"--steps {steps}: expected 1 or more"
        )
    c = dataclasses.replace(
        c, target=None, target_metric="val_loss", val_tokens=c.val_row_len
    )  # nothing to validate
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells when it starts and stops
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(c.cache_dir) / "inductor"))
    world = tg.join_world(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    try:

        def say(message):
            if world.rank == 0:
                print(message, file=sys.stderr, flush=True)

        c = tg.settle(c, world.device)
        if tokens:
            c = at_end(c, tuple(n * world.size for n in dict.fromkeys(tokens)))
        track = [tg.stage_at(c, tg.progress_at(c, step)) for step in range(c.steps)]
        begins = {
            stage: track.index(stage) for stage in dict.fromkeys(track)
        }  # stage -> its first step
        repeats = -(-steps // c.adam_every)
        schedule = [
            stage for stage in begins for _ in range((WARM + repeats + 1 + PROFILED) * c.adam_every)
        ]
        if world.device.type == "cpu":
            tg.keep_freed_memory()
        say("preparing the data ...")
        with mock.patch.object(
            corpus, "open_dataset", synthetic if synthetic_data else corpus.open_dataset
        ):
            data = corpus.load_data(c, schedule, world)
        log = types.SimpleNamespace(say=say)
        trainer = tg.Trainer(c, world, data, track, log)
        if trainer.compiled:
            trainer.warm_up(log)
        trainer.model.init_weights(c.seed)  # products of zeros take less power and time
        trainer.optimizer.reset()

        def batches():
            for step, stage in enumerate(schedule, start=1):
                yield list(
                    data.train.micro_batches(
                        step, world.rank, world.size, trainer.micro_rows[stage]
                    )
                )

        environment = trainer.environment
        result = dict(
            track=c.track,
            data=data.dataset.name,
            device=environment["device"],
            world_size=world.size,
            dtype=environment["dtype"],
            kernels=environment["kernels"],
            compiled=trainer.compiled,
            params=trainer.params,
            n_vocab=data.dataset.n_vocab,
            peak_flops=trainer.peak,
            stages=[],
            fit=None,
        )
        with (
            contextlib.closing(Prefetcher(batches(), world.device)) as prefetcher,
            named_parts(trainer),
        ):
            ready = iter(prefetcher)
            for stage, step in begins.items():
                _, progress = trainer.enter(step + 1)
                result["stages"].append(row := measure(trainer, ready, stage, progress, repeats))
                result["fit"] = fit(result["stages"])
                say(
                    f"{row['tokens']:,} tokens: {row['ms']:,.2f} ms, {row['tokens_per_s']:,.0f} tokens/s, "
                    f"{row['peak_share']:.1%} of peak"
                )
                if world.rank == 0:
                    save(result)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if world.rank:
        sys.exit(0)  # the first rank reports
    say(f"\n{render(result)}")
    return result


def render(result):
    """The result as Markdown: a line for each stage, one for where its time goes, the fit."""
    lines = [
        f"# Trainer: {result['track']} on {result['world_size']} x {result['device']}",
        "",
        f"{result['params'] / 1e6:.1f}M parameters, {result['dtype']}, "
        f"{'compiled' if result['compiled'] else 'not compiled'}, data {result['data']}, peak "
        f"{result['peak_flops'] / 1e12:.2f} TFLOP/s (measured products).",
        "",
        "| tokens a step | windows | documents to | passes | targets | ms (p20–p80) | tokens/s | of peak | "
        "peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for s in result["stages"]:
        lines.append(
            f"| {s['tokens']:,} | {', '.join(map(str, s['windows']))} | {s['max_doc_len']} | {s['passes']} | "
            f"{s['n_targets']}{', tied' * s['tied']} | {s['ms']:,.2f} ({s['p20']:,.2f}–{s['p80']:,.2f}) | "
            f"{s['tokens_per_s']:,.0f} | {s['peak_share']:.1%} | {s['peak_memory_bytes'] / 1e9:.2f} GB |"
        )
    lines += [
        "",
        "Where the time goes, ms of a step under the profiler:",
        "",
        "| tokens a step | " + " | ".join(PARTS) + " | sum |",
        "|---|" + "---|" * (len(PARTS) + 1),
    ]
    for s in result["stages"]:
        cells = (
            f"{s['parts'][part]:,.2f} ({s['parts'][part] / s['profiled_ms']:.0%})" for part in PARTS
        )
        lines.append(f"| {s['tokens']:,} | {' | '.join(cells)} | {s['profiled_ms']:,.2f} |")
    if result["fit"]:
        f = result["fit"]
        lines += [
            "",
            f"Least squares: {f['fixed_ms']:.2f} ms + {f['us_per_token']:.3f} us per token and rank.",
        ]
    return "\n".join(lines) + "\n"


def add_arguments(parser):
    parser.add_argument(
        "--steps", type=int, default=10, metavar="N", help="timed steps at each size [10]"
    )
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=(),
        metavar="N",
        help="these tokens per step and rank instead of the schedule's, at the last stage's windows",
    )
    parser.add_argument(
        "--synthetic",
        dest="synthetic_data",
        action="store_true",
        help="random tokens with the track's vocabulary, in documents as long as web pages",
    )
