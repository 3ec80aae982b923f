"""What each piece of the recipe is worth: it is turned off, or on where the track goes without,
one at a time.

    ./run.sh benchmarks ablate --track laptop --seeds 5 --json ablate.json --table ablate.md
    ./run.sh benchmarks ablate --track laptop --only softcap smear --steps 80
    ./run.sh benchmarks ablate --track llama-1m --only adamw --json adamw.json
    ./run.sh benchmarks ablate --at parity --seeds 3 --json parts.json --table parts.md

The third one compares the recipe as a whole with AdamW, which gets twice the steps. The last one
takes the parts that gpt2-small has of the record, and two of our own that are no option, at the
small shape and on the tokens of benchmarks parity --quick, with one thread; no checkout is needed.
--step-tokens makes its steps shorter.

Options other than those below are the trainer's own (./run.sh train --help): --steps N shortens
the whole schedule, --seed N is the first seed. The recipe as it comes (base) and each variant of it
train from the same seeds on the same tokens, to the last step; the target only says where a line
between validations crosses it. A round is one seed of every variant, in an order that rotates, so
that a machine that drifts hits all alike; every variant is compared with the base of its own round.
The clock is the trainer's: no start-up, no compiling, no validation.

With --json, every finished run is in the file at once, and the same command goes on where it was
cut short; more --seeds or other pieces may be added later. Runs on other settings, source or
machine are refused, not mixed.
"""

import datetime
import gc
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from base import InputError, one_line
from benchmarks import subject
from benchmarks.options import COUNT
from benchmarks.report import say
from records.runs import APART
from runtime.environment import describe_environment
from runtime.log import Log
from runtime.memory import free_memory, ran_out

from .pieces import BASE, PIECES, RIVALS, choose
from .summary import STATEMENT, final, render, summarise

# Options of the trainer that have no meaning here: every run goes to its last step, and leaves
# nothing but its numbers
REFUSED = tuple(
    "--run-dir --repeat --max-time --patience --sample-tokens --checkpoint-every --keep-last "
    "--keep-best --resume --extend --warm-start --max-restarts --gpus".split()
)


# --- a run of one variant


class Points(Log):
    """A run's progress on the screen; its validations are kept, nothing else is written."""

    def __init__(self, folder, steps):
        super().__init__(folder, steps)
        self.val = []
        # CPU seconds between the ends of steps, without validations: the first step has none
        self.cpu_seconds = []
        self.since = None

    def step(self, step, total, kind, loss, seconds, kept=None, **more):
        now = time.process_time()
        if self.since is not None:
            self.cpu_seconds.append(now - self.since)
        self.since = now

    def validation(self, step, total, metrics, seconds):
        self.val.append(dict(step=step, train_time=seconds, **metrics))
        self.since = time.process_time()

    def save_weights(self, weights, name="model.safetensors"):
        return False


