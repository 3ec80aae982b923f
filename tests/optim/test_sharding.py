"""Parameters shared out over ranks and machines, without processes: ranks are threads, and the
collectives are those of PyTorch's documentation at their worst."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import torch
from helpers import PIECES
from optim_helpers import (
    ADAMS,
    RULES,
    SHAPES,
    Parameters,
    accumulate,
    assert_equal,
    give,
    gradients,
    master_of,
    optimizer_of,
    rules,
    summed,
    weights,
)

from models import gpt
from optim import Adam, LoRA, OptimConfig, RowAdam, TouchedRows, shards
from optim import tensors as optimizer_tensors
from runtime.machine import World

# --- Who owns what


def world_of(rank, size, local=None):
    """A World of size / local machines with so many ranks each; its groups are tuples of ranks."""
    device = torch.device("cpu")
    if local in (None, size):
        return World(rank, size, device, size)
    first = rank - rank % local
    node = tuple(range(first, first + local))
    across = tuple(range(rank % local, size, local))
    return World(rank, size, device, local, node, across)


@pytest.mark.parametrize("world_size", range(1, 10))
def test_parts_of_all_ranks_make_up_every_parameter(world_size):
    """In order, nothing twice, nothing missing, padded parts equally long; each rank holds only
    its state."""
    model = Parameters()
    optimizers = []
    for rank in range(world_size):
        own = Parameters()
        optimizers.append(optimizer_of(own, rules(normuon=True), world_of(rank, world_size)))
    for name, p in model.named_parameters():
        rule = RULES[name]
        whole = p.detach()
        if isinstance(rule, Adam):
            whole = whole.flatten()
        elif isinstance(rule, RowAdam):
            whole = whole.flatten(0, -2)
        parts = [o.shards[name].own for o in optimizers]
        for part, o in zip(parts, optimizers):
            state = o.state[name]
            if isinstance(rule, LoRA):
                assert {len(x) for x in state.values() if x is not None} == {len(part)}
                continue
            if isinstance(rule, RowAdam):
                assert "m" not in state
            else:
                assert state["m"].shape == part.shape
            if isinstance(rule, Adam):
                assert state["v"].shape == part.shape
            else:
                assert len(state["v"]) == len(part)
        if not rule.sharded:
            assert all(torch.equal(part, whole) for part in parts)
            continue

        # Random numbers: in order and once each. The parts are views of the weights
        assert torch.equal(torch.cat(parts), whole)
        behind = 0
        for part, o in zip(parts, optimizers):
            if len(part):
                begin = o.params[name].data_ptr()
                assert part.data_ptr() == begin + behind * p.element_size()
            behind += part.numel()
        (n,) = {o.shards[name].n for o in optimizers}
        assert len(whole) <= n * world_size < len(whole) + world_size
        assert all(len(part) <= n for part in parts)


def test_machines_share_out_alike():
    """Ranks in the same place of their machines have the same parts."""
    for rank in range(6):
        there = optimizer_of(Parameters(), world=world_of(rank, 6, 3))
        alone = optimizer_of(Parameters(), world=world_of(rank % 3, 3))
        for name in SHAPES:
            ours = there.shards[name]
            theirs = alone.shards[name]
            assert ours.start == theirs.start, name
            assert torch.equal(ours.own, theirs.own), name


# --- Ranks as threads


class Ranks:
    """Ranks as threads, with torch.distributed's collectives as its documentation has them, at
    their worst.

    A collective's result is NaN until wait(); its input must not change before; all ranks must call
    the same ones in the same order with the same sizes. Groups are tuples of ranks.
    """

    def __init__(self, size, local=None):
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.thread = threading.local()
        self.worlds = [world_of(rank, size, local) for rank in range(size)]
        self.slots = [None] * size
        self.calls = []  # (collective, members of the group, elements) of each, of the first rank

    def run(self, fn):
        """fn(rank) on all ranks at once; returns their results, or raises what the first of them
        raised."""

        def body(rank):
            self.thread.rank = rank
            try:
                return fn(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(body, rank) for rank in range(self.size)]
        errors = [e for e in (f.exception() for f in futures) if e]
        for e in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise e
        return [f.result() for f in futures]

    def exchange(self, what, x, group):
        """(x of everyone in the group, by rank; this rank's place in it)."""
        rank = self.thread.rank
        group = group or tuple(range(self.size))
        assert rank in group
        self.slots[rank] = (what, x.shape, x.dtype, len(group)), x.detach().clone()
        self.barrier.wait()
        tags, values = zip(*self.slots)
        if rank == 0:
            self.calls.append((what, len(group), x.numel()))
        self.barrier.wait()
        assert len(set(tags)) == 1, f"ranks call different collectives: {tags}"
        return [values[member] for member in group], group.index(rank)

    def start(self, x, out, result, async_op):
        """The work of a collective that reads x and will write result to out."""
        copy = x.detach().clone()
        in_place = x is out
        assert x.is_contiguous()
        assert out.is_contiguous()
        assert out.shape == result.shape
        assert out.dtype == x.dtype
        out.fill_(float("nan"))

        class Work:
            def wait(self):
                untouched = in_place or torch.equal(x.nan_to_num(0.3), copy.nan_to_num(0.3))
                assert untouched, "the input of a running collective was overwritten"
                out.copy_(result)

        return Work() if async_op else Work().wait()

    def reduce_scatter(self, out, x, group=None, async_op=False):
        values, place = self.exchange("reduce_scatter", x, group)
        assert len(x) == len(out) * len(values)
        result = sum(values)
        if len(result):
            result = result.chunk(len(values))[place]
        return self.start(x, out, result, async_op)

    def all_gather(self, out, x, group=None, async_op=False):
        values, _ = self.exchange("all_gather", x, group)
        assert len(out) == len(x) * len(values)
        return self.start(x, out, torch.cat(values), async_op)

    def all_to_all(self, out, x, receives, sends, group=None, async_op=False):
        """Not by exchange(): each rank's x has another size."""
        rank = self.thread.rank
        group = group or tuple(range(self.size))
        self.slots[rank] = "all_to_all", x.detach().clone().split(sends)
        self.barrier.wait()
        slots = list(self.slots)
        if rank == 0:
            self.calls.append(("all_to_all", len(group), x.numel()))
        self.barrier.wait()
        assert {slot[0] for slot in slots} == {"all_to_all"}
        came = [slots[member][1][group.index(rank)] for member in group]
        assert [len(part) for part in came] == receives
        return self.start(x, out, torch.cat(came), async_op)

    def all_reduce(self, x, group=None, async_op=False):
        values, _ = self.exchange("all_reduce", x, group)
        return self.start(x, x, sum(values), async_op)


@pytest.fixture
def ranks(request, monkeypatch):
    """param: how many ranks, or (how many, how many on a machine)."""
    ranks = Ranks(*(request.param if isinstance(request.param, tuple) else [request.param]))
    monkeypatch.setattr(shards, "reduce_scatter", ranks.reduce_scatter)
    monkeypatch.setattr(shards, "all_gather", ranks.all_gather)
    monkeypatch.setattr(shards, "all_to_all", ranks.all_to_all)
    monkeypatch.setattr(torch.distributed, "all_reduce", ranks.all_reduce)
    return ranks


def rank_gradients(step, world_size):
    return [gradients(100 * step + rank) for rank in range(world_size)]


@pytest.mark.parametrize("ranks", [3, 8], indirect=True, ids=str)
def test_weights_are_gathered_where_they_are(ranks):
    """Parameters that ranks do not divide have memory for the padding behind them, so that nothing
    is copied back; they are contiguous, and keep their values and shapes."""
    models = [Parameters() for _ in range(ranks.size)]
    before = weights(models[0])
    optimizers = [optimizer_of(m, world=world) for m, world in zip(models, ranks.worlds)]
    assert_equal(weights(models[0]), before)
    outs = []
    gather = shards.all_gather

    def watched(out, x, **kwargs):
        if ranks.thread.rank == 0:
            outs.append(out.data_ptr())
        return gather(out, x, **kwargs)

    shards.all_gather = watched  # the fixture puts it back

    def on_rank(rank):
        give(models[rank], gradients(rank))
        optimizers[rank].step(0.7, 0.9)

    ranks.run(on_rank)
    where = [models[0].get_parameter(n).data_ptr() for n in SHAPES if RULES[n].sharded]
    assert sorted(outs) == sorted(where)
    for optimizer in optimizers:
        for name, room in optimizer.rooms.items():
            p = optimizer.params[name]
            assert p.is_contiguous() and p.shape == SHAPES[name]
            assert not room[p.numel() :].any()
    assert optimizers[0].rooms


# --- Steps


def assert_close_to_alone(found, expected, dtype):
    """Weights of many ranks and of one."""
    for name, w in found.items():
        if dtype == torch.float32 or name in ADAMS:
            torch.testing.assert_close(w, expected[name], atol=1e-5, rtol=1e-5)
        else:  # products of other batch sizes round differently in bf16
            torch.testing.assert_close(w, expected[name], atol=0.02, rtol=0.01)


WORLDS = [(n, torch.float32) for n in (2, 3, 5, 7, (4, 2), (6, 3), (6, 2), (3, 1))]
WORLDS += [(n, torch.bfloat16) for n in (3, (4, 2), (3, 1))]


@pytest.mark.parametrize("ranks, dtype", WORLDS, indirect=["ranks"], ids=str)
def test_many_ranks_do_what_one_does(ranks, dtype):
    """Four steps: all ranks end with the same bits: the weights of one rank with the summed
    gradients."""
    models = [Parameters(dtype=dtype) for _ in range(ranks.size)]
    optimizers = [optimizer_of(m, world=world) for m, world in zip(models, ranks.worlds)]
    alone = Parameters(dtype=dtype)
    reference = optimizer_of(alone)
    for step in range(4):
        grads = rank_gradients(step, ranks.size)
        give(alone, summed(grads))
        reference.step(0.7, 0.9)

        def on_rank(rank):
            give(models[rank], grads[rank])
            optimizers[rank].step(0.7, 0.9)

        ranks.run(on_rank)
        assert all(p.grad is None for m in models for p in m.parameters())
        for m in models[1:]:
            assert_equal(weights(m), weights(models[0]))
        assert_close_to_alone(weights(models[0]), weights(alone), dtype)

    n = len(SHAPES)
    local = ranks.worlds[0].local_size
    if local == 1:
        expected = n  # nothing is shared out: everything is summed over the machines
    else:
        expected = 2 * n - 1  # a reduce and a gather each, no gather of what is whole
        if local < ranks.size:
            expected += n - 1  # and across machines
    assert len(ranks.calls) == 4 * expected


@pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])
@pytest.mark.parametrize("ranks", [3, (4, 2), (3, 1)], indirect=True, ids=str)
def test_what_is_prepared_before_the_judgement_changes_no_bit(ranks, normuon):
    """Updates begin while sums are on their way, and end as those that begin afterwards; a step
    that does not count leaves every bit, on a GPU, where only the device knows, as well."""
    every = rules(every=2, normuon=normuon)
    found = []
    for prepared in True, False:
        models = [Parameters() for _ in range(ranks.size)]
        optimizers = [optimizer_of(m, every, world) for m, world in zip(models, ranks.worlds)]

        def on_rank(rank, step, ok):
            accumulate(models[rank], gradients(10 * step + rank))
            if prepared:
                parts = optimizers[rank].gradients(0.9)
                waits = {name for name, part in parts.items() if part is None}
                assert waits == (ADAMS if step % 2 else set())
            optimizers[rank].step(0.7, 0.9, ok)

        for step, ok in (1, True), (2, True), (3, True), (4, False):
            before = [weights(m) for m in models]
            moments = [clones(o) for o in optimizers]
            ok = torch.tensor(ok).as_subclass(OnGPU)
            ranks.run(lambda rank: on_rank(rank, step, ok))
        for m, o, old, kept in zip(models, optimizers, before, moments):
            assert_equal(weights(m), old)
            assert_equal(clones(o), kept)
        found.append(weights(models[0]))
    assert_equal(*found)


