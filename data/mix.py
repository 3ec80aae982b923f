"""How much of each source is trained on, and in which order.

Documents of all sources are merged so that the mix is the same in every part of the training split:
each document has a place in its source, a fraction from 0 to 1, and the split is sorted by it.
"""

from typing import NamedTuple

import numpy as np

from base import InputError


class Share(NamedTuple):
    """A source in the mix. there, wanted: tokens or bytes, as the mix counts."""

    name: str
    there: int
    wanted: float
    epochs: float


def shares(mix, sources):
    """How much of each source: list of Share.

    mix: recipe.Mix; sources: [(name, tokens or bytes there are, weight or None, max_epochs)].
    Raises InputError for more than there is.
    """
    sources = [source for source in sources if source[1]]
    weighted = any(weight is not None for _, _, weight, _ in sources)
    amounts = [there if weight is None else weight for _, there, weight, _ in sources]
    fractions = [amount / sum(amounts) for amount in amounts]
    most = [max_epochs * there / f for (_, there, _, max_epochs), f in zip(sources, fractions)]
    if mix.total is not None:
        total = mix.total
        if total > min(most) * (1 + 1e-9):
            name, there, _, max_epochs = sources[most.index(min(most))]
            raise InputError(
                f"[mix] total {total:,}: {name} has {there:,} {mix.by}, enough for a total of "
                f"{int(min(most)):,} with its max_epochs of {max_epochs:g}; lower the total or its "
                "weight, or raise max_epochs"
            )
    elif weighted:
        total = min(most)
    else:  # without weights everything once
        total = sum(amounts)
    return [
        Share(name, there, f * total, f * total / there)
        for (name, there, _, _), f in zip(sources, fractions)
    ]


def chosen(sizes, hashes, epochs):
    """Which documents of a source, and how often: array of indices in order.

    sizes: (n,) of documents; hashes: (n,) in [0, 1), which choose those of a part of an epoch;
    epochs: how often the source is gone through.
    """
    n = len(sizes)
    whole = int(epochs + 1e-9)
    passes = [np.arange(n)] * whole
    part = epochs - whole
    if part > 1e-9:
        # As many as make up the part, those of the lowest hashes, in the order of the source
        by_hash = np.argsort(hashes, kind="stable")
        reached = np.cumsum(np.asarray(sizes, dtype=np.float64)[by_hash])
        wanted = part * reached[-1]
        count = int(np.searchsorted(reached - np.asarray(sizes)[by_hash] / 2, wanted))
        passes.append(np.sort(by_hash[:count]))
    return np.concatenate(passes) if passes else np.zeros(0, dtype=np.int64)


def merged(sizes_by_source):
    """The order of all documents: (sources (m,), positions (m,)), the k-th of them being
    number positions[k] among those of source sources[k]."""
    places = []
    owners = []
    positions = []
    for i, sizes in enumerate(sizes_by_source):
        sizes = np.asarray(sizes, dtype=np.float64)
        ends = np.cumsum(sizes)
        places.append((ends - sizes / 2) / max(1.0, ends[-1] if len(ends) else 1.0))
        owners.append(np.full(len(sizes), i, dtype=np.int32))
        positions.append(np.arange(len(sizes)))
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.concatenate(owners)[order], np.concatenate(positions)[order]
