"""How long a track takes on a cluster that is not here: a model of its step. Nothing in it is
measured unless given.

    ./run.sh benchmarks cluster --gpus 8 --nodes 1
    ./run.sh benchmarks cluster --from trainer.json --dollars-per-gpu-hour 2.5

trainer.json is of `./run.sh benchmarks trainer --tokens ... --json trainer.json`. Options other
than those below are the trainer's own. For n ranks in nodes of k and a stage of R rows of row_len
tokens:

    step    = compute + idle + shared + fixed + communication
    compute = us_per_token * R * row_len / n
    idle    = us_per_token * (ceil(R / n) - R / n) * row_len
              rows are not cut: ranks without one wait
    shared  = shared_ms / k      the optimizer: a node's ranks divide the parameters
    fixed   = fixed_ms           launching, and what else every rank does
    communication = sum over collectives of (m - 1) / m * bytes / rate + latency,
              for m ranks in a ring, as NCCL does it
    rate    = link inside a node, min(link, network) from each rank to its like on other nodes,
              min(link, k * network) in one ring over all
    latency = 8.4 us + 3.4 us a hop inside a node + 9.6 us a hop between nodes
              (NCCL, src/graph/tuning.cc, ring)

Collectives are those of a step of the trainer (optim/shards.py). A sharded parameter's gradient is
reduce-scattered inside each node, padded to k equal parts (of whole matrices for Muon), each part
is all-reduced across nodes, and the weights are all-gathered inside each node; another's gradient
is all-reduced over all ranks, as is the guard's report. An all-reduce is twice the bytes. Of tables
of n-grams and value embeddings an all-to-all takes only the rows that ranks touch, where they are
few (optim/touched.py): as many as a text has different ones, about; see DISTINCT. Adam's count once
in adam_every steps; while the head is the embedding as well, the one of its own has no gradient.
Where nodes of k do not make n, the optimizer is divided by n, in one ring. Collectives begin when
backward has ended, and nothing of them is taken to be hidden; copying rows out and adding them up
is not counted. Time to target is the track's steps; validation and start-up are not on its clock.
Memory is taken to suffice.

Part by part, each of these terms is shared out among the model's own parts: compute by their FLOPs
(6 a token for each weight of a product; attention has what the template counts besides), the
optimizer by the bytes of weights, gradients and moments that it goes through, communication by each
parameter's own collectives. Compute so includes what is not a product, in proportion; tables that
are only looked up have none. All of that is a prediction too.

Without a measurement: the public record (modded-nanogpt, one H100): 29 ms + 1.534 us a token,
fitted to its logs at three batches. All 29 ms are shared: they are the optimizer and eight passes
of accumulation, of which eight ranks do one each. With the record's volumes the model gives its
stages on 8 H100s, as three sets of logs have them, within 3%. No run on several nodes has been
compared with it.
"""

import collections
import json
import typing
from pathlib import Path

from base import InputError
from benchmarks import subject
from benchmarks.options import COUNT, POSITIVE
from benchmarks.report import document, number, say, table
from benchmarks.synthetic import vocabulary
from models import outline
from optim.touched import ONE_IN
from runtime import collectives, hardware
from runtime.collectives import Links, communication_ms, sent_bytes, shards


class Cost(typing.NamedTuple):
    """What a step costs one rank."""

    us_per_token: float
    shared_ms: float
    fixed_ms: float
    source: str = ""


RECORD = Cost(
    us_per_token=1.534,
    shared_ms=29.0,
    fixed_ms=0.0,
    source="the public record on one H100 (11 layers x 768, FP8): 29 ms + 1.534 us per token",
)
LINKS = Links()
# (a, b): n tokens have a * n**b different ones, and as many rows. Fitted to 32,768, 65,536 and
# 98,304 tokens of Python's standard library (a tokenizer of 50,257), where it is within 4%, and
# within 15% for words and pairs of words of English Wikipedia. FineWeb has not been counted
DISTINCT = dict(ngram_embeds=(4.1, 0.8), value_embeds=(6.9, 0.634))
TERMS = ("compute", "idle", "shared", "fixed", "communication")
PART_TERMS = ("compute", "shared", "communication")  # that parts of the model have


