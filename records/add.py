"""Takes finished runs into the records: checks each against its own log and all against each other,
keeps the evidence.

A record is a folder, records/<track>/<date>_<name>/, with summary.json and a folder for each seed:
the run's log.txt, metrics.jsonl, config.json and result.json as they were, but for absolute paths,
of which the last part is kept.
"""

import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import unicodedata
from contextlib import suppress
from pathlib import Path

from base import InputError

from .compare import APART, losses_to_test, t_test
from .read import read_runs

RECORDS = Path(__file__).parent
FILES = ("log.txt", "metrics.jsonl", "config.json", "result.json")  # never the weights
MOST_BYTES = 10_000_000  # of a file; the public record's largest logs have 0.3 MB
RULER = "\n" + "=" * 100 + "\n"  # around the description in log.txt
PATHS = (
    "run_dir",
    "cache_dir",
    "text",
    "resume",
    "warm_start",
)  # of the configuration: where, not what
OF_THE_RUN = (
    "date",
    "git_dirty",
    "probe",
)  # in the environment, and may differ between runs of a record
STEP_LINE = re.compile(r"step:\d+/\d+ (?:train|val)_loss:\S+ train_time:\d+ms(?= )")


def add_arguments(parser):
    parser.description = """\
Makes a record of finished runs, records/<track>/<date>_<name>/: their logs, metrics, configurations and results (not
the weights), and summary.json with means, spreads and p. Runs have to agree with their own logs, to come from a commit,
and to differ in the seed alone."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="folder of a finished run, or of several; several are several seeds of one record",
    )
    parser.add_argument(
        "--name", required=True, help="what is new, in a few words; also names the folder"
    )
    parser.add_argument(
        "--allow-dirty",
        action="store_true",
        help="take runs whose source is not a commit of this repository; the record says so",
    )
    parser.add_argument(
        "--records",
        type=Path,
        default=RECORDS,
        metavar="DIR",
        help="where records are kept [records]",
    )


def run(args):
    """Make the record, print its folder. Returns 0; raises InputError, and then nothing has
    changed."""
    runs = sorted(
        (load_run(f) for path in args.runs for f in run_folders(path)),
        key=lambda r: r["result"]["seed"],
    )
    same_but_seeds(runs)
    if not args.allow_dirty:
        require_commit(runs, args.records)
    slug = slugify(args.name)
    if not slug:
        raise InputError(
            f"--name {args.name!r}: expected some letters or digits, from which the folder is named"
        )
    folder = (
        args.records
        / runs[0]["config"]["track"]
        / f"{max(r['environment']['date'] for r in runs)[:10]}_{slug}"
    )
    taken = [p for p in folder.parent.glob("*") if p.name.split("_", 1)[-1] == slug]
    if taken:
        raise InputError(f"--name {args.name!r}: {taken[0]} is there already; choose another name")
    summary = dict(name=args.name, date=folder.name[:10]) | summarize(runs)
    aside = folder.with_name(f".{folder.name}.tmp")
    made = not folder.parent.exists()
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of an add that was killed
        for r in runs:
            write_run(r, aside / f"seed{r['result']['seed']}")
            load_run(
                aside / f"seed{r['result']['seed']}"
            )  # what is kept has to pass the same checks
        (aside / "summary.json").write_text(
            json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        os.rename(aside, folder)
    except OSError as e:
        raise InputError(
            f"{folder}: cannot be written: {e.strerror or e}; nothing was added"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if made:
            with suppress(OSError):
                folder.parent.rmdir()  # only if empty
    print(folder)
    return 0


def slugify(name):
    """Letters a-z, digits and dashes: safe as a folder's name on every system."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:60].strip("-")


# --- one run


def run_folders(path):
    """The folder itself if it is a run's, else the folders in it, all of them: to leave one out
    is to choose."""
    inside = sorted(p for p in path.glob("*") if p.is_dir())
    return inside if inside and not any((path / name).exists() for name in FILES) else [path]


