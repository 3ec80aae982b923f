"""data/filters.py: each published threshold, from both sides."""

import pytest

from base import InputError
from data import filters

ALL = filters.RULES


def dropped(name, text, **thresholds):
    return ALL[name].drops(filters.Measures(text), **(ALL[name].thresholds | thresholds))


def words(n, start=0):
    """n words, each another one, of seven letters."""
    return [f"w{i:05d}x" for i in range(start, start + n)]


def said(n):
    return " ".join(words(n))


def lines(n_bad, bad, n_good, good="A whole line that ends as it should."):
    return "\n".join([bad] * n_bad + [f"{good[:-1]} {i}." for i in range(n_good)])


def repeated(n, share, total=1000):
    """Words of which n in a row are there so often that the later times make up the share."""
    gram = words(n)
    times = round(share * total / n)
    text = list(gram)
    for k in range(times):
        text += words(1, 10_000 + k)  # else the end and the beginning would be one as well
        text += gram
    return " ".join(text + words(total - len(text), 20_000))


# name of the rule, a text that stays, a text just beyond the published threshold
SIDES = [
    ("gopher_words", said(50), said(49)),
    ("gopher_words", said(100_000), said(100_001)),
    ("gopher_word_length", "abc " * 60, "abc ab " * 30),
    ("gopher_word_length", "a" * 10 + " " + "b" * 10, "a" * 10 + " " + "b" * 11),
    ("gopher_symbols", said(100) + " #" * 10, said(100) + " #" * 11),
    ("gopher_symbols", said(100) + " ..." * 10, said(100) + " ..." * 11),
    ("gopher_symbols", said(100) + " …" * 10, said(100) + " …" * 11),
    ("gopher_bullets", lines(90, "- an item", 10), lines(91, "- an item", 9)),
    ("gopher_bullets", lines(90, "• an item", 10), lines(91, "• an item", 9)),
    ("gopher_ellipses", lines(30, "and so on...", 70), lines(31, "and so on…", 69)),
    ("gopher_letters", "word " * 80 + "12 " * 20, "word " * 79 + "12 " * 21),
    ("gopher_stop_words", "the cat and a dog", "the cat, the dog"),
    ("gopher_repeated_lines", "\n".join([*words(69), *["w00001x"] * 20, *words(11, 100)]),
     "\n".join([*words(79), *["w00001x"] * 21])),
    ("gopher_repeated_paragraphs", "\n\n".join([*words(80), *["w00001x"] * 20]),
     "\n\n".join([*words(79), *["w00001x"] * 21])),
    ("gopher_top_2_gram", said(1000 - 200) + " same pairs_x" * 100,
     said(1000 - 220) + " same123 pairs_x" * 110),
    ("gopher_top_3_gram", said(840) + " aaaaaaa bbbbbbb ccccccc" * 53,
     said(800) + " aaaaaaa bbbbbbb ccccccc" * 67),
    ("gopher_top_4_gram", said(850) + " aaaaaaa bbbbbbb ccccccc ddddddd" * 37,
     said(800) + " aaaaaaa bbbbbbb ccccccc ddddddd" * 50),
    ("gopher_repeated_5_grams", repeated(5, 0.145), repeated(5, 0.155)),
    ("gopher_repeated_6_grams", repeated(6, 0.135), repeated(6, 0.145)),
    ("gopher_repeated_7_grams", repeated(7, 0.125), repeated(7, 0.135)),
    ("gopher_repeated_8_grams", repeated(8, 0.115), repeated(8, 0.125)),
    ("gopher_repeated_9_grams", repeated(9, 0.105), repeated(9, 0.115)),
    ("gopher_repeated_10_grams", repeated(10, 0.09), repeated(10, 0.11)),
    ("c4_lorem_ipsum", "lorem, ipsum", "Lorem ipsum dolor"),
    ("c4_curly_bracket", "(x) [y]", "f() {"),
    ("c4_sentences", "One. Two! Three? Four. Five.", "One. Two! Three? Four."),
    ("fineweb_terminal", lines(88, "no end here", 12), lines(89, "no end here", 11)),
    ("fineweb_short_lines", lines(67, "x" * 30, 33), lines(68, "x" * 30, 32)),
    ("fineweb_short_lines", lines(90, "x" * 31, 10), lines(90, "x" * 30, 10)),
    ("fineweb_repeated_lines", "\n".join([*words(100), "w00001x"]),
     "\n".join([*words(97), "w00001x"])),
    ("fineweb_newlines", said(100) + "\n" * 30, said(100) + "\n" * 31),
    ("code_mean_line", "\n".join(["x" * 100] * 5), "\n".join(["x" * 100] * 4 + ["x" * 105])),
    ("code_longest_line", "x" * 1000, "x" * 1001),
    ("code_alphanumeric", "x" * 25 + "-" * 75, "x" * 24 + "-" * 76),
]  # fmt: skip


