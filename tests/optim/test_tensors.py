"""An optimizer's state as whole tensors: gathered and loaded, training goes on bit for bit."""

import pytest
import torch
from optim_helpers import (
    Parameters,
    accumulate,
    assert_equal,
    gradients,
    optimizer_of,
    rules,
    weights,
)

from optim.tensors import gather, load


def steps(model, optimizer, numbers):
    for k in numbers:
        accumulate(model, gradients(k))
        optimizer.step(1 - 0.1 * k, 0.85)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("every", [1, 2])
def test_state_that_was_gathered_and_loaded_goes_on_bit_for_bit(dtype, every):
    """From other weights and moments, and with gradients that have to go."""
    model = Parameters(dtype=dtype)
    optimizer = optimizer_of(model, rules(every, normuon=True))
    other = Parameters(dtype=dtype, seed=9)
    continued = optimizer_of(other, rules(every, normuon=True))
    steps(other, continued, [7])
    assert bool(continued.waiting()) == (every == 2)

    steps(model, optimizer, range(4))
    tensors = gather(optimizer)
    for name, x in tensors.items():
        assert x.dtype == torch.float32, name
        assert x.device.type == "cpu", name
    before = {name: x.clone() for name, x in tensors.items()}
    load(continued, lambda name, like: tensors[name].view(like.shape).to(like), 4)
    assert_equal(weights(model), weights(other))
    steps(model, optimizer, range(4, 6))
    assert_equal(tensors, before)  # a copy: training goes on while it is written
    steps(other, continued, range(4, 6))
    assert_equal(weights(model), weights(other))
    assert_equal(gather(optimizer), gather(continued))
