"""kernels/products.py, compiled for AVX2 whatever else this processor has, beside float64 and the
PyTorch forms, gradients included."""

import pytest
import torch
from helpers import built
from test_fused import SAMPLED, draw, results
from test_fused import same as same_within

from base.places import cache_folder
from kernels import choose_ops, fused, native, products
from kernels.attention import attention
from kernels.linear_log_prob import linear_log_prob
from kernels.op import OPS
from kernels.polar_express import polar_express
from models.gpt import Config, Model
from models.parts import document_starts, previous


@pytest.fixture(scope="module")
def c(tmp_path_factory):
    if "avx2" not in native.processor():
        pytest.skip("this processor has no AVX2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "NATIVE", ["-march=haswell", "-fopenmp"])
        patch.setattr(native, "WIDEST", [])
        patch.setattr(native, "has_eight", lambda: True)
        library, _ = built(products.Products, tmp_path_factory.mktemp("cache"))
    return fused.Fused(native.build("fused", cache_folder()), products=library)


def same(found, reference, leaves, times=4):
    """Sums here are one after the other, PyTorch's in several parts, which rounds less."""
    same_within(found, reference, leaves, times=times)


def test_only_for_vectors_of_eight(monkeypatch):
    for flags, expected in (
        ("flags : sse avx2 fma", True),
        ("flags : sse avx2", False),
        ("flags : avx2 fma avx512f", False),
        ("Features : asimd", False),
    ):
        monkeypatch.setattr(native, "processor", lambda flags=flags: flags)
        assert native.has_eight() == expected


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (7, 33, 16), (100, 77, 23), (801, 130, 40), (9, 800, 24)]
)
@pytest.mark.parametrize("about", SAMPLED)
def test_losses(c, shape, about):
    """Of more rows than are multiplied at a time, and of columns that fill no panel."""
    N, V, C = shape
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    targets[3::5] = -100
    h = draw(N, C)
    w = draw(V, C, seed=1) / C**0.5
    same(
        lambda h, w: c.linear_log_prob(h, w, targets, **about),
        lambda h, w: linear_log_prob(h, w, targets, **about),
        [h, w],
        times=16,
    )
    with torch.no_grad():
        found = c.linear_log_prob(h, w, targets, **about)
    torch.testing.assert_close(found, linear_log_prob(h, w, targets, **about))


def test_losses_again(c):
    """A second backward pass gives the same, and what is not a number stays in its row."""
    h, w = draw(9, 16).requires_grad_(), draw(20, 16, seed=1).requires_grad_()
    losses = c.linear_log_prob(h, w, torch.arange(9))
    first, second = (torch.autograd.grad(losses.sum(), (h, w), retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second))
    with torch.no_grad():
        h[4, 2] = float("nan")
    losses = c.linear_log_prob(h, w, torch.arange(9))
    assert losses.isnan().nonzero().tolist() == [[4]]
    assert torch.autograd.grad(losses.sum(), h)[0].isnan().any(1).nonzero().tolist() == [[4]]


def about_documents(B, T, window):
    cu = [*range(0, B * T, T), 5, T + 1, B * T]
    cu_seqlens = torch.tensor(sorted({n for n in cu if n <= B * T}) + [B * T], dtype=torch.int32)
    return dict(cu_seqlens=cu_seqlens, max_seqlen=T, window=window, scale=0.3)


