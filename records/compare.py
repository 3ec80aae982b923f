"""Runs side by side, ours and the field's: ./run.sh records compare."""

import dataclasses
import itertools
import math
import statistics
import string
from pathlib import Path

from base import InputError, to_json

from .metrics import VAL_LOSS, lower_is_better, meets, unit
from .read import RUN_HELP, read_runs
from .several import differences, notes, spread, table


def add_arguments(parser):
    parser.description = """\
Runs side by side. Each argument is one column: a run, or a folder whose runs are repetitions
of one another.

Times to a loss are read off straight lines between validations. A speed-up is the ratio of
the (geometric) mean times to the lowest loss that every run reached, or to their common
target, first column over this; its 95% interval is Welch's, on the logarithms, and needs two
runs or more on either side."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--json",
        action="store_true",
        help='print {"runs": [...]} and so on instead, an entry for each run',
    )


def run(args):
    """Print the comparison. Returns 0; raises InputError."""
    groups = {}
    for argument in args.runs:
        path = str(Path(argument))
        if path in groups:
            raise InputError(f"{path}: given twice; expected each group of runs once")
        groups[path] = read_runs(path)
    result = compare(groups)
    print(to_json(result, indent=1) if args.json else report(result))
    return 0


def compare(groups):
    """groups: {label: [Run, ...]}, the first being what the others are compared with. Returns a
    dict for JSON:

    runs: every run with its group; groups: means and spreads; loss: to which the speed-ups are;
    warnings: lines.
    """
    warnings = differences(groups, ("metric", "target", "data", "hardware", "world_size"))
    kept = {}
    for label, runs in groups.items():
        kept[label] = [r for r in runs if r.usable] or runs
        out = [r for r in runs if not r.usable]
        if out:
            line = out[0].ending
            if len(out) > 1:
                line += f", nor {len(out) - 1} more of {label}"
            if len(out) < len(runs):
                line += "; left out of the means"
            warnings.append(line)
    everyone = list(itertools.chain.from_iterable(kept.values()))
    warnings += notes(everyone)

    loss, levels = losses_of_interest(everyone)
    summaries = [summary(label, runs, levels) for label, runs in kept.items()]
    first = summaries[0]
    for s in summaries:
        s["speedup"] = ratio(first["times_to_loss_s"], s["times_to_loss_s"])
        s["time_ratio"] = ratio(first["times_s"], s["times_s"])

    # On unlike machines also by what their matrix products were measured to do
    if len({(r.hardware, r.world_size) for r in everyone}) > 1:
        unknown = []
        for label, runs in kept.items():
            if not all(r.matmul_rate for r in runs):
                unknown.append(label)
        if unknown:
            warnings.append(
                f"{unknown[0]} has no measured matmul rate, so there is no comparison per unit of "
                "it"
            )
        elif all(s["matmul_flops_to_loss"] for s in summaries):
            for s in summaries:
                s["speedup_per_matmul_rate"] = ratio(
                    first["matmul_flops_to_loss"], s["matmul_flops_to_loss"]
                )
    listed = []
    for label, runs in groups.items():
        listed += [dict(group=label, **as_dict(r)) for r in runs]
    return dict(runs=listed, groups=summaries, loss=loss, warnings=warnings)


def losses_of_interest(runs):
    """(loss, levels): the loss to which runs are compared, None where there is none, and the
    losses on the way there, the last being it."""
    if len({r.metric for r in runs}) > 1 or not all(r.val for r in runs):
        return None, []
    metric = runs[0].metric
    if lower_is_better(metric):  # the best loss that every run reached
        loss = max(min(p.loss for p in r.val) for r in runs)
    else:
        loss = min(max(p.loss for p in r.val) for r in runs)
    targets = {r.target for r in runs}
    if len(targets) == 1:
        target = targets.pop()
        if target is not None and meets(loss, target, metric):
            loss = target
    if not math.isfinite(loss):
        return loss, []
    return loss, [*losses_on_the_way(runs, loss), loss]


def losses_on_the_way(runs, end):
    """A handful of round losses that every run passed, from the highest down to above `end`."""
    firsts = []
    for r in runs:
        later = [p.loss for p in r.val if p.step]
        firsts.append(later[0] if later else end)
    start = min(firsts)
    if not end < start < math.inf:
        return []

    # About six of them, a round step apart: 1, 2 or 5 times a power of ten
    rough = (start - end) / 6
    power = 10 ** math.floor(math.log10(rough))
    for factor in (1, 2, 5, 10):
        step = power * factor
        if step >= rough:
            break
    multiples = range(math.floor(start / step), math.floor(end / step), -1)
    levels = [round(k * step, 10) for k in multiples]
    return [level for level in levels if end < level <= start]


def summary(label, runs, levels):
    """Numbers of one group; lists have an entry for each run that has the number. levels:
    losses, the last being the one to which the speed-up is."""
    # When each level was reached, of the runs that came there
    time_to = []
    for level in levels:
        times = [r.time_to(level) for r in runs]
        times = [t for t in times if t is not None]
        time_to.append(dict(loss=level, times_s=times, n=len(runs)))
    times_to_loss = time_to[-1]["times_s"] if time_to else []
    if len(times_to_loss) < len(runs):  # not all got there
        times_to_loss = []

    # The same time in FLOPs that the machine could have done meanwhile
    rates = [r.matmul_rate for r in runs]
    flops = []
    if all(rates):
        flops = [t * rate for t, rate in zip(times_to_loss, rates)]
    return dict(
        group=label,
        n=len(runs),
        hardware=sorted({f"{r.world_size or '?'} x {r.hardware}" for r in runs if r.hardware}),
        metric=runs[0].metric,
        losses=[r.final_loss for r in runs if r.final_loss is not None],
        times_s=[r.time_s for r in runs if r.time_s is not None and r.usable],
        steps=[r.steps for r in runs],
        tokens=[r.tokens for r in runs if r.tokens is not None],
        tokens_per_s=[r.tokens / r.time_s for r in runs if r.tokens is not None and r.time_s],
        time_to=time_to,
        times_to_loss_s=times_to_loss,
        matmul_flops_to_loss=flops,
    )


def ratio(before, after):
    """before / after of positive numbers: dict(ratio of geometric means, low and high of its 95%
    interval or None)."""
    if not before or not after:
        return None
    values = [*before, *after]
    if min(values) <= 0 or not all(map(math.isfinite, values)):
        return None
    a = [math.log(x) for x in before]
    b = [math.log(x) for x in after]
    result = dict(ratio=math.exp(statistics.fmean(a) - statistics.fmean(b)), low=None, high=None)
    if before is not after and len(a) > 1 and len(b) > 1:
        if statistics.stdev(a) > 0 or statistics.stdev(b) > 0:
            from scipy.stats import ttest_ind

            interval = ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
            result["low"] = math.exp(float(interval.low))
            result["high"] = math.exp(float(interval.high))
    return result


def report(result):
    """The comparison as text."""
    groups = result["groups"]
    loss = result["loss"]
    # The groups by letter
    letters = string.ascii_uppercase
    names = [*letters[: len(groups)], *(f"#{i + 1}" for i in range(len(letters), len(groups)))]
    columns = []
    for name, g in zip(names, groups):
        runs = f"{g['n']} run" if g["n"] == 1 else f"{g['n']} runs"
        columns.append([name, g["group"], runs, ", ".join(g["hardware"]) or "hardware ?"])

    # What was measured; a row that nobody has is left out
    rows = [
        ["", *names],
        ["training time, s", *(spread(g["times_s"], ".3f") for g in groups)],
        ["steps", *(spread(g["steps"], ",.0f") for g in groups)],
        ["tokens", *(spread(g["tokens"], ",.0f") for g in groups)],
        ["tokens/s", *(spread(g["tokens_per_s"], ",.0f") for g in groups)],
        ["last loss", *(last_loss(g) for g in groups)],
    ]
    rows = [row for row in rows if {*row[1:]} != {"-"}]
    for i, to in enumerate(groups[0]["time_to"]):
        label = f"time to {to['loss']:.5g}{' (all got there)' * (to['loss'] == loss)}, s"
        rows.append([label, *(time_to(g["time_to"][i]) for g in groups)])

    # Against the first
    others = groups[1:]
    if others and loss is not None:
        rows.append([f"speed-up to {loss:.5g}", "1", *(times(g["speedup"]) for g in others)])
    if others:
        label = "speed-up, whole run, at any loss"
        rows.append([label, "1", *(times(g["time_ratio"]) for g in others)])
    if others and "speedup_per_matmul_rate" in groups[0]:
        row = ["time to it x matmul rate, PFLOP"]
        for g in groups:
            row.append(spread([flops / 1e15 for flops in g["matmul_flops_to_loss"]], ".4g"))
        rows.append(row)
        label = "speed-up per unit of matmul rate"
        rows.append([label, "1", *(times(g["speedup_per_matmul_rate"]) for g in others)])

    lines = [table(columns), "", table(rows)]
    if result["warnings"]:
        lines += ["", *(f"warning: {w}" for w in result["warnings"])]
    if others and any(g["n"] < 2 for g in groups):
        lines.append(
            "no interval where a side has a single run: how much of the difference is chance is "
            "not known"
        )
    return "\n".join(lines)


def last_loss(g):
    """Of a group, with its unit unless that is what losses usually are in."""
    loss = spread(g["losses"], ".5f")
    if g["losses"] and g["metric"] != VAL_LOSS:
        loss += f" {unit(g['metric']).replace(' per ', '/')}"
    return loss


def time_to(entry):
    """Times to a loss, and how many runs came there if not all did."""
    reached = len(entry["times_s"])
    said = spread(entry["times_s"], ".3f")
    if 0 < reached < entry["n"]:
        said += f" ({reached} of {entry['n']})"
    return said


def times(r):
    """A ratio and its interval."""
    if r is None:
        return "-"
    said = f"{r['ratio']:.3f}"
    if r["low"] is not None:
        said += f" ({r['low']:.3f} to {r['high']:.3f})"
    return said


def as_dict(run):
    """A Run for JSON, without its training points."""
    flat = {f.name: getattr(run, f.name) for f in dataclasses.fields(run)}
    del flat["train"]
    flat["val"] = [p._asdict() for p in run.val]
    flat["stopped_early"] = run.stopped_early
    return flat
