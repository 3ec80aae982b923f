"""Python in a process with limits: what runs, what is refused, what ends it."""

import os

import pytest

from runtime.sandbox import Function, Sandbox


@pytest.fixture(scope="module")
def sandbox():
    box = Sandbox(seconds=2.0, megabytes=64)
    yield box
    box.close()


@pytest.mark.parametrize(
    "code, output",
    [
        ("1 + 1", "2\n"),
        ("print('a')\nx = 6\nx * 7", "a\n42\n"),
        ("x = 3", ""),
        ("'\\ud800'", "'\\ud800'\n"),
        ("import math, json, heapq\nmath.gcd(12, 18)", "6\n"),
        ("", ""),
    ],
)
def test_what_code_says_is_what_python_shows(code, output, sandbox):
    assert sandbox.run(code) == (output, None)


@pytest.mark.parametrize(
    "code, error",
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("open('/etc/passwd').read()", "PermissionError: opens the file /etc/passwd"),
        ("open('x.py', 'w')", "PermissionError: opens the file x.py"),
        ("import os; os.open('x', os.O_RDONLY)", "PermissionError: opens the file x"),
        ("import os; os.system('true')", "PermissionError: uses os.system"),
        ("import os; os.fork()", "PermissionError: uses os.fork"),
        ("import os; os.remove('x')", "PermissionError: uses os.remove"),
        ("import os; os.listdir('/')", "PermissionError: lists a folder"),
        ("import socket; socket.socket()", "PermissionError: uses socket.__new__"),
        ("import subprocess; subprocess.run(['true'])", "PermissionError: uses subprocess.Popen"),
        ("import ctypes; ctypes.CDLL(None)", "PermissionError: uses ctypes.dlopen"),
        ("x = 'a' * 10**9", "MemoryError"),
        ("def f(n): return f(n)\nf(1)", "RecursionError: maximum recursion depth exceeded"),
        ("import os; os._exit(0)", "ended early"),
        ("raise SystemExit(0)", "SystemExit: ended early"),
        ("x = (", "SyntaxError"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import torch", "ModuleNotFoundError: No module named 'torch'"),
    ],
)
def test_what_it_may_not_do_is_said(code, error, sandbox):
    assert sandbox.run(code).error.startswith(error)
    assert sandbox.run("2 + 3").output == "5\n"


def test_time_is_limited(sandbox):
    box = Sandbox(seconds=0.3, megabytes=64)
    assert box.run("while True: pass").error == "TimeoutError: no end after 0.3 s"
    assert box.run("1").output == "1\n"
    box.close()


def test_output_is_limited(sandbox):
    assert len(sandbox.run("print('x' * 10**6)").output) == 4096


def test_tests_run_after_the_code(sandbox):
    code = "def double(x): return 2 * x"
    assert sandbox.run(code, ["assert double(2) == 4", "assert double(0) == 0"]).error is None
    assert sandbox.run(code, ["assert double(2) == 4", "assert double(0) == 1"]).error
    assert sandbox.run("raise SystemExit(0)", ["assert False"]).error


def test_nothing_stays_between_two_pieces(sandbox):
    sandbox.run("import math; math.pi = 3")
    assert sandbox.run("import math; math.pi").output.startswith("3.14")


FUNCTIONS = """
table = open(__file__).read()  # while it is imported it may
def good(answer, question): return len(answer) + question["n"]
def flag(answer, question): return answer == "x"
def words(answer, question): return "1.0"
def nothing(answer, question): pass
def wild(answer, question): return float("nan")
def raises(answer, question): return question["missing"]
def hangs(answer, question):
    while True: pass
def opens(answer, question): return len(open("/etc/passwd").read())
def prints(answer, question):
    print('{"value": 5}')
    return 1
def exits(answer, question): raise SystemExit
def dies(answer, question):
    import os
    os._exit(1)
number = 3
"""


@pytest.mark.parametrize(
    "name, value, wrong",
    [
        ("good", 5.0, None),
        ("flag", 0.0, None),
        ("prints", 1.0, None),
        ("words", None, "returned '1.0', which is no number"),
        ("nothing", None, "returned None, which is no number"),
        ("wild", None, "returned nan, which is not finite"),
        ("raises", None, "raised KeyError: 'missing'"),
        ("hangs", None, "gave no answer in 0.5 s"),
        ("opens", None, "raised PermissionError: opens the file /etc/passwd"),
        ("exits", None, "raised SystemExit"),
        ("dies", None, "ended its process"),
    ],
)
def test_a_function_gives_a_number_or_what_is_wrong_with_it(name, value, wrong, tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(FUNCTIONS)
    function = Function(path, name, 0.5 if name == "hangs" else 30, 256)
    assert function.start() is None
    assert function.call("abc", dict(n=2)) == (value, wrong)
    function.close()


@pytest.mark.parametrize(
    "text, wrong",
    [
        (FUNCTIONS, "has no function missing; it has good, flag"),
        ("def missing(:", "cannot be imported: SyntaxError"),
        ("import nowhere_at_all", "cannot be imported: ModuleNotFoundError"),
        ("missing = 3", "has no function missing; it has none"),
    ],
)
def test_a_file_that_does_not_have_it_is_said_at_once(text, wrong, tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(text)
    function = Function(path, "missing", 5, 256)
    assert function.start().startswith(wrong)
    function.close()


def test_no_process_is_left(tmp_path):
    box = Sandbox()
    box.run("1")
    pid = box.child.process.pid
    box.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
