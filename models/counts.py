"""What followed the last tokens in the training text.

For each length n, the n - 1 tokens before a target are looked up in the text that the model trains
on: `seen` says how often they were there, `hits` how often the target followed them, `kinds` how
many different tokens did. From these comes a distribution for each n, smoothed by the shorter ones,

    p_n(y) = (max(hits - D, 0) + D kinds p_(n-1)(y)) / seen,      p_1(y) = hits / seen

which a model mixes with its own, as it does with what followed earlier in the document (copies.py):
no weights, and right from the first step. A token that follows a context several times in one
document is counted once: documents repeat themselves, which says little of others, and in training
a document's own part can be left out exactly, else the text would be predicted from itself.

A context of n tokens is a context of n - 1 tokens and what followed it, so the tables are a tree:
one look-up for each length. Bytes: 12 for a context and a token that followed it, in the run's
folder, and about 24 more in memory; Python's library has 2.1M of them for n up to 4.

Source: absolute discounting, Ney, Essen and Kneser 1994; counts without one's own, as there;
mixing by a learned gate, Grave et al., arXiv:1612.04426.

Shapes: B rows, T tokens in a row, N lengths from 1 to N.
"""

import numpy as np
import torch
import torch.nn.functional as F

from base import InputError
from data import read_shard
from kernels.contexts import takes

from . import copies

DISCOUNT = 0.75
PIECE = 4096  # tokens of a document that count as one
MOST = 4_000_000  # tokens of a training text that are counted, for which 0.5 GB are needed
STRIDE = 1 << 24  # more than there are tokens in a vocabulary


class Counts:
    """How often tokens followed contexts of 0, 1, ..., n - 1 tokens. Without a text: never."""

    def __init__(self, n, tables=None, device=None):
        """tables: what tables() gave; device: the CPU if None, whatever new tensors' is: on meta
        these would have PyTorch import torch.compile, a second."""
        device = device or "cpu"
        self.n = n
        self.known = tables is not None
        self.own = False  # whether it is the text that is trained on
        self.in_part = False  # whether it is only the beginning of it
        self.lengths = []
        for i in range(n):
            found = NOTHING
            if self.known:
                found = [tables[f"{name}.{i}"] for name in Length.STORED]
            self.lengths.append(Length(*(torch.as_tensor(x, device=device) for x in found)))

    @classmethod
    def of_tables(cls, n, tables, device=None):
        """Of what tables() gave. Raises InputError for what it cannot have given, since look-ups
        trust it."""
        contexts = 1
        for i in range(n):
            first, follower, count = (tables.get(f"{name}.{i}") for name in Length.STORED)
            right = first is not None and follower is not None and count is not None
            right = right and all(x.dtype == torch.int32 for x in (first, follower, count))
            right = right and first.shape == (contexts + 1,) and follower.shape == count.shape
            right = right and follower.dim() == 1 and first[0] == 0 and first[-1] == len(follower)
            if not right or (first.diff() < 0).any():
                raise InputError(
                    f"the counts of {i + 1} tokens in the training text are not whole; train anew"
                )
            contexts = len(follower)
        return cls(n, tables, device)

    @classmethod
    def of_text(cls, shards, eot, n, device=None, most=MOST):
        """Counts of the first tokens of these shards."""
        pieces = []
        left = most + 2  # a token more than is counted says whether there are others
        for path in shards:
            pieces.append(read_shard(path)[:left])
            left -= len(pieces[-1])
            if not left:
                break
        text = np.concatenate(pieces)[: most + 1]
        tables = {}
        for i, found in enumerate(count(text.astype(np.int64), text == eot, n)):
            tables |= {f"{name}.{i}": torch.from_numpy(x) for name, x in zip(Length.STORED, found)}
        counts = cls(n, tables, device)
        counts.own = True
        counts.in_part = not left
        return counts

    def tables(self):
        """{name: CPU tensor} for a run's folder."""
        found = {}
        for i, length in enumerate(self.lengths):
            found |= {f"{name}.{i}": getattr(length, name).cpu() for name in Length.STORED}
        return found

    def of_targets(self, inputs, targets, starts, leave_out, in_c=None):
        """(seen, hits, kinds), each (B, T, n) int64.

        inputs, targets: (B, T) int64; starts: (B, T) bool, where documents begin; leave_out: the
        part of the documents in the rows, where the text is the one that is trained on. What is
        found for a target that is negative means nothing. in_c: a kernels.contexts.Contexts, which
        does the same.
        """
        leave_out = leave_out and self.own
        if in_c and takes(inputs):
            lengths = [(x.first, x.follower, x.count, x.seen) for x in self.lengths]
            how = leave_out and (2 if self.in_part else 1)
            return in_c.of_targets(lengths, inputs, targets, starts, how)
        # A target that does not count in the loss follows all the same
        there = targets >= 0
        targets = copies.chosen(there, targets, inputs.roll(-1, dims=1))
        at = torch.arange(inputs.size(1), device=inputs.device)
        so_far = at - at.where(starts, 0).cummax(dim=1).values + 1  # tokens of the document
        place = torch.zeros_like(inputs)  # of the context, -1 where it never was
        places = []
        for i, length in enumerate(self.lengths):
            next_place = length.find(place, targets)
            places.append((place, next_place))
            # The context with one token more
            place = next_place.roll(1, dims=1) if i else length.find(place, inputs)
            place = place.where(so_far > i, -1)
        if leave_out:
            own = copies.contexts(inputs, starts, self.n)
            counted = None  # all are
            if self.in_part:  # a document in which something is new was not counted
                new = (next_place < 0) & (so_far >= self.n) & there
                document = starts.cumsum(dim=1) - 1
                is_new = torch.zeros_like(document).scatter_reduce(1, document, new.long(), "amax")
                counted = is_new.gather(1, document) == 0

        found = []
        for i, (place, next_place) in enumerate(places):
            counts = self.lengths[i].at(place, next_place)
            if leave_out:
                left = without_own(*counts, own[i], targets)
                if counted is not None:
                    left = [copies.chosen(counted, x, y) for x, y in zip(left, counts)]
                counts = left
            found.append([x.where(place >= 0, 0) for x in counts])
        return [torch.stack(x, dim=-1) for x in zip(*found)]


