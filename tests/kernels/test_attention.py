"""kernels/attention.py against dense attention, a document at a time, in float64 and in the same
dtype.

Every backend is tested: on a GPU those that work there, else the flash ones as fakes that do what
is documented, and flex through the mathematics PyTorch runs without a compiler. What only the CPU
needs runs blockwise, the reference.
"""

import importlib
import sys
import types

import pytest
import torch
import torch.nn.attention.flex_attention
import torch.nn.attention.varlen
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import DEVICE
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.attention import BACKENDS, OF_TOKENS, attention, choose_backend

module = importlib.import_module("kernels.attention")

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
HUGE = 10**9
# lengths of the documents of each row
PACKINGS = {
    "one short row": [
        [1, 15, 16, 1, 32, 12]
    ],  # borders on 16, 32 and 64: where blocks of 16 and 32 end
    "three rows": [[50], [16, 16, 1, 17], [1] * 9 + [41]],
    "rows of one block": [[16, 16], [32], [31, 1]],
    "single tokens": [[1], [1], [1]],
    "many blocks": [[64, 1, 7, 16, 33, 80]],
}


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch):
    monkeypatch.delenv("ATTENTION_BACKEND", raising=False)


def cu_seqlens_of(rows, padding=2):
    """int32 starts of the documents in the flattened rows, padded at the end with the number of
    tokens."""
    lengths = [0] + [n for row in rows for n in row]
    return (
        torch.tensor(lengths)
        .cumsum(0)
        .to(torch.int32)
        .repeat_interleave(torch.tensor([1] * (len(lengths) - 1) + [1 + padding]))
    )


def naive(q, k, v, rows, window, scale):
    """Every document alone, with a dense (T, T) mask. Computes in the dtype it is given. (B, T,
    H, D)."""
    flat, parts, at = [x.flatten(0, 1) for x in (q, k, v)], [], 0
    for n in (n for row in rows for n in row):
        q_, k_, v_ = (x[at : at + n].transpose(0, 1) for x in flat)  # (H, n, D)
        back = torch.arange(n)[:, None] - torch.arange(n)
        hidden = (back < 0) | (back > window)
        weights = (q_ @ k_.mT * scale).masked_fill(hidden, float("-inf")).softmax(-1)
        parts.append((weights @ v_).transpose(0, 1))
        at += n
    return torch.cat(parts).view(q.shape)


def draw(rows, H=2, D=8, dtype=torch.float32, seed=0, n=4):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(len(rows), sum(rows[0]), H, D, generator=g).to(dtype) for _ in range(n)]


