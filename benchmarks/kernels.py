"""Every op in kernels/ on this GPU: time, bytes or FLOPs per second, share of the machine's rate;
beside alternatives.

    python -m benchmarks kernels [--only NAME ...] [--tokens N ...] [--json FILE] [--table FILE.md]

Shapes are those of gpt2-small. Forward, backward and both are timed as benchmarks/timing.py says,
with inputs that want gradients, as in training. GB/s and TFLOP/s are of the least bytes or
operations the result needs, so work that a variant does on top lowers its number; shares are of a
large copy and a large matrix product in the same process, under the same clock. Every variant is
first compared with the reference, outputs and gradients; a wrong one is not timed.

Meant to be started and left alone: the work happens in a second process. A variant that raises,
hangs, or takes that process with it (an illegal memory access does) costs one line in the result,
and the rest goes on in a new one.
"""

import argparse
import collections
import time
import typing

import torch

from benchmarks.cases import BACKWARD, BOTH, CASES, FORWARD, GPT2_SMALL
from benchmarks.measure import supervise

TOKENS = (GPT2_SMALL.tokens, 16384)


# --------------------------------------------------------------------------------------------------
# What an H200 should do


class Target(typing.NamedTuple):
    case: str
    direction: str
    measure: str  # "share" of the rate, "us", or "speedup" over another variant
    value: float
    variant: str = "stopwatch"
    over: str = ""

    def __str__(self):
        goal = dict(
            share=f"at least {self.value:.0%} of the copy rate",
            us=f"at most {self.value / 1e3:.1f} ms",
            speedup=f"at least {self.value:g}x as fast as {self.over}",
        )[self.measure]
        return (
            f"{self.case}, {self.direction}"
            + f" ({self.variant})" * (self.variant != "stopwatch")
            + f": {goal}"
        )


TARGETS = (
    Target("rms_norm", FORWARD, "share", 0.85),
    Target("rms_norm", BACKWARD, "share", 0.80),
    Target("softcap_cross_entropy", BOTH, "us", 2900),
    Target("softcap_cross_entropy, without autograd", FORWARD, "us", 2200, "stopwatch, e5m2"),
    Target("relu2_mlp", BOTH, "speedup", 1.0, over="torch.compile"),
    Target("linear_cross_entropy", BOTH, "speedup", 1.5, "stopwatch, fp8", over="stopwatch"),
    Target("polar_express", FORWARD, "us", 1500),
    Target("polar_express", FORWARD, "speedup", 2.0, over="torch.optim.Muon.step"),
    Target("qk_norm_rope", FORWARD, "share", 0.80),
    Target("qk_norm_rope", BACKWARD, "share", 0.80),
)


def judge(target, result):
    """(measured value or None, "met", "not met" or "not measured")."""
    found = {
        r["variant"]: r
        for r in result["rows"]
        if (r["case"], r["direction"], r["tokens"])
        == (target.case, target.direction, GPT2_SMALL.tokens)
    }
    ours, other = found.get(target.variant), found.get(target.over)
    if "H200" not in result["device"] or not ours or (target.over and not other):
        return None, "not measured"
    if target.measure == "us":
        value = ours["median_us"]
        return value, "met" if value <= target.value else "not met"
    value = ours["share"] if target.measure == "share" else other["median_us"] / ours["median_us"]
    return value, "not measured" if value is None else "met" if value >= target.value else "not met"


# --------------------------------------------------------------------------------------------------
# The command


def unavailable():
    """Why this benchmark cannot run here, or None."""
    if not torch.cuda.is_available():
        return (
            "benchmark kernels needs a CUDA GPU and there is none here; without one, "
            "`python -m benchmarks loader` and `python -m benchmarks resources` work"
        )


def add_arguments(parser):
    parser.add_argument(
        "--only",
        nargs="+",
        type=op_name,
        default=(),
        metavar="NAME",
        help="these ops: " + ", ".join(sorted(ops())),
    )
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=token_count,
        default=TOKENS,
        metavar="N",
        help=f"numbers of tokens (default: {' '.join(map(str, TOKENS))})",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=330,
        help="no case is begun after this many (default: %(default)g)",
    )


def ops():
    """Names of ops, as --only takes them: what cases are called before the comma."""
    return {name.split(",")[0] for name in CASES}


def op_name(text):
    if text not in ops() | set(CASES):
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {', '.join(sorted(ops()))}")
    return text


def token_count(text):
    if not text.isdigit() or int(text) % 128 or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a multiple of 128")
    return int(text)


def run(only=(), tokens=TOKENS, seconds=330.0, save=lambda result: None):
    """dict(device, l2_bytes, memory_bytes, rates, rows, targets); save is given the same as it
    grows."""
    deadline = time.time() + seconds
    plan = [
        (name, n)
        for n in tokens
        for name, (_, per_token) in CASES.items()
        if (per_token or n == tokens[0])
        and (not only or name in only or name.split(",")[0] in only)
    ]
    properties = torch.cuda.get_device_properties(0)

    def result(rows, rates):
        r = dict(
            device=properties.name,
            capability=[properties.major, properties.minor],
            sms=properties.multi_processor_count,
            l2_bytes=properties.L2_cache_size,
            memory_bytes=properties.total_memory,
            rates=rates,
            rows=rows,
        )
        r["targets"] = [
            dict(target=str(t), measured=value, verdict=verdict)
            for t in TARGETS
            for value, verdict in [judge(t, r)]
        ]
        return r

    return result(*supervise(plan, deadline, saw=lambda rows, rates: save(result(rows, rates))))


