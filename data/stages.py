"""The stages of a build, in order: each reads what others have left in their folders and returns a
summary for the manifest.

A piece is some megabytes of documents of one source; what a stage makes of piece i is called
`00000i` with an ending. A document is number j of its piece, from `read` on.
"""

import dataclasses
import functools
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np

from base import InputError, write_text

from . import clean, filters, reading
from . import mix as mixing
from .pieces import (
    progress,
    read_arrays,
    read_json,
    read_lines,
    read_part,
    write_arrays,
    write_json,
    write_lines,
)
from .recipe import Part
from .shards import ShardWriter
from .tokenizers import Tokenizer, make_tokenizer

EXAMPLES = 2  # of each kind that a piece keeps for the report, and MOST that the report has
MOST = 6
EXAMPLE_CHARS = 400

# What becomes of a document that filters let through
TRAIN, VAL, EXACT, NEAR, CONTAMINATED, REPEATED = range(6)


def numbered(i):
    return f"{i:06d}"


def pieces_in(folder):
    """Numbers of the pieces that a stage has made."""
    return [int(path.stem) for path in sorted(folder.glob("[0-9]*.json"))]


def add(total, counts):
    """Add the numbers in a nested dict to those in another."""
    for key, value in counts.items():
        if isinstance(value, dict):
            add(total.setdefault(key, {}), value)
        elif isinstance(value, list):
            # Examples: the first ones
            total.setdefault(key, []).extend(value[: MOST - len(total.get(key, []))])
        else:
            total[key] = total.get(key, 0) + value
    return total


# --------------------------------------------------------------------------------------------------
# read


def read(todo, files, folder, crew):
    """Read, clean, filter; keys and signatures of what is left."""
    found = crew.map(read_piece, wanted_pieces(todo, files, folder))
    for _ in progress(found, "reading, cleaning, filtering", " pieces"):
        pass
    sources = {part.name: {} for part in todo.source}
    summaries = [read_json(folder / f"{numbered(i)}.json") for i in pieces_in(folder)]
    for said in summaries:
        add(sources[said["source"]], said["counts"])
    for name, counts in sources.items():
        if not counts:
            raise InputError(f"{name}: there are no documents in it; expected some text")
    if not any(counts["kept"] for counts in sources.values()):
        raise InputError(
            "filters let no document through; --dry-run shows which one drops what, and --preset "
            "none has no filters"
        )
    return dict(
        documents=sum(counts["documents"] for counts in sources.values()),
        documents_kept=sum(counts["kept"] for counts in sources.values()),
        pieces=len(summaries),
        sources=sources,
    )


def wanted_pieces(todo, files, folder):
    """Yield the arguments of read_piece() for pieces that are not there yet."""
    i = 0
    for part in todo.source:
        rules = filters.rules_of(part.preset, part.filters)
        licence = part.licence or files[part.name].about.get("licence", "")
        part = dataclasses.replace(part, licence=licence)
        for documents in cut(reading.documents(part, files[part.name]), todo.piece_bytes):
            if not (folder / f"{numbered(i)}.json").exists():
                yield folder, i, part, rules, todo.dedup, documents
            i += 1


def cut(documents, most):
    """Yield lists of Documents of so many characters; also 10,000 documents are a piece."""
    piece = []
    size = 0
    for document in documents:
        piece.append(document)
        size += len(document.text) + 100
        if size >= most or len(piece) >= 10_000:
            yield piece
            piece = []
            size = 0
    if piece:
        yield piece


def read_piece(folder, i, part, rules, settings, documents):
    """Write a piece: its documents, their keys and signatures, and last what there is to say."""
    from . import dedup

    kept, counts = sift(part, rules, settings, documents)
    texts = [document.text for document in kept]
    arrays = dict(
        keys=dedup.exact_keys(texts),
        bytes=np.array([len(text.encode(errors="replace")) for text in texts], dtype=np.int64),
    )
    if settings.parts:
        arrays["part_keys"], arrays["part_counts"] = dedup.piece_keys(
            texts, DIVIDERS[settings.parts]
        )
    if settings.near:
        arrays["signatures"] = dedup.signatures(texts, minhash(settings))
    lines = [as_line(document, part) for document in kept]
    arrays["places"] = write_lines(folder / f"{numbered(i)}.jsonl.zst", lines)
    write_arrays(folder / f"{numbered(i)}.npz", **arrays)
    write_json(folder / f"{numbered(i)}.json", dict(source=part.name, counts=counts))


