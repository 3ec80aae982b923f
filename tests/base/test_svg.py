"""Pictures and pages: well-formed, escaped, with the numbers where they belong."""

import math
import re
import xml.etree.ElementTree as ET

import pytest

from base.svg import (
    HEIGHT,
    LEFT,
    RIGHT,
    WIDTH,
    Series,
    chart,
    columns,
    element,
    interval,
    page,
    short,
    stacked_bar,
    table,
    ticks,
)

EVIL = "<script>alert('x')</script> & \"so\""


def parse(markup):
    """The element tree of markup; an error where it is not well-formed or not escaped."""
    return ET.fromstring(f"<r>{markup}</r>")


def path(figure, name):
    """[(x, y)] of the path with a class."""
    [d] = re.findall(f'<path d="M([^"]+)" class="{name}"', figure)
    return [tuple(map(float, pair.split())) for pair in d.split("L")]


def test_whatever_is_text_is_escaped():
    points = [(0, 1.0), (1, 2.0)]
    made = [
        chart(
            [Series(EVIL, points), Series("b", points)], title=EVIL, x=EVIL, y=EVIL, level=(1, EVIL)
        ),
        stacked_bar([(EVIL, 1.0), ("b", 2.0)], unit=EVIL),
        columns([(EVIL, 1.0)], title=EVIL, x=EVIL, y=EVIL),
        table([EVIL], [[EVIL, 1], [None, EVIL]], class_=EVIL),
        element("p", EVIL, class_=EVIL),
    ]
    for markup in made:
        parse(markup)
        assert "<script" not in markup and "&lt;script" in markup
    whole = page(EVIL, *made)
    assert whole.count("<script") == 0 and "default-src 'none'" in whole.replace("&#x27;", "'")
    assert not re.search(r"https?://(?!www\.w3\.org)", whole)


def test_points_are_where_their_values_say():
    figure = chart([Series("a", [(0, 0.0), (5, 5.0), (10, 10.0)])], title="t", y_range=(0, 10))
    (x0, y0), (x1, y1), (x2, y2) = path(figure, "line c0")
    assert (x0, x2) == (LEFT, WIDTH - RIGHT)
    assert x1 == pytest.approx((x0 + x2) / 2) and y1 == pytest.approx((y0 + y2) / 2)
    assert 0 < y2 < y1 < y0 < HEIGHT
    figure = chart([Series("a", [(0, 1.0), (1, 10.0), (2, 100.0)])], title="t", log_y=True)
    ys = [y for _, y in path(figure, "line c0")]
    assert ys[1] == pytest.approx((ys[0] + ys[2]) / 2, abs=0.2)


def test_long_lines_are_thinned_and_holes_left_out():
    n = 100_000
    figure = chart([Series("a", [(i, float(i)) for i in range(n)])], title="t")
    assert 100 < len(path(figure, "line c0")) < 700 and len(figure) < 30_000
    figure = chart([Series("a", [(0, 1.0), (1, math.nan), (2, 2.0)])], title="t")
    assert len(path(figure, "line c0")) == 2
    assert chart([Series("a", [(0, math.inf)])], title="t") == ""
    parse(chart([Series("a", [(3, 7.0)], kind="dots")], title="one point"))


def test_a_stacked_bar_is_full():
    bar = stacked_bar([("a", 1.0), ("nothing", 0.0), ("b", 3.0)])
    widths = [float(w) for w in re.findall(r'<rect[^>]* width="([\d.]+)"', bar)]
    assert widths == [250, 750] and "nothing" not in bar and "75%" in bar
    assert stacked_bar([("a", 0.0)]) == ""


def test_ticks_are_round_numbers_within():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(1.487, 1.752) == [1.5, 1.55, 1.6, 1.65, 1.7, 1.75]
    assert ticks(3, 3) == [3]
    for low, high in ((0.0012, 0.9), (-5, 1e9), (1e-9, 2e-9)):
        found = ticks(low, high)
        assert 3 <= len(found) <= 11 and all(low - 1e-12 <= x <= high * 1.0001 for x in found)


def test_short_numbers():
    cases = {
        0: "0",
        1.49424: "1.494",
        5811: "5,811",
        48000: "48k",
        1671918: "1.67M",
        2e-5: "2.0e-05",
    }
    assert {x: short(x) for x in cases} == cases
    assert short(math.nan) == short(None) == "–"


def test_an_interval_marks_value_and_chance():
    marks = interval(0.5, 0.1, chance=0.25)
    assert 'cx="50.0"' in marks and 'x1="26.0"' in marks and 'x1="40.4" x2="59.6"' in marks
    parse(marks)
