"""door.py and run.sh: what comes before a verb's module and after it, and what a user sees of an
error that nobody expected."""

import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import types
from pathlib import Path

import pytest
from helpers import ROOT, options, tiny, write_text

import door
import train_gpt as tg
from base import InputError, last_resort, streams


@pytest.fixture
def verb(monkeypatch, tmp_path):
    """verb(error): from now on the verb "verb" ends by this error, or returns it if it is none."""
    monkeypatch.setattr(last_resort, "ROOT", tmp_path)  # no line is one of ours
    monkeypatch.setattr(last_resort, "cache_folder", lambda: tmp_path / ".cache")
    monkeypatch.delenv(last_resort.DEBUG, raising=False)
    monkeypatch.setattr(streams, "mend", lambda: None)  # pytest has streams of its own
    monkeypatch.setattr(door, "do_not_spin", lambda: None)
    monkeypatch.setattr(door, "use_large_pages", lambda: None)

    def make(error):
        def main(argv):
            assert "--debug" not in argv  # which is the door's
            if isinstance(error, BaseException):
                raise error
            return error

        monkeypatch.setitem(sys.modules, "verb.__main__", types.SimpleNamespace(main=main))
        monkeypatch.setitem(sys.modules, "verb", types.ModuleType("verb"))

    return make


