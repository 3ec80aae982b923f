"""What every op in kernels/ is tested for: as exact as PyTorch in the same dtype, and no memory
left unwritten."""

import contextlib
import itertools

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape, dtype=torch.float32, seed=0, scale=1.0):
    """Normal random numbers on the device under test, the same ones everywhere."""
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=g)).to(DEVICE, dtype)


@contextlib.contextmanager
def poisoned_memory():
    """torch.empty gives NaN (the largest value for integers), so that an element left unwritten
    shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def outputs_and_gradients(fn, inputs, upstream=None):
    """[outputs of fn, then gradients of the float inputs, None where fn does not use one].

    upstream: one gradient for each output (None where an output has none); random ones if not
    given.
    """
    leaves = [
        x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, torch.Tensor) else x
        for x in inputs
    ]
    outputs = fn(*leaves)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    if upstream is None:
        upstream = [draw(*y.shape, seed=100 + i).to(y.dtype) for i, y in enumerate(outputs)]
    pairs = [
        (y, dy.to(y.dtype))
        for y, dy in zip(outputs, upstream)
        if dy is not None and y.requires_grad
    ]
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    grads = torch.autograd.grad(
        [y for y, _ in pairs], wanted, [dy for _, dy in pairs], allow_unused=True
    )
    return [*(y.detach() for y in outputs), *grads]


def to_double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def assert_as_exact_as_eager(op, reference, inputs, upstream=None, factor=2.0, slack=1e-6):
    """Errors of op against reference in float64: at most factor times those of reference in the
    inputs' own dtype.

    Outputs and gradients, by the largest absolute error; slack is relative to the largest exact
    value (at least 1).
    """
    with poisoned_memory():
        ours = outputs_and_gradients(op, inputs, upstream)
    eager = outputs_and_gradients(reference, inputs, upstream)
    if (
        upstream is None
    ):  # the float64 run has to see the upstream gradients that the others saw, rounding included
        n = len(ours) - sum(isinstance(x, torch.Tensor) and x.is_floating_point() for x in inputs)
        upstream = [draw(*y.shape, seed=100 + i).to(y.dtype) for i, y in enumerate(ours[:n])]
    exact = outputs_and_gradients(reference, [to_double(x) for x in inputs], upstream)
    for i, (o, e, r) in enumerate(itertools.zip_longest(ours, eager, exact)):
        assert (o is None) == (r is None), f"result {i}: {o} where the reference has {r}"
        if o is None:
            continue
        assert o.shape == r.shape and o.dtype == e.dtype, (
            f"result {i}: {o.shape} {o.dtype}, expected {e.shape} {e.dtype}"
        )
        if o.numel() == 0:
            continue
        assert not o.isnan().any(), f"result {i} has {int(o.isnan().sum())} NaN"
        allowed = factor * (e.double() - r).abs().max() + slack * max(1.0, r.abs().max())
        error = (o.double() - r).abs().max()
        assert error <= allowed, f"result {i}: error {error:.3g}, allowed {allowed:.3g}"
