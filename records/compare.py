"""Tests and compares runs, ours and the field's: python -m records check and compare."""

import bisect
import dataclasses
import math
import statistics
from collections import Counter
from pathlib import Path

from base import InputError, to_json

from .read import read_runs

ALPHA = 0.01  # the public record's
APART = (
    "seed",
    "run_dir",
    "cache_dir",
    "text",
    "gpus",
    "repeat",
    "micro_tokens",
    "recompute",
    "sample_tokens",
    "resume",
    "checkpoint_every",
    "keep_last",
    "keep_best",
    "max_restarts",
)  # not the recipe
RUN_HELP = "a run's folder, a log (ours, modded-nanogpt's, llm.c's, nanoGPT's, nanochat's), or a folder of those"


# --------------------------------------------------------------------------------------------------
# check


def check_add_arguments(parser):
    parser.description = f"""\
Is the mean validation loss of a recipe below its target, beyond chance? A one-sided t-test on runs that differ in the
seed alone; it passes with p < {ALPHA}. Exit status: 0 passed, 1 failed, 2 bad input.

Runs that stop at their first validation at or below the target have last losses below it by construction, which prove
nothing about the mean. Of those, the losses of all runs are tested at the step where the first of them stopped, and p
is multiplied by the number of validations at which that could have happened. Runs of a fixed length (--steps N
--eval-every N) have nothing to make good for."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--target", type=float, metavar="LOSS", help="loss to be below [the runs' own]"
    )


def check_run(args):
    """Print the runs, their statistics and a verdict. Returns 0 if it passed, 1 if not; raises
    InputError."""
    runs = gather(args.runs)
    target = the_target(runs) if args.target is None else args.target
    if not math.isfinite(target):
        raise InputError(f"--target {target}: expected a finite number")
    left_out = [r for r in runs if not usable(r)]
    runs = [r for r in runs if usable(r)]
    if not runs:
        raise InputError(f"{ending(left_out[0])}, and there is no other; expected finished runs")
    same_recipe(runs)

    metric, early = runs[0].metric, [r for r in runs if r.stopped_early]
    losses, step, looks = losses_to_test(runs)
    rows = [
        ["run", "steps", f"last {metric}", *([f"at step {step}"] if early else []), "time s", ""]
    ]
    for r, loss in zip(runs, losses):
        rows.append(
            [
                r.where,
                f"{r.steps}/{r.total_steps or '?'}",
                f"{r.final_loss:.5f}",
                *([f"{loss:.5f}"] if early else []),
                "-" if r.time_s is None else f"{r.time_s:.3f}",
                "stopped early" if r.stopped_early else "",
            ]
        )
    print(table(rows))
    print()
    if early:
        print(
            f"note: {len(early)} of {len(runs)} runs stopped before their last step, as they do at the first "
            "validation at or below the target: their last losses are low by selection, and a test of those proves "
            f"nothing. Tested are the losses of all at step {step}, where the first of them stopped, with p times "
            f"the {looks} validations planned. Better: runs of a fixed length, --steps N --eval-every N"
        )
    for r in left_out:
        print(f"left out: {ending(r)}")
    for line in differences({r.where: [r] for r in runs}, ("hardware", "world_size", "git_commit")):
        print(f"warning: {line}")
    for note, count in Counter(note for r in runs for note in r.notes).items():
        print(f"note: {note}" + f" ({count} runs)" * (count > 1))

    test = t_test(losses, target, looks)
    times = [r.time_s for r in runs if r.time_s is not None]
    print(
        f"n {len(losses)}, mean {test.mean:.5f}"
        + ("" if test.sd is None else f", sd {test.sd:.5f}")
        + f", target {target:g}"
        + ("" if test.p is None else f", t {test.t:.3f}, p {test.p:.2g}")
    )
    what = "training time" if len(early) < len(runs) else "time until they stopped"
    print(f"{what} {spread(times, '.3f')} s" if times else "the logs have no clock")
    print(verdict(test, target, f"{metric}{f' at step {step}' if early else ''}", len(left_out)))
    return 0 if test.passed else 1


def losses_to_test(runs):
    """(losses, step, by how much to multiply p). Without early stops the last losses, None and 1.

    A run that stops at its first validation at or below the target has a last loss below it by
    construction. At the step where the first of them stopped every run still has a loss, and
    nothing has been selected but the step itself, one of the planned validations: a Bonferroni
    correction by their number pays for that.
    """
    early = [r for r in runs if r.stopped_early]
    if not early:
        return [r.final_loss for r in runs], None, 1
    first = min(early, key=lambda r: r.steps)
    losses = [next((p.loss for p in r.val if p.step == first.steps), None) for r in runs]
    if None in losses:
        raise InputError(
            f"{runs[losses.index(None)].where}: has no validation at step {first.steps}, where "
            f"{first.where} stopped; expected validations at the same steps in all"
        )
    return losses, first.steps, validations(runs)


@dataclasses.dataclass
class TTest:
    """Of losses against a target. None: there is no such number."""

    n: int
    mean: float
    sd: float | None
    t: float | None
    p: float | None
    more: int | None  # further runs until p < ALPHA, if they had the same mean and sd

    @property
    def passed(self):
        return self.p is not None and self.p < ALPHA


def t_test(losses, target, looks=1):
    """One-sided, one-sample t-test: how likely is a mean this low if the true one is `target`?
    losses: floats.

    looks: p is multiplied by it (Bonferroni), for a step that was chosen among so many. Two equal
    losses or one have no spread and no p.
    """
    from scipy import stats

    n, mean = len(losses), math.fsum(losses) / len(losses)
    if n < 2 or not math.isfinite(mean) or max(losses) == min(losses):
        sd = statistics.stdev(losses) if n > 1 and math.isfinite(mean) else None
        return TTest(n, mean, sd, None, None, None)
    sd = statistics.stdev(losses)
    result = stats.ttest_1samp(losses, target, alternative="less")

    def enough(m):  # runs of this mean and sd
        return looks * stats.t.cdf((mean - target) / (sd / math.sqrt(m)), m - 1) < ALPHA

    most = 10**6
    more = bisect.bisect_left(range(n, most), True, key=enough) if mean < target else None
    return TTest(
        n,
        mean,
        sd,
        float(result.statistic),
        min(1.0, looks * float(result.pvalue)),
        None if more == most - n else more,
    )


def verdict(test, target, what, left_out):
    """The result in one line."""
    mean = (
        f"mean {what} of {test.n} run{'s' * (test.n > 1)}"
        + f" ({left_out} that did not end left out)" * (left_out > 0)
        + f", {test.mean:.5f}, is"
    )
    if test.passed:
        return f"pass: the {mean} below {target:g} with p = {test.p:.2g} < {ALPHA}"
    if not test.mean < target:
        return f"fail: the {mean} not below {target:g}"
    if test.p is None:
        why = "one run shows no spread" if test.n == 1 else "the losses show no spread"
        return f"fail: the {mean} below {target:g}, but {why}, so there is nothing to test with; run more seeds"
    more = f"; at this mean and sd {test.more} more would do" if test.more else ""
    return f"fail: the {mean} below {target:g} with p = {test.p:.2g}, not < {ALPHA}{more}"


def the_target(runs):
    """The runs' own target. Raises InputError where they have none or several."""
    targets = {r.target: r for r in runs}
    if len(targets) > 1:
        (a, first), (b, second) = list(targets.items())[:2]
        raise InputError(
            f"{first.where} has target {a}, {second.where} {b}; say which with --target"
        )
    if None in targets:
        raise InputError(
            f"{runs[0].where}: names no target; give one with --target, such as --target 3.28"
        )
    return runs[0].target


