"""kernels/clear.py: zeros, whatever was there, or every bit as it was."""

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, draw

from kernels.clear import clear_unless


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (5, 7), (3, 4096), (140_001,)], ids=str)
def test_zeros_or_nothing(shape, dtype):
    x = draw(*shape, dtype=dtype)
    x.view(-1)[::3] = float("nan")
    before = x.clone()
    clear_unless(x, torch.tensor(True, device=DEVICE))
    assert torch.equal(x.nan_to_num(7), before.nan_to_num(7))
    clear_unless(x, torch.tensor(False, device=DEVICE))
    assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("ok", [False, True])
def test_no_element_of_a_neighbour_is_touched(ok):
    """Part of a tensor, and one whose elements are not side by side."""
    for part in (lambda x: x[2:5], lambda x: x[:, 1:4], lambda x: x.t()[1:3]):
        x = draw(8, 6)
        expected = x.clone()
        if not ok:
            part(expected).zero_()
        clear_unless(part(x), torch.tensor(ok, device=DEVICE))
        assert torch.equal(x, expected)


def test_registration_is_sound():
    torch.library.opcheck(clear_unless, (draw(4, 3), torch.tensor(False, device=DEVICE)))
