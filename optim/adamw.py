"""AdamW: Adam whose weight decay stands apart from the gradient, for every parameter of a model.

    w <- w (1 - lr decay) - lr m^ / (sqrt(v^) + eps)

The known-good recipe of the field: warm-up and cosine are train_gpt.py's (warmup_cosine), clipping
is the optimizer's. Minimum bytes are Adam's. Source: Loshchilov & Hutter, arXiv:1711.05101.
"""

import dataclasses
import functools
import typing

from .adam import Adam
from .masters import average, choose, join, store


def adamw_update(
    p, companion, grad, m, v, lr, beta1, beta2, eps, correction1, correction2, kept, ok=None
):
    """AdamW on flat tensors, otherwise as adam_update; kept: 1 - lr decay, what is left of a weight
    before the step."""
    g = grad.float()
    master = join(p, companion)
    average(m, beta1, (1 - beta1) * g, ok)
    average(v, beta2, (1 - beta2) * g * g, ok)
    step = lr * (m / correction1) / ((v / correction2).sqrt() + eps)
    store(p, companion, choose(ok, master * kept - step, master))


@dataclasses.dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled decay: weight_decay is times the learning rate, not its square."""

    eps: float = 1e-8

    pieces: typing.ClassVar[tuple] = (adamw_update,)

    def update(self, w, companion, grad, state, turn):
        lr = self.lr * turn.lr_scale
        beta1, beta2 = self.betas
        corrections = [1 - beta**turn.count for beta in self.betas]
        kept = 1 - lr * self.weight_decay
        hyperparameters = map(turn.scalar, (lr, beta1, beta2, self.eps, *corrections, kept))
        turn.fast(adamw_update)(
            w, companion, grad, state["m"], state["v"], *hyperparameters, ok=turn.ok
        )


def adamw_rules(optim, small, large):
    """{name: AdamW} for a template's parameters, in this order; optim: an OptimConfig.

    small: names of norms, gates and the like, which do not decay; large: of matrices and tables.
    """
    rule = functools.partial(AdamW, optim.adamw_lr, betas=optim.adamw_betas)
    rules = dict.fromkeys(small, rule(sharded=False))
    return rules | dict.fromkeys(large, rule(weight_decay=optim.adamw_decay))
