"""benchmarks/process.py: a whole program is timed, its output kept, its end explained."""

import subprocess
import sys

import pytest

from base import InputError
from benchmarks import process


def python(code):
    return [sys.executable, "-c", code]


def test_seconds_and_output(tmp_path, capsys):
    code = "import time; print('begun', flush=True); time.sleep(0.3); print('done')"
    seconds = process.execute("it", python(code), tmp_path, tmp_path / "log", None, every=0.2)
    assert 0.3 < seconds < 20
    assert (tmp_path / "log").read_text() == "begun\ndone\n"
    assert capsys.readouterr().err.endswith("s  done\n")


@pytest.mark.parametrize(
    "code, said",
    [
        ("raise ValueError('too deep')", "it ended with status 1: ValueError: too deep"),
        (
            "import sys; print('error: no text'); print('bye'); sys.exit(2)",
            "it ended with status 2: no text",
        ),
        ("import sys; print('bye'); sys.exit(4)", "it ended with status 4: bye"),
        ("import sys; sys.exit(5)", "it ended with status 5: it said nothing"),
    ],
)
def test_an_end_that_was_not_expected_says_why(tmp_path, code, said):
    with pytest.raises(InputError) as e:
        process.execute("it", python(code), tmp_path, tmp_path / "log", None)
    assert str(e.value) == said
    status = int(said.split("status ")[1].split(":")[0])
    assert process.execute("it", python(code), tmp_path, tmp_path / "log", None, ok=(0, status))


def test_a_command_that_is_interrupted_leaves_no_process(tmp_path, monkeypatch):
    def interrupt(line):
        raise KeyboardInterrupt

    started = []
    popen = subprocess.Popen

    def start(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[0]

    monkeypatch.setattr(process, "say", interrupt)
    monkeypatch.setattr(subprocess, "Popen", start)
    code = "import time\nprint('begun', flush=True)\ntime.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        process.execute("child", python(code), tmp_path, tmp_path / "log", None, every=0)
    assert started[0].poll() is not None


def test_a_limit_ends_a_process_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "GRACE", 0.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('begun')"
    code += "; time.sleep(100)"
    with pytest.raises(InputError, match="it was ended after 1 s, which is all the time it has"):
        process.execute("it", python(code), tmp_path, tmp_path / "log", None, limit=1)
    assert process.execute("it", python(""), tmp_path, tmp_path / "log", None, limit=60) < 60
