"""./run.sh data build: from sources to tokens, a stage at a time.

    sources       which files there are, and their checksums
    read          documents, cleaned and filtered; keys and signatures for the next stage
    dedup         of documents that are alike one stays; what is for validation
    decontaminate what a model is judged by is not trained on
    tokenizer     learned from the training split, or taken as it is
    encode        tokens of what is kept
    mix           shards, in an order that has the mix in every part of it

Each stage has a folder in OUT/work whose name has a hash of all that goes into it, so a build that
was stopped, or whose recipe has changed from some stage on, goes on where that differs. A stage
works on pieces of some megabytes; each is written aside and renamed, and is the same whatever
process makes it. At the end files move to OUT, manifest.json last: without it OUT is no corpus.
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import importlib.metadata
import itertools
import os
import shutil
import sys
import time
import unicodedata
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from base import InputError, to_json, write_text
from base.command import Parser, given_path
from base.files import sha256_of, sweep
from base.places import cache_folder

from . import clean, emit, filters, reading, recipe, report
from . import stages as work
from .pieces import progress, read_json, release_memory, say, workers, write_json
from .sources import MANIFEST
from .tokenizers import make_tokenizer, n_cores, on_disk

LAYOUT = 2  # change it when a stage comes to write something else for the same recipe


def main(argv):
    """`./run.sh data build`. Returns the exit status; raises InputError."""
    parser = command_line()
    args = parser.parse_args(argv)
    todo = recipe_of(args)
    cache = Path(args.cache_dir) / "data"
    began = time.perf_counter()
    if args.emit:
        emit.emit(*args.emit, todo)
        return 0
    with workers(args.processes) as crew:
        if args.dry_run:
            print(work.dry_run(todo, cache, crew))
            return 0
        if args.out is None:
            raise InputError("--out: expected the folder that the corpus is to be in")
        try:
            manifest = build(todo, args.out, cache, crew, args.keep_work, args.replace)
        except (OSError, BrokenProcessPool) as e:
            raise InputError(
                f"{getattr(e, 'filename', None) or args.out}: {why(e)}; put this right and start "
                "the same command again: it goes on where it was"
            ) from None
    splits = manifest["splits"]
    result = dict(
        out=str(args.out),
        documents=manifest["documents"],
        documents_kept=manifest["documents_kept"],
        train_tokens=splits["train"]["tokens"],
        val_tokens=splits["val"]["tokens"],
        seconds=round(time.perf_counter() - began, 1),
        report=str(args.out / "report.html"),
    )
    print(to_json(result))
    return 0


def why(error):
    """In words: what the system says, or that a process has gone."""
    if isinstance(error, BrokenProcessPool):
        return "a process was ended from outside, as the system does when memory is short"
    return error.strerror or error


def command_line():
    parser = Parser(
        prog="./run.sh data build",
        usage="./run.sh data build RECIPE.toml|SOURCE ... --out DIR [OPTIONS]",
        description="Make a corpus to train on: read sources, clean and filter their documents, "
        "drop duplicates, mix, tokenize. ./run.sh --data DIR trains on it. A build that was "
        "stopped goes on when the same command is given again.",
        epilog=epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a recipe, or files, folders, patterns, stdlib, or hub:NAME of a data set",
    )
    parser.add_argument("--out", type=given_path, metavar="DIR", help="the folder to build in")
    parser.add_argument(
        "--preset", choices=filters.PRESETS, help="which filters apply [prose; code for stdlib]"
    )
    parser.add_argument("--column", help="the field with the text [text]")
    parser.add_argument("--language", metavar="CODE", help="keep documents in it only, such as en")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each source at most")
    parser.add_argument(
        "--val-fraction", type=float, metavar="F", help="of documents, for validation [0.01]"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the division in two [0]")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="bpe:N, gpt2, bytes, chars, or a tokenizer.json"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show what filters make of the first documents of each source, and write nothing",
    )
    parser.add_argument(
        "--processes", type=int, default=n_cores(), metavar="N", help="to work in [%(default)s]"
    )
    parser.add_argument(
        "--emit",
        nargs=2,
        metavar=("datatrove", "FILE.py"),
        help="build nothing: write a script that reads, filters and deduplicates on a cluster",
    )
    parser.add_argument("--keep-work", action="store_true", help="keep what stages hand on")
    parser.add_argument(
        "--replace", action="store_true", help="build anew over a corpus of another recipe"
    )
    parser.add_argument(
        "--cache-dir", default=str(cache_folder()), help="where downloads are kept [%(default)s]"
    )
    return parser


def epilog():
    lines = ["presets of filters:"]
    for name, rules in filters.PRESETS.items():
        lines.append(f"  {name:9}{len(rules)} rules")
    return "\n".join(lines + ["docs/building-data.md has recipes, and every rule."])


def recipe_of(args):
    """The Recipe that a command line asks for. Raises InputError."""
    if args.processes < 1:
        raise InputError(f"--processes {args.processes}: expected 1 or more")
    given = {}
    for key in "val_fraction", "seed", "tokenizer":
        if getattr(args, key) is not None:
            given[key] = getattr(args, key)
    of_parts = {}
    for key in "preset", "column", "language", "limit":
        if getattr(args, key) is not None:
            of_parts[key] = getattr(args, key)

    if any(source.endswith(".toml") for source in args.sources):
        if len(args.sources) > 1:
            raise InputError(f"{args.sources[1]}: expected one recipe and nothing else")
        if of_parts:
            raise InputError(f"--{next(iter(of_parts))}: not with a recipe, which says it itself")
        return dataclasses.replace(recipe.read(args.sources[0]), **given)
    parts = [part_of(source, of_parts) for source in args.sources]
    return recipe.from_table(given | dict(source=parts), "command line")


def part_of(source, of_parts):
    """The [[source]] that a word on the command line stands for."""
    if source.startswith("hub:"):
        return dict(hub=source.removeprefix("hub:")) | of_parts
    if source == "stdlib":
        return dict(source=source, preset="code") | of_parts
    return dict(path=source) | of_parts


# --------------------------------------------------------------------------------------------------
# The stages


def build(todo, out, cache, crew, keep_work=False, replace=False):
    """Build a corpus in the folder `out`; returns its manifest. Raises InputError and OSError."""
    files = {part.name: reading.locate(part, cache) for part in todo.source}
    stages = Stages(out / "work", crew.processes)
    checksums = stages.checksums(files)
    manifest = finished(out, todo, checksums, replace)
    if manifest is None:
        done = make_tokens(todo, stages, files, checksums, crew)
        done["mix"] = make_mix(todo, stages, done)
        manifest = describe(todo, files, checksums, done)
        publish(out, stages, manifest, done)
    if not keep_work:
        shutil.rmtree(stages.work, ignore_errors=True)
    return manifest


def make_tokens(todo, stages, files, checksums, crew):
    """All stages before the mix: {name: Stage}."""
    sets = {n: file_state(path) for n, path in work.set_paths(todo.decontaminate).items()}
    tokenizer = known_tokenizer(todo.tokenizer)
    given = file_state(tokenizer) if tokenizer.endswith(".json") else tokenizer
    stages.begin()

    read = stages.run(
        "read",
        [what_is_read(todo), todo.piece_bytes, settings(todo.dedup), clean.FTFY, checksums],
        lambda folder: work.read(todo, files, folder, crew),
    )
    if changed := stages.changed():
        raise InputError(f"{changed}: changed while it was read; start again when it is at rest")
    duplicates = stages.run(
        "dedup",
        [read.key, todo.val_fraction, todo.seed],
        lambda folder: work.find_duplicates(todo, read.folder, folder, crew),
    )
    done = dict(read=read, dedup=duplicates)
    texts = read  # the stage whose pieces hold the text
    if todo.dedup.parts:
        texts = duplicates = done["parts"] = stages.run(
            "parts",
            [duplicates.key],
            lambda folder: work.drop_parts(todo, read.folder, done["dedup"].folder, folder, crew),
        )
    clear = stages.run(
        "decontaminate",
        [duplicates.key, {**settings(todo.decontaminate), "base": ""}, sets],
        lambda folder: work.decontaminate(todo, texts.folder, duplicates.folder, folder, crew),
    )
    tokens = stages.run(
        "tokenizer",
        [clear.key, given, todo.tokenizer_bytes],
        lambda folder: crew.alone(
            work.choose_tokenizer, todo, tokenizer, texts.folder, clear.folder, folder
        ),
    )
    encoded = stages.run(
        "encode",
        [tokens.key],
        lambda folder: work.encode(texts.folder, clear.folder, tokens.folder, folder, crew),
    )
    return done | dict(decontaminate=clear, tokenizer=tokens, encode=encoded)


def make_mix(todo, stages, done):
    """The Stage that writes the shards."""
    weights = [[part.name, part.weight, part.max_epochs] for part in todo.source]
    return stages.run(
        "mix",
        [done["encode"].key, settings(todo.mix), weights],
        lambda folder: work.mix(todo, done["encode"].folder, done["tokenizer"].said, folder),
    )


LATER = ("weight", "max_epochs", "base")  # of no influence on what is read


def what_is_read(todo):
    """Settings of the sources, without those that only the mix looks at."""
    parts = [settings(part) for part in todo.source]
    return [{k: v for k, v in p.items() if k not in LATER} for p in parts]


def settings(config):
    return dataclasses.asdict(config)


@dataclasses.dataclass
class Stage:
    name: str
    key: str
    folder: Path
    said: dict  # its summary


class Stages:
    """The stages' folders, each named after what goes into it."""

    def __init__(self, work, processes):
        self.work = work
        self.processes = processes
        self.seconds = {}  # of each stage, in this process
        self.seen = {}  # path -> its stamp and checksum

    def run(self, name, depends, function):
        """Run function(folder), which returns the stage's summary, unless it has been done."""
        text = to_json([LAYOUT, name, VERSIONS, depends], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        folder = self.work / f"{name}-{key}"
        began = time.perf_counter()
        if not (folder / "done.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "done.json", function(folder))
            release_memory()
        self.seconds[name] = round(time.perf_counter() - began, 3)
        return Stage(name, key, folder, read_json(folder / "done.json"))

    def checksums(self, files):
        """{source: [[name, bytes, sha256]]}; hashed again where a file looks touched."""
        known = {}
        with contextlib.suppress(OSError, ValueError):
            known = read_json(self.work / "sources.json")
        found = {}
        every = [(source, *pair) for source, f in files.items() for pair in zip(f.names, f.paths)]
        for source, name, file in progress(every, "looking at the sources", "file"):
            stamp = stamp_of(file)
            old = known.get(str(file), {})
            sha256 = old["sha256"] if old.get("stamp") == stamp else sha256_of(file)
            self.seen[str(file)] = dict(stamp=stamp, sha256=sha256)
            found.setdefault(source, []).append([name, stamp[0], sha256])
        return found

    def begin(self):
        """Make the folder of stages, and keep the checksums there for when they go on."""
        self.work.mkdir(parents=True, exist_ok=True)
        write_json(self.work / "sources.json", self.seen)

    def changed(self):
        """The first file that is no longer what checksums() has seen, or None."""
        for path, seen in self.seen.items():
            if stamp_of(path) != seen["stamp"]:
                return path


def stamp_of(path):
    """What changes when a file is written to. Raises InputError."""
    try:
        stat = os.stat(path)
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


class Asked(Exception):
    """There is nothing wrong with a tokenizer's name; it asks for text to learn from."""


def known_tokenizer(name):
    """The name of a tokenizer, fetched if it is a repository's. Raises InputError for one that
    cannot be made, before hours go into what it is for."""

    def no_texts():
        raise Asked

    name = on_disk(name)
    with contextlib.suppress(Asked):
        make_tokenizer(name, no_texts)
    return name


def file_state(path):
    """The checksum of a file that a recipe names. Raises InputError."""
    try:
        return sha256_of(path)
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}") from None


def finished(out, todo, checksums, replace):
    """The manifest of a corpus in `out` that is what is asked for, None where there is none.
    Raises InputError where there is another."""
    path = out / MANIFEST
    if not path.exists():
        return None
    before = read_json(path)
    asked = recipe.as_json(todo)
    how = "; choose another --out, or --replace builds it anew"
    for source, now in checksums.items():
        was = before["checksums"].get(source)
        if was is not None and was != now:
            names = [a[0] for a, b in itertools.zip_longest(now, was, fillvalue=[""]) if a != b]
            what = f"{source}: {names[0] or 'a file that is gone'}: changed since it was built"
            break
    else:
        changed = [key for key in asked if asked[key] != before["recipe"].get(key)]
        if not changed and before["versions"] == VERSIONS and before["layout"] == LAYOUT:
            say(f"{out}: is built already")
            return before
        what = f"was built with another {changed[0] if changed else 'version of this program'}"
    if not replace:
        raise InputError(f"{path}: {what}{how}")
    path.unlink()


def describe(todo, files, checksums, done):
    """The manifest of a build, without the files that publish() adds."""
    tokens = done["tokenizer"].said
    manifest = dict(
        layout=LAYOUT,
        documents=done["read"].said["documents"],
        documents_kept=done["encode"].said["documents"],
        splits=done["mix"].said["splits"],
        n_vocab=tokens["n_vocab"],
        eot=tokens["eot"],
        sources={part.name: source_entry(part, files[part.name], done) for part in todo.source},
        stages={name: copy.deepcopy(stage.said) for name, stage in done.items()},
        recipe=recipe.as_json(todo),
        versions=VERSIONS,
        cleaning=clean.FTFY,
        checksums=checksums,
    )
    manifest["fingerprint"] = hashlib.sha256(sorted_json(manifest).encode()).hexdigest()
    return manifest


def publish(out, stages, manifest, done, leave=False):
    """Move what was made to `out`, the manifest last; leave: it stays there for another mix, and
    its text is left out."""
    page = report.html(manifest)
    for source in manifest["stages"]["read"]["sources"].values():
        source.pop("examples", None)  # of which the report has enough

    mixed = done["mix"]
    moves = [(done["tokenizer"].folder / "tokenizer.json", out / "tokenizer.json")]
    for split in mixed.said["splits"].values():
        moves += [(mixed.folder / name, out / name) for name in split["shards"]]
    moves += [(mixed.folder / name, out / name) for name in mixed.said["by_source"].values()]
    if not leave:
        text = done["encode"]
        moves += [(text.folder / name, out / "text" / name) for name in text.said["files"]]
    (out / "text").mkdir(parents=True, exist_ok=True)
    sweep(out, seconds=None)  # what a build left that was killed
    manifest["files"] = {}
    for made, place in progress(moves, "comparing and naming files", "file"):
        if leave:
            shutil.copyfile(made, place)
        elif made.exists():  # else a build that was stopped here has moved it
            os.replace(made, place)
        name = place.relative_to(out).as_posix()
        manifest["files"][name] = [place.stat().st_size, sha256_of(place)]
    for stale in [*out.glob("*.bin"), *(out / "text").glob("*.zst")]:
        if stale.relative_to(out).as_posix() not in manifest["files"]:
            stale.unlink()
    write_text(out / "report.html", page)
    write_json(out / "timings.json", dict(seconds=stages.seconds, processes=stages.processes))
    write_json(out / MANIFEST, manifest)


def source_entry(part, files, done):
    """What the manifest says of a source."""
    about = dict(files.about)
    if part.licence:
        about["licence"] = part.licence
    about.setdefault("licence", "not stated")
    return about | dict(
        files=len(files.paths),
        filters=filters.rules_of(part.preset, part.filters),
        kept=done["encode"].said["sources"][part.name],
        mix=done["mix"].said["sources"].get(part.name),
    )


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


PACKAGES = ("ftfy", "py3langid", "zstandard", "pyarrow", "numpy", "tokenizers", "tiktoken")
VERSIONS = {package: version(package) for package in PACKAGES}
VERSIONS["unicode"] = unicodedata.unidata_version


def sorted_json(value):
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    return to_json(value, sort_keys=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
