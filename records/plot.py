"""Draws validation loss against time and against tokens: ./run.sh records plot."""

import json
import math
import textwrap
from pathlib import Path
from typing import NamedTuple

from base import InputError, whole_file
from base.command import given_path

from .add import OF_THE_RUN
from .metrics import unit
from .read import RUN_HELP, read_runs
from .runs import APART, Run

# Okabe and Ito's colours, told apart by colour-blind people too; without yellow, which is faint on
# white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":")  # for more than seven
STYLE = {
    "svg.hashsalt": "stopwatch",  # the same picture is the same bytes
    "svg.fonttype": "none",  # text stays text
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.6,
    "axes.edgecolor": "#888888",
    "axes.axisbelow": True,
}


class Line(NamedTuple):
    """One line of the picture: runs that differ in the seed alone."""

    label: str
    runs: list

    def by_step(self, x):
        """({step: Point} of each run, the steps that all of them have in order); x: "seconds" or
        "tokens"."""
        found = []
        for run in self.runs:
            points = [p for p in run.val if getattr(p, x) is not None and math.isfinite(p.loss)]
            found.append({p.step: p for p in points})
        return found, sorted(set.intersection(*map(set, found)))

    def points(self, x):
        """[(x, mean, lowest, highest), ...], x averaged too, at the steps that every run has."""
        found, common = self.by_step(x)
        rows = []
        for step in common:
            points = [run[step] for run in found]
            losses = [p.loss for p in points]
            x_mean = sum(getattr(p, x) for p in points) / len(points)
            rows.append((x_mean, sum(losses) / len(losses), min(losses), max(losses)))
        return rows

    def tails(self, x):
        """[(x, loss), ...] for each run, from where points end: some runs stop at their target
        earlier than others."""
        found, common = self.by_step(x)
        tails = []
        for run in found:
            points = [p for step, p in run.items() if step >= common[-1]]
            tails.append([(getattr(p, x), p.loss) for p in points])
        return tails


def add_arguments(parser):
    parser.description = """\
Draws validation loss against time and against tokens, side by side. Every line says at its
end what it is. Runs that differ in the seed alone are one line, their mean, in a band from
the lowest to the highest. A broken line is the target."""
    parser.add_argument("runs", nargs="+", type=given_path, metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "-o",
        "--output",
        type=given_path,
        default=Path("loss"),
        metavar="FILE",
        help="picture to write, .png or .svg; without an ending, both [loss]",
    )


def run(args):
    """Draw, print the names of the files written. Returns 0; raises InputError."""
    suffix = args.output.suffix
    if suffix in (".png", ".svg"):
        files = [args.output]
    elif suffix[1:].isalpha():
        raise InputError(
            f"--output {args.output}: expected a name ending in .png or .svg, or neither"
        )
    else:  # lr-0.02 has no ending
        files = [args.output.with_name(args.output.name + kind) for kind in (".png", ".svg")]
    runs = []
    for path in args.runs:
        runs += [(path, r) for r in read_runs(path)]
    figure = draw(runs)
    for file in files:
        save(figure, file)
        print(file)
    return 0


class Member(NamedTuple):
    """A run among those that are drawn as one line."""

    run: Run
    home: Path  # the folder that its own is in
    named: bool  # whether that folder was given, or is a record, so that its name means something


def group(runs):
    """[(path as given, Run), ...] -> [Line, ...]. Where the log has no configuration, runs of
    the same length that were given as one path are taken to differ in the seed alone."""
    # Runs that agree in all of this are one line
    groups = {}
    for path, r in runs:
        home = Path(r.path).resolve().parent
        config = {name: value for name, value in r.config.items() if name not in APART}
        environment = {
            name: value for name, value in r.environment.items() if name not in OF_THE_RUN
        }
        key = (
            config or str(path),
            environment,
            r.track,
            r.total_steps,
            r.data,
            r.hardware,
            r.world_size,
            str(home) if is_record(home) else None,
        )
        members = groups.setdefault(json.dumps(key, sort_keys=True, default=str), {})
        named = is_record(home) or home == Path(path).resolve()
        members[r.where] = Member(r, home, named)  # each run once
    groups = [list(members.values()) for members in groups.values()]

    # A folder of seeds has the better name if they are all there is in it
    homes = []
    for members in groups:
        homes += {member.home for member in members}
    labels = []
    for members in groups:
        first = members[0]
        label = first.run.name or Path(first.run.path).name
        alone = homes.count(first.home) == 1
        if first.named and alone and (len(members) > 1 or is_record(first.home)):
            label = first.home.name
        labels.append(label)

    lines = []
    for members, label in zip(groups, labels):
        shown = label
        if labels.count(label) > 1:
            shown = f"{members[0].home.name}/{label}"
        if len(members) > 1:
            shown += f" (n={len(members)})"
        lines.append(Line(shown, [member.run for member in members]))
    return lines


def is_record(folder):
    return (folder / "summary.json").exists()


