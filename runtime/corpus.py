"""The corpus a run trains on, opened by all of its processes."""

from pathlib import Path

from data import open_data, open_dataset
from records.metrics import needs_bytes

from .machine import first_rank_first


def load_data(config, stage_of, world, opener=None):
    """data.Data of a trainer's configuration; the first rank prepares it for the others.

    stage_of: step -> its stage, with rows and model.max_doc_len; opener: in place of
    data.open_dataset, where there is no corpus. Raises InputError.
    """
    opener = opener or open_dataset
    return open_data(
        config.data,
        Path(config.run.cache_dir) / "data",
        batch_rows=lambda step: stage_of(step).rows,
        max_doc_len=lambda step: stage_of(step).model.max_doc_len,
        seed=config.goal.seed,
        need_bytes=needs_bytes(config.goal.target_metric),
        open_dataset=lambda *args: first_rank_first(world, lambda: opener(*args)),
    )