DIVIDERS = dict(lines="\n", paragraphs="\n\n")


def as_line(document, part):
    """A document as a line of a piece."""
    about = {key: value for key, value in document.about.items() if value}
    if part.licence:
        about.setdefault("licence", part.licence)
    return dict(text=document.text, source=part.name, id=document.id) | about


def minhash(settings):
    from .dedup import MinHash

    return MinHash(
        words=settings.words,
        bands=settings.bands,
        rows=settings.rows,
        seed=settings.seed,
        threshold=settings.threshold,
    )


def sift(part, rules, settings, documents):
    """Clean and filter Documents: (those that are kept, counts)."""
    counts = dict(documents=0, bytes=0, kept=0, kept_bytes=0, repaired=0)
    dropped = {}
    lines = Counter()
    languages = Counter()
    lengths = Counter()
    kept_lengths = Counter()
    examples = {}
    kept = []
    for number, document in enumerate(documents):
        before = len(document.text.encode(errors="replace"))
        counts["documents"] += 1
        counts["bytes"] += before
        text = clean.clean(document.text)
        if part.wikitext_marks:
            text = clean.without_marks(text)
        counts["repaired"] += text != document.text.strip("\n")
        why = None
        language = document.about.get("language") or ""
        if not text.strip():
            why = "empty"
        if why is None and (part.language or number % SAMPLED == 0):
            language = clean.language_of(text)
            languages[language or "too short to tell"] += 1
            if part.language and language and language != part.language:
                why = "language"
        if why is None:
            text, why, gone = filters.apply(text, rules)
            lines.update(gone)
        if why is None and not text.strip():
            why = "empty"
        lengths[bin_of(len(text))] += 1
        if why:
            n, size = dropped.get(why, (0, 0))
            dropped[why] = n + 1, size + before
        else:
            about = document.about | (dict(language=language) if language else {})
            kept.append(document._replace(text=text, about=about))
            counts["kept"] += 1
            counts["kept_bytes"] += len(text.encode(errors="replace"))
            kept_lengths[bin_of(len(text))] += 1
        shown = examples.setdefault(why or "kept", [])
        if len(shown) < EXAMPLES:
            shown.append([document.id, text[:EXAMPLE_CHARS]])
    counts["dropped"] = {why: dict(documents=n, bytes=b) for why, (n, b) in dropped.items()}
    counts["lines_dropped"] = dict(lines)
    counts["languages"] = dict(languages)
    counts["lengths"] = dict(lengths)
    counts["kept_lengths"] = dict(kept_lengths)
    counts["examples"] = examples
    return kept, counts


SAMPLED = 8  # of so many documents the language of one is found out, for the report


def bin_of(length):
    """The bin of a length in characters: the power of two it reaches, as str."""
    return str(length.bit_length() - 1 if length else 0)


def dry_run(todo, cache, crew):
    """In words: what filters make of the first pieces of each source."""
    lines = []
    for part in todo.source:
        rules = filters.rules_of(part.preset, part.filters)
        files = reading.locate(part, cache)
        documents = next(cut(reading.documents(part, files), todo.piece_bytes), [])
        if not documents:
            raise InputError(f"{part.name}: there are no documents in it; expected some text")
        kept, counts = sift(part, rules, todo.dedup, documents)
        lines.append(
            f"{part.name}: {len(files.paths)} files; of the first {len(documents):,} documents, "
            f"{counts['bytes']:,} bytes, {len(kept):,} are kept with {counts['kept_bytes']:,} bytes"
        )
        by_count = sorted(counts["dropped"].items(), key=lambda item: -item[1]["documents"])
        for why, n in by_count:
            at = ", ".join(f"{key} {value:g}" for key, value in rules.get(why, {}).items())
            lines.append(f"  {why}{f' ({at})' if at else ''}: {n['documents']:,} dropped")
            for name, text in counts["examples"][why]:
                lines.append(f"      {name}: {' '.join(text.split())[:100]}")
        for why, n in counts["lines_dropped"].items():
            lines.append(f"  {why}: {n:,} lines dropped")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# dedup


