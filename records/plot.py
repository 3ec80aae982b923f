"""Draws validation loss against time and against tokens: python -m records plot."""

import json
import math
import os
import textwrap
from pathlib import Path
from typing import NamedTuple

from base import InputError

from .add import OF_THE_RUN
from .compare import APART, RUN_HELP
from .read import read_runs

# Okabe and Ito's colours, told apart by colour-blind people too; without yellow, which is faint on
# white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":")  # for more than seven
METRICS = {
    "val_loss": "validation loss (nats per token)",
    "val_bpb": "validation loss (bits per byte)",
}
STYLE = {
    "svg.hashsalt": "stopwatch",
    "svg.fonttype": "none",  # the same picture is the same bytes; text stays text
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
        """({step: Point}, ...) for each run, and the steps they all have in order; x: "seconds"
        or "tokens"."""
        found = [
            {p.step: p for p in run.val if getattr(p, x) is not None and math.isfinite(p.loss)}
            for run in self.runs
        ]
        return found, sorted(set.intersection(*map(set, found)))

    def points(self, x):
        """[(x, mean, lowest, highest), ...], x averaged too, at the steps that every run has."""
        found, common = self.by_step(x)
        rows = []
        for step in common:
            points = [run[step] for run in found]
            losses = [p.loss for p in points]
            rows.append(
                (
                    sum(getattr(p, x) for p in points) / len(points),
                    sum(losses) / len(losses),
                    min(losses),
                    max(losses),
                )
            )
        return rows

    def tails(self, x):
        """[(x, loss), ...] for each run, from where points end: some runs stop at their target
        earlier than others."""
        found, common = self.by_step(x)
        return [
            [(getattr(p, x), p.loss) for step, p in run.items() if step >= common[-1]]
            for run in found
        ]


def add_arguments(parser):
    parser.description = """\
Draws validation loss against time and against tokens. Every line says at its end what it is. Runs that differ in the
seed alone are one line, their mean, in a band from the lowest to the highest."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("loss"),
        metavar="FILE",
        help="picture to write, .png or .svg; without an ending, both [loss]",
    )


def run(args):
    """Draw, print the names of the files written. Returns 0; raises InputError."""
    suffixes = [args.output.suffix] if args.output.suffix in (".png", ".svg") else [".png", ".svg"]
    if args.output.suffix and len(suffixes) > 1 and args.output.suffix[1:].isalpha():
        raise InputError(
            f"--output {args.output}: expected a name ending in .png or .svg, or neither"
        )
    figure = draw([(path, r) for path in args.runs for r in read_runs(path)])
    for suffix in suffixes:
        file = (
            args.output if len(suffixes) == 1 else args.output.with_name(args.output.name + suffix)
        )
        save(figure, file)
        print(file)
    return 0


def group(runs):
    """[(path as given, Run), ...] -> [Line, ...]. Where the log has no configuration, runs of
    the same length that were given as one path are taken to differ in the seed alone."""
    groups = {}
    for path, r in runs:
        home = Path(r.path).resolve().parent
        key = (
            {name: value for name, value in r.config.items() if name not in APART} or str(path),
            {name: value for name, value in r.environment.items() if name not in OF_THE_RUN},
            r.track,
            r.total_steps,
            r.data,
            r.hardware,
            r.world_size,
            str(home) if is_record(home) else None,
        )
        members = groups.setdefault(json.dumps(key, sort_keys=True, default=str), {})
        members[r.where] = (
            r,
            home,
            is_record(home) or home == Path(path).resolve(),
        )  # each run once
    groups = [list(members.values()) for members in groups.values()]
    homes = [home for members in groups for home in {home for _, home, _ in members}]
    names = []
    for members in groups:
        r, home, named = members[
            0
        ]  # a folder of seeds has the better name if they are all there is in it
        named = named and homes.count(home) == 1 and (len(members) > 1 or is_record(home))
        names.append((home.name, home.name if named else r.name or Path(r.path).name))
    labels = [label for _, label in names]
    return [
        Line(
            (f"{folder}/{label}" if labels.count(label) > 1 else label)
            + (f" (n={len(members)})" if len(members) > 1 else ""),
            [r for r, _, _ in members],
        )
        for (folder, label), members in zip(names, groups)
    ]


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
    empty = next((path for path, r in runs if not any(math.isfinite(p.loss) for p in r.val)), None)
    if empty or not runs:
        raise InputError(
            f"{empty or 'no runs'}: expected a run with a validation loss; there is nothing to draw"
        )
    lines, (metric,) = group(runs), metrics
    targets = sorted({r.target for _, r in runs if r.target is not None})
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.8), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for ax, x, title in zip(
            panels, ("seconds", "tokens"), ("training time", "training tokens")
        ):
            panel(ax, lines, x, title)
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
        tops = [
            [mean for _, mean, _, _ in line.points(x)][n // 5 :]
            for line in lines
            for x in ("seconds", "tokens")
            if (n := len(line.points(x)))
        ]
        if not tops:
            raise InputError(
                f"{runs[0][0]}: expected validations with their time or tokens, at steps that all seeds "
                "have; there is nothing to draw"
            )
        values = [v for top in tops for v in top] + targets
        low = min([p.loss for _, r in runs for p in r.val if math.isfinite(p.loss)] + targets)
        margin = 0.06 * (max(values) - low) or 0.1
        # the steep first fifth may leave the picture: what is compared is the end
        panels[0].set_ylim(low - margin, max(values) + margin)
        panels[0].set_ylabel(METRICS.get(metric, metric))
        panels[1].tick_params(labelleft=True)
        for ax in panels:
            label_ends(ax)
    return figure


def panel(ax, lines, x, title):
    """Lines of one panel. Their ends are kept in ax.ends for label_ends."""
    from matplotlib.ticker import EngFormatter

    drawn = [(line.points(x), line, i) for i, line in enumerate(lines) if line.points(x)]
    size, unit = (
        time_unit(max((points[-1][0] for points, _, _ in drawn), default=0))
        if x == "seconds"
        else (1, "")
    )
    ax.ends = []
    for points, line, i in drawn:
        style = dict(
            color=COLORS[i % len(COLORS)], linestyle=DASHES[i // len(COLORS) % len(DASHES)]
        )
        xs, mean, low, high = zip(*points)
        xs = [value / size for value in xs]
        ax.plot(
            xs, mean, linewidth=1.8, marker="o" if len(xs) <= 30 else None, markersize=3, **style
        )
        if len(line.runs) > 1:
            ax.fill_between(xs, low, high, color=style["color"], alpha=0.2, linewidth=0)
            for tail in line.tails(x):
                tail_xs, losses = zip(*tail)
                ax.plot(
                    [value / size for value in tail_xs], losses, linewidth=0.8, alpha=0.6, **style
                )
        ax.ends.append((xs[-1], mean[-1], "\n".join(textwrap.wrap(line.label, 26)), style["color"]))
    ax.set_xlim(left=0)
    ax.set_xlabel(f"{title} ({unit})" if unit else title)
    if x == "tokens":
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    if not drawn:
        ax.set_xticks([])
        ax.text(
            0.5, 0.5, f"no {x} in these logs", transform=ax.transAxes, ha="center", color="#666666"
        )


def time_unit(seconds):
    """(seconds in it, its name) of the largest unit of which there is at least one."""
    return next(
        ((size, unit) for size, unit in ((3600, "h"), (60, "min")) if seconds >= size), (1, "s")
    )


def duration(seconds):
    """1.5 -> "1.5 s", 90 -> "1.5 min", 5400 -> "1.5 h"."""
    size, unit = time_unit(seconds)
    return f"{seconds / size:.3g} {unit}"


def label_ends(ax):
    """Names the lines of ax.ends, (x, y, label, color), beside the axes, at the height of their
    ends or as near as other labels allow. Call it when the axes' limits are final."""
    ends = sorted(ax.ends, key=lambda end: -end[1])
    to_axes = ax.transData - ax.transAxes
    gap = 0.047 * max((label.count("\n") + 1 for _, _, label, _ in ends), default=1)
    heights = spread([to_axes.transform((x, y))[1] for x, y, _, _ in ends], gap)
    for (x, y, label, color), height in zip(ends, heights):
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
    for height in heights:
        placed.append(min(height, placed[-1] - gap if placed else 1.0))
    for i in reversed(
        range(len(placed))
    ):  # what was pushed out at the bottom pushes the others up again
        floor = placed[i + 1] + gap if i + 1 < len(placed) else 0.0
        placed[i] = max(placed[i], floor)
    return placed


def save(figure, file):
    """Write a figure aside and rename it; the ending says as what. Raises InputError."""
    import matplotlib

    kind = file.suffix[1:]
    metadata = dict(Date=None, Creator=None) if kind == "svg" else dict(Software=None)
    aside = file.with_name(f".{file.name}.tmp")
    try:
        with matplotlib.rc_context(STYLE):
            figure.savefig(aside, format=kind, dpi=150, metadata=metadata)
        os.replace(aside, file)
    except OSError as e:
        raise InputError(
            f"{file}: cannot be written: {e.strerror or e}; choose another folder"
        ) from None
    finally:
        aside.unlink(missing_ok=True)
