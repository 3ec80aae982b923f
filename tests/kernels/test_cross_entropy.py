"""kernels/cross_entropy.py against the formula in float64 and in the same dtype."""

import importlib
import math

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_exact_as_eager, poisoned_memory

from kernels import cross_entropy, cross_entropy_kernels
from kernels import quantize as quantize_module
from kernels.cross_entropy import (
    _softcap_cross_entropy,
    cross_entropy_in_pytorch,
    scale_gradient,
    sigmoid_cap,
    softcap_cross_entropy,
    softcap_cross_entropy_reference,
)
from kernels.launch import runs_triton
from kernels.linear_cross_entropy import (
    _linear_cross_entropy,
    _linear_cross_entropy_backward,
    linear_cross_entropy,
    linear_cross_entropy_in_pytorch,
    linear_cross_entropy_reference,
)
from kernels.quantize import E4M3, E5M2
from kernels.sampled_softmax import sample_vocabulary

linear_module = importlib.import_module("kernels.linear_cross_entropy")
RECORD = (23.0, 5.0, 7.5)
CAPS = [None, RECORD, 15.0, (400.0, 0.0, 100.0)]  # 15.0: tanh; the last one needs the maximum
LINEAR = [linear_cross_entropy, linear_cross_entropy_in_pytorch]


class InPyTorch(torch.autograd.Function):
    """What a CPU computes, without the product before it."""

    @staticmethod
    def forward(ctx, logits, *args):
        loss, gradient = cross_entropy_in_pytorch(logits, *args, wanted=True)
        ctx.gradient = gradient.to(logits.dtype)
        return loss.float()

    @staticmethod
    def backward(ctx, dloss):
        return ctx.gradient * dloss, *[None] * 6


def in_pytorch(
    logits, targets, *, cap, target_weights=None, sampled=None, ignore_index=-100, grad_scale=1.0
):
    return InPyTorch.apply(
        logits, targets, target_weights, sampled, sigmoid_cap(cap), ignore_index, 1.0
    )


FUNCTIONS = [softcap_cross_entropy, softcap_cross_entropy_reference, in_pytorch]
APPROXIMATE = DEVICE.type == "cuda"  # bf16 logits that need a gradient go through tanh.approx there
FACTOR = 4 if APPROXIMATE else 2  # and exp2 and division in fp32 are a bit or two short of exact
caps = pytest.mark.parametrize("cap", CAPS, ids=str)
functions = pytest.mark.parametrize("fn", FUNCTIONS, ids=["op", "reference", "in pytorch"])
linear = pytest.mark.parametrize("fn", LINEAR, ids=["op", "in pytorch"])


def formula(logits, targets, cap, target_weights=None, ignore_index=-100, sampled=None):
    """Summed loss, in the dtype it is given; with sampled, a column counts as often as the
    tokens it stands for."""
    z = logits
    if isinstance(cap, float):
        z = cap * torch.tanh(z / cap)
    elif cap:
        a, b, c = cap
        z = a * torch.sigmoid((z + b) / c)
    if sampled is not None:
        first, log_many = sampled.tolist()
        z = torch.cat([z[:, : int(first)], z[:, int(first) :] + log_many], dim=1)
    targets = targets if targets.dim() == 2 else targets[:, None]
    counted = targets != ignore_index
    weights = counted if target_weights is None else counted * target_weights.to(z.dtype)
    return -(z.log_softmax(1).gather(1, targets.where(counted, 0)) * weights).sum()


def loss_and_gradient(fn, logits, *args, **kwargs):
    logits = logits.detach().requires_grad_()
    with poisoned_memory():
        loss = fn(logits, *args, **kwargs)
        return loss.detach(), torch.autograd.grad(loss, logits)[0]


def draw(N, V, dtype=torch.float32, size=5.0, seed=0, K=None):
    """Logits, and targets among which are 0 and V - 1 as far as N goes."""
    g = torch.Generator().manual_seed(seed)
    targets = torch.randint(V, (N,) if K is None else (N, K), generator=g)
    targets[:1], targets[1:2] = 0, V - 1
    return (torch.randn(N, V, generator=g) * size).to(DEVICE, dtype), targets.to(DEVICE)


def check(fn, logits, targets, cap, **kwargs):
    """Loss and gradient within FACTOR times the error of same-dtype eager, plus 1e-6 (of the
    loss, for the loss; 1e-3 of it where it is approximate: eager's error in bf16 is larger, but
    now and then zero by chance)."""
    loss, gradient = loss_and_gradient(fn, logits, targets, cap=cap, **kwargs)
    exact, exact_gradient = loss_and_gradient(formula, logits.double(), targets, cap, **kwargs)
    eager, eager_gradient = loss_and_gradient(formula, logits, targets, cap, **kwargs)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert gradient.dtype == logits.dtype and gradient.shape == logits.shape
    slack = 1e-3 if APPROXIMATE and logits.dtype == torch.bfloat16 else 1e-6
    assert (loss - exact).abs() <= FACTOR * (eager - exact).abs() + slack * max(
        1, exact.abs().item()
    )
    if logits.numel():
        allowed = FACTOR * (eager_gradient - exact_gradient).abs().max() + 1e-6
        assert (gradient - exact_gradient).abs().max() <= allowed
    return loss, gradient


# --- the loss and its gradient


@pytest.mark.parametrize("dtype", DTYPES)
@caps
@pytest.mark.parametrize("N, V", [(0, 41), (1, 41), (3, 1000), (2, 50257), (1, 50304)])
def test_loss_and_gradient(N, V, cap, dtype):
    check(softcap_cross_entropy, *draw(N, V, dtype), cap)


