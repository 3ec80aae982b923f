"""Code of a model's, and functions of a user's that judge it, in processes of their own with limits
on time, memory, files and network. What that does not protect from is in docs/teaching.md.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from base import to_json

CHILD = Path(__file__).with_name("sandbox_child.py")
START_SECONDS = 120  # that a function's file may take to be imported
GRACE = 5.0  # seconds beyond a request's own before the process counts as lost


class Ran(NamedTuple):
    """What became of some code."""

    output: str  # what it printed, and the value of its last line
    error: str | None  # how it ended, None if well


class Gone(Exception):
    """The process has ended, or does not answer."""


class Child:
    """A process that answers lines of JSON; begun again when it is needed after it ended."""

    def __init__(self, mode, seconds, megabytes, *where, isolated=True):
        self.seconds = seconds
        # Without site-packages, the user's variables and folders
        flags = ["-I", "-S"] if isolated else []
        words = mode, f"{seconds:g}", str(megabytes), *map(str, where)
        self.command = [sys.executable, *flags, str(CHILD), *words]
        self.process = None
        self.waiting = b""  # what was read beyond an answer

    def start(self):
        """Begin; returns its first answer. Raises Gone."""
        self.close()
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        return self.answer(START_SECONDS)

    def ask(self, request, seconds):
        """Its answer to a request. Raises Gone, and then the process is no more."""
        if self.process is None:
            first = self.start()
            if "ready" not in first:
                self.close()
                return first
        try:
            self.process.stdin.write(to_json(request).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            self.close()
            raise Gone("ended") from None
        return self.answer(seconds)

    def answer(self, seconds):
        until = time.monotonic() + seconds
        fd = self.process.stdout.fileno()
        while b"\n" not in self.waiting:
            left = until - time.monotonic()
            if left <= 0 or not select.select([fd], [], [], left)[0]:
                self.close()
                raise Gone(f"gave no answer in {seconds:g} s")
            piece = os.read(fd, 1 << 16)
            if not piece:
                self.close()
                raise Gone("ended its process")
            self.waiting += piece
        line, _, self.waiting = self.waiting.partition(b"\n")
        return json.loads(line)

    def close(self):
        """End it, if it runs."""
        process = self.process
        self.process = None
        self.waiting = b""
        if process:
            process.kill()
            process.wait()
            for pipe in process.stdin, process.stdout:
                with contextlib.suppress(OSError):
                    pipe.close()


class Sandbox:
    """Runs Python: each piece of code in a process of its own, with its standard library."""

    def __init__(self, seconds=5.0, megabytes=256):
        self.seconds = seconds
        self.child = Child("code", seconds, megabytes)

    def run(self, code, tests=()):
        """The Ran of some code, and of tests that run after it."""
        try:
            request = dict(code=code, tests=list(tests))
            return Ran(**self.child.ask(request, self.seconds + GRACE))
        except Gone as e:
            return Ran("", f"the sandbox {e}")

    def close(self):
        self.child.close()


class Function:
    """A function of a user's file, called in another process."""

    def __init__(self, path, name, seconds, megabytes):
        self.seconds = seconds
        self.child = Child("function", seconds, megabytes, path, name, isolated=False)

    def start(self):
        """Import its file. Returns what is wrong with it, None if nothing."""
        try:
            return self.child.start().get("error")
        except Gone as e:
            return str(e)

    def call(self, *arguments):
        """(value, None), or (None, what went wrong)."""
        try:
            said = self.child.ask(dict(arguments=arguments), self.seconds)
        except Gone as e:
            return None, str(e)
        return said.get("value"), said.get("error")

    def close(self):
        self.child.close()
