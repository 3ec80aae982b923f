"""Which documents are there already: exactly, nearly, or in paragraphs.

Each of the three is done in two steps, so that a build can stream. The first turns a batch of texts
into a few numbers for each, in any process; it depends on those texts alone. The second sees the
numbers of all documents, in their order, and says which is a copy of which.

Near duplicates are found by MinHash with banding (Broder 1997; Leskovec, Rajaraman and Ullman,
chapter 3). The similarity s of two documents is Jaccard's: the share of their sets of five words in
a row (data/words.py says what a word is) that both have. A signature is the least hash of a
document's set under each of 14 x 8 functions, so two signatures agree in a share s of their places.
Documents that agree in all 8 places of any of 14 bands are candidates: a pair is one with
probability 1 - (1 - s^8)^14. What is then made of a candidate, near_duplicates says.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from .pieces import progress, read_arrays, write_arrays
from .words import batches, ngrams, whole, word_hashes

NO_WORDS = np.uint32(0xFFFFFFFF)  # fills the signature of a text without words
# Partners in its bucket that a document is compared with, in each band. Only where very many
# documents share a band by a template, and are not alike, are there more.
MOST_PARTNERS = 256
IN_BAND = 0xD6E8FEB86659FD93  # an odd multiplier without structure
ROWS_AT_ONCE = 1 << 16
PAIRS_IN_MEMORY = 1 << 16  # where more members of a bucket are compared than the first
PAIRS_AT_ONCE = 1 << 12  # by their signatures
TEXTS_AT_ONCE = 1 << 8  # pairs, by their texts


@dataclass(frozen=True)
class MinHash:
    """How near duplicates are looked for: the parameters that a record has to name."""

    words: int = 5  # in a row
    bands: int = 14
    rows: int = 8  # functions in a band
    seed: int = 1  # of the functions
    threshold: float = 0.8  # least similarity of duplicates

    @property
    def functions(self):
        return self.bands * self.rows

    @property
    def doubt(self):
        """How far a signature's estimate of the threshold may be off: three standard errors."""
        return 3 * (self.threshold * (1 - self.threshold) / self.functions) ** 0.5


def exact_keys(texts):
    """128 bits of each text's BLAKE2b, of its UTF-8: (n, 2) uint64. Equal texts have equal keys."""
    digests = [
        hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        for text in texts
    ]
    return np.frombuffer(b"".join(digests), dtype="<u8").reshape(-1, 2)


def shingles(texts, config):
    """The hashes of `config.words` words in a row of a batch: (hashes (S,) uint64, counts (n,)).

    A text of fewer words has one, of all of them; a text without words has none.
    """
    hashes, counts = word_hashes(texts)
    grams, n_grams = ngrams(hashes, counts, config.words)
    short = np.flatnonzero((0 < counts) & (counts < config.words))
    if len(short):
        at = np.cumsum(n_grams)[short]  # the short text itself has none yet
        grams = np.insert(grams, at, whole(hashes, counts)[short])
        n_grams[short] = 1
    return grams, n_grams


def signatures(texts, config):
    """MinHash signatures (n, bands * rows) uint32 of a batch of texts.

    Function k maps a shingle's hash x, the upper half of its 64 bits, to a_k x + b_k modulo 2^32:
    a permutation, which puts the first place of a set with equal chances everywhere, x being as
    good as random. A text without words has NO_WORDS everywhere.
    """
    grams, counts = shingles(texts, config)
    halves = (grams >> np.uint64(32)).astype(np.uint32)
    a, b = _functions(config)
    out = np.full((len(texts), config.functions), NO_WORDS)
    end = 0
    for row, count in zip(out, counts):
        begin = end
        end += count
        for at in range(begin, end, 1024):  # what fits into the cache
            values = halves[at : min(at + 1024, end)] * a
            values += b
            np.minimum(row, values.min(axis=1), out=row)
    return out


@lru_cache(maxsize=4)
def _functions(config):
    """(a, b), each (functions, 1) uint32, a odd."""
    rng = np.random.default_rng(config.seed)
    a, b = rng.integers(0, 1 << 32, (2, config.functions, 1), dtype=np.uint32)
    return a | np.uint32(1), b


