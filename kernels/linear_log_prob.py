"""The logarithm of the probability that an LM head gives each target.

    z = cap(h w^T) + b,   log_prob_i = z_i,t_i - log(sum_j exp z_ij)
    dz_ij = g_i (1[j = t_i] - softmax(z_i)_j),   dh = dz w,   dw = dz^T h

h: (N, C), w: (V, C); b: what a sampled softmax adds to columns. Unlike linear_cross_entropy it
gives a number for each target, whose gradient g_i comes from outside: for mixing the model's
probabilities with others', and for losses over sequences.

Bytes beyond the three products: N V elements of h's dtype written and read twice. Rows go through
the caches a few at a time, since outside of torch.compile every operation passes over its operands
again. Plain PyTorch on every device; torch.compile gets the reference, which it fuses itself.
"""

import torch
import torch.nn.functional as F

from .cross_entropy import check, final_logits
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
        bias = None if sampled is None else stands_for(sampled, len(w)).to(h.dtype)
        counted = targets != ignore_index
        columns = targets.where(counted, 0)[:, None]  # (N, 1)
        log_prob = torch.empty(len(h), dtype=wide, device=h.device)
        total = torch.empty(len(h), 1, dtype=wide, device=h.device)
        # Products take many rows at a time, and what follows them as many as stay in a cache
        for block in slices(len(h), len(h) if wanted else PRODUCT_ROWS):
            logits = F.linear(h[block], w, bias)
            for rows in slices(len(logits), cached_rows(len(w))):
                most = logits[rows].amax(1, keepdim=True).to(wide)
                e = logits[rows].to(wide).sub_(most)
                target = e.gather(1, columns[block][rows])
                e.exp_()
                sums = e.sum(1, keepdim=True)
                total[block][rows] = sums
                log_prob[block][rows] = (target - sums.log())[:, 0]
                if wanted:
                    logits[rows] = e  # what backward needs, in the same place
        exps = logits if wanted else None  # exp of each logit less the largest of its row
        ctx.save_for_backward(h, w, columns, counted, total, exps)
        return log_prob.where(counted, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        h, w, columns, counted, total, exps = ctx.saved_tensors
        g = grad.where(counted, 0.0)[:, None]  # (N, 1)
        dz = torch.empty_like(exps)
        for rows in slices(len(h), cached_rows(len(w))):
            torch.mul(exps[rows], (-g[rows] / total[rows]).to(dz.dtype), out=dz[rows])
            dz[rows].scatter_add_(1, columns[rows], g[rows].to(dz.dtype))
        return dz @ w, dz.t() @ h, None, None, None
