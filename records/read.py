"""Reads training runs, ours and the field's.

read_runs(path) takes a log, a run's folder or a folder of those, and returns a list of Run. Logs
are read in the dialect of whatever wrote them: see logs.py.
"""

import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from base import InputError

from .logs import lines, read_log
from .metrics import TRAIN_LOSS
from .runs import Point, Run, conclude, describe, number, text, tokens_at, whole

# Of a run of ours. A record compresses its metrics, and has the configuration in log.txt alone.
RUN_FILES = ("log.txt", "metrics.jsonl", "metrics.jsonl.bz2", "config.json", "result.json")
RUN_HELP = (
    "a run's folder, a log (ours, modded-nanogpt's, llm.c's, nanoGPT's, nanochat's), or a folder "
    "of those"
)
LOG_SUFFIXES = (".txt", ".log", ".out", ".stdout", ".err", ".stderr")


def read_runs(path, warn=lambda line: print(line, file=sys.stderr)):
    """Every run in `path`: a log, a run's folder, or a folder searched for those.

    Returns a list of Run, in the order of their paths. In a folder that is searched, what is no log
    is skipped, and warn() is called with a line that says how much was. Raises InputError where
    there is nothing to read.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(
            f"{path}: no such file or folder; expected a log, a run's folder or a folder of runs"
        )
    if is_run_folder(path):
        return read_run_folder(path)
    if not path.is_dir():
        if path.name in RUN_FILES and is_run_folder(path.parent):
            return read_run_folder(path.parent)
        return read_log(path)

    # A folder to be searched: what is no log in it is counted, and said once at the end
    runs = []
    skipped = []
    found = find_runs(path)
    for item in tqdm(found, desc=f"reading {path}", unit="log", delay=2, leave=False, disable=None):
        try:
            runs += read_run_folder(item) if item.is_dir() else read_log(item)
        except InputError as e:
            skipped.append(str(e))

    if not runs:
        tried = "there is none"
        if skipped:
            tried = f"none of {len(found)} files is one, the first because {skipped[0]}"
        raise InputError(
            f"{path}: expected training logs ({' '.join(LOG_SUFFIXES)}) or run folders in it: "
            f"{tried}"
        )
    if skipped:
        more = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        warn(f"skipped: {skipped[0]}{more}")
    return runs


def find_runs(root):
    """Run folders and log files below a folder, sorted; what is in a run folder is its own."""
    found = []
    for folder, folders, files in os.walk(root):
        if is_run_folder(Path(folder)):
            found.append(Path(folder))
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if Path(name).suffix.lower() in LOG_SUFFIXES:
                found.append(Path(folder, name))
    return sorted(found)


def is_run_folder(folder):
    """Whether this is the folder of one run of ours, as opposed to one that holds several logs."""
    return folder.is_dir() and sum((folder / name).is_file() for name in RUN_FILES) > 1


# --------------------------------------------------------------------------------------------------
# Our run folders


def read_run_folder(folder):
    """The run of ours in `folder`, in a list. Any of its files may be missing as long as one has
    the losses. Raises InputError."""
    header = read_json(folder / "config.json")
    result = read_json(folder / "result.json")
    log = None
    if (folder / "log.txt").is_file():
        log = read_log(folder / "log.txt")[-1]

    # What ran: config.json says it, or the header of the log
    run = Run(str(folder), "stopwatch", name=folder.name)
    if log and not isinstance(header.get("config"), dict):
        header = dict(config=log.config, environment=log.environment, data=log.data)
    describe(run, header)
    run.metric = text(result.get("target_metric")) or run.metric
    if log:
        run.probe = run.probe or log.probe
        run.notes = log.notes
        run.sources = log.sources

    # The losses: with all their digits in the metrics, with four in the log
    metrics = [folder / name for name in ("metrics.jsonl", "metrics.jsonl.bz2")]
    metrics = [path for path in metrics if path.is_file()]
    if metrics:
        read_metrics(run, metrics[0])
    elif log:
        run.val = log.val
        run.train = log.train
    conclude(run)

    if result:
        add_result(run, result, folder / "result.json")
    elif not (run.val or run.train):
        raise InputError(
            f"{folder}: expected a run's losses in metrics.jsonl, log.txt or result.json, "
            "found none"
        )
    return [run]


def read_json(path):
    """The object in a JSON file, {} if there is no such file. Raises InputError."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path}:{getattr(e, 'lineno', 1)}: not JSON ({str(e)[:80]})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}:1: expected a JSON object, found {type(value).__name__}")
    return value


def read_metrics(run, path):
    """Points from metrics.jsonl; lines that are none (the last of a run that was killed, say)
    are noted."""
    bad = []
    for n, line in lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            bad.append(n)
            continue

        step = whole(row.get("step"))
        seconds = number(row.get("train_time"))
        for points, name in ((run.val, run.metric), (run.train, TRAIN_LOSS)):
            loss = number(row.get(name))
            if step is None or loss is None:
                continue
            # Resumed from a checkpoint: what came after it is done again
            while points and points[-1].step >= step:
                points.pop()
            points.append(Point(step, tokens_at(run, step), seconds, loss))
    if bad:
        more = f" with {len(bad) - 1} more" if len(bad) > 1 else ""
        run.notes.append(f"{path.name}:{bad[0]}: no JSON object, skipped{more}")


def add_result(run, result, path):
    """What result.json says wins: it was written when the run had ended. path: of that file.
    Raises InputError."""
    loss = number(result.get(run.metric))
    seconds = number(result.get("train_time_s"))
    steps = whole(result.get("steps"))
    if loss is None or seconds is None or steps is None:
        raise InputError(
            f"{path}:1: not the result of a run: expected steps, train_time_s and {run.metric} "
            "as numbers"
        )
    # Its last validation is in every result
    run.finished = True
    run.final_loss = loss
    run.time_s = seconds
    run.steps = steps
    # What it ran for, on what; fields that it lacks are as they were
    run.target = number(result.get("target"))
    for field, key, kind in (
        ("track", "track", text),
        ("seed", "seed", whole),
        ("tokens", "tokens", whole),
        ("hardware", "device", text),
        ("world_size", "world_size", whole),
        ("data", "data_fingerprint", text),
    ):
        value = kind(result.get(key))
        if value is not None:
            setattr(run, field, value)
    if not run.val:
        run.val = [Point(steps, run.tokens, seconds, loss)]

    resumed = result.get("resumed_at")
    if isinstance(resumed, list):
        run.resumed_at = [step for step in resumed if whole(step) is not None]
    if run.resumed_at:
        run.notes.append(f"resumed from a checkpoint at step {', '.join(map(str, run.resumed_at))}")
