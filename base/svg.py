"""Pictures and pages that need nothing else: inline SVG, HTML with its style inside, no script, no
network, light and dark.

What a caller gives as text is escaped here; Markup is what is HTML already. Colors are CSS
variables, so a picture belongs into page().
"""

import html
import math
from typing import NamedTuple


class Markup(str):
    """Text that is HTML or SVG already."""


def escape(value):
    """The value as text of a page; Markup stays as it is."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(str(value), quote=True))


def element(name, *content, **attributes):
    """An element; attributes: class_ for class, and _ for - in others; None leaves one out."""
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(escape(part) for part in content if part is not None)
    return Markup(f"<{name}{said}>{inside}</{name}>")


# --------------------------------------------------------------------------------------------------
# Numbers


def short(x):
    """A number in few characters: 1.49, 48k, 1.7M."""
    if x is None or not math.isfinite(x):
        return "–"
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(x) >= size:
            scaled = x / (1e3 if suffix == "k" else size)
            return f"{scaled:.3g}{suffix}"
    if x == int(x):
        return f"{int(x):,}"
    return f"{x:.4g}" if abs(x) >= 1e-3 else f"{x:.1e}"


def ticks(low, high, n=5):
    """About n round numbers from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, n)
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= 0.8 * rough)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def powers(low, high):
    """Powers of ten from low to high, with 2 and 5 times them where there are few."""
    ends = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [f * 10.0**e for e in ends for f in factors if low <= f * 10.0**e <= high]
        if len(found) > 2:
            return found
    return found


# --------------------------------------------------------------------------------------------------
# Pictures


class Series(NamedTuple):
    """A line of a chart."""

    name: str
    points: list  # (x, y)
    color: int = 0  # which of the page's colors
    kind: str = "line"  # or dots: a line with a mark at each point; or faint: behind the others


WIDTH = 560
HEIGHT = 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 34
MOST_POINTS = 600  # of a line: more cannot be seen
COLORS = 6


def chart(series, *, title, x="", y="", log_y=False, zero=False, level=None, y_range=None):
    """A line chart as an SVG figure.

    title: what is said above it; x, y: what the axes are; zero: y begins at 0; level: (y, name) of
    a broken line across; y_range: (lowest, highest) that is shown, by default all.
    """
    series = [
        s._replace(points=[p for p in s.points if all(map(math.isfinite, p))]) for s in series
    ]
    series = [s for s in series if s.points]
    if not series:
        return Markup("")
    xs = [px for s in series for px, _ in s.points]
    ys = [py for s in series for _, py in s.points]
    if level:
        ys.append(level[0])
    low, high = y_range or (min(ys), max(ys))
    if zero:
        low = min(0.0, low)
    if log_y:
        low = max(low, min([py for py in ys if py > 0], default=1e-9))
        low, high = low / 1.05, max(high, low) * 1.05
    else:
        room = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = low - (0 if zero and low == 0 else room), high + room
    first, last = min(xs), max(xs)
    if first == last:
        first, last = first - 0.5, last + 0.5

    def place_x(value):
        return LEFT + (value - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def place_y(value):
        if log_y:
            share = math.log(max(value, low) / low) / math.log(high / low)
        else:
            share = (value - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in powers(low, high) if log_y else ticks(low, high):
        at = round(place_y(value), 1)
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(
            element("text", short(value), x=LEFT - 7, y=at + 3.5, class_="tick", text_anchor="end")
        )
    for value in ticks(first, last, 6):
        at = round(place_x(value), 1)
        parts.append(
            element("text", short(value), x=at, y=HEIGHT - BOTTOM + 16, class_="tick middle")
        )
    parts.append(
        element("text", x, x=WIDTH - RIGHT, y=HEIGHT - 3, class_="axis", text_anchor="end")
    )
    if level:
        at = round(place_y(level[0]), 1)
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="level"))
        parts.append(
            element("text", level[1], x=WIDTH - RIGHT, y=at - 5, class_="axis", text_anchor="end")
        )

    lines = []
    for s in series:
        placed = [(round(place_x(a), 1), round(place_y(b), 1)) for a, b in thinned(s.points)]
        path = "M" + "L".join(f"{a} {b}" for a, b in placed)
        color = f"c{s.color % COLORS}"
        lines.append(element("path", d=path, class_=f"{s.kind} {color}"))
        if s.kind == "dots" and len(s.points) <= 100:
            for (a, b), (px, py) in zip(placed, s.points):
                said = element("title", f"{s.name}: {py:.5g} at {short(px)} {x}")
                lines.append(element("circle", said, cx=a, cy=b, r=2.6, class_=color))
    clip = f"clip-{abs(hash_of(title, *(s.name for s in series)))}"
    box = element(
        "rect", x=LEFT, y=TOP - 4, width=WIDTH - LEFT - RIGHT + 4, height=HEIGHT - TOP - BOTTOM + 8
    )
    parts.append(element("clipPath", box, id=clip))
    parts.append(element("g", *lines, clip_path=f"url(#{clip})"))

    svg = element(
        "svg",
        element("title", title),
        *parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        class_="chart",
    )
    head = element("figcaption", element("b", title), " ", element("span", y, class_="unit"))
    return element("figure", head, legend([(s.name, s.color) for s in series if s.name]), svg)


