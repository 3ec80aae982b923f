"""Cross-entropy of softcapped logits, alone or together with the LM head, its gradient computed in
the forward pass.

    z' = a sigmoid((z + b) / c);   loss = sum over rows and k of w_k (logsumexp(z') - z'[y_k])
    dloss/dz_j = dz'_j/dz_j (W p_j - (sum of w_k with y_k = j)),   p = softmax(z'),  W = sum of the
    row's w_k linear_cross_entropy:  z = h w^T,   dh = dz w,   dw = dz^T h sampled softmax: z'_j +
    log m for the columns j that each stand for m tokens; sample_vocabulary chooses them

z: (N, V) logits; y: (N, K) targets, K of them per row (multi-token prediction), each of which can
be ignored. The cap keeps logits in (0, a), which steadies training and makes the maximum pass of
logsumexp unnecessary: shifted by a / 2, exp stays in fp32's range as long as a / 2 + log V < 80.
Beyond that, and without a cap, the maximum is taken along.

Minimum bytes: 2 N V read, 2 N V written (N V in e5m2) for bf16 logits; the head's products, three,
2 N V C FLOPs each. Two kernels, one of which a table picks for a chip:
    two-pass  Triton, everywhere. A row is read for the sum of exp and read again for the gradient,
              the second time from
              L2, if what all the chip's rows in flight take fits there: many warps to a row, so few
              rows in flight.
    resident  Gluon, compute capability 9.0 and newer. The row stays in shared memory, two blocks to
    an SM.
Everything is fp32 between load and store. bf16 logits that need a gradient go through the
hardware's tanh (relative
error 2^-11, below the logits' own rounding); all others, and validation, through an fp32 sigmoid.

Source: Gemma 2's tanh softcap (a tanh is a sigmoid of twice the argument), in the record's
asymmetric form 23 sigmoid((z + 5) / 7.5) (modded-nanogpt record 54); its multi-token targets (53),
e5m2 gradients (67), and the row in shared memory with loss and gradient in one kernel (79).
Gradient in the forward pass, and the target's column computed apart because p - 1 cancels:
Liger-Kernel. The head as one op of three plain products: see linear_cross_entropy. Sampled softmax:
Bengio and Senecal 2008; with the batch's own targets as candidates, Jean et al., arXiv:1412.2007.
"""

import math
import types
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .fp8 import E4M3, E5M2, dynamic_scale, fp8_matmul, quantize, to_fp8, transpose_copy
from .launch import INTERPRETED, as_rows, cast, for_chip, runs_triton, sm_count, tl, triton
from .op import Op, declare

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy

    gl_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # Triton 3.7, 3.6
except ImportError:
    gluon = types.SimpleNamespace(jit=lambda fn: fn)

# chip -> kernel, logits of a step, warps to a row. 90 is the fastest of 15 tried on an H200 (49,152
# rows of 50,304, e5m2 gradients): 2.36 ms, the best two-pass 2.99. Others are not measured:
# registers allow an A100 2 or 3 rows of 100 kB to an SM, which leaves half of L2 to the gradients
# on their way out; L40S and B200 have the L2 for more.
CONFIG = {
    80: ("two-pass", 8192, 16),
    89: ("two-pass", 4096, 16),
    90: ("resident", 4096, 8),
    100: ("two-pass", 4096, 16),
}


