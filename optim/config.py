"""The options of the optimizer that ranks above any one rule."""

import dataclasses

from base.options import POSITIVE, RATE, Options, option


@dataclasses.dataclass(frozen=True)
class OptimConfig(Options):
    """Learning rates and the forms of the rules; which parameter has which rule is the template's
    to say (update_rules)."""

    muon_lr: float = option(0.03, "Muon, on the matrices of the blocks", RATE, group="optimizer")
    adam_lr: float = option(
        0.008, "Adam, on the head; embeddings and scalars have multiples of it", RATE
    )
    weight_decay: float = option(
        0.0, "times the squared learning rate, where it agrees with the update", RATE
    )
    normuon: bool = option(False, "each neuron's part of Muon's update is scaled to the same size")
    row_moments: bool = option(
        False, "Adam has one second moment for a row of a table, and no momentum there"
    )
    adam_every: int = option(
        1, "Adam updates at each so many steps, from the sum of their gradients", POSITIVE
    )
