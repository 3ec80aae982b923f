"""One page about a run, or about several side by side: ./run.sh report.

The page is one HTML file with its pictures inside, which needs no network and no script: what was
trained on what, how the losses fell, where the time went, what an evaluation found, what the model
wrote, and the command that does it again.
"""

import argparse
import json
import math
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from base import InputError, whole_file
from base.command import Parser, given_path, refuse
from base.places import runs_folder
from base.svg import (
    Series,
    chart,
    element,
    interval,
    page,
    short,
    stacked_bar,
    table,
)

from .logs import lines
from .metrics import METRICS, TRAIN_LOSS, VAL_LOSS, unit
from .read import is_run_folder, read_json, read_run_folder
from .runs import Run, dictionary, number, text, tokens_at

DESCRIPTION = """\
Writes one HTML page about a finished run, the newest one or those that are named: what was trained
on what, curves, time by part, cost and energy where the result has them, what ./run.sh eval found,
samples by step, and the command to repeat it. The page needs no network. Its name goes to
stdout."""

EXAMPLES = """\
examples:
  ./run.sh report
  ./run.sh report runs/a --out a.html
  ./run.sh report runs/a runs/b"""

MOST_RUNS = 6
PARTS = {  # of the process's time -> in words
    "imports_s": "start",
    "data_s": "data",
    "compile_s": "compiling",
    "train_s": "training",
    "validation_s": "validation",
    "sample_s": "samples",
    "save_s": "saving",
}
OF_ANSWERS = {  # numbers of steps that learn from a model's own answers -> title, what they are of
    "reward": ("Reward", "of an answer"),
    "answer_tokens": ("Length", "tokens of an answer"),
    "kl": ("KL", "nats per token, to the model it began with"),
    "entropy": ("Entropy", "nats per token"),
}
SAMPLE = re.compile(r"^--- a sample after step (\d+)$")
DRAWN_FROM = 0.02  # losses of the first so much of training do not decide what a chart shows


class Story(NamedTuple):
    """What a run's folder tells."""

    name: str
    run: Run
    result: dict
    header: dict  # of config.json
    data: dict  # of data.json
    evaluation: dict  # of eval.json
    rows: list  # of metrics.jsonl
    samples: dict  # step -> texts
    color: int


# --------------------------------------------------------------------------------------------------
# The command


def parse(argv):
    parser = Parser(
        prog="./run.sh report",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
    )
    parser.add_argument(
        "runs", nargs="*", type=given_path, metavar="RUN", help="folders [the newest in runs/]"
    )
    parser.add_argument(
        "--out", type=given_path, metavar="FILE", help="the page [report.html in the first run's]"
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Parse, write the page, print its name. Returns the exit status."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        folders = args.runs or [newest()]
        if len(folders) > MOST_RUNS:
            raise InputError(f"{len(folders)} runs: expected {MOST_RUNS} or fewer on a page")
        out = args.out or folders[0] / "report.html"
        stories = [read_story(folder, i) for i, folder in enumerate(folders)]
        stories = with_names(stories)
        try:
            with whole_file(Path(out)) as aside:
                aside.write_text(document(stories), encoding="utf-8")
        except OSError as e:
            raise InputError(f"{out}: cannot be written: {e.strerror or e}") from None
        print(out, flush=True)
    except InputError as e:
        return refuse(e)
    return 0


def newest():
    """The folder of the run that wrote last, finished or not."""
    runs = runs_folder()
    found = [*runs.glob("*/metrics.jsonl"), *runs.glob("*/seed*/metrics.jsonl")]
    found = [path for path in found if is_run_folder(path.parent)]
    if not found:
        raise InputError(f"{runs}: no run yet; train one with ./run.sh, or name a run's folder")
    return max(found, key=lambda path: path.stat().st_mtime).parent


# --------------------------------------------------------------------------------------------------
# Reading


def read_story(folder, color=0):
    """The Story of a run of ours, finished or not. Raises InputError."""
    if not is_run_folder(folder):
        raise InputError(
            f"{folder}: expected the folder of a run, with its config.json and metrics.jsonl"
        )
    [run] = read_run_folder(folder)
    return Story(
        name=folder.resolve().name,
        run=run,
        result=read_json(folder / "result.json"),
        header=read_json(folder / "config.json"),
        data=read_json(folder / "data.json"),
        evaluation=read_json(folder / "eval.json"),
        rows=read_rows(folder),
        samples=read_samples(folder / "log.txt"),
        color=color,
    )


def with_names(stories):
    """The same with names of their own, where folders are called alike."""
    names = [story.name for story in stories]
    if len(set(names)) == len(names):
        return stories
    return [story._replace(name=story.run.path) for story in stories]


def read_rows(folder):
    """Objects of metrics.jsonl by step, of a resumed run the later ones."""
    rows = []
    for name in ("metrics.jsonl", "metrics.jsonl.bz2"):
        if not (folder / name).is_file():
            continue
        for _, line in lines(folder / name):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, dict) and number(row.get("step")) is not None:
                rows.append(row)
        break
    return rows


