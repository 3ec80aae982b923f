"""What `./run.sh data build` has made, to train on: --data FOLDER."""

import json
from functools import partial
from pathlib import Path

from base import InputError
from base.files import difference

from .dataset import Dataset
from .pieces import progress
from .sources import MANIFEST, Source
from .tokenizers import Tokenizer


def read_manifest(folder):
    """The manifest of a built corpus. Raises InputError."""
    path = Path(folder, MANIFEST)
    try:
        manifest = json.loads(path.read_bytes())
        for split in "train", "val":
            names = manifest["splits"][split]["shards"]
            if not names or not all(name in manifest["files"] for name in names):
                raise ValueError(f"no {split} shards")
        str(manifest["fingerprint"]), int(manifest["n_vocab"]), int(manifest["eot"])
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{path}: not the manifest of a built corpus ({type(e).__name__}: {e}); expected what "
            "./run.sh data build writes"
        ) from None


def check(folder, manifest, names):
    """Compare files with their checksums. Raises InputError."""
    for name in progress(names, f"comparing checksums of {folder}", "file"):
        size, sha256 = manifest["files"][name]
        try:
            problem = difference(folder / name, size, sha256)
        except OSError as e:
            problem = e.strerror
        if problem:
            raise InputError(
                f"{folder / name}: {problem}: not what was built; build it again with --replace"
            )


def load_tokenizer(folder):
    path = folder / "tokenizer.json"
    return Tokenizer.from_json(path.read_bytes(), path)


def open_built(config, cache):
    """The Dataset of a built corpus, whose folder is config.data. Raises InputError."""
    folder = Path(config.data)
    manifest = read_manifest(folder)
    splits = manifest["splits"]
    shards = {name: splits[name]["shards"] for name in ("train", "val")}
    check(folder, manifest, ["tokenizer.json", *shards["train"], *shards["val"]])
    train = splits["train"]
    about = {name: s.get("licence") for name, s in manifest["sources"].items()}
    return Dataset(
        name=str(folder),
        train=[folder / name for name in shards["train"]],
        val=[folder / name for name in shards["val"]],
        n_vocab=manifest["n_vocab"],
        eot=manifest["eot"],
        fingerprint=manifest["fingerprint"],
        folder=folder.absolute(),
        load_tokenizer=partial(load_tokenizer, folder),
        notes=[
            f"{folder}: {train['documents']:,} documents, {train['tokens']:,} tokens of "
            f"{', '.join(manifest['sources'])}; validation: {splits['val']['documents']:,}"
        ],
        about=dict(folder=str(folder.absolute()), licences=about),
    )


SOURCE = Source("a corpus that was built", open_built)
