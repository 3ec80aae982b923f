"""What a run's model thinks of given tokens: the log probability of each.

Everything that is measured stands on these two: Scorer.windows() for running text, and
Scorer.continuations() for how likely a text is after another one.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from base import InputError
from data.loader import IGNORE, default_max_docs, pack

PASS_TOKENS = 8192  # of a forward pass


class Scored(NamedTuple):
    """A continuation, as a model sees it."""

    log_probs: np.ndarray  # (n,) of its tokens
    is_greedy: bool | None  # whether every token is the likeliest one; None where nobody asked
    n_cut: int  # tokens of the context that did not fit

    @property
    def log_prob(self):
        return float(self.log_probs.sum())


class Scorer:
    """Log probabilities by the model of a run.

    saved: runtime.saved.Saved. Text begins as in training, with the end-of-text token.
    """

    def __init__(self, saved, quiet=False):
        self.model = saved.model.eval()
        self.stage = saved.stage
        self.tokenizer = saved.tokenizer
        self.max_len = saved.max_len
        self.device = next(saved.model.parameters()).device
        self.quiet = quiet

    @torch.inference_mode()
    def log_probs(self, batch):
        """(B, T) float64 on the CPU, of a MicroBatch's targets; 0 where one is IGNORE."""
        inputs, targets, cu_seqlens = (t.to(self.device) for t in batch)
        if hasattr(self.model, "log_probs"):
            found = self.model.log_probs(inputs, targets, cu_seqlens, self.stage)
        else:
            logits = self.model.logits(inputs, cu_seqlens, self.stage)
            losses = F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="none"
            )
            found = -losses.view_as(inputs)
        found = found.double().cpu()
        if not found.isfinite().all():
            raise InputError("the model's losses are not finite: its weights are of no use")
        return found

    @torch.inference_mode()
    def greedy(self, batch):
        """(B, T) bool: whether each target is the likeliest token."""
        inputs, targets, cu_seqlens = (t.to(self.device) for t in batch)
        likeliest = self.model.logits(inputs, cu_seqlens, self.stage).argmax(-1)
        return (likeliest == targets).cpu()

    def windows(self, streams, row_len, overlap=0):
        """(n,) float64: nats of every token of the streams but their first, each counted once.

        Rows of row_len tokens go through a stream one after another, as in training's validation;
        a token sees what stands before it in its row and its document. With overlap, each row
        begins so many tokens earlier, for context alone. streams: (tokens,) arrays.
        """
        rows = []  # (tokens, where its documents start, first input, first target, end)
        for tokens in streams:
            n = len(tokens) - 1
            starts = np.flatnonzero(tokens[:n] == self.tokenizer.eot)
            end = 0
            while end < n:
                begin = max(0, end - overlap)
                last = min(begin + row_len, n)
                rows.append((tokens, starts, begin, end, last))
                end = last

        found = []
        max_docs = default_max_docs(row_len)
        at_once = max(1, PASS_TOKENS // row_len)
        with self.bar(len(rows) * row_len, "token") as bar:
            for i in range(0, len(rows), at_once):
                group = rows[i : i + at_once]
                segments = [as_segments(row[0], row[1], row[2], row[4]) for row in group]
                batch = pack(segments, row_len, max_docs, row_len)
                for log_probs, (*_, begin, first, last) in zip(self.log_probs(batch), group):
                    found.append(-log_probs[first - begin : last - begin].numpy())
                bar.update(len(group) * row_len)
        return np.concatenate(found)

    def encode_pair(self, context, continuation):
        """(tokens of the context, of the continuation), by lm-eval's rule: spaces at the end of
        the context belong to the continuation, and the two are encoded as one text. Raises
        InputError for text that the tokenizer does not know."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            continuation = context[-spaces:] + continuation
            context = context[:-spaces]
        whole, before = self.tokenizer.encode([context + continuation, context])
        return before.tolist(), whole[len(before) :].tolist()

    def continuations(self, pairs, greedy=False):
        """A Scored for each pair, in their order.

        pairs: (tokens of the context, tokens of the continuation); the context is not empty, and
        its first tokens are cut where all do not fit.
        """
        found = [None] * len(pairs)
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        at = 0
        with self.bar(len(pairs), "text") as bar:
            while at < len(order):
                longest = sum(map(len, pairs[order[at]]))
                group = order[at : at + max(1, PASS_TOKENS // min(longest, self.max_len))]
                at += len(group)
                for i, scored in zip(group, self.score([pairs[i] for i in group], greedy)):
                    found[i] = scored
                bar.update(len(group))
        return found

    def score(self, pairs, greedy):
        """The same for pairs that go through the model together."""
        rows = []
        for context, continuation in pairs:
            if not continuation:
                raise InputError("a continuation of no tokens: expected some text")
            tokens = [*context, *continuation]
            cut = max(0, len(tokens) - 1 - self.max_len)
            if cut >= len(context):
                raise InputError(
                    f"a continuation of {len(continuation)} tokens: the model looks back at "
                    f"{self.max_len}; expected a shorter text"
                )
            rows.append((np.array(tokens[cut:]), len(context) - cut, cut))
        longest = max(len(tokens) for tokens, _, _ in rows) - 1
        segments = [[(tokens, 0, len(tokens) - 1)] for tokens, _, _ in rows]
        batch = pack(segments, longest, 1, longest)
        # The context's tokens stay targets: what followed what is of use to some models
        found = self.log_probs(batch).numpy()
        likeliest = self.greedy(batch).numpy() if greedy else None
        scored = []
        for i, (tokens, first, cut) in enumerate(rows):
            own = slice(first - 1, len(tokens) - 1)
            is_greedy = bool(likeliest[i, own].all()) if greedy else None
            scored.append(Scored(found[i, own], is_greedy, cut))
        return scored

    def bar(self, total, unit):
        return tqdm(
            total=total,
            unit=unit,
            unit_scale=True,
            delay=2,
            leave=False,
            disable=self.quiet or None,
        )


def as_segments(tokens, starts, begin, end):
    """A row's (tokens, start, length) segments, one for each document; starts: where documents
    begin."""
    first = np.searchsorted(starts, begin + 1)
    last = np.searchsorted(starts, end)
    borders = [begin, *starts[first:last].tolist(), end]
    return [(tokens, a, b - a) for a, b in zip(borders, borders[1:])]
