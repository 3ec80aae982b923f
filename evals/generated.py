"""Tasks that are made here and need no download, from held-out text and from numbers.

They say whether a model has learned what it should, in steps finer than public benchmarks have for
small models. They are no public benchmark, and are labelled "generated".
"""

import random
import re

from .items import Item, Task

NOTE = "generated"
CONTEXT = 32  # words that are shown of a text
ANSWER = 6  # and that are to be recognised
MANY = 20  # items, below which a text is too short for a task
WORD = re.compile(r"\s*\S+")  # with the space before it


def continuation(documents, n, seed=0):
    """Which of four continuations of held-out text is the true one? The others are from elsewhere
    in it, of as many words."""
    r = random.Random(seed)
    pieces = passages(documents, CONTEXT + ANSWER, n, r)
    items = []
    for i, piece in enumerate(pieces):
        answers = [piece[CONTEXT:], *elsewhere(pieces, i, CONTEXT, r)]
        items.append(choice(piece[:CONTEXT], answers, r))
    return Task("continuation", items, 0.25, NOTE)


def order(documents, n, seed=0):
    """Which of four orders of the same words is the true one? The others are shuffled."""
    r = random.Random(seed)
    items = []
    for piece in passages(documents, CONTEXT + ANSWER, n, r):
        true = piece[CONTEXT:]
        if len(set(true)) > 2:  # else there are not four orders
            orders = {tuple(true): None}
            while len(orders) < 4:
                orders[tuple(r.sample(true, ANSWER))] = None
            items.append(choice(piece[:CONTEXT], orders, r))
    return Task("order", items, 0.25, NOTE)


def repeat(documents, n, seed=0):
    """A passage stands twice, the second time up to its last words: which of four ends is it?"""
    r = random.Random(seed)
    half = CONTEXT // 2
    pieces = passages(documents, half + ANSWER, n, r)
    items = []
    for i, piece in enumerate(pieces):
        answers = [piece[half:], *elsewhere(pieces, i, half, r)]
        items.append(choice([*piece, "\n", *piece[:half]], answers, r))
    return Task("repeat", items, 0.25, NOTE)


def arithmetic(documents, n, seed=0):
    """Sums of two numbers below 100, after three solved ones: which of four results is it?"""
    r = random.Random(seed)
    items = []
    for _ in range(n):
        sums = [(r.randrange(100), r.randrange(100)) for _ in range(4)]
        before = "".join(f"{a} + {b} = {a + b}\n" for a, b in sums[:3])
        a, b = sums[3]
        wrong = r.sample([x for x in range(a + b - 12, a + b + 13) if x >= 0 and x != a + b], 3)
        options = [f" {x}" for x in (a + b, *wrong)]
        items.append(shuffled(f"{before}{a} + {b} =", options, r))
    return Task("arithmetic", items, 0.25, NOTE)


TASKS = {f.__name__: f for f in (continuation, order, repeat, arithmetic)}


def passages(documents, length, n, r):
    """About n lists of so many words from all over the documents, none of them overlapping."""
    found = []
    for text in documents:
        words = WORD.findall(text)
        found += [words[at : at + length] for at in range(0, len(words) - length + 1, length)]
    r.shuffle(found)
    return found[:n]


def elsewhere(pieces, i, begin, r):
    """The ends of three other pieces; fewer where there are not so many."""
    others = [p[begin:] for p in pieces[:i] + pieces[i + 1 :]]
    return r.sample(others, min(3, len(others)))


def choice(context, answers, r):
    """An Item of lists of words, the first of the answers being the true one."""
    return shuffled("".join(context), ["".join(answer) for answer in answers], r)


def shuffled(context, options, r):
    """An Item whose first option is right, in an order of its own."""
    order = r.sample(range(len(options)), len(options))
    return Item(tuple((context, options[i]) for i in order), order.index(0))
