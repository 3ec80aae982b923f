"""./run.sh data mix-search: short trainings over a few ratios of a mix.

Everything before the mix is done once. Each ratio gets its own shards, a training of the same
length, and a measurement in bits per byte on the validation text of each source. A short run of a
small model says which ratio is better for such a run; larger models and longer training move the
best one, mostly towards the larger source.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

from base import InputError, to_json, write_text
from base.command import Parser, given_path
from base.places import cache_folder

from . import build, reading, recipe
from .pieces import read_json, read_lines, say, workers, write_json
from .report import COLORS, STYLE, WIDTH, key, label, svg, table, text
from .sources import MANIFEST

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the first of two sources, where none are given
ROOT = Path(__file__).resolve().parent.parent


def main(argv):
    """`./run.sh data mix-search`. Returns the exit status; raises InputError."""
    parser = Parser(
        prog="./run.sh data mix-search",
        usage="./run.sh data mix-search RECIPE.toml --out DIR [OPTIONS] [-- OPTIONS OF TRAINING]",
        description="Train for a short while on each of a few mixes of a recipe's sources, and "
        "show the validation loss of each source. What follows -- goes to ./run.sh train.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=given_path)
    parser.add_argument("--out", type=given_path, required=True, metavar="DIR")
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="W,W",
        help="of the sources in order, such as 0.7,0.3; once for each mix "
        "[five shares of the first of two]",
    )
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="[%(default)s]")
    parser.add_argument("--processes", type=int, default=build.n_cores(), metavar="N")
    parser.add_argument("--cache-dir", default=str(cache_folder()), metavar="DIR")
    at = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:at])
    todo = recipe.read(args.recipe)
    mixes = parse_weights(args.weights, [part for part in todo.source if part.split != "val"])

    with workers(args.processes) as crew:
        folders = make_mixes(todo, mixes, args.out, Path(args.cache_dir) / "data", crew)
    texts = validation_texts(args.out)
    results = []
    for weights, folder in folders:
        results.append(train_and_measure(weights, folder, texts, args, argv[at + 1 :]))
    names = [*texts]
    write_text(args.out / "mix-search.html", page(names, results))
    print(lines_of_table(names, results))
    said = dict(best=min(results, key=mean)["weights"], report=str(args.out / "mix-search.html"))
    print(to_json(said))
    return 0


def parse_weights(given, parts):
    """[{source: weight}] of the mixes. Raises InputError."""
    names = [part.name for part in parts]
    if len(names) < 2:
        raise InputError("mix-search: expected a recipe of two sources or more")
    if not given:
        if len(names) > 2:
            raise InputError(
                f"--weights: expected a weight for each of {', '.join(names)}, once for each mix"
            )
        return [{names[0]: share, names[1]: round(1 - share, 6)} for share in SHARES]
    mixes = []
    for words in given:
        try:
            weights = [float(word) for word in words.split(",")]
        except ValueError:
            weights = []
        if len(weights) != len(names) or min(weights, default=0) <= 0:
            raise InputError(
                f"--weights {words}: expected {len(names)} positive numbers with commas between "
                f"them, for {', '.join(names)}"
            )
        mixes.append({n: round(w / sum(weights), 6) for n, w in zip(names, weights)})
    return mixes


def make_mixes(todo, mixes, out, cache, crew):
    """Build a corpus for each mix: [(weights, its folder)]. All have as many tokens as the one
    that has the fewest of them."""
    files = {part.name: reading.locate(part, cache) for part in todo.source}
    stages = build.Stages(out / "work", crew.processes)
    checksums = stages.checksums(files)
    done = build.make_tokens(todo, stages, files, checksums, crew)
    folders = []
    for weights in mixes:
        parts = [dataclasses.replace(p, weight=weights.get(p.name)) for p in todo.source]
        mixed = dataclasses.replace(todo, source=tuple(parts))
        folder = out / "-".join(f"{share:g}" for share in weights.values())
        its = done | dict(mix=build.make_mix(mixed, stages, done))
        manifest = build.describe(mixed, files, checksums, its)
        build.publish(folder, stages, manifest, its, leave=True)
        folders.append((weights, folder))
    write_validation(todo, done["encode"].folder, out / "validation")
    return folders


def write_validation(todo, encoded, folder):
    """The validation text of each source in a file of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = {part.name: [] for part in todo.source}
    for path in sorted(encoded.glob("*.jsonl.zst")):
        for line in read_lines(path):
            if line["split"] == "val":
                documents[line["source"]].append(line["text"])
    for name, its in documents.items():
        if its:
            write_text(folder / f"{name}.txt", "<|endoftext|>".join(its))


