"""kernels/quantize.py and fp8_linear.py: quantising is PyTorch's cast bit by bit; the linear
layer against its formula and against float64."""

import pytest
import torch
from kernel_checks import (
    DEVICE,
    DTYPES,
    assert_as_exact_as_eager,
    draw,
    outputs_and_gradients,
    poisoned_memory,
    to_double,
)

from kernels import quantize as module
from kernels.fp8_linear import (
    DelayedScale,
    _fp8_linear,
    _fp8_matmul,
    fp8_linear,
    fp8_linear_reference,
    fp8_matmul,
)
from kernels.quantize import (
    E4M3,
    E5M2,
    _amax,
    _quantize,
    _transpose_copy,
    amax,
    dynamic_scale,
    quantize,
    quantize_and_amax,
    quantize_reference,
    transpose_copy,
)

INF, NAN = float("inf"), float("nan")
SHAPES = [(0, 96), (5, 0), (1, 1), (3, 768), (199, 96), (70, 133)]
# Hopper's tensor cores add fp8 products with about 14 bits (DeepSeek-V3's report, arXiv:2412.19437)
SLACK = 1e-6 if DEVICE.type == "cpu" else 1e-3


def scalar(value):
    return torch.tensor(value, device=DEVICE)


def bits(q):
    """Comparable where NaN is not; the sign of NaN is not looked at."""
    return torch.where(q.float().isnan(), 255, q.view(torch.uint8).int())


def wide(*shape, dtype=torch.float32, seed=0):
    """Numbers of such different magnitudes that the formats' subnormals and limits are in."""
    return (draw(*shape, seed=seed) * 2 ** (5 * draw(*shape, seed=seed + 50))).to(dtype)


# --- quantising


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("to", [E4M3, E5M2])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantizing_is_the_clamped_cast_bit_by_bit(shape, to, dtype):
    for x, scale in (
        (wide(*shape, dtype=dtype), 0.37),
        (draw(*shape, dtype=dtype, scale=1e-4), 1.0),
    ):
        with poisoned_memory():
            q, q_t, largest = quantize_and_amax(x, scalar(scale), to, transpose=True)
        expected, expected_t = quantize_reference(x, scalar(scale), to, transpose=True)
        assert q.dtype == q_t.dtype == to and q.is_contiguous() and q_t.is_contiguous()
        assert torch.equal(bits(q), bits(expected)) and torch.equal(bits(q_t), bits(expected_t))
        assert largest.dtype == torch.float32 and largest.shape == ()
        assert largest == amax(x) == (x.float().abs().max() if x.numel() else 0)
        alone, empty = quantize(x, scalar(scale), to)
        assert torch.equal(bits(alone), bits(q)) and empty.shape == (0,)


def test_compiled_it_is_quantised_to_the_same_bits():
    """By plain PyTorch, for Inductor to fuse."""
    x = draw(9, 33, scale=300.0)
    x[0, :3] = torch.tensor([INF, -INF, float("nan")])
    compiled = torch.compile(quantize, backend="aot_eager", fullgraph=True)
    for to in E4M3, E5M2:
        expected, _ = quantize(x, scalar(0.7), to)
        q, empty = compiled(x, scalar(0.7), to)
        assert torch.equal(bits(q), bits(expected))
        assert empty.numel() == 0


