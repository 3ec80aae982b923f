"""What an update rule is: how one parameter moves, what it remembers, what that costs.

A new optimizer is one file beside this one, with a subclass of Rule, and the line in a template's
update_rules() that names it.
"""

import dataclasses
import typing

import torch


class Turn(typing.NamedTuple):
    """What all rules need to know about the step that is being taken."""

    lr_scale: float  # the schedule's factor of the learning rate
    momentum: float  # the schedule's momentum, for rules that follow it
    count: int  # turns so far with this one, whether or not they counted
    ok: torch.Tensor | None  # the guard: None, or 0-d bool on the device
    scalar: typing.Callable  # float -> what pointwise functions take for a hyperparameter
    fast: typing.Callable  # pointwise function -> the same, compiled where the run compiles
    fixed: dict  # what the rule's fixed() gave
    prepared: typing.Any = None  # what its prepare() gave, if it was called


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one parameter is updated."""

    lr: float  # peak learning rate
    weight_decay: float = 0.0  # times the squared learning rate; cautious, see masters.py
    sharded: bool = True  # each rank updates its part only
    every: int = 1  # updates at each so many steps, from the sum of their gradients

    # Whether prepare() is worth calling: then gradients are summed first, and updated last
    prepares: typing.ClassVar[bool] = False
    pieces: typing.ClassVar[tuple] = ()  # pointwise functions that are worth compiling

    def parts(self, whole):
        """The parameter's data as a view whose dim 0 is shared out over ranks."""
        raise NotImplementedError

    def new_state(self, own):
        """{name: fp32 tensor} of moments for the rows that this rank owns, all zero."""
        raise NotImplementedError

    def fixed(self, own, start):
        """{name: tensor} of what depends on which rows a rank owns, from row `start` on, and never
        changes."""
        return {}

    def state_bytes(self, p):
        """Bytes of the moments of a whole parameter p (may be on meta), for the estimate."""
        raise NotImplementedError

    def prepare(self, grad, state, turn):
        """What can be computed for update() before it is known whether the step counts: nothing may
        be written. grad, state, turn: as there."""
        return None

    def update(self, w, companion, grad, state, turn):
        """One update in place of the owned rows w and of the state.

        companion: see masters.py; grad: of w's shape, summed over ranks; turn: a Turn.
        """
        raise NotImplementedError

    def shrink(self, lr, turn):
        """What cautious decay takes off a weight, as a fraction; None without decay."""
        if not self.weight_decay:
            return None
        return turn.scalar(lr * lr * self.weight_decay)
