"""kernels/updates.py: masters bit for bit, Adam and Muon against float64 and PyTorch, compiled as eager."""

import shutil

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from kernel_checks import DEVICE, draw
from kernels.polar_express import polar_express
from kernels.updates import adam_update, descend, join, muon_update, nesterov, new_companion, split, store

KINDS = ["fp32", "bf16 and 16 bits", "bf16 and a whole master"]


def weights(kind, start):
    """(p, companion) of weights that start at these fp32 numbers, rounded to bf16 if they are bf16."""
    if kind == "fp32":
        return start.clone(), None
    p = start.bfloat16()
    return p, p.float() if "whole" in kind else torch.zeros_like(p, dtype=torch.int16)


def bits(x):
    return x.view(torch.int32)


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
    assert torch.equal(p.view(torch.int16)[~halfway], x.bfloat16().view(torch.int16)[~halfway])  # the nearest
    away = ((bits(x)[halfway] >> 16) + 1).to(torch.int16)  # the next one up in magnitude
    assert torch.equal(p.view(torch.int16)[halfway], away) and (low[halfway] == -2**15).all()


def test_every_upper_half_with_every_kind_of_lower_half():
    """All signs, exponents and leading bits, so zeros, subnormals, infinities and NaN too."""
    upper = torch.arange(-2**15, 2**15, dtype=torch.int32, device=DEVICE)[:, None] << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32, device=DEVICE)
    check_split((upper | lower).flatten().view(torch.float32))


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(st.lists(st.integers(-2**31, 2**31 - 1), min_size=1, max_size=200))
def test_any_bits(patterns):
    check_split(from_bits(patterns))


@pytest.mark.parametrize("pattern, p, low", [
    (0x3F800000, 1.0, 0), (0x3F800001, 1.0, 1), (0x3F80FFFF, 1.0078125, -1), (-2**31, -0.0, 0), (1, 0.0, 1),
    (0x7F7FFFFF, float("inf"), -1),  # the largest fp32, beyond the largest bf16
    (0x7F7F7FFF, float.fromhex("0x1.fep127"), 2**15 - 1), (0x7F800000, float("inf"), 0), (-0x800000, -float("inf"), 0)])
def test_values_by_hand(pattern, p, low):
    high, rest = split(from_bits([pattern]))
    assert high.item() == p and str(high.item())[0] == str(p)[0] and rest.item() == low


@pytest.mark.parametrize("pattern", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0x7F807FFF, -1, -0x7FFFFF])
def test_nan_is_seen_in_the_weight(pattern):
    """0x7FFFFFFF is what CUDA makes: rounded up it would be -0; 0x7F800001, rounded down, infinity."""
    p, low = split(from_bits([pattern]))
    assert p.isnan().all() and join(p, low).isnan().all()


def test_a_nan_update_reaches_the_weight():
    for kind in KINDS:
        p, companion = weights(kind, torch.ones(4, device=DEVICE))
        update = torch.tensor([0.0, float("nan"), 1.0, 0.0], device=DEVICE)
        descend(p, companion, update, 0.1, 0.0)
        assert p.isnan().tolist() == join(p, companion).isnan().tolist() == [False, True, False, False]


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


def adam_loop(p, companion, grads, lrs, betas, eps, update=adam_update, number=float):
    m, v = (torch.zeros_like(p, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32) for _ in range(2))
    for step, (grad, lr) in enumerate(zip(grads, lrs), start=1):
        update(p, companion, grad, m, v, *map(number, (lr, *betas, eps, *(1 - b**step for b in betas))))
    return m, v


def adam_reference(w, grads, lrs, betas, eps):
    """In float64, from the paper."""
    w, m, v = w.double(), 0, 0
    for t, (g, lr) in enumerate(zip(grads, lrs), start=1):
        m, v = (b * s + (1 - b) * x for b, s, x in zip(betas, (m, v), (g.double(), g.double()**2)))
        w = w - lr * m / (1 - betas[0]**t) / ((v / (1 - betas[1]**t)).sqrt() + eps)
    return w


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("betas, eps", [((0.9, 0.99), 1e-8), ((0.75, 0.95), 1e-10), ((0.0, 0.9), 1e-2)])
def test_adam_is_float64s_adam(kind, betas, eps):
    """200 steps with changing learning rates and gradients of very different size."""
    p, companion = weights(kind, draw(300))
    grads = [draw(300, seed=i, scale=10.0 ** (i % 5 - 3)).to(p.dtype) for i in range(200)]
    lrs = [0.01 * (1 - i / 250) for i in range(200)]
    expected = adam_reference(join(p, companion), grads, lrs, betas, eps)
    adam_loop(p, companion, grads, lrs, betas, eps)
    torch.testing.assert_close(join(p, companion).double(), expected, atol=2e-5, rtol=0)
    assert torch.equal(p, join(p, companion).to(p.dtype))


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
    """Bit for bit: 16 bits beside a bf16 weight are as good as fp32 weights."""
    start = draw(6, 5, 8).bfloat16().float()
    grads = [draw(6, 5, 8, seed=i).bfloat16() for i in range(20)]
    found = []
    for kind in KINDS:
        p, companion = weights(kind, start)
        m = torch.zeros_like(start)
        flat = p.view(-1), None if companion is None else companion.view(-1)
        adam_loop(*flat, [g.view(-1) for g in grads], [0.01] * 20, (0.9, 0.99), 1e-8)
        for g in grads:
            muon_update(p, companion, g, m, 0.02, 0.001, 0.9)
        found.append(join(p, companion))
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
    """Momentum with Nesterov's look ahead, polar factor, sqrt(rows / cols) for tall ones, decoupled decay."""
    p, m = draw(*shape), torch.zeros(shape, device=DEVICE)
    w, average = p.double(), 0
    for i, (lr, decay, beta) in enumerate([(0.1, 0.3, 0.85), (0.1, 0.0, 0.9), (0.02, 0.3, 0.95), (0.0, 1.0, 0.0)] * 3):
        g = draw(*shape, seed=10 + i)
        muon_update(p, None, g, m, lr, lr * decay, beta)
        average = beta * average + (1 - beta) * g.double()
        step = polar_express(beta * average + (1 - beta) * g.double())
        w = (1 - lr * decay) * w - lr * max(1, shape[-2] / shape[-1]) ** 0.5 * step
        torch.testing.assert_close(p.double(), w, atol=1e-4, rtol=0)
        torch.testing.assert_close(m.double(), average, atol=1e-6, rtol=0)


