"""What benchmarks/kernels.py times: the ops of kernels/ on gpt2-small's shapes, who can compute
them, the least work.

A case is a function of a Size, so that tests can run it tiny on a CPU. Imports happen inside
variants: one that is missing or broken is that variant's error and nobody else's.
"""

import dataclasses
import importlib
import math
import random
import typing

import torch
import torch.nn.functional as F

from data.loader import default_max_docs

BF16 = torch.bfloat16
FP32 = torch.float32
INT32 = torch.int32
CAP = (23.0, 5.0, 7.5)
FORWARD = "forward"
BACKWARD = "backward"
BOTH = "forward+backward"
INFERENCE = "inference"
MIXED = {FORWARD: "fp8", BACKWARD: "bf16"}  # rates where only the forward pass is in FP8


class Size(typing.NamedTuple):
    tokens: int
    width: int
    hidden: int
    vocab: int
    heads: int
    head_dim: int
    layers: int
    row_len: int
    max_doc_len: int
    windows: tuple


GPT2_SMALL = Size(49152, 768, 3072, 50304, 6, 128, 11, 16384, 2048, (640, 1408))


@dataclasses.dataclass
class Variant:
    """One way of computing a case.

    make(*inputs of the first set) returns the function that is timed; imports belong in it, so that
    one that fails is this variant's error alone.
    """

    make: typing.Callable
    # what its share is of: copy, bf16 or fp8; {direction: rate} where mixed; empty: the usual
    rate: str | dict = ""
    tolerance: float = 0.02  # |result - reference| / |reference|


@dataclasses.dataclass
class Case:
    """inputs(draw) -> tuple of tensors, fresh random ones in each call; the first variant is the
    reference."""

    inputs: typing.Callable
    variants: dict
    work: dict  # direction -> least bytes, or FLOPs
    leaves: tuple = ()  # which inputs get gradients; none: forward only
    unit: str = "bytes"


class Draw:
    """Random tensors on a device, others in each call."""

    def __init__(self, device, seed=0):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape, dtype=BF16, scale=1.0):
        drawn = FP32 if dtype.itemsize == 1 else dtype
        x = torch.randn(shape, device=self.device, dtype=drawn, generator=self.generator)
        return (x if scale == 1 else x.mul_(scale)).to(dtype)

    def like(self, y):
        """An upstream gradient for y."""
        return self(*y.shape, dtype=y.dtype) if y.dim() else torch.ones_like(y)

    def below(self, high, *shape):
        return torch.randint(high, shape, device=self.device, generator=self.generator)

    def uniform(self, *shape):
        return torch.rand(shape, device=self.device, generator=self.generator)


def compiled(fn):
    return torch.compile(fn, fullgraph=True, dynamic=False)


def resolve(path):
    """What a dotted path names."""
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def of(path, call=None, **options):
    """Variant.make for the function at a path, with keyword arguments bound; call(function,
    *inputs) says how, where it does not take the inputs as they are."""

    def make(*_):
        function = resolve(path)
        if call:
            return lambda *inputs: call(function, *inputs)
        return lambda *inputs: function(*inputs, **options)

    return make


def then_compiled(make):
    return lambda *inputs: compiled(make(*inputs))


def beside(path, **options):
    """The three that nearly every case has: the op, and its reference run eagerly and compiled."""
    reference = of(f"{path}_reference", **options)
    return {
        "eager": Variant(reference),
        "torch.compile": Variant(then_compiled(reference)),
        "stopwatch": Variant(of(path, **options)),
    }


def three(forward, backward):
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


# --- norms


def rms_norm(s, residual=False, weight=False, others=None):
    """Rows, a residual to add to them and a weight where there are."""

    def inputs(draw):
        rows = [draw(s.tokens, s.width) for _ in range(1 + residual)]
        weights = [draw(s.width)] if weight else []
        return (*rows, *weights)

    op = "add_rms_norm" if residual else "rms_norm"
    variants = beside(f"kernels.rms_norm.{op}")
    for name, (path, call) in (others or {}).items():
        variants[name] = Variant(of(path, call))
    e = 2 * s.tokens * s.width
    work = three(4 * e, 4 * e) if residual else three(2 * e, 3 * e)
    return Case(inputs, variants, work, leaves=tuple(range(1 + residual + weight)))


