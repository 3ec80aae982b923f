"""Writes the records' front page, records/README.md, and its chart, history.svg, from what is
committed there.

The same records give the same bytes, so a test can tell whether the page is up to date.
"""

import contextlib
import datetime
import json
import math
import os
import re
from pathlib import Path

from base import InputError

from .add import RECORDS, load_run, same_but_seeds, summarize
from .plot import COLORS, STYLE, duration, label_ends, save

PUBLIC = json.loads(Path(__file__).with_name("history.json").read_text(encoding="utf-8"))
METRICS = {"val_loss": "nats per token", "val_bpb": "bits per byte"}


def add_arguments(parser):
    parser.add_argument(
        "--records",
        type=Path,
        default=RECORDS,
        metavar="DIR",
        help="where records are kept, and the page is written [records]",
    )


def run(args):
    """Write README.md and history.svg, print their names. Returns 0; raises InputError."""
    records = load_records(args.records)
    save(chart(records), args.records / "history.svg")
    page, aside = args.records / "README.md", args.records / ".README.md.tmp"
    try:
        aside.write_text(render(records), encoding="utf-8")
        os.replace(aside, page)
    except OSError as e:
        raise InputError(f"{page}: cannot be written: {e.strerror or e}") from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()
    print(page, args.records / "history.svg", sep="\n")
    return 0


def load_records(root):
    """[summary with its folder relative to root as `path`, ...]. Raises InputError where a
    record is not what its own logs say, or has none."""

    def same(a, b):  # libraries may differ in the last digit
        return (
            math.isclose(a, b, rel_tol=1e-9)
            if isinstance(a, float) and isinstance(b, float)
            else a == b
        )

    records = []
    for folder in sorted(p for p in root.glob("*/*") if p.is_dir() and not p.name.startswith(".")):
        file = folder / "summary.json"
        try:
            summary = json.loads(file.read_text(encoding="utf-8"))
            runs = sorted(map(load_run, folder.glob("seed*")), key=lambda r: r["result"]["seed"])
            if not runs:
                raise InputError(
                    f"{folder}: expected a folder for each seed, found none; restore them"
                )
            same_but_seeds(runs)
            wrong = [
                name for name, value in summarize(runs).items() if not same(summary[name], value)
            ]
            if wrong:
                raise InputError(
                    f"{file}: {wrong[0]} is {summary[wrong[0]]}, not what the runs beside it say; "
                    "restore the file, or add the record anew"
                )
            datetime.date.fromisoformat(summary["date"]), summary["name"].strip()
            records.append(
                summary
                | dict(
                    path=folder.relative_to(root).as_posix(),
                    hardware=hardware_class(summary["environment"]),
                )
            )
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as e:
            if isinstance(e, InputError):
                raise
            raise InputError(
                f"{file}: not a record's summary ({type(e).__name__}: {e}); restore it"
            ) from None
    return records


def hardware_class(environment):
    """What times are compared within: "8xH100", "1xRTX 4090", "2-core CPU"."""
    device, size = environment["device"], environment["world_size"]
    if not re.match("NVIDIA|Tesla|Quadro|GeForce|AMD (Instinct|Radeon)", device):
        return f"{environment['threads'] * size}-core CPU"
    short = re.sub(
        r"NVIDIA |Tesla |Quadro |GeForce |AMD |[ -](\d+ ?GB|SXM\d?|HBM\d\w?)\b", "", device
    )
    return f"{size}x{short}"


def tables(records):
    """{(track, metric, target, hardware): [record, ...]}: the fastest first, then those that
    missed their target."""
    groups = {}
    for r in sorted(records, key=lambda r: (missed(r), r["time_mean_s"], r["path"])):
        groups.setdefault((r["track"], r["target_metric"], r["target"], r["hardware"]), []).append(
            r
        )
    return dict(sorted(groups.items()))


def missed(r):
    return r["loss_mean"] > r["target"]


# --- the page


def render(records):
    """The page as Markdown."""
    parts = [HEAD.format(chart=chart_says(records)).rstrip()]
    before = None
    for (track, metric, target, hardware), rows in tables(records).items():
        if before != (track, metric, target):
            parts.append(f"## {track}: {target:g} {METRICS.get(metric, metric)}")
            before = track, metric, target
        device = sorted({r["environment"]["device"] for r in rows})
        parts.append(
            f"### {hardware}\n\nMeasured on {', '.join(device)}.\n\n"
            + "\n".join(
                [
                    "| | training time | record | date | loss | n | p | steps | tokens | commit |",
                    "|---|---|---|---|---|---|---|---|---|---|",
                    *(row(i, r) for i, r in enumerate(rows, 1)),
                ]
            )
        )
    if not records:
        parts.append("No records yet.")
    parts.append(public())
    return "\n\n".join(parts) + "\n"


HEAD = """# Records

<!-- Made by `python -m records leaderboard` from the folders beside it: change those, not this page. -->

![Time to target by date, the public record beside ours](history.svg)

{chart}

Training time is the training loop alone; validation, start-up and compilation are outside the clock. Times compare
within one table, where task and hardware are the same. Mean ± standard deviation over n runs that differ in the seed
alone. p is the probability of a mean loss this low if the true mean were the target (one-sided t-test, two runs or
more). Runs that stop at their first validation at the target are below it by construction: there p is of all losses at
the step where the first of them stopped, times the number of validations (`python -m records check` says more).
Each record's folder has the logs, with the source that ran, and `summary.json`.
"""