LEGEND = """Above each column is the least that has to be moved or computed. A cell is the median in microseconds, the
20th to the 80th percentile, what that makes of the least, and its share of the machine's rate; the fastest is bold.
† launched call by call, not in a graph; ‡ another function, or no reference, to compare with. Made by
`python -m benchmarks kernels`."""


def render(result):
    """The result as Markdown: targets, then tables for each op."""
    environment = result.get("environment", {})
    made = [f"PyTorch {environment['torch']}"] if environment.get("torch") else []
    made += [f"commit {environment['git_commit'][:10]}"] if environment.get("git_commit") else []
    made += [environment["date"]] if environment.get("date") else []
    lines = [
        f"# Kernels on {result['device']}",
        "",
        ", ".join(made),
        "",
        f"Rates: {_rates(result['rates'][0]) if result['rates'] else 'not measured'}.",
        "",
        LEGEND,
        "",
        "## Targets on an H200",
        "",
        "| target | measured | |",
        "|---|---|---|",
    ]
    for t, entry in zip(TARGETS, result["targets"]):
        value = entry["measured"]
        shown = (
            "not measured"
            if value is None
            else dict(share=f"{value:.1%}", us=f"{value / 1e3:.2f} ms", speedup=f"{value:.2f}x")[
                t.measure
            ]
        )
        lines.append(f"| {entry['target']} | {shown} | {entry['verdict']} |")
    by_case = collections.defaultdict(list)
    for row in result["rows"]:
        by_case[row["case"]].append(row)
    for name in sorted(by_case, key=[*CASES].index):
        lines += ["", f"## {name}", "", *_table(by_case[name])]
    return "\n".join(lines) + "\n"


def _rates(rates):
    return ", ".join(
        f"{name} "
        + (
            "not measured"
            if not value
            else f"{value / 1e9:,.0f} GB/s"
            if name == "copy"
            else f"{value / 1e12:,.0f} TFLOP/s"
        )
        for name, value in rates.items()
    )


def _table(rows):
    """For each size a line for each variant and a column for each direction; below, what went
    wrong."""
    timed = [r for r in rows if "median_us" in r]
    variants = list(dict.fromkeys(r["variant"] for r in rows if r["variant"]))
    variants.sort(key=lambda v: not v.startswith("stopwatch"))
    lines = [] if timed else ["not measured"]
    for shape in dict.fromkeys(r["shape"] for r in timed):
        here = {(r["variant"], r["direction"]): r for r in timed if r["shape"] == shape}
        directions = list(dict.fromkeys(direction for _, direction in here))
        fastest = {
            d: min(r["median_us"] for (_, e), r in here.items() if d == e) for d in directions
        }
        least = {
            d: _amount(max((r for (_, e), r in here.items() if d == e), key=lambda r: r["work"]))
            for d in directions
        }
        lines += [
            "" if lines else None,
            f"| {shape} | " + " | ".join(f"{d}, {least[d]}" for d in directions) + " |",
            "|---|" + "---|" * len(directions),
        ]
        for v in variants:
            lines.append(
                f"| {v} | "
                + " | ".join(_cell(here.get((v, d)), fastest[d]) for d in directions)
                + " |"
            )
    notes = []
    for r in rows:
        if "error" in r:
            at = ", ".join(filter(None, [r["variant"], r["direction"], f"{r['tokens']:,} tokens"]))
            notes.append(f"- {at}: {r['error']}")
    return (
        [line for line in lines if line is not None]
        + [""] * bool(notes)
        + list(dict.fromkeys(notes))
    )


def _amount(row):
    return (
        f"{row['work'] / 1e6:,.0f} MB"
        if row["unit"] == "bytes"
        else f"{row['work'] / 1e12:.3f} TFLOP"
    )


def _cell(row, fastest):
    if row is None:
        return "not measured"
    per_second = (
        f"{row['per_second'] / 1e9:,.0f} GB/s"
        if row["unit"] == "bytes"
        else f"{row['per_second'] / 1e12:,.0f} TFLOP/s"
    )
    mark = (" †" if row["method"] != "graph" else "") + (" ‡" if row["difference"] is None else "")
    share = (
        ""
        if row["share"] is None
        else f", {row['share']:.0%}" + (" of fp8" if row["rate"] == "fp8" else "")
    )
    bold = "**" if row["median_us"] == fastest else ""
    spread = f"({_us(row['p20_us'])}–{_us(row['p80_us'])})"
    return f"{bold}{_us(row['median_us'])}{bold} {spread}{mark}, {per_second}{share}"


def _us(x):
    return f"{x:,.1f}" if x < 1000 else f"{x:,.0f}"