def clones(optimizer):
    """{name: a copy} of all moments."""
    found = {}
    for name, state in optimizer.state.items():
        for key, x in state.items():
            if x is not None:
                found[f"{key}/{name}"] = x.clone()
    return found


class OnGPU(torch.Tensor):
    """A judgement that says it is on a GPU, where the host does not know it."""

    device = torch.device("cuda", 0)

    def __bool__(self):
        raise AssertionError("the host waits for the device")


@pytest.mark.parametrize("ranks", [4, (4, 2)], indirect=True, ids=str)
def test_one_ranks_bad_gradient_is_seen_by_the_owner_of_its_part(ranks):
    """The guard judges sums over ranks, a rank's part of each, and all of them together miss
    nothing; sums come in one order, matrices first, and each once."""
    models = [Parameters() for _ in range(ranks.size)]
    optimizers = [optimizer_of(m, world=world) for m, world in zip(models, ranks.worlds)]
    for name in SHAPES:
        for bad in float("nan"), float("inf"):

            def on_rank(rank):
                optimizers[rank].drop_gradients()
                give(models[rank], gradients(rank))
                if rank == 1:
                    models[rank].get_parameter(name).grad.view(-1)[-1] = bad
                return optimizers[rank].gradients(0.9)

            ranks.calls.clear()
            parts = ranks.run(on_rank)
            for other in SHAPES:
                fine = [bool(part[other].isfinite().all()) for part in parts]
                assert all(fine) == (other != name), other
                assert not all(fine) or other != name
    whole = [elements for what, _, elements in ranks.calls]
    n_across = len(SHAPES) - 1 if ranks.size > ranks.worlds[0].local_size else 0
    assert len(whole) == len(SHAPES) + n_across
    banks = sum(RULES[name].prepares for name in SHAPES)
    first = {name: optimizers[0].shards[name] for name in SHAPES if RULES[name].prepares}
    local = ranks.worlds[0].local_size
    assert whole[:banks] == [s.n * local * s.whole[0].numel() for s in first.values()]


