"""What each piece of the recipe is worth: it is turned off, or on where the track goes without,
one at a time.

    ./run.sh benchmarks ablate --track laptop --seeds 5 --json ablate.json --table ablate.md
    ./run.sh benchmarks ablate --track laptop --only softcap smear --steps 80

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
from benchmarks.report import document, number, say, spread, table
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
    "--keep-best --resume --max-restarts --gpus".split()
)


class Piece(NamedTuple):
    """Fields of a configuration without and with a piece: values, or functions of the one that is
    to be changed. on is empty where there is nothing sensible to turn on."""

    what: str
    off: dict
    on: dict


PIECES = {
    "softcap": Piece(
        "sigmoid that bounds the logits", dict(softcap=()), dict(softcap=(23.0, 5.0, 7.5))
    ),
    "value-embeds": Piece(
        "second token embeddings, added to the values",
        dict(value_embed_layers=()),
        dict(value_embed_layers=lambda c: tuple(dict.fromkeys((0, c.n_layer - 1)))),
    ),
    "ngrams": Piece(
        "hashed embeddings of n-grams", dict(n_gram=1, ngram_signs=False), dict(n_gram=2)
    ),
    "ngram-signs": Piece(
        "signs that tell n-grams in one row apart",
        dict(ngram_signs=False),
        dict(ngram_signs=lambda c: c.n_gram > 1),
    ),
    "smear": Piece(
        "gated share of the previous token's embedding", dict(smear=False), dict(smear=True)
    ),
    "attn-gate": Piece("gate on each head's output", dict(attn_gate=False), dict(attn_gate=True)),
    "key-offset": Piece(
        "half of each key is its predecessor's, in far-seeing layers",
        dict(key_offset=False),
        dict(key_offset=True),
    ),
    "paired-heads": Piece(
        "pairs of heads that see each other's keys",
        dict(paired_layers=()),
        dict(
            paired_layers=lambda c: tuple(
                i for i in range(0, c.n_layer - 1, 2) if i not in c.skip[1:]
            )
        ),
    ),
    "skip": Piece(
        "a layer without attention takes an earlier one's output",
        dict(skip=()),
        dict(skip=lambda c: ((c.n_layer + 1) // 4, (c.n_layer + 1) // 2)),
    ),
    "backout": Piece(
        "a middle layer's output is taken out at the end",
        dict(backout=-1),
        dict(backout=lambda c: min(2 * c.n_layer // 3, c.n_layer - 2)),
    ),
    "mtp": Piece(
        "several next tokens are predicted early in training", dict(mtp=(1,)), dict(mtp=(2, 1))
    ),
    "sampled-softmax": Piece(
        "the training loss is among a sample of the tokens",
        dict(sampled_softmax=(0,)),
        dict(sampled_softmax=lambda c: (min(16384, -(-min(c.batch_tokens) // 128) * 64),)),
    ),
    "tied": Piece("head and embedding are one at first", dict(tied=0.0), dict(tied=2 / 3)),
    "yarn": Piece(
        "rotary frequencies follow the window",
        dict(yarn=False),
        dict(yarn=lambda c: len(set(c.long_window)) > 1),
    ),
    "short-windows": Piece(
        "most layers see less far than the others",
        dict(short_window=lambda c: c.long_window),
        dict(short_window=lambda c: tuple(max(1, w // 2) for w in c.long_window)),
    ),
    "window-growth": Piece(
        "windows grow from stage to stage",
        dict(short_window=lambda c: c.short_window[-1:], long_window=lambda c: c.long_window[-1:]),
        dict(
            short_window=lambda c: tuple(max(1, c.short_window[-1] * k // 3) for k in (1, 2, 3)),
            long_window=lambda c: tuple(max(1, c.long_window[-1] * k // 3) for k in (1, 2, 3)),
        ),
    ),
    "document-growth": Piece(
        "documents are cut shorter at first", dict(max_doc_len=lambda c: c.max_doc_len[-1:]), {}
    ),
    "shuffle": Piece(
        "documents in random order from the start", dict(shuffle=False), dict(shuffle=True)
    ),
    "normuon": Piece(
        "Muon's update scaled neuron by neuron", dict(normuon=False), dict(normuon=True)
    ),
    "weight-decay": Piece("cautious weight decay", dict(weight_decay=0.0), dict(weight_decay=1.2)),
    "row-moments": Piece(
        "Adam without momentum and with one second moment a row, on tables",
        dict(row_moments=False),
        dict(row_moments=True),
    ),
    "adam-every": Piece("Adam at every second step only", dict(adam_every=1), dict(adam_every=2)),
    "cooldown": Piece("the learning rate falls at the end", dict(cooldown=0.0), dict(cooldown=0.6)),
}


class Variant(NamedTuple):
    label: str
    what: str
    fields: dict  # of the configuration, where it differs from the base
    config: subject.Settings


def apply(c, fields):
    """The configuration with these values, or what functions make of it. Raises InputError."""
    values = {name: value(c) if callable(value) else value for name, value in fields.items()}
    return subject.change(c, **values)


def differences(c, base):
    return {name: x for name, x in c.fields.items() if x != base.fields[name]}


def variant(base, name):
    """The piece turned off, or on where base goes without. Raises InputError, saying why, where
    neither can be done."""
    piece = PIECES[name]
    for word, turned, fields in (("without", "off", piece.off), ("with", "on", piece.on)):
        try:
            changed = apply(base, fields)
        except InputError as e:
            raise InputError(f"{name}: cannot be turned {turned} here: {e}") from None
        if changed != base:
            return Variant(f"{word} {name}", piece.what, differences(changed, base), changed)
    raise InputError(f"{name}: makes no difference to this configuration")


def choose(base, only):
    """({name: Variant}, the base first, {name: why it is left out}). Names that were asked for
    are not left out: an InputError says what is wrong with them."""
    for name in only:
        if name not in PIECES:
            near = difflib.get_close_matches(name, PIECES, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            expected = ", ".join(PIECES)
            raise InputError(f"--only {name}: no such piece; {hint}expected of {expected}")
    chosen = {BASE: Variant(BASE, "the recipe as it comes", {}, base)}
    left_out = {}
    for name in dict.fromkeys(only or PIECES):
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


def mean_interval(values):
    """(mean, half the width of its 95% t-interval; None from fewer than two values)."""
    from scipy import stats

    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return mean, quantile * statistics.stdev(values) / math.sqrt(n)


def difference(pairs):
    """Of (variant, base) by seed: dict(mean, low, high, n) of variant - base; None without
    pairs."""
    if not pairs:
        return None
    mean, half = mean_interval([a - b for a, b in pairs])
    if half is None:
        return dict(mean=mean, low=None, high=None, n=len(pairs))
    return dict(mean=mean, low=mean - half, high=mean + half, n=len(pairs))


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
            row["step_ratio"] = spread(a["ms_per_step"] / b["ms_per_step"] for a, b in both)
            if target is not None:
                row["target_ratio"] = None
                pairs = [(time_to(a, metric, target), time_to(b, metric, target)) for a, b in both]
                # a ratio over the seeds that made it would be one over the lucky ones
                if len(both) == len(made) and all(None not in pair for pair in pairs):
                    row["target_ratio"] = ratio(pairs)
        summary[name] = row
    return summary


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

    def step(self, step, total, kind, loss, seconds):
        pass

    def validation(self, step, total, metrics, seconds):
        self.val.append(dict(step=step, train_time=seconds, **metrics))


class Bench:
    """Trainers by variant. Each is built once and kept, as far as a quarter of the free memory
    goes: the others are built anew for each run, with compiled code from the cache."""

    def __init__(self, variants, world, folder):
        self.variants = variants
        self.world = world
        self.folder = folder
        self.kept = {}
        self.bytes = 0
        self.budget = (free_memory(world.device) or 4e9) / 4

    def build(self, c, log):
        trainer = subject.Subject(c, self.world, log)
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
        """One run's row: validations, time, tokens; or an error. Returns (row, seconds spent on
        building)."""
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        row = dict(variant=name, seed=seed, date=date)
        started = time.perf_counter()
        built = 0.0
        with Points(self.folder / f"{name}-{seed}", self.variants[name].config.steps) as log:
            try:
                trainer = self.trainer(name, log)
                built = time.perf_counter() - started
                result = trainer.run(log, seed)
                row |= dict(
                    val=log.val,
                    train_time_s=result["train_time_s"],
                    steps=result["steps"],
                    tokens=result["tokens"],
                    params=result["params"],
                    ms_per_step=1e3 * result["train_time_s"] / result["steps"],
                )
            except (InputError, RuntimeError) as e:
                if not isinstance(e, InputError) and not ran_out(e):
                    raise
                row["error"] = " ".join(str(e).split())[:200]
        return row, built


def settings_of(c, world):
    """What runs in one file must share, as it comes back from JSON."""
    config = dict(c.fields)
    for name in APART:
        if name not in ("micro_tokens", "recompute"):
            config.pop(name, None)
    settings = dict(
        config=config,
        fingerprint=subject.open_data(c, world).dataset.fingerprint,
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
    old = previous["settings"] | previous["settings"].get("config", {})
    new = settings | settings["config"]
    for key in sorted((old.keys() | new.keys()) - {"config"}):
        if old.get(key) != new.get(key):
            found = f"{key} {old.get(key)}, not {new.get(key)}"
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


def refuse(options):
    """Raises InputError for options of the trainer that have no meaning here."""
    given = {option.split("=")[0] for option in options}
    wrong = [option for option in REFUSED if option in given]
    if wrong:
        raise InputError(
            f"{wrong[0]} is not for ablate: leave it out; --seeds N repeats, --json FILE keeps "
            "results"
        )


def run(only=(), seeds=3, trainer_options=(), previous=None, save=lambda result: None):
    """dict(track, metric, target, ..., variants={name: dict(label, what, fields)}, runs=[...],
    summary={name: ...}); save is given the same after every run; previous: such a result, to go
    on from."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            "ablate runs in one process, on one device: expected to be started without torchrun"
        )
    base = subject.parse(trainer_options)
    refuse(trainer_options)
    target = base.target
    metric = base.target_metric
    base = subject.change(base, target=None, checkpoint_every="off")
    variants, left_out = choose(base, only)
    world = subject.alone()
    say("preparing the data ...")
    settings = settings_of(base, world)
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
    described = {}
    for name, v in variants.items():
        described[name] = dict(label=v.label, what=v.what, fields=v.fields)
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
        statement=STATEMENT,
        # what the file has beyond what was asked for stays in it
        variants=described | {n: v for n, v in previous["variants"].items() if n not in described},
    )

    def update():
        result["summary"] = summarise(runs, list(result["variants"]), metric, target)
        save(result)

    spent = []
    building = []
    with tempfile.TemporaryDirectory(prefix="ablate-") as folder:
        bench = Bench(variants, world, Path(folder))
        if todo:
            with Points(Path(folder, "passes"), 1) as log:
                passes = result["passes"] or bench.passes(log)
            result["passes"] = passes
            for name, v in variants.items():
                bench.variants[name] = v._replace(config=subject.change(v.config, **passes))
        for i, (name, seed) in enumerate(todo):
            started = time.perf_counter()
            row, built = bench.run(name, seed)
            spent.append(time.perf_counter() - started - built)
            if built > 0.1:
                building.append(built)
            runs.append(row)
            update()
            later = {n for n, _ in todo[i + 1 :]}
            left = (len(todo) - i - 1) * statistics.fmean(spent)
            left += len(later - bench.kept.keys()) * statistics.fmean(building or [0.0])
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


