"""What joins the residual stream.

    weighted    a x + b z, of two numbers
    smeared     x_t + share_t x_(t-1), but for tokens that begin a document

Bytes, at e an element of n: weighted 3 e n forward and 5 e n backward, smeared 2 e n and 3 e n,
where it is one pass: in torch.compile, and on a CPU in C (fused.py).
"""

import torch


def previous(x, starts, first):
    """(B, T, ...) -> the value one token earlier; `first` at documents' starts, which each row
    begins with."""
    return torch.where(starts, first, x.roll(1, dims=1))


def weighted(x, z, a, b):
    """x, z: (..., C), a, b: 0-d, or (..., 1) -> (..., C)."""
    return a * x + b * z


def smeared(x, share, starts):
    """x: (B, T, C), share: (B, T, 1), starts: (B, T) bool, where documents begin, as every row
    does -> (B, T, C)."""
    return x + share * previous(x, starts[..., None], 0)
