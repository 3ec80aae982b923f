"""A conversation goes on from line to line, and no command or interruption ends the program."""

import builtins
import contextlib
import os
import select
import signal
import sys
import time

import pytest
from processes import ROOT

from data.chat import read_conversations
from inference import chat
from inference.engine import Engine


@pytest.fixture
def talk(trained, monkeypatch, capsys):
    """Function of the lines typed, and of options: (exit status, stdout, stderr)."""

    def talk(*lines, options=()):
        typed = iter(lines)

        def read(prompt):
            line = next(typed, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(builtins, "input", read)
        argv = ["--run", trained[0].run.run_dir, "-n", 12, *options]
        status = chat.main([*map(str, argv)])
        return status, *capsys.readouterr()

    return talk


def test_it_says_what_kind_of_model_it_is_and_ends_with_the_input(talk):
    status, out, err = talk()
    assert status == 0 and out == "\n"
    assert "a base model, which continues what you write" in err


def test_the_text_goes_on_and_reset_forgets_it(talk, tmp_path):
    file = tmp_path / "said.txt"
    _, first, _ = talk("the cat ")
    talk("the cat ", "a dog ", f"/save {file}")
    text = file.read_text()
    assert text.startswith(first.rstrip("\n")) and "\na dog " in text
    talk("the cat ", "/reset", "a dog ", f"/save {file}")
    assert file.read_text().startswith("a dog ")


def test_every_answer_has_a_seed_of_its_own(talk):
    _, out, _ = talk("the ", "/reset", "the ")
    one, other = out.strip().splitlines()[0], out.strip().splitlines()[-1]
    assert one != other


def test_options_are_changed(talk):
    greedy = ["/set temperature 0", "/set repetition-penalty 1", "/set tokens 20"]
    _, one, _ = talk(*greedy, "the ")
    options = ["--temperature", 0, "--repetition-penalty", 1, "--seed", 5, "-n", 20]
    assert talk("the ", options=options)[1] == one


def test_set_alone_shows_the_options(talk):
    status, out, err = talk("/set top-p 0.5", "/set")
    assert status == 0 and not out.strip()
    assert "  top-p 0.5\n" in err and "  temperature " in err and "  tokens " in err


@pytest.mark.parametrize(
    ["line", "message"],
    [
        ("/set temperature -1", "--temperature -1.0: expected a number from 0 to 100"),
        ("/set temperature warm", "/set temperature warm: expected a number"),
        ("/set nothing 1", "expected one of temperature"),
        ("/set tokens 0", "--tokens 0: expected a positive number"),
        ("/dance", "/help lists them"),
        ("/save", "/save: expected a file"),
        ("/save /nowhere/file", "/save /nowhere/file: No such file"),
        ("a\udcff", "not UTF-8"),
    ],
)
def test_what_is_wrong_is_one_line_and_it_goes_on(talk, line, message):
    _, right, _ = talk("the ")
    status, out, err = talk(line, "the ")
    assert status == 0 and out == right
    [error] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in error


def test_an_interruption_ends_the_answer_and_not_the_program(talk, monkeypatch, tmp_path):
    run = Engine.run

    def interrupted(engine, completions):
        for i, piece in enumerate(run(engine, completions)):
            if i == 3:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Engine, "run", interrupted)
    file = tmp_path / "said.txt"
    status, out, _ = talk("the ", KeyboardInterrupt, f"/save {file}", "/quit", "never ")
    assert status == 0 and "never" not in out
    assert out.startswith(file.read_text())  # what was shown is what is kept
    assert len(file.read_text()) == len("the ") + 3


def test_an_answer_does_not_color_the_terminal(talk, monkeypatch, tmp_path):
    """It is shown what it says, and kept as it is."""
    said = "\x1b[2Jred\r"
    monkeypatch.setattr(Engine, "run", lambda self, batch: [(batch[0], said)])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    file = tmp_path / "said.txt"
    _, out, _ = talk("the ", f"/save {file}")
    assert out.startswith("the \\x1b[2Jred\\x0d\n")
    assert file.read_bytes().decode() == f"the {said}"


def test_options_that_are_wrong_end_it_at_once(talk):
    status, out, err = talk("the ", options=["--top-p", 2])
    assert status == 2 and out == "" and "--top-p 2.0: expected a fraction" in err


def test_a_model_that_was_taught_answers(talk, monkeypatch, tmp_path):
    """Its answer stands alone, and what was said is saved as teaching reads it."""
    asked = []

    class Answers(chat.Answered):
        def prompt_with(self, line):
            asked.append([*self.messages, line])
            return (100, 101)

    def run(engine, batch):
        for text in "yes", "!":
            batch[0].text += text
            yield batch[0], text

    monkeypatch.setattr(chat, "is_taught", lambda saved: True)
    monkeypatch.setattr(chat, "Answered", Answers)
    monkeypatch.setattr(Engine, "run", run)
    file = tmp_path / "said.jsonl"
    _, out, err = talk("is it?", "is it, too?", f"/save {file}", "/reset", "again?")
    assert out == "yes!\nyes!\nyes!\n\n" and "taught to answer" in err
    [messages] = read_conversations(file)
    assert [m.text for m in messages] == ["is it?", "yes!", "is it, too?", "yes!"]
    assert [len(before) for before in asked] == [1, 3, 1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_in_a_terminal(trained, tmp_path):
    """As a person has it: lines are typed, Ctrl-C stops an answer and then what is typed, but not
    the program; Ctrl-D ends it."""
    file = tmp_path / "said.txt"
    argv = [sys.executable, "door.py", "chat", "--run", trained[0].run.run_dir, "-n", "100000"]
    with Terminal(argv) as terminal:
        terminal.until("> ")
        terminal.type("the cat \n")
        terminal.until("the cat \r\nthe cat ")  # what was typed, and again what the answer is to
        before = len(terminal.shown)
        terminal.wait_for_more(before + 20)
        terminal.type("\x03")
        terminal.until("\r\n> ", before)
        terminal.type("/set tokens 5\n")
        terminal.until("> ", len(terminal.shown))
        terminal.type("half a line")
        terminal.until("half a line", len(terminal.shown))
        terminal.type("\x03")
        terminal.until("\r\n> ", len(terminal.shown))
        terminal.type(f"/save {file}\n")
        terminal.until(f"characters in {file}", 0)
        terminal.type("\x04")
        assert terminal.status() == 0
    text = file.read_text()
    assert text.startswith("the cat ") and len(text) > 20
    assert "half a line" not in text and "Traceback" not in terminal.shown


class Terminal:
    """A program in a pseudo-terminal. Use as a context manager."""

    def __init__(self, argv):
        import pty

        self.shown = ""
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.chdir(ROOT)
            os.execve(argv[0], [*map(str, argv)], os.environ | {"TERM": "dumb"})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    def read(self, until):
        assert time.monotonic() < until, f"waited in vain; there is {self.shown[-500:]!r}"
        if select.select([self.fd], [], [], 0.2)[0]:
            with contextlib.suppress(OSError):
                self.shown += os.read(self.fd, 10_000).decode(errors="replace")

    def until(self, text, begin=0, seconds=120):
        """Wait until this is shown, behind so many characters."""
        end = time.monotonic() + seconds
        while text not in self.shown[begin:]:
            self.read(end)

    def wait_for_more(self, n, seconds=120):
        end = time.monotonic() + seconds
        while len(self.shown) < n:
            self.read(end)

    def type(self, text):
        os.write(self.fd, text.encode())

    def status(self, seconds=60):
        end = time.monotonic() + seconds
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            self.read(end)
