"""Text put right before it is judged: encodings repaired, one kind of newline, no control
characters.

ftfy repairs what was decoded in the wrong encoding and joined letters that belong together (NFC).
It is asked line by line, and only for lines that are not ASCII: there is nothing to repair in
others, and it reads about a megabyte a second. Quotes, ligatures and wide letters stay as they are,
since they are the author's; entities such as &amp; stay because programs and pages about HTML have
them on purpose.
"""

import re
import unicodedata
from functools import cache

from .sources import Document

# Of C0 and C1 all but newline and tab; the byte-order mark inside text; what is no character
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\ufeff\ufff9-\ufffb\ud800-\udfff]")
NEWLINES = re.compile(r"\r\n|[\r\u2028\u2029\x0b\x0c\x85]")
EMPTY_LINES = re.compile(r"\n{4,}")
ROUNDS = 4  # of repair at most; nearly all texts are the same after one

FTFY = dict(  # what the manifest says of it
    unescape_html=False,
    remove_terminal_escapes=True,
    fix_encoding=True,
    restore_byte_a0=True,
    replace_lossy_sequences=True,
    decode_inconsistent_utf8=True,
    fix_c1_controls=True,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    fix_surrogates=True,
    remove_control_chars=False,
    normalization="NFC",
)


@cache
def ftfy_config():
    import ftfy

    return ftfy.TextFixerConfig(**FTFY)


def clean(text):
    """The text put right; the same again for what comes out. Never raises."""
    for _ in range(ROUNDS):
        before = text
        text = once(text)
        if text == before:
            break
    return text


def once(text):
    text = NEWLINES.sub("\n", text)
    if not text.isascii():
        lines = text.split("\n")
        text = "\n".join(line if line.isascii() else repaired(line) for line in lines)
        text = NEWLINES.sub("\n", text)  # a repair may have brought one to light
    text = CONTROL.sub("", text)
    text = "\n".join([line.rstrip(" \t\xa0") for line in text.split("\n")])
    return EMPTY_LINES.sub("\n\n\n", text).strip("\n")


def repaired(line):
    import ftfy

    try:
        return ftfy.fix_text(line, ftfy_config())
    except Exception:  # whatever it comes upon, the line is better left as it is
        return unicodedata.normalize("NFC", line)


# --------------------------------------------------------------------------------------------------
# WikiText

TITLE = re.compile(r" ?= ([^=]|[^=].*[^=]) = ?")  # a level deeper is " = = Section = = "
MARKS = [
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r" ([.,;:!?%)\]}])"), r"\1"),
    (re.compile(r"([(\[{$£€]) "), r"\1"),
    (re.compile(r" (n't|'s|'re|'ve|'d|'ll|'m)\b"), r"\1"),
    (re.compile(r'" ([^"\n]*) "'), r'"\1"'),
]


def join_rows(documents):
    """Documents of one line each -> whole articles: a new one begins at each heading ` = Title = `
    between empty lines."""
    lines = []
    first = None
    title = None
    empty = True  # the line before
    for document in documents:
        for line in document.text.split("\n"):
            heading = TITLE.fullmatch(line) if empty else None
            if heading and any(lines):
                yield article(lines, first, title)
                lines = []
                first = None
            if heading:
                title = line.strip(" =")
            first = first or document
            lines.append(line)
            empty = not line.strip()
    if any(line.strip() for line in lines):
        yield article(lines, first, title)


def article(lines, first, title):
    about = first.about | (dict(title=title) if title else {})
    return Document("\n".join(lines), first.id, about)


def without_marks(text):
    """WikiText as it would be written: `1 @,@ 000 men , of` -> `1,000 men, of`."""
    for pattern, to in MARKS:
        text = pattern.sub(to, text)
    return text


# --------------------------------------------------------------------------------------------------
# Language


@cache
def identifier():
    from py3langid import langid

    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


LANGUAGE_CHARS = 500  # from the middle of a text: a page begins with menus
LEAST_CHARS = 50  # a guess from fewer is not worth anything


def language_of(text):
    """The language of a text as ISO 639-1 such as "en"; empty if it is too short to tell."""
    if len(text) < LEAST_CHARS:
        return ""
    begin = max(0, len(text) // 2 - LANGUAGE_CHARS // 2)
    return identifier().classify(text[begin : begin + LANGUAGE_CHARS])[0]
