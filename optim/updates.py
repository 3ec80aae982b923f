"""Adam, Muon and NorMuon on bf16 weights with exact fp32 masters, or fp32 weights; pointwise parts
in one pass each.

A weight p comes with a companion, what is missing from its fp32 master:

    p fp32    None: the weight is its own master
    p bf16    int16 `low`: bits of the master = (bits of p << 16) + low, with low in [-2^15, 2^15);
              p is then the
              nearest bf16 (halfway cases away from zero), and p with low is the master bit for bit
    p bf16    fp32, the whole master: for CPUs, where Inductor's loops over 16-bit integers are
    scalar

Minimum bytes per bf16 weight with bf16 gradients: Adam 26, by rows 12, nesterov 12, descend 10, and
2 for NorMuon's balance; with whole masters Adam 28, by rows 14 and descend 12. Decay and the guard
cost no bytes. The guard `ok` is a 0-d bool tensor on the weights' device. Where it is False,
weights, companions and moments keep every bit, whatever the gradient holds; True changes no bit of
the result, and None (or Python's True) is no guard. The choice is made in the pass that writes, so
nothing waits for the device.
Cautious decay takes shrink * w off a weight w only where the step goes towards zero as well. So it
never works against the gradient, and adds no minimum of its own to the loss's. Where there is no
step there is none (in the paper there is), so that rows of a table that no token has used yet keep
their weights.
Plain PyTorch for torch.compile(fullgraph=True), which makes one kernel of adam_update, nesterov and
descend each; compiled, hyperparameters are 0-d tensors, so that a new value compiles nothing. Flat
tensors, so that one kernel serves every shape, except where matrices or tables are named. No
autograd: call under torch.no_grad(). Sources: Adam (Kingma & Ba, arXiv:1412.6980), by rows as
Mudigere et al. have AdaGrad (arXiv:2104.05158); Muon (Jordan et al., 2024); NorMuon (Li et al.,
arXiv:2510.05491); cautious decay (Chen et al., arXiv:2510.12402); 16 bits beside a bf16 weight as
in modded-nanogpt, but signed, so that the weight is its master rounded and not cut off.
"""

import torch

from kernels.polar_express import polar_express
from kernels.symmetric_matmul import as_batch


def split(master):
    """fp32 -> p bf16, low int16. Beyond bf16's largest value p is infinite, as rounding has it;
    all NaN become one."""
    bits = torch.where(master.isnan(), 0x7FC00000, master.view(torch.int32))
    rounded = (bits + 0x8000) & -0x10000
    return rounded.view(torch.float32).to(torch.bfloat16), (bits - rounded).to(torch.int16)


def join(p, companion):
    """The fp32 master of p; may be p or the companion itself."""
    if companion is None:
        return p
    if companion.dtype == torch.float32:
        return companion
    return (p.float().view(torch.int32) + companion).view(torch.float32)


def store(p, companion, master):
    """Write p and its companion, so that join gives this fp32 master."""
    if companion is None:
        p.copy_(master)
    elif companion.dtype == torch.float32:
        companion.copy_(master)
        p.copy_(master)
    else:
        high, low = split(master)
        p.copy_(high)
        companion.copy_(low)


def new_companion(p):
    """Of fresh weights, which are their own masters."""
    if p.dtype == torch.float32:
        return None
    packed = p.dtype == torch.bfloat16 and p.is_cuda
    return torch.zeros_like(p, dtype=torch.int16) if packed else p.float()


def choose(ok, new, old):
    """new if ok, else old, to the bit; arithmetic would not do: 0 * nan is nan, and -0 + 0 is
    not -0."""
    return new if ok is None or ok is True else torch.where(ok, new, old)


def average(x, beta, new, ok):
    """x <- beta x + new, if ok; without a guard in place, which spares eager runs two passes."""
    if ok is None or ok is True:
        x.mul_(beta).add_(new)
    else:
        x.copy_(torch.where(ok, x * beta + new, x))


def adam_update(
    p, companion, grad, m, v, lr, beta1, beta2, eps, correction1, correction2, shrink=None, ok=None
):
    """Adam on flat tensors. m, v: fp32; correction1, correction2: 1 - beta**step, of beta1 and of
    beta2.

    shrink: cautious decay, w <- w - step - shrink w [step w > 0]; None and 0 are none.
    Powers taken in here would be taken for every element: measured with Inductor on a CPU, twice
    the time.
    """
    g, master = grad.float(), join(p, companion)
    average(m, beta1, (1 - beta1) * g, ok)
    average(v, beta2, (1 - beta2) * g * g, ok)
    step = lr * (m / correction1) / ((v / correction2).sqrt() + eps)
    decayed = (
        master if shrink is None else torch.where(step * master > 0, master * (1 - shrink), master)
    )
    store(p, companion, choose(ok, decayed - step, master))


def nesterov(grad, m, momentum, ok=None):
    """Add a gradient to the average m (fp32); returns the look-ahead average in the gradient's
    dtype. Flat tensors.

    If not ok, what it returns is of no use.
    """
    g = grad.float()
    average(m, momentum, (1 - momentum) * g, ok)
    return ((1 - momentum) * g + momentum * m).to(grad.dtype)


