"""Causal attention over rows of packed documents, with a sliding window.

    y_i = sum_j softmax_j(scale q_i . k_j) v_j   over j in i's document with 0 <= i - j <= window

A query sees itself and at most `window` tokens before it, never another document. One function over whatever the
machine offers; every backend means the same by `window`, and tests/kernels pins that.

Backends
    varlen      torch.nn.attention.varlen (FlashAttention 2 built into PyTorch; 3 or 4 where installed). CUDA.
    flash_attn  the flash-attn 2 package. CUDA.
    blockwise   plain PyTorch, any device: queries in blocks of about `window` look at their own and the previous
                block, so the score matrix is T x 2 window, not T x T. The reference for all others.
"""

import inspect
import os

import torch
import torch.nn.functional as F


def attention(q, k, v, *, cu_seqlens, max_seqlen, window, scale, backend="blockwise"):
    """q, k, v: (B, T, H, D), B rows of T packed tokens -> (B, T, H, D).

    cu_seqlens: (n + 1,) int32, where documents start in the B * T flattened tokens; every row's start is among them;
    padded at the end with B * T. max_seqlen: longest document; window: tokens before the query that it may see.
    """
    window = min(window, max_seqlen - 1, q.size(1) - 1)
    if backend == "blockwise":
        return blockwise_attention(q, k, v, cu_seqlens, window, scale)
    B, T, H, D = q.shape
    flat = [x.reshape(B * T, H, D) for x in (q, k, v)]
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn
        y = varlen_attn(*flat, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=(window, 0))
    elif backend == "flash_attn":
        from flash_attn import flash_attn_varlen_func
        y = flash_attn_varlen_func(*flat, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=scale,
                                   causal=True, window_size=(window, 0))
    else:
        raise ValueError(f"unknown attention backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    return y.view(B, T, H, D)


BACKENDS = ("varlen", "flash_attn", "blockwise")


def blockwise_attention(q, k, v, cu_seqlens, window, scale):
    """The reference. Memory: B * T * H scores times (T if window >= T / 2, else 2 window)."""
    B, T, H, D = q.shape
    doc = torch.bucketize(torch.arange(B * T, device=q.device, dtype=torch.int32), cu_seqlens, right=True).view(B, T)
    if 2 * window >= T:  # two blocks would be the whole row
        i = torch.arange(T, device=q.device)
        near = (i[:, None] >= i) & (i[:, None] - i <= window)  # (T, T)
        mask = near & (doc[:, :, None] == doc[:, None, :])  # (B, T, T)
        return _softmax_attend(q, k, v, mask, scale)

    b = max(16, window)
    n = -(-T // b)
    pad = n * b - T
    if pad:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, pad)) for x in (q, k, v))
        doc = F.pad(doc, (0, pad), value=-1)

    def with_previous(x, fill):  # (B, n * b, ...) -> (B * n, 2 b, ...): each block behind the one before it
        x = x.unflatten(1, (n, b))
        previous = torch.cat([torch.full_like(x[:, :1], fill), x[:, :-1]], dim=1)
        return torch.cat([previous, x], dim=2).flatten(0, 1)

    i = torch.arange(b, 2 * b, device=q.device)[:, None]
    j = torch.arange(2 * b, device=q.device)
    mask = (i >= j) & (i - j <= window) & (doc.reshape(B * n, b, 1) == with_previous(doc, -2)[:, None, :])
    y = _softmax_attend(q.reshape(B * n, b, H, D), with_previous(k, 0), with_previous(v, 0), mask, scale)
    return y.reshape(B, n * b, H, D)[:, :T]


def _softmax_attend(q, k, v, mask, scale):
    """q: (N, S, H, D), k, v: (N, L, H, D), mask: (N, S, L) -> (N, S, H, D). Softmax in fp32."""
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).float() * scale  # (N, H, S, L)
    weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return (weights.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)


def choose_backend(device, dtype, head_dim, forced=None):
    """Name of the fastest backend that works here, found by running each one forward and backward and comparing.

    forced, or the environment variable ATTENTION_BACKEND: use this one, and fail if it does not work.
    FlashAttention 3 or 4, where installed, is switched on inside torch's varlen attention.
    """
    device = torch.device(device)
    forced = forced or os.environ.get("ATTENTION_BACKEND")
    if device.type == "cuda" and forced in (None, "varlen"):
        _activate_flash_attention(device, dtype, head_dim)
    if forced:
        if forced not in BACKENDS:
            raise ValueError(f"unknown attention backend {forced!r}: expected one of {', '.join(BACKENDS)}")
        if error := _probe(forced, device, dtype, head_dim):
            raise ValueError(f"attention backend {forced!r} does not work here: {error}")
        return forced
    if device.type != "cuda":
        return "blockwise"
    return next(b for b in BACKENDS if b == "blockwise" or not _probe(b, device, dtype, head_dim))


def _activate_flash_attention(device, dtype, head_dim):
    """Let varlen attention use FlashAttention 3 (Hopper) or 4 (Hopper, Blackwell) if one is installed and works."""
    try:
        from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl
    except ImportError:
        return
    major = torch.cuda.get_device_capability(device)[0]
    for impl in {9: ("FA3", "FA4"), 10: ("FA4",)}.get(major, ()):
        try:
            activate_flash_attention_impl(impl)
        except Exception:
            continue  # not installed
        if not _probe("varlen", device, dtype, head_dim):
            return
        restore_flash_attention_impl()


def _probe(backend, device, dtype, head_dim):
    """None if the backend gives the reference's output and gradients on a small case, else what went wrong."""
    if backend == "varlen" and device.type == "cuda":
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as e:
            return str(e)
        if "window_size" not in inspect.signature(varlen_attn).parameters:
            return "this PyTorch's varlen_attn has no window_size"
    g = torch.Generator(device="cpu").manual_seed(0)
    q, k, v, dy = (torch.randn(1, 256, 2, head_dim, generator=g).to(device, dtype) for _ in range(4))
    cu_seqlens = torch.tensor([0, 100, 256, 256], dtype=torch.int32, device=device)
    results = []
    for b in (backend, "blockwise"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        try:
            y = attention(*leaves, cu_seqlens=cu_seqlens, max_seqlen=156, window=40, scale=head_dim**-0.5, backend=b)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy)])
        except Exception as e:
            return f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"
    # torch's max, which keeps a NaN, not Python's, which may lose it
    worst = torch.stack([(a.float() - r.float()).abs().max() for a, r in zip(*results)]).max().item()
    return None if worst < 0.1 else f"differs from the reference by {worst:.2g}"
