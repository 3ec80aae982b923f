"""./run.sh chat: a conversation with a run's model, in the terminal."""

import contextlib
import functools
from pathlib import Path

from base import InputError, to_json, write_text
from base.command import refuse
from base.terminal import on_screen
from data.chat import Message, prompt_of

from .engine import Request
from .options import KNOBS, check, is_taught, is_text, make_parser, open_run, say
from .sampling import default_sampling
from .tools import MOST_ROUNDS, Tools, add_option

DESCRIPTION = """\
A conversation with the model of a finished run: the newest one, or the one that is named. A model
that ./run.sh sft has taught answers. One that was trained on text alone does not: it continues what
you write, and its own text."""

COMMANDS = """\
commands:
  /set NAME VALUE    change an option, such as /set temperature 0.7 or /set tokens 50
  /set               what they are now
  /reset             forget the conversation
  /save FILE         write it into a file; of a model that answers, a line that sft reads
  /help              this list
  /quit              the end; so is Ctrl-D. Ctrl-C stops an answer"""


def main(argv=None):
    """Parse, talk. Returns the exit status."""
    try:
        parser = make_parser("chat", DESCRIPTION, COMMANDS, tokens=120)
        add_option(parser)
        args = parser.parse_args(argv)
        check(args)
        tools = Tools(args.tools)
        saved, engine = open_run(args)
        if tools and not is_taught(saved):
            raise InputError(f"--tools: {saved.folder} is a base model: expected a taught one")
    except InputError as e:
        return refuse(e)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  lines can be edited, and come back with the arrow keys
    kind = "a base model, which continues what you write"
    said = Continued
    if is_taught(saved):
        kind = "a model that was taught to answer"
        said = functools.partial(Answered, saved.tokenizer)
    say(f"{saved.folder}: {kind}. /help lists commands")
    with contextlib.closing(tools):
        Conversation(engine, args, said, tools).hold()
    return 0


class Continued:
    """A conversation with a base model: one text, the user's lines and what the model added."""

    def __init__(self):
        self.text = ""
        self.prompt = ""

    def prompt_with(self, line):
        """What the model goes on from with one line more."""
        # The model goes on within the line, but what the user says begins a new one
        between = "\n" if self.text and not self.text.endswith("\n") else ""
        self.prompt = self.text + between + line
        return self.prompt

    def begin(self, line):
        """Take the line. Returns what of it the answer is shown behind."""
        self.text = self.prompt
        return line

    def add(self, piece):
        self.text += piece

    def use(self, tools):
        """A base model asks for no tools."""
        return None

    def to_save(self):
        return self.text


class Answered:
    """A conversation with a model that was taught to have one: messages in turn."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.messages = []

    def prompt_with(self, line):
        """What the model goes on from with one message more. Raises InputError."""
        return tuple(prompt_of([*self.messages, Message("user", line)], self.tokenizer))

    def begin(self, line):
        """Take the message. Returns what of it the answer is shown behind."""
        self.messages += [Message("user", line), Message("assistant", "")]
        return ""

    def add(self, piece):
        last = self.messages[-1]
        self.messages[-1] = last._replace(text=last.text + piece)

    def use(self, tools):
        """Where the answer asks for tools: what they say, and what the model goes on from; else
        None."""
        calls = tools.asked_for(self.messages[-1].text)
        if not calls:
            return None
        results = tools.do(calls)
        self.messages += results
        prompt = tuple(prompt_of(self.messages, self.tokenizer))
        self.messages.append(Message("assistant", ""))
        return "\n".join(message.text for message in results), prompt

    def to_save(self):
        """A line that ./run.sh sft reads."""
        messages = [dict(role=m.role, content=m.text) for m in self.messages]
        return to_json(dict(messages=messages), ensure_ascii=False) + "\n"


class Conversation:
    """What was said so far, and the options, which /set changes."""

    def __init__(self, engine, args, said, tools):
        """said: makes a Continued or an Answered in which nothing is said yet."""
        self.engine = engine
        self.tools = tools
        self.args = args
        self.new = said
        self.said = said()
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
        """Take a line, and show what the model makes of it. Raises InputError."""
        if not is_text(line):
            raise InputError("that line is not UTF-8")
        completion = self.begin(self.said.prompt_with(line))
        print(self.said.begin(line), end="", flush=True)
        try:
            self.show(self.written(completion))
            for _ in range(MOST_ROUNDS):
                used = self.said.use(self.tools)
                if used is None:
                    break
                # What the tools say, and what the model makes of it
                result, prompt = used
                self.show([f"\n{result}\n"])
                self.show(self.written(self.begin(prompt)))
        except KeyboardInterrupt:
            pass  # what there is of the answer stays
        print()
        self.n_answers += 1

    def show(self, pieces):
        for text in on_screen(pieces):
            print(text, end="", flush=True)

    def begin(self, prompt):
        """A Completion of a prompt, with the options as they are. Raises InputError."""
        seed = self.args.seed + self.n_answers
        sampling = default_sampling(self.engine.tokenizer, **check(self.args))
        request = Request(prompt, self.args.tokens, sampling, seed, tuple(self.args.stop))
        completion = self.engine.begin(request)
        if completion.n_cut:
            say(f"note: the first {completion.n_cut} tokens of the conversation are out of sight")
        return completion

    def written(self, completion):
        """Yield an answer in pieces, which the conversation has as they are."""
        for _, text in self.engine.run([completion]):
            self.said.add(text)
            yield text

    def command(self, line):
        """Do what a line that begins with / says. Raises InputError."""
        name, *words = line.split(maxsplit=2)
        if name == "/reset" and not words:
            self.said = self.new()
        elif name == "/save" and not words:
            raise InputError("/save: expected a file, as in /save talk.txt")
        elif name == "/save":
            self.save(line.split(maxsplit=1)[1])
        elif name == "/set" and len(words) == 2:
            self.set(*words)
        elif name == "/set" and not words:
            say(self.options())
        elif name == "/help":
            say(COMMANDS)
        else:
            raise InputError(f"{line}: no such command; /help lists them")

    def save(self, name):
        path = Path(name).expanduser()
        text = self.said.to_save()
        try:
            write_text(path, text)
        except OSError as e:
            raise InputError(f"/save {path}: {e.strerror}; expected a file to write") from None
        say(f"{len(text)} characters in {path}")

    def options(self):
        """The options as they are, a line each."""
        sampling = default_sampling(self.engine.tokenizer, **check(self.args))
        now = {f.name: getattr(sampling, f.name) for f in KNOBS}
        now |= dict(tokens=self.args.tokens, seed=self.args.seed)
        return "\n".join(f"  {name.replace('_', '-')} {value}" for name, value in now.items())

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