@pytest.mark.parametrize("V", [41, 1000])
def test_many_rows(V):
    check(softcap_cross_entropy, *draw(20, V, torch.bfloat16), RECORD)


@pytest.mark.parametrize("dtype", DTYPES)
@caps
@pytest.mark.parametrize("N, V", [(0, 41), (1, 41), (199, 1000)])
def test_in_pytorch(N, V, cap, dtype):
    for fn in FUNCTIONS[1:]:
        check(fn, *draw(N, V, dtype), cap)


@caps
def test_bf16_logits_are_only_rounded_once(cap):
    """From bf16 logits on, the loss is computed in fp32: 1e-6 of it, where bf16 would lose 1e-3."""
    logits, targets = draw(6, 1000, torch.bfloat16)
    exact = formula(logits.double(), targets, cap).item()
    for fn in FUNCTIONS:
        assert fn(logits, targets, cap=cap).item() == pytest.approx(exact, rel=1e-6)
    loss, _ = loss_and_gradient(softcap_cross_entropy, logits, targets, cap=cap)
    assert loss.item() == pytest.approx(exact, rel=1e-3 if APPROXIMATE else 1e-6)


@functions
def test_a_case_by_hand(fn):
    """Two classes with logits 0 and log 3, without a cap: probabilities 1/4 and 3/4."""
    logits = torch.tensor([[0.0, math.log(3)]] * 2, device=DEVICE)
    loss, gradient = loss_and_gradient(fn, logits, torch.tensor([0, 1], device=DEVICE), cap=None)
    assert loss.item() == pytest.approx(math.log(4) + math.log(4 / 3))
    torch.testing.assert_close(gradient.cpu(), torch.tensor([[-0.75, 0.75], [0.25, -0.25]]))


@functions
def test_the_cap_by_hand(fn):
    """a sigmoid((z + b) / c): at z = -b it is a / 2, with slope a / 4c."""
    a, b, c = cap = 8.0, 3.0, 2.0
    logits = torch.tensor([[-b, c * math.log(3) - b]], device=DEVICE)  # a / 2 and 3 a / 4
    loss, gradient = loss_and_gradient(fn, logits, torch.tensor([0], device=DEVICE), cap=cap)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(a / 4)))
    p = 1 / (1 + math.exp(a / 4))
    torch.testing.assert_close(
        gradient.cpu(), torch.tensor([[(p - 1) * a / c / 4, (1 - p) * a / c * 3 / 16]])
    )


@functions
def test_a_number_as_cap_is_tanh(fn):
    logits, targets = draw(5, 41, size=20.0)
    loss, gradient = loss_and_gradient(fn, logits, targets, cap=15.0)
    other, other_gradient = loss_and_gradient(formula, 15 * torch.tanh(logits / 15), targets, None)
    torch.testing.assert_close(loss, other)
    slope = 1 - torch.tanh(logits / 15).square()
    torch.testing.assert_close(gradient, other_gradient * slope, rtol=1e-4, atol=1e-6)


@caps
def test_gradient_against_differences(cap):
    """Central differences of the float64 formula, which nothing of autograd enters."""
    logits, targets = draw(3, 11, size=3.0)
    targets[2] = -100
    gradient = loss_and_gradient(softcap_cross_entropy, logits, targets, cap=cap)[1]
    for i, j in ((0, 0), (0, 5), (1, 10), (1, 3), (2, 4)):
        step = torch.zeros(3, 11, dtype=torch.float64, device=DEVICE)
        step[i, j] = 1e-5
        more, less = (formula(logits.double() + s, targets, cap).item() for s in (step, -step))
        assert gradient[i, j].item() == pytest.approx(
            (more - less) / 2e-5, abs=2e-5 if APPROXIMATE else 2e-6
        )


@functions
@caps
def test_sum_over_parts_is_the_sum(fn, cap):
    """Summed, not averaged: chunks of the tokens add up."""
    logits, targets = draw(15, 41)
    parts = sum(fn(z, t, cap=cap) for z, t in zip(logits.split(7), targets.split(7)))
    torch.testing.assert_close(parts, fn(logits, targets, cap=cap))


@functions
def test_input_stays_as_it_was(fn):
    logits, targets = draw(7, 41)
    copy = logits.clone()
    loss_and_gradient(fn, logits, targets, cap=RECORD)
    assert torch.equal(logits, copy)


def test_two_runs_agree_bit_by_bit():
    logits, targets = draw(6, 1000, torch.bfloat16, K=2)
    for a, b in zip(
        *(loss_and_gradient(softcap_cross_entropy, logits, targets, cap=RECORD) for _ in range(2))
    ):
        assert torch.equal(a, b)


# --- targets


@functions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@caps
def test_ignored_targets_count_for_nothing(fn, cap, dtype):
    logits, targets = draw(6, 41, dtype)
    targets[2:5] = -100
    loss, gradient = check(fn, logits, targets, cap)
    assert not gradient[2:5].any() and gradient[1].any() and gradient[5].any()
    kept = targets != -100
    torch.testing.assert_close(loss, loss_and_gradient(fn, logits[kept], targets[kept], cap=cap)[0])


