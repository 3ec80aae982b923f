"""data/decontaminate.py: overlaps with evaluations, against sets of tuples of words."""

import re

import numpy as np
import pytest
from near_duplicates import real_texts

from data import decontaminate
from data.decontaminate import contaminated, hits, lengths_of, ngram_hashes

QUESTION = (
    "A train leaves the station at 9 and arrives at 12 after 270 miles; how fast was it going?"
)


def grams_of(text, n):
    words = re.findall(r"[^\W_]+", text.lower())
    return set(zip(*(words[k:] for k in range(n))))


def test_against_sets_of_tuples():
    originals = real_texts()
    texts = [next(originals) for _ in range(120)]
    rng = np.random.default_rng(0)
    for at in range(60, 120):  # some words of an evaluation within others of their own
        words = texts[at - 60].split(" ")
        begin = int(rng.integers(50))
        some = words[begin : begin + int(rng.integers(5, 30))]
        texts[at] = " ".join([*texts[at].split(" "), *some])
    tests = texts[:60]
    items = set().union(*(grams_of(text, 13) for text in tests))
    expected = [bool(grams_of(text, 13) & items) for text in texts]
    assert 5 < sum(expected[60:]) < 58
    hashes = ngram_hashes(tests)
    assert hashes.dtype == np.uint64 and (np.diff(hashes) > 0).all()
    assert contaminated(texts, hashes).tolist() == expected
    assert [bool(contaminated([text], hashes)[0]) for text in texts] == expected


def test_case_and_punctuation_do_not_count_and_numbers_do():
    hashes = ngram_hashes([QUESTION])
    shouted = re.sub(r"[;?]", " -- ", QUESTION).upper()
    assert contaminated([f"See: {shouted} Indeed."], hashes).tolist() == [True]
    # Every 13 words in a row hold at least one of these numbers
    other = QUESTION.replace("9", "8").replace("12", "11").replace("270", "280")
    assert contaminated([other], hashes).tolist() == [False]


def test_short_items():
    nine = "nine words are enough to be looked for anywhere"
    three = "three short words"
    hashes = ngram_hashes([nine, three, "", "..."])
    texts = [
        f"a text with {nine} in it",
        nine,
        nine.replace("enough", "few"),
        f"a text with {three} in it",
        three.title() + "!",
        "",
        "...",
    ]
    found = contaminated(texts, hashes)
    assert found.tolist() == [True, True, False, False, True, False, False]


@pytest.mark.parametrize("few", [0, 2, 1 << 16])
def test_hits_are_those_of_each_text_alone(few, monkeypatch):
    """Each once, and `own` where the text by itself has the same hash."""
    monkeypatch.setattr(decontaminate, "FEW", few)
    nine = "nine words are enough to be looked for anywhere"
    originals = real_texts()
    tests = [next(originals) for _ in range(5)] + [nine, "three short words"]
    hashes = ngram_hashes(tests)
    texts = [f"{tests[1]} {tests[1]} {nine}", next(originals), "", nine, "Three short words!", nine]
    texts += tests[3:]
    documents, places, own = hits(texts, hashes, lengths_of(hashes))
    pairs = list(zip(documents.tolist(), places.tolist()))
    assert len(set(pairs)) == len(pairs)
    expected = []
    for i, text in enumerate(texts):
        expected += [(i, at) for at in np.flatnonzero(np.isin(hashes, ngram_hashes([text])))]
    assert sorted(pair for pair, its in zip(pairs, own) if its) == expected
    others = [pair for pair, its in zip(pairs, own) if not its]
    assert others == [(0, np.flatnonzero(np.isin(hashes, ngram_hashes([nine])))[0])]


def test_fewer_hashes_of_a_large_split():
    originals = real_texts()
    texts = [next(originals) for _ in range(100)]
    every = ngram_hashes(texts)
    some = ngram_hashes(texts, one_in=8)
    assert set(some) <= set(every)
    assert 0.08 < len(some) / len(every) < 0.17
    assert contaminated(texts, some).all()
    assert not contaminated([next(originals) for _ in range(100)], some).all()


def test_nothing_to_look_for_and_wrong_lengths():
    assert contaminated([QUESTION], ngram_hashes([])).tolist() == [False]
    assert contaminated([], ngram_hashes([QUESTION])).tolist() == []
    for n in 0, 7, 64:
        with pytest.raises(ValueError, match="expected 8 to 63"):
            ngram_hashes([QUESTION], n)


def test_many_texts_stream():
    hashes = ngram_hashes(f"{QUESTION} {i}" for i in range(3000))
    assert contaminated([f"{QUESTION} 2999"], hashes).all()
