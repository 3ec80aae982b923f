"""Reads training runs from logs, ours and the field's.

read_runs(path) takes a log, a run's folder or a folder of those, and returns a list of Run,
whatever wrote them:

dialect        what its lines look like stopwatch      ours: a folder with metrics.jsonl,
config.json and result.json, or its log.txt alone modded-nanogpt step:250/1390 val_loss:4.4321
train_time:8200ms step_avg:32.80ms  (tracks 1 to 3, 2024 to 2026) llm.c          s:250 tel:4.4321
(main.log), or on the console val loss 4.4321 and step 251/18865 | loss 4.43 ... nanoGPT        step
250: train loss 4.4012, val loss 4.4321 and iter 250: loss 4.4123, time 135.20ms, mfu 38.00%
nanochat       Step 00250 | Validation bpb: 0.9876 and step 00250/05000 (5.00%) | loss: 3.21 | ...
dt: 90.12ms ...

Logs are read line by line, so their size does not matter; a file may hold several runs. Only lines
that begin like the above count: a log may well contain the source that printed it.
"""

import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from base import InputError


class Point(NamedTuple):
    """One measurement. tokens: seen in training so far, None if the log does not tell; seconds:
    the training clock, None where the log has none; loss: of a validation in the run's metric,
    of a training step in nats per token, None where the line has only a time."""

    step: int
    tokens: int | None
    seconds: float | None
    loss: float | None


@dataclasses.dataclass
class Run:
    """One training run as its log tells it; what the log does not tell is None."""

    path: str  # the log, or the folder of the run, as given
    dialect: str  # stopwatch, modded-nanogpt, llm.c, nanoGPT or nanochat
    line: int = 1  # where in the log the run begins: a file may hold several
    name: str = ""  # of the run's folder or file
    track: str | None = None
    seed: int | None = None
    # what the losses of val are: val_loss (nats per token) or val_bpb (bits per byte)
    metric: str = "val_loss"
    target: float | None = None
    steps: int = 0  # optimizer steps done
    total_steps: int | None = None  # optimizer steps planned
    finished: bool | None = (
        False  # came to its last step or its target; None: the log does not say where it would end
    )
    time_s: float | None = None  # training clock at the last validation
    final_loss: float | None = None  # last validation
    tokens: int | None = None  # seen in training
    hardware: str | None = None  # product name of one device
    world_size: int | None = None
    data: str | None = None  # fingerprint
    probe: dict | None = (
        # this machine's measured rates: {"matmul": {dtype: FLOP/s}, "copy": bytes/s}, one device
        None
    )
    resumed_at: list = dataclasses.field(
        default_factory=list
    )  # steps of the checkpoints it went on from; of our runs
    config: dict = dataclasses.field(default_factory=dict)  # of our runs
    environment: dict = dataclasses.field(default_factory=dict)  # of our runs
    val: list[Point] = dataclasses.field(default_factory=list)
    train: list[Point] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(
        default_factory=list
    )  # what to know before believing a number

    @property
    def where(self):
        """path, or path:line where the run is not at the top of its file."""
        return self.path if self.line == 1 else f"{self.path}:{self.line}"

    @property
    def stopped_early(self):
        """Whether it ended at a validation before its last planned step: ours do when the target
        is met."""
        ended = (
            self.finished
            if self.dialect == "stopwatch"
            else self.val and self.val[-1].step == self.steps
        )
        return bool(self.total_steps and 0 < self.steps < self.total_steps and ended)

    @property
    def matmul_rate(self):
        """Measured FLOP/s of all its devices in matrix products, in the run's dtype; None if it
        was not measured."""
        rates = (self.probe or {}).get("matmul")
        rate = (
            rates.get(text(self.environment.get("dtype")) or "bfloat16")
            if isinstance(rates, dict)
            else None
        )
        return rate * (self.world_size or 1) if number(rate) and rate > 0 else None

    def time_to(self, loss):
        """Training seconds until the validation loss was first at or below `loss`, by straight
        lines between validations; None if it never was, or the log has no clock there."""
        before = None
        for point in self.val:
            if point.loss <= loss:
                if point.seconds is None or point.loss == loss or before is None:
                    return point.seconds
                if before.seconds is None:
                    return None
                share = (
                    (before.loss - loss) / (before.loss - point.loss)
                    if math.isfinite(before.loss)
                    else 1.0
                )
                return before.seconds + share * (point.seconds - before.seconds)
            before = point
        return None


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
    if path.name in RUN_FILES and is_run_folder(path.parent) and not path.is_dir():
        return read_run_folder(path.parent)
    if is_run_folder(path):
        return read_run_folder(path)
    if not path.is_dir():
        return read_log(path)

    found, runs, skipped = [], [], []
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if is_run_folder(Path(folder)):
            found.append(Path(folder))
            folders.clear()
        else:
            found += [
                Path(folder, name) for name in files if Path(name).suffix.lower() in LOG_SUFFIXES
            ]
    for item in tqdm(
        sorted(found), desc=f"reading {path}", unit="log", delay=2, leave=False, disable=None
    ):
        try:
            runs += read_run_folder(item) if item.is_dir() else read_log(item)
        except InputError as e:
            skipped.append(str(e))
    if not runs:
        tried = (
            f"none of {len(found)} files is one, the first because {skipped[0]}"
            if skipped
            else "there is none"
        )
        raise InputError(
            f"{path}: expected training logs ({' '.join(LOG_SUFFIXES)}) or run folders in it: {tried}"
        )
    if skipped:
        more = f" and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        warn(f"skipped: {skipped[0]}{more}")
    return runs


