"""Tests and compares runs, ours and the field's: ./run.sh records check and compare."""

import bisect
import dataclasses
import itertools
import math
import statistics
import string
from collections import Counter
from pathlib import Path

from base import InputError, to_json

from .metrics import VAL_LOSS, lower_is_better, meets, unit
from .read import read_runs
from .source import check as check_source

ALPHA = 0.01  # the public record's
# Fields of the configuration that are not the recipe: where a run is kept, how it is kept alive,
# how its work is divided
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
    "sample_every",
    "sample_prompts",
    "resume",
    "extend",
    "vocabulary",
    "checkpoint_every",
    "keep_last",
    "keep_best",
    "max_restarts",
)
RUN_HELP = (
    "a run's folder, a log (ours, modded-nanogpt's, llm.c's, nanoGPT's, nanochat's), or a folder "
    "of those"
)


# --------------------------------------------------------------------------------------------------
# check


def check_add_arguments(parser):
    parser.description = f"""\
Is the mean validation loss of a recipe below its target, beyond chance? A one-sided t-test
on runs that differ in the seed alone; it passes with p < {ALPHA}. Exit status: 0 passed,
1 failed, 2 bad input.

Of runs of ours it also says whether their source is proved: whether each log names the
digest of the archive beside it, in the run's folder or the record's.

Runs that stop at their first validation at or below the target have last losses below it by
construction, which prove nothing about the mean. Of those, the losses of all runs are tested
at the step where the first of them stopped, and p is multiplied by the number of validations
at which that could have happened. Runs of a fixed length (--steps N --eval-every N) have
nothing to make good for."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--target", type=float, metavar="LOSS", help="loss to be below [the runs' own]"
    )


def check_run(args):
    """Print the runs, their statistics and a verdict, for each recipe apart. Returns 0 if all
    passed, 1 if one did not; raises InputError."""
    if args.target is not None and not math.isfinite(args.target):
        raise InputError(f"--target {args.target}: expected a finite number")
    status = 0
    for i, paths in enumerate(recipes(args.runs)):
        if i:
            print()
        status = max(status, check(paths, args.target))
    return status


def recipes(paths):
    """[[path, ...], ...]: what is checked together. A track's folder holds records, which are
    recipes of their own; everything else is one."""
    together = []
    apart = []
    for path in paths:
        records = sorted(summary.parent for summary in Path(path).glob("*/summary.json"))
        if records:
            apart += [[record] for record in records]
        else:
            together.append(path)
    return [together, *apart] if together else apart


def check(paths, target=None):
    """The same for runs of one recipe; target: theirs if None."""
    runs = gather(paths)
    if target is None:
        target = the_target(runs)

    # Only runs that came to their end count; of one recipe, each once, from the source they name
    left_out = [r for r in runs if not usable(r)]
    runs = [r for r in runs if usable(r)]
    if not runs:
        raise InputError(f"{ending(left_out[0])}, and there is no other; expected finished runs")
    same_recipe(runs)
    proved = proofs(runs)

    # The runs, and what to know about them
    metric = runs[0].metric
    early = [r for r in runs if r.stopped_early]
    losses, step, looks = losses_to_test(runs)
    print(table(check_rows(runs, losses, step)))
    print()
    if early:
        print(
            f"note: {len(early)} of {len(runs)} runs stopped before their last step, as they do at "
            "the first validation at or below the target: their last losses are low by selection, "
            "and a test of those proves nothing. Tested are the losses of all at step "
            f"{step}, where the first of them stopped, with p times the {looks} validations "
            "planned. Better: runs of a fixed length, --steps N --eval-every N"
        )
    for r in left_out:
        print(f"left out: {ending(r)}")
    for line in differences({r.where: [r] for r in runs}, ("hardware", "world_size", "git_commit")):
        print(f"warning: {line}")
    for line in notes(runs):
        print(f"note: {line}")
    for line in proved:
        print(line)

    # The test, the clock, the verdict
    test = t_test(losses, target, looks, metric)
    numbers = f"n {len(losses)}, mean {test.mean:.5f}"
    if test.sd is not None:
        numbers += f", sd {test.sd:.5f}"
    numbers += f", target {target:g}"
    if test.p is not None:
        numbers += f", t {test.t:.3f}, p {test.p:.2g}"
    print(numbers)
    times = [r.time_s for r in runs if r.time_s is not None]
    what = "training time" if len(early) < len(runs) else "time until they stopped"
    print(f"{what} {spread(times, '.3f')} s" if times else "the logs have no clock")
    tested = f"{metric} at step {step}" if early else metric
    print(verdict(test, target, tested, len(left_out), lower_is_better(metric)))
    return 0 if test.passed else 1


def check_rows(runs, losses, step):
    """The table of check. losses: those that are tested; step: where, None if at the end."""
    head = ["run", "steps", f"last {runs[0].metric}", "time s", ""]
    if step is not None:
        head.insert(3, f"at step {step}")
    rows = [head]
    for r, loss in zip(runs, losses):
        time = "-" if r.time_s is None else f"{r.time_s:.3f}"
        early = "stopped early" if r.stopped_early else ""
        row = [r.where, f"{r.steps}/{r.total_steps or '?'}", f"{r.final_loss:.5f}", time, early]
        if step is not None:
            row.insert(3, f"{loss:.5f}")
        rows.append(row)
    return rows


def proofs(runs):
    """Lines about whether logs of ours belong to their source. Raises InputError where a log and
    the archive beside it contradict each other."""
    proved = {}  # digest -> [runs, the archive of the first]
    lines = []
    for r in runs:
        if r.dialect != "stopwatch":
            continue
        folder = Path(r.path)  # of the run, or that its log lies in
        if not folder.is_dir():
            folder = folder.parent
        if not r.sources:
            lines.append(
                f"note: {r.where} names no archive of its source: logs of before 2026-12 begin "
                "with its text"
            )
        for name, digest in r.sources:
            archive = check_source(folder, name, digest)
            if archive is None:
                lines.append(
                    f"warning: {r.where} names {name}, which is not beside it, so nothing proves "
                    "from which source it ran"
                )
            else:
                proved.setdefault(digest, [0, archive])[0] += 1
    for digest, (count, archive) in proved.items():
        logs = f"the logs of {count} runs name" if count > 1 else "the log names"
        lines.append(f"source: {logs} sha256 {digest[:16]}..., and that is {archive}")
    return lines


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
    losses = []
    for r in runs:
        there = [p.loss for p in r.val if p.step == first.steps]
        if not there:
            raise InputError(
                f"{r.where}: has no validation at step {first.steps}, where {first.where} "
                "stopped; expected validations at the same steps in all"
            )
        losses.append(there[0])
    return losses, first.steps, validations(runs)


@dataclasses.dataclass
class TTest:
    """Of losses against a target. None: there is no such number."""

    n: int
    mean: float
    sd: float | None = None
    t: float | None = None
    p: float | None = None
    more: int | None = None  # further runs until p < ALPHA, if they had the same mean and sd

    @property
    def passed(self):
        return self.p is not None and self.p < ALPHA


def t_test(losses, target, looks=1, metric=VAL_LOSS):
    """One-sided, one-sample t-test: how likely is a mean this low if the true one is `target`?
    losses: floats; of a metric of which higher is better, a mean this high.

    looks: p is multiplied by it (Bonferroni), for a step that was chosen among so many. Two equal
    losses or one have no spread and no p.
    """
    from scipy import stats

    n = len(losses)
    mean = math.fsum(losses) / n
    if n < 2 or not math.isfinite(mean):
        return TTest(n, mean)
    sd = statistics.stdev(losses)
    if max(losses) == min(losses):
        return TTest(n, mean, sd)
    lower = lower_is_better(metric)
    result = stats.ttest_1samp(losses, target, alternative="less" if lower else "greater")
    p = min(1.0, looks * float(result.pvalue))
    test = TTest(n, mean, sd, float(result.statistic), p)
    gap = mean - target if lower else target - mean  # negative: on the right side

    def enough(m):  # runs of this mean and sd
        return looks * stats.t.cdf(gap / (sd / math.sqrt(m)), m - 1) < ALPHA

    most = 10**6
    if gap < 0:
        more = bisect.bisect_left(range(n, most), True, key=enough)
        test.more = more if more < most - n else None
    return test


def verdict(test, target, what, left_out, lower=True):
    """The result in one line. lower: whether lower is better."""
    runs = f"{test.n} run" if test.n == 1 else f"{test.n} runs"
    if left_out:
        runs += f" ({left_out} that did not end left out)"
    mean = f"the mean {what} of {runs}, {test.mean:.5f}, is"
    side = "below" if lower else "above"
    if test.passed:
        return f"pass: {mean} {side} {target:g} with p = {test.p:.2g} < {ALPHA}"
    on_the_right_side = test.mean < target if lower else test.mean > target
    if not on_the_right_side:
        return f"fail: {mean} not {side} {target:g}"
    if test.p is None:
        why = "one run shows no spread" if test.n == 1 else "the losses show no spread"
        return (
            f"fail: {mean} {side} {target:g}, but {why}, so there is nothing to test with; run "
            "more seeds"
        )
    more = f"; at this mean and sd {test.more} more would do" if test.more else ""
    return f"fail: {mean} {side} {target:g} with p = {test.p:.2g}, not < {ALPHA}{more}"


def the_target(runs):
    """The runs' own target. Raises InputError where they have none or several."""
    targets = {}  # target -> the last run that has it
    for r in runs:
        targets[r.target] = r
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
    if run.final_loss is None:
        return False
    return run.finished is not False or run.stopped_early