@functions
@pytest.mark.parametrize("ignore_index", [-1, 0, 1, 40])
def test_any_ignore_index(fn, ignore_index):
    logits, targets = draw(7, 41)
    targets[2:5] = ignore_index
    _, gradient = check(fn, logits, targets, RECORD, ignore_index=ignore_index)
    assert (
        not gradient[targets == ignore_index].any()
        and gradient[targets != ignore_index].any(1).all()
    )


@functions
@caps
@pytest.mark.parametrize("N", [0, 3])
def test_nothing_to_count_gives_zero(fn, cap, N):
    """A rank with padding only: loss 0 and gradient 0, not 0 / 0."""
    logits, targets = draw(N, 41)
    loss, gradient = loss_and_gradient(fn, logits, targets.fill_(-100), cap=cap)
    assert loss.item() == 0 and torch.equal(gradient, torch.zeros_like(logits))


@functions
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K, weighted", [(1, True), (2, False), (3, True)])
def test_several_targets_in_a_row(fn, K, dtype, weighted):
    """Ignored here and there, a row of them all, and the same token twice in a row."""
    logits, targets = draw(6, 41, dtype, K=K)
    targets[2:4, K - 1] = targets[4, :] = -100
    targets[5] = 7
    weights = torch.tensor([1.0, 0.5, 0.0][:K], device=DEVICE) if weighted else None
    for cap in (None, RECORD):
        loss, gradient = check(fn, logits, targets, cap, target_weights=weights)
        assert not gradient[4].any() and gradient[5].any()
        apart = sum(
            loss_and_gradient(fn, logits, y.clone(), cap=cap)[0]
            * (1 if weights is None else weights[k])
            for k, y in enumerate(targets.unbind(1))
        )
        torch.testing.assert_close(loss, apart)


@pytest.mark.skipif(not runs_triton(torch.empty(0, device=DEVICE)), reason="PyTorch raises")
def test_a_target_outside_the_vocabulary_is_seen():
    """And nothing is read or written there."""
    wide = torch.zeros(3, 50, device=DEVICE)
    for target in (41, -1, 10**12):
        loss, gradient = loss_and_gradient(
            softcap_cross_entropy,
            wide[:, :41],
            torch.tensor([3, target, 5], device=DEVICE),
            cap=RECORD,
        )
        assert loss.isnan() and gradient.isfinite().all()


# --- sampled softmax


@functions
@pytest.mark.parametrize("dtype", DTYPES)
@caps
@pytest.mark.parametrize("first", [1, 7, 300, 1000])
def test_columns_that_stand_for_many_tokens(fn, first, cap, dtype):
    logits, targets = draw(5, 1000, dtype, K=2)
    targets %= first
    check(
        fn,
        logits,
        targets,
        cap,
        target_weights=torch.tensor([1.0, 0.5], device=DEVICE),
        sampled=torch.tensor([first, math.log(49.0)], device=DEVICE),
    )


def test_a_column_for_three_tokens_is_three_columns():
    logits, targets = draw(4, 41)
    targets %= 39
    repeated = torch.cat([logits[:, :39], *[logits[:, 39:]] * 3], dim=1)
    sampled = torch.tensor([39, math.log(3)], device=DEVICE)
    loss, gradient = loss_and_gradient(
        softcap_cross_entropy, logits, targets, cap=RECORD, sampled=sampled
    )
    other, other_gradient = loss_and_gradient(softcap_cross_entropy, repeated, targets, cap=RECORD)
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(gradient[:, :39], other_gradient[:, :39])
    torch.testing.assert_close(gradient[:, 39:], 3 * other_gradient[:, 39:41])


@pytest.mark.parametrize("fp8", [None, (0.01, 0.02, 1e-3)], ids=["", "fp8"])
def test_linear_among_a_sample(fp8):
    h, w, targets = draw_linear(16, 32, 48)
    targets, sampled = targets % 20, torch.tensor([20, math.log(3)], device=DEVICE)
    results = []
    for fn in (linear_cross_entropy_reference, *LINEAR):
        leaves = [x.detach().requires_grad_() for x in (h, w)]
        loss = fn(*leaves, targets, cap=RECORD, sampled=sampled, fp8=fp8)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    for y, *xs in zip(*results):
        for x in xs:
            assert (x - y).abs().max() <= (
                0.1 if fp8 else 2e-2 if h.dtype != torch.float32 else 1e-5
            ) * y.abs().max()


@pytest.mark.parametrize("n", [40, 64, 499, 500])
def test_a_sample_holds_every_target(n):
    targets = torch.randint(40, (3, 50), generator=torch.Generator().manual_seed(0)).to(DEVICE) * 12
    targets[1, :30] = -100
    tokens, among, sampled = sample_vocabulary(targets, 500, n, torch.tensor(5, device=DEVICE))
    counted = targets != -100
    assert len(tokens.unique()) == n and torch.equal(among == -100, ~counted)
    assert torch.equal(tokens[among[counted]], targets[counted])
    first, many = sampled[0].item(), sampled[1].exp().item()
    assert first == len(targets[counted].unique()) == among.max() + 1
    assert first + many * (n - first) == pytest.approx(500) or n == first
    again = sample_vocabulary(targets, 500, n, torch.tensor(5, device=DEVICE))
    assert all(torch.equal(a, b) for a, b in zip((tokens, among, sampled), again))