class Pieces:
    """Arrays of all documents in order; starts[i] is where those of piece i begin."""

    def __init__(self, folder):
        self.folder = folder
        self.numbers = pieces_in(folder)
        self.sources = [read_json(folder / f"{numbered(i)}.json")["source"] for i in self.numbers]
        keys = []
        sizes = []
        places = []
        for i in self.numbers:
            with np.load(folder / f"{numbered(i)}.npz", allow_pickle=False) as arrays:
                keys.append(arrays["keys"])
                sizes.append(arrays["bytes"])
                places.append(arrays["places"])
        self.keys = np.concatenate(keys)
        self.bytes = np.concatenate(sizes)
        self.places = np.concatenate(places)  # in the file of its piece
        self.starts = np.cumsum([0] + [len(part) for part in keys])
        counts = np.diff(self.starts)
        self.owner = np.repeat(np.arange(len(self.numbers)), counts)  # its piece

    def signatures(self, path, rank):
        """All signatures (N, k) uint32 in a file that is mapped, column after column, as banding
        reads them; that of document i is row rank[i]."""
        whole = None
        for i, begin in zip(self.numbers, self.starts):
            part = read_arrays(self.folder / f"{numbered(i)}.npz")["signatures"]
            if whole is None:
                shape = (len(self.keys), part.shape[1])
                whole = np.lib.format.open_memmap(
                    path, "w+", dtype=part.dtype, shape=shape, fortran_order=True
                )
            whole[rank[begin : begin + len(part)]] = part
        return whole

    def documents(self, wanted):
        """Yield (number, line) of documents with these numbers, in the order of numbers."""
        wanted = np.unique(wanted)
        yield from zip(wanted.tolist(), lines_at(self.folder, self.whereabouts(wanted)))

    @functools.cached_property
    def firsts(self):
        """The first document of each part of a file."""
        new = np.append(True, self.places[1:] != self.places[:-1])
        new[self.starts[:-1][np.diff(self.starts) > 0]] = True  # every piece has one at 0
        return np.flatnonzero(new)

    def whereabouts(self, documents):
        """(n, 3) int64 of documents (n,) by their numbers: piece, place of the part in its file,
        and which line of the part it is."""
        first = self.firsts[np.searchsorted(self.firsts, documents, side="right") - 1]
        pieces = np.array(self.numbers)[self.owner[documents]]
        return np.stack([pieces, self.places[documents], documents - first], axis=1)


def lines_at(folder, whereabouts):
    """Yield the lines of documents by their Pieces.whereabouts() (n, 3), which ascend; parts
    without any are not read."""
    part = None
    for piece, at, line in whereabouts.tolist():
        if part != (piece, at):
            part = (piece, at)
            lines = read_part(folder / f"{numbered(piece)}.jsonl.zst", at)
        yield json.loads(lines[line])


def unit_hash(keys, salt):
    """Keys (N, 2) uint64 -> (N,) float64 in [0, 1), another for each salt."""
    mixed = keys[:, 0] ^ np.uint64(int.from_bytes(hashlib.sha256(str(salt).encode()).digest()[:8]))
    # Two rounds of a multiplication and a shift spread what the salt has changed
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        mixed ^= mixed >> np.uint64(30)
        mixed = mixed * np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)) * 2.0**-53


