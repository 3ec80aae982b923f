"""kernels/updates.py: masters bit for bit, Adam, Muon and NorMuon against float64, the guard,
compiled as eager."""

import functools
import shutil

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from kernel_checks import DEVICE, draw

from kernels.polar_express import polar_express
from optim.updates import (
    adam_update,
    balance,
    descend,
    gradient_report,
    join,
    muon_update,
    nesterov,
    new_companion,
    new_second_moment,
    row_scale,
    row_update,
    split,
    store,
)

KINDS = ["fp32", "bf16 and 16 bits", "bf16 and a whole master"]


def weights(kind, start):
    """(p, companion) of weights that start at these fp32 numbers, rounded to bf16 if they are
    bf16."""
    if kind == "fp32":
        return start.clone(), None
    p = start.bfloat16()
    return p, p.float() if "whole" in kind else torch.zeros_like(p, dtype=torch.int16)


def bits(x):
    """As integers: equal only where every bit is."""
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


def flag(value):
    return torch.tensor(value, device=DEVICE)


def from_bits(patterns):
    return torch.tensor(patterns, dtype=torch.int32, device=DEVICE).view(torch.float32)


# --- p and the 16 bits


def check_split(x):
    p, low = split(x)
    assert p.dtype == torch.bfloat16 and low.dtype == torch.int16
    nan = x.isnan()
    assert torch.equal(p.isnan(), nan) and join(p, low)[nan].isnan().all()
    x, p, low = x[~nan], p[~nan], low[~nan]
    assert torch.equal(bits(join(p, low)), bits(x))
    halfway = bits(x) & 0xFFFF == 0x8000
    assert torch.equal(
        p.view(torch.int16)[~halfway], x.bfloat16().view(torch.int16)[~halfway]
    )  # the nearest
    away = ((bits(x)[halfway] >> 16) + 1).to(torch.int16)  # the next one up in magnitude
    assert torch.equal(p.view(torch.int16)[halfway], away) and (low[halfway] == -(2**15)).all()


