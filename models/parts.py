"""Parts that templates share: documents in a row, gates, softcap, rotary embedding.

Shapes: B rows, T tokens in a row, C width, H heads, D head width.
"""

import math
import zlib

import torch
import torch.nn.functional as F

from data.loader import IGNORE

GATE_INPUTS = 12  # gates look at this many dimensions of a token


def draw(name, shape, seed, std):
    """(shape) fp32 normal numbers on the CPU.

    They depend on the name and the seed alone: the same on every device, whatever other parameters
    a model has.
    """
    g = torch.Generator().manual_seed((seed << 20) % 2**62 + zlib.crc32(name.encode()) % 2**20)
    return torch.randn(shape, generator=g) * std


def document_starts(inputs, cu_seqlens):
    """(B, T) bool: where a document begins, as every row does."""
    starts = torch.zeros(inputs.numel() + 1, dtype=torch.bool, device=inputs.device)
    return starts.index_fill(0, cu_seqlens.long(), True)[:-1].view(inputs.shape)


def previous(x, starts, first):
    """(B, T, ...) -> the value one token earlier; `first` at documents' starts, which each row
    begins with."""
    return torch.where(starts, first, x.roll(1, dims=1))


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
