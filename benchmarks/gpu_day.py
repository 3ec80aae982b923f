"""All that wants a look when a GPU can be had, in ten minutes: what works there, and how fast.

    ./run.sh benchmarks gpu-day --out gpu-day --json gpu-day.json
    ./run.sh benchmarks gpu-day --tiny --out /tmp/day            a test of itself, on a CPU

Parts, each with a limit of its own:
    cold      one short training through all stages, with validation and checkpoints, on random
              tokens and empty caches
    resume    that run, some steps further
    warm      the same training again, with the caches as they are now
    steps     ./run.sh benchmarks trainer: step times by stage, and where they go
    sample    a text from a run that has been trained for it
    kernels   the tests of the kernels, with the names of those that fail
    trainer   the tests of the trainer, the same

Every part's result is in --out DIR/PART.json as soon as it is there, its output in DIR/PART.txt.
The same command goes on where it was cut short: parts that are done on this machine and source are
not done again. Other options are the trainer's own.
"""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import torch

from base import InputError, one_line
from base.files import write_text
from benchmarks.options import POSITIVE
from benchmarks.process import ROOT, SYNTHETIC, execute, train
from benchmarks.report import document, number, say, table

LEAST = 15  # seconds with which no part is begun
PATIENCE = 5  # how many times a part's limit it has at tiny shape, where the machine may be any
DOOR = ROOT / "door.py"

TRACK = ["--track", "gpt2-small"]
SHORT = (
    "--steps 9 --extension 1 --eval-every 4 --checkpoint-every 4 --val-tokens 1048576 "
    "--sample-tokens 0 --max-skips 9"
).split()
ADDED = 4  # steps when it goes on
# The same recipe with every size cut down
TINY = (
    "--n-embd 48 --data stdlib --tokenizer bpe:512 --ngram-rows 512 --row-len 128 "
    "--val-row-len 256 --val-tokens 512 --batch-tokens 128 256 384 --max-doc-len 64 128 128 "
    "--short-window 8 16 32 --long-window 16 32 64 --val-windows 32 64 --no-compile "
    "--dtype float32"
).split()
SAMPLED = "--track laptop --steps 6 --eval-every 6 --no-compile --sample-tokens 0".split()

KERNEL_TESTS = ["tests/kernels"]
TRAINER_TESTS = (
    "tests/test_train.py tests/optim tests/models tests/runtime tests/test_distributed.py "
    "tests/test_schedules.py tests/test_template.py"
).split()
TINY_TESTS = dict(
    kernels=["tests/kernels/test_embedding.py"], trainer=["tests/optim/test_tensors.py"]
)
OUTCOMES = "PASSED FAILED ERROR SKIPPED XFAIL XPASS"


class Day:
    """What the parts share."""

    def __init__(self, folder, tiny, options, workers):
        self.folder = folder
        self.tiny = tiny
        self.one = ["--gpus", 1] if torch.cuda.is_available() else []
        self.recipe = [*TRACK, *(TINY if tiny else []), *options]
        self.options = [*TRACK, *SHORT, *self.recipe[len(TRACK) :]]
        self.workers = workers

    def log(self, part):
        return self.folder / f"{part}.txt"


# --- the parts: each is a function of (day, its name, its limit in seconds) -> dict


def trained(day, part, limit):
    """The training as a process; its numbers."""
    options = [*day.options, *day.one]
    log = day.log(part)
    result = train(part, options, day.folder, synthetic=True, limit=limit, log=log)
    names = "process_s cold_start_s compile_s train_s validation_s save_s steps val_loss params"
    found = {name: result[name] for name in names.split() if name in result}
    if not result["steps"] or not result["val_loss"] < 20:
        raise InputError(f"expected steps and a loss below 20, found {found}")
    return found | dict(curve=validations(day.folder / "run"))


def validations(run):
    """[[step, val_loss], ...] of a run's folder."""
    from records.read import read_run_folder

    return [[point.step, point.loss] for point in read_run_folder(run)[0].val]


def cold(day, part, limit):
    shutil.rmtree(day.folder / "cache", ignore_errors=True)
    found = trained(day, part, limit)
    first = day.folder / "first"
    shutil.rmtree(first, ignore_errors=True)
    (day.folder / "run").rename(first)
    checkpoints = sorted(path.name for path in (first / "checkpoints").iterdir())
    if not checkpoints:
        raise InputError("the run left no checkpoint")
    return found | dict(checkpoints=checkpoints)


def warm(day, part, limit):
    return trained(day, part, limit)


