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

import contextlib
import datetime
import difflib
import gc
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from base import InputError
from benchmarks import subject
from benchmarks.options import COUNT
from benchmarks.report import bracketed, document, number, say, spread, table
from records.compare import APART
from records.metrics import unit
from records.runs import Point, Run
from runtime.environment import describe_environment
from runtime.log import Log
from runtime.memory import free_memory, ran_out

BASE = "base"
CONFIDENCE = 0.95
# options of the trainer that have no meaning here: every run goes to its last step, and leaves
# nothing but its numbers
REFUSED = tuple(
    "--run-dir --repeat --max-time --patience --sample-tokens --checkpoint-every --keep-last "
    "--keep-best --resume --extend --warm-start --max-restarts --gpus".split()
)


class Piece(NamedTuple):
    """Fields of a configuration without and with a piece: values, or functions of the one that is
    to be changed. on is empty where there is nothing sensible to turn on."""

    off: dict
    on: dict

    @property
    def what(self):
        """The help of its option."""
        return subject.help_of(next(iter(self.off)))


def of(field, off, on):
    return Piece({field: off}, {field: on})


def switches():
    """The options that are on or off, each a piece."""
    names = "smear attn_gate key_offset qkvo_scales gate_by_value paired_near shuffle".split()
    names += ["normuon", "row_moments"]
    return {name.replace("_", "-"): of(name, False, True) for name in names}


