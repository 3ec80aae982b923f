"""What a user sees of an error that no program expected: one line, and where the whole of it is."""

import contextlib
import datetime
import os
import platform
import sys
import tempfile
import traceback
from pathlib import Path

from .errors import one_line
from .places import cache_folder
from .terminal import printable

ROOT = Path(__file__).resolve().parent.parent
DEBUG = "STOPWATCH_DEBUG"  # in the environment, where processes that we start find it, too
NAME = "error.txt"  # of a report in a run's folder


def debugging():
    """Whether --debug was given: errors are shown with their traceback."""
    return bool(os.environ.get(DEBUG))


def show_if_debugging(error):
    """The traceback of an error that is explained otherwise, for whoever asked for --debug."""
    if debugging():
        say("".join(traceback.format_exception(error)))


def end(error):
    """Say in one line that a program ended by this error. Returns the exit status, 1.

    The report is where error.report says, else in the cache or the temporary folder; with --debug
    it is on stderr as well.
    """
    path = getattr(error, "report", None) or write_report(error)
    if debugging():
        say(report(error))
    where = f"the full report is in {path}" if path else "--debug shows all of it"
    say(f"error: {rank_in_words()}{explain(error)}; {where}")
    return 1


def rank_in_words():
    """ "rank 3: " in one of several processes that torchrun or the like has started, else empty."""
    rank = os.environ.get("RANK", "")
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    return f"rank {rank}: " if rank and several else ""


def explain(error):
    """What happened and where, in one line of at most some 300 characters."""
    said = one_line(error)
    if isinstance(error, MemoryError):
        return f"out of memory {said}".strip()
    if isinstance(error, ImportError):
        # Of a package that is missing or broken; run.sh installs what is not there
        said = f"{said}; delete {ROOT / '.venv'} and start ./run.sh, which installs it again"
    elif isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename is not None else ""
        return shortened(f"{error.strerror}{where}")
    else:
        said = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return shortened(said) + place_of(error)


def place_of(error):
    """The last line of our own that it came through, as " (train_gpt.py:12)"; empty if none."""
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / ".venv"):
            place = f" ({path.relative_to(ROOT)}:{frame.lineno})"
    return place


def shortened(text, most=300):
    return text if len(text) <= most else f"{text[:most]} ..."


def report(error):
    """All that is known of an error, as text."""
    torch = sys.modules.get("torch")
    lines = [
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC",
        f"command: {' '.join(sys.argv)}",
        f"Python {platform.python_version()}, PyTorch {getattr(torch, '__version__', None)}, "
        f"{platform.platform()}",
        "",
    ]
    return "\n".join(lines) + "\n" + "".join(traceback.format_exception(error))


def write_report(error, folder=None):
    """Write the report into `folder`, else where there is room for it. Returns its path, None if
    it cannot be written anywhere."""
    stamp = f"error-{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}-{os.getpid()}.txt"
    places = [lambda: cache_folder() / "errors" / stamp]
    places.append(lambda: Path(tempfile.gettempdir(), f"stopwatch-{stamp}"))
    if folder is not None:
        places.insert(0, lambda: Path(folder, NAME))
    for place in places:
        with contextlib.suppress(OSError):
            path = place()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(report(error), encoding="utf-8", errors="backslashreplace")
            return path


def say(text):
    """A line on stderr, if that can be written."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(text.rstrip()), file=sys.stderr, flush=True)
