"""Multiway dynamic dense connections (MUDD): how much a token takes of earlier streams, and how far
its gates are open, are functions of the token.

    c(x) = scale (W2 gelu(W1 x) + b)        W1: (HIDDEN, C), W2: (n, HIDDEN), zero at first

So each coefficient starts as a number, scale times b, and learns to differ between tokens. Two such
functions mix what the last layer and the head begin with, two more are gates of all layers: which
coefficient stands where is listed here, as Parts. Source: Xiao et al., arXiv:2502.12170, in the
form of the public record (modded-nanogpt, records 81 and 85).

Shapes: B rows, T tokens in a row, C width.
"""

import typing

import torch
import torch.nn.functional as F

HIDDEN = 64
SCALE = 0.1  # of the coefficients; of the gates it is learned, and this its start
# What a sublayer's stream is multiplied by at first: a layer has two, so the stream grows by 1.1
STREAM = 1.1**0.5


class Part(typing.NamedTuple):
    """Some coefficients of one function."""

    name: str
    layer: int  # whose block takes them
    size: int  # how many
    start: float  # what they are at first


def last_parts(c):
    """Of the last layer. x0: what the stream began with, late: the later of c.mudd's outputs."""
    i = c.n_layer - 1
    parts = [
        # What joins the values
        Part("values_x0", i, 1, 0.0),
        Part("values_late", i, 1, 0.0),
        Part("values_x", i, 1, 0.0),
        # What the stream is before attention is added
        Part("mix_x0", i, 1, 0.0),
        Part("mix_late", i, 1, 0.0),
        Part("mix_x", i, 1, 0.0),  # besides 1
    ]
    if i in c.value_embed_layers:  # a gate for each half of the heads
        parts.append(Part("value_gate", i, 1 if c.n_head % 2 else 2, 2.0))
    # The layer's factors, in place of numbers
    parts += [Part("stream", i, 1, STREAM), Part("attn", i, 1, 1.0), Part("x0", i, 1, 0.0)]
    if c.n_gram > 1:
        parts.append(Part("ngrams", i, 1, 0.05))
    return [*parts, Part("mlp_stream", i, 1, STREAM), Part("mlp", i, 1, 1.0)]


def behind_parts(c):
    """Behind the last layer: what joins the stream before the head."""
    i = c.n_layer
    parts = [
        Part("x0", i, 1, 0.0),
        Part("late", i, 1, -0.5),  # taken out
        Part("last", i, 1, 0.0),  # what the last layer began with
        Part("early", i, 1, 0.0),
    ]
    if c.value_embed_layers:  # the first one's value embedding
        parts.append(Part("value", i, 1, 0.0))
    return parts


def gate_parts(c):
    """Two lists: of layers before c.mudd_gates, and from there on."""
    before = []
    behind = []
    for i in range(c.n_layer):
        parts = before if i < c.mudd_gates else behind
        if i in c.xsa_layers:
            parts.append(Part("xsa", i, c.n_head, 0.0))
        if i in c.gated_layers:
            parts.append(Part("out", i, c.n_head, 0.25))
        if i in c.inject_layers:
            parts.append(Part("x0", i, 1, 0.0))
            if c.n_gram > 1:
                parts.append(Part("ngrams", i, 1, 0.05))
        if i in c.skip[1:]:
            parts.append(Part("skip", i, 1, 0.5))
    return before, behind


def size(parts):
    return sum(part.size for part in parts)


def new_weights(*lists):
    """(n, HIDDEN + 1) fp32: W2 and, as its last column, b, of the parts in these lists."""
    starts = [part.start for parts in lists for part in parts for _ in range(part.size)]
    w = torch.zeros(len(starts), HIDDEN + 1)
    w[:, -1] = torch.tensor(starts) / SCALE
    return w


def coefficients(x, w_in, w_out, scale, parts):
    """{layer: {name: (B, T, size)}} in x's dtype.

    x: (B, T, C); w_in: (HIDDEN, C), w_out: (n, HIDDEN + 1), with b as the last column, fp32.
    """
    hidden = F.gelu(F.linear(x, w_in.to(x.dtype)))
    out = F.linear(hidden, w_out[:, :-1].to(x.dtype))
    out = (scale * (out + w_out[:, -1])).to(x.dtype)  # (B, T, n), added in fp32
    found = {}
    pieces = out.split([part.size for part in parts], dim=-1)
    for part, piece in zip(parts, pieces):
        found.setdefault(part.layer, {})[part.name] = piece
    return found
