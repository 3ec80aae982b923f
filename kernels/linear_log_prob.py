"""The logarithm of the probability that an LM head gives each target.

    z = cap(h w^T) + b,   log_prob_i = z_i,t_i - log(sum_j exp z_ij)
    dz_ij = g_i (1[j = t_i] - e_ij / s_i),   e_ij = exp(z_ij - m_i),   s_i = sum_j e_ij
    dh_i = g_i w_t_i - g_i / s_i (e w)_i,   dw = sum_i g_i 1[t_i] h_i^T - e^T (g / s h)

h: (N, C), w: (V, C); b: what a sampled softmax adds to columns. Unlike linear_cross_entropy it
gives a number for each target, whose gradient g_i comes from outside: for mixing the model's
probabilities with others', and for losses over sequences.

Bytes beyond the three products: N V elements of h's dtype written and read twice. What differs from
row to row in the gradient is C numbers wide and not V, since it is applied to h and dh instead of
dz. Rows go through the caches a few at a time, as outside of torch.compile every operation passes
over its operands again. Plain PyTorch on every device; torch.compile gets the reference, which it
fuses itself.
"""

import torch
import torch.nn.functional as F

from .cross_entropy import check, final_logits
from .embedding import embedding_gradient_reference
from .sampled_softmax import stands_for

CACHED_NUMBERS = 2**18  # in fp32 fill the second cache of a core
PRODUCT_ROWS = 2048


def slices(n, size):
    """Slices of at most this size that make up n rows; one where there are none."""
    return [slice(start, start + size) for start in range(0, max(n, 1), max(size, 1))]


def cached_rows(n_vocab):
    return max(16, CACHED_NUMBERS // n_vocab)


def linear_log_prob_reference(h, w, targets, *, cap=None, sampled=None, ignore_index=-100):
    """linear_log_prob in plain PyTorch."""
    z = final_logits(F.linear(h, w), cap, sampled)
    return -F.cross_entropy(z, targets, ignore_index=ignore_index, reduction="none")


def linear_log_prob(h, w, targets, *, cap=None, sampled=None, ignore_index=-100):
    """(N,) log probabilities in at least fp32, 0 where a target is ignore_index.

    h: (N, C), w: (V, C), same dtype; targets: (N,) int64; cap: (a, b, c), a number or None as in
    softcap_cross_entropy; sampled: as there, for columns that stand for several tokens.

    Raises ValueError for shapes that do not fit.
    """
    if h.dim() != 2 or w.dim() != 2 or h.size(1) != w.size(1):
        raise ValueError(
            f"linear_log_prob: h {tuple(h.shape)}, w {tuple(w.shape)}; expected (N, C), (V, C)"
        )
    check(h, targets, None, 1.0)
    if targets.dim() != 1:
        raise ValueError(f"linear_log_prob: targets {tuple(targets.shape)}; expected (N,)")
    if torch.compiler.is_compiling() or cap is not None:
        return linear_log_prob_reference(
            h, w, targets, cap=cap, sampled=sampled, ignore_index=ignore_index
        )
    return _LinearLogProb.apply(h, w, targets, sampled, ignore_index)


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w, targets, sampled, ignore_index):
        wanted = any(ctx.needs_input_grad[:2])
        wide = torch.promote_types(h.dtype, torch.float32)
        bias = None if sampled is None else stands_for(sampled, len(w)).to(wide)
        counted = targets != ignore_index
        columns = targets.where(counted, 0)[:, None]  # (N, 1)
        log_prob = torch.empty(len(h), dtype=wide, device=h.device)
        total = torch.empty(len(h), 1, dtype=wide, device=h.device)
        buffer = torch.empty(cached_rows(len(w)), len(w), dtype=wide, device=h.device)
        # Products take many rows at a time, and what follows them as many as stay in a cache
        for block in slices(len(h), len(h) if wanted else PRODUCT_ROWS):
            logits = F.linear(h[block], w)
            for rows in slices(len(logits), len(buffer)):
                e = buffer[: len(logits[rows])].copy_(logits[rows])
                if bias is not None:
                    e.add_(bias)
                e.sub_(e.amax(1, keepdim=True))
                target = e.gather(1, columns[block][rows])
                e.exp_()
                sums = e.sum(1, keepdim=True)
                total[block][rows] = sums
                log_prob[block][rows] = (target - sums.log())[:, 0]
                if wanted:
                    logits[rows] = e  # what backward needs, in the same place
        exps = logits if wanted else None
        ctx.save_for_backward(h, w, columns, counted, total, exps)
        return log_prob.where(counted, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        h, w, columns, counted, total, exps = ctx.saved_tensors
        g = grad.where(counted, 0.0)[:, None]  # (N, 1)
        share = -g / total
        dh = share * (exps @ w) + g * w[columns[:, 0]]
        dw = embedding_gradient_reference(columns, g * h, len(w))  # sums in fp32
        dw += exps.t() @ (share * h).to(h.dtype)
        return dh.to(h.dtype), dw.to(w.dtype), None, None, None
