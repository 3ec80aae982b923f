"""./run.sh data tokenizer: learn a vocabulary from text, and compare tokenizers on a text."""

import argparse
import time
from pathlib import Path

from base import InputError, to_json, write_text
from base.command import Parser, given_path
from base.places import cache_folder

from . import reading, tokenizer_report
from .pieces import progress, say
from .recipe import Part
from .tokenizer_report import COMPARED_WITH
from .tokenizers import MOST_QWEN2, SPECIALS, make_tokenizer, train_qwen2

LEARNED = 200_000_000  # bytes: a vocabulary settles long before this much text
COMPARED = 20_000_000
CHUNK = 10_000  # characters; every tenth chunk of the text is measured, the others are learned from
DEFAULT = ("qwen2:4096", "qwen2:16384", "qwen2:32768", COMPARED_WITH)


def main(argv):
    """`./run.sh data tokenizer`. Returns the exit status; raises InputError."""
    args = command_line().parse_args(argv)
    return args.function(args)


def command_line():
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="./run.sh data tokenizer",
        description="Learn a vocabulary from text, or compare tokenizers on a text.\n"
        "TEXT is a file or folder: text, JSON lines, parquet, compressed or not.",
        epilog="docs/tokenizers.md says what the numbers mean.",
        formatter_class=layout,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    learn = commands.add_parser(
        "train",
        help="learn a vocabulary of exactly so many ids",
        description="Learn a byte-level BPE from text and write its tokenizer.json, as "
        "--tokenizer FILE takes it, and\nother programs read it: Qwen2's split, no normaliser, "
        f"and {len(SPECIALS)} special ids last:\n{' '.join(SPECIALS)}",
        formatter_class=layout,
    )
    learn.add_argument("--size", type=int, required=True, metavar="N", help="ids in all")
    learn.add_argument("--out", type=given_path, required=True, metavar="FILE", help="its file")
    learn.set_defaults(function=train)

    compare = commands.add_parser(
        "report",
        help="how many bytes a token stands for, and how text is cut",
        description="Compare tokenizers on a text. Those with a size learn from nine tenths of it; "
        "all are measured on the rest.",
        formatter_class=layout,
    )
    compare.add_argument(
        "--tokenizers",
        nargs="+",
        default=DEFAULT,
        metavar="NAME",
        help="as --tokenizer takes them: qwen2:N, bpe:N, gpt2, a tokenizer.json, OWNER/NAME on the "
        f"hub [{' '.join(DEFAULT)}]",
    )
    compare.set_defaults(function=report)
    for command, most in ((learn, LEARNED), (compare, COMPARED)):
        command.add_argument("text", nargs="+", metavar="TEXT", help="a file or folder")
        command.add_argument("--column", metavar="NAME", help="the field with the text [text]")
        command.add_argument(
            "--bytes", type=int, default=most, metavar="N", help="of text at most [%(default)s]"
        )
    return parser


def texts_of(args):
    """Yield (TEXT, text of a document), up to --bytes for each TEXT. Raises InputError."""
    for path in args.text:
        part = Part(name=path, path=path, column=args.column)
        size = 0
        files = reading.locate(part, Path(cache_folder()) / "data")
        for document in progress(reading.documents(part, files), f"reading {path}", " documents"):
            yield path, document.text
            size += len(document.text.encode(errors="replace"))
            if size >= args.bytes:
                break


# --------------------------------------------------------------------------------------------------
# train


def train(args):
    least = 256 + len(SPECIALS)
    if not least <= args.size <= MOST_QWEN2:
        raise InputError(f"--size {args.size}: expected {least} to {MOST_QWEN2}")
    if not args.out.parent.is_dir():
        raise InputError(f"--out {args.out}: there is no folder {args.out.parent}; make it first")
    began = time.perf_counter()
    size = 0

    def texts():
        nonlocal size
        for _, text in texts_of(args):
            size += len(text.encode(errors="replace"))
            yield text
        say(f"merging pairs of {size:,} bytes")

    tokenizer = train_qwen2(texts(), args.size)
    if not size:
        raise InputError(f"{' '.join(args.text)}: no text to learn from")
    if tokenizer.n_vocab < args.size:
        raise InputError(
            f"--size {args.size}: this text has pairs for {tokenizer.n_vocab} ids only; give more "
            f"text, or --size {tokenizer.n_vocab} or less"
        )
    try:
        write_text(args.out, tokenizer.to_json())
    except OSError as e:
        raise InputError(f"--out {args.out}: cannot be written: {e.strerror or e}") from None
    said = dict(
        tokenizer=str(args.out),
        n_vocab=tokenizer.n_vocab,
        specials=tokenizer.specials,
        bytes=size,
        seconds=round(time.perf_counter() - began, 2),
    )
    print(to_json(said))
    return 0


def report(args):
    learned = []
    measured = {}  # TEXT -> chunks
    number = 0
    for path, text in texts_of(args):
        for chunk in chunks(text):
            number += 1
            if number % 10:
                learned.append(chunk)
            else:
                measured.setdefault(path, []).append(chunk)
    if not measured:
        raise InputError(
            f"{' '.join(args.text)}: {number} parts of {CHUNK:,} characters; expected ten or more "
            "to compare tokenizers on one in ten"
        )
    tokenizers = {}
    for name in dict.fromkeys(args.tokenizers):
        say(f"{name} ...")
        try:
            tokenizers[name] = make_tokenizer(name, lambda: iter(learned))
        except InputError as e:
            if name != COMPARED_WITH:
                raise
            say(f"note: without {name}: {e}")
    if not tokenizers:
        raise InputError("--tokenizers: none is at hand; expected one such as qwen2:8192")
    print(tokenizer_report.as_text(tokenizers, learned, measured))
    return 0


def chunks(text):
    """Yield parts of a text of about CHUNK characters, cut after line ends where there are any."""
    while text:
        end = len(text)
        if end > CHUNK:
            end = text.rfind("\n", 0, CHUNK) + 1 or CHUNK
        yield text[:end]
        text = text[end:]