@pytest.mark.parametrize(
    "to, values, expected",
    [
        (
            E4M3,
            [448, 449, 1e30, INF, -INF, NAN, 464, 465],
            [448, 448, 448, 448, -448, NAN, 448, 448],
        ),
        (
            E5M2,
            [57344, 61440, 1e30, INF, -INF, NAN, -65504, 0],
            [57344, 57344, 57344, 57344, -57344, NAN, -57344, 0],
        ),
        # subnormals are multiples of 2^-9 and 2^-16; halves go to the even one, also to zero
        (
            E4M3,
            [2**-9, 2**-10, 1.01 * 2**-10, 1.5 * 2**-9, 7.5 * 2**-9, 2**-6],
            [2**-9, 0, 2**-9, 2**-8, 2**-6, 2**-6],
        ),
        (
            E5M2,
            [2**-16, 2**-17, 1.01 * 2**-17, 3.5 * 2**-16, -(2**-40), 1e-45],
            [2**-16, 0, 2**-16, 2**-14, 0, 0],
        ),
        # 17 lies between 16 and 18, 19 between 18 and 20; with two bits 18 lies between 16 and 20
        (E4M3, [17, 19, -17, 17.1], [16, 20, -16, 18]),
        (E5M2, [18, 22, -18, 18.1], [16, 24, -16, 20]),
    ],
)
@pytest.mark.parametrize("path", ["kernel", "PyTorch"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_saturation_subnormals_and_ties(to, values, expected, path, scale, monkeypatch):
    if path == "PyTorch":
        monkeypatch.setattr(module, "runs_triton", lambda x: False)
    x = scale * torch.tensor([values], device=DEVICE)
    q, q_t = quantize(x, scalar(scale), to, transpose=True)
    torch.testing.assert_close(
        q.float().tolist(), [[float(v) for v in expected]], rtol=0, atol=0, equal_nan=True
    )
    assert torch.equal(bits(q_t.t()), bits(q))


def test_largest_value_keeps_infinity_and_nan():
    x = wide(70, 133)
    x[69, 132] = -1e6
    assert amax(x) == quantize_and_amax(x, scalar(1.0))[2] == 1e6
    x[3, 7] = -INF
    assert amax(x) == quantize_and_amax(x, scalar(1.0))[2] == INF
    x[69, 1] = NAN
    assert (
        amax(x).isnan()
        and quantize_and_amax(x, scalar(1.0))[2].isnan()
        and dynamic_scale(x).isnan()
    )


def test_dynamic_scale_fills_the_range_and_has_a_floor():
    x = wide(33, 96)
    for to in (E4M3, E5M2):
        scale = dynamic_scale(x, to)
        assert quantize(x, scale, to)[0].float().abs().max() == torch.finfo(to).max
        assert scale == x.abs().max() / torch.finfo(to).max
    zero = torch.zeros_like(x)
    assert dynamic_scale(zero) > 0 and not quantize(zero, dynamic_scale(zero))[0].float().any()
    assert dynamic_scale(x[:0]) > 0


def test_strided_and_expanded_inputs():
    base = wide(60, 200)
    for x in (
        base[:, 8:104],
        base[::2, :96],
        base.t(),
        base[:1].expand(60, 200),
        base[:, :1].expand(60, 200),
    ):
        results, expected = (quantize(y, scalar(0.5), transpose=True) for y in (x, x.contiguous()))
        for a, b in zip(results, expected):
            assert torch.equal(bits(a), bits(b))
        assert amax(x) == x.abs().max()
        assert torch.equal(transpose_copy(x), x.t()) and transpose_copy(x).is_contiguous()


@pytest.mark.parametrize("dtype", [*DTYPES, E4M3, E5M2])
@pytest.mark.parametrize("shape", SHAPES)
def test_transposed_copy(shape, dtype):
    x = wide(*shape).to(dtype)
    with poisoned_memory():
        y = transpose_copy(x)
    assert y.dtype == dtype and y.is_contiguous() and y.shape == shape[::-1]
    assert torch.equal(
        y.view(torch.uint8), x.t().clone(memory_format=torch.contiguous_format).view(torch.uint8)
    )


def test_offsets_beyond_int32():
    """Rows 2^30 elements apart, in memory that is reserved but not touched."""
    far = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE).as_strided(
        (3, 64), (2**30, 1)
    )
    near = draw(3, 64, dtype=torch.float16)
    far.copy_(near)
    for a, b in zip(
        quantize(far, scalar(0.1), transpose=True), quantize(near, scalar(0.1), transpose=True)
    ):
        assert torch.equal(bits(a), bits(b))
    assert torch.equal(transpose_copy(far), near.t())
    assert amax(far) == near.abs().max()


def test_offsets_of_the_copies_beyond_int32():
    """The first tile of matrices that would be 3 by 2^30 and 2^30 by 3."""
    x, one = draw(64, 128), scalar(1.0)
    big, small = (torch.empty(n, dtype=E5M2, device=DEVICE) for n in (2**31 + 128, 0))
    module.quantize_kernel[1,](x, one, big, small, small, 3, 2**30, 128, 64, 128, False, False)
    expected = quantize_reference(x, one, E5M2)[0]
    assert torch.equal(bits(big.as_strided((3, 128), (2**30, 1))), bits(expected[:3]))
    q = torch.empty(64 * 3, dtype=E5M2, device=DEVICE)
    module.quantize_kernel[1,](x, one, q, big, small, 2**30, 3, 128, 64, 128, True, False)
    assert torch.equal(bits(big.as_strided((3, 64), (2**30, 1))), bits(expected[:, :3].t()))
    big = torch.empty(2**31 + 128, dtype=torch.uint8, device=DEVICE)
    module.transpose_kernel[1,](expected.view(torch.uint8), big, 2**30, 3, 128, 64, 128)
    assert torch.equal(big.as_strided((3, 64), (2**30, 1)), expected.view(torch.uint8)[:, :3].t())


# --- the linear layer


SCALES = [
    dict(),
    dict(x_scale=0.011, w_scale=0.013),
    dict(fp8_backward=True),
    dict(x_scale=0.011, w_scale=0.013, grad_scale=1e-4, fp8_backward=True),
]


def pair(**options):
    return (lambda x, w: fp8_linear(x, w, **options)), (
        lambda x, w: fp8_linear_reference(x, w, **options)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", SCALES)
def test_linear_is_its_formula(dtype, options):
    for shape in ((16, 64), (2, 3, 16, 32), (160, 96), (0, 64)):
        inputs = [draw(*shape, dtype=dtype), draw(48, shape[-1], dtype=dtype, seed=1)]
        assert_as_exact_as_eager(*pair(**options), inputs, slack=SLACK)


@pytest.mark.parametrize(
    "options", [*(pytest.param(s, marks=pytest.mark.slow) for s in SCALES[:3]), SCALES[3]]
)
def test_linear_with_strided_inputs_and_expanded_upstream_gradients(options):
    wide_, w = draw(4, 16, 200), draw(80, 96, seed=1)
    for x in (wide_[:, :, :96], wide_[:, ::2, 8:104], wide_.mT[:, :96, :1].expand(4, 96, 96)):
        for dy in (draw(1).expand(*x.shape[:-1], 80), draw(80).expand(*x.shape[:-1], 80)):
            assert_as_exact_as_eager(*pair(**options), [x, w], [dy], slack=SLACK)
            assert_as_exact_as_eager(*pair(**options), [x, draw(96, 80).t()], [dy], slack=SLACK)


def test_rows_of_any_number_when_backward_is_not_fp8():
    for shape in ((1, 32), (3, 32), (199, 32), (32,)):
        assert_as_exact_as_eager(*pair(), [draw(*shape), draw(16, 32, seed=1)], slack=SLACK)


def test_weights_may_be_of_another_dtype():
    inputs = [draw(32, 64, dtype=torch.bfloat16), draw(48, 64, seed=1)]
    for options in SCALES:
        y, dx, dw = outputs_and_gradients(pair(**options)[0], inputs)
        assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.slow
def test_error_against_the_exact_product_is_that_of_fp8():
    """Relative error, in norm. e4m3 rounds normal numbers by about 2.6% each, e5m2 by about
    5.2%."""
    inputs = [draw(256, 256), draw(256, 256, seed=1)]
    exact = outputs_and_gradients(
        torch.nn.functional.linear, [to_double(x) for x in inputs], [draw(256, 256, seed=2)]
    )

    def errors(**options):
        results = outputs_and_gradients(
            lambda x, w: fp8_linear(x, w, **options), inputs, [draw(256, 256, seed=2)]
        )
        return [((r - e).norm() / e.norm()).item() for r, e in zip(results, exact)]

    y, dx, dw = errors()
    assert 0.03 < y < 0.04 and dx < 1e-5 and dw < 1e-5
    y, dx, dw = errors(fp8_backward=True)
    assert 0.03 < y < 0.04 and 0.045 < dx < 0.065 and 0.045 < dw < 0.065
    assert errors(x_scale=1.0, w_scale=1.0)[0] < 0.04  # e4m3 has range to spare
    assert errors(x_scale=1e-3)[0] > 0.2  # saturates at 0.448


def test_saturated_and_bf16_gradients_by_hand():
    x, w = torch.full((16, 16), 1000.0, device=DEVICE), torch.full((16, 16), 2.0, device=DEVICE)
    y, dx, dw = outputs_and_gradients(
        pair(x_scale=1.0, w_scale=1.0)[0], [x, w], [torch.ones_like(x)]
    )
    assert (y == 16 * 448 * 2).all() and (dx == 16 * 2).all() and (dw == 16 * 1000).all()
    y, dx, dw = outputs_and_gradients(
        pair(x_scale=1.0, w_scale=1.0, grad_scale=2**-16, fp8_backward=True)[0],
        [x, w],
        [torch.ones_like(x)],
    )
    assert (dx == 16 * 2 * 0.875).all() and (dw == 16 * 448 * 0.875).all()  # 57344 / 2^16


def test_zero_tensors_give_zeros_and_nan_shows():
    zero, one = torch.zeros(16, 32, device=DEVICE), torch.ones(16, 32, device=DEVICE)
    for options in (dict(), dict(fp8_backward=True)):
        fn = pair(**options)[0]
        for x, w, g in ((zero, one, 1.0), (one, zero, 1.0), (one, one, 0.0), (zero, zero, 0.0)):
            y, dx, dw = outputs_and_gradients(fn, [x, w], [torch.full((16, 16), g, device=DEVICE)])
            for result, expected in (
                (y, 32 * x[0, 0] * w[0, 0]),
                (dx, 16 * g * w[0, 0]),
                (dw, 16 * g * x[0, 0]),
            ):
                torch.testing.assert_close(result, expected.expand_as(result))
        bad = one.clone()
        bad[3, 4] = NAN
        assert fn(bad, one).isnan().any()
    assert fp8_linear(bad, one, x_scale=1.0, w_scale=1.0)[3].isnan().all()


def test_static_scales_are_numbers_or_tensors():
    inputs, g = [draw(16, 32), draw(48, 32, seed=1)], [draw(16, 48, seed=2)]
    runs = [
        outputs_and_gradients(
            pair(x_scale=s[0], w_scale=s[1], grad_scale=s[2], fp8_backward=True)[0], inputs, g
        )
        for s in ((2, 1, 1), (2.0, 1.0, 1.0), (scalar(2.0), scalar(1.0), scalar(1.0)))
    ]
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


def test_a_frozen_input_or_weight():
    for needs in ((True, False), (False, True)):
        for options in SCALES:
            x, w = (
                draw(16, 32).requires_grad_(needs[0]),
                draw(48, 32, seed=1).requires_grad_(needs[1]),
            )
            y = fp8_linear(x, w, **options)
            y.backward(draw(16, 48, seed=2))
            a, b = draw(16, 32).requires_grad_(), draw(48, 32, seed=1).requires_grad_()
            fp8_linear(a, b, **options).backward(draw(16, 48, seed=2))
            for p, q, need in ((x, a, needs[0]), (w, b, needs[1])):
                assert torch.equal(p.grad, q.grad) if need else p.grad is None


def test_shapes_that_do_not_fit_are_named():
    for x, w, options, expected in (
        ((16, 32), (16, 48), {}, r"x \(16, 32\) and w \(16, 48\) differ"),
        ((16, 24), (16, 24), {}, r"w \(16, 24\) must have multiples of 16"),
        ((16, 32), (17, 32), {}, r"w \(17, 32\) must have multiples of 16"),
        ((3, 5, 32), (16, 32), dict(fp8_backward=True), r"x \(3, 5, 32\) has 15 rows"),
    ):
        with pytest.raises(ValueError, match=expected):
            fp8_linear(draw(*x), draw(*w), **options)


def test_old_gpus_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(module, "chip", lambda x: 80)
    with pytest.raises(ValueError, match="8.9 or newer.*8.0"):
        fp8_linear(draw(16, 32), draw(16, 32))


# --- delayed scales


def delayed(**kwargs):
    return DelayedScale(4.0, **kwargs).to(DEVICE)


def test_delayed_scale_follows_the_last_step():
    scale, x, w = delayed(headroom=1.5), draw(16, 32), draw(16, 32, seed=1)
    assert torch.equal(fp8_linear(x, w, x_scale=scale), fp8_linear(x, w, x_scale=4.0 * 1.5 / 448))
    fp8_linear(x * 2, w, x_scale=scale)  # another micro-batch, then a smaller one
    fp8_linear(x / 2, w, x_scale=scale)
    assert scale.amax == 2 * x.abs().max()
    before = scale.scale.clone()
    scale.roll()
    assert scale.scale != before and scale.amax == 0
    torch.testing.assert_close(scale.scale, 2 * x.abs().max() * 1.5 / 448)
    assert (
        not quantize(x * 3.1, scale.scale)[0].float().abs().lt(448).all()
    )  # beyond the headroom it saturates


def test_steps_that_measure_nothing_useful_leave_the_scale():
    for seen in (None, 0.0, NAN, INF):
        scale = delayed()
        if seen is not None:
            fp8_linear(torch.full((16, 32), seen, device=DEVICE), draw(16, 32), x_scale=scale)
        scale.roll()
        torch.testing.assert_close(scale.scale, scalar(4.0 * 1.25 / 448))
        assert scale.amax == 0


def test_delayed_scale_records_in_training_only_and_starts_anew():
    scale, x, w = delayed(), draw(16, 32), draw(16, 32, seed=1)
    with torch.no_grad():
        fp8_linear(x, w, x_scale=scale)
    assert scale.amax == 0
    fp8_linear(x, w, x_scale=scale)
    scale.roll()
    fp8_linear(x, w, x_scale=scale)
    scale.reset()
    assert scale.amax == 0
    torch.testing.assert_close(scale.scale, scalar(4.0 * 1.25 / 448))


def test_delayed_scale_is_saved_and_loaded():
    scale, other = delayed(), delayed()
    fp8_linear(draw(16, 32), draw(16, 32), x_scale=scale)
    other.load_state_dict(scale.state_dict())
    assert other.amax == scale.amax > 0
    scale.roll()
    other.roll()
    assert other.scale == scale.scale


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_delayed_scales_of_all_three_tensors_over_micro_batches(backend):
    """Recording happens in forward and backward of a compiled graph, rolling between steps
    recompiles nothing."""
    scales = [delayed(), delayed(), delayed(dtype=E5M2)]

    def f(x, w):
        return fp8_linear(
            x, w, x_scale=scales[0], w_scale=scales[1], grad_scale=scales[2], fp8_backward=True
        )

    run = f
    if backend != "eager":
        torch._dynamo.reset()
        run = torch.compile(f, fullgraph=True, backend=backend)
    w = draw(48, 32, seed=1).requires_grad_()
    for step in range(3):
        used, largest = [s.scale.item() for s in scales], [0.0, 0.0, 0.0]
        for micro in range(3):
            x = draw(16, 32, seed=10 * step + micro).requires_grad_()
            g = draw(16, 48, seed=10 * step + micro + 100)
            w.grad = None
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                y = run(x, w)
            y.backward(g)
            expected = outputs_and_gradients(
                pair(x_scale=used[0], w_scale=used[1], grad_scale=used[2], fp8_backward=True)[0],
                [x, w],
                [g],
            )
            for a, b in zip((y, x.grad, w.grad), expected):
                assert torch.equal(a, b)
            largest = [max(a, b.abs().max().item()) for a, b in zip(largest, (x, w, g))]
        assert [s.amax.item() for s in scales] == largest
        for s in scales:
            s.roll()
        torch.testing.assert_close(scales[2].scale.item(), largest[2] * 1.25 / 57344)


# --- the machinery


@pytest.mark.parametrize("options", SCALES)
def test_compiles_without_graph_breaks(options):
    def f(x, w):
        return fp8_linear(x.relu(), w, **options).square()

    inputs = [draw(2, 16, 32), draw(48, 32, seed=1)]
    compiled = outputs_and_gradients(torch.compile(f, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip(compiled, outputs_and_gradients(f, inputs)):
        torch.testing.assert_close(a, b)


def test_two_runs_agree_bit_by_bit():
    inputs = [draw(199, 96), draw(48, 96, seed=1)]
    for a, b in zip(
        outputs_and_gradients(fp8_linear, inputs), outputs_and_gradients(fp8_linear, inputs)
    ):
        assert torch.equal(a, b)


def test_without_triton_the_same_numbers(monkeypatch):
    """What a CPU runs outside the tests, forward and backward."""
    if DEVICE.type == "cuda":
        pytest.skip("tested on the CPU")
    inputs = [draw(32, 96), draw(48, 96, seed=1)]
    kernels = [outputs_and_gradients(pair(**options)[0], inputs) for options in SCALES]
    x = wide(70, 133)
    moved = transpose_copy(x), amax(x)
    monkeypatch.setattr(module, "runs_triton", lambda x: False)
    monkeypatch.setattr(module, "triton", None)
    for options, expected in zip(SCALES, kernels):
        for a, b in zip(outputs_and_gradients(pair(**options)[0], inputs), expected):
            assert torch.equal(a, b)
        assert_as_exact_as_eager(*pair(**options), inputs)
    assert torch.equal(transpose_copy(x), moved[0]) and amax(x) == moved[1] and amax(x[:0]) == 0


FP8_CHECKS = (
    "test_autograd_registration",
    "test_faketensor",
)  # the others compare, which PyTorch cannot in fp8


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("record", [False, True])
def test_registration_of_quantizing_is_sound(transpose, record):
    x = draw(3, 96)
    for to in (E4M3, E5M2):
        torch.library.opcheck(
            _quantize, (x, scalar(0.1), to, transpose, record), test_utils=FP8_CHECKS
        )
    assert torch.equal(x, draw(3, 96))


def test_registration_of_the_rest_is_sound():
    x = draw(3, 96)
    torch.library.opcheck(_amax, (x,))
    torch.library.opcheck(_transpose_copy, (x,))
    torch.library.opcheck(_transpose_copy, (x.to(E5M2),), test_utils=FP8_CHECKS)


PRODUCT_CHECKS = (*FP8_CHECKS, "test_aot_dispatch_static", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("fp8_backward", [False, True])
def test_registration_of_the_products_is_sound(fp8_backward):
    x, w, s = draw(16, 32), draw(48, 32, seed=1), scalar(0.02)
    (q_x, x_t), (q_w, w_t) = quantize(x, s, transpose=True), quantize(w, s, transpose=True)
    torch.library.opcheck(
        _fp8_matmul, (q_x, q_w, s, s, torch.bfloat16, True), test_utils=PRODUCT_CHECKS
    )
    torch.library.opcheck(
        _fp8_linear,
        (
            x.requires_grad_(),
            w.requires_grad_(),
            q_x,
            q_w,
            x_t,
            w_t,
            s,
            s,
            None,
            None,
            fp8_backward,
        ),
        test_utils=PRODUCT_CHECKS,
    )


def test_product_of_quantized_matrices():
    a, b = (quantize(draw(32, 64, seed=i), scalar(0.02), to)[0] for i, to in ((0, E5M2), (1, E4M3)))
    exact = (a.double() @ b.double().t()) * 0.02 * 0.03
    y = fp8_matmul(a, b, scalar(0.02), scalar(0.03), torch.float32)
    torch.testing.assert_close(y.double(), exact, rtol=SLACK, atol=SLACK * exact.abs().max().item())
    assert not fp8_matmul(a[:, :0], b[:, :0], scalar(1.0), scalar(1.0)).any()
