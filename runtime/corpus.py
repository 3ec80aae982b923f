"""The corpus a run trains on, opened by all of its processes."""

import contextlib
from pathlib import Path

from base import write_text
from data import open_data, open_dataset
from records.metrics import needs_bytes

from .machine import first_rank_first

TAG = "Signature: 8a477f597d28d172789f06886806bc55\n"  # of a cache, by bford.info/cachedir


def tag_cache(folder):
    """Mark a folder as a cache, which backups pass over, and so does a folder of text around
    it."""
    with contextlib.suppress(OSError):  # a read-only one
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "CACHEDIR.TAG").exists():
            write_text(folder / "CACHEDIR.TAG", TAG)


def load_data(config, stage_of, world, opener=None):
    """data.Data of a trainer's configuration; the first rank prepares it for the others.

    stage_of: step -> its stage, with rows and model.max_doc_len; opener: in place of
    data.open_dataset, where there is no corpus. Raises InputError.
    """
    opener = opener or open_dataset
    cache = Path(config.run.cache_dir)
    if world.rank == 0:
        for name in "data", "inductor":  # not the whole, which may be anybody's folder
            tag_cache(cache / name)

    return open_data(
        config.data,
        cache / "data",
        batch_rows=lambda step: stage_of(step).rows,
        max_doc_len=lambda step: stage_of(step).model.max_doc_len,
        seed=config.goal.seed,
        need_bytes=needs_bytes(config.goal.target_metric),
        open_dataset=lambda *args: first_rank_first(world, lambda: opener(*args)),
        questions=(config.policy.questions, config.policy.answer_tokens),
    )
