"""Words of texts as 64-bit hashes, a batch of texts at a time: what finding duplicates and
contamination counts.

Words are runs of letters and digits, in lower case and without accents; everything else is only
between them. A character of a script that puts no spaces between words (Chinese, Japanese, Thai,
Khmer, Burmese) is a word by itself. Numbers stay as they are: `3 + 4 = 7` is not `5 + 2 = 7`.

A word's hash is a polynomial over random values of its characters, modulo 2^64, mixed afterwards.
One running sum over the whole batch gives those of all words, so no loop in Python touches a word.
Two different words share a hash with a probability of about 2^-56.
"""

import unicodedata
from functools import lru_cache

import numpy as np

BETWEEN, LETTER, ALONE, DROPPED, UNKNOWN = range(5)  # what a character is
# Scripts without spaces between words: Thai and Lao, Burmese, Khmer, Japanese and Chinese
NO_SPACES = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
CODE_POINTS = 0x110000

# Odd multipliers without structure: of characters within a word, of words within an n-gram
IN_WORD = 0x9E3779B97F4A7C15
IN_NGRAM = 0xD6E8FEB86659FD93


def mix(x):
    """Spread every bit of x (n,) uint64 over all 64, in place: a permutation; Stafford's mix 13."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def word_hashes(texts):
    """The words of a batch of texts: (hashes (W,) uint64, counts (n,) int64 of words in each
    text), in the order of the text."""
    joined = "\n".join(texts)
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    ends = np.cumsum(np.array([len(text) + 1 for text in texts], dtype=np.int64))
    kinds, values = _characters(codes)

    dropped = kinds == DROPPED
    if dropped.any():
        ends = ends - np.cumsum(np.append(0, dropped))[np.minimum(ends, len(codes))]
        kinds = kinds[~dropped]
        values = values[~dropped]

    # A word begins at a letter that follows none, and at every character that is alone
    letter = np.zeros(len(kinds) + 2, dtype=bool)
    letter[1:-1] = kinds == LETTER
    alone = kinds == ALONE
    first = np.flatnonzero((letter[1:-1] & ~letter[:-2]) | alone)
    last = np.flatnonzero((letter[1:-1] & ~letter[2:]) | alone)

    powers, inverses = _powers(IN_WORD, 1 << len(kinds).bit_length())
    sums = np.zeros(len(kinds) + 1, dtype=np.uint64)
    np.cumsum(values * powers[: len(kinds)], out=sums[1:])
    hashes = mix((sums[last + 1] - sums[first]) * inverses[first])
    before = np.searchsorted(first, ends)  # words that begin before each text's end
    return hashes, np.diff(before, prepend=0)


def batches(texts, chars=1 << 20):
    """Lists of texts of about so many characters together."""
    batch = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= chars:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch


def ngrams(hashes, counts, n):
    """Hashes of every n words in a row: (grams (G,) uint64, counts (n_texts,) int64 of them).

    hashes, counts: of word_hashes. A text of fewer words has none; n-grams never span two texts.
    """
    n_grams = np.maximum(counts - (n - 1), 0)
    if len(hashes) < n:
        return np.zeros(0, dtype=np.uint64), n_grams
    size = len(hashes) - n + 1
    grams = hashes[:size].copy()
    for k in range(1, n):
        grams *= np.uint64(IN_NGRAM)
        grams += hashes[k : k + size]
    mix(grams)

    # Those that begin in the last n - 1 words of a text would go on into the next
    inside = np.ones(len(hashes), dtype=bool)
    for text_end, count in zip(np.cumsum(counts), counts):
        inside[max(text_end - (n - 1), text_end - count) : text_end] = False
    return grams[inside[:size]], n_grams


def whole(hashes, counts):
    """One hash over all the words of each text: (n_texts,) uint64, 0 where there are none.

    Of a text of n words it is the hash that ngrams gives for n.
    """
    ends = np.cumsum(counts)
    powers, inverses = _powers(IN_NGRAM, 1 << len(hashes).bit_length())
    sums = np.zeros(len(hashes) + 1, dtype=np.uint64)
    np.cumsum(hashes * inverses[: len(hashes)], out=sums[1:])
    found = (sums[ends] - sums[ends - counts]) * powers[np.maximum(ends - 1, 0)]
    mix(found)
    found[counts == 0] = 0
    return found


def _characters(codes):
    """What code points (n,) are: (kinds (n,) uint8, values (n,) uint64, 0 between words)."""
    kinds, values = _table()
    found = kinds[codes]
    if (found == UNKNOWN).any():
        for code in np.unique(codes[found == UNKNOWN]).tolist():
            kinds[code], normal = _examine(chr(code))
            if kinds[code] in (LETTER, ALONE):
                values[code] = mix(np.array([ord(normal) + 1], dtype=np.uint64))[0]
        found = kinds[codes]
    return found, values[codes]


@lru_cache(maxsize=1)
def _table():
    """(kinds, values) of all code points. Each is looked up when it is first met."""
    return np.full(CODE_POINTS, UNKNOWN, np.uint8), np.zeros(CODE_POINTS, np.uint64)


def _examine(char):
    """(kind, the character it counts as)."""
    category = unicodedata.category(char)
    if category == "Mn":
        return DROPPED, char
    if category[0] not in "LNM":
        return BETWEEN, char
    normal = char.lower()[0]
    base, *marks = unicodedata.normalize("NFD", normal)
    if all(unicodedata.category(mark) == "Mn" for mark in marks):
        normal = base  # an accent goes; the parts of a Korean syllable stay together
    alone = any(first <= ord(char) <= last for first, last in NO_SPACES)
    return (ALONE if alone else LETTER), normal


@lru_cache(maxsize=4)
def _powers(base, n):
    """base to the powers 0 ... n - 1, and their inverses, modulo 2^64: (n,) uint64 each."""
    both = []
    for factor in base, pow(base, -1, 1 << 64):
        powers = np.full(n, factor, dtype=np.uint64)
        powers[0] = 1
        both.append(np.cumprod(powers))
    return tuple(both)
