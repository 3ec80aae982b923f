"""Writes the records' front page, records/README.md, and its chart, history.svg, from what is
committed there.

The same records give the same bytes, so a test can tell whether the page is up to date.
"""

import datetime
import json
import math
import re
from pathlib import Path

from base import InputError, write_text
from base.command import given_path

from .add import RECORDS, load_run, same_but_seeds, summarize
from .metrics import meets, unit
from .plot import COLORS, STYLE, duration, label_ends, save

PUBLIC = json.loads(Path(__file__).with_name("history.json").read_text(encoding="utf-8"))
# Where a time may stand on the chart's axis, in seconds
TICKS = (0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, 3600, 10800, 36000)


def add_arguments(parser):
    parser.description = """\
Writes the records' front page, README.md, and its chart, history.svg, anew from the folders
beside them. Every record is checked on the way: its runs against their logs and their source,
its summary against its runs. Run it after records add, and commit what it wrote."""
    parser.add_argument(
        "--records",
        type=given_path,
        default=RECORDS,
        metavar="DIR",
        help="where records are kept, and the page is written [records]",
    )


def run(args):
    """Write README.md and history.svg, print their names. Returns 0; raises InputError."""
    records = load_records(args.records)
    picture = args.records / "history.svg"
    page = args.records / "README.md"
    save(chart(records), picture)
    try:
        write_text(page, render(records))
    except OSError as e:
        raise InputError(f"{page}: cannot be written: {e.strerror or e}") from None
    print(page, picture, sep="\n")
    return 0


def load_records(root):
    """[summary with its folder relative to root as `path`, ...]. Raises InputError where a
    record is not what its own logs say, or has none."""
    folders = [p for p in root.glob("*/*") if p.is_dir()]
    # A record that is being written, or was when its writer was killed, ends in .tmp
    folders = [p for p in folders if not p.name.startswith(".") and p.suffix != ".tmp"]
    return [load_record(folder, root) for folder in sorted(folders)]


def load_record(folder, root):
    """The summary of the record in `folder`, with `path` and `hardware`. Raises InputError."""
    file = folder / "summary.json"
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        runs = sorted(map(load_run, folder.glob("seed*")), key=lambda r: r.seed)
        if not runs:
            raise InputError(f"{folder}: expected a folder for each seed, found none; restore them")
        same_but_seeds(runs)
        for name, value in summarize(runs).items():
            if not same(summary[name], value):
                raise InputError(
                    f"{file}: {name} is {summary[name]}, not what the runs beside it say; "
                    "restore the file, or add the record anew"
                )
        # What the page will need
        datetime.date.fromisoformat(summary["date"])
        summary["name"].strip()
        hardware = hardware_class(summary["environment"])
    except InputError:
        raise
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as e:
        raise InputError(
            f"{file}: not a record's summary ({type(e).__name__}: {e}); restore it"
        ) from None
    return summary | dict(path=folder.relative_to(root).as_posix(), hardware=hardware)


def same(a, b):
    """Whether two values of a summary agree; libraries may differ in the last digit."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9)
    return a == b


def hardware_class(environment):
    """What times are compared within: "8xH100", "1xRTX 4090", "2-core CPU"."""
    device = environment["device"]
    size = environment["world_size"]
    if not re.match("NVIDIA|Tesla|Quadro|GeForce|AMD (Instinct|Radeon)", device):
        return f"{environment['threads'] * size}-core CPU"
    # Without the maker, the series, the memory and the socket
    short = re.sub(
        r"NVIDIA |Tesla |Quadro |GeForce |AMD |[ -](\d+ ?GB|SXM\d?|HBM\d\w?)\b", "", device
    )
    return f"{size}x{short}"


def tables(records):
    """{(track, metric, target, hardware): [record, ...]}: the fastest first, then those that
    missed their target."""
    groups = {}
    for r in sorted(records, key=lambda r: (missed(r), r["time_mean_s"], r["path"])):
        key = (r["track"], r["target_metric"], r["target"], r["hardware"])
        groups.setdefault(key, []).append(r)
    return dict(sorted(groups.items()))


def missed(r):
    return not meets(r["loss_mean"], r["target"], r["target_metric"])


# --------------------------------------------------------------------------------------------------
# The page


def render(records):
    """The page as Markdown."""
    parts = [HEAD.format(chart=chart_says(records)).rstrip()]
    before = None
    for (track, metric, target, hardware), rows in tables(records).items():
        if before != (track, metric, target):
            parts.append(f"## {track}: {target:g} {unit(metric)}")
        before = (track, metric, target)
        devices = sorted({r["environment"]["device"] for r in rows})
        # A table for each kind of machine: times elsewhere are other times
        lines = [
            "| | training time | record | date | loss | n | p | steps | tokens | commit |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(row(i, r) for i, r in enumerate(rows, 1)),
        ]
        parts.append(f"### {hardware}\n\nMeasured on {', '.join(devices)}.\n\n" + "\n".join(lines))
    if not records:
        parts.append("No records yet.")
    parts.append(public())
    return "\n\n".join(parts) + "\n"


HEAD = """# Records

<!-- Made by `./run.sh records leaderboard` from the folders beside it: change those, not this. -->

![Time to target by date, the public record beside ours](history.svg)

{chart}

