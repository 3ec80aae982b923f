"""What decoding does for each token on a CPU, in C: products of a few rows with all weights of a
model, and the small ops between them.

    linear         y = x w^T             w in bf16, also stored transposed, or in int8
    rms_norm, add_rms_norm               as in their own file
    rotate_halves  pairs (j, j + D / 2) of each head turned by the angles of its row
    attend_one     a token's attention to the keys and values of its row, where its own are put

One row's products read each weight once and use it once, so the bytes of the weights over the rate
at which memory is read are the least they can take. PyTorch's products in fp32 and in int4 come
near that rate and stay; those in int8 and bf16 read at about half of it, and its norms and turns
take longer than the arithmetic in them.

int8 is multiplied with activations that are rounded to whole numbers with one step for a row, as
large as sums in int32 leave room for (2^24 over the number of inputs, 15 bits at most; bf16 has 8),
and summed exactly.

native.py compiles decoding.c once. Where there is no compiler, the PyTorch forms stay. These are
for inference only: no gradients, and no torch.compile.

Source: weights as llm.c and llama2.c multiply them, prefetches measured (docs/experiments.md).
"""

import torch
import torch.nn.functional as F

from . import native
from .native import FLOAT, INT, LONG, POINTER

ROWS = 4  # of a transposed matrix that are added at once
DTYPES = torch.float32, torch.bfloat16  # of activations
# Rows up to which one product after the other is faster than PyTorch's product of matrices
FEW_ROWS = 8
MOST_INPUTS = 1 << 14  # beyond, int8's activations would have fewer than 10 bits
MOST = 1 << 18  # activations, up to which the small ops are worth it

SIGNATURES = dict(
    linear=[INT, LONG, LONG, LONG, POINTER, POINTER, POINTER, POINTER, INT],
    linear_transposed=[INT, LONG, LONG, LONG, POINTER, POINTER, POINTER, INT],
    rms_norm=[INT, LONG, LONG, POINTER, POINTER, POINTER, FLOAT, POINTER, POINTER],
    rotate_halves=[INT, LONG, LONG, LONG, LONG, POINTER, POINTER, POINTER, POINTER],
    attend=[INT, LONG, LONG, LONG, LONG, LONG, LONG, FLOAT, POINTER, POINTER, LONG, POINTER, LONG]
    + [POINTER, POINTER, POINTER, POINTER, INT],
)


# --------------------------------------------------------------------------------------------------
# In PyTorch


def linear_reference(x, w, transposed=False):
    """x: (..., C), w: (O, C) or transposed (C, O), a tensor or what stands for one
    (inference/quantize.py) -> (..., O).

    One row in bf16 on a CPU is a product of matrix and vector, which reads the weights 1.3 to 1.7
    times as fast as PyTorch's product of matrices does there.
    """
    if not isinstance(w, torch.Tensor):
        return w.linear(x)
    if transposed:
        return x @ w
    one_row = x.numel() == x.size(-1)
    if one_row and x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return torch.mv(w, x.flatten()).view(*x.shape[:-1], -1)
    return F.linear(x, w)


