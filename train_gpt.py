"""Stopwatch: train a GPT to a target loss against the clock.

One file, in reading order: configuration, model, schedules, optimizer, evaluation, the run, the
door. `./run.sh` starts it; `python train_gpt.py` and `torchrun --nproc_per_node=N train_gpt.py`
work as well. Tracks (tracks/*.py) are small sets of differences from the defaults in Config below.
"""

import contextlib
import dataclasses
import functools
import importlib
import math
import os
import sys
import time
import typing
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from base import InputError, to_json
from base.clock import START
from base.options import (
    AUTO,
    BY_STAGE,
    COUNT,
    FRACTION,
    PAIR,
    POSITIVE,
    RATE,
    check_options,
    option,
)
from data import Prefetcher, pack, sources
from data.loader import IGNORE
from inference.sampling import generate
from kernels import choose_ops, embedding, polar_express
from kernels.choose import choose_fp8
from kernels.cross_entropy import sample_vocabulary
from optim.shards import Shard
from optim.updates import (
    adam_update,
    balance,
    descend,
    gradient_report,
    muon_update,
    nesterov,
    new_companion,
    new_second_moment,
    row_scale,
    row_update,
)
from records.metrics import METRICS, VAL_LOSS, Evaluation, measure, meets
from records.source import pack_source
from runtime import memory, resume, state
from runtime.checkpoint import Checkpoints
from runtime.corpus import load_data
from runtime.environment import describe_environment, machine_probe
from runtime.guard import Guard
from runtime.log import Log
from runtime.machine import (
    World,
    can_compile,
    first_rank_first,
    join_world,
    keep_freed_memory,
    launch,
    lost_another,
    native_dtype,
    to_device,
    wait_for_first_rank,
)
from runtime.options import RunOptions, parse_options
from runtime.run import Run
from runtime.signals import Requests

ROOT = Path(__file__).resolve().parent
GATE_INPUTS = 12  # gates look at this many dimensions of a token


# --------------------------------------------------------------------------------------------------
# Configuration: every field is a command-line option


@dataclasses.dataclass(frozen=True)
class Config(RunOptions):
    """What is trained: the recipe. RunOptions, in runtime/options.py, says how and where a run is
    kept.

    Each tuple with entries by stage divides training equally by itself; their lengths may differ.
    """

    track: str = option("", "named set of defaults, data and target", group="goal")
    target: float | None = option(
        None,
        "stop when the validation metric is this or less; the model may be "
        "smaller for an easy one, as the track's file says",
        (lambda x: x is None or math.isfinite(x), "a number"),
    )
    target_metric: str = option(
        VAL_LOSS, " or ".join(metric.unit for metric in METRICS.values()), tuple(METRICS)
    )
    data: str = option(
        "stdlib",
        "what to train on; for text, --text says which",
        sources.EXPECTED,
        group="data",
    )
    text: str = option("", "train on this file or folder of text")
    tokenizer: str = option("bpe:4096", "for text: chars, bytes, bpe:N or gpt2")
    train_shards: int = option(9, "how many training shards to use, of a source that has them ready-made", POSITIVE)
    long_docs: str = option(
        "split", "what happens to a document beyond max_doc_len", ("split", "drop")
    )
    shuffle: bool = option(True, "documents in random order already in the first epoch")
    val_tokens: int = option(
        0, "validate on this many tokens from the start of the validation split; 0 is all", COUNT
    )
    n_layer: int = option(4, "transformer blocks", POSITIVE, group="model")
    n_embd: int = option(256, "width", (lambda n: n >= GATE_INPUTS, f"{GATE_INPUTS} or more"))
    n_head: int = option(4, "attention heads", POSITIVE)
    mlp_ratio: int = option(4, "hidden width of the MLP over n_embd", POSITIVE)
    value_embed_layers: tuple[int, ...] = option(
        (0, 3), "layers whose values get a second token embedding"
    )
    n_gram: int = option(
        1, "every n-gram up to this length has an embedding, hashed; 1 is tokens only", POSITIVE
    )
    ngram_rows: int = option(16384, "rows of the table for each of these lengths", POSITIVE)
    ngram_signs: bool = option(False, "each n-gram flips the signs of its row in a way of its own")
    smear: bool = option(
        False, "add a gated share of the previous token's embedding to each token's"
    )
    attn_gate: bool = option(False, "each head's output has a gate, a function of the token")
    key_offset: bool = option(
        False, "half of each key is its predecessor's, in layers that see far"
    )
    paired_layers: tuple[int, ...] = option((), "layers where two heads see each other's keys")
    skip: tuple[int, ...] = option(
        (), "two layers: the second has no attention but the first one's output"
    )
    backout: int = option(-1, "a layer whose output is taken out of the last one's; -1 is none")
    attn_scale: float = option(
        1.36, "of normalised queries and keys, times head width to the power of -1/2", POSITIVE
    )
    softcap: tuple[float, ...] = option(
        (), "a, b and c: logits become a * sigmoid((z + b) / c); empty leaves them"
    )
    rope_base: float = option(1024.0, "longest rotary wavelength over 2 pi, in tokens", POSITIVE)
    steps: int = option(500, "optimizer steps", POSITIVE, group="batch, context and schedule")
    row_len: int = option(256, "tokens in a packed row; attention never leaves a row", POSITIVE)
    val_row_len: int = option(1024, "the same for validation", POSITIVE)
    batch_tokens: tuple[int, ...] = option((8192,), "tokens per step, by stage", BY_STAGE)
    max_doc_len: tuple[int, ...] = option(
        (256,), "documents are cut at this many tokens, by stage", BY_STAGE
    )
    long_layers: tuple[int, ...] = option((), "layers that see as far as the last one does")
    short_window: tuple[int, ...] = option(
        (256,), "tokens a query sees behind it in most layers, by stage", BY_STAGE
    )
    long_window: tuple[int, ...] = option(
        (256,), "the same in long_layers and the last one, by stage", BY_STAGE
    )
    val_windows: tuple[int, ...] = option(
        (), "short and long window in validation; empty means the last stage's", PAIR
    )
    stage_lr: tuple[float, ...] = option((1.0,), "learning rate multiplier, by stage", BY_STAGE)
    yarn: bool = option(False, "rotary frequencies and attention's scale follow the long window")
    mtp: tuple[int, ...] = option(
        (1,), "next tokens each one predicts, by stage; the farthest fades out", BY_STAGE
    )
    sampled_softmax: tuple[int, ...] = option(
        (0,),
        "tokens the training loss chooses among, by stage: the targets of a forward pass, which should be fewer, "
        "and random others; 0 is all",
        (lambda ns: ns and all(n >= 0 and n % 64 == 0 for n in ns), "multiples of 64, or 0"),
    )
    tied: float = option(
        0.0, "fraction of training in which the head is the embedding as well", FRACTION
    )
    extension: int = option(0, "the last so many steps stay where the schedules end", COUNT)
    cooldown: float = option(
        0.6, "fraction of training over which the learning rate falls linearly", FRACTION
    )
    lr_floor: float = option(0.15, "where it falls to, as a fraction", FRACTION)
    muon_lr: float = option(0.03, "Muon, on the matrices of the blocks", RATE, group="optimizer")
    adam_lr: float = option(
        0.008, "Adam, on the head; embeddings and scalars have multiples of it", RATE
    )
    weight_decay: float = option(
        0.0, "times the squared learning rate, where it agrees with the update", RATE
    )
    normuon: bool = option(False, "each neuron's part of Muon's update is scaled to the same size")
    row_moments: bool = option(
        False, "Adam has one second moment for a row of a table, and no momentum there"
    )
    adam_every: int = option(
        1, "Adam updates at each so many steps, from the sum of their gradients", POSITIVE
    )
    max_skips: int = option(
        0,
        "so many steps may have a loss or gradient that is not finite and do not count; 0 "
        "stops at the first",
        COUNT,
    )
    spike_sigmas: float = option(
        0.0,
        "the same for a loss so many standard deviations above the mean of the last "
        "128 steps; 0 is off",
        RATE,
    )
    seed: int = option(
        0, "of the weights and the order of the data", (lambda n: 0 <= n < 2**63, "zero or more")
    )
    fp8: str = option(
        "off", "the head and the MLPs' forward products in 8-bit floats; auto: on Hopper", AUTO
    )
    dtype: str = option("auto", "of weights and activations", ("auto", "bfloat16", "float32"))

    def __post_init__(self):
        check_options(self)
        L, layers = self.n_layer, f"layers from 0 to {self.n_layer - 1}"
        for field, ok, expected in (
            (
                "n_embd",
                self.n_embd % (4 * self.n_head) == 0,
                f"a multiple of 4 * n_head ({4 * self.n_head})",
            ),
            (
                "batch_tokens",
                not any(b % self.row_len for b in self.batch_tokens),
                f"multiples of {self.row_len}, row_len",
            ),
            (
                "micro_tokens",
                self.micro_tokens % self.row_len == 0,
                f"a multiple of row_len ({self.row_len})",
            ),
            (
                "eval_every",
                not self.keep_best or self.eval_every % self.adam_every == 0,
                f"a multiple of adam_every ({self.adam_every}), for the best checkpoint to be that of a validation",
            ),
            (
                "seed",
                self.seed + self.repeat <= 2**63,
                f"seeds below 2**63, all {self.repeat} of them",
            ),
            ("value_embed_layers", all(0 <= i < L for i in self.value_embed_layers), layers),
            ("long_layers", all(0 <= i < L for i in self.long_layers), layers),
            ("extension", self.extension < self.steps, f"fewer than steps ({self.steps})"),
            (
                "paired_layers",
                all(0 <= i < L and self.n_head % 2 == 0 for i in self.paired_layers),
                f"{layers}, and an even n_head",
            ),
            (
                "skip",
                not self.skip
                or len(self.skip) == 2
                and 0 <= self.skip[0] < self.skip[1] < L
                and self.skip[1] not in self.paired_layers + self.value_embed_layers,
                "an earlier and a later layer, the later one without pairs and value embeddings, or none",
            ),
            ("backout", -1 <= self.backout < L - 1, "a layer before the last, or -1"),
            (
                "softcap",
                not self.softcap
                or len(self.softcap) == 3
                and all(map(math.isfinite, self.softcap))
                and self.softcap[2] != 0,
                "three numbers, or none",
            ),
            (
                "text",
                self.data != "text" or self.text,
                f"a file or folder, which track {self.track} needs",
            ),
        ):
            if not ok:
                raise InputError(
                    f"--{field.replace('_', '-')} {getattr(self, field)}: expected {expected}"
                )