def find_duplicates(todo, read_folder, folder, crew):
    """What becomes of each document (N,) uint8: train, val, or a duplicate; the first of those that
    are alike stays, and of several the one that is for validation."""
    from . import dedup

    pieces = Pieces(read_folder)
    n = len(pieces.keys)
    split_of = {part.name: part.split for part in todo.source}
    split = np.array([split_of[source] for source in pieces.sources])[pieces.owner]
    fate = np.where(unit_hash(pieces.keys, todo.seed) < todo.val_fraction, VAL, TRAIN)
    fate = np.where(split == "val", VAL, np.where(split == "train", TRAIN, fate)).astype(np.uint8)

    # Sources for validation come first, so that theirs are the documents that stay
    order = np.argsort(split != "val", kind="stable")
    rank = np.empty(n, dtype=np.int64)
    rank[order] = np.arange(n)
    first = np.arange(n)
    kept = folder / "bands.npz"  # what a build that is stopped here goes on from
    if todo.dedup.exact:
        first = order[dedup.exact_duplicates(pieces.keys[order])][rank]
        fate[first != np.arange(n)] = EXACT
    if todo.dedup.near:
        path = folder / "signatures.npy"
        signatures = pieces.signatures(path, rank)
        config = minhash(todo.dedup)

        def compare(left, right):
            return compare_texts(pieces, order[left], order[right], config, crew)

        near = dedup.near_duplicates(signatures, config, compare, kept)
        near = order[near][rank]
        fate[(fate < EXACT) & (near != np.arange(n))] = NEAR
        first = near[first]
        del signatures
        path.unlink()
    write_arrays(folder / "fate.npz", fate=fate, first=first)

    sizes = np.bincount(first, minlength=n)
    largest = [i for i in np.argsort(-sizes, kind="stable")[:10] if sizes[i] > 1]
    texts = {i: line for i, line in pieces.documents(np.array(largest, dtype=np.int64))}
    top = [
        dict(copies=int(sizes[i]), source=texts[i]["source"], id=texts[i]["id"],
             text=texts[i]["text"][:200])
        for i in largest
    ]  # fmt: skip
    kept.unlink(missing_ok=True)
    return dict(counts=count_fates(pieces, fate), top=top)


COMPARED = 1 << 24  # bytes of text that a process compares at a time


def compare_texts(pieces, left, right, config, crew):
    """Similarities (n,) of the texts of documents left[i] and right[i], by their numbers."""
    # Neighbours in the order of the files, which share parts of them
    order = np.lexsort((right, left))
    left = left[order]
    right = right[order]
    bounds = bounds_of(pieces.bytes[left] + pieces.bytes[right])

    def tasks():
        for begin, end in zip(bounds, bounds[1:]):
            pairs = np.stack([left[begin:end], right[begin:end]])
            documents, where = np.unique(pairs, return_inverse=True)
            yield pieces.folder, pieces.whereabouts(documents), where.reshape(2, -1), config

    similarities = np.empty(len(left))
    similarities[order] = np.concatenate(list(crew.map(compare_some, tasks())))
    return similarities


def bounds_of(sizes):
    """Where pairs of documents of these sizes (n,) are cut for one process to compare at a time:
    [0, ..., n]."""
    from .dedup import TEXTS_AT_ONCE

    ends = np.cumsum(sizes)
    bounds = [0]
    while (begin := bounds[-1]) < len(sizes):
        before = ends[begin - 1] if begin else 0
        fit = int(np.searchsorted(ends, before + COMPARED, side="right"))
        bounds.append(min(max(fit, begin + 1), begin + TEXTS_AT_ONCE, len(sizes)))
    return bounds


def compare_some(read_folder, whereabouts, pairs, config):
    """Similarities (n,) of pairs (2, n) of the documents that are at these places."""
    from . import dedup

    def read(wanted):
        return [line["text"] for line in lines_at(read_folder, whereabouts[wanted])]

    return dedup.similarities(read, *pairs, config)


NAMES = (
    "train",
    "val",
    "exact duplicates",
    "near duplicates",
    "contaminated",
    "repeated parts",  # and nothing else in it
)


def count_fates(pieces, fate):
    """{source: {fate: {documents, bytes}}}."""
    counts = {}
    for source in dict.fromkeys(pieces.sources):
        of_source = np.array([s == source for s in pieces.sources])[pieces.owner]
        counts[source] = {}
        for value, name in enumerate(NAMES):
            these = of_source & (fate == value)
            if these.any():
                counts[source][name] = dict(
                    documents=int(these.sum()), bytes=int(pieces.bytes[these].sum())
                )
    return counts


# --------------------------------------------------------------------------------------------------
# parts


