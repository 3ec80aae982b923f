"""Everything that training changes, as whole tensors by name: what a checkpoint holds.

weights/PARAMETER, m/PARAMETER, v/PARAMETER   see optim/tensors.py
other/NAME                                    what the guard and the model keep besides
"""

import typing

import torch
import torch.distributed as dist

from optim import tensors as optimizer_tensors


class State(typing.NamedTuple):
    """The parts of a run that change as it trains, on the processes of `world`."""

    model: typing.Any  # a template's Model
    optimizer: typing.Any
    guard: typing.Any
    world: typing.Any

    def gather(self):
        """{name: tensor} on the CPU of the first rank, {} on the others.

        All ranks have to call it, with no gradients waiting.
        """
        tensors = optimizer_tensors.gather(self.optimizer)
        if self.world.rank == 0:
            for name, x in self.other().items():
                tensors[f"other/{name}"] = x.to("cpu", copy=True)
        return tensors

    def restore(self, tensors, step):
        """Take over a checkpoint's tensors, there on the first rank, on every rank.

        A run's weights alone will do, without moments: those are zero then.
        """
        weights_alone = all(name.startswith("weights/") for name in tensors)

        def fetch(name, like, missing=None):
            if weights_alone and not name.startswith("weights/") and missing is None:
                missing = torch.zeros_like(like)
            if self.world.rank == 0:
                whole = tensors.get(name, missing).view(like.shape).to(like)
            else:
                whole = torch.empty_like(like)
            if self.world.size > 1:
                dist.broadcast(whole, 0)
            return whole

        optimizer_tensors.load(self.optimizer, fetch, step)
        for name, x in self.other().items():
            # A run in FP8 may go on from one that was not, with scales as they are now
            x.copy_(fetch(f"other/{name}", x, missing=x))

    def other(self):
        return dict(recent_losses=self.guard.recent, **self.model.state())