@pytest.mark.parametrize("ranks", [2, 3, (4, 2), (3, 1)], indirect=True, ids=str)
def test_many_ranks_shorten_the_gradient_that_one_does(ranks):
    """By the length of the sum over ranks of all parameters, whoever has which part."""
    models = [Parameters() for _ in range(ranks.size)]
    optimizers = [optimizer_of(m, world=world, clip=2.0) for m, world in zip(models, ranks.worlds)]
    alone = Parameters()
    reference = optimizer_of(alone, clip=2.0)
    for step in range(3):
        # Long, then short
        grads = [
            {name: g / 128**step for name, g in part.items()}
            for part in rank_gradients(step, ranks.size)
        ]
        give(alone, summed(grads))
        reference.step(0.7, 0.9)

        def on_rank(rank):
            give(models[rank], grads[rank])
            optimizers[rank].step(0.7, 0.9)

        ranks.run(on_rank)
        for m in models[1:]:
            assert_equal(weights(m), weights(models[0]))
        assert_close_to_alone(weights(models[0]), weights(alone), torch.float32)


@pytest.mark.parametrize("ranks", [(8, 4)], indirect=True, ids=str)
def test_between_machines_go_parts_only(ranks):
    """The links between machines carry a quarter of each gradient, and no weights."""
    models = [Parameters() for _ in range(ranks.size)]
    optimizers = [optimizer_of(m, world=world) for m, world in zip(models, ranks.worlds)]

    def on_rank(rank):
        give(models[rank], gradients(rank))
        optimizers[rank].step(0.7, 0.9)

    ranks.run(on_rank)
    across = sum(n for _, members, n in ranks.calls if members == 2)
    everywhere = [n for _, members, n in ranks.calls if members == 8]
    assert everywhere == [5]  # the scalars
    padded = 0  # elements of what is shared out, with the padding
    for name, shard in optimizers[0].shards.items():
        if RULES[name].sharded:
            padded += 4 * shard.n * shard.whole[0].numel()
    assert 4 * across == padded


