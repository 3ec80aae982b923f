"""Losses over a validation split, by all ranks together."""

import typing

import torch
import torch.distributed as dist

from data import ValLoader
from data.loader import IGNORE
from records.metrics import Evaluation, measure


class Split(typing.NamedTuple):
    """A validation split, or a part of it."""

    batches: list  # this rank's micro-batches
    n_targets: int  # over all ranks
    n_bytes: int | None  # of UTF-8 that these targets stand for; None if not to be known


def part_of(split, tokens, data, world):
    """Batches of a Split, evenly spread, of about this many tokens a rank, as a Split."""
    n = max(1, tokens // split.batches[0].inputs.numel())
    batches = split.batches[:: max(1, len(split.batches) // n)]
    targets = targets_of(batches)
    n_bytes = 0 if split.n_bytes is None else bytes_of(targets, data.dataset)
    counts = torch.tensor([len(targets), n_bytes], device=world.device)
    if world.size > 1:
        dist.all_reduce(counts)
    n_targets, n_bytes = counts.tolist()
    return Split(batches, n_targets, n_bytes or None)


def of_training_text(data, tokens, row_len, micro_rows):
    """Rows of the training text, cut as those of the validation split are, as a Split for one
    process; tokens: about how many, evenly spread over the first shard."""
    dataset = data.dataset
    loader = ValLoader(dataset.train[:1], eot=dataset.eot, n_vocab=dataset.n_vocab, row_len=row_len)
    n_rows = max(1, tokens // row_len)
    batches = list(loader.micro_batches(micro_rows=min(micro_rows, n_rows), n_rows=n_rows))
    targets = targets_of(batches)
    return Split(batches, len(targets), bytes_of(targets, dataset))


def targets_of(batches):
    return torch.cat([micro.targets[micro.targets != IGNORE] for micro in batches])


def bytes_of(targets, dataset):
    """UTF-8 bytes that targets stand for. Raises InputError where the vocabulary is out of
    reach."""
    return int(dataset.tokenizer.token_bytes[targets.numpy()].sum())


@torch.no_grad()
def evaluate(forward, stage, split, world):
    """Metrics by name over all ranks' batches of a Split; stage: the template's."""
    total = torch.zeros((), dtype=torch.float64, device=world.device)  # nats
    for micro in split.batches:
        inputs, targets, cu_seqlens = (t.to(world.device, non_blocking=True) for t in micro)
        total += forward(inputs, targets, cu_seqlens, stage)
    if world.size > 1:
        dist.all_reduce(total)
    return measure(Evaluation(total.item(), split.n_targets, split.n_bytes))
