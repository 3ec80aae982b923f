"""./run.sh data: what can be done with data before training."""

import argparse
import sys

from base import InputError
from base.command import Parser, refuse

from . import sources


def main(argv=None):
    """Parse, run the command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return run(argv)
    except InputError as e:
        return refuse(e)


def run(argv):
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="./run.sh data",
        description="Prepare data ahead of time. Training does the same by itself when it begins.",
        epilog=list_of_sources(),
        formatter_class=layout,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
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
        can = [name for name in sources.names() if sources.find(name).download]
        raise InputError(
            f"{args.source}: there is nothing to download, training prepares it; expected one of: "
            f"{', '.join(can)}"
        )
    return source.download(args.options)


def list_of_sources():
    lines = ["sources, as --data takes them:"]
    for name in sources.names():
        source = sources.find(name)
        network = " (over the network)" if source.network else ""
        lines.append(f"  {name:12}{source.about}{network}")
    return "\n".join(lines)
