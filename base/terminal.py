"""What may be shown on a terminal."""

import re
import sys

# All of ASCII's and Latin-1's but newline and tab
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text):
    """The text with control characters as \\x1b and the like, and lines that end in \\n.

    In text from elsewhere (a model's, a file's name) they could color or clear the screen, or hide
    what is wrong with a name.
    """
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text.replace("\r\n", "\n"))


def on_screen(pieces):
    """Yield text that comes in pieces as stdout may have it: as it is, but printable() on a
    terminal."""
    if not sys.stdout.isatty():
        yield from pieces
        return
    held = ""  # a \r, until it is known whether a \n follows
    for piece in pieces:
        text = held + piece
        held = "\r" if text.endswith("\r") else ""
        yield printable(text.removesuffix("\r"))
    yield printable(held)
