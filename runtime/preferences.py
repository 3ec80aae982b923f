"""Losses over pairs of answers, one preferred to the other, from the log probabilities of both.

    reward = beta (log pi - log ref),   margin = reward of the chosen - of the rejected one
    dpo     -log sigmoid(margin), log probabilities summed over an answer's tokens
    kto     1 - sigmoid(reward_c - z) + 1 - sigmoid(z - reward_r), z: the mean reward of all
            answers in a forward pass, at least 0, as a constant
    simpo   -log sigmoid(beta (mean log pi_c - mean log pi_r) - gamma), without a reference
    orpo    -mean log pi_c - beta log sigmoid(log odds_c - log odds_r), of mean log probabilities,
            without a reference; log odds = log p - log(1 - p)

--sft-weight w adds -w mean log pi_c to any of them: a margin can grow while both answers become
less likely, and this holds the chosen one up.

Sources: Rafailov et al., arXiv:2305.18290 (dpo); Ethayarajh et al., arXiv:2402.01306 (kto, where z
comes from answers to other questions); Meng et al., arXiv:2405.14734 (simpo); Hong et al.,
arXiv:2403.07691 (orpo); Pang et al., arXiv:2404.19733 (the likelihood beside dpo).
"""

import dataclasses
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from base import InputError, whole_file
from base.options import RATE, Options, option
from data.loader import IGNORE
from records.metrics import Evaluation, measure

KINDS = ("none", "dpo", "kto", "simpo", "orpo")
WITH_REFERENCE = ("dpo", "kto")


@dataclasses.dataclass(frozen=True)
class TeachingConfig(Options):
    """What is learned from pairs of answers."""

    preference: str = option(
        "none", "the loss over pairs of answers, of ./run.sh dpo and orpo", KINDS, group="teaching"
    )
    beta: float = option(
        0.1, "how much a difference in log probability counts against the other answer", RATE
    )
    gamma: float = option(0.5, "simpo: the margin that is wanted", RATE)
    label_smoothing: float = option(
        0.0,
        "dpo: the fraction of pairs that are taken to be the wrong way round",
        (lambda x: 0 <= x < 0.5, "a number from 0 to below 0.5"),
    )
    sft_weight: float = option(
        0.0,
        "times the mean negative log probability of the chosen answer, which is added to the loss",
        RATE,
    )


def log1mexp(x):
    """log(1 - exp(x)) for x < 0, exact near 0 and far from it: Maechler 2012."""
    x = x.clamp(max=-1e-7)
    near = (-torch.expm1(x)).log()
    far = torch.log1p(-x.exp())
    return torch.where(x > -math.log(2), near, far)


def pair_losses(sums, lengths, reference, config):
    """((K,) losses of pairs, (K, 2) rewards of the chosen and the rejected answer).

    sums: (K, 2) log probabilities of the answers; lengths: (K, 2) of their tokens; reference: as
    sums, of the model that it began with.
    """
    means = sums / lengths.clamp(min=1)
    beta = config.beta
    if config.preference in WITH_REFERENCE:
        rewards = beta * (sums - reference)
    else:
        rewards = beta * means
    margin = rewards[:, 0] - rewards[:, 1]
    if config.preference == "dpo":
        s = config.label_smoothing
        losses = -(1 - s) * F.logsigmoid(margin) - s * F.logsigmoid(-margin)
    elif config.preference == "kto":
        there = (lengths > 0).to(rewards.dtype)
        z = ((rewards * there).sum() / there.sum().clamp(min=1)).clamp(min=0).detach()
        losses = 2 - (rewards[:, 0] - z).sigmoid() - (z - rewards[:, 1]).sigmoid()
    elif config.preference == "simpo":
        losses = -F.logsigmoid(margin - config.gamma)
    else:
        odds = means - log1mexp(means)
        losses = -means[:, 0] - beta * F.logsigmoid(odds[:, 0] - odds[:, 1])
    if config.sft_weight:
        losses = losses - config.sft_weight * means[:, 0]
    return losses, rewards


