"""kernels/swiglu.py: forward and backward against float64 and eager, in all layouts."""

import importlib

import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPES,
    assert_as_exact_as_eager,
    draw,
    outputs_and_gradients,
    poisoned_memory,
)

from kernels.swiglu import (
    _swiglu,
    _swiglu_backward,
    swiglu,
    swiglu_backward_reference,
    swiglu_reference,
)

module = importlib.import_module("kernels.swiglu")

# Rows, then both halves: no rows, one, no power of two, more than a block, more than one dimension
SHAPES = [(0, 8), (1, 2), (5, 96), (67, 200), (3, 2 * 1500), (2, 5, 48), (34,)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_eager(shape, dtype):
    assert_as_exact_as_eager(swiglu, swiglu_reference, [draw(*shape, dtype=dtype, scale=3.0)])


def test_the_formula():
    """Written another way, in float64."""
    x = draw(7, 24).double()
    gate, up = x[:, :12], x[:, 12:]
    expected = gate * up / (1 + torch.exp(-gate))
    torch.testing.assert_close(swiglu_reference(x), expected)
    torch.testing.assert_close(swiglu(x.float()).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_autograd_in_float64():
    x = draw(5, 24, scale=2.0).double().requires_grad_()
    dy = draw(5, 12, seed=1).double()
    (expected,) = torch.autograd.grad(swiglu_reference(x), x, dy)
    torch.testing.assert_close(swiglu_backward_reference(dy, x.detach()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gate_is_rounded_before_it_multiplies(dtype):
    """As eager does, so equal to it but for the last bit of the exponential."""
    x = draw(64, 256, dtype=dtype)
    ours, eager = swiglu(x), swiglu_reference(x)
    assert (ours != eager).float().mean() < 0.01
    torch.testing.assert_close(ours, eager, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs_and_upstream_gradients(dtype):
    wide = draw(6, 5, 200, dtype=dtype)
    for x in (
        wide[:, 1, :96],
        wide[:, 1:3, 8:104],
        wide[::2, :, 3:99],
        wide[:, 0, :192:2],
        wide[:1, 0, :96].expand(5, 96),
        wide[:, :, :8].transpose(0, 1),
    ):
        assert_as_exact_as_eager(swiglu, swiglu_reference, [x])
    x = wide[:, 1, :96]
    for dy in (draw(1).expand(6, 48), draw(48).expand(6, 48), draw(6, 1).expand(6, 48)):
        assert_as_exact_as_eager(swiglu, swiglu_reference, [x], [dy.to(dtype)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_small_gates(dtype):
    """A gate far below zero is shut, one far above lets all through, neither is NaN."""
    gate = torch.tensor([-3e4, -200.0, -30.0, -1e-4, 0.0, 1e-4, 30.0, 200.0, 3e4], device=DEVICE)
    x = torch.cat([gate, torch.ones(9, device=DEVICE)]).to(dtype)
    y, dx = outputs_and_gradients(swiglu, [x], [torch.ones(9, device=DEVICE, dtype=dtype)])
    assert not y.isnan().any() and not dx.isnan().any()
    assert y[:2].abs().max() == 0 and torch.equal(y[-3:], x[6:9])
    assert dx[:2].abs().max() == 0 and torch.equal(dx[7:9], torch.ones_like(dx[7:9]))


def test_nan_stays_where_it_is():
    x = draw(4, 20)
    x[2, 3] = float("nan")
    assert swiglu(x).isnan().nonzero().tolist() == [[2, 3]]


def test_two_runs_agree_bit_by_bit():
    x = draw(140, 272, dtype=torch.bfloat16)
    for a, b in zip(outputs_and_gradients(swiglu, [x]), outputs_and_gradients(swiglu, [x])):
        assert torch.equal(a, b)


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 7\).*expected \(\.\.\., 2 F\)"):
        swiglu(draw(3, 7))


def test_registration_is_sound():
    x = draw(2, 5, 32)
    torch.library.opcheck(_swiglu, (x.clone().requires_grad_(),))
    torch.library.opcheck(_swiglu_backward, (draw(2, 5, 16), x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_graph_breaks(dtype):
    inputs = [draw(2, 5, 64, dtype=dtype)]
    compiled = outputs_and_gradients(
        torch.compile(swiglu, fullgraph=True, backend="aot_eager"), inputs
    )
    for a, b in zip(compiled, outputs_and_gradients(swiglu, inputs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_triton_the_same_numbers(dtype, monkeypatch):
    inputs = [draw(7, 200, dtype=dtype)]
    kernel = outputs_and_gradients(swiglu, inputs)
    monkeypatch.setattr(module, "runs_triton", lambda x: False)
    assert_as_exact_as_eager(swiglu, swiglu_reference, inputs)
    for a, b in zip(kernel, outputs_and_gradients(swiglu, inputs)):
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)


def test_offsets_beyond_int32():
    """Three rows that lie 2^30 elements apart, in memory that is reserved but not touched."""
    base = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    far = base.as_strided((3, 64), (2**30, 1))
    near = draw(3, 64, dtype=torch.float16)
    far.copy_(near)
    dy = draw(3, 32, dtype=torch.float16, seed=1)
    with poisoned_memory():
        assert torch.equal(swiglu(far), swiglu(near))
        assert torch.equal(_swiglu_backward(dy, far), _swiglu_backward(dy, near))
