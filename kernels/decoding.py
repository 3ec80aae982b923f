"""What decoding does for each token on a CPU, in C: products of a few rows with all weights of a
model, and the small ops between them.

    linear         y = x w^T             w in fp32 or bf16, also stored transposed, or in int8
    rms_norm, add_rms_norm               as in their own file
    swiglu         as in its own file
    rotate_halves  pairs (j, j + D / 2) of each head turned by the angles of its row
    attend_one     a token's attention to the keys and values of its row, where its own are put
    Blocks         all blocks of a Llama or a Qwen3 in one call: norm, queries, keys and values in
                   one product, turns, attention, product, sum and norm, SwiGLU, product, sum

One row's products read each weight once and use it once, so the bytes of the weights over the rate
at which memory is read are the least they can take. From pages of 2 MB a core reads half as fast
again as from those of 4 kB, so the weights are put in such (in_large_pages). PyTorch's products in
int8 and bf16 read at half of that rate, and between products Python and its small ops take longer
than the arithmetic in them: 6 ms a token of llama-100m, of 23.

int8 is multiplied with activations that are rounded to whole numbers with one step for a row, of 16
bits (bf16 has 8) and summed exactly: as two numbers of 8 bits each where the processor sums
products of bytes (VNNI), else as one, as large as sums in int32 leave room for (2^24 over the
number of inputs).

Products of 9 to 128 rows, of prompts and of many clients, are in tiles where the processor has such
(Intel's AMX), of bf16 or of codes that become bf16 on the way: PyTorch's first puts the weights in
another order. Alone, not of transposed ones, for which it is quick. Blocks have tiles for up to 512
tokens, also for attention, where scores and shares are bf16 as PyTorch's are.

native.py compiles decoding.c once. Where there is no compiler, the PyTorch forms stay, and for
Blocks models/llama.py's own. These are for inference only: no gradients, and no torch.compile.

Source: weights as llm.c and llama2.c multiply them; what was tried is in docs/experiments.md.
"""

import ctypes

import torch
import torch.nn.functional as F

from . import native
from .native import FLOAT, INT, LONG, POINTER

ROWS = 4  # of a transposed matrix that are added at once
DTYPES = torch.float32, torch.bfloat16  # of activations and of weights that are no codes
# Rows up to which one product after the other is faster than PyTorch's product of matrices, and of
# codes than making numbers of them first; no more than decoding.c's MOST_ROWS
FEW_ROWS = 8
FEW_ROWS_OF_CODES = 32
# Rows up to which products in tiles (Intel's AMX) are faster than PyTorch's, and the size of tiles
TILED_ROWS = 128
TILED_TOKENS = 512  # the same in Blocks
TILE = 32
MOST_INPUTS = 1 << 14  # beyond, int8's activations may have fewer than 10 bits
MOST = 1 << 22  # activations, up to which the small ops were tried
MATRICES = "q", "kv", "o", "gate_up", "down"  # of a block
NORMS = "attn_norm", "q_norm", "k_norm", "mlp_norm"
CODES = dict(int8=2, int4=3)  # decoding.c's numbers of kinds that are in none of DTYPES


class Matrix(ctypes.Structure):
    """decoding.c's struct matrix."""

    _fields_ = [("w", POINTER), ("scales", POINTER), ("n_out", LONG), ("n_in", LONG)]
    _fields_ += [("kind", INT), ("transposed", INT)]


class Shape(ctypes.Structure):
    """decoding.c's struct shape."""

    _fields_ = [(name, LONG) for name in ("width", "heads", "groups", "head", "hidden", "window")]
    _fields_ += [("eps", FLOAT), ("scale", FLOAT), ("half", INT), ("tiles", INT)]


class Block(ctypes.Structure):
    """decoding.c's struct block."""

    _fields_ = [(name, Matrix) for name in MATRICES]
    _fields_ += [(name, POINTER) for name in NORMS]
    _fields_ += [("keys", POINTER), ("values", POINTER), ("capacity", LONG)]


