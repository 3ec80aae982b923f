"""./run.sh data where: which documents of a corpus hold a string.

It answers "did it see this?" for a corpus that was built, and for a run that was trained on one, or
on text files that still are where they were. Spaces and line ends count as one space, since
cleaning and people write them differently.
"""

import argparse
import functools
import json
import re
from pathlib import Path

from base import InputError, to_json
from base.command import Parser, given_path

from .built import read_manifest
from .encodings import texts
from .pieces import progress, read_lines, say, workers
from .sources import is_built

AROUND = 60  # characters shown on both sides


def main(argv):
    """`./run.sh data where`. Returns the exit status; raises InputError."""
    parser = Parser(
        prog="./run.sh data where",
        description="Find the documents of a corpus that hold a string: a line of JSON for each, "
        "with its source, id, licence and split, and one with their number.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", required=True, help="what to look for")
    parser.add_argument("--run", type=given_path, help="the folder of a run: what it trained on")
    parser.add_argument("--data", type=given_path, metavar="DIR", help="a corpus that was built")
    parser.add_argument("--any-case", action="store_true", help="capitals count as small letters")
    parser.add_argument("--most", type=int, default=20, metavar="N", help="lines [%(default)s]")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="[%(default)s]")
    args = parser.parse_args(argv)
    if (args.run is None) == (args.data is None):
        raise InputError("data where: expected --run or --data, one of them")
    if not args.text.strip():
        raise InputError("--text: expected something to look for, found nothing")
    wanted = normal(args.text, args.any_case)

    found = 0
    with workers(args.processes) as crew:
        places = places_of(args.data) if args.data else places_of_run(args.run)
        hits = crew.map(search, [(*place, wanted, args.any_case) for place in places])
        for hit in progress(hits, "searching", " pieces", len(places)):
            for line in hit:
                found += 1
                if found <= args.most:
                    print(to_json(line, ensure_ascii=False))
    if found > args.most:
        say(f"and {found - args.most} more; --most {found} shows them")
    print(to_json(dict(found=found, text=args.text)))
    return 0


def normal(text, any_case):
    text = " ".join(text.split())
    return text.lower() if any_case else text


def places_of(folder):
    """[(kind, what search() reads)] of a built corpus. Raises InputError."""
    read_manifest(folder)
    files = sorted((folder / "text").glob("*.jsonl.zst"))
    if not files:
        raise InputError(f"{folder / 'text'}: the text of this corpus is gone; build it again")
    return [("built", path, {}) for path in files]


def places_of_run(run):
    """The same of what a run trained on. Raises InputError."""
    try:
        said = json.loads((run / "data.json").read_bytes())
        config = json.loads((run / "config.json").read_bytes())
    except (OSError, ValueError) as e:
        raise InputError(f"{run}: not the folder of a run: {e}") from None
    folder = Path(said.get("folder") or config.get("data", ""))
    if is_built(str(folder)):
        if read_manifest(folder)["fingerprint"] != said["fingerprint"]:
            raise InputError(f"{folder}: was built anew since {run} trained on it")
        return places_of(folder)
    if config.get("data") != "text":
        raise InputError(f"{run}: trained on {config.get('data')}, whose text is not at hand")
    root = Path(config["text"])
    root = root.parent if root.is_file() else root
    encodings = dict(said.get("encodings", []))
    splits = {}
    for split, rel, *_ in said["parts"]:
        splits.setdefault(rel, []).append(split)
    places = []
    for rel, its in splits.items():
        about = dict(id=rel, split="train and val" if len(set(its)) > 1 else its[0])
        about["encoding"] = encodings.get(rel, "utf-8")
        if (root / rel).is_file():
            places.append(("file", root / rel, about))
        else:
            say(f"{root / rel}: is gone, and left out")
    return places


def search(kind, path, about, wanted, any_case):
    """[what is known of each document that holds the text] of a file."""
    hits = []
    for line in lines_of(kind, path, about):
        text = line.pop("text")
        # Most documents lack the first word already
        if first_word(wanted, any_case).search(text) is None:
            continue
        text = normal(text, any_case)
        at = text.find(wanted)
        if at >= 0:
            shown = text[max(0, at - AROUND) : at + len(wanted) + AROUND]
            hits.append(line | dict(at=at, times=text.count(wanted), text=shown))
    return hits


def lines_of(kind, path, about):
    if kind == "built":
        yield from read_lines(path)
    else:
        text = "".join(texts(path, about["encoding"]))
        yield dict(text=text, id=about["id"], split=about["split"])


@functools.cache
def first_word(wanted, any_case):
    return re.compile(re.escape(wanted.split(" ")[0]), re.IGNORECASE if any_case else 0)
