"""The speedrun's template: a decoder-only transformer with the public record's main parts.

The matrices of all layers that have the same shape are one parameter (a bank), so that the
optimizer orthogonalises them in one batch and ranks share them out evenly. Parts that are switched
off have no elements. Which parts there are is gpt_config.py's; what they are and where they come
from is in docs/recipe.md.

Shapes: B rows, T tokens in a row, C width, H heads, D head width, V vocabulary, L layers.
"""

import functools
import typing

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from base import InputError
from data.loader import IGNORE
from kernels import choose_ops
from kernels.fp8_mlp import FP8MLPs
from kernels.gates import stands_still
from kernels.sampled_softmax import sample_vocabulary
from optim.adam import Adam
from optim.adamw import adamw_rules
from optim.muon import Muon
from optim.rows import RowAdam

from . import copies, counts, mudd
from .cache import KVCache
from .gpt_config import Config, Stage
from .parts import (
    GATE_INPUTS,
    UnbindWithRoom,
    document_starts,
    draw,
    gate,
    keep_less,
    later_targets,
    log_probs_by_chunks,
    loss_by_chunks,
    memory_of_logits,
    memory_of_scores,
    previous,
    rope_frequencies,
    softcap,
    without_own_value,
)

__all__ = ["Config", "Model"]  # what a template offers

# A mixture's gradient reaches the head where others know little, so it learns no more than they
# leave. So many times its own loss is added: 0.03 to 0.1 bits per byte less after 200 steps
ALONE = 0.3
MIXED = 64  # tokens whose whole distributions are mixed at once
SMALL = (  # parameters
    "lambdas",
    "residual_lambdas",
    "post_lambdas",
    "inject_lambdas",
    "scalars",
    "qkvo_scales",
    "smear_gate",
    "attn_gates",
    "value_gates",
    "xsa_strengths",
    "mudd_in",
    "mudd_out",
    "mudd_gate_in",
    "mudd_gate_out",
    "mudd_gate_scale",
    "mix_gates",
    "mix_counts",
)
LARGE = "value_embeds", "embed", "ngram_embeds", "lm_head", "attn_bank", "mlp_bank"


class Layer(typing.NamedTuple):
    """The weights of one block."""

    number: int
    # None in a layer without attention
    w_qkv: torch.Tensor | None  # (3 C, C)
    w_o: torch.Tensor | None  # (C, C)
    w_out_gate: torch.Tensor | None  # (H, GATE_INPUTS): of the heads' outputs
    w_value_gate: torch.Tensor | None  # (H, GATE_INPUTS): of the value embedding
    # Numbers by what they weigh, and "xsa" (H,): how much of a head's own value is left out.
    # Functions of the token can take their places
    weights: dict
    w_up: torch.Tensor  # (mlp_ratio C, C)
    w_down: torch.Tensor  # (mlp_ratio C, C), transposed


class Batch(typing.NamedTuple):
    """What every block sees."""

    inputs: torch.Tensor  # (B, T) int64
    stage: Stage
    # Rows of packed documents in training; in decoding a cache has what was before these tokens
    starts: torch.Tensor | None  # (B, T) bool: where documents begin
    cu_seqlens: torch.Tensor | None  # (n,) int32
    cache: KVCache | None = None


class Given(typing.NamedTuple):
    """What a block sees besides the stream: (B, T, C) each, or None."""

    weights: dict  # of the layer, and the token's, (B, T, n) each, in their places
    x0: torch.Tensor  # what the stream began with
    ngrams: torch.Tensor | None  # to be injected
    skipped: torch.Tensor | None  # an earlier layer's output, weighted, in place of attention
    attn_input: torch.Tensor | None  # of an earlier layer, normalised: what attention sees
    value: torch.Tensor | None  # the tokens' value embeddings
    late: torch.Tensor | None  # a later layer's output, mixed in by MUDD


def numbers(p):
    """The rows of p (n, m) as tuples of numbers, taken apart at once: one kernel in backward."""
    flat = p.flatten().unbind(0)
    m = p.size(1)
    return [flat[i : i + m] for i in range(0, len(flat), m)]


