"""What a run writes: log.txt, metrics.jsonl and progress while it trains, result.json and the
weights at the end.

Step lines in log.txt are the field's (modded-nanogpt's), so its readers read ours:
    step:S/N train_loss:4.1234 train_time:1234ms step_avg:12.34ms
    step:S/N val_loss:4.1234 train_time:1234ms step_avg:12.34ms val_bpb:1.2345
metrics.jsonl has an object for each step, with `step`, `train_loss`, `train_time` (seconds), `lr`
(a fraction of its peak) and, in one process, `grad_norm`, the norm of all gradients. It has one for
each validation, with `step`, `train_time` and every metric of records/metrics.py that the data
allows.

The source is beside them once, in source.tar.bz2, and log.txt begins with its digest: see
records/source.py. With --repeat each seed's folder has its own, so that any of them can be moved
and checked alone.

A run that is resumed in its folder goes on in the same files. A full disk or a lost folder does
not end a run. What nobody expected ends it, and is in error.txt.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path

from tqdm import tqdm

from base import InputError, last_resort, one_line, to_json, whole_file
from base.files import sweep
from base.terminal import printable
from records import source as sources
from records.metrics import METRICS, VAL_LOSS

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}"
RULE = "=" * 100
STEP_LINE = re.compile(rb"step:(\d+)/\d+ ")
OF_THE_START = (
    "date",
    "probe",
    "resume",
    "run_dir",
    "vocabulary",
)  # described, but new at every start
SHOW_EVERY = 15  # seconds between lines of progress where nobody watches a terminal


class Log:
    """Writes into `folder`; with active=False (ranks other than the first) it does nothing.

    resume_step: go on where a run was after so many steps, 0 for from the start; what the files
    here hold beyond, written before it was killed, is dropped. Without it the folder must not hold
    a run. Raises OSError, and then nothing has changed.
    """

    def __init__(self, folder, steps, active=True, resume_step=None):
        self.folder = Path(folder)
        self.active = active
        self.failed = False  # whether somebody was told that a file cannot be written
        self.resume_step = resume_step
        self.first = None  # (lines before it, description) of the header of the run that goes on
        self.tracker = None  # a Tracker, which gets what metrics.jsonl gets
        self.kept = {}  # files of the header, {name: content}: there from the start to the end
        if not active:
            return

        self.folder.mkdir(parents=True, exist_ok=True)
        if resume_step is not None:
            sweep(self.folder, seconds=None)  # whoever wrote here was killed
            self.first = drop_beyond(self.folder, resume_step)
        elif any((self.folder / name).exists() for name in ("log.txt", "metrics.jsonl")):
            raise FileExistsError(errno.EEXIST, "holds a run already", str(self.folder))

        self.text = Lines(self.folder / "log.txt", self.fail)
        self.metrics = Lines(self.folder / "metrics.jsonl", self.fail)
        self.shown = time.perf_counter()
        self.bar = tqdm(
            total=steps,
            initial=resume_step or 0,
            disable=None,  # no bar where stderr is no terminal
            dynamic_ncols=True,
            leave=False,
            bar_format=BAR,
        )
        if self.first:
            self.say_resumed()

    def expect(self, steps):
        """There will be so many steps in all."""
        self.bar.total = steps

    def say_resumed(self):
        self.say(f"resumed from step {self.resume_step}")

    def header(self, source, beside=None, **described):
        """Begin log.txt with the digest of the source and a description of what it runs on; the
        description is config.json as well, and the source source.tar.bz2.

        source: a Source, of records/source.py; beside: {name: content as bytes} of files that the
        run's folder has besides; described: what JSON can hold, by name. A run that is resumed
        keeps its first header; where this one differs, log.txt says so, and where steps were added
        config.json is this one.
        """
        if not self.active:
            return
        self.kept |= beside or {}
        text = to_json(dict(described, source=source.digest), indent=1)
        if self.first is None:
            self.begin(source, sources.ARCHIVE, text)
            self.kept["config.json"] = text.encode()
            if self.resume_step is not None:  # in a folder where nothing was, or no whole header
                self.say_resumed()
        else:
            head, description = self.first
            self.kept["config.json"] = description.encode()
            # The digest is the last line of the head: there may be remarks before it
            named = sources.named_in(head.rstrip("\n").rpartition("\n")[2])
            if named is None or named[1] != source.digest:
                self.say(
                    "the source is not the one this run began with; it goes on with what follows "
                    "in log.txt"
                )
                self.begin(source, f"source-{source.digest[:8]}.tar.bz2", text)
            else:
                self.kept[named[0]] = source.archive
                if changes := differences(description, text):
                    self.say(f"resumed with {', '.join(changes)}")
            if any(change.startswith("config.steps ") for change in differences(description, text)):
                # Whoever reads the weights asks config.json where in training they are from
                self.kept["config.json"] = text.encode()
                self.write("config.json", lambda path: path.write_text(text, encoding="utf-8"))
        self.keep()

    def begin(self, source, name, text):
        """A whole header into log.txt: the digest of the source and the description. name: of the
        archive beside it."""
        self.say(f"{sources.header_line(source, name)}\n{RULE}\n{text}\n{RULE}", quiet=True)
        self.kept[name] = source.archive

    def keep(self):
        """Write what is to be kept and is not there."""
        for name, content in self.kept.items():
            if not (self.folder / name).exists():
                self.write(name, lambda path, content=content: path.write_bytes(content))

    def say(self, message, quiet=False):
        """A line in log.txt, and on stderr unless quiet."""
        if self.active:
            self.text.add(message)
            if not quiet:
                show(message)

    def fail(self, path, error):
        """Say that a file cannot be written to; once, for what follows is likely to fail for the
        same reason."""
        if not self.failed:
            self.failed = True
            show(
                f"{path} cannot be written: {error.strerror or error}; training goes on, and "
                "writing is tried again"
            )

    def step(self, step, total, kind, loss, seconds, kept=None, **more):
        """One step line and one object of metrics.jsonl.

        step: numbered from 1, of `total`; kind: train or val; loss: nats per token; seconds: of the
        training clock; kept: what only metrics.jsonl has besides; more: further metrics by name;
        None for what could not be measured.
        """
        kept = {name: value for name, value in (kept or {}).items() if value is not None}
        more = {name: value for name, value in more.items() if value is not None}
        line = f"step:{step}/{total} {kind}_loss:{loss:.4f} {timed(step, seconds)}"
        for name, value in more.items():
            line += f" {name}:{value:{METRICS[name].format}}"
        self.say(line, quiet=kind == "train")
        if self.active:
            row = {"step": step, f"{kind}_loss": loss, **more, "train_time": seconds, **kept}
            self.keep_numbers(row)

    def keep_numbers(self, row):
        """An object of metrics.jsonl."""
        self.metrics.add(to_json(row))
        if self.tracker:
            self.tracker.log(row)

    def validation(self, step, total, measured, seconds):
        """The lines of a validation. measured: {name: value}, as records.metrics.measure gives."""
        others = {name: value for name, value in measured.items() if name != VAL_LOSS}
        self.step(step, total, "val", measured[VAL_LOSS], seconds, **others)

    def quick(self, step, total, name, value, seconds):
        """The lines of a look at a part of the validation split. name: of the metric."""
        value_in_words = f"part_{name}:{value:{METRICS[name].format}}"
        self.say(f"step:{step}/{total} {value_in_words} {timed(step, seconds)}")
        if self.active:
            row = {"step": step, f"part_{name}": value, "train_time": seconds}
            self.keep_numbers(row)

    def progress(self, step, text):
        """Show where training is; text: what to put beside the bar."""
        if not self.active:
            return
        with contextlib.suppress(OSError, ValueError):  # a terminal that was closed
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        now = time.perf_counter()
        if self.bar.disable and now - self.shown > SHOW_EVERY:
            show(f"step {step}/{self.bar.total}  {text}")
            self.shown = now

    def save_weights(self, weights, name="model.safetensors"):
        """Write a file of weights, {name: CPU tensor}. Returns whether it was written."""
        if not self.active:
            return False
        from safetensors.torch import save_file  # loads torch, which reading logs does without

        # Where somebody removed the folder, the weights are worth a new one
        with contextlib.suppress(OSError):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        self.keep()
        return self.write(name, lambda path: save_file(weights, path))

    def rename(self, name, new):
        """Give a file of the folder another name, if it is there."""
        if self.active:
            with contextlib.suppress(OSError):
                os.replace(self.folder / name, self.folder / new)

    def remove(self, *names):
        """Delete files of the folder, where they are there."""
        if self.active:
            for name in names:
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink()

    def finish(self, result):
        """Write result.json, the mark of a finished run unless it says `finishing`."""
        if not self.active:
            return
        text = to_json(result, indent=1)
        self.write("result.json", lambda path: path.write_text(text, encoding="utf-8"))

    def write(self, name, save):
        """Have save(path) write a file that is there whole or not at all. Failing is said, and no
        more: the run is done, or goes on, and its result still counts. Returns whether it did."""
        try:
            with whole_file(self.folder / name) as path:
                save(path)
                if self.text.path.exists():  # safetensors' files are for their owner alone
                    shutil.copymode(self.text.path, path)
        except Exception as e:  # safetensors has errors of its own
            self.say(f"{self.folder / name} could not be written: {one_line(e)}")
            return False
        return True

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.tracker:
            self.tracker.finish()
        if isinstance(error, InputError):
            self.say(f"error: {error}", quiet=True)  # on the screen it comes from main()
        elif isinstance(error, Exception) and self.active:
            error.report = last_resort.write_report(error, self.folder)
            self.say(f"error: {last_resort.explain(error)}; see {error.report}", quiet=True)
        if self.active:
            with contextlib.suppress(OSError, ValueError):
                self.bar.close()
            self.text.close()
            self.metrics.close()
            if isinstance(error, InputError) and not self.kept and self.resume_step is None:
                self.discard()

    def discard(self):
        """Remove what there is of a run that was refused before it began."""
        for name in "log.txt", "metrics.jsonl":
            with contextlib.suppress(OSError):
                (self.folder / name).unlink()


def timed(step, seconds):
    """The end of a step line: the training clock and its mean, as the field's logs have them."""
    return f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(step, 1):.2f}ms"


