"""The trainer's step, stage by stage: time, tokens/s, share of peak, memory, and where the time goes.

    python -m benchmarks trainer                                         this machine's track
    python -m benchmarks trainer --track gpt2-small --synthetic          with no FineWeb and no network
    python -m benchmarks trainer --synthetic --tokens 16384 32768 49152  what a step costs, and what a token adds
    torchrun --nproc_per_node=8 -m benchmarks trainer                    on several GPUs

Options other than those below are the trainer's own (./run.sh --help). Steps are real ones: batches come from the
loader's thread, every micro-batch goes forward and backward, the optimizer updates. After 3 steps to warm up, --steps
are timed; then 3 run under torch.profiler, whose step is divided into the parts of benchmarks/breakdown.py. The parts
sum to it; it is slower than the timed step where launching is what limits.
"""

import contextlib
import dataclasses
import json
import math
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
from benchmarks.breakdown import MARK, PARTS, named_parts, trace_parts
from benchmarks.timing import CudaClock, HostClock, summary
from data import Dataset, InputError, Prefetcher, ShardWriter

WARM, PROFILED = 3, 3  # steps


# --- data, where there is none


class Synthetic(Dataset):
    """Token ids without a text."""

    @property
    def tokenizer(self):
        raise InputError("synthetic tokens have no text: expected --target-metric val_loss")


def vocabulary(source, tokenizer):
    """How many tokens there are, without the data; of characters, those of Tiny Shakespeare."""
    bpe = re.fullmatch(r"bpe:(\d+)", tokenizer)
    return int(bpe[1]) if bpe and source != "fineweb10B" else dict(chars=66, bytes=257).get(tokenizer, 50257)


