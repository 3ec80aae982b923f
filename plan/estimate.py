"""A plan: what a configuration takes on some hardware, and the loss it may reach.

Everything follows from the template's own counts (models/__init__.py), runtime/memory.py's
estimate, runtime/hardware.toml and the runs in records/scaling/. Each number that was not measured
where it is used is said to be predicted, with what it was predicted from.
"""

import collections
import functools
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import torch

import train_gpt
from base import InputError
from base.places import runs_folder
from kernels import attention, choose_ops
from kernels.op import OPS
from models import load_template
from optim import rules_of
from records import scaling
from runtime import hardware, memory
from runtime.collectives import Links, collectives_of, communication_ms, parameters_of
from runtime.environment import device_name, matmul_rate
from runtime.hardware import Hardware
from runtime.machine import choose_dtype
from runtime.options import peek
from runtime.steps import n_tokens
from tracks import load_track

GB = 1e9
MANIFESTS = ("manifest.json", "data.json")  # of prepared data, and of a run's
FAR = 4  # times as many FLOPs a token, or as few, from where a rate is another model's
FEW_TOKENS = 16384  # of a GPU in a step, below which what every step costs anyway is felt
REPEATS = 4  # passes over the same text that are worth about as much as new text: arXiv 2305.16264


class Place(NamedTuple):
    """Where a run is planned."""

    hardware: Hardware
    count: int  # GPUs, or 1 for a processor
    here: bool  # whether it is this machine
    cuda: bool
    free: float | None  # bytes of each
    peak: float  # FLOP/s of each in matrix products
    peak_from: str


class Speed(NamedTuple):
    share: float | None  # of peak; None if nobody knows
    measured: bool  # on this hardware
    source: str


class Data(NamedTuple):
    """What a folder of prepared tokens holds."""

    folder: str
    n_vocab: int
    tokens: int


# --------------------------------------------------------------------------------------------------
# Where


def place_of(text=None):
    """The Place of words such as 8xh100; this machine if None. Raises InputError."""
    if text:
        kind, count = hardware.parse(text)
        free = kind.memory_gb * GB
        return Place(kind, count, False, True, free, kind.tflops * 1e12, "its data sheet")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    product = device_name(device)
    kind = (cuda and hardware.find(product)) or Hardware("gpu" if cuda else "cpu")
    count = torch.cuda.device_count() if cuda else 1
    peak = matmul_rate(device, choose_dtype("auto", device))
    free = memory.free_memory(device)
    return Place(kind._replace(name=product), count, True, cuda, free, peak, "measured now")


def ops_of(place, fp8):
    """kernels.Ops as such a place has them, of which only the names count here."""
    ops = choose_ops("cpu")
    if not place.cuda:
        return ops
    chip = place.hardware.chip
    forms = {name: "triton" if chip in op.faster_on else "pytorch" for name, op in OPS.items()}
    functions = {}
    if fp8:
        forms |= {name: "fp8" for name, op in OPS.items() if op.new_fp8}
        functions = dict(new_mlp=OPS["relu2_mlp"].new_fp8)
    attend = functools.partial(attention, backend="varlen")
    return ops.replace(forms=forms, attention=attend, **functions)


def uses_fp8(config, place):
    wanted = config.precision.fp8
    return wanted == "on" or wanted == "auto" and place.cuda and place.hardware.chip == 90


def speed_of(place, config, flops_per_token, runs=None):
    """The Speed to expect: of runs that this machine has made, else of the table."""
    fp8 = uses_fp8(config, place)
    if place.here:
        own = own_runs(place.hardware.name, config, runs or runs_folder())
        if own:
            return Speed(own[0], True, f"measured here: {own[1]}")
    key = place.hardware.name if place.hardware.tflops else "cpu"
    if place.here and place.cuda:
        found = hardware.find(place.hardware.name)
        key = found.name if found else "gpu"
    rate = hardware.nearest_rate(key, flops_per_token, fp8)
    if rate is None:
        return Speed(None, False, "nothing was measured on its kind")
    words = f"{rate.share:.0%} of peak, measured on {rate.hardware}: {rate.what} ({rate.source})"
    same = rate.hardware == key and key != "cpu"
    smaller = rate.flops_per_token / flops_per_token
    if same and 1 / FAR < smaller < FAR:
        return Speed(rate.share, True, words)
    if smaller >= FAR:
        words += f"; this model is {smaller:.0f} times smaller, and small ones reach less"
    return Speed(rate.share, False, f"predicted from {words}")


