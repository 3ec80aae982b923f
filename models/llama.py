"""The field's template: a decoder-only transformer that other programs load as Llama or as Qwen3.

RMSNorm with weights before attention and before the MLP, rotary embedding by halves, grouped
queries, SwiGLU, no biases. With qk_norm, the queries and keys of each head are normalised as well,
which makes it a Qwen3. Every operation comes in the order that Hugging Face's classes have it in,
and rounds where they round, so that the same weights give the same logits there.

The matrices of all layers that have the same shape are one parameter (a bank), as in gpt.py.
docs/llama.md has the shapes of its tracks and what was measured.

Shapes: B rows, T tokens in a row, C width, H heads of queries, G of keys and of values, D head
width, F width of the MLP, V vocabulary, L layers.
"""

import dataclasses
import functools
import math
import typing

import torch
from torch import nn

from base import InputError
from base.options import FRACTION, POSITIVE, RATE, Options, option
from data.loader import IGNORE
from kernels import choose_ops, fp8_linear
from optim.adam import Adam
from optim.adamw import adamw_rules
from optim.muon import Muon

from .cache import KVCache
from .parts import (
    counted,
    draw,
    dropout,
    keep_less,
    log_probs_by_chunks,
    loss_by_chunks,
    memory_of_logits,
    memory_of_scores,
    only,
    spread,
)

SMALL = "attn_norms", "mlp_norms", "final_norm", "q_norms", "k_norms"  # parameters
LARGE = "embed", "lm_head", "q_bank", "kv_bank", "o_bank", "mlp_bank"

SCALINGS = ("none", "linear", "llama3", "yarn")


