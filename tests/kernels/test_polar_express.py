"""kernels/polar_express.py against the singular value decomposition in float64."""

import importlib

import pytest
import torch
from kernel_checks import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.polar_express import COEFFICIENTS, polar_express, polar_express_by_kernels
from kernels.symmetric_matmul import symmetric_matmul_reference

module = importlib.import_module("kernels.polar_express")

# What five steps make of singular values in [1e-3, 1] of 1.02 |G|_F; bf16 adds its rounding.
BAND = {torch.float32: (0.858, 1.142), torch.bfloat16: (0.83, 1.16)}
SHAPES = [(16, 16), (16, 40), (40, 16), (3, 200), (128, 256), (4, 24, 17), (2, 3, 8, 12)]


def polynomial(s, steps=5):
    """What the steps do to singular values s."""
    for a, b, c in COEFFICIENTS[:steps]:
        s = a * s + b * s**3 + c * s**5
    return s


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_singular_values(m, n, s, seed=0):
    """U diag(s) V^T in float64; s: (min(m, n),)."""
    U, _, Vh = torch.linalg.svd(gaussian(m, n, seed=seed).double(), full_matrices=False)
    return U * s @ Vh


def ill_conditioned(m, n, smallest):
    """Singular values spread evenly in the logarithm, the smallest being `smallest` times 1.02
    |G|_F."""
    s = torch.logspace(0, torch.tensor(smallest).log10().item(), min(m, n), dtype=torch.float64)
    s[-1] = smallest * 1.02 * s[:-1].norm()
    return with_singular_values(m, n, s)


def distance_from_band(x, band):
    return max(band[0] - x.min().item(), x.max().item() - band[1])


def in_polar_directions(G, X):
    """U^T X V with G = U S V^T: diagonal, and near 1, if X is G's polar factor."""
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    return U.mT @ X.double() @ Vh.mT


def test_coefficients_keep_the_band():
    """On a fine grid of [1e-3, 1]; smaller ones grow 989-fold; none ever leaves the band
    upwards."""
    s = torch.logspace(-3, 0, 200_001, dtype=torch.float64)
    y = polynomial(s)
    assert y.min().item() == pytest.approx(0.85862, abs=1e-4)
    assert y.max().item() == pytest.approx(1.14108, abs=1e-4)
    tiny = torch.logspace(-9, -3, 1001, dtype=torch.float64)
    assert polynomial(tiny).max() < 1.1411
    assert (polynomial(tiny[:1]) / tiny[0]).item() == pytest.approx(989.47, abs=0.1)


