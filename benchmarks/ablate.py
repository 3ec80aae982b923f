"""What each piece of the recipe is worth: it is turned off, or on where the track goes without, one
at a time.

    python -m benchmarks ablate --track laptop --seeds 5 --json ablate.json --table ablate.md
    python -m benchmarks ablate --track laptop --only softcap smear --steps 80

Options other than those below are the trainer's own (./run.sh --help): --steps N shortens the whole
schedule, --seed N is the first seed. The recipe as it comes (base) and each variant of it train
from the same seeds on the same tokens, to the last step; the target only says where a line between
validations crosses it. A round is one seed of every variant, in an order that rotates, so that a
machine that drifts hits all alike; every variant is compared with the base of its own round. The
clock is the trainer's: no start-up, no compiling, no validation.

With --json, every finished run is in the file at once, and the same command goes on where it was
cut short; more --seeds or other pieces may be added later. Runs on other settings, source or
machine are refused, not mixed.
"""

import dataclasses
import datetime
import difflib
import gc
import hashlib
import json
import math
import os
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import NamedTuple

import torch

import train_gpt as tg
from base import InputError
from records.compare import APART
from records.runs import Point, Run
from runtime.environment import describe_environment
from runtime.log import Log
from runtime.memory import free_memory, ran_out
from runtime.signals import Requests

BASE, CONFIDENCE = "base", 0.95
# options of the trainer that have no meaning here: every run goes to its last step, and leaves
# nothing but its numbers
REFUSED = (
    "--run-dir",
    "--repeat",
    "--max-time",
    "--patience",
    "--sample-tokens",
    "--checkpoint-every",
    "--keep-last",
    "--keep-best",
    "--resume",
    "--max-restarts",
    "--gpus",
)


class Piece(NamedTuple):
    """Fields of Config without and with a piece: values, or functions of the Config that is to
    be changed. on is empty where there is nothing sensible to turn on."""

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
    fields: dict  # of Config, where it differs from the base
    config: tg.Config


def apply(c, fields):
    return dataclasses.replace(
        c, **{name: value(c) if callable(value) else value for name, value in fields.items()}
    )


def differences(c, base):
    return {
        f.name: getattr(c, f.name)
        for f in dataclasses.fields(c)
        if getattr(c, f.name) != getattr(base, f.name)
    }


def variant(base, name):
    """The piece turned off, or on where base goes without. Raises InputError, saying why, where
    neither can be done."""
    piece = PIECES[name]
    for word, fields in (("without", piece.off), ("with", piece.on)):
        try:
            changed = apply(base, fields)
        except InputError as e:
            raise InputError(
                f"{name}: cannot be turned {'off' if word == 'without' else 'on'} here: {e}"
            ) from None
        if changed != base:
            return Variant(f"{word} {name}", piece.what, differences(changed, base), changed)
    raise InputError(f"{name}: makes no difference to this configuration")


def choose(base, only):
    """({name: Variant}, the base first, {name: why it is left out}). Names that were asked for
    are not left out: an InputError says what is wrong with them."""
    for name in only:
        if name not in PIECES:
            near = difflib.get_close_matches(name, PIECES, 1)
            raise InputError(
                f"--only {name}: no such piece; {f'did you mean {near[0]}? ' if near else ''}expected of "
                f"{', '.join(PIECES)}"
            )
    chosen, left_out = {BASE: Variant(BASE, "the recipe as it comes", {}, base)}, {}
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

    mean, n = math.fsum(values) / len(values), len(values)
    if n < 2:
        return mean, None
    return mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * statistics.stdev(
        values
    ) / math.sqrt(n)


def difference(pairs):
    """Of (variant, base) by seed: dict(mean, low, high, n) of variant - base; None without
    pairs."""
    if not pairs:
        return None
    mean, half = mean_interval([a - b for a, b in pairs])
    return dict(
        mean=mean,
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
        n=len(pairs),
    )


def ratio(pairs):
    """The same of variant / base: the geometric mean, whose interval is a t-interval of the
    logarithms."""
    found = difference([(math.log(a), math.log(b)) for a, b in pairs])
    return found and {k: math.exp(v) if k != "n" and v is not None else v for k, v in found.items()}


