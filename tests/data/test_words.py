"""data/words.py against words found one at a time."""

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import words

FAST = settings(deadline=None, max_examples=50)
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
WORDY = st.text("ab Z1.-\n", max_size=60)


def one_by_one(text):
    """Words as the module's docstring has them, for scripts with spaces."""
    plain = unicodedata.normalize("NFD", text.lower())
    plain = "".join(char for char in plain if unicodedata.category(char) != "Mn")
    return re.findall(r"[^\W_]+", plain)


@FAST
@given(st.lists(WORDY, max_size=8))
def test_words_are_those_found_one_at_a_time(texts):
    hashes, counts = words.word_hashes(texts)
    expected = [one_by_one(text) for text in texts]
    assert counts.tolist() == [len(own) for own in expected]
    flat = [word for own in expected for word in own]
    assert len(set(zip(flat, hashes.tolist()))) == len(set(flat)) == len(set(hashes.tolist()))


@settings(FAST, max_examples=15)
@given(st.lists(TEXT, max_size=4))
def test_a_batch_is_its_texts_one_by_one(texts):
    hashes, counts = words.word_hashes(texts)
    assert len(hashes) == counts.sum()
    alone = [words.word_hashes([text])[0] for text in texts]
    assert [len(own) for own in alone] == counts.tolist()
    np.testing.assert_array_equal(hashes, np.concatenate([*alone, np.zeros(0, np.uint64)]))


@pytest.mark.parametrize(
    "one, other",
    [
        ("Naïve CAFÉ", "naive cafe"),
        ("nai\u0308ve cafe\u0301", "naïve café"),
        ("don't -- stop!", "don t stop"),
        ("snake_case", "Snake Case"),
        ("中文", "中 文"),
        ("ab中cd", "ab 中 cd"),
        ("ภาษา", "ภ า ษ า"),
        ("한국어", "한국어."),
    ],
)
def test_what_makes_no_difference(one, other):
    (a, b), counts = np.split(words.word_hashes([one, other])[0], 2), None
    assert counts is None and len(a) and a.tolist() == b.tolist()


@pytest.mark.parametrize(
    "one, other", [("3 + 4", "3 + 5"), ("ab", "ba"), ("a b", "ab"), ("한국", "하국"), ("中", "文")]
)
def test_what_makes_a_difference(one, other):
    assert words.word_hashes([one])[0].tolist() != words.word_hashes([other])[0].tolist()


@FAST
@given(st.lists(st.text("abc ", max_size=30), max_size=6), st.integers(1, 6))
def test_ngrams_and_wholes(texts, n):
    hashes, counts = words.word_hashes(texts)
    grams, n_grams = words.ngrams(hashes, counts, n)
    expected = []
    for text in texts:
        own = one_by_one(text)
        expected += zip(*(own[k:] for k in range(n)))
    assert n_grams.sum() == len(grams) == len(expected)
    assert len(set(zip(expected, grams.tolist()))) == len(set(expected))
    assert len(set(grams.tolist())) == len(set(expected))

    all_of_it = words.whole(hashes, counts)
    for text, count, found in zip(texts, counts, all_of_it):
        if count:
            alone, one = words.word_hashes([text])
            assert found == words.ngrams(alone, one, int(count))[0][0]
        else:
            assert found == 0


def test_nothing_at_all():
    for texts in [], [""], ["", "..."]:
        hashes, counts = words.word_hashes(texts)
        assert len(hashes) == 0 and counts.tolist() == [0] * len(texts)
        assert len(words.ngrams(hashes, counts, 5)[0]) == 0
