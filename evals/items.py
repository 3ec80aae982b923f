"""Multiple choice and completion: items, the files they come in, and the numbers made of them.

A file has a JSON object on each line, in one of these forms:

    HellaSwag   {"activity_label": ..., "ctx_a": ..., "ctx_b": ..., "endings": [...], "label": 2}
    choice      {"query": ..., "choices": [...], "gold": 2}             CORE's multiple choice
    schema      {"context_options": [...], "continuation": ..., "gold": 0}
    completion  {"context": ..., "continuation": ...}                   every token the likeliest

The last three are those of DCLM's CORE. A choice is right where the answer is the likeliest, and
what "likeliest" means is said with each number: by the log probability of the whole answer (acc),
divided by its characters (acc_norm of lm-eval), or by its tokens (llm.c; CORE counts only those
from where the answers of a choice differ, and so it is done here).
"""

import json
import random
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from base import InputError

from .results import accuracy

SHUFFLED_BY = 1337  # seed of the order in which a part of the items is taken, as in CORE
EXAMPLES_FROM = 1234  # and of an item's examples, plus its number


class Item(NamedTuple):
    """A question: texts and what may follow each, of which one is right; or one text that has to
    be gone on with."""

    pairs: tuple  # (context, continuation) for each option
    gold: int | None  # the right one; None: the continuation is to be the likeliest everywhere
    name: str = ""
    from_difference: bool = False  # tokens count from where the texts differ


class Task(NamedTuple):
    name: str
    items: list
    chance: float  # the accuracy of guessing
    note: str = ""


# --------------------------------------------------------------------------------------------------
# Files


def read_task(path, most=0, examples=0, name=None, chance=None, delimiter=" "):
    """The Task of a file; most: items at most, taken at random, 0 for all; examples: solved ones
    put before each. Raises InputError for the first line that has none of the forms."""
    path = Path(path)
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for n, line in enumerate(file, 1):
                if line.strip():
                    rows.append(checked(line, f"{path}:{n}"))
    except (OSError, UnicodeError) as e:
        raise InputError(
            f"{path}: {getattr(e, 'strerror', None) or e}; expected a file of JSON lines"
        ) from None
    if not rows:
        raise InputError(f"{path}: is empty; expected a JSON object on each line")
    kinds = {kind for kind, _ in rows}
    if len(kinds) > 1:
        raise InputError(f"{path}: has items of several forms, {', '.join(sorted(kinds))}")
    [kind] = kinds
    rows = [row for _, row in rows]
    order = list(range(len(rows)))
    random.Random(SHUFFLED_BY).shuffle(order)
    rows = [rows[i] for i in order[: most or None]]
    if examples >= len(rows):
        raise InputError(f"{path}: {len(rows)} items; expected more than {examples} examples")
    items = []
    for i, row in enumerate(rows):
        # Out of all but this one
        chosen = random.Random(EXAMPLES_FROM + i).sample(range(len(rows) - 1), examples)
        shown = [rows[n + (n >= i)] for n in chosen]
        before = "".join(solved(kind, other, delimiter) + "\n\n" for other in shown)
        items.append(as_item(kind, row, before, delimiter))
    if chance is None:
        chance = 0.0
        if kind != "completion":
            chance = float(np.mean([1 / len(item.pairs) for item in items]))
    note = f"{examples} examples before each" if examples else ""
    return Task(name or path.stem, items, chance, note)


def checked(line, where):
    """(form, object) of a line. Raises InputError."""
    try:
        row = json.loads(line)
    except ValueError as e:
        raise InputError(f"{where}: not JSON: {e}") from None
    row = row if isinstance(row, dict) else {}
    for kind, check in FORMS.items():
        if check(row):
            return kind, row
    raise InputError(
        f"{where}: expected the fields of HellaSwag (ctx_a, endings, label), of a choice (query, "
        "choices, gold), of a schema (context_options, continuation, gold) or of a completion "
        f"(context, continuation), found {', '.join(map(str, row)) or 'no object'}"
    )


def is_hellaswag(row):
    label = row.get("label")
    if isinstance(label, str) and label.isdecimal():
        label = int(label)
    ctx = row.get("ctx_a", row.get("ctx"))
    return isinstance(ctx, str) and is_choice(row.get("endings"), label)


def is_choice(options, gold):
    if not isinstance(options, list) or len(options) < 2:
        return False
    if not all(isinstance(option, str) and option for option in options):
        return False
    return type(gold) is int and 0 <= gold < len(options)


def is_completion(row):
    texts = row.get("context"), row.get("continuation")
    return all(isinstance(text, str) for text in texts) and bool(texts[1])


