"""Reads logs line by line, in the dialect of whichever program wrote them:

dialect         what its lines look like
stopwatch       ours, which are modded-nanogpt's behind a header in JSON
modded-nanogpt  step:250/1390 val_loss:4.4321 train_time:8200ms step_avg:32.80ms
                (tracks 1 to 3, 2024 to 2026)
llm.c           s:250 tel:4.4321 in main.log; on the console val loss 4.4321 and
                step 251/18865 | loss 4.43 ...
nanoGPT         step 250: train loss 4.4012, val loss 4.4321 and
                iter 250: loss 4.4123, time 135.20ms, mfu 38.00%
nanochat        Step 00250 | Validation bpb: 0.9876 and
                step 00250/05000 (5.00%) | loss: 3.21 | ... dt: 90.12ms ...

Logs are streamed, so their size does not matter; a file may hold several runs. Only lines that
begin like the above count: a log may well contain the source that printed it.
"""

import bz2
import json
import re
from pathlib import Path

from base import InputError

from .metrics import VAL_LOSS
from .runs import Point, Run, conclude, describe, tokens_at
from .source import named_in

RULE = "=" * 100
LINE_CHARACTERS = 1 << 13  # of a longer line the rest is skipped
BLOCK_LINES = 10_000  # of a header in JSON

# In patterns: a count, a count with separators, a number
N = r"(\d{1,12})"
COUNT = r"(\d[\d,]{0,20})"
X = r"([-+]?\d{1,20}(?:\.\d{0,30})?(?:e[-+]?\d{1,3})?|nan|inf)"
# (pattern, method of LogReader), tried in this order. No unbounded repetition stands beside
# another: such a pattern backtracks.
PATTERNS = []

CLOCKS = {
    "llm.c": "the sum of its step times without the first",
    "nanoGPT": "the sum of its step times without the first and without validations",
    "nanochat": "nanochat's own, which leaves out the first 11 steps",
}
PUBLIC_TARGETS = {  # of modded-nanogpt's tracks, by the folder of the log
    "track_1_short": 3.28,
    "track_2_medium": 2.92,
    "track_3_optimization": 3.28,
}


def on(pattern):
    """Have the decorated method called with the groups of each line that begins like this."""

    def register(method):
        PATTERNS.append((re.compile(pattern, re.ASCII), method))
        return method

    return register


def lines(path):
    """(number, line) of a text file, which may be compressed as .bz2, streamed; of lines beyond
    8K characters the beginning. Raises InputError."""
    open_file = bz2.open if path.suffix == ".bz2" else open
    try:
        with open_file(path, "rb") as f:
            utf16 = f.read(2) in (b"\xff\xfe", b"\xfe\xff")  # PowerShell's
        encoding = "utf-16" if utf16 else "utf-8-sig"
        with open_file(path, "rt", encoding=encoding, errors="replace", newline="\n") as f:
            n = 0
            begins = True
            while line := f.readline(LINE_CHARACTERS):
                if begins:
                    n += 1
                    # What stands before a carriage return is a progress bar's
                    yield n, line.rstrip("\r\n").rpartition("\r")[2]
                begins = line.endswith("\n")
    except OSError as e:
        raise InputError(f"{path}: {e.strerror or e}") from None
    except EOFError:
        raise InputError(f"{path}: cut short; restore it") from None


def read_log(path):
    """The runs in one log file. Raises InputError if there is none."""
    reader = LogReader(Path(path))
    n = 0
    first = ""  # the first line with something in it
    for n, line in lines(path):
        first = first or line.strip()
        reader.read(n, line)
    if not reader.runs:
        why = "it is empty"
        if first:
            why = (
                "none of its lines is a training step or a validation as a known trainer prints "
                f"them; it begins with {first[:40]!r}"
            )
        raise InputError(f"{path}:{n}: not a training log: {why}")
    for run in reader.runs:
        conclude(run)
    return reader.runs