def resume(day, part, limit):
    """The first part's run goes on."""
    first = day.folder / "first"
    if not first.is_dir():
        raise InputError("part cold has left no run to go on with")
    run = day.folder / "resumed"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(first, run)
    before = json.loads((run / "result.json").read_text())["steps"]
    command = [sys.executable, *SYNTHETIC, "--resume", run, "--steps", before + ADDED]
    command += ["--cache-dir", day.folder / "cache", *day.one]
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    seconds = execute(part, command, day.folder, day.log(part), env, ok=(0, 3), limit=limit)
    after = json.loads((run / "result.json").read_text())["steps"]
    if after != before + ADDED:
        raise InputError(f"expected {before + ADDED} steps after going on, found {after}")
    return dict(process_s=seconds, before=before, steps=after, curve=validations(run))


def steps(day, part, limit):
    """Step times by stage."""
    file = day.folder / "trainer.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, DOOR, "benchmarks", "trainer", "--synthetic", *day.recipe]
    command += ["--steps", 4 if day.tiny else 10, "--json", file]
    command += ["--cache-dir", day.folder / "cache", *day.one]
    cut = None
    try:
        execute(part, command, ROOT, day.log(part), None, limit=limit)
    except InputError as e:  # stages that were measured before it are kept
        cut = str(e)
        if not file.exists():
            raise
    measured = json.loads(file.read_text())
    names = "stages", "fit", "kernels", "device", "params", "peak_flops"
    return {name: measured.get(name) for name in names} | dict(cut=cut)


def sample(day, part, limit):
    """A text by a run on Python's own source."""
    started = time.perf_counter()
    options = [*SAMPLED, *day.one]
    if day.tiny:
        options += "--tokenizer bytes --val-tokens 4096 --batch-tokens 1024".split()
        options += ["--sampled-softmax", 0]
    folder = day.folder / "sampled"
    folder.mkdir(exist_ok=True)
    train(part, options, folder, limit=limit, log=day.log(part))
    left = limit - (time.perf_counter() - started)
    command = [sys.executable, DOOR, "sample", "--run", folder / "run", "--prompt", "def "]
    lines = []
    log = day.folder / f"{part}-text.txt"
    execute(part, command, ROOT, log, None, lines=lines, limit=max(left, 1))
    text = "".join(line for _, line in lines)
    if "def " not in text:
        raise InputError(f"expected a text that begins with its prompt, found {text[:80]!r}")
    return dict(text=text[:400])


def kernels(day, part, limit):
    return tests(day, part, limit, KERNEL_TESTS)


def trainer(day, part, limit):
    return tests(day, part, limit, TRAINER_TESTS)


def tests(day, part, limit, paths):
    """Counts by outcome and the names of the tests that failed; of those that there was time
    for."""
    paths = TINY_TESTS[part] if day.tiny else paths
    command = [sys.executable, "-m", "pytest", "-vv", "-rfE", "--tb=short", "-n", day.workers]
    lines = []
    cut = None
    try:
        # 1: some failed
        execute(part, [*command, *paths], ROOT, day.log(part), None, (0, 1), 30, lines, limit)
    except InputError as e:
        cut = str(e)
    found = outcomes(line for _, line in lines)
    if cut and not found:
        raise InputError(cut)
    counts = {}
    for outcome, _ in found.values():
        counts[outcome] = counts.get(outcome, 0) + 1
    failed = {name: why for name, (outcome, why) in found.items() if outcome in ("failed", "error")}
    return dict(counts=counts, failed=failed, cut=cut)


def outcomes(lines):
    """{test: (outcome, why)} of pytest's lines, with several workers or without."""
    found = {}
    names = OUTCOMES.replace(" ", "|")
    for line in lines:
        line = line.strip()
        summary = re.fullmatch(rf"({names}) (tests/\S+?::.+?)(?: - (.*))?", line)
        by_worker = re.fullmatch(rf"\[gw\d+\] \[ *\d+%\] ({names}) (tests/.+)", line)
        alone = re.fullmatch(rf"(tests/.+::.+?) ({names})(?: \(.*\))?(?: +\[ *\d+%\])?", line)
        if by_worker:
            found[by_worker[2]] = (by_worker[1].lower(), "")
        elif alone:
            found[alone[1]] = (alone[2].lower(), "")
        elif summary and summary[2] in found:
            found[summary[2]] = (summary[1].lower(), summary[3] or "")
    return found


