"""What comparisons with other people's programs share: their checkout, our trainer, the text.

A peer is a file beside this one with a class Checkout(Peer); `answer` is for the few functions of
that file that need the peer's own packages, and so run in an interpreter of its own.
"""

import importlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from base import InputError, one_line
from benchmarks.process import ROOT, execute, train

WARM = 10  # first steps that the median time of a step leaves out
LEAST_TEXT = 20_000  # characters: less does not fill our first batch


# --- in a process of the peer's interpreter, in the copy of its checkout


def answer(functions):
    """Print what the function named on the command line returns, as JSON; for `ask`."""
    print(json.dumps(functions[sys.argv[1]](*sys.argv[2:])))


def importable(*names):
    """dict(torch=its version, missing=[what import said of each package that cannot be used])."""
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as e:  # a package that is there may fail in ways of its own
            said = one_line(e, 120)
            missing.append(f"{name} ({type(e).__name__}: {said})")
    return dict(missing=missing, torch=getattr(sys.modules.get("torch"), "__version__", None))


def windows(ids, length):
    """Ids as (n, length) int64, the last row filled up with -1."""
    import torch

    ids = torch.as_tensor(ids, dtype=torch.int64)
    return torch.nn.functional.pad(ids, (0, -len(ids) % length), value=-1).view(-1, length)


def total_loss(model, inputs, targets):
    """Summed nats over the targets (n, T) int64 that are not -1, which a peer's mean leaves out."""
    import torch

    nats = 0.0
    rows = max(1, 2**14 // inputs.shape[1])
    for i in range(0, len(inputs), rows):
        y = targets[i : i + rows]
        with torch.no_grad():
            out = model(inputs[i : i + rows], y)
        mean = out[1] if isinstance(out, tuple) else out
        nats += mean.item() * (y >= 0).sum().item()
        print(f"evaluated {i + len(y)} of {len(inputs)} windows")
    return nats


def pieces(text, tokenizer, size):
    """Parts of at most `size` of the tokenizer's tokens, no character divided."""
    while text:
        ids = tokenizer.encode(text[: 8 * size])
        n = size
        while not text.startswith(piece := tokenizer.decode(ids[:n])):  # it ends inside a character
            n -= 1
        yield piece
        text = text[len(piece) :]


# --- here


def fail(message):
    raise InputError(message)


def environment(gpus=False, **more):
    """Environment of every process: no caches that outlive it, no GPU unless asked for, and each
    program's own way to let threads wait, not the one that our door chose for this process."""
    env = dict(os.environ)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "GOMP_SPINCOUNT", "RANK", "WORLD_SIZE"):
        env.pop(name, None)
    if not gpus:
        env["CUDA_VISIBLE_DEVICES"] = ""
    return env | dict(PYTHONUTF8="1", PYTHONUNBUFFERED="1") | more


def read_times(path):
    """(Run, its median ms per step) of a log or a run's folder."""
    from records.read import read_runs

    run = read_runs(path)[-1]
    return run, median_step(p.seconds for p in run.train if p.seconds is not None)


def median_step(seconds):
    """Median ms between the ends of steps, without the first WARM; None where there are none."""
    seconds = list(seconds)
    steps = [1e3 * (b - a) for a, b in zip(seconds, seconds[1:]) if b > a]
    if not steps:
        return None
    return statistics.median(steps[WARM:] or steps)


class Peer:
    """One peer: its checkout, copied into a folder, and how to run it there."""

    name = ""
    about = ""  # for --help
    needs = ()  # files of a checkout
    modules = ()  # packages
    left_behind = ()  # what is not copied of a checkout
    program = "."  # the folder of the checkout that it is started in
    own_options = ()  # arguments of its constructor that are options of the command
    own_data = None  # why it takes no --text, where it brings its data itself
    compiles = False  # whether starting again would be faster than the first start

    def __init__(self, checkout, python):
        self.checkout = Path(checkout)
        self.python = python
        missing = [name for name in self.needs if not (self.checkout / name).is_file()]
        if missing:
            fail(
                f"--{self.name} {checkout}: has no {missing[0]}: expected a checkout of {self.name}"
            )

    @staticmethod
    def add_arguments(parser):
        """Its options, those of own_options."""

    def commit(self):
        """Of the checkout; None where git cannot tell."""
        if not (self.checkout / ".git").exists():
            return None
        command = ["git", "-C", self.checkout, "rev-parse", "HEAD"]
        try:
            return subprocess.check_output(command, text=True).strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    def copy(self, folder):
        """Begin anew in this folder, with a copy of the checkout and empty caches."""
        self.folder = Path(folder)
        self.copied = self.folder / "copy"
        ignore = shutil.ignore_patterns(".git", "__pycache__", *self.left_behind)
        shutil.copytree(self.checkout, self.copied, ignore=ignore)
        self.env = self.environment(TORCHINDUCTOR_CACHE_DIR=str(self.folder / "inductor"))

    def environment(self, **more):
        return environment(**more)

    def run(self, what, *args, log="log.txt"):
        """Its interpreter with these arguments, in the copy; returns seconds."""
        self.lines = []  # of output, with the seconds at which they came
        what = f"{self.name}: {what}"
        command = [self.python, *args]
        folder = self.copied / self.program
        return execute(what, command, folder, self.folder / log, self.env, lines=self.lines)

    def ask(self, function, *args):
        """A function of the peer's file, in its interpreter; returns its dict."""
        path = [str(ROOT), os.environ.get("PYTHONPATH")]
        env = self.env | dict(PYTHONPATH=os.pathsep.join(filter(None, path)))
        log = self.folder / f"{function}.txt"
        command = [self.python, "-m", type(self).__module__, function, *args]
        execute(f"{self.name}: {function}", command, self.copied, log, env)
        lines = log.read_text(encoding="utf-8").splitlines()
        return json.loads([line for line in lines if line.startswith("{")][-1])

    def available(self):
        """What --python has: dict(missing, torch)."""
        with tempfile.TemporaryDirectory(prefix="peers-") as folder:
            self.copy(folder)
            return self.ask("importable", *self.modules)

    def task(self, text, trainer_options, folder):
        """What all are to train on, prepared in this folder."""
        return TextFile(text, folder)

    def train(self, task, folder):
        """Prepare the text, train, evaluate: one run's numbers."""
        self.copy(folder)
        started = time.perf_counter()
        self.prepare(task)
        prepared = time.perf_counter() - started
        process = self.run("training", *self.command())
        found = self.evaluate(task)

        return found | dict(process_s=process, prepare_s=prepared) | self.clock(found)

    def clock(self, found):
        """Its own training clock at the step of what evaluate() found, and its estimates."""
        run, ms = read_times(self.folder / "log.txt")
        there = [p for p in run.val if p.step == found["steps"]]
        if not there or there[-1].seconds is None:
            fail(
                f"{self.name}: its log has no validation with a time at step {found['steps']}, "
                "its checkpoint's"
            )
        clock = there[-1].seconds
        return dict(
            train_time_s=clock,
            ms_per_step=ms,
            own_metric=run.metric,
            own_estimate=there[-1].loss,
            own_estimates={p.step: p.loss for p in run.val},
        )

    def options(self, file, given):
        """(name, value) of each NAME=VALUE. Raises InputError where the peer's file has no such
        option."""
        source = (self.checkout / file).read_text(encoding="utf-8")
        for option in given:
            name, equals, value = option.partition("=")
            if not equals or not re.search(rf"[\"']--{re.escape(name)}[\"']", source):
                fail(
                    f"--{self.name}-options {option}: expected NAME=VALUE with an option of its "
                    f"{file}"
                )
            yield name, value


