"""What `./run.sh data build` is to do: a TOML file, or what is given on the command line.

    tokenizer = "bpe:8192"
    val_fraction = 0.01

    [[source]]
    path = "stories/*.jsonl.zst"
    preset = "stories"
    weight = 0.7

    [[source]]
    name = "wiki"
    hub = "wikitext-103"
    weight = 0.3

Every key is a field of a dataclass below, with its meaning; docs/building-data.md has examples.
"""

import dataclasses
import difflib
import json
import tomllib
from pathlib import Path

from base import InputError
from base.files import sha256_of
from base.options import POSITIVE, Options, option, remembered

from . import encodings, filters

SHARE = (lambda x: 0 < x < 1), "a fraction between 0 and 1"
AT_LEAST_ONE = (lambda n: n >= 1), "1 or more"
UNLESS_LEFT_OUT = (lambda x: x is None or x > 0), "a positive number"


def table(help):
    """A field that is a table of the recipe, empty by default."""
    about = dict(help=help, expect=None, group=None)
    return dataclasses.field(default_factory=dict, metadata=about)


@dataclasses.dataclass(frozen=True)
class Part(Options):
    """[[source]]: files of one origin, and what is done to their documents."""

    name: str = option("", "what manifest and report call it; empty: after its path")
    path: str = option("", "a file, a folder or a pattern such as data/*.jsonl.zst")
    hub: str = option("", "a data set of the Hub: a name that --help lists, or OWNER/REPOSITORY")
    source: str = option("", "one of data/sources that locates its files by itself, such as stdlib")
    files: str = option("", "of a data set of the Hub: a pattern of its files")
    revision: str = option("", "of a data set of the Hub; empty: the newest, which is recorded")
    column: str = option("", 'the field or column with the text; empty: "text"')
    encoding: str = option(
        "",
        "of text files without a byte-order mark; empty finds out",
        (encodings.known, "an encoding that Python knows, such as cp1252"),
    )
    rows_are_lines: bool | None = option(
        None, "rows are lines of WikiText, whose documents begin at a heading = Title ="
    )
    wikitext_marks: bool = option(False, "undo WikiText's @-@ and spaces before punctuation")
    split: str = option(
        "", "all of it is for this split; empty: by the hash of each", ("", "train", "val")
    )
    preset: str = option("", f"which filters apply: {', '.join(filters.PRESETS)}")
    filters: dict = table("rules added (true or thresholds) and taken away (false)")
    language: str = option("", "keep only documents in this language, such as en")
    weight: float | None = option(None, "its share of the mix", UNLESS_LEFT_OUT)
    max_epochs: float = option(1.0, "how often the mix may repeat its documents", POSITIVE)
    limit: int | None = option(None, "read this many documents at most", UNLESS_LEFT_OUT)
    licence: str = option("", "under which its text may be used; empty: as the source says")
    base: str = remembered("")  # folder that its path is relative to; of one machine

    def __post_init__(self):
        super().__post_init__()
        given = [key for key in ("path", "hub", "source") if getattr(self, key)]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise InputError(f"[[source]] {self.name}: expected path, hub or source, found {found}")
        filters.rules_of(self.preset, self.filters)  # raises for what it does not know


@dataclasses.dataclass(frozen=True)
class Dedup(Options):
    """[dedup]: which documents go because others say the same."""

    exact: bool = option(True, "of equal documents the first stays")
    near: bool = option(True, "of nearly equal ones too, by MinHash")
    parts: str = option(
        "", "also drop what other documents have as well", ("", "lines", "paragraphs")
    )
    words: int = option(5, "in a row, that documents are compared by", AT_LEAST_ONE)
    bands: int = option(
        14, "of a signature; documents that agree in one are compared", AT_LEAST_ONE
    )
    rows: int = option(8, "hashes in a band", AT_LEAST_ONE)
    seed: int = option(1, "of the hashes")
    threshold: float = option(0.8, "the least similarity of near duplicates", SHARE)


@dataclasses.dataclass(frozen=True)
class Decontaminate(Options):
    """[decontaminate]: which documents go because what a model is judged by is in them."""

    n: int = option(
        13, "words that have to be the same in a row", ((lambda n: 8 <= n <= 63), "8 to 63")
    )
    sets: dict = table('name -> file with what is never to be trained on, such as "exam.jsonl"')
    base: str = remembered("")  # folder that they are relative to
    validation: bool = option(True, "also against the validation split")
    common: int = option(
        10,
        "words of validation that more training documents than this have are a commonplace, such "
        "as a licence or how stories begin, and count for nothing",
        AT_LEAST_ONE,
    )


@dataclasses.dataclass(frozen=True)
class Mix(Options):
    """[mix]: how much of each source."""

    by: str = option("tokens", "what weights and total count", ("tokens", "bytes"))
    total: int | None = option(
        None, "of the training split; empty: as much as max_epochs allows", UNLESS_LEFT_OUT
    )


