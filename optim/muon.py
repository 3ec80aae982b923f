"""Muon and NorMuon on batches of matrices.

Minimum bytes per bf16 weight with a bf16 gradient: nesterov 12, descend 10 (12 with whole fp32
masters), and 2 for NorMuon's balance, besides the products in between. Sources: Muon (Jordan et
al., 2024); NorMuon (Li et al., arXiv:2510.05491).
"""

import dataclasses
import typing

import torch

from kernels.polar_express import polar_express
from kernels.symmetric_matmul import as_batch

from .masters import average, descend
from .rule import Rule


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


@dataclasses.dataclass(frozen=True)
class Muon(Rule):
    """Muon on the matrices of a bank (..., rows, cols); NorMuon on request.

    Whole matrices are shared out over the ranks. The momentum is the schedule's.
    """

    normuon: bool = False  # each neuron's part of the update is scaled to the same size
    orthogonalise: typing.Callable = polar_express

    pieces: typing.ClassVar[tuple] = (nesterov, balance, descend)

    def parts(self, whole):
        return whole.view(-1, *whole.shape[-2:])  # a single matrix is a bank of one

    def new_state(self, own):
        state = dict(m=torch.zeros_like(own, dtype=torch.float32))
        if self.normuon:
            state["v"] = new_second_moment(own)
        return state

    def state_bytes(self, p):
        # The momentum, and as much again for the products on the way: with it the whole estimate
        # was 3 to 6% above what gpt2-small took on an H200
        return 8 * p.numel()

    def update(self, w, companion, grad, state, turn):
        lr = self.lr * turn.lr_scale
        muon_update(
            w,
            companion,
            grad,
            state["m"],
            turn.scalar(lr),
            turn.scalar(turn.momentum),
            v=state.get("v"),
            shrink=self.shrink(lr, turn),
            ok=turn.ok,
            orthogonalise=self.orthogonalise,
            nesterov=turn.fast(nesterov),
            balance=turn.fast(balance),
            descend=turn.fast(descend),
        )
