"""What a training step multiplies in float32 on a CPU whose vectors have 8 numbers (AVX2), in C.

    losses          linear_log_prob's, of rows of the head
    attention       as attention.py has it
    attention_of    that of a projection, with norm, rotation, key offset, value embedding and gate
    polar_express   as polar_express.py has it

Products by a library go through memory between them, and small ones run below its rate. Here blocks
of logits and scores stay in a cache from one product to the next; and a symmetric product is half
of one. fused.py builds it and models/gpt.py calls it, where there is no AVX-512 and outside of
torch.compile. Numbers are in docs/experiments.md.

Polar factors of matrices (m, n) with n >= 2 m: each step multiplies by a polynomial P in A = X X^T,
so that A of the next step is A P P, a product of symmetric matrices with the same eigenvectors; X
itself is multiplied once, by the product of all P. FLOPs: 3 m^2 n + 17 m^3 with symmetric products
at half the price, where five steps of two products with X would be 5 (3 m^2 n + m^3).

Bytes: as in the ops' own files for one kernel each; of logits as many again where there is a
gradient.
"""

import torch

from . import native
from .attention import first_seen
from .native import FLOAT, INT, LONG, POINTER, strides_of
from .polar_express import COEFFICIENTS
from .symmetric_matmul import EPS, SAFETY, as_batch

EPS_OF_NORM = 1e-6
BLOCK = 6  # rows of what is multiplied at a time, as in C

ATTENTION = *[LONG] * 4, *[POINTER] * 6, FLOAT, *[POINTER] * 5, FLOAT

SIGNATURES = dict(
    head=[*[LONG] * 3, *[POINTER] * 7, INT],
    head_backward=[*[LONG] * 3, *[POINTER] * 6, INT],
    attend=[*ATTENTION, POINTER, POINTER, INT],
    attend_backward=[*ATTENTION, *[POINTER] * 9, INT],
    polar=[*[LONG] * 3, POINTER, LONG, POINTER, FLOAT, FLOAT, POINTER, INT],
)


class Products(native.Library):
    """The compiled library. Tensors are fp32, on a CPU."""

    name = "products"
    signatures = SIGNATURES

    def losses(self, h, w, targets, bias, wanted):
        """(N,) of rows h (N, C) for targets (N,), -1 for none; w: (V, C), bias: (V,) or None;
        wanted: whether there are gradients."""
        return Head.apply(self, h, w, targets, bias, wanted)

    def attention(self, q, k, v, *, cu_seqlens, max_seqlen, window, scale, backend):
        """As attention.py has it; for any backend."""
        if q.size(2) != k.size(2):
            k, v = (x.repeat_interleave(q.size(2) // k.size(2), dim=2) for x in (k, v))
        first = first_seen(cu_seqlens, *q.shape[:2], min(window, max_seqlen - 1))
        return Attention.apply(self, q, k, v, None, None, None, None, first, scale)

    def attention_of(
        self,
        qkv,
        cos,
        sin,
        *,
        starts=None,
        value=None,
        share=None,
        gate=None,
        cu_seqlens,
        max_seqlen,
        window,
        scale,
    ):
        """Attention of a projection qkv (B, T, 3 H, D) and what is around it -> (B, T, H, D).

        q and k are normed and rotated by cos and sin (T, 1, D / 2), as qk_norm_rope.py has it.
        starts: (B, T) bool, where documents start: elsewhere half of what a key has in each half
        of its columns, the last of them, is of the key before. value: (B, T, H D) joins v, by
        share (B, T, H) where that is given; gate: (B, T, H), times the output. The rest as in
        attention.py.
        """
        first = first_seen(cu_seqlens, *qkv.shape[:2], min(window, max_seqlen - 1))
        tables = cos, sin, starts
        return Attention.apply(self, qkv, None, None, tables, value, share, gate, first, scale)

    def polar_express(self, G, steps=5):
        """G: (..., m, n)."""
        X = as_batch(G).contiguous()
        Y = torch.empty_like(X)
        table = torch.tensor(COEFFICIENTS[:steps], dtype=torch.float32)
        self.call("polar", *X.shape, X, len(table), table, SAFETY, EPS, Y)
        return Y.view(G.shape)


class Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, products, h, w, targets, bias, wanted):
        h = h.contiguous()
        w = w.contiguous()
        targets = targets.contiguous()
        losses = torch.empty(len(h))
        blocks = -(-len(w) // BLOCK)
        dlogits = h.new_empty(len(h) * blocks * BLOCK) if wanted else None
        dh = torch.empty_like(h) if wanted else None
        sizes = len(h), *w.shape
        products.call("head", *sizes, h, w, bias, targets, losses, dlogits, dh)
        if wanted:
            ctx.save_for_backward(h, dlogits, dh)
            ctx.rest = products, len(w)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        h, dlogits, dh = ctx.saved_tensors
        products, V = ctx.rest
        scaled = torch.empty_like(dh)
        dw = h.new_empty(V, h.size(1))
        given = h, dlogits, g.contiguous(), dh, scaled, dw
        products.call("head_backward", len(h), *dw.shape, *given)
        return None, scaled, dw, None, None, None


class Attention(torch.autograd.Function):
    """Of q, k, v, or of all three in one, (B, T, 3 H, D)."""

    @staticmethod
    def forward(ctx, products, q, k, v, tables, value, share, gate, first, scale):
        in_one = k is None
        if in_one:
            q, k, v = q.contiguous().chunk(3, dim=2)
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        value, share, gate = (x if x is None else x.contiguous() for x in (value, share, gate))
        B, T, H, D = q.shape
        y = q.new_empty(q.shape)
        softmax = q.new_empty(B, H, T, 2)
        cos, sin, starts = tables or [None] * 3
        given = (B, T, H, D, q, k, v, strides_of(q, k, v), cos, sin, EPS_OF_NORM)
        given += (starts, value, share, gate, first, scale)
        products.call("attend", *given, y, softmax)
        ctx.save_for_backward(q, k, v, cos, sin, starts, value, share, gate, first, softmax)
        ctx.rest = products, scale, in_one
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        q, k, v, cos, sin, starts, value, share, gate, first, softmax = ctx.saved_tensors
        products, scale, in_one = ctx.rest
        B, T, H, D = q.shape
        dqkv = q.new_empty(B, T, 3 * H, D) if in_one else None
        found = dqkv.chunk(3, dim=2) if in_one else [q.new_empty(q.shape) for _ in range(3)]
        more = [None if x is None else torch.empty_like(x) for x in (value, share, gate)]
        given = (B, T, H, D, q, k, v, strides_of(q, k, v), cos, sin, EPS_OF_NORM)
        given += (starts, value, share, gate, first, scale)
        gradients = *found, strides_of(*found), *more
        products.call("attend_backward", *given, softmax, dy.contiguous(), *gradients)
        of_qkv = (dqkv, None, None) if in_one else found
        return None, *of_qkv, None, *more, None, None