# --------------------------------------------------------------------------------------------------
# Our run folders

RUN_FILES = ("log.txt", "metrics.jsonl", "config.json", "result.json")
LOG_SUFFIXES = (".txt", ".log", ".out", ".stdout", ".err", ".stderr")


def is_run_folder(folder):
    """Whether this is the folder of one run of ours, as opposed to one that holds several logs."""
    return folder.is_dir() and sum((folder / name).is_file() for name in RUN_FILES) > 1


def read_run_folder(folder):
    """The run of ours in `folder`, in a list. Any of its files may be missing as long as one has
    the losses."""
    header, result = read_json(folder / "config.json"), read_json(folder / "result.json")
    log = read_log(folder / "log.txt") if (folder / "log.txt").is_file() else []
    run = Run(str(folder), "stopwatch", name=folder.name)
    if log and not isinstance(header.get("config"), dict):
        header = dict(config=log[-1].config, environment=log[-1].environment, data=log[-1].data)
    describe(run, header)
    run.metric = text(result.get("target_metric")) or run.metric
    if log:
        run.probe, run.notes = run.probe or log[-1].probe, log[-1].notes
    if (folder / "metrics.jsonl").is_file():
        read_metrics(run, folder / "metrics.jsonl")
    elif log:
        run.val, run.train = log[-1].val, log[-1].train
    conclude(run)
    if result:
        add_result(run, result, folder / "result.json")
    elif not (run.val or run.train):
        raise InputError(
            f"{folder}: expected a run's losses in metrics.jsonl, log.txt or result.json, found none"
        )
    return [run]


def read_json(path):
    """The object in a JSON file, {} if there is no such file."""
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
        step, seconds = whole(row.get("step")), number(row.get("train_time"))
        for points, loss in (
            (run.val, number(row.get(run.metric))),
            (run.train, number(row.get("train_loss"))),
        ):
            if step is not None and loss is not None:
                while (
                    points and points[-1].step >= step
                ):  # resumed from a checkpoint: what came after it is done again
                    points.pop()
                points.append(Point(step, tokens_at(run, step), seconds, loss))
    if bad:
        more = f" with {len(bad) - 1} more" * (len(bad) > 1)
        run.notes.append(f"{path.name}:{bad[0]}: no JSON object, skipped{more}")


