"""The optimizer of train_gpt.py: numbers against references written here, and sharding without processes."""

import dataclasses
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import train_gpt
from kernels import updates
from kernels.polar_express import COEFFICIENTS
from kernels.updates import join
from train_gpt import GPT, Config, Optimizer, Rule, parameter_table

# odd sizes, so that no world size but 1 divides them all
SHAPES = dict(scalars=(5,), gates=(3, 1), embed=(13, 7), head=(9, 11),
              tall=(5, 12, 4), wide=(3, 4, 10), one=(1, 6, 6))
TABLE = dict(
    scalars=Rule("adam", 0.04, (0.9, 0.99), eps=0.1, sharded=False),
    gates=Rule("adam", 0.02, (0.9, 0.99)),
    embed=Rule("adam", 0.05, (0.75, 0.95)),
    head=Rule("adam", 0.01, (0.5, 0.9)),
    tall=Rule("muon", 0.05, weight_decay=0.3),
    wide=Rule("muon", 0.03),
    one=Rule("muon", 0.02, weight_decay=0.1),
)


class Parameters(nn.Module):
    """Named parameters with random weights and nothing else."""

    def __init__(self, shapes=SHAPES, dtype=torch.float32, seed=0):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=g).to(dtype)))


def gradients(seed, shapes=SHAPES):
    """Multiples of 1/8 up to 1, so that sums over ranks are exact in every dtype and order."""
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randint(-8, 9, shape, generator=g) / 8 for name, shape in shapes.items()}


def give(model, grads):
    for name, p in model.named_parameters():
        p.grad = grads[name].to(p.dtype)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(a, b):
    """Dicts of tensors, bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def single(rule, start, dtype=torch.float32):
    """A model of one parameter `w` with the given start, and its optimizer."""
    model = nn.Module()
    model.w = nn.Parameter(start.to(dtype, copy=True))
    return model, Optimizer(model, {"w": rule})


# --- Adam


def test_adam_is_torchs_adam():
    """20 steps with changing learning rates and very different gradient sizes, to 1e-6."""
    shapes = {n: s for n, s in SHAPES.items() if TABLE[n].optim == "adam"}
    model, reference = Parameters(shapes), Parameters(shapes)
    optimizer = Optimizer(model, {n: TABLE[n] for n in shapes})
    torchs = torch.optim.Adam([dict(params=[p], betas=TABLE[n].betas, eps=TABLE[n].eps)
                               for n, p in reference.named_parameters()])
    for step in range(20):
        scale = 1 - step / 25
        grads = {n: g * 10.0 ** (step % 5 - 2) for n, g in gradients(step, shapes).items()}
        give(model, grads)
        give(reference, grads)
        optimizer.step(scale, 0.9)
        for n, group in zip(shapes, torchs.param_groups):
            group["lr"] = TABLE[n].lr * scale
        torchs.step()
        for n, w in weights(model).items():
            torch.testing.assert_close(w, weights(reference)[n], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [1e-5, 1.0, 1e5])
def test_adams_first_step_is_the_learning_rate(size):
    """Whatever the gradient's size: lr times its sign. No gradient, no step."""
    model, optimizer = single(Rule("adam", 0.1, (0.9, 0.99)), torch.zeros(3))
    model.w.grad = torch.tensor([size, -size, 0.0])
    optimizer.step(0.5, 0.9)
    torch.testing.assert_close(model.w.detach(), torch.tensor([-0.05, 0.05, 0.0]), rtol=1e-4, atol=0)


# --- Muon


def orthogonalised(G):
    """The five polynomials on one float64 matrix, straight from their definition, without a transpose."""
    X = G / (1.02 * (G * G).sum().sqrt())
    for a, b, c in COEFFICIENTS:
        X = a * X + b * X @ X.T @ X + c * X @ X.T @ X @ X.T @ X
    return X


