"""Which documents hold text that a model is to be tested on.

A document is contaminated where 13 words in a row are those of an evaluation (GPT-3 and lm-eval
count so; data/words.py says what a word is: case, accents and punctuation do not count, numbers
do). An item of fewer words is looked for as a whole: anywhere in documents if it has at least 8
words, GPT-3's least; below that it says little, and counts only where it is all of a document.
"""

import numpy as np

from .words import batches, ngrams, whole, word_hashes

LEAST_WORDS = 8
# The lowest bits of a hash say of how many words it is, so that documents are looked through for
# those lengths only; ALL is for a text as a whole.
LENGTH = np.uint64(63)
ALL = 0


def ngram_hashes(texts, n=13, one_in=1):
    """What contaminated() looks for: sorted unique hashes (G,) uint64 of the n-grams of texts.

    texts: an iterable of str, such as the prompts and answers of an evaluation; n: words in a row,
    8 to 63; one_in: keep one n-gram in so many, chosen by its hash. Of a validation split, which
    may be large, that keeps 8 / one_in bytes a word in memory, and overlaps of n + 10 * one_in
    words are still as good as certain to be found. Sets are united by np.union1d.
    """
    if not LEAST_WORDS <= n <= int(LENGTH):
        raise ValueError(f"n {n}: expected {LEAST_WORDS} to {LENGTH}")
    found = [np.zeros(0, dtype=np.uint64)]
    for batch in batches(texts):
        hashes, counts = word_hashes(batch)
        grams = _marked(ngrams(hashes, counts, n)[0], n)
        found.append(grams[(grams >> np.uint64(6)) % np.uint64(one_in) == 0])
        items = whole(hashes, counts)
        found.append(_marked(items[_short(counts)], ALL))
        for length in range(LEAST_WORDS, n):
            found.append(_marked(items[counts == length], length))
        if len(found) > 1000:
            found = [np.unique(np.concatenate(found))]
    return np.unique(np.concatenate(found))


def contaminated(texts, hashes, n=13):
    """Which texts of a batch have an n-gram, or a whole short item, in common with those behind
    `hashes`: (n_texts,) bool. hashes: of ngram_hashes with the same n."""
    found = np.zeros(len(texts), dtype=bool)
    found[hits(texts, hashes, lengths_of(hashes), n)[0]] = True
    return found


def hits(texts, hashes, lengths, n=13):
    """What texts of a batch have in common with those behind `hashes`, each once: (texts (m,)
    int64, places (m,) int64 in hashes, own (m,) bool: whether ngram_hashes has it of the text,
    and not only of a part of it).

    hashes: of ngram_hashes with the same n, or a memory map of them; lengths: of lengths_of.
    """
    words, counts = word_hashes(texts)
    found = [(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool))]
    for length, few in lengths.items():
        if length == ALL:
            owners = np.flatnonzero(_short(counts))
            values = whole(words, counts)[owners]
        else:
            values, n_grams = ngrams(words, counts, length)
            owners = np.repeat(np.arange(len(texts)), n_grams)
        values = _marked(values, length)
        if few is None:
            order = np.argsort(values)  # so that neighbours are looked for one after the other
            values = values[order]
            owners = owners[order]
        among = hashes if few is None else hashes[few]
        at = np.minimum(np.searchsorted(among, values), len(among) - 1)
        hit = among[at] == values
        at = at[hit] if few is None else few[at[hit]]
        pairs = np.unique(owners[hit] * len(hashes) + at)
        owners, at = np.divmod(pairs, len(hashes))
        own = (length in (ALL, n)) | (counts[owners] == length)
        found.append((owners, at, own))
    return tuple(np.concatenate(parts) for parts in zip(*found))


FEW = 1 << 16


def lengths_of(hashes):
    """Of how many words those behind `hashes` are: {words: where these are in hashes (m,) int64,
    None where they are more than FEW}."""
    chunks = [slice(at, at + (1 << 20)) for at in range(0, len(hashes), 1 << 20)]
    counts = np.zeros(int(LENGTH) + 1, dtype=np.int64)
    for chunk in chunks:
        counts += np.bincount((hashes[chunk] & LENGTH).astype(np.int64), minlength=len(counts))
    found = {}
    for length in np.flatnonzero(counts).tolist():
        found[length] = None
        if counts[length] <= FEW:
            its = [c.start + np.flatnonzero((hashes[c] & LENGTH) == length) for c in chunks]
            found[length] = np.concatenate(its)
    return found


def _short(counts):
    return (0 < counts) & (counts < LEAST_WORDS)


def _marked(hashes, length):
    return (hashes & ~LENGTH) | np.uint64(length)