def exact_duplicates(keys):
    """For keys (N, 2) of all documents, the index of the first that is equal: (N,) int64, its own
    where a document is the first. Takes about 40 bytes a document beside the keys."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # keeps the order of equal ones
    same = np.ones(max(0, len(keys) - 1), dtype=bool)  # as the one before, in that order
    for column in keys.T:
        ordered = column[order]
        same &= ordered[1:] == ordered[:-1]
    new = np.append(True, ~same)[: len(keys)]
    group = np.cumsum(new) - 1
    first = np.empty(len(keys), dtype=np.int64)
    first[order] = order[new][group]
    return first


def near_duplicates(signatures, config, compare=None, kept=None):
    """For signatures (N, k) uint32 of all documents, the index of the first document in each one's
    cluster: (N,) int64, its own where that is the document itself, which is to be kept.

    signatures: an array or a memory map of one, read band by band; compare: function from two
    arrays of documents' indices (n,) to the similarities (n,) of these pairs of texts; kept: Path
    of a file that is written after each band, and from which a call with the same arguments goes
    on. Candidates are duplicates where the share of places in which their signatures agree is at
    least config.threshold. That estimate has a standard error (0.038 at 0.8), so with `compare`,
    candidates whose estimate is within config.doubt of the threshold are decided by the similarity
    of their texts. Clusters are what duplicates hold together, as links of a chain do. Takes less
    than 60 bytes a document beside the signatures.
    """
    n = len(signatures)
    # unmet: had more partners in some bucket than it was compared with
    state = dict(parents=np.arange(n), unmet=np.zeros(n, dtype=bool), bands=0)
    if kept is not None and kept.exists():
        state = read_arrays(kept)
    parents = state["parents"]
    unmet = state["unmet"]
    todo = range(int(state["bands"]), config.bands)
    for band in progress(todo, "comparing what may be alike", " bands"):
        members, buckets = _buckets(signatures, band, config)
        met = 0  # members of each bucket so far that all others of it have met
        while len(members) and met < MOST_PARTNERS:
            # One at first, with which most are alike, then more and more at a time: that two are
            # compared needlessly, being both like a third, is dear only for a large cluster
            fit = max(1, PAIRS_IN_MEMORY // len(members))
            n_leaders = min(max(1, met), MOST_PARTNERS - met, fit)
            left, right, stay = _pairs(parents, members, buckets, n_leaders)
            alike = _alike(signatures, left, right, band, unmet, config, compare)
            _join(parents, left[alike], right[alike])
            members = members[stay]
            buckets = buckets[stay]
            met += n_leaders
        unmet[members] = True
        if kept is not None:
            write_arrays(kept, parents=parents, unmet=unmet, bands=band + 1)
    return _roots(parents, np.arange(n))


def _buckets(signatures, band, config):
    """Documents that share all places of a band with another one: (members (M,) int32, the number
    of each one's bucket (M,) int32), bucket by bucket, ascending within one."""
    places = slice(band * config.rows, (band + 1) * config.rows)
    keys = np.empty(len(signatures), dtype=np.uint64)
    for at in range(0, len(keys), ROWS_AT_ONCE):
        rows = np.asarray(signatures[at : at + ROWS_AT_ONCE, places])
        part = np.zeros(len(rows), dtype=np.uint64)
        for place in rows.T:
            part *= np.uint64(IN_BAND)
            part += place
        part[(rows == NO_WORDS).all(axis=1)] = 0  # which is no key of another's, but by a miracle
        keys[at : at + ROWS_AT_ONCE] = part
    order = np.argsort(keys)
    keys = keys[order]
    same = keys[1:] == keys[:-1]
    shared = np.append(False, same) | np.append(same, False)
    shared &= keys != 0
    members = order[shared].astype(np.int32)
    del order
    keys = keys[shared]
    new = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
    del keys
    buckets = np.cumsum(new, dtype=np.int32)
    ascending = np.lexsort((members, buckets))  # a sort need not keep the order of equal keys
    return members[ascending], buckets[ascending]


def _pairs(parents, members, buckets, n_leaders):
    """The first n_leaders members of each bucket, each with those after it in its bucket that are
    not in its cluster: (left, right, each (n,) int32, which members have others to meet still
    (M,) bool). members, buckets: of _buckets."""
    new = np.diff(buckets, prepend=-1) != 0
    starts = np.flatnonzero(new).astype(np.int32)
    bucket = np.cumsum(new, dtype=np.int32) - 1
    rank = np.arange(len(members), dtype=np.int32) - starts[bucket]  # in its bucket
    roots = _roots(parents, members).astype(np.int32)
    left = []
    right = []
    for k in range(n_leaders):
        later = rank > k
        leaders = starts[bucket[later]] + np.int32(k)
        apart = roots[later] != roots[leaders]
        left.append(members[leaders[apart]])
        right.append(members[later][apart])
    # A bucket that is one cluster is done
    mixed = np.logical_or.reduceat(roots != roots[starts][bucket], starts)
    stay = mixed[bucket] & (rank >= n_leaders)
    return np.concatenate(left), np.concatenate(right), stay


def _alike(signatures, left, right, band, unmet, config, compare):
    """Which pairs of documents, candidates of a band, are duplicates: (n,) bool; see
    near_duplicates."""
    alike = np.zeros(len(left), dtype=bool)
    unsure = np.zeros(len(left), dtype=bool)
    for at in range(0, len(left), PAIRS_AT_ONCE):
        some = slice(at, at + PAIRS_AT_ONCE)
        same = signatures[left[some]] == signatures[right[some]]
        share = same.mean(axis=1)
        alike[some] = share >= config.threshold
        if compare is not None:
            doubtful = np.abs(share - config.threshold) <= config.doubt
            alike[some] &= ~doubtful
            # Candidates of an earlier band, and in two clusters still: then they were found unlike
            before = same.reshape(-1, config.bands, config.rows)[:, :band].all(axis=2).any(axis=1)
            before &= ~(unmet[left[some]] & unmet[right[some]])
            unsure[some] = doubtful & ~before
    if unsure.any():
        alike[unsure] = compare(left[unsure], right[unsure]) >= config.threshold
    return alike


def _join(parents, left, right):
    """Put the documents of each pair into one cluster."""
    for at in range(0, len(left), PAIRS_AT_ONCE):
        some = slice(at, at + PAIRS_AT_ONCE)
        for one, other in zip(left[some].tolist(), right[some].tolist()):
            first, second = sorted((_root(parents, one), _root(parents, other)))
            parents[second] = first


def similarities(read, left, right, config):
    """Jaccard's similarity of the documents left[i] and right[i]: (n,) float64.

    left, right: indices (n,); read: function from a list of indices to texts. The texts of
    TEXTS_AT_ONCE pairs are in memory at a time.
    """
    found = np.zeros(len(left))
    for at in range(0, len(left), TEXTS_AT_ONCE):
        pairs = np.stack([left[at : at + TEXTS_AT_ONCE], right[at : at + TEXTS_AT_ONCE]])
        documents, where = np.unique(pairs, return_inverse=True)
        sets = _shingle_sets(read(documents.tolist()), config)
        for i, (a, b) in enumerate(where.reshape(2, -1).T, at):
            both = len(np.intersect1d(sets[a], sets[b], assume_unique=True))
            found[i] = both / max(1, len(sets[a]) + len(sets[b]) - both)
    return found


def _shingle_sets(texts, config):
    """The sorted hashes of each text's shingles, [(s,) uint64, ...]."""
    sets = []
    for batch in batches(texts):
        grams, counts = shingles(batch, config)
        sets += [np.unique(own) for own in np.split(grams, np.cumsum(counts)[:-1])]
    return sets


def _root(parents, document):
    """The first document of a document's cluster."""
    while (parent := parents[document]) != document:
        parents[document] = document = parents[parent]
    return document


def _roots(parents, documents):
    """The same of many: (n,) int64."""
    roots = parents[documents]
    while not np.array_equal(up := parents[roots], roots):
        roots = up
    parents[documents] = roots
    return roots


def piece_keys(texts, divider="\n\n"):
    """The parts of texts between dividers, by default paragraphs: (keys (P,) uint64, counts
    (n,) int64 of each text's). Two parts with the same words have the same key; those without words
    have 0."""
    pieces = [text.split(divider) for text in texts]
    hashes, counts = word_hashes([piece for own in pieces for piece in own])
    sizes = [len(own) for own in pieces]
    return whole(hashes, counts), np.array(sizes, dtype=np.int64)


def repeated_pieces(keys, counts, most=1):
    """Which parts of all documents are to go: (P,) bool.

    keys (P,), counts (N,): of piece_keys, over all documents in their order. A part that more than
    `most` documents have stays where it comes first; everywhere else, the same document included,
    it goes. What has no words stays. Takes about 40 bytes a part beside the keys.
    """
    documents = np.repeat(np.arange(len(counts)), counts)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    new = np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]
    if not len(order):
        return new

    # In how many documents: how often the document changes within a run of equal keys
    changes = new | (np.diff(documents[order], prepend=-1) != 0)
    starts = np.flatnonzero(new)
    n_documents = np.add.reduceat(changes.astype(np.int64), starts)
    many = (n_documents > most)[np.cumsum(new) - 1]
    gone = np.zeros(len(keys), dtype=bool)
    gone[order] = many & ~new & (ordered != 0)
    return gone


def without_pieces(text, gone, divider="\n\n"):
    """The text without the parts that are to go. gone: (pieces of it,) bool."""
    return divider.join(piece for piece, out in zip(text.split(divider), gone) if not out)
