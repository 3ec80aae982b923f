"""The trainer's step, stage by stage: time, tokens/s, share of peak, memory, and where time goes.

    ./run.sh benchmarks trainer                                  this machine's track
    ./run.sh benchmarks trainer --track gpt2-small --synthetic   with no data and no network
    ./run.sh benchmarks trainer --synthetic --tokens 16384 32768 49152
                                     what a step costs, and what a token adds
    torchrun --nproc_per_node=8 -m benchmarks trainer            on several GPUs

Options other than those below are the trainer's own (./run.sh train --help). Steps are real ones:
batches come from the loader's thread, every micro-batch goes forward and backward, the guard
judges, the optimizer updates. Each stage is entered as in training. After 3 steps to warm up,
--steps are timed; then 3 run under torch.profiler, whose step is divided into the parts of
benchmarks/breakdown.py. The parts sum to it; it is slower than the timed step where launching is
what limits. With --adam-every N these are groups of N steps, and a step is their mean.
"""

import contextlib
import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import types
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from base import InputError
from benchmarks import report, subject
from benchmarks.breakdown import MARK, PARTS, trace_parts
from benchmarks.options import COUNT
from benchmarks.report import document, table
from benchmarks.synthetic import synthetic
from benchmarks.timing import CudaClock, HostClock, summary
from data import Prefetcher

WARM = 3  # groups of adam_every steps before those that are timed
PROFILED = 3  # and after them, under the profiler


def groups(repeats):
    """Of adam_every steps: all that measure() makes of a stage; the profiler has one to begin."""
    return WARM + repeats + 1 + PROFILED


def measure(trainer, batches, stage, repeats):
    """One stage: {ms, p20, p80, tokens_per_s, ...}.

    trainer: a Subject that has entered it; batches: iterator over this rank's micro-batches by
    step; repeats: how many groups of adam_every steps are timed.
    """
    c = trainer.c
    cuda = trainer.world.device.type == "cuda"
    clock = CudaClock() if cuda else HostClock()
    numbers = itertools.count(1)

    def group():
        for number in itertools.islice(numbers, c.adam_every):
            with record_function(MARK + "data"):
                batch = next(batches)
            trainer.step(batch, number)

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
    memory = torch.cuda.max_memory_allocated() if cuda else resident_bytes()

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
    parts = {part: us / (PROFILED * c.adam_every) / 1e3 for part, us in parts.items()}

    tokens = stage.rows * c.row_len
    ms = times["median_us"]
    return dict(
        tokens=tokens,
        tokens_per_rank=tokens // trainer.world.size,
        windows=sorted(set(stage.model.windows)),
        max_doc_len=stage.model.max_doc_len,
        n_targets=stage.model.n_targets,
        tied=stage.model.tied,
        n_sampled=stage.model.n_sampled,
        passes=trainer.passes(stage),
        ms=ms,
        p20=times["p20_us"],
        p80=times["p80_us"],
        steps=repeats * c.adam_every,
        tokens_per_s=1e3 * tokens / ms,
        peak_share=1e3 * tokens * trainer.flops(stage) / ms / trainer.peak,
        peak_memory_bytes=memory,
        profiled_ms=sum(parts.values()),
        parts=parts,
    )