NOTHING = np.array([0, 0], np.int32), *[np.zeros(0, np.int32)] * 2  # one context, never seen


class Length:
    """Contexts of one length, and what followed each; the latter are the contexts one longer."""

    STORED = "first", "follower", "count"

    def __init__(self, first, follower, count):
        """first: (U + 1,) int32, where the followers of each context begin; follower, count: (P,)
        int32, sorted by context and follower."""
        self.first = first
        self.follower = follower
        self.count = count
        self.kinds = first.diff().long()
        which = torch.arange(len(first) - 1, device=first.device)
        which = which.repeat_interleave(self.kinds, output_size=len(follower))
        self.pair = which * STRIDE + follower
        self.seen = torch.zeros_like(self.kinds).index_add_(0, which, count.long())

    def find(self, place, token):
        """Which of the pairs a context and what follows are, int64 of any shape; -1 for none."""
        pair = place * STRIDE + token
        at = torch.searchsorted(self.pair, pair)
        there = at < len(self.pair)
        if len(self.pair):
            at = at.clamp(max=len(self.pair) - 1)
            there = there & (self.pair[at] == pair)
        return at.where(there, -1)

    def followers(self, place, kinds):
        """(row, follower, count), (M,) each, of all that followed contexts; place, kinds: (B,)
        int64, of which the first `kinds` are wanted."""
        row = torch.arange(len(place), device=place.device).repeat_interleave(kinds)
        nth = torch.arange(len(row), device=place.device) - (kinds.cumsum(0) - kinds)[row]
        at = self.first[place[row]] + nth
        return row, self.follower[at].long(), self.count[at].float()

    def at(self, place, pair):
        """(seen, hits, kinds) of contexts and pairs; where one is -1, of another."""
        hits = torch.zeros_like(pair)
        if len(self.count):
            hits = self.count[pair].long().where(pair >= 0, 0)
        return self.seen[place], hits, self.kinds[place]


def count(text, starts, n):
    """[(first, follower, count) of a Length, ...] for n lengths, numpy int32.

    text: (T + 1,) int64; starts: alike, bool, where documents begin.
    """
    at = np.arange(len(text))
    inside = (at - np.maximum.accumulate(np.where(starts, at, 0)))[:-1]
    document = np.cumsum(starts[:-1] | (inside % PIECE == 0))
    inputs = text[:-1]
    targets = text[1:]
    place = np.zeros_like(inputs)  # of the context, -1 where the document is not that long
    n_contexts = 1
    n_tokens = text.max() + 1
    found = []
    for i in range(n):
        there = np.flatnonzero(place >= 0)
        pair = place[there] * n_tokens + targets[there]
        pair, order = in_order(pair)
        there = there[order]
        new = np.append(True, pair[1:] != pair[:-1])
        # Once for each document; places of a pair are in the order of the text
        here = document[there]
        counts = new | np.append(True, here[1:] != here[:-1])
        begins = np.flatnonzero(new)
        count = np.add.reduceat(counts.astype(np.int32), begins)
        pair = pair[begins]
        context, follower = np.divmod(pair, n_tokens)
        sizes = np.bincount(context, minlength=n_contexts)
        first = np.append(0, np.cumsum(sizes))
        found.append([x.astype(np.int32) for x in (first, follower, count)])

        # The context with one token more
        n_contexts = len(pair)
        place = np.full_like(inputs, -1)
        if i:
            place[there] = np.cumsum(new) - 1
            place = np.append(-1, place[:-1])
        else:
            of_token = np.full(n_tokens, -1)
            of_token[follower] = np.arange(len(follower))
            place = of_token[inputs]
        place[inside < i] = -1
    return found


