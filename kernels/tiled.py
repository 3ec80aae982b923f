"""What a CPU multiplies in bf16 where it has Intel's tiles (AMX), in C.

    losses          linear_log_prob's, of rows of the head, without gradients
    attention       as attention.py has it, with gradients

PyTorch's products go through memory between them, those of batches of matrices at a third of what
tiles can do. Here logits of 32 tokens become a sum of exponentials in registers. In attention 32
queries meet the keys from the first one's first to their own, 32 at a time, where blocks of two
windows have twice the keys that their queries see. Logits and scores are fp32. What that gains is
in docs/experiments.md, with what was tried besides.

Bytes: of losses, h once and w once for each 16th of the rows; of attention q, k, v and y, keys and
values twice where a window has 256 tokens, and with gradients 2 for each of H T (window + 64)
weights, written once and read twice, and for each gradient of a score, written and read once.

native.py compiles tiled.c once, where the processor has tiles. What is not for it is left to the
other forms: torch.compile, other dtypes, widths that are no multiple of 32.
"""

import torch

from . import native
from .attention import first_seen
from .native import FLOAT, INT, LONG, POINTER, strides_of

BLOCK = 32  # rows, and columns, that are multiplied at one time


class Tiled(native.Library):
    """The compiled library. Tensors are bf16, on a CPU, their last dimension a multiple of 32."""

    name = "tiled"
    signatures = dict(
        losses=[*[LONG] * 3, *[POINTER] * 4, INT],
        attend=[*[LONG] * 4, *[POINTER] * 5, FLOAT, LONG, POINTER, POINTER, INT],
        attend_backward=[*[LONG] * 4, *[POINTER] * 5, FLOAT, LONG, *[POINTER] * 6, INT],
    )

    @classmethod
    def build(cls, folder, say=lambda message: None):
        """As of any Library; None as well where there are no tiles, or the compiler knows none."""
        library = native.build(cls.name, folder, say) if native.is_for_here(cls.name) else None
        return cls(library) if library and library.has_tiles() else None

    def takes(self, *tensors):
        """Whether these, on a CPU, are for it."""
        return all(x.dtype == torch.bfloat16 and x.size(-1) % BLOCK == 0 for x in tensors)

    def losses(self, h, w, targets):
        """(N,) fp32 of rows h (N, C) for targets (N,), -1 for none; w: (V, C). No gradients."""
        found = torch.empty(len(h))
        given = [x.contiguous() for x in (h, w, targets)]
        self.call("losses", len(h), *w.shape, *given, found)
        return found

    def attention(self, q, k, v, *, cu_seqlens, max_seqlen, window, scale, backend):
        """As attention.py has it, for any backend."""
        if q.size(2) != k.size(2):
            k, v = (x.repeat_interleave(q.size(2) // k.size(2), dim=2) for x in (k, v))
        window = min(window, max_seqlen - 1, q.size(1) - 1)
        first = first_seen(cu_seqlens, *q.shape[:2], window)
        wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        columns = min(in_blocks(window) + BLOCK, in_blocks(q.size(1)))
        return Attend.apply(self, q, k, v, first, scale, columns, wanted)


class Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tiles, q, k, v, first, scale, columns, wanted):
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        B, T, H, _ = q.shape
        y = q.new_empty(q.shape)
        weights = q.new_empty(B, H, T, columns) if wanted else None
        given = q, k, v, strides_of(q, k, v), first, scale, columns
        tiles.call("attend", *q.shape, *given, weights, y)
        if wanted:
            ctx.save_for_backward(q, k, v, first, weights)
            ctx.rest = tiles, scale, columns
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        q, k, v, first, weights = ctx.saved_tensors
        tiles, scale, columns = ctx.rest
        dscores = torch.empty_like(weights)
        found = [q.new_empty(q.shape) for _ in range(3)]
        given = q, k, v, strides_of(q, k, v), first, scale, columns
        given += weights, dy.contiguous(), dscores, *found
        tiles.call("attend_backward", *q.shape, *given)
        return None, *found, None, None, None, None


def in_blocks(n):
    """n, up to a multiple of BLOCK."""
    return -(-n // BLOCK) * BLOCK
