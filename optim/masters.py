"""bf16 weights with exact fp32 masters, and the guarded step that all update rules end with.

A weight p comes with a companion, which holds what is missing from its fp32 master:

    p fp32    None: the weight is its own master
    p bf16    int16 `low`: bits of the master = (bits of p << 16) + low, low in [-2^15, 2^15).
              p is then the nearest bf16 (halfway cases away from zero), and p with low is the
              master bit for bit
    p bf16    fp32, the whole master: for CPUs, where Inductor's loops over 16-bit integers
              are scalar

The guard `ok` is a 0-d bool tensor on the weights' device. Where it is False, weights, companions
and moments keep every bit, whatever the gradient holds. True changes no bit of the result, and None
(or Python's True) is no guard. The choice is made in the pass that writes, so nothing waits for the
device.

Cautious decay takes shrink * w off a weight w only where the step goes towards zero as well. So it
never works against the gradient, and adds no minimum of its own to the loss's. Where there is no
step there is none (in the paper there is), so that rows of a table that no token has used yet keep
their weights.

Everything is plain PyTorch for torch.compile(fullgraph=True), which makes one kernel of each
pointwise function. Compiled, hyperparameters are 0-d tensors, so that a new value compiles nothing.
Tensors are flat, so that one kernel serves every shape, except where matrices or tables are named.
No autograd: call under torch.no_grad().

Sources: 16 bits beside a bf16 weight as in modded-nanogpt, but signed, so that the weight is its
master rounded and not cut off; cautious decay, Chen et al., arXiv:2510.12402.
"""

import torch


def split(master):
    """fp32 -> p bf16, low int16.

    Beyond bf16's largest value p is infinite, as rounding has it. All NaN become one.
    """
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
    """new if ok, else old, to the bit.

    Arithmetic would not do: 0 * nan is nan, and -0 + 0 is not -0.
    """
    if ok is None or ok is True:
        return new
    return torch.where(ok, new, old)


def average(x, beta, new, ok):
    """x <- beta x + new, if ok; without a guard in place, which spares eager runs two passes."""
    if ok is None or ok is True:
        x.mul_(beta).add_(new)
    else:
        x.copy_(torch.where(ok, x * beta + new, x))


def descend(p, companion, update, lr, shrink=None, scale=None, ok=None, factor=None):
    """Step along `update` with cautious decay: w <- w - lr update - shrink w [update w > 0]. Flat
    tensors.

    shrink: None is none. scale: of the update, from balance or row_scale; factor: (n, 1, 1), of lr
    and of shrink. With one of these the others are matrices too.
    """
    master = join(p, companion)
    update = update.float()
    if factor is not None:
        lr = lr * factor
        shrink = None if shrink is None else shrink * factor
    decayed = decay(master, update, shrink)
    step = update * (lr if scale is None else lr * scale)
    store(p, companion, choose(ok, decayed - step, master))


def decay(master, step, shrink):
    """The weights after cautious decay, for a step that is going to be taken off them."""
    if shrink is None:
        return master
    return torch.where(step * master > 0, master * (1 - shrink), master)
