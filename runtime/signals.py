"""What may be asked of a run from outside: to stop (SIGTERM, SIGINT, SIGHUP) or to save and go
on (SIGUSR1)."""

import contextlib
import os
import signal
import time


class Requests:
    """Signals since listen() was entered.

    Before training starts there is nothing to save, so they end the process at once. From
    `training` on they wait to be looked at, and a second signal to stop, a second or more later,
    ends the process.

    stop: the number of the signal that asked to stop, 0 if none has; save: whether SIGUSR1 came
    since it was taken.
    """

    def __init__(self):
        self.stop = 0
        self.save = False
        self.training = False
        self.since = 0.0  # time.monotonic() of the first signal to stop

    def receive(self, number, frame):
        if number == getattr(signal, "SIGUSR1", None):
            self.save = True
        elif not self.training:
            raise SystemExit(128 + number)
        elif not self.stop:
            self.stop = number
            self.since = time.monotonic()
            with contextlib.suppress(OSError):  # the signal may have ended whoever read it
                os.write(2, b"\nstopping after this step; once more to stop at once\n")
        elif time.monotonic() - self.since > 1:
            # Not sooner: the terminal and torchrun may both pass on the first one
            os._exit(128 + number)

    @contextlib.contextmanager
    def listen(self):
        """Handle the signals while inside; outside the main thread there is nothing to handle."""
        before = {}  # signal -> its handler until now
        with contextlib.suppress(ValueError):  # not the main thread
            for name in "SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1":
                number = getattr(signal, name, None)  # Windows lacks some
                if number is None:
                    continue
                if name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # as it is under nohup
                before[number] = signal.signal(number, self.receive)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class Interrupted(SystemExit):
    """A signal ended the run; its work is saved, unless checkpoints are off."""
