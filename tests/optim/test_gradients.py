"""gradient_report: exact sums of squares, finite only where every gradient is."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from kernel_checks import DEVICE, draw
from optim_helpers import BAD

from optim import gradient_report

SHAPES = [
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_report_is_float64s_sum_of_squares(dtype):
    grads = [draw(*s, seed=i, scale=10.0 ** (i - 4)).to(dtype) for i, s in enumerate(SHAPES)]
    grads.append(draw(300, 500).to(dtype).T)  # not contiguous
    report = gradient_report(grads)
    assert report.shape == (len(grads),)
    assert report.dtype == torch.float32
    expected = torch.stack([g.double().square().sum() for g in grads])
    torch.testing.assert_close(report.double(), expected, rtol=1e-6, atol=0)


def test_report_of_many_alike():
    """Where one running sum in fp32 would lose the small terms."""
    n = 2**22 + 3
    report = gradient_report([torch.full((n,), 0.1, dtype=torch.bfloat16, device=DEVICE)])
    assert report.double().item() == pytest.approx(n * 0.10009765625**2, rel=1e-6)


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(st.integers(1, 3000), st.data())
def test_report_is_finite_if_and_only_if_every_entry_is(n, data):
    where = data.draw(st.integers(0, n - 1))
    bad = data.draw(st.sampled_from(BAD))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    good = draw(n).to(dtype)
    spoiled = good.clone()
    spoiled[where] = bad
    assert gradient_report([good, spoiled, good]).isfinite().tolist() == [True, False, True]


def test_where_the_report_overflows():
    """As documented: from a norm of 1.8e19 on."""
    large = []
    for x in (1.8e19, -1.8e19, 1.9e19, 3e38):
        large.append(torch.tensor([x, 0.0], dtype=torch.bfloat16, device=DEVICE))
    assert gradient_report(large).isfinite().tolist() == [True, True, False, False]


@pytest.mark.compiles
def test_compiled_report_is_eager():
    grads = [draw(*s, seed=i).bfloat16() for i, s in enumerate([(3, 5), (0,), (40, 60)])]
    report = torch.compile(gradient_report, fullgraph=True)(grads)
    torch.testing.assert_close(report, gradient_report(grads), rtol=1e-5, atol=0)
