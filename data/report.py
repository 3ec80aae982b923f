"""report.html of a build: one file that needs no network, with pictures in SVG.

What it shows is in the manifest, except for the texts of examples, which only the report keeps.
"""

import html as escapes

COLORS = ("#2f6db5", "#d9822b", "#3a9a6b", "#a74d8f", "#b8a12f", "#6a6fc4", "#c0504d", "#5b8a8a")
GONE = "#c9ccd1"
WIDTH = 960  # of pictures, in pixels of their own

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; background: #fff;
       max-width: 1000px; margin: 2.5rem auto 5rem; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.6rem 0 .5rem; }
p, .note { color: #57606f; margin: .2rem 0 .8rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.3rem 0; }
.tile { border: 1px solid #e1e4e9; border-radius: 8px; padding: .6rem 1rem; min-width: 8.5rem; }
.tile b { display: block; font-size: 1.35rem; } .tile span { color: #57606f; font-size: .85rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th { text-align: left; font-weight: 600; color: #57606f; border-bottom: 1px solid #c9ccd1; }
th, td { padding: .28rem .7rem .28rem 0; vertical-align: top; }
td { border-bottom: 1px solid #eef0f3; } .n { text-align: right; white-space: nowrap; }
svg { width: 100%; height: auto; display: block; font: 12px system-ui, sans-serif; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
         margin: 0 .4em 0 1em; }
.key i:first-child { margin-left: 0; }
.rows { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem 2rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f7f9; padding: .6rem .8rem;
      margin: .3rem 0 .8rem; border-radius: 6px; font-size: .8rem; max-height: 9rem;
      overflow: auto; }
summary { cursor: pointer; } code { font-size: .85em; overflow-wrap: anywhere; }
"""


def html(manifest):
    """The page of a manifest as text."""
    names = [*manifest["sources"]]
    colors = {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}
    body = [
        heading(manifest),
        flow(manifest, colors),
        mix(manifest, colors),
        filters(manifest),
        lengths(manifest, colors),
        languages(manifest),
        duplicates(manifest),
        samples(manifest),
        origins(manifest),
    ]
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>Corpus: {text(', '.join(names))}</title><style>{STYLE}</style></head>\n<body>"
        + "\n".join(body)
        + "</body></html>\n"
    )


def text(value):
    return escapes.escape(str(value))


def amount(n):
    """12,345,678 as "12.3M"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:g}"


def share(part, whole):
    return f"{part / whole:.1%}" if whole else "0%"


def table(head, rows):
    """head: names of columns, with a > before those of numbers; rows: cells that are HTML."""
    classes = [" class='n'" if name.startswith(">") else "" for name in head]
    titles = "".join(f"<th{c}>{text(n.lstrip('>'))}</th>" for n, c in zip(head, classes))
    lines = [
        "<tr>" + "".join(f"<td{c}>{cell}</td>" for cell, c in zip(row, classes)) + "</tr>"
        for row in rows
    ]
    return f"<table><tr>{titles}</tr>{''.join(lines)}</table>"


def svg(height, parts):
    return f"<svg viewBox='0 0 {WIDTH} {height:.0f}' role='img'>{''.join(parts)}</svg>"


def label(x, y, words, anchor="start", color="#1d2430", weight=400):
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='{color}' "
        f"font-weight='{weight}'>{text(words)}</text>"
    )


def rect(x, y, width, height, color, hint=""):
    hint = f"<title>{text(hint)}</title>" if hint else ""
    return (
        f"<rect x='{x:.1f}' y='{y:.1f}' width='{max(0, width):.2f}' height='{max(0, height):.2f}' "
        f"fill='{color}'>{hint}</rect>"
    )


def key(colors):
    marks = "".join(f"<i style='background:{c}'></i>{text(n)}" for n, c in colors.items())
    return f"<p class='key'>{marks}</p>"


def heading(manifest):
    train, val = (manifest["splits"][name] for name in ("train", "val"))
    tiles = [
        (amount(manifest["documents"]), "documents read"),
        (amount(manifest["documents_kept"]), "documents kept"),
        (amount(train["tokens"]), "tokens to train on"),
        (amount(val["tokens"]), "tokens to validate on"),
        (f"{train['bytes'] / max(1, train['tokens']):.2f}", "bytes a token"),
        (f"{manifest['n_vocab']:,}", f"vocabulary, {manifest['stages']['tokenizer']['name']}"),
    ]
    cells = "".join(
        f"<div class='tile'><b>{text(n)}</b><span>{text(w)}</span></div>" for n, w in tiles
    )
    return (
        f"<h1>{text(', '.join(manifest['sources']))}</h1>"
        f"<p>fingerprint <code>{manifest['fingerprint'][:16]}</code></p>"
        f"<div class='tiles'>{cells}</div>"
    )


# --------------------------------------------------------------------------------------------------
# Flow

STEPS = ("read", "filters", "exact duplicates", "near duplicates", "decontaminated")


def flow_counts(manifest):
    """{source: [(documents, bytes) after each of STEPS]}, of what is still there."""
    counts = {}
    stages = manifest["stages"]
    nothing = dict(documents=0, bytes=0)
    for name, source in stages["read"]["sources"].items():
        there = [(source["documents"], source["bytes"]), (source["kept"], source["kept_bytes"])]
        gone = stages["dedup"]["counts"].get(name, {})
        for fate in "exact duplicates", "near duplicates":
            lost = gone.get(fate, nothing)
            documents, size = there[-1]
            there.append((documents - lost["documents"], size - lost["bytes"]))
        left = stages["decontaminate"]["counts"].get(name, {})
        kept = [left.get(split, nothing) for split in ("train", "val")]
        there.append((sum(n["documents"] for n in kept), sum(n["bytes"] for n in kept)))
        counts[name] = there
    return counts


def tokens_of(source):
    """(bytes, tokens) of what is kept of a source, both splits."""
    kept = source["kept"].values()
    return sum(split["bytes"] for split in kept), sum(split["tokens"] for split in kept)


def flow(manifest, colors):
    counts = flow_counts(manifest)
    total = sum(there[0][1] for there in counts.values()) or 1
    top, tall = 46, 230
    left = 95  # of the middle of the first bar, whose words need room
    step = (WIDTH - 2 * left) / (len(STEPS) - 1)
    width = 22
    parts = []
    # Where each source is in each bar, and what was lost before it
    levels = []  # [{source: (y, height)}]
    for k in range(len(STEPS)):
        y = top
        level = {}
        for name, there in counts.items():
            height = tall * there[k][1] / total
            level[name] = (y, height)
            y += height
        levels.append(level)
    for k, level in enumerate(levels):
        x = left - width / 2 + k * step
        documents = sum(there[k][0] for there in counts.values())
        size = sum(there[k][1] for there in counts.values())
        parts.append(label(x + width / 2, 16, STEPS[k], "middle", weight=600))
        said = f"{amount(documents)} documents, {amount(size)}B"
        parts.append(label(x + width / 2, 33, said, "middle", "#57606f"))
        for name, (y, height) in level.items():
            hint = f"{name}: {counts[name][k][0]:,} documents, {counts[name][k][1]:,} bytes"
            parts.append(rect(x, y, width, height, colors[name], hint))
        if k == 0:
            continue
        before = levels[k - 1]
        for name, (y, height) in level.items():
            y0, h0 = before[name]
            x0 = x - step + width
            bend = (x0 + x) / 2
            path = (
                f"M{x0:.1f},{y0:.1f} C{bend:.1f},{y0:.1f} {bend:.1f},{y:.1f} {x:.1f},{y:.1f} "
                f"V{y + height:.1f} C{bend:.1f},{y + height:.1f} {bend:.1f},{y0 + h0:.1f} "
                f"{x0:.1f},{y0 + h0:.1f} Z"
            )
            parts.append(f"<path d='{path}' fill='{colors[name]}' opacity='.28'/>")
        lost_documents = sum(there[k - 1][0] - there[k][0] for there in counts.values())
        lost = sum(there[k - 1][1] - there[k][1] for there in counts.values())
        middle = x - step / 2 + width / 2
        words = f"−{amount(lost_documents)} documents, −{share(lost, total)}"
        if lost_documents or lost:
            bottom = top + tall + 16
            parts.append(rect(middle - 46, bottom, 92, max(1, tall * lost / total), GONE))
            at = bottom + max(1, tall * lost / total) + 15
            parts.append(label(middle, at, words, "middle", "#57606f"))
    most_lost = max(
        sum(there[k - 1][1] - there[k][1] for there in counts.values())
        for k in range(1, len(STEPS))
    )
    height = top + tall + 40 + tall * max(0, most_lost) / total

    rows = []
    for name, there in counts.items():
        source = manifest["sources"][name]
        size, tokens = tokens_of(source)
        ratio = tokens / size if size else 0
        cells = [f"<i style='color:{colors[name]}'>■</i> {text(name)}"]
        for documents, left in there:
            about = f"<br>≈ {amount(left * ratio)} tokens" if ratio else ""
            cells.append(f"{documents:,}<br>{amount(left)}B{about}")
        cells.append(f"{tokens:,}<br>{ratio and size / tokens:.2f} bytes each")
        rows.append(cells)
    head = ["source", *(f">{name}" for name in STEPS), ">tokens"]
    return (
        "<h2>From documents to tokens</h2><p>Heights are bytes; what a stage took is grey below. "
        "Tokens before the last column are estimated from what is kept.</p>"
        + key(colors)
        + svg(height, parts)
        + table(head, rows)
    )


def mix(manifest, colors):
    sources = {n: s["mix"] for n, s in manifest["sources"].items() if s["mix"]}
    total = sum(s["tokens"] for s in sources.values()) or 1
    there = {n: manifest["sources"][n]["kept"].get("train", {}).get("tokens", 0) for n in sources}
    parts = []
    for row, (words, values) in enumerate(
        (("there are", there), ("trained on", {n: s["tokens"] for n, s in sources.items()}))
    ):
        y = 8 + row * 44
        whole = sum(values.values()) or 1
        parts.append(label(0, y + 19, words, color="#57606f"))
        x = 90.0
        for name, tokens in values.items():
            width = (WIDTH - 90) * tokens / whole
            hint = f"{name}: {tokens:,} tokens, {share(tokens, whole)}"
            parts.append(rect(x, y, max(0, width - 1), 30, colors[name], hint))
            if width > 60:
                words = f"{share(tokens, whole)}"
                parts.append(label(x + width / 2, y + 19, words, "middle", "#fff", 600))
            x += width
    rows = []
    for name, s in sources.items():
        weight = "" if s["weight"] is None else f"{s['weight']:g}"
        rows.append(
            [text(name), weight, f"{s['epochs']:.2f}", f"{s['documents']:,}",
             f"{s['tokens']:,}", share(s["tokens"], total)]
        )  # fmt: skip
    head = ["source", ">weight", ">epochs", ">documents", ">tokens", ">share"]
    return "<h2>The mix</h2>" + key(colors) + svg(92, parts) + table(head, rows)


def filters(manifest):
    rows = []
    for name, source in manifest["sources"].items():
        read = manifest["stages"]["read"]["sources"][name]
        dropped = sorted(read["dropped"].items(), key=lambda item: -item[1]["documents"])
        for rule, n in dropped:
            thresholds = source["filters"].get(rule, {})
            at = ", ".join(f"{k} {v:g}" for k, v in thresholds.items())
            rows.append(
                [text(name), f"<code>{text(rule)}</code>", text(at), f"{n['documents']:,}",
                 share(n["documents"], read["documents"]), amount(n["bytes"]) + "B"]
            )  # fmt: skip
        for rule, n in read["lines_dropped"].items():
            rows.append([text(name), f"<code>{text(rule)}</code>", "", f"{n:,} lines", "", ""])
    head = ["source", "rule", "threshold", ">dropped", ">of its documents", ">bytes"]
    words = "<p>A document counts for the first rule that drops it.</p>"
    return "<h2>Filters</h2>" + words + (table(head, rows) if rows else "<p>Nothing dropped.</p>")


def lengths(manifest, colors):
    pictures = []
    for name, read in manifest["stages"]["read"]["sources"].items():
        bins = sorted({int(b) for b in (*read["lengths"], *read["kept_lengths"])})
        span = range(min(bins, default=0), max(bins, default=0) + 1)
        most = max(read["lengths"].values(), default=1)
        each = (WIDTH - 20) / max(6, len(span))
        parts = []
        for i, b in enumerate(span):
            x = 10 + i * each
            for values, color in ((read["lengths"], GONE), (read["kept_lengths"], colors[name])):
                n = values.get(str(b), 0)
                height = 200 * n / most
                parts.append(rect(x, 220 - height, each - 6, height, color, f"{n:,} documents"))
            parts.append(
                f"<text x='{x + each / 2 - 3:.1f}' y='246' text-anchor='middle' fill='#57606f' "
                f"font-size='22'>{amount(2**b)}</text>"
            )
        parts.append(f"<line x1='0' x2='{WIDTH}' y1='220' y2='220' stroke='#c9ccd1'/>")
        pictures.append(
            f"<div>{text(name)}; the highest is {most:,} documents{svg(256, parts)}</div>"
        )
    words = "<p>Characters of a document, from so many up to twice as many; grey was dropped.</p>"
    return "<h2>Lengths</h2>" + words + f"<div class='rows'>{''.join(pictures)}</div>"


def languages(manifest):
    rows = []
    for name, read in manifest["stages"]["read"]["sources"].items():
        found = sorted(read["languages"].items(), key=lambda item: -item[1])
        total = sum(n for _, n in found)
        said = ", ".join(f"{text(code)} {share(n, total)}" for code, n in found[:8])
        rows.append([text(name), said or "not looked at", f"{total:,}"])
    words = "<p>As py3langid takes them, of all documents where a language is asked for, else of a "
    words += "sample.</p>"
    return "<h2>Languages</h2>" + words + table(["source", "languages", ">documents"], rows)


def duplicates(manifest):
    top = manifest["stages"]["dedup"]["top"]
    if not top:
        return "<h2>Duplicates</h2><p>None.</p>"
    rows = [
        [f"{d['copies']:,}", text(d["source"]), text(d["id"]), text(" ".join(d["text"].split()))]
        for d in top
    ]
    words = "<p>Documents with most others like them; one of each is kept.</p>"
    parts = manifest["stages"].get("parts")
    if parts:
        said = [f"{n}: {d['parts']:,}, {amount(d['bytes'])}B" for n, d in parts["dropped"].items()]
        words += f"<p>Repeated {parts['what']} that went: {text('; '.join(said))}.</p>"
    return "<h2>Duplicates</h2>" + words + table([">alike", "source", "kept", "begins"], rows)


def samples(manifest):
    parts = ["<h2>Samples</h2><p>The first of each kind.</p>"]
    for name, read in manifest["stages"]["read"]["sources"].items():
        for why, examples in sorted(read["examples"].items(), key=lambda item: item[0] != "kept"):
            what = "kept by all filters" if why == "kept" else f"dropped by {why}"
            shown = "".join(
                f"<div><code>{text(of)}</code><pre>{text(said)}</pre></div>"
                for of, said in examples
            )
            opened = " open" if why == "kept" else ""
            parts.append(
                f"<details{opened}><summary>{text(name)}: {text(what)}</summary>{shown}</details>"
            )
    return "".join(parts)


def origins(manifest):
    rows = []
    for name, source in manifest["sources"].items():
        where = source.get("url") or source.get("repository") or ""
        revision = source.get("revision", "")
        left_out = len(source.get("left_out", []))
        said = f"{source['files']:,}" + (f", {left_out:,} left out" if left_out else "")
        rows.append([text(name), text(source["licence"]), text(where), text(revision), said])
    head = ["source", "licence", "from", "revision", ">files"]
    versions = ", ".join(f"{k} {v}" for k, v in manifest["versions"].items() if v)
    return f"<h2>Where it is from</h2>{table(head, rows)}<p class='note'>{text(versions)}</p>"