class LogReader:
    """Turns lines into runs. What a header says holds for the runs that begin after it."""

    def __init__(self, path):
        self.path = path
        self.n = 0  # of the line that is being read
        self.runs = []

        # What headers have said so far
        self.header = dict(world_size=None, hardware=None, probe=None, total_steps=None)
        self.ours = {}  # the JSON in our header
        self.sources = []  # of our headers
        self.block = None  # lines since a rule, as long as they may be JSON
        self.gpus = []
        self.batch = None  # tokens per step
        self.rank_tokens = None  # nanochat's, per micro-batch

        # The run that lines belong to now
        self.run = None
        self.dialect = None
        self.first = None  # step of its first line
        self.last = None  # step of its latest line
        self.seconds = None  # its clock where it has one: at the latest line
        self.clock = 0.0  # the sum of its step times where it has none
        self.done = 0  # the step up to which they are summed
        self.pace = None  # seconds of an ordinary step

    def read(self, n, line):
        self.n = n
        if line == RULE:
            self.end_block()
        elif self.block is not None:
            if (self.block or line == "{") and len(self.block) < BLOCK_LINES:
                self.block.append(line)
            else:
                self.block = None
        for pattern, method in PATTERNS:
            if match := pattern.match(line):
                method(self, *match.groups())
                break

    def end_block(self):
        """Between two rules our log.txt has its environment and configuration as JSON."""
        self.ours = {}
        try:
            ours = json.loads("\n".join(self.block or []))
            if isinstance(ours, dict) and isinstance(ours.get("config"), dict):
                self.ours = ours
        except (ValueError, RecursionError):
            pass  # the first rule, or somebody else's
        self.block = []

    # --- points

    def at(self, step, dialect, kind, total=None):
        """The run that a line with this step belongs to: the current one, or a new one."""
        run = self.run
        if run is None or dialect != self.dialect:
            return self.begin(step, dialect, kind, total)
        twice_at_first = step == self.first == self.last and getattr(run, kind)
        if step < self.last or twice_at_first:
            ended = run.total_steps is not None and self.last >= run.total_steps
            if ended or step <= max(self.first, 1):
                return self.begin(step, dialect, kind, total)
            run.notes.append(
                f"line {self.n}: goes on from step {step} after step {self.last}; what came "
                "between is left out"
            )
            for points in (run.val, run.train):
                while points and points[-1].step >= step:
                    points.pop()
            self.clock = 0.0
            if run.train:
                self.clock = run.train[-1].seconds or 0.0
            self.done = step - (kind == "train")
            self.seconds = None
        self.last = step
        return run

    def begin(self, step, dialect, kind, total):
        """A new run, whose first line has this step."""
        run = Run(str(self.path), dialect.split()[0], name=self.path.stem)
        if self.runs:
            run.line = self.n
        self.run = run
        self.dialect = dialect
        self.first = step
        self.last = step
        self.seconds = None
        self.clock = 0.0
        self.done = step - (kind == "train")
        self.pace = None

        if dialect in CLOCKS:
            run.notes.append(f"its clock is {CLOCKS[dialect]}")
            if step > 1 and dialect != "nanochat":
                run.notes.append(f"it begins at step {step}: what came before is not in its times")
        if self.ours:
            run.dialect = "stopwatch"
            describe(run, self.ours)
            run.sources = self.sources
            if self.path.name == "log.txt":
                run.name = self.path.parent.name
        else:
            tracks = [part for part in self.path.parts if part in PUBLIC_TARGETS]
            if tracks:
                run.track = tracks[-1]
                run.target = PUBLIC_TARGETS[run.track]
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
            back = self.seconds is not None and seconds < self.seconds - 0.1
            if back and dialect == "modded-nanogpt":
                forget_times(run)
                run.notes.append(
                    f"the clock begins anew at step {step}: what came before is not in its times"
                )
            self.seconds = seconds

        tokens = None
        if self.ours:
            tokens = tokens_at(run, step)
        elif self.batch:
            tokens = step * self.batch
        points = getattr(run, kind)
        if points and points[-1].step == step:
            points.pop()
        points.append(Point(step, tokens, seconds, loss))

    def tick(self, step, seconds, ordinary=True):
        """Advance a clock that is the sum of step times, to after `step`. Where not every step
        is printed, and where one is out of the ordinary (it compiled, or validated), the last
        ordinary one stands for it."""
        if ordinary:
            self.pace = seconds
        self.clock += (step - self.done) * (self.pace or 0.0)
        self.done = step
        return self.clock

    # --- modded-nanogpt, and ours

    @on(rf"step:{N}/{N}(?: (val|train)_loss:{X})?(?: \w+:\S+)*? train_time:{X}(ms|s) step_avg:(.*)")
    def step_line(self, step, total, kind, loss, time, unit, rest):
        kind = kind or "train"
        loss = float(loss) if loss else None
        if kind == "val" and self.ours:
            # Our other metrics stand behind the time
            metric = self.ours["config"].get("target_metric")
            if isinstance(metric, str) and metric and metric != VAL_LOSS:
                other = re.search(rf" {re.escape(metric)}:{X}", rest)
                loss = float(other[1]) if other else None
        if kind == "val" and loss is None:
            return
        seconds = float(time) / (1000 if unit == "ms" else 1)
        self.add(int(step), "modded-nanogpt", kind, loss, seconds, int(total))

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
        run = self.run
        step = self.last if run and self.dialect == "llm.c" else 0
        if step and run.total_steps == step and run.val and run.val[-1].step == step:
            step = 0  # the run before has had its last validation
        self.add(step, "llm.c", "val", float(loss), self.clock if step else 0.0)

    @on(rf"step {{1,9}}{N}/{N} \| (?:train )?loss {X} .{{0,299}}?{X} ms")
    def llmc_step(self, step, total, loss, ms):
        self.llmc(int(step), float(loss), ms, int(total))

    @on(rf"step {N}: train loss {X} \(took {X} ms\)")
    def llmc_c_step(self, step, loss, ms):
        self.llmc(int(step) + 1, float(loss), ms, None)

    def llmc(self, step, loss, ms, total):
        run = self.at(step, "llm.c", "train", total)
        run.total_steps = total
        seconds = self.tick(step, float(ms) / 1000, ordinary=step > 1)
        self.add(step, "llm.c", "train", loss, seconds, total)

    # --- nanoGPT

    @on(rf"step {N}: train loss {X}, val loss {X}$")
    def nanogpt_val(self, step, _, loss):
        step = int(step)
        run = self.at(step, "nanoGPT", "val", self.header["total_steps"])
        seconds = None
        if self.pace:
            seconds = self.clock + (step - self.done) * self.pace
        elif step == 0:
            seconds = 0.0
        self.add(step, "nanoGPT", "val", float(loss), seconds, run.total_steps)

    @on(rf"iter {N}: loss {X}, time {X}ms")
    def nanogpt_step(self, index, loss, ms):
        step = int(index) + 1
        run = self.at(step, "nanoGPT", "train", self.header["total_steps"])
        # The time of a step after a validation has the validation in it
        validated = run.val and run.val[-1].step == step - 1
        clock = self.tick(step, float(ms) / 1000, ordinary=not validated and step - 1 > self.first)
        seconds = clock if self.pace else None
        self.add(step, "nanoGPT", "train", float(loss), seconds, run.total_steps)

    # --- nanochat

    @on(rf"Step {N} \| Validation bpb: {X}$")
    def nanochat_val(self, step, bpb):
        at_start = step == "0" * len(step)
        step = int(step)
        run = self.at(step, "nanochat", "val")
        run.metric = "val_bpb"
        known = self.done == step and (run.train or at_start)
        self.add(step, "nanochat", "val", float(bpb), self.clock if known else None)

    @on(
        rf"step {N}(?:/{N})? \({X}%\) \| loss: {X} \|.{{0,99}}?\| dt: {X}ms "
        rf"\|.{{0,199}}?\| total time: {X}m"
    )
    def nanochat_step(self, index, total, _, loss, ms, minutes):
        step = int(index) + 1
        seconds = float(ms) / 1000
        run = self.at(step, "nanochat", "train")
        run.total_steps = int(total) if total else None
        if not run.train and step > 11:  # goes on from a checkpoint
            self.clock = 60 * float(minutes) - seconds
        clock = self.tick(step, 0.0 if step <= 11 else seconds)  # nanochat's own rule
        self.add(step, "nanochat", "train", float(loss), clock, run.total_steps)

    # --- headers

    @on(r"\|\s{1,9}(\d{1,3})\s{1,9}(\S.{0,99}?)\s{1,99}(?:On|Off)\s{1,9}\|")
    def nvidia_smi(self, index, name):
        if int(index) == 0:
            self.gpus = []
        self.gpus.append(name)
        self.header.update(world_size=len(self.gpus), hardware=name)

    @on(r"Running .{0,199}?\bon (?:device_name=)?(\S.{0,99}?)\s{1,9}with world_size[ =](\d{1,6})\b")
    def hardware_and_world(self, name, size):
        self.header.update(world_size=int(size), hardware=name)

    @on(
        rf"\S{{1,99}}: .{{1,20}} parameters, (\w{{1,20}}), attention .{{0,499}}, {N} x (.{{1,99}}),"
        rf" {X} TFLOP/s in matrix products"
    )
    def our_machine(self, dtype, size, name, rate):
        probe = dict(matmul={dtype: 1e12 * float(rate) / max(1, int(size))})
        self.header.update(world_size=int(size), hardware=name, probe=probe)

    @on(r"(source: .*)")
    def our_source(self, line):
        named = named_in(line)
        if named:
            self.sources.append(list(named))

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
        r"(?:Total batch size|total desired batch size:|tokens per iteration will be:"
        rf"|\| total batch size *\|) {COUNT}"
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


def forget_times(run):
    """Take the times out of all points so far: a clock that begins anew does not go on from
    them."""
    for points in (run.val, run.train):
        i = len(points)
        while i and points[i - 1].seconds is not None:  # before that they are None already
            i -= 1
            points[i] = points[i]._replace(seconds=None)


def count(digits):
    return int(digits.replace(",", ""))
