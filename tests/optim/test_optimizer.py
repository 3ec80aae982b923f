"""The optimizer of train_gpt.py: numbers against references written here, and sharding without
processes."""

import dataclasses
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import PIECES
from optim.updates import join
from torch import nn

from kernels.polar_express import COEFFICIENTS
from optim import shards, updates
from runtime.state import gather_optimizer, load_optimizer
from train_gpt import GPT, Config, Optimizer, Rule, World, parameter_table, stage_at

# odd sizes, so that no world size but 1 divides them all
SHAPES = dict(
    scalars=(5,),
    gates=(3, 1),
    embed=(13, 7),
    head=(9, 11),
    tables=(3, 5, 4),
    tall=(5, 12, 4),
    wide=(3, 4, 10),
    one=(1, 6, 6),
)
TABLE = dict(
    scalars=Rule("adam", 0.04, (0.9, 0.99), eps=0.1, sharded=False),
    gates=Rule("adam", 0.02, (0.9, 0.99)),
    embed=Rule("adam", 0.05, (0.75, 0.95)),
    head=Rule("adam", 0.01, (0.5, 0.9), weight_decay=300),
    tables=Rule("row_adam", 0.03, (0.0, 0.9), weight_decay=20),
    tall=Rule("muon", 0.05, weight_decay=10),
    wide=Rule("muon", 0.03),
    one=Rule("muon", 0.02, weight_decay=40),
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


def single(rule, start, dtype=torch.float32, **options):
    """A model of one parameter `w` with the given start, and its optimizer."""
    model = nn.Module()
    model.w = nn.Parameter(start.to(dtype, copy=True))
    return model, Optimizer(model, {"w": rule}, **options)


# --- Adam


def test_adam_is_torchs_adam():
    """20 steps with changing learning rates and very different gradient sizes, to 1e-6."""
    shapes = {
        n: s for n, s in SHAPES.items() if TABLE[n].optim == "adam" and not TABLE[n].weight_decay
    }
    model, reference = Parameters(shapes), Parameters(shapes)
    optimizer = Optimizer(model, {n: TABLE[n] for n in shapes})
    torchs = torch.optim.Adam(
        [
            dict(params=[p], betas=TABLE[n].betas, eps=TABLE[n].eps)
            for n, p in reference.named_parameters()
        ]
    )
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
    torch.testing.assert_close(
        model.w.detach(), torch.tensor([-0.05, 0.05, 0.0]), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("lr_scale", [1.0, 0.5])
def test_adams_decay_is_cautious_and_times_the_squared_learning_rate(lr_scale):
    """A weight shrinks by lr^2 decay where its step goes towards zero as well, and else not at
    all."""
    start = torch.tensor([2.0, 2.0, -2.0, -2.0, 2.0])
    model, optimizer = single(Rule("adam", 0.1, (0.0, 0.0), weight_decay=4.0), start)
    model.w.grad = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0])
    optimizer.step(lr_scale, 0.9)
    lr = 0.1 * lr_scale
    expected = (
        start
        - lr * torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0])
        - 4 * lr**2 * torch.tensor([2.0, 0, 0, -2, 0])
    )
    torch.testing.assert_close(model.w.detach(), expected)


