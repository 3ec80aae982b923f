"""The options of the optimizer that ranks above any one rule."""

import dataclasses

from base.options import COUNT, FRACTION, POSITIVE, RATE, Options, option

BETAS = lambda xs: len(xs) == 2 and all(0 <= x < 1 for x in xs), "two numbers from 0 to below 1"


@dataclasses.dataclass(frozen=True)
class OptimConfig(Options):
    """Learning rates and the forms of the rules; which parameter has which rule is the template's
    to say (update_rules)."""

    optimizer: str = option(
        "muon",
        "muon, with Adam for what is no matrix of a block, or adamw for everything, with warm-up, "
        "cosine and clipping",
        ("muon", "adamw"),
        group="optimizer",
    )
    # With muon
    muon_lr: float = option(0.03, "Muon, on the matrices of the blocks", RATE)
    adam_lr: float = option(
        0.008, "Adam, on the head; embeddings and scalars have multiples of it", RATE
    )
    weight_decay: float = option(
        0.0, "times the squared learning rate, where it agrees with the update", RATE
    )
    normuon: bool = option(False, "each neuron's part of Muon's update is scaled to the same size")
    muon_head_pairs: bool = option(
        False, "Muon takes the queries' and keys' matrices apart into pairs of heads"
    )
    mlp_down_lr: float = option(
        1.0, "Muon's learning rate and decay on the MLPs' second matrices, times the others'", RATE
    )
    decay_by_shape: bool = option(
        False, "a tall matrix decays as much more as Muon steps farther on it"
    )
    head_betas: tuple[float, ...] = option(
        (0.75, 0.95), "Adam's on the head, and on the embedding if it is the head at first", BETAS
    )
    row_moments: bool = option(
        False, "Adam has one second moment for a row of a table, and no momentum there"
    )
    adam_every: int = option(
        1, "Adam updates at each so many steps, from the sum of their gradients", POSITIVE
    )
    # With adamw
    adamw_lr: float = option(3e-4, "AdamW", RATE)
    adamw_warmup: int = option(0, "steps over which its learning rate rises from zero", COUNT)
    adamw_floor: float = option(
        0.1, "where a cosine lets it fall to until the end, as a fraction", FRACTION
    )
    adamw_betas: tuple[float, ...] = option((0.9, 0.95), "of its two moments", BETAS)
    adamw_decay: float = option(
        0.1, "weight decay, times the learning rate; norms and gates have none", RATE
    )
    adamw_clip: float = option(
        1.0, "a gradient that is longer, over all parameters, is shortened to this; 0 is off", RATE
    )

    # Of either, for teaching
    lora_rank: int = option(
        0,
        "LoRA: the blocks' matrices move by products of this rank, all else stays; 0 is off",
        COUNT,
    )
    lora_alpha: float = option(16.0, "LoRA: over the rank, what such a product counts", POSITIVE)
    lora_lr: float = option(5e-3, "LoRA: of the products, which move by Adam", RATE)
    lora_rest: bool = option(False, "LoRA: embeddings, norms and gates learn as without it")

    @property
    def clip(self):
        """The longest gradient that an update sees; 0 for any."""
        return self.adamw_clip if self.optimizer == "adamw" else 0.0