@dataclasses.dataclass(frozen=True)
class Recipe(Options):
    """All of it."""

    source: tuple[Part, ...] = option((), "one or several [[source]]")
    preset: str = option("prose", "of sources that name none")
    language: str = option("", "of sources that name none")
    val_fraction: float = option(0.01, "of the documents, for validation", SHARE)
    seed: int = option(0, "of the division into train and validation")
    tokenizer: str = option("bpe:8192", "chars, bytes, bpe:N, gpt2 or the path of a tokenizer.json")
    tokenizer_bytes: int = option(
        200_000_000, "bytes of training text that a vocabulary is learned from", POSITIVE
    )
    piece_bytes: int = option(
        2_000_000,
        "characters that are worked on at once; results depend on it by their order of files only",
        POSITIVE,
    )
    dedup: Dedup = option(Dedup(), "")
    decontaminate: Decontaminate = option(Decontaminate(), "")
    mix: Mix = option(Mix(), "")

    def __post_init__(self):
        super().__post_init__()
        if not self.source:
            raise InputError("recipe: no [[source]]; expected one or several, each with a path")
        weights = [part.weight for part in self.source if part.split != "val"]
        if any(w is None for w in weights) and any(w is not None for w in weights):
            raise InputError("recipe: a weight for some sources only; expected all or none")
        names = [part.name for part in self.source]
        for name in names:
            if names.count(name) > 1:
                raise InputError(f"recipe: two sources named {name}; give each its own name")


def nearest(key, valid):
    near = difflib.get_close_matches(key, valid, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}expected of {', '.join(sorted(valid))}"


def build(cls, said, where):
    """A dataclass from a table of the recipe; where: what to call it. Raises InputError."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.metadata["help"] is not None}
    if not isinstance(said, dict):
        raise InputError(f"{where}: expected a table, found {said!r}")
    values = {}
    for key, value in said.items():
        if key not in fields:
            raise InputError(f"{where}: unknown key {key}; {nearest(key, fields)}")
        values[key] = checked(value, fields[key], f"{where}: {key}")
    try:
        return cls(**values)
    except InputError as e:
        raise InputError(f"{where}: {str(e).removeprefix('--')}") from None


def checked(value, field, where):
    """The value in the type of its field. Raises InputError."""
    kind = field.type
    wanted = {
        str: str,
        bool: bool,
        bool | None: bool,
        int: int,
        int | None: int,
        float: (int, float),
        float | None: (int, float),
        dict: dict,
    }.get(kind)
    if wanted and (not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool)):
        word = getattr(kind, "__name__", None) or str(kind).split(" ")[0]
        raise InputError(
            f"{where}: expected {dict(dict='a table').get(word, word)}, found {value!r}"
        )
    return value


TABLES = dict(dedup=Dedup, decontaminate=Decontaminate, mix=Mix)


def from_table(said, where, base=None):
    """The Recipe of a parsed TOML file. base: folder that its paths are relative to."""
    said = dict(said)
    parts = said.pop("source", [])
    if not isinstance(parts, list):
        raise InputError(f"{where}: expected [[source]], found [source]")
    tables = {
        key: build(cls, said.pop(key, {}), f"{where}: [{key}]") for key, cls in TABLES.items()
    }
    fields = {f.name for f in dataclasses.fields(Recipe)}
    for key in said:
        if key not in fields:
            raise InputError(f"{where}: unknown key {key}; {nearest(key, fields)}")

    if base is not None:
        tables["decontaminate"] = dataclasses.replace(tables["decontaminate"], base=str(base))
        if str(said.get("tokenizer", "")).endswith(".json"):
            said["tokenizer"] = str(Path(base, Path(said["tokenizer"]).expanduser()))
    made = []
    for i, table in enumerate(parts):
        part = build(Part, table, f"{where}: [[source]] {i + 1}")
        part = dataclasses.replace(
            part,
            base=str(base or ""),
            name=part.name or name_of(part, made),
            preset=part.preset or said.get("preset", Recipe.preset),
            language=part.language or said.get("language", ""),
        )
        made.append(part)
    return build(Recipe, said | tables | dict(source=tuple(made)), where)


def name_of(part, others):
    """After its path, with a number where others have that name already."""
    said = part.path.rstrip("/") or part.hub or part.source
    name = Path(said).name.split(".")[0].strip("*?[]-_ ") or Path(said).parent.name or "text"
    taken = {other.name for other in others}
    numbered = [name] + [f"{name}-{i}" for i in range(2, len(taken) + 3)]
    return next(n for n in numbered if n not in taken)


def read(path):
    """The Recipe of a TOML file. Raises InputError."""
    try:
        with open(path, "rb") as f:
            said = tomllib.load(f)
    except OSError as e:
        raise InputError(f"{path}: cannot read the recipe: {e.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not a recipe in TOML: {e}") from None
    return from_table(said, str(path), Path(path).parent)


def as_json(recipe):
    """The recipe as values that JSON can hold: what the manifest keeps of it, without what is of
    one machine."""
    said = json.loads(json.dumps(dataclasses.asdict(recipe)))
    for table in (*said["source"], said["decontaminate"]):
        del table["base"]
    if said["tokenizer"].endswith(".json"):
        path = Path(said["tokenizer"])
        content = sha256_of(path)[:16] if path.is_file() else "gone"
        said["tokenizer"] = f"{path.name} {content}"
    return said
