"""The corpus a run trains on, opened: its loaders, and what its validation split stands for in
bytes."""

import typing
from pathlib import Path

from base import InputError
from data import Dataset, TrainLoader, ValLoader, open_dataset, read_shard
from records.metrics import needs_bytes

from .machine import first_rank_first


class Data(typing.NamedTuple):
    dataset: Dataset
    train: TrainLoader
    val: ValLoader
    val_bytes: (
        int | None
    )  # text the validation targets stand for; None if the vocabulary is out of reach


def load_data(c, stages, world):
    """Prepare the corpus of Config c (the first rank does the work) and open its loaders;
    stages: one per step."""
    dataset = first_rank_first(
        world,
        lambda: open_dataset(
            Path(c.text) if c.data == "text" else c.data,
            c.tokenizer,
            Path(c.cache_dir) / "data",
            c.train_shards,
        ),
    )
    known = dict(eot=dataset.eot, n_vocab=dataset.n_vocab)
    train = TrainLoader(
        dataset.train,
        **known,
        row_len=c.row_len,
        batch_rows=lambda step: stages[step - 1].rows,
        max_doc_len=lambda step: stages[step - 1].max_doc_len,
        long_docs=c.long_docs,
        shuffle=c.shuffle,
        seed=c.seed,
    )
    there = sum(len(read_shard(p)) for p in dataset.val) - 1
    n_tokens = (
        c.val_tokens if c.data == "fineweb10B" else min(c.val_tokens, there)
    )  # FineWeb's number is the task
    val = ValLoader(dataset.val, **known, row_len=c.val_row_len, n_tokens=n_tokens or None)
    try:
        val_bytes = int(dataset.tokenizer.token_bytes[val.targets].sum())
    except (
        InputError
    ):  # GPT-2's vocabulary comes over the network; only metrics of bytes and the sample need it
        if needs_bytes(c.target_metric):
            raise
        val_bytes = None
    return Data(dataset, train, val, val_bytes)
