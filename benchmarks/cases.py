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
    work: dict = dataclasses.field(default_factory=dict)  # where it differs from the case's
    # |result - reference| / |reference|; None: another function, not compared
    tolerance: float | None = 0.02
    graph: bool = True  # can be captured
    restore: typing.Callable = list  # results -> what they stand for, to be compared


@dataclasses.dataclass
class Case:
    """inputs(draw) -> tuple of tensors, fresh random ones in each call; the first variant is the
    reference."""

    shape: str
    inputs: typing.Callable
    variants: dict
    work: dict  # direction -> least bytes, or FLOPs
    leaves: tuple = ()  # which inputs get gradients; none: forward only
    unit: str = "bytes"
    mutates: bool = False  # results are the inputs as it leaves them, too
    peak_bytes: float = 0  # of the hungriest variant, where that is many times the inputs


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

    def below(self, high, *shape, dtype=torch.int64, low=0):
        return torch.randint(
            low, high, shape, device=self.device, dtype=dtype, generator=self.generator
        )


# name -> (function of a Size that returns a Case, whether it depends on the number of tokens)
CASES = {}


def case(name, per_token=True):
    return lambda build: CASES.setdefault(name, (build, per_token))[0]


def compiled(fn, dynamic=False):
    return torch.compile(fn, fullgraph=True, dynamic=dynamic)


def ours(module, name, **options):
    """Variant.make for a function of kernels/, with keyword arguments bound."""

    def make(*_):
        fn = getattr(importlib.import_module(f"kernels.{module}"), name)
        return lambda *inputs: fn(*inputs, **options)

    return make


def beside(module, name, **options):
    """The three that nearly every case has: the op, and its reference run eagerly and compiled."""
    reference = ours(module, f"{name}_reference", **options)
    return dict(
        eager=Variant(reference),
        **{"torch.compile": Variant(lambda *x: compiled(reference(*x)))},
        stopwatch=Variant(ours(module, name, **options)),
    )


def elsewhere(path, call):
    """A Variant by a function of another package: call(function, *inputs)."""

    def make(*_):
        module, name = path.rsplit(".", 1)
        function = getattr(importlib.import_module(module), name)
        return lambda *inputs: call(function, *inputs)

    return Variant(make)


def three(forward, backward):
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}


# --- norms


@case("rms_norm")
def _(s):
    e = 2 * s.tokens * s.width
    return Case(
        f"({s.tokens:,}, {s.width}) bf16",
        lambda draw: (draw(s.tokens, s.width),),
        beside("rms_norm", "rms_norm"),
        three(2 * e, 3 * e),
        leaves=(0,),
    )


@case("rms_norm, weight")
def _(s):
    liger = "liger_kernel.transformers.functional.liger_rms_norm"
    others = dict(
        Liger=elsewhere(liger, lambda f, x, w: f(x, w, 1e-6, in_place=False)),
        QuACK=elsewhere("quack.rmsnorm", lambda f, x, w: f(x, w, eps=1e-6)),
    )
    e = 2 * s.tokens * s.width
    return Case(
        f"({s.tokens:,}, {s.width}) bf16",
        lambda draw: (draw(s.tokens, s.width), draw(s.width)),
        beside("rms_norm", "rms_norm") | others,
        three(2 * e, 3 * e),
        leaves=(0, 1),
    )


@case("add_rms_norm, weight")
def _(s):
    def liger(function, x, residual, w):
        return function.apply(x, residual, w, 1e-6, 0.0, "llama", False)

    def quack(function, x, residual, w):
        return function(x, w, residual=residual, eps=1e-6, prenorm=True)

    path = "liger_kernel.ops.fused_add_rms_norm.LigerFusedAddRMSNormFunction"
    others = dict(Liger=elsewhere(path, liger), QuACK=elsewhere("quack.rmsnorm", quack))
    e = 2 * s.tokens * s.width
    return Case(
        f"2 x ({s.tokens:,}, {s.width}) bf16",
        lambda draw: (draw(s.tokens, s.width), draw(s.tokens, s.width), draw(s.width)),
        beside("rms_norm", "add_rms_norm") | others,
        three(4 * e, 4 * e),
        leaves=(0, 1, 2),
    )