def output_and_gradients(fn, q, k, v, dy):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    y = fn(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def run(q, k, v, rows, window, scale=0.3, max_seqlen=None, **kwargs):
    longest = max(n for row in rows for n in row)
    return attention(
        q,
        k,
        v,
        cu_seqlens=cu_seqlens_of(rows).to(q.device),
        max_seqlen=max_seqlen or longest,
        window=window,
        scale=scale,
        **kwargs,
    )


def visible(rows, window):
    """(B T, B T) bool: which token sees which, told from the documents' lengths by two loops."""
    n = sum(map(sum, rows))
    seen, at = torch.zeros(n, n, dtype=torch.bool), 0
    for length in (n for row in rows for n in row):
        for i in range(at, at + length):
            seen[i, max(at, i - window) : i + 1] = True
        at += length
    return seen


def weights_of(rows, window, seed=0, **kwargs):
    """(B T, B T) the attention weights themselves: values are the unit vectors of all tokens of
    all rows."""
    n = sum(map(sum, rows))
    q, k = draw(rows, H=1, D=n, seed=seed, n=2)
    v = torch.eye(n).view(len(rows), -1, 1, n)
    return run(q, k, v, rows, window, scale=0.1, **kwargs).reshape(n, n)


# --- numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 1, 7, 16, 33, "T - 1", HUGE])
@pytest.mark.parametrize("packing", PACKINGS)
def test_output_and_gradients_are_as_exact_as_eager(packing, window, dtype):
    """Against float64: error at most twice that of the same mathematics in the same dtype."""
    rows = PACKINGS[packing]
    window = sum(rows[0]) - 1 if window == "T - 1" else window
    inputs = draw(rows, dtype=dtype)
    exact = output_and_gradients(
        lambda *x: naive(*x, rows, window, 0.3), *(x.double() for x in inputs)
    )
    eager = output_and_gradients(lambda *x: naive(*x, rows, window, 0.3), *inputs)
    ours = output_and_gradients(lambda *x: run(*x, rows, window), *inputs)
    for name, o, e, r in zip(("y", "dq", "dk", "dv"), ours, eager, exact):
        assert o.dtype == dtype and o.shape == r.shape
        allowed = 2 * (e - r).abs().max() + 1e-6
        assert (o - r).abs().max() <= allowed, name  # also false if there is a NaN


def test_large_scores_do_not_overflow():
    """Scores of some thousands: a softmax without its maximum taken off would be inf / inf."""
    rows = [[40, 60]]
    inputs = draw(rows)
    for window in (7, 80):
        exact = naive(*(x.double() for x in inputs[:3]), rows, window, 1000.0)
        assert (run(*inputs[:3], rows, window, scale=1000.0) - exact).abs().max() < 1e-2


def test_scale_is_the_factor_of_the_scores():
    rows = [[50, 14]]
    q, k, v = draw(rows, n=3)
    torch.testing.assert_close(
        run(q, k, v, rows, 7, scale=0.5), run(q * 2, k, v, rows, 7, scale=0.25)
    )
    assert not torch.allclose(run(q, k, v, rows, 7, scale=0.5), run(q, k, v, rows, 7, scale=0.25))


def test_heads_do_not_mix():
    rows = PACKINGS["three rows"]
    q, k, v = draw(rows, H=3, n=3)
    together = run(q, k, v, rows, 7)
    for h in range(3):
        alone = run(*(x[:, :, h : h + 1] for x in (q, k, v)), rows, 7)
        torch.testing.assert_close(together[:, :, h : h + 1], alone)


# --- who sees whom


@pytest.mark.parametrize("backend", ["blockwise", "sdpa"])
def test_fewer_heads_of_keys_serve_as_many_queries_each_in_order(backend):
    rows = [[5, 7], [12]]
    q, dy = draw(rows, H=6, n=2)
    k, v = draw(rows, H=2, seed=1, n=2)
    ours = output_and_gradients(lambda *x: run(*x, rows, 4, backend=backend), q, k, v, dy)
    whole = [x.unflatten(2, (2, 1)).expand(-1, -1, -1, 3, -1).flatten(2, 3) for x in (k, v)]
    y, dq, dk, dv = output_and_gradients(
        lambda *x: run(*x, rows, 4, backend=backend), q, *whole, dy
    )
    summed = [x.unflatten(2, (2, 3)).sum(3) for x in (dk, dv)]
    for a, b in zip(ours, [y, dq, *summed]):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("window", [0, 1, 7, 15, 16, 17, 31, 32, 33, 62, 63, 64, HUGE])
def test_window_is_exact(window):
    """A token `window` back is seen, one more back is not: all of the T x T pattern, across
    block sizes."""
    seen = weights_of([[64]], window) > 0
    i = torch.arange(64)
    back = i[:, None] - i
    assert torch.equal(seen, (back >= 0) & (back <= window))


@pytest.mark.parametrize("window", [1, 7, 16, 20, 40])
@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("j", [1, 16, 33])
def test_a_changed_token_moves_its_window_and_nothing_else(which, window, j):
    """Bit-exactly: key or value j reaches the queries j ... j + window."""
    rows = [[70]]
    q, k, v = draw(rows, n=3)
    before = run(q, k, v, rows, window)
    changed = k if which == "k" else v
    changed[:, j] += 1
    moved = (run(q, k, v, rows, window) != before).any(-1).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == list(range(j, min(70, j + window + 1)))


@pytest.mark.parametrize("window", [3, 40])
def test_a_changed_query_moves_only_its_own_output(window):
    rows = [[30, 40]]
    q, k, v = draw(rows, n=3)
    before = run(q, k, v, rows, window)
    q[:, 33] += 1
    moved = (run(q, k, v, rows, window) != before).any(-1).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == [33]


@st.composite
def packings(draw):
    """Rows of equal length up to 70, each cut at random places."""
    T = draw(st.integers(1, 70))
    cuts = draw(
        st.lists(st.sets(st.integers(1, max(1, T - 1)), max_size=8), min_size=1, max_size=3)
    )
    borders = [[0, *sorted(c for c in row if c < T), T] for row in cuts]
    return [[b - a for a, b in zip(row, row[1:])] for row in borders]


@settings(deadline=None, max_examples=50, database=None)
@given(packings(), st.one_of(st.integers(0, 75), st.just(HUGE)), st.integers(0, 9))
def test_any_packing_any_window(rows, window, seed):
    """Documents, rows and the future are invisible, all else in the window is seen, and weights
    sum to 1."""
    for max_seqlen in (None, sum(rows[0])):  # the longest document, or any bound of it
        weights = weights_of(rows, window, seed, max_seqlen=max_seqlen)
        assert torch.equal(weights > 0, visible(rows, window))
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))


