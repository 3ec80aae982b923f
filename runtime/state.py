"""What training goes on from, as whole tensors by name: the same on any number of ranks.

weights/PARAMETER   fp32, the masters
m/PARAMETER, v/PARAMETER   moments
other/NAME          losses that the guard remembers, scales of FP8 products
"""

import torch
import torch.distributed as dist

from optim.updates import join, store

from .resume import Position


def gather(trainer):
    """All of it, on the CPU of the first rank; {} on the others. All ranks have to call it, with
    no gradients waiting."""
    tensors = gather_optimizer(trainer.optimizer)
    if trainer.world.rank == 0:
        tensors |= {f"other/{name}": x.to("cpu", copy=True) for name, x in other(trainer).items()}
    return tensors


def restore(trainer, tensors, meta):
    """Copy a checkpoint's tensors, there on the first rank, into the trainer of every rank;
    returns its Position."""
    at, world = Position(**meta["progress"]), trainer.world
    at.resumed_at.append(at.step)

    def fetch(name, like):
        whole = (
            tensors[name].view(like.shape).to(like) if world.rank == 0 else torch.empty_like(like)
        )
        if world.size > 1:
            dist.broadcast(whole, 0)
        return whole

    load_optimizer(trainer.optimizer, fetch, at.step)
    for name, x in other(trainer).items():
        x.copy_(fetch(f"other/{name}", x))
    return at


def other(trainer):
    scales = {f"fp8_scale.{i}": x.scale for i, x in enumerate(trainer.model.scales())}
    return dict(recent_losses=trainer.guard.recent) | scales


def gather_optimizer(optimizer):
    """Its weights and moments; see gather()."""
    tensors = {}
    for name, s in optimizer.state.items():
        shard = optimizer.shards[name]
        kinds = dict(weights=join(shard.own, s["companion"]), m=s["m"], v=s["v"])
        whole = {kind: shard.collect(part) for kind, part in kinds.items() if part is not None}
        if optimizer.world.rank == 0:
            shape = optimizer.params[name].shape
            tensors |= {
                f"{kind}/{name}": (x.view(shape) if x.numel() == shape.numel() else x).to(
                    "cpu", copy=True
                )
                for kind, x in whole.items()
            }
    return tensors


@torch.no_grad()
def load_optimizer(optimizer, fetch, step_count):
    """fetch(name, like): the whole tensor by that name in the shape and dtype and on the device
    of `like`."""
    optimizer.reset()
    optimizer.step_count = step_count
    for name, s in optimizer.state.items():
        shard = optimizer.shards[name]

        def own(kind, part):
            whole = part.new_empty(len(shard.whole), *part.shape[1:], dtype=torch.float32)
            return fetch(f"{kind}/{name}", whole)[shard.start : shard.start + len(part)]

        store(shard.own, s["companion"], own("weights", shard.own))
        for kind in ("m", "v"):
            if s[kind] is not None:
                s[kind].copy_(own(kind, s[kind]))
        shard.gather()()
