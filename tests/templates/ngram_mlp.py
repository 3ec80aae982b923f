"""The smallest template that has everything: a two-layer MLP over the last tokens' embeddings.

It shows what models/__init__.py asks for, and tests train it with the programs as they are:
`--template templates.ngram_mlp`.

Shapes: B rows, T tokens in a row, V vocabulary, N tokens looked back at, E width of an embedding, H
width of the hidden layer.
"""

import dataclasses
import typing

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from base.options import POSITIVE, Options, option
from models.parts import document_starts, draw, previous
from optim import Adam, Muon, RowAdam


class Stage(typing.NamedTuple):
    """What the graph of a step depends on."""

    max_doc_len: int
    late: bool  # whether the gain has begun


@dataclasses.dataclass(frozen=True)
class Config(Options):
    look_back: int = option(4, "tokens that a prediction sees", POSITIVE, group="model")
    width: int = option(16, "of a token's embedding", POSITIVE)
    hidden: int = option(64, "of the layer between", POSITIVE)

    def stage(self, progress, max_doc_len):
        return Stage(max_doc_len, late=progress >= 0.5)

    def val_stage(self, stage, max_doc_len):
        return stage._replace(max_doc_len=max_doc_len)

    def target_weights(self, progress):
        return None

    def is_new_loss(self, before, after):
        return False

    def hf_names(self):
        return {
            "tokens": "model.embed_tokens.weight",
            "matrix": "model.mlp.up_proj.weight",
            "head": "lm_head.weight",
        }

    def hf_config(self, progress):
        return dict(
            architectures=["NgramMLP"],
            model_type="ngram_mlp",
            hidden_size=self.width,
            intermediate_size=self.hidden,
        )


class Model(nn.Module):
    def __init__(self, c, n_vocab, max_len, dtype, ops):
        super().__init__()
        self.c = c
        self.n_vocab = n_vocab
        self.dtype = dtype
        self.ops = ops
        self.recompute = False
        self.tokens = nn.Parameter(torch.zeros(n_vocab + 1, c.width, dtype=dtype))
        self.matrix = nn.Parameter(torch.zeros(c.hidden, c.look_back * c.width, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(c.hidden))
        self.head = nn.Parameter(torch.zeros(n_vocab, c.hidden, dtype=dtype))
        # What training keeps up to date besides parameters, and what a stage's entry fills
        self.register_buffer("steps", torch.zeros(()), persistent=False)
        self.register_buffer("gain", torch.ones(()), persistent=False)

    # --- Weights and buffers

    @torch.no_grad()
    def init_weights(self, seed):
        self.tokens.copy_(draw("tokens", self.tokens, seed, 1.0))
        std = self.matrix.size(1) ** -0.5
        self.matrix.copy_(draw("matrix", self.matrix, seed, std))
        self.bias.zero_()
        self.head.zero_()
        self.steps.zero_()

    def enter(self, progress):
        self.gain.fill_(1.25 if self.c.stage(progress, 0).late else 1.0)

    def after_step(self):
        self.steps += 1

    def state(self):
        return {"steps": self.steps}

    def reset_state(self):
        self.steps.zero_()

    def successors(self, before, after):
        return {}

    # --- Forward

    def features(self, inputs, cu_seqlens):
        """(B, T) int64 -> (B, T, H)."""
        starts = document_starts(inputs, cu_seqlens)
        nothing = torch.full_like(inputs, self.n_vocab)  # before a document begins
        seen = [inputs]
        for _ in range(self.c.look_back - 1):
            seen.append(previous(seen[-1], starts, nothing))
        x = F.embedding(torch.stack(seen, -1), self.tokens).flatten(2)  # (B, T, N E)
        h = F.linear(x, self.matrix) + self.bias.to(x.dtype)
        return self.gain.to(x.dtype) * torch.tanh(h)

    def forward(self, inputs, targets, cu_seqlens, stage, target_weights=None):
        if self.recompute and torch.is_grad_enabled():
            h = checkpoint(self.features, inputs, cu_seqlens, use_reentrant=False)
        else:
            h = self.features(inputs, cu_seqlens)
        loss = self.ops.linear_cross_entropy
        return loss(h.flatten(0, 1), self.head, targets.flatten(), cap=None)

    def logits(self, inputs, cu_seqlens, stage, last_only=False):
        h = self.features(inputs, cu_seqlens)
        if last_only:
            h = h[:, -1:]
        return F.linear(h, self.head).float()

    # --- What others need to know of the parameters

    def update_rules(self, optim):
        return {
            "bias": Adam(optim.adam_lr, sharded=False),
            "tokens": RowAdam(optim.adam_lr),
            "head": Adam(optim.adam_lr, weight_decay=optim.weight_decay),
            "matrix": Muon(optim.muon_lr, orthogonalise=self.ops.polar_express),
        }

    def flops_per_token(self, stage):
        return 6 * (self.matrix.numel() + self.head.numel())

    def activation_bytes(self, rows, row_len, recompute):
        size = self.dtype.itemsize
        tokens = rows * row_len
        widths = 0 if recompute else self.matrix.size(1) + 2 * self.c.hidden
        return dict(
            activations=tokens * size * widths, logits=tokens * self.n_vocab * (2 * size + 4)
        )