@pytest.mark.parametrize("window", [5, 60])
def test_enormous_tokens_of_other_documents_and_rows_do_not_leak(window):
    """Bit-exactly. (Not inf: times a weight of zero, in a shared block, that is NaN in any
    backend.)"""
    rows = [[20, 21, 23], [64]]
    q, k, v = draw(rows, n=3)
    before = run(q, k, v, rows, window)
    for x in (k, v):
        x[0, :20] = 1e30
        x[0, 41:] = -1e30
        x[1] = 1e30
    assert torch.equal(run(q, k, v, rows, window)[0, 20:41], before[0, 20:41])


@pytest.mark.parametrize("window", [7, 60])
def test_padding_and_empty_documents_change_nothing(window):
    """cu_seqlens of any length mean the same, with any number of paddings and repeated starts."""
    q, k, v = draw([[30, 34]], n=3)

    def with_starts(*starts):
        cu_seqlens = torch.tensor(starts, dtype=torch.int32)
        return attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=34, window=window, scale=0.3)

    plain = with_starts(0, 30, 64)
    for starts in ((0, 30, 64, 64, 64, 64, 64, 64), (0, 0, 30, 30, 30, 64)):
        assert torch.equal(with_starts(*starts), plain)


@pytest.mark.parametrize("window", [7, 60])
def test_rows_mean_the_same_alone_and_together(window):
    rows = PACKINGS["three rows"]
    q, k, v = draw(rows, n=3)
    together = run(q, k, v, rows, window)
    for r, row in enumerate(rows):
        torch.testing.assert_close(
            together[r : r + 1], run(q[r : r + 1], k[r : r + 1], v[r : r + 1], [row], window)
        )


def test_inputs_stay_as_they_were_and_may_be_strided():
    rows = PACKINGS["many blocks"]
    big = draw(rows, H=6, D=8, n=1)[0]
    q, k, v = big.chunk(3, dim=2)  # as from one projection
    copy = big.clone()
    for window in (7, HUGE):
        torch.testing.assert_close(
            run(q, k, v, rows, window), run(*(x.contiguous() for x in (q, k, v)), rows, window)
        )
    assert torch.equal(big, copy)


# --- memory and compilation


