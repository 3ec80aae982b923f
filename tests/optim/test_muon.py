"""Muon and NorMuon against loops over matrices in float64; what NorMuon's scale keeps."""

import pytest
import torch
from kernel_checks import DEVICE, draw
from optim_helpers import KINDS, bits, flag, single, start_at

from kernels.polar_express import COEFFICIENTS, polar_express
from optim import Muon, muon_update
from optim.masters import descend, join, store
from optim.muon import balance, head_pairs, nesterov, new_second_moment, whole_matrices

SHAPES = [(3, 8, 8), (4, 12, 3), (2, 5, 20), (1, 1, 7), (2, 7, 1), (6, 2)]


def normalised(step, v, beta2):
    """NorMuon's step and second moment for one matrix in float64, from the paper, but along the
    longer side."""
    rows, cols = step.shape
    dim = 1 if rows >= cols else 0
    v = beta2 * v + (1 - beta2) * (step**2).mean(dim, keepdim=True)
    scaled = step / v.sqrt()
    return scaled * (step.norm() / scaled.norm()), v


# --- The update


@pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_update_is_float64s(shape, normuon):
    """Momentum with Nesterov's look ahead, polar factor, sqrt(rows / cols) for tall ones,
    cautious decoupled decay; NorMuon's second moment."""
    p = draw(*shape)
    m = torch.zeros(shape, device=DEVICE)
    v = new_second_moment(p) if normuon else None
    w = p.double()
    average = 0
    v64 = v.double() if normuon else None
    tall = max(1, shape[-2] / shape[-1]) ** 0.5
    # Learning rate, decay, momentum and beta2 of each step
    steps = [
        (0.1, 0.3, 0.85, 0.9),
        (0.1, 0.0, 0.9, 0.5),
        (0.02, 0.3, 0.95, 0.95),
        (0.0, 1.0, 0.0, 0.9),
    ]
    for i, (lr, decay, beta, beta2) in enumerate(steps * 3):
        g = draw(*shape, seed=10 + i)
        muon_update(p, None, g, m, lr, beta, v, beta2, lr * decay)
        average = beta * average + (1 - beta) * g.double()
        step = polar_express(beta * average + (1 - beta) * g.double())
        if normuon:
            pairs = []
            for matrix, moment in zip(step.view(-1, *shape[-2:]), v64.view(-1, *v.shape[-2:])):
                pairs.append(normalised(matrix, moment, beta2))
            step = torch.stack([matrix for matrix, _ in pairs]).view(step.shape)
            v64 = torch.stack([moment for _, moment in pairs]).view(v.shape)
            torch.testing.assert_close(v.double(), v64, atol=1e-6, rtol=1e-4)
        shrunk = lr * decay * w * (step * w > 0)
        w = w - lr * tall * step - shrunk
        torch.testing.assert_close(p.double(), w, atol=2e-4 if normuon else 1e-4, rtol=0)
        torch.testing.assert_close(m.double(), average, atol=1e-6, rtol=0)


def test_the_parts_it_is_given_are_called():
    """On tensors that are views of nothing, flat ones without NorMuon, with hyperparameters as
    they are."""
    called = []

    def part(fn):
        def wrapped(*args):
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            called.append((fn.__name__, max(x.dim() for x in tensors)))
            assert all(x._base is None for x in tensors)
            return fn(*args)

        return wrapped

    def orthogonalise(G):
        called.append(tuple(G.shape))
        return polar_express(G)

    parts = {fn.__name__: part(fn) for fn in (nesterov, balance, descend)}
    parts["orthogonalise"] = orthogonalise
    plain = [("nesterov", 1), (2, 8, 4), ("descend", 1)]
    normed = [("nesterov", 1), (2, 8, 4), ("balance", 3), ("descend", 3)]
    for normuon, expected in ((False, plain), (True, normed)):
        called.clear()
        results = []
        for kwargs in ({}, parts):
            p, companion = start_at(KINDS[1], draw(2, 8, 4))
            m = torch.zeros(2, 8, 4, device=DEVICE)
            v = new_second_moment(p) if normuon else None
            grad = draw(2, 8, 4, seed=1).bfloat16()
            for number in (float, torch.tensor):
                lr, momentum, beta2, shrink = map(number, (0.1, 0.9, 0.9, 0.01))
                muon_update(p, companion, grad, m, lr, momentum, v, beta2, shrink, **kwargs)
            results.append([x for x in (join(p, companion), m, v) if x is not None])
        assert called == expected * 2
        assert all(map(torch.equal, *results))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_keep_their_values(kind):
    for n in (0, 5):
        p, companion = start_at(kind, draw(n))
        grad = draw(n, seed=1).to(p.dtype)
        before = grad.clone()
        look_ahead = nesterov(grad, draw(n), 0.9)
        descend(p, companion, look_ahead, 0.1)
        assert torch.equal(grad, before)
        assert look_ahead.dtype == grad.dtype


