"""Tests the losses of a recipe's runs against its target: ./run.sh records check."""

import bisect
import dataclasses
import math
import statistics
from pathlib import Path

from base import InputError

from .metrics import VAL_LOSS, lower_is_better
from .read import RUN_HELP, read_runs
from .runs import APART
from .several import differences, notes, spread, table
from .source import check as check_source

ALPHA = 0.01  # the public record's


def add_arguments(parser):
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


def run(args):
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


def gather(paths):
    """Runs of all paths, each once. Raises InputError."""
    runs = {}
    for path in paths:
        for r in read_runs(path):
            runs[r.where] = r
    return list(runs.values())


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
    left_out = [r for r in runs if not r.usable]
    runs = [r for r in runs if r.usable]
    if not runs:
        raise InputError(f"{left_out[0].ending}, and there is no other; expected finished runs")
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
        print(f"left out: {r.ending}")
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
