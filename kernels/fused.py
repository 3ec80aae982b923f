"""What a training step does between its products on a CPU, in C: each op in one pass.

    rms_norm, add_rms_norm, qk_norm_rope, rotate_halves, swiglu, relu2_mlp, linear_cross_entropy,
    linear_log_prob, embedding, weighted, smeared, gated, offset
                                    as in their own files, with gradients
    adam_update, adamw_update, row_scale, nesterov, descend
                                    as in optim/, which asks for its functions by their names

Outside of torch.compile PyTorch passes over its operands again for every operation, and for norms
of bf16 numbers also to widen and to narrow them: of a step of laptop only a fifth was products
(docs/experiments.md). Rows here are read once, and all that is between is in
registers or in the first cache; statistics and sums are in fp32, rounded once.

native.py compiles fused.c once. Where there is no compiler, and for what is not for it (other
dtypes and devices, softcaps, torch.compile), the PyTorch forms stay.

Bytes: as in the ops' own files for one kernel each.
"""

import functools

import torch
import torch.nn.functional as F

from . import native
from .attention import attention, sdpa_attend
from .contexts import Contexts
from .cross_entropy import check
from .decoding import rotate_halves_reference
from .gates import gated, offset
from .linear_log_prob import linear_log_prob
from .native import FLOAT, INT, LONG, POINTER
from .op import OPS
from .polar_express import polar_express
from .products import Products
from .sampled_softmax import stands_for
from .stream import smeared, weighted
from .tiled import Tiled

PARTS = 16  # of the rows, as in C
DTYPES = torch.float32, torch.bfloat16
LOGITS = 1 << 22  # that exist at one time without gradients: as many fit the caches

SIGNATURES = dict(
    rms_norm=[INT, LONG, LONG, POINTER, POINTER, POINTER, FLOAT, POINTER, POINTER, INT],
    rms_norm_backward=[INT, LONG, LONG, *[POINTER] * 4, FLOAT, POINTER, POINTER, INT],
    qk_norm_rope=[INT, *[LONG] * 5, *[POINTER] * 3, FLOAT, POINTER, POINTER, INT],
    qk_norm_rope_backward=[INT, *[LONG] * 5, *[POINTER] * 3, FLOAT, *[POINTER] * 5, INT],
    rotate_halves=[INT, *[LONG] * 4, *[POINTER] * 4, FLOAT, POINTER, INT],
    cross_entropy=[INT, LONG, LONG, POINTER, POINTER, POINTER, INT, POINTER, INT],
    weighted=[INT, LONG, LONG, POINTER, POINTER, FLOAT, FLOAT, POINTER, INT],
    weighted_backward=[INT, LONG, LONG, POINTER, POINTER, FLOAT, FLOAT, *[POINTER] * 4, INT],
    smear=[INT, LONG, LONG, *[POINTER] * 4, INT],
    smear_backward=[INT, LONG, LONG, *[POINTER] * 6, INT],
    gated=[INT, *[LONG] * 3, *[POINTER] * 3, LONG, POINTER, INT],
    gated_backward=[INT, LONG, LONG, *[POINTER] * 5, INT],
    offset=[INT, *[LONG] * 3, *[POINTER] * 3, INT],
    offset_backward=[INT, *[LONG] * 3, *[POINTER] * 3, INT],
    attention_weights=[INT, *[LONG] * 4, POINTER, POINTER, FLOAT, INT],
    attention_gradient=[INT, LONG, LONG, POINTER, POINTER, FLOAT, INT],
    embedding_gradient=[INT, LONG, LONG, LONG, POINTER, POINTER, POINTER, INT],
    relu2=[INT, LONG, POINTER, INT],
    relu2_backward=[INT, LONG, POINTER, POINTER, INT],
    swiglu=[INT, LONG, LONG, POINTER, POINTER, INT],
    swiglu_backward=[INT, LONG, LONG, POINTER, POINTER, POINTER, INT],
    adam=[INT, LONG, *[POINTER] * 5, *[FLOAT] * 7, INT, INT],
    descend=[INT, INT, LONG, LONG, LONG, *[POINTER] * 3, FLOAT, FLOAT, POINTER, INT, POINTER, INT],
    row_scale=[INT, LONG, LONG, POINTER, POINTER, *[FLOAT] * 4, POINTER, INT],
    nesterov=[INT, LONG, POINTER, POINTER, FLOAT, POINTER, INT],
)


