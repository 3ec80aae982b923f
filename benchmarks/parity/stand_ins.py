"""What the record's CUDA-only calls mean, in PyTorch on a CPU and in float32.

Everything here is written from what those calls compute, by their names and arguments: symmetric
products, the MLP's fused product, the loss with its gradient, attention over packed documents, the
rank-1 mix of attention maps ("DC"). One process stands for all ranks: collectives leave things as
they are. 8-bit and 16-bit floats are float32.
"""

import functools
import math
import types

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from base import InputError
from kernels.attention import attention

REDUCED = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


# --- tensors


class InFloat32(TorchFunctionMode):
    """While it is on, CUDA is the CPU and shorter floats are float32."""

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.Tensor.bfloat16, torch.Tensor.half):
            return args[0].float()
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.__setitem__ and isinstance(args[2], torch.Tensor):
            # A compiler reads all of the value before it writes; x[1:] = x[:-1] relies on it
            return func(args[0], args[1], args[2].clone())
        if func in (torch.Tensor.to, torch.Tensor.type):
            args = [args[0], *map(here, args[1:])]
        if kwargs:
            kwargs = {name: here(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)


def here(x):
    """An argument's meaning: another device or a shorter float is the CPU or float32."""
    if isinstance(x, torch.dtype):
        return torch.float32 if x in REDUCED else x
    if isinstance(x, torch.device) and x.type == "cuda":
        return torch.device("cpu")
    if isinstance(x, str) and x.split(":")[0] == "cuda":
        return "cpu"
    return x


# --- products of the optimizer


def symmetric(A, out):
    """A A^T, of each matrix."""
    return torch.matmul(A, A.mT, out=out)


def symmetric_of_columns(A, out):
    """A^T A."""
    return torch.matmul(A.mT, A, out=out)


def quadratic(A, alpha, beta, out):
    """beta A + alpha A A^T of symmetric matrices."""
    torch.matmul(A, A.mT, out=out)
    return out.mul_(alpha).add_(A, alpha=beta)


def transpose_copy(src, dst):
    dst.copy_(src.T)


def transpose_add(src, dst):
    dst.add_(src.T)


def cautious_update(p, mantissa, update, decay, lr):
    """A Muon weight less lr * (update + decay * weight where both have one sign).

    p: a view of the weights as uint16, which of float32 weights are all 32 bits: there the bits
    that the record keeps beside (mantissa) have nothing to add.
    """
    w = p.view(torch.float32)
    agrees = update * w >= 0
    w.sub_(lr * (update + decay * w * agrees))


# --- the MLP and the loss


class ReLUSquared:
    """relu(x W1^T)^2 W2; scales and 8-bit copies behind the matrices are not used."""

    @staticmethod
    def apply(x, up, down, *scales):
        return F.linear(x, up).relu().square() @ down


class CrossEntropy:
    """(rows,) losses of the next tokens, each with its weight, from softcapped logits."""

    @staticmethod
    def apply(x, targets, weights, *rest):
        if len(rest) == 7:
            prefixes, prefix_weight, head, *_ = rest
        elif len(rest) == 5:
            prefixes, prefix_weight, head = None, None, rest[0]
        else:
            raise InputError(
                f"--modded: its loss takes {3 + len(rest)} arguments, expected 8 or 10; give a "
                "commit that parity knows"
            )
        return softcapped_loss(x, head, targets, weights, prefixes, prefix_weight)


def softcapped_loss(x, head, targets, weights, prefixes=None, prefix_weight=None):
    """x: (N, C), head: (C, V), targets: (N,), weights: (n,) of the n next tokens; prefixes: (N,)
    another target each, -1 for none -> (N,).

    In the last n - 1 rows there is no n-th next token: its weight is missing in the loss, but not
    in the gradient of the normalisation, as the record's kernel has it.
    """
    z = 23 * torch.sigmoid((x @ head + 5) / 7.5)
    log_sum = z.logsumexp(-1)
    total = 0
    for k, weight in enumerate(weights):
        n = len(targets) - k
        loss = log_sum[:n] - z[:n].gather(1, targets[k:, None])[:, 0]
        beyond = log_sum[n:] - log_sum[n:].detach()
        total = total + weight * torch.cat([loss, beyond])
    if prefixes is not None:
        loss = log_sum - z.gather(1, prefixes.clamp(min=0)[:, None])[:, 0]
        total = total + prefix_weight * torch.where(prefixes >= 0, loss, 0.0)
    return total


def scaled_product(a, b, *, scale_a, scale_b, **how):
    """Of 8-bit floats, which are float32 here."""
    return (a @ b) * scale_a * scale_b


# --- attention


def attention_of_documents(
    q,
    k,
    v,
    *,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    causal,
    softmax_scale,
    window_size,
):
    """(T, H, D) each -> the same: each token sees itself and window_size[0] tokens before it."""
    if not causal or window_size[1]:
        raise InputError("--modded: its attention is not causal; give a commit that parity knows")
    y = attention(
        *(x[None] for x in (q, k, v)),
        cu_seqlens=cu_seqlens_q,
        max_seqlen=min(max_seqlen_q, len(q)),
        window=window_size[0],
        scale=softmax_scale,
    )
    return y[0]


def mix_of_maps(y, q, k, v, weights, log_sum, *, scaling, window, seq_lens, shrink=1):
    """DC: y + w2_h * sum over keys of (sum over heads j of w1_j A_j) V_h, with attention maps A_j
    over the last `window` tokens of the document.

    y: (T, H, D); q, k, v: (1, T, H, D); weights: w1, w2, (1, T, H) each; shrink: what the window is
    divided by.
    """
    window = max(1, window // shrink)
    q, k, v = q[0], k[0], v[0]
    w1, w2 = (w[0] for w in weights)
    T = len(q)
    at = torch.arange(T)
    starts = seq_lens[torch.bucketize(at, seq_lens, right=True) - 1]  # of each token's document
    added = []
    for begin in range(0, T, 1024):
        rows = at[begin : begin + 1024]
        keys = rows[:, None] - torch.arange(window)  # (t, W)
        seen = (keys >= starts[begin : begin + 1024, None])[:, None]
        keys = keys.clamp(min=0)
        scores = torch.einsum("thd,twhd->thw", q[rows], k[keys]) * scaling
        maps = scores.masked_fill(~seen, -math.inf).softmax(-1)  # (t, H, W)
        mixed = torch.einsum("th,thw->tw", w1[rows], maps)
        added.append(w2[rows][..., None] * torch.einsum("tw,twhd->thd", mixed, v[keys]))
    return y + torch.cat(added).view_as(y)


def no_mix(y, *args, **more):
    return y


# --- modules


class Module(types.ModuleType):
    """A module that has what it is given; anything else is refused by name."""

    def __init__(self, name, **members):
        super().__init__(name)
        self.__dict__.update(members)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise InputError(
            f"--modded: it uses {self.__name__}.{name}, which parity has no meaning for; give a "
            "commit that it knows"
        )


class Torch(types.ModuleType):
    """torch, but for what needs CUDA or a compiler."""

    def __init__(self, **members):
        super().__init__("torch")
        self.__dict__.update(members)

    def __getattr__(self, name):
        return getattr(torch, name)


class Done:
    """A collective that has ended."""

    def get_future(self):
        return self

    def wait(self):
        return self


def nothing(*args, **more):
    return None


def alike(*args, **more):
    """A collective of one process."""
    return Done()


def uncompiled(function=None, **options):
    """torch.compile, as a call or a decorator: the function itself."""
    return (lambda function: function) if function is None else function


def unpinned(make):
    """A factory of tensors without page-locked memory."""

    @functools.wraps(make)
    def wrapped(*args, pin_memory=False, **more):
        return make(*args, **more)

    return wrapped


def modules(tokens, dc=False, shrink=1):
    """{name: module} in place of what the record imports.

    tokens: every id's bytes, for its table of prefixes; dc: whether attention maps are mixed.
    """
    dist = Module(
        "torch.distributed",
        ReduceOp=types.SimpleNamespace(AVG="avg", SUM="sum"),
        init_process_group=nothing,
        destroy_process_group=nothing,
        barrier=nothing,
        is_initialized=lambda: True,
        get_world_size=lambda: 1,
        get_rank=lambda: 0,
        broadcast=alike,
        reduce=alike,
        all_reduce=alike,
    )
    cuda = Module(
        "torch.cuda",
        is_available=lambda: True,
        set_device=nothing,
        current_device=lambda: 0,
        synchronize=nothing,
        get_device_properties=lambda *device: types.SimpleNamespace(multi_processor_count=1),
        max_memory_allocated=lambda: 0,
        max_memory_reserved=lambda: 0,
    )
    dynamo = types.SimpleNamespace(config=types.SimpleNamespace())
    stand_in = Torch(
        cuda=cuda,
        distributed=dist,
        _dynamo=dynamo,
        compile=uncompiled,
        empty=unpinned(torch.empty),
        empty_like=unpinned(torch.empty_like),
        _scaled_mm=scaled_product,
    )
    triton_kernels = Module(
        "triton_kernels",
        XXT=symmetric,
        XTX=symmetric_of_columns,
        ba_plus_cAA=quadratic,
        FusedLinearReLUSquareFunction=ReLUSquared,
        FusedSoftcappedCrossEntropy=CrossEntropy,
        transpose_add=transpose_add,
        transpose_copy=transpose_copy,
        # Of 8-bit copies, which nothing reads
        quantize_transpose_mlp_down_weights=nothing,
        reduce_mlp_activation_scales=nothing,
    )
    mix = functools.partial(mix_of_maps, shrink=shrink) if dc else no_mix
    dc_kernels = Module(
        "dc_triton_kernels", dc_attention_postonly_nodd_correction_add_base_triton=mix
    )
    interface = types.SimpleNamespace(flash_attn_varlen_func=attention_of_documents)
    kernels = Module(
        "kernels",
        get_kernel=lambda *names, **more: types.SimpleNamespace(flash_attn_interface=interface),
    )
    encoding = types.SimpleNamespace(_mergeable_ranks={token: i for i, token in enumerate(tokens)})
    return {
        "torch": stand_in,
        "torch.distributed": dist,
        "torch._dynamo": dynamo,
        "triton": Module("triton", __version__="none"),
        "triton_kernels": triton_kernels,
        "dc_triton_kernels": dc_kernels,
        "kernels": kernels,
        "tiktoken": Module("tiktoken", get_encoding=lambda name: encoding),
    }


def importer(stand_ins, real):
    """__import__ for code that is to find these modules."""

    def find(name, globals=None, locals=None, fromlist=(), level=0):
        if name in stand_ins and fromlist:
            return stand_ins[name]
        if name.split(".")[0] in stand_ins and not fromlist:
            return stand_ins[name.split(".")[0]]  # import a.b as c looks up b in a
        return real(name, globals, locals, fromlist, level)

    return find
