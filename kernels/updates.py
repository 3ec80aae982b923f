"""Adam and Muon's updates, on bf16 weights with exact fp32 masters, or fp32 weights; pointwise parts in one pass each.

A weight p comes with a companion, what is missing from its fp32 master:

    p fp32    None: the weight is its own master
    p bf16    int16 `low`: bits of the master = (bits of p << 16) + low, with low in [-2^15, 2^15); p is then the
              nearest bf16 (halfway cases away from zero), and p with low is the master bit for bit
    p bf16    fp32, the whole master: for CPUs, where Inductor's loops over 16-bit integers are scalar

Minimum bytes per bf16 weight with bf16 gradients: Adam 26, nesterov 12, descend 10; with whole masters Adam 28 and
descend 12.
Plain PyTorch on flat tensors for torch.compile(fullgraph=True, dynamic=True), which makes one kernel of each; compiled,
hyperparameters are 0-d tensors, so that a new value compiles nothing. No autograd: call under torch.no_grad().
Sources: Adam (Kingma & Ba, arXiv:1412.6980); Muon (Jordan et al., 2024); 16 bits beside a bf16 weight as in
modded-nanogpt, but signed, so that the weight is its master rounded and not cut off.
"""

import torch

from .polar_express import polar_express


def split(master):
    """fp32 -> p bf16, low int16. Beyond bf16's largest value p is infinite, as rounding has it; all NaN become one."""
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


def adam_update(p, companion, grad, m, v, lr, beta1, beta2, eps, correction1, correction2):
    """Adam on flat tensors. m, v: fp32; correction1, correction2: 1 - beta**step, of beta1 and of beta2.

    Powers taken in here would be taken for every element: measured with Inductor on a CPU, twice the time.
    """
    g = grad.float()
    m.mul_(beta1).add_((1 - beta1) * g)
    v.mul_(beta2).add_((1 - beta2) * g * g)
    store(p, companion, join(p, companion) - lr * (m / correction1) / ((v / correction2).sqrt() + eps))


def nesterov(grad, m, momentum):
    """Add a gradient to the average m (fp32); returns the look-ahead average in the gradient's dtype. Flat tensors."""
    g = grad.float()
    m.mul_(momentum).add_((1 - momentum) * g)
    return ((1 - momentum) * g + momentum * m).to(grad.dtype)


def descend(p, companion, update, lr, shrink):
    """Step along `update`, with decoupled weight decay: master <- (1 - shrink) master - lr update. Flat tensors."""
    store(p, companion, join(p, companion) * (1 - shrink) - lr * update.float())


def muon_update(p, companion, grad, m, lr, shrink, momentum, orthogonalise=polar_express, nesterov=nesterov,
                descend=descend):
    """Muon on a batch of matrices (..., rows, cols), all contiguous; m: fp32.

    Momentum, orthogonalised; a tall matrix steps sqrt(rows / cols) times as far. The pointwise parts are arguments, so
    that a caller can hand in compiled ones: the products between them are faster eager.
    """
    # .data: compiled code would look at what a view is a view of
    flat_p, flat_c, flat_g, flat_m = (x if x is None else x.view(-1).data for x in (p, companion, grad, m))
    update = orthogonalise(nesterov(flat_g, flat_m, momentum).view(grad.shape))
    tall = max(1, grad.size(-2) / grad.size(-1)) ** 0.5
    descend(flat_p, flat_c, update.reshape(-1).data, lr * tall, shrink)