def ending(run):
    """What kept a run from being usable."""
    if run.final_loss is None:
        return f"{run.where} has no validation"
    return f"{run.where} did not end (last step {run.steps} of {run.total_steps})"


def same_recipe(runs):
    """Raises InputError unless the runs differ in their seed alone."""
    first = runs[0]
    seeds = {}  # seed -> where it was met
    curves = {}  # validations -> where they were met

    def differ(r, name, a, b):
        raise InputError(
            f"{first.where} and {r.where}: {name} differs ({a} and {b}); expected runs of one "
            "recipe, check others apart"
        )

    for r in runs:
        for name in ("metric", "total_steps", "data", "track"):
            if getattr(r, name) != getattr(first, name):
                differ(r, name, getattr(first, name), getattr(r, name))
        for name in sorted(first.config.keys() | r.config.keys()):
            if name not in APART and first.config.get(name) != r.config.get(name):
                differ(r, name, first.config.get(name), r.config.get(name))

        if r.seed is not None and r.seed in seeds:
            raise InputError(
                f"{seeds[r.seed]} and {r.where}: both have seed {r.seed}; expected a seed for "
                "each, a repetition says little about chance"
            )
        seeds[r.seed] = r.where
        curve = tuple(r.val)
        if curve in curves:
            raise InputError(
                f"{curves[curve]} and {r.where}: the same losses and times; expected each run once"
            )
        curves[curve] = r.where


