"""A whole program, timed from its start to its end."""

import re
import subprocess
import time
from pathlib import Path

from base import InputError

from .report import say


def execute(what, command, folder, log, env, ok=(0,), every=10.0):
    """Run a command in a folder with its output in the file `log`; returns its seconds.

    Every so many seconds a line of the output is shown. Raises InputError, saying why, where the
    exit status is none of ok.
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
        try:
            for line in child.stdout:
                f.write(line)
                now = time.perf_counter()
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
    seconds = time.perf_counter() - started
    if status not in ok:
        lines = Path(log).read_text(encoding="utf-8").splitlines()
        said = [line.strip() for line in lines if line.strip()]
        for line in said[-12:]:
            say(f"    {line[:200]}")
        raise InputError(f"{what} ended with status {status}: {reason(said)}")
    return seconds


def reason(said):
    """The last line of a program's output that names an error, else the last line."""
    errors = [line for line in said if re.match(r"([\w.]+(Error|Exception)|error)\b", line)]
    if errors:
        said = errors
    if not said:
        return "it said nothing"
    return said[-1].removeprefix("error: ")[:300]
