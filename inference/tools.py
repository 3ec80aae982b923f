"""Tools that a model may use while it answers: python, a calculator in the sandbox.

A model asks for one in its text (data/chat.py has the form), is told what came of it in the next
turn, and goes on.
"""

from base import InputError
from data.chat import Message, calls_in
from runtime.sandbox import Sandbox

NAMES = ("python",)
MOST_ROUNDS = 8  # times that one answer may ask
SECONDS, MEGABYTES = 5.0, 256


class Tools:
    """Those of --tools, by name. Raises InputError for one that is not there."""

    def __init__(self, names=()):
        for name in names:
            if name not in NAMES:
                raise InputError(f"--tools {name}: expected one of {', '.join(NAMES)}")
        self.names = tuple(names)
        self.sandbox = Sandbox(SECONDS, MEGABYTES) if "python" in self.names else None

    def __bool__(self):
        return bool(self.names)

    def has_all(self, calls):
        """Whether there are calls, and all of them are of tools that are here."""
        return bool(calls) and all(call.name in self.names for call in calls)

    def asked_for(self, text):
        """The Calls of an answer that can be done here, [] where it is the answer itself."""
        calls, _ = calls_in(text)
        return calls if self.has_all(calls) else []

    def do(self, calls):
        """A Message for each call, with what came of it."""
        return [Message("tool", self.result_of(call)) for call in calls]

    def result_of(self, call):
        """What python says of the argument `code`, as it is shown in a terminal."""
        code = call.arguments.get("code")
        if not isinstance(code, str):
            return 'error: expected {"code": "..."}'
        ran = self.sandbox.run(code)
        said = ran.output.strip()
        if ran.error:
            said = f"{said}\n{ran.error}".strip()
        return said or "None"

    def close(self):
        if self.sandbox:
            self.sandbox.close()


def add_option(group):
    """--tools, of the commands that answer."""
    group.add_argument(
        "--tools",
        nargs="+",
        default=[],
        metavar="NAME",
        help="that the model may use while it answers: python runs its code in a sandbox",
    )