class Largest(TorchDispatchMode):
    """Records the element count of the largest tensor any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("backend", ["blockwise", "sdpa"])
@pytest.mark.parametrize("T, window", [(4096, 0), (4096, 16), (2000, 100), (2048, 512)])
def test_no_tensor_of_T_times_T_where_the_window_is_small(T, window, backend):
    """Forward and backward: nothing larger than B H T times two blocks, T rounded up to whole
    blocks."""
    rows = [[T - 10, 10]]
    q, k, v, dy = draw(rows, H=1, D=4)
    block = max(16, window)
    with Largest() as largest:
        output_and_gradients(lambda *x: run(*x, rows, window, backend=backend), q, k, v, dy)
    assert 0 < largest.numel <= -(-T // block) * block * 2 * block < T * T


@pytest.mark.parametrize(
    "window, backend", [(3, "blockwise"), (40, "blockwise"), (3, "sdpa"), (3, "flex")]
)
def test_compiles_into_one_graph_for_all_documents(monkeypatch, window, backend):
    """fullgraph; the same numbers; other documents and max_seqlen the same: nothing is compiled
    anew."""
    allow_flex_on_cpu(monkeypatch)
    graphs = []

    def compiler(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def fn(q, k, v, cu_seqlens):
        return attention(
            q, k, v, cu_seqlens=cu_seqlens, max_seqlen=60, window=window, scale=0.3, backend=backend
        )

    compiled = torch.compile(fn, fullgraph=True, dynamic=False, backend=compiler)
    for rows in ([[10, 40], [49, 1]], [[1, 49], [25, 25]]):
        cu, inputs = cu_seqlens_of(rows), draw(rows)
        for a, b in zip(
            output_and_gradients(lambda *x: compiled(*x, cu), *inputs),
            output_and_gradients(lambda *x: fn(*x, cu), *inputs),
        ):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1


# --- choosing a backend


def fake_flash_attn(monkeypatch, extra_window=0, future=0, documents=True, scale=1.0, poison=None):
    """Install a flash_attn package that is right, or wrong in one way. Its interface: window
    (left, right), -1 is no limit, causal allows nothing to the right."""

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
    ):
        assert (
            q.dim() == 3
            and cu_seqlens_q.dtype == torch.int32
            and torch.equal(cu_seqlens_q, cu_seqlens_k)
        )
        starts = cu_seqlens_q.tolist() if documents else [0, len(q)]
        assert (
            max_seqlen_q == max_seqlen_k >= max(b - a for a, b in zip(starts, starts[1:]))
            or not documents
        )
        left, right = window_size
        back = torch.arange(len(q))[:, None] - torch.arange(len(q))
        hidden = back < -(future or (0 if causal else len(q) if right < 0 else right))
        if left >= 0:
            hidden |= back > left + extra_window
        doc = torch.bucketize(torch.arange(len(q)), torch.tensor(starts), right=True)
        hidden |= doc[:, None] != doc
        scores = torch.einsum("ihd,jhd->hij", q, k) * softmax_scale * scale
        y = torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)
        if poison is not None:
            {"q": q, "k": k, "v": v}[poison].register_hook(lambda g: g * float("nan"))
        return y

    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)


def fake_flash_attn_3(monkeypatch, returns_lse=False):
    """The flash-attn 3 package, as its signature has it, computed by the fake above."""
    flash = sys.modules["flash_attn"].flash_attn_varlen_func

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
    ):
        y = flash(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
        )
        return (y, None) if returns_lse else y

    package = types.ModuleType("flash_attn_interface")
    package.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)


def fake_varlen(monkeypatch):
    """Torch's own varlen attention, as its signature documents it, computed by the fake above."""
    flash = sys.modules["flash_attn"].flash_attn_varlen_func

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)
    ):
        return flash(
            query,
            key,
            value,
            cu_seq_q,
            cu_seq_k,
            max_q,
            max_k,
            softmax_scale=scale,
            window_size=window_size,
        )

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)


