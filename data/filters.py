"""Rules that say which documents are not worth training on, each by its name.

Gopher's are from Rae et al., https://arxiv.org/abs/2112.11446 (table A1 and its text), C4's from
Raffel et al., https://arxiv.org/abs/1910.10683 (section 2.2), FineWeb's from Penedo et al.,
https://arxiv.org/abs/2406.17557 (section 3.6); code's are those of the data of Chen et al.,
https://arxiv.org/abs/2107.03374 (section 3.1). Thresholds are the published ones unless a recipe
says otherwise.

A rule is a function of what is measured in a document, and of its thresholds; it is true where the
document goes. Words are what whitespace divides, without the punctuation around them; what is
punctuation only is no word.
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np

from base import InputError

FACTOR = np.uint64(0xD6E8FEB86659FD93)
PUNCTUATION = string.punctuation + "…‘’“”–—«»¡¿、。，？！：；（）【】「」《》"
TERMINAL = (".", "!", "?", '"', "'", "”", "’", "…", "。", "！", "？")
BULLETS = ("-", "*", "•", "●", "‣", "–", "◦", "▪")
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
POLICY = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
SENTENCE = re.compile(r"[.!?。！？]+[\"'”’)\]]*(?:\s|$)")
PARAGRAPH = re.compile(r"\n{2,}")


class Measures:
    """What rules ask of a text, each computed when it is first asked for."""

    def __init__(self, text):
        self.text = text

    @cached_property
    def words(self):
        stripped = [word.strip(PUNCTUATION) for word in self.text.split()]
        return [word for word in stripped if word]

    @cached_property
    def lines(self):
        """Those with something on them, without spaces around them."""
        stripped = [line.strip() for line in self.text.split("\n")]
        return [line for line in stripped if line]

    @cached_property
    def paragraphs(self):
        stripped = [paragraph.strip() for paragraph in PARAGRAPH.split(self.text)]
        return [paragraph for paragraph in stripped if paragraph]

    @cached_property
    def lower(self):
        return self.text.lower()

    def per_word(self, count):
        return count / max(1, len(self.words))

    def line_share(self, is_one):
        """The fraction of lines for which is_one(line) is true."""
        return sum(map(is_one, self.lines)) / max(1, len(self.lines))

    def top_ngram_share(self, n):
        """The fraction of characters that the most frequent n words in a row stand for."""
        words = self.words
        counts = Counter(zip(*(words[i:] for i in range(n))))
        if not counts:
            return 0.0
        most = max(counts.values())
        if most == 1:
            return 0.0
        longest = max(sum(map(len, gram)) for gram, count in counts.items() if count == most)
        return most * longest / max(1, self.word_chars)

    def repeated_ngram_share(self, n):
        """The fraction of characters in words that are part of n words in a row which have been
        there before; a word counts once."""
        if n > 1 and self.repeats.get(n - 1) is False:
            return 0.0  # what does not repeat in fewer words does not in more
        values = self.word_values
        count = max(0, len(values) - n + 1)
        # n words in a row are a number modulo 2^64; equal ones by chance in one of 10^9 documents
        hashes = np.zeros(count, dtype=np.uint64)
        for k in range(n):
            hashes *= FACTOR
            hashes += values[k : k + count]
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        again = order[1:][ordered[1:] == ordered[:-1]]  # where some begin that were there before
        self.repeats[n] = len(again) > 0
        if not len(again):
            return 0.0
        edges = np.zeros(len(values) + 1, dtype=np.int64)
        np.add.at(edges, again, 1)
        np.add.at(edges, again + n, -1)
        covered = np.cumsum(edges[:-1]) > 0
        return int(self.word_lengths[covered].sum()) / max(1, self.word_chars)

    @cached_property
    def repeats(self):
        """{n: whether some n words in a row are there twice}, as far as that has been asked."""
        return {}

    @cached_property
    def word_values(self):
        """A random number for each different word: (words,) uint64."""
        numbers = {}
        ids = [numbers.setdefault(word, len(numbers)) for word in self.words]
        values = np.random.default_rng(0).integers(0, 2**64, len(numbers), dtype=np.uint64)
        return values[np.array(ids, dtype=np.int64)]

    @cached_property
    def word_lengths(self):
        return np.array([len(word) for word in self.words], dtype=np.int64)

    @cached_property
    def word_chars(self):
        return sum(map(len, self.words))


def repeated_count(parts):
    """The fraction of parts that are there before."""
    return (len(parts) - len(set(parts))) / max(1, len(parts))


def repeated_chars(parts):
    """The fraction of characters in parts that are there before."""
    total = sum(map(len, parts))
    return (total - sum(map(len, set(parts)))) / max(1, total)


class Rule(NamedTuple):
    about: str
    thresholds: dict
    drops: Callable  # of (Measures, **thresholds); true where the document goes


def mean_word_length(m):
    return m.word_chars / max(1, len(m.words))


def mean_line_length(m):
    return sum(map(len, m.lines)) / max(1, len(m.lines))


def outside(value, least, most):
    return value < least or value > most


def is_text_of_code(m):
    return sum(c.isalnum() for c in m.text) / max(1, len(m.text))


RULES = {
    "length": Rule(
        "characters outside of bounds",
        dict(least=1, most=100_000_000),
        lambda m, least, most: outside(len(m.text), least, most),
    ),
    "words": Rule(
        "words outside of bounds",
        dict(least=1, most=100_000_000),
        lambda m, least, most: outside(len(m.words), least, most),
    ),
    "gopher_words": Rule(
        "words outside of bounds",
        dict(least=50, most=100_000),
        lambda m, least, most: outside(len(m.words), least, most),
    ),
    "gopher_word_length": Rule(
        "mean length of words outside of bounds",
        dict(least=3, most=10),
        lambda m, least, most: outside(mean_word_length(m), least, most),
    ),
    "gopher_symbols": Rule(
        "hash marks or ellipses for each word",
        dict(most=0.1),
        lambda m, most: (
            m.per_word(m.text.count("#")) > most
            or m.per_word(m.text.count("...") + m.text.count("…")) > most
        ),
    ),
    "gopher_bullets": Rule(
        "fraction of lines that begin with a bullet",
        dict(most=0.9),
        lambda m, most: m.line_share(lambda line: line.startswith(BULLETS)) > most,
    ),
    "gopher_ellipses": Rule(
        "fraction of lines that end with an ellipsis",
        dict(most=0.3),
        lambda m, most: m.line_share(lambda line: line.endswith(("...", "…"))) > most,
    ),
    "gopher_letters": Rule(
        "fraction of words with a letter in them",
        dict(least=0.8),
        lambda m, least: m.per_word(sum(any(map(str.isalpha, w)) for w in m.words)) < least,
    ),
    "gopher_stop_words": Rule(
        "different words among the, be, to, of, and, that, have, with: English only",
        dict(least=2),
        lambda m, least: len(STOP_WORDS.intersection(m.words)) < least,
    ),
    "gopher_repeated_lines": Rule(
        "fraction of lines that are there before, and of characters in them",
        dict(most=0.3, most_chars=0.2),
        lambda m, most, most_chars: (
            repeated_count(m.lines) > most or repeated_chars(m.lines) > most_chars
        ),
    ),
    "gopher_repeated_paragraphs": Rule(
        "the same of paragraphs",
        dict(most=0.3, most_chars=0.2),
        lambda m, most, most_chars: (
            repeated_count(m.paragraphs) > most or repeated_chars(m.paragraphs) > most_chars
        ),
    ),
    **{
        f"gopher_top_{n}_gram": Rule(
            f"fraction of characters in the most frequent {n} words in a row",
            dict(most=most),
            lambda m, most, n=n: m.top_ngram_share(n) > most,
        )
        for n, most in ((2, 0.20), (3, 0.18), (4, 0.16))
    },
    **{
        f"gopher_repeated_{n}_grams": Rule(
            f"fraction of characters in {n} words in a row that are there before",
            dict(most=most),
            lambda m, most, n=n: m.repeated_ngram_share(n) > most,
        )
        for n, most in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
    },
    "c4_lorem_ipsum": Rule("has lorem ipsum in it", {}, lambda m: "lorem ipsum" in m.lower),
    "c4_curly_bracket": Rule(
        "has a curly bracket: right for pages, wrong for code and formulas",
        {},
        lambda m: "{" in m.text,
    ),
    "c4_sentences": Rule(
        "fewer sentences",
        dict(least=5),
        lambda m, least: len(SENTENCE.findall(m.text)) < least,
    ),
    "fineweb_terminal": Rule(
        "fraction of lines that end with terminal punctuation",
        dict(least=0.12),
        lambda m, least: m.line_share(lambda line: line.endswith(TERMINAL)) < least,
    ),
    "fineweb_short_lines": Rule(
        "fraction of lines of so many characters at most",
        dict(most=0.67, chars=30),
        lambda m, most, chars: m.line_share(lambda line: len(line) <= chars) > most,
    ),
    "fineweb_repeated_lines": Rule(
        "fraction of characters in lines that are there before",
        dict(most=0.01),
        lambda m, most: repeated_chars(m.lines) > most,
    ),
    "fineweb_newlines": Rule(
        "line breaks for each word",
        dict(most=0.3),
        lambda m, most: m.per_word(m.text.count("\n")) > most,
    ),
    "code_mean_line": Rule(
        "mean length of lines", dict(most=100), lambda m, most: mean_line_length(m) > most
    ),
    "code_longest_line": Rule(
        "length of the longest line",
        dict(most=1000),
        lambda m, most: max(map(len, m.lines), default=0) > most,
    ),
    "code_alphanumeric": Rule(
        "fraction of characters that are letters or digits",
        dict(least=0.25),
        lambda m, least: is_text_of_code(m) < least,
    ),
}

# Rules that take lines away from a document rather than the document
LINE_RULES = {
    "c4_line_end": Rule(
        "lines without terminal punctuation: left out of FineWeb",
        {},
        lambda line: not line.rstrip().endswith(TERMINAL) or line.rstrip().endswith("..."),
    ),
    "c4_line_words": Rule(
        "lines of fewer words, or with a word of more characters",
        dict(least=3, chars=1000),
        lambda line, least, chars: (
            len(line.split()) < least or max(map(len, line.split()), default=0) > chars
        ),
    ),
    "c4_line_notices": Rule(
        "lines that name javascript, or a policy",
        {},
        lambda line: any(notice in line.lower() for notice in ("javascript", *POLICY)),
    ),
}

GOPHER_QUALITY = (
    "gopher_words",
    "gopher_word_length",
    "gopher_symbols",
    "gopher_bullets",
    "gopher_ellipses",
    "gopher_letters",
    "gopher_stop_words",
)
GOPHER_REPETITION = (
    "gopher_repeated_lines",
    "gopher_repeated_paragraphs",
    *(f"gopher_top_{n}_gram" for n in (2, 3, 4)),
    *(f"gopher_repeated_{n}_grams" for n in (5, 6, 7, 8, 9, 10)),
)
C4 = ("c4_line_words", "c4_line_notices", "c4_lorem_ipsum", "c4_curly_bracket", "c4_sentences")
FINEWEB = ("fineweb_terminal", "fineweb_short_lines", "fineweb_repeated_lines", "fineweb_newlines")
CODE = ("code_mean_line", "code_longest_line", "code_alphanumeric")

# What applies where a recipe names nothing else
PRESETS = {
    # Pages of the web, as FineWeb: without C4's rule for the ends of lines
    "web": (*GOPHER_REPETITION, *GOPHER_QUALITY, *C4, *FINEWEB),
    # Short texts: no minimum of 50 words, and few sentences are fine
    "stories": (
        "gopher_letters",
        "gopher_repeated_paragraphs",
        "gopher_top_2_gram",
        "c4_lorem_ipsum",
    ),
    # Programs repeat themselves and have brackets
    "code": CODE,
    # Books, encyclopedias, documentation: formulas and lists are fine, and any language
    "prose": (*GOPHER_REPETITION, "gopher_word_length", "gopher_symbols", "gopher_letters"),
    "none": (),
}


def rules_of(preset, changes):
    """{name of a rule: its thresholds} of a preset with the changes of a recipe: {name: true, false
    or thresholds}. Line rules come first. Raises InputError."""
    if preset and preset not in PRESETS:
        raise InputError(f"preset {preset}: {did_you_mean(preset, PRESETS)}")
    every = LINE_RULES | RULES
    chosen = {name: dict(every[name].thresholds) for name in PRESETS[preset or "none"]}
    for name, said in changes.items():
        if name not in every:
            raise InputError(f"filters: unknown rule {name}; {did_you_mean(name, every)}")
        if said is False:
            chosen.pop(name, None)
            continue
        thresholds = dict(every[name].thresholds)
        if said is not True and not isinstance(said, dict):
            raise InputError(f"filters: {name}: expected true, false or thresholds, found {said!r}")
        for key, value in (said if isinstance(said, dict) else {}).items():
            if key not in thresholds:
                known = ", ".join(thresholds) or "none: true or false"
                raise InputError(f"filters: {name} has no threshold {key}; expected of {known}")
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"filters: {name}: {key}: expected a number, found {value!r}")
            thresholds[key] = value
        chosen[name] = thresholds
    ordered = [name for name in every if name in chosen]
    return {name: chosen[name] for name in ordered}


def did_you_mean(name, valid):
    import difflib

    near = difflib.get_close_matches(name, valid, 1)
    return f"{f'did you mean {near[0]}? ' if near else ''}expected of {', '.join(valid)}"


def apply(text, rules):
    """What rules_of() has chosen, on a text: (text without the lines that went, name of the rule by
    which the document goes or None, {line rule: lines that went})."""
    lines_gone = {}
    chosen = [(name, rules[name]) for name in LINE_RULES if name in rules]
    if chosen:
        kept = []
        for line in text.split("\n"):
            why = None
            if line.strip():  # an empty one divides paragraphs
                why = next((n for n, t in chosen if LINE_RULES[n].drops(line, **t)), None)
            if why is None:
                kept.append(line)
            else:
                lines_gone[why] = lines_gone.get(why, 0) + 1
        if lines_gone:
            text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip("\n")

    measures = Measures(text)
    for name, thresholds in rules.items():
        if name in RULES and RULES[name].drops(measures, **thresholds):
            return text, name, lines_gone
    return text, None, lines_gone
