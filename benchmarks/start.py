"""Time from the command to the end of the first step, by phase, with cold and with warm caches.

    python -m benchmarks start                                     this machine's track
    python -m benchmarks start --track gpt2-small --synthetic      with no FineWeb and no network

Options other than those below are the trainer's own (./run.sh --help). The trainer runs twice in
processes of its own
on a fresh cache folder, which holds prepared data, compiled code and Triton's kernels: the first
run finds it empty
(cold), the second finds it filled (warm). Each stops after its first step. Functions of the trainer
are timed from
outside; what one spends in another that is timed counts there alone, so the phases sum to the
    total:
    interpreter     the process starts, Python is ready
    imports         train_gpt and all that it imports; by package from a third run with python -X
    importtime
    arguments       options, the track, looking for GPUs
    data            text into tokens, or the download; opening the loaders
    kernels         choosing and probing the ops
    model           building it, drawing its weights, the optimizer's state
    probe           measuring what the machine can do, describing it
    graph ...       compiling and running forward and backward of a stage, the optimizer's kernels,
    validation
    log             writing down what is about to run
    first step      its batch, and the step
    other           everything between
What the system itself keeps of files in memory is warm both times. On several GPUs one is measured.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


# --- in the trainer's process


class Phases:
    """Seconds by phase, each phase without those inside it, in the order in which they first
    began."""

    def __init__(self, now=time.monotonic):
        self.now, self.seconds, self.stack, self.since = now, {}, ["other"], now()

    def switch(self):
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
    phases.seconds["interpreter"], phases.since = phases.since - spawned, phases.since
    tg = phases.timed(lambda: __import__("train_gpt"), "imports")()
    import torch

    def wait():
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()

    def wrap(owner, name, phase):
        setattr(owner, name, phases.timed(getattr(owner, name), phase, wait))

    training = []  # not empty once that has begun

    def run(*args):
        training.append(True)
        return trainer_run(*args)

    def step(optimizer, *args):
        optimizer_step(optimizer, *args)
        if training:
            wait()
            phases.switch()
            aside = Path(f"{result}.aside")
            aside.write_text(json.dumps(phases.seconds))
            aside.replace(result)
            raise SystemExit(130)  # as a signal would: nobody needs the rest

    def during(what):
        return lambda *args: "first step" if training else what(*args)

    def graph(trainer, batch, step, stage, progress):
        targets = f", {stage.n_targets} targets" if stage.n_targets > 1 else ""
        return f"graph of {stage.rows * trainer.c.row_len:,} tokens{targets}{', tied' * stage.tied}"

    if synthetic:
        from benchmarks.trainer import synthetic as make
        from runtime import corpus

        corpus.open_dataset = make
    trainer_run, optimizer_step = tg.Trainer.run, tg.Optimizer.step
    tg.Trainer.run, tg.Optimizer.step = run, step
    for owner, name, phase in (
        (tg, "parse_args", "arguments"),
        (tg, "load_data", "data"),
        (tg, "choose_ops", "kernels"),
        (tg.Trainer, "__init__", "model"),
        (tg.GPT, "init_weights", "model"),
        (tg.Optimizer, "reset", "model"),
        (tg, "describe_environment", "probe"),
        (tg, "machine_probe", "probe"),
        (tg.Trainer, "describe", "log"),
        (tg.Trainer, "run", "first step"),
        (tg.Trainer, "accumulate", during(graph)),
        (tg.Optimizer, "step", during(lambda *_: "graph of the optimizer")),
        (tg, "evaluate", "graph of validation"),
    ):
        wrap(owner, name, phase)
    return tg.main(argv)


# --- here


def start(argv, cache, synthetic):
    """{phase: seconds} of one start with this cache folder."""
    from base import InputError

    run_dir = tempfile.TemporaryDirectory()
    result = Path(run_dir.name) / "phases.json"
    # Triton's kernels and Inductor's code would else be in folders that outlive the cold run
    env = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"} | dict(
        TRITON_CACHE_DIR=str(Path(cache) / "triton"), PYTHONPATH=str(ROOT)
    )
    argv = [*argv, "--cache-dir", str(cache), "--run-dir", f"{run_dir.name}/run", "--repeat", "1"]
    with run_dir:
        spawned = time.monotonic()
        child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "benchmarks.start",
                str(result),
                str(spawned),
                str(int(synthetic)),
                *argv,
            ],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        said = []
        for line in child.stderr:
            said.append(line.strip())
            print(line, end="", file=sys.stderr)
        child.wait()
        if not result.exists():
            error = next((line for line in reversed(said) if line), "it said nothing")
            raise InputError(
                f"the trainer ended with status {child.returncode} before its first step: "
                f"{error.removeprefix('error: ')}"
            )
        return json.loads(result.read_text())


IMPORTED = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \|\s*([\w.]+)")


def imports(text, most=8):
    """Output of python -X importtime -> [(package, seconds of its own modules), ...], the
    slowest first."""
    packages = {}
    for own, _, name in IMPORTED.findall(text):
        package = name.split(".")[0]
        packages[package] = packages.get(package, 0.0) + int(own) / 1e6
    return sorted(packages.items(), key=lambda item: -item[1])[:most]


def run(repeats=1, synthetic_data=False, trainer_options=(), save=lambda result: None):
    """dict(options, cold={phase: seconds}, warm=..., totals={cold: [s], warm: [s]}, imports);
    phases are medians."""
    import torch

    from base import InputError

    if repeats < 1:
        raise InputError(f"--repeats {repeats}: expected 1 or more")
    options = list(trainer_options)
    if torch.cuda.device_count() > 1 and "--gpus" not in options:
        options += ["--gpus", "1"]
    runs = dict(cold=[], warm=[])
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for state, phases in runs.items():
                print(f"--- {state}", file=sys.stderr, flush=True)
                phases.append(start(options, cache, synthetic_data))
                print(
                    f"{state}: {sum(phases[-1].values()):.2f} s to the end of the first step",
                    file=sys.stderr,
                )
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import train_gpt"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    result = dict(
        options=options,
        totals={state: [sum(p.values()) for p in all] for state, all in runs.items()},
        imports=imports(done.stderr),
    )
    for state, all in runs.items():
        names = dict.fromkeys(name for phases in all for name in phases)
        result[state] = {n: statistics.median(p.get(n, 0.0) for p in all) for n in names}
    print(f"\n{render(result)}", file=sys.stderr)
    return result


def render(result):
    """A line for each phase, cold beside warm."""

    def cell(state, phase):
        return f"{result[state][phase]:.2f}" if phase in result[state] else "–"

    names = list(dict.fromkeys([*result["cold"], *result["warm"]]))
    names = [n for n in names if n != "other"] + ["other"]
    cold, warm = (result["totals"][state] for state in ("cold", "warm"))
    lines = [
        f"# Start-up: ./run.sh {' '.join(result['options'])}".rstrip(),
        "",
        f"Seconds from the command to the end of the first step, {len(cold)} of each (medians).",
        "",
        "| phase | cold | warm |",
        "|---|---|---|",
    ]
    lines += [f"| {n} | {cell('cold', n)} | {cell('warm', n)} |" for n in names]
    lines += [
        f"| **total** | **{statistics.median(cold):.2f}** | **{statistics.median(warm):.2f}** |",
        "",
        "Imports by package, s of their own (slowed by being watched): "
        + ", ".join(f"{name} {seconds:.2f}" for name, seconds in result["imports"])
        + ".",
    ]
    return "\n".join(lines) + "\n"


def add_arguments(parser):
    parser.add_argument(
        "--repeats", type=int, default=1, metavar="N", help="cold and warm pairs, for medians [1]"
    )
    parser.add_argument(
        "--synthetic",
        dest="synthetic_data",
        action="store_true",
        help="random tokens in place of the track's data",
    )


if __name__ == "__main__":  # the trainer's process
    sys.exit(trace(sys.argv[1], float(sys.argv[2]), sys.argv[4:], bool(int(sys.argv[3]))))
