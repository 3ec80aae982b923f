"""Takes finished runs into the records: checks each against its own files and all against each
other, keeps the evidence.

A record is a folder, records/<track>/<date>_<name>/, where everything stands once:
    summary.json            means, spreads and p
    source.tar.bz2          the source that all its seeds ran from; its digest is in each log
    seed0/log.txt           as it was, with the configuration, but for absolute paths, of which
                            the last part is kept
    seed0/result.json       the same
    seed0/metrics.jsonl.bz2
"""

import bz2
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
from typing import NamedTuple

from base import InputError, whole_file
from base.command import given_path
from base.files import sweep

from .check import losses_to_test, t_test
from .metrics import METRICS, TRAIN_LOSS, VAL_LOSS, meets
from .read import read_runs
from .runs import APART, Run
from .source import ARCHIVE, named_in, unpacked
from .source import check as check_source

RECORDS = Path(__file__).parent
MOST_BYTES = 10_000_000  # of a file; the public record's largest logs have 0.3 MB
RULER = "\n" + "=" * 100 + "\n"  # around the description in log.txt
# Fields of the configuration that say where, not what
PATHS = ("run_dir", "cache_dir", "text", "val_text", "vocabulary", "resume", "warm_start")
# Of the environment: may differ between the runs of a record
OF_THE_RUN = ("date", "git_dirty", "probe")
MOMENT = 0.01  # seconds
STEP_LINE = re.compile(r"step:\d+/\d+ (?:train|val)_loss:\S+ train_time:\d+ms(?= )")


class Finished(NamedTuple):
    """A finished run with the content of its files."""

    folder: Path
    text: dict  # content of log.txt, metrics.jsonl and result.json
    head: str  # what stands in the log before the description
    steps: str  # and behind it
    config: dict
    environment: dict
    data: str  # fingerprint
    result: dict
    metrics: list  # a dict for each line of metrics.jsonl
    source: str  # its digest, or, of old runs, its text as it stands in the log
    archive: Path | None  # of the source; None for old runs
    run: Run

    @property
    def seed(self):
        return self.result["seed"]


def add_arguments(parser):
    parser.description = """\
Makes a record of finished runs: a folder records/<track>/<date>_<name>/ with their logs,
metrics and results, the source that they ran from, and summary.json with means, spreads and
p. The weights are not kept.

Each run has to agree with its own log and with the source beside it. Runs of one record come
from one commit and differ in the seed alone. Otherwise one line says what is wrong, and
nothing is added."""
    parser.add_argument(
        "runs",
        nargs="+",
        type=given_path,
        metavar="RUN_DIR",
        help="folder of a finished run, or of several, which are the seeds of one record",
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
        type=given_path,
        default=RECORDS,
        metavar="DIR",
        help="where records are kept [records]",
    )


def run(args):
    """Make the record, print its folder. Returns 0; raises InputError, and then nothing has
    changed."""
    runs = []
    for path in args.runs:
        runs += [load_run(folder) for folder in run_folders(path)]
    runs.sort(key=lambda r: r.seed)
    same_but_seeds(runs)
    if not args.allow_dirty:
        require_commit(runs, args.records)

    slug = slugify(args.name)
    if not slug:
        raise InputError(
            f"--name {args.name!r}: expected some letters or digits, from which the folder is named"
        )
    date = max(r.environment["date"] for r in runs)[:10]
    folder = args.records / runs[0].config["track"] / f"{date}_{slug}"
    taken = [p for p in folder.parent.glob("*") if p.name.split("_", 1)[-1] == slug]
    if taken:
        raise InputError(f"--name {args.name!r}: {taken[0]} is there already; choose another name")

    summary = dict(name=args.name, date=date) | summarize(runs)
    made = not folder.parent.exists()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        sweep(folder.parent)
        with whole_file(folder) as aside:
            for name, content in record_files(runs, summary).items():
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                (aside / name).write_bytes(content)
            for r in runs:  # what is kept has to pass the same checks
                load_run(aside / f"seed{r.seed}")
    except OSError as e:
        raise InputError(
            f"{folder}: cannot be written: {e.strerror or e}; nothing was added"
        ) from None
    finally:
        if made:
            with suppress(OSError):
                folder.parent.rmdir()  # only if empty
    print(folder)
    return 0


