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

from .masters import average, choose, descend
from .rule import Rule

BETA2 = 0.9  # of NorMuon's second moment


def nesterov(grad, m, momentum, ok=None):
    """Add a gradient to the average m (fp32); returns the look-ahead average in the gradient's
    dtype. Flat tensors.

    If not ok, what it returns is of no use.
    """
    g = grad.float()
    average(m, momentum, (1 - momentum) * g, ok)
    return ((1 - momentum) * g + momentum * m).to(grad.dtype)


def look_ahead(grad, m, momentum):
    """What nesterov() is going to return, without adding anything to m."""
    g = grad.float()
    return ((1 - momentum) * g + momentum * (momentum * m + (1 - momentum) * g)).to(grad.dtype)


def remember(grad, m, momentum, ok=None):
    """What nesterov() does to m."""
    average(m, momentum, (1 - momentum) * grad.float(), ok)


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
    beta2=BETA2,
    shrink=None,
    ok=None,
    orthogonalise=polar_express,
    nesterov=nesterov,
    balance=balance,
    descend=descend,
    groups=None,
    factor=None,
    prepared=None,
    remember=remember,
):
    """Muon on a batch of matrices (..., rows, cols), all contiguous; m: fp32. NorMuon with v, from
    new_second_moment.

    Momentum, orthogonalised; a tall matrix steps sqrt(rows / cols) times as far. The pointwise
    parts are arguments, so that a caller can hand in compiled ones: the products between them are
    faster eager. groups: [Group, ...] that all matrices (n, rows, cols) are divided into, with
    moments of their own instead of v; factor: (n, 1, 1) fp32, of each matrix's learning rate and
    decay; prepared: what directions() gave for the look-ahead average.
    """
    flat = v is None and factor is None

    def view(x, flat=flat):  # .data: compiled code would look at what a view is a view of
        return x if x is None else (x.reshape(-1) if flat else as_batch(x)).data

    if prepared is None:
        ahead = nesterov(view(grad, True), view(m, True), momentum, ok).view(grad.shape)
        update, moments = directions(ahead, groups, beta2, orthogonalise, balance)
    else:
        remember(view(grad, True), view(m, True), momentum, ok)
        update, moments = prepared
    scale = None
    if groups:
        keep_moments(groups, moments, ok)
    elif v is not None:
        scale = balance(view(update), view(v), beta2, ok)
    tall = shape_factor(grad)
    descend(view(p), view(companion), view(update), lr * tall, shrink, scale, ok, factor)


def shape_factor(x):
    """How much farther matrices (..., rows, cols) step than wide ones."""
    return max(1, x.size(-2) / x.size(-1)) ** 0.5


class Group(typing.NamedTuple):
    """Matrices of a bank that are orthogonalised alike."""

    index: torch.Tensor  # (k,) int64: which of those at hand
    heads: int  # along the rows of each, and every pair of heads is a matrix; 0: whole matrices
    v: torch.Tensor | None  # second moments: of all matrices at hand, those of others unused


def directions(ahead, groups, beta2, orthogonalise, balance):
    """Orthogonalise matrices (n, rows, cols) -> update of the same shape; and for groups, with
    their scale in it already, their new second moments: nothing is written but `ahead`."""
    if not groups:
        return orthogonalise(ahead), None
    moments = []
    for index, heads, v in groups:
        moment = None
        if len(index):
            part = ahead.index_select(0, index)
            if heads:
                part = head_pairs(part, heads)
            shape = part.shape
            part = orthogonalise(part.flatten(0, -3))
            if v is not None:
                moment = v.index_select(0, index)
                part = part * balance(part.data, moment.flatten(0, -3).data, beta2)
            part = part.view(shape)
            if heads:
                part = whole_matrices(part)
            ahead.index_copy_(0, index, part.to(ahead.dtype))
        moments.append(moment)
    return ahead, moments


def keep_moments(groups, moments, ok):
    """Write what directions() gave, if ok."""
    for group, moment in zip(groups, moments):
        if moment is not None:
            group.v.copy_(choose(ok, group.v.index_copy(0, group.index, moment), group.v))