def drop_parts(todo, read_folder, dedup_folder, folder, crew):
    """Lines or paragraphs that documents before have as well go, and documents that are left
    without any; the pieces are written again."""
    from . import dedup

    pieces = Pieces(read_folder)
    fate = read_arrays(dedup_folder / "fate.npz")["fate"]
    keys = []
    counts = []
    for i, begin, end in zip(pieces.numbers, pieces.starts, pieces.starts[1:]):
        with np.load(read_folder / f"{numbered(i)}.npz", allow_pickle=False) as arrays:
            keep = fate[begin:end] <= VAL
            counts.append(np.where(keep, arrays["part_counts"], 0))
            keys.append(arrays["part_keys"][np.repeat(keep, arrays["part_counts"])])
    counts = np.concatenate(counts)
    gone = dedup.repeated_pieces(np.concatenate(keys), counts)
    ends = np.concatenate([[0], np.cumsum(counts)])
    tasks = []
    for i, begin, end in zip(pieces.numbers, pieces.starts, pieces.starts[1:]):
        part = gone[ends[begin] : ends[end]]
        tasks.append((read_folder, folder, i, counts[begin:end], part, todo.dedup.parts))
    dropped = {}
    done = crew.map(rewrite_piece, tasks)
    for task, (empty, size) in zip(tasks, progress(done, "dropping parts", " pieces", len(tasks))):
        at = pieces.numbers.index(task[2])
        begin = pieces.starts[at]
        fate[begin : begin + len(empty)][empty] = REPEATED
        add(dropped.setdefault(pieces.sources[at], {}), dict(parts=int(task[4].sum()), bytes=size))
    write_arrays(folder / "fate.npz", fate=fate)
    return dict(what=todo.dedup.parts, dropped=dropped)


def rewrite_piece(read_folder, folder, i, counts, gone, kind):
    """Write a piece without parts; returns (documents without any left (n,) bool, bytes)."""
    from .dedup import without_pieces

    name = numbered(i)
    if not (folder / f"{name}.json").exists():
        arrays = read_arrays(read_folder / f"{name}.npz")
        lines = list(read_lines(read_folder / f"{name}.jsonl.zst"))
        begin = 0
        for line, count in zip(lines, counts.tolist()):
            part = gone[begin : begin + count]
            begin += count
            if part.any():
                line["text"] = without_pieces(line["text"], part, DIVIDERS[kind]).strip("\n")
        before = arrays["bytes"]
        arrays = dict(
            keys=arrays["keys"],
            bytes=np.array([len(line["text"].encode()) for line in lines], dtype=np.int64),
            empty=np.array([not line["text"].strip() for line in lines]),
            places=write_lines(folder / f"{name}.jsonl.zst", lines),
        )
        arrays["size"] = (before - arrays["bytes"]).sum()
        write_arrays(folder / f"{name}.npz", **arrays)
        write_json(folder / f"{name}.json", read_json(read_folder / f"{name}.json"))
    arrays = read_arrays(folder / f"{name}.npz")
    return arrays["empty"] & (counts > 0), int(arrays["size"])


# --------------------------------------------------------------------------------------------------
# decontaminate

VALIDATION = "validation"
MOST_HASHES = 50_000_000  # of the validation split: beyond, one in two is kept, or in three, ...


def set_paths(settings):
    """{name: Path} of the evaluation sets."""
    sets = settings.sets.items()
    return {name: Path(settings.base, Path(path).expanduser()) for name, path in sets}


