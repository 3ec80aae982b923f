"""kernels/qk_norm_rope.py: forward and backward against float64 and eager, in all layouts."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, DTYPES, assert_as_exact_as_eager, draw, outputs_and_gradients

from kernels.qk_norm_rope import (
    _qk_norm_rope,
    _qk_norm_rope_backward,
    qk_norm_rope,
    qk_norm_rope_reference,
)

module = importlib.import_module("kernels.qk_norm_rope")

# B, T, heads of q, heads of k, D
SHAPES = [
    (2, 5, 3, 3, 64),
    (1, 7, 6, 6, 128),
    (2, 67, 2, 2, 16),
    (1, 9, 4, 2, 32),
    (1, 67, 1, 5, 64),
    (2, 3, 2, 1, 6),
    (1, 1, 1, 1, 2),
    (1, 5, 3, 3, 200),
    (0, 5, 2, 2, 8),
    (2, 0, 2, 2, 8),
]


def tables(T, D, dtype=torch.float32, seed=8):
    """Random numbers for cos and sin, so that no identity between them is relied on."""
    cos, sin = (draw(T, 1, D // 2, dtype=dtype, seed=seed + i) for i in range(2))
    return cos, sin


def check(qkv, cos, sin, upstream=None, **kwargs):
    """As exact as eager; the tables follow the input's dtype, as they do in the float64 run."""

    def with_tables(fn):
        return lambda x: fn(x, cos.to(x.dtype), sin.to(x.dtype), **kwargs)

    assert_as_exact_as_eager(
        with_tables(qk_norm_rope), with_tables(qk_norm_rope_reference), [qkv], upstream
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_exact_as_eager(shape, dtype):
    B, T, H, K, D = shape
    check(draw(B, T, H + 2 * K, D, dtype=dtype), *tables(T + 2, D, dtype), n_head=H)


def test_what_the_trainer_computes():
    """norm, then rotation: the same formula written another way, with true angles."""
    B, T, H, D = 2, 6, 3, 16
    qkv = draw(B, T, 3 * H, D)
    angles = torch.arange(9, device=DEVICE)[:, None] * torch.tensor(
        [1.0, 0.3, 0.1, 0.01, 0, 0, 0, 0], device=DEVICE
    )
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    x1, x2 = F.rms_norm(qkv[:, :, : 2 * H], (D,), eps=1e-6).chunk(2, dim=-1)
    rotated = torch.cat([x1 * cos[:T] + x2 * sin[:T], x2 * cos[:T] - x1 * sin[:T]], dim=-1)
    q, k, v = qk_norm_rope(qkv, cos, sin)
    torch.testing.assert_close(torch.cat([q, k], dim=2), rotated)
    assert torch.equal(v, qkv[:, :, 2 * H :])


def test_q_and_k_are_laid_out_for_attention_and_v_is_not_copied():
    qkv = draw(2, 5, 6, 8)
    q, k, v = qk_norm_rope(qkv, *tables(5, 8))
    assert q.is_contiguous() and k.is_contiguous() and v.data_ptr() == qkv[:, :, 4:].data_ptr()


def test_scores_depend_on_the_distance_alone():
    """The meaning of a rotation: q at t and k at t - 3 give the same product wherever t is."""
    T, D = 20, 8
    angles = torch.arange(T, device=DEVICE)[:, None] * torch.tensor(
        [1.0, 0.5, 0.2, 0.0], device=DEVICE
    )
    q, k, _ = qk_norm_rope(draw(1, 1, 3, D).expand(1, T, 3, D), angles.cos(), angles.sin())
    products = (q[0, 3:, 0] * k[0, :-3, 0]).sum(-1)
    torch.testing.assert_close(products, products[:1].expand(T - 3), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layout", ["heads first", "every other head", "transposed width", "expanded batch"]
)
def test_strided_inputs(layout):
    x = {
        "heads first": draw(2, 6, 5, 8).transpose(1, 2),
        "every other head": draw(2, 5, 12, 8)[:, :, ::2],
        "transposed width": draw(2, 5, 8, 6).mT,
        "expanded batch": draw(1, 5, 6, 8).expand(2, 5, 6, 8),
    }[layout]
    check(x, *(t.expand(5, 1, 4) for t in tables(1, 8)))  # and of the tables


@pytest.mark.parametrize("upstream", ["one number", "one row", "heads first"])
def test_strided_upstream_gradients(upstream):
    """As sums, means and attention that keeps heads in front give them."""
    shape = (2, 5, 3, 8)
    d = {
        "one number": lambda seed: draw(1, seed=seed).expand(shape),
        "one row": lambda seed: draw(8, seed=seed).expand(shape),
        "heads first": lambda seed: draw(2, 3, 5, 8, seed=seed).transpose(1, 2),
    }[upstream]
    check(draw(2, 5, 9, 8), *tables(5, 8), [d(5), d(6), d(7)])


@pytest.mark.parametrize("used", [0, 1, 2])
def test_gradient_through_one_output_alone(used):
    upstream = [draw(2, 5, 2, 8, seed=9) if i == used else None for i in range(3)]
    check(draw(2, 5, 6, 8), *tables(5, 8), upstream)


def test_large_small_and_zero_heads():
    x = torch.stack(
        [draw(5, 8, scale=1e4), draw(5, 8, scale=1e-4), torch.zeros(5, 8, device=DEVICE)], dim=1
    )[None].repeat(1, 1, 3, 1)
    cos, sin = tables(5, 8)
    check(x, cos, sin)
    assert not qk_norm_rope(x, cos, sin)[0][:, :, 2].any()


def test_eps_is_inside_the_root():
    x = torch.tensor([3.0, -3.0, 1.0], device=DEVICE)[:, None].expand(1, 1, 3, 4)
    one, zero = torch.ones(1, 2, device=DEVICE), torch.zeros(1, 2, device=DEVICE)
    q, k, _ = qk_norm_rope(x, one, zero, eps=16.0)
    torch.testing.assert_close(q, torch.full_like(q, 3 / 5))
    torch.testing.assert_close(k, torch.full_like(k, -3 / 5))


def test_wrong_shapes_are_refused():
    x, (cos, sin) = draw(2, 5, 9, 8), tables(5, 8)
    for qkv, c, s, n_head in [
        (x[..., :7], cos, sin, None),
        (x[:, :, :8], cos, sin, None),
        (x, cos, sin, 4),
        (x, cos, sin, 9),
        (x, cos[:4], sin[:4], None),
        (x, cos[..., :3], sin[..., :3], None),
        (x, cos, sin[:4], None),
    ]:
        with pytest.raises(ValueError, match="expected"):
            qk_norm_rope(qkv, c, s, n_head)


def test_two_runs_agree_bit_by_bit():
    cos, sin = tables(50, 16)
    runs = [
        outputs_and_gradients(lambda x: qk_norm_rope(x, cos, sin), [draw(3, 50, 6, 16)])
        for _ in range(2)
    ]
    for a, b in zip(*runs):
        assert torch.equal(a, b)


@pytest.mark.parametrize("two_dims", [False, True])
def test_registration_is_sound(two_dims):
    qkv, (cos, sin) = draw(2, 5, 6, 8), tables(6, 8)
    if two_dims:
        cos, sin = cos[:, 0], sin[:, 0]
    torch.library.opcheck(_qk_norm_rope, (qkv, cos, sin, 2, 1e-6))
    q, k, v = qkv.split(2, dim=2)
    torch.library.opcheck(_qk_norm_rope_backward, (q, k, v, qkv, cos, sin, 1e-6))


def test_compiles_without_graph_breaks():
    """As in the trainer: from one product, whose weight's gradient the joined gradient goes
    into."""
    cos, sin = tables(9, 8)

    def f(x, w):
        q, k, v = qk_norm_rope((x @ w).view(2, 5, 6, 8), cos, sin)
        return q * v, k

    inputs = [draw(2, 5, 12), draw(12, 48, seed=1)]
    compiled = outputs_and_gradients(torch.compile(f, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip(compiled, outputs_and_gradients(f, inputs)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_triton_the_same_numbers(monkeypatch, dtype):
    """What a CPU runs outside the tests, forward and backward."""
    cos, sin = tables(6, 8, dtype)
    qkv = draw(2, 5, 7, 8, dtype=dtype)

    def f(x):
        return qk_norm_rope(x, cos, sin, n_head=3)

    kernels = outputs_and_gradients(f, [qkv])
    monkeypatch.setattr(module, "runs_triton", lambda x: False)
    check(qkv, cos, sin, n_head=3)
    if dtype == torch.float32:
        for a, b in zip(kernels, outputs_and_gradients(f, [qkv])):
            torch.testing.assert_close(a, b)
    torch.library.opcheck(_qk_norm_rope, (qkv, cos, sin, 3, 1e-6))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_offsets_beyond_int32(dim):
    """Rows, positions or heads that lie 2^30 elements apart, in memory that is reserved but not
    touched."""

    def far(values):
        base = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
        strides = [1, 1, 1, 1]
        strides[dim] = 2**30
        return base.as_strided(values.shape, strides).copy_(values)

    shape = [1, 1, 1, 64]
    shape[dim] = 3
    near, (cos, sin) = draw(*shape, dtype=torch.float16), tables(3, 64)
    x = far(near)
    expected = module.launch_forward(near, near, cos, sin, 1e-6)
    for a, b in zip(module.launch_forward(x, x, cos, sin, 1e-6), expected):
        assert torch.equal(a, b)
    dx, dv, expected, copied = (torch.zeros_like(near) for _ in range(4))
    module.launch_backward(near, near, near, near, near, cos, sin, 1e-6, expected, expected, copied)
    dx, dv = far(dx), far(dv)
    module.launch_backward(x, x, x, x, x, cos, sin, 1e-6, dx, dx, dv)
    assert torch.equal(dx, expected) and torch.equal(dv, near) and torch.equal(copied, near)