def resident_bytes():
    """The most memory that this process has had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fit(stages):
    """Least squares of ms = fixed_ms + us_per_token * tokens on a rank.

    None from fewer than two sizes.
    """
    tokens = [s["tokens_per_rank"] for s in stages]
    if len(set(tokens)) < 2:
        return None
    slope, intercept = statistics.linear_regression(tokens, [s["ms"] for s in stages])
    return dict(
        fixed_ms=intercept,
        us_per_token=1e3 * slope,
        optimizer_ms=statistics.mean(s["parts"]["optimizer"] for s in stages),
    )


def run(steps=10, tokens=(), synthetic_data=False, trainer_options=(), save=lambda result: None):
    """dict(track, ..., stages=[see measure()], fit=see fit()); save is given it as it grows."""
    c = subject.parse(trainer_options)
    for n in tokens:
        if n < 1 or n % c.row_len:
            raise InputError(f"--tokens {n}: expected a multiple of row_len ({c.row_len})")
    # There is nothing to validate
    c = subject.change(c, target=None, target_metric="val_loss", val_tokens=c.val_row_len)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells when it starts and stops
    subject.prepare_caches(c)
    world = subject.join()

    def say(message):
        if world.rank == 0:
            report.say(message)

    try:
        if tokens:
            c = subject.at_end(c, tuple(n * world.size for n in dict.fromkeys(tokens)))
        track = subject.schedule(c)
        begins = {}  # stage -> its first step
        for step, stage in enumerate(track, start=1):
            begins.setdefault(stage, step)
        repeats = -(-steps // c.adam_every)
        stages = []  # of every step that is made
        for stage in begins:
            stages += [stage] * groups(repeats) * c.adam_every
        say("preparing the data ...")
        data = subject.open_data(c, world, stages, synthetic if synthetic_data else None)
        log = types.SimpleNamespace(say=say)
        trainer = subject.Subject(c, world, log, data)
        trainer.warm_up(log)
        trainer.begin()
        result = dict(
            track=c.track,
            data=data.dataset.name,
            device=trainer.environment["device"],
            world_size=world.size,
            dtype=trainer.environment["dtype"],
            kernels=trainer.environment["kernels"],
            compiled=trainer.compiled,
            params=trainer.params,
            n_vocab=data.dataset.n_vocab,
            peak_flops=trainer.peak,
            stages=[],
            fit=None,
        )
        prefetcher = Prefetcher(trainer.batches(stages), world.device)
        with contextlib.closing(prefetcher):
            batches = iter(prefetcher)
            for stage, step in begins.items():
                trainer.enter(step)
                row = measure(trainer, batches, stage, repeats)
                result["stages"].append(row)
                result["fit"] = fit(result["stages"])
                say(
                    f"{row['tokens']:,} tokens: {row['ms']:,.2f} ms, {row['tokens_per_s']:,.0f} "
                    f"tokens/s, {row['peak_share']:.1%} of peak"
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
    steps = []
    parts = []
    for s in result["stages"]:
        tied = ", tied" if s["tied"] else ""
        cells = [f"{s['tokens']:,}", ", ".join(map(str, s["windows"])), s["max_doc_len"]]
        cells += [s["passes"], f"{s['n_targets']}{tied}"]
        cells.append(f"{s['ms']:,.2f} ({s['p20']:,.2f}–{s['p80']:,.2f})")
        cells += [f"{s['tokens_per_s']:,.0f}", f"{s['peak_share']:.1%}"]
        steps.append([*cells, f"{s['peak_memory_bytes'] / 1e9:.2f} GB"])
        cells = [f"{ms:,.2f} ({ms / s['profiled_ms']:.0%})" for ms in s["parts"].values()]
        parts.append([f"{s['tokens']:,}", *cells, f"{s['profiled_ms']:,.2f}"])
    header = ["tokens a step", "windows", "documents to", "passes", "targets", "ms (p20–p80)"]
    header += ["tokens/s", "of peak", "peak memory"]
    line = ""
    if result["fit"]:
        line = "Least squares: {fixed_ms:.2f} ms + {us_per_token:.3f} us per token and rank."
        line = line.format(**result["fit"])
    return document(
        f"# Trainer: {result['track']} on {result['world_size']} x {result['device']}",
        f"{result['params'] / 1e6:.1f}M parameters, {result['dtype']}, "
        f"{'compiled' if result['compiled'] else 'not compiled'}, data {result['data']}, peak "
        f"{result['peak_flops'] / 1e12:.2f} TFLOP/s (measured products).",
        table(header, steps),
        "Where the time goes, ms of a step under the profiler:",
        table(["tokens a step", *PARTS, "sum"], parts),
        line,
    )


def add_arguments(parser):
    parser.option("--steps", COUNT, 10, "N", "timed steps at each size")
    about = "these tokens per step and rank, at the last stage's windows, not the schedule's"
    parser.option("--tokens", int, (), "N", about, nargs="+")
    about = "random tokens with the track's vocabulary, in documents as long as web pages"
    parser.flag("--synthetic", about, dest="synthetic_data")