def slugify(name):
    """Letters a-z, digits and dashes: safe as a folder's name on every system."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:60].strip("-")


def record_files(runs, summary):
    """{name in the record's folder: content as bytes}."""
    files = {"summary.json": (json.dumps(summary, indent=1, ensure_ascii=False) + "\n").encode()}
    if runs[0].archive:
        files[ARCHIVE] = runs[0].archive.read_bytes()
    for r in runs:
        log = r.text["log.txt"]
        # Old logs begin with the text of their source, and that stays as it was
        source = "" if r.archive else r.head
        log = source + without_paths(r, log.removeprefix(source))
        result = without_paths(r, r.text["result.json"])
        files[f"seed{r.seed}/log.txt"] = log.encode()
        files[f"seed{r.seed}/result.json"] = result.encode()
        files[f"seed{r.seed}/metrics.jsonl.bz2"] = bz2.compress(r.text["metrics.jsonl"].encode())
    return files


def without_paths(r, text):
    """The text with the last part alone of every absolute path that the run has in its
    configuration: machines' paths are nobody's business."""
    said = [r.result.get("run_dir", ""), *(r.config.get(name, "") for name in PATHS)]
    for path in sorted(filter(os.path.isabs, said), key=len, reverse=True):  # inner folders first
        # "/data" says nothing, and is easily part of another word
        if len(Path(path).parts) > 2:
            for written in {path, json.dumps(path)[1:-1]}:
                text = text.replace(written, Path(path).name)
    return text


# --------------------------------------------------------------------------------------------------
# One run


def run_folders(path):
    """The folder itself if it is a run's, else the folders in it, all of them: to leave one out
    is to choose."""
    inside = sorted(p for p in path.glob("*") if p.is_dir())
    is_run = any((path / name).exists() for name in ("log.txt", "config.json", "result.json"))
    return inside if inside and not is_run else [path]


def load_run(folder):
    """The Finished run in a folder, of a run or of a record's seed. Raises InputError where it is
    unfinished or its files contradict each other."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: expected the folder of a run, as --run-dir names it")
    try:
        return checked(folder)
    except OSError as e:
        raise InputError(f"{folder}: cannot be read: {e.strerror or e}") from None
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OverflowError) as e:
        raise InputError(
            f"{folder}: not the files of a run as train_gpt.py writes them "
            f"({type(e).__name__}: {e})"
        ) from None


def checked(folder):
    """load_run, with whatever error a file that is no run's leads to."""
    # Of a run that has not finished the last one is missing
    text = {name: read_text(folder, name) for name in ("result.json", "metrics.jsonl", "log.txt")}
    result = json.loads(text["result.json"])
    metrics = [json.loads(line) for line in text["metrics.jsonl"].splitlines()]
    log = text["log.txt"]
    parts = log.split(RULER, 2)
    if len(parts) < 3:
        raise altered(folder, "log.txt ends before the first step")
    head, description, steps = parts
    pattern = r"^resumed with (?:.*, )?(config\.(?:steps|target|target_metric) .*)$"
    if changed := re.search(pattern, steps, re.MULTILINE):
        raise InputError(
            f"{folder}: it was resumed with {changed[1]}, so it cannot become a record; run it anew"
        )
    if (folder / "config.json").is_file() and read_text(folder, "config.json") != description:
        raise altered(folder, "log.txt and config.json describe different runs")
    described = json.loads(description)

    source = head
    archive = None
    named = named_in(head.rpartition("\n")[2])
    if named:
        name, source = named
        # Descriptions of before 2026-12 have no digest
        if described.get("source", source) != source:
            raise altered(
                folder, "log.txt begins with one digest of its source, and describes another"
            )
        archive = check_source(folder, name, source)
        if archive is None:
            raise InputError(
                f"{folder}: has no {name}, which log.txt names as the source of the run; restore it"
            )

    r = Finished(
        folder=folder,
        text=text,
        head=head,
        steps=steps,
        config=described["config"],
        environment=described["environment"],
        data=described["data"],
        result=result,
        metrics=metrics,
        source=source,
        archive=archive,
        run=None,
    )
    check(r)
    r = r._replace(run=read_runs(folder)[0])
    summarize([r])  # so that whatever is missing for that is found here
    return r


def read_text(folder, name):
    """The content of a file of a run, which a record may have compressed. Raises InputError where
    there is none, or too much."""
    path = folder / name
    compressed = folder / f"{name}.bz2"
    if compressed.is_file() and not path.is_file():
        return unpacked(compressed, MOST_BYTES).decode()
    if not path.is_file():
        why = ""
        if name == "result.json":
            why = ": the run has not finished, --resume may go on with it"
        raise InputError(f"{folder}: has no {name}{why}; only finished runs become records")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise InputError(f"{path}: expected at most {MOST_BYTES:,} bytes, found {size:,}")
    return path.read_text(encoding="utf-8")


def altered(folder, problem):
    return InputError(
        f"{folder}: {problem}; the files were cut or altered, so it cannot become a record"
    )


def check(r):
    """log.txt, metrics.jsonl, the configuration and result.json have to tell the same story.
    Raises InputError."""

    def need(ok, problem):
        if not ok:
            raise altered(r.folder, problem)

    c = r.config
    result = r.result

    # The log has exactly the steps of the metrics
    said = []
    for line in r.steps.splitlines():
        if match := STEP_LINE.match(line):
            said.append(re.sub("_loss:-?inf", "_loss:nan", match.group()))
    # Looks at a part of the validation split have no loss of their own
    rows = [row for row in r.metrics if TRAIN_LOSS in row or VAL_LOSS in row]
    expected = [step_line(row, c["steps"]) for row in rows]
    for ours, theirs in itertools.zip_longest(said, expected):
        need(
            ours == theirs,
            f"log.txt has {ours or 'no further step'!r} where metrics.jsonl has "
            f"{theirs or 'no further step'!r}",
        )
    validations = [row for row in r.metrics if VAL_LOSS in row]
    need(validations, "log.txt has no validation")
    check_resumed(r)

    # The result is the last validation
    last = validations[-1]
    values = dict(steps=last["step"], train_time_s=round(last["train_time"], 3))
    values |= {name: last.get(name) for name in METRICS}
    for name, value in values.items():
        found = result.get(name)
        # The clock goes on for a moment behind a validation before training ends
        same = found == value
        if name == "train_time_s" and isinstance(found, float | int):
            same = 0 <= found - value <= MOMENT
        need(
            same,
            f"result.json has {name} {found}, the last validation in log.txt and metrics.jsonl "
            f"{value}",
        )

    # The result is of this configuration
    for name, value in dict(
        track=c["track"],
        seed=c["seed"],
        target=c["target"],
        target_metric=c["target_metric"],
        data_fingerprint=r.data,
        device=r.environment["device"],
        world_size=r.environment["world_size"],
    ).items():
        need(result[name] == value, f"result.json has {name} {result[name]}, config.json {value}")

    # It is of a kind that can be a record
    if not c["track"] or c["target"] is None:
        raise InputError(
            f"{r.folder}: has no {'target' if c['track'] else 'track'}; a record is the time in "
            "which a track's target was reached"
        )
    need(slugify(c["track"]) == c["track"], f"expected a track's name, found {c['track']!r}")
    date = r.environment["date"]
    need(re.match(r"\d{4}-\d\d-\d\dT", date), f"expected a date, found {date!r}")
    need(type(c["seed"]) is int, f"expected a number as seed, found {c['seed']!r}")
    loss = result[c["target_metric"]]
    need(
        math.isfinite(loss) and math.isfinite(result["train_time_s"]),
        "expected finite loss and time",
    )
    need(
        result["reached"] == meets(loss, c["target"], c["target_metric"]),
        f"result.json has reached {result['reached']} with {c['target_metric']} {loss} and target "
        f"{c['target']}",
    )


def check_resumed(r):
    """A run that went on from a checkpoint has to be one run on one machine. Raises InputError."""

    def need(ok, problem):
        if not ok:
            raise InputError(f"{r.folder}: {problem}, so it cannot become a record; run it anew")

    steps = re.findall(r"^resumed from step (\d+)$", r.steps, re.MULTILINE)
    found = [int(step) for step in steps if step != "0"]
    said = r.result.get("resumed_at", [])
    need(found == said, f"log.txt says it was resumed from steps {found}, result.json {said}")
    first = r.metrics[0]["step"]
    need(
        not found or first <= found[0],
        f"its log begins at step {first}, resumed from a checkpoint in another folder",
    )
    need(RULER not in r.steps, "it was resumed with another source")
    changed = re.search(r"^resumed with (?:.*, )?(environment\..*)$", r.steps, re.MULTILINE)
    need(not changed, changed and f"it was resumed with another {changed[1]}")
    given = r.config.get("warm_start")
    need(not given, f"it began with the weights of {given}")


def step_line(row, total):
    """How Log writes a line of metrics.jsonl into log.txt, up to the time."""
    name = TRAIN_LOSS if TRAIN_LOSS in row else VAL_LOSS
    loss = math.nan if row[name] is None else row[name]  # null where it was not finite
    return (
        f"step:{row['step']}/{total} {name}:{loss:.4f} train_time:{1000 * row['train_time']:.0f}ms"
    )


# --------------------------------------------------------------------------------------------------
# Several runs


def settings(r):
    """What has to be the same in all runs of a record, as a flat dict."""
    flat = {f"config.{name}": value for name, value in r.config.items() if name not in APART}
    for name, value in r.environment.items():
        if name not in OF_THE_RUN:
            flat[f"environment.{name}"] = value
    return flat | {"data": r.data, "source": r.source}


def same_but_seeds(runs):
    """Runs of one record differ in the seed, and only there. Raises InputError."""
    first = settings(runs[0])
    for a, b in itertools.pairwise(runs):
        if a.seed == b.seed:
            raise InputError(
                f"{a.folder} and {b.folder}: expected different seeds, found {a.seed} twice; a "
                "repetition says nothing about chance"
            )
        other = settings(b)
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) == other.get(name):
                continue
            values = f" ({first.get(name)!r} and {other.get(name)!r})"
            if name == "source":
                values = ""  # two digests, or two long texts
            raise InputError(
                f"{runs[0].folder} and {b.folder}: {name} differs{values}; runs of one record "
                "differ in the seed alone, add these apart"
            )