@pytest.mark.parametrize("ranks", [3, (4, 2)], indirect=True, ids=str)
def test_a_gradient_with_memory_behind_it_is_not_copied(ranks):
    """What is in that memory counts nowhere: for the guard, for clipping, for the update."""
    names = [name for name, rule in RULES.items() if rule.sharded]
    found = []
    for behind in None, float("nan"):
        models = [Parameters() for _ in range(ranks.size)]
        optimizers = []
        for m, world in zip(models, ranks.worlds):
            optimizers.append(optimizer_of(m, rules(normuon=True), world, clip=0.5))
        padding = optimizers[0].padding_rows()
        assert set(padding) == {n for n in names if optimizers[0].shards[n].room is not None} & set(
            optimizers[0].rooms
        )

        def on_rank(rank):
            give(models[rank], gradients(rank))
            shards_ = optimizers[rank].shards
            if behind is not None:
                for name, rows in padding.items():
                    p = models[rank].get_parameter(name)
                    more = rows * shards_[name].whole[0].numel()
                    memory = torch.cat([p.grad.flatten(), torch.full((more,), behind)])
                    p.grad = memory[: p.numel()].view(p.shape)
                    grad = p.grad.view(shards_[name].whole.shape)
                    place = shards.with_room_behind(grad, shards_[name].n * shards_[name].ranks)
                    assert place.data_ptr() == p.grad.data_ptr() and len(place) == len(grad) + rows
            parts = optimizers[rank].gradients(0.9)
            assert all(part.isfinite().all() for part in parts.values())
            optimizers[rank].step(0.7, 0.9)

        ranks.run(on_rank)
        found.append(weights(models[0]))
    assert_equal(*found)