def draw(runs):
    """[(path as given, Run), ...] -> a matplotlib Figure with two panels. Raises InputError."""
    import matplotlib
    from matplotlib.figure import Figure

    metrics = {r.metric: path for path, r in runs}
    if len(metrics) > 1:
        found = ", ".join(f"{metric} in {path}" for metric, path in metrics.items())
        raise InputError(f"expected runs that measure the same, found {found}; plot them apart")
    for path, r in runs:
        if not any(math.isfinite(p.loss) for p in r.val):
            raise InputError(
                f"{path}: expected a run with a validation loss; there is nothing to draw"
            )
    (metric,) = metrics
    lines = group(runs)
    targets = sorted({r.target for _, r in runs if r.target is not None})

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.8), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        panel(panels[0], lines, targets, "seconds", "training time")
        panel(panels[1], lines, targets, "tokens", "training tokens")

        # The steep first fifth may leave the picture: what is compared is the end
        values = []
        for line in lines:
            for x in ("seconds", "tokens"):
                points = line.points(x)
                values += [mean for _, mean, _, _ in points[len(points) // 5 :]]
        if not values:
            raise InputError(
                f"{runs[0][0]}: expected validations with their time or tokens, at steps that all "
                "seeds have; there is nothing to draw"
            )
        losses = []
        for _, r in runs:
            losses += [p.loss for p in r.val if math.isfinite(p.loss)]
        low = min(losses + targets)
        high = max(values + targets)
        margin = 0.06 * (high - low) or 0.1
        panels[0].set_ylim(low - margin, high + margin)
        panels[0].set_ylabel(f"validation loss ({unit(metric)})")
        panels[1].tick_params(labelleft=True)
        for ax in panels:
            label_ends(ax)
    return figure


def panel(ax, lines, targets, x, title):
    """One panel: lines, and targets as broken ones. The lines' ends are kept in ax.ends for
    label_ends."""
    from matplotlib.ticker import EngFormatter

    drawn = []
    for i, line in enumerate(lines):
        points = line.points(x)
        if points:
            drawn.append((i, line, points))
    size = 1
    x_unit = ""
    if x == "seconds":
        longest = max((points[-1][0] for _, _, points in drawn), default=0)
        size, x_unit = time_unit(longest)

    # Each line: its mean, a band, and the ends of those that went on
    ax.ends = []
    for i, line, points in drawn:
        color = COLORS[i % len(COLORS)]
        style = dict(color=color, linestyle=DASHES[i // len(COLORS) % len(DASHES)])
        xs, mean, low, high = zip(*points)
        xs = [value / size for value in xs]
        marker = "o" if len(xs) <= 30 else None
        ax.plot(xs, mean, linewidth=1.8, marker=marker, markersize=3, **style)
        if len(line.runs) > 1:
            ax.fill_between(xs, low, high, color=color, alpha=0.2, linewidth=0)
            for tail in line.tails(x):
                tail_xs = [value / size for value, _ in tail]
                ax.plot(tail_xs, [loss for _, loss in tail], linewidth=0.8, alpha=0.6, **style)
        label = "\n".join(textwrap.wrap(line.label, 26))
        ax.ends.append((xs[-1], mean[-1], label, color))

    # Axes, and targets across both panels
    ax.set_xlim(left=0)
    ax.set_xlabel(f"{title} ({x_unit})" if x_unit else title)
    if x == "tokens":
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    if not drawn:
        ax.set_xticks([])
        style = dict(transform=ax.transAxes, ha="center", color="#666666")
        ax.text(0.5, 0.5, f"no {x} in these logs", **style)
    for target in targets:
        ax.axhline(target, color="#666666", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        ax.annotate(
            f"target {target:g}",
            (0, target),
            xycoords=("axes fraction", "data"),
            xytext=(3, -2),
            textcoords="offset points",
            va="top",
            color="#444444",
            fontsize=8,
        )


def time_unit(seconds):
    """(seconds in it, its name) of the largest unit of which there is at least one."""
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return size, name
    return 1, "s"


def duration(seconds):
    """1.5 -> "1.5 s", 90 -> "1.5 min", 5400 -> "1.5 h"."""
    size, unit = time_unit(seconds)
    return f"{seconds / size:.3g} {unit}"


def label_ends(ax):
    """Names the lines of ax.ends, (x, y, label, color), beside the axes, at the height of their
    ends or as near as other labels allow. Call it when the axes' limits are final."""
    ends = sorted(ax.ends, key=lambda end: -end[1])
    to_axes = ax.transData - ax.transAxes
    heights = [to_axes.transform((x, y))[1] for x, y, _, _ in ends]
    most_lines = max((label.count("\n") + 1 for _, _, label, _ in ends), default=1)
    for (x, y, label, color), height in zip(ends, spread(heights, gap=0.047 * most_lines)):
        ax.annotate(
            label,
            (x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            va="center",
            color=color,
            annotation_clip=False,
            arrowprops=dict(arrowstyle="-", color=color, linewidth=0.6, alpha=0.6, relpos=(0, 0.5)),
        )


def spread(heights, gap):
    """Falling heights -> falling heights at least `gap` apart, near the given ones, at most 1 if
    they fit above 0."""
    placed = []
    most = 1.0
    for height in heights:
        placed.append(min(height, most))
        most = placed[-1] - gap
    # What was pushed out at the bottom pushes the others up again
    least = 0.0
    for i in reversed(range(len(placed))):
        placed[i] = max(placed[i], least)
        least = placed[i] + gap
    return placed


def save(figure, file):
    """Write a figure, whole or not at all; the ending says as what. Raises InputError."""
    import matplotlib

    kind = file.suffix[1:]
    # No dates and versions: the same picture is the same bytes
    metadata = dict(Date=None, Creator=None) if kind == "svg" else dict(Software=None)
    try:
        with matplotlib.rc_context(STYLE), whole_file(file) as path:
            figure.savefig(path, format=kind, dpi=150, metadata=metadata)
    except OSError as e:
        raise InputError(
            f"{file}: cannot be written: {e.strerror or e}; choose another folder"
        ) from None