def read_samples(path):
    """{step: texts} of the samples in a log."""
    found = {}
    try:
        log = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return found
    inside = None  # lines of the sample that is read
    for line in log:
        start = SAMPLE.match(line)
        if start:
            inside = []
            found.setdefault(int(start[1]), []).append(inside)
        elif line == "---":
            inside = None
        elif inside is not None:
            inside.append(line)
    return {step: ["\n".join(lines) for lines in texts] for step, texts in found.items()}


def points(story, name, x="step"):
    """[(step, value)] of what metrics.jsonl calls so."""
    found = []
    for row in story.rows:
        value = number(row.get(name))
        if value is None:
            continue
        while found and found[-1][0] >= row[x]:  # resumed from a checkpoint
            found.pop()
        found.append((row[x], value))
    return found


def speeds(story):
    """[(step, tokens a second)] between steps, of the training clock."""
    times = [
        (row["step"], number(row.get("train_time"))) for row in story.rows if TRAIN_LOSS in row
    ]
    times = [(step, seconds) for step, seconds in times if seconds is not None]
    found = []
    every = max(1, len(times) // 120)
    for (a, since), (b, until) in zip(times[::every], times[every::every]):
        before, after = tokens_at(story.run, a), tokens_at(story.run, b)
        if before is not None and after is not None and until > since:
            found.append((b, (after - before) / (until - since)))
    return found


def smoothed(points, share=0.02):
    """The running mean of a series' last values, about this share of it at a time."""
    weight = 1 / max(1.0, share * len(points), min(8.0, len(points) / 6))
    found, mean = [], None
    for x, y in points:
        mean = y if mean is None else mean + weight * (y - mean)
        found.append((x, mean))
    return found


# --------------------------------------------------------------------------------------------------
# The page


def document(stories):
    """The page as text."""
    one = len(stories) == 1
    title = stories[0].name if one else " and ".join(story.name for story in stories)
    parts = [heading(stories[0])] if one else [comparing(stories)]
    parts += [section("Curves", element("div", *curves(stories), class_="grid-2"))]
    parts += [section("Time", *(time_by_part(story, one) for story in stories))]
    parts += [section("Evaluation", evaluations(stories))]
    parts += [section("Samples", samples(stories))]
    parts += [section("Trained on what", facts(stories))]
    parts += [section("Again", *(again(story, one) for story in stories))]
    parts += [options(stories)]
    parts += [element("footer", "Written by ./run.sh report of Stopwatch.")]
    return page(title, *parts)


def section(name, *content):
    """A part of the page with its heading, or nothing where it is empty."""
    if not any(content):
        return None
    return element("section", element("h2", name), *content)


def metric_of(story):
    """The metric that the run is judged by: bits per byte where there are any."""
    return "val_bpb" if story.result.get("val_bpb") is not None else story.run.metric


def heading(story):
    """The name, what became of it, and the numbers one looks for first."""
    result, run = story.result, story.run
    chip = None
    if result.get("reached") is True:
        chip = element("span", "target reached", class_="chip good")
    elif result.get("reached") is False:
        chip = element("span", "target not reached", class_="chip bad")
    elif not run.finished:
        chip = element("span", "not finished", class_="chip bad")
    return element(
        "header",
        element("h1", story.name, chip),
        element("p", lead(story), class_="lead"),
        element("div", *(tile(*t) for t in tiles(story)), class_="tiles"),
    )


def lead(story):
    """What happened, in a sentence."""
    run = story.run
    said = f"{short(run.steps)} steps"
    if run.tokens:
        said += f" on {short(run.tokens)} tokens"
    if text(story.result.get("data")) or text(story.data.get("name")):
        said += f" of {Path(story.result.get('data') or story.data['name']).name}"
    if run.time_s is not None:
        said += f" in {duration(run.time_s)} of training"
    if run.hardware:
        said += f", on {run.world_size or 1} × {run.hardware}"
    date = text(dictionary(story.header.get("environment")).get("date"))
    return f"{said}{', ' + date[:10] if date else ''}."


def duration(seconds):
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def tiles(story):
    """[(name, value, unit), ...]"""
    result, run = story.result, story.run
    found = []
    for name in METRICS:
        value = number(result.get(name))
        if value is None and name == run.metric:
            value = run.final_loss
        if value is not None:
            where = "validation" if name != VAL_LOSS else "validation loss"
            found.append((where, f"{value:.4f}", unit(name)))
    found.sort(key=lambda t: t[2] != "bits per byte")
    if number(result.get("train_bpb")) is not None:
        found.append(("training text", f"{result['train_bpb']:.4f}", "bits per byte"))
    for key, name, unit_ in (
        ("params", "parameters", ""),
        ("tokens", "tokens", ""),
        ("tokens_per_s", "speed", "tokens/s"),
    ):
        if number(result.get(key)) is not None:
            found.append((name, short(result[key]), unit_))
    if number(result.get("peak_share")) is not None:
        found.append(("of the peak", f"{result['peak_share']:.1%}", "of matrix products"))
    if number(result.get("process_s")) is not None:
        found.append(("whole process", duration(result["process_s"]), ""))
    found += expenses(result)
    return found


def expenses(result):
    """[(name, value, unit), ...] of what the result says of energy and money."""
    found = []
    for key, value in result.items():
        if number(value) is None or key == "train_time_s":
            continue
        if match := re.fullmatch(r"(.*?)_?(kwh|wh|joules|watts?|eur|usd|dollars|co2_?\w*)", key):
            units = dict(kwh="kWh", wh="Wh", eur="EUR", usd="USD", dollars="USD")
            money = match[2] in ("eur", "usd", "dollars")
            name = match[1].replace("_", " ") or ("cost" if money else "energy")
            found.append((name, short(value), units.get(match[2], match[2])))
        elif key in ("cost", "price", "energy"):
            found.append((key, short(value), ""))
    return found


def tile(name, value, unit_):
    return element(
        "div",
        element("div", name, class_="name"),
        element("div", value, " ", element("span", unit_, class_="unit"), class_="value"),
        class_="tile",
    )


def comparing(stories):
    """The heading of several runs: their numbers beside each other."""
    names = [named(story) for story in stories]
    by_story = [{(name, unit_): value for name, value, unit_ in tiles(s)} for s in stories]
    keys = dict.fromkeys(key for found in by_story for key in found)
    rows = []
    for name, unit_ in keys:
        label = element("span", name, " ", element("span", unit_, class_="unit"))
        rows.append([label, *(found.get((name, unit_), "–") for found in by_story)])
    title = " / ".join(story.name for story in stories)
    sentences = [element("p", named(story), ": ", lead(story)) for story in stories]
    return element(
        "header",
        element("h1", title),
        *sentences,
        element("div", table(["", *names], rows), class_="card", style="margin-top:18px"),
    )


def named(story):
    """The run's name with its color."""
    return element("span", element("i", class_=f"swatch b{story.color}"), story.name)


# --- Curves


def curves(stories):
    """Charts of what was logged."""
    many = len(stories) > 1

    def series(name, of, kind="line"):
        return [
            Series(story.name if many else name, of(story), story.color, kind) for story in stories
        ]

    found = [losses(stories), validation(stories)]
    # Of a model's own answers
    for name, (title, y) in OF_ANSWERS.items():
        mean = series("mean" if not many else "", lambda s: smoothed(points(s, name)))
        if not many:
            mean.insert(0, Series("", points(stories[0], name), stories[0].color, "faint"))
        for story in stories:
            at = points(story, f"val_{name}")
            label = story.name if many else "validation"
            mean.append(Series(label, at, story.color + (not many), "dots"))
        found.append(chart(mean, title=title, x="step", y=y))
    lr = series("", lambda s: points(s, "lr"))
    found.append(chart(lr, title="Learning rate", x="step", y="of its peak", zero=True))
    norm = series("", lambda s: smoothed(points(s, "grad_norm")))
    if not many:
        faint = series("", lambda s: points(s, "grad_norm"), "faint")
        norm = faint + norm
    found.append(
        chart(norm, title="Gradient norm", x="step", y="of all parameters", log_y=spread(norm))
    )
    speed = series("", speeds)
    found.append(
        chart(speed, title="Speed", x="step", y="tokens/s of the training clock", zero=True)
    )
    by_time = [
        Series(s.name if many else "", seconds_and_losses(s), s.color, "dots")
        for s in stories
        if s.run.metric == stories[0].run.metric
    ]
    found.append(
        chart(
            by_time,
            title="Validation by time",
            x="seconds of training",
            y=unit(stories[0].run.metric),
            y_range=within(by_time),
        )
    )
    return [figure for figure in found if figure]


def seconds_and_losses(story):
    """[(seconds, loss)] of its validations, of the whole split or of a part of it."""
    part = f"part_{story.run.metric}"
    found = {}
    for row in story.rows:
        loss = number(row.get(story.run.metric, row.get(part)))
        seconds = number(row.get("train_time"))
        if loss is not None and seconds is not None:
            found[row["step"]] = seconds, loss
    return [found[step] for step in sorted(found)]


def validation(stories):
    """Bits per byte, of the whole split and of the parts of it that were looked at."""
    drawn = []
    for story in stories:
        name = story.name if len(stories) > 1 else "whole split"
        color = story.color
        if part := points(story, "part_val_bpb"):
            drawn.append(Series(f"{name}, a part" if len(stories) > 1 else "a part", part, color))
        drawn.append(Series(name, points(story, "val_bpb"), color + (not len(stories) > 1), "dots"))
    targets = {s.run.target for s in stories if s.run.metric == "val_bpb" and s.run.target}
    level = None
    if len(targets) == 1:
        [target] = targets
        level = target, f"target {short(target)}"
    if not any(s.points for s in drawn if s.kind == "dots"):
        return None
    return chart(
        drawn,
        title="Validation",
        x="step",
        y="bits per byte",
        level=level,
        y_range=within(drawn, level),
    )


def losses(stories):
    """Training loss, each step and its mean, and validation loss."""
    drawn = []
    for story in stories:
        train = points(story, TRAIN_LOSS)
        val = points(story, VAL_LOSS)
        if len(stories) > 1:
            drawn.append(Series(story.name, smoothed(train), story.color))
            continue
        drawn.append(Series("", train, 0, "faint"))
        drawn.append(Series("training", smoothed(train), 0))
        drawn.append(Series("validation", val, 1, "dots"))
    title = "Loss" if len(stories) == 1 else "Training loss"
    return chart(drawn, title=title, x="step", y="nats per token", y_range=within(drawn))


def within(series, level=None):
    """The range of what lies behind the first steps, whose losses would flatten all others."""
    xs = [x for s in series for x, _ in s.points]
    if not xs:
        return None
    begin = DRAWN_FROM * max(xs)
    ys = [y for s in series if s.kind != "faint" for x, y in s.points if x >= begin]
    ys += [level[0]] if level else []
    return (min(ys), max(ys)) if ys else None


def spread(series):
    """Whether the values are of so different sizes that a logarithmic axis shows them better."""
    ys = [y for s in series for _, y in s.points]
    return bool(ys) and min(ys) > 0 and max(ys) > 20 * min(ys)


# --- Time, evaluation, samples


def time_by_part(story, alone):
    result = story.result
    total = number(result.get("process_s"))
    if total is None:
        return None
    parts = [(name, number(result.get(key)) or 0.0) for key, name in PARTS.items()]
    parts.append(("the rest", max(0.0, total - sum(seconds for _, seconds in parts))))
    said = element("p", f"{duration(total)} from the start of the process to its result.")
    return element(
        "div",
        element("h3", named(story)) if not alone else None,
        said,
        stacked_bar(parts),
        class_="card",
        style=None if alone else "margin-bottom:12px",
    )


def evaluations(stories):
    """What eval.json says, a row a number."""
    found = [evaluated(story) for story in stories]
    keys = list(dict.fromkeys(key for rows in found for key in rows))
    if not keys:
        return None
    many = len(stories) > 1
    rows = []
    for task, metric in keys:
        row = [task, metric]
        for by_key in found:
            row += number_cells(by_key.get((task, metric)), picture=not many)
        if len(stories) == 2:
            row.append(change(metric, *(by_key.get((task, metric)) for by_key in found)))
        rows.append(row)
    head = ["task", "measure"]
    for story in stories:
        head += [named(story) if many else "", *([] if many else ["chance", "of"])]
    if len(stories) == 2:
        head.append("the second")
    note = element(
        "p",
        "± is a standard error. Tasks called generated are made from held-out text and are no "
        "public benchmark. docs/evaluation.md says how each number is made."
        + (" ./run.sh eval --against compares item by item, which is finer." if many else ""),
        class_="soft",
    )
    return element("div", table(head, rows), note, class_="card")


def change(metric, one, other):
    """What the second run's number is more or less than the first one's; good or bad where that is
    beyond two standard errors of independent numbers."""
    values = [number(dictionary(row).get("value")) for row in (one, other)]
    if None in values:
        return "–"
    difference = values[1] - values[0]
    errors = [number(dictionary(row).get("stderr")) for row in (one, other)]
    class_ = None
    if None not in errors and abs(difference) > 2 * math.hypot(*errors):
        lower_is_better = not metric.startswith(("acc", "exact"))
        class_ = "good" if (difference < 0) == lower_is_better else "bad"
    return element("span", f"{difference:+.4f}", class_=class_)


def evaluated(story):
    rows = story.evaluation.get("results")
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return {(str(row.get("task")), str(row.get("metric"))): row for row in rows}


def number_cells(row, picture):
    """The cells of a number."""
    if row is None or number(row.get("value")) is None:
        return ["–"] if not picture else ["–", "", ""]
    value = number(row["value"])
    error = number(row.get("stderr"))
    said = f"{value:.4f}" if abs(value) < 1000 else short(value)
    if error is not None:
        said += f" ± {error:.4f}"
    if not picture:
        return [said]
    chance = number(row.get("chance"))
    drawn = interval(value, error, chance=chance) if chance is not None else None
    note = f", {row['note']}" if row.get("note") else ""
    cell = element("span", f"{said} ", drawn)
    return [
        cell,
        "" if chance is None else short(chance),
        f"{row.get('n', '')} {row.get('unit', '')}{note}",
    ]


def samples(stories):
    """What the models wrote, the last step's first."""
    blocks = []
    for story in stories:
        prompts = [str(p) for p in story.run.config.get("sample_prompts") or []]
        for i, (step, texts) in enumerate(sorted(story.samples.items(), reverse=True)):
            name = element("summary", f"after step {step:,}")
            if len(stories) > 1:
                name = element("summary", named(story), f" after step {step:,}")
            shown = [element("pre", *prompted(written, prompts)) for written in texts]
            inside = [name, element("div", *shown, class_="samples")]
            blocks.append(element("details", *inside, open="" if i == 0 else None))
    return element("div", *blocks, class_="card") if blocks else None


def prompted(written, prompts):
    """A sample with its prompt set apart."""
    for prompt in sorted(prompts, key=len, reverse=True):
        if prompt and written.startswith(prompt):
            return element("span", prompt, class_="prompt"), written[len(prompt) :]
    return (written,)


# --- Facts


def facts(stories):
    """Model, data, machine."""
    by_story = [dict(known(story)) for story in stories]
    keys = dict.fromkeys(key for found in by_story for key in found)
    rows = [[key, *(found.get(key, "–") for found in by_story)] for key in keys]
    head = ["", *(named(story) for story in stories)] if len(stories) > 1 else None
    return element("div", table(head, rows, class_="facts"), class_="card")


def known(story):
    """(name, value) pairs."""
    config, result = story.run.config, story.result
    environment = dictionary(story.header.get("environment"))
    shape = [f"{config[key]} {word}" for key, word in SHAPE.items() if config.get(key)]
    if shape:
        yield "model", f"{config.get('template', 'gpt')}: {', '.join(shape)}"
    if config.get("track"):
        yield "track", config["track"]
    source = text(result.get("data")) or text(story.data.get("name"))
    if source:
        yield "text", source
    splits = dictionary(story.data.get("splits"))
    counts = [f"{name} {short(dictionary(part).get('tokens'))}" for name, part in splits.items()]
    if counts:
        yield "tokens", ", ".join(counts)
    if story.data.get("split"):
        yield "held out", story.data["split"]
    if config.get("tokenizer"):
        size = story.header.get("n_vocab")
        yield "tokenizer", f"{config['tokenizer']}{f', {size:,} ids' if size else ''}"
    if story.run.data:
        yield "fingerprint of the data", story.run.data[:16]
    if config.get("batch_tokens"):
        sizes = ", ".join(short(n) for n in config["batch_tokens"])
        yield "batch", f"{sizes} tokens, rows of {config.get('row_len')}"
    rates = [
        f"{key.removesuffix('_lr')} {config[key]}"
        for key in config
        if key.endswith("_lr") and key != "stage_lr"
    ]
    if rates:
        yield "learning rates", ", ".join(rates)
    yield "seed", story.run.seed
    if story.run.hardware:
        cores = f", {environment['threads']} threads" if environment.get("threads") else ""
        yield "machine", f"{story.run.world_size or 1} × {story.run.hardware}{cores}"
    software = [f"PyTorch {environment[key]}" for key in ("torch",) if environment.get(key)]
    software += [str(environment[key]) for key in ("dtype", "platform") if environment.get(key)]
    if software:
        yield "software", ", ".join(software)
    if environment.get("git_commit"):
        changed = ", changed since" if environment.get("git_dirty") else ""
        yield "source", f"commit {environment['git_commit'][:12]}{changed}"
    if story.run.resumed_at:
        yield "resumed at steps", ", ".join(map(str, story.run.resumed_at))


SHAPE = {"n_layer": "layers", "n_embd": "wide", "n_head": "heads", "n_kv_head": "heads of keys"}


def again(story, alone):
    """The command to repeat the run."""
    command = text(story.header.get("command"))
    note = None
    if not command:
        words = ["./run.sh", "--track", str(story.run.track or ""), "--seed", str(story.run.seed)]
        command = shlex.join(words)
        note = "The run kept no command: this is its track and its seed; its options are below."
    return element(
        "div",
        element("h3", named(story)) if not alone else None,
        element("pre", command),
        element("p", note, class_="soft") if note else None,
    )


def options(stories):
    """Every option; of several runs first those that differ."""
    keys = list(dict.fromkeys(key for story in stories for key in story.run.config))
    if not keys:
        return None
    rows, differing = [], []
    for key in keys:
        values = [shown(story.run.config.get(key)) for story in stories]
        (differing if len(set(values)) > 1 else rows).append([element("code", key), *values])
    head = ["", *(named(story) for story in stories)]
    parts = []
    if differing:
        parts.append(
            section("Options that differ", element("div", table(head, differing), class_="card"))
        )
    parts.append(element("details", element("summary", "All options"), table(head, rows)))
    return element("div", *parts)


def shown(value):
    if isinstance(value, list):
        return " ".join(map(str, value)) or "–"
    return "–" if value in (None, "") else str(value)