def load_run(folder):
    """A finished run as dict(folder, config, environment, data, result, metrics, source: of the
    trainer, text: of each file, run: a Run). Raises InputError where it is unfinished or its
    files contradict each other."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: expected the folder of a run, as --run-dir names it")
    for name in reversed(FILES):  # result.json, which is written last, first
        path = folder / name
        if not path.is_file():
            why = (
                ": the run has not finished, --resume may go on with it"
                if name == "result.json"
                else ""
            )
            raise InputError(f"{folder}: has no {name}{why}; only finished runs become records")
        if path.stat().st_size > MOST_BYTES:
            raise InputError(
                f"{path}: expected at most {MOST_BYTES:,} bytes, found {path.stat().st_size:,}"
            )
    try:
        text = {name: (folder / name).read_text(encoding="utf-8") for name in FILES}
        described, result = json.loads(text["config.json"]), json.loads(text["result.json"])
        metrics = [json.loads(line) for line in text["metrics.jsonl"].splitlines()]
        r = dict(
            folder=folder,
            config=described["config"],
            environment=described["environment"],
            result=result,
            data=described["data"],
            metrics=metrics,
            text=text,
            source=text["log.txt"].split(RULER)[0],
        )
        check(r)
        r["run"] = read_runs(folder)[0]
        summarize([r])  # so that whatever is missing for that is found here
        return r
    except OSError as e:
        raise InputError(f"{folder}: cannot be read: {e.strerror or e}") from None
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as e:
        if isinstance(e, InputError):
            raise
        raise InputError(
            f"{folder}: not the files of a run as train_gpt.py writes them "
            f"({type(e).__name__}: {e})"
        ) from None


def check(r):
    """log.txt, metrics.jsonl, config.json and result.json have to tell the same story. Raises
    InputError."""

    def need(ok, problem):
        if not ok:
            raise InputError(
                f"{r['folder']}: {problem}; the files were cut or altered, so it cannot become a record"
            )

    c, e, result = r["config"], r["environment"], r["result"]
    parts = r["text"]["log.txt"].split(RULER, 2)
    need(len(parts) == 3, "log.txt ends before the first step")
    need(parts[1] == r["text"]["config.json"], "log.txt and config.json describe different runs")
    said = [
        re.sub("_loss:-?inf", "_loss:nan", m.group())
        for m in map(STEP_LINE.match, parts[2].splitlines())
        if m
    ]
    for line, m in itertools.zip_longest(said, r["metrics"]):
        expected = m and step_line(m, c["steps"])
        need(
            line == expected,
            f"log.txt has {line or 'no further step'!r} where metrics.jsonl has "
            f"{expected or 'no further step'!r}",
        )
    last = next((m for m in reversed(r["metrics"]) if "val_loss" in m), None)
    need(last, "log.txt has no validation")
    check_resumed(r, parts[2])
    for name, value in dict(
        steps=last["step"],
        val_loss=last["val_loss"],
        val_bpb=last.get("val_bpb"),
        train_time_s=round(last["train_time"], 3),
    ).items():
        need(
            result[name] == value,
            f"result.json has {name} {result[name]}, the last validation in log.txt and "
            f"metrics.jsonl {value}",
        )
    for name, value in dict(
        track=c["track"],
        seed=c["seed"],
        target=c["target"],
        target_metric=c["target_metric"],
        data_fingerprint=r["data"],
        device=e["device"],
        world_size=e["world_size"],
    ).items():
        need(result[name] == value, f"result.json has {name} {result[name]}, config.json {value}")
    if not c["track"] or c["target"] is None:
        raise InputError(
            f"{r['folder']}: has no {'target' if c['track'] else 'track'}; a record is the time in which "
            "a track's target was reached"
        )
    need(slugify(c["track"]) == c["track"], f"expected a track's name, found {c['track']!r}")
    need(re.match(r"\d{4}-\d\d-\d\dT", e["date"]), f"expected a date, found {e['date']!r}")
    need(type(c["seed"]) is int, f"expected a number as seed, found {c['seed']!r}")
    loss = result[c["target_metric"]]
    need(
        math.isfinite(loss) and math.isfinite(result["train_time_s"]),
        "expected finite loss and time",
    )
    need(
        result["reached"] == (loss <= c["target"]),
        f"result.json has reached {result['reached']} with {c['target_metric']} {loss} and target {c['target']}",
    )


def check_resumed(r, steps):
    """A run that went on from a checkpoint has to be one run on one machine. steps: log.txt
    behind its header."""

    def need(ok, problem):
        if not ok:
            raise InputError(f"{r['folder']}: {problem}, so it cannot become a record; run it anew")

    found = [
        int(step)
        for step in re.findall(r"^resumed from step (\d+)$", steps, re.MULTILINE)
        if step != "0"
    ]
    said = r["result"].get("resumed_at", [])
    need(found == said, f"log.txt says it was resumed from steps {found}, result.json {said}")
    first = r["metrics"][0]["step"]
    need(
        not found or first <= found[0],
        f"its log begins at step {first}, resumed from a checkpoint in another folder",
    )
    need(RULER not in steps, "it was resumed with another source")
    changed = re.search(r"^resumed with (?:.*, )?(environment\..*)$", steps, re.MULTILINE)
    need(not changed, changed and f"it was resumed with another {changed[1]}")
    need(
        not r["config"].get("warm_start"),
        f"it began with the weights of {r['config'].get('warm_start')}",
    )


def step_line(m, total):
    """How Log writes a line of metrics.jsonl into log.txt, up to the time."""
    kind = "train" if "train_loss" in m else "val"
    loss = m[f"{kind}_loss"]  # null where it was not finite
    return (
        f"step:{m['step']}/{total} {kind}_loss:{math.nan if loss is None else loss:.4f} "
        f"train_time:{1000 * m['train_time']:.0f}ms"
    )


def write_run(r, folder):
    """The run's files into a new folder. Machines' paths are nobody's business: of each its last
    part is kept."""
    folder.mkdir(parents=True)
    said = [r["result"].get("run_dir", ""), *(r["config"].get(name, "") for name in PATHS)]
    paths = [path for path in said if os.path.isabs(path)]
    for name, text in r["text"].items():
        source, ruler, rest = text.partition(RULER) if name == "log.txt" else ("", "", text)
        for path in sorted(paths, key=len, reverse=True):  # a folder after what is in it
            if (
                len(Path(path).parts) > 2
            ):  # "/data" says nothing, and is easily part of another word
                for written in {path, json.dumps(path)[1:-1]}:
                    rest = rest.replace(written, Path(path).name)
        (folder / name).write_text(source + ruler + rest, encoding="utf-8")


# --- several runs


def settings(r):
    """What has to be the same in all runs of a record, as a flat dict."""
    apart = {"config": APART, "environment": OF_THE_RUN}
    flat = {
        f"{part}.{name}": value
        for part, names in apart.items()
        for name, value in r[part].items()
        if name not in names
    }
    return flat | {"data": r["data"], "source in log.txt": r["source"]}


def same_but_seeds(runs):
    """Runs of one record differ in the seed, and only there. Raises InputError."""
    first = settings(runs[0])
    for a, b in itertools.pairwise(runs):
        if a["result"]["seed"] == b["result"]["seed"]:
            raise InputError(
                f"{a['folder']} and {b['folder']}: expected different seeds, found {a['result']['seed']} "
                "twice; a repetition says nothing about chance"
            )
        other = settings(b)
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                brief = (
                    ""
                    if name.startswith("source")
                    else f" ({first.get(name)!r} and {other.get(name)!r})"
                )
                raise InputError(
                    f"{runs[0]['folder']} and {b['folder']}: {name} differs{brief}; runs of one record "
                    "differ in the seed alone, add these apart"
                )


def summarize(runs):
    """What runs of one record amount to, from their own files; runs: in the order of their seeds.

    p_value: of a mean loss this low if the true mean were the target, as `python -m records check`
    has it: of the last losses, but where a run stopped at its first validation at the target, of
    all at that step (p_step).
    """
    c, e = runs[0]["config"], runs[0]["environment"]
    results = [r["result"] for r in runs]
    losses, times = (
        [result[name] for result in results] for name in (c["target_metric"], "train_time_s")
    )
    resumed = [result.get("resumed_at", []) for result in results]
    tested, p_step, looks = losses_to_test([r["run"] for r in runs])
    return dict(
        track=c["track"],
        target_metric=c["target_metric"],
        target=c["target"],
        n=len(runs),
        seeds=[result["seed"] for result in results],
        reached=sum(result["reached"] for result in results),
        losses=losses,
        loss_mean=statistics.mean(losses),
        loss_sd=sd(losses),
        p_value=t_test(tested, c["target"], looks).p,
        p_step=p_step,
        times_s=times,
        time_mean_s=statistics.mean(times),
        time_sd_s=sd(times),
        cold_starts_s=[result["cold_start_s"] for result in results],
        steps=[result["steps"] for result in results],
        tokens=[result["tokens"] for result in results],
        params=results[0]["params"],
        git_commit=e["git_commit"],
        git_dirty=any(r["environment"]["git_dirty"] is not False for r in runs),
        data=Path(results[0]["data"]).name,
        data_fingerprint=runs[0]["data"],
        machine_probe=e.get("probe"),
        environment={k: v for k, v in e.items() if k not in OF_THE_RUN and k != "git_commit"},
    ) | (dict(resumed_at=resumed) if any(resumed) else {})


def sd(values):
    return statistics.stdev(values) if len(values) > 1 else None


# --- the source


def require_commit(runs, records):
    """The code that ran, and this code, are commits. Raises InputError."""

    def git(*args):
        return subprocess.run(["git", "-C", records, *args], capture_output=True, text=True)

    ending = "commit first and run again, or --allow-dirty to take it as it is"
    for r in runs:
        if r["environment"]["git_dirty"] is not False:
            found = (
                "no git repository"
                if r["environment"]["git_dirty"] is None
                else "uncommitted changes"
            )
            raise InputError(
                f"{r['folder']}: ran with {found}, so no commit holds its source; {ending}"
            )
    if not shutil.which("git") or git("rev-parse").returncode:
        return  # records kept elsewhere
    commit = runs[0]["environment"]["git_commit"]
    if git("cat-file", "-e", f"{commit}^{{commit}}").returncode:
        raise InputError(
            f"{runs[0]['folder']}: commit {commit} is not in this repository; fetch it, or --allow-dirty"
        )
    # other records, and what is made from them, may be waiting to be committed
    changes = git(
        "status",
        "--porcelain",
        "--",
        ":(top)",
        ":(exclude)*/*",
        ":(exclude)README.md",
        ":(exclude)history.svg",
    ).stdout.splitlines()
    if changes:
        raise InputError(
            f"uncommitted changes here ({changes[0].strip()}{' ...' * (len(changes) > 1)}); {ending}"
        )