def decontaminate(todo, read_folder, dedup_folder, folder, crew):
    """Training documents that share a run of words with a text that models are judged by go."""
    from .decontaminate import lengths_of, ngram_hashes

    pieces = Pieces(read_folder)
    fate = read_arrays(dedup_folder / "fate.npz")["fate"]
    n = todo.decontaminate.n
    sets = {}
    for name, path in set_paths(todo.decontaminate).items():
        part = Part(name=name, path=str(path))
        files = reading.locate(part, folder)
        sets[name] = ngram_hashes((d.text for d in reading.documents(part, files)), n)

    # Each piece with training documents in it, and which those are
    tasks = []
    for i, begin, end in zip(pieces.numbers, pieces.starts, pieces.starts[1:]):
        if (fate[begin:end] == TRAIN).any():
            tasks.append((read_folder, folder, i, fate[begin:end] == TRAIN, n))
    if todo.decontaminate.validation:
        texts = (line["text"] for _, line in pieces.documents(np.flatnonzero(fate == VAL)))
        one_in = 1 + int(pieces.bytes[fate == VAL].sum() / 6) // MOST_HASHES  # 6 bytes a word
        sets[VALIDATION] = ngram_hashes(texts, n, one_in)

    (folder / "sets").mkdir(exist_ok=True)
    lengths = {name: lengths_of(hashes) for name, hashes in sets.items()}
    for k, hashes in enumerate(sets.values()):
        np.save(folder / "sets" / f"{k}.npy", hashes)
    having = np.zeros(len(sets.get(VALIDATION, [])), dtype=np.int32)  # training documents
    sets = [*sets]  # processes map the files
    hashes = None
    tasks = [(*task, [*lengths.values()]) for task in tasks] if sets else []
    found = crew.map(find_in_piece, tasks)
    for at, count in progress(found, "decontaminating", " pieces", len(tasks)):
        if VALIDATION in sets:
            having[at] += count
    common = having > todo.decontaminate.common
    counts = {name: 0 for name in sets}
    for task in tasks:
        begin = pieces.starts[pieces.numbers.index(task[2])]
        arrays = read_arrays(hits_path(folder, task[2]))
        for k, name in enumerate(sets):
            these = arrays[f"documents{k}"]
            if name == VALIDATION:
                these = these[~common[arrays[f"places{k}"]]]
            these = np.unique(these)
            counts[name] += len(these)
            fate[begin + these] = CONTAMINATED
    write_arrays(folder / "fate.npz", fate=fate)
    left = {name: int((fate == value).sum()) for value, name in ((TRAIN, "train"), (VAL, "val"))}
    if not left["val"] or not left["train"]:
        split = "validation" if not left["val"] else "training"
        raise InputError(
            f"nothing is left for {split} of {sum(left.values()):,} documents; expected a "
            "--val-fraction with which both have some, or more text"
        )
    return dict(n=n, sets=counts, commonplaces=int(common.sum()), counts=count_fates(pieces, fate))


def hits_path(folder, i):
    return folder / f"{numbered(i)}-hits.npz"


def find_in_piece(read_folder, folder, i, train, n, lengths):
    """Write what training documents of a piece have in common with each set; returns (places in
    the last one, how many documents have each)."""
    from .decontaminate import hits
    from .words import batches

    path = hits_path(folder, i)
    last = len(lengths) - 1
    if not path.exists():
        lines = read_lines(read_folder / f"{numbered(i)}.jsonl.zst")
        texts = [line["text"] for line, its in zip(lines, train) if its]
        numbers = np.flatnonzero(train)  # of the texts in the piece
        files = [folder / "sets" / f"{k}.npy" for k in range(len(lengths))]
        sets = [np.load(file, mmap_mode="r") for file in files]
        found = [[] for _ in sets]
        for batch in batches(texts):
            for own, hashes, its in zip(found, sets, lengths):
                documents, *rest = hits(batch, hashes, its, n)
                own.append((numbers[documents], *rest))
            numbers = numbers[len(batch) :]
        arrays = {}
        for k, parts in enumerate(found):
            for name, values in zip(("documents", "places", "own"), zip(*parts)):
                arrays[f"{name}{k}"] = np.concatenate(values)
        write_arrays(path, **arrays)
    arrays = read_arrays(path)
    return np.unique(arrays[f"places{last}"][arrays[f"own{last}"]], return_counts=True)


# --------------------------------------------------------------------------------------------------
# tokenizer, encode