def model_step(model, optimizer, rows, n_tokens):
    """One step on rows (B, T + 1) of one document each."""
    cu_seqlens = torch.arange(0, 32 * len(rows) + 1, 32, dtype=torch.int32)
    stage = model.c.stage(0.0, 32)
    loss = model(rows[:, :-1], rows[:, 1:], cu_seqlens, stage) / n_tokens
    loss.backward()
    optimizer.step(0.1, 0.85)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("ranks", [3, (4, 2)], indirect=True, ids=str)
def test_many_ranks_train_the_model(ranks, every):
    """GPT's own parameters and rules, each rank with its row of the batch, as one rank with all
    rows."""
    size = ranks.size
    c = gpt.Config(**PIECES | dict(n_embd=32, n_gram=2, ngram_rows=100))
    optim = OptimConfig(normuon=True, row_moments=True, adam_every=every)
    tokens = torch.randint(65, (size, 33), generator=torch.Generator().manual_seed(0))

    def fresh(world=None):
        model = gpt.Model(c, 65, 32)
        model.init_weights(0)
        optimizer = optimizer_of(model, model.update_rules(optim), world)
        model.grad_rooms = optimizer.padding_rows()  # as the trainer does
        return model, optimizer

    model, optimizer = fresh()
    many = [fresh(world) for world in ranks.worlds]
    for _ in range(2):
        model_step(model, optimizer, tokens, 32 * size)
        ranks.run(lambda rank: model_step(*many[rank], tokens[rank : rank + 1], 32 * size))
    first = weights(many[0][0])
    for other, _ in many[1:]:
        assert_equal(weights(other), first)
    for name, w in weights(model).items():
        if w.numel():
            # A step is 5e-4 or more; where a gradient is rounding only, Adam makes a whole step
            # of that
            off = (w - first[name]).abs()
            assert off.median() < 1e-4, name
            assert off.quantile(0.99) < 1e-3, name


