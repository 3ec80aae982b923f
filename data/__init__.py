"""Where tokens come from: shard format, loaders, FineWeb download, text to shards, tokenizers."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from .loader import Prefetcher, TrainLoader, ValLoader, pack
from .shards import ShardWriter, read_shard
from .text import prepare_text
from .tokenizers import Tokenizer, gpt2_tokenizer

__all__ = [
    "Dataset",
    "Prefetcher",
    "ShardWriter",
    "Tokenizer",
    "TrainLoader",
    "ValLoader",
    "open_dataset",
    "pack",
    "read_shard",
]


@dataclass
class Dataset:
    """Train and validation shards of one corpus, with what is needed to read and name them."""

    name: str
    train: list  # shard paths, in training order
    val: list
    n_vocab: int
    eot: int
    fingerprint: str  # sha256 of the text in order, or the Hub revision
    folder: Path

    @cached_property
    def tokenizer(self):
        """The Tokenizer; loaded late because GPT-2's comes over the network. Raises InputError."""
        path = self.folder / "tokenizer.json"
        return Tokenizer.from_json(path.read_bytes(), path) if path.exists() else gpt2_tokenizer()


def open_dataset(source, tokenizer, cache, train_shards=9):
    """Prepare a corpus if needed and return its Dataset.

    source: "stdlib", "fineweb10B", or the path of a text file or folder; tokenizer: for text, see
    tokenizers.py; cache: folder for shards; train_shards: how many FineWeb shards. Raises
    InputError.
    """
    if source == "fineweb10B":
        from .fineweb import REVISION, download

        folder = Path(cache) / "fineweb10B"
        train, val = download(folder, train_shards)
        return Dataset(source, train, val, 50257, 50256, f"kjj0/fineweb10B-gpt2@{REVISION}", folder)
    folder, meta, tok = prepare_text(source, tokenizer, cache)
    shards = {s: [folder / name for name in meta[f"{s}_shards"]] for s in ("train", "val")}
    return Dataset(
        str(source),
        shards["train"],
        shards["val"],
        tok.n_vocab,
        tok.eot,
        meta["fingerprint"],
        folder,
    )
