"""A whole program, timed from its start to its end; our trainer as one."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from base import InputError

from .report import say

ROOT = Path(__file__).resolve().parents[1]
TRAINER = [ROOT / "door.py", "train"]  # as ./run.sh starts it
GRACE = 15.0  # seconds that a process has to end when it is told to
SYNTHETIC = ["-m", "benchmarks.synthetic"]  # the trainer, on random tokens


def execute(what, command, folder, log, env, ok=(0,), every=10.0, lines=None, limit=None):
    """Run a command in a folder with its output in the file `log`; returns its seconds.

    lines: a list that gets (seconds since the start, line) of all output. Every so many seconds a
    line of it is shown. limit: seconds after which it is ended. Raises InputError, saying why,
    where it was ended or the exit status is none of ok.
    """
    started = time.perf_counter()
    shown = started
    with (
        open(log, "w", encoding="utf-8") as f,
        subprocess.Popen(
            [*map(str, command)],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as child,
    ):
        # It may leave what it does; what does not is killed
        timers = []
        if limit is not None:
            timers = [threading.Timer(limit, child.terminate)]
            timers.append(threading.Timer(limit + GRACE, child.kill))
        for timer in timers:
            timer.start()
        try:
            for line in child.stdout:
                f.write(line)
                now = time.perf_counter()
                if lines is not None:
                    lines.append((now - started, line))
                if now - shown >= every and line.strip():
                    say(f"    {now - started:.0f} s  {line.strip()[:100]}")
                    shown = now
            status = child.wait()
        except BaseException:
            # torchrun takes its workers with it; killed, it would leave them behind
            child.terminate()
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
            raise
        finally:
            for timer in timers:
                timer.cancel()
    seconds = time.perf_counter() - started
    if limit is not None and seconds >= limit:
        raise InputError(f"{what} was ended after {limit:.0f} s, which is all the time it has")
    if status not in ok:
        lines = Path(log).read_text(encoding="utf-8").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        for line in said[-12:]:
            say(f"    {line[:200]}")
        raise InputError(f"{what} ended with status {status}: {reason(said)}")
    return seconds


def train(what, options, folder, env=None, synthetic=False, limit=None, log=None):
    """Our trainer in a process of its own, its caches in folder/cache, its run in folder/run, which
    are left there; the result it wrote, with process_s from its start to its exit.

    env: its environment, this process's if None; limit: seconds after which it is ended; log: file
    for its output, folder/log.txt if None. Raises InputError where it fails.
    """
    folder = Path(folder)
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = [sys.executable, *(SYNTHETIC if synthetic else TRAINER), *options]
    command += ["--cache-dir", folder / "cache", "--run-dir", folder / "run", "--repeat", 1]
    # Triton's kernels and Inductor's code would else be in folders that outlive a first start
    env = dict(env or os.environ, TRITON_CACHE_DIR=str(folder / "cache/triton"))
    env.pop("TORCHINDUCTOR_CACHE_DIR", None)
    if synthetic:
        env["PYTHONPATH"] = str(ROOT)
    # Status 3: out of steps before the target
    log = log or folder / "log.txt"
    seconds = execute(what, command, folder, log, env, ok=(0, 3), limit=limit)
    result = json.loads((folder / "run/result.json").read_text())
    return result | dict(process_s=seconds)


def reason(said):
    """The last line of a program's output that names an error, else the last line."""
    errors = [line for line in said if re.match(r"([\w.]+(Error|Exception)|error)\b", line)]
    if errors:
        said = errors
    if not said:
        return "it said nothing"
    return said[-1].removeprefix("error: ")[:300]
