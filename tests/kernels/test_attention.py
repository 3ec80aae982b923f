"""kernels/attention.py against dense attention, a document at a time, in float64 and in the same dtype."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.attention.varlen
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import attention, choose_backend

ROOT = Path(__file__).resolve().parents[2]
HUGE = 10**9
# lengths of the documents of each row
PACKINGS = {
    "one short row": [[1, 15, 16, 1, 32, 12]],  # borders on 16, 32 and 64: where blocks of 16 and 32 end
    "three rows": [[50], [16, 16, 1, 17], [1] * 9 + [41]],
    "rows of one block": [[16, 16], [32], [31, 1]],
    "single tokens": [[1], [1], [1]],
    "many blocks": [[64, 1, 7, 16, 33, 80]],
}


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch):
    monkeypatch.delenv("ATTENTION_BACKEND", raising=False)


def cu_seqlens_of(rows, padding=2):
    """int32 starts of the documents in the flattened rows, padded at the end with the number of tokens."""
    lengths = [0] + [n for row in rows for n in row]
    return torch.tensor(lengths).cumsum(0).to(torch.int32).repeat_interleave(
        torch.tensor([1] * (len(lengths) - 1) + [1 + padding]))


def naive(q, k, v, rows, window, scale):
    """Every document alone, with a dense (T, T) mask. Computes in the dtype it is given. (B, T, H, D)."""
    flat, parts, at = [x.flatten(0, 1) for x in (q, k, v)], [], 0
    for n in (n for row in rows for n in row):
        q_, k_, v_ = (x[at:at + n].transpose(0, 1) for x in flat)  # (H, n, D)
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
    return attention(q, k, v, cu_seqlens=cu_seqlens_of(rows), max_seqlen=max_seqlen or longest, window=window,
                     scale=scale, **kwargs)


def visible(rows, window):
    """(B T, B T) bool: which token sees which, told from the documents' lengths by two loops."""
    n = sum(map(sum, rows))
    seen, at = torch.zeros(n, n, dtype=torch.bool), 0
    for length in (n for row in rows for n in row):
        for i in range(at, at + length):
            seen[i, max(at, i - window):i + 1] = True
        at += length
    return seen


def weights_of(rows, window, seed=0, **kwargs):
    """(B T, B T) the attention weights themselves: values are the unit vectors of all tokens of all rows."""
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
    exact = output_and_gradients(lambda *x: naive(*x, rows, window, 0.3), *(x.double() for x in inputs))
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
    torch.testing.assert_close(run(q, k, v, rows, 7, scale=0.5), run(q * 2, k, v, rows, 7, scale=0.25))
    assert not torch.allclose(run(q, k, v, rows, 7, scale=0.5), run(q, k, v, rows, 7, scale=0.25))


def test_heads_do_not_mix():
    rows = PACKINGS["three rows"]
    q, k, v = draw(rows, H=3, n=3)
    together = run(q, k, v, rows, 7)
    for h in range(3):
        alone = run(*(x[:, :, h:h + 1] for x in (q, k, v)), rows, 7)
        torch.testing.assert_close(together[:, :, h:h + 1], alone)


# --- who sees whom


@pytest.mark.parametrize("window", [0, 1, 7, 15, 16, 17, 31, 32, 33, 62, 63, 64, HUGE])
def test_window_is_exact(window):
    """A token `window` back is seen, one more back is not: all of the T x T pattern, across block sizes."""
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
    cuts = draw(st.lists(st.sets(st.integers(1, max(1, T - 1)), max_size=8), min_size=1, max_size=3))
    borders = [[0, *sorted(c for c in row if c < T), T] for row in cuts]
    return [[b - a for a, b in zip(row, row[1:])] for row in borders]


@settings(deadline=None, max_examples=80, database=None)
@given(packings(), st.one_of(st.integers(0, 75), st.just(HUGE)), st.integers(0, 9))
def test_any_packing_any_window(rows, window, seed):
    """Documents, rows and the future are invisible, all else in the window is seen, and weights sum to 1."""
    for max_seqlen in (None, sum(rows[0])):  # the longest document, or any bound of it
        weights = weights_of(rows, window, seed, max_seqlen=max_seqlen)
        assert torch.equal(weights > 0, visible(rows, window))
        torch.testing.assert_close(weights.sum(-1), torch.ones(len(weights)))


@pytest.mark.parametrize("window", [5, 60])
def test_enormous_tokens_of_other_documents_and_rows_do_not_leak(window):
    """Bit-exactly. (Not inf: times a weight of zero, in a shared block, that is NaN in any backend.)"""
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
        torch.testing.assert_close(together[r:r + 1], run(q[r:r + 1], k[r:r + 1], v[r:r + 1], [row], window))


def test_inputs_stay_as_they_were_and_may_be_strided():
    rows = PACKINGS["many blocks"]
    big = draw(rows, H=6, D=8, n=1)[0]
    q, k, v = big.chunk(3, dim=2)  # as from one projection
    copy = big.clone()
    for window in (7, HUGE):
        torch.testing.assert_close(run(q, k, v, rows, window),
                                   run(*(x.contiguous() for x in (q, k, v)), rows, window))
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