def summarize(runs):
    """What runs of one record amount to, from their own files; runs: in the order of their seeds.

    p_value: of a mean loss this low if the true mean were the target, as `./run.sh records check`
    has it: of the last losses, but where a run stopped at its first validation at the target, of
    all at that step (p_step).
    """
    c = runs[0].config
    environment = runs[0].environment
    results = [r.result for r in runs]
    losses = [result[c["target_metric"]] for result in results]
    times = [result["train_time_s"] for result in results]
    tested, p_step, looks = losses_to_test([r.run for r in runs])
    summary = dict(
        track=c["track"],
        target_metric=c["target_metric"],
        target=c["target"],
        n=len(runs),
        seeds=[result["seed"] for result in results],
        reached=sum(result["reached"] for result in results),
        losses=losses,
        loss_mean=statistics.mean(losses),
        loss_sd=sd(losses),
        p_value=t_test(tested, c["target"], looks, c["target_metric"]).p,
        p_step=p_step,
        times_s=times,
        time_mean_s=statistics.mean(times),
        time_sd_s=sd(times),
        cold_starts_s=[result["cold_start_s"] for result in results],
        steps=[result["steps"] for result in results],
        tokens=[result["tokens"] for result in results],
        params=results[0]["params"],
        git_commit=environment["git_commit"],
        git_dirty=any(r.environment["git_dirty"] is not False for r in runs),
        data=Path(results[0]["data"]).name,
        data_fingerprint=runs[0].data,
        machine_probe=environment.get("probe"),
        environment={
            name: value
            for name, value in environment.items()
            if name not in OF_THE_RUN and name != "git_commit"
        },
    )
    if runs[0].archive:
        summary["source"] = runs[0].source
    resumed = [result.get("resumed_at", []) for result in results]
    if any(resumed):
        summary["resumed_at"] = resumed
    return summary


