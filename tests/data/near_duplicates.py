"""Documents of real text with controlled edits, and what brute force finds among them."""

import itertools
import re
from pathlib import Path

import numpy as np

LIBRARY = Path(re.__file__).parent.parent


def edited_documents(n, seed=0):
    """n documents: parts of the standard library's source, and copies of earlier ones with a few
    or many edits, so that similarities of all sizes occur, most of them above a half."""
    rng = np.random.default_rng(seed)
    originals = real_texts()
    documents = []
    while len(documents) < n:
        words = next(originals).split(" ")
        documents.append(" ".join(words))
        for _ in range(rng.integers(0, 4)):
            documents.append(" ".join(edited(words, rng)))
    documents = documents[:n]
    rng.shuffle(documents)
    return documents


def real_texts():
    """Endless parts of files, of 100 to 400 words; none overlaps another."""
    rng = np.random.default_rng(1)
    for path in sorted(LIBRARY.glob("*.py")) + sorted(LIBRARY.glob("*/*.py")):
        words = path.read_text(errors="ignore").split(" ")
        while len(words) > 500:
            size = int(rng.integers(100, 400))
            yield " ".join(words[:size])
            words = words[size:]


def edited(words, rng):
    """The words with some exchanged, a run of them taken out, or others added at the end."""
    words = list(words)
    kind = rng.integers(3)
    share = rng.random() * 0.35
    if kind == 0:
        for at in rng.choice(len(words), int(share * len(words) / 5), replace=False):
            words[at] = f"other{rng.integers(1000)}"
    elif kind == 1:
        size = int(share * len(words))
        at = int(rng.integers(len(words) - size))
        del words[at : at + size]
    else:
        words += [f"more{rng.integers(1000)}" for _ in range(int(share * len(words)))]
    return words


def brute_force(documents, least=0.8):
    """(pairs (P, 2), similarities (P,)) of all documents at least that similar, counted with
    nothing but sets of tuples of words."""
    ids = {}
    holders = {}
    sizes = []
    for i, text in enumerate(documents):
        words = re.findall(r"[^\W_]+", text.lower())
        own = set(zip(*(words[k:] for k in range(5)))) or {tuple(words)}
        sizes.append(len(own))
        for shingle in own:
            holders.setdefault(ids.setdefault(shingle, len(ids)), []).append(i)
    both = {}
    for members in holders.values():
        for pair in itertools.combinations(members, 2):
            both[pair] = both.get(pair, 0) + 1
    pairs = np.array(list(both)).reshape(-1, 2)
    shared = np.array(list(both.values()))
    sizes = np.array(sizes)
    similarity = shared / (sizes[pairs[:, 0]] + sizes[pairs[:, 1]] - shared)
    chosen = similarity >= least
    return pairs[chosen], similarity[chosen]


def components(n, pairs):
    """The first document of each one's connected component: (n,)."""
    first = np.arange(n)
    changed = True
    while changed:
        before = first.copy()
        for a, b in pairs:
            first[a] = first[b] = min(first[a], first[b])
        changed = not np.array_equal(before, first)
    return first


def precision_and_recall(found, documents, least=0.8):
    """(precision, recall) of clusters found (N,) against brute force, counted in pairs.

    Recall: of pairs at least that similar, those in one cluster. Precision: of pairs in one
    cluster, those that brute force's pairs hold together as well.
    """
    pairs, _ = brute_force(documents, least)
    truth = components(len(documents), pairs)
    recall = np.mean(found[pairs[:, 0]] == found[pairs[:, 1]])
    together = [
        pair
        for first in np.unique(found[found != np.arange(len(found))])
        for pair in itertools.combinations(np.flatnonzero(found == first), 2)
    ]
    precision = np.mean([truth[a] == truth[b] for a, b in together])
    return float(precision), float(recall)
