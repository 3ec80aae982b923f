"""Adam on a table without momentum and with one second moment for a row.

Minimum bytes per bf16 weight with a bf16 gradient: 12, with whole fp32 masters 14. Source: moments
by rows as Mudigere et al. have them for AdaGrad (arXiv:2104.05158).
"""

import dataclasses
import typing

import torch

from .masters import average, descend
from .rule import Rule


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


@dataclasses.dataclass(frozen=True)
class RowAdam(Rule):
    """Adam on a table, without momentum and with one second moment for a row."""

    beta2: float = 0.95
    eps: float = 1e-10

    pieces: typing.ClassVar[tuple] = (row_scale, descend)

    def parts(self, whole):
        return whole.view(-1, whole.size(-1))

    def new_state(self, own):
        return dict(v=torch.zeros_like(own[:, :1], dtype=torch.float32))

    def state_bytes(self, p):
        return 4 * p.numel() // p.size(-1)

    def update(self, w, companion, grad, state, turn):
        lr = self.lr * turn.lr_scale
        correction = 1 - self.beta2**turn.count
        hyperparameters = map(turn.scalar, (lr, self.beta2, self.eps, correction))
        row_update(
            w,
            companion,
            grad,
            state["v"],
            *hyperparameters,
            shrink=self.shrink(lr, turn),
            ok=turn.ok,
            row_scale=turn.fast(row_scale),
            descend=turn.fast(descend),
        )