def sd(values):
    return statistics.stdev(values) if len(values) > 1 else None


# --------------------------------------------------------------------------------------------------
# The commit


def require_commit(runs, records):
    """The code that ran, and this code, are commits. Raises InputError."""

    def git(*args):
        return subprocess.run(["git", "-C", records, *args], capture_output=True, text=True)

    ending = "commit first and run again, or --allow-dirty to take it as it is"
    for r in runs:
        dirty = r.environment["git_dirty"]
        if dirty is not False:
            found = "no git repository" if dirty is None else "uncommitted changes"
            raise InputError(
                f"{r.folder}: ran with {found}, so no commit holds its source; {ending}"
            )
    if not shutil.which("git") or git("rev-parse").returncode:
        return  # records kept elsewhere
    commit = runs[0].environment["git_commit"]
    if git("cat-file", "-e", f"{commit}^{{commit}}").returncode:
        raise InputError(
            f"{runs[0].folder}: commit {commit} is not in this repository; fetch it, or "
            "--allow-dirty"
        )

    # Other records, and what is made from them, may be waiting to be committed
    made = (":(exclude)*/*", ":(exclude)README.md", ":(exclude)history.svg")
    changes = git("status", "--porcelain", "--", ":(top)", *made).stdout.splitlines()
    if changes:
        more = " ..." if len(changes) > 1 else ""
        raise InputError(f"uncommitted changes here ({changes[0].strip()}{more}); {ending}")
