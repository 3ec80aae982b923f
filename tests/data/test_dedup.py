"""data/dedup.py: against brute force, and what it promises of order, batches and memory."""

import dataclasses
import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from near_duplicates import brute_force, edited_documents, precision_and_recall

from data import dedup
from data.dedup import MinHash

FAST = settings(deadline=None, max_examples=50)
CONFIG = MinHash()
SMALL_KEYS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=30)


def reader(documents):
    return lambda indices: [documents[i] for i in indices]


def comparer(documents, config=CONFIG):
    return lambda left, right: dedup.similarities(reader(documents), left, right, config)


def check_against_brute_force(n):
    documents = edited_documents(n)
    signatures = dedup.signatures(documents, CONFIG)
    found = dedup.near_duplicates(signatures, CONFIG, comparer(documents))
    precision, recall = precision_and_recall(found, documents)
    print(f"{n} documents: precision {precision:.4f}, recall {recall:.4f}")
    assert precision >= 0.99
    assert recall >= 0.95


def test_recall_and_precision():
    check_against_brute_force(1000)


@pytest.mark.slow
def test_recall_and_precision_of_5000_documents():
    check_against_brute_force(5000)


def test_signatures_estimate_the_similarity():
    documents = edited_documents(600, seed=3)
    signatures = dedup.signatures(documents, CONFIG)
    pairs, similarity = brute_force(documents, least=0.3)
    estimate = (signatures[pairs[:, 0]] == signatures[pairs[:, 1]]).mean(axis=1)
    error = np.sqrt(similarity * (1 - similarity) / CONFIG.functions)
    assert abs((estimate - similarity).mean()) < 0.01
    assert 0.85 < ((estimate - similarity) / np.maximum(error, 1e-3)).std() < 1.15


def test_without_texts_the_estimate_decides():
    documents = edited_documents(400)
    signatures = dedup.signatures(documents, CONFIG)
    found = dedup.near_duplicates(signatures, CONFIG)
    for document in np.flatnonzero(found != np.arange(400)):
        others = np.flatnonzero(found == found[document])
        shares = (signatures[others] == signatures[document]).mean(axis=1)
        shares[others == document] = 0
        assert shares.max() >= CONFIG.threshold


