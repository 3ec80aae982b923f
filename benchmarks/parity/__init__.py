"""Whether our recipe learns as fast as the public record's: both at a small shape, step by step.

    ./run.sh benchmarks parity --modded ~/modded-nanogpt --quick --json parity.json
    ./run.sh benchmarks parity --modded ~/modded-nanogpt --commit 2c702746 --table parity.md

--modded takes a git checkout of github.com/KellerJordan/modded-nanogpt, any commit from 2c702746
(record #80) on; f411b3d3 (#89) is the newest that has been read. Its own model, optimizer and
schedules run on this machine's CPUs: what needs CUDA gets its PyTorch meaning while it runs
(benchmarks/parity/stand_ins.py), and nothing of it is kept. Our side is the track's recipe as it
is; other options are the trainer's own and change our side only (./run.sh train --help).

Both get the same tokens in the same order, Python's standard library in documents as long as web
pages, 11 layers of 6 heads, the same stages and steps; rows, documents and windows are 8 times
shorter than the record's, and a step has one row where it has eight. Learning rates, decay, momenta
and initial values are each side's own. All is float32 without FP8. A process has one thread; as
many run at a time as there are CPUs.

With --json every run is in the file at once, and the same command goes on where it was cut short.
"""

import concurrent.futures
import dataclasses
import datetime
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

from base import InputError, one_line
from base.places import cache_folder
from benchmarks.options import COUNT
from benchmarks.report import document, number, say, table

CONFIDENCE = 0.95
SIDES = "ours", "record"
SHRINK = 8  # rows, documents and windows are so many times shorter
EXTENSION = 15 / 1285  # of the steps

