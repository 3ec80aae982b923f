"""kernels/fused.py: the library in C beside float64 and the PyTorch forms, gradients included."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers import built

from kernels import choose_ops, fused, native
from kernels.attention import attention
from kernels.decoding import rotate_halves_reference
from kernels.embedding import embedding
from kernels.gates import gated, offset
from kernels.linear_log_prob import linear_log_prob
from kernels.op import OPS
from kernels.stream import smeared, weighted
from optim.adam import adam_update
from optim.adamw import adamw_update
from optim.masters import descend
from optim.muon import nesterov
from optim.rows import row_scale

HALF = torch.bfloat16
DTYPES = [torch.float32, HALF]


@pytest.fixture(scope="module")
def c(tmp_path_factory):
    library, said = built(fused.Fused, tmp_path_factory.mktemp("cache"))
    names = ["fused", "contexts"] + ["products"] * native.has_eight()
    names += ["tiled"] * native.has_tiles()
    assert said == [f"compiling kernels/{name}.c (once) ..." for name in names]
    return library


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(f, leaves):
    """Outputs, and gradients for upstream ones that differ from place to place."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    outputs = f(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [
        draw(*y.shape, seed=9).to(y.dtype) if y.dim() else torch.tensor(0.7, dtype=y.dtype)
        for y in outputs
    ]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def same(found, reference, leaves, eager=None, times=2):
    """Outputs and gradients no further from float64 than so many times as far as PyTorch's in the
    same dtype, and some roundings."""
    exact = results(reference, [x.double() for x in leaves])
    near = results(eager or reference, leaves)
    for x, y, z in zip(results(found, leaves), near, exact, strict=True):
        assert x.shape == z.shape and x.dtype == y.dtype
        assert x.isfinite().all()
        scale = z.abs().max().clamp(min=1e-30)
        error = (x.double() - z).abs().max() / scale
        eager_error = (y.double() - z).abs().max() / scale
        allowed = times * eager_error + 2 * torch.finfo(leaves[0].dtype).eps
        assert error <= allowed, (error, allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 7, 36), (2, 130)])
@pytest.mark.parametrize("weighted", [False, True])
def test_norms(c, dtype, shape, weighted):
    x = draw(*shape, dtype=dtype)
    more = draw(*shape, dtype=dtype, seed=1)
    weights = [draw(shape[-1], dtype=dtype, seed=2)] if weighted else []
    same(c.rms_norm, OPS["rms_norm"].reference, [x, *weights])
    same(c.add_rms_norm, OPS["add_rms_norm"].reference, [x, more, *weights])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 5, 3, 14), (3, 17, 2, 64)])
