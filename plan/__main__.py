"""What a training run will take and reach, before its first step.

    ./run.sh plan --track gpt2-small --hardware 8xh100
    ./run.sh plan --track laptop --tokens 20:1 --json
    ./run.sh plan --chart ladder.svg --hardware 8xh100
    ./run.sh plan --check          published runs beside what would have been planned
    ./run.sh plan ladder --help    the runs that losses are predicted from

Other options are the trainer's own: ./run.sh train --help. docs/planning.md says how the numbers
come about and how far they were off.
"""

import argparse
import sys
from pathlib import Path

from base import InputError, to_json
from base.command import Parser, given_path, refuse

from . import estimate, ladder, report


def main(argv=None):
    """Print a plan. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["ladder"]:
        return ladder.main(argv[1:])
    parser = Parser(
        prog="./run.sh plan",
        description=__doc__,
        usage="./run.sh plan [--OPTION VALUE ...]",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
    )
    parser.add_argument("--hardware", metavar="NAME", help="such as h100 or 8xh100 [this machine]")
    parser.add_argument(
        "--tokens",
        default="track",
        metavar="RULE",
        help="20:1 or 100:1 (to parameters), a number such as 2.5B, or track: its schedule [track]",
    )
    parser.add_argument("--data", metavar="DIR", help="prepared tokens, or a source of the trainer")
    parser.add_argument("--vocab", type=int, metavar="N", help="tokens in the vocabulary")
    parser.add_argument("--usd-per-hour", type=float, metavar="X", help="price of one device")
    parser.add_argument("--watts", type=float, metavar="X", help="what one device takes at load")
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    parser.add_argument(
        "--chart", type=given_path, metavar="FILE", help="cost against loss over the ladder"
    )
    parser.add_argument(
        "--torchtitan", type=given_path, metavar="FILE", help="a configuration of torchtitan for it"
    )
    parser.add_argument("--check", action="store_true", help="published runs beside their plans")
    try:
        args, options = parser.parse_known_args(argv)
        for name in ("vocab", "usd_per_hour", "watts"):
            value = getattr(args, name)
            if value is not None and not 0 < value < 1e12:
                option = name.replace("_", "-")
                raise InputError(f"--{option} {value}: expected a number above 0")
        return run(args, options)
    except InputError as e:
        return refuse(e)


def run(args, options):
    """Do what the options ask for. Returns the exit status. Raises InputError."""
    if args.check:
        from . import published

        rows = published.compare()
        print(to_json(rows) if args.json else "\n".join(published.table(rows)))
        return 0
    data = None
    if args.data and Path(args.data).is_dir():
        data = estimate.read_data(args.data)
    elif args.data:
        options = ["--data", args.data, *options]
    place = estimate.place_of(args.hardware)
    own = dict(usd=args.usd_per_hour, watts=args.watts)
    if args.chart:
        from . import chart

        chart.draw(args.chart, place, args.tokens, options, data, own)
        return 0
    config = estimate.configured(options)
    plan = estimate.make_plan(config, place, args.tokens, data, args.vocab, **own)
    if args.torchtitan:
        from . import torchtitan

        torchtitan.write(args.torchtitan, config, plan, place)
    print(to_json(plan) if args.json else "\n".join(report.in_words(plan)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
