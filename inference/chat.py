"""./run.sh chat: a conversation with a run's model, in the terminal."""

import contextlib
from pathlib import Path

from base import InputError, write_text
from base.command import refuse
from base.terminal import on_screen

from .engine import Request
from .options import KNOBS, check, is_text, make_parser, open_run, say
from .sampling import default_sampling

DESCRIPTION = """\
A conversation with the model of a finished run: the newest one, or the one that is named. A model
that was trained on text alone does not answer: it continues what you write, and its own text."""

COMMANDS = """\
commands:
  /set NAME VALUE    change an option, such as /set temperature 0.7 or /set tokens 50
  /reset             forget the conversation
  /save FILE         write it into a file
  /help              this list
  /quit              the end; so is Ctrl-D. Ctrl-C stops an answer"""


def main(argv=None):
    """Parse, talk. Returns the exit status."""
    try:
        args = make_parser("chat", DESCRIPTION, COMMANDS, tokens=120).parse_args(argv)
        check(args)
        saved, engine = open_run(args)
    except InputError as e:
        return refuse(e)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lines can be edited, and come back with the arrow keys
    say(f"{saved.folder}: a base model, which continues what you write. /help lists commands")
    Conversation(engine, args).hold()
    return 0


class Conversation:
    """All text so far, the user's and the model's, and the options, which /set changes."""

    def __init__(self, engine, args):
        self.engine = engine
        self.args = args
        self.text = ""
        self.n_answers = 0

    def hold(self):
        """Read lines and answer them, to the end of input or /quit."""
        while True:
            try:
                line = input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:  # what was typed is dropped
                print()
                continue
            if line.strip() == "/quit":
                return
            try:
                if line.startswith("/"):
                    self.command(line)
                else:
                    self.answer(line)
            except InputError as e:
                refuse(e)

    def answer(self, line):
        """Add a line to the text, and what the model makes of it. Raises InputError."""
        if not is_text(line):
            raise InputError("that line is not UTF-8")
        # The model goes on within the line, but what the user says begins a new one
        between = "\n" if self.text and not self.text.endswith("\n") else ""
        prompt = self.text + between + line
        seed = self.args.seed + self.n_answers
        sampling = default_sampling(self.engine.tokenizer, **check(self.args))
        request = Request(prompt, self.args.tokens, sampling, seed, tuple(self.args.stop))
        completion = self.engine.begin(request)
        if completion.n_cut:
            say(f"note: the first {completion.n_cut} tokens of the conversation are out of sight")

        self.text = prompt
        print(line, end="", flush=True)
        try:
            for text in on_screen(self.written(completion)):
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            pass  # what there is of the answer stays
        print()
        self.n_answers += 1

    def written(self, completion):
        """Yield an answer in pieces, which the conversation has as they are."""
        for _, text in self.engine.run([completion]):
            self.text += text
            yield text

    def command(self, line):
        """Do what a line that begins with / says. Raises InputError."""
        name, *words = line.split(maxsplit=2)
        if name == "/reset" and not words:
            self.text = ""
        elif name == "/save" and words:
            self.save(line.split(maxsplit=1)[1])
        elif name == "/set" and len(words) == 2:
            self.set(*words)
        elif name == "/help":
            say(COMMANDS)
        else:
            raise InputError(f"{line}: no such command; /help lists them")

    def save(self, name):
        path = Path(name).expanduser()
        try:
            write_text(path, self.text)
        except OSError as e:
            raise InputError(f"/save {path}: {e.strerror}; expected a file to write") from None
        say(f"{len(self.text)} characters in {path}")

    def set(self, name, value):
        """Change one of the options."""
        kinds = {f.name: f.type for f in KNOBS} | dict(tokens=int, seed=int)
        name = name.replace("-", "_")
        if name not in kinds:
            raise InputError(f"/set {name}: expected one of {', '.join(kinds)}")
        before = getattr(self.args, name)
        try:
            setattr(self.args, name, kinds[name](value))
            check(self.args)
        except ValueError as e:  # an InputError, too, is one
            setattr(self.args, name, before)
            if isinstance(e, InputError):
                raise
            raise InputError(f"/set {name} {value}: expected a number") from None