def synthetic(source, tokenizer, cache, train_shards=9, n_tokens=12_000_000):
    """In place of open_dataset(): tokens that are Zipf's by rank, in documents as long as FineWeb's."""
    n_vocab = vocabulary(source, tokenizer)
    folder = Path(cache) / f"synthetic-{n_vocab}-{n_tokens}"
    if not (folder / "train_000000.bin").exists():
        r = np.random.default_rng(0)
        share = np.cumsum(1 / np.arange(3, n_vocab + 2))
        tokens = np.searchsorted(share / share[-1], r.random(n_tokens)).astype(np.uint16)
        # lengths in GPT-2's tokens: mean 690, median 403 (log-normal: sigma^2 = 2 ln(mean / median))
        lengths = np.maximum(32, r.lognormal(np.log(403), np.sqrt(2 * np.log(690 / 403)), n_tokens // 100)).astype(int)
        starts = np.cumsum(lengths) - lengths
        tokens[starts[starts < n_tokens]] = n_vocab - 1
        with ShardWriter(folder, "train") as writer:
            writer.write(tokens)
    shards = [folder / "train_000000.bin"]
    return Synthetic("synthetic", shards, shards, n_vocab, n_vocab - 1, "synthetic", folder)


# --- measuring


def measure(trainer, batches, stage, steps):
    """One stage: {ms, p20, p80, tokens_per_s, ...}; batches: iterator over this rank's micro-batches by step."""
    c, world = trainer.c, trainer.world
    cuda = world.device.type == "cuda"
    clock, losses = CudaClock() if cuda else HostClock(), tg.LossPipe(world.device)

    def step(n=0):
        with record_function(MARK + "data"):
            batch = next(batches)
        losses.put(n, trainer.accumulate(batch, stage))
        for _, loss in losses.ready():
            if not math.isfinite(loss):
                raise InputError(f"the loss is {loss}: expected a finite one; lower --muon-lr and --adam-lr")
        trainer.optimizer.step(tg.lr_scale(c, 0.0), tg.muon_momentum(0.0))

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM):
        step()
    clock.wait()
    marks = [clock.mark()]
    for _ in range(steps):
        step()
        marks.append(clock.mark())
    clock.wait()
    times = summary([clock.between(a, b) / 1e3 for a, b in zip(marks, marks[1:])])
    memory = torch.cuda.max_memory_allocated() if cuda else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=activities) as profiler:
            step()  # the profiler's own start, and none of the host's lead from before
            clock.wait()
            with record_function(MARK + "profiled"):
                for _ in range(PROFILED):
                    step()
                clock.wait()
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        parts = trace_parts(json.loads(path.read_text())["traceEvents"], cuda)
    parts = {part: length / PROFILED / 1e3 for part, length in parts.items()}

    tokens, ms = stage.rows * c.row_len, times["median_us"]
    return dict(tokens=tokens, tokens_per_rank=tokens // world.size, windows=sorted(set(stage.windows)),
                max_doc_len=stage.max_doc_len, passes=-(-stage.rows // (trainer.micro_rows[stage] * world.size)),
                ms=ms, p20=times["p20_us"], p80=times["p80_us"], steps=steps, tokens_per_s=1e3 * tokens / ms,
                peak_share=1e3 * tokens * trainer.flops_per_token[stage] / ms / trainer.peak, peak_memory_bytes=memory,
                profiled_ms=sum(parts.values()), parts=parts)


def fit(stages):
    """Least squares of ms = fixed_ms + us_per_token * tokens on a rank; None from fewer than two sizes."""
    x = [s["tokens_per_rank"] for s in stages]
    if len(set(x)) < 2:
        return None
    slope, intercept = statistics.linear_regression(x, [s["ms"] for s in stages])
    return dict(fixed_ms=intercept, us_per_token=1e3 * slope,
                optimizer_ms=statistics.mean(s["parts"]["optimizer"] for s in stages))


def join():
    """This process's World, from torchrun's variables if there are any."""
    rank, local_rank, size = (int(os.environ.get(v, d)) for v, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return tg.World(rank, size, device)


def run(steps=10, tokens=(), synthetic_data=False, trainer_options=(), save=lambda result: None):
    """dict(track, ..., stages=[see measure()], fit=see fit()); save is given the same as it grows."""
    c = tg.parse_args(list(trainer_options))
    wrong = [n for n in tokens if n < 1 or n % c.row_len]
    if wrong or steps < 1:
        raise InputError(f"--tokens {wrong[0]}: expected a multiple of row_len ({c.row_len})" if wrong else
                         f"--steps {steps}: expected 1 or more")
    c = dataclasses.replace(c, target=None, target_metric="val_loss", val_tokens=c.val_row_len)  # nothing to validate
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells when it starts and stops
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(c.cache_dir) / "inductor"))
    world = join()
    try:
        def say(message):
            if world.rank == 0:
                print(message, file=sys.stderr, flush=True)
        stages = list(dict.fromkeys(tg.stage_at(c, step / c.steps) for step in range(c.steps)))
        if tokens:  # at the last stage's windows
            stages = [stages[-1]._replace(rows=n // c.row_len * world.size) for n in dict.fromkeys(tokens)]
        schedule = [stage for stage in stages for _ in range(WARM + steps + 1 + PROFILED)]
        if world.device.type == "cpu":
            tg.keep_freed_memory()
        say("preparing the data ...")
        with mock.patch.object(tg, "open_dataset", synthetic if synthetic_data else tg.open_dataset):
            data = tg.load_data(c, schedule, world)
        log = types.SimpleNamespace(say=say)
        trainer = tg.Trainer(c, world, data, schedule, log)
        if trainer.compiled:
            trainer.warm_up(log)
        trainer.model.init_weights(c.seed)  # products of zeros take less power and time
        trainer.optimizer.reset()
        environment = trainer.environment
        result = dict(track=c.track, data=data.dataset.name, device=environment["device"], world_size=world.size,
                      dtype=environment["dtype"], kernels=environment["kernels"], compiled=trainer.compiled,
                      params=trainer.params, n_vocab=data.dataset.n_vocab, peak_flops=trainer.peak, stages=[], fit=None)
        with contextlib.closing(Prefetcher(trainer.batches(), world.device)) as prefetcher, named_parts(trainer):
            batches = iter(prefetcher)
            for stage in stages:
                result["stages"].append(row := measure(trainer, batches, stage, steps))
                result["fit"] = fit(result["stages"])
                say(f"{row['tokens']:,} tokens: {row['ms']:,.2f} ms, {row['tokens_per_s']:,.0f} tokens/s, "
                    f"{row['peak_share']:.1%} of peak")
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
    lines = [f"# Trainer: {result['track']} on {result['world_size']} x {result['device']}", "",
             f"{result['params'] / 1e6:.1f}M parameters, {result['dtype']}, "
             f"{'compiled' if result['compiled'] else 'not compiled'}, data {result['data']}, peak "
             f"{result['peak_flops'] / 1e12:.2f} TFLOP/s (measured products).", "",
             "| tokens a step | windows | documents to | passes | ms (p20–p80) | tokens/s | of peak | peak memory |",
             "|---|---|---|---|---|---|---|---|"]
    for s in result["stages"]:
        lines.append(f"| {s['tokens']:,} | {', '.join(map(str, s['windows']))} | {s['max_doc_len']} | {s['passes']} | "
                     f"{s['ms']:,.2f} ({s['p20']:,.2f}–{s['p80']:,.2f}) | {s['tokens_per_s']:,.0f} | "
                     f"{s['peak_share']:.1%} | {s['peak_memory_bytes'] / 1e9:.2f} GB |")
    lines += ["", "Where the time goes, ms of a step under the profiler:", "",
              "| tokens a step | " + " | ".join(PARTS) + " | sum |", "|---|" + "---|" * (len(PARTS) + 1)]
    for s in result["stages"]:
        cells = (f"{s['parts'][part]:,.2f} ({s['parts'][part] / s['profiled_ms']:.0%})" for part in PARTS)
        lines.append(f"| {s['tokens']:,} | {' | '.join(cells)} | {s['profiled_ms']:,.2f} |")
    if result["fit"]:
        f = result["fit"]
        lines += ["", f"Least squares: {f['fixed_ms']:.2f} ms + {f['us_per_token']:.3f} us per token and rank."]
    return "\n".join(lines) + "\n"


def add_arguments(parser):
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps at each size [10]")
    parser.add_argument("--tokens", type=int, nargs="+", default=(), metavar="N",
                        help="these tokens per step and rank instead of the schedule's, at the last stage's windows")
    parser.add_argument("--synthetic", dest="synthetic_data", action="store_true",
                        help="random tokens with the track's vocabulary and FineWeb's document lengths")