class TextFile:
    """The task on a text, a file of one's own, in nats per character. Ours is the track own-text,
    which has its own vocabulary and a target in bits per byte."""

    metric = "val_loss"
    unit = "character"
    device = "cpu"
    target = None
    longer = 8  # our validation rows over our training rows, in its track
    tokens = 256  # of nanochat's tokenizer, without special ones

    def __init__(self, text, folder):
        """Raises InputError for text that cannot be used; folder: to work in."""
        try:
            self.text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            said = e.strerror if isinstance(e, OSError) else "not UTF-8"
            fail(f"--text {text}: {said}; expected a file of text")
        if len(self.text) < LEAST_TEXT:
            fail(f"--text {text}: {len(self.text):,} characters; expected {LEAST_TEXT:,} or more")
        self.name = Path(text).name
        self.path = Path(folder) / self.name
        # line ends as nanoGPT makes them, for all
        self.path.write_text(self.text, encoding="utf-8", newline="\n")
        train, val = split(self.text)
        self.train = [train]
        self.val = [val]

    def options_for(self):
        """Our trainer's: what it does with a text of one's own."""
        return ["--text", self.path]

    @property
    def scale(self):
        """What a loss is multiplied with to be in our target's metric: the bits per byte that a nat
        per character is on the validation split."""
        return size_of(self.val, "character") / size_of(self.val, "byte") / math.log(2)

    def our_validation(self):
        """(characters our trainer validates on, whether they are those of the peers)"""
        own = our_split(self.path)
        return len(own), own == self.val[0]

    def fill(self, cache):
        """Our trainer prepares the text itself."""


def split(text):
    """(train, validation) as nanoGPT divides: the last tenth of the characters is validation."""
    at = int(len(text) * 0.9)
    return text[:at], text[at:]


def our_split(path):
    """The text of our validation split, as our trainer prepares it."""
    import numpy as np

    from data import DataConfig, open_dataset, read_shard

    with tempfile.TemporaryDirectory(prefix="peers-") as cache:
        config = DataConfig(data="text", text=str(path), tokenizer="chars")
        dataset = open_dataset(config, Path(cache))
        ids = np.concatenate([read_shard(path) for path in dataset.val])
        return dataset.tokenizer.decode(ids)


def size_of(texts, unit):
    """Bytes, characters or tokens of all texts."""
    if unit == "byte":
        return sum(len(text.encode()) for text in texts)
    return sum(map(len, texts))


def our_options(task, loss, trainer_options):
    """What train_gpt.py is given to reach this loss; it draws no sample, as the peers do not."""
    goal = ["--target", f"{loss * task.scale:.6f}", "--sample-tokens", 0]
    return [*trainer_options, *task.options_for(), *goal]


def ours(what, task, options, folder):
    """The result of a run of our trainer, a process of its own, with the cache in this folder."""
    task.fill(Path(folder) / "cache")
    result = train(f"our trainer, {what}", options, folder, environment(gpus=task.device != "cpu"))
    run, ms = read_times(Path(folder) / "run")
    target = result["target"]
    return result | dict(
        loss=result[result["target_metric"]] / task.scale,
        time_to_loss_s=None if target is None else run.time_to(target),
        ms_per_step=ms,
        dtype=run.environment.get("dtype"),
    )


def whole(name, text, least):
    """The number that an option of a peer's was given. Raises InputError."""
    if not re.fullmatch(r"\d{1,9}", str(text), re.ASCII) or int(text) < least:
        fail(f"{name}={text}: expected a number of {least} or more")
    return int(text)
