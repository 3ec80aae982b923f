"""Causal attention over rows of packed documents, with a sliding window.

    y_i = sum_j softmax_j(scale q_i . k_j) v_j   over j in i's document with 0 <= i - j <= window

A query sees itself and at most `window` tokens before it, never another document. One function over
whatever the machine offers; every backend means the same by `window`, and tests/kernels pins that.

Backends
    flash_attn_3  the flash-attn 3 package. Hopper.
    flash_attn_4  the flash-attn-4 package, whose kernels are compiled when they are first used.
                  Hopper, Blackwell. By its own functions: PyTorch up to 2.13 can switch its varlen
                  attention over to it, but expects fewer results than they return by now.
    varlen        torch.nn.attention.varlen: FlashAttention 2 as built into PyTorch. CUDA.
    flash_attn    the flash-attn 2 package. CUDA.
    flex          torch's flex_attention, Triton kernels that skip the 128 x 128 blocks nobody sees.
                  CUDA; on a CPU PyTorch has only its forward.
    sdpa          torch's scaled_dot_product_attention on the blocks of blockwise, told by a mask.
                  Any device.
    blockwise     plain PyTorch, any device: queries in blocks of about `window` look at their own
                  and the previous block, so the score matrix is T x 2 window, not T x T. The
                  reference for all others.

FLOPs: 4 D for each query, head and token that it sees, 2.5 times as many in the backward. Memory
beyond inputs and outputs, in elements, S = min(2 window, T): blockwise B H T S scores, twice as
fp32 and as weights; sdpa B T S for the mask (on CUDA also as a bias in the inputs' dtype); flex
B (T / 128)^2; the others none. All can be traced into one graph by torch.compile: documents may
change from call to call, shapes and windows not.

Source: FlashAttention (arXiv:2205.14135); sliding windows as in Longformer (arXiv:2004.05150).
"""

import functools
import inspect
import os
import typing
import warnings

import torch
import torch.nn.functional as F