def chart_says(records):
    first, last = PUBLIC["records"][0], PUBLIC["records"][-1]
    return (
        f"The chart's grey line is [{PUBLIC['name']}]({PUBLIC['source']}) on {PUBLIC['hardware']}: "
        f"{PUBLIC['task']}, from {first['minutes']:g} to {last['minutes']:g} minutes. Coloured lines are ours"
        + (
            ", each for a track, a target and a kind of machine."
            if records
            else "; there are none yet."
        )
    )


def row(place, r):
    """A line of the table. place: in the order of times, from 1."""
    p = (
        "–"
        if r["p_value"] is None
        else f"{r['p_value']:.2g}" + (f" at step {r['p_step']}" if r["p_step"] else "")
    )
    commit = (r["git_commit"] or "–")[:7] + (
        " + changes" if r["git_dirty"] and r["git_commit"] else ""
    )
    name = re.sub(r"([\\|\[\]<>*_`])", r"\\\1", " ".join(r["name"].split()))
    return (
        "| "
        + " | ".join(
            [
                "missed" if missed(r) else f"{place}",
                spread(r["time_mean_s"], r["time_sd_s"], " s"),
                f"[{name}]({r['path']})",
                r["date"],
                spread(r["loss_mean"], r["loss_sd"]),
                f"{r['n']}",
                p,
                between(r["steps"], "{:,}".format),
                between(r["tokens"], count),
                commit,
            ]
        )
        + " |"
    )


def spread(mean, sd, unit=""):
    """mean ± sd, to the second digit of the sd; without one (n = 1) to five digits."""
    if not sd:
        return f"{mean:.5g}{unit}"
    digits = min(6, max(0, 1 - math.floor(math.log10(sd))))
    return f"{mean:.{digits}f} ± {sd:.{digits}f}{unit}"


def between(values, form):
    return "–".join(dict.fromkeys(map(form, (min(values), max(values)))))


def count(tokens):
    """81920 -> "81.92k", 338800000 -> "338.8M"."""
    return f"{tokens / 1e6:.4g}M" if tokens >= 1e6 else f"{tokens / 1e3:.4g}k"


def public():
    """The public record, for reference."""
    rows = [
        f"| {r['number']} | {r['date']} | {r['minutes']:g} | {r['change']} |"
        for r in PUBLIC["records"]
    ]
    return "\n".join(
        [
            "## The public record, for reference",
            "",
            f"[{PUBLIC['name']}]({PUBLIC['source']}): {PUBLIC['task']}, on {PUBLIC['hardware']}, as of commit "
            f"[{PUBLIC['commit'][:7]}]({PUBLIC['source']}/tree/{PUBLIC['commit']}). {PUBLIC['note']} What changed is in "
            "our words.",
            "",
            "<details>",
            f"<summary>{len(rows)} records</summary>",
            "",
            "| record | date | minutes | what changed |",
            "|---|---|---|---|",
            *rows,
            "",
            "</details>",
        ]
    )


# --- the chart


def chart(records):
    """Time to target by date, on a logarithmic scale: the best so far of every table, and the
    public record."""
    import matplotlib
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 5), layout="constrained")
        ax = figure.subplots()
        ax.ends = []

        def line(dates, seconds, label, color, **style):
            days = [date2num(datetime.date.fromisoformat(d)) for d in dates]
            ax.plot(days, seconds, drawstyle="steps-post", color=color, **style)
            ax.ends.append((days[-1], seconds[-1], label, color))

        line(
            [r["date"] for r in PUBLIC["records"]],
            [60 * r["minutes"] for r in PUBLIC["records"]],
            f"{PUBLIC['name']}\n{PUBLIC['hardware']}: {duration(60 * PUBLIC['records'][-1]['minutes'])}",
            "#777777",
            linewidth=1.5,
        )
        reached = {key: [r for r in rows if not missed(r)] for key, rows in tables(records).items()}
        for i, ((track, _, target, hardware), rows) in enumerate(
            (k, r) for k, r in reached.items() if r
        ):
            rows = sorted(rows, key=lambda r: (r["date"], -r["time_mean_s"]))
            best = [min(r["time_mean_s"] for r in rows[: n + 1]) for n in range(len(rows))]
            color = COLORS[i % len(COLORS)]
            line(
                [r["date"] for r in rows],
                best,
                f"{track} to {target:g}\n{hardware}: {duration(best[-1])}",
                color,
                linewidth=1.8,
            )
            ax.plot(
                [date2num(datetime.date.fromisoformat(r["date"])) for r in rows],
                [r["time_mean_s"] for r in rows],
                "o",
                color=color,
                markersize=4,
            )
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ticks = [
            t
            for t in (0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, 3600, 10800, 36000)
            if low <= t <= high
        ]
        ax.yaxis.set_major_locator(FixedLocator(ticks))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda s, _: duration(s)))
        ax.yaxis.set_minor_formatter(NullFormatter())
        locator = AutoDateLocator()
        ax.xaxis.set_major_locator(locator)
        ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        ax.set_ylabel("training time to the target")
        label_ends(ax)
    return figure