def muon_reference(start, grads, lrs, momenta, decay):
    """Muon on a bank in float64, matrix by matrix."""
    result = []
    for i, w in enumerate(start.double()):
        average = torch.zeros_like(w)
        for grad, lr, beta in zip(grads, lrs, momenta):
            g = grad[i].double()
            average = beta * average + (1 - beta) * g
            nesterov = beta * average + (1 - beta) * g
            rows, cols = w.shape
            w = (1 - lr * decay) * w - lr * max(1, rows / cols) ** 0.5 * orthogonalised(nesterov)
        result.append(w)
    return torch.stack(result)


@pytest.mark.parametrize("shape", [(3, 8, 8), (4, 12, 3), (2, 5, 20), (1, 1, 7), (1, 6, 2)], ids=str)
def test_muon_is_a_loop_over_matrices(shape):
    """Momentum with Nesterov's look ahead, polar factor, sqrt(rows / cols) for tall ones, decoupled decay."""
    lrs, momenta = [0.1, 0.1, 0.05, 0.02, 0.0, 0.07], [0.85, 0.9, 0.95, 0.95, 0.9, 0.0]
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    grads = [torch.randn(shape, generator=torch.Generator().manual_seed(10 + k)) for k in range(6)]
    model, optimizer = single(Rule("muon", 0.1, weight_decay=0.3), start)
    for k, grad in enumerate(grads):
        model.w.grad = grad.clone()
        optimizer.step(lrs[k] / 0.1, momenta[k])
        expected = muon_reference(start, grads[:k + 1], lrs, momenta, 0.3)
        torch.testing.assert_close(model.w.detach().double(), expected, atol=1e-4, rtol=0)


def test_muons_decay_is_decoupled_and_scaled_by_the_learning_rate():
    """Without a gradient a weight shrinks by 1 - lr decay and does nothing else."""
    model, optimizer = single(Rule("muon", 0.2, weight_decay=0.5), torch.ones(2, 3, 3))
    for _ in range(3):
        model.w.grad = torch.zeros(2, 3, 3)
        optimizer.step(0.5, 0.9)
    torch.testing.assert_close(model.w.detach(), torch.full((2, 3, 3), 0.95**3))


@pytest.mark.parametrize("rows, cols, factor", [(4, 4, 1), (4, 16, 1), (16, 4, 2), (36, 4, 3)])
def test_muons_update_has_the_spectral_norm_of_its_shape(rows, cols, factor):
    """All singular values near lr sqrt(max(1, rows / cols)), whatever the gradient's size."""
    model, optimizer = single(Rule("muon", 1.0), torch.zeros(1, rows, cols))
    model.w.grad = 100 * torch.randn(1, rows, cols, generator=torch.Generator().manual_seed(0))
    optimizer.step(0.01, 0.9)
    found = torch.linalg.svdvals(model.w.detach()) / (0.01 * factor)
    assert 0.85 < found.min() and found.max() < 1.15


def test_momentum_remembers():
    """After one gradient and then zeros the step keeps its direction; with momentum 0 it ends."""
    for momentum, moves in ((0.9, True), (0.0, False)):
        model, optimizer = single(Rule("muon", 0.1), torch.zeros(1, 4, 4))
        model.w.grad = torch.eye(4)[None]
        optimizer.step(1.0, momentum)
        first = model.w.detach().clone()
        model.w.grad = torch.zeros(1, 4, 4)
        optimizer.step(1.0, momentum)
        expected = 2 * first if moves else first
        torch.testing.assert_close(model.w.detach(), expected, atol=1e-4, rtol=0)


# --- weights, masters, state


def master_of(optimizer, name):
    return join(optimizer.state[name]["own"], optimizer.state[name]["companion"])


def train(optimizer, model, steps, seed=0):
    for k in range(steps):
        give(model, gradients(seed + k))
        optimizer.step(1 - 0.1 * k, 0.85 + 0.02 * k)