class PairLoss:
    """A model with a loss over pairs, called as a template is with next tokens: forward()."""

    def __init__(self, model, config, compiled=False):
        self.config = config
        self.log_probs = model.log_probs
        if compiled:
            self.log_probs = torch.compile(model.log_probs, fullgraph=True, dynamic=False)

    def answers(self, inputs, targets, cu_seqlens, answer, K, stage):
        """(sums, lengths), (K, 2) each: log probabilities of a batch's pairs of answers.

        answer: (B, T) int64, which of the 2 K answers a target is part of, 2 K for none.
        """
        log_probs = self.log_probs(inputs, targets, cu_seqlens, stage).flatten()
        place = answer.flatten()
        counts = (targets.flatten() != IGNORE).to(log_probs.dtype)
        sums = log_probs.new_zeros(2 * K + 1).index_add(0, place, log_probs)
        lengths = log_probs.new_zeros(2 * K + 1).index_add(0, place, counts)
        return sums[:-1].view(K, 2), lengths[:-1].view(K, 2)

    def losses(self, inputs, targets, cu_seqlens, answer, reference, stage):
        """(losses, rewards, which pairs are there) of a batch."""
        K = len(reference)
        sums, lengths = self.answers(inputs, targets, cu_seqlens, answer, K, stage)
        losses, rewards = pair_losses(sums, lengths, reference, self.config)
        return losses, rewards, lengths[:, 0] > 0

    def __call__(self, inputs, targets, cu_seqlens, answer, reference, stage, target_weights=None):
        """Summed loss over the pairs of a batch, a 0-d tensor."""
        losses, _, there = self.losses(inputs, targets, cu_seqlens, answer, reference, stage)
        return losses.where(there, 0).sum()


@torch.no_grad()
def evaluate_pairs(forward, stage, split, world):
    """Metrics by name over all ranks' batches of a Split of pairs."""
    # loss, pairs that are the right way round, rewards of both
    total = torch.zeros(4, dtype=torch.float64, device=world.device)
    for batch in split.batches:
        losses, rewards, there = forward.losses(*(t.to(world.device) for t in batch), stage)
        right = rewards[:, 0] > rewards[:, 1]
        rows = torch.stack([losses, right, rewards[:, 0], rewards[:, 1]]).double()
        total += rows.where(there, 0).sum(1)
    if world.size > 1:
        dist.all_reduce(total)
    loss, *sums = total.tolist()
    return measure(Evaluation(loss, split.n_targets, None, tuple(sums)))


# --------------------------------------------------------------------------------------------------
# The reference: the model that training begins with


def give_reference(setup, stage, folder, begins):
    """Give all pairs their log probabilities by the model as it is when a run begins; the run's
    folder keeps them for when it goes on. Does nothing where the loss has no reference.

    stage: the template's, of validation. Raises InputError where a run that goes on lacks them.
    """
    if setup.config.teaching.preference not in WITH_REFERENCE:
        return
    path = folder / "reference.safetensors"
    loaders = dict(train=setup.data.train, val=setup.data.val)
    if path.exists():
        found = load_file(path)
    elif begins:
        found = {name: log_probs_of(setup, stage, loader.of) for name, loader in loaders.items()}
        if setup.world.rank == 0:
            with whole_file(path) as temp:
                save_file(found, temp)
    else:
        raise InputError(
            f"{path}: is gone: expected the log probabilities of the model that this run began "
            "with; begin anew with another --run-dir"
        )
    for name, loader in loaders.items():
        loader.of.reference = found[name]
    world = setup.world
    rows = len(setup.val.batches[0].inputs)
    batches = list(setup.data.val.micro_batches(world.rank, world.size, rows))
    setup.val = setup.val._replace(batches=batches)


@torch.no_grad()
def log_probs_of(setup, stage, pairs):
    """(pairs, 2) fp32: log probabilities of all answers by the model as it is."""
    rows = pairs.packed(range(len(pairs)))
    at_once = len(setup.val.batches[0].inputs)
    found = torch.empty(len(pairs), 2)
    for i in tqdm(range(0, len(rows), at_once), "reference", delay=2, disable=None, leave=False):
        batch = pairs.batch(rows[i : i + at_once])
        *tensors, reference = (t.to(setup.world.device) for t in batch)
        sums, lengths = setup.eager.answers(*tensors, len(reference), stage)
        found[sum(rows[i : i + at_once], [])] = sums[lengths[:, 0] > 0].float().cpu()
    return found