def usable(run):
    """Whether its last loss is that of its end. A log that does not say where its run would end
    has to be believed."""
    return run.final_loss is not None and (run.finished is not False or run.stopped_early)


def ending(run):
    """What kept a run from being usable."""
    if run.final_loss is None:
        return f"{run.where} has no validation"
    return f"{run.where} did not end (last step {run.steps} of {run.total_steps})"


def same_recipe(runs):
    """Raises InputError unless the runs differ in their seed alone."""
    first, seen = runs[0], {}
    for r in runs:
        for name in ("metric", "total_steps", "data", "track"):
            if getattr(r, name) != getattr(first, name):
                raise InputError(
                    f"{first.where} and {r.where}: {name} differs ({getattr(first, name)} and "
                    f"{getattr(r, name)}); expected runs of one recipe, check others apart"
                )
        for name in sorted(first.config.keys() | r.config.keys()):
            if name not in APART and first.config.get(name) != r.config.get(name):
                raise InputError(
                    f"{first.where} and {r.where}: {name} differs ({first.config.get(name)} and "
                    f"{r.config.get(name)}); expected runs of one recipe, check others apart"
                )
        if r.seed is not None and r.seed in seen:
            raise InputError(
                f"{seen[r.seed]} and {r.where}: both have seed {r.seed}; expected a seed for each, a "
                "repetition says little about chance"
            )
        if tuple(r.val) in seen:
            raise InputError(
                f"{seen[tuple(r.val)]} and {r.where}: the same losses and times; expected each run once"
            )
        seen |= {tuple(r.val): r.where} | ({} if r.seed is None else {r.seed: r.where})