SIGNATURES = dict(
    in_large_pages=[POINTER, LONG],
    linear=[INT, LONG, POINTER, POINTER, POINTER, INT],
    dequantize=[INT, POINTER, POINTER, INT],
    linear_in_tiles=[LONG, POINTER, POINTER, POINTER, INT],
    rms_norm=[INT, LONG, LONG, POINTER, POINTER, POINTER, FLOAT, POINTER, POINTER, INT],
    swiglu=[INT, LONG, LONG, POINTER, POINTER, INT],
    rotate_halves=[INT, LONG, LONG, LONG, LONG, POINTER, POINTER, POINTER, POINTER, INT],
    attend=[INT, LONG, LONG, LONG, LONG, LONG, LONG, FLOAT, POINTER, POINTER, LONG, POINTER, LONG]
    + [POINTER, POINTER, POINTER, POINTER, INT],
    blocks=[POINTER, POINTER, LONG, POINTER, LONG, LONG, POINTER, POINTER, POINTER, POINTER, INT],
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


class Decoding(native.Library):
    """The compiled library. Methods take what the PyTorch forms take, and leave to those what is
    not for them: many rows, other devices and dtypes, gradients."""

    name = "decoding"
    signatures = SIGNATURES

    def __init__(self, library):
        super().__init__(library)
        self.has_tiles = bool(library.has_tiles())

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

        def swiglu(x):
            return self.swiglu(x) if takes(x) else ops.swiglu(x)

        return ops.replace(
            linear=self.linear,
            swiglu=swiglu,
            rms_norm=rms_norm,
            add_rms_norm=add_rms_norm,
            rotate_halves=self.rotate_halves,
            attend_one=self.attend_one,
            decoding=self,
        )

    def in_large_pages(self, tensors):
        """Have tensors on a CPU stand in large pages of memory, from which they are read faster,
        where the system has such."""
        for tensor in tensors:
            if tensor.device.type == "cpu":
                self.c.in_large_pages(tensor.data_ptr(), tensor.nbytes)

    def linear(self, x, w, transposed=False):
        """As linear_reference."""
        if not isinstance(w, torch.Tensor):
            return w.linear(x)
        matrix = matrix_of(w, transposed) if takes(x) and x.dtype == w.dtype else None
        y = None
        if matrix is not None:
            y = self.product(x, matrix, FEW_ROWS)
        return linear_reference(x, w, transposed) if y is None else y

    def linear_codes(self, x, matrix):
        """x (..., C), a Matrix of codes -> (..., n_out); None where it is not for this."""
        return self.product(x, matrix, FEW_ROWS_OF_CODES) if takes(x) else None

    def dequantized(self, matrix, dtype):
        """(n_out, n_in) of a Matrix of codes, in fp32 or bf16."""
        y = torch.empty(matrix.n_out, matrix.n_in, dtype=dtype)
        half = dtype == torch.bfloat16
        threads = torch.get_num_threads()
        self.c.dequantize(half, ctypes.addressof(matrix), y.data_ptr(), threads)
        return y

    def product(self, x, matrix, few):
        """x (..., n_in) -> (..., n_out), of up to so few rows one after the other, of more in
        tiles; None where neither is for it."""
        rows = x.numel() // matrix.n_in
        half = x.dtype == torch.bfloat16
        if rows > few and not (half and rows <= TILED_ROWS and self.fits_tiles(matrix)):
            return None
        y = x.new_empty(*x.shape[:-1], matrix.n_out)
        about = rows, ctypes.addressof(matrix), x.data_ptr(), y.data_ptr(), torch.get_num_threads()
        if rows <= few:
            self.c.linear(half, *about)
        else:
            self.c.linear_in_tiles(*about)
        return y

    def fits_tiles(self, matrix):
        fits = matrix.n_in % TILE == 0 and matrix.n_out >= TILE and not matrix.transposed
        return self.has_tiles and fits

    def all_fit_tiles(self, matrices):
        """Whether Blocks can be in tiles, which take transposed matrices as well."""
        in_bf16 = DTYPES.index(torch.bfloat16)
        return all(
            self.fits_tiles(m)
            or (self.has_tiles and m.kind == in_bf16 and m.n_in % TILE == m.n_out % TILE == 0)
            for m in matrices
        )

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
            torch.get_num_threads(),
        )
        return y, s

    def swiglu(self, x):
        """(..., 2 F) -> (..., F), as in swiglu.py."""
        n = x.size(-1) // 2
        y = x.new_empty(*x.shape[:-1], n)
        sizes = x.numel() // (2 * n), n
        addresses = x.data_ptr(), y.data_ptr()
        self.c.swiglu(x.dtype == torch.bfloat16, *sizes, *addresses, torch.get_num_threads())
        return y

    def rotate_halves(self, x, cos, sin):
        """As rotate_halves_reference; of tokens that have angles of their own, (B, S, 1, D / 2)."""
        one_each = x.dim() == 4 and cos.shape[:2] == x.shape[:2]
        # Tokens stand at equal distances
        in_rows = x.stride()[2:] == (x.size(-1), 1)
        in_rows = in_rows and (x.size(0) == 1 or x.stride(0) == x.size(1) * x.stride(1))
        angles = cos.is_contiguous() and sin.is_contiguous() and cos.dtype == x.dtype
        if not (one_each and in_rows and angles and takes(x, contiguous=False)):
            return rotate_halves_reference(x, cos, sin)
        y = torch.empty(x.shape, dtype=x.dtype)
        self.c.rotate_halves(
            x.dtype == torch.bfloat16,
            *(x.size(0) * x.size(1), x.size(2), x.size(3), x.stride(1)),
            *(t.data_ptr() for t in (x, cos, sin, y)),
            torch.get_num_threads(),
        )
        return y

    def blocks(self, layers, *about):
        """The Blocks of layers; None where one of their matrices is not for it."""
        matrices = [
            [matrix_of(getattr(layer, f"w_{name}"), name == "down") for name in MATRICES]
            for layer in layers
        ]
        if any(None in of_layer for of_layer in matrices):
            return None
        tiles = self.all_fit_tiles(sum(matrices, []))
        return Blocks(self.c, tiles, layers, matrices, *about)

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


