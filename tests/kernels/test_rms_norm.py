"""kernels/rms_norm.py: forward and backward against float64 and eager PyTorch, in all layouts."""

import importlib

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, assert_as_exact_as_eager, draw, outputs_and_gradients

from kernels.rms_norm import (
    _rms_norm,
    _rms_norm_backward,
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)

module = importlib.import_module("kernels.rms_norm")

SHAPES = [(0, 768), (1, 96), (3, 768), (199, 96), (3, 1000), (199, 1024), (2, 5, 96), (7, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_norm_is_as_exact_as_eager(shape, dtype, weighted):
    inputs = [
        draw(*shape, dtype=dtype),
        *([draw(shape[-1], dtype=dtype, seed=1)] if weighted else []),
    ]
    assert_as_exact_as_eager(rms_norm, rms_norm_reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_addition_and_norm_are_as_exact_as_eager(shape, dtype, weighted):
    inputs = [
        draw(*shape, dtype=dtype),
        draw(*shape, dtype=dtype, seed=1),
        *([draw(shape[-1], dtype=dtype, seed=2)] if weighted else []),
    ]
    assert_as_exact_as_eager(add_rms_norm, add_rms_norm_reference, inputs)


def test_gradient_through_either_output_alone():
    inputs = [draw(3, 96), draw(3, 96, seed=1)]
    for upstream in ([draw(3, 96, seed=2), None], [None, draw(3, 96, seed=3)]):
        assert_as_exact_as_eager(add_rms_norm, add_rms_norm_reference, inputs, upstream)


def test_strided_rows_and_expanded_upstream_gradients():
    wide = draw(5, 4, 200)
    for x in (wide[:, :, :96], wide[:, 1:3, 8:104], wide.mT[:, :96], wide[::2]):
        assert_as_exact_as_eager(rms_norm, rms_norm_reference, [x])
        assert_as_exact_as_eager(add_rms_norm, add_rms_norm_reference, [x, x.flip(0)])
        for dy in (draw(1).expand(x.shape), draw(x.size(-1)).expand(x.shape)):
            assert_as_exact_as_eager(rms_norm, rms_norm_reference, [x], [dy])


def test_large_small_and_zero_rows():
    x = torch.stack([draw(96, scale=1e4), draw(96, scale=1e-4), torch.zeros(96, device=DEVICE)])
    assert_as_exact_as_eager(rms_norm, rms_norm_reference, [x])
    assert not rms_norm(x)[2].any()


@pytest.mark.parametrize("small", [2.0**-9, 2.0**-12])
def test_a_gradient_of_w_that_cancels_between_programs(small):
    """Partial sums of 1 + small and of -1, whose difference bf16 would round away."""
    x = torch.ones(8, 1024, dtype=torch.bfloat16, device=DEVICE)
    w = torch.ones(1024, dtype=torch.bfloat16, device=DEVICE)
    dy = torch.zeros_like(x)
    dy[0] = 1
    dy[1] = small
    dy[4] = -1  # four rows of 1,024 make a program
    assert module.rows_per_program(1024) == 4
    _, _, dw = outputs_and_gradients(lambda x, w: rms_norm(x, w, 0.0), [x, w], [dy])
    assert dw.tolist() == [small] * 1024


def test_eps_is_inside_the_root():
    x = torch.full((1, 4), 3.0, device=DEVICE)
    torch.testing.assert_close(rms_norm(x, eps=16.0), torch.full_like(x, 3 / 5))


def test_two_runs_agree_bit_by_bit():
    inputs = [draw(199, 768), draw(768, seed=1)]
    for a, b in zip(
        outputs_and_gradients(rms_norm, inputs), outputs_and_gradients(rms_norm, inputs)
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_registration_is_sound(residual, weighted):
    x, r, w = (draw(3, 96, seed=i).requires_grad_() for i in range(3))
    w = draw(96).requires_grad_() if weighted else None
    torch.library.opcheck(_rms_norm, (x, r if residual else None, w, 1e-6))
    _, _, rstd = _rms_norm(x, None, None, 1e-6)
    torch.library.opcheck(
        _rms_norm_backward,
        (
            x.detach(),
            r.detach() if residual else None,
            x.detach(),
            w.detach() if weighted else None,
            rstd.detach(),
        ),
    )


def test_compiles_without_graph_breaks():
    def f(x, r, w):
        y, s = add_rms_norm(x, r, w)
        return rms_norm(y) + s

    inputs = [draw(5, 96), draw(5, 96, seed=1), draw(96, seed=2)]
    compiled = outputs_and_gradients(torch.compile(f, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip(compiled, outputs_and_gradients(f, inputs)):
        torch.testing.assert_close(a, b)


def test_without_triton_the_same_numbers(monkeypatch):
    """What a CPU runs outside the tests, forward and backward."""
    inputs = [draw(5, 96), draw(5, 96, seed=1), draw(96, seed=2)]
    kernels = outputs_and_gradients(add_rms_norm, inputs)
    monkeypatch.setattr(module, "runs_triton", lambda x: False)
    assert_as_exact_as_eager(add_rms_norm, add_rms_norm_reference, inputs)
    for a, b in zip(kernels, outputs_and_gradients(add_rms_norm, inputs)):
        torch.testing.assert_close(a, b)


def test_offsets_beyond_int32():
    """Three rows that lie 2^30 elements apart, in memory that is reserved but not touched."""
    base = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    far = base.as_strided((3, 64), (2**30, 1))
    near = draw(3, 64, dtype=torch.float16)
    far.copy_(near)
    torch.testing.assert_close(rms_norm(far), rms_norm(near), rtol=0, atol=0)
    dx, _ = module._rms_norm_backward(far, None, far, None, torch.ones(3, device=DEVICE))
    expected, _ = module._rms_norm_backward(near, None, near, None, torch.ones(3, device=DEVICE))
    torch.testing.assert_close(dx, expected, rtol=0, atol=0)