def test_rotation_by_halves(c, dtype, shape):
    """Of a slice of a projection as well, whose heads are not one stretch."""
    B, T, H, D = shape
    angles = draw(T, 1, D // 2, seed=3)
    cos = angles.cos().to(dtype)
    sin = angles.sin().to(dtype)

    def reference(x):
        return rotate_halves_reference(x, cos.to(x.dtype), sin.to(x.dtype))

    x = draw(*shape, dtype=dtype)
    same(lambda x: c.rotate_halves(x, cos, sin), reference, [x])
    both = draw(B, T, 2, H, D, dtype=dtype)
    same(lambda x: c.rotate_halves(x[:, :, 1], cos, sin), lambda x: reference(x[:, :, 1]), [both])
    if dtype == HALF:  # rounded where PyTorch rounds
        assert torch.equal(c.rotate_halves(x, cos, sin), reference(x))
    # Of positions of their own, as in decoding, it leaves them to PyTorch
    each = cos.expand(B, T, 1, D // 2)
    assert torch.equal(c.rotate_halves(x, each, each), rotate_halves_reference(x, each, each))


def test_norm_of_what_is_not_contiguous(c):
    x = draw(6, 40).t()
    same(c.rms_norm, OPS["rms_norm"].reference, [x])
    # A sum that nobody uses has no gradient
    a, b = (draw(5, 8, seed=i).requires_grad_() for i in range(2))
    c.add_rms_norm(a, b)[0].sum().backward()
    assert a.grad.isfinite().all() and torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_head", [None, 4])
def test_queries_and_keys(c, dtype, n_head):
    qkv = draw(2, 5, 6 if n_head is None else 8, 12, dtype=dtype)
    angles = draw(9, 1, 6)
    tables = angles.cos().to(dtype), angles.sin().to(dtype)

    def form(f):
        return lambda x: f(x, *(t.to(x.dtype) for t in tables), n_head)

    same(form(c.qk_norm_rope), form(OPS["qk_norm_rope"].reference), [qkv])
    # Where a gradient has another layout, as attention's have
    found, exact = [], []
    for f, to in (c.qk_norm_rope, found), (OPS["qk_norm_rope"].reference, exact):
        x = qkv.float().requires_grad_()
        outputs = f(x, *(t.float() for t in tables), n_head)
        sum((y.transpose(1, 2) * draw(*y.transpose(1, 2).shape)).sum() for y in outputs).backward()
        to.append(x.grad)
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 70)])
def test_swiglu(c, dtype, shape):
    x = 4 * draw(*shape, dtype=dtype)
    same(c.swiglu, OPS["swiglu"].reference, [x])


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu2_mlp(c, dtype):
    x = draw(3, 7, 16, dtype=dtype)
    ws = [draw(40, 16, dtype=dtype, seed=i) / 4 for i in (1, 2)]
    same(c.relu2_mlp, OPS["relu2_mlp"].reference, [x, *ws])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_residual_stream(c, dtype):
    x = draw(3, 11, 20, dtype=dtype)
    z = draw(3, 11, 20, dtype=dtype, seed=1)
    a, b = draw(2, seed=2).unbind()

    def of_numbers(f):
        return lambda x, z: f(x, z, a.to(x.dtype), b.to(x.dtype))

    same(of_numbers(c.weighted), of_numbers(weighted), [x, z])
    numbers = torch.stack([a, b]).requires_grad_()  # which stay in fp32
    of_a_and_b = [
        torch.autograd.grad((f(y, w, *numbers.to(y.dtype).unbind()) * y).sum(), numbers)[0]
        for f, y, w in ((c.weighted, x, z), (weighted, x.double(), z.double()))
    ]
    torch.testing.assert_close(*of_a_and_b, check_dtype=False, rtol=0.01, atol=0.01)

    starts = torch.rand(3, 11, generator=torch.Generator().manual_seed(3)) < 0.3
    starts[:, 0] = True
    share = draw(3, 11, 1, dtype=dtype, seed=4)
    same(lambda x, s: c.smeared(x, s, starts), lambda x, s: smeared(x, s, starts), [x, share])
    by_hand = x.clone()
    for b, t in (~starts).nonzero().tolist():
        by_hand[b, t] += share[b, t] * x[b, t - 1]
    torch.testing.assert_close(smeared(x, share, starts), by_hand)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (3, 11, 3, 6), (2, 40, 2, 64)])