def test_a_sample_too_small_for_the_targets_ignores_some():
    targets = torch.arange(100, device=DEVICE)
    tokens, among, sampled = sample_vocabulary(
        targets, 500, 64, torch.tensor(1, device=DEVICE), ignore_index=-1
    )
    counted = among != -1
    assert counted.sum() == 64 and torch.equal(tokens[among[counted]], targets[counted])
    assert sampled.isfinite().all() and sampled[0] >= 64
    nothing = sample_vocabulary(
        torch.full((7,), -1, device=DEVICE), 500, 64, torch.tensor(1), ignore_index=-1
    )
    assert (nothing[1] == -1).all() and nothing[2][1].exp().item() == pytest.approx(500 / 64)


def test_the_sum_over_a_sample_is_right_on_average():
    """Over 4,000 seeds the mean is within 5 of its standard errors, no token that is no target
    comes much more often than others, and the largest seeds do no worse."""
    weights = torch.randn(300, generator=torch.Generator().manual_seed(1)).exp().to(DEVICE)
    targets, sums, counts = (
        torch.tensor([3, 77, 3, 210], device=DEVICE),
        [],
        torch.zeros(300, device=DEVICE),
    )
    for seed in (*range(2000), *range(2**33, 2**33 + 2000)):
        tokens, _, (first, log_many) = sample_vocabulary(
            targets, 300, 64, torch.tensor(seed, device=DEVICE)
        )
        picked = weights[tokens]
        sums.append(picked[:3].sum() + picked[3:].sum() * log_many.exp())
        counts[tokens] += 1
    sums = torch.stack(sums).double()
    assert abs(sums.mean() - weights.sum()) < 5 * sums.std() / len(sums) ** 0.5
    assert (counts[[3, 77, 210]] == 4000).all()
    others = counts[counts < 4000]
    assert len(others) == 297 and ((others / 4000 - 61 / 297).abs() < 0.03).all()


# --- extremes and layouts


@functions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@caps
def test_enormous_logits(fn, cap, dtype):
    """+-1e4: no inf, no NaN; the cap bounds the loss of a token by a + log V."""
    logits, targets = draw(6, 41, dtype)
    logits[0], logits[1] = 1e4, -1e4
    logits[2, :20], logits[2, 20:] = 1e4, -1e4
    logits[3, targets[3]] = 1e4  # certain, and right
    logits[4, targets[4]] = -1e4
    logits[5, (targets[5] + 1) % 41] = 1e4  # certain, and wrong
    loss, gradient = check(fn, logits, targets, cap)
    assert loss.isfinite() and gradient.isfinite().all()
    if cap:
        assert loss.item() <= 6 * ((cap[0] if isinstance(cap, tuple) else 2 * cap) + math.log(41))
    else:
        assert loss.item() > 1e4


@functions
@pytest.mark.parametrize("a", [1e-3, 100.0, 140.0, 150.0, 160.0, 1000.0, -30.0])
def test_caps_of_every_height(fn, a):
    """Around the height where a / 2 + log V = 80, beyond which the maximum is needed."""
    logits, targets = draw(5, 1000, size=30.0)
    logits[0], logits[1] = 1e4, -1e4
    logits[2, ::2], logits[2, 1::2] = 1e4, -1e4
    check(fn, logits, targets, (a, 1.0, 10.0))


def test_a_cap_that_needs_the_maximum_for_the_size_of_the_vocabulary():
    """exp(79) is in fp32's range, 50,304 of them are not."""
    logits, targets = draw(2, 50304, size=30.0)
    logits[0] = 1e4
    loss, _ = check(softcap_cross_entropy, logits, targets, (158.0, 1.0, 10.0))
    assert loss.isfinite()
    needs = cross_entropy_kernels.needs_maximum
    assert needs([158.0, 0.0, 1.0], 50304) and not needs([158.0, 0.0, 1.0], 2)
    assert not needs([23.0, 5.0, 7.5], 50304) and needs(None, 2)


@functions
def test_logits_of_minus_infinity(fn):
    """Tokens that are ruled out, the first 5000 among them."""
    logits, targets = draw(3, 9000)
    logits[:, :5000], targets[:] = -math.inf, torch.tensor([6000, 8999, 5000])
    loss, gradient = loss_and_gradient(fn, logits, targets, cap=None)
    torch.testing.assert_close(
        loss, loss_and_gradient(fn, logits[:, 5000:], targets - 5000, cap=None)[0]
    )
    assert not gradient[:, :5000].any() and gradient.isfinite().all()


@functions
def test_strided_logits_and_targets(fn):
    """Every other column of every third row, the transpose, and the first columns of a padded
    head."""
    whole, _ = draw(24, 90)
    targets = torch.arange(8, device=DEVICE) * 5
    weights = torch.ones(4, device=DEVICE)[::2]
    for logits in (whole[::3, ::2], whole.T[:8, :20], whole[:8, :45]):
        t = (targets % logits.size(1))[: len(logits)]
        strided = torch.stack([t, t], 1)[:, 0]
        assert not logits.is_contiguous() and not strided.is_contiguous()
        for cap in (None, RECORD):
            loss, gradient = check(fn, logits, strided, cap)
            other, other_gradient = check(fn, logits.contiguous(), t, cap)
            torch.testing.assert_close(loss, other)
            torch.testing.assert_close(gradient, other_gradient)
        check(fn, logits, torch.stack([t, t.flip(0)]).T, RECORD, target_weights=weights)