@pytest.mark.parametrize("ranks", [4, (4, 2)], indirect=True, ids=str)
def test_masters_of_all_ranks_are_those_of_one(ranks):
    """bf16: each rank keeps the exact masters of its part only; together they are the single
    rank's."""
    names = [n for n, rule in RULES.items() if isinstance(rule, Adam) and rule.sharded]
    shapes = {name: SHAPES[name] for name in names}
    table = {name: RULES[name] for name in names}
    models = [Parameters(shapes, torch.bfloat16) for _ in range(4)]
    optimizers = [optimizer_of(m, table, world) for m, world in zip(models, ranks.worlds)]
    alone = Parameters(shapes, torch.bfloat16)
    reference = optimizer_of(alone, table)
    for step in range(3):
        grads = rank_gradients(step, 4)
        give(alone, summed(grads))
        reference.step(1.0, 0.9)

        def on_rank(rank):
            give(models[rank], grads[rank])
            optimizers[rank].step(1.0, 0.9)

        ranks.run(on_rank)
    machine = optimizers[: ranks.worlds[0].local_size]
    for name in shapes:
        together = torch.cat([master_of(o, name) for o in machine])
        torch.testing.assert_close(together, master_of(reference, name), atol=1e-6, rtol=1e-6)


# --- State in and out


@pytest.mark.parametrize("ranks", [2, 3, (4, 2)], indirect=True, ids=str)
def test_state_of_many_ranks_is_that_of_one_and_loads_on_any_number(ranks):
    """A rank without rows of a parameter is no trouble."""
    table = rules(every=2)

    def fresh(seed):
        """(models, optimizers) of all ranks, and of one alone."""
        models = [Parameters(seed=seed) for _ in range(ranks.size)]
        optimizers = [optimizer_of(m, table, world) for m, world in zip(models, ranks.worlds)]
        alone = Parameters(seed=seed)
        return models, optimizers, alone, optimizer_of(alone, table)

    def steps(numbers, models, optimizers, alone, reference):
        for k in numbers:
            grads = rank_gradients(k, ranks.size)
            accumulate(alone, summed(grads))
            reference.step(0.7, 0.9)

            def on_rank(rank):
                accumulate(models[rank], grads[rank])
                optimizers[rank].step(0.7, 0.9)

            ranks.run(on_rank)

    trained = fresh(seed=0)
    steps(range(4), *trained)
    models, optimizers, _, reference = trained
    gathered = ranks.run(lambda rank: optimizer_tensors.gather(optimizers[rank]))
    assert not any(gathered[1:])
    tensors = gathered[0]
    theirs = optimizer_tensors.gather(reference)
    assert tensors.keys() == theirs.keys()
    for name, x in tensors.items():
        torch.testing.assert_close(x, theirs[name], atol=1e-5, rtol=1e-5)

    def fetch(name, like):
        return tensors[name].view(like.shape).to(like)

    others = fresh(seed=5)
    continued, one = others[1], others[3]
    ranks.run(lambda rank: optimizer_tensors.load(continued[rank], fetch, 4))
    optimizer_tensors.load(one, fetch, 4)
    steps(range(4, 6), *others)
    steps(range(4, 6), *trained)
    assert_equal(weights(others[0][0]), weights(models[0]))
    for name, w in weights(others[2]).items():
        torch.testing.assert_close(w, weights(models[0])[name], atol=1e-5, rtol=1e-5)


# --- Rows of tables

TABLES = dict(
    flat=Adam(0.05, every=2),
    rows=RowAdam(0.03, every=2),
    odd=Adam(0.05, every=2),
    often=Adam(0.02),
    dense=Adam(0.02, every=2),
)
WIDTH = 4


class Tables(Parameters):
    """Parameters whose rows a batch names itself: its inputs are rows, negative ones none."""

    def __init__(self, ranks, dtype=torch.float32):
        shapes = dict(flat=(6 * ranks, WIDTH), rows=(2, 13, WIDTH), odd=(6 * ranks + 1, WIDTH))
        shapes |= dict(often=(6 * ranks, WIDTH), dense=(6 * ranks, WIDTH))
        super().__init__(shapes, dtype)

    def touched_rows(self, inputs, cu_seqlens):
        found = {}
        for name in ("flat", "rows", "odd", "often"):
            found[name] = inputs[inputs >= 0]
        return found | dict(unknown=inputs)


