"""Parts that templates share: documents in a row, gates, softcap, rotary embedding, the loss by
chunks, what is kept for backward.

Shapes: B rows, T tokens in a row, C width, H heads, D head width.
"""

import math
import zlib

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data.loader import IGNORE
from kernels.stream import previous as previous

GATE_INPUTS = 12  # gates look at this many dimensions of a token
# Logits that exist at one time in validation: 0.8 GB in bf16, where a row of 65,536 tokens with
# GPT-2's vocabulary would have 6.6 GB
VAL_LOGITS = 8192 * 50304
MOST_COUNTED = 0.9  # of the targets, beyond which it is not worth leaving the others out
COUNTED_TOGETHER = 256  # their number is rounded up to: oneDNN compiles a product for each number
RECOMPUTED_TOKENS = 4096  # whose logits exist at one time where memory is short


def draw(name, like, seed, std):
    """fp32 normal numbers of the shape of `like`: on its GPU if it is on one, else on the CPU.

    They depend on the name and the seed alone, whatever other parameters a model has: the same on
    any number of ranks. GPUs have others than CPUs, and different kinds of GPUs may differ.
    """
    device = like.device if like.is_cuda else torch.device("cpu")
    g = torch.Generator(device)
    g.manual_seed((seed << 20) % 2**62 + zlib.crc32(name.encode()) % 2**20)
    return torch.randn(like.shape, generator=g, device=device).mul_(std)