def test_offsets_beyond_int32():
    """Three rows that lie 2^30 elements apart, in memory that is reserved but not touched; so
    does the gradient."""
    base = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    far = base.as_strided((3, 64), (2**30, 1))
    near, targets = draw(3, 64, torch.float16)
    far.copy_(near)
    loss, gradient = loss_and_gradient(softcap_cross_entropy, near, targets, cap=RECORD)
    assert softcap_cross_entropy(far.requires_grad_(), targets, cap=RECORD).item() == loss.item()
    if runs_triton(near):
        cross_entropy_kernels.launch_cross_entropy(
            far.detach(), targets, None, None, RECORD, -100, 1.0, far.detach()
        )
        assert torch.equal(far, gradient)


def test_bad_arguments_are_named():
    logits, targets = draw(4, 41)
    for match, args in (
        ("rows|row for each", dict(targets=targets[:3])),
        ("int64", dict(targets=targets.int())),
        ("target_weights", dict(target_weights=torch.ones(2))),
        ("grad_scale", dict(grad_scale=0.0)),
        ("softcap", dict(cap=(1.0, 2.0, 0.0))),
    ):
        with pytest.raises(ValueError, match=match):
            softcap_cross_entropy(**dict(logits=logits, targets=targets, cap=None) | args)


# --- the upstream gradient


@functions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "factor, grad_scale",
    [
        (2.0, 1.0),
        (2.0, 2.0),
        (1.0005, 1.0),
        (-0.5, 2.0),
        (0.0, 1 / 49152),
        (1 / 49152, 1.0),
        (1 / 49152, 1 / 49152),
    ],
)
def test_upstream_gradient_is_honoured(fn, factor, grad_scale, dtype):
    logits, targets = draw(7, 41, dtype)
    gradient = loss_and_gradient(fn, logits, targets, cap=RECORD)[1]
    scaled = loss_and_gradient(
        lambda *x: fn(*x, cap=RECORD, grad_scale=grad_scale) * factor, logits, targets
    )[1]
    torch.testing.assert_close(
        scaled, gradient * factor, atol=1e-9, rtol=1e-6 if dtype == torch.float32 else 2e-2
    )


def test_the_expected_upstream_gradient_costs_no_copy():
    """Backward hands out what forward computed, bit by bit and in the same place."""
    logits, targets = draw(5, 41)
    logits.requires_grad_()
    loss = softcap_cross_entropy(logits, targets, cap=RECORD, grad_scale=1 / 3)
    (saved,) = loss.grad_fn.saved_tensors
    place, value = saved.data_ptr(), saved.clone()
    del saved
    (gradient,) = torch.autograd.grad(loss / 3, logits)
    assert gradient.data_ptr() == place and torch.equal(gradient, value)


def test_an_upstream_gradient_of_nan_is_passed_on():
    logits, targets = draw(5, 41)
    _, gradient = loss_and_gradient(
        lambda *x: softcap_cross_entropy(*x, cap=RECORD) * math.nan, logits, targets
    )
    assert gradient.isnan().all()


def test_backward_twice():
    """Each with an upstream gradient of its own, and the first result is written to in between."""
    logits, targets = draw(5, 41)
    logits.requires_grad_()
    (expected,) = torch.autograd.grad(formula(logits, targets, RECORD), logits)
    loss = softcap_cross_entropy(logits, targets, cap=RECORD)
    (zero,) = torch.autograd.grad(loss * 0, logits, retain_graph=True)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(first, expected)
    first.mul_(100)
    (second,) = torch.autograd.grad(loss * 2, logits, retain_graph=True)
    (last,) = torch.autograd.grad(loss * 3, logits)
    torch.testing.assert_close(second, 2 * expected)
    torch.testing.assert_close(last, 3 * expected)
    torch.testing.assert_close(first, 100 * expected)
    assert not zero.any()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_gradients_accumulate_apart():
    """.grad may be the tensor that backward handed out; the next backward adds to it."""
    logits, targets = draw(5, 41)
    logits.requires_grad_()
    (expected,) = torch.autograd.grad(formula(logits, targets, RECORD), logits)
    loss = softcap_cross_entropy(logits, targets, cap=RECORD)
    loss.backward(retain_graph=True)
    (loss + logits.sum() * 0).backward()
    softcap_cross_entropy(logits, targets, cap=RECORD).backward()
    torch.testing.assert_close(logits.grad, 3 * expected)


def test_second_derivatives_are_refused():
    logits, targets = draw(3, 41)
    loss = softcap_cross_entropy(logits.requires_grad_(), targets, cap=RECORD)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(
            torch.autograd.grad(loss, logits, create_graph=True)[0].square().sum(), logits
        )


def test_without_gradients_none_is_computed():
    logits, targets = draw(3, 41)
    with torch.no_grad():
        loss = softcap_cross_entropy(logits.requires_grad_(), targets, cap=RECORD)
    assert not loss.requires_grad and loss.item() == pytest.approx(
        formula(logits, targets, RECORD).item()
    )
    assert (
        _softcap_cross_entropy(
            logits.detach(), targets, None, None, list(RECORD), -100, 1.0, False
        )[1].numel()
        == 0
    )


# --- gradients in e5m2


@pytest.mark.skipif(not runs_triton(torch.empty(0, device=DEVICE)), reason="a kernel's option")
@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_e5m2(dtype, K):
    """Within half a step of e5m2 (2 bits of mantissa, subnormals of 2^-16), in units of the
    scale."""
    logits, targets = draw(8, 1000, dtype, K=K)
    targets[4], targets[5, K - 1] = -100, -100
    scale = torch.tensor(2.0**-14, device=DEVICE)
    gradient = torch.empty(8, 1000, dtype=E5M2, device=DEVICE)
    cross_entropy_kernels.launch_cross_entropy(
        logits, targets, None, None, RECORD, -100, 0.25, gradient, scale
    )
    _, exact = loss_and_gradient(formula, logits.double(), targets, RECORD)
    exact *= 0.25 / scale.double()
    slack = 0.01 if APPROXIMATE else 1e-4
    assert (
        (gradient.double() - exact).abs() <= exact.abs() * (0.125 + slack) + 2**-17 * (1 + slack)
    ).all()
    assert not gradient[4].double().any()