Training time is the training loop alone; validation, start-up and compilation are outside the
clock. Times compare within one table, where task and hardware are the same. Mean ± standard
deviation over n runs that differ in the seed alone. p is the probability of a mean loss this low if
the true mean were the target (one-sided t-test, two runs or more). Runs that stop at their first
validation at the target are below it by construction: there p is of all losses at the step where
the first of them stopped, times the number of validations (`./run.sh records check --help` says
more).

Each record's folder has `summary.json`, the logs with their configuration, and the source that ran
(`tar xjf source.tar.bz2`), whose digest is in the logs: `./run.sh records check FOLDER` compares
them.
"""


def chart_says(records):
    """What the chart shows, in words."""
    first = PUBLIC["records"][0]
    last = PUBLIC["records"][-1]
    ours = "; there are none yet."
    if records:
        ours = ", each for a track, a target and a kind of machine."
    return (
        f"The chart's grey line is [{PUBLIC['name']}]({PUBLIC['source']}) on {PUBLIC['hardware']}: "
        f"{PUBLIC['task']}, from {first['minutes']:g} to {last['minutes']:g} minutes. "
        f"Coloured lines are ours{ours}"
    )


def row(place, r):
    """A line of the table. place: in the order of times, from 1."""
    p = "–"
    if r["p_value"] is not None:
        p = f"{r['p_value']:.2g}"
        if r["p_step"]:
            p += f" at step {r['p_step']}"
    commit = "–"
    if r["git_commit"]:
        commit = r["git_commit"][:7] + (" + changes" if r["git_dirty"] else "")
    name = re.sub(r"([\\|\[\]<>*_`])", r"\\\1", " ".join(r["name"].split()))
    cells = [
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
    return f"| {' | '.join(cells)} |"


def spread(mean, sd, unit=""):
    """mean ± sd, to the second digit of the sd; without one (n = 1) to five digits."""
    if not sd:
        return f"{mean:.5g}{unit}"
    digits = min(6, max(0, 1 - math.floor(math.log10(sd))))
    return f"{mean:.{digits}f} ± {sd:.{digits}f}{unit}"


def between(values, form):
    """Least–most, or one number if they are the same when written."""
    ends = dict.fromkeys([form(min(values)), form(max(values))])
    return "–".join(ends)


def count(tokens):
    """81920 -> "81.92k", 338800000 -> "338.8M"."""
    return f"{tokens / 1e6:.4g}M" if tokens >= 1e6 else f"{tokens / 1e3:.4g}k"


def public():
    """The public record, for reference."""
    rows = [
        f"| {r['number']} | {r['date']} | {r['minutes']:g} | {r['change']} |"
        for r in PUBLIC["records"]
    ]
    lines = [
        "## The public record, for reference",
        "",
        f"[{PUBLIC['name']}]({PUBLIC['source']}): {PUBLIC['task']}, on {PUBLIC['hardware']}, as of "
        f"commit [{PUBLIC['commit'][:7]}]({PUBLIC['source']}/tree/{PUBLIC['commit']}). "
        f"{PUBLIC['note']} What changed is in our words.",
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
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# The chart


def chart(records):
    """Time to target by date, on a logarithmic scale: the best so far of every table, and the
    public record. A matplotlib Figure."""
    import matplotlib
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 5), layout="constrained")
        ax = figure.subplots()
        ax.ends = []
        draw_public(ax)
        draw_ours(ax, records)

        # Times as people say them, on a logarithmic scale
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(FixedLocator([t for t in TICKS if low <= t <= high]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda s, _: duration(s)))
        ax.yaxis.set_minor_formatter(NullFormatter())
        locator = AutoDateLocator()
        ax.xaxis.set_major_locator(locator)
        ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        ax.set_ylabel("training time to the target")
        label_ends(ax)
    return figure


def draw_public(ax):
    seconds = [60 * r["minutes"] for r in PUBLIC["records"]]
    label = f"{PUBLIC['name']}\n{PUBLIC['hardware']}: {duration(seconds[-1])}"
    steps(ax, days(PUBLIC["records"]), seconds, label, "#777777", linewidth=1.5)


def draw_ours(ax, records):
    """A line for each table with a record that reached its target, and a point for each of
    those."""
    reached = {}
    for key, rows in tables(records).items():
        met = [r for r in rows if not missed(r)]
        if met:
            reached[key] = sorted(met, key=lambda r: (r["date"], -r["time_mean_s"]))
    for i, ((track, _, target, hardware), rows) in enumerate(reached.items()):
        times = [r["time_mean_s"] for r in rows]
        best = [min(times[: n + 1]) for n in range(len(times))]  # up to each date
        color = COLORS[i % len(COLORS)]
        label = f"{track} to {target:g}\n{hardware}: {duration(best[-1])}"
        steps(ax, days(rows), best, label, color, linewidth=1.8)
        ax.plot(days(rows), times, "o", color=color, markersize=4)


def days(rows):
    """Dates as matplotlib counts them."""
    from matplotlib.dates import date2num

    return [date2num(datetime.date.fromisoformat(r["date"])) for r in rows]


def steps(ax, days, seconds, label, color, **style):
    """A line that falls at each date; label_ends names it at its end."""
    ax.plot(days, seconds, drawstyle="steps-post", color=color, **style)
    ax.ends.append((days[-1], seconds[-1], label, color))