class Model(nn.Module):
    """The transformer; models/__init__.py says what its methods are for."""

    def __init__(self, c, n_vocab, max_len, dtype=torch.float32, ops=None):
        super().__init__()
        self.c = c
        self.n_vocab = n_vocab
        self.dtype = dtype  # of large parameters and activations
        self.ops = ops or choose_ops("cpu")
        self.recompute = False
        self.grad_rooms = {}

        def parameter(*shape, dtype=dtype):
            return nn.Parameter(torch.zeros(shape, dtype=dtype))

        L = c.n_layer
        C = c.n_embd
        H = c.n_head
        V = -(-n_vocab // 64) * 64  # padded: GPUs like multiples of 64
        n_attn = len(c.attn_layers)
        n_value = len(c.value_embed_layers)
        # Token tables, untied; lm_head is both as long as a stage is tied
        self.embed = parameter(V, C)
        self.lm_head = parameter(V, C)
        self.value_embeds = parameter(n_value, V, C)
        self.ngram_embeds = parameter(c.n_gram - 1, c.ngram_rows, C)
        # Banks of equal matrices. The MLP's down matrices are stored transposed, so that they have
        # the shape of its up matrices
        self.attn_bank = parameter(n_attn * 4, C, C)  # Q, K, V, O of one layer, of the next, ...
        self.mlp_bank = parameter(L * 2, c.mlp_ratio * C, C)  # up, down, up, down, ...
        # Small parameters are fp32 whatever the rest is: they cost nothing
        by_token = c.mudd_gates >= 0  # whether functions of the token are in place of these
        n_gated = 0 if by_token else len(c.gated_layers)
        n_xsa = 0 if by_token else len(c.xsa_layers)
        n_value_gates = len(c.value_gate_layers)
        self.value_gates = parameter(n_value_gates, H, GATE_INPUTS, dtype=torch.float32)
        self.attn_gates = parameter(n_gated, H, GATE_INPUTS, dtype=torch.float32)
        self.xsa_strengths = parameter(n_xsa, H, dtype=torch.float32)
        self.qkvo_scales = parameter(n_attn * c.qkvo_scales, 2, dtype=torch.float32)  # of QKV, of O
        self.smear_gate = parameter(int(c.smear), GATE_INPUTS, dtype=torch.float32)
        # Gates of the model's own distribution and of each length's copies and counts: by the
        # token, and by how often the context was there
        n_others = c.copies + c.counts
        n_mixed = n_others + 1 if n_others else 0
        n_told = 2 * n_others + (c.copies > 0) + (c.counts > 0)
        n_told = max(1, n_told)  # so many without any in runs from before there were counts
        self.mix_gates = parameter(n_mixed, C, dtype=torch.float32)
        self.mix_counts = parameter(n_mixed, n_told, dtype=torch.float32)
        # Of the residual stream and of what it began with; or of the stream and of what joins it,
        # for attention and for the MLP, and of what it began with and n-grams
        n_lambdas = L * c.sublayer_lambdas
        n_inject = len(c.inject_layers) if c.sublayer_lambdas and not by_token else 0
        self.lambdas = parameter(L - n_lambdas, 2, dtype=torch.float32)
        self.residual_lambdas = parameter(n_lambdas, 2, dtype=torch.float32)
        self.post_lambdas = parameter(n_lambdas, 2, dtype=torch.float32)
        with_ngrams = c.inject and c.n_gram > 1
        self.inject_lambdas = parameter(n_inject, 1 + with_ngrams, dtype=torch.float32)
        self.scalars = parameter(3, dtype=torch.float32)  # weights of smear, skip and backout

        # MUDD's functions: of the last layer and behind it, and of gates
        parts = [mudd.last_parts(c), mudd.behind_parts(c)] if c.mudd else []
        rows = sum(map(mudd.size, parts))
        self.mudd_in = parameter(len(parts), mudd.HIDDEN, C, dtype=torch.float32)
        self.mudd_out = parameter(rows, mudd.HIDDEN + 1, dtype=torch.float32)
        parts = mudd.gate_parts(c) if by_token else []
        rows = sum(map(mudd.size, parts))
        self.mudd_gate_in = parameter(len(parts), mudd.HIDDEN, C, dtype=torch.float32)
        self.mudd_gate_out = parameter(rows, mudd.HIDDEN + 1, dtype=torch.float32)
        self.mudd_gate_scale = parameter(len(parts), 1, dtype=torch.float32)

        # Rotary tables, filled by enter(); paired heads take turns in rows of twice the length
        n_positions = max_len * (2 if c.paired_layers else 1)
        for name in "cos", "sin":
            table = torch.zeros(n_positions, 1, c.head_dim // 2, dtype=dtype)
            self.register_buffer(name, table, persistent=False)
        # For stages that ask for them: what attention's scores are multiplied by, beside the last
        # stage's scale, and whether the head is the embedding
        self.register_buffer("rescale", torch.ones(()), persistent=False)
        self.register_buffer("head_is_embed", torch.zeros((), dtype=torch.bool), persistent=False)
        # Signs for n-grams that share a row, drawn once and for all
        g = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (1024 * c.ngram_signs, C), generator=g, device="cpu")
        self.register_buffer("signs", (2 * signs - 1).to(self.cos), persistent=False)
        # The longest token that each one begins with: known after learn_tokens()
        prefixes = torch.full((V if any(c.prefix_loss) else 0,), IGNORE)
        self.register_buffer("prefixes", prefixes, persistent=False)
        self.knows_tokens = False
        # Of the training text, where they are mixed in: known after learn_tokens(), too
        self.counts = counts.Counts(c.counts)
        self.enter(0.0)
        # In FP8 the MLPs have scales, and copies of their weights
        self.fp8_mlps = FP8MLPs(L, c.mlp_ratio * C, C) if self.ops.fp8 else None
        if self.ops.fp8:
            self.mlps = [functools.partial(self.fp8_mlps, i) for i in range(L)]
        else:
            self.mlps = [self.ops.new_mlp()] * L

    # ----------------------------------------------------------------------------------------------
    # Weights and buffers

    @torch.no_grad()
    def init_weights(self, seed):
        """Outputs of all MLPs start at zero, and of attention if it has no scales: then the model
        starts as embedding -> head."""

        def normal(name, std):
            p = self.get_parameter(name)
            p.copy_(draw(name, p, seed, std))

        # Tokens have size 1, since what follows is normalised; n-grams have nothing to say yet
        normal("embed", 1.0)
        self.ngram_embeds.zero_()
        # Small logits: the first loss is that of a uniform guess
        normal("lm_head", 0.005)
        normal("value_embeds", 0.01)
        std = 0.5 * self.c.n_embd**-0.5
        normal("attn_bank", std)
        if self.c.qkvo_scales:
            # Queries and keys are normalised, so half of QKV is half of the values
            self.qkvo_scales.copy_(torch.tensor([0.5, 1.0]).expand_as(self.qkvo_scales))
        else:
            self.attn_bank[3::4].zero_()  # O
        normal("mlp_bank", std)
        self.mlp_bank[1::2].zero_()  # down
        # A gate's weights of zero are a gate of 1: 2 sigmoid(0)
        for gates in self.value_gates, self.attn_gates, self.smear_gate, self.xsa_strengths:
            gates.zero_()
        # At first all of a mixture's parts have equal shares
        self.mix_gates.zero_()
        self.mix_counts.zero_()
        # The residual stream as it is, nothing of the embedding again, and a little of n-grams
        self.lambdas.copy_(torch.tensor([1.0, 0.0]).expand_as(self.lambdas))
        self.residual_lambdas.fill_(mudd.STREAM)
        self.post_lambdas.fill_(1.0)
        self.inject_lambdas.zero_()
        self.inject_lambdas[:, 1:].fill_(0.05)
        self.scalars.copy_(torch.tensor([0.0, 0.2, -0.5]))
        # Functions of the token start as numbers
        c = self.c
        for name in "mudd_in", "mudd_gate_in":
            normal(name, (3 * c.n_embd) ** -0.5)
        if c.mudd:
            self.mudd_out.copy_(mudd.new_weights(mudd.last_parts(c), mudd.behind_parts(c)))
        if c.mudd_gates >= 0:
            self.mudd_gate_out.copy_(mudd.new_weights(*mudd.gate_parts(c)))
            self.mudd_gate_scale.fill_(mudd.SCALE)
            self.scalars[1].fill_(-1.5)  # behind a sigmoid

    def learn_tokens(self, dataset):
        """What the loss needs to know of the tokens' texts. Raises InputError where those are out
        of reach."""
        if self.c.counts and dataset.rows == "text":  # else a run that is taught has them
            device = self.cos.device
            self.counts = counts.Counts.of_text(dataset.train, dataset.eot, self.c.counts, device)
        if not len(self.prefixes):
            return
        try:
            table = torch.from_numpy(dataset.prefixes())
        except InputError as e:
            raise InputError(
                f"the prefix loss needs to know the bytes of each token: {e}; --prefix-loss 0 "
                "trains without it, and takes more steps"
            ) from None
        self.prefixes[: len(table)] = table.where(table >= 0, IGNORE).to(self.prefixes.device)
        self.knows_tokens = True

    def tables(self):
        """The counts, for a run's folder."""
        return self.counts.tables() if self.counts.known else {}

    def wants_tables(self):
        return self.c.counts > 0 and not self.counts.known

    def take_tables(self, tables):
        """What tables() gave. Raises InputError for what it cannot have given."""
        self.counts = counts.Counts.of_tables(self.c.counts, tables, self.cos.device)

    def enter(self, progress):
        """Fill the rotary tables, and what else goes by the stage, for the one that this progress
        is in."""
        if self.cos.is_meta:
            return  # a model that is only counted
        self.rescale.fill_(self.c.scale(progress) / self.c.scale(1.0))
        self.head_is_embed.fill_(progress < self.c.tied)
        n = self.c.head_dim // 4  # frequencies; the other half of the pairs stands still
        freqs = rope_frequencies(self.c.rope_base, n, self.c.long_windows(progress))
        freqs = F.pad(freqs.to(self.cos.device), (0, n))  # (D / 2,)
        positions = torch.arange(len(self.cos), device=freqs.device)
        angles = positions[:, None] * freqs  # (T, D / 2)
        self.cos.copy_(angles.cos()[:, None])
        self.sin.copy_(angles.sin()[:, None])

    def before_step(self):
        """FP8 copies of the MLPs' weights, for all forward passes of a step."""
        if self.fp8_mlps:
            self.fp8_mlps.quantize(self.mlp_bank)

    def after_step(self):
        """Each FP8 scale follows the largest activation of the step, over all ranks."""
        if self.fp8_mlps:
            post = self.fp8_mlps.post
            if dist.is_initialized():  # they agree, so that one of them speaks for all
                dist.all_reduce(post.amax, op=dist.ReduceOp.MAX)
            post.roll()

    def reset_state(self):
        if self.fp8_mlps:
            self.fp8_mlps.post.reset()

    def state(self):
        if not self.fp8_mlps:
            return {}
        scales = self.fp8_mlps.post.scale[:, 0].unbind(0)
        return {f"fp8_scale.{i}": scale for i, scale in enumerate(scales)}

    def successors(self, before, after):
        """The embedding leaves the head, whose weights and moments it takes along."""
        stays = after is not None and after.tied
        return {"embed": "lm_head"} if before.tied and not stays else {}

    # ----------------------------------------------------------------------------------------------
    # Forward

    def hidden(self, inputs, cu_seqlens, stage, cache=None):
        """inputs: (B, T) int64; stage: a Stage -> (B, T, C) ready for the head.

        cache: what was before in each row, instead of cu_seqlens.
        """
        c = self.c
        starts = document_starts(inputs, cu_seqlens) if cache is None else None  # (B, T)
        batch = Batch(inputs, stage, starts, cu_seqlens, cache)
        layers = cache.layers if cache else self.layers()
        x0, ngrams = self.embed_inputs(batch)  # (B, T, C) each
        values = self.embed_values(inputs)
        gates = self.gates_of(x0, 0)  # {layer: {name: (B, T, n)}}, of those that see the token

        # What the stream begins with; where n-grams are injected, they come before the first layer
        # as well
        x = x0
        if ngrams is not None:
            x = x + (layers[0].weights | gates.get(0, {}))["ngrams"] * ngrams
        start = x

        outputs = {}  # of the blocks that later ones look back at: (B, T, C)
        attn_input = None
        for layer in layers:
            i = layer.number
            if i == c.mudd_gates:
                gates |= self.gates_of(x, 1)
            given = Given(
                weights=layer.weights | gates.get(i, {}),
                x0=x0,
                ngrams=ngrams if i else None,
                skipped=self.skipped(outputs[c.skip[0]], gates) if layer.w_qkv is None else None,
                attn_input=attn_input,
                value=values.get(i),
                late=None,
            )
            if c.in_mudd(i):
                outputs["last"] = x
                by_token = self.mudd_of(x, 0)[i]
                weights = given.weights | by_token
                given = given._replace(weights=weights, x0=start, late=outputs[c.mudd[1]])
            x = keep_less(self.recompute, self.block, layer, x, batch, given)
            if i in (*c.skip, c.backout, *c.mudd):
                outputs[i] = x
            if i == c.attn_input:
                attn_input = self.ops.rms_norm(x)

        # Backout: what an earlier layer has said is taken out before the head
        if c.backout >= 0:
            x = x + self.scalars[2] * outputs[c.backout]
        # MUDD: the same, by the token, and others are added
        if c.mudd:
            early, late = c.mudd
            sources = dict(
                x0=start,
                late=outputs[late],
                last=outputs["last"],
                early=outputs[early],
                value=next(iter(values.values()), None),
            )
            weights = self.mudd_of(x, 1)[c.n_layer]
            for name, weight in weights.items():
                x = x + weight * sources[name]
        return self.ops.rms_norm(x)

    def layers(self):
        """A Layer for each block: its slices of the banks."""
        c = self.c
        attn = self.attn_bank.view(-1, 4 * c.n_embd, c.n_embd).unbind(0)
        attn = dict(zip(c.attn_layers, attn))
        scales = dict(zip(c.attn_layers, numbers(self.qkvo_scales)))  # {} where they are off
        out_gates = dict(zip(c.gated_layers, self.attn_gates.unbind(0)))  # the same
        value_gates = dict(zip(c.value_gate_layers, self.value_gates.unbind(0)))
        rows = self.grad_rooms.get("mlp_bank", 0)
        mlp = UnbindWithRoom.apply(self.mlp_bank, rows) if rows else self.mlp_bank.unbind(0)
        weights = self.weights()
        layers = []
        for i in range(c.n_layer):
            w_qkv, w_o = attn[i].split([3 * c.n_embd, c.n_embd]) if i in attn else (None, None)
            if i in scales:  # of the weights, which are fewer than the activations
                of_qkv, of_o = scales[i]
                w_qkv = of_qkv * w_qkv
                w_o = of_o * w_o
            layers.append(
                Layer(
                    number=i,
                    w_qkv=w_qkv,
                    w_o=w_o,
                    w_out_gate=out_gates.get(i),
                    w_value_gate=value_gates.get(i),
                    weights=weights[i],
                    w_up=mlp[2 * i],
                    w_down=mlp[2 * i + 1],
                )
            )
        return layers

    def weights(self):
        """[{what it weighs: number}] by layer; functions of the token may take their places."""
        c = self.c
        xsa = dict(zip(c.xsa_layers, self.xsa_strengths.unbind(0)))  # {} where there are functions
        inject = dict(zip(c.inject_layers, numbers(self.inject_lambdas)))
        lambdas = numbers(self.lambdas)
        residual = numbers(self.residual_lambdas)
        post = numbers(self.post_lambdas)
        found = []
        for i in range(c.n_layer):
            if c.sublayer_lambdas:
                weights = dict(zip(("stream", "mlp_stream"), residual[i]))
                weights |= zip(("attn", "mlp"), post[i])
                weights |= zip(("x0", "ngrams"), inject.get(i, ()))
            else:
                weights = dict(zip(("stream", "x0"), lambdas[i]))
            if i in xsa:
                weights["xsa"] = xsa[i]
            found.append(weights)
        return found

    def gates_of(self, x, half):
        """{layer: {name: (B, T, n)}} as functions of x (B, T, C): half 0 has the layers before
        c.mudd_gates, 1 those from there on. {} where they are off."""
        if self.c.mudd_gates < 0:
            return {}
        parts = mudd.gate_parts(self.c)
        w_out = self.mudd_gate_out.split([mudd.size(part) for part in parts])
        scale = self.mudd_gate_scale[half]
        return mudd.coefficients(x, self.mudd_gate_in[half], w_out[half], scale, parts[half])

    def mudd_of(self, x, place):
        """The same of what is mixed: place 0 is the last layer, 1 behind it."""
        parts = mudd.last_parts(self.c), mudd.behind_parts(self.c)
        w_out = self.mudd_out.split([mudd.size(part) for part in parts])
        return mudd.coefficients(x, self.mudd_in[place], w_out[place], mudd.SCALE, parts[place])

    def skipped(self, output, gates):
        """What a layer without attention adds of an earlier one's output."""
        weight = self.scalars[1]
        if gates:
            weight = weight.sigmoid() * gates[self.c.skip[1]]["skip"]
        return weight * output

    def block(self, layer, x, batch, given):
        """One block on the residual stream x: (B, T, C) -> (B, T, C)."""
        c = self.c
        w = given.weights
        # What the stream began with comes again: before attention, or where it is injected, behind
        if not c.sublayer_lambdas:
            x = self.ops.weighted(x, given.x0, w["stream"], w["x0"])
        elif not c.inject and layer.w_qkv is not None:
            x = x + w["x0"] * given.x0

        if layer.w_qkv is None:
            y = given.skipped
        else:
            h = self.ops.rms_norm(x) if given.attn_input is None else given.attn_input
            more = self.more_values(layer, x, h, given)
            y = self.attention(layer, h, batch, more, w)
            if given.late is not None:  # MUDD: earlier streams join this one
                x = (1 + w["mix_x"]) * x + w["mix_x0"] * given.x0 + w["mix_late"] * given.late
            if c.sublayer_lambdas:
                x = w["stream"] * x
                y = w["attn"] * y
            if c.inject:
                x = x + w["x0"] * given.x0
                if given.ngrams is not None:
                    x = x + w["ngrams"] * given.ngrams
        h, x = self.ops.add_rms_norm(x, y)  # x + y, and that normalised

        y = self.mlps[layer.number](h, layer.w_up, layer.w_down)
        if c.sublayer_lambdas:
            x = w["mlp_stream"] * x
            y = w["mlp"] * y
        return x + y

    def more_values(self, layer, x, h, given):
        """What joins the values of attention, whose input is h: (B, T, C), and how much of it by
        head, (B, T, H), None for all; (None, None) for nothing."""
        c = self.c
        w = given.weights
        more = None
        share = None
        # Value embedding: a second embedding of the token, gated by head
        if given.value is not None:
            if "value_gate" in w:
                n = w["value_gate"].size(-1)
                share = w["value_gate"].repeat_interleave(c.n_head // n, dim=-1)
            else:
                seen = h
                if c.gate_by_value:
                    half = GATE_INPUTS // 2
                    seen = torch.cat([h[..., :half], given.value[..., :half]], dim=-1)
                share = gate(seen, layer.w_value_gate)
            more = given.value
        # MUDD: shares of earlier streams
        if given.late is not None:
            streams = w["values_x0"] * given.x0 + w["values_late"] * given.late
            streams = streams + w["values_x"] * x
            more = streams if more is None else self.shared(more, share) + streams
            share = None
        return more, share

    def shared(self, values, share):
        """(B, T, C) by the share of each head, (B, T, H) or None."""
        if share is None:
            return values
        return (share[..., None] * values.unflatten(2, (self.c.n_head, -1))).flatten(2)

    def attention(self, layer, h, batch, more_values, weights):
        """h: (B, T, C), normalised; more_values: what joins the values; weights: of the layer ->
        (B, T, C)."""
        c = self.c
        i = layer.number
        B, T = batch.inputs.shape
        H = c.n_head
        D = c.head_dim
        w_qkv = layer.w_qkv

        # Paired heads: heads h and h + H / 2 take turns in time, so that each query sees both
        # heads' keys. Q, K, V of the first half of the heads come first, then those of the second:
        # then a view is all it takes
        pair = i in c.paired_layers
        n = 2 if pair else 1
        if pair:
            w_qkv = w_qkv.view(3, 2, -1, c.n_embd).transpose(0, 1).flatten(0, 2)
        qkv = F.linear(h, w_qkv).view(B, n * T, 3 * H // n, D)
        offset = c.key_offset and c.sees_far(i) and not pair
        if self.in_one(batch, pair, weights):
            more, share = more_values
            y = self.products.attention_of(
                qkv,
                self.cos,
                self.sin,
                starts=batch.starts if offset else None,
                value=more,
                share=share,
                gate=self.share_of_output(layer, h, weights),
                **self.seen(i, 1, batch),
            )
            return F.linear(y.reshape(B, T, c.n_embd), layer.w_o)
        q, k, v = self.qk_norm_rope(qkv, n, batch)  # (B, n T, H / n, D) each
        if batch.stage.by_buffers:
            q = (self.rescale * q.float()).to(q.dtype)

        # Key offset: what stands still of a key is its predecessor's, so that a query finds what
        # came after a token
        if offset and batch.cache is None:
            k = self.ops.offset(k, batch.starts)
        elif offset:
            k = torch.where(stands_still(k), self.one_before(k, batch, k, f"key {i}"), k)

        more, share = more_values
        if share is not None and not pair:
            v = self.ops.gated(more.view(v.shape), share, v)
        elif more is not None:
            v = v + self.shared(more, share).view(v.shape)

        y = self.attend(i, q, k, v, n, batch)  # (B, n T, H / n, D)
        if "xsa" in weights:
            y = without_own_value(y, v, weights["xsa"])
        share = self.share_of_output(layer, h, weights)
        if share is not None:
            y = self.ops.gated(y.reshape(B, T, H, D), share)
        return F.linear(y.reshape(B, T, c.n_embd), layer.w_o)

    def share_of_output(self, layer, h, weights):
        """What each head's output is multiplied by, (B, T, H), or None."""
        if "out" in weights:
            return weights["out"]
        return None if layer.w_out_gate is None else gate(h, layer.w_out_gate)

    # What the layers begin with

    def embed_inputs(self, batch):
        """(B, T, C) twice: tokens, with which the residual stream begins, and n-grams, None where
        they are part of that."""
        c = self.c
        x = self.ops.embedding(batch.inputs, self.lm_head if batch.stage.tied else self.embed)
        if batch.stage.by_buffers and c.becomes_untied:
            x = torch.where(self.head_is_embed, self.ops.embedding(batch.inputs, self.lm_head), x)
        if c.smear_first:
            x = self.smeared(x, batch)
        # Tokens, and the n-grams that end at them; normalised, so that every layer and the smear
        # begin with the same size
        ngrams = self.embed_ngrams(batch) if c.n_gram > 1 else None
        if c.tied:
            x = self.ops.rms_norm(x)  # to the size of the n-grams' embeddings
        if not c.inject and ngrams is not None:
            x = x + ngrams
            ngrams = None
        x = self.ops.rms_norm(x)
        return x if c.smear_first else self.smeared(x, batch), ngrams

    def smeared(self, x, batch):
        """(B, T, C) with a gated share of the token before."""
        for w_gate in self.smear_gate.unbind(0):  # one, or none where it is off
            share = gate(x, w_gate[None])  # (B, T, 1)
            if self.c.smear_first:
                share = share / 2  # from 0 to 1
            share = self.scalars[0] * share
            if batch.cache is None:
                x = self.ops.smeared(x, share, batch.starts)
            else:
                x = x + share * self.one_before(x, batch, torch.zeros_like(x), "smear")
        return x

    def embed_values(self, inputs):
        """{layer: (B, T, C)} of the layers with value embeddings, in one look-up."""
        n, V, C = self.value_embeds.shape
        if not n:
            return {}
        rows = self.value_rows(inputs)
        values = self.ops.embedding(rows, self.value_embeds.view(n * V, C)).unbind(0)
        return dict(zip(self.c.value_embed_layers, values))

    def value_rows(self, inputs):
        """(n, B, T): each token's row for each of n layers, in all their tables as one."""
        n, V, _ = self.value_embeds.shape
        first_rows = V * torch.arange(n, device=inputs.device)
        return first_rows[:, None, None] + inputs

    def embed_ngrams(self, batch):
        """Sum of the embeddings of the 2-gram, 3-gram, ... that end at each token, within its
        document: (B, T, C)."""
        total = 0
        for key, table in zip(self.ngram_keys(batch), self.ngram_embeds.unbind(0)):
            x = self.ops.embedding(key % len(table), table)
            if len(self.signs):  # those that share a row get it with other signs
                x = x * F.embedding(key // len(table) % len(self.signs), self.signs)
            total = total + x
        return total

    def ngram_keys(self, batch):
        """[(B, T) int64 of the 2-gram that ends at each token, of the 3-gram, ...]"""
        keys = []
        key = before = batch.inputs
        for i in range(len(self.ngram_embeds)):
            before = self.one_before(before, batch, torch.zeros_like(before), f"token {i}")
            # An odd factor, so that rows of a power of two still depend on all tokens
            key = key * (self.n_vocab | 1) + before
            keys.append(key)
        return keys

    def touched_rows(self, inputs, cu_seqlens):
        """{table: (n,) int64, of all its rows as one those that these tokens look up}, some of them
        more than once; on the tokens' device, wherever the model is."""
        starts = document_starts(inputs, cu_seqlens)
        batch = Batch(inputs, None, starts, cu_seqlens)
        found = dict(value_embeds=self.value_rows(inputs).flatten())
        n_rows = self.ngram_embeds.size(1)
        keys = self.ngram_keys(batch)
        rows = [i * n_rows + key.flatten() % n_rows for i, key in enumerate(keys)]
        return found | dict(ngram_embeds=torch.cat(rows)) if rows else found

    # What tokens know of those before them: in the same rows, or in decoding in a cache

    def one_before(self, x, batch, first, name):
        """(B, T, ...) -> the value one token earlier; `first` where documents begin. name: under
        which the last value is kept for the tokens to come."""
        if batch.cache is not None:
            return batch.cache.previous(name, x, first)
        starts = batch.starts.view(*batch.starts.shape, *[1] * (x.dim() - 2))
        return previous(x, starts, first)

    def qk_norm_rope(self, qkv, n, batch):
        """(B, n T, 3 H / n, D) -> queries and keys, normalised and rotated, and values."""
        if batch.cache is None:
            return self.ops.qk_norm_rope(qkv, self.cos, self.sin)
        # Each row is at positions of its own, so all are one row with the angles of those
        at = batch.cache.positions(n).flatten()
        in_one_row = qkv.flatten(0, 1)[None]
        qkv_ = self.ops.qk_norm_rope(in_one_row, self.cos[at], self.sin[at])
        return [x[0].unflatten(0, qkv.shape[:2]) for x in qkv_]

    def attend(self, layer, q, k, v, n, batch):
        """(B, n T, H / n, D) each -> the same; n: heads that take turns in time."""
        stage = batch.stage
        if batch.cache is not None:
            window = min(n * stage.windows[layer], n * stage.max_doc_len - 1)
            return batch.cache.attend(layer, q, k, v, window, stage.attn_scale)
        return self.ops.attention(q, k, v, **self.seen(layer, n, batch))

    def seen(self, layer, n, batch):
        """What a query sees, and the scale of its scores."""
        stage = batch.stage
        return dict(
            cu_seqlens=n * batch.cu_seqlens,
            max_seqlen=n * stage.max_doc_len,
            window=n * stage.windows[layer],
            scale=stage.attn_scale,
        )

    def in_one(self, batch, pair, weights):
        """Whether attention is one op with what comes before and after it."""
        plain = not pair and batch.cache is None and not batch.stage.by_buffers
        return plain and "xsa" not in weights and self.products is not None

    @property
    def products(self):
        """The forms of several ops in one, or None; torch.compile makes its own."""
        return None if torch.compiler.is_compiling() else self.ops.products

    def forward(self, inputs, targets, cu_seqlens, stage, target_weights=None):
        """Summed cross-entropy (fp32 scalar) over the targets that are not padding.

        target_weights: (n,) fp32 for predicting the n next tokens from each, and behind these the
        next one's prefix where the stage has that; None for one.
        """
        # Every token is a row of its own from here on
        x = self.hidden(inputs, cu_seqlens, stage).flatten(0, 1)  # (B T, C)
        starts = document_starts(inputs, cu_seqlens)
        others = self.others(inputs, targets, starts, stage)
        columns = later_targets(targets, starts, stage.n_targets)
        if stage.prefix:
            if not self.knows_tokens:
                raise ValueError("the prefix loss needs learn_tokens() before")
            prefix = self.prefixes[targets.clamp(min=0)].where(targets != IGNORE, IGNORE)
            columns = torch.cat([columns, prefix[..., None]], dim=2)
        targets = columns.flatten(0, 1)  # (B T, n)

        # Sampled softmax: only some columns of the head take part. Seeded by the tokens, so that a
        # resumed run chooses the same
        w = self.lm_head
        sampled = None
        if 0 < stage.n_sampled < len(w):
            tokens, targets, sampled = sample_vocabulary(
                targets, len(w), stage.n_sampled, inputs.sum(), IGNORE
            )
            w = self.ops.embedding(tokens, w)
        if others:
            loss = functools.partial(self.mixed_loss, sampled=sampled)
            rows = x, targets[:, 0], *(n.flatten(0, 1) for n in others)
        else:
            loss = functools.partial(
                self.ops.linear_cross_entropy,
                cap=self.c.softcap or None,
                target_weights=target_weights,
                sampled=sampled,
            )
            rows = x, targets

        return loss_by_chunks(self.recompute, loss, w, *rows)

    def others(self, inputs, targets, starts, stage):
        """What else predicts the targets (B, T): what a gate is told of it (B, T, n), which of it
        is there and its probabilities, (B, T, copies + counts) each. () for nothing."""
        c = self.c
        in_c = self.ops.contexts
        found = []
        if c.copies:
            earlier = copies.earlier(inputs, targets, starts, c.copies, in_c)
            found.append(copies.predictions(*earlier))
        if c.counts:
            of_targets = self.counts.of_targets(inputs, targets, starts, stage.leave_out, in_c)
            found.append(counts.predictions(*of_targets))
        return tuple(torch.cat(x, dim=-1) for x in zip(*found))

    def mixed_loss(self, x, w, targets, told, there, probs, sampled):
        """Summed loss of the head's distribution mixed with others.

        x: (N, C), w: (V, C), targets: (N,); told, there, probs: rows of others(); sampled: as for
        the head.
        """
        return -self.mixed_log_probs(x, w, targets, told, there, probs, sampled, ALONE).sum()

    def mixed_log_probs(self, x, w, targets, told, there, probs, sampled=None, alone=0.0):
        """(N,) log probabilities of the same mixture, 0 where a target is IGNORE; their gradient
        has `alone` times that of the head's own."""
        cap = self.c.softcap or None
        own = self.ops.linear_log_prob(x, w, targets, cap=cap, sampled=sampled, ignore_index=IGNORE)
        log_prob = copies.mixture(own, self.mix(x, told), there, probs)
        if alone:
            log_prob = log_prob + alone * (own - own.detach())
        return log_prob.where(targets != IGNORE, 0.0)

    def log_probs(self, inputs, targets, cu_seqlens, stage, n_vocab=None):
        """(B, T) log probabilities of the targets, 0 where one is IGNORE; stage: of validation;
        n_vocab: among so many tokens, as logits() has them; None: and what pads them, as in
        training."""
        rows = [self.hidden(inputs, cu_seqlens, stage).flatten(0, 1), targets.flatten()]
        if self.is_mixed:
            starts = document_starts(inputs, cu_seqlens)
            others = self.others(inputs, targets, starts, stage)
            rows += [n.flatten(0, 1) for n in others]
            of_rows = self.mixed_log_probs
        else:
            cap = self.c.softcap or None
            of_rows = functools.partial(self.ops.linear_log_prob, cap=cap, ignore_index=IGNORE)
        return log_probs_by_chunks(of_rows, self.lm_head[:n_vocab], *rows).view_as(inputs)

    @property
    def is_mixed(self):
        return len(self.mix_gates) > 0

    def mix(self, x, told):
        """Gates of the mixture: (..., C), (..., n) as others() has it -> (..., copies + counts + 1)
        fp32."""
        by_token = F.linear(x.to(self.mix_gates.dtype), self.mix_gates)
        return by_token + F.linear(told.to(self.mix_counts.dtype), self.mix_counts)

    def logits(self, inputs, cu_seqlens, stage, last_only=False):
        """(B, T, n_vocab) fp32, (B, 1, n_vocab) of the last tokens only."""
        x = self.hidden(inputs, cu_seqlens, stage)
        first = inputs.size(1) - 1 if last_only else 0
        logits = self.head(x[:, first:])
        if not self.is_mixed:
            return logits
        at = torch.arange(inputs.size(1), device=inputs.device)
        begins = at.where(document_starts(inputs, cu_seqlens), 0).cummax(dim=1).values
        for row, of_row in enumerate(begins.tolist()):
            texts = [inputs[row, begin : t + 1] for t, begin in enumerate(of_row)][first:]
            for i in range(0, len(texts), MIXED):  # so that texts and counts stay small
                some = slice(i, i + MIXED)
                logits[row, some] = self.mix_in(
                    x[row, first:][some], logits[row, some], texts[some]
                )
        return logits

    def new_cache(self, rows):
        """An empty cache for decode()."""
        return KVCache(rows, self.embed.device, self.layers(), self.ops.attend_one)

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
            x = cache.of_last(x)  # (B, 1, C)
        logits = self.head(x)
        texts = cache.texts_with(inputs) if self.is_mixed else []
        if every:
            new = [(row, i) for row, n in enumerate(counts) for i in range(n) if texts]
            if new:
                places = tuple(torch.tensor(new, device=x.device).unbind(1))
                so_far = [texts[row][: len(texts[row]) - counts[row] + 1 + i] for row, i in new]
                logits[places] = self.mix_in(x[places], logits[places], so_far)
            return logits
        cache.end()
        return self.mix_in(x[:, 0], logits[:, 0], texts) if self.is_mixed else logits[:, 0]

    def head(self, x):
        """(..., C) -> logits (..., n_vocab), fp32."""
        logits = F.linear(x, self.lm_head[: self.n_vocab]).float()
        return softcap(logits, self.c.softcap)

    def mix_in(self, x, logits, texts):
        """Log probabilities (N, n_vocab) of the head's distribution mixed with what followed
        before, in the document and in the training text.

        x: (N, C), of last tokens; logits: (N, n_vocab); texts: N documents so far, (T,) int64 each.
        """
        texts = pad_sequence(texts, batch_first=True, padding_value=-1, padding_side="left")
        found = []
        if self.c.copies:
            found.append(copies.Followers(texts, self.c.copies))
        if self.c.counts:
            found.append(counts.Followers(self.counts, texts))
        told = torch.cat([f.told for f in found], dim=-1)
        there = torch.cat([f.there for f in found], dim=-1)
        shares = copies.log_shares(self.mix(x, told), there).to(logits.dtype)
        others = torch.zeros_like(logits)
        sizes = [f.there.size(1) for f in found]
        for f, of_lengths in zip(found, shares[:, 1:].exp().split(sizes, dim=1)):
            f.add_to(others, of_lengths)
        return torch.logaddexp(logits.log_softmax(-1) + shares[:, :1], others.log())

    # ----------------------------------------------------------------------------------------------
    # What others need to know of the parameters

    def update_rules(self, optim):
        """Every parameter's rule. Small ones first, the long Muon updates last, so that they hide
        the others' gathers."""
        if optim.optimizer == "adamw":
            return adamw_rules(optim, SMALL, LARGE)
        lr = optim.adam_lr
        decay = optim.weight_decay
        # Matrices of the blocks
        muon = functools.partial(
            Muon,
            optim.muon_lr,
            weight_decay=decay,
            normuon=optim.normuon,
            orthogonalise=self.ops.polar_express,
        )
        attn_matrices = muon()
        if optim.muon_head_pairs:
            pairs = (True, True, False, False)  # Q and K, not V and O
            attn_matrices = muon(paired=pairs, heads=self.c.n_head)
        factors = (1.0, optim.mlp_down_lr) if optim.mlp_down_lr != 1 else ()
        mlp_matrices = muon(factors=factors, decay_by_shape=optim.decay_by_shape)
        # The head; and tables, of which a step touches few rows: these learn 75 times as fast
        adam = functools.partial(Adam, every=optim.adam_every)
        head = adam(lr, betas=optim.head_betas, weight_decay=decay / 1.6)
        if optim.row_moments:
            tables = RowAdam(lr * 75, beta2=0.95, weight_decay=decay / 50, every=optim.adam_every)
        else:
            tables = adam(lr * 75, betas=(0.75, 0.95), weight_decay=decay / 50)
        # Every block's input is normalised, so while the blocks' outputs are zero these have
        # rounding errors for gradients: the larger eps keeps Adam from blowing those up to full
        # steps
        scalars = adam(lr * 5, betas=(0.9, 0.99), eps=1e-6, sharded=False)
        gates = adam(lr, betas=(0.9, 0.99), sharded=False)
        smear_gate = adam(lr / 100, betas=(0.9, 0.99), sharded=False)
        strengths = adam(lr, betas=(0.9, 0.95), eps=1e-6, sharded=False)
        streams = adam(lr * 5, betas=(0.9, 0.95), eps=1e-6, sharded=False)
        mixes = adam(lr / 4, betas=(0.9, 0.99), sharded=False)
        slow = adam(lr / 10, betas=(0.9, 0.99), sharded=False)
        return {
            "lambdas": scalars,
            "residual_lambdas": streams,
            "post_lambdas": strengths,
            "inject_lambdas": strengths,
            "mudd_out": mixes,
            "mudd_in": mixes,
            "mudd_gate_out": slow,
            "mudd_gate_in": slow,
            "mudd_gate_scale": slow,
            "scalars": scalars,
            "qkvo_scales": scalars,
            "smear_gate": smear_gate if self.c.smear_first else gates,
            "xsa_strengths": strengths,
            "attn_gates": gates,
            "value_gates": gates,
            "mix_gates": gates,
            "mix_counts": gates,
            "value_embeds": tables,
            "embed": head if self.c.tied else tables,  # it takes over the head's moments
            "ngram_embeds": tables,
            "lm_head": head,
            "attn_bank": attn_matrices,
            "mlp_bank": mlp_matrices,
        }

    def flops_per_token(self, stage):
        """Training FLOPs per token: 6 per matrix weight in use, and attention over half of what
        windows let it see."""
        c = self.c
        # A product of n weights takes 2 n forward and 4 n backward
        V = len(self.lm_head)
        head = min(stage.n_sampled or V, V) * c.n_embd
        small = (self.mudd_in, self.mudd_out, self.mudd_gate_in, self.mudd_gate_out)
        matrices = self.attn_bank.numel() + self.mlp_bank.numel() + head
        matrices += sum(p.numel() for p in small)
        # Attention: 2 products of a width for each key, 3 times that with backward
        seen = 0  # keys
        for i in c.attn_layers:
            heads = 2 if i in c.paired_layers else 1
            seen += heads * min(stage.windows[i], stage.max_doc_len)
        return 6 * matrices + 12 * c.n_embd * seen / 2

    def activation_bytes(self, rows, row_len, recompute):
        """Bytes kept for backward, of activations and of logits.

        Of activations there are about 12 widths a layer besides the MLP's, 2 more where sublayers
        have weights, and 4 a value embedding; with recompute one width a layer and a value
        embedding, and one layer's while it is computed again. Logits are there once for as many
        tokens as are computed at one time.
        """
        c = self.c
        size = self.embed.element_size()
        tokens = rows * row_len
        layer = (12 + 2 * c.sublayer_lambdas + c.mlp_ratio) * c.n_embd
        n_value = len(c.value_embed_layers)
        if recompute:
            widths = (c.n_layer + n_value) * c.n_embd + layer
        else:
            widths = c.n_layer * layer + 4 * n_value * c.n_embd

        ops = self.ops.named()
        kept = []  # keys that a query sees, by layer
        for i in range(c.n_layer):
            far = c.sees_far(i)
            window = max(c.long_window if far else c.short_window)
            window = max(window, c.last_windows[far])
            kept.append(min(2 * window, row_len))
        kept.sort(reverse=True)
        if recompute:
            kept = kept[:1]
        scores = memory_of_scores(ops, tokens, c.n_head, kept, size)

        V = len(self.embed)
        columns = max(min(n or V, V) for n in c.sampled_softmax)
        logits = memory_of_logits(ops["linear_cross_entropy"], tokens, columns, size, recompute)
        return dict(activations=tokens * size * widths + scores, logits=logits)
