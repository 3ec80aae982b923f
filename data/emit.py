"""`./run.sh data build ... --emit datatrove FILE.py`: the reading, filtering and deduplicating of a
recipe as a pipeline of datatrove, for more machines than one.

The steps are datatrove's kind and call this program's functions, so that what is kept is what a
build keeps: the thresholds stand in the script, each source's by rule. Reading, cleaning, filters
and signatures run in as many tasks as are asked for; clusters of duplicates are found in one.
"""

import dataclasses
import pprint
from pathlib import Path

from base import InputError, write_text

from . import filters

ROOT = Path(__file__).resolve().parent.parent


def emit(kind, path, todo):
    """Write the script for a Recipe. Raises InputError."""
    if kind != "datatrove":
        raise InputError(f"--emit {kind}: expected datatrove")
    if todo.dedup.parts:
        raise InputError(
            f"--emit datatrove: not with parts = {todo.dedup.parts!r} in [dedup]; build what the "
            "script has written with a recipe that has it"
        )
    if any(part.limit for part in todo.source):
        raise InputError(
            "--emit datatrove: not with a limit, since tasks do not know of each other"
        )
    rules = {part.name: filters.rules_of(part.preset, part.filters) for part in todo.source}
    parts = []
    for part in todo.source:
        here = str(Path(part.base, Path(part.path).expanduser()).absolute()) if part.path else ""
        changed = dataclasses.asdict(dataclasses.replace(part, path=here, base=""))
        default = {f.name: f.default for f in dataclasses.fields(part)}
        parts.append({key: v for key, v in changed.items() if v != default[key] and v != {}})
    values = dict(
        ROOT=repr(str(ROOT)),
        PARTS=pprint.pformat(parts, width=96, sort_dicts=False),
        RULES=pprint.pformat(rules, width=96, sort_dicts=False),
        DEDUP=pprint.pformat(dataclasses.asdict(todo.dedup), width=96, sort_dicts=False),
    )
    text = SCRIPT
    for name, value in values.items():
        text = text.replace(f"${name}$", value)
    try:
        write_text(Path(path), text)
    except OSError as e:
        raise InputError(f"--emit {path}: cannot be written: {e.strerror or e}") from None