def test_bf16_weights_are_the_masters_rounded():
    """After every step; and the masters do what fp32 weights would do with the same gradients (Adam)."""
    model, exact = Parameters(dtype=torch.bfloat16), Parameters()
    with torch.no_grad():
        for p, q in zip(exact.parameters(), model.parameters()):
            p.copy_(q)
    optimizer, reference = Optimizer(model, TABLE), Optimizer(exact, TABLE)
    for k in range(5):
        for m, o in ((model, optimizer), (exact, reference)):
            give(m, gradients(k))
            o.step(1.0, 0.9)
        for name, p in model.named_parameters():
            master = master_of(optimizer, name)
            assert master.dtype == torch.float32
            assert torch.equal(p.detach().flatten(), master.bfloat16().flatten())
            assert not torch.equal(p.detach().float().flatten(), master.flatten())
            if TABLE[name].optim == "adam":
                assert torch.equal(master, optimizer.units(name, exact.get_parameter(name)).detach())
            else:
                torch.testing.assert_close(master, exact.get_parameter(name).detach(), atol=0.05, rtol=0)


@pytest.mark.parametrize("rule, shape", [(Rule("adam", 1e-4, (0.0, 0.9)), (4,)),
                                         (Rule("muon", 1e-4), (1, 1, 1))], ids=["adam", "muon"])
def test_updates_too_small_for_bf16_add_up_in_the_master(rule, shape):
    """At 1.0 bf16 cannot take off 1e-4; a hundred of them are 1e-2."""
    model, optimizer = single(rule, torch.ones(shape), torch.bfloat16)
    for _ in range(100):
        model.w.grad = torch.ones(shape, dtype=torch.bfloat16)
        optimizer.step(1.0, 0.0)
    moved = 1 - master_of(optimizer, "w")
    assert ((0.85e-2 < moved) & (moved < 1.15e-2)).all()
    assert (model.w.float() < 1 - 0.007).all()