def new_second_moment(p):
    """NorMuon's v for matrices p (..., rows, cols): fp32 zeros, (..., rows, 1), or (..., 1, cols)
    if cols > rows.

    An orthogonal factor's rows are orthonormal if it is wide, its columns if it is tall: what
    differs in length, and is made alike, is the other side's. The paper takes rows always; by the
    shape as in modded-nanogpt.
    """
    rows, cols = p.shape[-2:]
    return p.new_zeros(
        *p.shape[:-2], *((rows, 1) if rows >= cols else (1, cols)), dtype=torch.float32
    )


def balance(update, v, beta2, ok=None):
    """NorMuon on matrices (..., rows, cols): average their mean squares into v; returns the scale
    for descend.

    That is 1 / sqrt(v), at most 1e5, times what keeps each matrix's Frobenius norm (so v needs no
    bias correction); finite for zeros. Apart from descend, since in one graph Inductor takes the
    roots anew for every few elements.
    """
    square = update.float().square().mean(-1 if v.size(-1) == 1 else -2, keepdim=True)
    average(v, beta2, (1 - beta2) * square, ok)
    scale = v.clamp_min(1e-10).rsqrt()
    before, after = (x.sum((-2, -1), keepdim=True) for x in (square, square * scale * scale))
    return scale * (before / after.clamp_min(1e-30)).sqrt()


def descend(p, companion, update, lr, shrink=None, scale=None, ok=None):
    """Step along `update` with cautious decay: w <- w - lr update - shrink w [update w > 0]. Flat
    tensors.

    shrink: None is none. scale: of the update, from balance or row_scale; the others are then
    matrices too.
    """
    master, update = join(p, companion), update.float()
    decayed = (
        master
        if shrink is None
        else torch.where(update * master > 0, master * (1 - shrink), master)
    )
    step = update * (lr if scale is None else lr * scale)
    store(p, companion, choose(ok, decayed - step, master))


def row_scale(grad, v, lr, beta2, eps, correction2, ok=None):
    """Average the mean square of each row of a table's gradient (rows, cols) into v (rows, 1),
    fp32; returns the scale for descend, Adam's step over the gradient. Apart from descend for
    the same reason as balance."""
    average(v, beta2, (1 - beta2) * grad.float().square().mean(-1, keepdim=True), ok)
    return lr / ((v / correction2).sqrt() + eps)


def row_update(
    p,
    companion,
    grad,
    v,
    lr,
    beta2,
    eps,
    correction2,
    shrink=None,
    ok=None,
    row_scale=row_scale,
    descend=descend,
):
    """Adam on a table (rows, cols), without momentum and with one second moment v (rows, 1) for a
    row.

    A row without a gradient keeps every bit, however soon after it had one. The parts are arguments
    as in muon_update.
    """
    descend(
        p, companion, grad, 1.0, shrink, row_scale(grad, v, lr, beta2, eps, correction2, ok), ok
    )


def muon_update(
    p,
    companion,
    grad,
    m,
    lr,
    momentum,
    v=None,
    beta2=0.9,
    shrink=None,
    ok=None,
    orthogonalise=polar_express,
    nesterov=nesterov,
    balance=balance,
    descend=descend,
):
    """Muon on a batch of matrices (..., rows, cols), all contiguous; m: fp32. NorMuon with v, from
    new_second_moment.

    Momentum, orthogonalised; a tall matrix steps sqrt(rows / cols) times as far. The pointwise
    parts are arguments, so that a caller can hand in compiled ones: the products between them are
    faster eager.
    """

    def view(x, flat=v is None):  # .data: compiled code would look at what a view is a view of
        return x if x is None else (x.reshape(-1) if flat else as_batch(x)).data

    update = orthogonalise(nesterov(view(grad, True), view(m, True), momentum, ok).view(grad.shape))
    scale = None if v is None else balance(view(update), view(v), beta2, ok)
    tall = max(1, grad.size(-2) / grad.size(-1)) ** 0.5
    descend(view(p), view(companion), view(update), lr * tall, shrink, scale, ok)


def gradient_report(grads):
    """Sum of squares of each gradient, (n,) fp32, in a pass over each (eager on a CPU, bf16 is
    copied to fp32 for it).

    Finite if and only if all of the gradient is, and its norm below 1.8e19 (the root of fp32's
    largest). In rows of 1,024 and then over rows: PyTorch's norm of 4e7 bf16 numbers at once,
    squared, was 0.6% short on a CPU.
    """

    def squares(x):
        return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square().sum()

    def total(g):
        rest = g.numel() % 1024
        rows, rest = g.split((len(g) - rest, rest))
        # not of nothing: with sizes unknown while compiling, that was not finite on a GPU (PyTorch
        # 2.11)
        parts = [squares(x) for x in (rows.view(-1, 1024), rest) if x.numel()]
        return sum(parts, g.new_zeros((), dtype=torch.float32))

    return torch.stack([total(g.reshape(-1)) for g in grads])
