"""data/clean.py: text put right, and nothing else changed."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import clean
from data.sources import Document

pytest.importorskip("ftfy")

ODD = st.text(
    st.sampled_from("aé\u0301\r\n\t \x0b\x0c\x00\x1b[0m\x85\xa0\u2028ï»¿â€™Ã©\ufeff\ud800=@-,")
)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(), ODD, st.text().map(lambda t: t.encode().decode("latin-1"))))
def test_cleaning_never_raises_and_is_the_same_twice(text):
    once = clean.clean(text)
    assert clean.clean(once) == once
    assert not set(once) & set("\r\x00\x1b\x0b\x0c\u2028\ufeff\ud800")
    once.encode()  # is valid UTF-8
    assert "\n\n\n\n" not in once and not once.startswith("\n") and not once.endswith("\n")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), min_size=1)))
def test_plain_text_stays_as_it_is(lines):
    text = "\n".join(lines)
    assert clean.clean(text) == text


@pytest.mark.parametrize(
    "text, right",
    [
        ("cafÃ© and donâ€™t", "café and don’t"),
        ("cafÃ\x00©", "café"),  # to be repaired once the control character is gone
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("a \t\nb\xa0", "a\nb"),
        ("e\u0301", "é"),
        ("a\n\n\n\n\n\nb", "a\n\n\nb"),
        ("\ufeffbell\x07 red\x1b[31m", "bell red"),
        ("    indented\n\ttab", "    indented\n\ttab"),
        ("“quotes” ﬁ ＡＢ &amp;", "“quotes” ﬁ ＡＢ &amp;"),  # the author's
    ],
)
def test_what_is_repaired(text, right):
    assert clean.clean(text) == right


def test_rows_of_wikitext_become_articles():
    rows = [
        "",
        " = First = ",
        "",
        " A line . ",
        " = = Part = = ",
        " More . ",
        "",
        " = Second = ",
        "",
    ]
    rows = [Document(f"{row}\n", f"r{i}", {}) for i, row in enumerate(rows + [" Its line . "])]
    found = list(clean.join_rows(rows))
    assert [document.about["title"] for document in found] == ["First", "Second"]
    assert "= = Part = =" in found[0].text and "Second" not in found[0].text
    assert "Its line" in found[1].text
    assert [document.id for document in found] == ["r0", "r7"]
    assert list(clean.join_rows([])) == []


def test_marks_of_wikitext():
    said = ' It had 1 @,@ 000 men , of the well @-@ known " Third " ( 3 @.@ 5 ) . '
    right = ' It had 1,000 men, of the well-known "Third" (3.5). '
    assert clean.without_marks(said) == right


def test_language():
    pytest.importorskip("py3langid")
    english = "The quick brown fox jumps over the lazy dog and runs into the old forest."
    german = "Der schnelle braune Fuchs springt über den faulen Hund und läuft in den Wald."
    assert clean.language_of(english) == "en" and clean.language_of(german) == "de"
    assert clean.language_of("Hello") == ""
