"""Where tokens come from: sources, shards, tokenizers, and the loaders that training reads.

Names are loaded when they are first asked for: the loaders import torch, which takes more than a
second, and what only reads or writes text has no use for it.
"""

import importlib

MODULES = {
    "Data": "dataset",
    "DataConfig": "config",
    "Dataset": "dataset",
    "Prefetcher": "loader",
    "ShardWriter": "shards",
    "Tokenizer": "tokenizers",
    "TrainLoader": "loader",
    "ValLoader": "loader",
    "open_data": "dataset",
    "open_dataset": "dataset",
    "pack": "loader",
    "read_shard": "shards",
}
__all__ = [*MODULES]


def __getattr__(name):
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)
    globals()[name] = value
    return value