# Options whose values parity sets; what the rest of the trainer's are is up to the user
REFUSED = tuple(
    "--run-dir --repeat --max-time --time --patience --checkpoint-every --resume --extend --data "
    "--warm-start --gpus --steps --seed --text --tokenizer --n-embd --batch-tokens --row-len "
    "--template --micro-tokens --dtype".split()
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is done."""

    width: int
    steps: int
    validations: int  # in the course of a run
    val_tokens: int
    val_row_len: int


FULL = Plan(width=192, steps=1285, validations=10, val_tokens=131_072, val_row_len=32_768)
QUICK = Plan(width=96, steps=80, validations=3, val_tokens=32_768, val_row_len=16_384)


# --- one run, in a process of its own


def run_one(job):
    """The row of one side and seed: its curve and its seconds, or an error."""
    import torch

    torch.set_num_threads(1)
    from benchmarks.ablate import Points
    from runtime.machine import keep_freed_memory

    from . import record, task

    keep_freed_memory()
    side, seed, shape = job["side"], job["seed"], job["shape"]
    tokens = task.Tokens(job["data"], job["cache"], shape.shrink)
    row = dict(side=side, seed=seed)
    started = time.perf_counter()

    def progress(step, loss):
        say(f"{side}, seed {seed}: step {step}/{shape.steps} val_loss {loss:.4f}")

    try:
        with tempfile.TemporaryDirectory(prefix="parity-") as folder:
            if side == "record":
                curve = record.train(
                    job["checkout"],
                    shape,
                    job["data"],
                    tokens.bytes,
                    seed,
                    folder,
                    job["dc"],
                    progress,
                )
            else:

                class Ours(Points):
                    def say(self, *words, **more):
                        pass

                    def validation(self, step, total, metrics, seconds):
                        super().validation(step, total, metrics, seconds)
                        progress(step, metrics["val_loss"])

                with Ours(Path(folder), shape.steps) as log:
                    curve = task.train(job["config"], tokens, seed, log)
    except InputError as e:
        return row | dict(error=one_line(e, 400))
    seconds = time.perf_counter() - started
    return row | dict(curve=curve, seconds=seconds, cpu_seconds=time.process_time())


# --- statistics


def difference(ours, record):
    """dict(mean, low, high) of ours - record, by Welch's t-interval: seeds of the two have nothing
    in common. Bounds are None where a side has one run."""
    from scipy import stats

    found = dict(mean=statistics.fmean(ours) - statistics.fmean(record), low=None, high=None)
    if min(len(ours), len(record)) < 2:
        return found
    shares = [statistics.variance(x) / len(x) for x in (ours, record)]
    error = sum(shares)
    half = 0.0
    if error:
        parts = [share**2 / (len(x) - 1) for share, x in zip(shares, (ours, record))]
        freedom = error**2 / sum(parts)
        half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(error)
    return found | dict(low=found["mean"] - half, high=found["mean"] + half)


def summarise(runs):
    """What the runs so far say: final losses by seed, means, their difference, and the curves'
    means."""
    made = {side: [] for side in SIDES}
    for run in sorted((r for r in runs if "error" not in r), key=lambda r: r["seed"]):
        made[run["side"]].append(run)
    summary = {side: [run["curve"][-1][1] for run in made[side]] for side in SIDES}
    for side in SIDES:
        losses = summary[side]
        summary[f"{side}_mean"] = statistics.fmean(losses) if losses else None
        summary[f"{side}_sd"] = statistics.stdev(losses) if len(losses) > 1 else None
    curves = {}
    for side in SIDES:
        by_step = {}
        for run in made[side]:
            for step, loss in run["curve"]:
                by_step.setdefault(step, []).append(loss)
        curves[side] = [[step, statistics.fmean(x)] for step, x in sorted(by_step.items()) if step]
    summary["curves"] = curves
    summary["difference"] = summary["at_or_below"] = None
    if made["ours"] and made["record"]:
        summary["difference"] = difference(summary["ours"], summary["record"])
        summary["at_or_below"] = summary["difference"]["mean"] <= 0
    return summary


# --- the benchmark


def shape_of(plan, rows, tokens):
    from .record import RANKS, Shape

    extension = max(1, round(plan.steps * EXTENSION))
    if rows > RANKS:
        raise InputError(f"--rows {rows}: expected 1 to {RANKS}, as many as the record has GPUs")
    return Shape(
        width=plan.width,
        n_vocab=tokens.n_vocab,
        eot=tokens.eot,
        shrink=SHRINK,
        rows=rows,
        steps=plan.steps,
        extension=extension,
        eval_every=max(1, -(-plan.steps // (plan.validations + 1))),
        val_tokens=plan.val_tokens,
        val_row_len=plan.val_row_len,
    )


def with_track(options):
    """The trainer's options, of gpt2-small where they name no track."""
    if any(str(o).split("=")[0] == "--track" for o in options):
        return list(options)
    return ["--track", "gpt2-small", *options]


def resume(previous, settings):
    """The runs of an earlier result, of the same settings. Raises InputError for others."""
    if not previous:
        return []
    there = previous.get("settings")
    if not isinstance(there, dict) or not isinstance(previous.get("runs"), list):
        raise InputError("--json: the file holds no parity result; give another file")
    for key in sorted(there.keys() | settings.keys()):
        if there.get(key) != settings.get(key):
            what = f"{key} {there.get(key)}, not {settings.get(key)}"
            what = "other source" if key == "source" else what
            raise InputError(f"--json: the file's runs were made with {what}; give another file")
    return [run for run in previous["runs"] if "error" not in run]


def run(
    modded,
    commit=None,
    quick=False,
    seeds=3,
    width=None,
    steps=None,
    rows=1,
    dc=False,
    jobs=0,
    trainer_options=(),
    previous=None,
    save=lambda result: None,
):
    """Train both sides from each seed; returns the result. Raises InputError."""
    from benchmarks import subject

    from . import task
    from .record import HEADS, Checkout

    for option in REFUSED:
        if any(o == option or str(o).startswith(f"{option}=") for o in trainer_options):
            raise InputError(f"{option}: has no meaning in parity; leave it out")
    plan = QUICK if quick else FULL
    plan = dataclasses.replace(plan, width=width or plan.width, steps=steps or plan.steps)
    if plan.width % (4 * HEADS):
        raise InputError(f"--width {plan.width}: expected a multiple of {4 * HEADS}")
    if plan.steps < 6:
        raise InputError(f"--steps {plan.steps}: expected 6 or more, for all stages")
    checkout = Checkout.read(modded, commit)
    track = subject.parse(with_track(trainer_options))

    with tempfile.TemporaryDirectory(prefix="parity-tokens-") as folder:
        say("tokens ...")
        tokens = task.Tokens(folder, Path(cache_folder()) / "data", SHRINK)
        shape = shape_of(plan, rows, tokens)
        c = task.scaled(track, shape)
        needed, passes = tokens.write_for(c, shape.val_tokens)
        settings = dict(
            commit=checkout.commit,
            dc=dc,
            shape=shape._asdict(),
            ours={name: x for name, x in c.fields.items() if name not in ("cache_dir",)},
            source=subject.source_hash(),
            data=tokens.source.fingerprint,
        )
        settings = json.loads(json.dumps(settings))
        runs = resume(previous, settings)
        result = dict(
            modded=str(modded),
            commit=checkout.commit,
            quick=quick,
            steps=plan.steps,
            tokens=needed,
            passes=passes,
            dc=dc,
            metric="val_loss",
            unit="nats per token",
            settings=settings,
            runs=runs,
        )

        def update():
            result.update(summarise(runs))
            save(result)

        done = {(r["side"], r["seed"]) for r in runs}
        todo = [(s, seed) for seed in range(seeds) for s in reversed(SIDES)]
        todo = [(side, seed) for side, seed in todo if (side, seed) not in done]
        shared = dict(checkout=checkout, shape=shape, data=folder, cache=tokens.cache)
        shared |= dict(config=c, dc=dc)
        jobs = min(jobs or len(os.sched_getaffinity(0)), max(1, len(todo)))
        say(f"{len(todo)} runs of {needed:,} tokens, {jobs} at a time")
        started = time.perf_counter()
        # Processes of their own: the record's script changes its process, and one thread each is
        # the best use of two cores
        with concurrent.futures.ProcessPoolExecutor(
            jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1
        ) as pool:
            waiting = [
                pool.submit(run_one, dict(shared, side=side, seed=seed)) for side, seed in todo
            ]
            try:
                for n, future in enumerate(concurrent.futures.as_completed(waiting), 1):
                    row = future.result()
                    runs.append(row)
                    update()
                    left = (time.perf_counter() - started) / n * (len(todo) - n)
                    said = row.get("error") or f"{row['curve'][-1][1]:.4f}, {row['seconds']:.0f} s"
                    left = datetime.timedelta(seconds=round(left))
                    say(f"[{n}/{len(todo)}] {row['side']}, seed {row['seed']}: {said}; {left} left")
                    if "error" in row:
                        raise InputError(f"{row['side']}, seed {row['seed']}: {row['error']}")
            except concurrent.futures.process.BrokenProcessPool:
                raise InputError(
                    "a run ended without a word, perhaps out of memory: give --jobs 1"
                ) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    update()
    say(f"\n{render(result)}")
    return result


# --- the report


STATEMENT = """\
Losses are means over seeds, of the same validation tokens. The brackets are a 95% t-interval
(Welch) of the difference of the two means, over seeds that scatter the initial weights; the tokens
and their order are the same in all runs. It says nothing about other shapes: at the record's own
width, batch and length parts may be worth more or less."""


def interval(x):
    mean = format(x["mean"], "+.4f")
    if x["low"] is None:
        return f"{mean} (one seed has no interval: --seeds 3 or more)"
    return f"{mean} [{x['low']:+.4f}, {x['high']:+.4f}]"


def render(result):
    """Loss against steps for both sides, and the difference at the end."""
    shape = result["settings"]["shape"]
    curves = {side: dict(result["curves"][side]) for side in SIDES}
    rows = []
    for step in sorted(curves["ours"].keys() | curves["record"].keys()):
        ours, record = (curves[side].get(step) for side in SIDES)
        apart = None if None in (ours, record) else ours - record
        rows.append([step, *(number(x, ".4f") for x in (ours, record)), number(apart, "+.4f")])
    final = [
        f"{side}: {number(result[f'{side}_mean'], '.4f')} (sd {number(result[f'{side}_sd'], '.4f')}"
        f", {len(result[side])} seeds)"
        for side in SIDES
    ]
    verdict = ""
    if result["difference"]:
        at = "at or below" if result["at_or_below"] else "above"
        verdict = f"Ours - record: {interval(result['difference'])}: ours is {at} the record."
    return document(
        f"# Parity with the record at {result['commit'][:8]}",
        f"11 layers, width {shape['width']}, {shape['n_vocab']:,} tokens in the vocabulary, "
        f"{result['steps']} steps of {result['tokens']:,} tokens in all (the text "
        f"{result['passes']} times), DC {'as the record has it' if result['dc'] else 'off'}, "
        f"float32; {result['metric']} in {result['unit']} over {shape['val_tokens']:,} tokens.",
        table(["step", "ours", "record", "difference"], rows),
        "; ".join(final) + ".",
        verdict,
        STATEMENT,
    )


def add_arguments(parser):
    parser.option(
        "--modded", Path, None, "CHECKOUT", "git checkout of modded-nanogpt", required=True
    )
    parser.option("--commit", str, None, "C", "another commit of it than the checked-out one")
    parser.flag("--quick", f"{QUICK.steps} steps at width {QUICK.width}: 10 minutes on two cores")
    parser.option("--seeds", COUNT, 3, "N", "runs of each side")
    parser.option("--width", COUNT, None, "C", f"instead of {FULL.width}, a multiple of 24")
    parser.option("--steps", COUNT, None, "N", f"instead of {FULL.steps}")
    parser.option("--rows", COUNT, 1, "N", "of a step in its first stage; the record has 8")
    parser.flag("--dc", "mix attention maps of the record's last layer, as it does since #85")
    parser.option("--jobs", COUNT, 0, "N", "runs at a time, of one thread each; 0: one per CPU")
