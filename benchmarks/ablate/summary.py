"""What runs of variants say beside those of the base with the same seeds: numbers, and tables of
them."""

import math
import statistics

from benchmarks.report import bracketed, document, number, spread, table
from records.metrics import unit
from records.runs import Point, Run

from .pieces import BASE

CONFIDENCE = 0.95
EXACT = "params", "flops_per_token"  # the same from every seed

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


# --- numbers


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
            row |= beside_base(both, metric)
            if target is not None:
                row["target_ratio"] = None
                pairs = [(time_to(a, metric, target), time_to(b, metric, target)) for a, b in both]
                # A ratio over the seeds that made it would be one over the lucky ones
                if len(both) == len(made) and all(None not in pair for pair in pairs):
                    row["target_ratio"] = ratio(pairs)
        for key in EXACT:
            row[key] = next((r.get(key) for r in mine.values()), None)
        summary[name] = row
    pool(summary)
    return summary


def beside_base(both, metric):
    """What (a variant's run, the base's) of each seed say together."""
    losses = [(final(a, metric), final(b, metric)) for a, b in both]
    cpu_ratio = None
    if all("cpu_ms_per_step" in r for pair in both for r in pair):
        cpu_ratio = spread(a["cpu_ms_per_step"] / b["cpu_ms_per_step"] for a, b in both)
    return dict(
        difference=difference(losses),
        by_seed=[a - b for a, b in losses],
        cpu_ratio=cpu_ratio,
        step_ratio=spread(a["ms_per_step"] / b["ms_per_step"] for a, b in both),
    )


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


# --- tables


def interval(x, form, sign=""):
    """A mean with its interval, where it has one."""
    if x is None:
        return ""
    mean = format(x["mean"], sign + form)
    if x["low"] is None:
        return mean
    return f"{mean} [{x['low']:{sign}{form}}, {x['high']:{sign}{form}}]"


def label_of(v):
    """What a variant is, and which options it changes to what."""
    changed = ", ".join(f"{key}={shown(x)}" for key, x in v["fields"].items())
    return f"{v['what']} ({changed})" if changed else v["what"]


def shown(x):
    """A field's value in the table."""
    if isinstance(x, list | tuple):
        return " ".join(map(str, x)) or "none"
    if isinstance(x, float):
        return f"{x:.3g}"
    return x


def table_of_pieces(result, names):
    """Losses, the time of a step, and the time to the target if there is one."""
    target = result["target"]
    header = ["", f"{result['metric']} at the end", "difference", "ms/step", "ratio"]
    if target is not None:
        header += ["s to target", "ratio"]
    rows = []
    for name in names:
        row = result["summary"][name]
        v = result["variants"][name]
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
        rows.append([*cells, label_of(v)])
    return table([*header, ""], rows)


def table_of_parts(result, names):
    """The same at parity's shape, where a step's time is the CPU's: each seed's difference, and
    what a variant has more than the base."""
    header = ["", "by seed", "mean", "±", "CPU ratio", "parameters", "FLOPs a token", ""]
    summary = result["summary"]
    base = summary[BASE]
    rows = []
    for name in names:
        row = summary[name]
        v = result["variants"][name]
        if name == BASE:
            sd = "" if row["sd"] is None else f" (sd {row['sd']:.4f})"
            cells = [v["label"], number(row["loss"], ".4f") + sd, "", "", ""]
            cells += [number(row["params"], ","), number(row["flops_per_token"], ",.0f")]
            rows.append([*cells, v["what"]])
            continue
        more = [None if None in (row[k], base[k]) else row[k] - base[k] for k in EXACT]
        rows.append(
            [
                v["label"],
                ", ".join(format(x, "+.4f") for x in row["by_seed"]),
                interval(row["difference"], ".4f", "+"),
                number(row.get("pooled"), ".4f"),
                bracketed(row["cpu_ratio"], ".3f"),
                *(number(x, "+,.0f") for x in more),
                label_of(v),
            ]
        )
    return table(header, rows)


def render(result):
    """A row for each variant, worst loss first: what is lost without it, or won with it."""
    metric = result["metric"]
    target = result["target"]
    summary = result["summary"]
    where = result["settings"]
    seeds = {r["seed"] for r in result["runs"]}
    tokens = sorted({r["tokens"] for r in result["runs"] if "error" not in r})
    goal = "" if target is None else f", target {target:g}"

    def key(name):
        found = summary[name].get("difference")
        return name != BASE, -found["mean"] if found else -math.inf

    make_table = table_of_parts if "shape" in result else table_of_pieces
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
        make_table(result, sorted(summary, key=key)),
        result["statement"],
        "**One seed has no interval: --seeds 3 or more.**" if len(seeds) < 2 else "",
        f"Left out: {left_out}." if left_out else "",
        *failed,
    )
