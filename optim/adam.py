"""Adam on flat tensors in one pass.

Minimum bytes per bf16 weight with a bf16 gradient: 26, with whole fp32 masters 28. Decay and the
guard cost no bytes. Source: Kingma & Ba, arXiv:1412.6980.
"""

import dataclasses
import typing

import torch

from .masters import average, choose, decay, join, store
from .rule import Rule


def adam_update(
    p, companion, grad, m, v, lr, beta1, beta2, eps, correction1, correction2, shrink=None, ok=None
):
    """Adam on flat tensors. m, v: fp32; correction1, correction2: 1 - beta**step, of beta1 and of
    beta2.

    shrink: cautious decay, w <- w - step - shrink w [step w > 0]; None and 0 are none.
    Powers taken in here would be taken for every element: measured with Inductor on a CPU, twice
    the time.
    """
    g = grad.float()
    master = join(p, companion)
    average(m, beta1, (1 - beta1) * g, ok)
    average(v, beta2, (1 - beta2) * g * g, ok)
    step = lr * (m / correction1) / ((v / correction2).sqrt() + eps)
    decayed = decay(master, step, shrink)
    store(p, companion, choose(ok, decayed - step, master))


@dataclasses.dataclass(frozen=True)
class Adam(Rule):
    """Adam with bias correction and cautious decay, on the flattened parameter."""

    betas: tuple = (0.9, 0.95)
    eps: float = 1e-10

    pieces: typing.ClassVar[tuple] = (adam_update,)

    def parts(self, whole):
        return whole.view(-1)

    def new_state(self, own):
        m = torch.zeros_like(own, dtype=torch.float32)
        return dict(m=m, v=m.clone())

    def state_bytes(self, p):
        return 8 * p.numel()

    def update(self, w, companion, grad, state, turn):
        lr = self.lr * turn.lr_scale
        beta1, beta2 = self.betas
        corrections = [1 - beta**turn.count for beta in self.betas]
        hyperparameters = map(turn.scalar, (lr, beta1, beta2, self.eps, *corrections))
        turn.fast(adam_update)(
            w,
            companion,
            grad,
            state["m"],
            state["v"],
            *hyperparameters,
            shrink=self.shrink(lr, turn),
            ok=turn.ok,
        )
