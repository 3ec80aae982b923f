"""An optimizer's weights and moments as whole tensors by name, the same on any number of ranks.

weights/PARAMETER             fp32, the masters
m/PARAMETER, v/PARAMETER      moments, by the names of the rule
"""

import torch

from .masters import join, store


def gather(optimizer):
    """{name: tensor} on the CPU of the first rank, {} on the others. All ranks have to call it,
    with no gradients waiting."""
    tensors = {}
    for name, state in optimizer.state.items():
        shard = optimizer.shards[name]
        shape = optimizer.params[name].shape
        kinds = dict(state)
        kinds["weights"] = join(shard.own, kinds.pop("companion"))
        for kind, part in kinds.items():
            whole = shard.collect(part)  # all ranks take part
            if optimizer.world.rank == 0:
                if whole.numel() == shape.numel():
                    whole = whole.view(shape)
                tensors[f"{kind}/{name}"] = whole.to("cpu", copy=True)
    return tensors


@torch.no_grad()
def load(optimizer, fetch, step_count):
    """Take over what gather() gave after so many steps.

    fetch(name, like): the whole tensor by that name, in the shape and dtype and on the device of
    `like`; every rank calls it for the same names in the same order.
    """
    optimizer.reset()
    optimizer.step_count = step_count
    for name, state in optimizer.state.items():
        shard = optimizer.shards[name]

        def own_part(kind, part):
            shape = (len(shard.whole), *part.shape[1:])
            whole = part.new_empty(shape, dtype=torch.float32)
            return fetch(f"{kind}/{name}", whole)[shard.start : shard.start + len(part)]

        store(shard.own, state["companion"], own_part("weights", shard.own))
        for kind, moments in state.items():
            if kind != "companion":
                moments.copy_(own_part(kind, moments))
        shard.gather()()
