"""What is done to heads before and after attention.

    gated       share x, or onto + share x, by head
    offset      half of a key is of the token before, but for tokens that begin a document: of each
                half of its columns the last half, those that rotation hardly turns

Bytes, at e an element of n: gated 2 e n forward (3 with onto) and 3 e n backward, offset 2 and 2,
where it is one pass: in torch.compile, and on a CPU in C (fused.py).

Source: key offset, sparse attention gates and gated value embeddings of modded-nanogpt.
"""

import torch

from .stream import previous


def gated(x, share, onto=None):
    """x, onto: (B, T, H, D), share: (B, T, H) -> (B, T, H, D)."""
    y = share[..., None] * x
    return y if onto is None else onto + y


def offset(k, starts):
    """k: (B, T, H, D), D even; starts: (B, T) bool, where documents begin, as every row
    does -> (B, T, H, D)."""
    return torch.where(stands_still(k), previous(k, starts[..., None, None], k), k)


def stands_still(k):
    """(D,) bool: which columns of a head are the token's before."""
    D = k.size(-1)
    return torch.arange(D, device=k.device) % (D // 2) >= D // 4
