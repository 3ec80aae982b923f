"""What has followed the last tokens before, earlier in the same document.

A document repeats itself: names, phrases, whole lines. For each length n, the n - 1 tokens before a
target are looked up in what the model has read of the document; `seen` says how often they were
there, `hits` how often the target followed them. hits / seen is a distribution over what followed,
one for each n, which a model mixes with its own: no weights, and right from the first step.

Source: caches of n-grams in language models, Kuhn and De Mori 1990; as heads of a transformer,
Akyurek et al., arXiv:2401.12973; mixing by a learned gate, Grave et al., arXiv:1612.04426.

Shapes: B rows, T tokens in a row, N lengths from 1 to N.
"""

import torch
import torch.nn.functional as F

from kernels.contexts import takes

FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd; 2^64 over the golden ratio


def hashed(key, x):
    """A new 64-bit hash of a hash and a number, elementwise."""
    key = key * FACTOR + x  # small keys and numbers must not make up for each other
    return key ^ (key >> 29)


def chosen(condition, x, other):
    """torch.where() of int64 tensors. Of two of them, with a comparison of a third in the same
    kernel, PyTorch 2.13 compiles it wrongly for AVX2: the last 4 of 8 numbers came out as the other
    ones."""
    return other + condition * (x - other)


def runs(keys):
    """(B, T) int64 -> (order, first), (B, T) each: the order that sorts a row, and for each place
    of the sorted row where its run of equal keys begins."""
    order = keys.argsort(dim=1, stable=True)
    ordered = keys.gather(1, order)
    at = torch.arange(keys.size(1), device=keys.device).expand_as(keys)
    new = torch.ones_like(keys, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return order, at.where(new, 0).cummax(dim=1).values


def rank(keys):
    """(B, T) int64 -> (B, T): how many equal keys stand before each one in its row."""
    order, first = runs(keys)
    at = torch.arange(keys.size(1), device=keys.device)
    return torch.empty_like(keys).scatter_(1, order, at - first)


def contexts(inputs, starts, n):
    """n hashes (B, T) int64: of the document and its last 0, 1, ..., n - 1 tokens. Where the
    document does not have so many yet, a number of its own."""
    at = torch.arange(inputs.size(1), device=inputs.device).expand_as(inputs)
    inside = at - at.where(starts, 0).cummax(dim=1).values  # tokens of the document before
    key = starts.long().cumsum(dim=1)
    found = [key]
    for back in range(n - 1):
        key = hashed(key, inputs.roll(back, dims=1))
        found.append(chosen(inside >= back, key, -1 - at))
    return found


def earlier(inputs, targets, starts, n, in_c=None):
    """(seen, hits), each (B, T, n) int64.

    inputs, targets: (B, T) int64; starts: (B, T) bool, where documents begin. What is found for a
    target that is negative means nothing. in_c: a kernels.contexts.Contexts, which does the same.
    """
    if in_c and takes(inputs):
        return in_c.earlier(inputs, targets, starts, n)
    keys = contexts(inputs, starts, n)
    # A target that does not count in the loss has followed all the same
    targets = chosen(targets < 0, inputs.roll(-1, dims=1), targets)
    seen = [rank(key) for key in keys]
    hits = [rank(hashed(key, targets)) for key in keys]
    return torch.stack(seen, dim=-1), torch.stack(hits, dim=-1)


def predictions(seen, hits):
    """Counts (..., n) -> (told (..., 2 n + 1), there (..., n), probabilities (..., n)): what a gate
    is told, which lengths have something to say, and what they say."""
    return told(seen), seen > 0, hits.float() / seen.float().clamp(min=1)


def told(seen):
    """(..., n) -> (..., 2 n + 1) fp32: what a gate is told, how often each context was there,
    whether it was at all, and 1."""
    counts = seen.float()
    return torch.cat([counts.log1p(), (seen > 0).float(), torch.ones_like(counts[..., :1])], dim=-1)


class Followers:
    """What followed the last 0, 1, ..., n - 1 tokens of documents, of all tokens at once: the same
    as predictions() has of one."""

    def __init__(self, texts, n):
        """texts: (B, T) int64, documents so far, padded on the left with -1."""
        T = texts.size(1)
        self.followed = texts[:, 1:].clamp(min=0)
        same = [texts[:, :-1] >= 0]  # whether the context that ends there is the last one
        for back in range(n - 1):  # one token more has to agree, so far back
            agrees = torch.zeros_like(same[0])
            if back < T:
                last = texts[:, T - 1 - back, None]
                agrees[:, back:] = (texts[:, : T - 1 - back] == last) & (last >= 0)
            same.append(same[-1] & agrees)
        self.same = torch.stack(same, dim=1)  # (B, n, T - 1)
        self.seen = self.same.sum(-1)  # (B, n)
        self.told = told(self.seen)
        self.there = self.seen > 0

    def add_to(self, sums, share):
        """Add each length's probabilities, (B, n_vocab), times its share, (B, n)."""
        of_one = share / self.seen.clamp(min=1)
        sums.scatter_add_(1, self.followed, (self.same * of_one[..., None]).sum(1))


def mixture(own, gates, there, others):
    """Log probabilities (...) of a mixture: of a model's own, and of each length's.

    own: (...) log probabilities; gates: (..., n + 1), of the model and of each length, which count
    among those that are there; there, others: (..., n), which those are and their probabilities.
    """
    share = log_shares(gates, there).to(own.dtype)
    others = others.to(own.dtype)
    return (share + torch.cat([own[..., None], others.log()], dim=-1)).logsumexp(-1)


def log_shares(gates, there):
    """Logs of the shares (..., n + 1) in a mixture: the model's own, then each length's."""
    none = F.pad(~there, (1, 0))  # the model itself always has something to say
    return gates.masked_fill(none, -torch.inf).log_softmax(-1)