def rotate_halves_reference(x, cos, sin):
    """x: (..., T, H, D), cos, sin: (..., T, 1, D / 2) of its positions' angles -> x turned by them.

    Dimension j is a pair with j + D / 2 and turns counterclockwise, as in Hugging Face's models.
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def attend_one_reference(q, k, v, keys, values, lengths, window, scale):
    """One new token in each row: q (B, 1, H, D), k, v (B, 1, G, D), whose heads divide H, keys,
    values (B or more, capacity, G, D), lengths (B,) int64 of tokens that are there -> (B, 1, H, D).

    k and v are put into keys and values, at index lengths[b] of row b; then a query sees the last
    window + 1 of those.
    """
    rows = torch.arange(len(q))
    keys[rows, lengths] = k[:, 0]
    values[rows, lengths] = v[:, 0]
    seen = torch.arange(int(lengths.max()) + 1)
    ago = lengths[:, None] - seen
    y = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        keys[: len(q), : len(seen)].transpose(1, 2),
        values[: len(q), : len(seen)].transpose(1, 2),
        attn_mask=((ago >= 0) & (ago <= window))[:, None, None],
        scale=scale,
        enable_gqa=q.size(2) != k.size(2),
    )
    return y.transpose(1, 2)


# --------------------------------------------------------------------------------------------------
# In C


class Decoding:
    """The compiled library. Methods take what the PyTorch forms take, and leave to those what is
    not for them: many rows, other devices and dtypes, gradients."""

    def __init__(self, library):
        self.c = native.declare(library, SIGNATURES)

    def ops(self, ops):
        """The Ops with these forms in place of its own."""

        def rms_norm(x, weight=None, eps=1e-6):
            if not takes(x):
                return ops.rms_norm(x, weight, eps)
            return self.rms_norm(x, None, weight, eps)[0]

        def add_rms_norm(x, residual, weight=None, eps=1e-6):
            if not (takes(x) and takes(residual)):
                return ops.add_rms_norm(x, residual, weight, eps)
            return self.rms_norm(x, residual, weight, eps)

        return ops.replace(
            linear=self.linear,
            rms_norm=rms_norm,
            add_rms_norm=add_rms_norm,
            rotate_halves=self.rotate_halves,
            attend_one=self.attend_one,
            decoding=self,
        )

    def linear(self, x, w, transposed=False):
        """As linear_reference."""
        if not isinstance(w, torch.Tensor):
            return w.linear(x)
        half = torch.bfloat16
        few = x.numel() <= FEW_ROWS * x.size(-1) and takes(x)
        if not (few and x.dtype == w.dtype == half and w.is_contiguous()):
            return linear_reference(x, w, transposed)
        if not transposed:
            return self.product(x, w, None)
        n_in, n_out = w.shape
        if n_in % ROWS:
            return linear_reference(x, w, transposed)
        y = x.new_empty(*x.shape[:-1], n_out)
        sizes = x.numel() // n_in, n_out, n_in
        args = x.data_ptr(), w.data_ptr(), y.data_ptr(), torch.get_num_threads()
        self.c.linear_transposed(True, *sizes, *args)
        return y

    def linear_int8(self, x, codes, scales):
        """x (..., C), codes (n_out, C) int8, scales (n_out,) bf16 -> (..., n_out); None where it is
        not for this."""
        few = x.numel() <= FEW_ROWS * x.size(-1) and x.size(-1) <= MOST_INPUTS
        return self.product(x, codes, scales) if few and takes(x) else None

    def product(self, x, w, scales):
        n_out, n_in = w.shape
        y = x.new_empty(*x.shape[:-1], n_out)
        self.c.linear(
            x.dtype == torch.bfloat16,
            x.numel() // n_in,
            n_out,
            n_in,
            x.data_ptr(),
            w.data_ptr(),
            None if scales is None else scales.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y

    def rms_norm(self, x, residual, weight, eps):
        """(y, s) of add_rms_norm, or of rms_norm where there is no residual."""
        n = x.size(-1)
        y = torch.empty_like(x)
        s = x if residual is None else torch.empty_like(x)
        if weight is not None and weight.dtype != x.dtype:
            weight = weight.to(x.dtype)
        self.c.rms_norm(
            x.dtype == torch.bfloat16,
            x.numel() // n,
            n,
            x.data_ptr(),
            None if residual is None else residual.data_ptr(),
            None if weight is None else weight.data_ptr(),
            eps,
            s.data_ptr(),
            y.data_ptr(),
        )
        return y, s

    def rotate_halves(self, x, cos, sin):
        """As rotate_halves_reference; of one new token in each row."""
        one_each = x.dim() == 4 and x.size(1) == 1 and cos.shape[:2] == x.shape[:2]
        in_rows = x.stride()[2:] == (x.size(-1), 1)
        angles = cos.is_contiguous() and sin.is_contiguous() and cos.dtype == x.dtype
        if not (one_each and in_rows and angles and takes(x, contiguous=False)):
            return rotate_halves_reference(x, cos, sin)
        y = torch.empty(x.shape, dtype=x.dtype)
        self.c.rotate_halves(
            x.dtype == torch.bfloat16,
            *(x.size(0), x.size(2), x.size(3), x.stride(0)),
            *(t.data_ptr() for t in (x, cos, sin, y)),
        )
        return y

    def attend_one(self, q, k, v, keys, values, lengths, window, scale):
        """As attend_one_reference."""
        width = q.size(3)
        fits = takes(q) and q.dtype == k.dtype == v.dtype == keys.dtype
        fits = fits and all(t.stride()[2:] == (width, 1) for t in (k, v))
        if not (fits and keys.is_contiguous() and values.is_contiguous()):
            return attend_one_reference(q, k, v, keys, values, lengths, window, scale)
        y = torch.empty_like(q)
        self.c.attend(
            q.dtype == torch.bfloat16,
            *(q.size(0), q.size(2), k.size(2), width, keys.size(1), window, scale),
            *(q.data_ptr(), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0)),
            *(t.data_ptr() for t in (keys, values, lengths, y)),
            torch.get_num_threads(),
        )
        return y


def takes(x, contiguous=True):
    """Whether these are activations of decoding: few, on a CPU, without gradients."""
    return (
        x.dtype in DTYPES
        and x.device.type == "cpu"
        and 0 < x.numel() <= MOST
        and not torch.is_grad_enabled()
        and (not contiguous or x.is_contiguous())
    )


def build(folder, say=lambda message: None):
    """The Decoding of this machine; None where that is not possible. As native.build()."""
    library = native.build("decoding", folder, say)
    return None if library is None else Decoding(library)