def choose_tokenizer(todo, name, read_folder, clear_folder, folder):
    """Learn the vocabulary from the training split, or take the one that is named."""
    pieces = Pieces(read_folder)
    fate = read_arrays(clear_folder / "fate.npz")["fate"]
    train = np.flatnonzero(fate == TRAIN)
    share = min(1.0, todo.tokenizer_bytes / max(1, pieces.bytes[train].sum()))
    sample = train[unit_hash(pieces.keys[train], "tokenizer") < share]
    everything = name == "chars"  # every character must have an id
    wanted = np.flatnonzero(fate <= VAL) if everything else sample

    def texts():
        for _, line in progress(pieces.documents(wanted), "learning the vocabulary", " documents"):
            yield line["text"]

    tokenizer = make_tokenizer(name, texts)
    write_text(folder / "tokenizer.json", tokenizer.to_json())
    learned = name.partition(":")[0] in ("bpe", "qwen2")
    return dict(
        name=Path(todo.tokenizer).name,  # a path is of one machine
        n_vocab=tokenizer.n_vocab,
        eot=tokenizer.eot,
        dtype=np.dtype(tokenizer.dtype).name,
        learned_from_bytes=int(pieces.bytes[wanted].sum()) if learned else 0,
    )


def encode(read_folder, clear_folder, tokens_folder, folder, crew):
    """Tokens of what is kept, and its text with where it is from."""
    pieces = Pieces(read_folder)
    fate = read_arrays(clear_folder / "fate.npz")["fate"]
    tasks = []
    for i, begin, end in zip(pieces.numbers, pieces.starts, pieces.starts[1:]):
        if (fate[begin:end] <= VAL).any():
            tasks.append((read_folder, tokens_folder, folder, i, fate[begin:end]))
    done = crew.map(encode_piece, tasks)
    for _ in progress(done, "encoding", " pieces", len(tasks)):
        pass
    sources = {source: {} for source in dict.fromkeys(pieces.sources)}
    for i in pieces_in(folder):
        said = read_json(folder / f"{numbered(i)}.json")
        add(sources[said["source"]], said["counts"])
    return dict(
        documents=sum(split["documents"] for s in sources.values() for split in s.values()),
        sources=sources,
        files=[f"{numbered(i)}.jsonl.zst" for i in pieces_in(folder)],
    )


TOKENIZERS = {}  # of this process: loading one takes longer than a piece


def encode_piece(read_folder, tokens_folder, folder, i, fate):
    """Write a piece's tokens, each document after an end-of-text, and its text."""
    if (folder / f"{numbered(i)}.json").exists():
        return
    path = tokens_folder / "tokenizer.json"
    if path not in TOKENIZERS:
        TOKENIZERS[path] = Tokenizer.from_json(path.read_bytes(), path)
    tokenizer = TOKENIZERS[path]
    lines = []
    for line, its in zip(read_lines(read_folder / f"{numbered(i)}.jsonl.zst"), fate):
        if its <= VAL:
            lines.append(line | dict(split=("train", "val")[its]))
    arrays = tokenizer.encode([line["text"] for line in lines])
    dtype = arrays[0].dtype
    eot = np.array([tokenizer.eot], dtype=dtype)
    ids = np.concatenate([part for array in arrays for part in (eot, array)])
    lengths = np.array([len(array) + 1 for array in arrays], dtype=np.int64)
    sizes = np.array([len(line["text"].encode()) for line in lines], dtype=np.int64)
    is_val = np.array([line["split"] == "val" for line in lines])
    counts = {}
    for split, these in (("train", ~is_val), ("val", is_val)):
        counts[split] = dict(
            documents=int(these.sum()),
            bytes=int(sizes[these].sum()),
            tokens=int(lengths[these].sum()),
        )
    order = unit_hash_of([line["id"] for line in lines], lines[0]["source"])
    write_lines(folder / f"{numbered(i)}.jsonl.zst", lines)
    write_arrays(
        folder / f"{numbered(i)}.npz",
        ids=ids,
        lengths=lengths,
        bytes=sizes,
        val=is_val,
        order=order,
    )
    write_json(folder / f"{numbered(i)}.json", dict(source=lines[0]["source"], counts=counts))


def unit_hash_of(names, salt):
    """(n,) float64 in [0, 1) of names."""
    digests = [
        hashlib.sha256(f"{salt}\0{name}".encode(errors="replace")).digest() for name in names
    ]
    return np.array([int.from_bytes(d[:8]) >> 11 for d in digests]) * 2.0**-53


# --------------------------------------------------------------------------------------------------
# mix


