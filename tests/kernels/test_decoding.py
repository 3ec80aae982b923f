"""kernels/decoding.py: the library in C beside float64 and the PyTorch forms."""

import math
import weakref

import pytest
import torch
from helpers import built

from inference import quantize
from kernels import choose_ops, decoding, native
from kernels.decoding import Decoding

HALF = torch.bfloat16
DTYPES = [torch.float32, HALF]
REFERENCE = choose_ops("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache") / "decoding"


@pytest.fixture(scope="module")
def compiled(folder):
    library, said = built(Decoding, folder)
    assert said == ["compiling kernels/decoding.c (once) ..."]
    with torch.no_grad():
        yield library


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(found, eager, exact):
    """No further from float64 than twice as far as eager is, and a rounding."""
    assert found.dtype == eager.dtype and found.shape == eager.shape
    scale = exact.abs().max()
    error, eager_error = ((y.double() - exact).abs().max() / scale for y in (found, eager))
    assert error <= 2 * eager_error + torch.finfo(found.dtype).eps


@pytest.mark.parametrize("rows", [1, 3, 6, 9])
@pytest.mark.parametrize("n_out, n_in", [(1, 4), (7, 36), (130, 96), (64, 770)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(compiled, rows, n_out, n_in, transposed, dtype):
    x = draw(rows, n_in, dtype=dtype)
    w = draw(n_out, n_in, dtype=dtype, seed=1)
    exact = x.double() @ w.double().t()
    eager = x @ w.t()
    if transposed:
        w = w.t().contiguous()
    check(compiled.linear(x[:, None], w, transposed)[:, 0], eager, exact)


@pytest.fixture
def in_tiles(compiled, monkeypatch):
    """The library where the processor has tiles, without products by rows or by PyTorch."""
    if not compiled.has_tiles:
        pytest.skip("needs AMX")
    monkeypatch.setattr(compiled.c, "linear", None)
    monkeypatch.setattr(decoding, "linear_reference", None)
    return compiled


@pytest.mark.parametrize("rows", [9, 16, 33, 100, 128])
@pytest.mark.parametrize("n_out, n_in", [(32, 32), (50, 96), (130, 64), (1026, 736)])
@pytest.mark.parametrize("threads", [1, 2])
def test_products_in_tiles(in_tiles, rows, n_out, n_in, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x = draw(rows, n_in, dtype=HALF)
    w = draw(n_out, n_in, dtype=HALF, seed=1)
    exact = x.double() @ w.double().t()
    check(in_tiles.linear(x[:, None], w)[:, 0], x @ w.t(), exact)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [33, 100])
def test_products_of_codes_in_tiles(in_tiles, kind, rows):
    x = draw(rows, 96, dtype=HALF)
    w = quantize.Quantized(draw(70, 96, dtype=HALF, seed=1), kind, decoding=in_tiles)
    numbers = w.dequantized()
    exact = x.double() @ numbers.double().t()
    check(in_tiles.linear_codes(x, w.matrix), x @ numbers.t(), exact)


@pytest.mark.parametrize(
    "rows, n_out, n_in, dtype",
    [(129, 64, 64, HALF), (9, 31, 64, HALF), (9, 64, 48, HALF), (9, 64, 64, torch.float32)],
)
def test_what_tiles_are_not_for_is_left_to_pytorch(compiled, rows, n_out, n_in, dtype, monkeypatch):
    monkeypatch.setattr(compiled.c, "linear_in_tiles", None)
    x = draw(rows, n_in, dtype=dtype)
    w = draw(n_out, n_in, dtype=dtype, seed=1)
    assert torch.equal(compiled.linear(x, w), x @ w.t())
    w = w.t().contiguous()
    assert torch.equal(compiled.linear(x, w, transposed=True), x @ w)


def test_large_pages_change_no_value(compiled):
    large, small = torch.arange(3 << 20), torch.arange(5)
    compiled.in_large_pages([large, small, large[:0]])
    assert torch.equal(large, torch.arange(3 << 20)) and torch.equal(small, torch.arange(5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_out, n_in", [(1, 4), (7, 36), (64, 4864)])
@pytest.mark.parametrize("rows", [1, 6])
def test_products_in_int8(compiled, dtype, n_out, n_in, rows):
    x = draw(rows, n_in, dtype=dtype)
    codes = draw(n_out, n_in, seed=1).mul(60).clamp(-128, 127).to(torch.int8)
    scales = draw(n_out, seed=2).abs().to(HALF)
    exact = x.double() @ (codes.double() * scales.double()[:, None]).t()
    found = compiled.linear_codes(x, decoding.matrix_of_codes("int8", codes, scales))
    error = (found.double() - exact).abs().max() / exact.abs().max()
    assert error < (1e-3 if dtype == torch.float32 else 5e-3)


def test_the_largest_int8_products_do_not_overflow(compiled):
    for n_in in 64, 768, decoding.MOST_INPUTS:
        x = torch.full((1, n_in), 3.0)
        codes = torch.full((2, n_in), -128, dtype=torch.int8)
        ones = torch.ones(2, dtype=HALF)
        found = compiled.linear_codes(x, decoding.matrix_of_codes("int8", codes, ones))
        torch.testing.assert_close(found, torch.full((1, 2), -384.0 * n_in), rtol=2e-3, atol=0)
    wide = torch.zeros(1, decoding.MOST_INPUTS + 1, dtype=torch.int8)
    assert decoding.matrix_of_codes("int8", wide, ones) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_out, n_in", [(1, 32), (7, 96), (5, 768), (3, 2080)])
def test_codes_of_int4(compiled, dtype, n_out, n_in):
    """Products of few rows, and all of it as numbers."""
    codes = torch.randint(16, (n_out, n_in), generator=torch.Generator().manual_seed(0))
    scales = draw(n_out, 2, n_in // 32, seed=2).to(HALF)  # and zeros
    scale, zero = scales.double().repeat_interleave(32, dim=2).unbind(1)
    w = (codes - 8) * scale + zero
    two_each = (codes[:, ::2] + 16 * codes[:, 1::2]).to(torch.uint8)
    matrix = decoding.matrix_of_codes("int4", two_each, scales)
    assert torch.equal(compiled.dequantized(matrix, dtype), w.to(dtype))
    x = draw(3, n_in, dtype=dtype)
    exact = x.double() @ w.t()
    found = compiled.linear_codes(x, matrix)
    error = (found.double() - exact).abs().max() / exact.abs().max()
    assert found.dtype == dtype and error < (2e-4 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_int8_as_numbers(compiled, dtype):
    codes = torch.randint(-128, 128, (7, 45), generator=torch.Generator().manual_seed(0))
    codes, scales = codes.to(torch.int8), draw(7, dtype=HALF)
    matrix = decoding.matrix_of_codes("int8", codes, scales)
    expected = codes.to(dtype) * scales.to(dtype)[:, None]
    assert torch.equal(compiled.dequantized(matrix, dtype), expected)


def test_a_matrix_has_what_it_points_at():
    codes, scales = torch.ones(3, 64, dtype=torch.int8), torch.ones(3, dtype=HALF)
    there = [weakref.ref(codes), weakref.ref(scales)]
    matrix = decoding.matrix_of_codes("int8", codes, scales)
    del codes, scales
    assert all(ref() is not None for ref in there)
    del matrix
    assert all(ref() is None for ref in there)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(compiled, bad):
    x = draw(1, 64)
    x[0, 40] = bad
    codes = torch.ones(3, 64, dtype=torch.int8)
    of_codes = decoding.matrix_of_codes("int8", codes, torch.ones(3, dtype=HALF))
    assert not compiled.linear_codes(x, of_codes).isfinite().any()
    half = x.to(HALF)
    assert not compiled.linear(half, torch.ones(3, 64, dtype=HALF)).isfinite().any()
    assert compiled.ops(REFERENCE).rms_norm(half).isnan()[0, 40]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [5, 96])
def test_norms(compiled, dtype, n):
    ops = compiled.ops(REFERENCE)
    x = 3 * draw(4, 1, n, dtype=dtype)
    more = draw(4, 1, n, dtype=dtype, seed=1)
    weight = draw(n, seed=2)
    for w in None, weight.to(dtype), weight:
        y, s = ops.add_rms_norm(x, more, w, 1e-5)
        reference, sums = REFERENCE.add_rms_norm(x, more, w, 1e-5)
        assert torch.equal(s, sums)
        wide = s.double()
        exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        exact = exact if w is None else exact * w.double()
        check(y, reference, exact)
        check(ops.rms_norm(s, w, 1e-5), reference, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1, 10), (2, 4, 96), (1, 90, 1600)])
def test_gates(compiled, dtype, shape):
    ops = compiled.ops(REFERENCE)
    x = 3 * draw(*shape, dtype=dtype)
    gate, up = x.double().chunk(2, dim=-1)
    check(ops.swiglu(x), REFERENCE.swiglu(x), gate * gate.sigmoid() * up)
    rows = x.transpose(0, 1)  # which are not for it, unless there is one of either
    torch.testing.assert_close(ops.swiglu(rows), REFERENCE.swiglu(rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, S", [(3, 1), (1, 7), (2, 6), (1, 300)])
def test_turns(compiled, dtype, B, S):
    kv = draw(B, S, 2, 5, 16, dtype=dtype)
    cos, sin = (draw(B, S, 1, 8, dtype=dtype, seed=i) for i in (1, 2))
    for x in kv[:, :, 1], kv[:, :, 0].contiguous():
        exact = decoding.rotate_halves_reference(x.double(), cos.double(), sin.double())
        eager = decoding.rotate_halves_reference(x, cos, sin)
        found = compiled.rotate_halves(x, cos, sin)
        check(found, eager, exact)
        if dtype == torch.bfloat16:
            assert torch.equal(found, eager)  # products are rounded where PyTorch rounds them
    apart = kv[:, :, 0].transpose(0, 1)
    turned = compiled.rotate_halves(apart, cos.transpose(0, 1), sin.transpose(0, 1))
    torch.testing.assert_close(turned.transpose(0, 1), eager, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1000, 6, 0])
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_of_one_token(compiled, dtype, window, threads):
    lengths = torch.tensor([0, 300, 5])
    q = 3 * draw(3, 1, 6, 16, dtype=dtype)
    k, v = draw(3, 1, 2, 2, 16, dtype=dtype, seed=1).unbind(2)
    past = draw(2, 4, 320, 2, 16, dtype=dtype, seed=2)
    for b, n in enumerate(lengths):
        past[:, b, n:] = math.nan  # what nothing may see
    past[:, 3] = math.nan
    results = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    for attend, wide in (
        (compiled.attend_one, dtype),
        (decoding.attend_one_reference, dtype),
        (decoding.attend_one_reference, torch.float64),
    ):
        keys, values = past.clone().to(wide).unbind(0)
        if attend is decoding.attend_one_reference:  # which multiplies what it does not see by 0
            keys, values = (t.nan_to_num() for t in (keys, values))
        y = attend(*(t.to(wide) for t in (q, k, v)), keys, values, lengths, window, 0.3)
        results.append((y, keys.nan_to_num(), values.nan_to_num()))
    torch.set_num_threads(before)
    (found, *kept), (eager, *expected), (exact, *_) = results
    check(found, eager, exact)
    assert torch.equal(kept[0], expected[0]) and torch.equal(kept[1], expected[1])


def test_gradients_and_many_rows_are_left_to_pytorch(compiled):
    ops = compiled.ops(REFERENCE)
    x = draw(2, 1, 16).requires_grad_()
    with torch.enable_grad():
        ops.rms_norm(x).sum().backward()
    assert x.grad is not None
    many = draw(decoding.FEW_ROWS_OF_CODES + 1, 16)
    codes = torch.ones(3, 16, dtype=torch.int8)
    matrix = decoding.matrix_of_codes("int8", codes, torch.ones(3, dtype=HALF))
    assert compiled.linear_codes(many, matrix) is None
    assert ops.rms_norm(draw(2, 16).double()).dtype == torch.float64


def test_threads_change_no_bit(compiled):
    x, w = draw(2, 96, dtype=HALF), draw(200, 96, dtype=HALF, seed=1)
    before = torch.get_num_threads()
    made = []
    for threads in 1, 2:
        torch.set_num_threads(threads)
        made.append(compiled.linear(x, w))
        made.append(compiled.linear(x, w[:192].view(96, 192), True))
    torch.set_num_threads(before)
    assert torch.equal(made[0], made[2]) and torch.equal(made[1], made[3])


def test_without_a_compiler_pytorch_stays(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(native, "COMPILERS", ())
    assert Decoding.build(tmp_path, said.append) is None
    assert "no C compiler" in said.pop()
    monkeypatch.setattr(native, "COMPILERS", ("false",))
    assert Decoding.build(tmp_path, said.append) is None
    assert "without kernels/decoding.c" in said[-1]
    assert not list(tmp_path.iterdir())


def test_without_a_folder_for_it_pytorch_stays(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for folder in file, file / "folder":
        said = []
        assert Decoding.build(folder, said.append) is None
        assert "without kernels/decoding.c" in said[-1]


def test_it_is_compiled_once(compiled, folder, monkeypatch):
    said = []
    monkeypatch.setattr(native, "COMPILERS", ())
    assert Decoding.build(folder, said.append) is not None
    assert said == [] and len(list(folder.iterdir())) == 1
