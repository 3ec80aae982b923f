"""The cross-entropy of rows of bf16 logits that stay in shared memory, and its gradient: Gluon.

For compute capability 9.0 and newer. It does what softcap_cross_entropy_kernel does with a cap, by
the hardware's tanh and without a maximum, but reads each row once: the row is copied to shared
memory, all of it in flight at a time, and there replaced by its tanh in fp16, which is as exact as
tanh.approx. Two blocks fit an SM at V = 50,304.

Source: the row in shared memory with loss and gradient in one kernel, modded-nanogpt's record 79
(there in CUDA C++).
"""

import types

from .launch import tl

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.ampere import async_copy

    gl_barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # Triton 3.7, 3.6
except ImportError:
    gluon = types.SimpleNamespace(jit=lambda fn: fn)


@gluon.jit
def resident_to_gradient(x, dtype: tl.constexpr):
    return (gl.minimum(gl.maximum(x, -57344.0), 57344.0) if dtype == gl.float8e5 else x).to(dtype)


@gluon.jit
def resident_cross_entropy_kernel(
    logits,  # (N, V)
    targets,  # (N, K) int64
    weights,  # (K,) fp32 or None
    sampled,  # (2,) fp32 or None
    losses,  # (N,) out, fp32
    dlogits,  # (N, V) out, with GRADIENT
    fp8_scale,  # () fp32 or None: dlogits is divided by it
    stride_z,
    stride_y,
    stride_k,
    stride_d,
    ignore_index,
    scale,  # the upstream gradient
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
    """One row a program. See the module's docstring."""
    LOG2E: tl.constexpr = 1.4426950408889634
    layout: tl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])  # 16 bytes a thread
    few: tl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [gl.num_warps(), 1], [1, 0])
    shared: tl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    row = gl.program_id(0).to(gl.int64)
    logits += row * stride_z
    lanes = gl.arange(0, BLOCK, layout)
    # The row on its way in; in chunks apart, so that the compiler sees that writing one cannot
    # touch another, and needs fewer barriers
    chunks = ()
    for i in gl.static_range(CHUNKS):
        chunks = chunks + (gl.allocate_shared_memory(gl.bfloat16, [BLOCK], shared),)
        async_copy.async_copy_global_to_shared(
            chunks[i], logits + i * BLOCK + lanes, i * BLOCK + lanes < V
        )
        async_copy.commit_group()

    # The row's targets and their tanh
    k = gl.arange(0, BLOCK_K, gl.SliceLayout(1, few))
    k_ = gl.arange(0, BLOCK_K, gl.SliceLayout(0, few))
    y = gl.load(targets + row * stride_y + k * stride_k, k < K, ignore_index)
    counted = y != ignore_index
    inside = counted & (y >= 0) & (y < V)
    w = gl.load(weights + k, k < K, 0.0).to(gl.float32) if weights is not None else 1.0
    w = gl.where(counted, w, 0.0)
    total = gl.sum(w, 0)
    u_y = (gl.load(logits + y, inside, float("nan")).to(gl.float32) + b) * (0.5 / c)
    t_y = gl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [u_y], dtype=gl.float32, is_pure=True, pack=1
    )
    t_y = t_y.to(gl.float16).to(gl.float32)
    height = 0.5 * LOG2E * a
    if sampled is not None:
        first = gl.load(sampled)
        log_many = gl.load(sampled + 1) * LOG2E

    # The sum of exp, chunk by chunk as they come in
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

    # The gradient, from the tanh; then the targets' columns over it
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