class Fused(native.Library):
    """The compiled library. Methods take what the PyTorch forms take. contexts: a Contexts, or
    None; products: a Products, or None, for fp32 where it is faster than PyTorch's; tiled: a
    Tiled, or None, for bf16."""

    name = "fused"
    signatures = SIGNATURES

    def __init__(self, library, contexts=None, products=None, tiled=None):
        super().__init__(library)
        self.contexts = contexts
        self.products = products
        self.tiled = tiled

    @classmethod
    def build(cls, folder, say=lambda message: None):
        """As of any Library, with the other three."""
        found = super().build(folder, say)
        if found:
            found.contexts = Contexts.build(folder, say)
            found.products = Products.build(folder, say)
            found.tiled = Tiled.build(folder, say)
        return found

    def call(self, name, x, *args):
        """A function of the library on numbers of x's dtype."""
        super().call(name, x.dtype == torch.bfloat16, *args)

    # ----------------------------------------------------------------------------------------------
    # Of the forward pass, with gradients

    def rms_norm(self, x, weight=None, eps=1e-6):
        if not takes(x):
            return OPS["rms_norm"].reference(x, weight, eps)
        return Norm.apply(self, x, None, weight, eps)[0]

    def add_rms_norm(self, x, residual, weight=None, eps=1e-6):
        if not takes(x, residual):
            return OPS["add_rms_norm"].reference(x, residual, weight, eps)
        return Norm.apply(self, x, residual, weight, eps)

    def qk_norm_rope(self, qkv, cos, sin, n_head=None, eps=1e-6):
        T = qkv.size(1)
        tables = takes(qkv, cos, sin) and cos.is_contiguous() and sin.is_contiguous()
        if not tables or min(len(cos), len(sin)) < T or qkv.size(3) % 2:
            return OPS["qk_norm_rope"].reference(qkv, cos, sin, n_head, eps)
        heads = qkv.size(2) // 3 if n_head is None else n_head
        return QKNormRope.apply(self, qkv, cos, sin, heads, eps)

    def rotate_halves(self, x, cos, sin):
        """As decoding.py has it; of rows that all begin at position 0."""
        tables = cos.shape == sin.shape == (x.size(1), 1, x.size(-1) // 2)
        in_one = cos.is_contiguous() and sin.is_contiguous()
        if not (x.dim() == 4 and tables and in_one and takes(x, cos, sin)):
            return rotate_halves_reference(x, cos, sin)
        return RotateHalves.apply(self, x, cos, sin)

    def swiglu(self, x):
        if not takes(x):
            return OPS["swiglu"].reference(x)
        return SwiGLU.apply(self, x)

    def relu2_mlp(self, x, w_up, w_down):
        if not takes(x, w_up, w_down):
            return OPS["relu2_mlp"].reference(x, w_up, w_down)
        return ReLU2MLP.apply(self, x, w_up, w_down)

    def linear_cross_entropy(
        self, h, w, targets, *, cap, target_weights=None, sampled=None, ignore_index=-100, **rest
    ):
        one = targets.dim() == 1 or targets.size(1) == 1
        if not (takes(h, w) and cap is None and one):
            return OPS["linear_cross_entropy"].on_cpu(
                h,
                w,
                targets,
                cap=cap,
                target_weights=target_weights,
                sampled=sampled,
                ignore_index=ignore_index,
                **rest,
            )
        check(h, targets, target_weights, 1.0)
        loss = self.losses(h, w, targets.flatten(), sampled, ignore_index).sum()
        return loss if target_weights is None else target_weights[0] * loss

    def linear_log_prob(self, h, w, targets, *, cap=None, sampled=None, ignore_index=-100):
        if not (takes(h, w) and cap is None):
            return linear_log_prob(
                h, w, targets, cap=cap, sampled=sampled, ignore_index=ignore_index
            )
        check(h, targets, None, 1.0)
        return -self.losses(h, w, targets, sampled, ignore_index)

    def losses(self, h, w, targets, sampled, ignore_index):
        """(N,) fp32, 0 where a target is ignore_index. Raises IndexError as PyTorch's losses do,
        ValueError for shapes that do not fit."""
        if w.dim() != 2 or h.size(1) != w.size(1) or targets.dim() != 1:
            of = [tuple(x.shape) for x in (h, w, targets)]
            raise ValueError("losses: {}, {} and {} do not fit".format(*of))
        columns = targets.where(targets != ignore_index, -1)
        low, high = columns.aminmax()
        if low < -1 or high >= len(w):
            raise IndexError(f"targets from {low} to {high}: expected 0 to {len(w) - 1}")
        wanted = torch.is_grad_enabled() and (h.requires_grad or w.requires_grad)
        bias = None if sampled is None else stands_for(sampled, len(w)).float()
        if self.multiplies(h):
            return self.products.losses(h, w, columns, bias, wanted)
        if self.tiled and not wanted and bias is None and self.tiled.takes(h, w):
            return self.tiled.losses(h, w, columns)
        return LinearCrossEntropy.apply(self, h, w, columns, bias, wanted)

    def multiplies(self, *tensors):
        return self.products is not None and tensors[0].dtype == torch.float32 and takes(*tensors)

    def attention(self, q, k, v, **about):
        """As attention.py has it; raises ValueError for shapes that do not fit."""
        alike = k.shape == v.shape and all(q.size(i) == k.size(i) for i in (0, 1, 3))
        if not alike or q.size(2) % k.size(2):
            of = [tuple(x.shape) for x in (q, k, v)]
            raise ValueError("attention: {}, {} and {} do not fit".format(*of))
        if about["backend"] == "sdpa" and self.tiled and self.tiled.takes(q) and takes(q, k, v):
            return self.tiled.attention(q, k, v, **about)
        attend = functools.partial(attention, attend=self.attend)
        wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
        if about["backend"] == "sdpa" and wanted and self.multiplies(q, k, v):
            attend = self.products.attention
        return attend(q, k, v, **about)

    def products_for(self, dtype):
        """The Products, if it is for this dtype, or None."""
        return self.products if dtype == torch.float32 else None

    def polar_express(self, G, steps=5):
        """As polar_express.py has it."""
        if not self.multiplies(G):
            return polar_express(G, steps)
        return self.products.polar_express(G, steps)

    def attend(self, q, k, v, first, scale):
        """In bf16, in about half of PyTorch's time, whose backward is slow and which needs a mask;
        in fp32 its kernels are faster by a fifth."""
        if not (q.dtype == torch.bfloat16 and takes(q, k, v)):
            return sdpa_attend(q, k, v, first, scale)
        return Attend.apply(self, q, k, v, first, scale)

    def weighted(self, x, z, a, b):
        """As stream.py has it."""
        if not (takes(x, z) and a.dim() == b.dim() == 0):
            return weighted(x, z, a, b)
        return Weighted.apply(self, x, z, a, b)

    def smeared(self, x, share, starts):
        """As stream.py has it."""
        if not takes(x, share):
            return smeared(x, share, starts)
        return Smear.apply(self, x, share, starts)

    def gated(self, x, share, onto=None):
        """As gates.py has it."""
        tensors = [t for t in (x, share, onto) if t is not None]
        if not takes(*tensors):
            return gated(x, share, onto)
        return Gated.apply(self, x, share, onto)

    def offset(self, k, starts):
        """As gates.py has it."""
        return Offset.apply(self, k, starts) if takes(k) else offset(k, starts)

    def embedding(self, index, table):
        if not (takes(table) and table.requires_grad and torch.is_grad_enabled()):
            return F.embedding(index, table)
        return Embedding.apply(self, index, table)

    def forms(self):
        """{name of an op: its form here}"""
        names = "rms_norm add_rms_norm qk_norm_rope swiglu relu2_mlp linear_cross_entropy".split()
        return {name: getattr(self, name) for name in names}

    # ----------------------------------------------------------------------------------------------
    # Of the optimizers: in place, without a guard, which a CPU looks at before

    def adam_update(
        self, p, companion, grad, m, v, lr, beta1, beta2, eps, *corrections, shrink=None, ok=None
    ):
        numbers = lr, beta1, beta2, eps, *corrections
        self.adam(p, companion, grad, m, v, *numbers, shrink or 0.0, cautious=True)

    def adamw_update(
        self, p, companion, grad, m, v, lr, beta1, beta2, eps, *corrections_and_kept, ok=None
    ):
        *corrections, kept = corrections_and_kept
        numbers = lr, beta1, beta2, eps, *corrections
        self.adam(p, companion, grad, m, v, *numbers, 1 - kept, cautious=False)

    def adam(self, p, companion, grad, m, v, *numbers, cautious):
        master = p if companion is None else companion
        grad = grad.contiguous()
        self.call("adam", p, p.numel(), p, master, grad, m, v, *numbers, cautious)

    def row_scale(self, grad, v, lr, beta2, eps, correction2, ok=None):
        scale = torch.empty_like(v)
        numbers = lr, beta2, eps, correction2
        self.call("row_scale", grad, *grad.shape, grad.contiguous(), v, *numbers, scale)
        return scale

    def nesterov(self, grad, m, momentum, ok=None):
        ahead = torch.empty_like(grad)
        self.call("nesterov", grad, grad.numel(), grad, m, momentum, ahead)
        return ahead

    def descend(self, p, companion, update, lr, shrink=None, scale=None, ok=None, factor=None):
        master = p if companion is None else companion
        *k, rows, cols = p.shape if p.dim() > 1 else (1, p.numel())
        update = update.contiguous()
        by_row = scale is not None and scale.size(-1) == 1
        self.call(
            "descend",
            p,
            update.dtype == torch.bfloat16,
            *(torch.Size(k).numel(), rows, cols),
            *(p, master, update, lr, shrink or 0.0),
            *(scale, by_row, factor),
        )


def takes(*tensors):
    """Whether these are numbers of one dtype on a CPU, and nobody is compiling."""
    x = tensors[0]
    return (
        x.dtype in DTYPES
        and all(t.dtype == x.dtype and t.device.type == "cpu" for t in tensors)
        and x.numel() > 0
        and not torch.compiler.is_compiling()
    )


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused, x, residual, weight, eps):
        x = x.contiguous()
        n = x.size(-1)
        y = torch.empty_like(x)
        s = x
        if residual is not None:
            residual = residual.contiguous()
            s = torch.empty_like(x)
        wide = None if weight is None else weight.to(x.dtype).float()
        fused.call("rms_norm", x, x.numel() // n, n, x, residual, wide, eps, s, y)
        ctx.save_for_backward(s, weight)
        ctx.rest = fused, eps, residual is not None
        if residual is None:
            return y, None
        return y, s

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, ds):
        s, weight = ctx.saved_tensors
        fused, eps, added = ctx.rest
        n = s.size(-1)
        dx = torch.empty_like(s)
        wide = dw = None
        if weight is not None:
            wide = weight.to(s.dtype).float()
            dw = torch.zeros(PARTS, n)
        ds = None if ds is None or not added else ds.contiguous()
        dy = dy.contiguous()
        fused.call("rms_norm_backward", s, s.numel() // n, n, dy, ds, s, wide, eps, dx, dw)
        if dw is not None:
            dw = dw.sum(0).to(weight.dtype)
        return None, dx, dx if added else None, dw, None


class QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused, qkv, cos, sin, heads, eps):
        qkv = qkv.contiguous()
        B, T, n, D = qkv.shape
        others = (n - heads) // 2
        q = qkv.new_empty(B, T, heads, D)
        k = qkv.new_empty(B, T, others, D)
        sizes = B * T, T, heads, others, D
        fused.call("qk_norm_rope", qkv, *sizes, qkv, cos, sin, eps, q, k)
        ctx.save_for_backward(qkv, cos, sin)
        ctx.rest = fused, sizes, eps
        return q, k, qkv[:, :, heads + others :]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        qkv, cos, sin = ctx.saved_tensors
        fused, sizes, eps = ctx.rest
        grads = [g if g.stride(3) == 1 else g.contiguous() for g in grads]
        strides = torch.tensor([s for g in grads for s in g.stride()[:3]])
        dqkv = torch.empty_like(qkv)
        given = qkv, cos, sin, eps, *grads, strides, dqkv
        fused.call("qk_norm_rope_backward", qkv, *sizes, *given)
        return None, dqkv, *[None] * 4


class RotateHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        ctx.fused = fused
        return turned(fused, x, cos, sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return None, turned(ctx.fused, dy, *ctx.saved_tensors, -1.0), None, None


def turned(fused, x, cos, sin, sign):
    """x: (B, T, H, D), turned by its positions' angles or, with a sign of -1, against them."""
    if x.stride(3) != 1:
        x = x.contiguous()
    B, T, H, D = x.shape
    y = x.new_empty(x.shape)
    strides = torch.tensor(x.stride()[:3])
    fused.call("rotate_halves", x, B * T, T, H, D, x, strides, cos, sin, sign, y)
    return y


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused, x):
        x = x.contiguous()
        n = x.size(-1) // 2
        y = x.new_empty(*x.shape[:-1], n)
        fused.call("swiglu", x, y.numel() // n, n, x, y)
        ctx.save_for_backward(x)
        ctx.fused = fused
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        n = x.size(-1) // 2
        dx = torch.empty_like(x)
        ctx.fused.call("swiglu_backward", x, dy.numel() // n, n, dy.contiguous(), x, dx)
        return None, dx


class ReLU2MLP(torch.autograd.Function):
    """As relu2_mlp, keeping only what is behind the activation."""

    @staticmethod
    def forward(ctx, fused, x, w_up, w_down):
        post = F.linear(x, w_up)
        fused.call("relu2", post, post.numel(), post)
        ctx.save_for_backward(x, w_up, w_down, post)
        ctx.fused = fused
        return post @ w_down

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, w_up, w_down, post = ctx.saved_tensors
        d = F.linear(dy, w_down)
        ctx.fused.call("relu2_backward", d, d.numel(), d, post)
        rows = [t.flatten(0, -2) for t in (x, dy, post, d)]
        dw_up = rows[3].t() @ rows[0]
        dw_down = rows[2].t() @ rows[1]
        return None, d @ w_up, dw_up, dw_down


class LinearCrossEntropy(torch.autograd.Function):
    """-> a loss for each row, whose gradient is g if wanted; that of the logits takes their place
    in the forward pass."""

    @staticmethod
    def forward(ctx, fused, h, w, targets, bias, wanted):
        losses = torch.empty(len(h))
        rows = len(h) if wanted else max(1, LOGITS // len(w))
        buffer = h.new_empty(min(rows, len(h)), len(w))
        for some, of, to in zip(h.split(rows), targets.split(rows), losses.split(rows)):
            logits = torch.mm(some, w.t(), out=buffer[: len(some)])
            given = len(some), len(w), logits, bias, of, wanted, to
            fused.call("cross_entropy", h, *given)
        if wanted:
            ctx.save_for_backward(h, w, logits)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        h, w, dlogits = ctx.saved_tensors
        g = g[:, None].to(h.dtype)  # (N, 1)
        return None, g * (dlogits @ w), dlogits.t() @ (g * h), None, None, None


class Attend(torch.autograd.Function):
    """As attention.py's sdpa_attend. Scores are rounded to the inputs' dtype, as in blockwise's."""

    @staticmethod
    def forward(ctx, fused, q, k, v, first, scale):
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # (N, H, S or L, D)
        weights = q @ k.transpose(2, 3)
        fused.call("attention_weights", q, *weights.shape, weights, first.contiguous(), scale)
        ctx.save_for_backward(q, k, v, weights)
        ctx.rest = fused, scale
        return (weights @ v).transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        q, k, v, weights = ctx.saved_tensors
        fused, scale = ctx.rest
        dy = dy.transpose(1, 2).contiguous()
        dv = weights.transpose(2, 3) @ dy
        d = dy @ v.transpose(2, 3)
        L = d.size(3)
        fused.call("attention_gradient", q, d.numel() // L, L, weights, d, scale)
        dq = d @ k
        dk = d.transpose(2, 3) @ q
        return None, *(x.transpose(1, 2) for x in (dq, dk, dv)), None, None


class Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused, x, z, a, b):
        x = x.contiguous()
        z = z.contiguous()
        sizes = x.numel() // x.size(-1), x.size(-1)
        y = torch.empty_like(x)
        fused.call("weighted", x, *sizes, x, z, float(a), float(b), y)
        ctx.save_for_backward(x, z, a, b)
        ctx.rest = fused, sizes
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, z, a, b = ctx.saved_tensors
        fused, sizes = ctx.rest
        dx = torch.empty_like(x)
        dz = torch.empty_like(z)
        sums = torch.empty(PARTS, 2)
        given = x, z, float(a), float(b), dy.contiguous(), dx, dz, sums
        fused.call("weighted_backward", x, *sizes, *given)
        da, db = sums.sum(0).unbind()
        return None, dx, dz, da.to(a.dtype), db.to(b.dtype)


class Smear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused, x, share, starts):
        x, starts = x.contiguous(), starts.contiguous()
        wide = share.float().contiguous()
        y = torch.empty_like(x)
        fused.call("smear", x, starts.numel(), x.size(-1), x, wide, starts, y)
        ctx.save_for_backward(x, wide, starts)
        ctx.fused = fused
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, share, starts = ctx.saved_tensors
        dx = torch.empty_like(x)
        dshare = torch.empty_like(share)
        given = x, share, starts, dy.contiguous(), dx, dshare
        ctx.fused.call("smear_backward", x, starts.numel(), x.size(-1), *given)
        return None, dx, dshare.to(x.dtype), None


class Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused, x, share, onto):
        x, share = x.contiguous(), share.contiguous()
        B, T, H, D = x.shape
        if onto is not None and onto.stride() != (T * onto.stride(1), onto.stride(1), D, 1):
            onto = onto.contiguous()
        y = torch.empty_like(x)
        given = share.numel(), H, D, x, share, onto, 0 if onto is None else onto.stride(1)
        fused.call("gated", x, *given, y)
        ctx.save_for_backward(x, share)
        ctx.rest = fused, onto is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, share = ctx.saved_tensors
        fused, has_onto = ctx.rest
        dx = torch.empty_like(x)
        dshare = torch.empty_like(share)
        given = share.numel(), x.size(-1), x, share, dy.contiguous(), dx, dshare
        fused.call("gated_backward", x, *given)
        return None, dx, dshare, dy if has_onto else None


class Offset(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused, k, starts):
        k, starts = k.contiguous(), starts.contiguous()
        y = torch.empty_like(k)
        fused.call("offset", k, starts.numel(), *k.shape[2:], k, starts, y)
        ctx.save_for_backward(starts)
        ctx.fused = fused
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        (starts,) = ctx.saved_tensors
        dk = torch.empty_like(dy)
        given = starts.numel(), *dy.shape[2:], starts, dy.contiguous(), dk
        ctx.fused.call("offset_backward", dy, *given)
        return None, dk, None


class Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fused, index, table):
        ctx.save_for_backward(index)
        ctx.rest = fused, len(table)
        return F.embedding(index, table)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        fused, rows = ctx.rest
        return None, None, gradient_of_rows(fused, ctx.saved_tensors[0], dy, rows)


def gradient_of_rows(fused, index, dy, rows):
    C = dy.size(-1)
    sums = dy.new_empty(rows, C)
    index = index.contiguous()
    dy = dy.contiguous()
    fused.call("embedding_gradient", dy, index.numel(), C, rows, index, dy, sums)
    return sums
