"""Bits per byte and perplexity of running text: what a run trained on, was validated on, or any."""

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from base import InputError
from base.places import cache_folder
from data import DataConfig, open_dataset, read_shard
from data.encodings import NotText, examine, texts
from data.sources.text import list_files
from data.tokenizers import END_OF_TEXT
from runtime.warm_start import other_tokens

from .results import Measure

LEAST_DOCUMENTS = 20  # whose spread says how certain a number is; else pieces of a row's length


class Text(NamedTuple):
    """Tokens to be measured."""

    name: str  # train, val, or of a file
    streams: list  # (n,) arrays of tokens; the first of each is context alone


def measure_text(scorer, text, row_len, overlap=0):
    """Measures of a Text: bits per byte, nats per token, perplexity per token.

    The standard errors are over documents, whose tokens go together, or over pieces of row_len
    tokens where there are few documents.
    """
    nats = scorer.windows(text.streams, row_len, overlap)
    targets = np.concatenate([tokens[1:] for tokens in text.streams])
    n_bytes = scorer.tokenizer.token_bytes[targets]
    group, unit = groups(text.streams, scorer.tokenizer.eot, row_len)

    def by_group(x):
        return np.bincount(group, weights=x)

    nats, n_bytes, n = by_group(nats), by_group(n_bytes), by_group(np.ones(len(targets)))
    note = f"rows of {row_len} tokens"
    note += f", each beginning with {overlap} of the one before" if overlap else ", no overlap"
    more = dict(lower_is_better=True, unit=unit, note=note)
    return [
        Measure(text.name, "bits per byte", nats / math.log(2), n_bytes, **more),
        Measure(text.name, "nats per token", nats, n, **more),
        Measure(text.name, "perplexity per token", nats, n, log=True, **more),
    ]


def groups(streams, eot, row_len):
    """(number of the group of each target, what groups are)."""
    if len(streams) >= LEAST_DOCUMENTS:  # pieces from all over
        lengths = [len(tokens) - 1 for tokens in streams]
        return np.repeat(np.arange(len(streams)), lengths), f"pieces of {row_len} tokens"
    # The first token of a stream begins a document, be it in the middle of one
    begins = [np.append(True, tokens[1:-1] == eot) for tokens in streams]
    documents = np.cumsum(np.concatenate(begins)) - 1
    if documents[-1] + 1 >= LEAST_DOCUMENTS:
        return documents, "documents"
    return np.arange(len(documents)) // row_len, f"pieces of {row_len} tokens"


# --------------------------------------------------------------------------------------------------
# Texts


def open_corpus(saved):
    """The Dataset that a run was trained on. Raises InputError where it is no longer there, or no
    longer what it was."""
    known = {f.name for f in dataclasses.fields(DataConfig)}
    config = DataConfig(**{k: v for k, v in saved.options.items() if k in known})
    if config.vocabulary:  # the run keeps a copy
        path = str(saved.folder / "tokenizer.json")
        config = dataclasses.replace(config, vocabulary=path)
    cache = Path(saved.options.get("cache_dir") or cache_folder())
    if not cache.is_dir():
        cache = cache_folder()
    dataset = open_dataset(config, cache / "data")
    fingerprint = saved.result.get("data_fingerprint")
    if fingerprint and dataset.fingerprint != fingerprint:
        raise InputError(
            f"{dataset.name}: is no longer the text that {saved.folder} was trained on; name a "
            "text with --text"
        )
    # A vocabulary that was learned anew, as another version of the learner does it
    if other := other_tokens(saved.folder, dataset):
        raise InputError(f"{dataset.name}: {other}; name a text with --text")
    return dataset


def validation(dataset, *limits):
    """The Text of a validation split; limits: of its tokens, of which 0 is none."""
    parts = [read_shard(path, dataset.n_vocab) for path in dataset.val]
    tokens = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return Text("val", [tokens[: min([len(tokens), *(n + 1 for n in limits if n)])]])


def training(dataset, row_len, n_tokens):
    """A Text of about n_tokens out of the training text, in pieces of row_len spread evenly."""
    pieces = []
    shards = [read_shard(path, dataset.n_vocab) for path in dataset.train]
    total = sum(map(len, shards))
    for shard in shards:
        n = max(1, round(n_tokens / row_len * len(shard) / total))
        last = max(0, len(shard) - row_len - 1)
        for start in np.linspace(0, last, min(n, max(1, len(shard) // row_len))).astype(int):
            pieces.append(shard[start : start + row_len + 1])
    return Text("train", pieces)


def read_documents(path):
    """Texts of a file or a folder: files, or what stands between end-of-text marks. Raises
    InputError."""
    try:
        listing = list_files(Path(path))
        documents = []
        for name in listing.files:
            file = listing.root / name
            found = examine(file)
            whole = "".join(texts(file, found.encoding))
            documents += [part for part in whole.split(END_OF_TEXT) if part]
    except NotText as e:
        raise InputError(f"--text {file}: expected text, found a file that is {e}") from None
    except OSError as e:
        raise InputError(f"--text {e.filename or path}: {e.strerror}") from None
    if not documents:
        raise InputError(f"--text {path}: expected some text, found none")
    return documents


def as_text(name, documents, tokenizer, most=0):
    """The Text of documents; most: tokens at most, 0 for all. Raises InputError for text that the
    tokenizer does not know."""
    tokens = []
    for ids in tokenizer.encode(documents):
        tokens += [np.array([tokenizer.eot], dtype=tokenizer.dtype), ids]
    tokens = np.concatenate(tokens)
    return Text(name, [tokens[: most + 1] if most else tokens])


def as_documents(tokens, tokenizer):
    """Texts of the documents among tokens."""
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.eot))
    return [tokenizer.decode(part) for part in parts if len(part)]