def track_names():
    return sorted(p.stem.replace("_", "-") for p in (ROOT / "tracks").glob("[a-z]*.py"))


def load_track(name, target=None):
    """A track's fields. The easier the target (None is the track's own), the smaller the model
    may be: EASIER in the track's file names the fields that change for targets no lower than a
    number."""
    if name not in track_names():
        raise InputError(f"unknown track {name!r}: expected one of {', '.join(track_names())}")
    module = importlib.import_module(f"tracks.{name.replace('-', '_')}")
    fields = dict(module.TRACK, track=name)
    target = fields.get("target") if target is None else target
    rungs = [goal for goal in getattr(module, "EASIER", {}) if goal <= target]
    return fields | (module.EASIER[max(rungs)] if rungs else {})


def parse_args(argv):
    """Command line -> Config: defaults, then the track's fields, then the options given."""
    given = parse_options(
        Config,
        argv,
        load_track("laptop"),
        prog="run.sh",
        usage="""./run.sh [--OPTION VALUE ...]          train this machine's track
       ./run.sh --track laptop --steps 50     a track by name, a field changed
       ./run.sh --text FILE_OR_FOLDER         on your own text
       ./run.sh test [PYTEST ARGUMENTS]       the tests""",
        description="Train a GPT to a target loss against the clock, on this machine. Without options: track "
        "gpt2-small where there is a CUDA GPU, else laptop. Progress goes to stderr, the result is one "
        "line of JSON on stdout. Exit status: 0 target reached, 3 out of steps before it, 2 bad input, 143 "
        "or 130 stopped by SIGTERM or Ctrl-C, with the work saved.",
        epilog=f"Tracks: {', '.join(track_names())}. What is in brackets is the laptop track's value. Lists have an "
        "entry for each of the equally long stages of training, or one for all.",
    )
    big = torch.cuda.is_available() and "text" not in given
    track = given.pop("track", None) or ("gpt2-small" if big else "laptop")
    fields = load_track(track, given.get("target"))
    # for its own sake: the whole model, and every token kept
    if "text" in given and fields["data"] != "text":
        fields = load_track(track, -math.inf) | dict(
            data="text", target=None, tokenizer=Config.tokenizer, long_docs="split", shuffle=True
        )
    return Config(**(fields | given))