@pytest.mark.skipif(not runs_triton(torch.empty(0, device=DEVICE)), reason="a kernel's option")
def test_e5m2_saturates():
    logits, targets = draw(3, 41)
    gradient = torch.empty(3, 41, dtype=E5M2, device=DEVICE)
    cross_entropy_kernels.launch_cross_entropy(
        logits, targets, None, None, None, -100, 1.0, gradient, torch.tensor(1e-9, device=DEVICE)
    )
    assert gradient.float().abs().max() == 57344 and gradient.float()[0, 0] == -57344


@pytest.mark.skipif(
    DEVICE.type != "cuda" or torch.cuda.get_device_capability() < (9, 0), reason="from Hopper on"
)
@pytest.mark.parametrize("gradient_dtype", [torch.bfloat16, E5M2])
@pytest.mark.parametrize(
    "V, config",
    [
        (4112, ("resident", 2048, 8)),
        (50304, ("resident", 2048, 8)),
        (50304, ("resident", 4096, 8)),
        (100000, ("resident", 2048, 8)),
    ],
)
def test_resident_kernel(V, config, gradient_dtype):
    logits, targets = draw(300, V, torch.bfloat16, K=3)
    targets[4], targets[5:9, 1] = -100, -100
    weights = torch.tensor([1.0, 0.5, 0.25], device=DEVICE)
    scale = torch.tensor(2.0**-12, device=DEVICE) if gradient_dtype == E5M2 else None
    gradient = torch.empty(300, V, dtype=gradient_dtype, device=DEVICE)
    losses = cross_entropy_kernels.launch_cross_entropy(
        logits, targets, weights, None, RECORD, -100, 1.0, gradient, scale, config
    )
    exact, exact_gradient = loss_and_gradient(
        formula, logits.double(), targets, RECORD, target_weights=weights
    )
    assert losses.sum().item() == pytest.approx(exact.item(), rel=1e-3)
    got = gradient.double() * (1 if scale is None else scale.double())
    step = 2.0**-9 if scale is None else 2.0**-3
    assert ((got - exact_gradient).abs() <= exact_gradient.abs() * (step + 0.03) + 1e-4).all()
    assert not got[4].any()


# --- linear_cross_entropy


def draw_linear(N, C, V, dtype=torch.float32, K=None):
    g = torch.Generator().manual_seed(1)
    h, w = torch.randn(N, C, generator=g), torch.randn(V, C, generator=g) * 5 * C**-0.5
    _, targets = draw(N, V, K=K)
    return h.to(DEVICE, dtype), w.to(DEVICE, dtype), targets


@linear
@pytest.mark.parametrize("dtype", DTYPES)
@caps
@pytest.mark.parametrize("N, C, V", [(0, 24, 41), (1, 24, 41), (9, 24, 41), (3, 16, 1000)])
def test_linear_is_as_exact_as_eager(N, C, V, cap, dtype, fn):
    h, w, targets = draw_linear(N, C, V, dtype)
    targets[2:3] = -100
    assert_as_exact_as_eager(
        lambda *x: fn(*x, targets, cap=cap),
        lambda *x: linear_cross_entropy_reference(*x, targets, cap=cap),
        [h, w],
        [torch.tensor(1.0, device=DEVICE)],
    )


@linear
def test_linear_with_several_targets_in_strided_memory(fn):
    h, w, targets = draw_linear(10, 24, 82, K=3)
    targets[3:9, 1] = targets[5] = -100
    options = dict(cap=RECORD, target_weights=torch.tensor([1.0, 0.5, 0.25], device=DEVICE))
    for h_, w_ in (
        (h, w),
        (h[:, ::2], w[:, :12]),
        (h.T.contiguous().T, w.T.contiguous().T),
        (h, w[::2]),
    ):
        y = targets % len(w_) if len(w_) < 82 else targets
        assert_as_exact_as_eager(
            lambda *x: fn(*x, y, **options),
            lambda *x: linear_cross_entropy_reference(*x, y, **options),
            [h_, w_],
            [torch.tensor(1.0, device=DEVICE)],
        )


def linear_gradients(h, w, targets, factor=1.0, fn=linear_cross_entropy, **kwargs):
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    loss = fn(h, w, targets, cap=RECORD, **kwargs)
    return [loss.detach(), *torch.autograd.grad(loss * factor, [h, w])]


@pytest.mark.parametrize("fp8", [None, (0.01, 0.02, 1e-4)], ids=["", "fp8"])
@pytest.mark.parametrize("factor", [2.0, -0.5, 0.0, 0.3])
@linear
def test_linear_honours_the_upstream_gradient(factor, fp8, fn):
    h, w, targets = draw_linear(16, 32, 48)
    _, dh, dw = linear_gradients(h, w, targets, fn=fn, fp8=fp8)
    loss, dh_, dw_ = linear_gradients(h, w, targets, factor, fn, fp8=fp8)
    torch.testing.assert_close(dh_, dh * factor)
    torch.testing.assert_close(dw_, dw * factor)