@case("qk_norm_rope")
def _(s):
    T = min(s.tokens, s.row_len)
    B = s.tokens // T

    def inputs(draw):
        angles = torch.rand(T, s.head_dim // 2, device=draw.device, generator=draw.generator) * 6.28
        return draw(B, T, 3 * s.heads, s.head_dim), angles.cos().to(BF16), angles.sin().to(BF16)

    e = 2 * B * T * s.heads * s.head_dim
    return Case(
        f"({B}, {T:,}, {3 * s.heads}, {s.head_dim}) bf16",
        inputs,
        beside("qk_norm_rope", "qk_norm_rope"),
        three(4 * e, 8 * e),
        leaves=(0,),
    )


# --- embeddings


@case("embedding")
def _(s):
    """Token ids are Zipf's: the commonest is one of sixteen, and all of them add to its row of
    the gradient."""

    def eager(*_):
        return lambda index, table: F.embedding(index, table)

    def sums(*_):
        from kernels.embedding import _Embedding  # what it does on a CPU

        return compiled(lambda index, table: _Embedding.apply(index, table))

    def inputs(draw):
        uniform = torch.rand(s.tokens, device=draw.device, generator=draw.generator)
        return (s.vocab**uniform).long() - 1, draw(s.vocab, s.width)

    e = 2 * s.tokens * s.width
    return Case(
        f"({s.tokens:,},) from ({s.vocab:,}, {s.width}) bf16",
        inputs,
        {
            "eager": Variant(eager),
            "stopwatch": Variant(lambda *x: compiled(ours("embedding", "embedding")(*x))),
            "scatter_add in fp32": Variant(sums),
        },
        three(2 * e, e + 2 * s.vocab * s.width),
        leaves=(1,),
    )


# --- the head


def tokens_and_logits(s, draw):
    return draw(s.tokens, s.vocab, scale=2.0), draw.below(s.vocab, s.tokens)


@case("softcap_cross_entropy")
def _(s):
    logits = s.tokens * s.vocab
    return Case(
        f"({s.tokens:,}, {s.vocab:,}) bf16",
        lambda draw: tokens_and_logits(s, draw),
        beside("cross_entropy", "softcap_cross_entropy", cap=CAP),
        {INFERENCE: 2 * logits, BOTH: 4 * logits},
        leaves=(0,),
        peak_bytes=30 * logits,
    )


@case("softcap_cross_entropy, without autograd", per_token=False)
def _(s):
    """The kernel alone, in the configurations worth a comparison, writing bf16 and e5m2
    gradients."""

    def eager(*_):
        from kernels.cross_entropy import softcap_cross_entropy_reference

        def loss_and_gradient(logits, targets):
            with torch.enable_grad():
                z = logits.detach().requires_grad_()
                loss = softcap_cross_entropy_reference(z, targets, cap=CAP)
            return loss.detach(), torch.autograd.grad(loss, z)[0]

        return loss_and_gradient

    def launched(config, dtype):
        def make(logits, _):
            from kernels.cross_entropy_kernels import launch_cross_entropy

            scale = torch.full((), SCALE, device=logits.device) if dtype != BF16 else None

            def loss_and_gradient(logits, targets):
                dlogits = torch.empty_like(logits, dtype=dtype)
                losses = launch_cross_entropy(
                    logits, targets, None, None, list(CAP), -100, 1.0, dlogits, scale, config
                )
                return losses.sum(), dlogits

            return loss_and_gradient

        return make

    logits = s.tokens * s.vocab
    SCALE = 2.0**-15
    configs = (
        ("two-pass", 8192, 16),
        ("two-pass", 4096, 16),
        ("two-pass", 4096, 8),
        ("two-pass", 16384, 32),
        ("resident", 2048, 8),
        ("resident", 4096, 16),
    )
    variants = {
        "eager": Variant(eager),
        "stopwatch": Variant(launched(None, BF16)),
        "stopwatch, e5m2": Variant(launched(None, torch.float8_e5m2)),
    }
    variants |= {
        f"{kernel} {block} {warps}w": Variant(launched((kernel, block, warps), BF16))
        for kernel, block, warps in configs
    }
    variants |= {
        f"{kernel} {block} {warps}w, e5m2": Variant(
            launched((kernel, block, warps), torch.float8_e5m2)
        )
        for kernel, block, warps in (configs[0], configs[4])
    }
    for name, v in variants.items():
        if name.endswith("e5m2"):
            v.work = {FORWARD: 3 * logits}
            v.tolerance = 0.1
            v.restore = lambda results: [results[0], results[1].float().mul_(SCALE)]
    return Case(
        f"({s.tokens:,}, {s.vocab:,}) bf16",
        lambda draw: tokens_and_logits(s, draw),
        variants,
        {FORWARD: 4 * logits},
        peak_bytes=34 * logits,
    )


@case("linear_cross_entropy")
def _(s):
    product = 2 * s.tokens * s.width * s.vocab
    std = 2 * s.width**-0.5
    variants = beside("linear_cross_entropy", "linear_cross_entropy", cap=CAP)
    variants["stopwatch, fp8"] = Variant(
        ours("linear_cross_entropy", "fp8_linear_cross_entropy", cap=CAP),
        {INFERENCE: "bf16", BOTH: "fp8"},
        tolerance=0.1,
    )
    return Case(
        f"({s.tokens:,}, {s.width}) x ({s.vocab:,}, {s.width}) bf16",
        lambda draw: (
            draw(s.tokens, s.width),
            draw(s.vocab, s.width, scale=std),
            draw.below(s.vocab, s.tokens),
        ),
        variants,
        {INFERENCE: product, BOTH: 3 * product},
        leaves=(0, 1),
        unit="FLOPs",
        peak_bytes=34 * s.tokens * s.vocab,
    )


# --- linear layers


@case("linear_relu2")
def _(s):
    product = 2 * s.tokens * s.width * s.hidden
    return Case(
        f"({s.tokens:,}, {s.width}) x ({s.hidden:,}, {s.width}) bf16",
        lambda draw: (draw(s.tokens, s.width), draw(s.hidden, s.width, scale=s.width**-0.5)),
        beside("mlp", "linear_relu2"),
        three(product, 2 * product),
        leaves=(0, 1),
        unit="FLOPs",
    )


@case("relu2_mlp")
def _(s):
    def fp8(x, *_):
        """Quantising x and the weights included, as in every micro-batch."""
        from kernels.fp8_mlp import FP8ReLU2MLP

        return FP8ReLU2MLP().to(x.device)

    product = 2 * s.tokens * s.width * s.hidden
    std = s.width**-0.5
    mixed = {FORWARD: "fp8", BACKWARD: "bf16"}
    return Case(
        f"({s.tokens:,}, {s.width}), 2 x ({s.hidden:,}, {s.width}) bf16",
        lambda draw: (
            draw(s.tokens, s.width),
            *(draw(s.hidden, s.width, scale=std) for _ in range(2)),
        ),
        beside("mlp", "relu2_mlp") | {"stopwatch, fp8 forward": Variant(fp8, mixed, tolerance=0.1)},
        three(2 * product, 4 * product),
        leaves=(0, 1, 2),
        unit="FLOPs",
    )


def fp8_linear(s, n):
    product = 2 * s.tokens * s.width * n
    std = s.width**-0.5
    # what is drawn stays below 6 sigma
    scales = dict(x_scale=6 / 448, w_scale=6 * std / 448, grad_scale=6 / 57344)
    mixed = {FORWARD: "fp8", BACKWARD: "bf16"}
    return Case(
        f"({s.tokens:,}, {s.width}) x ({n:,}, {s.width}) bf16",
        lambda draw: (draw(s.tokens, s.width), draw(n, s.width, scale=std)),
        {
            "bf16": Variant(lambda *_: F.linear),
            "stopwatch": Variant(ours("fp8_linear", "fp8_linear", **scales), mixed, tolerance=0.1),
            "stopwatch, fp8 backward": Variant(
                ours("fp8_linear", "fp8_linear", **scales, fp8_backward=True), "fp8", tolerance=0.1
            ),
            "stopwatch, dynamic": Variant(ours("fp8_linear", "fp8_linear"), mixed, tolerance=0.1),
        },
        three(product, 2 * product),
        leaves=(0, 1),
        unit="FLOPs",
        peak_bytes=8 * s.tokens * n,
    )


case("fp8_linear, up")(lambda s: fp8_linear(s, s.hidden))
case("fp8_linear, head")(lambda s: fp8_linear(s, s.vocab))


def quantize(s, transpose):
    return Case(
        f"({s.tokens:,}, {s.width}) bf16 to e4m3",
        lambda draw: (draw(s.tokens, s.width), torch.full((), 6 / 448, device=draw.device)),
        beside("quantize", "quantize", transpose=transpose),
        {FORWARD: (3 + transpose) * s.tokens * s.width},
    )


case("quantize")(lambda s: quantize(s, False))
case("quantize, transpose")(lambda s: quantize(s, True))


@case("transpose_copy")
def _(s):
    def eager(*_):
        return lambda x: x.t().contiguous()

    return Case(
        f"({s.tokens:,}, {s.vocab:,}) e5m2",
        lambda draw: (draw(s.tokens, s.vocab, dtype=torch.float8_e5m2),),
        {
            "eager": Variant(eager),
            "torch.compile": Variant(lambda *_: compiled(eager())),
            "stopwatch": Variant(ours("quantize", "transpose_copy")),
        },
        {FORWARD: 2 * s.tokens * s.vocab},
        peak_bytes=6 * s.tokens * s.vocab,
    )


# --- the optimizer


def matrices(s):
    """(how many, rows, columns) of the attention's and of the MLP's matrices."""
    return (4 * s.layers, s.width, s.width), (2 * s.layers, s.hidden, s.width)


def symmetric(n, m, k, add):
    name = "symmetric_matmul"
    flops = n * m * (m + 1) * k  # the lower triangle's
    options = dict(alpha=-2.8, beta=4.0) if add else {}
    variants = dict(
        cuBLAS=Variant(ours(name, f"{name}_reference", **options)),
        stopwatch=Variant(ours(name, name, **options)),
    )

    def inputs(draw):
        # the MLP's matrices are tall, and taken as their transposes
        X = draw(n, k, m).mT if m < k else draw(n, m, k)
        return (X @ X.mT / k**0.5,) * 2 if add else (X,)

    return Case(f"{n} x ({m:,}, {k:,}) bf16", inputs, variants, {FORWARD: flops}, unit="FLOPs")


@case("symmetric_matmul, attention", per_token=False)
def _(s):
    return symmetric(*matrices(s)[0], add=False)


@case("symmetric_matmul, mlp", per_token=False)
def _(s):
    n, k, m = matrices(s)[1]
    return symmetric(n, m, k, add=False)


@case("symmetric_matmul, b A + c A A", per_token=False)
def _(s):
    return symmetric(*matrices(s)[0], add=True)


@case("polar_express", per_token=False)
def _(s):
    def ours(symmetric):
        def make(*_):
            from kernels.polar_express import polar_express

            function = getattr(importlib.import_module("kernels.symmetric_matmul"), symmetric)
            return lambda *banks: [polar_express(G, symmetric=function) for G in banks]

        return make

    def muon(*banks):
        params = [torch.nn.Parameter(G.clone()) for bank in banks for G in bank]
        for p in params:
            p.grad = p.detach().clone()
        optimizer = torch.optim.Muon(params)
        return lambda *_: optimizer.step()

    def muon_products(*_):
        from torch.optim._muon import _zeropower_via_newtonschulz

        return lambda *banks: [
            _zeropower_via_newtonschulz(G.clone(), (3.4445, -4.775, 2.0315), 5, 1e-7)
            for bank in banks
            for G in bank
        ]

    (n, m, _), (n2, k, m2) = matrices(s)
    flops = 5 * (n * 4 * m**3 + n2 * (3 * m2**2 * k + m2**3))  # both symmetric products by halves
    return Case(
        f"{n} x ({m}, {m}) and {n2} x ({k:,}, {m2}) bf16",
        lambda draw: tuple(draw(*shape) for shape in matrices(s)),
        {
            "eager": Variant(ours("symmetric_matmul_reference")),
            "torch.compile": Variant(
                lambda *x: compiled(ours("symmetric_matmul_reference")(*x)), tolerance=0.1
            ),
            "stopwatch": Variant(ours("symmetric_matmul"), tolerance=0.1),
            "torch.optim.Muon.step": Variant(muon, graph=False, tolerance=None),
            "Muon's products": Variant(muon_products, tolerance=None),
        },
        {FORWARD: flops},
        unit="FLOPs",
    )


def update(file, shape, inputs, work, call, torch_op=None):
    """What the trainer compiles of optim/ on a GPU: call(the file as a module, *inputs), with the
    guard's ok last."""

    def plain(*_):
        module = importlib.import_module(f"optim.{file}")
        return lambda *tensors: call(module, *tensors)

    variants = {"eager": Variant(plain), "stopwatch": Variant(lambda *x: compiled(plain(*x)))}
    if torch_op:
        variants["torch.optim"] = Variant(torch_op, graph=False, tolerance=None)
    return Case(
        shape,
        lambda draw: (*inputs(draw), torch.ones((), dtype=torch.bool, device=draw.device)),
        variants,
        {FORWARD: work},
        mutates=True,
    )


def low_bits(draw, *shape):
    return draw.below(2**15, *shape, dtype=torch.int16, low=-(2**15))


def on_cpu(*scalars):
    """Where the trainer has hyperparameters: as 0-d tensors they are no constants to the
    compiler."""
    return [torch.tensor(x) for x in scalars]


@case("adam_update", per_token=False)
def _(s):
    n = s.vocab * s.width
    *hyper, shrink = on_cpu(1e-3, 0.75, 0.95, 1e-10, 1 - 0.75**10, 1 - 0.95**10, 1e-4)

    def torch_adam(p, *_):
        p = torch.nn.Parameter(p.float())
        p.grad = p.detach().clone()
        optimizer = torch.optim.Adam([p], fused=p.is_cuda)
        return lambda *_: optimizer.step()

    return update(
        "adam",
        f"({s.vocab:,}, {s.width}) bf16 with fp32 masters, cautious decay",
        lambda draw: (
            draw(n),
            low_bits(draw, n),
            draw(n),
            draw(n, dtype=FP32),
            draw(n, dtype=FP32).square(),
        ),
        26 * n,
        lambda rules, p, low, grad, m, v, ok: rules.adam_update(
            p, low, grad, m, v, *hyper, shrink=shrink, ok=ok
        ),
        torch_adam,
    )


@case("row_update", per_token=False)
def _(s):
    shape = (s.vocab, s.width)
    n = s.vocab * s.width
    *hyper, shrink = on_cpu(1e-3, 0.95, 1e-10, 1 - 0.95**10, 1e-4)
    return update(
        "rows",
        f"({s.vocab:,}, {s.width}) bf16 with fp32 masters, cautious decay",
        lambda draw: (
            draw(*shape),
            low_bits(draw, *shape),
            draw(*shape),
            draw(s.vocab, 1, dtype=FP32).square(),
        ),
        12 * n,
        lambda rules, p, low, grad, v, ok: rules.row_update(
            p, low, grad, v, *hyper, shrink=shrink, ok=ok
        ),
    )


@case("nesterov", per_token=False)
def _(s):
    k, rows, cols = matrices(s)[1]
    n = k * rows * cols
    (momentum,) = on_cpu(0.95)
    return update(
        "muon",
        f"{k} x ({rows:,}, {cols}) bf16",
        lambda draw: (draw(n), draw(n, dtype=FP32)),
        12 * n,
        lambda rules, grad, m, ok: rules.nesterov(grad, m, momentum, ok),
    )


@case("balance", per_token=False)
def _(s):
    shape = k, rows, cols = matrices(s)[1]
    return update(
        "muon",
        f"{k} x ({rows:,}, {cols}) bf16",
        lambda draw: (draw(*shape, scale=rows**-0.5), draw(k, rows, 1, dtype=FP32).square_()),
        2 * k * rows * cols,
        lambda rules, x, v, ok: rules.balance(x, v, 0.9, ok),
    )


def descend(s, balanced):
    shape = k, rows, cols = matrices(s)[1]
    n = k * rows * cols
    (lr, shrink) = on_cpu(1e-3, 1e-4)

    def inputs(draw):
        of = shape if balanced else (n,)
        scale = (draw(k, rows, 1, dtype=FP32).exp_(),) if balanced else ()
        return draw(*of), low_bits(draw, *of), draw(*of), *scale

    return update(
        "masters",
        f"{k} x ({rows:,}, {cols}) bf16 with fp32 masters, cautious decay",
        inputs,
        10 * n,
        lambda rules, p, low, x, *rest: rules.descend(
            p, low, x, lr, shrink, *rest[:-1], ok=rest[-1]
        ),
    )


case("descend", per_token=False)(lambda s: descend(s, balanced=False))
case("descend, NorMuon", per_token=False)(lambda s: descend(s, balanced=True))


@case("gradient_report", per_token=False)
def _(s):
    """What the guard reads: every gradient, once a step."""

    def eager(*_):
        return lambda *grads: torch.stack([g.float().square().sum() for g in grads])

    def foreach(*_):
        return lambda *grads: torch.stack(torch._foreach_norm(grads, 2, dtype=FP32)).square()

    def ours(*_):
        from optim import gradient_report

        return lambda *grads: gradient_report(grads)

    shapes = ((s.vocab, s.width), (s.vocab, s.width), *matrices(s))
    return Case(
        f"2 x ({s.vocab:,}, {s.width}) and Muon's matrices, bf16",
        lambda draw: tuple(draw(*shape) for shape in shapes),
        {
            "eager": Variant(eager),
            "stopwatch": Variant(ours),
            "torch.compile": Variant(lambda *x: compiled(ours(*x))),
            "torch._foreach_norm": Variant(foreach),
        },
        {FORWARD: 2 * sum(map(math.prod, shapes))},
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
    scale = 1.36 * D**-0.5

    def inputs(draw):
        starts = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(INT32)
        # Padded as by the loader: what a kernel starts for documents that are not there is part of
        # its time
        slots = B * (default_max_docs(T) + -(-T // s.max_doc_len)) + 1
        padding = max(0, slots - len(starts))
        starts = F.pad(starts, (0, padding), value=s.tokens).to(draw.device)
        return draw(B, T, H, D), draw(B, T, H, D), draw(B, T, H, D), starts

    def backend(name):
        def make(*_):
            from kernels.attention import attention

            return lambda q, k, v, cu_seqlens: attention(
                q,
                k,
                v,
                cu_seqlens=cu_seqlens,
                max_seqlen=max(lengths),
                window=window,
                scale=scale,
                backend=name,
            )

        return make

    names = importlib.import_module("kernels.attention").BACKENDS
    return Case(
        f"({B}, {T:,}, {H}, {D}) bf16, {len(lengths)} documents, window {window}",
        inputs,
        {
            "blockwise": Variant(backend("blockwise")),
            "blockwise, compiled": Variant(lambda *x: compiled(backend("blockwise")(*x))),
            **{name: Variant(backend(name)) for name in names if name != "blockwise"},
        },
        three(4 * D * H * pairs, 10 * D * H * pairs),
        leaves=(0, 1, 2),
        unit="FLOPs",
        peak_bytes=32 * s.tokens * H * 2 * window,
    )


case("attention, short window")(lambda s: attention(s, s.windows[0]))


@case("attention, long window")
def _(s):
    return attention(s, s.windows[1])
