"""kernels/tiled.py, where the processor has Intel's tiles, beside float64 and the PyTorch forms,
gradients included."""

import pytest
import torch
from helpers import built
from kernel_checks import poisoned_memory
from test_fused import draw, results, same

from base.places import cache_folder
from kernels import choose_ops, native
from kernels.attention import attention
from kernels.fused import Fused
from kernels.linear_log_prob import linear_log_prob
from kernels.tiled import Tiled
from models.gpt import Config, Model

HALF = torch.bfloat16


@pytest.fixture(scope="module")
def c(tmp_path_factory):
    if not native.has_tiles():
        pytest.skip("this processor has no tiles")
    library = Tiled.build(tmp_path_factory.mktemp("cache"))
    if library is None:
        pytest.skip("the compiler, or Linux, has no tiles")
    return Fused(native.build("fused", cache_folder()), tiled=library)


def test_only_where_there_are_tiles(monkeypatch, tmp_path):
    for flags, expected in (
        ("flags : avx512f avx512_bf16 amx_tile amx_bf16", True),
        ("flags : avx512f avx512_bf16", False),
        ("Features : asimd bf16", False),
    ):
        monkeypatch.setattr(native, "processor", lambda flags=flags: flags)
        assert native.has_tiles() == expected
    said = []
    assert Tiled.build(tmp_path, said.append) is None and not said


def test_a_compiler_without_tiles_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "has_tiles", lambda: True)
    monkeypatch.setattr(native, "NATIVE", [])
    monkeypatch.setattr(native, "WIDEST", [])
    library, _ = built(Fused, tmp_path)
    assert library.tiled is None


SHAPES = [(1, 1, 32), (7, 33, 64), (100, 77, 32), (801, 130, 96), (40, 5000, 32), (3000, 40, 32)]


@pytest.mark.parametrize("shape", SHAPES)
def test_losses(c, shape):
    """Of columns and rows that fill no tile, of heads that no cache holds; logits are not rounded,
    so that losses are exact to fp32."""
    N, V, C = shape
    targets = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    targets[3::5] = -100
    h = draw(N, C, dtype=HALF)
    w = draw(V + 3, C, dtype=HALF, seed=1)[:V]  # behind these others follow
    with torch.no_grad(), poisoned_memory():
        found = c.linear_log_prob(h, w, targets)
    exact = linear_log_prob(h.double(), w.double(), targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=2e-5, rtol=1e-5)


def test_losses_that_are_large_or_none(c):
    h = torch.zeros(70, 32, dtype=HALF)
    h[:, 0] = 1e4
    h[1, 3] = float("nan")
    w = torch.zeros(40, 32, dtype=HALF)
    w[5] = 1
    w[7] = -1
    with torch.no_grad():
        found = c.linear_log_prob(h, w, torch.full((70,), 5))
        far = c.linear_log_prob(h, w, torch.full((70,), 7))
    assert found.isnan().tolist() == [i == 1 for i in range(70)]
    assert found[0] == 0 and far[0] == -2e4 * torch.tensor(1e4, dtype=HALF).item() / 1e4


def test_gradients_and_other_widths_are_left_to_others(c, monkeypatch):
    monkeypatch.setattr(c.tiled, "c", None)
    h = draw(5, 32, dtype=HALF).requires_grad_()
    c.linear_log_prob(h, draw(7, 32, dtype=HALF), torch.arange(5)).sum().backward()
    with torch.no_grad():
        c.linear_log_prob(draw(5, 16, dtype=HALF), draw(7, 16, dtype=HALF), torch.arange(5))
        c.linear_log_prob(draw(5, 32), draw(7, 32), torch.arange(5))
    q = draw(1, 4, 2, 16, dtype=HALF)
    about = about_documents(1, 4, 4)
    c.attention(q, q, q, **about, backend="sdpa")
    wide = draw(1, 4, 2, 32, dtype=HALF)
    c.attention(wide, wide, wide, **about, backend="blockwise")


