"""kernels/linear_log_prob.py beside its reference in float64 and finite differences."""

import importlib

import pytest
import torch

from kernels import linear_log_prob
from kernels.linear_log_prob import cached_rows, linear_log_prob_reference
from kernels.sampled_softmax import sample_vocabulary


def draw(n, v, c, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(n, c, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    w = torch.randn(v, c, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), generator=g)
    targets[:: max(2, n // 3)] = -100
    return h, w, targets


def gradients(f, h, w, targets, upstream, **kwargs):
    """(log probabilities, dh, dw)"""
    out = f(h, w, targets, **kwargs)
    dh, dw = torch.autograd.grad(out, (h, w), upstream.to(out.dtype))
    return out.detach(), dh, dw


@pytest.mark.parametrize("cap", [None, 3.0, (23.0, 5.0, 7.5)])
@pytest.mark.parametrize("n, v, c", [(1, 2, 1), (7, 33, 5), (cached_rows(4001) + 3, 4001, 2)])
def test_float64(n, v, c, cap):
    h, w, targets = draw(n, v, c)
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream[targets < 0] = torch.nan  # of what is not counted, nothing may come
    ours = gradients(linear_log_prob, h, w, targets, upstream.nan_to_num(9.0), cap=cap)
    wanted = gradients(linear_log_prob_reference, h, w, targets, upstream.nan_to_num(9.0), cap=cap)
    for a, b in zip(ours, wanted):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert (ours[0][targets < 0] == 0).all()


def test_sampled_columns_stand_for_several_tokens():
    h, w, targets = draw(40, 256, 8)
    tokens, targets, sampled = sample_vocabulary(targets, 256, 128, torch.tensor(3), -100)
    upstream = torch.linspace(-1, 1, 40, dtype=torch.float64)
    small = w.detach()[tokens].requires_grad_()
    ours = gradients(linear_log_prob, h, small, targets, upstream, sampled=sampled)
    wanted = gradients(linear_log_prob_reference, h, small, targets, upstream, sampled=sampled)
    for a, b in zip(ours, wanted):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # log of how many is fp32


def test_bf16_is_as_exact_as_the_reference():
    """The error against float64 is at most twice that of the reference in the same dtype."""
    h, w, targets = draw(300, 500, 64)
    with torch.no_grad():
        w *= 0.2
    upstream = torch.randn(300, generator=torch.Generator().manual_seed(1))
    exact = gradients(linear_log_prob_reference, h, w, targets, upstream)
    small = [x.detach().bfloat16().requires_grad_() for x in (h, w)]
    rounded = [x.detach().double().requires_grad_() for x in small]
    exact = gradients(linear_log_prob_reference, *rounded, targets, upstream)
    ours = gradients(linear_log_prob, *small, targets, upstream)
    plain = gradients(linear_log_prob_reference, *small, targets, upstream)
    for a, b, x in zip(ours, plain, exact):
        error = (a.double() - x).norm()
        assert error <= 2 * (b.double() - x).norm() + 1e-9


def test_gradients_of_a_token_that_is_often_the_target_add_up():
    h = torch.rand(4000, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    w = torch.zeros(4, 8, dtype=torch.bfloat16, requires_grad=True)
    linear_log_prob(h, w, torch.zeros(4000, dtype=torch.int64)).sum().backward()
    # A softmax of equal logits is 1/4 everywhere
    torch.testing.assert_close(w.grad[0].float(), 0.75 * h.float().sum(0), rtol=1e-2, atol=0)


def test_large_logits_and_no_gradients():
    h = torch.full((3, 1), 1e4)
    w = torch.tensor([[1.0], [0.0], [-1.0]])
    targets = torch.tensor([0, 1, 2])
    with torch.no_grad():
        assert linear_log_prob(h, w, targets).tolist() == [0.0, -1e4, -2e4]


@torch.no_grad()
def test_many_rows_go_through_in_blocks(monkeypatch):
    monkeypatch.setattr(importlib.import_module("kernels.linear_log_prob"), "PRODUCT_ROWS", 7)
    h, w, targets = draw(30, 5, 3)
    torch.testing.assert_close(
        linear_log_prob(h, w, targets), linear_log_prob_reference(h, w, targets)
    )


def test_no_rows():
    h, w, _ = draw(3, 5, 2)
    out = linear_log_prob(h[:0], w, torch.zeros(0, dtype=torch.int64))
    out.sum().backward()
    assert out.shape == (0,) and w.grad.abs().sum() == 0


@pytest.mark.parametrize(
    "h, w, targets",
    [
        ((3,), (5, 2), (3,)),
        ((3, 2), (5, 3), (3,)),
        ((3, 2), (5, 2), (4,)),
        ((3, 2), (5, 2), (3, 1)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(h, w, targets):
    with pytest.raises(ValueError):
        linear_log_prob(torch.zeros(h), torch.zeros(w), torch.zeros(targets, dtype=torch.int64))
