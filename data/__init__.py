"""Where tokens come from: sources, shards, tokenizers, and the loaders that training reads."""

from .config import DataConfig
from .dataset import Data, Dataset, open_data, open_dataset
from .loader import Prefetcher, TrainLoader, ValLoader, pack
from .shards import ShardWriter, read_shard
from .tokenizers import Tokenizer

__all__ = [
    "Data",
    "DataConfig",
    "Dataset",
    "Prefetcher",
    "ShardWriter",
    "Tokenizer",
    "TrainLoader",
    "ValLoader",
    "open_data",
    "open_dataset",
    "pack",
    "read_shard",
]