PARTS = {  # name: (function, seconds it may take)
    "cold": (cold, 200),
    "resume": (resume, 70),
    "warm": (warm, 70),
    "steps": (steps, 130),
    "sample": (sample, 60),
    "kernels": (kernels, 150),
    "trainer": (trainer, 200),
}


# --- the day


def kept(file, key):
    """What a part has left that need not be done again, or None."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and found.get("key") == key
    return found if same and found.get("status") == "done" else None


def run(
    out="gpu-day",
    tiny=False,
    only=(),
    minutes=10.0,
    workers=4,
    trainer_options=(),
    save=lambda result: None,
):
    """dict(parts={name: dict(status, seconds, ...)}); save is given it as it grows."""
    from benchmarks import subject
    from runtime.environment import describe_environment

    if not tiny and not torch.cuda.is_available():
        raise InputError("gpu-day: no CUDA GPU here; --tiny is a test of it on a CPU")
    for name in only:
        if name not in PARTS:
            raise InputError(f"--only {name}: expected of {', '.join(PARTS)}")
    day = Day(Path(out).absolute(), tiny, list(trainer_options), workers)
    subject.parse(day.options)  # wrong ones at once
    day.folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    key = dict(
        source=subject.source_hash(),
        torch=torch.__version__,
        device=describe_environment(device)["device"],
        options=list(map(str, day.options)),
    )
    parts = {}
    result = dict(tiny=tiny, out=str(out), options=key["options"], parts=parts)
    started = time.perf_counter()
    for name in only or PARTS:
        part, most = PARTS[name]
        file = day.folder / f"{name}.json"
        found = kept(file, key)
        if found:
            parts[name] = found
            say(f"{name}: done before")
            save(result)
            continue
        left = 60 * minutes - (time.perf_counter() - started)
        if left < LEAST:
            parts[name] = dict(status="no time left")
            say(f"{name}: no time left; the same command goes on")
            save(result)
            continue
        limit = min(PATIENCE * most if tiny else most, left)
        say(f"--- {name}, {limit:.0f} s at most")
        begun = time.perf_counter()
        try:
            row = dict(status="done", **part(day, name, limit))
        except InputError as e:
            row = dict(status="failed", error=one_line(e, 400))
            say(f"{name}: {row['error']}")
        row |= dict(seconds=time.perf_counter() - begun, key=key)
        parts[name] = row
        write_text(file, json.dumps(row, indent=1) + "\n")
        save(result)
    say(f"\n{render(result)}")
    return result


def render(result):
    """A line for each part, the steps by stage, and the tests that failed."""
    rows = []
    failed = []
    stages = []
    for name, part in result["parts"].items():
        rows.append([name, part["status"], number(part.get("seconds")), in_words(name, part)])
        for test, why in part.get("failed", {}).items():
            failed.append(f"- {test}" + (f": {why[:160]}" if why else ""))
        for s in part.get("stages") or ():
            cells = [f"{s['tokens']:,}", f"{s['ms']:,.2f} ({s['p20']:,.2f}–{s['p80']:,.2f})"]
            stages.append([*cells, f"{s['tokens_per_s']:,.0f}", f"{s['peak_share']:.1%}"])
    return document(
        "# A day with a GPU" + (", at tiny shape" if result["tiny"] else ""),
        table(["part", "", "s", ""], rows),
        table(["tokens a step", "ms (p20–p80)", "tokens/s", "of peak"], stages) if stages else "",
        f"{len(failed)} tests failed:" if failed else "",
        failed,
    )


def in_words(name, part):
    """What a part found, for its line."""
    if "error" in part:
        return part["error"]
    if "counts" in part:
        counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(part["counts"].items()))
        return counts + (f"; cut short: {part['cut']}" if part["cut"] else "")
    if "cold_start_s" in part:
        return f"{part['cold_start_s']:.1f} s to the first step, val_loss {part['val_loss']:.4f}"
    if "before" in part:
        return f"step {part['before']} to {part['steps']}"
    if "stages" in part:
        cut = f"; cut short: {part['cut']}" if part["cut"] else ""
        return f"{len(part['stages'])} stages{cut}"
    return " ".join(part.get("text", "").split())[:60]


def add_arguments(parser):
    parser.option("--out", str, "gpu-day", "DIR", "folder for parts' results and outputs")
    parser.flag("--tiny", "a tiny shape and few tests, also without a GPU: a test of this itself")
    parser.option("--only", str, (), "PART", f"of {', '.join(PARTS)}", nargs="+")
    parser.option("--minutes", POSITIVE, 10.0, "N", "for all parts; what is left is done next time")
    parser.option("--workers", int, 4, "N", "processes of the tests")