def softcap_cross_entropy_reference(
    logits, targets, *, cap, target_weights=None, sampled=None, ignore_index=-100, grad_scale=1.0
):
    """softcap_cross_entropy in plain PyTorch, which torch.compile fuses; grad_scale changes
    nothing here."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if cap is not None:
        a, b, c = sigmoid_cap(cap)
        z = a * torch.sigmoid((z + b) / c)
    if sampled is not None:
        z = z + stands_for(sampled, z.size(1))
    losses = [
        F.cross_entropy(z, y, ignore_index=ignore_index, reduction="sum")
        for y in columns(targets).unbind(1)
    ]
    if target_weights is not None:
        losses = [w * loss for w, loss in zip(target_weights.unbind(0), losses)]
    return sum(losses)


def linear_cross_entropy_reference(
    h,
    w,
    targets,
    *,
    cap,
    target_weights=None,
    sampled=None,
    ignore_index=-100,
    grad_scale=1.0,
    fp8=None,
):
    """linear_cross_entropy in plain PyTorch; never in fp8."""
    return softcap_cross_entropy_reference(
        F.linear(h, w),
        targets,
        cap=cap,
        target_weights=target_weights,
        sampled=sampled,
        ignore_index=ignore_index,
    )


def linear_cross_entropy_in_pytorch(
    h,
    w,
    targets,
    *,
    cap,
    target_weights=None,
    sampled=None,
    ignore_index=-100,
    grad_scale=1.0,
    fp8=None,
):
    """linear_cross_entropy with the gradient in the forward pass in plain PyTorch, for
    torch.compile on a CPU, which cannot fuse what is inside an op; never in fp8, and grad_scale
    changes nothing here.

    Compiled, the loss of 4,096 rows of 1,536 bf16 logits and its gradient take 2.7 ms on 2 cores of
    an AMD EPYC, the reference's 8.7; other lengths were not measured. Not for GPUs, where exps in
    fp32 would go through memory.
    """
    if not torch.is_grad_enabled():
        return linear_cross_entropy_reference(
            h,
            w,
            targets,
            cap=cap,
            target_weights=target_weights,
            sampled=sampled,
            ignore_index=ignore_index,
        )
    return _LinearInPyTorch.apply(
        h, w, targets, target_weights, sampled, sigmoid_cap(cap), ignore_index
    )


def softcap_cross_entropy(
    logits, targets, *, cap, target_weights=None, sampled=None, ignore_index=-100, grad_scale=1.0
):
    """Summed loss, an fp32 scalar.

    logits: (N, V) fp32, bf16 or fp16. targets: (N,) or (N, K) int64, ignore_index where not
    counted; any other number outside 0..V-1 makes the loss NaN (off the GPU: an error).
    target_weights: (K,) fp32 or None (ones); it gets no gradient. cap: (a, b, c) for a sigmoid((z +
    b) / c); a number s for s tanh(z / s); None for none. sampled: (2,) fp32 or None: the first
    column that stands for more than one token, as all after it, and the logarithm of how many;
    targets are columns before it. It gets no gradient.

    If logits require grad, the gradient is computed right away, for an upstream gradient of
    grad_scale. Give the one that will come (1 / n_tokens for a mean): backward then has nothing to
    do. For any other it scales the gradient. Under torch.compile, backward copies the gradient
    first; linear_cross_entropy never does.
    """
    check(logits, targets, target_weights, grad_scale)
    wanted = torch.is_grad_enabled() and logits.requires_grad
    return _softcap_cross_entropy(
        logits, targets, target_weights, sampled, sigmoid_cap(cap), ignore_index, grad_scale, wanted
    )[0]


def linear_cross_entropy(
    h,
    w,
    targets,
    *,
    cap,
    target_weights=None,
    sampled=None,
    ignore_index=-100,
    grad_scale=1.0,
    fp8=None,
):
    """softcap_cross_entropy(h @ w.T, ...): the LM head and its loss, with one buffer for logits and
    their gradient.

    h: (N, C), w: (V, C), same dtype; the rest as in softcap_cross_entropy. An upstream gradient
    other than grad_scale is applied to dh and dw, which are small. Without gradients, the logits
    live until the loss is known.

    fp8: None, or (h_scale, w_scale, logits_gradient_scale), numbers or 0-d fp32 tensors with value
    = fp8 number times scale: h and w in e4m3, the gradient of the logits in e5m2 (so its scale has
    to suit grad_scale), all three products in fp8. Raises ValueError unless V, C and, for
    gradients, N are multiples of 16.

    No chunks: at C = 768 the products dominate, and adding up dw over chunks costs more than logits
    take memory.
    """
    if h.dim() != 2 or w.dim() != 2 or h.size(1) != w.size(1):
        raise ValueError(
            f"linear_cross_entropy: h {tuple(h.shape)}, w {tuple(w.shape)}; expected (N, C), (V, C)"
        )
    check(h, targets, target_weights, grad_scale)
    wanted = torch.is_grad_enabled() and (h.requires_grad or w.requires_grad)
    scales = [None] * 3
    if fp8 is not None:
        if w.size(0) % 16 or w.size(1) % 16 or wanted and h.size(0) % 16:
            raise ValueError(
                f"linear_cross_entropy: fp8 needs multiples of 16; h {tuple(h.shape)}, w {tuple(w.shape)}"
            )
        # filled on the device: copying a number there would synchronise
        scales = [
            s
            if isinstance(s, torch.Tensor)
            else torch.full((), s, dtype=torch.float32, device=h.device)
            for s in fp8
        ]
    return _linear_cross_entropy(
        h,
        w,
        targets,
        target_weights,
        sampled,
        *scales,
        sigmoid_cap(cap),
        ignore_index,
        grad_scale,
        wanted,
    )[0]


def fp8_linear_cross_entropy(h, w, targets, *, cap, target_weights=None, sampled=None):
    """linear_cross_entropy in fp8 on RMS-normalised h, with scales of its own: h cannot pass
    sqrt(C), w goes by its largest, and with an upstream gradient applied afterwards that of a
    logit cannot pass the slope of the cap times the sum of the target weights, for which 4
    leaves room (a / 4c = 0.8 in the record's cap). Without gradients, in h's dtype."""
    fp8 = None
    if torch.is_grad_enabled():
        fp8 = h.size(1) ** 0.5 / 448, dynamic_scale(w), 4 / 57344
    return linear_cross_entropy(
        h, w, targets, cap=cap, target_weights=target_weights, sampled=sampled, fp8=fp8
    )


def sample_vocabulary(targets, n_vocab, n, seed, ignore_index=-100):
    """What a sampled softmax chooses among: the tokens that are targets, and others at random, n in
    all.

    targets: (...) int64, seed: 0-d int64 -> tokens (n,), targets as indices of those, and `sampled`
    for the losses above. The sum of exp over the vocabulary is right on average, if fewer than n
    tokens are targets: those stand for themselves, each other one for its share of all that are no
    target. (The loss, its logarithm, is a little too low.) Otherwise n random ones of the targets
    are all there is, and other targets become ignore_index. The same targets and seed give the same
    choice.
    """
    device, token = targets.device, torch.where(targets == ignore_index, n_vocab, targets)
    wanted = torch.zeros(n_vocab + 1, dtype=torch.bool, device=device).index_fill(
        0, token.flatten(), True
    )[:-1]
    order = torch.arange(n_vocab, device=device) + seed
    for _ in range(2):  # a hash: no generator, whose state a checkpoint would have to keep
        order = (order ^ (order >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    chosen = (order + (wanted.long() << 32)).topk(n).indices
    first = wanted.sum()
    sampled = torch.stack(
        [first.float(), ((n_vocab - first) / (n - first).clamp(min=1)).clamp(min=1).log()]
    )
    place = torch.full((n_vocab + 1,), ignore_index, device=device)
    place = place.index_copy(0, chosen, torch.arange(n, device=device))
    return chosen, place[token], sampled


def stands_for(sampled, n):
    """-> (n,) fp32: what to add to capped logits, by column."""
    first, log_many = sampled.unbind(0)
    return torch.where(torch.arange(n, device=sampled.device) < first, 0.0, log_many)


def sigmoid_cap(cap):
    """(a, b, c), s or None -> [a, b, c] or None. s tanh(z / s) is 2s sigmoid(2z / s) - s; the -
    s changes no loss."""
    if cap is None:
        return None
    a, b, c = cap if isinstance(cap, Sequence) else (2 * cap, 0, cap / 2)
    if c == 0:
        raise ValueError(f"softcap {cap}: its last number divides and cannot be 0")
    return [float(a), float(b), float(c)]


def columns(targets):
    return targets if targets.dim() == 2 else targets[:, None]


def check(x, targets, target_weights, grad_scale):
    if (
        x.dim() != 2
        or targets.dim() not in (1, 2)
        or len(targets) != len(x)
        or targets.dtype != torch.int64
    ):
        raise ValueError(
            f"cross-entropy: targets have to be int64, (N,) or (N, K), one row for each of the {len(x)}; "
            f"got {tuple(targets.shape)} {targets.dtype} for {tuple(x.shape)}"
        )
    if target_weights is not None and target_weights.shape != columns(targets).shape[1:]:
        raise ValueError(
            f"cross-entropy: target_weights {tuple(target_weights.shape)}, targets {tuple(targets.shape)}"
        )
    if grad_scale == 0:
        raise ValueError("cross-entropy: grad_scale 0 would lose the gradient")


# --- kernels


@triton.jit
def softcap(z, a, b, c, CAP: tl.constexpr, FAST: tl.constexpr):
    """z', shifted into (-a/2, a/2), and the slope dz'/dz."""
    if not CAP:
        return z, tl.full((1,), 1.0, tl.float32)
    elif FAST:
        u = (z + b) * (0.5 / c)
        t = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )
        return t * (0.5 * a), (0.25 * a / c) * (1 - t * t)
    else:
        p = 1 / (1 + tl.exp2((z + b) * (-1.4426950408889634 / c)))
        return (p - 0.5) * a, (a / c) * (p * (1 - p))


@triton.jit
def to_gradient(x, dtype: tl.constexpr):
    return to_fp8(x, dtype) if dtype == tl.float8e5 else cast(x, dtype)


@triton.jit
def softcap_cross_entropy_kernel(
    logits,
    targets,
    weights,
    sampled,
    losses,
    dlogits,
    fp8_scale,
    stride_z,
    stride_y,
    stride_k,
    stride_d,
    ignore_index,
    scale,
    a,
    b,
    c,
    V: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CAP: tl.constexpr,
    MAXIMUM: tl.constexpr,
    FAST: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    # z' in powers of two from the start, otherwise as it is until the maximum is taken off, exactly
    if not MAXIMUM:
        a *= LOG2E
        scale /= LOG2E
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride_z
    k = tl.arange(0, BLOCK_K)
    y = tl.load(targets + row * stride_y + k * stride_k, k < K, ignore_index)
    counted = y != ignore_index
    w = tl.where(
        counted,
        tl.load(weights + k, k < K, 0.0).to(tl.float32) if weights is not None else 1.0,
        0.0,
    )
    total = tl.sum(w)
    z_y = tl.load(logits + y, counted & (y >= 0) & (y < V), float("nan")).to(tl.float32)
    z_y, slope_y = softcap(z_y, a, b, c, CAP, FAST)
    if sampled is not None:
        first, log_many = tl.load(sampled), tl.load(sampled + 1)
        if not MAXIMUM:
            log_many *= LOG2E

    KEEP: tl.constexpr = "evict_last" if GRADIENT else "evict_first"
    exps = tl.zeros((BLOCK,), tl.float32)
    largest = -1.0e38  # finite, so that a logit of -inf is harmless
    for start in range(0, V, BLOCK):
        col = start + tl.arange(0, BLOCK)
        z = tl.load(logits + col, col < V, 0.0, eviction_policy=KEEP).to(tl.float32)
        z, _ = softcap(z, a, b, c, CAP, FAST)
        if sampled is not None:
            z += tl.where(col < first, 0.0, log_many)
        z = tl.where(col < V, z, float("-inf"))
        if MAXIMUM:
            larger = tl.maximum(largest, tl.max(z))
            exps *= tl.exp2((largest - larger) * LOG2E)
            largest = larger
            z = (z - largest) * LOG2E
        exps += tl.exp2(z)
    lse = tl.log2(tl.sum(exps))
    if MAXIMUM:
        z_y = (z_y - largest) * LOG2E
    tl.store(losses + row, tl.sum(tl.where(counted, w * (lse - z_y), 0.0)) / LOG2E)

    if GRADIENT:
        dlogits += row * stride_d
        if fp8_scale is not None:
            scale /= tl.load(fp8_scale)
        # the targets' columns apart, where p - 1 has to be taken in fp32; a token can be the target
        # more than once
        w_y = tl.sum(tl.where(y[:, None] == y[None, :], w[None, :], 0.0), 1)
        g_y = (tl.exp2(z_y - lse) * total - w_y) * slope_y * scale
        tl.debug_barrier()  # dlogits may be logits: all threads have read the targets' logits
        for start in range(0, V, BLOCK):
            col = start + tl.arange(0, BLOCK)
            z = tl.load(logits + col, col < V, 0.0, eviction_policy="evict_first").to(tl.float32)
            z, slope = softcap(z, a, b, c, CAP, FAST)
            if sampled is not None:
                z += tl.where(col < first, 0.0, log_many)
            if MAXIMUM:
                z = (z - largest) * LOG2E
            g = tl.exp2(z - lse) * slope * (total * scale)
            tl.store(
                dlogits + col,
                to_gradient(g, dlogits.dtype.element_ty),
                col < V,
                eviction_policy="evict_first",
            )
        tl.debug_barrier()  # the targets' columns now, over what the loop has stored there
        y = tl.load(
            targets + row * stride_y + k * stride_k, k < K, -1
        )  # read again: cheaper than to keep
        tl.store(
            dlogits + y,
            to_gradient(g_y, dlogits.dtype.element_ty),
            (y != ignore_index) & (y >= 0) & (y < V),
        )


@gluon.jit
def resident_to_gradient(x, dtype: tl.constexpr):
    return (gl.minimum(gl.maximum(x, -57344.0), 57344.0) if dtype == gl.float8e5 else x).to(dtype)


@gluon.jit
def resident_cross_entropy_kernel(
    logits,
    targets,
    weights,
    sampled,
    losses,
    dlogits,
    fp8_scale,
    stride_z,
    stride_y,
    stride_k,
    stride_d,
    ignore_index,
    scale,
    a,
    b,
    c,
    V: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """As softcap_cross_entropy_kernel with CAP and FAST and without MAXIMUM, but the row is read
    once: copied to shared memory, all of it in flight at a time, and there replaced by tanh in
    fp16, which is as exact as tanh.approx."""
    LOG2E: tl.constexpr = 1.4426950408889634
    layout: tl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])  # 16 bytes a thread
    few: tl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [gl.num_warps(), 1], [1, 0])
    shared: tl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    row = gl.program_id(0).to(gl.int64)
    logits += row * stride_z
    lanes = gl.arange(0, BLOCK, layout)
    # apart, so that the compiler sees that writing one cannot touch another, and needs fewer
    # barriers
    chunks = ()
    for i in gl.static_range(CHUNKS):
        chunks = chunks + (gl.allocate_shared_memory(gl.bfloat16, [BLOCK], shared),)
        async_copy.async_copy_global_to_shared(
            chunks[i], logits + i * BLOCK + lanes, i * BLOCK + lanes < V
        )
        async_copy.commit_group()

    k, k_ = (
        gl.arange(0, BLOCK_K, gl.SliceLayout(1, few)),
        gl.arange(0, BLOCK_K, gl.SliceLayout(0, few)),
    )
    y = gl.load(targets + row * stride_y + k * stride_k, k < K, ignore_index)
    counted, inside = y != ignore_index, (y != ignore_index) & (y >= 0) & (y < V)
    w = gl.where(
        counted,
        gl.load(weights + k, k < K, 0.0).to(gl.float32) if weights is not None else 1.0,
        0.0,
    )
    total = gl.sum(w, 0)
    u_y = (gl.load(logits + y, inside, float("nan")).to(gl.float32) + b) * (0.5 / c)
    t_y = gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [u_y], dtype=gl.float32, is_pure=True, pack=1
    )
    t_y = t_y.to(gl.float16).to(gl.float32)
    height = 0.5 * LOG2E * a
    if sampled is not None:
        first, log_many = gl.load(sampled), gl.load(sampled + 1) * LOG2E

    exps = gl.zeros([BLOCK], gl.float32, layout)
    for i in gl.static_range(CHUNKS):
        async_copy.wait_group(CHUNKS - 1 - i)
        u = (chunks[i].load(layout).to(gl.float32) + b) * (0.5 / c)
        t = gl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=gl.float32, is_pure=True, pack=1
        )
        rounded = t.to(gl.float16)
        chunks[i]._reinterpret(gl.float16, [BLOCK], shared).store(rounded)
        z = rounded.to(gl.float32) * height
        if sampled is not None:
            z += gl.where(i * BLOCK + lanes < first, 0.0, log_many)
        exps += gl.where(i * BLOCK + lanes < V, gl.exp2(z), 0.0)
    lse = gl.log2(gl.sum(exps, 0))
    gl.store(losses + row, gl.sum(gl.where(counted, w * (lse - t_y * height), 0.0), 0) / LOG2E)

    if GRADIENT:
        dlogits += row * stride_d
        if fp8_scale is not None:
            scale /= gl.load(fp8_scale)
        factor = 0.25 * a / c * scale
        for i in gl.static_range(CHUNKS):
            t = chunks[i]._reinterpret(gl.float16, [BLOCK], shared).load(layout).to(gl.float32)
            z = t * height - lse
            if sampled is not None:
                z += gl.where(i * BLOCK + lanes < first, 0.0, log_many)
            g = gl.exp2(z) * (1 - t * t) * (total * factor)
            g = resident_to_gradient(g, dlogits.dtype.element_ty)
            gl.store(dlogits + i * BLOCK + lanes, g, i * BLOCK + lanes < V)
        y_ = gl.load(targets + row * stride_y + k_ * stride_k, k_ < K, ignore_index)
        w_ = gl.convert_layout(w, gl.SliceLayout(0, few))
        w_y = gl.sum(
            gl.where(gl.expand_dims(y, 1) == gl.expand_dims(y_, 0), gl.expand_dims(w_, 0), 0.0), 1
        )
        g_y = (gl.exp2(t_y * height - lse) * total - w_y) * (1 - t_y * t_y) * factor
        gl_barrier()
        gl.store(dlogits + y, resident_to_gradient(g_y, dlogits.dtype.element_ty), inside)


@triton.jit
def scale_kernel(x, upstream, expected, n, BLOCK: tl.constexpr):
    """x *= upstream / expected, or nothing at all where the two agree to the last bits of fp32."""
    factor = tl.load(upstream).to(tl.float32) / expected
    if not tl.abs(factor - 1) <= 3e-7:  # also where it is NaN
        for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(n, BLOCK), tl.num_programs(0)):
            i = block * BLOCK + tl.arange(0, BLOCK)
            v = tl.load(x + i, i < n).to(tl.float32)
            tl.store(x + i, cast(v * factor, x.dtype.element_ty), i < n)


def launch_cross_entropy(
    logits,
    targets,
    target_weights,
    sampled,
    cap,
    ignore_index,
    grad_scale,
    dlogits,
    fp8_scale=None,
    config=None,
):
    """Rows -> losses (N,) fp32. dlogits: where the gradient goes, may be logits itself, or None.

    config: as in CONFIG, to measure others. What the resident kernel cannot do falls to the other.
    """
    N, V = logits.shape
    targets, K = columns(targets), columns(targets).size(1)
    target_weights = None if target_weights is None else target_weights.contiguous()
    losses = logits.new_empty(N, dtype=torch.float32)
    kernel, block, warps = config or for_chip(CONFIG, logits)
    a, b, c = cap or (0.0, 0.0, 1.0)
    maximum = cap is None or abs(a) / 2 + math.log(V) > 80
    gradient = dlogits is not None
    fast = logits.dtype == torch.bfloat16 and gradient and not INTERPRETED
    if N == 0:
        return losses
    out = dlogits if gradient else losses
    arguments = (
        logits,
        targets,
        target_weights,
        sampled,
        losses,
        out,
        fp8_scale,
        logits.stride(0),
        *targets.stride(),
        out.stride(0),
        ignore_index,
        grad_scale,
        a,
        b,
        c,
        V,
        K,
        triton.next_power_of_2(K),
    )
    aligned = all(
        x.stride(0) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 for x in (logits, out)
    )
    if kernel == "resident" and fast and not maximum and aligned and V % 16 == 0 and V <= 110_000:
        resident_cross_entropy_kernel[N,](
            *arguments, gradient, block, triton.cdiv(V, block), num_warps=warps
        )
    else:
        block = min(block, triton.next_power_of_2(V))
        softcap_cross_entropy_kernel[N,](
            *arguments,
            cap is not None,
            maximum,
            fast,
            gradient,
            block,
            num_warps=min(warps, max(1, block // 256)),
        )
    return losses


def launch_scale(x, upstream, expected):
    """x, contiguous, times upstream / expected, in place."""
    if x.numel():
        programs = min(triton.cdiv(x.numel(), 4096), 8 * sm_count(x))
        scale_kernel[programs,](x, upstream, expected, x.numel(), 4096, num_warps=8)


# --- what a CPU computes


def cross_entropy_in_pytorch(
    logits, targets, target_weights, sampled, cap, ignore_index, grad_scale, wanted
):
    """-> loss, gradient of the logits in at least fp32 (None unless wanted).

    One exp for a logit, which serves loss and gradient. The maximum of bf16 logits is taken in
    bf16: half the time.
    """
    z, slope, V = logits.to(torch.promote_types(logits.dtype, torch.float32)), 1, logits.size(1)
    if cap is not None:
        a, b, c = cap
        p = torch.sigmoid((z + b) / c)
        z, slope = a * p, a / c * p * (1 - p)
    most = (logits if cap is None else z).amax(1, keepdim=True).to(z.dtype)
    if sampled is not None:
        z = z + stands_for(sampled, V)
    targets = columns(targets)
    counted = targets != ignore_index
    w = counted.to(z.dtype) * (1.0 if target_weights is None else target_weights)
    targets = targets.where(counted, 0)
    target = z.gather(1, targets) - most
    e = (z - most).exp_()
    del z
    total = e.sum(1, keepdim=True)
    loss = (w * (total.log() - target)).sum()
    if not wanted:
        return loss, None
    g = e.mul_(w.sum(1, keepdim=True) / total)
    if torch.compiler.is_compiling():  # in the same loop; a scatter would need one of its own
        for y, weight in zip(targets.split(1, 1), w.split(1, 1)):
            g = torch.where(torch.arange(V, device=y.device) == y, g - weight, g)
    else:
        g.scatter_add_(1, targets, -w)
    return loss, g.mul_(slope * grad_scale)


class _LinearInPyTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, w, targets, target_weights, sampled, cap, ignore_index):
        loss, dlogits = cross_entropy_in_pytorch(
            F.linear(h, w), targets, target_weights, sampled, cap, ignore_index, 1.0, wanted=True
        )
        ctx.save_for_backward(dlogits.to(h.dtype), h, w)
        return loss.to(torch.promote_types(h.dtype, torch.float32))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss):
        dlogits, h, w = ctx.saved_tensors
        return (dlogits @ w * dloss).to(h.dtype), (dlogits.t() @ h * dloss).to(w.dtype), *[None] * 5


# --- ops


@torch.library.custom_op("stopwatch::softcap_cross_entropy", mutates_args=())
def _softcap_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    target_weights: torch.Tensor | None,
    sampled: torch.Tensor | None,
    cap: Sequence[float] | None,
    ignore_index: int,
    grad_scale: float,
    wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> loss, gradient of the logits for an upstream gradient of grad_scale (empty unless
    wanted)."""
    if runs_triton(logits):
        dlogits = (
            torch.empty_like(logits, memory_format=torch.contiguous_format) if wanted else None
        )
        loss = launch_cross_entropy(
            as_rows(logits),
            targets,
            target_weights,
            sampled,
            cap,
            ignore_index,
            grad_scale,
            dlogits,
        ).sum()
    else:
        loss, dlogits = cross_entropy_in_pytorch(
            logits, targets, target_weights, sampled, cap, ignore_index, grad_scale, wanted
        )
    return loss.float(), dlogits.to(logits.dtype) if wanted else logits.new_empty(0)


@_softcap_cross_entropy.register_fake
def _(logits, targets, target_weights, sampled, cap, ignore_index, grad_scale, wanted):
    return logits.new_empty((), dtype=torch.float32), logits.new_empty(
        logits.shape if wanted else 0
    )


@torch.library.custom_op("stopwatch::scale_gradient", mutates_args={"x"})
def _scale_gradient(x: torch.Tensor, upstream: torch.Tensor, expected: float) -> None:
    if runs_triton(x):
        launch_scale(x, upstream, expected)
    else:
        x.mul_(upstream / expected)


@_scale_gradient.register_fake
def _(x, upstream, expected):
    pass


def _save(ctx, inputs, output):
    ctx.grad_scale = inputs[-2]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(
        False
    )  # or autograd makes gigabytes of zeros, as the gradient of dlogits
    ctx.save_for_backward(output[1])


def _backward(ctx, dloss, _):
    """Hand out the saved gradient itself, scaled in place where the upstream gradient is not the
    expected one.

    That is safe if this is the only time: nobody else has seen the tensor, and autograd is about to
    drop it. A copy is made if the graph is kept (retain_graph, create_graph), since backward can
    come again and the receiver may by then have changed what it got; and under torch.compile, which
    traces with tensors of its own type, and whose graphs may not write to what they are given.
    """
    (dlogits,) = ctx.saved_tensors
    if torch._C._autograd._get_current_graph_task_keep_graph() or type(dlogits) is not torch.Tensor:
        dlogits = dlogits.clone()
    _scale_gradient(dlogits, dloss, ctx.grad_scale)
    return dlogits, *[None] * 7


_softcap_cross_entropy.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("stopwatch::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    h: torch.Tensor,
    w: torch.Tensor,
    targets: torch.Tensor,
    target_weights: torch.Tensor | None,
    sampled: torch.Tensor | None,
    h_scale: torch.Tensor | None,
    w_scale: torch.Tensor | None,
    g_scale: torch.Tensor | None,
    cap: Sequence[float] | None,
    ignore_index: int,
    grad_scale: float,
    wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> loss, gradient of the logits, and in fp8 h^T and w^T (the last three empty where not
    wanted)."""
    if fp8 := h_scale is not None:
        (q_h, h_t), (q_w, w_t) = (
            quantize(x, s, E4M3, transpose=wanted) for x, s in ((h, h_scale), (w, w_scale))
        )
        logits = fp8_matmul(q_h, q_w, h_scale, w_scale, h.dtype, fast=True)
    else:
        h_t = w_t = None
        logits = h @ w.t()
    if runs_triton(h):
        dlogits = (
            (torch.empty_like(logits, dtype=E5M2) if fp8 else logits) if wanted else None
        )  # in place if it can be
        loss = launch_cross_entropy(
            logits,
            targets,
            target_weights,
            sampled,
            cap,
            ignore_index,
            grad_scale,
            dlogits,
            g_scale,
        ).sum()
    else:
        loss, dlogits = cross_entropy_in_pytorch(
            logits, targets, target_weights, sampled, cap, ignore_index, grad_scale, wanted
        )
        if wanted:
            dlogits = quantize(dlogits, g_scale, E5M2)[0] if fp8 else dlogits.to(h.dtype)
    return loss.float(), *(h.new_empty(0) if x is None else x for x in (dlogits, h_t, w_t))


@_linear_cross_entropy.register_fake
def _(
    h,
    w,
    targets,
    target_weights,
    sampled,
    h_scale,
    w_scale,
    g_scale,
    cap,
    ignore_index,
    grad_scale,
    wanted,
):
    loss, fp8 = h.new_empty((), dtype=torch.float32), h_scale is not None
    dlogits = h.new_empty(
        (len(h), len(w)) if wanted else 0, dtype=E5M2 if fp8 and wanted else h.dtype
    )
    if not fp8:
        return loss, dlogits, h.new_empty(0), h.new_empty(0)
    return loss, dlogits, *(x.new_empty(x.shape[::-1] if wanted else 0, dtype=E4M3) for x in (h, w))


@torch.library.custom_op("stopwatch::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(
    dloss: torch.Tensor,
    dlogits: torch.Tensor,
    h: torch.Tensor,
    w: torch.Tensor,
    h_scale: torch.Tensor | None,
    w_scale: torch.Tensor | None,
    g_scale: torch.Tensor | None,
    grad_scale: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """h, w: as they are, or in fp8 transposed -> dh, dw."""
    if h_scale is not None:
        g_scale = g_scale * (dloss / grad_scale)  # the products apply it
        return (
            fp8_matmul(dlogits, w, g_scale, w_scale, dtype),
            fp8_matmul(transpose_copy(dlogits), h, g_scale, h_scale, dtype),
        )
    dh, dw = dlogits @ w, dlogits.t() @ h
    for x in (dh, dw):
        _scale_gradient(x, dloss, grad_scale)
    return dh, dw


@_linear_cross_entropy_backward.register_fake
def _(dloss, dlogits, h, w, h_scale, w_scale, g_scale, grad_scale, dtype):
    C = h.size(1) if h_scale is None else h.size(0)
    return tuple(dlogits.new_empty(rows, C, dtype=dtype) for rows in dlogits.shape)


def _save_linear(ctx, inputs, output):
    h, w, _, _, _, *scales, _, _, ctx.grad_scale, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtype = h.dtype
    ctx.save_for_backward(output[1], *((h, w) if scales[0] is None else output[2:]), *scales)


def _backward_linear(ctx, dloss, *_):
    """The saved tensors are only read, so backward can come as often as it likes."""
    return *_linear_cross_entropy_backward(dloss, *ctx.saved_tensors, ctx.grad_scale, ctx.dtype), *[
        None
    ] * 10


_linear_cross_entropy.register_autograd(_backward_linear, setup_context=_save_linear)


def _example(draw, _):
    h = draw(64, 128)
    targets = torch.arange(64, device=h.device) * 13 % 1024
    return [h, draw(1024, 128) / 11], dict(targets=targets, cap=(23.0, 5.0, 7.5))


declare(
    Op(
        "linear_cross_entropy",
        triton=linear_cross_entropy,
        reference=linear_cross_entropy_reference,
        example=_example,
        faster_on=(90,),
        on_cpu=linear_cross_entropy_in_pytorch,
        new_fp8=lambda: fp8_linear_cross_entropy,
    )
)