class Batches:
    """A loader: step -> rank -> rows of tables, in two micro-batches."""

    def __init__(self, touched):
        self.touched = touched

    def of_ranks(self, step, ranks, world_size, micro_rows):
        found = []
        for rank in ranks:
            rows = torch.tensor(self.touched[step][rank % len(self.touched[step])])
            found.append([Inputs(part, None) for part in rows.chunk(2)])
        return found


class Inputs(NamedTuple):
    inputs: torch.Tensor
    cu_seqlens: torch.Tensor | None


# Rank by rank: none at all, one that all touch, twice the same, both ends and one of another owner
TOUCHED = {
    1: [[-1], [5, 5], [5], [5, 0]],
    2: [[-1], [5], [23, 1], [5]],
    3: [[0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]],
    4: [[2], [-1], [-1], [-1]],
    5: [[-1], [-1], [-1], [-1]],
    6: [[-1], [-1], [-1], [-1]],
    7: [list(range(20)), [1], [2], [3]],  # too many: then all rows go
    8: [[4], [4], [4], [4]],
}


def rows_touched(step, rank):
    rows = TOUCHED[step][rank % 4]
    return [row for row in rows if row >= 0]


def table_gradients(step, rank, model):
    """Any numbers, of which sums round, in rows that are touched; everywhere in the others."""
    g = torch.Generator().manual_seed(100 * step + rank)
    found = {}
    for name, p in model.named_parameters():
        grad = torch.randn(p.shape, generator=g)
        if name != "dense":
            keep = torch.zeros(p.numel() // WIDTH, 1)
            keep[rows_touched(step, rank)] = 1.0
            grad = grad * keep.view(*p.shape[:-1], 1)
        found[name] = grad
    return found


def train_tables(ranks, dtype, sparse, steps, begun=None, bad=()):
    """(models, optimizers) of all ranks after these steps; begun: those of earlier ones; bad: steps
    that do not count."""
    models, optimizers = begun or (
        [Tables(4, dtype) for _ in range(ranks.size)],
        [],
    )
    if not begun:
        for model, world in zip(models, ranks.worlds):
            optimizers.append(optimizer_of(model, TABLES, world, skips=True))
    touched = [TouchedRows(o, m) for o, m in zip(optimizers, models)]
    for step in steps:

        def on_rank(rank):
            batch = touched[rank].batch(Batches(TOUCHED), step, None)
            assert len(batch) == min(2, len(TOUCHED[step][rank % 4]))
            accumulate(models[rank], table_gradients(step, rank, models[rank]))
            rows = touched[rank].rows(step) if sparse else ()
            optimizers[rank].gradients(0.9, rows)
            ok = torch.tensor(step not in bad).as_subclass(OnGPU)
            optimizers[rank].step(0.7, 0.9, ok)

        ranks.run(on_rank)
    return models, optimizers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [4, 2, (8, 4)], indirect=True, ids=str)
def test_rows_that_are_touched_make_the_sums_of_all_rows(ranks, dtype, monkeypatch):
    """To the last bit, where sums go from rank to rank, in as many collectives and fewer bytes;
    through steps that do not count, and beginning anew between two."""
    # Triton's interpreter is not for several threads
    clear = "optim.optimizer.clear_unless"
    monkeypatch.setattr(clear, lambda grad, ok: grad.masked_fill_(~ok, 0))
    dense, theirs = train_tables(ranks, dtype, False, range(1, 9), bad=(4, 5))
    calls = list(ranks.calls)
    ranks.calls.clear()
    sparse = train_tables(ranks, dtype, True, range(1, 5), bad=(4, 5))
    models, ours = train_tables(ranks, dtype, True, range(5, 9), sparse, bad=(4, 5))
    for a, b, p, q in zip(dense, models, theirs, ours):
        assert_equal(weights(b), weights(a))
        assert_equal(clones(q), clones(p))

    assert len(ranks.calls) == len(calls)
    kinds = [what for what, _, _ in ranks.calls]
    assert kinds.count("all_to_all") == 3 + 3 + 7  # flat, rows, often
    before = sum(n for what, _, n in calls if what == "reduce_scatter")
    after = sum(n for what, _, n in ranks.calls if what in ("reduce_scatter", "all_to_all"))
    assert after < before