def cells_of(name, row, v, target):
    """A variant's line of the table."""
    loss = number(row["loss"], ".4f")
    if name == BASE and row["sd"] is not None:
        loss += f" (sd {row['sd']:.4f})"
    if row["failed"]:
        loss += f" ({row['failed']} of {row['runs']} failed)"
    cells = [v["label"], loss, interval(row.get("difference"), ".4f", "+")]
    cells.append(number(row["ms_per_step"], ",.2f"))
    s = row.get("step_ratio")
    cells.append(f"{s['median']:.3f} [{s['least']:.3f}, {s['most']:.3f}]" if s else "")
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
        rows.append(cells_of(name, summary[name], result["variants"][name], target))
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
        table([*header, ""], rows),
        result["statement"],
        "**One seed has no interval: --seeds 3 or more.**" if len(seeds) < 2 else "",
        f"Left out: {left_out}." if left_out else "",
        *failed,
    )


def add_arguments(parser):
    width = max(map(len, PIECES)) + 2
    lines = [f"  {name:{width}}{piece.what}" for name, piece in PIECES.items()]
    parser.epilog = "\n".join(["pieces:", *lines])
    parser.option("--only", str, (), "NAME", "these pieces instead of all", nargs="+")
    parser.option("--seeds", COUNT, 3, "N", "runs of every variant")