class Bench:
    """Trainers by variant. Each is built once and kept, as far as a quarter of the free memory
    goes: the others are built anew for each run, with compiled code from the cache.

    open_data: function of Settings that gives a trainer its data.
    """

    def __init__(self, variants, world, folder, open_data):
        self.variants = variants
        self.world = world
        self.folder = folder
        self.open_data = open_data
        self.kept = {}
        self.bytes = 0
        self.budget = (free_memory(world.device) or 4e9) / 4

    def build(self, c, log):
        trainer = subject.Subject(c, self.world, log, self.open_data(c))
        trainer.own_code()
        return trainer

    def passes(self, log):
        """What all share, or their times would not compare: micro_tokens and recompute as the
        base's trainer chose them. On a GPU two thirds of its micro_tokens, so that other
        variants' weights have room beside."""
        base = self.variants[BASE].config
        choices = self.build(base, log).shared_choices()
        rows = choices["rows"]
        if self.world.device.type == "cuda" and not base.micro_tokens:
            rows = max(1, rows * 2 // 3)
        return dict(micro_tokens=rows * base.row_len, recompute=choices["recompute"])

    def trainer(self, name, log):
        if name in self.kept:
            return self.kept[name]
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        log.say(f"building {self.variants[name].label} ...")
        trainer = self.build(self.variants[name].config, log)
        trainer.warm_up(log)
        size = 16 * trainer.params  # weights, what is below their last bit, moments
        if self.bytes + size <= self.budget:
            self.kept[name] = trainer
            self.bytes += size
        return trainer

    def run(self, name, seed):
        """One run's row: validations, time, tokens; or an error."""
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = dict(variant=name, seed=seed, date=date)
        with Points(self.folder / f"{name}-{seed}", self.variants[name].config.steps) as log:
            try:
                trainer = self.trainer(name, log)
                with self.variants[name].around(trainer):
                    result = trainer.run(log, seed)
                row |= {key: result[key] for key in ("train_time_s", "steps", "tokens", "params")}
                row["val"] = log.val
                row["ms_per_step"] = 1e3 * row["train_time_s"] / row["steps"]
                if log.cpu_seconds:
                    row["cpu_ms_per_step"] = 1e3 * statistics.fmean(log.cpu_seconds)
                row["flops_per_token"] = trainer.mean_flops()
            except (InputError, RuntimeError) as e:
                if not isinstance(e, InputError) and not ran_out(e):
                    raise
                row["error"] = one_line(e, 200)
        return row


# --- all of them


def order(names, round_number):
    """Each round begins with another."""
    shift = round_number % len(names)
    return names[shift:] + names[:shift]


def settings_of(c, dataset, world):
    """What runs in one file must share, as it comes back from JSON."""
    settings = dict(c.fields)
    for name in APART:
        if name not in ("micro_tokens", "recompute"):
            settings.pop(name, None)
    settings |= dict(
        fingerprint=dataset.fingerprint,
        source=subject.source_hash(),
        torch=torch.__version__,
        device=describe_environment(world.device)["device"],
        threads=torch.get_num_threads(),
    )
    return json.loads(json.dumps(settings))


def resume(previous, settings, variants):
    """The runs of an earlier result that need not be done again. Raises InputError where it is
    of something else."""
    if not previous:
        return []
    advice = "give another file, or delete it"
    kinds = dict(settings=dict, runs=list, variants=dict)
    if not all(isinstance(previous.get(key), kind) for key, kind in kinds.items()):
        raise InputError(f"--json: the file holds no ablation; {advice}")
    old = previous["settings"]
    for key in sorted(old.keys() | settings.keys()):
        if old.get(key) != settings.get(key):
            found = f"{key} {old.get(key)}, not {settings.get(key)}"
            if key == "source":
                found = "other source"
            raise InputError(f"--json: the file's runs were made with {found}; {advice}")
    for name, v in variants.items():
        there = previous["variants"].get(name)
        if there and there.get("fields") != json.loads(json.dumps(v.fields)):
            raise InputError(
                f"--json: the file's runs {there.get('label')} had {there.get('fields')}, not "
                f"{v.fields}; {advice}"
            )
    return [r for r in previous["runs"] if "error" not in r]


class Place(NamedTuple):
    """Where pieces are measured."""

    base: subject.Settings
    open_data: object  # function of Settings: what a trainer of these learns from
    preset: tuple = tuple(PIECES)  # what is measured unless --only says what
    code: dict = {}  # {name: Code} of more pieces
    about: dict = {}  # what the result says besides


def run(
    only=(),
    seeds=3,
    at=None,
    step_tokens=None,
    trainer_options=(),
    previous=None,
    save=lambda result: None,
):
    """dict(track, metric, target, ..., variants={name: dict(label, what, fields)}, runs=[...],
    summary={name: ...}); save is given the same after every run; previous: such a result, to go
    on from."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            "ablate runs in one process, on one device: expected to be started without torchrun"
        )
    if step_tokens and not at:
        raise InputError("--step-tokens: only with --at parity; --batch-tokens is the trainer's")
    given = {option.split("=")[0] for option in trainer_options}
    for option in REFUSED:
        if option in given:
            raise InputError(
                f"{option} is not for ablate: leave it out; --seeds N repeats, --json FILE keeps "
                "results"
            )
    if not at:
        place = Place(subject.parse(trainer_options), subject.open_data)
        return compare(place, only, seeds, previous, save)
    from benchmarks.parity import parts

    with parts.at_parity(trainer_options, step_tokens) as place:
        return compare(place, only, seeds, previous, save)


def compare(place, only, seeds, previous, save):
    """What run() returns."""
    base = place.base
    target = base.target
    metric = base.target_metric
    base = subject.change(base, target=None, checkpoint_every="off")
    variants, left_out = choose(base, only, place.preset, place.code)
    world = subject.alone()
    say("preparing the data ...")
    settings = settings_of(base, place.open_data(base).dataset, world)
    runs = resume(previous, settings, variants)
    for name, reason in left_out.items():
        say(f"left out: {name}, which {reason}")
    subject.prepare_caches(base)

    done = {(r["variant"], r["seed"]) for r in runs}
    todo = []
    for n in range(seeds):
        for name in order(list(variants), n):
            if (name, base.seed + n) not in done:
                todo.append((name, base.seed + n))
    if runs:
        say(f"going on: {len(runs)} runs are there, {len(todo)} to do")
    described = {
        name: dict(label=v.label, what=v.what, fields=v.fields) for name, v in variants.items()
    }
    previous = previous or dict(variants={})
    result = dict(
        track=base.track,
        metric=metric,
        target=target,
        steps=base.steps,
        settings=settings,
        passes=previous.get("passes"),
        left_out=left_out,
        runs=runs,
        **place.about,
        statement=STATEMENT,
        # what the file has beyond what was asked for stays in it
        variants=previous["variants"] | described,
    )

    def update():
        result["summary"] = summarise(runs, list(result["variants"]), metric, target)
        save(result)

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ablate-") as folder:
        bench = Bench(variants, world, Path(folder), place.open_data)
        if todo:
            with Points(Path(folder, "passes"), 1) as log:
                passes = result["passes"] or bench.passes(log)
            result["passes"] = passes
            for name, v in variants.items():
                bench.variants[name] = v._replace(config=subject.change(v.config, **passes))
        for i, (name, seed) in enumerate(todo):
            row = bench.run(name, seed)
            runs.append(row)
            update()
            left = (time.perf_counter() - started) / (i + 1) * (len(todo) - i - 1)
            said = row.get("error")
            if not said:
                said = f"{metric} {final(row, metric):.4f}, {row['ms_per_step']:.2f} ms a step"
            say(
                f"[{i + 1}/{len(todo)}] seed {seed}, {variants[name].label}: {said}; about "
                f"{datetime.timedelta(seconds=round(left))} left"
            )
    update()
    if all("error" in r for r in runs):
        raise InputError(f"every run failed, the first one with: {runs[0]['error']}")
    say(f"\n{render(result)}")
    return result


def add_arguments(parser):
    width = max(map(len, PIECES)) + 2
    lines = [f"  {name:{width}}{piece.what}" for name, piece in PIECES.items()]
    rivals = [f"  {name:{width}}{piece.what}" for name, piece in RIVALS.items()]
    parser.epilog = "\n".join(["pieces:", *lines, "rivals, with --only:", *rivals])
    parser.option("--only", str, (), "NAME", "these pieces instead of all", nargs="+")
    parser.option("--seeds", COUNT, 3, "N", "runs of every variant")
    parser.option(
        "--at",
        str,
        None,
        "parity",
        "gpt2-small's parts at the small shape of benchmarks parity",
        choices=("parity",),
    )
    parser.option("--step-tokens", COUNT, None, "N", "there, in a step of the first stage [2048]")