SCRIPT = '''"""Documents of a recipe, read, cleaned, filtered and deduplicated by datatrove.

    python THIS.py --out FOLDER --tasks 8                  # on this machine
    python THIS.py --out FOLDER --tasks 500 --slurm PART   # on a partition of Slurm

FOLDER is one that all machines see, and so is this program's. Documents that are kept are in
FOLDER/documents, which ./run.sh data build FOLDER/documents --preset none --out CORPUS
decontaminates, mixes and tokenizes. Tasks share the files, so there is no use in more tasks than
files. Changed values need another FOLDER: datatrove skips the tasks that its logs there call done.
"""

import argparse
import json
import sys
from pathlib import Path

STOPWATCH = $ROOT$
sys.path.insert(0, STOPWATCH)

import numpy as np  # noqa: E402
from datatrove.data import Document  # noqa: E402
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor  # noqa: E402
from datatrove.pipeline.base import PipelineStep  # noqa: E402
from datatrove.pipeline.writers import JsonlWriter  # noqa: E402

from data import dedup, reading, recipe, sources, stages  # noqa: E402

# Where documents come from
PARTS = $PARTS$

# By which rules those of each source go: {source: {rule: thresholds}}
RULES = $RULES$

# Which go because others say the same
DEDUP = $DEDUP$


class Read(PipelineStep):
    """Documents of this task's files, as they are."""

    type = "READER"
    name = "Sources"

    def __init__(self, cache):
        super().__init__()
        self.cache = cache

    def run(self, data=None, rank=0, world_size=1):
        files = []
        for part in PARTS:
            part = recipe.Part(**part)
            located = reading.locate(part, Path(self.cache))
            files += [(part, located, i) for i in range(len(located.paths))]
        begin, end = (len(files) * r // world_size for r in (rank, rank + 1))
        for part, located, i in files[begin:end]:
            one = located._replace(paths=located.paths[i : i + 1], names=located.names[i : i + 1])
            for document in reading.documents(part, one):
                about = dict(document.about, source=part.name)
                yield Document(text=document.text, id=document.id, metadata=about)


class Sift(PipelineStep):
    """Cleans documents and drops those that a rule is against."""

    type = "FILTER"
    name = "Rules"

    def run(self, data, rank=0, world_size=1):
        parts = {part["name"]: recipe.Part(**part) for part in PARTS}
        settings = recipe.Dedup(**DEDUP)
        for source, batch in batches(data):
            given = [sources.Document(d.text, d.id, d.metadata) for d in batch]
            kept, counts = stages.sift(parts[source], RULES[source], settings, given)
            for why, n in counts["dropped"].items():
                self.stat_update(f"dropped_{why}", value=n["documents"])
            for document in kept:
                self.stat_update("forwarded")
                yield Document(text=document.text, id=document.id, metadata=document.about)


class Sign(PipelineStep):
    """Writes documents of this task with their keys and signatures, which Cluster compares."""

    type = "DEDUP"
    name = "Keys and signatures"

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def run(self, data, rank=0, world_size=1):
        config = minhash()
        folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        keys = [np.zeros((0, 2), dtype=np.uint64)]
        signatures = [np.zeros((0, config.functions), dtype=np.uint32)]
        places = []
        for_val = []
        split = {part["name"]: part.get("split", "") for part in PARTS}
        with open(folder / f"{rank:05d}.jsonl", "wb") as f:
            for source, batch in batches(data):
                texts = [document.text for document in batch]
                keys.append(dedup.exact_keys(texts))
                signatures.append(dedup.signatures(texts, config))
                for document in batch:
                    places.append(f.tell())
                    for_val.append(split[source] == "val")
                    line = dict(text=document.text, id=document.id) | document.metadata
                    f.write(json.dumps(line, ensure_ascii=False).encode(errors="replace") + b"\\n")
        np.savez(
            folder / f"{rank:05d}.npz",
            keys=np.concatenate(keys),
            signatures=np.concatenate(signatures),
            places=np.array(places, dtype=np.int64),
            for_val=np.array(for_val, dtype=bool),
        )
        return
        yield  # a step hands on documents; this one has none for the next


class Cluster(PipelineStep):
    """Finds duplicates among the documents of all tasks; runs in one."""

    type = "DEDUP"
    name = "Clusters"

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def run(self, data=None, rank=0, world_size=1):
        folder = Path(self.folder)
        parts = []
        for path in sorted(folder.glob("?????.npz")):
            with np.load(path, allow_pickle=False) as found:
                parts.append({name: found[name] for name in found.files})
        starts = np.cumsum([0] + [len(part["keys"]) for part in parts])
        n = int(starts[-1])
        # Documents for validation come first: of those that are alike theirs stay
        order = np.argsort(~np.concatenate([part["for_val"] for part in parts]), kind="stable")
        place = np.empty(n, dtype=np.int64)
        place[order] = np.arange(n)
        keep = np.ones(n, dtype=bool)
        if DEDUP["exact"]:
            keys = np.concatenate([part["keys"] for part in parts])
            first = dedup.exact_duplicates(keys[order])
            keep &= (first == np.arange(n))[place]
        if DEDUP["near"]:
            signatures = np.concatenate([part.pop("signatures") for part in parts])[order]

            def read(rows):
                texts = []
                for i in order[rows].tolist():
                    task = int(np.searchsorted(starts, i, side="right")) - 1
                    with open(folder / f"{task:05d}.jsonl", "rb") as f:
                        f.seek(parts[task]["places"][i - starts[task]])
                        texts.append(json.loads(f.readline())["text"])
                return texts

            def compare(left, right):
                return dedup.similarities(read, left, right, minhash())

            first = dedup.near_duplicates(signatures, minhash(), compare)
            keep &= (first == np.arange(n))[place]
        self.stat_update("duplicates", value=int((~keep).sum()))
        for task, (begin, end) in enumerate(zip(starts, starts[1:])):
            np.save(folder / f"{task:05d}.keep.npy", keep[begin:end])
        return
        yield


class Keep(PipelineStep):
    """The documents of a task of Sign without duplicates."""

    type = "FILTER"
    name = "Duplicates"

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def run(self, data=None, rank=0, world_size=1):
        keep = np.load(Path(self.folder) / f"{rank:05d}.keep.npy", allow_pickle=False)
        with open(Path(self.folder) / f"{rank:05d}.jsonl", encoding="utf-8", newline="\\n") as f:
            for line, kept in zip(f, keep):
                if kept:
                    about = json.loads(line)
                    self.stat_update("forwarded")
                    yield Document(text=about.pop("text"), id=about.pop("id"), metadata=about)


def minhash():
    return stages.minhash(recipe.Dedup(**DEDUP))


def batches(documents, most=256):
    """Yield (source, documents of it), a few at a time."""
    source = None
    batch = []
    for document in documents:
        if batch and (document.metadata["source"] != source or len(batch) == most):
            yield source, batch
            batch = []
        source = document.metadata["source"]
        batch.append(document)
    if batch:
        yield source, batch


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--tasks", type=int, default=1, metavar="N", help="[%(default)s]")
    parser.add_argument("--workers", type=int, default=-1, metavar="N", help="at once; -1: all")
    parser.add_argument("--slurm", metavar="PARTITION")
    parser.add_argument("--time", default="20:00:00", help="of Slurm, for a task [%(default)s]")
    parser.add_argument("--memory", type=int, default=4, metavar="GB", help="of Slurm, for a task")
    args = parser.parse_args()
    out = args.out.absolute()
    work = str(out / "work")
    pipelines = [
        ("read", args.tasks, [Read(str(out / "cache")), Sift(), Sign(work)]),
        ("cluster", 1, [Cluster(work)]),
        ("keep", args.tasks, [Keep(work), JsonlWriter(str(out / "documents"))]),
    ]
    before = None
    for name, tasks, pipeline in pipelines:
        logs = str(out / "logs" / name)
        if args.slurm:
            before = SlurmPipelineExecutor(
                job_name=name,
                pipeline=pipeline,
                tasks=tasks,
                workers=args.workers,
                time=args.time,
                partition=args.slurm,
                mem_per_cpu_gb=args.memory,
                logging_dir=logs,
                depends=before,
            )
        else:
            before = LocalPipelineExecutor(
                pipeline=pipeline,
                tasks=tasks,
                workers=args.workers,
                logging_dir=logs,
                depends=before,
            )
    before.run()  # which first runs what it depends on


if __name__ == "__main__":
    main()
'''