def fake_flash_attn_4(monkeypatch):
    """The flash-attn-4 package's two functions as 4.0.0b36 has them: None is no limit, and
    results we do not need."""
    flash = sys.modules["flash_attn"].flash_attn_varlen_func

    def fwd(
        q,
        k,
        v,
        *,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_size_left,
        return_lse,
    ):
        assert causal and return_lse
        y = flash(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            softmax_scale=softmax_scale,
            window_size=(-1 if window_size_left is None else window_size_left, 0),
        )
        return y, torch.full((q.size(1), len(q)), 7.0), None, None, None

    def bwd(q, k, v, y, dy, logsumexp, **options):
        assert (logsumexp == 7).all() and y.shape == dy.shape
        n, H, scale = len(q), q.size(1), options["softmax_scale"]
        unit = torch.eye(n, dtype=q.dtype)[:, None].expand(n, H, n)
        p = fwd(q, k, unit, return_lse=True, **options)[0]  # the weights: i, h, j
        dp = torch.einsum("ihd,jhd->ihj", dy, v)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
        return (
            torch.einsum("ihj,jhd->ihd", ds, k),
            torch.einsum("ihj,ihd->jhd", ds, q),
            torch.einsum("ihj,ihd->jhd", p, dy),
        )

    package = types.ModuleType("flash_attn.cute.interface")
    package._flash_attn_fwd, package._flash_attn_bwd = fwd, bwd
    monkeypatch.setitem(sys.modules, "flash_attn.cute", types.ModuleType("flash_attn.cute"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", package)


def fake_all(monkeypatch):
    fake_flash_attn(monkeypatch)
    fake_flash_attn_3(monkeypatch)
    fake_flash_attn_4(monkeypatch)
    fake_varlen(monkeypatch)


def allow_flex_on_cpu(monkeypatch):
    """PyTorch refuses gradients of flex_attention on a CPU for want of kernels; its own
    mathematics has them."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *args: None)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Every backend that works here or can be played."""
    if DEVICE.type == "cpu":
        fake_all(monkeypatch)
        allow_flex_on_cpu(monkeypatch)
    elif error := module._probe(request.param, DEVICE, dtype_of(request.param), 64):
        pytest.skip(error)
    return request.param


def dtype_of(backend):
    return torch.bfloat16 if DEVICE.type == "cuda" and backend in OF_TOKENS else torch.float32


def run_there(q, k, v, rows, window, backend, scale=0.3):
    """run on the device under test in the backend's dtype; tensors come from and go to the CPU."""
    dtype = dtype_of(backend) if q.dtype == torch.float32 else q.dtype
    there = (x.to(DEVICE, dtype) for x in (q, k, v))
    return run(*there, rows, window, scale, backend=backend).to(q)


def assert_as_exact_as_naive(rows, window, backend, D=64, seed=0):
    """Output and gradients against float64: at most twice the error of dense attention in the same
    dtype.

    Three times on a GPU, as in FlashAttention's own tests: products there are summed in another
    order. Where a token sees only itself, dq and dk are zero, and fused kernels find that by
    subtracting two sums of D products; and SDPA's exponential has 20 bits on a CPU.
    """
    inputs = [x.to(dtype_of(backend)) for x in draw(rows, D=D, seed=seed)]
    exact = output_and_gradients(
        lambda *x: naive(*x, rows, window, 0.3), *(x.double() for x in inputs)
    )
    eager = output_and_gradients(lambda *x: naive(*x, rows, window, 0.3), *inputs)
    ours = output_and_gradients(lambda *x: run_there(*x, rows, window, backend), *inputs)
    for name, o, e, r in zip(("y", "dq", "dk", "dv"), ours, eager, exact):
        slack = 4e-6 * max(1, r.abs().max()) if r.any() else 2 * D * torch.finfo(e.dtype).eps
        allowed = (2 if DEVICE.type == "cpu" else 3) * (e - r).abs().max() + slack
        assert (o - r).abs().max() <= allowed, name


@pytest.mark.parametrize("window", [0, 7, 127, 128, 129, HUGE])
def test_every_backend_is_as_exact_as_eager(backend, window):
    for rows in ([[300], [128, 172], [1, 127, 1, 129, 42]], [[1, 15, 16, 1, 32]]):
        assert_as_exact_as_naive(rows, window, backend)


def test_every_backend_any_packing_any_window(backend):
    @settings(deadline=None, max_examples=4 if backend == "flex" else 15, database=None)
    @given(packings(), st.one_of(st.integers(0, 75), st.just(HUGE)), st.integers(0, 9))
    def check(rows, window, seed):
        if backend == "flex":
            torch._dynamo.reset()  # it counts a compilation for each shape
        assert_as_exact_as_naive(
            rows, window, backend, D=16 if DEVICE.type == "cpu" else 64, seed=seed
        )

    check()


@pytest.mark.parametrize("window", [0, 1, 15, 16, 17, 62, 63, 64])
def test_every_backend_sees_the_same_window(backend, window):
    """A token `window` back is seen, one more back is not, nor one of another document or to
    come."""
    rows = [[64], [17, 47], [1, 62, 1]]
    q, k = draw(rows, H=1, D=192, n=2)
    v = torch.eye(192).view(3, 64, 1, 192)
    if (
        backend == "flex" and DEVICE.type == "cuda"
    ):  # whose tile of so wide a head is too large in fp32
        q, k, v = (x.bfloat16() for x in (q, k, v))
    weights = run_there(q, k, v, rows, window, backend, scale=0.1).reshape(192, 192)
    assert torch.equal(weights > 0, visible(rows, window))


def test_every_backend_takes_slices_of_a_projection_and_strided_gradients(backend):
    rows = [[30, 34], [64]]
    qkv = draw(rows, H=6, D=64, n=1)[0]
    dy = draw(rows, D=64, n=1, seed=1)[0].transpose(1, 2).contiguous().transpose(1, 2)

    def gradients(fn):
        leaf = qkv.clone().requires_grad_()
        y = fn(*leaf.to(DEVICE, dtype_of(backend)).split(2, dim=2))
        return torch.autograd.grad(y, leaf, dy.to(y))

    for a, b in zip(
        gradients(lambda *x: run(*x, rows, 7, backend=backend)),
        gradients(lambda *x: run(*x, rows, 7)),
    ):
        torch.testing.assert_close(
            a, b, atol=1e-5 if dtype_of(backend) == torch.float32 else 0.1, rtol=1e-4
        )


@settings(deadline=None, max_examples=30, database=None)
@given(packings(), st.one_of(st.integers(0, 75), st.just(HUGE)), st.sampled_from([1, 8, 16]))
def test_flex_is_told_which_blocks_to_skip(rows, window, block):
    """Blocks it is given are those somebody sees; those it need not mask, those in which all see
    all."""
    masks = []

    def flex_attention(q, k, v, block_mask, scale):
        masks.append(block_mask)
        return q

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.nn.attention.flex_attention, "flex_attention", flex_attention)
        monkeypatch.setattr(module, "FLEX_BLOCK", block)
        run(*draw(rows, n=3), rows, window, backend="flex")
    mask, (B, T) = masks[0], (len(rows), sum(rows[0]))
    seen = torch.stack(
        [visible(rows, window)[b * T : (b + 1) * T, b * T : (b + 1) * T] for b in range(B)]
    )
    b, i, j = torch.arange(B)[:, None, None], torch.arange(T)[:, None], torch.arange(T)
    assert mask.shape == (B, 1, T, T) and torch.equal(mask.mask_mod(b, 0, i, j), seen)
    n = -(-T // block)
    for b in range(B):
        for i in range(n):
            tiles = [
                seen[b, i * block : (i + 1) * block, j * block : (j + 1) * block] for j in range(n)
            ]
            partial = mask.kv_indices[b, 0, i, : mask.kv_num_blocks[b, 0, i]].tolist()
            full = mask.full_kv_indices[b, 0, i, : mask.full_kv_num_blocks[b, 0, i]].tolist()
            assert sorted(partial + full) == [j for j in range(n) if tiles[j].any()]
            assert all(tiles[j].all() for j in full)
            assert i in partial and all(not tiles[j].all() for j in partial if j != i)
    assert (
        0 <= mask.kv_indices.min() and mask.kv_indices.max() < n and mask.full_kv_indices.max() < n
    )
    assert mask.kv_indices.dtype == mask.kv_num_blocks.dtype == torch.int32


def test_cpu_gets_sdpa():
    assert choose_backend("cpu", torch.float32, 64) == "sdpa"
    assert choose_backend(torch.device("cpu"), torch.bfloat16, 128) == "sdpa"


@pytest.mark.parametrize("name", OF_TOKENS)
@pytest.mark.parametrize("window", [0, 1, 7, 16, 63, HUGE])
def test_flash_backends_are_given_the_same_window(monkeypatch, name, window):
    """The arguments passed to FlashAttention, played by its documented meaning, give what
    blockwise gives."""
    fake_all(monkeypatch)
    rows = [[1, 15, 16, 1, 31], [64]]
    inputs = draw(rows)
    for a, b in zip(
        output_and_gradients(lambda *x: run(*x, rows, window, backend=name), *inputs),
        output_and_gradients(lambda *x: run(*x, rows, window), *inputs),
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", OF_TOKENS)
def test_flash_backends_are_told_when_there_is_no_limit(monkeypatch, name):
    """window (-1, 0), for which they have faster kernels, and never a window beyond the longest
    document."""
    given = []
    fake_flash_attn(monkeypatch)
    flash = sys.modules["flash_attn"].flash_attn_varlen_func

    def recorded(*args, **kwargs):
        given.append((args[5], args[6], kwargs["window_size"]))
        return flash(*args, **kwargs)

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", recorded)
    fake_flash_attn_3(monkeypatch, returns_lse=True)  # as its first versions
    fake_flash_attn_4(monkeypatch)
    fake_varlen(monkeypatch)
    rows = [[30, 34]]
    for window, max_seqlen in ((32, 34), (33, 34), (HUGE, 34), (62, 100), (63, 100)):
        run(*draw(rows, n=3), rows, window, max_seqlen=max_seqlen, backend=name)
    assert given == [
        (34, 34, (32, 0)),
        (34, 34, (-1, 0)),
        (34, 34, (-1, 0)),
        (64, 64, (62, 0)),
        (64, 64, (-1, 0)),
    ]


def test_unknown_backend_lists_the_known_ones(monkeypatch):
    rows = [[8]]
    monkeypatch.setenv("ATTENTION_BACKEND", "flash_atn")
    for call in (
        lambda: choose_backend("cpu", torch.float32, 8, forced="flash_atn"),
        lambda: choose_backend("cpu", torch.float32, 8),
        lambda: run(*draw(rows, n=3), rows, 3, backend="flash_atn"),
    ):
        with pytest.raises(ValueError, match=f"'flash_atn'.*{', '.join(BACKENDS)}") as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_forced_backend_that_does_not_work_is_refused(monkeypatch, how):
    """In one line that names it."""
    if how == "environment":
        monkeypatch.setenv("ATTENTION_BACKEND", "varlen")
    with pytest.raises(ValueError, match="'varlen' does not work here: .+") as error:
        choose_backend("cpu", torch.float32, 16, forced="varlen" if how == "argument" else None)
    assert "\n" not in str(error.value)


def test_the_argument_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("ATTENTION_BACKEND", "varlen")
    assert choose_backend("cpu", torch.float32, 16, forced="blockwise") == "blockwise"


def test_environment_forces_a_backend_that_works(monkeypatch):
    fake_flash_attn(monkeypatch)
    monkeypatch.setenv("ATTENTION_BACKEND", "flash_attn")
    assert choose_backend("cpu", torch.float32, 16) == "flash_attn"


@pytest.mark.parametrize(
    "fault",
    [
        dict(extra_window=1),
        dict(extra_window=-1),
        dict(future=1),
        dict(documents=False),
        dict(scale=1.5),
    ],
    ids=str,
)
def test_probe_refuses_a_backend_that_means_something_else(monkeypatch, fault):
    """A window one too long or too short, the next token, other documents, another scale."""
    fake_flash_attn(monkeypatch, **fault)
    with pytest.raises(
        ValueError, match="'flash_attn' does not work here: differs from the reference"
    ):
        choose_backend("cpu", torch.float32, 16, forced="flash_attn")


@pytest.mark.parametrize("poison", ["q", "k", "v"])
def test_probe_refuses_a_backend_with_NaN_gradients(monkeypatch, poison):
    """Right outputs and one gradient of NaN, as broken builds give."""
    fake_flash_attn(monkeypatch, poison=poison)
    with pytest.raises(ValueError, match="'flash_attn' does not work here"):
        choose_backend("cpu", torch.float32, 16, forced="flash_attn")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_can_be_had_on_a_CPU(dtype):
    assert choose_backend("cpu", dtype, 64, forced="sdpa") == "sdpa"


def test_flex_is_refused_on_a_CPU():
    with pytest.raises(ValueError, match="'flex' does not work here: .*CPU"):
        choose_backend("cpu", torch.float32, 64, forced="flex")


def test_a_varlen_without_windows_is_refused(monkeypatch):
    """PyTorch 2.10's."""

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None
    ):
        raise AssertionError("called")

    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
    with pytest.raises(ValueError, match="'varlen' does not work here: .*no window_size"):
        choose_backend("cpu", torch.float32, 64, forced="varlen")


def test_probe_refuses_a_head_width_or_dtype_that_a_backend_cannot_do(monkeypatch):
    fake_flash_attn(monkeypatch)
    flash = sys.modules["flash_attn"].flash_attn_varlen_func

    def picky(q, *args, **kwargs):
        if q.size(-1) > 256 or q.dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError(
                "FlashAttention only\nsupports fp16 and bf16, head dimension at most 256"
            )
        return flash(q, *args, **kwargs)

    monkeypatch.setattr(sys.modules["flash_attn"], "flash_attn_varlen_func", picky)
    for dtype, head_dim in ((torch.float32, 64), (torch.bfloat16, 264)):
        with pytest.raises(
            ValueError,
            match="'flash_attn' does not work here: RuntimeError: FlashAttention only sup",
        ):
            choose_backend("cpu", dtype, head_dim, forced="flash_attn")
    assert choose_backend("cpu", torch.bfloat16, 64, forced="flash_attn") == "flash_attn"


@pytest.mark.parametrize(
    "major, newest",
    [(7, []), (8, []), (9, ["flash_attn_3", "flash_attn_4"]), (10, ["flash_attn_4"]), (12, [])],
)
def test_order_of_preference(monkeypatch, major, newest):
    """The newest FlashAttention made for the chip, the one built in, the others."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    everything = newest + ["varlen", "flash_attn", "flex", "sdpa", "blockwise"]
    for i, works in enumerate(everything):
        tried = []

        def probe(backend, device, dtype, head_dim, shapes):
            tried.append(backend)
            return None if backend == works else "no"

        monkeypatch.setattr(module, "_probe", probe)
        assert choose_backend("cuda", torch.bfloat16, 128) == works and tried == everything[: i + 1]
        assert choose_backend("cuda", torch.bfloat16, 128, forced=works) == works and tried[
            i + 1 :
        ] == [works]
    with pytest.raises(ValueError, match="'varlen' does not work here: no"):
        choose_backend("cuda", torch.bfloat16, 128, forced="varlen")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="plays a package that may be there")
def test_the_op_of_flash_attn_4_is_sound(monkeypatch):
    """Its registrations, and that a compiled graph takes it whole."""
    fake_all(monkeypatch)
    rows = [[3, 5]]
    qkv = [x.flatten(0, 1).requires_grad_() for x in draw(rows, n=3)]
    for left in (-1, 2):
        torch.library.opcheck(
            module._flash_attn_4_forward, (*qkv, cu_seqlens_of(rows), 5, left, 0.3)
        )
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: run(*x, rows, 2, backend="flash_attn_4"), fullgraph=True, backend="aot_eager"
    )
    inputs = draw(rows)
    for a, b in zip(
        output_and_gradients(compiled, *inputs),
        output_and_gradients(lambda *x: run(*x, rows, 2), *inputs),
    ):
        torch.testing.assert_close(a, b)


# --- which one, on a machine that is not here


def candidates(monkeypatch, capability, **errors):
    """choose_backend() on a GPU of this capability where these do not work; (backend, lines)."""
    monkeypatch.delenv("ATTENTION_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(module, "_probe", lambda backend, *rest: errors.get(backend))
    said = []
    found = choose_backend("cuda", torch.bfloat16, 128, say=said.append)
    return found, said


MISSING = "ModuleNotFoundError: No module named"


def test_a_faster_backend_that_does_not_work_is_named_with_its_reason(monkeypatch):
    """But for one of two packages that serve as well, of which nobody needs both."""
    assert candidates(monkeypatch, (9, 0)) == ("flash_attn_3", [])
    assert candidates(monkeypatch, (8, 0)) == ("varlen", [])
    assert candidates(monkeypatch, (9, 0), flash_attn_3=MISSING) == ("flash_attn_4", [])
    found, said = candidates(
        monkeypatch, (9, 0), flash_attn_3=MISSING, flash_attn_4="differs from the reference by 3"
    )
    assert found == "varlen" and len(said) == 1
    assert "flash_attn_4: differs from the reference by 3" in said[0]
    found, said = candidates(monkeypatch, (10, 0), flash_attn_4=MISSING)
    assert found == "varlen" and "requirements-flash.txt" in said[0]
    _, said = candidates(monkeypatch, (8, 0), varlen="RuntimeError: no kernel image")
    assert "no kernel image" in said[0] and "requirements-flash" not in said[0]


SHAPES = [module.Shape(16384, 83, 896, 128), module.Shape(262144, 1025, 262144, 300)]


@pytest.mark.parametrize("wrong", ["wide window", "many places", "long row", None])
def test_the_probe_sees_what_is_wrong_only_where_training_is(monkeypatch, wrong):
    """A backend that is right on small inputs, and not on windows over several tiles, as many
    documents as validation has, or rows as long."""

    def attend(q, k, v, cu_seqlens, max_seqlen, left, scale):
        off = (wrong == "wide window" and left >= 128) or (
            wrong == "many places" and len(cu_seqlens) > 257
        )
        off |= wrong == "long row" and max_seqlen > 1000
        rows = [x[None] for x in (q, k, v)]
        window = left if left >= 0 else max_seqlen
        y = module.blockwise_attention(*rows, cu_seqlens, window, scale)[0]
        return y * 1.5 if off else y

    monkeypatch.setitem(OF_TOKENS, "flash_attn", attend)
    assert choose_backend("cpu", torch.float32, 16, forced="flash_attn") == "flash_attn"
    if wrong is None:
        choose_backend("cpu", torch.float32, 16, forced="flash_attn", shapes=SHAPES)
        return
    with pytest.raises(ValueError, match="differs from the reference by .* at window"):
        choose_backend("cpu", torch.float32, 16, forced="flash_attn", shapes=SHAPES)