def collectives_of(c, parameters, n, node, tied=False, touched=()):
    """What n ranks, in nodes of so many, exchange in a step of a stage with the head tied or not.
    touched: as collectives.collectives_of() has it."""
    used = [p for p in parameters if subject.has_gradient(p.name, c, tied)]
    return collectives.collectives_of(used, n, node, touched)


def touched_bytes(c, parameters, rows, n, node):
    """{table: bytes of the rows that a rank sends at a turn, about} of tables of which ranks
    exchange only these (optim/touched.py); rows: of the batch."""
    k = shards(n, node)
    found = {}
    for p in parameters:
        if k == 1 or not p.count or p.name not in DISTINCT:
            continue
        scale, power = DISTINCT[p.name]
        tokens = -(-rows // n) * c.row_len * p.every
        tables = dict(ngram_embeds=c.n_gram - 1, value_embeds=len(c.value_embed_layers))[p.name]
        sent = tables * min(tokens, scale * tokens**power)
        in_parts = -(-p.units // k) * (p.count // p.units) % c.n_embd == 0  # whole rows
        if in_parts and ONE_IN * sent <= p.count // c.n_embd:
            found[p.name] = sent * c.n_embd * p.bytes / p.count
    return found


def step_ms(rows, row_len, n, cost, collectives, links=LINKS):
    """{term: ms} of a step; they sum to it."""
    tokens = rows * row_len / n  # of a rank, on average
    most = -(-rows // n) * row_len
    return dict(
        compute=cost.us_per_token * tokens / 1e3,
        idle=cost.us_per_token * (most - tokens) / 1e3,
        shared=cost.shared_ms / shards(n, links.node),
        fixed=cost.fixed_ms,
        communication=communication_ms(collectives, n, links),
    )


def predict_stage(c, parameters, stage, n, cost, links):
    """{term: ms} of a step of this stage."""
    exchanged = exchanged_in(c, parameters, stage, n, links)
    return step_ms(stage.rows, c.row_len, n, cost, exchanged, links)


def exchanged_in(c, parameters, stage, n, links):
    """The collectives of a step of this stage."""
    touched = touched_bytes(c, parameters, stage.rows, n, links.node)
    return collectives_of(c, parameters, n, links.node, stage.model.tied, touched)


def predict(c, parameters, n, cost, links, dollars=None):
    """One line of the table: ms by stage and term, seconds to target, dollars, the largest term."""
    stages = []
    for stage, steps in collections.Counter(subject.schedule(c)).items():
        terms = predict_stage(c, parameters, stage, n, cost, links)
        exchanged = exchanged_in(c, parameters, stage, n, links)
        stages.append(
            dict(
                tokens=stage.rows * c.row_len,
                steps=steps,
                ms=sum(terms.values()),
                terms=terms,
                bytes=sent_bytes(exchanged, n, links.node),
            )
        )
    seconds = {t: sum(s["steps"] * s["terms"][t] for s in stages) / 1e3 for t in TERMS}
    total = sum(seconds.values())
    hours = total * n / 3600
    return dict(
        gpus=n,
        nodes=-(-n // links.node),
        stages=stages,
        seconds=total,
        seconds_by_term=seconds,
        dominates=max(seconds, key=seconds.get),
        gpu_hours=hours,
        dollars=None if dollars is None else hours * dollars,
        bytes=sum(s["steps"] * s["bytes"] for s in stages) / c.steps,
    )


def parts_of(c, parameters, model, n, cost, links):
    """[dict(name, params, gflops, ms by term)] of a step on average over the schedule, the longest
    first: each parameter, and attention; they sum to predict()'s compute, shared and communication.

    model: the template's, on meta; gflops: of a rank.
    """
    tables = {name for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name}
    weights = {p.name: 0 if p.name in tables else p.count for p in parameters}
    found = {p.name: dict(name=p.name, params=p.count, gflops=0.0) for p in parameters if p.count}
    found["attention"] = dict(name="attention", params=0, gflops=0.0)
    for part in found.values():
        part |= dict(compute=0.0, shared=0.0, communication=0.0)
    for stage, steps in collections.Counter(subject.schedule(c)).items():
        share = steps / c.steps
        tokens = stage.rows * c.row_len / n
        used = [p for p in parameters if subject.has_gradient(p.name, c, stage.model.tied)]
        terms = predict_stage(c, parameters, stage, n, cost, links)

        # FLOPs; a sampled head is what the template says
        flops = {name: 6.0 * count for name, count in weights.items()}
        V = len(model.lm_head)
        if 0 < stage.model.n_sampled < V:
            flops["lm_head"] *= stage.model.n_sampled / V
        flops["attention"] = max(0.0, model.flops_per_token(stage.model) - sum(flops.values()))
        total = sum(flops.values())
        # Read and written once: gradient, weight and its lower bits, a moment or two in fp32
        traffic = {p.name: p.count * (2 + 2 * 4 + 2 * 8) / p.every for p in used}
        all_traffic = sum(traffic.values())
        for name, part in found.items():
            part["gflops"] += share * flops.get(name, 0.0) * tokens / 1e9
            part["compute"] += share * terms["compute"] * flops.get(name, 0.0) / total
            part["shared"] += share * terms["shared"] * traffic.get(name, 0.0) / all_traffic
        touched = touched_bytes(c, parameters, stage.rows, n, links.node)
        for p in used:
            if p.count:
                # But for the report
                own = collectives.collectives_of([p], n, links.node, touched)[:-1]
                found[p.name]["communication"] += share * communication_ms(own, n, links)
    parts = [part | dict(ms=sum(part[t] for t in PART_TERMS)) for part in found.values()]
    return sorted(parts, key=lambda part: -part["ms"])


def cost_from(path, params):
    """Cost from the JSON of `./run.sh benchmarks trainer --tokens A B ...` on one rank. Raises
    InputError."""
    try:
        result = json.loads(Path(path).read_text())
        result = result.get("results", {}).get("trainer", result)  # one of `all`
        fit = result["fit"]
        world_size = result["world_size"]
        measured = result["params"]
    except OSError as e:
        raise InputError(f"--from {path}: {e.strerror}") from None
    except (ValueError, LookupError, AttributeError, TypeError):
        expected = "the JSON of ./run.sh benchmarks trainer"
        raise InputError(f"--from {path}: expected {expected}") from None
    if world_size != 1 or not fit:
        raise InputError(
            f"--from {path}: expected one rank at two or more sizes, found {world_size} and "
            f"{len(result['stages'])}: measure with `trainer --tokens 16384 32768 49152`"
        )
    if measured != params:
        raise InputError(
            f"--from {path}: measured with {measured:,} parameters, this track has {params:,}: "
            "give the options it was measured with"
        )
    whole = max(0.0, fit["fixed_ms"])
    shared = min(fit["optimizer_ms"], whole)
    source = f"{path}: {result['device']}, one rank"
    return Cost(fit["us_per_token"], shared, whole - shared, source)


def run(
    gpus=8,
    nodes=1,
    results=None,
    link=None,
    network=None,
    dollars_per_gpu_hour=None,
    kind="h100",
    trainer_options=(),
):
    """dict(track, cost, links, predicted=see predict(), parts=see parts_of(), table=[predict() from
    1 to 1,024 GPUs])."""
    options = list(trainer_options)
    if "--track" not in options:
        options = ["--track", "gpt2-small", *options]
    c = subject.parse(options)
    n_vocab = vocabulary(c.data, c.tokenizer)
    parameters = subject.parameters(c, n_vocab)
    model = outline(c.config, n_vocab)
    params = sum(p.count for p in parameters)
    cost = RECORD
    if results:
        cost = cost_from(results, params)
    elif (c.n_layer, c.n_embd, c.tokenizer) != (11, 768, "gpt2"):
        raise InputError(f"no measurement of {c.track} as configured: give --from FILE")
    known, _ = hardware.parse(kind)
    links = Links(link or known.link, network or known.network, gpus)

    def line(n):
        return predict(c, parameters, n, cost, links, dollars_per_gpu_hour)

    result = dict(
        track=c.track,
        params=params,
        steps=c.steps,
        row_len=c.row_len,
        cost=cost._asdict(),
        links=links._asdict(),
        predicted=line(gpus * nodes),
        parts=parts_of(c, parameters, model, gpus * nodes, cost, links),
        table=[line(2**i) for i in range(11)],
    )
    say(render(result))
    return result


def render(result):
    """The prediction, then a line for each number of GPUs."""
    p = result["predicted"]
    cost = result["cost"]
    links = result["links"]
    dollars = "" if p["dollars"] is None else f", **${p['dollars']:,.2f}**"
    stages = []
    for s in p["stages"]:
        terms = [f"{s['terms'][t]:.2f}" for t in TERMS]
        stages.append([f"{s['tokens']:,}", s["steps"], f"{s['ms']:.2f}", *terms])
    parts = []
    for part in result["parts"]:
        if part["ms"] >= 0.005:
            terms = [f"{part[t]:.2f}" for t in ("ms", *PART_TERMS)]
            parts.append([part["name"], f"{part['params']:,}", f"{part['gflops']:,.0f}", *terms])
    rows = []
    for t in result["table"]:
        largest = t["dominates"]
        row = [f"{t['gpus']:,}", t["nodes"], ", ".join(f"{s['ms']:.1f}" for s in t["stages"])]
        row += [f"{t['seconds']:,.1f}", f"{t['gpu_hours']:.2f}", number(t["dollars"], ",.2f")]
        rows.append([*row, f"{largest} {t['seconds_by_term'][largest] / t['seconds']:.0%}"])
    header = ["GPUs", "nodes", "ms by stage", "s to target", "GPU hours", "$", "largest term"]
    return document(
        f"# {result['track']} on {p['gpus']} GPUs, {p['nodes']} node{'s' * (p['nodes'] > 1)}: "
        "a prediction",
        f"Cost: {cost['source']}. Per rank {cost['us_per_token']:.3f} us a token and "
        f"{cost['fixed_ms']:.2f} ms, and {cost['shared_ms']:.2f} ms divided by the ranks of a "
        f"node. Links: {links['link']:g} GB/s inside a node, {links['network']:g} GB/s a GPU "
        f"between nodes of {links['node']}; {p['bytes'] / 1e6:,.0f} MB a step and rank.",
        f"**{p['seconds']:,.1f} s** for {result['steps']:,} steps, {p['gpu_hours']:.2f} GPU "
        f"hours{dollars}; most of it is {p['dominates']}.",
        table(["tokens a step", "steps", "ms", *TERMS], stages),
        "Part by part, ms of a step on average, predicted:",
        table(["part", "parameters", "GFLOP", "ms", *PART_TERMS], parts),
        table(header, rows),
    )


def add_arguments(parser):
    parser.option("--gpus", COUNT, 8, "N", "in a node")
    parser.option("--nodes", COUNT, 1, "N", "of them")
    about = "JSON of `./run.sh benchmarks trainer --tokens ...` on one rank"
    parser.option("--from", Path, None, "FILE", about, dest="results")
    about = "whose links these are: a name in runtime/hardware.toml"
    parser.option("--hardware", str, "h100", "NAME", about, dest="kind")
    about = "bus bandwidth of a node, if not the hardware's"
    parser.option("--link", POSITIVE, None, "GB/S", about)
    about = "network of each GPU between nodes, the same: 400 Gb/s is 50"
    parser.option("--network", POSITIVE, None, "GB/S", about)
    parser.option("--dollars-per-gpu-hour", POSITIVE, None, "X", "price")
