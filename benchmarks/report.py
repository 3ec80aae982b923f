"""What benchmarks say: progress on stderr, tables in Markdown, numbers that may be missing."""

import statistics
import sys


def say(message):
    """A line of progress, at once."""
    print(message, file=sys.stderr, flush=True)


def number(value, form=",.1f"):
    """The value in this format; a dash where there is none."""
    if value is None:
        return "–"
    return format(value, form)


def table(header, rows):
    """Markdown lines of a table from its column names and rows of cells."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in [header, *rows]]
    lines.insert(1, "|" + "---|" * len(header))
    return lines


def document(*blocks):
    """Markdown of blocks, each a text or a list of lines, with an empty line between them.

    Blocks that are empty or None are left out.
    """
    texts = []
    for block in blocks:
        text = block if isinstance(block, str) else "\n".join(block or ())
        if text:
            texts.append(text)
    return "\n\n".join(texts) + "\n"


def spread(values):
    """dict(median, least, most); None where there are no values, or one is missing."""
    values = list(values)
    if not values or None in values:
        return None
    return dict(median=statistics.median(values), least=min(values), most=max(values))


def bracketed(x, form):
    """A spread as "median [least, most]"; the median alone where all values are the same."""
    if x is None:
        return "–"
    median = format(x["median"], form)
    if x["least"] == x["most"]:
        return median
    return f"{median} [{x['least']:{form}}, {x['most']:{form}}]"