class Encoded:
    """What encode() has written, of one source and split."""

    def __init__(self, folder, source, val):
        self.folder = folder
        self.val = val
        self.pieces = []  # of each document: its piece
        lengths = []
        sizes = []
        order = []
        places = []
        for i in pieces_in(folder):
            if read_json(folder / f"{numbered(i)}.json")["source"] != source:
                continue
            with np.load(folder / f"{numbered(i)}.npz", allow_pickle=False) as found:
                these = found["val"] == val
                ends = np.cumsum(found["lengths"])
                places.append((ends - found["lengths"])[these])
                lengths.append(found["lengths"][these])
                sizes.append(found["bytes"][these])
                order.append(found["order"][these])
                self.pieces += [np.full(int(these.sum()), i)]
        empty = [np.zeros(0, dtype=np.int64)]
        self.pieces = np.concatenate(self.pieces or empty)
        self.lengths = np.concatenate(lengths or empty)
        self.bytes = np.concatenate(sizes or empty)
        self.order = np.concatenate(order or empty)
        self.places = np.concatenate(places or empty)
        self.open = None  # the piece whose tokens are in memory
        self.ids = None

    def tokens(self, j):
        """The tokens of document j, end-of-text first; j mostly grows."""
        piece = self.pieces[j]
        if self.open != piece:
            with np.load(self.folder / f"{numbered(piece)}.npz", allow_pickle=False) as found:
                self.ids = found["ids"]
            self.open = piece
        return self.ids[self.places[j] : self.places[j] + self.lengths[j]]


WHOLE = 1 << 40  # tokens in a shard: all of them in one


def mix(todo, encoded_folder, tokenizer, folder):
    """Write the shards of both splits, merged by the mix, and of each source's validation."""
    for path in folder.glob("*"):  # of a build that was stopped here
        path.unlink()
    dtype = np.dtype(tokenizer["dtype"]).type
    splits = {}
    sources = {}
    for split in "train", "val":
        there = {}
        for part in todo.source:
            found = Encoded(encoded_folder, part.name, split == "val")
            if len(found.lengths):
                there[part.name] = found
        if split == "train":
            picked = pick(todo, there, sources)
        else:
            picked = {name: np.arange(len(found.lengths)) for name, found in there.items()}
        splits[split] = write_split(there, picked, folder, split, dtype)
        if split == "val":
            by_source = {}
            for number, (name, found) in enumerate(there.items()):
                with ShardWriter(folder, f"source{number}_val", WHOLE, dtype) as writer:
                    for j in range(len(found.lengths)):
                        writer.write(found.tokens(j))
                by_source[name] = writer.paths[0].name
    return dict(splits=splits, sources=sources, by_source=by_source)


def pick(todo, there, sources):
    """{source: documents of the training split in order}; `sources` gets what there is to say."""
    parts = {part.name: part for part in todo.source}
    by_tokens = todo.mix.by == "tokens"
    amounts = {n: f.lengths if by_tokens else f.bytes for n, f in there.items()}
    wanted = mixing.shares(
        todo.mix,
        [(n, int(a.sum()), parts[n].weight, parts[n].max_epochs) for n, a in amounts.items()],
    )
    picked = {}
    for share in wanted:
        found = there[share.name]
        picked[share.name] = mixing.chosen(amounts[share.name], found.order, share.epochs)
        these = picked[share.name]
        sources[share.name] = dict(
            weight=parts[share.name].weight,
            epochs=round(share.epochs, 6),
            documents=len(these),
            bytes=int(found.bytes[these].sum()),
            tokens=int(found.lengths[these].sum()),
        )
    return {name: these for name, these in picked.items() if len(these)}


def write_split(there, picked, folder, split, dtype):
    """Write the shards of a split; returns what the manifest says of it."""
    names = [*picked]
    owners, positions = mixing.merged([there[name].lengths[picked[name]] for name in names])
    size = 0
    with ShardWriter(folder, split, dtype=dtype) as writer:
        order = zip(owners.tolist(), positions.tolist())
        for owner, position in progress(order, f"writing {split}", " documents", len(owners)):
            found = there[names[owner]]
            j = int(picked[names[owner]][position])
            writer.write(found.tokens(j))
            size += int(found.bytes[j])
    return dict(
        documents=len(owners),
        bytes=size,
        tokens=writer.n_tokens,
        shards=[path.name for path in writer.paths],
    )
