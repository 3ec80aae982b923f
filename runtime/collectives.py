"""What ranks exchange in a step of the trainer (optim/shards.py), and how long that takes: a model,
of which nothing is measured here.

benchmarks/cluster.py has its formulas and what it was compared with; ./run.sh plan uses it as well.
Does without torch.
"""

from typing import NamedTuple


class Parameter(NamedTuple):
    """A model's parameter as the optimizer shares it out."""

    name: str
    count: int  # of elements
    bytes: int
    units: int  # that are shared out among ranks: matrices, rows or elements
    sharded: bool
    every: int  # steps between its updates


def parameters_of(model, rules):
    """[Parameter, ...] of a template's Model, which may be on meta, in the order in which the
    optimizer takes them; rules: its update rules."""
    tensors = dict(model.named_parameters())
    found = []
    for name, rule in rules.items():
        p = tensors[name].data
        units = len(rule.parts(p)) if p.numel() else 0
        found.append(Parameter(name, p.numel(), p.nbytes, units, rule.sharded, rule.every))
    return found


class Links(NamedTuple):
    """GB/s in one direction, as a GPU sees them.

    link: measured by nccl-tests inside a node (H100: NVIDIA/nccl-tests, issue 326; A100: NCCL's
    src/graph/tuning.cc); network: the card's.
    """

    link: float = 360.0
    network: float = 50.0
    node: int = 8  # GPUs in it


class Collective(NamedTuple):
    kind: str  # reduce_scatter, all_gather, all_reduce or all_to_all
    bytes: float  # of the whole; in an all-to-all, that a rank sends, to itself as well
    group: str = "all"  # the ranks of a node, a rank and its like "across" nodes, or all
    every: int = 1  # steps between two of them


def shards(n, node):
    """How many ranks divide the optimizer among them, of n in nodes of so many: see
    join_world()."""
    return node if n % node == 0 else n


def collectives_of(parameters, n, node, touched=()):
    """What n ranks, in nodes of so many, exchange in a step; parameters: those that have a
    gradient in it; touched: {name: bytes of the rows that a rank sends}, of tables of which ranks
    exchange only these (optim/touched.py)."""
    k = shards(n, node)
    found = []
    reported = 4  # the loss and three requests
    for p in parameters:
        if not p.units:
            continue
        reported += 1  # the sum of its gradient's squares
        if not p.sharded or k == 1:
            found.append(Collective("all_reduce", p.bytes, "all", p.every))
            continue
        part = p.bytes / p.units * -(-p.units // k)
        if p.name in touched:
            found.append(Collective("all_to_all", touched[p.name], "node", p.every))
        else:
            found.append(Collective("reduce_scatter", k * part, "node", p.every))
        found.append(Collective("all_gather", k * part, "node", p.every))
        if n > k:
            found.append(Collective("all_reduce", part, "across", p.every))
    return [*found, Collective("all_reduce", 4 * reported)]


def times(collective):
    """How often a ring carries the bytes."""
    return 2 if collective.kind == "all_reduce" else 1


def ranks_in(group, n, node):
    """How many ranks such a group has, and on how many nodes they are."""
    k = shards(n, node)
    if group == "node":
        return k, -(-k // node)
    if group == "across":
        return n // k, n // k
    return n, -(-n // node)


def sent_bytes(collectives, n, node):
    """Bytes a rank sends in a step."""
    total = 0.0
    for x in collectives:
        m, _ = ranks_in(x.group, n, node)
        total += times(x) * (m - 1) / m * x.bytes / x.every
    return total


def communication_ms(collectives, n, links):
    """Milliseconds of a step, one collective after the other."""
    total = 0.0
    for x in collectives:
        m, nodes = ranks_in(x.group, n, links.node)
        rate = links.link  # GB/s
        if nodes > 1:
            cards = m // nodes  # that carry the ring from a node to the next
            rate = min(rate, cards * links.network)
        hops_us = 3.4 * (m - nodes) + 9.6 * (nodes - 1)
        if m > 1:
            ms = times(x) * ((m - 1) / m * x.bytes / rate / 1e6 + hops_us / 1e3) + 8.4e-3
            total += ms / x.every
    return total
