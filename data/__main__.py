"""./run.sh data: text into tokens, and what can be done with data before training."""

import argparse
import importlib
import sys

from base import InputError
from base.command import Parser, refuse

from . import sources

# Command -> (module with its main(argv), a line for --help)
COMMANDS = {
    "build": ("data.build", "text from any number of sources, cleaned, into tokens to train on"),
    "tokenizer": ("data.tokenizer_command", "learn a vocabulary, or compare tokenizers on a text"),
    "where": ("data.where", "which documents of a corpus hold a string"),
    "stats": ("data.stats", "what is in a corpus that was built"),
    "mix-search": ("data.mix_search", "short trainings over a few ratios of a mix"),
}


def main(argv=None):
    """Parse, run the command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in COMMANDS:
            module, _ = COMMANDS[argv[0]]
            return importlib.import_module(module).main(argv[1:])
        return run(argv)
    except InputError as e:
        return refuse(e)


def run(argv):
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="./run.sh data",
        description="Make data for training out of text, or fetch it ahead of time.",
        epilog=list_of_sources(),
        formatter_class=layout,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, about) in COMMANDS.items():
        commands.add_parser(name, help=about)
    download = commands.add_parser(
        "download",
        help="fetch a source over the network",
        description="Fetch a source over the network ahead of time: its shards are in the cache "
        "when training begins.\n./run.sh data download SOURCE --help lists the source's options.",
        epilog=list_of_sources(),
        formatter_class=layout,
    )
    download.add_argument("source", metavar="SOURCE", help="what to fetch, one of those below")
    download.add_argument("options", nargs=argparse.REMAINDER, help="options of the source")

    args = parser.parse_args(argv)
    source = sources.find(args.source)
    if source.download is None:
        can = [name for name in sources.trainable() if sources.find(name).download]
        raise InputError(
            f"{args.source}: there is nothing to download, training prepares it; expected one of: "
            f"{', '.join(can)}"
        )
    return source.download(args.options)


def list_of_sources():
    lines = ["sources, as --data takes them:"]
    for name in sources.trainable():
        source = sources.find(name)
        network = " (over the network)" if source.network else ""
        lines.append(f"  {name:12}{source.about}{network}")
    lines.append("and what ./run.sh data build has made, by its folder")
    return "\n".join(lines)
