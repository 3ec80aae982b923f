"""What may be asked of a run from outside: to stop (SIGTERM, SIGINT, SIGHUP) or to save and go
on (SIGUSR1)."""

import contextlib
import os
import signal
import time


class Requests:
    """Signals since it was entered. Before training starts there is nothing to save, so they end
    the process at once; from `training` on they wait to be looked at, and a second signal to stop,
    a second or more later, ends the process.

    stop: the number of the signal that asked to stop, 0 if none has; save: whether SIGUSR1 came
    since it was taken.
    """

    def __init__(self):
        self.stop, self.save, self.training, self.since = 0, False, False, 0.0

    def receive(self, number, frame):
        if number == getattr(signal, "SIGUSR1", None):
            self.save = True
        elif not self.training:
            raise SystemExit(128 + number)
        elif not self.stop:
            self.stop, self.since = number, time.monotonic()
            with contextlib.suppress(OSError):  # the signal may have ended whoever read it
                os.write(2, b"\nstopping after this step; once more to stop at once\n")
        elif (
            time.monotonic() - self.since > 1
        ):  # the terminal and torchrun may both pass on the first one
            os._exit(128 + number)

    @contextlib.contextmanager
    def listen(self):
        """Handle the signals while inside; outside the main thread there is nothing to handle."""
        names = [
            name
            for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
            if hasattr(signal, name)
            and (name != "SIGHUP" or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)
        ]  # as it is under nohup
        before = {}
        with contextlib.suppress(ValueError):  # not the main thread
            for name in names:
                before[name] = signal.signal(getattr(signal, name), self.receive)
        try:
            yield self
        finally:
            for name, handler in before.items():
                signal.signal(getattr(signal, name), handler)


class Interrupted(SystemExit):
    """A signal ended the run; its work is saved, unless checkpoints are off."""