def test_heads_around_attention(c, dtype, shape):
    B, T, H, D = shape
    x = draw(*shape, dtype=dtype)
    share = draw(B, T, H, dtype=dtype, seed=1)
    same(c.gated, gated, [x, share])
    same(c.gated, gated, [x, share, draw(*shape, dtype=dtype, seed=2)])
    qkv = draw(B, T, 3 * H, D, dtype=dtype, seed=3)

    def of_slices(f):  # as values come
        return lambda x, share, qkv: f(x, share, qkv.chunk(3, dim=2)[2])

    same(of_slices(c.gated), of_slices(gated), [x, share, qkv])
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(c.gated(turned, share, turned), gated(turned, share, turned))

    starts = torch.rand(B, T, generator=torch.Generator().manual_seed(4)) < 0.3
    starts[:, 0] = True
    same(lambda k: c.offset(k, starts), lambda k: offset(k, starts), [x])
    by_hand = x.clone()
    for b, t in (~starts).nonzero().tolist():
        for d in range(D):
            if d % (D // 2) >= D // 4:
                by_hand[b, t, :, d] = x[b, t - 1, :, d]
    assert torch.equal(offset(x, starts), by_hand) and torch.equal(c.offset(x, starts), by_hand)


def of_rows(f, dtype, **about):
    targets = torch.tensor([3, 0, -100, 32, 7, -100, 3])
    return (lambda h, w: f(h, w, targets, **about)), [
        draw(7, 16, dtype=dtype),
        draw(33, 16, dtype=dtype, seed=1) / 2,
    ]


SAMPLED = dict(sampled=torch.tensor([33.0, 1.5])), dict(sampled=torch.tensor([20.0, 1.5])), {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("about", SAMPLED)
def test_losses(c, dtype, about):
    found, leaves = of_rows(c.linear_log_prob, dtype, **about)
    reference, _ = of_rows(linear_log_prob, dtype, **about)
    same(found, reference, leaves)
    weights = draw(1).abs()
    found, leaves = of_rows(
        c.linear_cross_entropy, dtype, cap=None, target_weights=weights, **about
    )
    reference, _ = of_rows(
        OPS["linear_cross_entropy"].reference, dtype, cap=None, target_weights=weights, **about
    )
    same(found, reference, leaves)


def test_large_logits_and_targets_that_do_not_exist(c):
    h = torch.tensor([[1e4, 0.0], [-1e4, 1.0], [200.0, -200.0]])
    w = torch.eye(2)
    targets = torch.tensor([0, 0, 1])
    torch.testing.assert_close(c.linear_log_prob(h, w, targets), linear_log_prob(h, w, targets))
    for bad in 2, -5:
        with pytest.raises(IndexError, match="expected 0 to 1"):
            c.linear_log_prob(h, w, torch.tensor([0, bad, 1]))


def test_without_gradients_logits_come_in_parts(c, monkeypatch):
    monkeypatch.setattr(fused, "LOGITS", 70)
    found, (h, w) = of_rows(c.linear_log_prob, torch.float32)
    reference, _ = of_rows(linear_log_prob, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(found(h, w), reference(h, w))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [3, 100])
def test_attention(c, dtype, window):
    """Documents, a window that ends inside of them, and heads that share keys."""
    q = draw(2, 37, 4, 16, dtype=dtype)
    k, v = (draw(2, 37, 2, 16, dtype=dtype, seed=i) for i in (1, 2))
    about = dict(
        cu_seqlens=torch.tensor([0, 5, 37, 60, 74, 74], dtype=torch.int32),
        max_seqlen=37,
        window=window,
        scale=0.3,
    )

    def form(f, backend):
        return lambda q, k, v: f(q, k, v, **about, backend=backend)

    same(form(c.attention, "sdpa"), form(attention, "blockwise"), [q, k, v])


def nearly_sure(form, dtype):
    """Gradients of q and k of a query that sees two keys, the second e^6 times as much; 1 -
    sigmoid(6) is less than bf16 tells from 0 below 1."""
    q, k, v = torch.zeros(3, 1, 2, 1, 32, dtype=dtype)
    q[:, 1, :, 0] = 1
    k[:, 1, :, 0] = 6
    v[:, 1] = 1
    cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)
    about = dict(cu_seqlens=cu_seqlens, max_seqlen=2, window=2, scale=1.0)
    leaves = q.requires_grad_(), k.requires_grad_()
    y = form(*leaves, v, **about)
    return [g.double() for g in torch.autograd.grad(y[:, 1].sum(), leaves)]


def test_gradients_of_attention_that_is_nearly_sure(c, monkeypatch):
    exact = nearly_sure(attention, torch.float64)
    for tiled in {c.tiled, None}:
        monkeypatch.setattr(c, "tiled", tiled)
        found = nearly_sure(functools.partial(c.attention, backend="sdpa"), HALF)
        for g, of in zip(found, exact, strict=True):
            assert (g - of).abs().max() < 0.01 * of.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_that_do_not_fit(c, dtype):
    """Are told of before C reads what is not there; without gradients as well."""
    h = draw(4, 64, dtype=dtype)
    targets = torch.zeros(4, dtype=torch.int64)
    for w in draw(5, 32, dtype=dtype), draw(5, 96, dtype=dtype), draw(2, 5, 64, dtype=dtype):
        with torch.no_grad(), pytest.raises(ValueError, match="do not fit"):
            c.linear_log_prob(h, w, targets)
        with torch.no_grad(), pytest.raises(ValueError, match="do not fit"):
            c.linear_cross_entropy(h, w, targets, cap=None)
    with torch.no_grad(), pytest.raises(ValueError, match="do not fit"):
        c.linear_log_prob(h, draw(5, 64, dtype=dtype), targets[:, None].expand(4, 2))

    q = draw(1, 40, 2, 32, dtype=dtype)
    cu_seqlens = torch.tensor([0, 40], dtype=torch.int32)
    about = dict(cu_seqlens=cu_seqlens, max_seqlen=40, window=40, scale=0.3, backend="sdpa")
    three = q[:, :, [0, 1, 1]]
    for k, v in (q[:, :20],) * 2, (q[..., :16], q), (q, q[:, :, :1]), (three, three):
        with pytest.raises(ValueError, match="do not fit"):
            c.attention(q, k, v, **about)


def test_documents_told_in_int64(c):
    q = draw(1, 40, 2, 32, dtype=HALF)
    cu_seqlens = torch.tensor([0, 7, 40])
    about = dict(max_seqlen=40, window=9, scale=0.3, backend="sdpa")
    found = c.attention(q, q, q, cu_seqlens=cu_seqlens, **about)
    assert torch.equal(found, c.attention(q, q, q, cu_seqlens=cu_seqlens.int(), **about))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding(c, dtype):
    index = torch.tensor([[4, 4, 0], [8, 4, 4]])
    table = draw(9, 20, dtype=dtype)
    same(
        lambda t: c.embedding(index, t),
        lambda t: F.embedding(index, t),
        [table],
        eager=lambda t: embedding(index, t),
    )
    with pytest.raises(IndexError):
        c.embedding(torch.tensor([9]), table.requires_grad_())


# --------------------------------------------------------------------------------------------------
# Optimizers


def state_of(dtype, *shape):
    """p, companion, grad and moments; a third of the gradients are zero."""
    master = draw(*shape)
    p = master.to(dtype)
    grad = draw(*shape, dtype=dtype, seed=1)
    grad[::3] = 0
    moments = draw(*shape, seed=2), draw(*shape, seed=3).square()
    return p, master if dtype == HALF else None, grad, *moments


def check_updates(c, function, make, *rest, **named):
    """Three steps by C and by PyTorch."""
    found, expected = make(), make()
    for _ in range(3):
        getattr(c, function.__name__)(*found, *rest, **named)
        function(*expected, *rest, **named)
    for x, y in zip(found, expected, strict=True):
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-2 if x.dtype == HALF else 1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shrink", [None, 0.03])
def test_adam(c, dtype, shrink):
    numbers = 0.1, 0.9, 0.95, 1e-8, 0.19, 0.0975
    check_updates(c, adam_update, lambda: state_of(dtype, 1003), *numbers, shrink=shrink)
    kept = 1 - (shrink or 0)
    check_updates(c, adamw_update, lambda: state_of(dtype, 1003), *numbers, kept)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shrink", [None, 0.03])
@pytest.mark.parametrize("scale", [None, (3, 5, 1), (3, 1, 7)])
@pytest.mark.parametrize("factor", [False, True])
def test_descend(c, dtype, shrink, scale, factor):
    about = dict(
        shrink=shrink,
        scale=None if scale is None else draw(*scale, seed=5).abs(),
        factor=draw(3, 1, 1, seed=6).abs() if factor else None,
    )
    check_updates(c, descend, lambda: state_of(dtype, 3, 5, 7)[:3], 0.1, **about)
    update = draw(3, 5, 7, seed=7)  # in fp32, as balanced ones are
    check_updates(c, descend, lambda: (*state_of(dtype, 3, 5, 7)[:2], update), 0.1, **about)


def test_descend_on_what_is_flat(c):
    check_updates(c, descend, lambda: state_of(HALF, 103)[:3], 0.1, shrink=0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_tables(c, dtype):
    grad = state_of(dtype, 21, 34)[2]
    v, w = (torch.ones(21, 1) for _ in range(2))
    for _ in range(2):
        numbers = 0.1, 0.95, 1e-8, 0.5
        torch.testing.assert_close(c.row_scale(grad, v, *numbers), row_scale(grad, w, *numbers))
    torch.testing.assert_close(v, w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_gradient_keep_every_bit(c, dtype):
    p, companion, grad, *_ = state_of(dtype, 21, 34)
    before = [x.clone() for x in (p, companion) if x is not None]
    c.descend(p, companion, grad, 1.0, 0.1, torch.ones(21, 1))
    for x, y in zip([x for x in (p, companion) if x is not None], before):
        assert torch.equal(x[::3], y[::3]) and not torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nesterov(c, dtype):
    grad = draw(101, dtype=dtype)
    m, n = (draw(101, seed=1) for _ in range(2))
    torch.testing.assert_close(c.nesterov(grad, m, 0.9), nesterov(grad, n, 0.9))
    torch.testing.assert_close(m, n)


# --------------------------------------------------------------------------------------------------


def test_threads_change_no_bit(c):
    x = draw(37, 24, dtype=HALF)
    w = draw(24, seed=1, dtype=HALF)
    found = []
    for threads in 1, 3:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        found.append(results(c.rms_norm, [x, w]))
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*found))


def test_what_is_not_a_number_stays_so(c):
    x = draw(3, 8)
    x[1, 2] = float("nan")
    for y in c.rms_norm(x), c.swiglu(x), c.relu2_mlp(x, draw(8, 8), draw(8, 8)):
        assert y[1].isnan().any() and y[0].isfinite().all() and y[2].isfinite().all()
    losses = c.linear_log_prob(x, draw(5, 8), torch.tensor([0, 1, 2]))
    assert losses.isnan().tolist() == [False, True, False]


def test_other_dtypes_and_softcaps_are_left_to_pytorch(c):
    x = draw(3, 8).double()
    assert torch.equal(c.rms_norm(x), OPS["rms_norm"].reference(x))
    h, w, targets = draw(3, 8), draw(5, 8, seed=1), torch.tensor([0, 1, 2])
    for f in c.linear_cross_entropy, OPS["linear_cross_entropy"].reference:
        torch.testing.assert_close(
            f(h, w, targets, cap=2.0), OPS["linear_cross_entropy"].reference(h, w, targets, cap=2.0)
        )
    two = torch.stack([targets, targets + 1], 1)
    weights = torch.tensor([1.0, 0.5])
    about = dict(cap=None, target_weights=weights)
    torch.testing.assert_close(
        c.linear_cross_entropy(h, w, two, **about),
        OPS["linear_cross_entropy"].reference(h, w, two, **about),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cpu_takes_them_by_itself(c, dtype):
    said = []
    ops = choose_ops("cpu", dtype, say=said.append, fused=c)
    forms = ops.named()
    assert said == [] and ops.fused is c
    assert all(forms[name] == "c" for name in c.forms())
    for kernels in ("reference",), ("rms_norm",):
        ops = choose_ops("cpu", dtype, kernels=kernels, fused=c)
        assert ops.fused is None and "c" not in ops.named().values()


def test_one_that_is_wrong_is_not_taken(c, monkeypatch):
    monkeypatch.setattr(c, "swiglu", lambda x: 1.2 * OPS["swiglu"].reference(x))
    said = []
    ops = choose_ops("cpu", fused=c, say=said.append)
    assert ops.named()["swiglu"] == "pytorch" and ops.named()["rms_norm"] == "c"
    assert len(said) == 1 and "swiglu by PyTorch, which is slower" in said[0]


def test_without_a_compiler_pytorch_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "COMPILERS", ())
    said = []
    assert fused.Fused.build(tmp_path, said.append) is None
    assert said == ["without kernels/fused.c, which is slower: there is no C compiler"]