def hash_of(*texts):
    """A number that is the same in every process."""
    value = 0
    for character in "\0".join(texts):
        value = (value * 31 + ord(character)) % 2**31
    return value


def thinned(points):
    """At most MOST_POINTS of the points, the last among them."""
    if len(points) <= MOST_POINTS:
        return points
    step = -(-len(points) // MOST_POINTS)
    kept = points[::step]
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def legend(names):
    """What the colors stand for; names: (text, color). Nothing where there is only one."""
    if len(names) < 2:
        return Markup("")
    items = [
        element("span", element("i", class_=f"swatch b{color % COLORS}"), name)
        for name, color in names
    ]
    return element("div", *items, class_="legend")


def stacked_bar(parts, *, unit="s"):
    """A bar whose pieces are parts of a whole, with what each is; parts: (name, value)."""
    parts = [(name, value) for name, value in parts if value > 0]
    total = sum(value for _, value in parts)
    if not total:
        return Markup("")
    pieces, names, at = [], [], 0.0
    for i, (name, value) in enumerate(parts):
        width = 1000 * value / total
        said = element("title", f"{name}: {short(value)} {unit}, {value / total:.0%}")
        pieces.append(
            element(
                "rect",
                said,
                x=round(at, 2),
                y=0,
                width=round(width, 2),
                height=26,
                class_=f"f{i % 8}",
            )
        )
        names.append(
            element(
                "span",
                element("i", class_=f"swatch g{i % 8}"),
                f"{name} ",
                element("b", f"{short(round(value, 2))} {unit}"),
            )
        )
        at += width
    bar = element(
        "svg", *pieces, viewBox="0 0 1000 26", preserveAspectRatio="none", class_="bar", role="img"
    )
    return element("div", bar, element("div", *names, class_="legend"), class_="stack")


def columns(values, *, title, x="", y=""):
    """A chart of columns; values: (label, number)."""
    values = [(label, value) for label, value in values if math.isfinite(value)]
    if not values:
        return Markup("")
    high = max(value for _, value in values) or 1.0
    room = (WIDTH - LEFT - RIGHT) / len(values)
    parts = []
    for value in ticks(0, high):
        at = round(HEIGHT - BOTTOM - value / high * (HEIGHT - TOP - BOTTOM), 1)
        parts.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        parts.append(
            element("text", short(value), x=LEFT - 7, y=at + 3.5, class_="tick", text_anchor="end")
        )
    every = -(-len(values) // 10)
    for i, (label, value) in enumerate(values):
        height = max(0.0, value) / high * (HEIGHT - TOP - BOTTOM)
        said = element("title", f"{label}: {short(value)}")
        parts.append(
            element(
                "rect",
                said,
                x=round(LEFT + (i + 0.1) * room, 1),
                y=round(HEIGHT - BOTTOM - height, 1),
                width=round(0.8 * room, 1),
                height=round(height, 1),
                class_="f0",
            )
        )
        if i % every == 0:
            at = round(LEFT + (i + 0.5) * room, 1)
            parts.append(element("text", label, x=at, y=HEIGHT - BOTTOM + 16, class_="tick middle"))
    parts.append(
        element("text", x, x=WIDTH - RIGHT, y=HEIGHT - 3, class_="axis", text_anchor="end")
    )
    svg = element(
        "svg",
        element("title", title),
        *parts,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        class_="chart",
    )
    head = element("figcaption", element("b", title), " ", element("span", y, class_="unit"))
    return element("figure", head, svg)


def interval(value, error, low=0.0, high=1.0, chance=None):
    """A value with its standard error on a small scale; chance: a mark for guessing."""

    def at(x):
        return round(2 + 96 * min(1.0, max(0.0, (x - low) / (high - low))), 2)

    parts = [element("rect", x=2, y=7, width=96, height=4, rx=2, class_="track")]
    if chance is not None:
        parts.append(
            element(
                "line",
                element("title", f"chance {short(chance)}"),
                x1=at(chance),
                x2=at(chance),
                y1=2,
                y2=16,
                class_="chance",
            )
        )
    parts.append(
        element("rect", x=2, y=7, width=max(0.0, at(value) - 2), height=4, rx=2, class_="f0")
    )
    if error:
        parts.append(
            element("line", x1=at(value - error), x2=at(value + error), y1=9, y2=9, class_="error")
        )
    parts.append(element("circle", cx=at(value), cy=9, r=3.2, class_="c0"))
    return element("svg", *parts, viewBox="0 0 100 18", class_="interval", aria_hidden="true")


# --------------------------------------------------------------------------------------------------
# Pages


def table(head, rows, class_=None):
    """A table; cells are text or Markup. A cell that begins with a digit or a sign stands to the
    right."""

    def cell(name, value):
        text = str(value)
        numeric = not isinstance(value, Markup) and text[:1] and text[0] in "0123456789+-−±"
        return element(name, value, class_="number" if numeric else None)

    top = element("thead", element("tr", *(element("th", name) for name in head))) if head else None
    body = [element("tr", *(cell("td", value) for value in row)) for row in rows]
    inside = element("table", top, element("tbody", *body), class_=class_)
    return element("div", inside, class_="scroll")


def page(title, *body):
    """A whole HTML document, as text."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = Markup(
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="color-scheme" content="light dark">'
    )
    style = Markup(f"<style>{STYLE}</style>")
    document = element(
        "html",
        element("head", head, element("title", title), style),
        element("body", element("main", *body)),
        lang="en",
    )
    return f"<!doctype html>\n{document}\n"


# Okabe and Ito's colours, told apart by colour-blind people too
STYLE = (
    """
:root { --paper: #fbfbf9; --card: #fff; --ink: #1b1d21; --soft: #676b73; --rule: #e4e4df;
 --k0: #0072b2; --k1: #d55e00; --k2: #009e73; --k3: #cc79a7; --k4: #56b4e9; --k5: #b8860b;
 --k6: #7a6ff0; --k7: #9aa0a8; --good: #00795a; --bad: #c2410c; --code: #f3f3ef; }
@media (prefers-color-scheme: dark) {
 :root { --paper: #131519; --card: #1a1d23; --ink: #e8e9ec; --soft: #9aa0aa; --rule: #2c3038;
 --k0: #5ab4f0; --k1: #ff9248; --k2: #35c79a; --k3: #e79ac4; --k4: #9bd3f5; --k5: #e5bb4b;
 --k6: #a79cff; --k7: #6d737d; --good: #4fd1a5; --bad: #ff9a6a; --code: #22262e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
 font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 36px 22px 70px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.015em;
 overflow-wrap: anywhere; }
h2 { font-size: 13px; text-transform: uppercase; letter-spacing: .08em; color: var(--soft);
 margin: 42px 0 12px; font-weight: 650; }
h3 { font-size: 15px; margin: 14px 0 6px; overflow-wrap: anywhere; }
p { margin: 6px 0; } .lead { font-size: 18px; } .soft { color: var(--soft); }
.tiles { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr));
 margin-top: 22px; }
.tile, figure, .card { background: var(--card); border: 1px solid var(--rule);
 border-radius: 10px; margin: 0; padding: 14px 16px; }
.tile .value { font-size: 25px; font-weight: 640; letter-spacing: -.02em;
 font-variant-numeric: tabular-nums; line-height: 1.25; }
.tile .unit, .unit { color: var(--soft); font-size: 13px; font-weight: 400; letter-spacing: 0; }
.tile .unit { display: block; }
.tile .name { color: var(--soft); font-size: 13px; }
.samples { display: grid; gap: 14px;
 grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); }
.grid-2 { display: grid; gap: 14px;
 grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
figure { padding: 14px 14px 8px; } figcaption { margin: 0 2px 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; color: var(--soft);
 margin: 2px 2px 4px; } .legend b { color: var(--ink); font-weight: 600; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 6px; }
svg.chart { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg .middle { text-anchor: middle; } svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .level { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 4 4; }
svg path { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg path.faint { stroke-width: 1; opacity: .3; }
svg.bar { width: 100%; height: 26px; border-radius: 6px; display: block; margin-bottom: 8px; }
svg.interval { width: 130px; height: 18px; vertical-align: middle; }
svg .track { fill: var(--rule); } svg .chance { stroke: var(--soft); stroke-width: 1.5; }
svg .error { stroke: var(--ink); stroke-width: 1.6; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: var(--soft); font-weight: 550; font-size: 13px; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td { overflow-wrap: anywhere; } td.number { font-variant-numeric: tabular-nums; }
table.facts td:first-child { color: var(--soft); width: 190px; overflow-wrap: normal; }
tr.differs td { font-weight: 600; } .good { color: var(--good); } .bad { color: var(--bad); }
pre { background: var(--code); border-radius: 8px; padding: 12px 14px; margin: 8px 0;
 white-space: pre-wrap; overflow-wrap: anywhere;
 font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre .prompt { color: var(--k0); font-weight: 650; }
details { margin: 8px 0; } summary { cursor: pointer; color: var(--soft); }
.chip { display: inline-block; border: 1px solid currentColor; border-radius: 99px;
 padding: 1px 11px; font-size: 13px; margin-left: 10px; vertical-align: 5px; font-weight: 500; }
footer { margin-top: 46px; color: var(--soft); font-size: 13px; }
@media print { main { max-width: none; } figure, .card, .tile { break-inside: avoid; } }
"""
    + "".join(
        f"svg path.c{i} {{ stroke: var(--k{i}); }} svg circle.c{i} {{ fill: var(--k{i}); }}\n"
        f".b{i} {{ background: var(--k{i}); }}\n"
        for i in range(COLORS)
    )
    + "".join(
        f"svg .f{i} {{ fill: var(--k{i}); }} .g{i} {{ background: var(--k{i}); }}\n"
        for i in range(8)
    )
)
