"""What tells others that this process goes on, and how long it waits for them.

Two look at it: the launcher, which reads each rank's beats (runtime/workers.py) and can name the
one that hangs, and the process group, whose collectives give up after a while, on any number of
machines.
"""

import contextlib
import datetime
import math
import os
import time
from pathlib import Path

import torch.distributed as dist

from .workers import BEAT, FOLDER

START = 6 * 3600.0  # seconds that collectives may take until training begins: somebody downloads
AFTER = 15.0  # seconds that the process group waits longer than the launcher, who knows more
SLOW = 10  # so many times as long may take a first step, and what the first rank does alone
STEPS = 20  # steps of this run may take longer than expected: a rank that takes so many hangs


class Watch:
    """Of one process among others. seconds: without a sign for so long while training, it hangs;
    infinity: never."""

    def __init__(self, world, seconds):
        self.world = world
        self.seconds = seconds
        self.count = 0
        self.allowed = None  # seconds that collectives may take now
        self.steps = 0
        self.since = 0.0  # time.monotonic() when the last step ended
        self.file = None
        if world.size > 1 and FOLDER in os.environ:
            with contextlib.suppress(OSError):
                self.file = os.open(Path(os.environ[FOLDER], "beats"), os.O_WRONLY)

    def begin(self):
        """Training begins, or goes on after something else; all ranks are there."""
        self.since = time.monotonic()
        self.allow(1 if self.steps else SLOW)

    def step(self):
        """A step was taken."""
        now = time.monotonic()
        self.seconds = max(self.seconds, STEPS * (now - self.since))
        self.since = now
        self.steps += 1
        self.allow(1)

    def rest(self):
        """Something other than steps begins: a validation, a sample, a save."""
        self.allow(SLOW)

    def end(self):
        """Training is over: what comes may take as long as it will."""
        self.allow(math.inf)
        if self.file is not None:
            os.close(self.file)
            self.file = None

    def beat(self):
        """In the middle of a step: this process is about to wait for others."""
        self.tell(1)

    def allow(self, share):
        """This process will go on within share times the seconds, and waits as long for others."""
        seconds = share * self.seconds
        self.tell(share)
        allowed = min(seconds + AFTER, START)
        if self.world.size == 1 or allowed == self.allowed:
            return
        self.allowed = allowed
        timeout = datetime.timedelta(seconds=allowed)
        for group in {None, self.world.node, self.world.across}:
            dist.distributed_c10d._set_pg_timeout(timeout, group)

    def tell(self, share):
        """The same for the launcher."""
        self.count += 1
        if self.file is not None:
            seconds = share * self.seconds
            until = time.monotonic() + seconds if seconds < math.inf else 0.0
            os.pwrite(self.file, BEAT.pack(self.count, until), self.world.rank * BEAT.size)