FORMS = {
    "hellaswag": is_hellaswag,
    "choice": lambda row: (
        isinstance(row.get("query"), str) and is_choice(row.get("choices"), row.get("gold"))
    ),
    "schema": lambda row: (
        is_choice(row.get("context_options"), row.get("gold"))
        and isinstance(row.get("continuation"), str)
        and bool(row["continuation"])
    ),
    "completion": is_completion,
}


def as_item(kind, row, before, delimiter):
    """The Item of a row; before: solved examples."""
    if kind == "hellaswag":
        context = before + hellaswag_context(row)
        pairs = [(context, " " + hellaswag_text(ending)) for ending in row["endings"]]
        return Item(tuple(pairs), int(row["label"]))
    if kind == "choice":
        context = before + row["query"].rstrip()
        pairs = [(context, delimiter + choice) for choice in row["choices"]]
        return Item(tuple(pairs), row["gold"], from_difference=True)
    if kind == "schema":
        after = delimiter + row["continuation"]
        return Item(
            tuple((before + option.rstrip(), after) for option in row["context_options"]),
            row["gold"],
        )
    return Item(((before + row["context"].rstrip(), delimiter + row["continuation"]),), None)


def solved(kind, row, delimiter):
    """The text of an item with its right answer."""
    item = as_item(kind, row, "", delimiter)
    context, continuation = item.pairs[item.gold or 0]
    return context + continuation


def hellaswag_context(row):
    """As lm-eval writes it: the activity, then both parts of the context."""
    context = row.get("ctx_a", row.get("ctx"))
    if row.get("ctx_b"):
        context += " " + row["ctx_b"][:1].upper() + row["ctx_b"][1:]
    if row.get("activity_label"):
        context = f"{row['activity_label']}: {context}"
    return hellaswag_text(context)


def hellaswag_text(text):
    """Without the marks of WikiHow."""
    text = text.strip().replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)
    return text.replace("  ", " ")


# --------------------------------------------------------------------------------------------------
# Numbers


def measure_task(scorer, task):
    """Measures of a Task, or none of them where no item can be written in the model's tokens."""
    asked = []  # (item, its pairs as tokens)
    for item in task.items:
        try:
            asked.append((item, [encoded(scorer, *pair) for pair in item.pairs]))
        except InputError:  # characters that the tokenizer does not know
            asked.append((item, None))
    flat = [pair for _, pairs in asked if pairs for pair in pairs]
    if not flat:
        return []
    completion = task.items[0].gold is None
    answers = iter(scorer.continuations(flat, greedy=completion))

    n_cut = 0
    kept = []
    right = {}  # metric -> whether each item is right
    for item, pairs in asked:
        if not pairs:
            continue
        kept.append(item)
        found = [next(answers) for _ in pairs]
        n_cut += any(scored.n_cut for scored in found)
        for metric, is_right in judged(item, pairs, found).items():
            right.setdefault(metric, []).append(is_right)
    notes = [task.note] if task.note else []
    if len(kept) < len(task.items):
        notes.append(f"{len(task.items) - len(kept)} items have characters the model does not know")
    if n_cut:
        notes.append(f"{n_cut} items did not fit and lost their beginning")
    names = tuple(item.name or item.pairs[item.gold or 0][0][-60:] for item in kept)
    return [
        accuracy(task.name, metric, answers, task.chance, note="; ".join(notes), items=names)
        for metric, answers in right.items()
    ]


def encoded(scorer, context, continuation):
    """The tokens of a pair, the context a document that begins."""
    before, after = scorer.encode_pair(context, continuation)
    return [scorer.tokenizer.eot, *before], after


def judged(item, pairs, found):
    """{metric: whether the item is right}; pairs: its tokens, found: their Scored."""
    if item.gold is None:
        return {"exact": found[0].is_greedy}
    sums = np.array([scored.log_prob for scored in found])
    characters = np.array([max(1, len(continuation.strip())) for _, continuation in item.pairs])
    scores = {
        "acc": sums,
        "acc_norm by characters": sums / characters,
        "acc_norm by tokens": means(item, pairs, found),
    }
    return {metric: int(score.argmax()) == item.gold for metric, score in scores.items()}


def means(item, pairs, found):
    """(options,) mean log probability of the tokens that count."""
    same = 0
    if item.from_difference:
        same = common_prefix([before + after for before, after in pairs])
    counted = []
    for (before, after), scored in zip(pairs, found):
        first = min(max(0, same - len(before)), len(after) - 1)
        counted.append(scored.log_probs[first:].mean())
    return np.array(counted)


def common_prefix(texts):
    """How many tokens all lists begin with."""
    for n, tokens in enumerate(zip(*texts)):
        if len(set(tokens)) > 1:
            return n
    return min(map(len, texts))
