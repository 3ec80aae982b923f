"""kernels/mlp.py: forward and backward against float64 and eager PyTorch, through both kernels,
in all layouts."""

import functools

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
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import fp8_mlp, mlp
from kernels import mlp_kernels as module
from kernels.fp8_mlp import _fp8_relu2_mlp, fp8_relu2_mlp, fp8_relu2_mlp_reference
from kernels.mlp import (
    _linear_relu2,
    _relu2_mlp,
    _relu2_mlp_backward,
    linear_relu2,
    linear_relu2_reference,
    relu2_mlp,
    relu2_mlp_reference,
)
from kernels.quantize import quantize_reference

SHAPES = [
    (0, 96, 384),
    (1, 96, 384),
    (140, 96, 272),
    (3, 100, 40),
    (199, 100, 40),
    (199, 64, 256),
    (2, 5, 64, 256),
    (64, 256),
]
DTYPES_OF_SHAPES = [(s, d) for s in SHAPES for d in DTYPES] + [
    ((3, 768, 512), torch.bfloat16)
]  # (rows, K, N), dtype


@pytest.fixture(params=["tma", "pointers"])
def kernel(request, monkeypatch):
    """Both kernels in turn; "tma" wherever the chip and the layout let it."""
    if request.param == "pointers":
        monkeypatch.setattr(module, "uses_tma", lambda *matrices: False)


def mlp_inputs(*rows, K, N, dtype=torch.float32):
    """x, w_up, w_down with everything between them of size about 1; the weights are a slice of a
    bank."""
    bank = draw(5, N, K, dtype=dtype, seed=1, scale=K**-0.5)
    return [draw(*rows, K, dtype=dtype), bank[2], bank[3]]


@pytest.mark.parametrize("shape, dtype", DTYPES_OF_SHAPES)
def test_linear_relu2_is_as_exact_as_eager(shape, dtype, kernel):
    *rows, K, N = shape
    assert_as_exact_as_eager(
        linear_relu2, linear_relu2_reference, mlp_inputs(*rows, K=K, N=N, dtype=dtype)[:2]
    )


