"""The corpus a run trains on, opened by all processes of the run."""

import dataclasses
from pathlib import Path

from data import DataConfig, open_data, open_dataset
from records.metrics import needs_bytes

from .machine import first_rank_first


def load_data(c, stages, world, opener=None):
    """Prepare the corpus of Config c (the first rank does the work) and open its loaders; returns
    Data. stages: one per step; opener: in place of open_dataset, where there is no data."""
    opener = opener or open_dataset
    fields = {f.name: getattr(c, f.name) for f in dataclasses.fields(DataConfig)}
    return open_data(
        DataConfig(**fields),
        Path(c.cache_dir) / "data",
        batch_rows=lambda step: stages[step - 1].rows,
        max_doc_len=lambda step: stages[step - 1].max_doc_len,
        seed=c.seed,
        need_bytes=needs_bytes(c.target_metric),
        open_dataset=lambda *args: first_rank_first(world, lambda: opener(*args)),
    )
