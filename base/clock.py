"""When this process began."""

import os
import time
from pathlib import Path


def process_age():
    """Seconds since this process was started; on systems without /proc, since this import."""
    try:
        # Fields after the program's name in brackets; the 20th is the start, in ticks since boot
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


START = time.perf_counter() - process_age()  # what start-up is counted from