def test_every_coefficient_is_pinned():
    """Values at six points: a coefficient off by 1e-3 changes one of them by 1e-3 at least."""
    s = torch.tensor([1e-3, 0.01, 0.1, 0.4, 0.7, 1 / 1.02], dtype=torch.float64)
    expected = torch.tensor(
        [0.85887, 1.02692, 1.05824, 0.98530, 0.93677, 0.90234], dtype=torch.float64
    )
    torch.testing.assert_close(polynomial(s), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", BAND)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_end_in_the_band(shape, dtype):
    for seed in range(3):
        G = gaussian(*shape, seed=seed, dtype=dtype)
        X = polar_express(G)
        assert X.shape == G.shape and X.dtype == dtype
        assert distance_from_band(torch.linalg.svdvals(X.double()), BAND[dtype]) <= 0


@pytest.mark.parametrize(
    "dtype, smallest",
    [(torch.float32, 1e-1), (torch.float32, 1e-2), (torch.float32, 1e-3), (torch.bfloat16, 1e-2)],
)
@pytest.mark.parametrize("m, n", [(16, 16), (16, 40), (40, 16)])
def test_ill_conditioned_matrices_end_in_the_band(m, n, dtype, smallest):
    """Down to what the polynomials are made for; bf16 cannot hold the directions of smaller
    ones."""
    X = polar_express(ill_conditioned(m, n, smallest).to(dtype))
    assert distance_from_band(torch.linalg.svdvals(X.double()), BAND[dtype]) <= 0


@pytest.mark.parametrize("shape", [*SHAPES, (1, 64), (64, 1), (1, 1)], ids=str)
def test_equals_the_polynomial_of_the_singular_values(shape):
    """Nothing but the singular values changes, and they as the five polynomials say."""
    G = gaussian(*shape)
    U, s, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    s = s / (1.02 * s.norm(dim=-1, keepdim=True))
    expected = U * polynomial(s)[..., None, :] @ Vh
    torch.testing.assert_close(polar_express(G).double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype, off_diagonal", [(torch.float32, 2e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("m, n", [(16, 16), (16, 40), (40, 16), (128, 256)])
def test_points_where_the_exact_polar_factor_points(m, n, dtype, off_diagonal):
    G = gaussian(m, n, dtype=dtype) if m != n else ill_conditioned(m, n, 1e-2).to(dtype)
    aligned = in_polar_directions(G, polar_express(G))
    assert distance_from_band(aligned.diagonal(), BAND[dtype]) <= 0
    assert (aligned - aligned.diagonal().diag()).abs().max() < off_diagonal


@pytest.mark.parametrize("steps", range(6))
def test_number_of_steps(steps):
    G = ill_conditioned(12, 20, 1e-2).float()
    s = torch.linalg.svdvals(G.double())
    expected = polynomial(s / (1.02 * s.norm()), steps).sort(descending=True).values
    found = torch.linalg.svdvals(polar_express(G, steps).double())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("m, n", [(8, 24), (24, 8), (16, 16)])
def test_a_batch_is_its_matrices_one_by_one(m, n, dtype, atol):
    """Also when their sizes differ by a million, and one is zero."""
    G = gaussian(2, 3, m, n) * torch.tensor([[1.0, 1e-2, 1e4], [1e-1, 0.0, 1e2]])[..., None, None]
    X = polar_express(G.to(dtype))
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(X[i, j], polar_express(G[i, j].to(dtype)), atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", BAND)
@pytest.mark.parametrize("m, n", [(8, 24), (1, 7), (2, 3)])
def test_transpose_equivariance(m, n, dtype):
    G = gaussian(m, n, dtype=dtype)
    atol = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(polar_express(G.mT), polar_express(G).mT, atol=atol, rtol=0)
    torch.testing.assert_close(
        polar_express(G.mT.contiguous()), polar_express(G).mT, atol=atol, rtol=0
    )


@pytest.mark.parametrize("scale", [1e-2, 1e-1, 1e3, 1e8, -1.0])
def test_scale_does_not_matter_and_sign_does(scale):
    """Up to the 1e-6 that guards zero."""
    G = gaussian(16, 24)
    expected = polar_express(G) * (-1 if scale < 0 else 1)
    torch.testing.assert_close(polar_express(G * scale), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [1e-4, 1e-6])
@pytest.mark.parametrize("dtype", BAND)
def test_small_matrices_are_still_orthogonalised(scale, dtype):
    """A gradient of a mean over many tokens may be small; its update may not."""
    X = polar_express(gaussian(16, 40, dtype=dtype) * scale)
    assert distance_from_band(torch.linalg.svdvals(X.double()), BAND[dtype]) <= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(5, 5), (3, 9), (9, 3), (2, 4, 6), (1, 1), (0, 4, 6)], ids=str)
def test_zero_stays_zero(shape, dtype):
    """Also no matrix at all: a rank that owns none."""
    X = polar_express(torch.zeros(shape, dtype=dtype))
    assert X.dtype == dtype and torch.equal(X, torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("m, n", [(16, 16), (16, 40), (40, 16)])
@pytest.mark.parametrize("rank", [1, 3, 15])
def test_rank_deficient_matrices(m, n, rank):
    """The directions that are there end in the band, the others stay near zero."""
    s = torch.zeros(16, dtype=torch.float64)
    s[:rank] = torch.linspace(1, 0.1, rank)
    found = torch.linalg.svdvals(polar_express(with_singular_values(m, n, s).float()).double())
    assert distance_from_band(found[:rank], BAND[torch.float32]) <= 0
    assert (found[rank:] < 1e-3).all()


@pytest.mark.parametrize("dtype", BAND)
def test_a_single_row_becomes_a_unit_vector(dtype):
    G = gaussian(1, 300, dtype=dtype)
    X = polar_express(G).double()
    length = X.norm().item()
    assert BAND[dtype][0] <= length <= BAND[dtype][1]
    assert (X * G.double()).sum() / (length * G.double().norm()) > 0.999  # the cosine


def test_input_stays_as_it_was():
    for shape in ((8, 12), (12, 8)):
        G = gaussian(*shape)
        copy = G.clone()
        polar_express(G)
        assert torch.equal(G, copy)


@pytest.mark.parametrize("dtype", BAND)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_symmetric_products_by_kernels(shape, scale, dtype):
    """The same polar factor, with the band kept, by the op that computes half of each symmetric
    product and the norm from the first one."""
    G = (scale * gaussian(*shape)).to(DEVICE, dtype)
    X = polar_express_by_kernels(G)
    assert X.shape == G.shape and X.dtype == dtype and X.is_contiguous()
    assert distance_from_band(torch.linalg.svdvals(X.double()), BAND[dtype]) <= 0
    # Rounded elsewhere, to the same exactness on average; of few numbers either may be luckier
    exact = polar_express(G.double())
    off, allowed = ((x.double() - exact).norm() for x in (X, polar_express(G)))
    assert off <= 1.5 * allowed + (1e-5 if dtype == torch.float32 else 0.05) * exact.norm()


def test_each_matrix_of_a_batch_has_its_own_norm():
    G = torch.stack([s * gaussian(8, 12, seed=i) for i, s in enumerate((1e-4, 1.0, 1e7, 0.0))])
    X = polar_express_by_kernels(G.to(DEVICE))
    torch.testing.assert_close(X, polar_express(G).to(DEVICE), atol=1e-4, rtol=1e-3)
    assert not X[3].any()


@pytest.mark.parametrize(
    "shape, symmetric",
    [((2, 12, 20), (2, 12, 12)), ((2, 20, 12), (2, 12, 12)), ((9, 9), (1, 9, 9))],
    ids=str,
)
def test_two_symmetric_products_of_the_smaller_side_per_step(shape, symmetric, monkeypatch):
    found = []

    def spy(X, *args, **kwargs):
        found.append(symmetric_matmul_reference(X, *args, **kwargs))
        return found[-1]

    monkeypatch.setattr(module, "symmetric_matmul_reference", spy)
    polar_express(gaussian(*shape), steps=3)
    assert [x.shape for x in found] == [symmetric] * 6
    for x in found:
        torch.testing.assert_close(x, x.mT)


class Launches(TorchDispatchMode):
    """Names of the operations that would start a kernel: all but views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):
            self.names.append(func._schema.name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("shape", [(2, 12, 20), (2, 20, 12)], ids=str)
def test_three_launches_a_step_with_the_kernels_for_symmetric_products(shape):
    """Two of them and a product that copies nothing; by baddbmm with its copy it was four. None for
    the norm and the division by it, which were four more."""
    G = gaussian(*shape).to(DEVICE)
    step = ["stopwatch::symmetric_matmul", "stopwatch::symmetric_matmul", "aten::bmm"]
    for steps in 1, 5:
        with Launches() as launches:
            polar_express_by_kernels(G, steps)
        assert launches.names == steps * step


def test_the_result_is_laid_out_as_a_gradient():
    """The optimizer flattens it: also for tall, transposed and sliced matrices."""
    wide = gaussian(3, 40, 60)
    for G in (wide, wide.mT, wide.mT.contiguous(), wide[::2, :30, 5:20], wide[:, 0]):
        assert polar_express(G).is_contiguous()