@pytest.mark.parametrize("every", [1, 2])
def test_row_adam_is_float64s(every):
    """Each row's step is its gradient over the root of its mean square's average, with the
    rule's learning rate, second beta and eps, Adam's own count of steps, and cautious decay."""
    start = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
    rule = Rule("row_adam", 0.05, (0.5, 0.9), eps=0.01, weight_decay=20.0)
    model, optimizer = single(rule, start, adam_every=every)
    w, v, waiting = start.double().view(12, 5), 0, 0
    for step in range(1, 9):
        grad = torch.randn(start.shape, generator=torch.Generator().manual_seed(10 + step))
        model.w.grad = grad.clone() if model.w.grad is None else model.w.grad + grad
        optimizer.step(1 - step / 10, 0.9)
        waiting = waiting + grad.double().view(12, 5)
        if step % every == 0:
            lr = 0.05 * (1 - step / 10)
            v = 0.9 * v + 0.1 * waiting.square().mean(1, keepdim=True)
            update = lr * waiting / ((v / (1 - 0.9 ** (step // every))).sqrt() + 0.01)
            w, waiting = w - update - lr**2 * 20 * w * (update * w > 0), 0
    torch.testing.assert_close(model.w.detach().double().view(12, 5), w, atol=1e-5, rtol=0)


def summed(parts):
    return {name: sum(part[name] for part in parts) for name in parts[0]}


@pytest.mark.parametrize("every", [2, 3])
def test_adam_every_nth_step_is_adam_on_summed_gradients(every):
    """And Muon at each step. Bit for bit, since the gradients' sums are exact."""
    model, reference = Parameters(), Parameters()
    optimizer = Optimizer(model, TABLE, adam_every=every)
    adams, muons = Optimizer(reference, TABLE), Optimizer(reference, TABLE)
    adam_names = {name for name, rule in TABLE.items() if rule.optim != "muon"}
    waiting = []
    for step in range(2 * every + 1):
        scale, grads = 1 - step / 10, gradients(step)
        before = weights(model)
        for name, p in model.named_parameters():  # as backward does
            p.grad = grads[name] if p.grad is None else p.grad + grads[name]
        optimizer.step(scale, 0.9)
        waiting.append(grads)
        for name, p in reference.named_parameters():
            p.grad = None if name in adam_names else grads[name].clone()
        muons.step(scale, 0.9)
        if (step + 1) % every == 0:
            for name, p in reference.named_parameters():
                p.grad = summed(waiting)[name] if name in adam_names else None
            adams.step(scale, 0.9)
            waiting = []
            assert optimizer.waiting() == []
        else:
            assert set(optimizer.waiting()) == adam_names
            assert_equal(
                {n: before[n] for n in adam_names}, {n: weights(model)[n] for n in adam_names}
            )
        assert_equal(weights(model), weights(reference))


# --- Muon


def orthogonalised(G):
    """The five polynomials on one float64 matrix, straight from their definition, without a
    transpose."""
    X = G / (1.02 * (G * G).sum().sqrt())
    for a, b, c in COEFFICIENTS:
        X = a * X + b * X @ X.T @ X + c * X @ X.T @ X @ X.T @ X
    return X


def muon_reference(start, grads, lrs, momenta, decay, normuon=False):
    """Muon on a bank in float64, matrix by matrix."""
    result = []
    for i, w in enumerate(start.double()):
        rows, cols = w.shape
        average, v = torch.zeros_like(w), 0
        for grad, lr, beta in zip(grads, lrs, momenta):
            g = grad[i].double()
            average = beta * average + (1 - beta) * g
            update = orthogonalised(beta * average + (1 - beta) * g)
            shrink = lr**2 * decay * (update * w >= 0)
            # each row, or column, of the longer side to the same size, the whole as large as before
            if normuon:
                v = 0.9 * v + 0.1 * (update**2).mean(1 if rows >= cols else 0, keepdim=True)
                balanced = update / v.sqrt()
                update = balanced * update.norm() / balanced.norm()
            w = (1 - shrink) * w - lr * max(1, rows / cols) ** 0.5 * update
        result.append(w)
    return torch.stack(result)


@pytest.mark.parametrize("normuon", [False, True])
@pytest.mark.parametrize(
    "shape", [(3, 8, 8), (4, 12, 3), (2, 5, 20), (1, 1, 7), (1, 6, 2)], ids=str
)
def test_muon_is_a_loop_over_matrices(shape, normuon):
    """Momentum with Nesterov's look ahead, polar factor, sqrt(rows / cols) for tall ones,
    cautious decoupled decay."""
    lrs, momenta = [0.1, 0.1, 0.05, 0.02, 0.0, 0.07], [0.85, 0.9, 0.95, 0.95, 0.9, 0.0]
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    grads = [torch.randn(shape, generator=torch.Generator().manual_seed(10 + k)) for k in range(6)]
    model, optimizer = single(Rule("muon", 0.1, weight_decay=10.0), start, normuon=normuon)
    for k, grad in enumerate(grads):
        model.w.grad = grad.clone()
        optimizer.step(lrs[k] / 0.1, momenta[k])
        expected = muon_reference(start, grads[: k + 1], lrs, momenta, 10.0, normuon)
        torch.testing.assert_close(model.w.detach().double(), expected, atol=1e-4, rtol=0)


def test_muons_decay_is_decoupled_and_times_the_squared_learning_rate():
    """A weight whose step goes towards zero shrinks by 1 - lr^2 decay besides; without a
    gradient nothing happens."""
    start, grad = torch.ones(2, 3, 3), torch.diag(torch.tensor([1.0, 2.0, -1.0])).expand(2, 3, 3)
    ends = []
    for decay in (0.0, 5.0):
        model, optimizer = single(Rule("muon", 0.2, weight_decay=decay), start)
        model.w.grad = torch.zeros(2, 3, 3)
        optimizer.step(0.5, 0.9)
        assert torch.equal(model.w, start)
        model.w.grad = grad.clone()
        optimizer.step(0.5, 0.9)
        ends.append(model.w.detach())
    shrunk = 0.1**2 * 5 * torch.diag(torch.tensor([1.0, 1.0, 0.0])).expand(2, 3, 3)
    torch.testing.assert_close(ends[0] - ends[1], shrunk, atol=1e-6, rtol=0)


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
    return join(optimizer.shards[name].own, optimizer.state[name]["companion"])


def train(optimizer, model, steps, seed=0):
    for k in range(steps):
        give(model, gradients(seed + k))
        optimizer.step(1 - 0.1 * k, 0.85 + 0.02 * k)


def test_bf16_weights_are_the_masters_rounded():
    """After every step; and the masters do what fp32 weights would do with the same gradients
    (Adam)."""
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
            if TABLE[name].optim != "muon":
                assert torch.equal(
                    master,
                    exact.get_parameter(name).view(optimizer.shards[name].whole.shape).detach(),
                )
            else:
                torch.testing.assert_close(
                    master, exact.get_parameter(name).detach(), atol=0.05, rtol=0
                )


@pytest.mark.parametrize(
    "rule, shape",
    [(Rule("adam", 1e-4, (0.0, 0.9)), (4,)), (Rule("muon", 1e-4), (1, 1, 1))],
    ids=["adam", "muon"],
)
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


class OnGPU(torch.Tensor):
    """Says it is on a GPU, where nobody may ask for its value."""

    device = torch.device("cuda", 0)

    def __bool__(self):
        raise AssertionError("the host waits for the device")


def judged(ok, kind):
    return torch.tensor(ok).as_subclass(OnGPU if kind == "cuda" else torch.Tensor)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [dict(), dict(normuon=True)], ids=["muon", "normuon"])
def test_a_step_that_does_not_count_leaves_every_bit(dtype, options, kind):
    """Whatever the gradients hold; what follows is as if it had not been, but for the step count
    of Adam."""
    model = Parameters(dtype=dtype)
    optimizer = Optimizer(model, TABLE, **options)
    train(optimizer, model, 2)

    def everything():
        moments = {
            (n, k): x.clone()
            for n, s in optimizer.state.items()
            for k, x in s.items()
            if x is not None
        }
        return weights(model) | moments

    before = everything()
    for bad in (float("nan"), float("inf"), 1.0):
        give(model, {n: g * bad for n, g in gradients(5).items()})
        optimizer.step(1.0, 0.9, judged(False, kind))
        assert_equal(before, everything())
        assert optimizer.waiting() == []
    give(model, gradients(6))
    optimizer.step(1.0, 0.9, judged(True, kind))
    assert all(
        p.isfinite().all() and not torch.equal(p, before[n]) for n, p in model.named_parameters()
    )


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("bad", [float("nan"), 1.0], ids=["not finite", "finite"])
def test_gradients_of_a_step_that_does_not_count_do_not_wait(bad, kind):
    """With adam_every, the step after a bad one updates from its own gradients."""
    model, other = Parameters(), Parameters()
    optimizer, reference = (
        Optimizer(model, TABLE, adam_every=2),
        Optimizer(other, TABLE, adam_every=2),
    )
    give(model, {n: g * bad for n, g in gradients(1).items()})
    give(other, {n: torch.zeros_like(g) for n, g in gradients(1).items()})
    for o in (optimizer, reference):
        o.step(1.0, 0.9, judged(False, kind))
        o.forget_waiting(judged(False, kind))
    for m, o in ((model, optimizer), (other, reference)):
        for name, p in m.named_parameters():
            p.grad = gradients(2)[name] + (0 if p.grad is None else p.grad)
        o.forget_waiting(judged(True, kind))
        o.step(1.0, 0.9, judged(True, kind))
    assert all(p.isfinite().all() for p in model.parameters())
    assert_equal(weights(model), weights(other))


EVERYTHING = PIECES | dict(n_embd=32, weight_decay=1.0, normuon=True, row_moments=True)


@pytest.fixture(scope="module", params=["plain", "everything"])
def graphs(request):
    """(which, counts of graphs of adam_update, row_scale, nesterov, balance, descend after each
    of three steps) of GPT's parameters, compiled as the optimizer compiles them; the weights
    must be those of the eager run."""
    counts, after = [0] * 5, []
    torch._dynamo.reset()  # other tests' graphs count towards the limit

    def counting(i):
        def backend(graph, inputs):
            counts[i] += 1
            return graph.forward

        return backend

    c = tiny(**(EVERYTHING if request.param == "everything" else {}))
    models = [GPT(c, 65) for _ in range(2)]
    for m in models:
        m.init_weights(0)
    compiled, eager = (
        Optimizer(m, parameter_table(c), compile=m is models[0], normuon=c.normuon) for m in models
    )
    adam, row_scale, nesterov, balance, descend = (
        torch.compile(f, fullgraph=True, dynamic=True, backend=counting(i))
        for i, f in enumerate(
            (
                updates.adam_update,
                updates.row_scale,
                updates.nesterov,
                updates.balance,
                updates.descend,
            )
        )
    )
    compiled.adam = adam
    compiled.row_adam = functools.partial(updates.row_update, row_scale=row_scale, descend=descend)
    compiled.muon = functools.partial(
        updates.muon_update, nesterov=nesterov, balance=balance, descend=descend
    )
    for step in range(3):
        grads = gradients(step, {n: p.shape for n, p in models[0].named_parameters()})
        for m, o in zip(models, (compiled, eager)):
            give(m, grads)
            o.step(0.1 - 0.01 * step, 0.85 + 0.02 * step, torch.tensor(step != 1))
        after.append(tuple(counts))
    for name, w in weights(models[0]).items():
        torch.testing.assert_close(w, weights(models[1])[name])
    return request.param, after


def test_values_that_change_every_step_compile_nothing(graphs):
    """New learning rates, momenta, judgements and step counts: no graph after the first step's."""
    assert graphs[1][0] == graphs[1][-1]


def test_one_graph_of_each_update_for_all_shapes(graphs):
    """Two of Adam where some parameters decay and others do not; NorMuon's balance has another
    for square matrices, descend for tables."""
    assert graphs[1][0] == ((1, 0, 1, 0, 1) if graphs[0] == "plain" else (2, 1, 1, 2, 2))


# --- the table


def test_the_table_must_name_every_parameter_and_no_other():
    without = {n: r for n, r in TABLE.items() if n != "gates"}
    for wrong in (without, TABLE | dict(other=Rule("adam", 0.1)), {}):
        with pytest.raises(AssertionError, match="table"):
            Optimizer(Parameters(), wrong)


def tiny(**kwargs):
    return Config(
        **dict(
            n_layer=2,
            n_embd=16,
            n_head=2,
            row_len=32,
            val_row_len=32,
            batch_tokens=(64,),
            value_embed_layers=(0, 1),
        )
        | kwargs
    )


CONFIGS = dict(
    default=Config(),
    tiny=tiny(),
    one_layer=tiny(n_layer=1, value_embed_layers=(0,)),
    no_value_embeds=tiny(value_embed_layers=()),
    no_softcap=tiny(softcap=()),
    ngrams=tiny(n_gram=3, ngram_rows=100),
    everything=tiny(**EVERYTHING),
)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_of_the_model(name):
    """Every parameter of GPT; matrices by Muon, in banks; the long Muon updates last."""
    c = CONFIGS[name]
    with torch.device("meta"):
        params = dict(GPT(c, 65).named_parameters())
    table = parameter_table(c)
    assert sorted(table) == sorted(params)
    optims = [rule.optim for rule in table.values()]
    assert optims == sorted(optims, key="muon".__eq__)
    assert set(optims) == {"adam", "muon"} | ({"row_adam"} if c.row_moments else set())
    for n, rule in table.items():
        assert rule.lr > 0 and (rule.optim == "muon") == n.endswith("_bank")
        assert params[n].dim() >= 2 or n == "scalars"
        assert rule.sharded or params[n].numel() < 10_000


def test_what_decays():
    """With the record's factors: tables little, the head and what is tied to it 31 times as
    much, small ones not."""
    for tied in (0.0, 0.5):
        table = parameter_table(Config(weight_decay=1.6, tied=tied))
        assert {n for n, r in table.items() if r.weight_decay} == {
            "value_embeds",
            "embed",
            "ngram_embeds",
            "lm_head",
            "attn_bank",
            "mlp_bank",
        }
        assert table["lm_head"].weight_decay == 1.0 and table["mlp_bank"].weight_decay == 1.6
        assert table["embed"].weight_decay == (1.0 if tied else pytest.approx(0.032))
        assert (table["embed"].lr == table["lm_head"].lr) == bool(tied)
        assert table["embed"].betas == table["lm_head"].betas  # untying takes the moments along
    assert not any(r.weight_decay for r in parameter_table(Config()).values())


@pytest.mark.parametrize("tied", [0.0, 0.5])
def test_tables_have_a_moment_a_row(tied):
    """The head and what is tied to it keep Adam's, and nothing else changes."""
    without, table = (
        parameter_table(Config(row_moments=on, tied=tied, weight_decay=1.0)) for on in (False, True)
    )
    tables = {"value_embeds", "ngram_embeds"} | ({"embed"} if not tied else set())
    for n, rule in table.items():
        assert rule == dataclasses.replace(
            without[n], optim="row_adam" if n in tables else without[n].optim
        ), n
    c = tiny(**PIECES, row_moments=True, tied=tied)
    state = Optimizer(GPT(c, 65), parameter_table(c)).state
    for n, s in state.items():
        assert (s["m"] is None) == (n in tables), n
    assert state["value_embeds"]["v"].shape == (
        len(c.value_embed_layers) * 128,
        1,
    )  # 65 tokens, padded


def model_step(c, model, optimizer, rows, n_tokens):
    """One step on rows (B, T + 1) of one document each; returns its share of the loss."""
    cu_seqlens = torch.arange(0, 32 * len(rows) + 1, 32, dtype=torch.int32)
    loss = model(rows[:, :-1], rows[:, 1:], cu_seqlens, stage_at(c, 0.0)) / n_tokens
    loss.backward()
    optimizer.step(0.1, 0.85)
    return loss.item()


@pytest.mark.parametrize(
    "name", ["tiny", "one_layer", "no_value_embeds", "no_softcap", "everything"]
)
def test_the_optimizer_trains_the_model(name):
    """Five steps on one batch: the loss falls and every parameter that is used has moved."""
    c = CONFIGS[name]
    model = GPT(c, 65)
    model.init_weights(0)
    before = weights(model)
    optimizer = Optimizer(model, parameter_table(c), normuon=c.normuon)
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(65, (2, 33), generator=g)
    losses = [model_step(c, model, optimizer, tokens, 64) for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    for n, w in weights(model).items():
        used = w.numel() and (n != "scalars" or c.smear)
        assert w.isfinite().all() and (not used or not torch.equal(w, before[n])), n


# --- the head and the embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untying_copies_weights_masters_and_moments(dtype):
    c = tiny(tied=0.5)
    model = GPT(c, 65, dtype)
    model.init_weights(0)
    optimizer = Optimizer(model, parameter_table(c))
    for k in range(3):
        for name, p in model.named_parameters():
            if name != "embed":  # as while tied: it has no gradient
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k)).to(
                    p.dtype
                )
        optimizer.step(1.0, 0.9)
    model.lm_head.grad = torch.ones_like(model.lm_head)
    before = weights(model)
    assert not torch.equal(model.embed, model.lm_head)
    optimizer.untie()
    assert torch.equal(model.embed, model.lm_head)
    head, embed = optimizer.state["lm_head"], optimizer.state["embed"]
    for key, x in head.items():
        assert x is None or torch.equal(x, embed[key]) and x.data_ptr() != embed[key].data_ptr()
    assert head["m"].any() and head["v"].any()
    assert torch.equal(master_of(optimizer, "embed"), master_of(optimizer, "lm_head"))
    assert_equal(weights(model), before | dict(embed=before["lm_head"]))
    assert torch.equal(
        model.embed.grad, model.lm_head.grad
    )  # the sum that waits for Adam is of both
    optimizer.step(1.0, 0.9)  # the same rule, so the same gradient still gives the same weights
    assert torch.equal(model.embed, model.lm_head) and not torch.equal(
        model.embed, before["lm_head"]
    )


# --- shards


def world_of(rank, size, local=None):
    """A World of size / local machines with so many ranks each; its groups are tuples of ranks."""
    local = local or size
    if local == size:
        return World(rank, size, torch.device("cpu"), size)
    first = rank - rank % local
    return World(
        rank,
        size,
        torch.device("cpu"),
        local,
        tuple(range(first, first + local)),
        tuple(range(rank % local, size, local)),
    )


@pytest.mark.parametrize("world_size", range(1, 10))
def test_parts_of_all_ranks_make_up_every_parameter(world_size):
    """In order, nothing twice, nothing missing, padded parts equally long; each rank holds only
    its state."""
    model = Parameters()
    optimizers = [
        Optimizer(model, TABLE, world_of(rank, world_size), normuon=True)
        for rank in range(world_size)
    ]
    for name, p in model.named_parameters():
        rule, states = TABLE[name], [o.state[name] for o in optimizers]
        whole = p.detach()
        if rule.optim == "adam":
            whole = whole.flatten()
        elif rule.optim == "row_adam":
            whole = whole.flatten(0, -2)
        parts = [o.shards[name].own for o in optimizers]
        for part, s in zip(parts, states):
            assert s["m"] is None if rule.optim == "row_adam" else s["m"].shape == part.shape
            assert s["v"].shape == part.shape if rule.optim == "adam" else len(s["v"]) == len(part)
        if not rule.sharded:
            assert all(torch.equal(part, whole) for part in parts)
            continue
        assert torch.equal(torch.cat(parts), whole)  # random numbers: in order and once each
        starts = [
            (part.data_ptr() - p.data_ptr()) // p.element_size() for part in parts if len(part)
        ]
        counts = [part.numel() for part in parts if len(part)]
        assert starts == [
            sum(counts[:i]) for i in range(len(counts))
        ]  # the parts are views of the weights
        (n,) = {o.shards[name].n for o in optimizers}
        assert len(whole) <= n * world_size < len(whole) + world_size
        assert all(len(part) <= n for part in parts)


def test_machines_share_out_alike():
    """Ranks in the same place of their machines have the same parts."""
    model = Parameters()
    there = [Optimizer(model, TABLE, world_of(rank, 6, 3)) for rank in range(6)]
    alone = [Optimizer(model, TABLE, world_of(rank, 3)) for rank in range(3)]
    for name in SHAPES:
        for rank in range(6):
            assert (
                there[rank].shards[name].own.data_ptr()
                == alone[rank % 3].shards[name].own.data_ptr()
            )
            assert len(there[rank].shards[name].own) == len(alone[rank % 3].shards[name].own)


class Ranks:
    """Ranks as threads, with torch.distributed's collectives as its documentation has them, at
    their worst.

    A collective's result is NaN until wait(); its input must not change before; all ranks must call
    the same ones in the same order with the same sizes. Groups are tuples of ranks.
    """

    def __init__(self, size, local=None):
        self.size, self.barrier, self.thread = (
            size,
            threading.Barrier(size, timeout=30),
            threading.local(),
        )
        self.worlds = [world_of(rank, size, local) for rank in range(size)]
        self.slots, self.calls = [None] * size, []

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
        copy, in_place = x.detach().clone(), x is out
        assert x.is_contiguous() and out.is_contiguous()
        assert out.shape == result.shape and out.dtype == x.dtype
        out.fill_(float("nan"))

        class Work:
            def wait(self):
                assert in_place or torch.equal(x, copy), (
                    "the input of a running collective was overwritten"
                )
                out.copy_(result)

        return Work() if async_op else Work().wait()

    def reduce_scatter(self, out, x, group=None, async_op=False):
        values, place = self.exchange("reduce_scatter", x, group)
        assert len(x) == len(out) * len(values)
        total = sum(values)
        return self.start(
            x, out, total.chunk(len(values))[place] if len(total) else total, async_op
        )

    def all_gather(self, out, x, group=None, async_op=False):
        values, _ = self.exchange("all_gather", x, group)
        assert len(out) == len(x) * len(values)
        return self.start(x, out, torch.cat(values), async_op)

    def all_reduce(self, x, group=None, async_op=False):
        return self.start(x, x, sum(self.exchange("all_reduce", x, group)[0]), async_op)


@pytest.fixture
def ranks(request, monkeypatch):
    """param: how many ranks, or (how many, how many on a machine)."""
    ranks = Ranks(*(request.param if isinstance(request.param, tuple) else [request.param]))
    monkeypatch.setattr(shards, "reduce_scatter", ranks.reduce_scatter)
    monkeypatch.setattr(shards, "all_gather", ranks.all_gather)
    monkeypatch.setattr(torch.distributed, "all_reduce", ranks.all_reduce)
    return ranks


def rank_gradients(step, world_size):
    return [gradients(100 * step + rank) for rank in range(world_size)]


def assert_close_to_alone(found, expected, dtype):
    """Weights of many ranks and of one."""
    for name, w in found.items():
        if dtype == torch.float32 or TABLE[name].optim != "muon":
            torch.testing.assert_close(w, expected[name], atol=1e-5, rtol=1e-5)
        else:  # products of other batch sizes round differently in bf16
            torch.testing.assert_close(w, expected[name], atol=0.02, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "ranks", [2, 3, 5, 7, (4, 2), (6, 3), (6, 2), (3, 1)], indirect=True, ids=str
)
def test_many_ranks_do_what_one_does(ranks, dtype):
    """Four steps: all ranks end with the same bits: the weights of one rank with the summed
    gradients."""
    models = [Parameters(dtype=dtype) for _ in range(ranks.size)]
    optimizers = [Optimizer(m, TABLE, world) for m, world in zip(models, ranks.worlds)]
    alone = Parameters(dtype=dtype)
    reference = Optimizer(alone, TABLE)
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
    local, n = ranks.worlds[0].local_size, len(SHAPES)
    if local == 1:  # nothing is shared out: everything is summed over the machines
        assert len(ranks.calls) == 4 * n
    else:  # a reduce and a gather each, no gather of what is whole
        assert len(ranks.calls) == 4 * (2 * n - 1 + (n - 1 if local < ranks.size else 0))


@pytest.mark.parametrize("ranks", [(8, 4)], indirect=True, ids=str)
def test_between_machines_go_parts_only(ranks):
    """The links between machines carry a quarter of each gradient, and no weights."""
    models = [Parameters() for _ in range(ranks.size)]
    optimizers = [Optimizer(m, TABLE, world) for m, world in zip(models, ranks.worlds)]

    def on_rank(rank):
        give(models[rank], gradients(rank))
        optimizers[rank].step(0.7, 0.9)

    ranks.run(on_rank)
    across = sum(n for what, members, n in ranks.calls if members == 2)
    everywhere = [n for what, members, n in ranks.calls if members == 8]
    assert everywhere == [5]  # the scalars
    sizes = {
        n: 4 * o.n * optimizers[0].shards[n].whole[0].numel()
        for n, o in optimizers[0].shards.items()
        if TABLE[n].sharded
    }
    assert 4 * across == sum(sizes.values())


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("ranks", [3, (4, 2)], indirect=True, ids=str)
def test_many_ranks_train_the_model(ranks, every):
    """GPT's own parameters and table, each rank with its row of the batch, as one rank with all
    rows."""
    c = tiny(**EVERYTHING | dict(n_gram=2, ngram_rows=100, weight_decay=0.0))
    size = ranks.size
    tokens = torch.randint(65, (size, 33), generator=torch.Generator().manual_seed(0))

    def fresh(world=World()):
        model = GPT(c, 65)
        model.init_weights(0)
        return model, Optimizer(model, parameter_table(c), world, normuon=True, adam_every=every)

    model, optimizer = fresh()
    many = [fresh(world) for world in ranks.worlds]
    for _ in range(2):
        model_step(c, model, optimizer, tokens, 32 * size)
        ranks.run(lambda rank: model_step(c, *many[rank], tokens[rank : rank + 1], 32 * size))
    for name, w in weights(model).items():
        for m, _ in many[1:]:
            assert torch.equal(m.get_parameter(name), many[0][0].get_parameter(name)), name
        off = (w - weights(many[0][0])[name]).abs()
        # a step is 5e-4 or more; where a gradient is rounding only, Adam makes a whole step of that
        assert not w.numel() or off.median() < 1e-4 and off.quantile(0.99) < 1e-3, name


@pytest.mark.parametrize("ranks", [4, (4, 2)], indirect=True, ids=str)
def test_masters_of_all_ranks_are_those_of_one(ranks):
    """bf16: each rank keeps the exact masters of its part only; together they are the single
    rank's."""
    shapes = {n: s for n, s in SHAPES.items() if TABLE[n].optim == "adam" and TABLE[n].sharded}
    table = {n: TABLE[n] for n in shapes}
    models = [Parameters(shapes, torch.bfloat16) for _ in range(4)]
    optimizers = [Optimizer(m, table, world) for m, world in zip(models, ranks.worlds)]
    alone = Parameters(shapes, torch.bfloat16)
    reference = Optimizer(alone, table)
    for step in range(3):
        grads = rank_gradients(step, 4)
        give(alone, {n: sum(g[n] for g in grads) for n in shapes})
        reference.step(1.0, 0.9)
        ranks.run(lambda rank: (give(models[rank], grads[rank]), optimizers[rank].step(1.0, 0.9)))
    for name in shapes:
        together = torch.cat([master_of(o, name) for o in optimizers[: ranks.worlds[0].local_size]])
        torch.testing.assert_close(together, master_of(reference, name), atol=1e-6, rtol=1e-6)


# --- state in and out


def from_tensors(tensors):
    """The fetch for load_optimizer."""
    return lambda name, like: tensors[name].view(like.shape).to(like)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [1, 2])
def test_state_that_was_gathered_and_loaded_goes_on_bit_for_bit(dtype, every):
    """From other weights and moments, and with gradients that have to go."""
    model, other = Parameters(dtype=dtype), Parameters(dtype=dtype, seed=9)
    optimizer, continued = (
        Optimizer(m, TABLE, normuon=True, adam_every=every) for m in (model, other)
    )

    def steps(model, optimizer, numbers):
        for k in numbers:
            for name, p in model.named_parameters():
                grad = gradients(k)[name].to(p.dtype)
                p.grad = grad if p.grad is None else p.grad + grad
            optimizer.step(1 - 0.1 * k, 0.85)

    steps(other, continued, [7])
    assert bool(continued.waiting()) == (every == 2)
    steps(model, optimizer, range(4))
    tensors = gather_optimizer(optimizer)
    assert all(x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors.values())
    before = {name: x.clone() for name, x in tensors.items()}
    load_optimizer(continued, from_tensors(tensors), 4)
    assert_equal(weights(model), weights(other))
    steps(model, optimizer, range(4, 6))
    assert_equal(tensors, before)  # a copy: training goes on while it is written
    steps(other, continued, range(4, 6))
    assert_equal(weights(model), weights(other))
    assert_equal(gather_optimizer(optimizer), gather_optimizer(continued))


@pytest.mark.parametrize("ranks", [2, 3, (4, 2)], indirect=True, ids=str)
def test_state_of_many_ranks_is_that_of_one_and_loads_on_any_number(ranks):
    """A rank without rows of a parameter is no trouble."""
    models = [Parameters() for _ in range(ranks.size)]
    optimizers = [
        Optimizer(m, TABLE, world, adam_every=2) for m, world in zip(models, ranks.worlds)
    ]
    alone = Parameters()
    reference = Optimizer(alone, TABLE, adam_every=2)

    def steps(numbers, models, optimizers, alone, reference):
        for k in numbers:
            grads = rank_gradients(k, ranks.size)

            def accumulate(model, grads):
                for name, p in model.named_parameters():
                    p.grad = grads[name].clone() if p.grad is None else p.grad + grads[name]

            accumulate(alone, summed(grads))
            reference.step(0.7, 0.9)
            ranks.run(
                lambda rank: (
                    accumulate(models[rank], grads[rank]),
                    optimizers[rank].step(0.7, 0.9),
                )
            )

    steps(range(4), models, optimizers, alone, reference)
    tensors = ranks.run(lambda rank: gather_optimizer(optimizers[rank]))
    assert not any(tensors[1:])
    theirs, fetch = gather_optimizer(reference), from_tensors(tensors[0])
    assert tensors[0].keys() == theirs.keys()
    for name, x in tensors[0].items():
        torch.testing.assert_close(x, theirs[name], atol=1e-5, rtol=1e-5)
    fresh = [Parameters(seed=5) for _ in range(ranks.size)]
    continued = [Optimizer(m, TABLE, world, adam_every=2) for m, world in zip(fresh, ranks.worlds)]
    ranks.run(lambda rank: load_optimizer(continued[rank], fetch, 4))
    one = Parameters(seed=6)
    on_one = Optimizer(one, TABLE, adam_every=2)
    load_optimizer(on_one, fetch, 4)
    steps(range(4, 6), fresh, continued, one, on_one)
    steps(range(4, 6), models, optimizers, alone, reference)
    assert_equal(weights(fresh[0]), weights(models[0]))
    for name, w in weights(one).items():
        torch.testing.assert_close(w, weights(models[0])[name], atol=1e-5, rtol=1e-5)
