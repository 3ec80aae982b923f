"""A softmax over some of the vocabulary: the tokens that are targets, and others at random.

    loss = log(sum over columns j of m_j exp(z_j)) - z_y,   m_j: the tokens that column j stands for

A target stands for itself, m = 1; each other chosen token for its share of all tokens that are no
target. So the sum of exp is right on average over the choice. (The loss, its logarithm, is a little
too low.) The head then multiplies by n rows of its weight instead of V.

Source: sampled softmax, Bengio and Senecal 2008; with the batch's own targets as candidates, Jean
et al., arXiv:1412.2007.
"""

import torch


def sample_vocabulary(targets, n_vocab, n, seed, ignore_index=-100):
    """What a sampled softmax chooses among.

    targets: (...) int64, seed: 0-d int64 -> tokens (n,), targets as indices of those, and `sampled`
    for softcap_cross_entropy and linear_cross_entropy. If n tokens or more are targets, n random
    ones of them are all there is, and other targets become ignore_index. The same targets and seed
    give the same choice.
    """
    device = targets.device
    token = torch.where(targets == ignore_index, n_vocab, targets)
    wanted = torch.zeros(n_vocab + 1, dtype=torch.bool, device=device)
    wanted = wanted.index_fill(0, token.flatten(), True)[:-1]

    # A random order by a hash: no generator, whose state a checkpoint would have to keep
    order = torch.arange(n_vocab, device=device) + seed
    for _ in range(2):
        order = (order ^ (order >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    chosen = (order + (wanted.long() << 32)).topk(n).indices  # targets come first

    first = wanted.sum()
    many = ((n_vocab - first) / (n - first).clamp(min=1)).clamp(min=1)
    sampled = torch.stack([first.float(), many.log()])
    place = torch.full((n_vocab + 1,), ignore_index, device=device)
    place = place.index_copy(0, chosen, torch.arange(n, device=device))
    return chosen, place[token], sampled


def stands_for(sampled, n):
    """-> (n,) fp32: what to add to capped logits, by column."""
    first, log_many = sampled.unbind(0)
    return torch.where(torch.arange(n, device=sampled.device) < first, 0.0, log_many)
