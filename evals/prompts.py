"""Prompts with checks: what a model should prefer, know and write, item by item.

A file has a JSON object on each line, with a name of what it checks and one of

    {"check": "grammar", "prompt": "The cats", "good": " are asleep.", "bad": " is asleep."}
    {"check": "facts", "prompt": "The capital of France is", "expect": ["Paris"]}
    {"check": "coherence", "prompt": "Once upon a time"}

A pair passes where the good continuation has the higher log probability: a model prefers it,
whatever it would write. What is expected passes where one of the words stands in the first 12
tokens that the model writes greedily. Free text of 60 tokens passes where it is coherent by three
simple rules: at most a fifth of its words repeat the four before them, no line comes three times,
and at least nine in ten of its words stand in the run's held-out text.
"""

import json
import re
from pathlib import Path

from base import InputError
from base.places import cache_folder
from inference.engine import Engine, Request
from inference.sampling import Sampling, default_sampling
from kernels.drawing import Drawing

from .items import encoded
from .results import accuracy

FOLDER = Path(__file__).parent / "prompts"
FACT_TOKENS = 12
FREE_TOKENS = 60
MOST_REPEATED = 0.2  # of the words, in a row of five that stood there before
LEAST_KNOWN = 0.9  # of the words
WORD = re.compile(r"\w+")


def read_prompts(path):
    """[(check, object)] of a file, or of one of ours by its name. Raises InputError."""
    path = Path(path)
    if not path.exists() and (FOLDER / f"{path}.jsonl").exists():
        path = FOLDER / f"{path}.jsonl"
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as e:
        raise InputError(
            f"--prompts {path}: {getattr(e, 'strerror', None) or e}; expected a file of JSON "
            f"lines, or one of {', '.join(own_sets())}"
        ) from None
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            fine = isinstance(row["prompt"], str) and isinstance(row["check"], str)
            pair = isinstance(row.get("good"), str) and isinstance(row.get("bad"), str)
            words = row.get("expect", [])
            fine = fine and (pair or "good" not in row) and all(isinstance(w, str) for w in words)
        except (ValueError, KeyError, TypeError):
            fine = False
        if not fine:
            raise InputError(
                f"{path}:{n}: expected an object with check, prompt, and good and bad, or expect, "
                "or neither"
            )
        found.append(row)
    if not found:
        raise InputError(f"{path}: is empty; expected a JSON object on each line")
    return found


def own_sets():
    return sorted(path.stem for path in FOLDER.glob("*.jsonl"))


def measure_prompts(scorer, saved, rows, known, seed=0):
    """A Measure for each check. known: words of held-out text."""
    passed = {}  # check -> [(name, whether it passes)]
    compiled = Drawing.build(cache_folder())
    engine = Engine(saved.model, saved.stage, saved.tokenizer, saved.max_len, drawing=compiled)
    for row in rows:
        try:
            ok = passes(scorer, engine, saved.tokenizer, row, known, seed)
        except InputError:  # characters that the tokenizer does not know
            continue
        passed.setdefault(row["check"], []).append((row["prompt"] + row.get("good", ""), ok))
    return [
        accuracy(
            "prompts",
            check,
            [ok for _, ok in items],
            None,
            unit="prompts",
            items=tuple(name for name, _ in items),
        )
        for check, items in passed.items()
    ]


def passes(scorer, engine, tokenizer, row, known, seed):
    """Whether the model passes. Raises InputError for text that it does not know."""
    prompt = row["prompt"]
    if "good" in row:
        pairs = [encoded(scorer, prompt, row[which]) for which in ("good", "bad")]
        good, bad = scorer.continuations(pairs)
        return good.log_prob > bad.log_prob
    if "expect" in row:
        request = Request(prompt, FACT_TOKENS, Sampling(temperature=0.0))
        [done] = engine.generate([request])
        return any(word in done.text for word in row["expect"])
    request = Request(prompt, FREE_TOKENS, default_sampling(tokenizer), seed)
    [done] = engine.generate([request])
    return is_coherent(done.text, known)


def is_coherent(text, known):
    """Whether a text of a model's passes three rules; known: a set of words."""
    words = [word.lower() for word in WORD.findall(text)]
    if not words:
        return False
    seen = set()
    repeated = 0
    for i in range(4, len(words)):
        five = tuple(words[i - 4 : i + 1])
        repeated += five in seen
        seen.add(five)
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 3]
    thrice = any(lines.count(line) > 2 for line in set(lines))
    share = sum(word in known for word in words) / len(words)
    return repeated <= MOST_REPEATED * len(words) and not thrice and share >= LEAST_KNOWN


def known_words(documents):
    """The words of texts."""
    return {word.lower() for text in documents for word in WORD.findall(text)}