def head_pairs(x, heads):
    """(n, heads d, cols) -> (n, heads / 2, 2 d, cols): heads h and h + heads / 2 together, as in
    paired layers."""
    n, rows, cols = x.shape
    d = rows // heads
    x = x.view(n, 2, heads // 2, d, cols)
    return x.transpose(1, 2).reshape(n, heads // 2, 2 * d, cols)


def whole_matrices(pairs):
    """What head_pairs() took apart: (n, heads / 2, 2 d, cols) -> (n, heads d, cols)."""
    return pairs.unflatten(2, (2, -1)).transpose(1, 2).flatten(1, 3)


@dataclasses.dataclass(frozen=True)
class Muon(Rule):
    """Muon on the matrices of a bank (..., rows, cols); NorMuon on request.

    Whole matrices are shared out over the ranks. The momentum is the schedule's. Banks repeat a
    pattern of matrices, such as Q, K, V, O: factors and paired are of the places in it.
    """

    normuon: bool = False  # each neuron's part of the update is scaled to the same size
    orthogonalise: typing.Callable = polar_express
    factors: tuple = ()  # of the learning rate, and of decay with it, by place
    decay_by_shape: bool = False  # a tall matrix decays as much more as it steps farther
    # By place, whether its rows are heads of which each pair is orthogonalised by itself
    paired: tuple = ()
    heads: int = 0

    prepares: typing.ClassVar[bool] = True
    pieces: typing.ClassVar[tuple] = (nesterov, balance, descend, look_ahead, remember)

    def parts(self, whole):
        return whole.view(-1, *whole.shape[-2:])  # a single matrix is a bank of one

    def new_state(self, own):
        state = dict(m=torch.zeros_like(own, dtype=torch.float32))
        if self.normuon:
            state["v"] = new_second_moment(own)
        if self.normuon and any(self.paired):
            state["v_pairs"] = new_second_moment(head_pairs(own, self.heads))
        return state

    def fixed(self, own, start):
        numbers = range(start, start + len(own))
        found = {}
        if self.factors:
            factors = [self.factors[i % len(self.factors)] for i in numbers]
            found["factor"] = torch.tensor(factors, device=own.device).view(-1, 1, 1)
        if any(self.paired):
            is_paired = [self.paired[i % len(self.paired)] for i in numbers]
            for name, wanted in ("pairs", True), ("whole", False):
                places = [k for k, paired in enumerate(is_paired) if paired == wanted]
                found[name] = torch.tensor(places, dtype=torch.int64, device=own.device)
        return found

    def state_bytes(self, p):
        # The momentum, and as much again for the products on the way: with it the whole estimate
        # was 3 to 6% above what gpt2-small took on an H200
        return 8 * p.numel()

    def prepare(self, grad, state, turn):
        momentum = turn.scalar(turn.momentum)
        ahead = turn.fast(look_ahead)(grad.reshape(-1).data, state["m"].view(-1).data, momentum)
        groups = self.groups(state, turn)
        balance_ = turn.fast(balance)
        return directions(ahead.view(grad.shape), groups, BETA2, self.orthogonalise, balance_)

    def update(self, w, companion, grad, state, turn):
        lr = self.lr * turn.lr_scale
        shrink = lr * lr * self.weight_decay
        if self.decay_by_shape:
            shrink *= shape_factor(w)
        groups = self.groups(state, turn)
        muon_update(
            w,
            companion,
            grad,
            state["m"],
            turn.scalar(lr),
            turn.scalar(turn.momentum),
            v=None if groups else state.get("v"),
            shrink=turn.scalar(shrink) if self.weight_decay else None,
            ok=turn.ok,
            orthogonalise=self.orthogonalise,
            nesterov=turn.fast(nesterov),
            balance=turn.fast(balance),
            descend=turn.fast(descend),
            groups=groups,
            factor=turn.fixed.get("factor"),
            prepared=turn.prepared,
            remember=turn.fast(remember) if turn.prepared else remember,
        )

    def groups(self, state, turn):
        """[Group, ...] of the matrices at hand, None if all are alike."""
        if not any(self.paired):
            return None
        return [
            Group(turn.fixed["pairs"], self.heads, state.get("v_pairs")),
            Group(turn.fixed["whole"], 0, state.get("v")),
        ]