@pytest.mark.parametrize("kind", KINDS)
def test_no_matrices_are_no_problem(kind):
    p, companion = start_at(kind, draw(0, 4, 8))
    v = new_second_moment(p)
    grad = draw(0, 4, 8).to(p.dtype)
    muon_update(p, companion, grad, draw(0, 4, 8), 0.1, 0.9, v, 0.9, 0.0, flag(True))
    assert v.shape == (0, 1, 8)


def plain_muon(p, companion, grad, m, lr, momentum):
    """In fp32, an operation at a time."""
    g = grad.float()
    m.mul_(momentum).add_((1 - momentum) * g)
    ahead = ((1 - momentum) * g + momentum * m).to(grad.dtype)
    step = polar_express(ahead).float()
    tall = max(1, grad.size(-2) / grad.size(-1)) ** 0.5
    store(p, companion, join(p, companion) - lr * tall * step)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_off_changes_no_bit(kind):
    """Without v, either with no decay or one of 0, and with a guard that is True."""

    def five_steps(update, **kwargs):
        p, companion = start_at(kind, draw(3, 8, 6))
        m = torch.zeros(3, 8, 6, device=DEVICE)
        for i in range(5):
            update(p, companion, draw(3, 8, 6, seed=i).to(p.dtype), m, 0.1, 0.9, **kwargs)
        return bits(join(p, companion)), bits(m)

    expected = five_steps(plain_muon)
    for ok in (None, True, flag(True)):
        for shrink in (None, 0.0):
            assert all(map(torch.equal, expected, five_steps(muon_update, shrink=shrink, ok=ok)))


# --- The rule


def orthogonalised(G):
    """The five polynomials on one float64 matrix, straight from their definition, without a
    transpose."""
    X = G / (1.02 * (G * G).sum().sqrt())
    for a, b, c in COEFFICIENTS:
        X = a * X + b * X @ X.T @ X + c * X @ X.T @ X @ X.T @ X
    return X


def muon_reference(
    start, grads, lrs, momenta, decay, normuon, factors=(1,), by_shape=False, rows_of=()
):
    """Muon on a bank in float64, matrix by matrix.

    factors: of lr and decay, in turn; by_shape: decay grows as the step of a tall matrix does;
    rows_of: by place, lists of rows that are a matrix each, or None.
    """
    result = []
    for i, w in enumerate(start.double()):
        rows, cols = w.shape
        average = torch.zeros_like(w)
        tall = max(1, rows / cols) ** 0.5
        factor = factors[i % len(factors)]
        pieces = rows_of[i % len(rows_of)] if rows_of else None
        pieces = pieces or [list(range(rows))]
        v = [0] * len(pieces)
        for grad, lr, beta in zip(grads, lrs, momenta):
            g = grad[i].double()
            average = beta * average + (1 - beta) * g
            ahead = beta * average + (1 - beta) * g
            update = torch.zeros_like(w)
            scaled = torch.zeros_like(w)
            for k, piece in enumerate(pieces):
                update[piece] = scaled[piece] = orthogonalised(ahead[piece])
                if normuon:
                    scaled[piece], v[k] = normalised(update[piece], v[k], 0.9)
            shrink = lr**2 * decay * factor * (tall if by_shape else 1) * (update * w >= 0)
            w = (1 - shrink) * w - lr * tall * factor * scaled
        result.append(w)
    return torch.stack(result)


@pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])
@pytest.mark.parametrize(
    "shape", [(3, 8, 8), (4, 12, 3), (2, 5, 20), (1, 1, 7), (1, 6, 2)], ids=str
)
def test_the_rule_is_a_loop_over_matrices(shape, normuon):
    """With its learning rate, decay and second beta, and the schedule's momentum."""
    lrs = [0.1, 0.1, 0.05, 0.02, 0.0, 0.07]
    momenta = [0.85, 0.9, 0.95, 0.95, 0.9, 0.0]
    start = draw(*shape, seed=1).cpu()
    grads = [draw(*shape, seed=10 + k).cpu() for k in range(6)]
    model, optimizer = single(Muon(0.1, weight_decay=10.0, normuon=normuon), start)
    for k, grad in enumerate(grads):
        model.w.grad = grad.clone()
        optimizer.step(lrs[k] / 0.1, momenta[k])
        expected = muon_reference(start, grads[: k + 1], lrs, momenta, 10.0, normuon)
        torch.testing.assert_close(model.w.detach().double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("normuon", [False, True], ids=["muon", "normuon"])
@pytest.mark.parametrize(
    "fields, reference",
    [
        (dict(factors=(1.0, 2.0)), dict(factors=(1, 2))),
        (dict(decay_by_shape=True), dict(by_shape=True)),
        (
            dict(factors=(0.5, 1.0, 3.0), decay_by_shape=True),
            dict(factors=(0.5, 1, 3), by_shape=True),
        ),
        # Six heads of 2: heads 0 and 3, 1 and 4, 2 and 5
        (
            dict(paired=(True, False), heads=6),
            dict(rows_of=[[[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]], None]),
        ),
        (
            dict(paired=(True, True, False), heads=2, factors=(1.0, 2.0)),
            dict(rows_of=[[list(range(12))], [list(range(12))], None], factors=(1, 2)),
        ),
        # All matrices are paired
        (
            dict(paired=(True,), heads=4),
            dict(rows_of=[[[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]]),
        ),
    ],
    ids=["factors", "shape", "both", "pairs", "one pair", "all pairs"],
)
def test_patterns_of_a_bank(fields, reference, normuon):
    """Learning rates and decay by place and by shape, and pairs of heads that are matrices of
    their own, with NorMuon's moments of their own."""
    lrs = [0.1, 0.05, 0.07, 0.02]
    momenta = [0.85, 0.9, 0.95, 0.0]
    start = draw(5, 12, 5, seed=1).cpu()
    grads = [draw(5, 12, 5, seed=10 + k).cpu() for k in range(4)]
    rule = Muon(0.1, weight_decay=10.0, normuon=normuon, **fields)
    model, optimizer = single(rule, start)
    for k, grad in enumerate(grads):
        model.w.grad = grad.clone()
        optimizer.step(lrs[k] / 0.1, momenta[k])
        expected = muon_reference(start, grads[: k + 1], lrs, momenta, 10.0, normuon, **reference)
        torch.testing.assert_close(model.w.detach().double(), expected, atol=1e-4, rtol=0)


def test_pairs_of_heads_and_back():
    """Heads h and h + H / 2 together; nothing is lost on the way back."""
    x = torch.arange(2 * 12 * 3).view(2, 12, 3)
    pairs = head_pairs(x, 6)
    assert torch.equal(pairs[1, 2], x[1, [4, 5, 10, 11]])
    assert torch.equal(whole_matrices(pairs), x)


def test_decay_is_decoupled_and_times_the_squared_learning_rate():
    """A weight whose step goes towards zero shrinks by 1 - lr^2 decay besides; without a
    gradient nothing happens."""
    start = torch.ones(2, 3, 3)
    grad = torch.diag(torch.tensor([1.0, 2.0, -1.0])).expand(2, 3, 3)
    ends = []
    for decay in (0.0, 5.0):
        model, optimizer = single(Muon(0.2, weight_decay=decay), start)
        model.w.grad = torch.zeros(2, 3, 3)
        optimizer.step(0.5, 0.9)
        assert torch.equal(model.w, start)
        model.w.grad = grad.clone()
        optimizer.step(0.5, 0.9)
        ends.append(model.w.detach())
    shrunk = 0.1**2 * 5 * torch.diag(torch.tensor([1.0, 1.0, 0.0])).expand(2, 3, 3)
    torch.testing.assert_close(ends[0] - ends[1], shrunk, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rows, cols, factor", [(4, 4, 1), (4, 16, 1), (16, 4, 2), (36, 4, 3)])
def test_the_update_has_the_spectral_norm_of_its_shape(rows, cols, factor):
    """All singular values near lr sqrt(max(1, rows / cols)), whatever the gradient's size."""
    model, optimizer = single(Muon(1.0), torch.zeros(1, rows, cols))
    model.w.grad = 100 * draw(1, rows, cols).cpu()
    optimizer.step(0.01, 0.9)
    found = torch.linalg.svdvals(model.w.detach()) / (0.01 * factor)
    assert 0.85 < found.min()
    assert found.max() < 1.15


@pytest.mark.parametrize("momentum, moves", [(0.9, True), (0.0, False)])
def test_momentum_remembers(momentum, moves):
    """After one gradient and then zeros the step keeps its direction; with momentum 0 it ends."""
    model, optimizer = single(Muon(0.1), torch.zeros(1, 4, 4))
    model.w.grad = torch.eye(4)[None]
    optimizer.step(1.0, momentum)
    first = model.w.detach().clone()
    model.w.grad = torch.zeros(1, 4, 4)
    optimizer.step(1.0, momentum)
    expected = 2 * first if moves else first
    torch.testing.assert_close(model.w.detach(), expected, atol=1e-4, rtol=0)


# --- NorMuon's scale


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((3, 12, 4), (3, 12, 1)),
        ((3, 4, 12), (3, 1, 12)),
        ((4, 4), (4, 1)),
        ((1, 5), (1, 5)),
        ((2, 3, 5, 1), (2, 3, 5, 1)),
    ],
)
def test_the_second_moment_is_along_the_longer_side(shape, expected):
    v = new_second_moment(draw(*shape, dtype=torch.bfloat16))
    assert v.shape == expected
    assert v.dtype == torch.float32
    assert not v.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_balance_evens_the_longer_side_and_keeps_the_norm(shape, dtype):
    """The first step makes all rows (of a wide matrix columns) alike; every later one keeps each
    matrix's norm."""
    v = new_second_moment(draw(*shape))
    uneven = draw(*v.shape, seed=1).exp()  # rows or columns of very different length
    for i in range(5):
        update = (draw(*shape, seed=2 + i) * uneven).to(dtype)
        scaled = update.double() * balance(update, v, 0.9).double()
        norm = update.double().norm(dim=(-2, -1))
        torch.testing.assert_close(scaled.norm(dim=(-2, -1)), norm, rtol=1e-5, atol=0)
        if i == 0:
            lengths = scaled.norm(dim=-1 if v.size(-1) == 1 else -2)
            alike = lengths.mean(-1, keepdim=True).expand_as(lengths)
            torch.testing.assert_close(lengths, alike, rtol=1e-5, atol=0)


def test_each_matrix_has_its_own_norm_and_moment():
    """A batch gives what its matrices give alone: no number is shared between layers."""
    update = draw(3, 8, 4) * torch.tensor([1e-2, 1.0, 1e2], device=DEVICE).view(3, 1, 1)
    v = draw(3, 8, 1, seed=1).square()
    alone = [u.clone() for u in v]
    together = balance(update, v, 0.9)
    for i, u in enumerate(alone):
        torch.testing.assert_close(balance(update[i], u, 0.9), together[i], rtol=1e-6, atol=0)
        torch.testing.assert_close(u, v[i], rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("factor", [2.0**-8, 2.0**9])
def test_normuon_does_not_feel_the_gradients_scale(shape, factor):
    """What it would do with a loss in other units; nor balance the update's, as long as v is in
    the same."""
    found = []
    for scale in (1.0, factor):
        p = draw(*shape)
        m = torch.zeros(shape, device=DEVICE)
        v = new_second_moment(p)
        for i in range(3):
            grad = draw(*shape, seed=10 + i, scale=1e4) * scale
            muon_update(p, None, grad, m, 0.1, 0.9, v, 0.9, 0.01)
        found.append(p)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)

    update = draw(*shape)
    v = new_second_moment(update) + 1.0
    scaled = v * factor**2
    expected = balance(update, v, 0.9)
    torch.testing.assert_close(expected, balance(update * factor, scaled, 0.9), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(4, 12, 3), (4, 3, 12), (4, 5, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_matrices_of_padding_stay_zero(kind, shape):
    """And change nothing for the others; so do rows and columns that get no gradient, and there
    is no NaN."""
    start = draw(*shape)
    start[2:] = 0
    grads = [draw(*shape, seed=1 + i) for i in range(4)]
    for g in grads:
        g[2:] = 0
        g[1, 0] = 0
        g[1, :, 0] = 0
    found = []
    for n in (4, 2):
        p, companion = start_at(kind, start[:n])
        m = torch.zeros_like(start[:n])
        v = new_second_moment(p)
        for g in grads:
            muon_update(p, companion, g[:n].to(p.dtype), m, 0.1, 0.9, v, 0.9, 0.01)
        for x in (p, m, v):
            assert x[2:].count_nonzero() == 0
        assert join(p, companion).isfinite().all()
        assert v.isfinite().all()
        found.append([x[:2] for x in (join(p, companion), v)])
    atol = 2e-3 if "bf16" in kind else 1e-6
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=atol)