def validations(runs):
    """At how many steps the longest of the runs would have been validated, had none stopped it."""
    longest = max(runs, key=lambda r: r.steps)
    steps = [0, *(p.step for p in longest.val if p.step)]
    every = longest.config.get("eval_every")
    if not isinstance(every, int) or every <= 0:
        every = steps[-1] - steps[-2]
    to_come = math.ceil((longest.total_steps - steps[-1]) / every)
    return len(steps) - 1 + to_come


# --------------------------------------------------------------------------------------------------
# compare


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
        kept[label] = [r for r in runs if usable(r)] or runs
        out = [r for r in runs if not usable(r)]
        if out:
            line = ending(out[0])
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
        times_s=[r.time_s for r in runs if r.time_s is not None and usable(r)],
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


# --------------------------------------------------------------------------------------------------
# Both


def gather(paths):
    """Runs of all paths, each once. Raises InputError."""
    runs = {}
    for path in paths:
        for r in read_runs(path):
            runs[r.where] = r
    return list(runs.values())


def notes(runs):
    """The notes of all runs, each once, with the number of runs that have it."""
    lines = []
    found = Counter()
    for r in runs:
        found.update(dict.fromkeys(r.notes, 1))
    for note, count in found.items():
        lines.append(f"{note} ({count} runs)" if count > 1 else note)
    return lines


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
            more = " ..." if len(first) > 3 else ""
            found.append(f"{name.replace('_', ' ')} differs: {said}{more}")
    return found


def spread(values, form):
    """Mean and, of several that differ, standard deviation."""
    if not values:
        return "-"
    said = f"{math.fsum(values) / len(values):{form}}"
    if len(values) > 1 and max(values) > min(values):
        said += f" +- {statistics.stdev(values):{form}}"
    return said


def table(rows):
    """Rows of strings in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