@pytest.mark.parametrize("shape", [(2, 37, 4, 16), (1, 430, 2, 20), (3, 9, 2, 64)])
@pytest.mark.parametrize("window", [3, 50, 1000])
def test_attention(c, shape, window):
    """Documents, windows, and heads that share keys."""
    B, T, H, D = shape
    q = draw(B, T, H, D)
    k, v = (draw(B, T, H // 2, D, seed=i) for i in (1, 2))
    about = about_documents(B, T, window)

    def form(f, backend):
        return lambda q, k, v: f(q, k, v, **about, backend=backend)

    same(form(c.attention, "sdpa"), form(attention, "blockwise"), [q, k, v])


def test_attention_of_what_is_not_in_one_stretch(c):
    about = about_documents(2, 21, 8)

    def form(f, backend):
        def of(qkv):
            q, k, v = (x.transpose(1, 3) for x in qkv.unbind(1))  # no stride of 1
            return f(q, k, v, **about, backend=backend)

        return of

    same(form(c.attention, "sdpa"), form(attention, "blockwise"), [draw(2, 3, 16, 2, 21)])


@pytest.mark.parametrize("shape", [(2, 37, 4, 16), (1, 101, 2, 32), (2, 50, 2, 64)])
@pytest.mark.parametrize("parts", ["", "offset", "value", "value share", "offset value share gate"])
def test_attention_with_what_is_around_it(c, shape, parts):
    B, T, H, D = shape
    about = about_documents(B, T, 40)
    starts = document_starts(torch.zeros(B, T), about["cu_seqlens"])
    angles = draw(T + 3, 1, D // 2, seed=3)
    tables = angles.cos(), angles.sin()
    qkv = draw(B, T, 3 * H, D)
    more = dict(
        value=draw(B, T, H * D, seed=4), share=draw(B, T, H, seed=5), gate=draw(B, T, H, seed=6)
    )
    more = {name: x for name, x in more.items() if name in parts}

    def found(qkv, *more_):
        named = dict(zip(more, more_))
        named["starts"] = starts if "offset" in parts else None
        return c.products.attention_of(qkv, *tables, **named, **about)

    def reference(qkv, *more_):
        named = dict(zip(more, more_))
        cos, sin = (x.to(qkv.dtype) for x in tables)
        q, k, v = OPS["qk_norm_rope"].reference(qkv, cos, sin)
        if "offset" in parts:
            still = torch.arange(D) % (D // 2) >= D // 4
            k = torch.where(still, previous(k, starts[..., None, None], k), k)
        if "value" in parts:
            share = named.get("share", torch.ones(B, T, H))[..., None]
            v = v + share * named["value"].view(v.shape)
        y = attention(q, k, v, **about)
        return y * named["gate"][..., None] if "gate" in parts else y

    same(found, reference, [qkv, *more.values()])


SHAPES = [(2, 128, 128), (3, 33, 40), (1, 40, 33), (2, 100, 24), (3, 17, 500), (1, 1, 6), (2, 2, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_factors(c, shape):
    """As far from float64 as PyTorch's, or three times as far."""
    G = 3 * draw(*shape)
    exact = polar_express(G.double())
    error = (c.polar_express(G).double() - exact).abs().max()
    assert error <= 3 * (polar_express(G).double() - exact).abs().max() + 1e-6
    assert torch.equal(c.polar_express(torch.zeros(shape)), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (64, 64)])
def test_polar_factors_of_what_has_hardly_a_rank(c, shape):
    """Singular values down to 1e-7 of the largest: those above 1e-3 of the norm end near 1, none
    above 1.2."""
    U, _, V = torch.linalg.svd(draw(*shape), full_matrices=False)
    S = torch.logspace(0, -7, 64)
    found = torch.linalg.svdvals(c.polar_express(U * S @ V).double())
    assert found.max() < 1.2
    assert (found > 0.8).sum() >= (S > 1.1e-3 * S.norm()).sum()


def test_threads_change_no_bit(c):
    qkv = draw(3, 50, 6, 16)
    tables = draw(50, 1, 8), draw(50, 1, 8, seed=1)
    about = about_documents(3, 50, 20)
    targets = torch.arange(500) % 70
    found = []
    before = torch.get_num_threads()
    for threads in 1, 3:
        torch.set_num_threads(threads)
        found.append(
            [
                *results(lambda x: c.products.attention_of(x, *tables, **about), [qkv]),
                *results(
                    lambda h, w: c.linear_log_prob(h, w, targets), [draw(500, 24), draw(70, 24)]
                ),
                c.polar_express(draw(5, 20, 30)),
            ]
        )
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*found))


def test_the_model_is_the_same(c):
    """Loss and gradients of a model with all that attention has around it."""
    config = Config(
        n_layer=2,
        n_embd=32,
        n_head=2,
        value_embed_layers=(0,),
        smear=True,
        attn_gate=True,
        key_offset=True,
        short_window=(8,),
        long_window=(16,),
    )
    inputs = torch.randint(60, (2, 40), generator=torch.Generator().manual_seed(0))
    targets = inputs.roll(-1, dims=1)
    cu_seqlens = torch.tensor([0, 13, 40, 80], dtype=torch.int32)
    found = []
    for library in None, c:
        ops = choose_ops("cpu", fused=library)
        assert (ops.products is None) == (library is None)
        model = Model(config, 60, 40, ops=ops)
        with pytest.MonkeyPatch.context() as compiling:
            compiling.setattr(torch.compiler, "is_compiling", lambda: True)
            assert model.products is None
        model.init_weights(0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p += 0.1 * draw(*p.shape, seed=len(name))
        loss = model(inputs, targets, cu_seqlens, config.stage(1.0, 40))
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads))
    (loss, grads), (own_loss, own_grads) = found
    torch.testing.assert_close(own_loss, loss)
    assert grads.keys() == own_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(own_grads[name], grad, rtol=1e-4, atol=1e-4 * grad.abs().max())