class UnbindWithRoom(torch.autograd.Function):
    """bank.unbind(0), whose gradient has memory for so many rows more behind it, which are zero:
    ranks that do not divide the bank sum it from where it is. One cat either way, so it costs no
    pass."""

    @staticmethod
    def forward(bank, rows):
        return bank.unbind(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.rows = inputs

    @staticmethod
    def backward(ctx, *grads):
        room = grads[0].new_zeros(ctx.rows, *grads[0].shape)
        return torch.cat([*(grad[None] for grad in grads), room])[: len(grads)], None


def document_starts(inputs, cu_seqlens):
    """(B, T) bool: where a document begins, as every row does."""
    starts = torch.zeros(inputs.numel() + 1, dtype=torch.bool, device=inputs.device)
    return starts.index_fill(0, cu_seqlens.long(), True)[:-1].view(inputs.shape)


def later_targets(targets, starts, n):
    """(B, T) -> (B, T, n): the n next tokens; beyond a document's end they are IGNORE."""
    ends = F.pad(starts[:, 1:], (0, 1), value=True)
    later = [targets]
    for _ in range(n - 1):
        later.append(torch.where(ends, IGNORE, later[-1].roll(-1, dims=1)))
    return torch.stack(later, dim=2)


def gate(x, w):
    """x: (..., C), w: (H, GATE_INPUTS) -> (..., H) between 0 and 2, seeing the first dimensions
    of x only."""
    return 2 * torch.sigmoid(F.linear(x[..., :GATE_INPUTS], w.to(x.dtype)))


def without_own_value(y, v, strength):
    """y less the share tanh(strength) of what points along v; y, v: (B, T, H, D), strength: (H,)
    or (B, T, H)."""
    along = (y * v).sum(-1) / v.square().sum(-1).clamp(min=1e-8)  # (B, T, H), in lengths of v
    return y - (strength.tanh().to(y.dtype) * along)[..., None] * v


def softcap(logits, cap):
    """a * sigmoid((z + b) / c) for cap = (a, b, c); the logits themselves for an empty cap."""
    if not cap:
        return logits
    a, b, c = cap
    return a * torch.sigmoid((logits + b) / c)


def rope_frequencies(base, n, long_windows):
    """(n,) radians per token, from 1 down to 1 / base.

    long_windows: of the stages so far. At each change of the window, frequencies that turn less
    than once in the old one are slowed down in proportion, those that turn 32 times stay, those in
    between in part (YaRN: Peng et al., arXiv:2309.00071).
    """
    freqs = base ** -torch.linspace(0, 1, n)
    for old, new in zip(long_windows, long_windows[1:]):
        kept = ((old * freqs / (2 * math.pi) - 1) / (32 - 1)).clamp(0, 1)
        freqs = freqs * (kept + (1 - kept) * old / new)
    return freqs


def yarn_scale(long_windows):
    """How much larger attention's scale is after these long windows than at the first."""
    return math.prod(
        1 + 0.2 * math.log(new / old) for old, new in zip(long_windows, long_windows[1:])
    )


def dropout(x, p, inputs, place):
    """x (B, T, C) with each element zero with probability p, else 1 / (1 - p) times as large.

    A hash of the tokens (B, T) and of the place in the model says which, no generator, whose state
    a checkpoint would have to keep: the same batch loses the same again.
    """
    n = torch.arange(inputs.numel(), device=x.device)
    seed = (inputs.flatten() * (2 * n + 1)).sum() + place
    number = torch.arange(x.numel(), device=x.device) + seed * 0x9E3779B1
    for _ in range(2):
        number = ((number ^ (number >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    number = number ^ (number >> 16)
    kept = (number >= int(p * 2**32)).view(x.shape)
    return torch.where(kept, x / (1 - p), 0)


def keep_less(recompute, function, *args):
    """function(*args); with recompute, backward computes it again instead of keeping what is
    inside."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False)
    return function(*args)


def counted(targets):
    """(n,) int64: numbers of the targets, (N,) or (N, k), that are not IGNORE, and of some that
    are, so that n is one of few; None where nearly all are to be computed anyway, as in
    pre-training.

    Where only what an assistant says counts, that is a third of the tokens; the others need no
    logits. On a GPU the host would have to wait for their number, and a compiled graph has one.
    """
    if targets.is_cuda or torch.compiler.is_compiling():
        return None
    counts = (targets != IGNORE).view(len(targets), -1).any(1)
    kept = counts.nonzero()[:, 0]
    if not 0 < len(kept) < MOST_COUNTED * len(targets):
        return None
    if len(kept) > COUNTED_TOGETHER:
        others = (~counts).nonzero()[: -len(kept) % COUNTED_TOGETHER, 0]
        kept = torch.cat([kept, others])
    return kept


def only(kept, *rows):
    """Those of the rows, (N, ...) each; all of them for None."""
    return rows if kept is None else [x.index_select(0, kept) for x in rows]


def spread(kept, values, n):
    """(n,) zeros with the values at `kept`; the values themselves for None."""
    return values if kept is None else values.new_zeros(n).index_copy(0, kept, values)


def loss_by_chunks(recompute, loss, w, *rows):
    """Sum of loss(x, w, ...) over chunks of the rows, of which only one's logits exist at a time.

    w: (V, C), the head; rows: (N, ...) each, what the loss has of each token, its targets second.
    """
    rows = only(counted(rows[1]), *rows)
    chunk = len(rows[0])
    if not torch.is_grad_enabled():
        chunk = VAL_LOGITS // len(w)
    elif recompute:
        chunk = RECOMPUTED_TOKENS
    total = 0
    for x, *rest in zip(*(r.split(chunk) for r in rows)):
        total = total + keep_less(recompute, loss, x, w, *rest)
    return total


def log_probs_by_chunks(log_probs, w, *rows):
    """(N,) what log_probs(x, w, ...) says of each row, 0 where its target is IGNORE; only a
    chunk's logits exist at a time; w, rows: as above."""
    kept = counted(rows[1])
    chunks = zip(*(r.split(VAL_LOGITS // len(w)) for r in only(kept, *rows)))
    found = torch.cat([log_probs(x, w, *rest) for x, *rest in chunks])
    return spread(kept, found, len(rows[1]))


def memory_of_logits(form, tokens, columns, size, recompute):
    """Bytes of logits while they exist; form: of linear_cross_entropy, size: bytes of a weight."""
    if form == "fp8":
        per_logit = 3  # bf16, and a gradient of one byte
    elif form == "triton":
        per_logit = size  # the gradient overwrites the logit
    else:
        per_logit = 2 * size + 4  # logit, gradient and, in passing, fp32
    at_once = min(tokens, RECOMPUTED_TOKENS) if recompute else tokens
    return at_once * columns * per_logit


def memory_of_scores(forms, tokens, n_head, seen, size):
    """Bytes that attention by PyTorch's plain means, or in C, keeps; forms: of all ops, as
    Ops.named() has them; seen: keys of each query, by layer; size: bytes of a query's element."""
    backend = forms["attention"]
    if backend == "sdpa" and size == 2 and "c" in forms.values():
        return 2 * tokens * n_head * sum(seen)
    if backend == "blockwise":
        return 4 * tokens * n_head * sum(seen)
    if backend == "sdpa":  # the mask, as it is made and as a bias
        return (1 + size) * tokens * sum(seen)
    return 0
