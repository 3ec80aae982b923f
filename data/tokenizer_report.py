"""What tokenizers make of a text, side by side: the report of ./run.sh data tokenizer."""

import re

import numpy as np

COMPARED_WITH = "gpt2"
WORTH = 0.15  # of the tokens, that a tokenizer of one's own has to save
# What shows how a tokenizer cuts
SAMPLES = (
    ("numbers", "In 2026, 1234567 + 89 = 3.14e-5"),
    ("punctuation", 'Wait... what?! (Yes); "no" -- it\'s'),
    ("code", "def area(r):\n    return 3.14 * r ** 2  # camelCase, snake_case\n"),
    ("accents", "déjà vu, naïveté, Übergröße"),
    ("Russian", "Привет, как дела?"),
    ("Arabic", "مرحبا بالعالم"),
    ("Hindi", "नमस्ते दुनिया"),
    ("Chinese", "你好，世界"),
    ("Japanese", "こんにちは世界"),
    ("emoji", "👍🏽 🙂"),
)


def as_text(tokenizers, learned, measured):
    """The report. tokenizers: {name: Tokenizer}; learned, measured: texts, measured by source."""
    rows = {name: count(tok, learned, measured) for name, tok in tokenizers.items()}
    n_bytes = sum(map(size_of, [*learned, *sum(measured.values(), [])]))
    parts = [
        f"{n_bytes:,} bytes of text; learned from nine tenths, measured on the rest",
        table_of(rows, measured),
        *(f"{name}: {line}" for name, row in rows.items() for line in remarks(row)),
        "",
        *comparisons(rows),
    ]
    for what, sample in SAMPLES:
        parts += ["", f"{what}: {sample!r}"]
        for name, tokenizer in tokenizers.items():
            pieces = cut(tokenizer, sample)
            parts.append(f"  {name:16}{len(pieces):4}  {'|'.join(pieces)}")
    return "\n".join(parts)


def size_of(text):
    return len(text.encode())


def count(tokenizer, learned, measured):
    """{what: number} of a tokenizer on texts."""
    used = np.zeros(tokenizer.n_vocab, dtype=bool)
    tokens = {}  # source -> in what is measured
    for source, texts in measured.items():
        arrays = tokenizer.encode(texts)
        tokens[source] = sum(map(len, arrays))
        for ids in arrays:
            used[ids] = True
    n_text = tokenizer.n_vocab - len(tokenizer.specials)  # ids that stand for text
    unused = n_text - int(used.sum())
    n_tokens = sum(tokens.values())
    n_learned = 0
    for ids in tokenizer.encode(learned):
        used[ids] = True
        n_learned += len(ids)
    every = sum(measured.values(), [])
    return dict(
        n_vocab=tokenizer.n_vocab,
        bytes_per_token={s: sum(map(size_of, t)) / tokens[s] for s, t in measured.items()},
        overall=sum(map(size_of, every)) / n_tokens,
        tokens_per_word=n_tokens / max(1, sum(len(text.split()) for text in every)),
        n_text=n_text,
        unused=unused,
        never=n_text - int(used.sum()),
        tokens=n_tokens,
        all_tokens=n_tokens + n_learned,
    )


def table_of(rows, measured):
    """The numbers in columns."""
    sources = [*measured] if len(measured) > 1 else []
    head = ["tokenizer", "ids", "bytes/token", "tokens/word", "unused in the tenth", "in all"]
    lines = [head + [f"bytes/token of {source}" for source in sources]]
    for name, row in rows.items():
        lines.append(
            [
                name,
                f"{row['n_vocab']:,}",
                f"{row['overall']:.3f}",
                f"{row['tokens_per_word']:.2f}",
                f"{row['unused'] / row['n_text']:.1%}",
                f"{row['never'] / row['n_text']:.1%}",
                *(f"{row['bytes_per_token'][source]:.3f}" for source in sources),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))])
        for line in lines
    )


def remarks(row):
    """Lines about one tokenizer's size beside the text's."""
    n_vocab = row["n_vocab"]
    tokens = row["all_tokens"]
    if n_vocab**2 > tokens:
        yield (
            f"{n_vocab:,} ids squared are {n_vocab**2:.2g}, more than this text's {tokens:.2g} "
            f"tokens: an id occurs {tokens / n_vocab:,.0f} times on average. If this is all there "
            f"is to train on, a rule of thumb takes the root at most, {tokens**0.5:,.0f} ids"
        )
    if row["never"]:
        yield f"{row['never']:,} ids never occur in this text: what they stand for is not learned"


def comparisons(rows):
    """Lines about what a tokenizer of one's own saves, beside GPT-2's or the first ready-made one
    that is there."""
    ready = [COMPARED_WITH, *(name for name in rows if not re.fullmatch(r"\w+:\d+", name))]
    base = next((name for name in ready if name in rows), None)
    if base is None:
        yield f"{COMPARED_WITH} is not at hand, to say what a tokenizer of one's own saves"
        return
    for name, row in rows.items():
        if name == base:
            continue
        saved = 1 - row["tokens"] / rows[base]["tokens"]
        what = f"{saved:.1%} fewer" if saved >= 0 else f"{-saved:.1%} more"
        worth = "worth it" if saved > WORTH else "not worth it by itself"
        yield (
            f"{name} takes {what} tokens than {base} on this text: a tokenizer of one's own is "
            f"{worth} (the rule: more than {WORTH:.0%} fewer)"
        )


def cut(tokenizer, text):
    """The pieces that a tokenizer cuts a text into, as they can be shown: a dot for one that is
    only a part of a character."""
    pieces = []
    for i in tokenizer.encode([text])[0].tolist():
        token = tokenizer.tokens[i]
        if isinstance(token, bytes):
            token = token.decode(errors="replace").replace("\ufffd", "·")
        pieces.append(token.replace("\n", "\\n").replace("\t", "\\t"))
    return pieces