def validations(runs):
    """At how many steps the longest of the runs would have been validated, had none stopped it."""
    longest = max(runs, key=lambda r: r.steps)
    steps = [0, *(p.step for p in longest.val if p.step)]
    every = longest.config.get("eval_every")
    every = every if isinstance(every, int) and every > 0 else steps[-1] - steps[-2]
    return len(steps) - 1 + -(-(longest.total_steps - steps[-1]) // every)


# --------------------------------------------------------------------------------------------------
# compare


def add_arguments(parser):
    parser.description = """\
Runs side by side. Each argument is one column: a run, or a folder whose runs are repetitions of one another. Times to a
loss are read off straight lines between validations. A speed-up is the ratio of the (geometric) mean times to the
lowest loss that every run reached, or to their common target, first column over this; its 95% interval is Welch's, on
the logarithms, and needs two runs or more on either side."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--json",
        action="store_true",
        help='print {"runs": [...]} and so on instead, a run an entry',
    )


def run(args):
    """Print the comparison. Returns 0; raises InputError."""
    groups = {}
    for path in map(str, map(Path, args.runs)):
        if path in groups:
            raise InputError(f"{path}: given twice; expected each group of runs once")
        groups[path] = read_runs(path)
    result = compare(groups)
    if args.json:
        print(to_json(result, indent=1))
    else:
        print(report(result))
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
        kept[label] = [r for r in runs if usable(r)] or runs
        out = [r for r in runs if not usable(r)]
        if out:
            warnings.append(
                ending(out[0])
                + f", nor {len(out) - 1} more of {label}" * (len(out) > 1)
                + ("" if len(out) == len(runs) else "; left out of the means")
            )
    everyone = [r for runs in kept.values() for r in runs]
    for note, count in Counter(note for r in everyone for note in r.notes).items():
        warnings.append(note + f" ({count} runs)" * (count > 1) if len(everyone) > 1 else note)

    loss, levels = None, []
    if len({r.metric for r in everyone}) == 1 and all(r.val for r in everyone):
        targets, best = (
            {r.target for r in everyone},
            max(min(p.loss for p in r.val) for r in everyone),
        )
        target = targets.pop() if len(targets) == 1 else None
        loss = target if target is not None and best <= target else best
        levels = [*losses_on_the_way(everyone, loss), loss] if math.isfinite(loss) else []
    summaries = [summary(label, runs, levels) for label, runs in kept.items()]
    first = summaries[0]
    for s, runs in zip(summaries, kept.values()):
        s["speedup"] = ratio(first["times_to_loss_s"], s["times_to_loss_s"])
        s["time_ratio"] = ratio(first["times_s"], s["times_s"])
    if len({(r.hardware, r.world_size) for r in everyone}) > 1:
        missing = [label for label, runs in kept.items() if not all(r.matmul_rate for r in runs)]
        if missing:
            warnings.append(
                f"{missing[0]} has no measured matmul rate, so there is no comparison per unit of it"
            )
        elif all(s["matmul_flops_to_loss"] for s in summaries):
            for s in summaries:
                s["speedup_per_matmul_rate"] = ratio(
                    first["matmul_flops_to_loss"], s["matmul_flops_to_loss"]
                )
    listed = [dict(group=label, **as_dict(r)) for label, runs in groups.items() for r in runs]
    return dict(runs=listed, groups=summaries, loss=loss, warnings=warnings)


def summary(label, runs, levels):
    """Numbers of one group; lists have an entry for each run that has the number. levels:
    losses, the last being the one to which the speed-up is."""
    to = [[t for r in runs if (t := r.time_to(level)) is not None] for level in levels]
    times = to[-1] if levels and len(to[-1]) == len(runs) else []
    rates = [r.matmul_rate for r in runs]
    return dict(
        group=label,
        n=len(runs),
        hardware=sorted({f"{r.world_size or '?'} x {r.hardware}" for r in runs if r.hardware}),
        metric=runs[0].metric,
        losses=[r.final_loss for r in runs if r.final_loss is not None],
        times_s=[r.time_s for r in runs if r.time_s is not None and usable(r)],
        steps=[r.steps for r in runs],
        tokens=[r.tokens for r in runs if r.tokens is not None],
        tokens_per_s=[r.tokens / r.time_s for r in runs if r.tokens is not None and r.time_s],
        time_to=[dict(loss=level, times_s=t, n=len(runs)) for level, t in zip(levels, to)],
        times_to_loss_s=times,
        matmul_flops_to_loss=[t * rate for t, rate in zip(times, rates)]
        if times and all(rates)
        else [],
    )


def ratio(before, after):
    """before / after of positive numbers: dict(ratio of geometric means, low and high of its 95%
    interval or None)."""
    if (
        not before
        or not after
        or min(*before, *after) <= 0
        or not all(map(math.isfinite, [*before, *after]))
    ):
        return None
    a, b = ([math.log(x) for x in values] for values in (before, after))
    middle = statistics.fmean(a) - statistics.fmean(b)
    low = high = None
    if (
        before is not after
        and len(a) > 1
        and len(b) > 1
        and max(statistics.stdev(a), statistics.stdev(b)) > 0
    ):
        from scipy.stats import ttest_ind

        low, high = map(float, ttest_ind(a, b, equal_var=False).confidence_interval(0.95))
    return dict(
        ratio=math.exp(middle),
        low=None if low is None else math.exp(low),
        high=None if high is None else math.exp(high),
    )


def losses_on_the_way(runs, end):
    """A handful of round losses that every run passed, from the highest down to above `end`."""
    start = min(next((p.loss for p in r.val if p.step), end) for r in runs)
    if not end < start < math.inf:
        return []
    rough = (start - end) / 6
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    levels = [
        round(k * step, 10) for k in range(math.floor(start / step), math.floor(end / step), -1)
    ]
    return [level for level in levels if end < level <= start]


def report(result):
    """The comparison as text."""
    groups, loss = result["groups"], result["loss"]
    names = [chr(ord("A") + i) if i < 26 else f"#{i + 1}" for i in range(len(groups))]
    lines = [
        table(
            [
                [
                    name,
                    g["group"],
                    f"{g['n']} run{'s' * (g['n'] > 1)}",
                    ", ".join(g["hardware"]) or "hardware ?",
                ]
                for name, g in zip(names, groups)
            ]
        ),
        "",
    ]
    rows = [
        ["", *names],
        ["training time, s", *(spread(g["times_s"], ".3f") for g in groups)],
        ["steps", *(spread(g["steps"], ",.0f") for g in groups)],
        ["tokens", *(spread(g["tokens"], ",.0f") for g in groups)],
        ["tokens/s", *(spread(g["tokens_per_s"], ",.0f") for g in groups)],
        [
            "last loss",
            *(
                spread(g["losses"], ".5f")
                + " bits/byte" * (g["metric"] == "val_bpb" and g["losses"] != [])
                for g in groups
            ),
        ],
    ]
    rows = [row for row in rows if {*row[1:]} != {"-"}]
    for i, to in enumerate(groups[0]["time_to"]):
        rows.append(
            [
                f"time to {to['loss']:.5g}{' (all got there)' * (to['loss'] == loss)}, s",
                *(
                    spread(t["times_s"], ".3f")
                    + f" ({len(t['times_s'])} of {t['n']})" * (0 < len(t["times_s"]) < t["n"])
                    for t in (g["time_to"][i] for g in groups)
                ),
            ]
        )
    if len(groups) > 1:
        if loss is not None:
            rows.append(
                [f"speed-up to {loss:.5g}", "1", *(times(g["speedup"]) for g in groups[1:])]
            )
        rows.append(
            ["speed-up, whole run, at any loss", "1", *(times(g["time_ratio"]) for g in groups[1:])]
        )
        if "speedup_per_matmul_rate" in groups[0]:
            rows.append(
                [
                    "time to it x matmul rate, PFLOP",
                    *(spread([f / 1e15 for f in g["matmul_flops_to_loss"]], ".4g") for g in groups),
                ]
            )
            rows.append(
                [
                    "speed-up per unit of matmul rate",
                    "1",
                    *(times(g["speedup_per_matmul_rate"]) for g in groups[1:]),
                ]
            )
    lines += (
        [table(rows)]
        + [""] * bool(result["warnings"])
        + [f"warning: {w}" for w in result["warnings"]]
    )
    if len(groups) > 1 and any(g["n"] < 2 for g in groups):
        lines.append(
            "no interval where a side has a single run: how much of the difference is chance is not known"
        )
    return "\n".join(lines)


def times(r):
    if r is None:
        return "-"
    return f"{r['ratio']:.3f}" + (
        f" ({r['low']:.3f} to {r['high']:.3f})" if r["low"] is not None else ""
    )


def as_dict(run):
    """A Run for JSON, without its training points."""
    flat = {f.name: getattr(run, f.name) for f in dataclasses.fields(run) if f.name != "train"}
    return flat | dict(val=[p._asdict() for p in run.val], stopped_early=run.stopped_early)


# --------------------------------------------------------------------------------------------------
# Both


def gather(paths):
    """Runs of all paths, each once. Raises InputError."""
    runs = {r.where: r for path in paths for r in read_runs(path)}
    return list(runs.values())


def differences(groups, names):
    """A line for each of these in which the runs of the groups differ, or are not known to
    agree."""
    found = []
    for name in names:
        first = {}  # value -> where it is first met
        for label, runs in groups.items():
            for r in runs:
                value = getattr(r, name) if hasattr(r, name) else r.environment.get(name)
                first.setdefault("unknown" if value is None else str(value), label)
        if len(first) > 1:
            said = ", ".join(f"{value} in {label}" for value, label in list(first.items())[:3])
            found.append(f"{name.replace('_', ' ')} differs: {said}" + " ..." * (len(first) > 3))
    return found


def spread(values, form):
    """Mean and, of several that differ, standard deviation."""
    if not values:
        return "-"
    mean = math.fsum(values) / len(values)
    differ = len(values) > 1 and max(values) > min(values)
    return f"{mean:{form}}" + (f" +- {statistics.stdev(values):{form}}" if differ else "")


def table(rows):
    """Rows of strings in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
    )