def own_runs(device, config, folder):
    """(share of peak, run) of this machine's finished run that is most like this one, or None."""
    best = None
    for path in Path(folder).glob("*/result.json"):
        try:
            result = json.loads(path.read_bytes())
            said = json.loads(path.with_name("config.json").read_bytes())["config"]
            if result["device"] != device or said["template"] != config.goal.template:
                continue
            share = float(result["peak_share"])
            unlike = result["track"] != config.goal.track, -path.stat().st_mtime
        except (OSError, ValueError, KeyError, TypeError):
            continue  # of another version
        if share > 0 and (best is None or unlike < best[0]):
            best = unlike, share, path.parent.name
    return best[1:] if best else None


# --------------------------------------------------------------------------------------------------
# What


def configured(options):
    """The trainer's Config of these options, also of a track whose text is not given yet. Raises
    InputError."""
    first = peek(options, "track", "text")
    if first["track"] and not first["text"] and load_track(first["track"]).get("data") == "text":
        options = [*options, "--text", "not given"]
    return train_gpt.parse_args(options)


def read_data(folder):
    """The Data of a folder with a manifest. Raises InputError."""
    for name in MANIFESTS:
        path = Path(folder, name)
        if path.exists():
            try:
                said = json.loads(path.read_bytes())
                tokens = said["splits"]["train"]["tokens"]
                return Data(str(folder), int(said["n_vocab"]), int(tokens))
            except (OSError, ValueError, KeyError, TypeError) as e:
                raise InputError(f"{path}: {e}; expected the manifest of prepared data") from None
    raise InputError(
        f"--data {folder}: expected a folder with {' or '.join(MANIFESTS)}, as ./run.sh data build "
        "and every run leave it, or the name of a source"
    )


def vocabulary(config):
    """Tokens in the vocabulary, as far as the tokenizer's name says. Raises InputError."""
    name = config.data.tokenizer
    if config.data.data == "fineweb10B":
        name = "gpt2"
    found = re.fullmatch(r"\w+:(\d+)", name)
    # Characters are Tiny Shakespeare's; a small text has fewer than the 4,096 of bpe
    known = dict(bytes=257, gpt2=50257, chars=66, bpe=4096)
    if not found and name not in known:
        raise InputError(
            f"--tokenizer {name}: the plan needs to know how many tokens it has: expected bpe:N, "
            f"{', '.join(known)}, or --vocab N"
        )
    return int(found[1]) if found else known[name]


def build(config, n_vocab, place):
    """The template's Model of a configuration on meta, as this place would run it."""
    template = load_template(config.goal.template)
    max_len = max(config.data.row_len, config.data.val_row_len)
    dtype = torch.bfloat16
    if config.precision.dtype != "auto":
        dtype = getattr(torch, config.precision.dtype)
    elif place.here:
        dtype = choose_dtype("auto", torch.device("cuda" if place.cuda else "cpu"))
    ops = ops_of(place, uses_fp8(config, place))
    with torch.device("meta"):
        return template.Model(config.model, n_vocab, max_len, dtype, ops)


@functools.lru_cache(maxsize=8)
def tokens_by_stage(config):
    """{stage: tokens of all its steps}"""
    tokens = collections.Counter()
    for stage in train_gpt.stages_of(config).values():
        tokens[stage] += n_tokens(config, stage)
    return tokens


def flops_per_token(model, config):
    """Training FLOPs, the mean over the tokens of the schedule."""
    tokens = tokens_by_stage(config)
    flops = sum(n * model.flops_per_token(stage.model) for stage, n in tokens.items())
    return flops / tokens.total()


def tokens_of(rule, config, n):
    """Tokens to train on by a rule: the track's own schedule, R:1 for R a parameter, or a number.

    n: parameters that count. Raises InputError.
    """
    if rule == "track":
        return tokens_by_stage(config).total()
    ratio = re.fullmatch(r"(\d+(?:\.\d+)?):1", rule)
    number = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMBT]?)", rule, re.IGNORECASE)
    if ratio and float(ratio[1]) > 0:
        return round(float(ratio[1]) * n)
    if number:
        unit = dict(K=1e3, M=1e6, B=1e9, T=1e12).get(number[2].upper(), 1)
        tokens = round(float(number[1]) * unit)
        if 0 < tokens < 10**18:
            return tokens
    raise InputError(
        f"--tokens {rule}: expected track, a ratio to the parameters such as 20:1 or 100:1, or a "
        "number such as 655M or 2.5B"
    )


# --------------------------------------------------------------------------------------------------
# How good


