"""What an answer is worth: rewards by name, or by a function of one's own.

A reward is judged of (answer, question): the answer's text, and the object of the question's line.
--reward FILE.py:FUNCTION calls FUNCTION(answer, question) -> number in another process.
"""

import re
from pathlib import Path

from base import InputError
from runtime.sandbox import Function, Sandbox

EXPECTED = "expected exact, number, regex, regex:PATTERN, python or FILE.py:FUNCTION"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
FENCE = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)
SEARCHED = 10_000  # characters of an answer that a regular expression sees


class Reward:
    """A reward of --reward. Made before anything is trained, so that what is wrong with it is said
    then. Raises InputError."""

    def __init__(self, config, questions=()):
        """config: PolicyConfig; questions: all that it will judge answers to, whose fields it
        checks."""
        self.name = config.reward
        self.seconds = config.reward_seconds
        self.close = lambda: None
        name, _, rest = config.reward.partition(":")
        if config.reward == "exact":
            self.judge = exact
            need(questions, "answer", str | int | float, "a text or a number")
        elif config.reward == "number":
            self.judge = same_number
            need(questions, "answer", str | int | float, "a number")
            for q in questions:
                if last_number(str(q.fields["answer"])) is None:
                    raise InputError(f"{q.where}: answer: expected a number, {found(q, 'answer')}")
        elif name == "regex" and rest:
            pattern = compiled(rest, f"--reward {config.reward}")
            self.judge = lambda answer, fields: bool(pattern.search(answer[:SEARCHED]))
        elif config.reward == "regex":
            need(questions, "pattern", str, "a regular expression")
            patterns = {q.where: compiled(q.fields["pattern"], q.where) for q in questions}
            known = {pattern.pattern: pattern for pattern in patterns.values()}
            self.judge = lambda answer, fields: bool(
                known[fields["pattern"]].search(answer[:SEARCHED])
            )
        elif config.reward == "python":
            need(questions, "tests", str | list, "a text of Python, or a list of them")
            sandbox = Sandbox(config.reward_seconds, config.reward_memory)
            self.close = sandbox.close
            self.judge = lambda answer, fields: passes(sandbox, answer, fields)
        elif ".py:" in config.reward:
            self.begin_function(config)
        else:
            raise InputError(f"--reward {config.reward}: {EXPECTED}")

    def begin_function(self, config):
        path, _, name = config.reward.rpartition(":")
        path = Path(path).expanduser()
        if not path.is_file():
            raise InputError(f"--reward {config.reward}: {path} is no file: {EXPECTED}")
        if not name.isidentifier():
            raise InputError(f"--reward {config.reward}: expected a function's name behind the :")
        function = Function(path.resolve(), name, config.reward_seconds, config.reward_memory)
        self.close = function.close
        wrong = function.start()
        if wrong:
            function.close()
            raise InputError(
                f"--reward {config.reward}: {path} {wrong}; expected a function of (answer, "
                "question) that returns a number"
            )

        def judge(answer, fields):
            value, wrong = function.call(answer, fields)
            if wrong:
                raise Wrong(wrong)
            return value

        self.judge = judge

    def __call__(self, answer, question):
        """What an answer, a text, is worth: a float. Raises InputError for a function that fails.

        question: a data.questions.Question.
        """
        try:
            return float(self.judge(answer, question.fields))
        except Wrong as e:
            raise InputError(
                f"--reward {self.name}: {e}, for the answer {answer[:60]!r} to {question.where}: "
                "expected a number for every answer, within --reward-seconds, from the two "
                "arguments alone; mend the function and go on with --resume"
            ) from None


class Wrong(Exception):
    """What a function did that no reward does."""


def need(questions, name, kind, expected):
    """Raises InputError for a question without this field."""
    for q in questions:
        value = q.fields.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(
                f"{q.where}: {name}: expected {expected} beside messages, which the reward looks "
                f"at; {found(q, name)}"
            )


def found(question, name):
    if name not in question.fields:
        return "found none"
    return f"found {question.fields[name]!r:.60}"


def compiled(pattern, where):
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as e:
        raise InputError(f"{where}: pattern {pattern!r:.60}: {e}") from None


# --------------------------------------------------------------------------------------------------
# Of (answer, fields)


def exact(answer, fields):
    """Whether it is the field `answer`, without white space around both."""
    return answer.strip() == str(fields["answer"]).strip()


def same_number(answer, fields):
    """Whether the last number in it, or the one behind ####, is that of the field `answer`."""
    return last_number(answer) == last_number(str(fields["answer"]))


def last_number(text):
    """The last number of a text, of what stands behind #### where that is there; None without."""
    numbers = NUMBER.findall(text.rpartition("####")[2])
    return float(numbers[-1].replace(",", "")) if numbers else None


def passes(sandbox, answer, fields):
    """Whether the answer's Python, in ``` fences or as a whole, passes the field `tests`."""
    blocks = FENCE.findall(answer)
    code = "\n".join(blocks) if blocks else answer
    tests = fields["tests"]
    return sandbox.run(code, [tests] if isinstance(tests, str) else tests).error is None