class Stage(typing.NamedTuple):
    """What the graph of a step depends on."""

    max_doc_len: int  # no document is longer


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Shape and parts of the model."""

    # Shape
    n_layer: int = option(4, "transformer blocks", POSITIVE, group="model")
    n_embd: int = option(256, "width", POSITIVE)
    n_head: int = option(4, "attention heads", POSITIVE)
    n_kv_head: int = option(
        0,
        "heads of keys and of values, each for as many of queries; 0 is n_head",
        (lambda n: n >= 0, "zero or more"),
    )
    head_dim: int = option(64, "width of a head", POSITIVE)
    ffn_dim: int = option(
        0,
        "hidden width of SwiGLU; 0 is 8/3 of n_embd, to a multiple of 64",
        (lambda n: n >= 0, "zero or more"),
    )
    tied_embeddings: bool = option(True, "the head is the embedding as well")
    # Parts
    qk_norm: bool = option(False, "normalise the queries and keys of each head: Qwen3, not Llama")
    norm_eps: float = option(1e-6, "what norms add to the mean square", POSITIVE)
    dropout: float = option(0.0, "of embeddings and of what each block adds, in training", FRACTION)
    # Positions
    rope_theta: float = option(10000.0, "longest rotary wavelength over 2 pi, in tokens", POSITIVE)
    rope_scaling: str = option("none", "for a context beyond rope_original_len", SCALINGS)
    rope_factor: float = option(1.0, "how many times as long that context is", RATE)
    rope_original_len: int = option(2048, "tokens of the context before rope_scaling", POSITIVE)

    def __post_init__(self):
        super().__post_init__()
        if self.n_head % self.kv_heads:
            self.refuse("n_kv_head", f"a number that divides n_head ({self.n_head}), or 0")
        if self.head_dim % 2:
            self.refuse("head_dim", "an even number")
        if not self.qk_norm and self.n_embd % self.n_head:
            why = "as Llama has it; with qk_norm any will do"
            self.refuse("n_embd", f"a multiple of n_head ({self.n_head}), {why}")
        if self.dropout == 1:
            self.refuse("dropout", "a fraction below 1")
        if self.rope_factor < 1:
            self.refuse("rope_factor", "1 or more")

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head

    @property
    def ffn(self):
        """Hidden width of the MLP."""
        return self.ffn_dim or -(-8 * self.n_embd // (3 * 64)) * 64

    def stage(self, progress, max_doc_len):
        """The Stage at this progress."""
        return Stage(max_doc_len)

    def at_the_end(self, progress=1.0):
        """{option: value} of those that change in the course of training: none."""
        return {}

    def val_stage(self, stage, max_doc_len):
        """The same for validation."""
        return Stage(max_doc_len)

    def target_weights(self, progress):
        return None  # one next token, of weight 1

    def is_new_loss(self, before, after):
        """Whether the training losses of two stages cannot be compared."""
        return False

    # ----------------------------------------------------------------------------------------------
    # What others call it

    def hf_names(self):
        """{parameter: Hugging Face's names of its parts along dim 0, or one name}; ".T": stored
        transposed."""

        def in_layers(*parts):
            return [
                f"model.layers.{i}.{part}.weight" for i in range(self.n_layer) for part in parts
            ]

        names = {
            "embed": "model.embed_tokens.weight",
            "lm_head": "lm_head.weight",
            "attn_norms": in_layers("input_layernorm"),
            "q_bank": in_layers("self_attn.q_proj"),
            "kv_bank": in_layers("self_attn.k_proj", "self_attn.v_proj"),
            "o_bank": in_layers("self_attn.o_proj"),
            "q_norms": in_layers("self_attn.q_norm"),
            "k_norms": in_layers("self_attn.k_norm"),
            "mlp_norms": in_layers("post_attention_layernorm"),
            "mlp_bank": in_layers("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
            "final_norm": "model.norm.weight",
        }
        names["mlp_bank"][2::3] = [f"{name}.T" for name in names["mlp_bank"][2::3]]
        return names

    def hf_config(self, progress):
        """Hugging Face's words for the configuration.

        What has a default there is written all the same, since defaults differ between the two
        families and between versions of the library.
        """
        family = "qwen3" if self.qk_norm else "llama"
        config = dict(
            architectures=["Qwen3ForCausalLM" if self.qk_norm else "LlamaForCausalLM"],
            model_type=family,
            hidden_size=self.n_embd,
            num_hidden_layers=self.n_layer,
            num_attention_heads=self.n_head,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.ffn,
            hidden_act="silu",
            rms_norm_eps=self.norm_eps,
            rope_theta=self.rope_theta,
            tie_word_embeddings=self.tied_embeddings,
            attention_bias=False,
            attention_dropout=0.0,
        )
        if self.qk_norm:
            config |= dict(use_sliding_window=False)
        else:
            config |= dict(mlp_bias=False)
        if self.rope_scaling != "none":
            config["rope_scaling"] = self.hf_rope_scaling()
        return config

    @classmethod
    def from_hf(cls, said):
        """The Config of a Hugging Face configuration of a Llama or a Qwen3, a dict. Raises
        InputError for what this template does not have, KeyError for what is missing."""
        qwen3 = said["model_type"] == "qwen3"
        n_head = said["num_attention_heads"]
        # Version 5 of transformers has the numbers of positions in a dict of their own
        rope = dict(said.get("rope_parameters") or said.get("rope_scaling") or {})
        theta = rope.get("rope_theta", said.get("rope_theta", 10000.0))
        scaling = rope.get("rope_type", rope.get("type", "default"))
        width = said.get("head_dim") or (128 if qwen3 else said["hidden_size"] // n_head)
        config = cls(
            n_layer=said["num_hidden_layers"],
            n_embd=said["hidden_size"],
            n_head=n_head,
            n_kv_head=said.get("num_key_value_heads") or n_head,
            head_dim=width,
            ffn_dim=said["intermediate_size"],
            tied_embeddings=said.get("tie_word_embeddings", False),
            qk_norm=qwen3,
            norm_eps=said.get("rms_norm_eps", 1e-6),
            rope_theta=float(theta),
            rope_scaling="none" if scaling == "default" else scaling,
            rope_factor=float(rope.get("factor", 1.0)),
            rope_original_len=rope.get("original_max_position_embeddings", 2048),
        )
        # What it would say of itself differs where something has no place here
        ours = config.hf_config(1.0)
        own = ours.pop("rope_scaling", {})
        theirs = {k: x for k, x in rope.items() if k not in ("type", "rope_theta", "rope_type")}
        for name in {*theirs, *own} - {"rope_type"}:
            if theirs.get(name) != own.get(name):
                raise InputError(
                    f"{name} of its positions is {theirs.get(name)}, where models/llama.py has "
                    f"{own.get(name)}"
                )
        for name in "attention_bias", "mlp_bias", "hidden_act", "use_sliding_window":
            if name in ours and said.get(name, ours[name]) != ours[name]:
                raise InputError(
                    f"{name} is {said[name]}, where models/llama.py has {ours[name]} only"
                )
        return config

    def hf_rope_scaling(self):
        scaling = dict(rope_type=self.rope_scaling, factor=self.rope_factor)
        if self.rope_scaling != "linear":
            scaling["original_max_position_embeddings"] = self.rope_original_len
        if self.rope_scaling == "llama3":
            scaling |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
        return scaling


class Layer(typing.NamedTuple):
    """The weights of one block."""

    number: int
    attn_norm: torch.Tensor  # (C,)
    w_q: torch.Tensor  # (H D, C)
    w_kv: torch.Tensor  # (2 G D, C): of keys, of values
    w_o: torch.Tensor  # (C, H D)
    q_norm: torch.Tensor | None  # (D,)
    k_norm: torch.Tensor | None
    mlp_norm: torch.Tensor  # (C,)
    w_gate_up: torch.Tensor  # (2 F, C): of the gate, of what it lets through
    w_down: torch.Tensor  # (F, C), transposed


class Batch(typing.NamedTuple):
    """What every block sees."""

    inputs: torch.Tensor  # (B, T) int64
    stage: Stage
    # Of the angles of the tokens' positions: (T, 1, D / 2), in decoding (B, T, 1, D / 2)
    cos: torch.Tensor
    sin: torch.Tensor
    # Rows of packed documents in training; in decoding a cache has what was before these tokens
    cu_seqlens: torch.Tensor | None  # (n,) int32
    cache: KVCache | None


class Model(nn.Module):
    """The transformer; models/__init__.py says what its methods are for."""

    # For weights of fewer bits: matrices of a Layer (whether stored transposed), tables, and the
    # banks that the matrices are of
    quantizable = dict(
        layer=dict(w_q=False, w_kv=False, w_o=False, w_gate_up=False, w_down=True),
        tables=("embed", "lm_head"),
        banks=("q_bank", "kv_bank", "o_bank", "mlp_bank"),
    )

    def __init__(self, c, n_vocab, max_len, dtype=torch.float32, ops=None):
        super().__init__()
        self.c = c
        self.n_vocab = n_vocab
        self.dtype = dtype  # of large parameters and activations
        self.ops = ops or choose_ops("cpu")
        self.recompute = False
        if self.ops.fp8 and (c.n_embd % 16 or c.ffn % 8):
            raise InputError(
                f"--fp8: products in 8-bit floats need an n_embd of a multiple of 16 and a ffn_dim "
                f"of 8, not {c.n_embd} and {c.ffn}; choose others, or --fp8 off"
            )

        def parameter(*shape, dtype=dtype):
            return nn.Parameter(torch.zeros(shape, dtype=dtype))

        L = c.n_layer
        C = c.n_embd
        V = -(-n_vocab // 64) * 64  # padded: GPUs like multiples of 64
        q_width = c.n_head * c.head_dim
        kv_width = c.kv_heads * c.head_dim
        n_heads_normed = L if c.qk_norm else 0
        self.embed = parameter(V, C)
        self.lm_head = parameter(0 if c.tied_embeddings else V, C)
        # Banks of equal matrices. The MLP's down matrices are stored transposed, so that they have
        # the shape of the others
        self.q_bank = parameter(L, q_width, C)
        self.kv_bank = parameter(2 * L, kv_width, C)  # K and V of one layer, of the next, ...
        self.o_bank = parameter(L, C, q_width)
        self.mlp_bank = parameter(3 * L, c.ffn, C)  # gate, up, down, gate, up, down, ...
        # Small parameters are fp32 whatever the rest is: they cost nothing
        self.attn_norms = parameter(L, C, dtype=torch.float32)
        self.mlp_norms = parameter(L, C, dtype=torch.float32)
        self.final_norm = parameter(C, dtype=torch.float32)
        self.q_norms = parameter(n_heads_normed, c.head_dim, dtype=torch.float32)
        self.k_norms = parameter(n_heads_normed, c.head_dim, dtype=torch.float32)

        # Rotary tables, the same throughout training
        for name in "cos", "sin":
            table = torch.zeros(max_len, 1, c.head_dim // 2, dtype=dtype)
            self.register_buffer(name, table, persistent=False)
        self.enter(0.0)

    @property
    def head(self):
        """(V, C): what the last hidden state is multiplied with."""
        return self.embed if self.c.tied_embeddings else self.lm_head

    # ----------------------------------------------------------------------------------------------
    # Weights and buffers

    @torch.no_grad()
    def init_weights(self, seed):
        """Outputs of all blocks start at zero, so that the model starts as embedding -> head."""

        def normal(name, std):
            p = self.get_parameter(name)
            p.copy_(draw(name, p, seed, std))

        # Small logits: the first loss is that of a uniform guess
        normal("embed", 0.02)
        normal("lm_head", 0.005)
        std = 0.5 * self.c.n_embd**-0.5
        normal("q_bank", std)
        normal("kv_bank", std)
        normal("mlp_bank", std)
        self.o_bank.zero_()
        self.mlp_bank[2::3].zero_()  # down
        for name in SMALL:
            self.get_parameter(name).fill_(1.0)

    def enter(self, progress):
        """Fill the rotary tables."""
        if self.cos.is_meta:
            return  # a model that is only counted
        freqs, size = rope_frequencies(self.c)  # (D / 2,)
        positions = torch.arange(len(self.cos), dtype=torch.float32)
        angles = (positions[:, None] * freqs)[:, None]  # (T, 1, D / 2)
        self.cos.copy_(angles.cos() * size)
        self.sin.copy_(angles.sin() * size)

    def after_step(self):
        pass

    def state(self):
        return {}

    def reset_state(self):
        pass

    def successors(self, before, after):
        return {}

    # ----------------------------------------------------------------------------------------------
    # Forward

    def hidden(self, inputs, cu_seqlens, stage, cache=None, kept=None):
        """inputs: (B, T) int64; stage: a Stage -> (B, T, C) ready for the head.

        cache: what was before in each row, instead of cu_seqlens; kept: (n,) int64, numbers of the
        tokens that are asked for -> (n, C).
        """
        c = self.c
        x = self.ops.embedding(inputs, self.embed)  # (B, T, C)
        if cache and cache.blocks and cache.blocks.takes(x, cache.lengths):
            kv = cache.rooms(c.n_layer, (c.kv_heads, c.head_dim), self.dtype)
            return cache.blocks(x, cache.lengths, kv, stage.max_doc_len - 1)
        if cache is None:
            cos = self.cos[: inputs.size(1)]
            sin = self.sin[: inputs.size(1)]
        else:  # each row is at positions of its own
            cos = self.cos[cache.positions()]
            sin = self.sin[cache.positions()]
        batch = Batch(inputs, stage, cos, sin, cu_seqlens, cache)

        x = self.drop(x, batch, 0)
        for layer in cache.layers if cache else self.layers():
            last = layer.number == c.n_layer - 1
            x = keep_less(self.recompute, self.block, layer, x, batch, kept if last else None)
        return self.ops.rms_norm(x, self.final_norm.to(x.dtype), c.norm_eps)

    def layers(self):
        """A Layer for each block: its slices of the banks."""
        c = self.c
        L = c.n_layer
        small = {}
        for name in "attn_norms", "mlp_norms", "q_norms", "k_norms":
            norms = self.get_parameter(name).to(self.dtype).unbind(0)
            small[name] = norms or L * [None]
        q = self.q_bank.unbind(0)
        kv = self.kv_bank.view(L, -1, c.n_embd).unbind(0)
        o = self.o_bank.unbind(0)
        mlp = self.mlp_bank.view(L, -1, c.n_embd).unbind(0)
        layers = []
        for i in range(L):
            w_gate_up, w_down = mlp[i].split([2 * c.ffn, c.ffn])
            layers.append(
                Layer(
                    number=i,
                    attn_norm=small["attn_norms"][i],
                    w_q=q[i],
                    w_kv=kv[i],
                    w_o=o[i],
                    q_norm=small["q_norms"][i],
                    k_norm=small["k_norms"][i],
                    mlp_norm=small["mlp_norms"][i],
                    w_gate_up=w_gate_up,
                    w_down=w_down,
                )
            )
        return layers

    def block(self, layer, x, batch, kept=None):
        """One block on the residual stream: (B, T, C) -> (B, T, C); kept: as for hidden()."""
        ops = self.ops
        eps = self.c.norm_eps
        h = ops.rms_norm(x, layer.attn_norm, eps)
        y = self.attention(layer, h, batch)
        if kept is not None:  # behind attention, tokens do not know of each other
            x, y = only(kept, x.flatten(0, 1), y.flatten(0, 1))
        y = self.drop(y, batch, 2 * layer.number + 1)
        h, x = ops.add_rms_norm(x, y, layer.mlp_norm, eps)  # x + y, and that normalised
        return x + self.drop(self.mlp(layer, h), batch, 2 * layer.number + 2)

    def attention(self, layer, h, batch):
        """h: (B, T, C), normalised -> (B, T, C)."""
        c = self.c
        B, T = batch.inputs.shape
        q = self.ops.linear(h, layer.w_q).view(B, T, c.n_head, c.head_dim)
        kv = self.ops.linear(h, layer.w_kv).view(B, T, 2, c.kv_heads, c.head_dim)
        k, v = kv.unbind(2)  # (B, T, G, D) each

        # Normalised or not, queries and keys turn with their positions. (The op qk_norm_rope has no
        # weights, and turns the other way.)
        if c.qk_norm:
            q = self.ops.rms_norm(q, layer.q_norm, c.norm_eps)
            k = self.ops.rms_norm(k, layer.k_norm, c.norm_eps)
        q = self.ops.rotate_halves(q, batch.cos, batch.sin)
        k = self.ops.rotate_halves(k, batch.cos, batch.sin)

        # All of the document so far
        window = batch.stage.max_doc_len - 1
        scale = c.head_dim**-0.5
        if batch.cache is not None:
            y = batch.cache.attend(layer.number, q, k, v, window, scale)
        else:
            y = self.ops.attention(
                q,
                k,
                v,
                cu_seqlens=batch.cu_seqlens,
                max_seqlen=batch.stage.max_doc_len,
                window=window,
                scale=scale,
            )
        return self.ops.linear(y.reshape(B, T, -1), layer.w_o)

    def mlp(self, layer, h):
        """SwiGLU: (..., C) -> (..., C)."""
        # In FP8 the wide product is in 8-bit floats, except where there are no gradients, so that
        # validation measures the weights; the narrow one would lose more than it gains
        wide = self.ops.linear
        if self.ops.fp8 and torch.is_grad_enabled():
            wide = fp8_linear
        y = self.ops.swiglu(wide(h, layer.w_gate_up))  # (..., F)
        return self.ops.linear(y, layer.w_down, transposed=True)

    def drop(self, x, batch, place):
        """Dropout at a place of its own in the model; in training only."""
        if not self.c.dropout or not torch.is_grad_enabled():
            return x
        return dropout(x, self.c.dropout, batch.inputs, place)

    def forward(self, inputs, targets, cu_seqlens, stage, target_weights=None):
        """Summed cross-entropy (fp32 scalar) over the targets that are not padding."""
        x, targets, _ = self.hidden_of(inputs, targets, cu_seqlens, stage)
        loss = functools.partial(self.ops.linear_cross_entropy, cap=None)
        return loss_by_chunks(self.recompute, loss, self.head, x, targets)

    def hidden_of(self, inputs, targets, cu_seqlens, stage):
        """(x, (n, C) ready for the head; targets, (n,); numbers of these tokens or None): of those
        that count."""
        targets = targets.flatten()
        kept = None if self.c.dropout else counted(targets)  # whose places in a batch matter
        x = self.hidden(inputs, cu_seqlens, stage, kept=kept)
        (targets,) = only(kept, targets)
        return x.view(len(targets), -1), targets, kept

    def log_probs(self, inputs, targets, cu_seqlens, stage, n_vocab=None):
        """(B, T) log probabilities of the targets, 0 where one is IGNORE; n_vocab: among so many
        tokens, as logits() has them; None: and what pads them, as in training."""
        x, targets, kept = self.hidden_of(inputs, targets, cu_seqlens, stage)
        of_rows = functools.partial(self.ops.linear_log_prob, ignore_index=IGNORE)
        head = self.head[:n_vocab]
        found = log_probs_by_chunks(of_rows, head, x, targets)
        return spread(kept, found, inputs.numel()).view_as(inputs)

    def logits(self, inputs, cu_seqlens, stage, last_only=False):
        """(B, T, n_vocab) fp32, (B, 1, n_vocab) of the last tokens only."""
        x = self.hidden(inputs, cu_seqlens, stage)
        first = inputs.size(1) - 1 if last_only else 0
        return self.ops.linear(x[:, first:], self.head[: self.n_vocab]).float()

    def new_cache(self, rows):
        """An empty cache for decode()."""
        c = self.c
        layers = self.layers()
        cache = KVCache(rows, self.embed.device, layers, self.ops.attend_one)
        if self.ops.decoding:
            about = self.final_norm, self.cos, self.sin, c.n_head, c.kv_heads, c.norm_eps
            cache.blocks = self.ops.decoding.blocks(layers, *about)
        return cache

    def decode(self, inputs, counts, cache, stage, every=False):
        """The new tokens of each row, and what follows them: (B, n_vocab) fp32.

        inputs: (B, S) int64, padded on the right; counts: B numbers of tokens without the padding,
        each 1 or more; cache: has the tokens before, and then these as well. A row's first token
        begins a document, and all are part of it. every: what follows each of them, (B, S,
        n_vocab), and the caller tells cache.end() how many stay.
        """
        cache.begin(inputs.size(1), counts)
        x = self.hidden(inputs, None, stage, cache)
        if not every:
            x = cache.of_last(x)[:, 0]  # (B, C)
            cache.end()
        return self.ops.linear(x, self.head[: self.n_vocab]).float()

    # ----------------------------------------------------------------------------------------------
    # What others need to know of the parameters

    def update_rules(self, optim):
        """Every parameter's rule. Small ones first, the long Muon updates last, so that they hide
        the others' gathers."""
        if optim.optimizer == "adamw":
            return adamw_rules(optim, SMALL, LARGE)
        decay = optim.weight_decay
        muon = Muon(
            optim.muon_lr,
            weight_decay=decay,
            normuon=optim.normuon,
            orthogonalise=self.ops.polar_express,
        )
        adam = functools.partial(Adam, optim.adam_lr, every=optim.adam_every)
        head = adam(betas=(0.75, 0.95), weight_decay=decay / 1.6)
        norms = adam(betas=(0.9, 0.99), sharded=False)
        rules = dict.fromkeys(SMALL, norms) | dict.fromkeys(LARGE, muon)
        return rules | dict(embed=head, lm_head=head)

    def flops_per_token(self, stage):
        """Training FLOPs per token: 6 per matrix weight in use, and attention over half of what it
        may see."""
        c = self.c
        # A product of n weights takes 2 n forward and 4 n backward
        banks = self.q_bank, self.kv_bank, self.o_bank, self.mlp_bank
        matrices = sum(bank.numel() for bank in banks) + self.head.numel()
        # Attention: 2 products of a width for each key, 3 times that with backward
        seen = c.n_layer * stage.max_doc_len  # keys
        return 6 * matrices + 12 * c.n_head * c.head_dim * seen / 2

    def activation_bytes(self, rows, row_len, recompute):
        """Bytes kept for backward, of activations and of logits.

        A block keeps what its matrices multiply, what its norms normalise, queries, keys and values
        before and after they turn, and three widths of the MLP; with recompute one width, and one
        block's all while it is computed again.
        """
        c = self.c
        size = self.embed.element_size()
        tokens = rows * row_len
        q_width = c.n_head * c.head_dim
        kv_width = c.kv_heads * c.head_dim
        block = 4 * c.n_embd + 3 * q_width + 4 * kv_width + 3 * c.ffn
        if c.qk_norm:
            block += q_width + kv_width
        if c.kv_heads < c.n_head:  # keys and values are repeated for attention
            block += 2 * q_width
        if recompute:
            widths = c.n_layer * c.n_embd + block
        else:
            widths = c.n_layer * block

        ops = self.ops.named()
        layers = 1 if recompute else c.n_layer
        scores = memory_of_scores(ops, tokens, c.n_head, [row_len] * layers, size)
        logits = memory_of_logits(
            ops["linear_cross_entropy"], tokens, len(self.embed), size, recompute
        )
        return dict(activations=tokens * size * widths + scores, logits=logits)


# --------------------------------------------------------------------------------------------------
# Positions


def rope_frequencies(c):
    """((D / 2,) radians per token, factor of cosine and sine), as Hugging Face's rope_type says.

    linear: all are slowed down by rope_factor. llama3 and yarn: those that turn less than once, or
    in part less than 4 or 32 times, in the original context.
    """
    D = c.head_dim
    freqs = c.rope_theta ** -(torch.arange(0, D, 2, dtype=torch.float32) / D)
    slow = freqs / c.rope_factor
    turns = c.rope_original_len * freqs / (2 * math.pi)  # in the original context
    if c.rope_scaling == "linear":
        return slow, 1.0
    if c.rope_scaling == "llama3":
        kept = ((turns - 1) / (4 - 1)).clamp(0, 1)
        return kept * freqs + (1 - kept) * slow, 1.0
    if c.rope_scaling == "yarn":
        # By the dimension, between those that turn 32 times and once
        first, last = (
            D * math.log(c.rope_original_len / (n * 2 * math.pi)) / (2 * math.log(c.rope_theta))
            for n in (32, 1)
        )
        first = max(math.floor(first), 0)
        last = min(math.ceil(last), D - 1)
        ramp = (torch.arange(D // 2, dtype=torch.float32) - first) / max(last - first, 0.001)
        kept = 1 - ramp.clamp(0, 1)
        return kept * freqs + (1 - kept) * slow, 0.1 * math.log(c.rope_factor) + 1
    return freqs, 1.0