def test_linear_expects_the_upstream_gradient_it_is_told():
    h, w, targets = draw_linear(16, 32, 48)
    loss, dh, dw = linear_gradients(h, w, targets)
    for a, b in zip(
        linear_gradients(h, w, targets, 0.125, grad_scale=0.125), (loss, dh / 8, dw / 8)
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fp8", [None, (0.01, 0.02, 1e-4)], ids=["", "fp8"])
@linear
def test_linear_backward_twice(fp8, fn):
    h, w, targets = draw_linear(16, 32, 48)
    h, w = h.requires_grad_(), w.requires_grad_()
    _, *expected = linear_gradients(h, w, targets, fn=fn, fp8=fp8)
    loss = fn(h, w, targets, cap=RECORD, fp8=fp8)
    for x in torch.autograd.grad(loss * 3, [h, w], retain_graph=True):
        x.mul_(100)
    for a, b in zip(torch.autograd.grad(loss * 2, [h, w]), expected):
        torch.testing.assert_close(a, 2 * b)


@pytest.mark.compiles
@pytest.mark.skipif(DEVICE.type != "cpu", reason="for CPUs")
@pytest.mark.slow
def test_compiled_on_a_cpu():
    """As the trainer has it: several targets, a sample, bf16. One exp for a logit, unlike the
    reference's two."""
    from torch._inductor.utils import run_and_get_code

    h, w, targets = draw_linear(64, 32, 128, torch.bfloat16, K=2)
    sampled, weights = torch.tensor([100.0, 1.5]), torch.tensor([1.0, 0.5])
    found, exps = [], []
    for fn in (linear_cross_entropy_reference, linear_cross_entropy_in_pytorch):
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()

        def step():
            loss = torch.compile(fn, fullgraph=True)(
                h, w, targets % 100, cap=None, target_weights=weights, sampled=sampled
            )
            return loss, *torch.autograd.grad(loss / 64, [h, w])

        results, code = run_and_get_code(step)
        found.append(results)
        exps.append(sum(source.count(".exp()") for source in code))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=2e-2)
    assert exps[1] < exps[0], exps


def test_second_derivatives_of_the_linear_form_are_refused():
    h, w, targets = draw_linear(5, 24, 41)
    factor = torch.ones((), requires_grad=True, device=DEVICE)
    loss = linear_cross_entropy_in_pytorch(h.requires_grad_(), w, targets, cap=RECORD) * factor
    (gradient,) = torch.autograd.grad(loss, h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@linear
def test_linear_without_gradients(fn):
    h, w, targets = draw_linear(5, 24, 41)
    with torch.no_grad():
        loss = fn(h.requires_grad_(), w.requires_grad_(), targets, cap=RECORD)
    torch.testing.assert_close(
        loss, linear_cross_entropy_reference(h.detach(), w.detach(), targets, cap=RECORD)
    )
    assert not loss.requires_grad
    results = _linear_cross_entropy(
        h.detach(), w.detach(), targets, None, None, None, None, None, None, -100, 1.0, False
    )
    assert not any(x.numel() for x in results[1:])


@pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="no fp8"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tensors", [False, True])
def test_linear_in_fp8(dtype, tensors):
    """The same as quantising the operands of the three products by hand."""
    h, w, targets = draw_linear(16, 64, 160, dtype)
    targets[7] = -100
    numbers = h_scale, w_scale, g_scale = 0.008, 0.006, 2.0**-15
    scales = [torch.tensor(s, device=DEVICE) for s in numbers] if tensors else numbers
    loss, dh, dw = linear_gradients(h, w, targets, grad_scale=0.5, factor=0.5, fp8=scales)

    def by_hand(x, scale, fp8_dtype):
        largest = torch.finfo(fp8_dtype).max
        return (x.float() / scale).clamp(-largest, largest).to(fp8_dtype).float() * scale

    h_, w_ = by_hand(h, h_scale, E4M3), by_hand(w, w_scale, E4M3)
    logits = (h_ @ w_.T).to(dtype).float()
    exact, g = loss_and_gradient(formula, logits, targets, RECORD)
    g = by_hand(0.5 * g, g_scale, E5M2)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    for x, expected in ((dh, g @ w_), (dw, g.T @ h_)):
        assert x.dtype == dtype
        assert (x - expected).norm() <= 0.02 * expected.norm()
    _, dh_, dw_ = linear_gradients(h, w, targets, grad_scale=0.5, factor=0.5)
    for x, exact in ((dh, dh_), (dw, dw_)):  # and all of fp8 together is a matter of some percent
        assert (x - exact).float().norm() <= 0.15 * exact.float().norm()


@pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9), reason="no fp8"
)
def test_the_head_in_fp8_with_scales_of_its_own():
    """On targets of three weights whose logits are lowest, so that gradients are at their largest;
    without gradients it is bf16's."""
    h, w, targets = draw_linear(16, 64, 160, torch.bfloat16, K=3)
    h = h * h.float().square().mean(1, keepdim=True).rsqrt().bfloat16()
    targets[:] = (h @ w.T).argmin(1)[:, None]
    options = dict(cap=RECORD, target_weights=torch.tensor([1.0, 1.0, 1.0], device=DEVICE))
    results = []
    for fn in (linear_module.fp8_linear_cross_entropy, linear_cross_entropy):
        leaves = [x.detach().requires_grad_() for x in (h, w)]
        loss = fn(*leaves, targets, **options)
        results.append([loss.detach(), *torch.autograd.grad(loss / 16, leaves)])
    for a, b in zip(*results):
        assert (a - b).float().norm() <= 0.1 * b.float().norm()
    with torch.no_grad():
        a, b = (
            fn(h, w, targets, **options)
            for fn in (linear_module.fp8_linear_cross_entropy, linear_cross_entropy)
        )
        assert torch.equal(a, b)