def halves(c):
    """Windows half as long as the long ones."""
    return tuple(max(1, w // 2) for w in c.long_window)


def thirds(windows):
    """Windows that grow from stage to stage, to the last of these."""
    return tuple(max(1, windows[-1] * k // 3) for k in (1, 2, 3))


def free_layers(c):
    """Every other layer that has attention."""
    return tuple(i for i in range(0, c.n_layer - 1, 2) if i not in c.skip[1:])


def unpaired_layers(c):
    """Layers that have attention without pairs."""
    return tuple(i for i in range(c.n_layer) if i not in (*c.skip[1:], *c.paired_layers))


def mixed_layers(c):
    """For MUDD, where it can be."""
    return (c.n_layer // 3, two_thirds(c)) if c.inject else ()


def without_mudd(c):
    """The layer that MUDD takes out, as backout does."""
    return c.mudd[1] if c.mudd else c.backout


def two_thirds(c):
    """The layer behind which a third of them is left."""
    return min(2 * c.n_layer // 3, c.n_layer - 2)


PIECES = {
    "softcap": of("softcap", (), (23.0, 5.0, 7.5)),
    "value-embeds": of(
        "value_embed_layers", (), lambda c: tuple(dict.fromkeys((0, c.n_layer - 1)))
    ),
    "ngrams": Piece(dict(n_gram=1, ngram_signs=False), dict(n_gram=2)),
    "ngram-signs": of("ngram_signs", False, lambda c: c.n_gram > 1),
    "smear-first": of("smear_first", False, lambda c: c.smear),
    "gate-layers": of("attn_gate_layers", (), lambda c: (c.n_layer - 1,) * c.attn_gate),
    "paired-heads": of("paired_layers", (), free_layers),
    "xsa": of("xsa_layers", (), unpaired_layers),
    # Each takes along what cannot be without it, and is turned on only where what it needs is there
    "sublayer-lambdas": Piece(
        dict(sublayer_lambdas=False, inject=False, mudd=(), mudd_gates=-1, backout=without_mudd),
        dict(sublayer_lambdas=True),
    ),
    "inject": Piece(
        dict(inject=False, mudd=(), mudd_gates=-1, backout=without_mudd),
        dict(inject=lambda c: c.sublayer_lambdas),
    ),
    "mudd": Piece(
        dict(mudd=(), backout=without_mudd),
        dict(mudd=mixed_layers, backout=lambda c: -1 if c.inject else c.backout),
    ),
    "mudd-gates": of("mudd_gates", -1, lambda c: max(1, c.n_layer // 3) if c.inject else -1),
    "attn-input": of("attn_input", -1, two_thirds),
    "skip": of("skip", (), lambda c: ((c.n_layer + 1) // 4, (c.n_layer + 1) // 2)),
    "backout": of("backout", -1, two_thirds),
    "mtp": of("mtp", (1,), (2, 1)),
    "sampled-softmax": of(
        "sampled_softmax", (0,), lambda c: (min(16384, -(-min(c.batch_tokens) // 128) * 64),)
    ),
    "tied": of("tied", 0.0, 2 / 3),
    "yarn": of("yarn", False, lambda c: len(set(c.long_window)) > 1),
    "short-windows": of("short_window", lambda c: c.long_window, halves),
    "window-growth": Piece(
        dict(short_window=lambda c: c.short_window[-1:], long_window=lambda c: c.long_window[-1:]),
        dict(
            short_window=lambda c: thirds(c.short_window),
            long_window=lambda c: thirds(c.long_window),
        ),
    ),
    "document-growth": Piece(dict(max_doc_len=lambda c: c.max_doc_len[-1:]), {}),
    "weight-decay": of("weight_decay", 0.0, 1.2),
    "adam-every": of("adam_every", 1, 2),
    "cooldown": of("cooldown", 0.0, 0.6),
    "grow-gradients": of("grow_gradients", False, lambda c: len(c.batch_tokens) > 1),
    "prefix-loss": of("prefix_loss", (0.0,), (0.25, 0.0)),
    "extension-windows": Piece(dict(extension_windows=()), {}),
    "head-betas": of("head_betas", (0.75, 0.95), (0.5, 0.95)),
    "muon-head-pairs": of("muon_head_pairs", False, lambda c: c.n_head % 2 == 0),
    "mlp-down-lr": of("mlp_down_lr", 1.0, 2.0),
    "decay-by-shape": of("decay_by_shape", False, lambda c: c.weight_decay > 0),
    **switches(),
}


def warmup(c):
    """As the configuration says, or else a twentieth of twice its steps."""
    return c.adamw_warmup or c.steps // 10


# What the whole recipe is compared with, only where --only names it
RIVALS = {
    # The field's optimizer, with its own learning rate (--adamw-lr), gets twice the steps
    "adamw": Piece(
        dict(optimizer="muon"),
        dict(optimizer="adamw", adamw_warmup=warmup, steps=lambda c: 2 * c.steps),
    ),
}


class Code(NamedTuple):
    """A piece that is no option: what it is without, while around(trainer) lasts."""

    what: str
    around: object  # a context manager


class Variant(NamedTuple):
    label: str
    what: str
    fields: dict  # of the configuration, where it differs from the base
    config: subject.Settings
    around: object = contextlib.nullcontext  # function of a trainer, entered for each run


def apply(c, fields):
    """The configuration with these values, or what functions make of it. Raises InputError."""
    for name in fields:
        if name not in c.fields:
            raise InputError(f"this template has no {name}")
    values = {name: value(c) if callable(value) else value for name, value in fields.items()}
    return subject.change(c, **values)


def differences(c, base):
    return {name: x for name, x in c.fields.items() if x != base.fields[name]}


def variant(base, name):
    """The piece turned off, or on where base goes without. Raises InputError, saying why, where
    neither can be done."""
    piece = (PIECES | RIVALS)[name]
    for word, turned, fields in (("without", "off", piece.off), ("with", "on", piece.on)):
        try:
            changed = apply(base, fields)
        except InputError as e:
            raise InputError(f"{name}: cannot be turned {turned} here: {e}") from None
        if changed != base:
            return Variant(f"{word} {name}", piece.what, differences(changed, base), changed)
    raise InputError(f"{name}: makes no difference to this configuration")


def choose(base, only, preset=PIECES, code=None):
    """({name: Variant}, the base first, {name: why it is left out}). Names that were asked for
    are not left out: an InputError says what is wrong with them.

    preset: names to take where none is asked for; code: {name: Code} of more pieces.
    """
    code = code or {}
    known = PIECES | RIVALS | code
    for name in only:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            expected = ", ".join(known)
            raise InputError(f"--only {name}: no such piece; {hint}expected of {expected}")
    chosen = {BASE: Variant(BASE, "the recipe as it comes", {}, base)}
    left_out = {}
    for name in dict.fromkeys(only or preset):
        if name in code:
            what, around = code[name]
            chosen[name] = Variant(f"without {name}", what, {}, base, around)
            continue
        try:
            chosen[name] = variant(base, name)
        except InputError as e:
            if only:
                raise InputError(f"--only {e}") from None
            left_out[name] = str(e).split(": ", 1)[1]
    return chosen, left_out


def order(names, round_number):
    """Each round begins with another."""
    shift = round_number % len(names)
    return names[shift:] + names[:shift]


# --- statistics


def difference(pairs):
    """Of (variant, base) by seed: dict(mean, low, high, n) of variant - base, with a 95%
    t-interval, which one pair has not; None without pairs."""
    from scipy import stats

    values = [a - b for a, b in pairs]
    n = len(values)
    if not n:
        return None
    mean = math.fsum(values) / n
    found = dict(mean=mean, low=None, high=None, n=n)
    if n > 1:
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
        half = quantile * statistics.stdev(values) / math.sqrt(n)
        found |= dict(low=mean - half, high=mean + half)
    return found


def ratio(pairs):
    """The same of variant / base: the geometric mean, whose interval is a t-interval of the
    logarithms."""
    found = difference([(math.log(a), math.log(b)) for a, b in pairs])
    if found is None:
        return None
    for key in ("mean", "low", "high"):
        if found[key] is not None:
            found[key] = math.exp(found[key])
    return found


def time_to(run, metric, target):
    """Seconds of training until the metric was at target, by a line between validations; None if
    it never was."""
    points = [Point(p["step"], None, p["train_time"], p[metric]) for p in run["val"]]
    return Run("", "stopwatch", val=points).time_to(target)


def final(run, metric):
    return run["val"][-1][metric]


def summarise(runs, names, metric, target):
    """{name: what its runs say, beside those of the base with the same seeds}. A run that failed
    counts as one that did not reach the target; its loss is in no mean."""
    base = {r["seed"]: r for r in runs if r["variant"] == BASE and "error" not in r}
    summary = {}
    for name in names:
        made = [r for r in runs if r["variant"] == name]
        if not made:
            continue
        mine = {r["seed"]: r for r in made if "error" not in r}
        losses = [final(r, metric) for r in mine.values()]
        ms = [r["ms_per_step"] for r in mine.values()]
        row = dict(
            runs=len(made),
            failed=len(made) - len(mine),
            loss=statistics.fmean(losses) if losses else None,
            sd=statistics.stdev(losses) if len(losses) > 1 else None,
            ms_per_step=statistics.median(ms) if ms else None,
        )
        if target is not None:
            times = [time_to(r, metric, target) for r in mine.values()]
            there = [t for t in times if t is not None]
            row["reached"] = len(there)
            row["time_to_target"] = statistics.fmean(there) if there else None
        if name != BASE:
            both = [(mine[seed], base[seed]) for seed in sorted(mine.keys() & base.keys())]
            row["difference"] = difference([(final(a, metric), final(b, metric)) for a, b in both])
            row["by_seed"] = [final(a, metric) - final(b, metric) for a, b in both]
            row["cpu_ratio"] = None
            if all("cpu_ms_per_step" in r for pair in both for r in pair):
                pairs = [(a["cpu_ms_per_step"], b["cpu_ms_per_step"]) for a, b in both]
                row["cpu_ratio"] = spread(a / b for a, b in pairs)
            row["step_ratio"] = spread(a["ms_per_step"] / b["ms_per_step"] for a, b in both)
            if target is not None:
                row["target_ratio"] = None
                pairs = [(time_to(a, metric, target), time_to(b, metric, target)) for a, b in both]
                # a ratio over the seeds that made it would be one over the lucky ones
                if len(both) == len(made) and all(None not in pair for pair in pairs):
                    row["target_ratio"] = ratio(pairs)
        for key in "params", "flops_per_token":  # the same from every seed
            row[key] = next((r.get(key) for r in mine.values()), None)
        summary[name] = row
    pool(summary)
    return summary


def pool(summary):
    """Put beside each difference the half width of its 95% interval if all pieces' differences
    scatter over the seeds alike: `pooled`, None where no piece has two seeds."""
    from scipy import stats

    rows = [row for row in summary.values() if row.get("difference")]
    squares = freedom = 0
    for row in rows:
        values = row["by_seed"]
        if len(values) > 1:
            squares += statistics.variance(values) * (len(values) - 1)
            freedom += len(values) - 1
    for row in rows:
        row["pooled"] = None
        if freedom:
            sd = math.sqrt(squares / freedom)
            quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
            row["pooled"] = quantile * sd / math.sqrt(row["difference"]["n"])


STATEMENT = """\
Every run of a variant is compared with the base's of the same seed and round: the same tokens in
the same order (unless the piece is that order), and the same first weights as far as the piece has
none of its own. Differences: the mean of variant - base; above zero, the variant is worse. Time per
step: the median of the rounds' ratios, in brackets the least and the most. Time to the target: the
geometric mean of the ratios, given only where all runs of both reached it. The brackets behind
means are 95% t-intervals over the seeds, of the differences and of the logarithms of the ratios:
they say how far other seeds would move that mean on this machine and these data, if seeds scatter
like a normal distribution, and nothing about other data, sizes or tuning. They are not corrected
for the number of variants: of twenty that change nothing, one is expected to leave out zero."""


# --- running


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
                row["error"] = " ".join(str(e).split())[:200]
        return row


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
    from .parity import parts

    with parts.at_parity(trainer_options, step_tokens) as place:
        return compare(place, only, seeds, previous, save)


class Place(NamedTuple):
    """Where pieces are measured."""

    base: subject.Settings
    open_data: object  # function of Settings: what a trainer of these learns from
    preset: tuple = tuple(PIECES)  # what is measured unless --only says what
    code: dict = {}  # {name: Code} of more pieces
    about: dict = {}  # what the result says besides


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


# --- the report


def interval(x, form, sign=""):
    """A mean with its interval, where it has one."""
    if x is None:
        return ""
    mean = format(x["mean"], sign + form)
    if x["low"] is None:
        return mean
    return f"{mean} [{x['low']:{sign}{form}}, {x['high']:{sign}{form}}]"


def small_cells(name, row, v, base):
    """A variant's line of the table at parity's shape, where a step's time is the CPU's."""
    if name == BASE:
        sd = "" if row["sd"] is None else f" (sd {row['sd']:.4f})"
        cells = [v["label"], number(row["loss"], ".4f") + sd, "", "", ""]
        cells += [number(row["params"], ","), number(row["flops_per_token"], ",.0f")]
        return [*cells, v["what"]]
    found = row["difference"]
    more = [None if None in (row[k], base[k]) else row[k] - base[k] for k in EXACT]
    changed = ", ".join(f"{key}={shown(x)}" for key, x in v["fields"].items())
    return [
        v["label"],
        ", ".join(format(x, "+.4f") for x in row["by_seed"]),
        interval(found, ".4f", "+"),
        number(row.get("pooled"), ".4f"),
        bracketed(row["cpu_ratio"], ".3f"),
        *(number(x, "+,.0f") for x in more),
        f"{v['what']} ({changed})" if changed else v["what"],
    ]


EXACT = "params", "flops_per_token"


def cells_of(name, row, v, target):
    """A variant's line of the table."""
    loss = number(row["loss"], ".4f")
    if name == BASE and row["sd"] is not None:
        loss += f" (sd {row['sd']:.4f})"
    if row["failed"]:
        loss += f" ({row['failed']} of {row['runs']} failed)"
    cells = [v["label"], loss, interval(row.get("difference"), ".4f", "+")]
    cells.append(number(row["ms_per_step"], ",.2f"))
    cells.append("" if name == BASE else bracketed(row["step_ratio"], ".3f"))
    if target is not None:
        if not row["reached"]:
            cells.append("not reached")
        elif row["reached"] < row["runs"]:
            cells.append(f"reached in {row['reached']} of {row['runs']}")
        else:
            cells.append(f"{row['time_to_target']:,.2f}")
        missing = "" if name == BASE else "–"
        cells.append(interval(row.get("target_ratio"), ".3f") or missing)
    changed = ", ".join(f"{key}={shown(x)}" for key, x in v["fields"].items())
    return [*cells, f"{v['what']} ({changed})" if changed else v["what"]]


def shown(x):
    """A field's value in the table."""
    if isinstance(x, list | tuple):
        return " ".join(map(str, x)) or "none"
    if isinstance(x, float):
        return f"{x:.3g}"
    return x


def render(result):
    """A row for each variant, worst loss first: what is lost without it, or won with it."""
    metric = result["metric"]
    target = result["target"]
    summary = result["summary"]
    where = result["settings"]
    seeds = {r["seed"] for r in result["runs"]}
    tokens = sorted({r["tokens"] for r in result["runs"] if "error" not in r})
    goal = "" if target is None else f", target {target:g}"
    header = ["", f"{metric} at the end", "difference", "ms/step", "ratio"]
    if target is not None:
        header += ["s to target", "ratio"]

    def key(name):
        found = summary[name].get("difference")
        return name != BASE, -found["mean"] if found else -math.inf

    rows = []
    for name in sorted(summary, key=key):
        row, v = summary[name], result["variants"][name]
        if "shape" in result:
            rows.append(small_cells(name, row, v, summary[BASE]))
        else:
            rows.append(cells_of(name, row, v, target))
    if "shape" in result:
        header = ["", "by seed", "mean", "±", "CPU ratio", "parameters", "FLOPs a token"]
    left_out = "; ".join(f"{name} {reason}" for name, reason in result["left_out"].items())
    failed = []
    for r in result["runs"]:
        if "error" in r:
            label = result["variants"][r["variant"]]["label"]
            failed.append(f"Failed: {label}, seed {r['seed']}: {r['error']}")
    return document(
        f"# Ablation: {result['track']}, {len(seeds)} seed{'s' * (len(seeds) > 1)} on "
        f"{where['device']}",
        f"{result['steps']} steps, {' and '.join(f'{n:,}' for n in tokens)} tokens in every run, "
        f"{metric} in {unit(metric)}{goal}; torch {where['torch']}, {where['threads']} CPU "
        "threads.",
        result.get("shape"),
        table([*header, ""], rows),
        result["statement"],
        "**One seed has no interval: --seeds 3 or more.**" if len(seeds) < 2 else "",
        f"Left out: {left_out}." if left_out else "",
        *failed,
    )


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