def time_to(run, metric, target):
    """Seconds of training until the metric was at target, by a line between validations; None if
    it never was."""
    points = [Point(p["step"], None, p["train_time"], p[metric]) for p in run["val"]]
    return Run("", "stopwatch", val=points).time_to(target)


def summarise(runs, names, metric, target):
    """{name: what its runs say, beside those of the base with the same seeds}. A run that failed
    counts as one that did not reach the target; its loss is in no mean."""
    by_seed = {name: {r["seed"]: r for r in runs if r["variant"] == name} for name in names}
    ended = {
        name: {seed: r for seed, r in rs.items() if "error" not in r}
        for name, rs in by_seed.items()
    }
    summary = {}
    for name in names:
        mine, base = ended[name], ended[BASE]
        if not by_seed[name]:
            continue
        both = sorted(mine.keys() & base.keys())
        losses, ms = (
            [r["val"][-1][metric] for r in mine.values()],
            [r["ms_per_step"] for r in mine.values()],
        )
        row = summary[name] = dict(
            runs=len(by_seed[name]),
            failed=len(by_seed[name]) - len(mine),
            loss=statistics.fmean(losses) if losses else None,
            sd=statistics.stdev(losses) if len(losses) > 1 else None,
            ms_per_step=statistics.median(ms) if ms else None,
        )
        if target is not None:
            times = {seed: time_to(r, metric, target) for seed, r in mine.items()}
            there = [t for t in times.values() if t is not None]
            row |= dict(
                reached=len(there), time_to_target=statistics.fmean(there) if there else None
            )
        if name == BASE:
            continue
        row["difference"] = difference(
            [(mine[s]["val"][-1][metric], base[s]["val"][-1][metric]) for s in both]
        )
        ratios = [mine[s]["ms_per_step"] / base[s]["ms_per_step"] for s in both]
        row["step_ratio"] = (
            dict(median=statistics.median(ratios), least=min(ratios), most=max(ratios))
            if both
            else None
        )
        if target is not None:
            pairs = [(times[s], time_to(base[s], metric, target)) for s in both]
            # a ratio over the seeds that made it would be one over the lucky ones
            all_there = len(both) == len(by_seed[name]) and all(None not in pair for pair in pairs)
            row["target_ratio"] = ratio(pairs) if all_there else None
    return summary


STATEMENT = """\
Every run of a variant is compared with the base's of the same seed and round: the same tokens in the same order (unless
the piece is that order), and the same first weights as far as the piece has none of its own. Differences: the mean of
variant - base; above zero, the variant is worse. Time per step: the median of the rounds' ratios, in brackets the least
and the most. Time to the target: the geometric mean of the ratios, given only where all runs of both reached it. The
brackets behind means are 95% t-intervals over the seeds, of the differences and of the logarithms of the ratios: they
say how far other seeds would move that mean on this machine and these data, if seeds scatter like a normal
distribution, and nothing about other data, sizes or tuning. They are not corrected for the number of variants: of
twenty that change nothing, one is expected to leave out zero."""


# --- running


class Points(Log):
    """A run's progress on the screen; its validations are kept, nothing else is written."""

    def __init__(self, folder, steps):
        super().__init__(folder, steps)
        self.val = []

    def step(self, step, total, kind, loss, seconds, **more):
        if kind == "val":
            self.val.append(dict(step=step, train_time=seconds, val_loss=loss, **more))


def stages_of(c):
    return [tg.stage_at(c, tg.progress_at(c, step)) for step in range(c.steps)]


def own_code(model):
    """Give a model a forward() of its own: torch.compile keeps graphs by code object, and
    refuses more than a few."""
    kind = type(model)
    forward = types.FunctionType(
        kind.forward.__code__.replace(),
        kind.forward.__globals__,
        "forward",
        kind.forward.__defaults__,
        kind.forward.__closure__,
    )
    forward.__kwdefaults__ = kind.forward.__kwdefaults__
    model.__class__ = type(kind.__name__, (kind,), dict(forward=forward))


