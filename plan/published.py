"""Runs that others have published, beside what ./run.sh plan would have said of them.

Nothing of the plan was fitted to them. What they did not publish is not compared, and what is our
own reckoning says so in `note`.
"""

from typing import NamedTuple

import train_gpt

from . import estimate


class Published(NamedTuple):
    """One run. Either options describe it to the trainer, or flops_per_token is given."""

    name: str
    hardware: str
    tokens: float
    flops_per_token: float | None = None
    options: tuple = ()
    fp8: bool = False
    hours: float | None = None
    tokens_per_s: float | None = None
    usd: float | None = None
    usd_per_hour: float | None = None  # of one GPU, where that is known
    val_bpb: float | None = None
    source: str = ""
    note: str = ""


LLAMA = ("--template", "llama", "--track", "laptop")

# The 1.055B of MyLLM and minimind's 64M, in the words of our llama template
MYLLM = (
    *LLAMA,
    *"--n-layer 28 --n-embd 1792 --n-head 14 --n-kv-head 2 --head-dim 128 --ffn-dim 4864".split(),
    *"--tokenizer bpe:65535 --row-len 8192 --val-row-len 8192 --max-doc-len 8192".split(),
    *"--batch-tokens 262144".split(),
)
MINIMIND = (
    *LLAMA,
    *"--n-layer 8 --n-embd 768 --n-head 8 --n-kv-head 4 --head-dim 96 --ffn-dim 2432".split(),
    *"--tokenizer bpe:6400 --row-len 340 --val-row-len 340 --max-doc-len 340".split(),
    *"--batch-tokens 87040".split(),
)

RUNS = (
    Published(
        name="nanochat d24, bf16",
        hardware="8xh100",
        flops_per_token=4.775e9,
        tokens=4.33e19 / 4.775e9,
        hours=3.04,
        usd=73,
        usd_per_hour=3.0,
        val_bpb=0.74833,
        source="nanochat's leaderboard, 2026-01-29",
        note="tokens from its FLOPs; text: FineWeb-Edu",
    ),
    Published(
        name="nanochat d24, FP8",
        hardware="8xh100",
        flops_per_token=4.775e9,
        tokens=5.84e9,
        fp8=True,
        hours=1.65,
        usd=40,
        usd_per_hour=3.0,
        val_bpb=0.71800,
        source="nanochat's leaderboard, 2026-03-14",
        note="text: ClimbMix",
    ),
    Published(
        name="286M on one H100",
        hardware="h100",
        flops_per_token=0.760e9,
        tokens=655e6,
        hours=1.0,
        usd=4.30,
        usd_per_hour=4.30,
        source="a blog's post on a run of nanochat's d12",
        note='published as "under an hour", taken as one; its price is taken as that of an hour',
    ),
    Published(
        name="1.055B on 8 GPUs, as H100",
        hardware="8xh100",
        options=MYLLM,
        tokens=27.54e9,
        hours=35.4,
        tokens_per_s=216_100,
        source="MyLLM's pages",
        note="its GPU is not named: this line takes an H100",
    ),
    Published(
        name="1.055B on 8 GPUs, as A100",
        hardware="8xa100",
        options=MYLLM,
        tokens=27.54e9,
        hours=35.4,
        tokens_per_s=216_100,
        source="MyLLM's pages",
        note="the same run, taken for one on A100s",
    ),
    Published(
        name="minimind 64M, pre-training",
        hardware="rtx3090",
        options=MINIMIND,
        tokens=1.27e6 * 340,
        hours=1.21,
        source="minimind's README: 1.21 of its 2.31 hours",
        note="tokens are our reckoning: one pass over 1.27 million rows of 340; two passes in that "
        "time would be above the card's peak",
    ),
)


def planned(run):
    """dict(hours, tokens_per_s, usd, val_bpb, ...): what the plan says of a Published run."""
    place = estimate.place_of(run.hardware)
    if run.options:
        config = train_gpt.parse_args([*run.options, "--micro-tokens", "0"])
        plan = estimate.make_plan(config, place, f"{run.tokens:.0f}", usd=run.usd_per_hour)
        keys = "hours", "tokens_per_s", "usd", "val_bpb", "val_bpb_low", "val_bpb_high", "params"
        return {key: plan[key] for key in keys}
    config = train_gpt.configure(fp8="on" if run.fp8 else "off", data="fineweb10B")
    speed = estimate.speed_of(place, config, run.flops_per_token)
    tokens_per_s = place.count * place.peak * speed.share / run.flops_per_token
    hours = run.tokens / tokens_per_s / 3600
    loss = estimate.expected_loss(config, run.flops_per_token / 6, run.tokens)
    value = loss.expected._asdict() if loss else dict.fromkeys(("value", "low", "high"))
    return dict(
        hours=hours,
        tokens_per_s=round(tokens_per_s),
        usd=run.usd_per_hour and hours * place.count * run.usd_per_hour,
        val_bpb=value["value"],
        val_bpb_low=value["low"],
        val_bpb_high=value["high"],
    )


def compare(runs=RUNS):
    """[dict(name, published, planned, error), ...]; error: planned over published, less 1."""
    rows = []
    for run in runs:
        said = planned(run)
        published = {key: getattr(run, key) for key in ("hours", "tokens_per_s", "usd", "val_bpb")}
        error = {}
        for key, value in published.items():
            if value is not None and said[key] is not None:
                error[key] = said[key] / value - 1
        rows.append(
            dict(
                name=run.name,
                hardware=run.hardware,
                published=published,
                planned=said,
                error=error,
                source=run.source,
                note=run.note,
            )
        )
    return rows


UNITS = dict(hours=".2f", tokens_per_s=",.0f", usd=",.2f", val_bpb=".3f")


def table(rows):
    """Lines of a table in Markdown."""
    lines = ["| run | what | published | planned | error |", "|---|---|---|---|---|"]
    for row in rows:
        for key, form in UNITS.items():
            value = row["published"][key]
            if value is None:
                continue
            ours = row["planned"][key]
            if ours is None:
                continue
            said = format(ours, form)
            if key == "val_bpb":
                low, high = row["planned"]["val_bpb_low"], row["planned"]["val_bpb_high"]
                said += f" ({low:.2f} to {high:.2f})"
            name = key.replace("_per_s", "/s").replace("val_bpb", "bits per byte")
            lines.append(
                f"| {row['name']} | {name} | {value:{form}} | {said} | {row['error'][key]:+.0%} |"
            )
    lines.append("")
    for row in rows:
        lines.append(f"{row['name']}: {row['source']}. {row['note']}.")
    return lines