class Lines:
    """A file that lines are appended to, each given to the system at once.

    What cannot be written waits in memory and is tried again with the next line; fail(path, error)
    is told.
    """

    def __init__(self, path, fail):
        self.path = path
        self.fail = fail
        self.waiting = b""  # what is not in the file yet
        self.lock = threading.Lock()  # the thread that writes checkpoints has its say too
        self.file = open(path, "a+b", buffering=0)

    def add(self, line):
        with self.lock:
            self.waiting += line.encode("utf-8", "backslashreplace") + b"\n"
            self.flush()

    def flush(self):
        try:
            # A deleted file is there as long as it is open: all of it has to be written anew
            if self.file and not os.fstat(self.file.fileno()).st_nlink:
                self.file.seek(0)
                self.waiting = self.file.readall() + self.waiting
                self.drop()
            if not self.file:
                self.file = open(self.path, "a+b", buffering=0)
            while self.waiting:
                written = self.file.write(self.waiting)  # a disk that fills up takes a part
                self.waiting = self.waiting[written:]
        except OSError as e:
            self.drop()
            self.fail(self.path, e)

    def drop(self):
        """Close the file; flush() opens it again."""
        file = self.file
        self.file = None
        if file:
            with contextlib.suppress(OSError):
                file.close()

    def close(self):
        with self.lock:
            if self.file or self.waiting:
                self.flush()
            if self.file:
                with contextlib.suppress(OSError):
                    os.fsync(self.file.fileno())
            self.drop()


