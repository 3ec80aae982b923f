"""When this process began, and what its time went into."""

import contextlib
import os
import time
from pathlib import Path


def process_age():
    """Seconds since this process was started; on systems without /proc, since this import.

    run.sh becomes the process that it starts: where it has installed something before, what counts
    is from this import on.
    """
    if "STOPWATCH_INSTALLED" in os.environ:
        return 0.0
    try:
        # Fields after the program's name in brackets; the 20th is the start, in ticks since boot
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


START = time.perf_counter() - process_age()  # what start-up is counted from
_taken = []  # that start-up was counted


class Parts:
    """Seconds of a process by part. A part inside another counts for itself alone."""

    def __init__(self, began=None, **seconds):
        """began: perf_counter() at the start, now if None; seconds: {name: seconds} of what has
        gone by since."""
        self.began = time.perf_counter() if began is None else began
        self.seconds = seconds
        self.inside = 0.0  # seconds of the parts within the one that runs

    @contextlib.contextmanager
    def part(self, name):
        """What is done inside belongs to this part."""
        begin = time.perf_counter()
        outer = self.inside
        self.inside = 0.0
        try:
            yield
        finally:
            took = time.perf_counter() - begin
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self.inside
            self.inside = outer + took

    def elapsed(self):
        """Seconds since the beginning."""
        return time.perf_counter() - self.began


def parts_so_far():
    """The Parts of this process, of which imports have taken all until now; from the second call
    on, those of what begins now: programs with several trainings count start-up once."""
    if _taken:
        return Parts()
    _taken.append(True)
    return Parts(START, imports_s=time.perf_counter() - START)