def matrix_of(w, transposed):
    """The Matrix of a tensor, or of what stands for one; None for what decoding.c does not have."""
    if not isinstance(w, torch.Tensor):
        return w.matrix
    if w.dtype not in DTYPES or not w.is_contiguous() or w.device.type != "cpu":
        return None
    n_out, n_in = w.shape[::-1] if transposed else w.shape
    if transposed and n_in % ROWS:
        return None
    if w.dtype == torch.bfloat16 and w.size(1) % 2:  # which are multiplied in pairs
        return None
    return Matrix(w.data_ptr(), None, n_out, n_in, DTYPES.index(w.dtype), transposed)


def matrix_of_codes(kind, codes, scales):
    """The Matrix of (n_out, n_in) int8 with (n_out,) scales, or of (n_out, n_in / 2) uint8 with two
    codes of int4 each, the even input's in the lower bits, and (n_out, 2, n_in / 32) scales and
    zeros; scales in bf16. None for what decoding.c does not have."""
    n_out, n_in = codes.shape
    if kind == "int4":
        n_in *= 2
    if n_in > MOST_INPUTS or codes.device.type != "cpu":
        return None
    matrix = Matrix(codes.data_ptr(), scales.data_ptr(), n_out, n_in, CODES[kind], False)
    matrix.tensors = codes, scales  # live as long as their addresses
    return matrix


class Blocks:
    """All blocks of a Llama or a Qwen3 (models/llama.py) for a few new tokens, by one call.

    tiles: whether products can be in tiles; layers: its Layers; matrices: a Matrix of each of their
    MATRICES; last_norm: (C,), the weight of the norm behind them; cos, sin: (positions, 1, D / 2).
    heads, groups: of queries, of keys and values.
    """

    def __init__(self, c, tiles, layers, matrices, last_norm, cos, sin, heads, groups, eps):
        self.c = c
        self.tiles = tiles and cos.dtype == torch.bfloat16 and 2 * cos.size(-1) % TILE == 0
        self.dtype = cos.dtype
        self.positions = len(cos)
        head = 2 * cos.size(-1)
        # Also what has to live as long as its address is used
        self.layers = layers
        self.turns = cos, sin
        self.norms = [last_norm.float()]
        self.blocks = (Block * len(layers))()
        for layer, of_layer, block in zip(layers, matrices, self.blocks):
            for name, matrix in zip(MATRICES, of_layer):
                setattr(block, name, matrix)
            for name in NORMS:
                weight = getattr(layer, name)
                if weight is not None:
                    self.norms.append(weight.float())
                    setattr(block, name, self.norms[-1].data_ptr())
        hidden = self.blocks[0].down.n_in
        self.shape = Shape(len(last_norm), heads, groups, head, hidden)
        self.shape.eps = eps
        self.shape.scale = head**-0.5
        self.shape.half = self.dtype == torch.bfloat16

    def takes(self, x, lengths):
        """Whether it is for x (B, S, C), the new tokens of rows that have so many before."""
        tokens = x.size(0) * x.size(1)
        return (
            tokens <= (TILED_TOKENS if self.tiles else self.few)
            and takes(x)
            and x.dtype == self.dtype
            and max(lengths) + x.size(1) <= self.positions
        )

    @property
    def few(self):
        """Tokens that need no tiles."""
        of_codes = self.blocks[0].q.kind in CODES.values()
        return FEW_ROWS_OF_CODES if of_codes else FEW_ROWS

    def __call__(self, x, lengths, kv, window):
        """What is ready for the head: (B, S, C), in place of x. kv: (keys, values) of each layer,
        with room for S tokens more than `lengths` in each row, which are put there; window: tokens
        before one that it may see."""
        for block, (keys, values) in zip(self.blocks, kv):
            block.keys = keys.data_ptr()
            block.values = values.data_ptr()
            block.capacity = keys.size(1)
        self.shape.window = window
        rows, steps, _ = x.shape
        self.shape.tiles = rows * steps > self.few
        cos, sin = self.turns
        before = (ctypes.c_int64 * rows)(*lengths)
        self.c.blocks(
            ctypes.addressof(self.shape),
            ctypes.addressof(self.blocks),
            len(self.blocks),
            self.norms[0].data_ptr(),
            rows,
            steps,
            ctypes.addressof(before),
            cos.data_ptr(),
            sin.data_ptr(),
            x.data_ptr(),
            torch.get_num_threads(),
        )
        return x