def test_every_upper_half_with_every_kind_of_lower_half():
    """All signs, exponents and leading bits, so zeros, subnormals, infinities and NaN too."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=DEVICE)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32, device=DEVICE)
    check_split((upper | lower).flatten().view(torch.float32))


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=200))
def test_any_bits(patterns):
    check_split(from_bits(patterns))


@pytest.mark.parametrize(
    "pattern, p, low",
    [
        (0x3F800000, 1.0, 0),
        (0x3F800001, 1.0, 1),
        (0x3F80FFFF, 1.0078125, -1),
        (-(2**31), -0.0, 0),
        (1, 0.0, 1),
        (0x7F7FFFFF, float("inf"), -1),  # the largest fp32, beyond the largest bf16
        (0x7F7F7FFF, float.fromhex("0x1.fep127"), 2**15 - 1),
        (0x7F800000, float("inf"), 0),
        (-0x800000, -float("inf"), 0),
    ],
)
def test_values_by_hand(pattern, p, low):
    high, rest = split(from_bits([pattern]))
    assert high.item() == p and str(high.item())[0] == str(p)[0] and rest.item() == low


@pytest.mark.parametrize("pattern", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0x7F807FFF, -1, -0x7FFFFF])
def test_nan_is_seen_in_the_weight(pattern):
    """0x7FFFFFFF is what CUDA makes: rounded up it would be -0; 0x7F800001, rounded down,
    infinity."""
    p, low = split(from_bits([pattern]))
    assert p.isnan().all() and join(p, low).isnan().all()


def test_a_nan_update_reaches_the_weight():
    for kind in KINDS:
        p, companion = weights(kind, torch.ones(4, device=DEVICE))
        update = torch.tensor([0.0, float("nan"), 1.0, 0.0], device=DEVICE)
        descend(p, companion, update, 0.1)
        assert (
            p.isnan().tolist() == join(p, companion).isnan().tolist() == [False, True, False, False]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_join_gives_what_was_stored(kind):
    p, companion = weights(kind, draw(100))
    master = draw(100, seed=1)
    store(p, companion, master)
    assert torch.equal(join(p, companion), master) and torch.equal(p, master.to(p.dtype))


def test_new_companions():
    """Fresh weights are their own masters; fp32 ones need nothing."""
    assert new_companion(draw(5)) is None
    for dtype in (torch.bfloat16, torch.float16):
        p = draw(3, 5, dtype=dtype)
        companion = new_companion(p)
        assert companion.shape == p.shape and companion.data_ptr() != p.data_ptr()
        assert torch.equal(join(p, companion), p.float())
    dtype = torch.int16 if DEVICE.type == "cuda" else torch.float32
    assert new_companion(draw(5, dtype=torch.bfloat16)).dtype == dtype


# --- updates


def adam_loop(p, companion, grads, lrs, betas, eps, update=adam_update, number=float, **kwargs):
    m, v = (torch.zeros_like(p, dtype=torch.float32) for _ in range(2))
    for step, (grad, lr) in enumerate(zip(grads, lrs), start=1):
        update(
            p,
            companion,
            grad,
            m,
            v,
            *map(number, (lr, *betas, eps, *(1 - b**step for b in betas))),
            **kwargs,
        )
    return m, v


def adam_reference(w, grads, lrs, betas, eps, shrink=0.0):
    """In float64, from the papers."""
    w, m, v = w.double(), 0, 0
    for t, (g, lr) in enumerate(zip(grads, lrs), start=1):
        m, v = (
            b * s + (1 - b) * x for b, s, x in zip(betas, (m, v), (g.double(), g.double() ** 2))
        )
        step = lr * m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
        w = w - step - shrink * w * (step * w > 0)
    return w


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "betas, eps, shrink",
    [((0.9, 0.99), 1e-8, 0.0), ((0.75, 0.95), 1e-10, 0.01), ((0.0, 0.9), 1e-2, 0.0)],
)
def test_adam_is_float64s_adam(kind, betas, eps, shrink):
    """200 steps with changing learning rates and gradients of very different size."""
    p, companion = weights(kind, draw(300))
    grads = [draw(300, seed=i, scale=10.0 ** (i % 5 - 3)).to(p.dtype) for i in range(200)]
    lrs = [0.01 * (1 - i / 250) for i in range(200)]
    expected = adam_reference(join(p, companion), grads, lrs, betas, eps, shrink)
    adam_loop(p, companion, grads, lrs, betas, eps, shrink=shrink or None)
    torch.testing.assert_close(join(p, companion).double(), expected, atol=2e-5, rtol=0)
    assert torch.equal(p, join(p, companion).to(p.dtype))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps, shrink", [(1e-10, 0.0), (1e-10, 0.01), (1e-2, 0.01)])
def test_row_moments_are_float64s(kind, eps, shrink):
    """A row's step is its gradient over the root of the average of its mean square."""
    R, C, beta = 40, 24, 0.9
    p, companion = weights(kind, draw(R, C))
    w, v, mean_square = join(p, companion).double(), torch.zeros(R, 1, device=DEVICE), 0
    for t in range(1, 101):
        grad, lr = draw(R, C, seed=t, scale=10.0 ** (t % 5 - 3)).to(p.dtype), 0.01 * (1 - t / 125)
        row_update(p, companion, grad, v, lr, beta, eps, 1 - beta**t, shrink or None)
        g = grad.double()
        mean_square = beta * mean_square + (1 - beta) * (g * g).mean(1, keepdim=True)
        step = lr * g / ((mean_square / (1 - beta**t)).sqrt() + eps)
        w = w - step - shrink * w * (step * w > 0)
    torch.testing.assert_close(join(p, companion).double(), w, atol=2e-5, rtol=0)
    torch.testing.assert_close(v.double(), mean_square, atol=0, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_gradient_keep_every_bit(kind):
    """However often and late they had one: there is no momentum. Adam's flat tensors go on
    moving."""
    p, companion = weights(kind, draw(30, 8))
    v, used = torch.zeros(30, 1, device=DEVICE), torch.arange(30, device=DEVICE) % 3 == 0
    for t in range(1, 6):
        before = join(p, companion).clone()
        grad = draw(30, 8, seed=t).to(p.dtype) * (used[:, None] if t > 1 else 1)
        row_update(p, companion, grad, v, 0.1, 0.9, 1e-10, 1 - 0.9**t, 0.1)
        same = (join(p, companion) == before).all(1)
        assert same.tolist() == ((~used).tolist() if t > 1 else [False] * 30)
    assert (v > 0).all()


def test_no_rows_and_one_column():
    """A rank may have no row of a table. One column is Adam without momentum."""
    cols = 1
    for rows in (0, 5):
        p, v = draw(rows, cols), torch.zeros(rows, 1, device=DEVICE)
        flat = [draw(rows, cols).view(-1), *torch.zeros(2, rows * cols, device=DEVICE)]
        row_update(p, None, draw(rows, cols, seed=1), v, 0.1, 0.9, 1e-10, 0.1)
        adam_update(
            flat[0],
            None,
            draw(rows, cols, seed=1).view(-1),
            *flat[1:],
            0.1,
            0.0,
            0.9,
            1e-10,
            1.0,
            0.1,
        )
        torch.testing.assert_close(p.view(-1), flat[0])


def test_adam_is_torchs_adam():
    ours, theirs = draw(300), torch.nn.Parameter(draw(300))
    torchs = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    grads = [draw(300, seed=i) for i in range(50)]
    for g in grads:
        theirs.grad = g
        torchs.step()
    adam_loop(ours, None, grads, [0.01] * 50, (0.9, 0.99), 1e-8)
    torch.testing.assert_close(ours, theirs.detach(), atol=1e-6, rtol=1e-6)


def test_all_kinds_have_the_same_masters():
    """Bit for bit, with everything on: 16 bits beside a bf16 weight are as good as fp32 weights.
    100 steps of each, of which the guard drops some."""
    start = draw(6, 5, 8).bfloat16().float()
    grads = [draw(6, 5, 8, seed=i).bfloat16() for i in range(100)]
    found = []
    for kind in KINDS:
        p, companion = weights(kind, start)
        m, v = torch.zeros_like(start), new_second_moment(p)
        flat = p.view(-1), None if companion is None else companion.view(-1)
        adam_loop(*flat, [g.view(-1) for g in grads], [0.01] * 100, (0.9, 0.99), 1e-8, shrink=0.001)
        for i, g in enumerate(grads):
            muon_update(p, companion, g, m, 0.02, 0.9, shrink=0.001)
            muon_update(p, companion, g, m, 0.02, 0.9, v, shrink=0.001, ok=flag(i % 7 != 3))
            master = join(p, companion)
            assert (
                (p.float() - master).abs() <= (master.to(p.dtype).float() - master).abs()
            ).all()  # the nearest
        found.append(master)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_updates_too_small_for_bf16(kind):
    """At 1.0 bf16 cannot take off 1e-5; the master loses nothing, and the weight follows it."""
    p, companion = weights(kind, torch.ones(64, device=DEVICE))
    master = torch.ones(64, device=DEVICE)
    update = torch.linspace(0.5, 1.0, 64, device=DEVICE).to(p.dtype)
    for _ in range(1000):
        descend(p, companion, update, 1e-5, 1e-6)
        master = master * (1 - 1e-6) - 1e-5 * update.float()
    assert torch.equal(join(p, companion), master) and torch.equal(p, master.to(p.dtype))
    assert (master < 0.995).all() and torch.ones(1).bfloat16() - 1e-5 == 1


@pytest.mark.parametrize("shape", [(3, 8, 8), (4, 12, 3), (2, 5, 20), (1, 1, 7), (6, 2)], ids=str)
def test_muon_is_float64s_muon(shape):
    """Momentum with Nesterov's look ahead, polar factor, sqrt(rows / cols) for tall ones,
    cautious decoupled decay."""
    p, m = draw(*shape), torch.zeros(shape, device=DEVICE)
    w, average = p.double(), 0
    for i, (lr, decay, beta) in enumerate(
        [(0.1, 0.3, 0.85), (0.1, 0.0, 0.9), (0.02, 0.3, 0.95), (0.0, 1.0, 0.0)] * 3
    ):
        g = draw(*shape, seed=10 + i)
        muon_update(p, None, g, m, lr, beta, shrink=lr * decay)
        average = beta * average + (1 - beta) * g.double()
        step = polar_express(beta * average + (1 - beta) * g.double())
        w = w - lr * decay * w * (step * w > 0) - lr * max(1, shape[-2] / shape[-1]) ** 0.5 * step
        torch.testing.assert_close(p.double(), w, atol=1e-4, rtol=0)
        torch.testing.assert_close(m.double(), average, atol=1e-6, rtol=0)


def test_muon_update_calls_the_parts_it_is_given():
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

    parts = dict(orthogonalise=orthogonalise) | {
        f.__name__: part(f) for f in (nesterov, balance, descend)
    }
    for normed in (False, True):
        called.clear()
        results = []
        for kwargs in ({}, parts):
            p, companion = weights(KINDS[1], draw(2, 8, 4))
            m, v = torch.zeros(2, 8, 4, device=DEVICE), new_second_moment(p) if normed else None
            for number in (float, torch.tensor):
                lr, momentum, beta2, shrink = map(number, (0.1, 0.9, 0.9, 0.01))
                muon_update(
                    p,
                    companion,
                    draw(2, 8, 4, seed=1).bfloat16(),
                    m,
                    lr,
                    momentum,
                    v,
                    beta2,
                    shrink,
                    **kwargs,
                )
            results += [join(p, companion), m, v]
        nor = [("nesterov", 1), (2, 8, 4), ("balance", 3), ("descend", 3)]
        assert called == (nor if normed else [("nesterov", 1), (2, 8, 4), ("descend", 1)]) * 2
        assert all(a is b or torch.equal(a, b) for a, b in zip(results[:3], results[3:]))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_keep_their_values_and_empty_shards_are_no_problem(kind):
    for n in (0, 5):
        p, companion = weights(kind, draw(n))
        grad = draw(n, seed=1).to(p.dtype)
        before = grad.clone()
        adam_loop(p, companion, [grad], [0.1], (0.9, 0.99), 1e-8)
        look_ahead = nesterov(grad, draw(n), 0.9)
        descend(p, companion, look_ahead, 0.1)
        assert torch.equal(grad, before) and look_ahead.dtype == grad.dtype


def test_no_matrices_are_no_problem():
    for kind in KINDS:
        p, companion = weights(kind, draw(0, 4, 8))
        v = new_second_moment(p)
        muon_update(
            p,
            companion,
            draw(0, 4, 8).to(p.dtype),
            draw(0, 4, 8),
            0.1,
            0.9,
            v,
            0.9,
            0.0,
            flag(True),
        )
        assert v.shape == (0, 1, 8)


# --- switched off


def as_before(p, companion, grad, m, lr, momentum):
    """Plain Muon in fp32, an operation at a time."""
    g = grad.float()
    m.mul_(momentum).add_((1 - momentum) * g)
    ahead = ((1 - momentum) * g + momentum * m).to(grad.dtype)
    step = polar_express(ahead).float()
    tall = max(1, grad.size(-2) / grad.size(-1)) ** 0.5
    store(p, companion, join(p, companion) - lr * tall * step)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_off_changes_no_bit(kind):
    """Muon without v, either with no decay or one of 0, and with a guard that is True."""

    def muon(update, **kwargs):
        p, companion = weights(kind, draw(3, 8, 6))
        m = torch.zeros(3, 8, 6, device=DEVICE)
        for i in range(5):
            update(p, companion, draw(3, 8, 6, seed=i).to(p.dtype), m, 0.1, 0.9, **kwargs)
        return bits(join(p, companion)), bits(m)

    def adam(**kwargs):
        p, companion = weights(kind, draw(50))
        state = adam_loop(
            p,
            companion,
            [draw(50, seed=i).to(p.dtype) for i in range(5)],
            [0.1] * 5,
            (0.9, 0.99),
            1e-8,
            **kwargs,
        )
        return [bits(x) for x in (join(p, companion), *state)]

    for ok in (None, True, flag(True)):
        for shrink in (None, 0.0):
            assert all(map(torch.equal, muon(as_before), muon(muon_update, shrink=shrink, ok=ok)))
        assert all(map(torch.equal, adam(), adam(shrink=0.0, ok=ok)))


# --- NorMuon


def normalised(step, v, beta2):
    """NorMuon's step and second moment for one matrix in float64, from the paper, but along the
    longer side."""
    rows, cols = step.shape
    dim = 1 if rows >= cols else 0
    v = beta2 * v + (1 - beta2) * (step**2).mean(dim, keepdim=True)
    scaled = step / v.sqrt()
    return scaled * (step.norm() / scaled.norm()), v


SHAPES = [(3, 8, 8), (4, 12, 3), (2, 5, 20), (1, 1, 7), (2, 7, 1), (6, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normuon_is_float64s_normuon(shape):
    p, m = draw(*shape), torch.zeros(shape, device=DEVICE)
    v = new_second_moment(p)
    w, average, v64 = p.double(), 0, v.double()
    steps = [(0.1, 0.3, 0.85, 0.9), (0.02, 0.3, 0.9, 0.95), (0.1, 0.0, 0.0, 0.5)] * 4
    for i, (lr, decay, beta, beta2) in enumerate(steps):
        g = draw(*shape, seed=10 + i)
        muon_update(p, None, g, m, lr, beta, v, beta2, lr * decay)
        average = beta * average + (1 - beta) * g.double()
        step = polar_express(beta * average + (1 - beta) * g.double())
        pairs = [
            normalised(s, u, beta2)
            for s, u in zip(step.view(-1, *shape[-2:]), v64.view(-1, *v.shape[-2:]))
        ]
        step, v64 = (torch.stack(x).view(like.shape) for x, like in zip(zip(*pairs), (step, v64)))
        w = w - lr * max(1, shape[-2] / shape[-1]) ** 0.5 * step - lr * decay * w * (step * w > 0)
        torch.testing.assert_close(p.double(), w, atol=2e-4, rtol=0)
        torch.testing.assert_close(v.double(), v64, atol=1e-6, rtol=1e-4)


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
    assert v.shape == expected and v.dtype == torch.float32 and not v.any()


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
        torch.testing.assert_close(
            scaled.norm(dim=(-2, -1)), update.double().norm(dim=(-2, -1)), rtol=1e-5, atol=0
        )
        if i == 0:
            lengths = scaled.norm(dim=-1 if v.size(-1) == 1 else -2)
            torch.testing.assert_close(
                lengths, lengths.mean(-1, keepdim=True).expand_as(lengths), rtol=1e-5, atol=0
            )


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
        p, m = draw(*shape), torch.zeros(shape, device=DEVICE)
        v = new_second_moment(p)
        for i in range(3):
            muon_update(
                p, None, draw(*shape, seed=10 + i, scale=1e4) * scale, m, 0.1, 0.9, v, 0.9, 0.01
            )
        found.append(p)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)
    update, v = draw(*shape), new_second_moment(draw(*shape)) + 1.0
    scaled = v * factor**2
    torch.testing.assert_close(
        balance(update, v, 0.9), balance(update * factor, scaled, 0.9), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("shape", [(4, 12, 3), (4, 3, 12), (4, 5, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_matrices_of_padding_stay_zero(kind, shape):
    """And change nothing for the others; so do rows and columns that get no gradient, and there
    is no NaN."""
    start, grads = draw(*shape), [draw(*shape, seed=1 + i) for i in range(4)]
    start[2:] = 0
    for g in grads:
        g[2:] = 0
        g[1, 0] = g[1, :, 0] = 0
    found = []
    for n in (4, 2):
        p, companion = weights(kind, start[:n])
        m, v = torch.zeros_like(start[:n]), new_second_moment(p)
        for g in grads:
            muon_update(p, companion, g[:n].to(p.dtype), m, 0.1, 0.9, v, 0.9, 0.01)
        assert p[2:].count_nonzero() == m[2:].count_nonzero() == v[2:].count_nonzero() == 0
        assert join(p, companion).isfinite().all() and v.isfinite().all()
        found.append([x[:2] for x in (join(p, companion), v)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-3 if "bf16" in kind else 1e-6)


# --- cautious decay


NUMBERS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -2.0, 1e-3, -3e4]) | st.floats(
    -10, 10, width=32
).filter(lambda x: x == 0 or abs(x) > 1e-6)  # far from eps, and products that fp32 has


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=50), st.floats(0, 0.5))
def test_decay_only_where_step_and_decay_agree(pairs, shrink):
    """Each weight by itself, in float64."""
    w, u = (torch.tensor(x, device=DEVICE) for x in zip(*pairs))
    p, q = w.clone(), w.clone()
    descend(p, None, u, 0.1, shrink)
    m = u / (1 - 0.9) / 10  # with no gradient, Adam steps along the sign of its average
    adam_update(q, None, torch.zeros_like(u), m, u.square(), 0.1, 1.0, 1.0, 1e-12, 1.0, 1.0, shrink)
    for w, u, p, q in zip(w.tolist(), u.tolist(), p.tolist(), q.tolist()):
        expected = w - 0.1 * u - (shrink * w if u * w > 0 else 0)
        assert p == pytest.approx(expected, rel=1e-5, abs=1e-5)
        sign = (u > 0) - (u < 0)
        expected = w - 0.1 * sign - (shrink * w if u * w > 0 else 0)
        assert q == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_decay_where_there_is_no_step(kind):
    """Rows that no token used keep their weights."""
    for update in (adam_update, descend):
        p, companion = weights(kind, draw(20))
        before, zero = join(p, companion).clone(), torch.zeros_like(p)
        if update is descend:
            descend(p, companion, zero, 0.1, 0.5)
        else:
            adam_loop(p, companion, [zero], [0.1], (0.9, 0.99), 1e-8, shrink=0.5)
        assert torch.equal(join(p, companion), before)


# --- the guard


BAD = [float("nan"), float("inf"), -float("inf")]


def guarded_calls(kind, parts, number, bad, where, ok):
    """Every update once, with a `bad` entry in the gradient `where`; states have signed zeros,
    subnormals and numbers that bf16 lacks. Returns (name, what it may write before, and after)
    of each."""

    def special(x, *values):
        x.view(-1)[: 4 + len(values)] = torch.tensor(
            [-0.0, 0.0, 1e-42, -1e-42, *values], device=DEVICE
        )
        return x

    calls, muons = [], {f.__name__: parts[f] for f in (nesterov, balance, descend) if parts}
    rowwise = {f.__name__: parts[f] for f in (row_scale, descend) if parts}
    for shape in ((40,), (2, 5, 4), (2, 4, 5)):

        def call(name, fn, *written, args):
            before = [x.clone() for x in written if x is not None]
            fn(*args)
            calls.append((name, before, [x for x in written if x is not None]))

        def fresh():
            p, companion = weights(kind, torch.zeros(shape, device=DEVICE))
            store(p, companion, special(draw(*shape, seed=5), 3.3e38))
            return p, companion

        p, c = fresh()
        g = draw(*shape, seed=6).to(p.dtype)
        g.view(-1)[where] = bad
        m, v = special(draw(*shape, seed=7)), draw(*shape, seed=8).square()
        if len(shape) == 1:
            scalars = map(number, (0.1, 0.9, 0.99, 1e-8, 0.1, 0.01, 0.01))
            call(
                "adam_update",
                parts.get(adam_update, adam_update),
                p,
                c,
                m,
                v,
                args=(p, c, g, m, v, *scalars, ok),
            )
            p, c = fresh()
            call(
                "descend",
                parts.get(descend, descend),
                p,
                c,
                args=(p, c, g, number(0.1), number(0.01), None, ok),
            )
            call("nesterov", parts.get(nesterov, nesterov), m, args=(g, m, number(0.9), ok))
        else:
            by_row = draw(10, 1, seed=8).square()
            rows = [x if x is None else x.view(10, -1) for x in (p, c)]
            if shape == (2, 5, 4):
                call(
                    "row_update",
                    functools.partial(row_update, **rowwise),
                    *rows,
                    by_row,
                    args=(
                        *rows,
                        g.view(10, -1),
                        by_row,
                        *map(number, (0.1, 0.99, 1e-8, 0.01, 0.01)),
                        ok,
                    ),
                )
                p, c = fresh()
            v = new_second_moment(p) + 1e-3
            call(
                f"muon_update {shape}",
                functools.partial(muon_update, **muons),
                p,
                c,
                m,
                v,
                args=(p, c, g, m, number(0.1), number(0.9), v, number(0.9), number(0.01), ok),
            )
    return calls


def check_guard(kind, parts, number):
    for bad in BAD:
        for where in (0, 17, -1, slice(None)):
            for name, before, after in guarded_calls(kind, parts, number, bad, where, flag(False)):
                assert all(torch.equal(bits(b), bits(a)) for b, a in zip(before, after)), (
                    name,
                    bad,
                    where,
                )
    plain, guarded = (guarded_calls(kind, parts, number, 0.5, 0, ok) for ok in (None, flag(True)))
    for (name, before, a), (*_, b) in zip(plain, guarded):
        assert all(map(torch.equal, map(bits, a), map(bits, b))), name
        assert not all(map(torch.equal, map(bits, before), map(bits, a))), name
    for name, before, after in guarded_calls(
        kind, parts, number, BAD[0], 0, None
    ):  # nobody stops these
        assert any(x.isnan().any() for x in after), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_ok_never_happened(kind):
    """No bit changes, whatever is in the gradient, and True is no guard."""
    check_guard(kind, {}, float)


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_after_a_dropped_step(kind):
    """With bad batches in between, and a guard from the gradients themselves, all ends as
    without them."""
    found = []
    for bad in (False, True):
        p, companion = weights(kind, draw(2, 6, 4))
        m, v = torch.zeros(2, 6, 4, device=DEVICE), new_second_moment(p)
        for i in range(6):
            grads = [draw(2, 6, 4, seed=i)]
            if bad:
                grads.insert(0, torch.where(draw(2, 6, 4, seed=50 + i) > 1, BAD[i % 3], grads[0]))
            for g in grads:
                ok = gradient_report([g]).sum().isfinite()
                muon_update(p, companion, g.to(p.dtype), m, 0.1, 0.9, v, 0.9, 0.01, ok)
        found.append([bits(x) for x in (p, m, v)])
    assert all(map(torch.equal, *found))


def test_on_a_gpu_scalars_on_the_cpu_and_the_guard_beside_the_weights(monkeypatch):
    """Shapes and devices only, so on any machine: nothing mixes what PyTorch will not, and
    nothing asks for a value, which fake tensors do not have."""
    from torch._subclasses import FakeTensorMode

    def copy_(self, other):  # the real one asks for a CUDA driver
        assert self.device == other.device and self.shape == other.shape
        return self

    with FakeTensorMode(), torch.no_grad():
        monkeypatch.setattr(torch.Tensor, "copy_", copy_)

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="cuda")

        scalar, ok = torch.empty(()), empty(dtype=torch.bool)
        for dtype, companion in ((torch.bfloat16, torch.int16), (torch.float32, None)):
            p, m = empty(2, 8, 4, dtype=dtype), empty(2, 8, 4)
            c = companion and empty(2, 8, 4, dtype=companion)
            flat = p.view(-1), c if c is None else c.view(-1), p.view(-1), m.view(-1)
            adam_update(*flat, m.view(-1), *[scalar] * 7, ok)
            for v in (None, empty(2, 8, 1)):
                muon_update(p, c, p, m, scalar, scalar, v, scalar, scalar, ok)
            report = gradient_report([p, m])
            assert report.shape == (2,) and report.device.type == "cuda"


# --- gradient_report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_report_is_float64s_sum_of_squares(dtype):
    shapes = [
        (),
        (1,),
        (0,),
        (3, 0),
        (1023,),
        (1024,),
        (1025,),
        (7, 300),
        (40, 1024),
        (3, 1000, 700),
    ]
    grads = [draw(*s, seed=i, scale=10.0 ** (i - 4)).to(dtype) for i, s in enumerate(shapes)]
    grads.append(draw(300, 500).to(dtype).T)  # not contiguous
    report = gradient_report(grads)
    assert report.shape == (len(grads),) and report.dtype == torch.float32
    expected = torch.stack([g.double().square().sum() for g in grads])
    torch.testing.assert_close(report.double(), expected, rtol=1e-6, atol=0)


def test_report_of_many_alike():
    """Where one running sum in fp32 would lose the small terms."""
    report = gradient_report(
        [torch.full((2**22 + 3,), 0.1, dtype=torch.bfloat16, device=DEVICE)]
    ).double()
    assert report.item() == pytest.approx((2**22 + 3) * 0.10009765625**2, rel=1e-6)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.integers(1, 3000), st.data())
def test_report_is_finite_if_and_only_if_every_entry_is(n, data):
    where, bad = data.draw(st.integers(0, n - 1)), data.draw(st.sampled_from(BAD))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    good = draw(n).to(dtype)
    spoiled = good.clone()
    spoiled[where] = bad
    assert gradient_report([good, spoiled, good]).isfinite().tolist() == [True, False, True]


def test_where_the_report_overflows():
    """As documented: from a norm of 1.8e19 on."""
    large = [
        torch.tensor([x, 0.0], dtype=torch.bfloat16, device=DEVICE)
        for x in (1.8e19, -1.8e19, 1.9e19, 3e38)
    ]
    assert gradient_report(large).isfinite().tolist() == [True, True, False, False]


# --- compiled


def number(x):
    return torch.tensor(x, dtype=torch.float32)


def compile_parts(dynamic=True):
    """Each part compiled, as the trainer does it; each says on its own when it needs more than
    one kernel."""
    from torch._inductor import metrics

    def part(fn):
        compiled = torch.compile(fn, fullgraph=True, dynamic=dynamic)

        def wrapped(*args, **kwargs):
            metrics.reset()
            with torch.no_grad():
                result = compiled(*args, **kwargs)
            # none if this graph was there already
            assert fn is balance or metrics.generated_kernel_count <= (4 if fn is row_scale else 1)
            return result

        return wrapped

    return {f: part(f) for f in (adam_update, row_scale, nesterov, balance, descend)}


@pytest.fixture(scope="module")
def compiled():
    if DEVICE.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler")
    with torch._dynamo.config.patch(recompile_limit=64):
        yield compile_parts()


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_eager_and_one_kernel(kind, compiled):
    for n in (1003, 520):
        start, grads = draw(n), [draw(n, seed=i) for i in range(4)]
        results = []
        for adam, look, down in (
            (adam_update, nesterov, descend),
            map(compiled.get, (adam_update, nesterov, descend)),
        ):
            p, companion = weights(kind, start)
            state = adam_loop(
                p,
                companion,
                [g.to(p.dtype) for g in grads],
                [0.1, 0.1, 0.05, 0.0],
                (0.9, 0.99),
                1e-8,
                adam,
                number,
                shrink=number(0.01),
                ok=None,
            )
            m = torch.zeros(n, device=DEVICE)
            ahead = look(grads[0].to(p.dtype), m, number(0.9), None)
            down(p, companion, ahead, number(0.05), number(0.01), None, None)
            results.append([join(p, companion), m, ahead, *state])
        for a, b in zip(*results):
            torch.testing.assert_close(
                a, b, atol=1e-6, rtol=1e-6 if a.dtype == torch.float32 else 1e-2
            )


@pytest.mark.parametrize(
    "kind, dynamic", [(KINDS[2], True), pytest.param(KINDS[1], False, marks=pytest.mark.slow)]
)
def test_compiled_steps_that_are_not_ok_never_happened(kind, dynamic, compiled):
    """Bit for bit, and in one kernel; sizes known, as on a GPU, or not, as on a CPU. All others
    are as eager ones."""
    parts = compiled if dynamic else compile_parts(False)
    check_guard(kind, parts, number)
    eager, ours = (guarded_calls(kind, x, number, 0.5, 0, flag(True)) for x in ({}, parts))
    for (name, _, a), (*_, b) in zip(eager, ours):
        for x, y in zip(a, b):
            torch.testing.assert_close(
                x,
                y,
                atol=1e-5,
                rtol=1e-5 if x.dtype == torch.float32 else 1e-2,
                msg=lambda m: f"{name}: {m}",
            ) if x.dtype != torch.int16 else None


def test_compiled_report_is_eager(compiled):
    grads = [draw(*s, seed=i).bfloat16() for i, s in enumerate([(3, 5), (0,), (40, 60)])]
    report = torch.compile(gradient_report, fullgraph=True)(grads)
    torch.testing.assert_close(report, gradient_report(grads), rtol=1e-5, atol=0)


def test_compiled_weights_keep_inf_and_nan(compiled):
    inf, nan = float("inf"), float("nan")
    p, low = weights(KINDS[1], torch.tensor([1.0, 3.3895e38, -1.0, 0.0] * 5, device=DEVICE))
    update = torch.tensor([nan, -1e36, inf, 0.0] * 5, device=DEVICE)
    compiled[descend](p, low, update, number(1.0), number(0.0), None, None)
    master = (
        torch.tensor([nan, 3.3895e38, -inf, 0.0] * 5, device=DEVICE).bfloat16().float() - update
    )
    master = torch.where(update.isinf(), -inf, master)
    torch.testing.assert_close(join(p, low), master, equal_nan=True, rtol=1e-6, atol=0)
    assert p[0].isnan() and p[1].isinf() and p[2] == -inf and p[3] == 0