def about_documents(B, T, window):
    """Rows of several documents, of which one is a token long."""
    cu = [*range(0, B * T, T), 5, T // 2, T // 2 + 1, B * T]
    cu_seqlens = torch.tensor(sorted({n for n in cu if n <= B * T}) + [B * T], dtype=torch.int32)
    return dict(cu_seqlens=cu_seqlens, max_seqlen=T, window=window, scale=0.3)


def forms(c, about):
    """Ours, and PyTorch's in the same dtype and in any."""
    ours = lambda *qkv: c.attention(*qkv, **about, backend="sdpa")  # noqa: E731
    eager = lambda *qkv: attention(*qkv, **about, backend="sdpa")  # noqa: E731
    reference = lambda *qkv: attention(*qkv, **about, backend="blockwise")  # noqa: E731
    return ours, eager, reference


@pytest.mark.parametrize(
    "shape", [(1, 1, 2, 32), (2, 37, 4, 32), (1, 700, 2, 64), (3, 256, 2, 32), (2, 290, 2, 128)]
)
@pytest.mark.parametrize("window", [3, 50, 1000])
def test_attention(c, shape, window):
    """Documents, windows, and heads that share keys; of rows that fill no block, or no job."""
    B, T, H, D = shape
    q = draw(B, T, H, D, dtype=HALF)
    k, v = (draw(B, T, H // 2, D, dtype=HALF, seed=i) for i in (1, 2))
    ours, eager, reference = forms(c, about_documents(B, T, window))
    with poisoned_memory():
        same(ours, reference, [q, k, v], eager, times=3)
        with torch.no_grad():
            y = ours(q, k, v)
    assert torch.equal(y, ours(q.requires_grad_(), k, v))


def test_attention_of_what_is_not_in_one_stretch(c):
    ours, eager, reference = forms(c, about_documents(2, 41, 8))

    def of(f):
        return lambda qkv: f(*(x.transpose(1, 3) for x in qkv.unbind(1)))  # no stride of 1

    same(of(ours), of(reference), [draw(2, 3, 32, 2, 41, dtype=HALF)], of(eager), times=3)

    def of_slices(f):
        return lambda qkv: f(*qkv.chunk(3, dim=2))

    qkv = draw(2, 41, 6, 32, dtype=HALF)
    same(of_slices(ours), of_slices(reference), [qkv], of_slices(eager), times=3)


def test_a_query_that_is_not_a_number_stays_alone(c):
    q, k, v = (draw(1, 70, 2, 32, dtype=HALF, seed=i) for i in range(3))
    q[0, 40, 1, 3] = float("nan")
    y = c.attention(q, k, v, **about_documents(1, 70, 20), backend="sdpa")
    assert y[0, 40, 1].isnan().all()
    assert y.isnan().sum() == 32


def test_threads_change_no_bit(c):
    qkv = draw(2, 300, 6, 32, dtype=HALF)
    ours, _, _ = forms(c, about_documents(2, 300, 100))
    h, w, targets = draw(500, 32, dtype=HALF), draw(70, 32, dtype=HALF), torch.arange(500) % 70
    found = []
    before = torch.get_num_threads()
    for threads in 1, 3:
        torch.set_num_threads(threads)
        of_attention = results(lambda x: ours(*x.chunk(3, dim=2)), [qkv])
        with torch.no_grad():
            found.append([*of_attention, c.linear_log_prob(h, w, targets)])
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(*found))


def test_the_model_is_the_same(c):
    """Loss and gradients of a model, and its validation's."""
    about = dict(n_layer=2, n_embd=64, n_head=2, short_window=(8,), long_window=(16,))
    config = Config(**about, value_embed_layers=(0,))
    inputs = torch.randint(60, (2, 40), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, 13, 40, 80], dtype=torch.int32)
    batch = inputs, inputs.roll(-1, dims=1), cu_seqlens, config.stage(1.0, 40)
    plain = Fused(native.build("fused", cache_folder()))
    found = []
    for fused, dtype in (None, torch.float32), (plain, HALF), (c, HALF):
        model = Model(config, 60, 40, dtype=dtype, ops=choose_ops("cpu", dtype, fused=fused))
        model.init_weights(0)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p += (0.1 * draw(*p.shape, seed=len(name))).to(p.dtype)
            val = model(*batch)
        loss = model(*batch)
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([x.double() for x in (loss.detach(), val, *grads)])
    for exact, near, ours in zip(*found, strict=True):
        scale = exact.abs().max()
        assert (ours - exact).abs().max() <= 2 * (near - exact).abs().max() + 0.05 * scale
