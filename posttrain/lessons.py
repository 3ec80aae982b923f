"""What ./run.sh teach-demo teaches, made of what every machine has: sums, numbers to put in order,
letters to count and what Python's library says of its functions; and how an answer is judged.

A sum is answered in one of two ways: at once, or digit by digit from the units on, which a small
model can do. The other questions have a long answer and a short one. Which questions are learned
from and which are asked in the end is decided by a hash of the question, so that none is both.
"""

import ast
import hashlib
import random
import re
from typing import NamedTuple

from base import to_json, write_text
from data.sources.stdlib import list_files
from data.tokenizers import END_OF_TEXT

WORKED = 0.3  # of the sums that are learned from, how many are worked out
SHORT = 0.4  # of the other answers, how many are short
TURNS = (1, 1, 1, 1, 1, 2, 3)  # questions of a conversation
KINDS = ("order", "letters", "docs")  # besides sums
RESULT = re.compile(r"#### (\d+)$")
MOST_DIGITS = 3
MOST_CHARACTERS = 30_000  # of a file of Python's library
MOST_OF_LINE = 60  # characters of a sentence about a function

LETTERS = "aeiou"
IN_DOCS = "Python's library says of it: "


class Lesson(NamedTuple):
    """A question and two right answers, of which the short one is preferred."""

    kind: str
    question: str
    short: str
    long: str

    @property
    def result(self):
        """The number that a sum comes to; None of other questions."""
        return result_of(self.short)


# --------------------------------------------------------------------------------------------------
# Questions


def worked_out(a, b):
    """The sum digit by digit from the units on: '7+5=12 4+8+1=13 1+0+1=2'."""
    steps = []
    carry = 0
    while a or b or not steps:
        shown = f"{a % 10}+{b % 10}" + ("+1" if carry else "")
        total = a % 10 + b % 10 + carry
        steps.append(f"{shown}={total}")
        carry = total // 10
        a //= 10
        b //= 10
    return " ".join(steps)


def sum_lesson(rng, evenly):
    """Of any two numbers; evenly: short ones are as frequent as long ones, of which there are more,
    else a model looks for the digits of short ones in the wrong places."""
    digits = [MOST_DIGITS, MOST_DIGITS]
    if evenly:
        digits = rng.choices(range(1, MOST_DIGITS + 1), k=2)
    a, b = (rng.randrange(10**n) for n in digits)
    result = f"#### {a + b}"
    return Lesson("sum", f"What is {a}+{b}?", result, f"{worked_out(a, b)} {result}")


def order_lesson(rng):
    numbers = [rng.randrange(10) for _ in range(rng.randint(3, 5))]
    said = " ".join(map(str, numbers))
    short = " ".join(map(str, sorted(numbers)))
    return Lesson("order", f"Put in order: {said}", short, f"From small to large it is {short}.")


def letters_lesson(rng):
    letter = rng.choice(LETTERS)
    word = "".join(rng.choice(LETTERS) for _ in range(rng.randint(3, 7)))
    n = str(word.count(letter))
    spelled = " ".join(word)  # a token a letter
    long = f"The letter {letter} is there so many times: {n}."
    return Lesson("letters", f"How many {letter} are in {spelled}?", n, long)


def docs_lesson(rng, functions):
    name, says = rng.choice(functions)
    return Lesson("docs", f"What does {name} do?", says, IN_DOCS + says)