@pytest.mark.parametrize("shape, dtype", DTYPES_OF_SHAPES)
def test_relu2_mlp_is_as_exact_as_eager(shape, dtype, kernel):
    *rows, K, N = shape
    assert_as_exact_as_eager(
        relu2_mlp, relu2_mlp_reference, mlp_inputs(*rows, K=K, N=N, dtype=dtype)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of 4 bytes, of 2
def test_strided_inputs_and_expanded_upstream_gradients(dtype):
    wide, weights = (
        draw(40, 4, 200, dtype=dtype),
        draw(9 * 128 * 96 + 3, dtype=dtype, seed=1, scale=0.1),
    )
    up, down = weights[:-3].view(9, 128, 96)[3:5]
    for x in (
        wide[:, 1, :96],
        wide[:, 1:3, 8:104],
        wide[::2, :, 3:99],
        wide[:, 0, :192:2],
        wide[:1, 0, :96].expand(5, 96),
    ):
        assert_as_exact_as_eager(relu2_mlp, relu2_mlp_reference, [x, up, down])
    x = wide[:, 1, :96]
    misaligned = weights[3:].view(9, 128, 96)[3]
    column_major = draw(96, 128, dtype=dtype, seed=3, scale=0.1).T
    padded = draw(128, 104, dtype=dtype, seed=4, scale=0.1)[:, :96]
    for w in (misaligned, column_major, padded, up[::3], up[:1].expand(128, 96)):
        assert_as_exact_as_eager(relu2_mlp, relu2_mlp_reference, [x, w, w])
        assert_as_exact_as_eager(linear_relu2, linear_relu2_reference, [x, w])
    for dy in (draw(1).expand(x.shape), draw(96).expand(x.shape), draw(40, 1).expand(x.shape)):
        assert_as_exact_as_eager(relu2_mlp, relu2_mlp_reference, [x, up, down], [dy.to(dtype)])
    assert_as_exact_as_eager(
        linear_relu2, linear_relu2_reference, [x, up], [draw(128, dtype=dtype).expand(40, 128)]
    )


def test_backward_of_a_post_that_is_not_contiguous(kernel):
    dy, down, post = draw(40, 96), draw(256, 96, seed=1), draw(40, 300, seed=2).square()[:, 7:263]
    assert torch.equal(
        _relu2_mlp_backward(dy, down, post), _relu2_mlp_backward(dy, down, post.contiguous())
    )


def test_tma_only_where_it_can_address_the_matrix():
    x = draw(40, 96, dtype=torch.bfloat16)
    if module.for_chip(module.TMA_TILE, x) is None:
        pytest.skip("this chip's shared memory is too small for the tile")
    bank = draw(5 * 40 * 96 + 8, dtype=torch.bfloat16)
    assert module.uses_tma(x, bank[8:].view(5, 40, 96)[3], x[::2], x[:, :50], x[:, 8:])
    for a in (
        bank[1:-7].view(5, 40, 96)[3],
        x[:, 1:],
        x[:, :90].contiguous(),
        x[:1].expand(40, 96),
        x.float(),
        x[:, :0],
    ):
        assert not module.uses_tma(x, a)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_is_exactly_zero_where_the_relu_is_off(dtype, kernel):
    x = draw(40, 64, dtype=dtype)
    x[::3] = 0
    eye = torch.eye(64, dtype=dtype, device=DEVICE)  # pre is x, dpre is x's gradient
    for fn, weights in ((linear_relu2, [eye]), (relu2_mlp, [eye, eye])):
        y, dx, *_ = outputs_and_gradients(fn, [x, *weights])
        assert not y[x <= 0].any() and not dx[x <= 0].any()
        assert y[x > 0].all() and dx[x > 0].all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_activation_and_its_gradient_round_as_eager_does(dtype, kernel):
    """With one product in each sum nothing is left but the roundings of the epilogue: equal to
    eager bit by bit."""
    x, eye = draw(300, 64, dtype=dtype, scale=8.0), torch.eye(64, dtype=dtype, device=DEVICE)
    x[x.abs() < 2**-6] = 1  # fp16's squares lose bits below
    for fn, reference, weights in (
        (linear_relu2, linear_relu2_reference, [eye * 1.2]),
        (relu2_mlp, relu2_mlp_reference, [eye * 1.2, eye * 0.7]),
    ):
        ours, eager = (outputs_and_gradients(f, [x, *weights])[:2] for f in (fn, reference))
        assert torch.equal(ours[0], eager[0]) and torch.equal(ours[1], eager[1])


def test_huge_tiny_and_nan(kernel):
    for dtype in DTYPES:
        _, up, down = mlp_inputs(5, K=64, N=256, dtype=dtype)
        for scale in (
            30.0,
            1.0 if dtype == torch.float16 else 1e-5,
        ):  # tiny squares underflow in fp16
            x = draw(5, 64, dtype=dtype, scale=scale)
            assert_as_exact_as_eager(relu2_mlp, relu2_mlp_reference, [x, up, down])
        x[1, 3] = float("nan")
        assert linear_relu2(x, up).isnan().sum(1).tolist() == [0, 256, 0, 0, 0]
    x = draw(5, 64, dtype=torch.float16, scale=500)  # the square overflows
    assert torch.equal(linear_relu2(x, up).isinf(), linear_relu2_reference(x, up).isinf())


def test_two_runs_agree_bit_by_bit(kernel):
    inputs = mlp_inputs(140, K=96, N=272, dtype=torch.bfloat16)
    for a, b in zip(
        outputs_and_gradients(relu2_mlp, inputs), outputs_and_gradients(relu2_mlp, inputs)
    ):
        assert torch.equal(a, b)


def test_gradient_of_some_inputs_only():
    x, up, down = mlp_inputs(5, K=64, N=256)
    up.requires_grad_()
    relu2_mlp(x, up, down).sum().backward()
    linear_relu2(x, up)
    w = up.detach().clone().requires_grad_()
    relu2_mlp_reference(x, w, down).sum().backward()
    torch.testing.assert_close(up.grad, w.grad)


def test_registration_is_sound():
    x, up, down = (a.requires_grad_() for a in mlp_inputs(2, 5, K=32, N=64))
    torch.library.opcheck(_linear_relu2, (x, up))
    torch.library.opcheck(_relu2_mlp, (x, up, down))
    x, up, down = (a.detach() for a in (x, up, down))
    torch.library.opcheck(_relu2_mlp_backward, (x, down, linear_relu2(x, up)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_without_graph_breaks(dtype):
    def f(x, up, down):
        return relu2_mlp(x, up, down) + linear_relu2(x, up)[..., :32]

    inputs = mlp_inputs(2, 5, K=32, N=64, dtype=dtype)
    compiled = outputs_and_gradients(torch.compile(f, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip(compiled, outputs_and_gradients(f, inputs)):
        torch.testing.assert_close(a, b)


def test_without_triton_the_same_numbers(monkeypatch):
    """What a CPU runs outside the tests, forward and backward."""
    inputs = mlp_inputs(2, 5, K=96, N=384)
    kernels = [
        outputs_and_gradients(fn, inputs[:n]) for fn, n in ((linear_relu2, 2), (relu2_mlp, 3))
    ]
    for m in (mlp, fp8_mlp):
        monkeypatch.setattr(m, "runs_triton", lambda x: False)
    assert_as_exact_as_eager(linear_relu2, linear_relu2_reference, inputs[:2])
    assert_as_exact_as_eager(relu2_mlp, relu2_mlp_reference, inputs)
    plain = [outputs_and_gradients(fn, inputs[:n]) for fn, n in ((linear_relu2, 2), (relu2_mlp, 3))]
    for a, b in zip(sum(kernels, []), sum(plain, [])):
        torch.testing.assert_close(a, b)


def test_input_offsets_beyond_int32(kernel):
    """Three rows that lie 2^30 elements apart, in memory that is reserved but not touched."""
    base = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    far = base.as_strided((3, 64), (2**30, 1))
    near, other = draw(3, 64, dtype=torch.float16), draw(8, 64, dtype=torch.float16, seed=1)
    far.copy_(near)
    torch.testing.assert_close(linear_relu2(far, other), linear_relu2(near, other), rtol=0, atol=0)
    torch.testing.assert_close(linear_relu2(other, far), linear_relu2(other, near), rtol=0, atol=0)


def test_output_offsets_beyond_int32():
    """One program of the kernel with pointers, told that the output's rows are 2^30 long."""
    BM, BN, BK, warps, stages = module.TILE_FP32
    base = torch.empty(2**31 + BN, dtype=torch.float16, device=DEVICE)
    far = base.as_strided((3, BN), (2**30, 1))
    x, w = draw(3, 64, dtype=torch.float16), draw(BN, 64, dtype=torch.float16, seed=1)
    post = linear_relu2(x, w)
    for expected, backward in ((post, False), (module.launch_linear_relu2(x, w, post), True)):
        module.linear_relu2_kernel[1,](
            x,
            w,
            base,
            base,
            *5 * [None],
            3,
            2**30,
            64,
            64,
            64,
            BM,
            BN,
            BK // 2,
            backward,
            False,
            num_warps=warps,
            num_stages=stages,
        )
        torch.testing.assert_close(far, expected, rtol=0, atol=0)


# --- fp8


def fp8_inputs(*rows, K, N, post_scale=1 / 32):
    """x, w_up, w_down in bf16 and then what fp8_relu2_mlp takes beside them."""
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")

    def pair(a):
        scale = a.float().abs().amax() / 448 if a.numel() else torch.ones((), device=DEVICE)
        return quantize_reference(a, scale)[0], scale

    x, up, down = mlp_inputs(*rows, K=K, N=N, dtype=torch.bfloat16)
    return x, up, down, pair(x), pair(up), pair(down.T), torch.tensor(post_scale, device=DEVICE)


@pytest.mark.parametrize("shape", [(1, 96, 384), (140, 96, 272), (199, 48, 80), (2, 5, 64, 256)])
def test_fp8_multiplies_quantises_and_finds_the_maximum(shape, kernel):
    *rows, K, N = shape
    *inputs, x8, up8, down8, post_scale = fp8_inputs(*rows, K=K, N=N)
    exact = (x8[0].double() @ up8[0].double().T * x8[1].double() * up8[1].double()).relu().square()
    with poisoned_memory():
        post, q, largest = module.launch_linear_relu2(
            x8[0].flatten(0, -2), up8[0], scales=(x8[1], up8[1], post_scale)
        )
        y, same_largest = fp8_relu2_mlp(
            *(a.requires_grad_() for a in inputs), x8, up8, down8, post_scale
        )
    torch.testing.assert_close(post.view(exact.shape).double(), exact, rtol=2**-6, atol=1e-3)
    assert torch.equal(
        q.view(torch.uint8), quantize_reference(post, post_scale)[0].view(torch.uint8)
    )
    assert largest == same_largest == post.max() and not same_largest.requires_grad
    y_reference, _, _ = fp8_relu2_mlp_reference(x8, up8, down8, post_scale)
    # Hopper's tensor cores sum fp8 products in 14 bits, and a post rounded the other way is one of
    # fp8's steps off
    rough = 2**-8 if DEVICE.type == "cpu" else 2**-6
    torch.testing.assert_close(
        y, y_reference, rtol=2**-6, atol=rough * y_reference.abs().max().item()
    )


def test_fp8_saturates_and_keeps_nan(kernel):
    _, _, _, (x, x_scale), up8, _, post_scale = fp8_inputs(40, K=64, N=256, post_scale=1e-4)
    post, q, _ = module.launch_linear_relu2(x, up8[0], scales=(x_scale, up8[1], post_scale))
    assert q.float().max() == 448 and (q.float()[post > 448e-4] == 448).all()
    for a in module.launch_linear_relu2(
        x, up8[0], scales=(x_scale * float("nan"), up8[1], post_scale)
    ):
        assert a.float().isnan().all()


@pytest.mark.parametrize("rows", [(0,), (40,), (2, 5)])
def test_fp8_of_numbers_that_fp8_has_is_bf16(rows, kernel):
    """With nothing to round in the first product's inputs, the gradients are those of relu2_mlp.

    Bit by bit where sums are fp32; Hopper's tensor cores sum fp8 products in fewer bits.
    """
    tolerance = 0 if DEVICE.type == "cpu" else 2**-6
    x, up, down, *_ = fp8_inputs(*rows, K=64, N=256)
    x, up = x.to(torch.float8_e4m3fn).bfloat16(), (8 * up).to(torch.float8_e4m3fn).bfloat16()
    one = torch.ones((), device=DEVICE)
    x8, up8 = (x.to(torch.float8_e4m3fn), one), (up.to(torch.float8_e4m3fn), one)
    down8 = (down.T.to(torch.float8_e4m3fn).contiguous(), one)
    y, dx, d_up, d_down = outputs_and_gradients(
        lambda *a: fp8_relu2_mlp(*a, x8, up8, down8, 4 * one)[0], [x, up, down]
    )
    expected = outputs_and_gradients(relu2_mlp, [x, up, down])
    for a, b in zip((dx, d_up, d_down), expected[1:]):
        assert not a.numel() or (a - b).abs().max() <= tolerance * b.abs().max()
    assert y.shape == expected[0].shape and not y.isnan().any()
    assert (y - expected[0]).norm() <= 0.1 * expected[0].norm()


def test_fp8_without_triton_and_compiled_the_same_numbers(monkeypatch):
    x, up, down, *rest = fp8_inputs(2, 5, K=64, N=256)

    def f(x, up, down):
        y, largest = fp8_relu2_mlp(x, up, down, *rest)
        return y + linear_relu2(x, up)[..., :64], largest

    inputs = [x, up, down]
    kernels = outputs_and_gradients(f, inputs)
    compiled = outputs_and_gradients(torch.compile(f, fullgraph=True, backend="aot_eager"), inputs)
    for m in (mlp, fp8_mlp):
        monkeypatch.setattr(m, "runs_triton", lambda x: False)
    for a, b, c in zip(kernels, compiled, outputs_and_gradients(f, inputs)):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c, rtol=2**-5, atol=2**-7 * c.abs().max().item())


def test_fp8_registration_is_sound():
    x, up, down, x8, up8, down8, post_scale = fp8_inputs(2, 5, K=64, N=256)
    x, up, down = (a.requires_grad_() for a in (x, up, down))
    torch.library.opcheck(
        _fp8_relu2_mlp,
        (x, up, down, *x8, *up8, *down8, post_scale),
        test_utils=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_static"),
    )  # the others need e4m3 arithmetic


def test_the_layer_in_fp8():
    """Its scale of x holds the largest that a norm can give; without gradients it is bf16's."""
    _, up, down, *_ = fp8_inputs(1, K=64, N=256)
    x = draw(5, 64, dtype=torch.bfloat16)
    x[0] = 0
    x[0, 3] = 8  # sqrt(64): all of a norm in one place
    layer = fp8_mlp.FP8ReLU2MLP().to(DEVICE)
    results = outputs_and_gradients(layer, [x, up, down])
    for a, b in zip(results, outputs_and_gradients(relu2_mlp, [x, up, down])):
        assert (a - b).norm() <= 0.1 * b.norm()
    expected = relu2_mlp(x, up, down)
    assert (results[0][0] - expected[0]).norm() <= 0.1 * expected[0].norm()
    with torch.no_grad():
        assert torch.equal(layer(x, up, down), expected)


def test_the_mlps_of_all_layers_are_those_of_one():
    """Bit for bit the layers that quantise their own weights: outputs, gradients, and the largest
    activations; without gradients they are bf16's."""
    bank = torch.stack([draw(64, 32, seed=i, dtype=torch.bfloat16) / 5 for i in range(6)])
    bank[3] = 0
    mlps = fp8_mlp.FP8MLPs(3, 64, 32).to(DEVICE)
    mlps.quantize(bank)
    x = draw(5, 32, seed=9, dtype=torch.bfloat16)
    for layer in (0, 1, 2):
        alone = fp8_mlp.FP8ReLU2MLP().to(DEVICE)
        alone.post.scale.copy_(mlps.post.scale[layer, 0])
        args = [x, bank[2 * layer], bank[2 * layer + 1]]
        found = outputs_and_gradients(functools.partial(mlps, layer), args)
        for a, b in zip(found, outputs_and_gradients(alone, args)):
            assert torch.equal(a, b)
        assert mlps.post.amax[layer, 0] == alone.post.amax > 0
        with torch.no_grad():
            assert torch.equal(mlps(layer, *args), relu2_mlp(*args))
    before = mlps.post.scale.clone()
    largest = mlps.post.amax.clone()
    mlps.post.roll()
    torch.testing.assert_close(mlps.post.scale[:, 0], largest[:, 0] * 1.8 / 448)
    assert torch.equal(mlps.post.scale[:, 1:], before[:, 1:])
    assert not mlps.post.amax.any()


class Launches(TorchDispatchMode):
    """Counts operations that would start a kernel: all but views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        views = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        if not views:
            self.names.append(func._schema.name)
        return result


def test_launches_of_a_step_do_not_grow_with_the_layers():
    """Of quantising all weights, which was 4 a matrix and pass, and of rolling all scales, which
    was 8 a layer; in a pass x is quantised, and multiplied twice."""
    counts = []
    for n_layer in (1, 4):
        mlps = fp8_mlp.FP8MLPs(n_layer, 64, 32).to(DEVICE)
        bank = draw(2 * n_layer, 64, 32, dtype=torch.bfloat16)
        with Launches() as quantising:
            fp8_mlp.quantize_bank(bank, mlps.q_up, mlps.q_down, mlps.w_scale)
        with Launches() as rolling:
            mlps.post.roll()
        counts.append((len(quantising.names), len(rolling.names)))
    assert counts[0] == counts[1]
    assert counts[0][1] <= 8
    graph = make_fx(fp8_mlp.quantize_bank)(bank, mlps.q_up, mlps.q_down, mlps.w_scale)
    reductions = [n for n in graph.graph.nodes if "amax" in str(n.target)]
    copies = [n for n in graph.graph.nodes if "copy_" in str(n.target)]
    assert (len(reductions), len(copies)) == (
        1,
        3,
    )  # torch.compile: one kernel or two, and one each


def test_the_layers_scale_follows_the_largest_of_all_micro_batches():
    x, up, down, *_ = fp8_inputs(5, K=64, N=256)
    layer = fp8_mlp.FP8ReLU2MLP().to(DEVICE)
    before = layer.post.scale.clone()
    with torch.no_grad():
        layer(x, up, down)
    assert layer.post.amax == 0  # validation does not alter training
    layer(2 * x, up, down)
    largest = layer.post.amax.clone()
    layer(x / 2, up, down)
    assert layer.post.amax == largest > 0 and layer.post.scale == before
    layer.post.roll()
    torch.testing.assert_close(layer.post.scale, largest * 1.25 / 448)