@pytest.mark.parametrize("name, stays, goes", SIDES, ids=lambda v: v if len(str(v)) < 40 else "")
def test_both_sides_of_a_threshold(name, stays, goes):
    assert not dropped(name, stays)
    assert dropped(name, goes)


def test_every_published_rule_is_tested():
    published = filters.GOPHER_QUALITY + filters.GOPHER_REPETITION + filters.C4 + filters.FINEWEB
    tested = {name for name, _, _ in SIDES} | filters.LINE_RULES.keys()
    assert set(published) | set(filters.CODE) <= tested


def test_the_published_thresholds():
    """As the papers have them; a change of one is a change of what a preset means."""
    numbers = {name: tuple(rule.thresholds.values()) for name, rule in ALL.items()}
    assert numbers["gopher_words"] == (50, 100_000)
    assert numbers["gopher_word_length"] == (3, 10)
    assert [numbers[f"gopher_top_{n}_gram"] for n in (2, 3, 4)] == [(0.2,), (0.18,), (0.16,)]
    assert [numbers[f"gopher_repeated_{n}_grams"][0] for n in (5, 6, 7, 8, 9, 10)] == [
        0.15, 0.14, 0.13, 0.12, 0.11, 0.10
    ]  # fmt: skip
    assert numbers["gopher_repeated_lines"] == numbers["gopher_repeated_paragraphs"] == (0.3, 0.2)


@pytest.mark.parametrize(
    "name, line, goes",
    [
        ("c4_line_end", "A line that ends.", False),
        ("c4_line_end", "A line that does not", True),
        ("c4_line_end", "A line that...", True),
        ("c4_line_words", "three words here", False),
        ("c4_line_words", "two words", True),
        ("c4_line_words", f"a long {'x' * 1000}", False),
        ("c4_line_words", f"a long {'x' * 1001}", True),
        ("c4_line_notices", "Please enable Javascript to see this", True),
        ("c4_line_notices", "This site uses cookies, as sites do", True),
        ("c4_line_notices", "We baked some cookies today", False),
    ],
)
def test_lines_that_go(name, line, goes):
    rules = {name: filters.LINE_RULES[name].thresholds}
    text = f"Kept as it is, whatever is below.\n{line}"
    left, why, gone = filters.apply(text, rules)
    assert why is None
    assert (left, gone) == ((text.split("\n")[0], {name: 1}) if goes else (text, {}))


def test_a_word_counts_once_where_runs_overlap():
    """x y x y x y ...: all but the first n words are part of a run that was there before."""
    m = filters.Measures("aa bb " * 50)
    assert m.repeated_ngram_share(5) == pytest.approx(98 / 100)
    assert filters.Measures(said(100)).repeated_ngram_share(5) == 0.0
    assert filters.Measures("").repeated_ngram_share(5) == 0.0


def test_presets_and_changes():
    web = filters.rules_of("web", {})
    assert "c4_curly_bracket" in web and "c4_line_end" not in web
    assert "gopher_words" not in filters.rules_of("stories", {})
    assert "c4_curly_bracket" not in filters.rules_of("code", {})
    changed = filters.rules_of("web", {"gopher_words": {"least": 5}, "c4_curly_bracket": False})
    assert changed["gopher_words"] == dict(least=5, most=100_000)
    assert "c4_curly_bracket" not in changed
    assert filters.rules_of("none", {"c4_line_end": True}) == {"c4_line_end": {}}
    for said, message in [
        ({"gofer_words": True}, "unknown rule gofer_words; did you mean gopher_words"),
        ({"gopher_words": {"max": 3}}, "no threshold max; expected of least, most"),
        ({"gopher_words": {"most": "3"}}, "expected a number, found '3'"),
        ({"gopher_words": 50}, "expected true, false or thresholds, found 50"),
    ]:
        with pytest.raises(InputError, match=message):
            filters.rules_of("web", said)


@pytest.mark.parametrize("text", ["", " ", "\n\n", "...", "#", "a", "\u200b", "中文字", "🙂🙂"])
def test_no_rule_fails_on_odd_texts(text):
    for name in ALL:
        assert dropped(name, text) in (True, False)
