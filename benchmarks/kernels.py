"""Every op in kernels/ on this GPU, beside its alternatives: time, bytes or FLOPs per second, share
of the machine's rate.

    ./run.sh benchmarks kernels [--only NAME ...] [--tokens N ...] [--json FILE] [--table FILE.md]

Shapes are those of gpt2-small. Forward, backward and both are timed as benchmarks/timing.py says,
with inputs that want gradients, as in training. GB/s and TFLOP/s are of the least bytes or
operations the result needs, so work that a variant does on top lowers its number; shares are of a
large copy and a large matrix product in the same process, under the same clock. Every variant is
first compared with the reference, outputs and gradients; a wrong one is not timed.

A variant that raises costs one line in the result. After an illegal memory access, or a graph
that could not be captured, the rest fails as well: --only goes on with it.
"""

import collections
import functools
import gc

import torch

from benchmarks import timing
from benchmarks.cases import CASES, GPT2_SMALL
from benchmarks.measure import Machine, measure, measured_rates
from benchmarks.options import value
from benchmarks.report import document, table

TOKENS = (GPT2_SMALL.tokens, 16384)


# --- the command


def unavailable():
    """Why this benchmark cannot run here, or None."""
    if not torch.cuda.is_available():
        return (
            "benchmark kernels needs a CUDA GPU and there is none here; without one, "
            "./run.sh benchmarks loader and ./run.sh benchmarks resources work"
        )


def ops():
    """Names of ops, as --only takes them: what cases are called before the comma."""
    return sorted({name.split(",")[0] for name in CASES})


def add_arguments(parser):
    names = ", ".join(ops())
    one = value(str, lambda text: text in {*ops(), *CASES}, f"some of {names}")
    parser.option("--only", one, (), "NAME", f"these ops: {names}", nargs="+")
    count = value(int, lambda n: n > 0 and n % 128 == 0, "a multiple of 128")
    shown = " ".join(map(str, TOKENS))
    parser.add_argument(
        "--tokens", type=count, nargs="+", default=TOKENS, metavar="N", help=f"[{shown}]"
    )


def plan_of(only, tokens):
    """[(case, tokens), ...]; what does not depend on the number of tokens is there once."""
    plan = []
    planned = []
    for n in tokens:
        for name, build in CASES.items():
            if only and not {name, name.split(",")[0]} & set(only):
                continue
            least = name, build(GPT2_SMALL._replace(tokens=n)).work
            if least not in planned:
                planned.append(least)
                plan.append((name, n))
    return plan


def run(only=(), tokens=TOKENS, save=lambda result: None):
    """dict(device, l2_bytes, memory_bytes, rates, rows); save is given the same as it grows."""
    from torch._functorch import config as functorch_config

    properties = torch.cuda.get_device_properties(0)
    machine = Machine(
        device=torch.device("cuda"),
        clock=timing.CudaClock(),
        cache_bytes=properties.L2_cache_size,
        graphs=True,
    )
    gc.collect()
    gc.freeze()  # torch's own objects need no second look; collecting is part of every case
    # Graphs cannot be captured on the default stream, and compiled backward passes are run many
    # times over
    with torch.cuda.stream(torch.cuda.Stream()), functorch_config.patch(donated_buffer=False):
        machine.rates = measured_rates(machine)
        result = dict(
            device=properties.name,
            capability=[properties.major, properties.minor],
            sms=properties.multi_processor_count,
            l2_bytes=properties.L2_cache_size,
            memory_bytes=properties.total_memory,
            rates=[machine.rates],
            rows=[],
        )
        for name, n in plan_of(only, tokens):
            size = GPT2_SMALL._replace(tokens=n)
            result["rows"] += measure(name, functools.partial(CASES[name], size), n, machine)
            save(result)
    gc.unfreeze()
    return result


# --- the tables

LEGEND = """\
Above each column is the least that has to be moved or computed. A cell is the median in
microseconds, the 20th to the 80th percentile, what that makes of the least, and its share of the
machine's rate; the fastest is bold. † launched call by call, not in a graph; ‡ no reference to
compare with. Made by `./run.sh benchmarks kernels`."""
MADE = ("torch", "git_commit", "date")  # with what, of the environment


def render(result):
    """The result as Markdown: tables for each op."""
    environment = result.get("environment", {})
    made = [str(environment[key]) for key in MADE if environment.get(key)]
    rates = "not measured"
    if result["rates"]:
        rates = ", ".join(rate_of(name, x) for name, x in result["rates"][0].items())
    by_case = collections.defaultdict(list)
    for row in result["rows"]:
        by_case[row["case"]].append(row)
    tables = []
    for name in CASES:
        if name in by_case:
            tables += [f"## {name}", *tables_of(by_case[name])]
    return document(
        f"# Kernels on {result['device']}",
        ", ".join(made),
        f"Rates: {rates}.",
        LEGEND,
        *tables,
    )


def rate_of(name, x):
    if not x:
        return f"{name} not measured"
    if name == "copy":
        return f"{name} {x / 1e9:,.0f} GB/s"
    return f"{name} {x / 1e12:,.0f} TFLOP/s"


def tables_of(rows):
    """For each size a line for each variant and a column for each direction; below, what went
    wrong."""
    timed = [r for r in rows if "median_us" in r]
    variants = list(dict.fromkeys(r["variant"] for r in rows if r["variant"]))
    variants.sort(key=lambda v: not v.startswith("stopwatch"))
    blocks = []
    for shape in dict.fromkeys(r["shape"] for r in timed):
        columns = collections.defaultdict(dict)  # direction -> variant -> row
        for r in timed:
            if r["shape"] == shape:
                columns[r["direction"]][r["variant"]] = r
        header = [shape]
        for direction, cells in columns.items():
            header.append(f"{direction}, {amount(max(cells.values(), key=lambda r: r['work']))}")
        lines = []
        for v in variants:
            lines.append([v, *(cell(cells, v) for cells in columns.values())])
        blocks.append(table(header, lines))
    notes = []
    for r in rows:
        if "error" in r:
            at = [r["variant"], r["direction"], f"{r['tokens']:,} tokens"]
            notes.append(f"- {', '.join(filter(None, at))}: {r['error']}")
    return [*(blocks or ["not measured"]), list(dict.fromkeys(notes))]


def amount(row):
    """The least work of a row."""
    if row["unit"] == "bytes":
        return f"{row['work'] / 1e6:,.0f} MB"
    return f"{row['work'] / 1e12:.3f} TFLOP"


def cell(cells, variant):
    """A variant's cell in a column = {variant: row}."""
    if variant not in cells:
        return "not measured"
    row = cells[variant]
    per_second = f"{row['per_second'] / 1e12:,.0f} TFLOP/s"
    if row["unit"] == "bytes":
        per_second = f"{row['per_second'] / 1e9:,.0f} GB/s"
    marks = ""
    if row["method"] != "graph":
        marks += " †"
    if row["difference"] is None:
        marks += " ‡"
    share = ""
    if row["share"] is not None:
        share = f", {row['share']:.0%}"
        if row["rate"] == "fp8":
            share += " of fp8"
    median = us(row["median_us"])
    if row["median_us"] == min(r["median_us"] for r in cells.values()):
        median = f"**{median}**"
    return f"{median} ({us(row['p20_us'])}–{us(row['p80_us'])}){marks}, {per_second}{share}"


def us(x):
    return f"{x:,.1f}" if x < 1000 else f"{x:,.0f}"