def describe(run, header):
    """Fill in what config.json, or the header of log.txt, says about a run of ours."""
    run.config, run.environment = (
        header[k] if isinstance(header.get(k), dict) else {} for k in ("config", "environment")
    )
    run.track, run.data, run.hardware = (
        text(run.config.get("track")),
        text(header.get("data")),
        text(run.environment.get("device")),
    )
    run.seed, run.total_steps = whole(run.config.get("seed")), whole(run.config.get("steps"))
    run.target, run.world_size = (
        number(run.config.get("target")),
        whole(run.environment.get("world_size")),
    )
    run.metric = text(run.config.get("target_metric")) or run.metric
    run.probe = (
        run.environment.get("probe") if isinstance(run.environment.get("probe"), dict) else None
    )


def add_result(run, result, path):
    """What result.json says wins: it was written when the run had ended."""
    loss, seconds = number(result.get(run.metric)), number(result.get("train_time_s"))
    steps = whole(result.get("steps"))
    if loss is None or seconds is None or steps is None:
        raise InputError(
            f"{path}:1: not the result of a run: expected steps, train_time_s and {run.metric} as numbers"
        )
    run.finished, run.final_loss, run.time_s, run.steps = True, loss, seconds, steps
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
        setattr(run, field, getattr(run, field) if value is None else value)
    run.val = run.val or [Point(steps, run.tokens, seconds, loss)]
    resumed = result.get("resumed_at")
    run.resumed_at = (
        [at for at in resumed if whole(at) is not None] if isinstance(resumed, list) else []
    )
    if run.resumed_at:
        run.notes.append(f"resumed from a checkpoint at step {', '.join(map(str, run.resumed_at))}")