def test_tables_have_touched_rows_only_where_parts_are_rows_that_are_few():
    model = Tables(4)
    world = world_of(1, 4)
    touched = TouchedRows(optimizer_of(model, TABLES, world), model)
    assert touched.tables.keys() == {"flat", "rows", "often"}
    found = {}
    for step in TOUCHED:
        touched.batch(Batches(TOUCHED), step, None)
        found[step] = touched.rows(step)
        assert touched.rows(step) == {}
    names = ["often", "flat rows often"] * 3 + ["", "often"]
    assert [" ".join(rows) for rows in found.values()] == names
    of_flat = found[2]["flat"]
    assert of_flat.mine.tolist() == [5] and of_flat.sends == [1, 0, 0, 0]
    # This rank owns rows 6 to 11, which nobody touches
    assert of_flat.theirs.tolist() == [] and of_flat.receives == [0, 0, 0, 0]
    of_rows = found[2]["rows"]  # 7 of them
    assert of_rows.mine.tolist() == [5] and of_rows.theirs.tolist() == []
    first = TouchedRows(optimizer_of(Tables(4), TABLES, world_of(0, 4)), model)
    for step in (1, 2):
        first.batch(Batches(TOUCHED), step, None)
    of_flat = first.rows(2)["flat"]
    assert of_flat.mine.tolist() == [] and of_flat.sends == [0, 0, 0, 0]
    assert of_flat.theirs.tolist() == [5, 1, 5, 0, 5] and of_flat.receives == [0, 1, 2, 2]


def test_touched_rows_of_less_than_a_turn_are_not_all():
    """Where a gradient waits already, all rows of it go at the next turn."""
    model = Tables(4)
    optimizer = optimizer_of(model, TABLES, world_of(1, 4))
    optimizer.step_count = 3
    touched = TouchedRows(optimizer, model)
    found = []
    for step in (4, 5, 6):
        touched.batch(Batches(TOUCHED), step, None)
        found.append(" ".join(touched.rows(step)))
    assert found == ["often", "often", "flat rows often"]


@pytest.mark.parametrize("local", [1, 4])
def test_batches_are_the_ranks_own_where_no_rows_are_touched(local):
    """Alone, with a model that has no such tables, with a loader that makes one rank's batches."""

    class Loader:
        def micro_batches(self, step, rank, size, micro_rows):
            yield step, rank, size, micro_rows

    for model in Tables(4), Parameters():
        world = world_of(3, 4, local)
        rules = TABLES if isinstance(model, Tables) else RULES
        touched = TouchedRows(optimizer_of(model, rules, world), model)
        assert touched.batch(Loader(), 1, 2) == [(1, 3, 4, 2)] and touched.rows(1) == {}
        if local == 1 or model.__class__ is Parameters:
            padding = Inputs(torch.tensor([0]), None)
            assert touched.note([[padding]] * local) == {}  # as the warm-up asks


@pytest.mark.parametrize("ranks", [4], indirect=True)
def test_a_bad_touched_row_is_seen_by_its_owner(ranks):
    models = [Tables(4) for _ in range(4)]
    optimizers = [optimizer_of(m, TABLES, w) for m, w in zip(models, ranks.worlds)]
    touched = [TouchedRows(o, m) for o, m in zip(optimizers, models)]

    def on_rank(rank):
        touched[rank].batch(Batches(TOUCHED), 1, None)
        give(models[rank], table_gradients(1, rank, models[rank]))
        if rank == 3:
            models[rank].often.grad[0, 1] = float("inf")
        return optimizers[rank].gradients(0.9, touched[rank].rows(1))["often"]

    parts = ranks.run(on_rank)
    assert [bool(part.isfinite().all()) for part in parts] == [False, True, True, True]