class Bench:
    """Trainers by variant. Each is built once and kept, as far as a quarter of the free memory
    goes: the others are built anew for each run, with compiled code from the cache."""

    def __init__(self, variants, world, folder):
        self.variants, self.world, self.folder, self.kept, self.bytes = (
            variants,
            world,
            folder,
            {},
            0,
        )
        self.budget = (free_memory(world.device) or 4e9) / 4

    def build(self, c, log):
        stages = stages_of(c)
        trainer = tg.Trainer(c, self.world, tg.load_data(c, stages, self.world), stages, log)
        own_code(trainer.model)
        return trainer

    def passes(self, log):
        """What all share, or their times would not compare: micro_tokens and recompute as the
        base's trainer chose them. On a GPU two thirds of its micro_tokens, so that other
        variants' weights have room beside."""
        base = self.variants[BASE].config
        trainer = self.build(base, log)
        rows = max(trainer.micro_rows.values())
        if self.world.device.type == "cuda" and not base.micro_tokens:
            rows = max(1, rows * 2 // 3)
        return dict(
            micro_tokens=rows * base.row_len, recompute="on" if trainer.model.recompute else "off"
        )

    def trainer(self, name, log):
        if name in self.kept:
            return self.kept[name]
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()
        log.say(f"building {self.variants[name].label} ...")
        trainer = self.build(self.variants[name].config, log)
        if trainer.compiled:
            trainer.warm_up(log)
        size = 16 * trainer.params  # weights, what is below their last bit, moments
        if self.bytes + size <= self.budget:
            self.kept[name], self.bytes = trainer, self.bytes + size
        return trainer

    def run(self, name, seed):
        """One run's row: validations, time, tokens; or an error. Returns (row, seconds spent on
        building)."""
        row = dict(
            variant=name,
            seed=seed,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        started, built = time.perf_counter(), 0.0
        with Points(self.folder / f"{name}-{seed}", self.variants[name].config.steps) as log:
            try:
                trainer = self.trainer(name, log)
                built = time.perf_counter() - started
                trainer.c = dataclasses.replace(trainer.c, seed=seed)
                trainer.model.zero_grad(set_to_none=True)  # what a run that failed left
                result = trainer.run(log, time.perf_counter(), Requests())
                row |= dict(
                    val=log.val,
                    train_time_s=result["train_time_s"],
                    steps=result["steps"],
                    tokens=result["tokens"],
                    params=result["params"],
                    ms_per_step=1e3 * result["train_time_s"] / result["steps"],
                )
            except (InputError, RuntimeError) as e:
                if not (isinstance(e, InputError) or ran_out(e)):
                    raise
                row["error"] = " ".join(str(e).split())[:200]
        return row, built


def source_hash():
    """SHA-256 of what decides a run's numbers."""
    files = [
        tg.ROOT / "train_gpt.py",
        *(p for d in ("kernels", "data", "runtime") for p in (tg.ROOT / d).glob("*.py")),
    ]
    return hashlib.sha256(b"".join(p.read_bytes() for p in sorted(files))).hexdigest()


def settings_of(c, world):
    """What runs in one file must share, as it comes back from JSON."""
    config = {
        k: v
        for k, v in dataclasses.asdict(c).items()
        if k not in APART or k in ("micro_tokens", "recompute")
    }
    data = tg.load_data(c, stages_of(c), world).dataset.fingerprint
    return json.loads(
        json.dumps(
            dict(
                config=config,
                fingerprint=data,
                source=source_hash(),
                torch=torch.__version__,
                device=describe_environment(world.device)["device"],
                threads=torch.get_num_threads(),
            )
        )
    )


def resume(previous, settings, variants):
    """The runs of an earlier result that need not be done again. Raises InputError where it is
    of something else."""
    if not previous:
        return []
    advice = "give another file, or delete it"
    was = previous.get("settings")
    rows = previous.get("runs")
    if (
        not isinstance(was, dict)
        or not isinstance(rows, list)
        or not isinstance(previous.get("variants"), dict)
    ):
        raise InputError(f"--json: the file holds no ablation; {advice}")
    old, new = (
        {**s.get("config", {}), **{k: v for k, v in s.items() if k != "config"}}
        for s in (was, settings)
    )
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            found = (
                "other source" if key == "source" else f"{key} {old.get(key)}, not {new.get(key)}"
            )
            raise InputError(f"--json: the file's runs were made with {found}; {advice}")
    for name, v in variants.items():
        there = previous["variants"].get(name)
        if there and there.get("fields") != json.loads(json.dumps(v.fields)):
            raise InputError(
                f"--json: the file's runs {there.get('label')} had {there.get('fields')}, not {v.fields}; "
                f"{advice}"
            )
    return [r for r in rows if "error" not in r]


def run(only=(), seeds=3, trainer_options=(), previous=None, save=lambda result: None):
    """dict(track, metric, target, ..., variants={name: dict(label, what, fields)}, runs=[...],
    summary={name: ...}); save is given the same after every run; previous: such a result, to go
    on from."""

    def say(message):
        print(message, file=sys.stderr, flush=True)

    if seeds < 1:
        raise InputError(f"--seeds {seeds}: expected 1 or more")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise InputError(
            "ablate runs in one process, on one device: expected to be started without torchrun"
        )
    base = tg.parse_args(list(trainer_options))
    given = {option.split("=")[0] for option in trainer_options}
    if wrong := [option for option in REFUSED if option in given]:
        raise InputError(
            f"{wrong[0]} is not for ablate: leave it out; --seeds N repeats, --json FILE keeps results"
        )
    target, metric = base.target, base.target_metric
    base = dataclasses.replace(base, target=None, checkpoint_every="off")
    variants, left_out = choose(base, only)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    world = tg.World(device=device)
    say("preparing the data ...")
    settings = settings_of(base, world)
    runs = resume(previous, settings, variants)

    for name, reason in left_out.items():
        say(f"left out: {name}, which {reason}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(base.cache_dir) / "inductor"))
    if device.type == "cpu":
        tg.keep_freed_memory()

    names = list(variants)
    done = {(r["variant"], r["seed"]) for r in runs}
    todo = [(name, base.seed + n) for n in range(seeds) for name in order(names, n)]
    todo = [item for item in todo if item not in done]
    if runs:
        say(f"going on: {len(runs)} runs are there, {len(todo)} to do")
    if previous:  # what the file has beyond what was asked for stays in it
        names += [name for name in previous["variants"] if name not in variants]
    described = {
        name: dict(label=v.label, what=v.what, fields=v.fields) for name, v in variants.items()
    }
    result = dict(
        track=base.track,
        metric=metric,
        target=target,
        steps=base.steps,
        settings=settings,
        passes=(previous or {}).get("passes"),
        left_out=left_out,
        runs=runs,
        statement=STATEMENT,
        variants={name: described.get(name) or previous["variants"][name] for name in names},
    )

    def update():
        result["summary"] = summarise(runs, names, metric, target)
        save(result)

    spent, building = [], []
    with tempfile.TemporaryDirectory(prefix="ablate-") as folder:
        bench = Bench(variants, world, Path(folder))
        if todo:
            with Points(Path(folder, "passes"), 1) as log:
                passes = result["passes"] = result["passes"] or bench.passes(log)
            bench.variants = {
                name: v._replace(config=dataclasses.replace(v.config, **passes))
                for name, v in variants.items()
            }
        for i, (name, seed) in enumerate(todo):
            started = time.perf_counter()
            row, built = bench.run(name, seed)
            spent.append(time.perf_counter() - started - built)
            building += [built] if built > 0.1 else []
            runs.append(row)
            update()
            later = todo[i + 1 :]
            to_build = len({n for n, _ in later} - bench.kept.keys())
            left = len(later) * statistics.fmean(spent) + to_build * statistics.fmean(
                building or [0.0]
            )
            said = row.get("error") or (
                f"{metric} {row['val'][-1][metric]:.4f}, {row['ms_per_step']:.2f} ms a step"
            )
            say(
                f"[{i + 1}/{len(todo)}] seed {seed}, {variants[name].label}: {said}; about "
                f"{datetime.timedelta(seconds=round(left))} left"
            )
    update()
    if not any("error" not in r for r in runs):
        raise InputError(f"every run failed, the first one with: {runs[0]['error']}")
    say(f"\n{render(result)}")
    return result


# --- the report


def bracket(low, high, form):
    return "" if low is None else f" [{low:{form}}, {high:{form}}]"


def shown(x):
    return f"{x:.3g}" if isinstance(x, float) else x


def render(result):
    """A row for each variant, worst loss first: what is lost without it, or won with it."""
    metric, target, summary = result["metric"], result["target"], result["summary"]
    seeds = sorted({r["seed"] for r in result["runs"]})
    tokens = sorted({r["tokens"] for r in result["runs"] if "error" not in r})
    unit = dict(val_loss="nats per token", val_bpb="bits per byte")[metric]
    where = result["settings"]
    lines = [
        f"# Ablation: {result['track']}, {len(seeds)} seed{'s' * (len(seeds) > 1)} on {where['device']}",
        "",
        f"{result['steps']} steps, {' and '.join(f'{n:,}' for n in tokens)} tokens in every run, "
        f"{metric} in {unit}"
        + (f", target {target:g}" if target is not None else "")
        + f"; torch {where['torch']}, {where['threads']} CPU threads.",
        "",
    ]
    columns = ["", f"{metric} at the end", "difference", "ms/step", "ratio"]
    columns += ["s to target", "ratio"] if target is not None else []
    lines += ["| " + " | ".join(columns) + " | |", "|---" * (len(columns) + 1) + "|"]

    def key(name):
        found = summary[name].get("difference")
        return name != BASE, -found["mean"] if found else -math.inf

    for name in sorted(summary, key=key):
        row, v = summary[name], result["variants"][name]
        loss = "–" if row["loss"] is None else f"{row['loss']:.4f}"
        loss += f" (sd {row['sd']:.4f})" if name == BASE and row["sd"] is not None else ""
        loss += f" ({row['failed']} of {row['runs']} failed)" if row["failed"] else ""
        d, s = row.get("difference"), row.get("step_ratio")
        cells = [
            v["label"],
            loss,
            f"{d['mean']:+.4f}{bracket(d['low'], d['high'], '+.4f')}" if d else "",
            "–" if row["ms_per_step"] is None else f"{row['ms_per_step']:,.2f}",
            f"{s['median']:.3f} [{s['least']:.3f}, {s['most']:.3f}]" if s else "",
        ]
        if target is not None:
            r, some = row.get("target_ratio"), f"reached in {row['reached']} of {row['runs']}"
            cells += [
                ("not reached" if not row["reached"] else some)
                if row["reached"] < row["runs"]
                else f"{row['time_to_target']:,.2f}",
                f"{r['mean']:.3f}{bracket(r['low'], r['high'], '.3f')}"
                if r
                else ""
                if name == BASE
                else "–",
            ]
        changed = ", ".join(
            f"{k}={' '.join(map(str, x)) or 'none' if isinstance(x, list | tuple) else shown(x)}"
            for k, x in v["fields"].items()
        )
        lines.append(
            "| " + " | ".join(cells) + f" | {v['what']}{f' ({changed})' if changed else ''} |"
        )
    lines += ["", result["statement"]]
    if len(seeds) < 2:
        lines += ["", "**One seed has no interval: --seeds 3 or more.**"]
    if result["left_out"]:
        lines += [
            "",
            "Left out: "
            + "; ".join(f"{name} {reason}" for name, reason in result["left_out"].items())
            + ".",
        ]
    for row in result["runs"]:
        if "error" in row:
            lines += [
                "",
                f"Failed: {result['variants'][row['variant']]['label']}, seed {row['seed']}: {row['error']}",
            ]
    return "\n".join(lines) + "\n"


def add_arguments(parser):
    width = max(map(len, PIECES)) + 2
    parser.epilog = "pieces:\n" + "\n".join(
        f"  {name:{width}}{piece.what}" for name, piece in PIECES.items()
    )
    parser.add_argument(
        "--only", nargs="+", default=(), metavar="NAME", help="these pieces instead of all"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="runs of every variant [3]"
    )