NORMS = {
    "Liger": (
        "liger_kernel.transformers.functional.liger_rms_norm",
        lambda f, x, w: f(x, w, 1e-6, in_place=False),
    ),
    "QuACK": ("quack.rmsnorm", lambda f, x, w: f(x, w, eps=1e-6)),
}
ADD_NORMS = {
    "Liger": (
        "liger_kernel.ops.fused_add_rms_norm.LigerFusedAddRMSNormFunction",
        lambda f, x, residual, w: f.apply(x, residual, w, 1e-6, 0.0, "llama", False),
    ),
    "QuACK": (
        "quack.rmsnorm",
        lambda f, x, residual, w: f(x, w, residual=residual, eps=1e-6, prenorm=True),
    ),
}


def qk_norm_rope(s):
    T = min(s.tokens, s.row_len)
    B = s.tokens // T

    def inputs(draw):
        angles = draw.uniform(T, s.head_dim // 2) * 6.28
        return draw(B, T, 3 * s.heads, s.head_dim), angles.cos().to(BF16), angles.sin().to(BF16)

    e = 2 * B * T * s.heads * s.head_dim
    return Case(
        inputs, beside("kernels.qk_norm_rope.qk_norm_rope"), three(4 * e, 8 * e), leaves=(0,)
    )


def swiglu(s):
    """Gates and values of the width that llama-100m has for this one, 8/3 of it."""
    F = 8 * s.width // 3

    def inputs(draw):
        return (draw(s.tokens, 2 * F),)

    e = 2 * s.tokens * F
    variants = beside("kernels.swiglu.swiglu")
    variants["Liger"] = Variant(
        of(
            "liger_kernel.ops.swiglu.LigerSiLUMulFunction",
            lambda f, x: f.apply(*(half.contiguous() for half in x.chunk(2, -1))),
        )
    )
    return Case(inputs, variants, three(3 * e, 5 * e), leaves=(0,))


# --- embeddings and the head


def embedding(s):
    """Token ids are Zipf's: the commonest is one of sixteen, and all of them add to its row of
    the gradient."""

    def inputs(draw):
        return (s.vocab ** draw.uniform(s.tokens)).long() - 1, draw(s.vocab, s.width)

    variants = {
        "eager": Variant(of("torch.nn.functional.embedding")),
        "stopwatch": Variant(then_compiled(of("kernels.embedding.embedding"))),
    }
    e = 2 * s.tokens * s.width
    return Case(inputs, variants, three(2 * e, e + 2 * s.vocab * s.width), leaves=(1,))


def softcap_cross_entropy(s):
    logits = s.tokens * s.vocab
    return Case(
        lambda draw: (draw(s.tokens, s.vocab, scale=2.0), draw.below(s.vocab, s.tokens)),
        beside("kernels.cross_entropy.softcap_cross_entropy", cap=CAP),
        {INFERENCE: 2 * logits, BOTH: 4 * logits},
        leaves=(0,),
    )


def linear_cross_entropy(s):
    def inputs(draw):
        head = draw(s.vocab, s.width, scale=2 * s.width**-0.5)
        return draw(s.tokens, s.width), head, draw.below(s.vocab, s.tokens)

    module = "kernels.linear_cross_entropy"
    variants = beside(f"{module}.linear_cross_entropy", cap=CAP)
    variants["stopwatch, fp8"] = Variant(
        of(f"{module}.fp8_linear_cross_entropy", cap=CAP),
        {INFERENCE: "bf16", BOTH: "fp8"},
        tolerance=0.1,
    )
    product = 2 * s.tokens * s.width * s.vocab
    return Case(
        inputs,
        variants,
        {INFERENCE: product, BOTH: 3 * product},
        leaves=(0, 1),
        unit="FLOPs",
    )


# --- linear layers


def products(s, matrices, n, variants):
    """Rows times so many matrices (n, width): a product each forward, two backward."""

    def inputs(draw):
        weights = [draw(n, s.width, scale=s.width**-0.5) for _ in range(matrices)]
        return draw(s.tokens, s.width), *weights

    product = 2 * s.tokens * s.width * n
    return Case(
        inputs,
        variants,
        three(matrices * product, 2 * matrices * product),
        leaves=tuple(range(1 + matrices)),
        unit="FLOPs",
    )


def relu2_mlp(s):
    def fp8(x, *_):
        """Quantising x and the weights included, as in every micro-batch."""
        return resolve("kernels.fp8_mlp.FP8ReLU2MLP")().to(x.device)

    variants = beside("kernels.mlp.relu2_mlp")
    variants["stopwatch, fp8 forward"] = Variant(fp8, MIXED, tolerance=0.1)
    return products(s, 2, s.hidden, variants)


def fp8_linear(s, n):
    path = "kernels.fp8_linear.fp8_linear"
    # what is drawn stays below 6 sigma
    scales = dict(x_scale=6 / 448, w_scale=6 * s.width**-0.5 / 448, grad_scale=6 / 57344)
    variants = {
        "bf16": Variant(of("torch.nn.functional.linear")),
        "stopwatch": Variant(of(path, **scales), MIXED, tolerance=0.1),
        "stopwatch, fp8 backward": Variant(
            of(path, **scales, fp8_backward=True), "fp8", tolerance=0.1
        ),
        "stopwatch, dynamic": Variant(of(path), MIXED, tolerance=0.1),
    }
    return products(s, 1, n, variants)


def quantize(s, transpose):
    return Case(
        lambda draw: (draw(s.tokens, s.width), torch.full((), 6 / 448, device=draw.device)),
        beside("kernels.quantize.quantize", transpose=transpose),
        {FORWARD: (3 + transpose) * s.tokens * s.width},
    )


def transpose_copy(s):
    def eager(*_):
        return lambda x: x.t().contiguous()

    variants = {
        "eager": Variant(eager),
        "torch.compile": Variant(then_compiled(eager)),
        "stopwatch": Variant(of("kernels.quantize.transpose_copy")),
    }
    elements = s.tokens * s.vocab
    return Case(
        lambda draw: (draw(s.tokens, s.vocab, dtype=torch.float8_e5m2),),
        variants,
        {FORWARD: 2 * elements},
    )


# --- the optimizer's


def attention_matrices(s):
    """(how many, rows, columns)"""
    return 4 * s.layers, s.width, s.width


def mlp_matrices(s):
    """(how many, rows, columns)"""
    return 2 * s.layers, s.hidden, s.width


def symmetric_matmul(shape, **options):
    """X X^T of matrices (n, rows, columns), the tall ones as their transposes; with beta a matrix
    is added to it."""
    n, rows, columns = shape
    m = min(rows, columns)
    k = max(rows, columns)

    def inputs(draw):
        X = draw(*shape)
        X = X.mT if columns < rows else X
        return (X @ X.mT / k**0.5,) * 2 if options else (X,)

    path = "kernels.symmetric_matmul.symmetric_matmul"
    variants = {
        "cuBLAS": Variant(of(f"{path}_reference", **options)),
        "stopwatch": Variant(of(path, **options)),
    }
    # the lower triangle's
    return Case(inputs, variants, {FORWARD: n * m * (m + 1) * k}, unit="FLOPs")


def polar_express(s):
    def by(form):
        def make(*_):
            function = resolve(f"kernels.polar_express.{form}")
            return lambda *banks: [function(G) for G in banks]

        return make

    reference = by("polar_express")
    variants = {
        "eager": Variant(reference),
        "torch.compile": Variant(then_compiled(reference), tolerance=0.1),
        "stopwatch": Variant(by("polar_express_by_kernels"), tolerance=0.1),
    }
    n, m, _ = attention_matrices(s)
    n2, k, m2 = mlp_matrices(s)
    flops = 5 * (n * 4 * m**3 + n2 * (3 * m2**2 * k + m2**3))  # both symmetric products by halves
    return Case(
        lambda draw: (draw(*attention_matrices(s)), draw(*mlp_matrices(s))),
        variants,
        {FORWARD: flops},
        unit="FLOPs",
    )


# --- attention


def documents(s):
    """Lengths of documents with FineWeb's spread, cut at max_doc_len and at the ends of rows."""
    r = random.Random(0)
    lengths = []
    row = min(s.tokens, s.row_len)
    for _ in range(s.tokens // row):
        left = row
        while left:
            drawn = int(s.max_doc_len * 0.2 * math.exp(r.gauss(0, 1)))
            lengths.append(min(left, s.max_doc_len, max(1, drawn)))
            left -= lengths[-1]
    return lengths


def attention(s, window):
    T = min(s.tokens, s.row_len)
    B = s.tokens // T
    H = s.heads
    D = s.head_dim
    lengths = documents(s)
    pairs = sum(min(i, window) + 1 for n in lengths for i in range(n))

    def inputs(draw):
        starts = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(INT32)
        # Padded as by the loader: what a kernel starts for documents that are not there is part of
        # its time
        slots = B * (default_max_docs(T) + -(-T // s.max_doc_len)) + 1
        padding = max(0, slots - len(starts))
        starts = F.pad(starts, (0, padding), value=s.tokens).to(draw.device)
        return draw(B, T, H, D), draw(B, T, H, D), draw(B, T, H, D), starts

    def by(backend):
        def call(function, q, k, v, cu_seqlens):
            return function(
                q,
                k,
                v,
                cu_seqlens=cu_seqlens,
                max_seqlen=max(lengths),
                window=window,
                scale=1.36 * D**-0.5,
                backend=backend,
            )

        return of("kernels.attention.attention", call)

    variants = {
        "blockwise": Variant(by("blockwise")),
        "blockwise, compiled": Variant(then_compiled(by("blockwise"))),
    }
    for name in resolve("kernels.attention.BACKENDS"):
        variants.setdefault(name, Variant(by(name)))
    return Case(
        inputs,
        variants,
        three(4 * D * H * pairs, 10 * D * H * pairs),
        leaves=(0, 1, 2),
        unit="FLOPs",
    )


CASES = {
    "rms_norm": rms_norm,
    "rms_norm, weight": lambda s: rms_norm(s, weight=True, others=NORMS),
    "add_rms_norm, weight": lambda s: rms_norm(s, True, True, ADD_NORMS),
    "qk_norm_rope": qk_norm_rope,
    "swiglu": swiglu,
    "embedding": embedding,
    "softcap_cross_entropy": softcap_cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "linear_relu2": lambda s: products(s, 1, s.hidden, beside("kernels.mlp.linear_relu2")),
    "relu2_mlp": relu2_mlp,
    "fp8_linear, up": lambda s: fp8_linear(s, s.hidden),
    "fp8_linear, head": lambda s: fp8_linear(s, s.vocab),
    "quantize": lambda s: quantize(s, False),
    "quantize, transpose": lambda s: quantize(s, True),
    "transpose_copy": transpose_copy,
    "symmetric_matmul, attention": lambda s: symmetric_matmul(attention_matrices(s)),
    "symmetric_matmul, mlp": lambda s: symmetric_matmul(mlp_matrices(s)),
    "symmetric_matmul, b A + c A A": lambda s: symmetric_matmul(
        attention_matrices(s), alpha=-2.8, beta=4.0
    ),
    "polar_express": polar_express,
    "attention, short window": lambda s: attention(s, s.windows[0]),
    "attention, long window": lambda s: attention(s, s.windows[1]),
}