class Loss(NamedTuple):
    expected: scaling.Expected
    source: str
    caveats: tuple


def expected_loss(config, n, tokens, folder=scaling.FOLDER):
    """The Loss in bits per byte of n (FLOPs per token over 6) after so many tokens, or None."""
    ladders = scaling.ladders(folder)
    wanted = config.goal.template, "stdlib" if config.data.data == "stdlib" else "english"

    def unlike(key):
        return key[0] != wanted[0], key[1] != wanted[1], key

    if not ladders:
        return None
    key = min(ladders, key=unlike)
    fit = ladders[key]
    caveats = []
    if key[0] != wanted[0]:
        caveats.append(f"the runs are of template {key[0]}, this is {wanted[0]}")
    if key[1] != wanted[1]:
        caveats.append(f"the runs' text is {key[1]}; another text moves the loss, by up to a half")
    elif key[1] == "english":
        caveats.append("another English text moves the loss by a tenth or two")
    far = n / fit.largest[0], tokens / fit.largest[1]
    if max(far) > 2:
        caveats.append(
            f"{max(1, far[0]):,.0f} times the largest model and {max(1, far[1]):,.0f} times the "
            "longest run of the fit: an extrapolation"
        )
    source = f"{fit.runs} runs of {fit.sizes} sizes, {key[0]} on {key[1]}"
    return Loss(fit(n, tokens), source, tuple(caveats))


# --------------------------------------------------------------------------------------------------
# All of it


