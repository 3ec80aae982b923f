"""Stopwatch: train a GPT to a target loss against the clock.

One file, in reading order: configuration, model, optimizer, schedules, evaluation and sampling, the run, the door.
`./run.sh` starts it; `python train_gpt.py` and `torchrun --nproc_per_node=N train_gpt.py` work as well.
Tracks (tracks/*.py) are small sets of differences from the defaults in Config below.
"""

import time

START = time.perf_counter()  # the cold start is counted from here

import argparse
import contextlib
import ctypes
import dataclasses
import datetime
import difflib
import functools
import importlib
import json
import logging
import math
import os
import shutil
import sys
import sysconfig
import typing
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import Dataset, InputError, Prefetcher, TrainLoader, ValLoader, open_dataset, pack, read_shard
from kernels import adam_update, choose_ops, descend, muon_update, nesterov, new_companion, polar_express
from records import Log, describe_environment, machine_probe, synchronize

ROOT = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------------------
# Configuration: every field is a command-line option


def option(default, help, group=None):
    """A field of Config; group: the heading it begins in --help."""
    return dataclasses.field(default=default, metadata=dict(help=help, group=group))


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything a run depends on. Tuples with one entry per stage divide training into equal stages."""
    track: str = option("", "named set of defaults, data and target", "goal")
    target: float | None = option(None, "stop when the validation metric is this or less; one easier than "
                                       "the track's own may choose a smaller model")
    target_metric: str = option("val_loss", "val_loss (nats per token) or val_bpb (bits per byte)")
    data: str = option("stdlib", "stdlib, fineweb10B, or text (then --text says which)", "data")
    text: str = option("", "train on this file or folder of text")
    tokenizer: str = option("bpe:4096", "for text: chars, bytes, bpe:N or gpt2")
    train_shards: int = option(9, "how many FineWeb shards of 100M tokens to use")
    cache_dir: str = option(str(ROOT / ".cache"), "prepared data and compiled code")
    long_docs: str = option("split", "what happens to a document beyond max_doc_len: split or drop")
    shuffle: bool = option(True, "documents in random order already in the first epoch")
    val_tokens: int = option(0, "validate on this many tokens from the start of the validation split; 0 is all")
    n_layer: int = option(4, "transformer blocks", "model")
    n_embd: int = option(256, "width")
    n_head: int = option(4, "attention heads")
    mlp_ratio: int = option(4, "hidden width of the MLP over n_embd")
    value_embed_layers: tuple[int, ...] = option((0, 3), "layers whose values get a second token embedding")
    n_gram: int = option(1, "every n-gram up to this length has an embedding, hashed; 1 is tokens only")
    ngram_rows: int = option(16384, "rows of the table for each of these lengths")
    softcap: tuple[float, ...] = option((), "a, b and c: logits become a * sigmoid((z + b) / c); empty leaves them")
    rope_base: float = option(1024.0, "longest rotary wavelength over 2 pi, in tokens")
    steps: int = option(500, "optimizer steps", "batch, context and schedule")
    row_len: int = option(256, "tokens in a packed row; attention never leaves a row")
    val_row_len: int = option(1024, "the same for validation")
    batch_tokens: tuple[int, ...] = option((8192,), "tokens per step, by stage")
    max_doc_len: tuple[int, ...] = option((256,), "documents are cut at this many tokens, by stage")
    short_window: tuple[int, ...] = option((256,), "tokens a query sees behind it in most layers, by stage")
    long_window: tuple[int, ...] = option((256,), "the same in every fourth layer and the last, by stage")
    val_windows: tuple[int, ...] = option((), "short and long window in validation; empty means the last stage's")
    stage_lr: tuple[float, ...] = option((1.0,), "learning rate multiplier, by stage")
    cooldown: float = option(0.6, "fraction of training over which the learning rate falls linearly")
    lr_floor: float = option(0.15, "where it falls to, as a fraction")
    muon_lr: float = option(0.03, "Muon, on the matrices of the blocks", "optimizer")
    adam_lr: float = option(0.008, "Adam, on the head; embeddings and scalars have multiples of it")
    weight_decay: float = option(0.0, "decoupled, on the matrices")
    eval_every: int = option(125, "steps between validations; there is always one at the end", "run")
    micro_tokens: int = option(0, "tokens per forward pass; 0 fits them to the memory found")
    seed: int = option(0, "of the weights and the order of the data")
    repeat: int = option(1, "runs from this many successive seeds, one after the other in one process")
    dtype: str = option("auto", "of weights and activations: bfloat16, float32 or auto")
    kernels: tuple[str, ...] = option(("auto",), "auto, reference (PyTorch only), all, or names of ops to run by Triton")
    compile: bool = option(True, "torch.compile; off, a run starts at once and is slower")
    gpus: int = option(0, "how many GPUs; 0 is all there are")
    run_dir: str = option("", "where log, metrics and weights go; empty is runs/<utc>-<track>")
    sample_tokens: int = option(120, "length of the text sample at the end")

    def __post_init__(self):
        def need(ok, field, expected):
            if not ok:
                raise InputError(f"--{field.replace('_', '-')} {getattr(self, field)}: expected {expected}")
        need(self.target_metric in ("val_loss", "val_bpb"), "target_metric", "val_loss or val_bpb")
        need(self.long_docs in ("split", "drop"), "long_docs", "split or drop")
        need(self.dtype in ("auto", "bfloat16", "float32"), "dtype", "auto, bfloat16 or float32")
        need(self.n_embd >= 12, "n_embd", "12 or more")
        for f in ("n_layer", "n_embd", "n_head", "mlp_ratio", "steps", "row_len", "val_row_len", "eval_every", "repeat",
                  "n_gram", "ngram_rows"):
            need(getattr(self, f) > 0, f, "a positive number")
        for f in ("micro_tokens", "val_tokens", "gpus", "sample_tokens", "seed"):
            need(getattr(self, f) >= 0, f, "zero or more")
        for f in ("batch_tokens", "max_doc_len", "short_window", "long_window", "stage_lr"):
            need(getattr(self, f) and min(getattr(self, f)) > 0, f, "one positive number per stage")
        need(self.n_embd % self.n_head == 0 and self.n_embd // self.n_head % 4 == 0, "n_embd",
             f"a multiple of 4 * n_head ({4 * self.n_head})")
        need(all(b % self.row_len == 0 for b in self.batch_tokens), "batch_tokens",
             f"multiples of row_len ({self.row_len})")
        need(self.micro_tokens % self.row_len == 0, "micro_tokens", f"a multiple of row_len ({self.row_len})")
        need(all(0 <= i < self.n_layer for i in self.value_embed_layers), "value_embed_layers",
             f"layers from 0 to {self.n_layer - 1}")
        need(len(self.softcap) in (0, 3) and self.softcap[-1:] != (0,), "softcap", "three numbers, or none")
        need(self.rope_base > 0, "rope_base", "a positive number")
        for f in ("muon_lr", "adam_lr", "weight_decay"):
            need(0 <= getattr(self, f) < math.inf, f, "zero or more")
        need(len(self.val_windows) in (0, 2) and min(self.val_windows, default=1) > 0, "val_windows",
             "a short and a long window, or none")
        for f in ("cooldown", "lr_floor"):
            need(0 <= getattr(self, f) <= 1, f, "a fraction")
        need(self.data in ("stdlib", "fineweb10B", "text"), "data", "stdlib, fineweb10B or text")
        need(self.data != "text" or self.text, "text", f"the path of a file or folder: track {self.track} needs a text")


def track_names():
    return sorted(p.stem.replace("_", "-") for p in (ROOT / "tracks").glob("[a-z]*.py"))


def load_track(name, target=None):
    """A track's fields. Easier targets than the track's own may come with a smaller model (EASIER in its file)."""
    if name not in track_names():
        raise InputError(f"unknown track {name!r}: expected one of {', '.join(track_names())}")
    module = importlib.import_module(f"tracks.{name.replace('-', '_')}")
    fields = dict(module.TRACK, track=name)
    rungs = [goal for goal in getattr(module, "EASIER", {}) if target is not None and goal <= target]
    return fields | (module.EASIER[max(rungs)] if rungs else {})


class Parser(argparse.ArgumentParser):
    """One line for an error, with the nearest valid name."""

    def error(self, message):
        if message.startswith("unrecognized arguments: "):
            given = message.split(": ", 1)[1].split()[0]
            valid = sorted(s for a in self._actions for s in a.option_strings if s.startswith("--"))
            near = difflib.get_close_matches(given, valid, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            message = f"unknown option {given}: {hint}valid are {' '.join(valid)}"
        raise InputError(message)


def parse_args(argv):
    """Command line -> Config: defaults, then the track's fields, then the options given."""
    parser = Parser(
        prog="run.sh", formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
        usage="""./run.sh [--OPTION VALUE ...]          train this machine's track
       ./run.sh --track laptop --steps 50     a track by name, a field changed
       ./run.sh --text FILE_OR_FOLDER         on your own text
       ./run.sh test [PYTEST ARGUMENTS]       the tests""",
        description="Train a GPT to a target loss against the clock, on this machine. Without options: track "
                    "gpt2-small where there is a CUDA GPU, else laptop. Progress goes to stderr, the result is one "
                    "line of JSON on stdout. Exit status: 0 target reached, 3 out of steps before it, 2 bad input.",
        epilog=f"Tracks: {', '.join(track_names())}. What is in brackets is the laptop track's value. Lists have an "
               "entry for each of the equally long stages of training, or one for all.", allow_abbrev=False)
    shown, group = load_track("laptop"), None
    for f in dataclasses.fields(Config):
        group = parser.add_argument_group(f.metadata["group"]) if f.metadata["group"] else group
        kind = typing.get_args(f.type)[0] if typing.get_args(f.type) else f.type
        name, default = "--" + f.name.replace("_", "-"), shown.get(f.name, f.default)
        default = " ".join(map(str, default)) if isinstance(default, tuple) else default
        kwargs = dict(dest=f.name, default=None, help=f"{f.metadata['help']} [{default}]".replace("%", "%%"))
        if f.type is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, **kwargs)
        elif typing.get_origin(f.type) is tuple:
            group.add_argument(name, type=kind, nargs="*", metavar=kind.__name__.upper(), **kwargs)
        else:
            group.add_argument(name, type=kind, metavar=kind.__name__.upper(), **kwargs)
    given = {name: tuple(value) if isinstance(value, list) else value
             for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    big = torch.cuda.is_available() and "text" not in given
    fields = load_track(given.pop("track", None) or ("gpt2-small" if big else "laptop"), given.get("target"))
    if "text" in given and fields["data"] != "text":  # on a track with its own data: keep every token, for its own sake
        fields |= dict(data="text", target=None, tokenizer=Config.tokenizer, long_docs="split", shuffle=True)
    return Config(**(fields | given))


# ---------------------------------------------------------------------------------------------------------------------
# Model
# Shapes: B rows, T tokens in a row, C width, H heads, D head width, V vocabulary


class GPT(nn.Module):
    """A decoder-only transformer with the record's main parts.

    The matrices of all layers with the same shape are one parameter (a bank), so that the optimizer
    orthogonalises them in one batch and ranks share them out evenly.
    """

    def __init__(self, c, n_vocab, dtype=torch.float32, ops=None):
        super().__init__()
        self.c, self.n_vocab, self.ops = c, n_vocab, ops or choose_ops("cpu")
        L, C, H, V = c.n_layer, c.n_embd, c.n_head, -(-n_vocab // 64) * 64  # padded: GPUs like multiples of 64
        n_ve = len(c.value_embed_layers)
        self.embed = nn.Parameter(torch.empty(V, C, dtype=dtype))
        self.lm_head = nn.Parameter(torch.empty(V, C, dtype=dtype))
        self.value_embeds = nn.Parameter(torch.empty(n_ve, V, C, dtype=dtype))
        self.ngram_embeds = nn.Parameter(torch.empty(c.n_gram - 1, c.ngram_rows, C, dtype=dtype))
        self.attn_bank = nn.Parameter(torch.empty(L * 4, C, C, dtype=dtype))  # Q, K, V, O of layer 0, of layer 1, ...
        self.mlp_bank = nn.Parameter(torch.empty(L * 2, c.mlp_ratio * C, C, dtype=dtype))  # up, down transposed, ...
        self.value_gates = nn.Parameter(torch.empty(n_ve, H, 12))
        self.lambdas = nn.Parameter(torch.empty(L, 2))  # per layer: weight of the residual stream, of the embedding

        D, T = C // H, max(c.row_len, c.val_row_len)
        freqs = c.rope_base ** -torch.linspace(0, 1, D // 4)  # half of the head's dimensions rotate, half stand still
        angles = torch.arange(T)[:, None] * torch.cat([freqs, torch.zeros(D // 4)])  # (T, D / 2)
        self.register_buffer("cos", angles.cos()[:, None].to(dtype), persistent=False)  # (T, 1, D / 2)
        self.register_buffer("sin", angles.sin()[:, None].to(dtype), persistent=False)

    @torch.no_grad()
    def init_weights(self, seed):
        """Outputs of all blocks start at zero, so that the model starts as embedding -> head."""
        g = torch.Generator().manual_seed(seed)  # on the CPU, so that every device starts from the same weights
        L, C = self.c.n_layer, self.c.n_embd
        std = 0.5 * C**-0.5

        def draw(shape, std):
            return torch.randn(shape, generator=g) * std

        self.embed.copy_(draw(self.embed.shape, 1.0))
        self.ngram_embeds.zero_()
        self.lm_head.copy_(draw(self.lm_head.shape, 0.005))
        self.value_embeds.copy_(draw(self.value_embeds.shape, 0.01))
        attn = draw((L, 4, C, C), std)
        attn[:, 3] = 0
        mlp = draw((L, 2, *self.mlp_bank.shape[1:]), std)
        mlp[:, 1] = 0
        self.attn_bank.copy_(attn.flatten(0, 1))
        self.mlp_bank.copy_(mlp.flatten(0, 1))
        self.value_gates.zero_()
        self.lambdas.copy_(torch.tensor([1.0, 0.0]).expand(L, 2))

    def embed_ngrams(self, inputs, cu_seqlens):
        """Sum of the embeddings of the 2-gram, 3-gram, ... that end at each token, within its document: (B, T, C)."""
        starts = torch.zeros(inputs.numel() + 1, dtype=torch.bool, device=inputs.device)
        starts = starts.index_fill(0, cu_seqlens.long(), True)[:-1].view(inputs.shape)
        key = before = inputs
        total = 0
        for table in self.ngram_embeds.unbind(0):
            before = F.pad(before[:, :-1], (1, 0)).masked_fill(starts, 0)
            key = key * (self.n_vocab | 1) + before  # odd, so that rows of a power of two still depend on all tokens
            total = total + F.embedding(key % len(table), table)
        return total

    def hidden(self, inputs, cu_seqlens, max_seqlen, windows):
        """inputs: (B, T) int64; windows: one int per layer -> (B, T, C) ready for the head."""
        c, ops = self.c, self.ops
        B, T = inputs.shape
        H, D = c.n_head, c.n_embd // c.n_head
        attn = self.attn_bank.view(c.n_layer, 4 * c.n_embd, c.n_embd).unbind(0)
        mlp = self.mlp_bank.unbind(0)
        value_embeds = dict(zip(c.value_embed_layers, zip(self.value_embeds.unbind(0), self.value_gates.unbind(0))))
        x = x0 = ops.rms_norm(F.embedding(inputs, self.embed) + self.embed_ngrams(inputs, cu_seqlens))
        for i in range(c.n_layer):
            x = self.lambdas[i, 0] * x + self.lambdas[i, 1] * x0

            h = ops.rms_norm(x)
            w_qkv, w_o = attn[i].split([3 * c.n_embd, c.n_embd])
            q, k, v = ops.qkv_norm_rope(F.linear(h, w_qkv).view(B, T, 3 * H, D), self.cos, self.sin)  # (B, T, H, D)
            if i in value_embeds:
                table, w_gate = value_embeds[i]
                gate = 2 * torch.sigmoid(F.linear(h[..., :12], w_gate.to(h.dtype)))  # (B, T, H)
                v = v + gate[..., None] * F.embedding(inputs, table).view(B, T, H, D)
            # with normalised q and k, 1.36 / sqrt(D) is the record's 0.12 at D = 128
            y = ops.attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, window=windows[i],
                              scale=1.36 * D**-0.5)
            h, x = ops.add_rms_norm(x, F.linear(y.reshape(B, T, c.n_embd), w_o))
            x = x + ops.relu2_mlp(h, *mlp[2 * i:2 * i + 2])
        return ops.rms_norm(x)

    def forward(self, inputs, targets, cu_seqlens, max_seqlen, windows, chunk=None):
        """Summed cross-entropy (fp32 scalar) over the targets that are not padding.

        chunk: tokens whose logits exist at one time; None is all of them (training needs their gradient anyway).
        """
        x = self.hidden(inputs, cu_seqlens, max_seqlen, windows).flatten(0, 1)  # (B T, C)
        targets = targets.flatten()
        cap = self.c.softcap or None
        return sum(self.ops.linear_cross_entropy(h, self.lm_head, t, cap=cap)
                   for h, t in zip(x.split(chunk or len(x)), targets.split(chunk or len(x))))

    def flops_per_token(self, windows, max_doc_len):
        """Training FLOPs per token: 6 per matrix weight, and attention over half of what the window lets it see."""
        matrices = self.attn_bank.numel() + self.mlp_bank.numel() + self.lm_head.numel()
        return 6 * matrices + sum(12 * self.c.n_embd * min(w, max_doc_len) / 2 for w in windows)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: plain functions of progress, the fraction of steps behind us


def by_stage(values, progress):
    """The entry for this progress, stages being equally long."""
    return values[min(int(progress * len(values)), len(values) - 1)]


def lr_scale(c, progress):
    """Flat at the stage's multiplier, then linearly down to lr_floor over the last `cooldown` of training."""
    t = max(0.0, (progress - (1 - c.cooldown)) / c.cooldown) if c.cooldown else 0.0
    return by_stage(c.stage_lr, progress) * (1 - t) + c.lr_floor * t


def muon_momentum(progress):
    """0.85 -> 0.95 over the first fifth, back to 0.85 in the last 4%: fresh gradients count more at both ends."""
    return 0.85 + 0.10 * min(1.0, progress / 0.2, (1 - progress) / 0.04)


def layer_windows(c, short, long):
    """Every fourth layer and the last one see far."""
    return tuple(long if i % 4 == 3 or i == c.n_layer - 1 else short for i in range(c.n_layer))


class Stage(typing.NamedTuple):
    """What the compiled graph depends on."""
    windows: tuple
    max_doc_len: int
    rows: int  # global batch


def stage_at(c, progress):
    windows = layer_windows(c, by_stage(c.short_window, progress), by_stage(c.long_window, progress))
    max_doc_len = min(by_stage(c.max_doc_len, progress), c.row_len)
    return Stage(windows, max_doc_len, by_stage(c.batch_tokens, progress) // c.row_len)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one parameter is updated. lr: peak learning rate; sharded: each rank updates its part only."""
    optim: str  # "muon" or "adam"
    lr: float
    betas: tuple = (0.0, 0.0)
    eps: float = 1e-10
    weight_decay: float = 0.0  # Muon's only
    sharded: bool = True

    def __post_init__(self):
        assert self.optim in ("adam", "muon") and not (self.optim == "adam" and self.weight_decay)


def parameter_table(c):
    """Every parameter of GPT, declared once, in the order in which gradients are reduced and updated:
    small ones first, the long Muon updates last, so that they hide the others' gathers."""
    lr = c.adam_lr
    return {
        # every block's input is normalised, so while the blocks' outputs are zero these have rounding errors for
        # gradients: the larger eps keeps Adam from blowing those up to full steps
        "lambdas": Rule("adam", lr * 5, (0.9, 0.99), eps=1e-6, sharded=False),
        "value_gates": Rule("adam", lr, (0.9, 0.99), sharded=False),
        "value_embeds": Rule("adam", lr * 75, (0.75, 0.95)),
        "embed": Rule("adam", lr * 75, (0.75, 0.95)),
        "ngram_embeds": Rule("adam", lr * 75, (0.75, 0.95)),
        "lm_head": Rule("adam", lr, (0.75, 0.95)),
        "attn_bank": Rule("muon", c.muon_lr, weight_decay=c.weight_decay),
        "mlp_bank": Rule("muon", c.muon_lr, weight_decay=c.weight_decay),
    }


# PyTorch 2.13 renamed these
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Optimizer:
    """Muon and Adam by the table, shared out over ranks.

    Each gradient is reduce-scattered, its owner updates its part, the weights are all-gathered; all three overlap
    between parameters. Parts are rows of the flattened parameter (Adam) or whole matrices (Muon); a world size that
    does not divide them gets padding. For bf16 weights the owner keeps what makes them exact fp32 masters.
    """

    def __init__(self, model, table, rank=0, world_size=1, compile=False, polar_express=polar_express):
        self.params = dict(model.named_parameters())
        assert table.keys() == self.params.keys(), "the table must name every parameter"
        self.table = {name: rule for name, rule in table.items() if self.params[name].numel()}
        self.rank, self.world_size = rank, world_size
        # 0-d tensors, so that a new value compiles nothing
        self.scalar = (lambda x: torch.tensor(x, dtype=torch.float32)) if compile else float
        # on flat tensors, so that one compiled kernel serves every parameter; on a GPU one for each size, since
        # Inductor vectorises loads where it knows the size
        dynamic = not next(model.parameters()).is_cuda
        self.adam, *momentum_and_step = (torch.compile(f, fullgraph=True, dynamic=dynamic) if compile else f
                                         for f in (adam_update, nesterov, descend))
        self.muon = functools.partial(muon_update, **dict(zip(("nesterov", "descend"), momentum_and_step)),
                                      orthogonalise=polar_express)
        self.reset()

    def units(self, name, x):
        """View of a parameter-shaped tensor with what ranks divide on dim 0."""
        return x if self.table[name].optim == "muon" else x.view(-1)

    @torch.no_grad()
    def reset(self):
        """Moments at zero, nothing below the weights' last bit."""
        self.state, self.step_count = {}, 0
        for name, rule in self.table.items():
            whole = self.units(name, self.params[name].data)
            n = -(-len(whole) // self.world_size) if rule.sharded else len(whole)
            start = min(self.rank * n, len(whole)) if rule.sharded else 0
            own = whole[start:start + n]  # may be shorter than n, or empty, on the last ranks
            state = dict(whole=whole, n=n, own=own, companion=new_companion(own),
                         m=torch.zeros_like(own, dtype=torch.float32))
            if rule.optim == "adam":
                state["v"] = torch.zeros_like(state["m"])
            self.state[name] = state

    @torch.no_grad()
    def step(self, lr_scale, momentum):
        """One update from .grad (summed over micro-batches; summed over ranks here). Clears .grad."""
        self.step_count += 1
        reduced = {name: self._reduce(name) for name in self.table}
        gathers = []
        for name, rule in self.table.items():
            work, grad = reduced[name]
            if work is not None:
                work.wait()
            s = self.state[name]
            if len(s["own"]):
                scalar, lr = self.scalar, rule.lr * lr_scale
                # .data: compiled code would look at what a view is a view of
                tensors = s["own"].data, s["companion"], grad[:len(s["own"])].data, s["m"]
                if rule.optim == "adam":
                    corrections = (1 - beta**self.step_count for beta in rule.betas)
                    self.adam(*tensors, s["v"], *map(scalar, (lr, *rule.betas, rule.eps, *corrections)))
                else:
                    self.muon(*tensors, *map(scalar, (lr, lr * rule.weight_decay, momentum)))
            gathers.append(self._gather(name))
            self.params[name].grad = None
        for work, finish in filter(None, gathers):
            work.wait()
            finish()

    def _reduce(self, name):
        """Start summing the gradient over ranks; returns (work, this rank's part)."""
        grad, s = self.units(name, self.params[name].grad), self.state[name]
        if self.world_size == 1:
            return None, grad
        if not self.table[name].sharded:
            return dist.all_reduce(grad, async_op=True), grad
        padded = s["n"] * self.world_size
        if len(grad) != padded:
            grad = torch.cat([grad, grad.new_zeros(padded - len(grad), *grad.shape[1:])])
        part = torch.empty_like(grad[:s["n"]])
        return reduce_scatter(part, grad, async_op=True), part

    def _gather(self, name):
        """Start collecting the updated parts; returns (work, what to do when it is done)."""
        s = self.state[name]
        if self.world_size == 1 or not self.table[name].sharded:
            return None
        own = s["own"].clone()
        if len(own) != s["n"]:
            own = torch.cat([own, own.new_zeros(s["n"] - len(own), *own.shape[1:])])
        padded = s["n"] * self.world_size
        out = s["whole"] if len(s["whole"]) == padded else own.new_empty(padded, *own.shape[1:])
        finish = (lambda: None) if out is s["whole"] else lambda: s["whole"].copy_(out[:len(s["whole"])])
        return all_gather(out, own, async_op=True), finish


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and sampling


VAL_LOGITS = 8192 * 50304  # at one time: 0.8 GB in bf16, where a row of 65,536 tokens would have 6.6 GB


@torch.no_grad()
def evaluate(c, forward, n_logits, micro_batches, world):
    """Summed loss in nats over the micro-batches of all ranks. n_logits: per token, with padding."""
    windows = layer_windows(c, *(c.val_windows or (c.short_window[-1], c.long_window[-1])))
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    chunk = VAL_LOGITS // n_logits
    for micro in micro_batches:
        inputs, targets, cu_seqlens = (t.to(world.device, non_blocking=True) for t in micro)
        total += forward(inputs, targets, cu_seqlens, c.val_row_len, windows, chunk)
    if world.size > 1:
        dist.all_reduce(total)
    return total.item()


@torch.no_grad()
def generate(model, tokens, n, seed=0, temperature=0.8, top_k=50):
    """Continue a list of token ids by n, recomputing the context each time. Returns all ids."""
    c, g = model.c, torch.Generator().manual_seed(seed)
    windows = layer_windows(c, c.short_window[-1], c.long_window[-1])
    for _ in range(n):
        context = torch.tensor([tokens[-c.row_len:]], device=model.embed.device)
        cu_seqlens = torch.tensor([0, context.size(1)], dtype=torch.int32, device=context.device)
        h = model.hidden(context, cu_seqlens, context.size(1), windows)[0, -1]
        logits = F.linear(h, model.lm_head[:model.n_vocab]).float().cpu()
        if c.softcap:
            a, b, s = c.softcap
            logits = a * torch.sigmoid((logits + b) / s)
        top = logits.topk(min(top_k, len(logits)))
        choice = torch.multinomial((top.values / temperature).softmax(-1), 1, generator=g)
        tokens = tokens + [top.indices[choice].item()]
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# The run


class Clock:
    """Training time in seconds: runs between start() and stop(), waiting for the device at both."""

    def __init__(self, device):
        self.device, self.total, self.since = device, 0.0, None

    def start(self):
        synchronize(self.device)
        self.since = time.perf_counter()

    def stop(self):
        synchronize(self.device)
        self.total, self.since = self.now(), None

    def now(self):
        """Without waiting: on a GPU the host runs ahead of it."""
        return self.total + (time.perf_counter() - self.since if self.since else 0.0)


class LossPipe:
    """Brings each step's loss to the host without making it wait: a loss comes out once its copy has arrived."""

    def __init__(self, device):
        self.cuda, self.waiting = device.type == "cuda", []

    def put(self, step, loss):
        host = torch.empty((), dtype=torch.float32, pin_memory=self.cuda)
        host.copy_(loss, non_blocking=True)
        event = torch.cuda.Event() if self.cuda else None
        if event:
            event.record()
        self.waiting.append((step, host, event))

    def ready(self):
        while self.waiting and (self.waiting[0][2] is None or self.waiting[0][2].query()):
            step, host, _ = self.waiting.pop(0)
            yield step, host.item()


def native_dtype(device):
    """bfloat16 where the hardware multiplies it, Ampere and later, a CPU with AVX512-BF16 or AMX; else float32."""
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        flags = Path("/proc/cpuinfo")
        native = flags.exists() and any(f in flags.read_text() for f in ("avx512_bf16", "amx_bf16", " bf16"))
    return torch.bfloat16 if native else torch.float32


def keep_freed_memory():
    """Have glibc reuse large blocks. It returns them to the system when freed, and on CPUs a step then spends a
    quarter of its time on page faults: laptop 13,700 -> 17,700 tokens/s on 2 cores."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-2, 2**26)  # M_TOP_PAD


class World(typing.NamedTuple):
    """Which process this is, of how many, on what device."""
    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")


class Data(typing.NamedTuple):
    dataset: Dataset
    train: TrainLoader
    val: ValLoader
    val_bytes: int | None  # text the validation targets stand for; None if the vocabulary is out of reach


def load_data(c, stages, world):
    """Prepare the corpus (the first rank does the work) and open its loaders."""
    dataset = first_rank_first(world, lambda: open_dataset(
        Path(c.text) if c.data == "text" else c.data, c.tokenizer, Path(c.cache_dir) / "data", c.train_shards))
    known = dict(eot=dataset.eot, n_vocab=dataset.n_vocab)
    train = TrainLoader(dataset.train, **known, row_len=c.row_len, batch_rows=lambda step: stages[step].rows,
                        max_doc_len=lambda step: stages[step].max_doc_len, long_docs=c.long_docs,
                        shuffle=c.shuffle, seed=c.seed)
    there = sum(len(read_shard(p)) for p in dataset.val) - 1
    n_tokens = c.val_tokens if c.data == "fineweb10B" else min(c.val_tokens, there)  # FineWeb's number is the task
    val = ValLoader(dataset.val, **known, row_len=c.val_row_len, n_tokens=n_tokens or None)
    try:
        val_bytes = int(dataset.tokenizer.token_bytes[val.targets].sum())
    except InputError:  # GPT-2's vocabulary comes over the network; only bits per byte and the sample need it
        if c.target_metric == "val_bpb":
            raise
        val_bytes = None
    return Data(dataset, train, val, val_bytes)


def most_micro_rows(c, model, world):
    """How many rows fit into one forward and backward pass, on the rank with the least free memory."""
    if c.micro_tokens:
        return c.micro_tokens // c.row_len
    if world.device.type != "cuda":
        return max(1, 16384 // c.row_len)
    # Saved for backward: about 16 widths a layer, 4 a value embedding. Logits: in one buffer with their gradient where
    # a kernel writes it there, else also the gradient and fp32 in passing.
    # Gradients of the weights come on top; moments and masters are there already.
    size = model.embed.element_size()
    per_logit = size if model.ops.named()["linear_cross_entropy"] == "triton" else 2 * size + 4
    per_token = size * c.n_embd * (16 * c.n_layer + 4 * len(c.value_embed_layers)) + per_logit * len(model.embed)
    free = 0.85 * torch.cuda.mem_get_info(world.device)[0] - sum(p.numel() * size for p in model.parameters())
    rows = torch.tensor(max(1, int(free / (per_token * c.row_len))), device=world.device)
    if world.size > 1:  # ranks that disagreed would train on some rows twice and on others never
        dist.all_reduce(rows, op=dist.ReduceOp.MIN)
    return rows.item()


def equal_passes(rows, most):
    """Rows per pass such that `rows` take as few passes as `most` allows, equally large."""
    return -(-rows // -(-rows // most))


class Trainer:
    """One configuration on one machine: model, optimizer, data and the compiled step, for runs from several seeds."""

    def __init__(self, c, world, data, stages, log):
        self.c, self.world, self.data, self.stages = c, world, data, stages
        device = world.device
        dtype = native_dtype(device) if c.dtype == "auto" else getattr(torch, c.dtype)
        try:
            ops = choose_ops(device, dtype, c.n_embd // c.n_head, c.kernels, log.say)
        except ValueError as e:
            raise InputError(e) from None
        self.compiled = c.compile and can_compile(log)
        with device:
            self.model = GPT(c, self.data.dataset.n_vocab, dtype, ops)
        self.optimizer = Optimizer(self.model, parameter_table(c), world.rank, world.size, self.compiled, ops.polar_express)
        self.forward = torch.compile(self.model, fullgraph=True, dynamic=False) if self.compiled else self.model
        most = most_micro_rows(c, self.model, world)
        self.micro_rows = {s: equal_passes(-(-s.rows // world.size), most) for s in set(self.stages)}
        val_rows = max(1, min(self.micro_rows[self.stages[-1]] * c.row_len, 16384) // c.val_row_len)
        self.val_batches = list(self.data.val.micro_batches(world.rank, world.size, val_rows))
        self.params = sum(p.numel() for p in self.model.parameters())
        self.flops_per_token = {s: self.model.flops_per_token(s.windows, s.max_doc_len) for s in set(self.stages)}
        self.environment = describe_environment(device) | dict(
            dtype=str(dtype)[6:], kernels=ops.named(), world_size=world.size, probe=machine_probe(device))
        self.peak = self.environment["probe"]["matmul"][str(dtype)[6:]] * world.size  # "share of peak" is a share of it

    def describe(self, log):
        """What is about to run: all of it into the log, the gist on the screen."""
        c, data, environment = self.c, self.data, self.environment
        sources = [Path(__file__), *ROOT.glob(f"tracks/{c.track.replace('-', '_')}.py"), *ROOT.glob("kernels/*.py")]
        log.header("\n".join(p.read_text() for p in sorted(sources)), environment=environment,
                   config=dataclasses.asdict(c), data=data.dataset.fingerprint)
        triton = [name for name, how in environment["kernels"].items() if how == "triton"]
        log.say(f"{c.track}: {self.params / 1e6:.1f}M parameters, {environment['dtype']}, attention "
                f"{environment['kernels']['attention']}, Triton for {', '.join(triton) or 'nothing'}, "
                f"{self.world.size} x {environment['device']}, {self.peak / 1e12:.2f} TFLOP/s in matrix products")
        goal = f"until {c.target_metric} is {c.target} or less" if c.target is not None else "to the last step"
        log.say(f"training on {data.dataset.name} {goal}, at most {c.steps} steps, seed {c.seed}; log in {log.folder}")
        if data.val_bytes is None:
            log.say("no bits per byte and no sample: the tokenizer's vocabulary could not be downloaded")

    def warm_up(self, log):
        """Compile everything on batches of padding, whose loss and gradients are zero, outside the clock."""
        torch._dynamo.config.recompile_limit = len(self.micro_rows) + 8  # a graph for each stage, one for validation
        for p in self.model.parameters():
            p.data.zero_()  # not what the memory happens to hold
        log.say("compiling ... (a minute or so the first time, seconds from then on)")
        for stage, rows in sorted(self.micro_rows.items()):
            padding = pack([None] * rows, self.c.row_len, self.data.train.max_docs, stage.max_doc_len)
            self.accumulate([[t.to(self.world.device) for t in padding]], stage)
        self.optimizer.step(0.0, 0.0)  # at learning rate 0
        evaluate(self.c, self.forward, len(self.model.lm_head), self.val_batches[:1], self.world)

    def accumulate(self, batch, stage):
        """Forward and backward over this rank's micro-batches; returns the global mean loss, 0-d, on the device."""
        total = torch.zeros((), device=self.world.device)
        n_tokens = stage.rows * self.c.row_len
        for inputs, targets, cu_seqlens in batch:
            loss = self.forward(inputs, targets, cu_seqlens, stage.max_doc_len, stage.windows) / n_tokens
            loss.backward()
            total += loss.detach()
        if self.world.size > 1:
            dist.all_reduce(total)
        return total

    def validate(self, step):
        """Validation metrics by name; val_bpb is None where the tokenizer's bytes are unknown."""
        nats = evaluate(self.c, self.forward, len(self.model.lm_head), self.val_batches, self.world)
        if not math.isfinite(nats):
            raise InputError(f"step {step}: the validation loss is {nats}, so the run stopped there")
        data = self.data
        return dict(val_loss=nats / data.val.n_targets,
                    val_bpb=nats / math.log(2) / data.val_bytes if data.val_bytes else None)

    def batches(self):
        """This rank's micro-batches, for each step."""
        for step, stage in enumerate(self.stages):
            yield list(self.data.train.micro_batches(step, self.world.rank, self.world.size, self.micro_rows[stage]))

    def run(self, log, started):
        """Train from c.seed to the target or the last step; returns the result as a dict. started: perf_counter()
        when this run began."""
        c, world, stages = self.c, self.world, self.stages
        self.data.train.reseed(c.seed)
        self.model.init_weights(c.seed)
        self.optimizer.reset()
        clock, losses = Clock(world.device), LossPipe(world.device)
        tokens, flops, metrics, reached = 0, 0.0, {}, False

        def receive():
            """Losses that have arrived: check, log, show."""
            for step, loss in losses.ready():
                if not math.isfinite(loss):
                    raise InputError(f"step {step}: the training loss is {loss}, so the run stopped there: "
                                     "lower --muon-lr and --adam-lr, or try --dtype float32")
                elapsed = clock.now()
                log.step(step, c.steps, "train", loss, elapsed)
                left = datetime.timedelta(seconds=int(elapsed / step * (c.steps - step)))  # validations not counted
                log.progress(step, f"loss {loss:.3f}  {tokens / elapsed:,.0f} tok/s  "
                                   f"{flops / elapsed / self.peak:.0%} of peak  {left} left at most")

        cold_start = time.perf_counter() - started
        with contextlib.closing(Prefetcher(self.batches(), world.device)) as prefetcher:
            clock.start()
            for step, batch in enumerate(prefetcher, start=1):
                stage, progress = stages[step - 1], (step - 1) / c.steps
                tokens += stage.rows * c.row_len
                flops += stage.rows * c.row_len * self.flops_per_token[stage]
                losses.put(step, self.accumulate(batch, stage))
                receive()
                self.optimizer.step(lr_scale(c, progress), muon_momentum(progress))
                if step == c.steps or step % c.eval_every == 0:
                    clock.stop()
                    metrics = self.validate(step)
                    log.step(step, c.steps, "val", metrics["val_loss"], clock.total, val_bpb=metrics["val_bpb"])
                    receive()
                    reached = c.target is not None and metrics[c.target_metric] <= c.target
                    if reached:
                        break
                    clock.start()

        return dict(track=c.track, target_metric=c.target_metric, target=c.target,
                    reached=reached if c.target is not None else None, **metrics,
                    train_time_s=round(clock.total, 3), cold_start_s=round(cold_start, 2), steps=step, tokens=tokens,
                    tokens_per_s=round(tokens / clock.total), peak_share=round(flops / clock.total / self.peak, 3),
                    params=self.params, device=self.environment["device"], world_size=world.size, seed=c.seed,
                    data=self.data.dataset.name, data_fingerprint=self.data.dataset.fingerprint,
                    run_dir=str(log.folder))

    def save(self, result, log):
        """The result and the weights, and a sample of text on the screen."""
        c, data = self.c, self.data.dataset
        log.finish(result, {name: p.detach().cpu() for name, p in self.model.named_parameters()})
        if self.data.val_bytes and c.sample_tokens:
            sample = data.tokenizer.decode(generate(self.model, [data.eot], c.sample_tokens, c.seed))
            log.say(f"--- a sample\n{sample}\n---")


def train(c, world=World(), report=lambda result: None):
    """Train as configured, c.repeat times from successive seeds. report(result) is called after each run; returns the
    last result (the JSON line) as a dict. Raises InputError for what a user can mend."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(c.cache_dir) / "inductor"))
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
    run_dir = Path(c.run_dir or ROOT / "runs" / f"{stamp}-{c.track or 'run'}")
    if run_dir.is_dir() and next(run_dir.rglob("log.txt"), None):
        raise InputError(f"--run-dir {run_dir}: holds a run already; choose another folder")
    if world.device.type == "cpu":
        keep_freed_memory()
    stages = [stage_at(c, step / c.steps) for step in range(c.steps)]
    data = load_data(c, stages, world)
    trainer, started = None, START
    for seed in range(c.seed, c.seed + c.repeat):
        c = dataclasses.replace(c, seed=seed)
        try:
            log = Log(run_dir / f"seed{seed}" if c.repeat > 1 else run_dir, c.steps, world.rank == 0)
        except OSError as e:
            raise InputError(f"--run-dir {run_dir}: {e.strerror}; choose a folder that can be written") from None
        with log:
            try:
                first = trainer is None
                trainer = trainer or Trainer(c, world, data, stages, log)
                trainer.c = c
                trainer.describe(log)
                if first and trainer.compiled:
                    trainer.warm_up(log)
                result = trainer.run(log, started)
                if world.rank == 0:
                    trainer.save(result, log)
                    report(result)
            except (InputError, torch.OutOfMemoryError) as e:
                if isinstance(e, torch.OutOfMemoryError):
                    e = InputError(f"out of memory on {world.device}: lower --micro-tokens, a multiple of {c.row_len} "
                                   f"({' '.join(str(e).split())[:120]})")
                log.say(f"error: {e}", quiet=True)
                raise e from None
            if world.size > 1:
                dist.barrier()  # nobody leaves while the first rank writes: the launcher would end the others
        started = time.perf_counter()
    return result


def can_compile(log):
    """Whether torch.compile finds what it needs; says what is missing."""
    if not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        missing = "a C++ compiler (g++)"
    elif not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing = "Python's headers (python3-dev)"
    else:
        return True
    log.say(f"running without torch.compile, which is slower: {missing} would have to be installed for it")
    return False


def first_rank_first(world, prepare):
    """Call prepare() on the first rank, then on the others, who find its work done; a failure ends all of them."""
    result, error = None, None
    for turn in (True, False):
        if (world.rank == 0) == turn:
            try:
                result = prepare()
            except InputError as e:
                error = e
        if world.size > 1:
            failed = torch.tensor(float(error is not None), device=world.device)
            dist.all_reduce(failed)
            error = error or (InputError("another rank could not prepare the data") if failed else None)
        if error:
            raise error
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The door


def launch(argv, n):
    """Start n copies of this program with torchrun; returns the exit status of the first that failed, else 0."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args as torchrun_args, run as torchrun
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the workers' own line says it all
    try:
        torchrun(torchrun_args(["--standalone", f"--nproc_per_node={n}", str(Path(__file__).resolve()), *argv]))
    except ChildFailedError as e:
        return e.get_first_failure()[1].exitcode
    except SignalException as e:
        return 128 + e.sigval
    return 0


def main(argv=None):
    """Parse, launch one process per GPU if there are several, train, print the result. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    rank, local_rank, size = (int(os.environ.get(v, d)) for v, d in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    try:
        c = parse_args(argv)
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if "RANK" not in os.environ:
            if c.gpus > found:
                raise InputError(f"--gpus {c.gpus}: this machine has {found}; leave the option out to use all")
            if (c.gpus or found) > 1:
                return launch(argv, c.gpus or found)
        device = torch.device("cuda", local_rank) if found else torch.device("cpu")
        if found:
            if local_rank >= found:
                raise InputError(f"process {local_rank} has no GPU: this machine has {found}, lower --nproc_per_node")
            torch.cuda.set_device(device)
        if size > 1:
            # the first rank may be downloading for a long time while the others wait
            dist.init_process_group("nccl" if found else "gloo", timeout=datetime.timedelta(hours=6),
                                    device_id=device if found else None)
        reached = []

        def report(result):
            print(json.dumps(result), flush=True)
            reached.append(result["reached"])
        train(c, World(rank, size, device), report)
        return 3 if False in reached else 0  # on the first rank only: the launcher ends the others when one fails
    except InputError as e:
        if rank == 0:
            print(f"error: {e}", file=sys.stderr)
        else:
            time.sleep(2)  # for the first rank to say it
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