ERRORS = [
    (MemoryError(), "out of memory"),
    (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "No space left on device: /a/b"),
    (PermissionError(errno.EACCES, "Permission denied", "/home"), "Permission denied: /home"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe"),
    (ModuleNotFoundError("No module named 'tqdm'"), "No module named 'tqdm'; delete "),
    (UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range"), "UnicodeEncodeError: 'ascii'"),
    (subprocess.CalledProcessError(1, ["g++"]), "CalledProcessError: Command '['g++']' returned"),
    (RuntimeError("compile error\n\nCommand:\n" + "x" * 9000), "RuntimeError: compile error Comm"),
    (AssertionError(), "AssertionError (tests/test_door.py:"),
    (RecursionError("maximum recursion depth"), "RecursionError: maximum recursion depth"),
]


@pytest.mark.parametrize("error, said", ERRORS, ids=[type(e).__name__ for e, _ in ERRORS])
def test_any_error_is_one_line_and_a_report(error, said, verb, tmp_path, capsys, monkeypatch):
    if said.startswith("AssertionError"):
        monkeypatch.setattr(last_resort, "ROOT", ROOT)  # a line of ours is named
    verb(error)
    assert door.main(["verb", "--option"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and len(err) < 600
    assert err.startswith("error: ") and said in err and "Traceback" not in err
    report = Path(err.rstrip().rpartition("the full report is in ")[2])
    text = report.read_text()
    if last_resort.ROOT == ROOT:
        report.unlink()
    assert "Traceback" in text and type(error).__name__ in text and "\ncommand: " in text
    assert "PyTorch 2" in text


def test_debug_shows_all_of_it_and_is_no_option_of_the_verb(verb, capsys, monkeypatch):
    monkeypatch.setenv(last_resort.DEBUG, "")
    verb(RuntimeError("deep"))
    assert door.main(["verb", "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.splitlines()[-1].startswith("error: RuntimeError: deep")
    assert os.environ[last_resort.DEBUG]  # processes that we start show theirs, too


def test_what_a_user_can_mend_shows_its_traceback_only_if_asked(capsys, monkeypatch):
    from data.__main__ import main

    assert main(["download", "nowhere"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ")
    monkeypatch.setenv(last_resort.DEBUG, "1")
    assert main(["download", "nowhere"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and "\nerror: " in err


def test_a_report_that_can_be_written_nowhere(verb, capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(last_resort, "cache_folder", lambda: tmp_path / "file")

    def no_folder():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr(last_resort.tempfile, "gettempdir", no_folder)
    verb(RuntimeError("deep"))
    assert door.main(["verb"]) == 1
    assert capsys.readouterr().err == "error: RuntimeError: deep; --debug shows all of it\n"


@pytest.mark.parametrize(
    "ending, status", [(0, 0), (3, 3), (SystemExit(0), 0), (KeyboardInterrupt(), 130)]
)
def test_other_ends_are_silent(ending, status, verb, capsys):
    verb(ending)
    assert door.main(["verb"]) == status
    assert capsys.readouterr() == ("", "")


def test_an_error_while_training_is_reported_in_the_runs_folder(
    tmp_path, verb, capsys, monkeypatch
):
    text = write_text(tmp_path / "text", 2000)
    monkeypatch.setattr(tg, "backward", lambda *args: 1 / 0)
    argv = options(tiny(text, tmp_path, steps=2))
    assert door.main(["train", *argv]) == 1
    report = tmp_path / "run/error.txt"
    err = capsys.readouterr().err
    assert err.splitlines()[-1].endswith(f"the full report is in {report}")
    assert "Traceback" not in err and "ZeroDivisionError" in report.read_text()
    log = (tmp_path / "run/log.txt").read_text().splitlines()
    assert (
        log[-1].startswith("error: ZeroDivisionError: division by zero") and "error.txt" in log[-1]
    )


def test_a_result_that_stdout_does_not_take(tmp_path, capsys, monkeypatch):
    """Said once; further seeds are trained, and the files have it."""
    text = write_text(tmp_path / "text", 2000)
    full = open("/dev/full", "w")
    monkeypatch.setattr(sys, "stdout", full)
    argv = options(tiny(text, tmp_path, steps=2, repeat=2))
    assert tg.main(argv) == 0
    assert streams.close() is None  # nothing is left for Python to complain about
    full.close()
    monkeypatch.undo()
    err = capsys.readouterr().err
    where = tmp_path / "run/seed0/result.json"
    said = f"the result cannot be written to stdout (No space left on device); it is in {where}"
    assert err.splitlines().count(said) == 1 and err.count("be written to stdout") == 1
    for seed in 0, 1:
        assert json.loads((tmp_path / f"run/seed{seed}/result.json").read_text())["seed"] == seed


# --------------------------------------------------------------------------------------------------
# Processes without torch, each of which takes a tenth of a second

PROGRAM = """
import os, sys
def main(argv):
    print("out é")
    print("err é", file=sys.stderr, flush=True)
    number = os.open(os.devnull, os.O_RDONLY)
    assert number > 2, number
    return 3
"""


def start(tmp_path, program, redirections="", env=(), **options):
    """The verb "toy" with this program, started by a shell."""
    (tmp_path / "toy").mkdir(exist_ok=True)
    (tmp_path / "toy/__main__.py").write_text(program)
    env = os.environ | dict(PYTHONPATH=str(tmp_path), PYTHONUNBUFFERED="") | dict(env)
    env = {name: value for name, value in env.items() if value is not None}
    command = f"'{sys.executable}' '{ROOT}/door.py' toy {redirections}"
    return subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        text=True,
        # However the tests were started: in a shell's background it is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


ASCII = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii:strict")


@pytest.mark.parametrize(
    "redirections, env, status, out, err",
    [
        ("", {}, 3, "out é\n", "err é\n"),
        ("", ASCII, 3, "out \\xe9\n", "err \\xe9\n"),
        ("<&- >&- 2>&-", {}, 3, "", ""),
        (">&-", {}, 3, "", "err é\n"),
        ("2>/dev/full", {}, 3, "out é\n", ""),
        (
            ">/dev/full",
            {},
            3,
            "",
            "err é\nerror: stdout cannot be written: No space left on device\n",
        ),
    ],
    ids=["as usual", "ASCII", "all closed", "stdout closed", "stderr full", "stdout full"],
)
def test_streams(redirections, env, status, out, err, tmp_path):
    done = start(tmp_path, PROGRAM, redirections, env)
    assert done.communicate(timeout=60) == (out, err)
    assert done.returncode == status


def test_a_reader_that_leaves_ends_it_quietly(tmp_path):
    program = "def main(argv):\n    while True: print('x' * 1000)\n"
    done = start(tmp_path, program)
    done.stdout.close()
    assert (done.stderr.read(), done.wait(60)) == ("", 141)


def test_ctrl_c_during_imports_and_after(tmp_path):
    for before in "", "def main(argv):\n    ":
        program = f"import sys, time\n{before}print('here', flush=True); time.sleep(60)\n"
        started = start(tmp_path, program)
        assert started.stdout.readline() == "here\n"
        started.send_signal(signal.SIGINT)
        assert started.communicate(timeout=60) == ("", "")
        assert started.returncode == (130 if before else -signal.SIGINT)


def test_a_process_ends_at_once_but_what_waits_for_its_end_is_called(tmp_path):
    program = """
import atexit, gc, sys, threading, time
class Slow:
    def __del__(self):
        print("taken to pieces")
sys.slow = Slow()  # until Python forgets it
def main(argv):
    assert gc.isenabled()
    atexit.register(lambda: print("at exit"))
    threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
    print("main")
    return 7
"""
    done = start(tmp_path, program)
    assert done.communicate(timeout=60) == ("main\nthread\nat exit\n", "")
    assert done.returncode == 7


@pytest.mark.parametrize(
    "given, found", [({}, "5000"), (dict(GOMP_SPINCOUNT="5"), "5"), (dict(OMP_WAIT_POLICY="x"), "")]
)
def test_threads_that_wait_are_told_to_sleep_before_torch_is_there(given, found, tmp_path):
    """Unless the user has told them something."""
    program = """
import os, sys
def main(argv):
    print(os.environ.get("GOMP_SPINCOUNT", ""), "torch" in sys.modules)
    print(os.environ["THP_MEM_ALLOC_ENABLE"])
"""
    env = dict.fromkeys(("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE"))
    done = start(tmp_path, program, env={**env, **given})
    assert done.communicate(timeout=60) == (f"{found} False\n1\n", "")


@pytest.mark.parametrize("path", ["{}", ":{}", "{}:"])
def test_modules_of_the_users_do_not_take_the_place_of_others(path, tmp_path):
    """Of the standard library, ours, or a package; with an empty entry, which is where one is."""
    for name in "enum", "functools", "random", "signal", "base", "data", "tqdm":
        (tmp_path / f"{name}.py").write_text("raise SystemExit(f'{__file__} was imported')")
    (tmp_path / "mine.py").write_text("here = 'mine'")
    program = "import random, tqdm, data, mine\ndef main(argv): print(mine.here)"
    done = start(tmp_path, program, env=dict(PYTHONPATH=path.format(tmp_path)), cwd=tmp_path)
    assert done.communicate(timeout=60) == ("mine\n", "")


def test_an_import_that_fails(tmp_path):
    done = start(tmp_path, "import nonesuch\n", env=dict(TMPDIR=str(tmp_path)))
    out, err = done.communicate(timeout=60)
    assert done.returncode == 1 and out == "" and err.count("\n") == 1
    assert err.startswith("error: No module named 'nonesuch'; delete ")
    Path(err.rstrip().rpartition("the full report is in ")[2]).unlink()


# --------------------------------------------------------------------------------------------------
# run.sh, with a toy for Python


@pytest.fixture
def checkout(tmp_path):
    """A folder with a space in its name, run.sh in it, and a toy .venv that says what it is
    given."""
    folder = tmp_path / "my checkout"
    folder.mkdir()
    for path in ROOT.glob("requirements*.txt"):
        shutil.copy(path, folder)
    shutil.copy(ROOT / "run.sh", folder)
    return folder


def toy_python(path, program):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{program}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def run_sh(script, *argv, env=(), **options):
    command = ["bash", script, *argv]
    env = os.environ | dict(env)
    return subprocess.run(command, capture_output=True, text=True, env=env, **options)


def installed(checkout, program='printf "%s|" "$@"'):
    """As if the core had been installed."""
    given = "[[ ${PYTHONHOME:-} || ${PYTHONSAFEPATH:-} ]] && exit 70\n"  # no Python works then
    toy_python(checkout / ".venv/bin/python", given + program)
    shutil.copy(checkout / "requirements.txt", checkout / ".venv/.installed-core")


def test_run_sh_from_anywhere(checkout, tmp_path):
    """By a relative path, with CDPATH set, and by links to it."""
    installed(checkout)
    expected = f"{checkout}/door.py|train|--text|my novel.txt|"
    links = tmp_path / "bin"
    links.mkdir()
    (links / "one").symlink_to("../my checkout/run.sh")
    (links / "two").symlink_to(links / "one")
    env = dict(CDPATH=f".:{tmp_path}", PYTHONSAFEPATH="1", PYTHONHOME="/usr")
    for script, cwd in (
        ("run.sh", checkout),
        ("my checkout/run.sh", tmp_path),
        (links / "one", "/"),
        ("bin/two", tmp_path),
    ):
        done = run_sh(script, "--text", "my novel.txt", cwd=cwd, env=env)
        assert (done.stdout, done.stderr) == (expected, ""), script
    assert run_sh("run.sh", "sample", "x", cwd=checkout).stdout == f"{checkout}/door.py|sample|x|"


def test_run_sh_takes_a_python_in_a_path_with_a_space(checkout, tmp_path):
    """It is asked for its version, makes .venv, and what it made is used."""
    own = tmp_path / "py dir/python3"
    making = 'mkdir -p "$4/bin"; printf "#!/bin/bash\\necho ran \\$1 >&2\\n" > "$4/bin/python"'
    toy_python(own, f'[[ $1 == -c ]] && exit 0\n{making}; chmod +x "$4/bin/python"')
    done = run_sh(checkout / "run.sh", env=dict(PYTHON=str(own)))
    said = done.stderr.splitlines()
    assert said == [
        "installing requirements.txt into .venv (once) ...",
        "ran -m",
        "ran -c",
        f"ran {checkout}/door.py",
    ]
    done = run_sh(checkout / "run.sh", "--help", env=dict(PYTHON=str(own)))
    assert done.stdout.startswith("Train a GPT") and done.stderr == ""


def test_run_sh_after_its_python_was_upgraded(checkout, tmp_path):
    """.venv is made anew: its Python starts, and has none of the packages. pip is told that it is
    not for the user, whatever its settings say, and finds nothing on PYTHONPATH."""
    installed(checkout, "[[ $1 != -c ]]")
    own = tmp_path / "python3"
    made = 'echo \\"\\$2 PIP_USER=\\${PIP_USER:-} PYTHONPATH=\\${PYTHONPATH:-}\\" >&2'
    making = f'mkdir -p "$4/bin"; printf "#!/bin/bash\n{made}\n" > "$4/bin/python"'
    toy_python(own, f'[[ $1 == -c ]] && exit 0\n{making}; chmod +x "$4/bin/python"')
    done = run_sh(
        checkout / "run.sh", "--steps", env=dict(PYTHON=str(own), PIP_USER="1", PYTHONPATH="x")
    )
    said = done.stderr.splitlines()
    assert said[0] == "installing requirements.txt into .venv (once) ..."
    assert said[1] == "pip PIP_USER=0 PYTHONPATH=" and said[-1] == "train PIP_USER=1 PYTHONPATH=x"
    assert any("native.build_all(" in line for line in said)


def test_run_sh_in_a_folder_that_is_gone(checkout, tmp_path):
    installed(checkout)
    script = (
        f"mkdir {tmp_path}/gone; cd {tmp_path}/gone; rmdir {tmp_path}/gone; '{checkout}/run.sh'"
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: the folder you are in has been deleted")


def test_run_sh_where_nothing_can_be_installed(checkout, tmp_path):
    toy_python(tmp_path / "py/python3", '[[ $1 == -c ]] && exit 0; echo "no room"; exit 1')
    done = run_sh(checkout / "run.sh", env=dict(PYTHON=str(tmp_path / "py/python3")))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[0] == "no room"
    assert done.stderr.splitlines()[1].startswith(f"error: {checkout}/.venv was not made")


def test_run_sh_keeps_to_bash_3_2():
    """Which macOS has; it stops at what these are, wherever in the file they stand."""
    text = "\n".join(line.partition("# ")[0] for line in (ROOT / "run.sh").open())
    newer = r"=~|\bmapfile\b|\breadarray\b|declare -A|local -n|\$\{\w+(,,|\^\^|@)|\|&|&>>|;;&"
    assert re.findall(newer, text) == []


def test_run_sh_has_line_ends_of_unix_wherever_it_is_checked_out():
    assert b"\r" not in (ROOT / "run.sh").read_bytes()
    attributes = (ROOT / ".gitattributes").read_text()
    assert re.search(r"^\*\.sh .*\beol=lf$", attributes, re.M)


def test_errors_of_input_stay_what_they_are(verb, capsys):
    """A verb says them itself; one that forgets has the last resort."""
    verb(InputError("no such text"))
    assert door.main(["verb"]) == 1
    assert "InputError: no such text" in capsys.readouterr().err


@pytest.mark.parametrize(
    "verb, argv, gpu, wanted",
    [
        ("sample", [], True, False),
        ("train", [], True, True),
        ("train", [], False, False),
        ("train", ["--kernels", "rms_norm"], False, True),
        ("sft", ["--data", "x"], False, False),
        ("benchmarks", [], False, True),
    ],
)
def test_triton_is_loaded_where_it_may_run(verb, argv, gpu, wanted, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(door, "may_have_gpu", lambda: gpu)
    assert door.wants_triton(verb, argv) is wanted


def test_a_container_without_nvidia_smi_may_have_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(door.shutil, "which", lambda name: None)
    monkeypatch.setattr(door, "DRIVER", (str(tmp_path / "nvidiactl"),))
    assert not door.may_have_gpu()
    (tmp_path / "nvidiactl").write_text("")
    assert door.may_have_gpu()
    monkeypatch.setattr(door, "DRIVER", ())
    monkeypatch.setattr(door.shutil, "which", lambda name: "/bin/nvidia-smi")
    assert door.may_have_gpu()
