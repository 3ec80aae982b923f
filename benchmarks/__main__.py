"""Benchmarks, by name. The result is one JSON object on stdout (or in --json FILE); progress goes to stderr.

    python -m benchmarks loader
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import benchmarks.loader
from records import describe_environment

BENCHMARKS = {"loader": benchmarks.loader.run}


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result here instead of stdout")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = dict(benchmark=args.name, environment=describe_environment(device), **BENCHMARKS[args.name]())
    text = json.dumps(result, indent=1)
    args.json.write_text(text + "\n") if args.json else print(text)


if __name__ == "__main__":
    sys.exit(main())