def attention(q, k, v, *, cu_seqlens, max_seqlen, window, scale, backend="blockwise", attend=None):
    """q: (B, T, H, D), B rows of T packed tokens -> (B, T, H, D); k, v: the same, or with fewer
    heads that divide H, each for as many of q, one after the other; all of one dtype.

    cu_seqlens: (n + 1,) int32, where documents start in the B * T flattened tokens; every row's
        start is among them; padded at the end with B * T.
    max_seqlen: the longest document, or a bound of it.
    window: tokens before the query that it may see.
    backend: one of BACKENDS; choose_backend finds the fastest. Raises ValueError for another.
    attend: what computes sdpa's blocks instead, with the same arguments.
    """
    if backend not in BACKENDS:
        raise ValueError(
            f"unknown attention backend {backend!r}: expected one of {', '.join(BACKENDS)}"
        )
    longest = min(max_seqlen, q.size(1))
    window = min(window, longest - 1)
    if q.size(2) != k.size(2):
        k, v = (x.repeat_interleave(q.size(2) // k.size(2), dim=2) for x in (k, v))
    if backend in OF_ROWS:
        form = OF_ROWS[backend]
        if backend == "sdpa" and attend:
            form = functools.partial(blockwise_attention, attend=attend)
        return form(q, k, v, cu_seqlens, window, scale)
    # (B T, H, D), a view also of a slice of a projection
    q_, k_, v_ = (x.flatten(0, 1) for x in (q, k, v))
    # -1 is no limit, for which FlashAttention has plain causal kernels, which are faster
    left = -1 if window == longest - 1 else window
    y = OF_TOKENS[backend](q_, k_, v_, cu_seqlens, longest, left, scale)
    return y.unflatten(0, q.shape[:2])


# --- FlashAttention: (B T, H, D); window left, as in all its versions: that many tokens before the


def _flash_attn_3(q, k, v, cu_seqlens, max_seqlen, left, scale):
    from flash_attn_interface import flash_attn_varlen_func

    y = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        causal=True,
        window_size=(left, 0),
    )
    return y[0] if isinstance(y, tuple) else y  # its first versions also returned the log-sum-exp


def _flash_attn_4(q, k, v, cu_seqlens, max_seqlen, left, scale):
    return _flash_attn_4_forward(q, k, v, cu_seqlens, max_seqlen, left, scale)[0]


@torch.library.custom_op("stopwatch::flash_attn_4", mutates_args=())
def _flash_attn_4_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    left: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> y like q, logsumexp (H, B T) fp32. Its own autograd function cannot be traced, so this
    is an op."""
    from flash_attn.cute.interface import _flash_attn_fwd

    y, logsumexp, *_ = _flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        softmax_scale=scale,
        causal=True,
        window_size_left=None if left < 0 else left,
        return_lse=True,
    )
    return y.contiguous(), logsumexp.contiguous()


@_flash_attn_4_forward.register_fake
def _(q, k, v, cu_seqlens, max_seqlen, left, scale):
    logsumexp = q.new_empty(q.shape[1::-1], dtype=torch.float32)
    return q.new_empty(q.shape), logsumexp


@torch.library.custom_op("stopwatch::flash_attn_4_backward", mutates_args=())
def _flash_attn_4_backward(
    dy: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    y: torch.Tensor,
    logsumexp: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    left: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd

    dq, dk, dv, *_ = _flash_attn_bwd(
        q,
        k,
        v,
        y,
        dy.contiguous(),
        logsumexp,
        softmax_scale=scale,
        causal=True,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        window_size_left=None if left < 0 else left,
    )
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_flash_attn_4_backward.register_fake
def _(dy, q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _flash_attn_4_save(ctx, inputs, output):
    *qkv, cu_seqlens, ctx.max_seqlen, ctx.left, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*qkv, *output, cu_seqlens)


def _flash_attn_4_gradients(ctx, dy, _):
    dq, dk, dv = _flash_attn_4_backward(dy, *ctx.saved_tensors, ctx.max_seqlen, ctx.left, ctx.scale)
    return dq, dk, dv, None, None, None, None


_flash_attn_4_forward.register_autograd(_flash_attn_4_gradients, setup_context=_flash_attn_4_save)


def _varlen(q, k, v, cu_seqlens, max_seqlen, left, scale):
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=(left, 0)
    )


def _flash_attn(q, k, v, cu_seqlens, max_seqlen, left, scale):
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        softmax_scale=scale,
        causal=True,
        window_size=(left, 0),
    )


# --- the others: (B, T, H, D)


def first_seen(cu_seqlens, B, T, window):
    """(B, T) int32: the first position of its row that each token sees. It sees all from there to
    itself."""
    i = torch.arange(B * T, device=cu_seqlens.device, dtype=torch.int32)
    start = cu_seqlens[torch.bucketize(i, cu_seqlens, right=True) - 1].int()
    return (torch.maximum(start, i - window) - i // T * T).clamp(min=0).view(B, T)


FLEX_BLOCK = 128


def flex(q, k, v, cu_seqlens, window, scale):
    """torch's flex_attention.

    Its block mask is made here, from T / 128 numbers a row and no T x T mask, so that it can be
    part of any graph. The layers of a compiled model that have the same window share one: to the
    compiler it is a common subexpression.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    B, T, H, D = q.shape
    first = first_seen(cu_seqlens, B, T, window)

    # Blocks of keys that a block of queries sees: from `lowest` to its own. All its queries see all
    # keys of those from `whole` on, but for its own. Neither ever falls from one block to the next,
    # as `first` does not.
    block = torch.arange(-(-T // FLEX_BLOCK), device=q.device, dtype=torch.int32)  # (n,)
    n = len(block)
    lowest = first[:, block * FLEX_BLOCK] // FLEX_BLOCK  # (B, n)
    last = first[:, (block * FLEX_BLOCK + FLEX_BLOCK - 1).clamp(max=T - 1)]
    whole = torch.minimum((last + FLEX_BLOCK - 1) // FLEX_BLOCK, block)
    partly = (whole - lowest)[..., None]  # how many before its own, which is the last in the list
    block_mask = BlockMask.from_kv_blocks(
        (whole - lowest + 1)[:, None],
        torch.where(block == partly, block[:, None], (lowest[..., None] + block) % n)[:, None],
        (block - whole)[:, None],
        ((whole[..., None] + block) % n)[:, None],
        BLOCK_SIZE=FLEX_BLOCK,
        seq_lengths=(T, T),
        mask_mod=lambda b, h, i, j: (j >= first[b, i]) & (j <= i),
    )

    run = _compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    y = run(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=block_mask, scale=scale)
    return y.transpose(1, 2)


@functools.cache
def _compiled_flex():
    """For callers that are not compiled themselves: without a compiler it would make all T x T
    scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def blockwise_attention(q, k, v, cu_seqlens, window, scale, attend=None):
    """The reference, in plain PyTorch. attend: what computes a block, _softmax_attend if not
    given."""
    attend = attend or _softmax_attend
    B, T, H, D = q.shape
    first = first_seen(cu_seqlens, B, T, window)
    if 2 * window >= T:  # two blocks would be the whole row
        return attend(q, k, v, first, scale)

    # n blocks of b queries
    b = max(16, window)
    n = -(-T // b)
    pad = n * b - T
    if pad:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, pad)) for x in (q, k, v))
        # Padding sees padding. Not by F.pad, whose tail PyTorch 2.13's Inductor leaves unwritten
        # here
        first = torch.cat([first, first.new_full((len(first), pad), T)], dim=1)

    def with_previous(x):
        """(B, n * b, H, D) -> (B * n, 2 b, H, D): each block behind the one before it."""
        x = x.unflatten(1, (n, b))
        previous = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        return torch.cat([previous, x], dim=2).flatten(0, 1)

    before = b * torch.arange(-1, n - 1, device=q.device, dtype=torch.int32)  # where keys begin
    first = (first.view(B, n, b) - before[:, None]).clamp(min=0)
    y = attend(
        q.reshape(B * n, b, H, D), with_previous(k), with_previous(v), first.flatten(0, 1), scale
    )
    return y.reshape(B, n * b, H, D)[:, :T]


def _softmax_attend(q, k, v, first, scale):
    """q: (N, S, H, D), k, v: (N, L, H, D), first: (N, S) int32 -> (N, S, H, D). Softmax in fp32.

    Queries are at the last S places of L. Each sees keys from its `first` to its own place.
    """
    mask = _seen(first, k.size(1))
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).float() * scale  # (N, H, S, L)
    weights = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    return (weights.to(v.dtype) @ v.transpose(1, 2)).transpose(1, 2)


def sdpa_attend(q, k, v, first, scale):
    """The same by torch's fused kernels."""
    mask = _seen(first, k.size(1))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], scale=scale)
    return y.transpose(1, 2)


def _seen(first, L):
    """(N, S) -> (N, S, L) bool: which of L keys each query sees."""
    j = torch.arange(L, device=first.device, dtype=torch.int32)
    return (j >= first[..., None]) & (j <= j[L - first.size(1) :, None])


# Those that take (B T, H, D), and those that take (B, T, H, D)
OF_TOKENS = dict(
    flash_attn_3=_flash_attn_3, flash_attn_4=_flash_attn_4, varlen=_varlen, flash_attn=_flash_attn
)
OF_ROWS = dict(
    flex=flex,
    sdpa=functools.partial(blockwise_attention, attend=sdpa_attend),
    blockwise=blockwise_attention,
)
BACKENDS = (*OF_TOKENS, *OF_ROWS)  # in the order of preference


# --- which one


class Shape(typing.NamedTuple):
    """What attention is asked for, by training or by validation."""

    row: int  # tokens
    places: int  # in cu_seqlens, with those that are padding
    max_seqlen: int
    window: int


SMALL = Shape(row=256, places=3, max_seqlen=156, window=40)


def choose_backend(device, dtype, head_dim, forced=None, shapes=(), say=lambda message: None):
    """Name of the fastest backend that works here, found by running them forward and backward and
    comparing; on a CPU it is sdpa, whose fused kernels took a quarter to two thirds of blockwise's
    time, forward and backward (uncompiled, rows of 256 to 2,048 tokens).

    forced, or the environment variable ATTENTION_BACKEND: use this one; ValueError if it does not
    work. shapes: Shapes that it is for, tried besides a small one. say(message) is told why those
    made for this chip are not taken.
    """
    device = torch.device(device)
    forced = forced or os.environ.get("ATTENTION_BACKEND")
    if forced and forced not in BACKENDS:
        raise ValueError(
            f"unknown attention backend {forced!r}: expected one of {', '.join(BACKENDS)}"
        )
    if not forced and device.type != "cuda":
        return "sdpa" if device.type == "cpu" else "blockwise"
    if forced:
        candidates = [forced]
    else:
        candidates = _candidates(torch.cuda.get_device_capability(device)[0])
    errors = {}  # of those that do not work
    for backend in candidates:
        errors[backend] = _probe(backend, device, dtype, head_dim, shapes)
        if errors[backend] is None:
            del errors[backend]
            if message := _instead(backend, errors):
                say(message)
            return backend
    raise ValueError(f"attention backend {backend!r} does not work here: {errors[backend]}")


MISSING = "ModuleNotFoundError"


def _instead(backend, errors):
    """A line on why the faster backends are not taken; None where it is only that one of two
    packages which serve as well is not installed."""
    if backend in MADE_FOR and all(error.startswith(MISSING) for error in errors.values()):
        return None
    if not errors:
        return None
    why = "; ".join(f"{name}: {error}" for name, error in errors.items())
    line = f"attention by {backend}, since what is faster does not work here ({why})"
    if any(errors.get(name, "").startswith(MISSING) for name in MADE_FOR):
        line += "; pip install -r requirements-flash.txt into .venv gives FlashAttention 4"
    return line


# Compute capabilities that a package was made for, where it is not all
MADE_FOR = dict(flash_attn_3=(9,), flash_attn_4=(9, 10))


def _candidates(major):
    """Backends for GPUs of this compute capability, the fastest first."""
    return [backend for backend in BACKENDS if major in MADE_FOR.get(backend, (major,))]


def _probe(backend, device, dtype, head_dim, shapes=()):
    """None if the backend gives the reference's output and gradients on a small case and on the
    shapes, else what went wrong.

    A dtype, head width or chip that it was not made for shows here as well.
    """
    if backend == "varlen":
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as e:
            return str(e)
        if "window_size" not in inspect.signature(varlen_attn).parameters:
            return "this PyTorch's varlen_attn has no window_size"
    if backend == "flash_attn_4":
        # its compiler's, for arguments that are not given
        warnings.filterwarnings("ignore", "Argument .* cannot be converted to a JitArgument")

    # A window inside of the documents, one that is no limit, and what is asked for
    try:
        for shape in (SMALL, SMALL._replace(window=155), *shapes):
            error = _compare(
                backend, shape, 2 if shape.row == SMALL.row else 1, device, dtype, head_dim
            )
            if error is not None:
                return error
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the reference has taken more than training may have left
    return None


def _compare(backend, shape, heads, device, dtype, head_dim):
    """How far the backend is from the reference at a Shape, in words; None where it is not.

    Of a row as many tokens are tried as it takes for the window to end inside of a document: a
    short one, a long one, what is left, and the places behind are empty.
    """
    T = max(SMALL.row, min(shape.row, 4 * shape.window))
    g = torch.Generator(device="cpu").manual_seed(0)
    size = (1, T, heads, head_dim)
    q, k, v, dy = (torch.randn(size, generator=g).to(device, dtype) for _ in range(4))
    short = min(T // 5 | 1, shape.max_seqlen)  # odd: not where tiles end
    long = min(3 * T // 5, shape.max_seqlen)
    starts = [0, short, *range(short + long, T, shape.max_seqlen)]
    ends = [T] * max(1, shape.places + 1 - len(starts))
    cu_seqlens = torch.tensor(starts + ends, dtype=torch.int32, device=device)
    results = []
    for b in (backend, "blockwise"):
        results.append([])
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        try:
            y = attention(
                *leaves,
                cu_seqlens=cu_seqlens,
                max_seqlen=shape.max_seqlen,
                window=shape.window,
                scale=head_dim**-0.5,
                backend=b,
            )
            results[-1] += [y.detach(), *torch.autograd.grad(y, leaves, dy)]
        except Exception as e:
            return f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"
    # torch's max, which keeps a NaN, not Python's, which may lose it
    differences = [(a.float() - r.float()).abs().max() for a, r in zip(*results)]
    worst = torch.stack(differences).max().item()
    if worst < 0.1:
        return None
    said = f"differs from the reference by {worst:.2g}"
    return said if shape.row == SMALL.row else f"{said} at window {shape.window}, row {shape.row}"