def show(line):
    """A line on stderr, above the progress bar. Where stderr is a file on a full disk, there is
    nobody to tell."""
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(printable(line), file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# Going on in the files of a run that was killed


def drop_beyond(folder, step):
    """Take out of log.txt and metrics.jsonl in `folder` what a run wrote after `step`, and lines
    that were cut off.

    Returns (what stands before the description, the description) from log.txt's header, None where
    it has no whole one. Raises OSError, and then neither file has changed.
    """
    log = whole_lines(folder / "log.txt")
    rules = [i for i, line in enumerate(log) if line == f"{RULE}\n".encode()][:2]
    head = rules[1] + 1 if len(rules) == 2 else 0  # lines of the header

    # Everything from the first line of a later step on goes, or from where it was resumed from
    # this step before. Losses come in later than validations, though: after a line beyond there
    # may be a step's line that is not.
    kept = []
    beyond = False
    again = f"resumed from step {step}\n".encode()
    for line in log[head:]:
        match = STEP_LINE.match(line)
        later = match is not None and int(match[1]) > step
        if later or line == again:
            beyond = True
        if not beyond or (match and not later):
            kept.append(line)
    if not head and not any(map(STEP_LINE.match, kept)):
        kept = []  # killed while it wrote the header

    metrics = whole_lines(folder / "metrics.jsonl")
    rewrite(
        {
            folder / "log.txt": log[:head] + kept,
            folder / "metrics.jsonl": [line for line in metrics if step_of(line) <= step],
        }
    )
    if not head:
        return None
    before = b"".join(log[: rules[0]])
    description = b"".join(log[rules[0] + 1 : rules[1]])
    return before.decode("utf-8", "replace"), description.decode("utf-8", "replace")[:-1]


def whole_lines(path):
    """Lines of a file as bytes, without what a kill left of the last one; none if there is no
    file."""
    try:
        return [line + b"\n" for line in path.read_bytes().split(b"\n")[:-1]]
    except FileNotFoundError:
        return []


def step_of(line):
    """Step of a line of metrics.jsonl, infinite if it is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf
    return step if isinstance(step, int) else math.inf


def rewrite(files):
    """{path: lines as bytes}: all are written aside before any is renamed, so that a full disk
    costs nothing."""
    with contextlib.ExitStack() as renamed_at_the_end:
        for path, lines in files.items():
            content = b"".join(lines)
            if not path.exists() or path.read_bytes() != content:
                renamed_at_the_end.enter_context(whole_file(path)).write_bytes(content)


def differences(before, after):
    """["environment.device X (was Y)", ...] for two descriptions as JSON, but for what is new at
    every start."""
    found = []
    try:
        before = json.loads(before)
        after = json.loads(after)
        for part in ("config", "environment"):
            old = before[part]
            new = after[part]
            for name in sorted(old.keys() | new.keys()):
                if name not in OF_THE_START and old.get(name) != new.get(name):
                    found.append(f"{part}.{name} {new.get(name)!r} (was {old.get(name)!r})")
    except (ValueError, TypeError, KeyError, AttributeError):
        return []  # somebody else's header
    return found