def test_fp32_parameters_of_a_bf16_model_stay_exact():
    """As lambdas and value_gates are."""
    model = Parameters(dtype=torch.bfloat16)
    model.scalars = nn.Parameter(torch.linspace(0.1, 0.5, 5))
    reference = Parameters()
    reference.scalars = nn.Parameter(torch.linspace(0.1, 0.5, 5))
    train(Optimizer(model, TABLE), model, 4)
    train(Optimizer(reference, TABLE), reference, 4)
    assert model.scalars.dtype == torch.float32 and torch.equal(model.scalars, reference.scalars)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reset_starts_afresh(dtype):
    """After a warm-up, old weights and reset() give bit for bit the run that had no warm-up."""
    model, other = Parameters(dtype=dtype), Parameters(dtype=dtype)
    start = weights(model)
    optimizer = Optimizer(model, TABLE)
    train(optimizer, model, 3, seed=50)
    assert not torch.equal(model.tall, start["tall"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(start[name])
    optimizer.reset()
    train(optimizer, model, 3)
    train(Optimizer(other, TABLE), other, 3)
    assert_equal(weights(model), weights(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_with_no_learning_rate_changes_no_weight(dtype):
    """The warm-up takes one, and training starts from these weights."""
    model = Parameters(dtype=dtype)
    before = weights(model)
    give(model, gradients(0))
    Optimizer(model, TABLE).step(0.0, 0.0)
    assert_equal(weights(model), before)


def test_lr_scale_multiplies_the_learning_rate():
    half, whole = Parameters(), Parameters()
    table = {name: dataclasses.replace(rule, lr=rule.lr / 2) for name, rule in TABLE.items()}
    for model, rules, scale in ((half, TABLE, 0.5), (whole, table, 1.0)):
        optimizer = Optimizer(model, rules)
        for k in range(3):
            give(model, gradients(k))
            optimizer.step(scale, 0.9)
    assert_equal(weights(half), weights(whole))


def test_step_clears_gradients_and_keeps_the_parameters_storage():
    """Compiled graphs hold on to the storage."""
    model = Parameters()
    where = [p.data_ptr() for p in model.parameters()]
    optimizer = Optimizer(model, TABLE)
    train(optimizer, model, 2)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert [p.data_ptr() for p in model.parameters()] == where


@pytest.fixture(scope="module")
def graphs():
    """How many graphs (adam_update's, nesterov's, descend's) there are after each of three steps of GPT's parameters, compiled as
    the optimizer compiles them; the weights must be those of the eager run."""
    counts, after = [0, 0, 0], []

    def counting(i):
        def backend(graph, inputs):
            counts[i] += 1
            return graph.forward
        return backend
    models = [GPT(tiny(), 65) for _ in range(2)]
    for m in models:
        m.init_weights(0)
    compiled, eager = (Optimizer(m, parameter_table(tiny()), compile=m is models[0]) for m in models)
    adam, nesterov, descend = (torch.compile(f, fullgraph=True, dynamic=True, backend=counting(i)) for i, f in
                               enumerate((updates.adam_update, updates.nesterov, updates.descend)))
    compiled.adam = adam
    compiled.muon = functools.partial(updates.muon_update, nesterov=nesterov, descend=descend)
    for step in range(3):
        grads = gradients(step, {n: p.shape for n, p in models[0].named_parameters()})
        for m, o in zip(models, (compiled, eager)):
            give(m, grads)
            o.step(0.1 - 0.01 * step, 0.85 + 0.02 * step)
        after.append(tuple(counts))
    for name, w in weights(models[0]).items():
        torch.testing.assert_close(w, weights(models[1])[name])
    return after


def test_values_that_change_every_step_compile_nothing(graphs):
    """New learning rates, momenta and step counts: no graph after the first step's."""
    assert graphs[0] == graphs[-1]


def test_one_graph_of_each_update_for_all_shapes(graphs):
    assert graphs[0] == (1, 1, 1)


# --- the table


def test_the_table_must_name_every_parameter_and_no_other():
    without = {n: r for n, r in TABLE.items() if n != "gates"}
    for wrong in (without, TABLE | dict(other=Rule("adam", 0.1)), {}):
        with pytest.raises(AssertionError, match="table"):
            Optimizer(Parameters(), wrong)


def tiny(**kwargs):
    return Config(**dict(n_layer=2, n_embd=16, n_head=2, row_len=32, val_row_len=32, batch_tokens=(64,),
                         value_embed_layers=(0, 1)) | kwargs)


CONFIGS = dict(default=Config(), tiny=tiny(), one_layer=tiny(n_layer=1, value_embed_layers=(0,)),
               no_value_embeds=tiny(value_embed_layers=()), no_softcap=tiny(softcap=()),
               ngrams=tiny(n_gram=3, ngram_rows=100))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_of_the_model(name):
    """Every parameter of GPT; matrices by Muon, in banks; the long Muon updates last."""
    c = CONFIGS[name]
    with torch.device("meta"):
        params = dict(GPT(c, 65).named_parameters())
    table = parameter_table(c)
    assert sorted(table) == sorted(params)
    optims = [rule.optim for rule in table.values()]
    assert optims == sorted(optims) and set(optims) == {"adam", "muon"}
    for n, rule in table.items():
        assert rule.lr > 0 and (rule.optim == "muon") == n.endswith("_bank") and params[n].dim() >= 2
        assert rule.sharded or params[n].numel() < 10_000


@pytest.mark.parametrize("name", ["tiny", "one_layer", "no_value_embeds", "no_softcap"])
def test_the_optimizer_trains_the_model(name):
    """Three steps on one batch: the loss falls and every parameter has moved."""
    c = CONFIGS[name]
    model = GPT(c, 65)
    model.init_weights(0)
    before = weights(model)
    optimizer = Optimizer(model, parameter_table(c))
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(65, (2, 33), generator=g)
    cu_seqlens = torch.tensor([0, 20, 32, 64], dtype=torch.int32)
    losses = []
    for _ in range(3):
        loss = model(tokens[:, :-1], tokens[:, 1:], cu_seqlens, 32, (32,) * c.n_layer) / 64
        loss.backward()
        optimizer.step(0.1, 0.85)
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    for n, w in weights(model).items():
        assert w.isfinite().all() and (not w.numel() or not torch.equal(w, before[n])), n


# --- shards


@pytest.mark.parametrize("world_size", range(1, 10))
def test_parts_of_all_ranks_make_up_every_parameter(world_size):
    """In order, nothing twice, nothing missing, padded parts equally long; each rank holds only its state."""
    model = Parameters()
    optimizers = [Optimizer(model, TABLE, rank, world_size) for rank in range(world_size)]
    for name, p in model.named_parameters():
        rule, states = TABLE[name], [o.state[name] for o in optimizers]
        whole = p.detach() if rule.optim == "muon" else p.detach().flatten()
        parts = [s["own"] for s in states]
        for s in states:
            assert s["own"].shape == s["m"].shape
            assert (rule.optim == "muon") or s["v"].shape == s["own"].shape
        if not rule.sharded:
            assert all(torch.equal(part, whole) for part in parts)
            continue
        assert torch.equal(torch.cat(parts), whole)  # random numbers: in order and once each
        starts = [(part.data_ptr() - p.data_ptr()) // p.element_size() for part in parts if len(part)]
        counts = [part.numel() for part in parts if len(part)]
        assert starts == [sum(counts[:i]) for i in range(len(counts))]  # the parts are views of the weights
        (n,) = {s["n"] for s in states}
        assert len(whole) <= n * world_size < len(whole) + world_size
        assert all(len(part) <= n for part in parts)


class World:
    """Ranks as threads, with torch.distributed's collectives as its documentation has them, at their worst.

    A collective's result is NaN until wait(); its input must not change before; all ranks must call the same
    ones in the same order with the same sizes.
    """

    def __init__(self, size):
        self.size, self.barrier, self.local = size, threading.Barrier(size, timeout=30), threading.local()
        self.slots, self.calls = [None] * size, 0

    def run(self, fn):
        """fn(rank) on all ranks at once; returns their results, or raises what the first of them raised."""
        def body(rank):
            self.local.rank = rank
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

    def exchange(self, what, x):
        """Everyone's x, by rank."""
        self.slots[self.local.rank] = (what, x.shape, x.dtype), x.detach().clone()
        self.barrier.wait()
        tags, values = zip(*self.slots)
        self.calls += self.local.rank == 0
        self.barrier.wait()
        assert len(set(tags)) == 1, f"ranks call different collectives: {tags}"
        return values

    def start(self, x, out, result):
        """The work of a collective that reads x and will write result to out."""
        copy, in_place = x.detach().clone(), x is out
        assert x.is_contiguous() and out.is_contiguous()
        assert out.shape == result.shape and out.dtype == x.dtype
        out.fill_(float("nan"))

        class Work:
            def wait(self):
                assert in_place or torch.equal(x, copy), "the input of a running collective was overwritten"
                out.copy_(result)
        return Work()

    def reduce_scatter(self, out, x, async_op=False):
        assert async_op and len(x) == len(out) * self.size
        total = sum(self.exchange("reduce_scatter", x))
        return self.start(x, out, total.chunk(self.size)[self.local.rank] if len(total) else total)

    def all_gather(self, out, x, async_op=False):
        assert async_op and len(out) == len(x) * self.size
        return self.start(x, out, torch.cat(self.exchange("all_gather", x)))

    def all_reduce(self, x, async_op=False):
        assert async_op
        return self.start(x, x, sum(self.exchange("all_reduce", x)))


@pytest.fixture
def world(request, monkeypatch):
    world = World(request.param)
    monkeypatch.setattr(train_gpt, "reduce_scatter", world.reduce_scatter)
    monkeypatch.setattr(train_gpt, "all_gather", world.all_gather)
    monkeypatch.setattr(train_gpt.dist, "all_reduce", world.all_reduce)
    return world


def rank_gradients(step, world_size):
    return [gradients(100 * step + rank) for rank in range(world_size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("world", [2, 3, 5, 7], indirect=True)
def test_many_ranks_do_what_one_does(world, dtype):
    """Four steps: all ranks end with the same bits: the weights of one rank with the summed gradients."""
    models = [Parameters(dtype=dtype) for _ in range(world.size)]
    optimizers = [Optimizer(m, TABLE, rank, world.size) for rank, m in enumerate(models)]
    alone = Parameters(dtype=dtype)
    reference = Optimizer(alone, TABLE)
    for step in range(4):
        grads = rank_gradients(step, world.size)
        give(alone, {n: sum(g[n] for g in grads) for n in SHAPES})
        reference.step(0.7, 0.9)

        def on_rank(rank):
            give(models[rank], grads[rank])
            optimizers[rank].step(0.7, 0.9)
        world.run(on_rank)
        assert all(p.grad is None for m in models for p in m.parameters())
        for m in models[1:]:
            assert_equal(weights(m), weights(models[0]))
        for name, w in weights(models[0]).items():
            if dtype == torch.float32 or TABLE[name].optim == "adam":
                torch.testing.assert_close(w, weights(alone)[name], atol=1e-5, rtol=1e-5)
            else:  # products of other batch sizes round differently in bf16
                torch.testing.assert_close(w, weights(alone)[name], atol=0.02, rtol=0.01)
    assert world.calls == 4 * (2 * len(SHAPES) - 1)  # a reduce and a gather each, no gather of what is whole


@pytest.mark.parametrize("world", [3], indirect=True)
def test_many_ranks_train_the_model(world):
    """GPT's own parameters and table, each rank with its row of the batch, as one rank with all rows."""
    c = tiny(n_gram=2, ngram_rows=100)
    tokens = torch.randint(65, (3, 33), generator=torch.Generator().manual_seed(0))

    def fresh(rank=0, world_size=1):
        model = GPT(c, 65)
        model.init_weights(0)
        return model, Optimizer(model, parameter_table(c), rank, world_size)

    def step(model, optimizer, rows):
        cu_seqlens = torch.arange(0, 32 * len(rows) + 1, 32, dtype=torch.int32)
        (model(rows[:, :-1], rows[:, 1:], cu_seqlens, 32, (32, 32)) / 96).backward()
        optimizer.step(0.1, 0.85)
    model, optimizer = fresh()
    ranks = [fresh(rank, 3) for rank in range(3)]
    for _ in range(2):
        step(model, optimizer, tokens)
        world.run(lambda rank: step(*ranks[rank], tokens[rank:rank + 1]))
    for name, w in weights(model).items():
        assert_equal({name: weights(ranks[1][0])[name]}, {name: weights(ranks[0][0])[name]})
        off = (w - weights(ranks[0][0])[name]).abs()
        # a step is 5e-4 or more; where a gradient is rounding only, Adam makes a whole step of that
        assert off.median() < 1e-4 and off.quantile(0.99) < 1e-3, name


@pytest.mark.parametrize("world", [4], indirect=True)
def test_masters_of_all_ranks_are_those_of_one(world):
    """bf16: each rank keeps the exact masters of its part only; together they are the single rank's."""
    shapes = {n: s for n, s in SHAPES.items() if TABLE[n].optim == "adam" and TABLE[n].sharded}
    table = {n: TABLE[n] for n in shapes}
    models = [Parameters(shapes, torch.bfloat16) for _ in range(4)]
    optimizers = [Optimizer(m, table, rank, 4) for rank, m in enumerate(models)]
    alone = Parameters(shapes, torch.bfloat16)
    reference = Optimizer(alone, table)
    for step in range(3):
        grads = rank_gradients(step, 4)
        give(alone, {n: sum(g[n] for g in grads) for n in shapes})
        reference.step(1.0, 0.9)
        world.run(lambda rank: (give(models[rank], grads[rank]), optimizers[rank].step(1.0, 0.9)))
    for name in shapes:
        together = torch.cat([master_of(o, name) for o in optimizers])
        torch.testing.assert_close(together, master_of(reference, name), atol=1e-6, rtol=1e-6)