# --------------------------------------------------------------------------------------------------
# Model
# Shapes: B rows, T tokens in a row, C width, H heads, D head width, V vocabulary


class GPT(nn.Module):
    """A decoder-only transformer with the record's main parts.

    The matrices of all layers with the same shape are one parameter (a bank), so that the optimizer
    orthogonalises them in one batch and ranks share them out evenly. Parts that are switched off
    have no elements.
    """

    def __init__(self, c, n_vocab, dtype=torch.float32, ops=None):
        super().__init__()
        self.c, self.n_vocab, self.ops, self.recompute = (
            c,
            n_vocab,
            ops or choose_ops("cpu", dtype, fp8=c.fp8),
            c.recompute == "on",
        )
        # padded: GPUs like multiples of 64
        L, C, H, V = c.n_layer, c.n_embd, c.n_head, -(-n_vocab // 64) * 64
        self.attn_layers = [i for i in range(L) if i not in c.skip[1:]]  # those with attention

        def parameter(*shape, dtype=dtype):
            return nn.Parameter(torch.zeros(shape, dtype=dtype))

        self.embed, self.lm_head = parameter(V, C), parameter(V, C)
        self.value_embeds = parameter(len(c.value_embed_layers), V, C)
        self.ngram_embeds = parameter(c.n_gram - 1, c.ngram_rows, C)
        # Q, K, V, O of one layer, of the next, ...
        self.attn_bank = parameter(len(self.attn_layers) * 4, C, C)
        self.mlp_bank = parameter(L * 2, c.mlp_ratio * C, C)  # up, down transposed, ...
        self.value_gates = parameter(len(c.value_embed_layers), H, GATE_INPUTS, dtype=torch.float32)
        self.attn_gates = parameter(
            len(self.attn_layers) * c.attn_gate, H, GATE_INPUTS, dtype=torch.float32
        )
        self.smear_gate = parameter(int(c.smear), GATE_INPUTS, dtype=torch.float32)
        # of each layer: of residual stream, embedding
        self.lambdas = parameter(L, 2, dtype=torch.float32)
        self.scalars = parameter(3, dtype=torch.float32)  # weights of smear, skip and backout

        D, T = C // H, max(c.row_len, c.val_row_len) * (2 if c.paired_layers else 1)
        for name in "cos", "sin":  # filled by rotate()
            self.register_buffer(name, torch.zeros(T, 1, D // 2, dtype=dtype), persistent=False)
        signs = torch.randint(
            2, (1024 * c.ngram_signs, C), generator=torch.Generator().manual_seed(0), device="cpu"
        )
        self.register_buffer("signs", (2 * signs - 1).to(self.cos), persistent=False)
        self.rotate(c.long_window[:1])
        self.mlps = [self.ops.new_mlp() for _ in range(L)]
        if self.ops.fp8:
            self.mlps = nn.ModuleList(self.mlps)

    @torch.no_grad()
    def init_weights(self, seed):
        """Outputs of all blocks start at zero, so that the model starts as embedding -> head."""

        # on the CPU, for every device alike, and by name, whatever other parameters there are
        def draw(name, std):
            g = torch.Generator().manual_seed(
                (seed << 20) % 2**62 + zlib.crc32(name.encode()) % 2**20
            )
            return torch.randn(self.get_parameter(name).shape, generator=g) * std

        std = 0.5 * self.c.n_embd**-0.5
        self.embed.copy_(draw("embed", 1.0))
        self.ngram_embeds.zero_()
        self.lm_head.copy_(draw("lm_head", 0.005))
        self.value_embeds.copy_(draw("value_embeds", 0.01))
        self.attn_bank.copy_(draw("attn_bank", std))
        self.attn_bank[3::4].zero_()
        self.mlp_bank.copy_(draw("mlp_bank", std))
        self.mlp_bank[1::2].zero_()
        for gates in (self.value_gates, self.attn_gates, self.smear_gate):
            gates.zero_()
        self.lambdas.copy_(torch.tensor([1.0, 0.0]).expand_as(self.lambdas))
        self.scalars.copy_(torch.tensor([0.0, 0.2, -0.5]))

    def scales(self):
        """What FP8 products know of the activations they multiply, [] without them."""
        return [mlp.post for mlp in self.mlps] if self.ops.fp8 else []

    def rotate(self, long_windows):
        """Fill the rotary tables for a stage, given the long windows of all stages up to it."""
        if self.cos.is_meta:
            return
        D = self.c.n_embd // self.c.n_head
        freqs = rope_frequencies(self.c, D // 4, long_windows).to(self.cos.device)
        # (T, D / 2)
        angles = torch.arange(len(self.cos), device=freqs.device)[:, None] * F.pad(
            freqs, (0, D // 4)
        )
        self.cos.copy_(angles.cos()[:, None])
        self.sin.copy_(angles.sin()[:, None])

    def embed_ngrams(self, inputs, starts):
        """Sum of the embeddings of the 2-gram, 3-gram, ... that end at each token, within its
        document: (B, T, C)."""
        key = before = inputs
        total = 0
        for table in self.ngram_embeds.unbind(0):
            before = previous(before, starts, torch.zeros_like(before))
            # odd, so that rows of a power of two still depend on all tokens
            key = key * (self.n_vocab | 1) + before
            x = embedding(key % len(table), table)
            if len(self.signs):  # those that share a row get it with other signs
                x = x * F.embedding(key // len(table) % len(self.signs), self.signs)
            total = total + x
        return total

    def hidden(self, inputs, cu_seqlens, stage):
        """inputs: (B, T) int64; stage: a Stage -> (B, T, C) ready for the head."""
        c, ops = self.c, self.ops
        B, T = inputs.shape
        H, D = c.n_head, c.n_embd // c.n_head
        attn = dict(
            zip(self.attn_layers, self.attn_bank.view(-1, 4 * c.n_embd, c.n_embd).unbind(0))
        )
        attn_gates = dict(zip(self.attn_layers, self.attn_gates.unbind(0)))
        mlp = self.mlp_bank.unbind(0)
        value_embeds = dict(
            zip(c.value_embed_layers, zip(self.value_embeds.unbind(0), self.value_gates.unbind(0)))
        )
        starts = document_starts(inputs, cu_seqlens)
        smear, skip, backout = self.scalars.unbind(0)

        x = embedding(inputs, self.lm_head if stage.tied else self.embed)
        x = ops.rms_norm(x) if c.tied else x  # to the size of the n-grams' embeddings
        x = ops.rms_norm(x + self.embed_ngrams(inputs, starts))
        for w_gate in self.smear_gate.unbind(0):
            x = x + smear * gate(x, w_gate[None]) * previous(
                x, starts[..., None], torch.zeros_like(x)
            )
        x0, outputs = x, []

        def block(i, x, skipped):
            x = self.lambdas[i, 0] * x + self.lambdas[i, 1] * x0
            if i in attn:
                h, pair = ops.rms_norm(x), i in c.paired_layers
                w_qkv, w_o = attn[i].split([3 * c.n_embd, c.n_embd])
                # heads h and h + H / 2 take turns in time, so that each query sees both heads' keys
                n = 1 + pair
                # Q, K, V of the first half of the heads, then of the second: then a view is all it
                # takes
                if pair:
                    w_qkv = w_qkv.view(3, 2, -1, c.n_embd).transpose(0, 1).flatten(0, 2)
                qkv = F.linear(h, w_qkv).view(B, n * T, 3 * H // n, D)
                q, k, v = ops.qkv_norm_rope(qkv, self.cos, self.sin)  # (B, n T, H / n, D)
                if c.key_offset and sees_far(c, i) and not pair:
                    # what stands still of a key is its predecessor's: a query finds what came after
                    # a token
                    still = torch.arange(D, device=x.device) % (D // 2) >= D // 4
                    k = torch.where(still, previous(k, starts[..., None, None], k), k)
                if i in value_embeds:
                    table, w_gate = value_embeds[i]
                    ve = gate(h, w_gate)[..., None] * embedding(inputs, table).view(B, T, H, D)
                    v = v + ve.view(v.shape)
                y = ops.attention(
                    q,
                    k,
                    v,
                    cu_seqlens=n * cu_seqlens,
                    max_seqlen=n * stage.max_doc_len,
                    window=n * stage.windows[i],
                    scale=stage.attn_scale,
                )
                if c.attn_gate:
                    y = gate(h, attn_gates[i])[..., None] * y.reshape(B, T, H, D)
                y = F.linear(y.reshape(B, T, c.n_embd), w_o)
            else:
                y = skip * skipped
            h, x = ops.add_rms_norm(x, y)
            return x + self.mlps[i](h, *mlp[2 * i : 2 * i + 2])

        for i in range(c.n_layer):
            x = self.keep_less(block, i, x, outputs[c.skip[0]] if i not in attn else None)
            outputs.append(x)
        if c.backout >= 0:
            x = x + backout * outputs[c.backout]
        return ops.rms_norm(x)

    def keep_less(self, function, *args):
        """function(*args); with recompute, backward computes it again instead of keeping what is
        inside."""
        recompute = self.recompute and torch.is_grad_enabled()
        return checkpoint(function, *args, use_reentrant=False) if recompute else function(*args)

    def forward(self, inputs, targets, cu_seqlens, stage, target_weights=None, chunk=0):
        """Summed cross-entropy (fp32 scalar) over the targets that are not padding.

        target_weights: (n,) fp32 for predicting the n next tokens from each, None for one.
        chunk: tokens whose logits exist at one time, 0 for all of them.
        """
        x = self.hidden(inputs, cu_seqlens, stage).flatten(0, 1)  # (B T, C)
        later, ends = (
            [targets],
            F.pad(document_starts(inputs, cu_seqlens)[:, 1:], (0, 1), value=True),
        )
        for _ in range(stage.n_targets - 1):  # the next document's tokens are no target
            later.append(torch.where(ends, IGNORE, later[-1].roll(-1, dims=1)))
        targets = torch.stack(later, dim=2).flatten(0, 1)  # (B T, n)
        w, sampled = self.lm_head, None
        # seeded by the tokens, so that a resumed run chooses the same
        if 0 < stage.n_sampled < len(w):
            tokens, targets, sampled = sample_vocabulary(
                targets, len(w), stage.n_sampled, inputs.sum(), IGNORE
            )
            w = embedding(tokens, w)
        loss = functools.partial(
            self.ops.linear_cross_entropy,
            cap=self.c.softcap or None,
            target_weights=target_weights,
            sampled=sampled,
        )
        size = chunk or (4096 if self.recompute else len(x))
        return sum(
            self.keep_less(loss, h, w, t) for h, t in zip(x.split(size), targets.split(size))
        )

    def flops_per_token(self, stage):
        """Training FLOPs per token: 6 per matrix weight in use, and attention over half of what
        windows let it see."""
        c = self.c
        head = min(stage.n_sampled or len(self.lm_head), len(self.lm_head)) * c.n_embd
        matrices = self.attn_bank.numel() + self.mlp_bank.numel() + head
        seen = sum(
            (1 + (i in c.paired_layers)) * min(stage.windows[i], stage.max_doc_len)
            for i in self.attn_layers
        )
        return 6 * matrices + 12 * c.n_embd * seen / 2


def document_starts(inputs, cu_seqlens):
    """(B, T) bool: where a document begins, as every row does."""
    starts = torch.zeros(inputs.numel() + 1, dtype=torch.bool, device=inputs.device)
    return starts.index_fill(0, cu_seqlens.long(), True)[:-1].view(inputs.shape)


def previous(x, starts, first):
    """(B, T, ...) -> the value one token earlier; `first` at documents' starts, which each row
    begins with."""
    return torch.where(starts, first, x.roll(1, dims=1))


def gate(x, w):
    """x: (..., C), w: (H, GATE_INPUTS) -> (..., H) between 0 and 2, seeing the first dimensions
    of x only."""
    return 2 * torch.sigmoid(F.linear(x[..., :GATE_INPUTS], w.to(x.dtype)))


# --------------------------------------------------------------------------------------------------
# Schedules: plain functions of progress, the fraction of the scheduled steps behind us


def progress_at(c, step):
    """step: how many are behind us."""
    return min(1.0, step / max(1, c.steps - c.extension))


def by_stage(values, progress):
    """The entry for this progress, stages being equally long."""
    return values[stage_number(values, progress)]


def stage_number(values, progress):
    return min(int(progress * len(values)), len(values) - 1)


def lr_scale(c, progress):
    """Flat at the stage's multiplier, then linearly down to lr_floor over the last `cooldown` of
    training."""
    t = max(0.0, (progress - (1 - c.cooldown)) / c.cooldown) if c.cooldown else 0.0
    return by_stage(c.stage_lr, progress) * (1 - t) + c.lr_floor * t


def muon_momentum(progress):
    """0.85 -> 0.95 over the first fifth, back to 0.85 in the last 4%: fresh gradients count more
    at both ends."""
    return 0.85 + 0.10 * min(1.0, progress / 0.2, (1 - progress) / 0.04)


def target_weights(c, progress):
    """1, 1/2, 1/4, ... for the next tokens that are predicted; the farthest fades out over its
    stage. None for one."""
    n = by_stage(c.mtp, progress)
    left = max(0.0, 1 - (progress * len(c.mtp) - stage_number(c.mtp, progress)))
    return None if n == 1 else [0.5**k * (left if k == n - 1 else 1) for k in range(n)]


def layer_windows(c, short, long):
    return tuple(long if sees_far(c, i) else short for i in range(c.n_layer))


def sees_far(c, i):
    return i in c.long_layers or i == c.n_layer - 1


def rope_frequencies(c, n, long_windows):
    """(n,) radians per token. With yarn, at each change of the long window those that turn less
    than once in the old window are slowed down in proportion, those that turn 32 times stay
    (Peng et al., arXiv:2309.00071)."""
    freqs = c.rope_base ** -torch.linspace(0, 1, n)
    for old, new in zip(long_windows, long_windows[1:] if c.yarn else ()):
        kept = ((old * freqs / (2 * math.pi) - 1) / (32 - 1)).clamp(0, 1)
        freqs = freqs * (kept + (1 - kept) * old / new)
    return freqs


class Stage(typing.NamedTuple):
    """What a step's graph and batch depend on."""

    windows: tuple  # by layer
    max_doc_len: int
    rows: int  # global batch
    attn_scale: float
    tied: bool  # whether the head is the embedding as well
    n_targets: int
    n_sampled: int  # tokens in the softmax, 0 for all


def stage_at(c, progress):
    windows = layer_windows(
        c, by_stage(c.short_window, progress), by_stage(c.long_window, progress)
    )
    max_doc_len = min(by_stage(c.max_doc_len, progress), c.row_len)
    scale = c.attn_scale * (c.n_embd // c.n_head) ** -0.5
    if c.yarn:
        until = c.long_window[: stage_number(c.long_window, progress) + 1]
        scale *= math.prod(1 + 0.2 * math.log(new / old) for old, new in zip(until, until[1:]))
    return Stage(
        windows,
        max_doc_len,
        by_stage(c.batch_tokens, progress) // c.row_len,
        scale,
        progress < c.tied,
        by_stage(c.mtp, progress),
        by_stage(c.sampled_softmax, progress),
    )


def val_stage(c, stage):
    """The same for validation during or after this stage."""
    windows = layer_windows(c, *(c.val_windows or (c.short_window[-1], c.long_window[-1])))
    return stage._replace(
        windows=windows, max_doc_len=c.val_row_len, rows=0, n_targets=1, n_sampled=0
    )


# --------------------------------------------------------------------------------------------------
# Optimizer


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one parameter is updated. lr: peak learning rate; sharded: each rank updates its part
    only."""

    optim: str  # "muon", "adam" or, for a table, "row_adam", which ignores the first beta
    lr: float
    betas: tuple = (0.0, 0.0)  # Adam's
    eps: float = 1e-10
    weight_decay: float = 0.0
    sharded: bool = True


def parameter_table(c):
    """Every parameter of GPT, declared once, in the order in which gradients are reduced and
    updated: small ones first, the long Muon updates last, so that they hide the others'
    gathers."""
    lr, decay = c.adam_lr, c.weight_decay
    tables = Rule(
        "row_adam" if c.row_moments else "adam", lr * 75, (0.75, 0.95), weight_decay=decay / 50
    )
    head = Rule("adam", lr, (0.75, 0.95), weight_decay=decay / 1.6)
    return {
        # every block's input is normalised, so while the blocks' outputs are zero these have
        # rounding errors for gradients: the larger eps keeps Adam from blowing those up to full
        # steps
        "lambdas": Rule("adam", lr * 5, (0.9, 0.99), eps=1e-6, sharded=False),
        "scalars": Rule("adam", lr * 5, (0.9, 0.99), eps=1e-6, sharded=False),
        "smear_gate": Rule("adam", lr, (0.9, 0.99), sharded=False),
        "attn_gates": Rule("adam", lr, (0.9, 0.99), sharded=False),
        "value_gates": Rule("adam", lr, (0.9, 0.99), sharded=False),
        "value_embeds": tables,
        "embed": head if c.tied else tables,
        "ngram_embeds": tables,
        "lm_head": head,
        "attn_bank": Rule("muon", c.muon_lr, weight_decay=decay),
        "mlp_bank": Rule("muon", c.muon_lr, weight_decay=decay),
    }


class Optimizer:
    """Muon and Adam by the table, shared out over the ranks of each machine.

    Each gradient is reduced to parts, its owner updates its part, the weights are gathered; all of
    it overlaps between parameters. Parts are rows of the flattened parameter (Adam) or of a table,
    or whole matrices (Muon). For bf16 weights the owner keeps what makes them exact fp32 masters.
    """

    def __init__(
        self,
        model,
        table,
        world=World(),
        compile=False,
        polar_express=polar_express,
        normuon=False,
        adam_every=1,
    ):
        self.params = dict(model.named_parameters())
        assert table.keys() == self.params.keys(), "the table must name every parameter"
        self.table = {name: rule for name, rule in table.items() if self.params[name].numel()}
        self.world, self.normuon, self.adam_every = world, normuon, adam_every
        # 0-d tensors, so that a new value compiles nothing
        self.scalar = (lambda x: torch.tensor(x, dtype=torch.float32)) if compile else float
        # on flat tensors, so that one compiled kernel serves every parameter; on a GPU one for each
        # size, since Inductor vectorises loads where it knows the size
        dynamic = not next(model.parameters()).is_cuda
        parts = {
            f.__name__: torch.compile(f, fullgraph=True, dynamic=dynamic) if compile else f
            for f in (adam_update, row_scale, nesterov, balance, descend)
        }
        self.adam = parts["adam_update"]
        self.row_adam = functools.partial(
            row_update, row_scale=parts["row_scale"], descend=parts["descend"]
        )
        self.muon = functools.partial(
            muon_update,
            nesterov=parts["nesterov"],
            balance=parts["balance"],
            descend=parts["descend"],
            orthogonalise=polar_express,
        )
        self.reset()

    @torch.no_grad()
    def reset(self):
        """Moments at zero, nothing below the weights' last bit, no gradients."""
        self.shards, self.state, self.step_count = {}, {}, 0
        for name, rule in self.table.items():
            whole = self.params[name].data
            parts = dict(muon=whole, adam=whole.view(-1), row_adam=whole.view(-1, whole.size(-1)))[
                rule.optim
            ]
            shard = self.shards[name] = Shard(parts, self.world, rule.sharded)
            m = (
                torch.zeros_like(shard.own, dtype=torch.float32)
                if rule.optim != "row_adam"
                else None
            )
            if rule.optim == "muon":
                v = new_second_moment(shard.own) if self.normuon else None
            else:
                v = (
                    torch.zeros_like(shard.own[:, :1], dtype=torch.float32)
                    if m is None
                    else m.clone()
                )
            self.state[name] = dict(companion=new_companion(shard.own), m=m, v=v)
            self.params[name].grad = None

    @torch.no_grad()
    def step(self, lr_scale, momentum, ok=None):
        """One update from .grad (summed over micro-batches; summed over ranks here). Clears .grad
        of what it updates.

        ok: None, or a 0-d bool tensor on the device: where it is False, weights and moments stay as
        they are.
        """
        self.step_count += 1
        # known already, and checks in every pass would cost 5%
        if ok is not None and ok.device.type == "cpu":
            if not ok:
                for name in self.waiting():
                    self.params[name].grad = None
            ok = None
        adam_step, adams_turn = (
            self.step_count // self.adam_every,
            self.step_count % self.adam_every == 0,
        )
        names = [name for name in self.waiting() if self.table[name].optim == "muon" or adams_turn]
        reduced = {name: self.shards[name].reduce(self.params[name].grad) for name in names}
        reduced = {name: self.shards[name].reduce_across(*reduced[name]) for name in names}
        gathers = []
        for name in names:
            rule, (work, grad), own, s = (
                self.table[name],
                reduced[name],
                self.shards[name].own,
                self.state[name],
            )
            if work is not None:
                work.wait()
            if len(own):
                lr = rule.lr * lr_scale
                last = dict(
                    shrink=self.scalar(lr * lr * rule.weight_decay) if rule.weight_decay else None,
                    ok=ok,
                )
                # .data: compiled code would look at what a view is a view of
                weights = own.data, s["companion"], grad[: len(own)].data
                corrections = [1 - beta**adam_step for beta in rule.betas]
                if rule.optim == "muon":
                    self.muon(
                        *weights, s["m"], self.scalar(lr), self.scalar(momentum), s["v"], **last
                    )
                elif rule.optim == "row_adam":
                    self.row_adam(
                        *weights,
                        s["v"],
                        *map(self.scalar, (lr, rule.betas[1], rule.eps, corrections[1])),
                        **last,
                    )
                else:
                    self.adam(
                        *weights,
                        s["m"],
                        s["v"],
                        *map(self.scalar, (lr, *rule.betas, rule.eps, *corrections)),
                        **last,
                    )
            gathers.append(self.shards[name].gather())
            self.params[name].grad = None
        for finish in gathers:
            finish()

    def forget_waiting(self, ok):
        """Where ok is False, what waits for Adam's turn is zero: it does not count and is no
        part of the sum."""
        for name in self.waiting():
            self.params[name].grad.masked_fill_(~ok, 0)

    def waiting(self):
        """Parameters that have a gradient: between steps, those that wait for Adam's turn."""
        return [name for name in self.table if self.params[name].grad is not None]

    def untie(self):
        """The embedding leaves the head, whose weights and moments it takes along."""
        self.params["embed"].data.copy_(self.params["lm_head"].data)
        for key, x in self.state["lm_head"].items():
            if x is not None:
                self.state["embed"][key].copy_(x)
        if self.params["lm_head"].grad is not None:
            self.params["embed"].grad = self.params["lm_head"].grad.clone()


# --------------------------------------------------------------------------------------------------
# Evaluation


# at one time: 0.8 GB in bf16, where a row of 65,536 tokens would have 6.6 GB
VAL_LOGITS = 8192 * 50304


@torch.no_grad()
def evaluate(forward, stage, n_logits, micro_batches, world):
    """Summed loss in nats over the micro-batches of all ranks. n_logits: per token, with
    padding."""
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    chunk = VAL_LOGITS // n_logits
    for micro in micro_batches:
        inputs, targets, cu_seqlens = (t.to(world.device, non_blocking=True) for t in micro)
        total += forward(inputs, targets, cu_seqlens, stage, chunk=chunk)
    if world.size > 1:
        dist.all_reduce(total)
    return total.item()


# --------------------------------------------------------------------------------------------------
# The run


class Trainer:
    """One configuration on one machine: model, optimizer, data and the compiled step, for runs
    from several seeds."""

    def __init__(self, c, world, data, stages, log):
        self.c, self.world, self.data, self.stages = c, world, data, stages
        device, n_vocab = world.device, data.dataset.n_vocab
        dtype = native_dtype(device) if c.dtype == "auto" else getattr(torch, c.dtype)
        try:
            ops = choose_ops(device, dtype, c.n_embd // c.n_head, c.kernels, c.fp8, log.say)
        except ValueError as e:
            raise InputError(e) from None
        self.compiled = c.compile and can_compile(log.say)
        with torch.device("meta"):
            most, recompute, self.memory_estimate = memory.fit(
                c, GPT(c, n_vocab, dtype, ops), world
            )
        with device:
            self.model = GPT(c, n_vocab, dtype, ops)
        self.model.recompute = recompute
        self.optimizer = Optimizer(
            self.model,
            parameter_table(c),
            world,
            self.compiled,
            ops.polar_express,
            c.normuon,
            c.adam_every,
        )
        self.forward = (
            torch.compile(self.model, fullgraph=True, dynamic=False)
            if self.compiled
            else self.model
        )
        # on a CPU, compiling it would take longer than it does
        on_gpu = self.compiled and device.type == "cuda"
        sums_of_squares = (
            torch.compile(gradient_report, dynamic=False) if on_gpu else gradient_report
        )
        self.guard = Guard(
            device, sums_of_squares, strict=c.max_skips == 0, spike_sigmas=c.spike_sigmas
        )
        self.micro_rows = {
            s: memory.equal_passes(-(-s.rows // world.size), most) for s in set(self.stages)
        }
        val_rows = max(1, min(self.micro_rows[self.stages[-1]] * c.row_len, 16384) // c.val_row_len)
        self.val_batches = list(self.data.val.micro_batches(world.rank, world.size, val_rows))
        self.params = sum(p.numel() for p in self.model.parameters())
        self.flops_per_token = {s: self.model.flops_per_token(s) for s in set(self.stages)}
        self.environment = describe_environment(device) | dict(
            dtype=str(dtype)[6:],
            kernels=ops.named(),
            world_size=world.size,
            probe=machine_probe(device),
        )
        # FLOP/s of all ranks
        self.peak = self.environment["probe"]["matmul"][str(dtype)[6:]] * world.size

    def describe(self, log):
        """What is about to run: all of it into the log, the gist on the screen."""
        c, data, environment = self.c, self.data, self.environment
        log.header(
            pack_source(ROOT) if log.active else None,
            environment=environment,
            config=dataclasses.asdict(c),
            data=data.dataset.fingerprint,
            n_vocab=data.dataset.n_vocab,
        )
        triton = [name for name, how in environment["kernels"].items() if how == "triton"]
        log.say(
            f"{c.track}: {self.params / 1e6:.1f}M parameters, {environment['dtype']}, attention "
            f"{environment['kernels']['attention']}, Triton for {', '.join(triton) or 'nothing'}, "
            f"{self.world.size} x {environment['device']}, {self.peak / 1e12:.2f} TFLOP/s in matrix products"
        )
        log.say(
            f"memory by estimate: {self.memory_estimate}{', blocks recomputed' * self.model.recompute}"
        )
        goal = (
            f"until {c.target_metric} is {c.target} or less"
            if c.target is not None
            else "to the last step"
        )
        log.say(
            f"training on {data.dataset.name} {goal}, at most {c.steps} steps, seed {c.seed}; log in {log.folder}"
        )
        if data.val_bytes is None:
            log.say(
                "no bits per byte and no sample: the tokenizer's vocabulary could not be downloaded"
            )

    def warm_up(self, log):
        """Compile everything on batches of padding, whose loss and gradients are zero, outside
        the clock."""
        c, step_of = self.c, {stage: step for step, stage in reversed(list(enumerate(self.stages)))}
        # a stage may have a graph for validation, an update one a size
        limit = 2 * len(self.micro_rows) + 16
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
        log.say("compiling ... (minutes the first time, seconds from then on)")
        for stage, rows in sorted(self.micro_rows.items()):
            padding = pack([None] * rows, c.row_len, self.data.train.max_docs, stage.max_doc_len)
            ok = self.accumulate(
                [[t.to(self.world.device) for t in padding]],
                0,
                stage,
                progress_at(c, step_of[stage]),
            )
        for _ in range(c.adam_every):
            self.optimizer.step(0.0, 0.0, ok)  # at learning rate 0
        validated = [
            step for step in range(1, c.steps + 1) if step % c.eval_every == 0 or step == c.steps
        ]
        for step in {val_stage(c, self.stages[step - 1]): step for step in validated}.values():
            self.validate(step, self.val_batches[:1])

    def rotate(self, step):
        """The rotary tables of the stage in which this step, numbered from 1, is."""
        number = stage_number(self.c.long_window, progress_at(self.c, max(step - 1, 0)))
        self.model.rotate(self.c.long_window[: number + 1])

    def accumulate(self, batch, step, stage, progress, votes=()):
        """Forward and backward over this rank's micro-batches; returns the guard's judgement,
        0-d, on the device."""
        total = torch.zeros((), device=self.world.device)
        n_tokens = stage.rows * self.c.row_len
        weights = target_weights(self.c, progress)
        weights = None if weights is None else to_device(weights, self.world.device)
        for inputs, targets, cu_seqlens in batch:
            loss = self.forward(inputs, targets, cu_seqlens, stage, weights) / n_tokens
            loss.backward()
            total += loss.detach()
        return self.guard.judge(
            step,
            total,
            {name: self.optimizer.params[name].grad for name in self.optimizer.table},
            votes,
        )

    def validate(self, step, batches=None):
        """Validation metrics by name; None for those that need bytes which are not known."""
        stage = val_stage(self.c, self.stages[step - 1])
        nats = evaluate(
            self.forward, stage, len(self.model.lm_head), batches or self.val_batches, self.world
        )
        if not math.isfinite(nats):
            raise InputError(
                f"step {step}: the validation loss is {nats}, so the run stopped there"
            )
        return measure(Evaluation(nats, self.data.val.n_targets, self.data.val_bytes))

    def enter(self, step):
        """Make ready for this step, numbered from 1; returns its stage and progress."""
        before, stage = self.stages[max(step - 2, 0)], self.stages[step - 1]
        if stage != before:
            self.rotate(step)
        if before.tied and not stage.tied:
            self.optimizer.untie()
        if before.n_sampled != stage.n_sampled:
            self.guard.recent.zero_()  # the loss begins a new series
        return stage, progress_at(self.c, step - 1)

    def step(self, batch, step, stage, progress, votes=()):
        """One step, numbered from 1: the update counts if the guard says so. votes: see
        Run.votes."""
        ok = self.accumulate(batch, step, stage, progress, votes)
        self.optimizer.step(lr_scale(self.c, progress), muon_momentum(progress), ok)
        # on a CPU step() has dropped them
        if self.c.max_skips and self.world.device.type == "cuda":
            self.optimizer.forget_waiting(ok)
        for scale in self.model.scales():
            scale.roll()

    def batches(self, first):
        """This rank's micro-batches, for each step from the first on."""
        for step in range(first, len(self.stages) + 1):
            yield list(
                self.data.train.micro_batches(
                    step, self.world.rank, self.world.size, self.micro_rows[self.stages[step - 1]]
                )
            )

    def run(self, log, started, requests, store=None, start_from=None):
        """Train from c.seed, or from a checkpoint, to the target or the last step; returns the
        result as a dict.

        started: perf_counter() when this run began; requests: what signals ask for; store:
        Checkpoints, on the first rank; start_from: (tensors, meta) of a checkpoint, the tensors on
        the first rank only. Raises Interrupted when a signal ended the run.
        """
        c, world = self.c, self.world
        self.data.train.reseed(c.seed)
        self.guard.reset()
        for scale in self.model.scales():
            scale.reset()
        if start_from:
            at = state.restore(self, *start_from)
        else:
            at = resume.Position()
            self.model.init_weights(c.seed)
            if c.warm_start:
                resume.copy_weights(c.warm_start, self.model)
            self.optimizer.reset()
        self.rotate(at.step)
        cold_start = time.perf_counter() - started
        requests.training = True
        run = Run(self, log, requests, store, at)
        self.loop(run)
        train_time = run.clock.total
        # the weights as they will be saved do not depend on where training ended
        if self.stages[at.step - 1].tied:
            self.optimizer.untie()
        met = None if c.target is None else meets(at.metrics[c.target_metric], c.target)
        return dict(
            track=c.track,
            target_metric=c.target_metric,
            target=c.target,
            reached=met,
            **at.metrics,
            train_time_s=round(train_time, 3),
            cold_start_s=round(cold_start, 2),
            steps=at.step,
            tokens=at.tokens,
            tokens_per_s=round(at.tokens / train_time),
            peak_share=round(at.flops / train_time / self.peak, 3),
            params=self.params,
            device=self.environment["device"],
            world_size=world.size,
            seed=c.seed,
            data=self.data.dataset.name,
            data_fingerprint=self.data.dataset.fingerprint,
            run_dir=str(log.folder),
            resumed_at=at.resumed_at,
        )

    def loop(self, run):
        """Train from where the run is until it says that a step was the last."""
        first = run.at.step + 1
        with contextlib.closing(Prefetcher(self.batches(first), self.world.device)) as batches:
            run.start()
            for step, batch in enumerate(() if run.done() else batches, start=first):
                stage, progress = self.enter(step)
                self.step(batch, step, stage, progress, run.votes())
                if run.after(step, stage.rows * self.c.row_len, self.flops_per_token[stage]):
                    break
            run.end()

    def save(self, result, log):
        """The result and the weights, and a sample of text on the screen."""
        c, data = self.c, self.data.dataset
        log.finish(result, {name: p.detach().cpu() for name, p in self.model.named_parameters()})
        if self.data.val_bytes and c.sample_tokens:
            stage = self.stages[result["steps"] - 1]._replace(tied=False)
            tokens = generate(self.model, stage, [data.eot], c.sample_tokens, c.seed)
            sample = data.tokenizer.decode(tokens)
            log.say(f"--- a sample\n{sample}\n---")


def settle(c, device):
    """The Config with what depends on the machine decided, as it goes into logs and checkpoints."""
    if c.fp8 != "auto":
        return c
    dtype = native_dtype(device) if c.dtype == "auto" else getattr(torch, c.dtype)
    on = choose_fp8(device, dtype, c.fp8, functools.partial(print, file=sys.stderr))
    return dataclasses.replace(c, fp8="on" if on else "off")


def train(c, world=World(), report=lambda result: None, requests=None):
    """Train as configured, c.repeat times from successive seeds. report(result) is called after
    each run; returns the last result (the JSON line) as a dict. Raises InputError for what a
    user can mend, Interrupted after a signal."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(c.cache_dir) / "inductor"))
    first_rank = world.rank == 0
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    folder, resuming = first_rank_first(
        world,
        lambda: (
            resume.choose_run_dir(c, ROOT / "runs", restarted) if first_rank else (Path(), False)
        ),
    )
    if world.device.type == "cpu":
        keep_freed_memory()
    c = settle(c, world.device)
    stages = [stage_at(c, progress_at(c, step)) for step in range(c.steps)]
    data = load_data(c, stages, world)
    trainer, started = None, START
    for seed in range(c.seed, c.seed + c.repeat):
        c = dataclasses.replace(c, seed=seed)
        run_dir = folder / f"seed{seed}" if c.repeat > 1 else folder

        with contextlib.ExitStack() as closing:
            result, tensors, meta = resume.begin(
                c, world, run_dir, resuming, data.dataset.fingerprint, closing
            )
            if result:
                report(result) if first_rank else None
                continue
            if c.warm_start and not meta:
                with torch.device("meta"):  # does it fit? before anything long is begun
                    resume.copy_weights(c.warm_start, GPT(c, data.dataset.n_vocab))
            log = closing.enter_context(
                Log(
                    run_dir,
                    c.steps,
                    first_rank,
                    resume_step=meta["progress"]["step"] if meta else 0 if resuming else None,
                )
            )
            try:
                first = trainer is None
                trainer = trainer or Trainer(c, world, data, stages, log)
                trainer.c = c
                trainer.describe(log)
                if first and trainer.compiled:
                    trainer.warm_up(log)
                store = None
                if first_rank and c.checkpoint_every != "off":
                    store = closing.enter_context(
                        contextlib.closing(
                            Checkpoints(run_dir / "checkpoints", c.keep_last, c.keep_best, log.say)
                        )
                    )
                result = trainer.run(
                    log, started, requests or Requests(), store, (tensors, meta) if meta else None
                )
                if first_rank:
                    trainer.save(result, log)
                    report(result)
            except (InputError, RuntimeError) as e:
                if memory.ran_out(e):
                    e = InputError(
                        memory.advice(c, trainer.memory_estimate if trainer else "unknown", e)
                    )
                if not isinstance(e, InputError):
                    raise
                log.say(f"error: {e}", quiet=True)
                raise e from None
            wait_for_first_rank(world)
        started = time.perf_counter()
    return result


# --------------------------------------------------------------------------------------------------
# The door


def main(argv=None):
    """Parse, launch one process per GPU if there are several, train, print the result. Returns
    the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    rank = int(os.environ.get("RANK", 0))
    reached = []

    def report(result):
        print(to_json(result), flush=True)
        reached.append(result["reached"])

    try:
        c = parse_args(argv)
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if "RANK" not in os.environ:
            if c.gpus > gpus:
                raise InputError(
                    f"--gpus {c.gpus}: this machine has {gpus}; leave the option out to use all"
                )
            if (c.gpus or gpus) > 1:
                return launch(__file__, argv, c.gpus or gpus, c.max_restarts)
        with Requests().listen() as requests:
            train(c, join_world(gpus), report, requests)
        # on the first rank only: the launcher ends the others when one fails, or starts again, and
        # then 3 is no failure
        return (
            3 if False in reached and not int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) else 0
        )
    except InputError as e:
        if rank == 0:
            print(f"error: {' '.join(str(e).splitlines())}", file=sys.stderr)
        else:
            time.sleep(2)  # for the first rank to say it
        return 2
    except SystemExit as e:  # a signal
        return e.code
    except RuntimeError as e:
        if not (dist.is_initialized() and lost_another(e)):
            raise
        print(
            f"error: another process has ended or cannot be reached: {str(e).splitlines()[0]}",
            file=sys.stderr,
        )
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
