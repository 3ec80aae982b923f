"""DCLM's CORE: 22 tasks out of one bundle, and their mean; HellaSwag; both fetched where there is a
network.

A bundle is a folder with core.yaml (each task's file, form, number of examples, delimiter),
eval_meta_data.csv (the accuracy of guessing, in percent) and eval_data/. A task's accuracy is by
tokens for choices and schemas, exact for completions; CORE is the mean of the centered ones.
"""

import csv
import math
import os
import shutil
import sys
import urllib.request
import zipfile
from pathlib import Path

import numpy as np

from base import InputError, one_line, whole_file
from base.places import cache_folder

from .items import measure_task, read_task
from .results import Measure

BUNDLE = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
HELLASWAG = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
CORE_METRICS = ("acc_norm by tokens", "exact")


def fetched(name):
    """The path of what is called core or hellaswag, downloaded once. Raises InputError."""
    folder = cache_folder() / "evals"
    url = BUNDLE if name == "core" else HELLASWAG
    path = folder / ("eval_bundle" if name == "core" else "hellaswag.jsonl")
    if path.exists():
        return path
    print(f"fetching {url} ...", file=sys.stderr, flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        archive = folder / os.path.basename(url)
        with whole_file(archive) as aside, urllib.request.urlopen(url, timeout=30) as answer:
            with open(aside, "wb") as file:
                shutil.copyfileobj(answer, file)
        if name != "core":
            os.replace(archive, path)
            return path
        with whole_file(path) as aside:
            aside.mkdir()
            with zipfile.ZipFile(archive) as bundle:
                bundle.extractall(aside)
        archive.unlink()
    except (OSError, zipfile.BadZipFile) as e:
        raise InputError(
            f"--tasks {name}: {url} could not be fetched ({getattr(e, 'reason', None) or e}); with "
            "a copy of it from elsewhere, name that: --tasks PATH"
        ) from None
    return path


def bundle_in(folder):
    """The folder of the bundle in a folder, or None."""
    found = [path.parent for path in sorted(Path(folder).rglob("core.yaml"))]
    return found[0] if found else None


def read_bundle(folder, most=0):
    """Tasks of a bundle; most: items of each at most, 0 for all. Raises InputError."""
    import yaml  # comes with huggingface-hub

    root = bundle_in(folder)
    if root is None:
        raise InputError(f"{folder}: expected CORE's bundle, with a core.yaml in it")
    try:
        said = yaml.safe_load((root / "core.yaml").read_text(encoding="utf-8"))
        with open(root / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        guessing = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
        tasks = [
            read_task(
                root / "eval_data" / task["dataset_uri"],
                most,
                task["num_fewshot"][0],
                task["label"],
                guessing[task["label"]],
                task.get("continuation_delimiter", " "),
            )
            for task in said["icl_tasks"]
        ]
    except InputError:
        raise
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, IndexError) as e:
        raise InputError(f"{root}: not CORE's bundle ({type(e).__name__}: {one_line(e)})") from None
    return tasks


def measure_bundle(scorer, tasks):
    """A Measure for each task by what CORE counts, and CORE itself."""
    found = []
    for task in tasks:
        found += [m for m in measure_task(scorer, task) if m.metric in CORE_METRICS]
    if not found:
        return []
    centered = np.array([m.centered for m in found])
    errors = [(m.stderr or 0.0) / (1 - m.chance) for m in found]
    error = math.sqrt(sum(e * e for e in errors)) / len(found)
    note = f"the mean of {len(found)} centered accuracies"
    core = Measure("CORE", "centered", centered, np.ones(len(found)), unit="tasks", note=note)
    return [*found, core._replace(error=error)]