def documented():
    """[(name, first line of its documentation), ...] of the functions and classes of Python's
    library and of their methods, sorted; lines that are a short sentence."""
    found = {}
    listing = list_files()
    for name in listing.files:
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if module.count(".") > 1 or "_" in module:
            continue
        try:
            tree = ast.parse((listing.root / name).read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for full_name, node in named(tree, module):
            first = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            if first.endswith(".") and 20 <= len(first) <= MOST_OF_LINE and first.isascii():
                found[full_name] = first
    return sorted(found.items())


def named(tree, name):
    """Yield (full name, node) of what is defined in a module or a class and is public."""
    for node in tree.body:
        is_class = isinstance(node, ast.ClassDef)
        if (is_class or isinstance(node, ast.FunctionDef)) and not node.name.startswith("_"):
            yield f"{name}.{node.name}", node
            if is_class:
                yield from named(node, f"{name}.{node.name}")


def lessons(kind, n, part, seed, functions=()):
    """n Lessons of a kind that belong to a part of them all: sft, grpo or test."""
    rng = random.Random(f"{kind} {part} {seed}")
    make = dict(
        sum=lambda: sum_lesson(rng, evenly=part != "test"),
        order=lambda: order_lesson(rng),
        letters=lambda: letters_lesson(rng),
        docs=lambda: docs_lesson(rng, functions),
    )
    found = []
    while len(found) < n:
        lesson = make[kind]()
        if part_of(lesson.question) == part:
            found.append(lesson)
    return found


def part_of(question):
    """For what a question is there: sft (also of the base text), grpo or test."""
    at = hashlib.sha256(question.encode()).digest()[0] / 256
    return "sft" if at < 0.6 else "grpo" if at < 0.9 else "test"


# --------------------------------------------------------------------------------------------------
# Answers, judged


def is_in_form(lesson, answer):
    """Whether an answer has one of the forms that its kind of question is answered in."""
    if lesson.kind == "sum":
        return re.fullmatch(r"(\d\+\d(\+1)?=\d+ )*#### \d+", answer) is not None
    return is_short(lesson, answer) or is_long(lesson, answer)


def is_short(lesson, answer):
    if lesson.kind == "order":
        return re.fullmatch(r"\d( \d)*", answer) is not None
    if lesson.kind == "letters":
        return re.fullmatch(r"\d+", answer) is not None
    return answer.endswith(".") and "\n" not in answer and not answer.startswith(IN_DOCS)


def is_long(lesson, answer):
    if lesson.kind == "order":
        return re.fullmatch(r"From small to large it is \d( \d)*\.", answer) is not None
    if lesson.kind == "letters":
        return re.fullmatch(r"The letter [a-z] is there so many times: \d+\.", answer) is not None
    return answer.startswith(IN_DOCS) and answer.endswith(".") and "\n" not in answer


def result_of(answer):
    """The number that an answer comes to; None where it does not."""
    found = RESULT.search(answer)
    return int(found[1]) if found else None


# --------------------------------------------------------------------------------------------------
# Files


def write_base(path, held_out, seed, megabytes, sums):
    """Two texts of one kind, documents of Python's library and of sums: one to begin with, and a
    tenth as much that is held out."""
    rng = random.Random(f"base {seed}")
    listing = list_files()
    names = list(listing.files)
    rng.shuffle(names)
    files = (listing.root / name for name in names)
    for place, part, share in ((held_out, "test", 0.1), (path, "sft", 1)):
        texts = []
        size = 0
        while size < share * megabytes * 1e6:
            text = next(files).read_text(encoding="utf-8", errors="replace")[:MOST_CHARACTERS]
            texts.append(text)
            size += len(text)
        lines = []
        for lesson in lessons("sum", round(share * sums), part, f"base {seed}"):
            said = lesson.question.removeprefix("What is ").removesuffix("?")
            lines.append(f"{said}: {lesson.long}")
        texts += ["\n".join(lines[i : i + 8]) + "\n" for i in range(0, len(lines), 8)]
        rng.shuffle(texts)
        write_text(place, END_OF_TEXT.join(texts))


def write_conversations(path, seed, sums, others, functions):
    rng = random.Random(f"conversations {seed}")
    lines = []
    for lesson in lessons("sum", sums, "sft", seed):
        lines.append((lesson.question, lesson.long if rng.random() < WORKED else lesson.short))
    for kind in KINDS:
        for lesson in lessons(kind, others, "sft", seed, functions):
            lines.append((lesson.question, lesson.short if rng.random() < SHORT else lesson.long))
    rng.shuffle(lines)
    said = []
    while lines:
        messages = []
        for _ in range(min(rng.choice(TURNS), len(lines))):
            question, answer = lines.pop()
            messages.append(dict(role="user", content=question))
            messages.append(dict(role="assistant", content=answer))
        said.append(dict(messages=messages))
    write_text(path, "".join(to_json(line) + "\n" for line in said))


def write_pairs(path, seed, each, functions):
    """So many pairs of questions with a number for an answer, five times as many with a sentence,
    which is harder to end where the model has not seen the question."""
    rng = random.Random(f"pairs {seed}")
    found = []
    for kind in KINDS:
        found += lessons(kind, 5 * each if kind == "docs" else each, "grpo", seed, functions)
    rng.shuffle(found)
    lines = [dict(prompt=x.question, chosen=x.short, rejected=x.long) for x in found]
    write_text(path, "".join(to_json(line) + "\n" for line in lines))


def write_questions(path, seed, n):
    """Sums with their results beside them, for GRPO."""
    lines = []
    for lesson in lessons("sum", n, "grpo", seed):
        asked = [dict(role="user", content=lesson.question)]
        lines.append(dict(messages=asked, answer=lesson.result))
    write_text(path, "".join(to_json(line) + "\n" for line in lines))