def validation_texts(out):
    """{source: file}."""
    return {path.stem: path for path in sorted((out / "validation").glob("*.txt"))}


def train_and_measure(weights, folder, texts, args, options):
    """Train on a mix and measure each source, unless that has been done: dict of the result."""
    run = folder / "run"
    result = folder / "mix-search.json"
    asked = dict(fingerprint=read_json(folder / MANIFEST)["fingerprint"], options=options)
    asked |= dict(steps=args.steps, weights=weights)
    if result.exists() and read_json(result)["asked"] == asked:
        return read_json(result)
    say(f"{folder}: training {args.steps} steps")
    run = folder / f"run-{time.strftime('%Y%m%d-%H%M%S')}"
    command = ["train", "--data", folder, "--track", "own-text", "--steps", args.steps]
    call([*command, "--run-dir", run, "--sample-tokens", 0, "--patience", 0, *options])
    given = [word for path in texts.values() for word in ("--text", path)]
    measured = call(["eval", "--run", run, *given, "--json"])
    losses = {
        row["task"]: row["value"] for row in measured["results"] if row["metric"] == "bits per byte"
    }
    bpb = {name: losses[str(path)] for name, path in texts.items()}
    found = dict(asked=asked, weights=weights, bits_per_byte=bpb)
    write_json(result, found)
    return found


def call(words):
    """Another program of ours; the JSON line that it ends with. Raises InputError."""
    command = [sys.executable, str(ROOT / "door.py"), *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, 3):  # 3: there was a target, which was not reached
        raise InputError(f"{' '.join(command[2:])}: ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def mean(result):
    values = result["bits_per_byte"].values()
    return sum(values) / len(values)


def lines_of_table(names, results):
    """The results as text."""
    lines = ["  ".join([f"{'mix':28}", *(f"{name:>14}" for name in names), f"{'mean':>8}"])]
    for result in results:
        mix = ", ".join(f"{n} {w:.0%}" for n, w in result["weights"].items())
        cells = [f"{result['bits_per_byte'][name]:14.4f}" for name in names]
        lines.append("  ".join([f"{mix:28}", *cells, f"{mean(result):8.4f}"]))
    lines.append("validation loss in bits per byte, lower is better")
    return "\n".join(lines)


def page(names, results):
    """mix-search.html: a line for each source over the share of the first."""
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    first = [*results[0]["weights"]][0]
    ordered = sorted(results, key=lambda result: result["weights"][first])
    values = [v for result in results for v in result["bits_per_byte"].values()]
    low, high = min(values), max(values)
    room = (high - low) or 1.0

    def x(result):
        return 60 + (WIDTH - 120) * result["weights"][first]

    def y(value):
        return 20 + 240 * (high - value) / room

    parts = [f"<line x1='60' x2='{WIDTH - 60}' y1='270' y2='270' stroke='#c9ccd1'/>"]
    for k in range(5):
        value = low + room * k / 4
        parts.append(label(52, y(value) + 4, f"{value:.2f}", "end", "#57606f"))
    for result in ordered:
        share = f"{result['weights'][first]:.0%}"
        parts.append(label(x(result), 288, share, "middle", "#57606f"))
    for name in names:
        points = [(x(result), y(result["bits_per_byte"][name])) for result in ordered]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(
            f"<polyline points='{path}' fill='none' stroke='{colors[name]}' stroke-width='2'/>"
        )
        parts += [
            f"<circle cx='{a:.1f}' cy='{b:.1f}' r='4' fill='{colors[name]}'/>" for a, b in points
        ]
    rows = []
    for result in ordered:
        mix = ", ".join(f"{text(n)} {w:.0%}" for n, w in result["weights"].items())
        rows.append(
            [mix, *(f"{result['bits_per_byte'][n]:.4f}" for n in names), f"{mean(result):.4f}"]
        )
    head = ["mix", *(f">{name}" for name in names), ">mean"]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>Mix</title>"
        f"<style>{STYLE}</style></head><body><h1>Which mix</h1>"
        f"<p>Bits per byte on the validation text of each source, over the share of {text(first)}; "
        f"lower is better.</p>{key(colors)}{svg(300, parts)}{table(head, rows)}</body></html>\n"
    )