def tokens_at(run, step):
    """Tokens seen after `step` steps of a run of ours, from its batch_tokens by stage; None if
    they are not known."""
    batches = run.config.get("batch_tokens")
    if not run.total_steps or not isinstance(batches, list) or not all(map(whole, batches)):
        return None
    ends = [
        -(-(i + 1) * run.total_steps // len(batches)) for i in range(len(batches))
    ]  # last step of each stage
    return sum(
        batch * max(0, min(step, end) - start)
        for batch, start, end in zip(batches, [0, *ends], ends)
    )


def number(value):
    """A JSON number as float, None for anything else."""
    try:
        return (
            float(value)
            if isinstance(value, (int, float)) and not isinstance(value, bool)
            else None
        )
    except OverflowError:
        return None


def whole(value):
    """A JSON integer that can be a count, None for anything else."""
    return (
        value
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**15
        else None
    )


def text(value):
    return value if isinstance(value, str) and value else None


def conclude(run):
    """What follows from the points: steps, time, final loss, tokens, and whether the run came to
    its end."""
    points = [p[-1] for p in (run.train, run.val) if p]
    run.steps = max((p.step for p in points), default=0)
    last = run.val[-1] if run.val else points[0] if points else Point(0, None, None, None)
    run.time_s, run.tokens, run.final_loss = (
        last.seconds,
        last.tokens,
        last.loss if run.val else None,
    )
    at_end = (
        last.step >= run.steps
    )  # a run that was killed after a validation has training steps behind it
    if run.total_steps is None:
        run.finished = None
    else:  # only ours stop at their target
        met = (
            run.dialect == "stopwatch"
            and run.val
            and run.target is not None
            and run.final_loss <= run.target
        )
        run.finished = bool(at_end and (run.steps >= run.total_steps or met))


# --------------------------------------------------------------------------------------------------
# Logs

RULE = "=" * 100
N, X = (
    r"(\d{1,12})",
    r"([-+]?\d{1,20}(?:\.\d{0,30})?(?:e[-+]?\d{1,3})?|nan|inf)",
)  # a count, a number
COUNT = r"(\d[\d,]{0,20})"  # with separators
# (pattern, what to do with it), tried in this order; no unbounded repetition beside another: it
# backtracks
LINES = []


def on(pattern):
    def register(method):
        LINES.append((re.compile(pattern, re.ASCII), method))
        return method

    return register


def lines(path):
    """(number, line) of a text file, streamed; of lines beyond 8K characters the beginning."""
    try:
        with open(path, "rb") as f:
            encoding = (
                "utf-16" if f.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
            )  # the former: PowerShell's
        with open(path, encoding=encoding, errors="replace", newline="\n") as f:
            n, begins = 0, True
            while line := f.readline(1 << 13):
                if begins:
                    n += 1
                    yield (
                        n,
                        line.rstrip("\r\n").rpartition("\r")[2],
                    )  # behind a progress bar, if there was one
                begins = line.endswith("\n")
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None


def read_log(path):
    """The runs in one log file. Raises InputError if there is none."""
    reader, n, first = LogReader(Path(path)), 0, ""
    for n, line in lines(path):
        first = first or line.strip()
        reader.read(n, line)
    if not reader.runs:
        why = (
            f"none of its lines is a training step or a validation as a known trainer prints them; it begins with "
            f"{first[:40]!r}"
            if first
            else "it is empty"
        )
        raise InputError(f"{path}:{n}: not a training log: {why}")
    for run in reader.runs:
        conclude(run)
    return reader.runs


class LogReader:
    """Turns lines into runs. What a header says holds for the runs that begin after it."""

    def __init__(self, path):
        self.path, self.runs, self.run, self.block = path, [], None, None
        self.header = dict(world_size=None, hardware=None, probe=None, total_steps=None)
        self.ours, self.gpus, self.batch, self.rank_tokens = {}, [], None, None

    def read(self, n, line):
        self.n = n
        if line == RULE:
            self.end_block()
        elif self.block is not None:
            if (self.block or line == "{") and len(self.block) < 10_000:
                self.block.append(line)
            else:
                self.block = None
        for pattern, method in LINES:
            if match := pattern.match(line):
                method(self, *match.groups())
                break

    def end_block(self):
        """Between two rules our log.txt has its environment and configuration as JSON."""
        try:
            ours = json.loads("\n".join(self.block or []))
            self.ours = (
                ours if isinstance(ours, dict) and isinstance(ours.get("config"), dict) else {}
            )
        except (ValueError, RecursionError):  # the first rule, or somebody else's
            self.ours = {}
        self.block = []

    def at(self, step, dialect, kind, total=None):
        """The run that a line with this step belongs to: the current one, or a new one."""
        run = self.run
        if run is None or dialect != self.dialect:
            return self.begin(step, dialect, kind, total)
        points = getattr(run, kind)
        if step < self.last or step == self.first == self.last and points:
            ended = run.total_steps is not None and self.last >= run.total_steps
            if ended or step <= max(self.first, 1):
                return self.begin(step, dialect, kind, total)
            run.notes.append(
                f"line {self.n}: goes on from step {step} after step {self.last}; what came between is "
                "left out"
            )
            for p in (run.val, run.train):
                while p and p[-1].step >= step:
                    p.pop()
            self.clock = run.train[-1].seconds or 0.0 if run.train else 0.0
            self.done, self.seconds = step - (kind == "train"), None
        self.last = step
        return run

    def begin(self, step, dialect, kind, total):
        run = Run(
            str(self.path),
            dialect.split()[0],
            line=1 if not self.runs else self.n,
            name=self.path.stem,
        )
        self.run, self.dialect, self.first, self.last = run, dialect, step, step
        self.seconds, self.clock, self.done, self.pace = None, 0.0, step - (kind == "train"), None
        if dialect in CLOCKS:
            run.notes.append(f"its clock is {CLOCKS[dialect]}")
            if step > 1 and dialect != "nanochat":
                run.notes.append(f"it begins at step {step}: what came before is not in its times")
        if self.ours:
            run.dialect = "stopwatch"
            describe(run, self.ours)
            run.name = self.path.parent.name if self.path.name == "log.txt" else run.name
        else:
            tracks = [part for part in self.path.parts if part in PUBLIC_TARGETS]
            run.track, run.target = (
                (tracks[-1], PUBLIC_TARGETS[tracks[-1]]) if tracks else (None, None)
            )
            run.total_steps = total
        for key, value in self.header.items():
            setattr(run, key, getattr(run, key) or value)
        self.runs.append(run)
        return run

    def add(self, step, dialect, kind, loss, seconds=None, total=None):
        """A point of the current run, or of one that begins here. kind: train or val."""
        if total is not None and step > total:
            return
        run = self.at(step, dialect, kind, total)
        if seconds is not None:
            if (
                self.seconds is not None
                and seconds < self.seconds - 0.1
                and dialect == "modded-nanogpt"
            ):
                for p in (run.val, run.train):
                    i = len(p)
                    while i and p[i - 1].seconds is not None:  # before that they are None already
                        i -= 1
                        p[i] = p[i]._replace(seconds=None)
                run.notes.append(
                    f"the clock begins anew at step {step}: what came before is not in its times"
                )
            self.seconds = seconds
        tokens = tokens_at(run, step) if self.ours else step * self.batch if self.batch else None
        points = getattr(run, kind)
        if points and points[-1].step == step:
            points.pop()
        points.append(Point(step, tokens, seconds, loss))

    def tick(self, step, seconds, ordinary=True):
        """Advance a clock that is the sum of step times, to after `step`. Where not every step
        is printed, and where one is out of the ordinary (it compiled, or validated), the last
        ordinary one stands for it."""
        self.pace = seconds if ordinary else self.pace
        self.clock += (step - self.done) * (self.pace or 0.0)
        self.done = step
        return self.clock

    # --- modded-nanogpt, and ours

    @on(rf"step:{N}/{N}(?: (val|train)_loss:{X})?(?: \w+:\S+)*? train_time:{X}(ms|s) step_avg:(.*)")
    def step_line(self, step, total, kind, loss, time, unit, rest):
        kind, loss = kind or "train", float(loss) if loss else None
        if kind == "val" and self.ours and self.ours["config"].get("target_metric") == "val_bpb":
            bpb = re.search(rf" val_bpb:{X}", rest)
            loss = float(bpb[1]) if bpb else None
        if kind == "train" or loss is not None:
            self.add(
                int(step),
                "modded-nanogpt",
                kind,
                loss,
                float(time) / (1000 if unit == "ms" else 1),
                int(total),
            )

    @on(r"(step:\d+/\d+ .*)")
    def broken_step_line(self, line):
        if self.run:
            self.run.notes.append(f"line {self.n}: not a whole step line, skipped: {line[:60]!r}")

    # --- llm.c

    @on(rf"s:{N} (tel|trl):{X}(?: |$)")
    def logger_line(self, step, kind, loss):
        self.add(int(step), "llm.c (main.log)", "val" if kind == "tel" else "train", float(loss))

    @on(rf"val loss {X}$")
    def llmc_val(self, loss):
        run, step = self.run, self.last if self.run and self.dialect == "llm.c" else 0
        if step and run.total_steps == step and run.val and run.val[-1].step == step:
            step = 0  # the run before has had its last validation
        seconds = self.clock if step else 0.0
        self.add(step, "llm.c", "val", float(loss), seconds)

    @on(rf"step {{1,9}}{N}/{N} \| (?:train )?loss {X} .{{0,299}}?{X} ms")
    def llmc_step(self, step, total, loss, ms):
        self.llmc(int(step), float(loss), ms, int(total))

    @on(rf"step {N}: train loss {X} \(took {X} ms\)")
    def llmc_c_step(self, step, loss, ms):
        self.llmc(int(step) + 1, float(loss), ms, None)

    def llmc(self, step, loss, ms, total):
        run = self.at(step, "llm.c", "train", total)
        run.total_steps = total
        self.add(
            step,
            "llm.c",
            "train",
            loss,
            self.tick(step, float(ms) / 1000, ordinary=step > 1),
            total,
        )

    # --- nanoGPT

    @on(rf"step {N}: train loss {X}, val loss {X}$")
    def nanogpt_val(self, step, _, loss):
        step = int(step)
        run = self.at(step, "nanoGPT", "val", self.header["total_steps"])
        seconds = (
            self.clock + (step - self.done) * self.pace if self.pace else 0.0 if step == 0 else None
        )
        self.add(step, "nanoGPT", "val", float(loss), seconds, run.total_steps)

    @on(rf"iter {N}: loss {X}, time {X}ms")
    def nanogpt_step(self, index, loss, ms):
        step = int(index) + 1
        run = self.at(step, "nanoGPT", "train", self.header["total_steps"])
        validated = run.val and run.val[-1].step == step - 1  # its time has the validation in it
        clock = self.tick(step, float(ms) / 1000, ordinary=not validated and step - 1 > self.first)
        self.add(
            step, "nanoGPT", "train", float(loss), clock if self.pace else None, run.total_steps
        )

    # --- nanochat

    @on(rf"Step {N} \| Validation bpb: {X}$")
    def nanochat_val(self, step, bpb):
        run = self.at(int(step), "nanochat", "val")
        run.metric = "val_bpb"
        known = self.done == int(step) and (run.train or step == "0" * len(step))
        self.add(int(step), "nanochat", "val", float(bpb), self.clock if known else None)

    @on(
        rf"step {N}(?:/{N})? \({X}%\) \| loss: {X} \|.{{0,99}}?\| dt: {X}ms \|.{{0,199}}?\| total time: {X}m"
    )
    def nanochat_step(self, index, total, _, loss, ms, minutes):
        step = int(index) + 1
        run = self.at(step, "nanochat", "train")
        run.total_steps = int(total) if total else None
        if not run.train and step > 11:  # goes on from a checkpoint
            self.clock = 60 * float(minutes) - float(ms) / 1000
        clock = self.tick(step, 0.0 if step <= 11 else float(ms) / 1000)  # nanochat's own rule
        self.add(step, "nanochat", "train", float(loss), clock, run.total_steps)

    # --- headers

    @on(r"\|\s{1,9}(\d{1,3})\s{1,9}(\S.{0,99}?)\s{1,99}(?:On|Off)\s{1,9}\|")
    def nvidia_smi(self, index, name):
        self.gpus = [*(self.gpus if int(index) else []), name]
        self.header.update(world_size=len(self.gpus), hardware=name)

    @on(r"Running .{0,199}?\bon (?:device_name=)?(\S.{0,99}?)\s{1,9}with world_size[ =](\d{1,6})\b")
    def hardware_and_world(self, name, size):
        self.header.update(world_size=int(size), hardware=name)

    @on(
        rf"\S{{1,99}}: .{{1,20}} parameters, (\w{{1,20}}), attention .{{0,499}}, {N} x (.{{1,99}}), {X} TFLOP/s in "
        r"matrix products"
    )
    def our_machine(self, dtype, size, name, rate):
        probe = dict(matmul={dtype: 1e12 * float(rate) / max(1, int(size))})
        self.header.update(world_size=int(size), hardware=name, probe=probe)

    @on(r"error: (.*)")
    def our_error(self, message):
        if self.run and self.ours:
            self.run.notes.append(f"it ended with: {message[:200]}")

    @on(r"GPU: (\S.{0,99}?) \| Peak FLOPS")
    def nanochat_gpu(self, name):
        self.header.update(hardware=name)

    @on(rf"Tokens / micro-batch( / rank)?: .{{0,99}}?{COUNT}$")
    def nanochat_world(self, rank, tokens):
        if rank:
            self.rank_tokens = count(tokens)
        elif self.rank_tokens:
            self.header.update(world_size=count(tokens) // self.rank_tokens)

    @on(
        r"(?:Total batch size|total desired batch size:|tokens per iteration will be:|\| total batch size *\|) "
        rf"{COUNT}"
    )
    def batch_size(self, tokens):
        self.batch = count(tokens)

    @on(r"\| (num_processes|device) {1,99}\| (\S.{0,99}?) {1,99}\|")
    def llmc_table(self, key, value):
        if key == "device":
            self.header.update(hardware=value)
        elif value.isdecimal():
            self.header.update(world_size=int(value[:6]))

    @on(rf"(?:Overriding: )?max_iters = {N}\b")
    def nanogpt_total(self, steps):
        self.header.update(total_steps=int(steps))


def count(digits):
    return int(digits.replace(",", ""))


CLOCKS = {
    "llm.c": "the sum of its step times without the first",
    "nanoGPT": "the sum of its step times without the first and without validations",
    "nanochat": "nanochat's own, which leaves out the first 11 steps",
}
PUBLIC_TARGETS = {
    "track_1_short": 3.28,
    "track_2_medium": 2.92,
    "track_3_optimization": 3.28,
}  # modded-nanogpt's