def test_muon_update_calls_the_parts_it_is_given():
    """On flat tensors that are views of nothing, with learning rates as they are."""
    called = []

    def part(fn):
        def wrapped(*args):
            called.append(fn.__name__)
            assert all(x._base is None and x.dim() < 2 for x in args if isinstance(x, torch.Tensor))
            return fn(*args)
        return wrapped

    def orthogonalise(G):
        called.append(tuple(G.shape))
        return polar_express(G)
    results = []
    for kwargs in ({}, dict(orthogonalise=orthogonalise, nesterov=part(nesterov), descend=part(descend))):
        p, companion = weights(KINDS[1], draw(2, 8, 4))
        m = torch.zeros(2, 8, 4, device=DEVICE)
        for number in (float, torch.tensor):
            muon_update(p, companion, draw(2, 8, 4, seed=1).bfloat16(), m, *map(number, (0.1, 0.01, 0.9)), **kwargs)
        results += [join(p, companion), m]
    assert called == ["nesterov", (2, 8, 4), "descend"] * 2
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_keep_their_values_and_empty_shards_are_no_problem(kind):
    for n in (0, 5):
        p, companion = weights(kind, draw(n))
        grad = draw(n, seed=1).to(p.dtype)
        before = grad.clone()
        adam_loop(p, companion, [grad], [0.1], (0.9, 0.99), 1e-8)
        look_ahead = nesterov(grad, draw(n), 0.9)
        descend(p, companion, look_ahead, 0.1, 0.0)
        assert torch.equal(grad, before) and look_ahead.dtype == grad.dtype


# --- compiled


@pytest.fixture(scope="module")
def compiled():
    if DEVICE.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler")
    return {f: torch.compile(f, fullgraph=True, dynamic=True) for f in (adam_update, nesterov, descend)}


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_is_eager_and_one_kernel(kind, compiled):
    from torch._inductor import metrics

    def one_kernel(fn):
        def wrapped(*args):
            metrics.reset()
            result = compiled[fn](*args)
            assert metrics.generated_kernel_count <= 1  # none if this graph was there already
            return result
        return wrapped

    def number(x):
        return torch.tensor(x, dtype=torch.float32)
    for n in (1003, 520):
        start, grads = draw(n), [draw(n, seed=i) for i in range(4)]
        results = []
        for adam, look, down in ((adam_update, nesterov, descend), map(one_kernel, (adam_update, nesterov, descend))):
            p, companion = weights(kind, start)
            with torch.no_grad():
                state = adam_loop(p, companion, [g.to(p.dtype) for g in grads], [0.1, 0.1, 0.05, 0.0], (0.9, 0.99),
                                  1e-8, adam, number)
                m = torch.zeros(n, device=DEVICE)
                ahead = look(grads[0].to(p.dtype), m, number(0.9))
                down(p, companion, ahead, number(0.05), number(0.01))
            results.append([join(p, companion), m, ahead, *state])
        for a, b in zip(*results):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6 if a.dtype == torch.float32 else 1e-2)


def test_compiled_weights_keep_inf_and_nan(compiled):
    inf, nan = float("inf"), float("nan")
    p, low = weights(KINDS[1], torch.tensor([1.0, 3.3895e38, -1.0, 0.0] * 5, device=DEVICE))
    update = torch.tensor([nan, -1e36, inf, 0.0] * 5, device=DEVICE)
    with torch.no_grad():
        compiled[descend](p, low, update, torch.tensor(1.0), torch.tensor(0.0))
    master = torch.tensor([nan, 3.3895e38, -inf, 0.0] * 5, device=DEVICE).bfloat16().float() - update
    master = torch.where(update.isinf(), -inf, master)
    torch.testing.assert_close(join(p, low), master, equal_nan=True, rtol=1e-6, atol=0)
    assert p[0].isnan() and p[1].isinf() and p[2] == -inf and p[3] == 0
