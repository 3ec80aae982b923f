"""Standard streams as they may be: closed, full, without a reader, or in ASCII."""

import contextlib
import errno
import io
import os
import select
import sys

NAMES = ("stdin", "stdout", "stderr")  # by their file descriptors 0, 1 and 2


def mend():
    """Make the standard streams safe to write to; called once, before any file is opened.

    A closed one becomes os.devnull: the next file to be opened would else have its number, and
    whatever a library prints would go into that file. What an encoding lacks is written escaped.
    """
    for number, name in enumerate(NAMES):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free, which is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    if hasattr(sys.stderr, "buffer"):
        encoding = sys.stderr.encoding
        sys.stderr = Remarks(
            sys.stderr.detach(), encoding, errors="backslashreplace", line_buffering=True
        )
        sys.__stderr__ = sys.stderr  # the one before has no file any more


class Remarks(io.TextIOWrapper):
    """A stderr that ends no program: what cannot be written is lost, since there is nobody to
    tell."""

    def write(self, text):
        with contextlib.suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self):
        with contextlib.suppress(OSError):
            super().flush()


def put(text):
    """Print a line on stdout at once. Returns None, or why it cannot be written, and then what is
    printed from now on goes nowhere."""
    try:
        print(text, flush=True)
    except (OSError, ValueError) as e:
        discard(sys.stdout)
        return getattr(e, "strerror", None) or str(e)


def reader_is_gone():
    """Whether stdout is a pipe that nobody reads any more, as in `| head`."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # errors are reported unasked
        return bool(poll.poll(0))
    except (OSError, ValueError, AttributeError):  # Windows has no poll
        return False


def close():
    """Write what waits on stdout and stderr; Python itself would complain about it as it ends.

    Returns the error of stdout, or None; that nobody reads on (`| head`) is none.
    """
    errors = {}
    for stream in sys.stdout, sys.stderr:
        try:
            stream.flush()
        except (OSError, ValueError) as e:
            errors[stream] = e
            discard(stream)
    error = errors.get(sys.stdout)
    if getattr(error, "errno", None) != errno.EPIPE:
        return error


def discard(stream):
    """Send what waits in a stream, and all that follows, to os.devnull."""
    with contextlib.suppress(OSError, ValueError):  # a stream of tests has no number
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
