"""Time from the command to the end of the first step, by phase, with cold and with warm caches.

    ./run.sh benchmarks start                                  this machine's track
    ./run.sh benchmarks start --track gpt2-small --synthetic   with no data and no network

Options other than those below are the trainer's own (./run.sh train --help). The trainer runs
twice in processes of its own on a fresh cache folder, which holds prepared data, compiled code and
Triton's kernels: the first run finds it empty (cold), the second finds it filled (warm). Each
stops after its first step. Functions of the trainer are timed from outside; what one spends in
another that is timed counts there alone, so the phases sum to the total:
    interpreter     the process starts, Python is ready
    imports         train_gpt and all that it imports
    arguments       options, the track, looking for GPUs
    data            text into tokens, or the download; opening the loaders
    kernels         choosing and probing the ops
    model           building it, drawing its weights, the optimizer's state
    probe           measuring what the machine can do, describing it
    graph ...       compiling and running forward and backward of a stage, the optimizer's
                    kernels, validation
    log             writing down what is about to run
    first step      its batch, and the step
    other           everything between
What the system itself keeps of files in memory is warm both times. On several GPUs one is
measured.
"""

import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.options import COUNT
from benchmarks.process import execute
from benchmarks.report import document, number, say, table

ROOT = Path(__file__).resolve().parent.parent


# --- in the trainer's process


class Phases:
    """Seconds by phase, without those of phases inside it, in the order of their begin."""

    def __init__(self, now=time.monotonic):
        self.now = now
        self.seconds = {}
        self.stack = ["other"]
        self.since = now()

    def switch(self):
        """Book the time since the last switch to the innermost phase."""
        now = self.now()
        phase = self.stack[-1]
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.since
        self.since = now

    def timed(self, function, phase, wait=lambda: None):
        """function, whose time counts as phase (a name, or what makes one of the arguments);
        wait() ends it."""

        def call(*args, **kwargs):
            self.switch()
            self.stack.append(phase if isinstance(phase, str) else phase(*args, **kwargs))
            self.seconds.setdefault(self.stack[-1], 0.0)
            try:
                return function(*args, **kwargs)
            finally:
                wait()
                self.switch()
                self.stack.pop()

        return call


def trace(result, spawned, argv, synthetic):
    """Train to the end of the first step, then write {phase: seconds} to the file `result`; the
    exit status."""
    phases = Phases()
    phases.seconds["interpreter"] = phases.since - spawned
    subject = phases.timed(importlib.import_module, "imports")("benchmarks.subject")
    import torch

    def wait():
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    training = []  # not empty once that has begun

    def begin(function):
        def call(*args):
            training.append(True)
            return function(*args)

        return call

    def end_after(function):
        def call(*args):
            function(*args)
            if training:
                wait()
                phases.switch()
                aside = Path(f"{result}.aside")
                aside.write_text(json.dumps(phases.seconds))
                aside.replace(result)
                raise SystemExit(130)  # as a signal would: nobody needs the rest

        return call

    if synthetic:
        from benchmarks.synthetic import synthetic as opener

        subject.use_data(opener)
    for (owner, name), around in {subject.TRAINING: begin, subject.STEP_ENDS: end_after}.items():
        setattr(owner, name, around(getattr(owner, name)))
    for owner, name, phase in subject.phases(graphs=lambda: not training):
        setattr(owner, name, phases.timed(getattr(owner, name), phase, wait))
    return subject.main(argv)


# --- here


def start(argv, cache, synthetic):
    """{phase: seconds} of one start with this cache folder."""
    # Triton's kernels and Inductor's code would else be in folders that outlive the cold run
    env = os.environ | dict(TRITON_CACHE_DIR=str(Path(cache) / "triton"), PYTHONPATH=str(ROOT))
    env.pop("TORCHINDUCTOR_CACHE_DIR", None)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "phases.json"
        command = [sys.executable, "-m", "benchmarks.start", result, time.monotonic()]
        command += [int(synthetic), *argv, "--cache-dir", cache, "--run-dir", f"{folder}/run"]
        what = "before its first step the trainer"
        execute(what, [*command, "--repeat", 1], None, f"{folder}/log", env, ok=(130,), every=0)
        return json.loads(result.read_text())


def run(repeats=1, synthetic_data=False, trainer_options=(), save=lambda result: None):
    """dict(options, cold={phase: seconds}, warm=..., totals={cold: [s], warm: [s]}); phases are
    medians."""
    import torch

    options = list(trainer_options)
    if torch.cuda.device_count() > 1 and "--gpus" not in options:
        options += ["--gpus", "1"]
    runs = dict(cold=[], warm=[])
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for state, phases in runs.items():
                say(f"--- {state}")
                phases.append(start(options, cache, synthetic_data))
                say(f"{state}: {sum(phases[-1].values()):.2f} s to the end of the first step")
    totals = {state: [sum(p.values()) for p in starts] for state, starts in runs.items()}
    result = dict(options=options, totals=totals)
    for state, starts in runs.items():
        result[state] = {}
        for phases in starts:
            for name in phases:
                seconds = [p.get(name, 0.0) for p in starts]
                result[state][name] = statistics.median(seconds)
    say(f"\n{render(result)}")
    return result


def render(result):
    """A line for each phase, cold beside warm."""
    cold = result["cold"]
    warm = result["warm"]
    names = [name for name in cold | warm if name != "other"]
    rows = []
    for name in [*names, "other"]:
        rows.append([name, number(cold.get(name), ".2f"), number(warm.get(name), ".2f")])
    totals = [statistics.median(result["totals"][state]) for state in ("cold", "warm")]
    rows.append(["**total**", *(f"**{total:.2f}**" for total in totals)])
    return document(
        f"# Start-up: ./run.sh {' '.join(result['options'])}".rstrip(),
        f"Seconds from the command to the end of the first step, {len(result['totals']['cold'])} "
        "of each (medians).",
        table(["phase", "cold", "warm"], rows),
    )


def add_arguments(parser):
    parser.option("--repeats", COUNT, 1, "N", "cold and warm pairs, for medians")
    about = "random tokens in place of the track's data"
    parser.flag("--synthetic", about, dest="synthetic_data")


if __name__ == "__main__":  # the trainer's process
    sys.exit(trace(sys.argv[1], float(sys.argv[2]), sys.argv[4:], bool(int(sys.argv[3]))))
