"""kernels/symmetric_matmul.py: against float64 and eager PyTorch, in all layouts, and symmetric
bit for bit."""

import importlib

import pytest
import torch
from kernel_checks import DEVICE, DTYPES, draw, poisoned_memory

from kernels.launch import runs_triton, tl, triton
from kernels.symmetric_matmul import (
    _symmetric_matmul,
    normalised_polynomial,
    normalised_polynomial_reference,
    symmetric_matmul,
    symmetric_matmul_reference,
    triangle,
)

module = importlib.import_module("kernels.symmetric_matmul")
SHAPES = [
    (1, 1),
    (3, 0),
    (0, 5),
    (7, 33),
    (128, 64),
    (96, 257),
    (130, 100),
    (384, 96),
    (0, 4, 4),
    (3, 20, 48),
    (2, 2, 129, 40),
]


def symmetric(*shape, dtype=torch.float32, seed=0):
    """(..., m, m), symmetric."""
    A = draw(*shape, dtype=dtype, seed=seed)
    return A.tril() + A.tril(-1).mT


def check(X, C=None, alpha=1.0, beta=0.0, diagonal=0.0):
    """As exact as eager: at most twice its error, from the largest value on. Returns the result."""
    with poisoned_memory():
        out = symmetric_matmul(X, C, alpha=alpha, beta=beta, diagonal=diagonal)
    numbers = dict(alpha=alpha, beta=beta, diagonal=diagonal)
    exact = symmetric_matmul_reference(X.double(), None if C is None else C.double(), **numbers)
    eager = symmetric_matmul_reference(X, C, **numbers)
    assert out.shape == exact.shape and out.dtype == X.dtype and out.is_contiguous()
    if runs_triton(X):
        assert torch.equal(out, out.mT)
    if out.numel():
        allowed = 2 * (eager.double() - exact).abs().max() + 1e-6 * max(1.0, exact.abs().max())
        assert (out.double() - exact).abs().max() <= allowed
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_eager(shape, dtype):
    """Rows and columns that tiles do not divide, empty batches, X by rows and by columns, with
    and without C."""
    X, C = draw(*shape, dtype=dtype), symmetric(*shape[:-1], shape[-2], dtype=dtype, seed=1)
    check(X)
    check(X, C, alpha=0.5, beta=-2.0)
    check(X.mT.contiguous().mT, C, alpha=-1.5, beta=0.25)
    check(X, C, alpha=0.5, beta=-2.0, diagonal=3.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_products_of_polar_express(dtype):
    """X X^T of a wide matrix, X^T X of a tall one, b A + c A A, where C and X are the same
    tensor."""
    for X in (draw(2, 40, 200, dtype=dtype), draw(2, 200, 40, dtype=dtype).mT):
        A = check(X / X.norm(dim=(-2, -1), keepdim=True))
        check(A, A, alpha=15.9, beta=-22.5)
        check(A, A, alpha=15.9, beta=-22.5, diagonal=8.2)


NUMBERS = 8.2, -22.5, 15.9


def twin(A, a, b, c):
    """normalised_polynomial of one matrix, element by element, in float64."""
    m = len(A)
    A = A.double()
    trace = sum(A[i, i].item() for i in range(m))
    if trace > 1e18:
        return torch.zeros_like(A)
    s = 1 / (1.02 * trace**0.5 + 1e-6)
    out = torch.empty_like(A)
    for i in range(m):
        for j in range(m):
            square = sum(A[i, k].item() * A[k, j].item() for k in range(m))
            out[i, j] = s * (b * s**2 * A[i, j].item() + c * s**4 * square + a * (i == j))
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_polynomial_with_the_division_by_the_norm_is_float64s(dtype):
    """Against loops over elements: norms from 1e-9 to 1e8, where the type holds them."""
    scales = (1e-2, 1.0, 3.0) if dtype == torch.float16 else (1e-9, 1e-6, 1e-2, 1.0, 1e3, 1e7)
    Y = torch.stack([draw(9, 40, seed=i, scale=s) for i, s in enumerate(scales)])
    A = (Y @ Y.mT).to(dtype)
    with poisoned_memory():
        out = normalised_polynomial(A, *NUMBERS)
    assert out.shape == A.shape and out.dtype == dtype and out.is_contiguous()
    digits = torch.finfo(dtype).eps
    for x, matrix in zip(out, A):
        exact = twin(matrix, *NUMBERS)
        assert (x.double() - exact).abs().max() <= 2 * digits * exact.abs().max()
    reference = normalised_polynomial_reference(A, *NUMBERS)
    torch.testing.assert_close(out, reference, rtol=4 * digits, atol=0)


@pytest.mark.parametrize("m", [0, 1, 31, 64, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_traces_of_every_size(m, dtype):
    """That blocks and tiles do not divide; in a batch, and in one that is strided."""
    Y = draw(2, m, 70, scale=0.1)
    A = (Y @ Y.mT).to(dtype)
    exact = normalised_polynomial_reference(A.double(), *NUMBERS)
    apart = torch.stack([A, A], dim=-1)[..., 0]
    for given in A, A.mT, apart:
        with poisoned_memory():
            out = normalised_polynomial(given, *NUMBERS)
        if m:
            # Numbers up to 22.5 add up to less than 2
            allowed = 2 * torch.finfo(dtype).eps * exact.abs().max() + 1e-5
            assert (out.double() - exact).abs().max() <= allowed
            assert not runs_triton(A) or torch.equal(out, out.mT)


def test_norms_that_are_nothing_too_large_or_no_number():
    Y = torch.stack([draw(5, 9, scale=s) for s in (0.0, 1e10, 1e18, 1.0)])
    Y[3, 1, 2] = float("nan")
    with poisoned_memory():
        out = normalised_polynomial(Y @ Y.mT, *NUMBERS)
    assert (out[0] @ Y[0]).eq(0).all() and out[0].isfinite().all()
    assert not out[1].any() and not out[2].any()
    assert out[3].isnan().all()
    reference = normalised_polynomial_reference(Y[:3] @ Y[:3].mT, *NUMBERS)
    torch.testing.assert_close(out[:3], reference)


def test_strided_and_expanded_inputs():
    """Every layout of X with a C of its own, and every layout of C with one X."""
    wide = draw(3, 50, 130)
    for X in (
        wide[..., ::3],
        wide[::2, :, 1:],
        wide.permute(1, 0, 2),
        wide.permute(2, 1, 0)[:5],
        wide[0].expand(4, 50, 130),
        draw(50, 1).expand(50, 70),
    ):
        C = symmetric(*X.shape[:-1], X.size(-2), seed=1)
        check(X, C.mT, alpha=2.0, beta=3.0)
    X = wide[:, ::2, 5:105]
    m = X.size(-2)
    C = symmetric(3, m, m, seed=1)
    for c in (C, C.mT, symmetric(m, m).expand(3, m, m), symmetric(3, m + 9, m + 9)[..., 9:, 9:]):
        check(X, c, alpha=2.0, beta=3.0)


def test_only_the_lower_half_of_c_counts():
    X, C = draw(140, 20), symmetric(140, 140, seed=1)
    if runs_triton(X):
        spoilt = C.tril() + torch.full_like(C, float("nan")).triu(1)
        assert torch.equal(symmetric_matmul(X, spoilt, beta=1.0), symmetric_matmul(X, C, beta=1.0))


def test_beta_zero_ignores_c():
    X = draw(9, 20)
    out = symmetric_matmul(X, torch.full((9, 9), float("nan"), device=DEVICE), beta=0.0)
    assert torch.equal(out, symmetric_matmul(X))


def test_large_and_small_values():
    X = torch.stack([draw(20, 30, scale=s) for s in (1e4, 1.0, 1e-4, 0.0)])
    for x in X:
        check(x)
        check(x.bfloat16())
    assert not symmetric_matmul(X)[3].any()
    assert symmetric_matmul(draw(5, 8, scale=1e3).half() + 1e3)[0, 0].isinf()  # as fp16 has it


def test_nan_stays_in_its_row_and_column():
    X = draw(140, 30)
    X[131, 29] = float("nan")
    nan = symmetric_matmul(X).isnan()
    assert nan[131].all() and nan[:, 131].all() and nan.sum() == 2 * 140 - 1


def test_two_runs_agree_bit_by_bit():
    X = draw(2, 200, 96, dtype=torch.bfloat16)
    assert torch.equal(symmetric_matmul(X), symmetric_matmul(X))


def test_wrong_shapes_and_dtypes_are_refused():
    X = draw(3, 8, 5)
    for C in (draw(3, 5, 5), draw(8, 8), draw(3, 8, 8, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="expected"):
            symmetric_matmul(X, C, beta=1.0)


# --- tiles: every one on or below the diagonal once


@triton.jit
def triangle_kernel(i, row, col, n, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    r, c = triangle(tl.load(i + at), n)
    tl.store(row + at, r)
    tl.store(col + at, c)


def tiles(i, n):
    i = torch.as_tensor(i, dtype=torch.int32, device=DEVICE)
    padded = torch.zeros(triton.next_power_of_2(len(i)), dtype=torch.int32, device=DEVICE)
    padded[: len(i)] = i
    row, col = torch.empty_like(padded), torch.empty_like(padded)
    triangle_kernel[1,](padded, row, col, n, len(padded))
    return list(zip(row[: len(i)].tolist(), col[: len(i)].tolist()))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 24, 25])
def test_every_tile_comes_once(n):
    assert sorted(tiles(range(n * (n + 1) // 2), n)) == [
        (r, c) for r in range(n) for c in range(r + 1)
    ]


@pytest.mark.parametrize("n", [46340, 46341, 65534, 65535])
def test_tiles_of_very_large_matrices(n):
    """Where fp32 square roots are off: ids up to 2^31, all different, none above the diagonal."""
    last = n * (n + 1) // 2 - 1
    ids = sorted(
        {
            *range(100),
            *range(last - 99, last + 1),
            *range(last // 2 - 50, last // 2 + 50),
            *(r * (r + 1) // 2 + d for r in range(1, n, n // 300) for d in (-1, 0, 1)),
        }
    )
    found = tiles(ids, n)
    assert len(set(found)) == len(ids) and all(0 <= c <= r < n for r, c in found)


# --- the op


def test_registration_is_sound():
    X, C = draw(2, 20, 30), symmetric(2, 20, 20)
    for args in (
        (X, None, 1.0, 0.0),
        (X.mT, None, 2.0, 0.0),
        (X, C, 0.5, 2.0),
        (X[0], C[0], 0.5, 2.0),
        (X.half(), None, 1.0, 0.0),
        (C @ C.mT, C @ C.mT, 0.5, 2.0, 1.0, True),
    ):
        torch.library.opcheck(_symmetric_matmul, args)


def test_compiles_without_graph_breaks():
    def f(X):
        A = symmetric_matmul(X.mT)
        return symmetric_matmul(A, A, alpha=0.5, beta=-1.0) + A

    X = draw(2, 30, 20)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(X), f(X))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_triton_the_same_numbers(dtype, monkeypatch):
    """What a CPU runs outside the tests."""
    X, C = draw(2, 3, 20, 30, dtype=dtype), symmetric(2, 3, 20, 20, dtype=dtype, seed=1)
    cases = [(X, None), (X, C), (X.mT.contiguous().mT, C), (X[0, 0], C[0, 0])]
    kernels = [symmetric_matmul(x, c, alpha=0.5, beta=2.0) for x, c in cases]
    monkeypatch.setattr(module, "runs_triton", lambda x: False)
    for (x, c), expected in zip(cases, kernels):
        out = symmetric_matmul(x, c, alpha=0.5, beta=2.0)
        assert out.is_contiguous()
        torch.testing.assert_close(
            out, expected, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-2
        )
        torch.library.opcheck(_symmetric_matmul, (x, c, 0.5, 2.0))


@pytest.mark.parametrize("strides", [(2**30, 1), (1, 2**30)], ids=["rows", "columns"])
def test_offsets_beyond_int32(strides):
    """Three rows, or columns, that lie 2^30 elements apart, in memory that is reserved but not
    touched."""
    base = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    shape = (3, 64) if strides[1] == 1 else (64, 3)
    far = base.as_strided(shape, strides)
    near = draw(*shape, dtype=torch.float16)
    far.copy_(near)
    assert torch.equal(symmetric_matmul(far), symmetric_matmul(near))
    batch = base.as_strided((3, 8, 8), (2**30, 8, 1))
    squares = symmetric(3, 8, 8, dtype=torch.float16)
    batch.copy_(squares)
    assert torch.equal(
        symmetric_matmul(batch, batch, beta=1.0), symmetric_matmul(squares, squares, beta=1.0)
    )
