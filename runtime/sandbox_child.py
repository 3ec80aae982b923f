"""The other side of sandbox.py: a Python process that runs code of a model's, or calls a function.

Started as `python sandbox_child.py MODE SECONDS MEGABYTES [FILE FUNCTION]`; it imports nothing of
ours. A line of JSON on stdin is a request, a line on stdout its answer.

code       {"code": ..., "tests": [...]} -> {"output": ..., "error": null or text}. Each request
           runs in a fork of its own, which ends when its time is over.
function   {"arguments": [...]} -> {"value": number} or {"error": text}. FILE is imported once, and
           may read files then.

What is refused is refused by an audit hook, by limits of the system, and where the kernel lets a
user do so by a network namespace without a network. docs/teaching.md says what that does not
protect from.
"""

import ast
import contextlib
import ctypes
import importlib.util
import io
import json
import math
import os
import resource
import select
import signal
import sys
import time

# So that what a model's code is likely to import is there already
import collections  # noqa: F401, isort: skip
import datetime  # noqa: F401, isort: skip
import decimal  # noqa: F401, isort: skip
import fractions  # noqa: F401, isort: skip
import functools  # noqa: F401, isort: skip
import itertools  # noqa: F401, isort: skip
import operator  # noqa: F401, isort: skip
import random  # noqa: F401, isort: skip
import re  # noqa: F401, isort: skip
import statistics  # noqa: F401, isort: skip
import string  # noqa: F401, isort: skip

MOST_OUTPUT = 4096  # characters
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
# Families of audit events (docs.python.org/3/library/audit_events.html) that reach out of a process
REFUSED = (
    "os.",
    "socket.",
    "subprocess.",
    "shutil.",
    "ctypes.",
    "pty.",
    "fcntl.",
    "mmap.",
    "signal.",
    "resource.",
    "tempfile.",
    "glob.",
    "sqlite3.",
    "syslog.",
    "webbrowser.",
    "urllib.",
    "http.",
    "ftplib.",
    "smtplib.",
    "gc.",
    "winreg.",
    "_winapi.",
)
MODULES = (".py", ".pyc", ".so", ".pyd")

inside = False  # whether the hook refuses


def hook(event, arguments):
    global inside
    if not inside:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        # A module that is imported late is read from its file
        if isinstance(path, str) and path.endswith(MODULES) and not writes:
            return
        what = f"opens the file {path}" if isinstance(path, str) else "opens a file"
    elif event in ("os.listdir", "os.scandir"):
        if arguments and arguments[0] in sys.path:  # for the same reason
            return
        what = "lists a folder"
    elif event.startswith(REFUSED):
        what = f"uses {event}"
    else:
        return
    raise PermissionError(what)


def limit(seconds, megabytes, files):
    """Limits of the system for this process. Those that it does not know are left out."""
    held = 0
    with contextlib.suppress(OSError, ValueError):
        with open("/proc/self/statm") as f:
            held = int(f.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = dict(RLIMIT_AS=held + megabytes * 2**20, RLIMIT_CORE=0)
    if not files:
        # No file grows, no process begins (unless this is root's), no time without end
        limits |= dict(RLIMIT_FSIZE=0, RLIMIT_NPROC=0, RLIMIT_CPU=math.ceil(seconds) + 1)
        limits |= dict(RLIMIT_NOFILE=32)
    for name, value in limits.items():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            resource.setrlimit(getattr(resource, name), (value, value))


def leave_network():
    """Into a namespace without a network, where the kernel lets a user do that."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNET)


def said(error):
    """An exception in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500].removesuffix(": ")


# --------------------------------------------------------------------------------------------------
# Code


def run_code(code, tests):
    """{"output", "error"} of code, as an interactive Python shows them: the value of a last line
    that is an expression is part of the output. tests: code that runs after it, in turn."""
    global inside
    out = io.StringIO()
    names = {"__name__": "__main__"}
    error = None
    sys.stdin = io.StringIO()
    sys.setrecursionlimit(2000)
    inside = True
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            tree = ast.parse(code)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, "<code>", "exec"), names)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), "<code>", "eval"), names)
                if value is not None:
                    print(repr(value))
            for test in tests:
                exec(compile(test, "<test>", "exec"), names)
    except BaseException as e:  # SystemExit, too, ends it before its tests
        error = said(e) if not isinstance(e, SystemExit) else "SystemExit: ended early"
    inside = False
    try:
        return dict(output=out.getvalue()[:MOST_OUTPUT], error=error)
    except BaseException:  # no memory left
        return dict(output="", error=error or "MemoryError")


def in_a_fork(request, seconds, megabytes):
    """What run_code() says, from a fork that ends when its time is over."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            limit(seconds, megabytes, files=False)
            answer = run_code(request["code"], request["tests"])
            os.write(write, json.dumps(answer).encode())
        finally:
            os._exit(0)
    os.close(write)
    until = time.monotonic() + seconds
    found = b""
    error = "ended early"
    while True:
        left = until - time.monotonic()
        if left <= 0 or not select.select([read], [], [], left)[0]:
            error = f"TimeoutError: no end after {seconds:g} s"
            found = b""
            break
        piece = os.read(read, 1 << 16)
        if not piece:
            break
        found += piece
    os.close(read)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        return json.loads(found)
    except ValueError:
        return dict(output="", error=error)


# --------------------------------------------------------------------------------------------------
# A function


def load(path, name):
    """The function of a file. Raises whatever the file raises, LookupError where it has none."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    spec = importlib.util.spec_from_file_location("reward_file", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["reward_file"] = module
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        there = [n for n, x in vars(module).items() if callable(x) and not n.startswith("_")]
        raise LookupError(f"has no function {name}; it has {', '.join(there) or 'none'}")
    return function


def call(function, arguments):
    """{"value"} or {"error"} of function(*arguments), which has to be a number."""
    global inside
    inside = True
    try:
        value = function(*arguments)
        if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
            return dict(error=f"returned {value!r:.80}, which is no number")
        value = float(value)
    except BaseException as e:
        return dict(error=f"raised {said(e)}")
    finally:
        inside = False
    if not math.isfinite(value):
        return dict(error=f"returned {value}, which is not finite")
    return dict(value=value)


# --------------------------------------------------------------------------------------------------


def main(mode, seconds, megabytes, *where):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that asks
    seconds = float(seconds)
    megabytes = int(megabytes)
    # What is printed must not be taken for an answer
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)

    def say(answer):
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    function = None
    sys.addaudithook(hook)
    try:
        if mode == "function":
            function = load(*where)
    except LookupError as e:
        say(dict(error=str(e.args[0])))
        return
    except BaseException as e:
        say(dict(error=f"cannot be imported: {said(e)}"))
        return
    leave_network()
    if function:
        limit(seconds, megabytes, files=True)
    say(dict(ready=True))
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if function:
            say(call(function, request["arguments"]))
        else:
            say(in_a_fork(request, seconds, megabytes))


if __name__ == "__main__":
    main(*sys.argv[1:])