def in_order(numbers):
    """(numbers in order, which they were): (n,) int64 each, from numbers that are not negative;
    equal ones stay in order. Where a number and its index fit into one together, these are sorted,
    which takes a tenth of the time."""
    bits = len(numbers).bit_length()
    if numbers.max(initial=0) >> (63 - bits):
        order = np.argsort(numbers, kind="stable")
        return numbers[order], order
    both = np.sort((numbers << bits) | np.arange(len(numbers)))
    return both >> bits, both & ((1 << bits) - 1)


def without_own(seen, hits, kinds, own, targets):
    """The same without what the rows themselves have of each document; own: (B, T) int64, hashes
    of contexts and documents."""
    order, first = copies.runs(own)
    pair_order, pair_first = copies.runs(copies.hashed(own, targets))
    # One place in the document stands for each kind of token that followed
    at = torch.arange(own.size(1), device=own.device)
    last = torch.zeros_like(first).scatter_reduce(1, first, at.expand_as(first), "amax")
    last = last.gather(1, first)  # where a run of equal contexts ends
    once = torch.zeros_like(own).scatter(1, pair_order, (pair_first == at).long())
    hits = (hits - 1).clamp(min=0)
    alone = once * (hits == 0)  # kinds that followed in this document only

    def of_context(x):
        """Sums over the places with the same context: (B, T) -> (B, T)."""
        x = x.gather(1, order)
        total = x.cumsum(dim=1)
        total = total.gather(1, last) - total.gather(1, first) + x.gather(1, first)
        return torch.empty_like(own).scatter_(1, order, total)

    seen = (seen - of_context(once)).clamp(min=0)
    return seen, hits, (kinds - of_context(alone)).clamp(min=0)


def probabilities(seen, hits, kinds):
    """(..., n) fp32 p_1, ..., p_n of the counts (..., n); 0 where a context was not seen, nor then
    a longer one."""
    of_length = zip(*(x.float().unbind(-1) for x in (seen, hits, kinds)))
    found = []
    for n_seen, n_hits, n_kinds in of_length:
        p = n_hits
        if found:
            p = (n_hits - DISCOUNT).clamp(min=0) + DISCOUNT * n_kinds * found[-1]
        found.append(p / n_seen.clamp(min=1))
    return torch.stack(found, dim=-1)


def predictions(seen, hits, kinds):
    """As of copies: what a gate is told, these counts and 1, which lengths have something to say,
    and what they say."""
    return told(seen, kinds), seen > 0, probabilities(seen, hits, kinds)


def told(seen, kinds):
    """(..., n) each -> (..., 2 n + 1) fp32."""
    one = torch.ones_like(seen[..., :1], dtype=torch.float32)
    return torch.cat([seen.float().log1p(), kinds.float().log1p(), one], dim=-1)


class Followers:
    """What followed the last 0, 1, ..., n - 1 tokens of documents in the training text, of all
    tokens at once: the same as predictions() has of one."""

    def __init__(self, counts, texts):
        """texts: (B, T) int64, documents so far, padded on the left with -1."""
        last = texts[:, -max(1, counts.n - 1) :]
        place = torch.zeros_like(last)  # of the contexts that end there, -1 where one never was
        seen = []
        kinds = []
        self.hits = []  # of each length: rows, tokens that followed there, and how often
        for i, length in enumerate(counts.lengths):
            here = place[:, -1]
            there = here >= 0
            here = here.clamp(min=0)
            seen.append(length.seen[here].where(there, 0))
            kinds.append(length.kinds[here].where(there, 0))
            # Without a context the same followed in all rows
            rows = slice(None) if i else slice(1)
            self.hits.append(length.followers(here[rows], kinds[-1][rows]))
            # The contexts with one token more: what follows a context is one itself
            before = F.pad(place[:, :-1], (1, 0), value=-1) if i else place
            place = length.find(before, last)
        self.seen = torch.stack(seen, dim=-1)  # (B, n)
        self.kinds = torch.stack(kinds, dim=-1)
        self.told = told(self.seen, self.kinds)
        self.there = self.seen > 0

    def add_to(self, sums, share):
        """Add each length's probabilities, (B, n_vocab), times its share, (B, n)."""
        seen = self.seen.clamp(min=1)
        left = DISCOUNT * self.kinds / seen  # what a length leaves to the one shorter
        share = share.clone()
        for i in reversed(range(1, share.size(1))):
            share[:, i - 1] += share[:, i] * left[:, i]
        of_one = share / seen
        _, tokens, hits = self.hits[0]
        alone = torch.zeros_like(sums[0]).index_put((tokens,), hits)
        sums += of_one[:, :1] * alone
        for i, (rows, tokens, hits) in enumerate(self.hits[1:], 1):
            hits = (hits - DISCOUNT).clamp(min=0)
            sums.index_put_((rows, tokens), of_one[rows, i] * hits, accumulate=True)