def test_similarities_are_jaccards():
    documents = edited_documents(100)
    pairs, expected = brute_force(documents, least=0.01)
    found = dedup.similarities(reader(documents), pairs[:, 0], pairs[:, 1], CONFIG)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_signatures_do_not_depend_on_the_batch_or_the_process():
    documents = [*edited_documents(20), "", "short one", "!?", "word " * 5000]
    whole = dedup.signatures(documents, CONFIG)
    assert whole.dtype == np.uint32 and whole.shape == (24, 112)
    parts = [dedup.signatures(documents[i : i + 5], CONFIG) for i in range(0, 24, 5)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    seven_words = dedup.signatures(["a b c d e f g"], CONFIG)[0]
    assert seven_words.sum() == 124882345423  # of this seed, in every process


def test_short_texts_and_those_without_words():
    texts = ["Hello, world!", "hello world", "", "...", "", "hello there"]
    texts += ["one two three four", "ONE, two, three: four", "a b c d e", "a b c d e!"]
    signatures = dedup.signatures(texts, CONFIG)
    assert dedup.near_duplicates(signatures, CONFIG).tolist() == [0, 0, 2, 3, 4, 5, 6, 6, 8, 8]


def test_the_first_of_a_cluster_stays_and_chains_hold_together():
    words = [f"w{i}" for i in range(400)]
    chain = [" ".join(words[20 * i : 20 * i + 300]) for i in range(5)]  # each 0.87 to the next
    order = [3, 1, 4, 0, 2]
    documents = ["something else entirely, of six words"] + [chain[i] for i in order]
    signatures = dedup.signatures(documents, CONFIG)
    found = dedup.near_duplicates(signatures, CONFIG, comparer(documents))
    assert found.tolist() == [0, 1, 1, 1, 1, 1]


def test_a_bucket_of_many_that_are_not_alike_ends(monkeypatch):
    """All share one band, and no more of their places."""
    signatures = np.random.default_rng(0).integers(0, 1 << 32, (2000, 112), dtype=np.uint32)
    signatures[:, :8] = 7
    signatures[1500] = signatures[20]
    monkeypatch.setattr(dedup, "MOST_PARTNERS", 30)
    found = dedup.near_duplicates(signatures, CONFIG)
    assert np.flatnonzero(found != np.arange(2000)).tolist() == [1500]
    assert found[1500] == 20


@pytest.mark.parametrize("pair", list(itertools.combinations(range(6), 2)))
def test_every_two_of_a_bucket_are_compared(pair):
    """Also those after its first document: here two that agree in one whole band only."""
    signatures = np.random.default_rng(0).integers(0, 1 << 32, (6, 112), dtype=np.uint32)
    first, second = pair
    signatures[second] = signatures[first]
    signatures[second, 8::8] ^= 1  # one place of every other band
    signatures[:, :8] = 7
    expected = list(range(6))
    expected[second] = first
    assert dedup.near_duplicates(signatures, CONFIG).tolist() == expected


def test_no_two_texts_are_compared_twice_and_none_is_left_out(monkeypatch):
    """Also where a bucket has more members than are compared in it: here 1 and 2 are alike, meet
    others only in the first band, and share it with the second."""
    documents = edited_documents(600)
    signatures = dedup.signatures(documents, CONFIG)
    seen = []

    def compare(left, right):
        seen.extend(zip(left.tolist(), right.tolist()))
        return comparer(documents)(left, right)

    dedup.near_duplicates(signatures, CONFIG, compare)
    assert len(seen) == len(set(seen)) > 100

    signatures = np.random.default_rng(0).integers(0, 1 << 32, (3, 112), dtype=np.uint32)
    signatures[2] = signatures[1]
    signatures[2, 20:43] ^= 1  # 0.79 of the places agree
    signatures[:, :8] = 7
    monkeypatch.setattr(dedup, "MOST_PARTNERS", 1)
    found = dedup.near_duplicates(signatures, CONFIG, lambda left, right: np.ones(len(left)))
    assert found.tolist() == [0, 1, 1]


def test_goes_on_after_the_last_band_that_was_done(tmp_path):
    documents = edited_documents(300)
    signatures = dedup.signatures(documents, CONFIG)
    whole = dedup.near_duplicates(signatures, CONFIG, comparer(documents))
    kept = tmp_path / "bands.npz"
    compared = []

    def compare(left, right):
        compared.append(len(left))
        if len(compared) % 5 == 0:
            raise KeyboardInterrupt
        return comparer(documents)(left, right)

    found = None
    stops = []
    while found is None:
        try:
            found = dedup.near_duplicates(signatures, CONFIG, compare, kept)
        except KeyboardInterrupt:
            stops.append(int(np.load(kept)["bands"]))
    assert len(stops) >= 3 and stops == sorted(stops) and stops[0] > 0
    np.testing.assert_array_equal(found, whole)


def peak_memory(function, *args):
    tracemalloc.start()
    function(*args)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_memory_a_document(share):
    """Also where most are copies."""
    n = 100_000
    rng = np.random.default_rng(0)
    config = MinHash(bands=2)
    signatures = rng.integers(0, 1 << 32, (n, 16), dtype=np.uint32)
    copies = int(share * n)
    signatures[n - copies :] = signatures[rng.integers(0, n - copies, copies)]
    at_once = 2 * dedup.PAIRS_AT_ONCE * 16 * 4 + (2 << 20)  # pairs' signatures, and small things
    assert peak_memory(dedup.near_duplicates, signatures, config) <= 60 * n + at_once
    keys = signatures[:, :4].copy().view(np.uint64)
    assert peak_memory(dedup.exact_duplicates, keys) <= 60 * n


def test_parameters_are_those_of_the_config():
    documents = edited_documents(300)
    loose = dataclasses.replace(CONFIG, threshold=0.5, bands=20, rows=4)
    n_loose = dedup.near_duplicates(
        dedup.signatures(documents, loose), loose, comparer(documents, loose)
    )
    strict = dedup.near_duplicates(dedup.signatures(documents, CONFIG), CONFIG, comparer(documents))
    assert len(np.unique(n_loose)) < len(np.unique(strict))
    other_seed = dataclasses.replace(CONFIG, seed=2)
    same = dedup.signatures(documents, other_seed) == dedup.signatures(documents, CONFIG)
    assert same.mean() < 0.01


@FAST
@given(SMALL_KEYS)
def test_exact_duplicates(pairs):
    keys = np.array(pairs, dtype=np.uint64).reshape(-1, 2)
    assert dedup.exact_duplicates(keys).tolist() == [pairs.index(pair) for pair in pairs]


def test_exact_keys():
    texts = ["a", "b", "a", "a ", "", "中\ud800"]
    keys = dedup.exact_keys(texts)
    assert keys.shape == (6, 2) and keys.dtype == np.uint64
    assert dedup.exact_duplicates(keys).tolist() == [0, 1, 0, 3, 4, 5]
    assert dedup.exact_keys([]).shape == (0, 2)


def test_paragraphs_repeated_over_documents():
    menu = "Home | About | Contact"
    texts = [
        f"{menu}\n\nfirst text\n\n***",
        f"home about contact\n\nsecond text\n\n***\n\n{menu}",
        "third text\n\nthird text",
    ]
    keys, counts = dedup.piece_keys(texts)
    gone = dedup.repeated_pieces(keys, counts)
    own = np.split(gone, np.cumsum(counts)[:-1])
    kept = [dedup.without_pieces(text, out) for text, out in zip(texts, own)]
    assert kept == [texts[0], "second text\n\n***", texts[2]]
    assert not dedup.repeated_pieces(keys, counts, most=2).any()


@FAST
@given(st.lists(st.lists(st.sampled_from(["a", "b", "c", ""]), max_size=5), max_size=6))
def test_repeated_pieces_against_a_loop(documents):
    texts = ["\n".join(own) for own in documents]
    keys, counts = dedup.piece_keys(texts, "\n")
    seen = set()
    expected = []
    for text in texts:
        for piece in text.split("\n"):
            n_documents = sum(piece in other.split("\n") for other in texts)
            expected.append(bool(piece) and piece in seen and n_documents > 1)
            seen.add(piece)
    assert dedup.repeated_pieces(keys, counts).tolist() == expected