@pytest.mark.parametrize("T, window", [(4096, 0), (4096, 16), (2000, 100), (2048, 512)])
def test_no_tensor_of_T_times_T_where_the_window_is_small(T, window):
    """Forward and backward: nothing larger than B H T times two blocks, T rounded up to whole blocks."""
    rows = [[T - 10, 10]]
    q, k, v, dy = draw(rows, H=1, D=4)
    block = max(16, window)
    with Largest() as largest:
        output_and_gradients(lambda *x: run(*x, rows, window), q, k, v, dy)
    assert 0 < largest.numel <= -(-T // block) * block * 2 * block < T * T


@pytest.mark.parametrize("window", [3, 40])
def test_compiles_into_one_graph_for_all_documents(window):
    """fullgraph; the same numbers; other documents and max_seqlen the same: nothing is compiled anew."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def fn(q, k, v, cu_seqlens):
        return attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=60, window=window, scale=0.3)
    compiled = torch.compile(fn, fullgraph=True, dynamic=False, backend=backend)
    for rows in ([[10, 40], [49, 1]], [[1, 49], [25, 25]]):
        cu, inputs = cu_seqlens_of(rows), draw(rows)
        for a, b in zip(output_and_gradients(lambda *x: compiled(*x, cu), *inputs),
                        output_and_gradients(lambda *x: fn(*x, cu), *inputs)):
            torch.testing.assert_close(a, b)
    assert len(graphs) == 1


# --- choosing a backend


def fake_flash_attn(monkeypatch, extra_window=0, future=0, documents=True, scale=1.0, poison=None):
    """Install a flash_attn package that is right, or wrong in one way. Its interface: window (left, right),
    -1 is no limit, causal allows nothing to the right."""
    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                               softmax_scale=None, causal=False, window_size=(-1, -1)):
        assert q.dim() == 3 and cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
        starts = cu_seqlens_q.tolist() if documents else [0, len(q)]
        assert max_seqlen_q == max_seqlen_k >= max(b - a for a, b in zip(starts, starts[1:])) or not documents
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


def fake_varlen(monkeypatch):
    """Torch's own varlen attention, as its signature documents it, computed by the fake above."""
    fake_flash_attn(monkeypatch)
    flash = sys.modules["flash_attn"].flash_attn_varlen_func

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        return flash(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, softmax_scale=scale,
                     window_size=window_size)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)


def test_cpu_gets_blockwise():
    assert choose_backend("cpu", torch.float32, 64) == "blockwise"
    assert choose_backend(torch.device("cpu"), torch.bfloat16, 128) == "blockwise"


@pytest.mark.parametrize("name", ["varlen", "flash_attn"])
@pytest.mark.parametrize("window", [0, 1, 7, 16, 63, HUGE])
def test_flash_backends_are_given_the_same_window(monkeypatch, name, window):
    """The arguments passed to FlashAttention, played by its documented meaning, give what blockwise gives."""
    fake_varlen(monkeypatch)
    rows = [[1, 15, 16, 1, 31], [64]]
    inputs = draw(rows)
    for a, b in zip(output_and_gradients(lambda *x: run(*x, rows, window, backend=name), *inputs),
                    output_and_gradients(lambda *x: run(*x, rows, window), *inputs)):
        torch.testing.assert_close(a, b)


def test_unknown_backend_lists_the_known_ones(monkeypatch):
    rows = [[8]]
    monkeypatch.setenv("ATTENTION_BACKEND", "flash_atn")
    for call in (lambda: choose_backend("cpu", torch.float32, 8, forced="flash_atn"),
                 lambda: choose_backend("cpu", torch.float32, 8),
                 lambda: run(*draw(rows, n=3), rows, 3, backend="flash_atn")):
        with pytest.raises(ValueError, match="'flash_atn'.*varlen, flash_attn, blockwise") as error:
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


@pytest.mark.parametrize("fault", [dict(extra_window=1), dict(extra_window=-1), dict(future=1),
                                   dict(documents=False), dict(scale=1.5)], ids=str)
def test_probe_refuses_a_backend_that_means_something_else(monkeypatch, fault):
    """A window one too long or too short, the next token, other documents, another scale."""
    fake_flash_attn(monkeypatch, **fault)
    with pytest.raises(ValueError, match="'flash_attn' does not work here: differs from the reference"):
        choose_backend("cpu", torch.float32, 16, forced="flash_attn")


@pytest.mark.parametrize("poison", ["q", "k", "v"])
def test_probe_refuses_a_backend_with_NaN_gradients(monkeypatch, poison):
    """Right outputs and one gradient of NaN, as broken builds give."""
    fake_flash_attn(monkeypatch, poison=poison)
    with pytest.raises(ValueError, match="'flash_attn' does not work here"):
        choose_backend("cpu", torch.float32, 16, forced="flash_attn")


def test_import_touches_no_device():
    """Every way to ask CUDA for something is mined before the import, so that this holds on any build."""
    code = """
import torch
def mine(*args, **kwargs):
    raise AssertionError("kernels asked for CUDA on import")
for name in ("is_available", "device_count", "get_device_capability", "get_device_properties", "init",
             "_lazy_init", "current_device", "mem_get_info"):
    setattr(torch.cuda, name, mine)
import kernels
import sys
assert not torch.cuda.is_initialized()
assert "flash_attn" not in sys.modules and "triton" not in sys.modules
"""
    env = os.environ | dict(CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
