"""What a run writes: log.txt, metrics.jsonl and progress while it trains, result.json and the
weights at the end.

Step lines in log.txt are the field's (modded-nanogpt's), so its readers read ours:
    step:S/N train_loss:4.1234 train_time:1234ms step_avg:12.34ms
    step:S/N val_loss:4.1234 train_time:1234ms step_avg:12.34ms val_bpb:1.2345
metrics.jsonl has one object per step with `step`, `train_loss`, `train_time` (seconds), and one per
validation with
`step`, `train_time`, `val_loss`, `val_bpb`.

A run that is resumed in its folder goes on in the same files. A full disk or a lost folder does not
end a run.
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

from base import to_json

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {postfix}"
RULE = "=" * 100
STEP_LINE = re.compile(rb"step:(\d+)/\d+ ")
OF_THE_START = ("date", "probe", "resume", "run_dir")  # in the description, and new at every start


class Log:
    """Writes into `folder`; with active=False (ranks other than the first) it does nothing.

    resume_step: go on where a run was after so many steps, 0 for from the start; what the files
    here hold beyond, written before it was killed, is dropped. Without it the folder must not hold
    a run. Raises OSError, and then nothing has changed.
    """

    def __init__(self, folder, steps, active=True, resume_step=None):
        self.folder, self.active, self.failed = Path(folder), active, False
        self.resume_step = resume_step
        self.first = self.config = (
            None  # header in log.txt of the run that is resumed; for config.json
        )
        if not active:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if resume_step is not None:
            self.first = drop_beyond(self.folder, resume_step)
        elif any((self.folder / name).exists() for name in ("log.txt", "metrics.jsonl")):
            raise FileExistsError(errno.EEXIST, "holds a run already", str(self.folder))
        self.text, self.metrics = (
            Lines(self.folder / name, self.fail) for name in ("log.txt", "metrics.jsonl")
        )
        self.shown = time.perf_counter()
        self.bar = tqdm(
            total=steps,
            initial=resume_step or 0,
            disable=None,
            dynamic_ncols=True,
            leave=False,
            bar_format=BAR,
        )
        if self.first:
            self.say_resumed()

    def say_resumed(self):
        self.say(f"resumed from step {self.resume_step}")

    def header(self, source, **described):
        """The recipe's source and what it runs on, into log.txt; the latter into config.json as
        well. A run that is resumed keeps its first header; where this one differs, log.txt says
        so."""
        if not self.active:
            return
        text = to_json(described, indent=1)
        whole = f"{source}\n{RULE}\n{text}\n{RULE}"
        if not self.first:
            self.config = text
            self.say(whole, quiet=True)
            if self.resume_step is not None:  # in a folder where nothing was, or no whole header
                self.say_resumed()
        else:
            first_source, self.config = self.first
            if not first_source.endswith(
                f"{source}\n"
            ):  # before it is what was said before the first header
                self.say(
                    "the source is not the one this run began with; it goes on with what follows in log.txt"
                )
                self.say(whole, quiet=True)
            elif changes := differences(self.config, text):
                self.say(f"resumed with {', '.join(changes)}")
        self.keep_config()

    def keep_config(self):
        """Write config.json unless it is there."""
        if self.config is not None and not (self.folder / "config.json").exists():
            self.write("config.json", lambda path: path.write_text(self.config, encoding="utf-8"))

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
                f"{path} cannot be written: {error.strerror or error}; training goes on, and writing is tried again"
            )

    def step(self, step, total, kind, loss, seconds, **more):
        """One step line and one metrics object. kind: train or val; more: further metrics by
        name."""
        line = (
            f"step:{step}/{total} {kind}_loss:{loss:.4f} train_time:{1000 * seconds:.0f}ms "
            f"step_avg:{1000 * seconds / max(step, 1):.2f}ms"
        )
        more = {name: value for name, value in more.items() if value is not None}
        self.say(
            line + "".join(f" {name}:{value:.4f}" for name, value in more.items()),
            quiet=kind == "train",
        )
        if self.active:
            self.metrics.add(
                to_json({"step": step, f"{kind}_loss": loss, **more, "train_time": seconds})
            )

    def progress(self, step, text):
        """Show where training is; text: what to put beside the bar."""
        if not self.active:
            return
        with contextlib.suppress(OSError, ValueError):  # a terminal that was closed
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(step - self.bar.n)
        now = time.perf_counter()
        if (
            self.bar.disable and now - self.shown > 15
        ):  # nobody watches a terminal: a line now and then
            show(f"step {step}/{self.bar.total}  {text}")
            self.shown = now

    def finish(self, result, weights):
        """Write model.safetensors (name -> CPU tensor) and then result.json, the mark of a
        finished run, each aside and renamed."""
        if not self.active:
            return
        from safetensors.torch import save_file  # loads torch, which reading logs does without

        with contextlib.suppress(
            OSError
        ):  # where somebody removed it, the weights are worth a new one
            self.folder.mkdir(parents=True, exist_ok=True)
        self.keep_config()
        self.write("model.safetensors", lambda path: save_file(weights, path))
        self.write(
            "result.json", lambda path: path.write_text(to_json(result, indent=1), encoding="utf-8")
        )

    def write(self, name, save):
        """Have save(path) write a file aside, bring it to disk and rename it. Failing is said,
        and no more: the run is done, or goes on, and its result still counts."""
        aside = self.folder / f"{name}.tmp"
        try:
            save(aside)
            if self.text.path.exists():
                shutil.copymode(
                    self.text.path, aside
                )  # safetensors' files are for their owner alone
            with open(aside, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(aside, self.folder / name)
        except Exception as e:  # safetensors has errors of its own
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            self.say(f"{self.folder / name} could not be written: {' '.join(str(e).split())}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.active:
            with contextlib.suppress(OSError, ValueError):
                self.bar.close()
            self.text.close()
            self.metrics.close()


class Lines:
    """A file that lines are appended to, each given to the system at once.

    What cannot be written waits in memory and is tried again with the next line; fail(path, error)
    is told.
    """

    def __init__(self, path, fail):
        self.path, self.fail, self.waiting = path, fail, b""
        self.lock = threading.Lock()  # the thread that writes checkpoints has its say too
        self.file = open(path, "a+b", buffering=0)

    def add(self, line):
        with self.lock:
            self.waiting += line.encode("utf-8", "backslashreplace") + b"\n"
            self.flush()

    def flush(self):
        try:
            if (
                self.file and not os.fstat(self.file.fileno()).st_nlink
            ):  # deleted, but there as long as it is open
                self.file.seek(0)
                self.waiting = self.file.readall() + self.waiting
                self.drop()
            if not self.file:
                self.file = open(self.path, "a+b", buffering=0)
            while self.waiting:
                self.waiting = self.waiting[
                    self.file.write(self.waiting) :
                ]  # a disk that fills up takes a part
        except OSError as e:
            self.drop()
            self.fail(self.path, e)

    def drop(self):
        """Close the file; flush() opens it again."""
        if self.file:
            file, self.file = self.file, None
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
        tqdm.write(line, file=sys.stderr)


def drop_beyond(folder, step):
    """Take out of log.txt and metrics.jsonl in `folder` what a run wrote after `step`, and lines
    that were cut off.

    Returns (source, description) from log.txt's header, None where it has no whole one. Raises
    OSError, and then neither file has changed.
    """
    log, kept, beyond = whole_lines(folder / "log.txt"), [], False
    rules = [i for i, line in enumerate(log) if line == f"{RULE}\n".encode()][:2]
    head = rules[1] + 1 if len(rules) == 2 else 0
    again = f"resumed from step {step}\n".encode()
    for line in log[head:]:
        match = STEP_LINE.match(line)
        beyond = beyond or line == again or bool(match and int(match[1]) > step)
        # losses come in later than validations: after a line beyond there may be one that is not
        if not beyond or match and int(match[1]) <= step:
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
    source, description = (
        b"".join(part).decode("utf-8", "replace")
        for part in (log[: rules[0]], log[rules[0] + 1 : rules[1]])
    )
    return source, description[:-1]


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
        return step if isinstance(step, int) else math.inf
    except (ValueError, TypeError, KeyError, RecursionError):
        return math.inf


def rewrite(files):
    """{path: lines as bytes}: all are written aside before any is renamed, so that a full disk
    costs nothing."""
    asides = {}
    try:
        for path, lines in files.items():
            content = b"".join(lines)
            if not path.exists() or path.read_bytes() != content:
                asides[path] = path.with_name(f"{path.name}.tmp")
                with open(asides[path], "wb") as f:
                    f.write(content)
                    f.flush()
                    os.fsync(f.fileno())
        for path, aside in asides.items():
            os.replace(aside, path)
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)


def differences(before, after):
    """["environment.device X (was Y)", ...] for two descriptions as JSON, but for what is new at
    every start."""
    try:
        before, after = json.loads(before), json.loads(after)
        pairs = [(part, before[part], after[part]) for part in ("config", "environment")]
        return [
            f"{part}.{name} {b.get(name)!r} (was {a.get(name)!r})"
            for part, a, b in pairs
            for name in sorted(a.keys() | b.keys())
            if name not in OF_THE_START and a.get(name) != b.get(name)
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []  # somebody else's header