def test_shapes_that_fp8_cannot_do():
    fp8 = (1.0, 1.0, 1.0)
    for N, C, V in ((17, 32, 48), (16, 24, 48), (16, 32, 41)):
        h, w, targets = draw_linear(N, C, V)
        with pytest.raises(ValueError, match="multiples of 16"):
            linear_cross_entropy(h.requires_grad_(), w, targets, cap=None, fp8=fp8)
    with pytest.raises(ValueError, match=r"expected \(N, C\), \(V, C\)"):
        linear_cross_entropy(h, w[:, :8], targets, cap=None)


# --- what every op has to do


@pytest.mark.parametrize("K", [None, 2])
@pytest.mark.parametrize("cap", [None, list(RECORD)])
def test_registration_is_sound(cap, K):
    logits, targets = draw(3, 48, K=K)
    weights = None if K is None else torch.ones(K, device=DEVICE)
    sampled = None if K is None else torch.tensor([48.0, 0.0], device=DEVICE)
    # expecting the upstream gradient 1 that comes: for another, backward writes to the second
    # output, which is private
    torch.library.opcheck(
        _softcap_cross_entropy,
        (logits.requires_grad_(), targets, weights, sampled, cap, -100, 1.0, True),
    )
    torch.library.opcheck(
        _softcap_cross_entropy, (logits.detach(), targets, weights, sampled, cap, -100, 2.0, False)
    )


def test_registration_of_the_scaling_is_sound():
    torch.library.opcheck(scale_gradient, (draw(3, 48)[0], torch.tensor(2.0, device=DEVICE), 0.5))


FP8_CHECKS = (
    "test_autograd_registration",
    "test_faketensor",
)  # the others add up or compare outputs, which fp8 cannot


@pytest.mark.parametrize("fp8", [False, True])
def test_registration_of_linear_is_sound(fp8):
    h, w, targets = draw_linear(16 if fp8 else 2, 32, 48)
    scales = [torch.tensor(0.01, device=DEVICE)] * 3 if fp8 else [None] * 3
    arguments = (
        targets,
        None,
        torch.tensor([48.0, 0.0], device=DEVICE),
        *scales,
        list(RECORD),
        -100,
        1.0,
    )
    checks = dict(test_utils=FP8_CHECKS) if fp8 else {}
    torch.library.opcheck(_linear_cross_entropy, (h, w, *arguments, False), **checks)
    torch.library.opcheck(
        _linear_cross_entropy, (h.requires_grad_(), w.requires_grad_(), *arguments, True), **checks
    )
    loss, dlogits, h_t, w_t = (x.detach() for x in _linear_cross_entropy(h, w, *arguments, True))
    operands = (h_t, w_t) if fp8 else (h.detach(), w.detach())
    torch.library.opcheck(
        _linear_cross_entropy_backward, (loss, dlogits, *operands, *scales, 1.0, h.dtype), **checks
    )


@pytest.mark.parametrize("fp8", [None, (0.01, 0.02, 1e-4)], ids=["", "fp8"])
def test_compiles_without_graph_breaks(fp8):
    h, w, targets = draw_linear(16 if fp8 else 3, 32, 48)

    def f(h, w):
        logits = h @ w.t()
        return (
            softcap_cross_entropy(logits, targets, cap=RECORD, grad_scale=0.5) * 2
            + linear_cross_entropy(h, w, targets, cap=15.0, fp8=fp8) / 3
        )

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    expected = f(*(x.requires_grad_() for x in (h, w)))
    loss = compiled(h, w)
    torch.testing.assert_close(loss, expected)
    for retain in (True, False):
        for a, b in zip(
            *(torch.autograd.grad(x * 3, [h, w], retain_graph=retain) for x in (loss, expected))
        ):
            torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(compiled(h, w), expected.detach())


@caps
def test_without_triton_the_same_numbers(monkeypatch, cap):
    """What a CPU runs outside the tests, forward and backward."""
    logits, targets = draw(5, 41, K=2)
    targets[2], targets[3, 1] = -100, -100
    options = dict(cap=cap, target_weights=torch.tensor([1.0, 0.5], device=DEVICE), grad_scale=0.5)
    kernels = loss_and_gradient(softcap_cross_entropy, logits, targets, **options)
    for m in (cross_entropy, linear_module, quantize_module):
        monkeypatch.setattr(m, "runs_triton", lambda x: False)
    check(softcap_cross_entropy, logits, targets, cap, target_weights=options["target_weights"])
    for a, b in zip(kernels, loss_and_gradient(softcap_cross_entropy, logits, targets, **options)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fp8", [None, (0.01, 0.02, 1e-4)], ids=["", "fp8"])
def test_linear_without_triton_the_same_numbers(monkeypatch, fp8):
    h, w, targets = draw_linear(16, 32, 48, torch.bfloat16)
    kernels = linear_gradients(h, w, targets, 2.0, fp8=fp8)
    for m in (cross_entropy, linear_module, quantize_module):
        monkeypatch.setattr(m, "runs_triton", lambda x: False)
    for a, b in zip(kernels, linear_gradients(h, w, targets, 2.0, fp8=fp8)):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2)
