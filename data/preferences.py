"""Rows that hold both answers of a pair, one preferred to the other."""

from typing import NamedTuple

import numpy as np
import torch

from .conversations import Conversations
from .loader import IGNORE


class PairBatch(NamedTuple):
    """B rows of T tokens with pairs of answers, K of them at most.

    inputs, targets, cu_seqlens: as of a MicroBatch; answer: (B, T) int64, which answer a target is
    part of: 2 k for the chosen one of pair k, 2 k + 1 for the rejected one, 2 K for none;
    reference: (K, 2) fp32, log probabilities of the answers by the model that training began with.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    answer: torch.Tensor
    reference: torch.Tensor


class Pairs(Conversations):
    """A split's pairs, and rows of whole ones.

    reference: (pairs, 2) fp32, log probabilities of the answers by another model; None for no
    other.
    """

    parts = 2
    reference = None

    def batch(self, rows):
        """A PairBatch of rows, lists of numbers of pairs or None for padding."""
        packed = super().batch(rows)
        K = len(rows) * self.max_docs // 2
        answer = np.full(packed.inputs.shape, 2 * K, dtype=np.int64)
        pairs = []
        for r, row in enumerate(rows):
            at = 0
            for p in row or ():
                for i in (2 * p, 2 * p + 1):
                    answer[r, at : at + self.lengths[i]] = 2 * len(pairs) + i % 2
                    at += self.lengths[i]
                pairs.append(p)
        answer[packed.targets.numpy() == IGNORE] = 2 * K
        reference = torch.zeros(K, 2)
        if self.reference is not None and pairs:
            reference[: len(pairs)] = self.reference[pairs]
        return PairBatch(*packed, torch.from_numpy(answer), reference)

    def counted(self, rows):
        """How many numbers the loss is a mean of: pairs."""
        return sum(map(len, rows))