def choose_memory(model, config, place, shards):
    """memory.choose() for one of the place's ranks, of rows as the trainer has them: the largest
    batch is shared out over the ranks, and each makes equal passes of its part."""
    most, recompute, parts = memory.choose(model, config, place.free, shards, place.cuda)
    if not most:
        return most, recompute, parts
    largest = max(config.schedule.batch_tokens) // config.data.row_len
    rows = memory.equal_passes(-(-largest // place.count), most)
    rules = rules_of(model, config.optim)
    row_len = config.data.row_len
    parts = memory.estimate(model, rules, rows, row_len, recompute, shards, place.cuda)
    return rows, recompute, parts


def advice(model, config, place):
    """What would make it fit: [a line, ...], of what was tried."""
    lines = []
    row_len = config.data.row_len
    half = row_len // 2
    tries = {
        "--recompute on": dict(recompute="on"),
        f"--micro-tokens {row_len} --recompute on": dict(micro_tokens=row_len, recompute="on"),
        f"--row-len {half} --micro-tokens {half} --recompute on": dict(
            row_len=half, micro_tokens=half, recompute="on"
        ),
    }
    if hasattr(config.optim, "row_moments") and not config.optim.row_moments:
        tries |= {"--row-moments": dict(row_moments=True)}
    for words, fields in tries.items():
        try:
            other = train_gpt.changed(config, **fields)
        except InputError:
            continue
        rows, _, parts = choose_memory(model, other, place, shards_of(place))
        if rows:
            lines.append(f"{words}: {sum(parts.values()) / GB:.1f} GB")
    if place.cuda and not place.here:
        for count in (2, 4, 8):
            if count > place.count and count <= place.hardware.node:
                rows, _, parts = choose_memory(model, config, place, count)
                if rows:
                    size = sum(parts.values()) / GB
                    lines.append(f"{count}x{place.hardware.name}: {size:.1f} GB each")
                    break
        table, _ = hardware.read()
        for kind in sorted(table.values(), key=lambda kind: kind.memory_gb):
            larger = place._replace(hardware=kind, free=kind.memory_gb * GB)
            rows, _, parts = choose_memory(model, config, larger, shards_of(place))
            if rows and kind.memory_gb > place.hardware.memory_gb:
                lines.append(f"{kind.name}: {sum(parts.values()) / GB:.1f} GB")
                break
    return lines or ["nothing that was tried: take a smaller model"]


def shards_of(place):
    """Ranks that divide the optimizer among them."""
    node = place.hardware.node if not place.here else place.count
    return node if place.count % node == 0 else place.count


def exchange_ms_of(model, config, place):
    """Milliseconds in which a step's gradients and parameters go from GPU to GPU."""
    if place.count == 1:
        return 0.0
    kind = place.hardware
    links = Links(kind.link, kind.network, kind.node)
    parameters = parameters_of(model, rules_of(model, config.optim))
    return communication_ms(collectives_of(parameters, place.count, kind.node), place.count, links)


def caveats_of(place, batch, passes):
    """[a line, ...] on what is not in the plan's numbers; batch: tokens of a step; passes: over the
    data, None if nobody knows."""
    lines = []
    if place.cuda and batch / place.count < FEW_TOKENS:
        lines.append(
            f"{batch / place.count:,.0f} tokens a step for each GPU are few: what every step costs "
            "whatever its size, milliseconds, is not counted"
        )
    if passes and passes > REPEATS:
        lines.append(
            f"{passes:.0f} passes over the data; from {REPEATS} on, text that comes again teaches "
            "less than new text"
        )
    return lines


def make_plan(config, place, rule="track", data=None, n_vocab=None, usd=None, watts=None):
    """dict: the plan; keys as ./run.sh plan --json prints them. Raises InputError.

    data: Data or None; n_vocab: tokens in the vocabulary, where neither data nor the tokenizer's
    name says; usd, watts: of one device, in place of the table's.
    """
    n_vocab = n_vocab or (data.n_vocab if data else vocabulary(config))
    model = build(config, n_vocab, place)
    by_part = {name: p.numel() for name, p in model.named_parameters() if p.numel()}
    params = sum(by_part.values())
    per_token = flops_per_token(model, config)
    n = per_token / 6

    # A table that is only looked up counts for the rule as little as it does in FLOPs
    tokens = tokens_of(rule, config, min(params, n))
    flops = tokens * per_token
    batch = tokens_of("track", config, 0) / config.schedule.steps
    steps = math.ceil(tokens / batch)

    shards = shards_of(place)
    rows, recompute, parts = choose_memory(model, config, place, shards)
    memory_gb = sum(parts.values()) / GB

    # A step's products, then what is exchanged; nothing of that is taken to be hidden
    speed = speed_of(place, config, per_token)
    exchange_ms = exchange_ms_of(model, config, place)
    seconds = hours = None
    if speed.share:
        rate = place.count * place.peak * speed.share
        if recompute:
            rate *= 3 / 4  # the blocks' forward pass, a third of the rest, comes twice
        seconds = flops / rate + steps * exchange_ms / 1e3
        hours = seconds / 3600

    # What that takes of the purse and of the wall socket
    kind = place.hardware
    usd_per_hour = usd if usd is not None else kind.usd_per_hour
    watts_each = watts if watts is not None else kind.watts
    cost = kwh = None
    if hours and usd_per_hour is not None:
        cost = hours * place.count * usd_per_hour
    if hours and watts_each is not None:
        kwh = hours * place.count * watts_each / 1e3

    # How good it will be
    expected = expected_loss(config, n, tokens)
    value = expected.expected if expected else scaling.Expected(None, None, None)
    passes = tokens / data.tokens if data else None
    caveats = list(expected.caveats) if expected else []
    caveats += caveats_of(place, batch, passes)
    chinchilla = {
        name: round(scaling.loss((E, A, a, B, b), min(params, n), tokens), 3)
        for name, (E, A, a, B, b) in scaling.CHINCHILLA.items()
    }
    return dict(
        track=config.goal.track,
        template=config.goal.template,
        hardware=f"{place.count}x{kind.name}" if place.count > 1 else kind.name,
        params=params,
        params_by_part=by_part,
        n_vocab=n_vocab,
        tokens=tokens,
        tokens_rule=rule,
        tokens_per_param=round(tokens / min(params, n), 2),
        passes=round(passes, 2) if passes else None,
        steps=steps,
        batch_tokens=round(batch),
        flops_per_token=per_token,
        flops=flops,
        memory_gb=round(memory_gb, 2),
        memory_by_part={name: round(size / GB, 3) for name, size in parts.items()},
        memory_free_gb=None if place.free is None else round(place.free / GB, 2),
        fits=rows > 0,
        rows=rows,
        recompute=recompute,
        advice=[] if rows else advice(model, config, place),
        peak_tflops=place.peak / 1e12,
        peak_from=place.peak_from,
        peak_share=speed.share,
        speed_from=speed.source,
        speed_measured=speed.measured,
        exchange_ms=round(exchange_ms, 2),
        tokens_per_s=round(tokens / seconds) if seconds else None,
        hours=hours,
        usd=cost,
        usd_per_hour=usd_per_hour,
        usd_from="given" if usd is not None else f"{kind.price_date}, {kind.price_source}",
        kwh=kwh,
        watts=watts_each,
        watts_from="given" if watts is not None else kind.watts_source,
        val_bpb=value.value,
        val_bpb_low=value.low,
        val_bpb_high=value.high,
        val_bpb_from=expected.source if expected else None,
        caveats=caveats,
        chinchilla_nats=chinchilla,
    )
