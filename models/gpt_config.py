"""Shape and parts of the speedrun's template: what its options are and which of them go together,
what the model's graph depends on over the course of training, and what others call its matrices.

The parts themselves are in gpt.py.
"""

import dataclasses
import math
import typing

from base.options import (
    BY_STAGE,
    COUNT,
    FRACTION,
    PAIR,
    POSITIVE,
    Options,
    by_stage,
    option,
    remembered,
    stage_number,
)

from . import mudd
from .parts import GATE_INPUTS, rope_frequencies, yarn_scale

WEIGHTS = (
    lambda ws: ws and all(0 <= w < math.inf for w in ws),
    "numbers of zero or more",
)
SAMPLED = (
    lambda ns: ns and all(n >= 0 and n % 64 == 0 for n in ns),
    "multiples of 64, or 0",
)


class Stage(typing.NamedTuple):
    """What the graph of a step depends on."""

    windows: tuple  # tokens that a query sees behind it, by layer
    max_doc_len: int  # no document is longer
    attn_scale: float
    tied: bool  # whether the head is the embedding as well
    n_targets: int  # next tokens that each one predicts
    n_sampled: int  # tokens in the softmax, 0 for all
    prefix: bool = False  # whether a target's own beginning is predicted as well
    # In validation: attention's scale and whether the head is the embedding are as the model's
    # buffers say, which enter() fills, so that one graph serves all stages
    by_buffers: bool = False
    leave_out: bool = False  # whether a text is predicted from the counts of the rest


@dataclasses.dataclass(frozen=True)
class Config(Options):
    """Shape and parts of the model. Each tuple with entries by stage divides training equally."""

    # Shape
    n_layer: int = option(4, "transformer blocks", POSITIVE, group="model")
    n_embd: int = option(256, "width", (lambda n: n >= GATE_INPUTS, f"{GATE_INPUTS} or more"))
    n_head: int = option(4, "attention heads", POSITIVE)
    mlp_ratio: int = option(4, "hidden width of the MLP over n_embd", POSITIVE)
    # Embeddings besides the tokens' own
    value_embed_layers: tuple[int, ...] = option(
        (0, 3), "layers whose values get a second token embedding"
    )
    n_gram: int = option(
        1, "every n-gram up to this length has an embedding, hashed; 1 is tokens only", POSITIVE
    )
    ngram_rows: int = option(16384, "rows of the table for each of these lengths", POSITIVE)
    ngram_signs: bool = option(False, "each n-gram flips the signs of its row in a way of its own")
    gate_by_value: bool = option(
        False, "half of what a value embedding's gate sees is that embedding"
    )
    smear: bool = option(
        False, "add a gated share of the previous token's embedding to each token's"
    )
    smear_first: bool = option(
        False, "that comes before the first norm, and its gate learns at a hundredth of the rate"
    )
    # Parts of attention and of the residual stream
    attn_gate: bool = option(False, "each head's output has a gate, a function of the token")
    attn_gate_layers: tuple[int, ...] = option((), "layers with these gates; empty means all")
    key_offset: bool = option(
        False, "half of each key is its predecessor's, in layers that see far"
    )
    paired_layers: tuple[int, ...] = option((), "layers where two heads see each other's keys")
    paired_near: bool = option(
        False, "these layers see half as far, so that a query has no more keys than elsewhere"
    )
    xsa_layers: tuple[int, ...] = option(
        (), "layers whose heads can leave out what points along the token's own value"
    )
    qkvo_scales: bool = option(
        False, "attention's matrices have learned scales, and the last one does not start at zero"
    )
    attn_input: int = option(
        -1, "a layer whose output is what attention sees in all layers behind it; -1 is none"
    )
    sublayer_lambdas: bool = option(
        False, "attention and MLP have learned weights of the stream and of what they add to it"
    )
    inject: bool = option(
        False, "n-grams join the stream behind each attention, and the first input too, by weights"
    )
    mudd: tuple[int, ...] = option(
        (),
        "two layers whose outputs the last layer and the head mix in, by a function of the token",
    )
    mudd_gates: int = option(
        -1,
        "gates and weights of all layers are functions of the token, taken from the first input "
        "and, for this layer and those behind it, from its input; -1 leaves them as they are",
    )
    skip: tuple[int, ...] = option(
        (), "two layers: the second has no attention but the first one's output"
    )
    backout: int = option(-1, "a layer whose output is taken out of the last one's; -1 is none")
    # Numbers in attention and in the head
    attn_scale: float = option(
        1.36, "of normalised queries and keys, times head width to the power of -1/2", POSITIVE
    )
    softcap: tuple[float, ...] = option(
        (), "a, b and c: logits become a * sigmoid((z + b) / c); empty leaves them"
    )
    rope_base: float = option(1024.0, "longest rotary wavelength over 2 pi, in tokens", POSITIVE)
    # How far each layer sees, over the course of training
    long_layers: tuple[int, ...] = option((), "layers that see as far as the last one does")
    short_window: tuple[int, ...] = option(
        (256,), "tokens a query sees behind it in most layers, by stage", BY_STAGE
    )
    long_window: tuple[int, ...] = option(
        (256,), "the same in long_layers and the last one, by stage", BY_STAGE
    )
    extension_windows: tuple[int, ...] = option(
        (),
        "short and long window in the extension, a stage more; empty leaves the last one's",
        PAIR,
    )
    val_windows: tuple[int, ...] = option(
        (), "short and long window in validation; empty means the last in training", PAIR
    )
    yarn: bool = option(False, "rotary frequencies and attention's scale follow the long window")
    # What they have followed, in a model that is taught; its own windows change them no more
    yarn_windows: tuple = remembered(())
    # The training loss and the head, over the course of training
    mtp: tuple[int, ...] = option(
        (1,), "next tokens each one predicts, by stage; the farthest fades out", BY_STAGE
    )
    prefix_loss: tuple[float, ...] = option(
        (0.0,),
        "weight of predicting the longest token that the next one begins with, by stage; it fades "
        "out over the last stage that has it",
        WEIGHTS,
    )
    sampled_softmax: tuple[int, ...] = option(
        (0,),
        "tokens the training loss chooses among, by stage: the targets of a forward pass, which "
        "should be fewer, and random others; 0 is all",
        SAMPLED,
    )
    copies: int = option(
        0,
        "mix in what followed the same 0, 1, ... tokens earlier in the document, for n-grams up to "
        "this length",
        COUNT,
    )
    counts: int = option(
        0,
        "mix in what followed the same 0, 1, ... tokens in the training text, for n-grams up to "
        "this length",
        COUNT,
    )
    tied: float = option(
        0.0, "fraction of training in which the head is the embedding as well", FRACTION
    )

    def __post_init__(self):
        super().__post_init__()
        # Options that are layers
        layers = range(self.n_layer)
        in_words = f"layers from 0 to {self.n_layer - 1}"
        if self.n_embd % (4 * self.n_head):
            self.refuse("n_embd", f"a multiple of 4 * n_head ({4 * self.n_head})")
        for field in "value_embed_layers", "long_layers", "paired_layers":
            if not all(i in layers for i in getattr(self, field)):
                self.refuse(field, in_words)
        if self.paired_layers and self.n_head % 2:
            self.refuse("paired_layers", f"{in_words}, and an even n_head")
        for field in "attn_gate_layers", "xsa_layers":
            if not all(i in self.attn_layers for i in getattr(self, field)):
                self.refuse(field, f"{in_words} that have attention")
        if any(i in self.paired_layers for i in self.xsa_layers):
            self.refuse("xsa_layers", f"{in_words} without pairs")
        if self.inject and not self.sublayer_lambdas:
            self.refuse("inject", "only with --sublayer-lambdas")
        if self.mudd and not self.mudd_is_valid():
            self.refuse(
                "mudd",
                "an earlier and a later layer before the last, with --inject, without --backout "
                "and with attention in the last layer, or none",
            )
        if self.mudd_gates != -1 and not (self.inject and 0 < self.mudd_gates < self.n_layer):
            self.refuse("mudd_gates", "a layer behind the first, with --inject, or -1")
        if not -1 <= self.attn_input < self.n_layer - 1:
            self.refuse("attn_input", "a layer before the last, or -1")
        if self.skip and not self.skip_is_valid():
            self.refuse(
                "skip",
                "an earlier and a later layer, the later one without pairs and value embeddings, "
                "or none",
            )
        if not -1 <= self.backout < self.n_layer - 1:
            self.refuse("backout", "a layer before the last, or -1")
        for field in "copies", "counts":
            if getattr(self, field) and any(n > 1 for n in self.mtp):
                self.refuse(field, "0 where several next tokens are predicted (--mtp)")
            if getattr(self, field) and any(self.prefix_loss):
                self.refuse(field, "0 where prefixes are predicted (--prefix-loss)")
        if self.softcap and not self.softcap_is_valid():
            self.refuse("softcap", "three numbers, or none")

    def skip_is_valid(self):
        if len(self.skip) != 2:
            return False
        source, target = self.skip
        taken = self.paired_layers + self.value_embed_layers
        return 0 <= source < target < self.n_layer and target not in taken

    def mudd_is_valid(self):
        if len(self.mudd) != 2 or not self.inject or self.backout >= 0:
            return False
        early, late = self.mudd
        return 0 <= early < late < self.n_layer - 1 and self.n_layer - 1 in self.attn_layers

    def softcap_is_valid(self):
        return (
            len(self.softcap) == 3
            and all(math.isfinite(x) for x in self.softcap)
            and self.softcap[2] != 0
        )

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def attn_layers(self):
        """Layers that have attention."""
        return [i for i in range(self.n_layer) if i not in self.skip[1:]]

    @property
    def gated_layers(self):
        """Layers whose heads' outputs have gates."""
        if not self.attn_gate:
            return []
        return [i for i in self.attn_layers if i in (self.attn_gate_layers or self.attn_layers)]

    @property
    def inject_layers(self):
        """Layers with weights for the first input and n-grams; the last one's may be MUDD's."""
        return [i for i in self.attn_layers if not self.in_mudd(i)]

    @property
    def value_gate_layers(self):
        """Layers with gates for value embeddings; the last one's may be MUDD's."""
        return [i for i in self.value_embed_layers if not self.in_mudd(i)]

    def in_mudd(self, layer):
        """Whether a layer mixes in what earlier ones said."""
        return bool(self.mudd) and layer == self.n_layer - 1

    def sees_far(self, layer):
        return layer in self.long_layers or layer == self.n_layer - 1

    def windows(self, short, long):
        """The window of each layer."""
        windows = []
        for i in range(self.n_layer):
            window = long if self.sees_far(i) else short
            if self.paired_near and i in self.paired_layers:
                window = max(1, window // 2)
            windows.append(window)
        return tuple(windows)

    def long_windows(self, progress):
        """Long windows of the stages so far, if rotary frequencies follow them."""
        if not self.yarn:
            return ()
        if self.yarn_windows:
            return self.yarn_windows
        before = self.long_window[: stage_number(self.long_window, progress) + 1]
        return before + self.extension_windows[1:] if progress == 1 else before

    @property
    def last_windows(self):
        """Short and long window at the end of training."""
        return self.extension_windows or (self.short_window[-1], self.long_window[-1])

    def stage(self, progress, max_doc_len):
        """The Stage at this progress."""
        short = by_stage(self.short_window, progress)
        long = by_stage(self.long_window, progress)
        if self.extension_windows and progress == 1:  # nowhere else, see progress_of()
            short, long = self.extension_windows
        return Stage(
            windows=self.windows(short, long),
            max_doc_len=max_doc_len,
            attn_scale=self.scale(progress),
            tied=progress < self.tied,
            n_targets=by_stage(self.mtp, progress),
            n_sampled=by_stage(self.sampled_softmax, progress),
            prefix=by_stage(self.prefix_loss, progress) > 0,
            leave_out=self.counts > 0,
        )

    def scale(self, progress):
        """Of attention's scores."""
        scale = self.attn_scale * self.head_dim**-0.5
        return scale * yarn_scale(self.long_windows(progress)) if self.yarn else scale

    @property
    def becomes_untied(self):
        """Whether the head is the embedding in one part of training, and not in the other."""
        return 0 < self.tied < 1

    def at_the_end(self, progress=1.0):
        """{option: value} of those that change in the course of training, as they end; progress:
        at which it ended."""
        by_stage = "short_window", "long_window", "mtp"
        ends = {name: getattr(self, name)[-1:] for name in by_stage}
        if self.extension_windows:
            short, long = self.extension_windows
            ends |= dict(short_window=(short,), long_window=(long,), extension_windows=())
        ends |= dict(sampled_softmax=(0,), prefix_loss=(0.0,), tied=float(self.tied == 1))
        return ends | dict(yarn_windows=self.long_windows(progress))

    def val_stage(self, stage, max_doc_len):
        """The same for validation: windows of the end, one target, all tokens in the softmax."""
        short, long = self.val_windows or self.last_windows
        rescaled = self.scale(0.0) != self.scale(1.0)
        return stage._replace(
            windows=self.windows(short, long),
            max_doc_len=max_doc_len,
            attn_scale=self.scale(1.0) if rescaled else stage.attn_scale,
            tied=stage.tied and not self.becomes_untied,
            by_buffers=rescaled or self.becomes_untied,
            n_targets=1,
            n_sampled=0,
            prefix=False,
            leave_out=False,
        )

    def train_eval_stage(self, stage, max_doc_len):
        """The same for measuring on the training text: what was counted in a document does not
        predict it."""
        return self.val_stage(stage, max_doc_len)._replace(leave_out=stage.leave_out)

    def attention(self, stage):
        """[(times a row's length, window), ...] of its narrowest and widest attention, where heads
        are paired and where they are not."""
        lengths = {1, 2} if self.paired_layers else {1}
        extremes = min(stage.windows), max(stage.windows)
        return [(n, window) for window in extremes for n in lengths]

    def is_new_loss(self, before, after):
        """Whether the training losses of two stages cannot be compared."""
        return before.n_sampled != after.n_sampled

    def target_weights(self, progress):
        """1, 1/2, 1/4, ... for the next tokens that are predicted; the farthest fades out over its
        stage. Behind them that of the prefix, where there is one. None for one token alone."""
        n = by_stage(self.mtp, progress)
        weights = [0.5**k for k in range(n)]
        if n > 1:
            weights[-1] *= left_of_stage(self.mtp, progress)
        prefix = by_stage(self.prefix_loss, progress)
        if prefix:
            later = self.prefix_loss[stage_number(self.prefix_loss, progress) + 1 :]
            fades = not any(later)
            weights.append(prefix * (left_of_stage(self.prefix_loss, progress) if fades else 1))
        return weights if len(weights) > 1 else None

    # ----------------------------------------------------------------------------------------------
    # What others call it

    def hf_names(self):
        """{parameter: Hugging Face's names of its matrices along dim 0, or one name}; ".T": stored
        transposed.

        Parameters that are not here have no other name.
        """

        def in_layers(layers, *matrices):
            return [f"model.layers.{i}.{matrix}" for i in layers for matrix in matrices]

        qkvo = [f"self_attn.{x}_proj.weight" for x in "qkvo"]
        attn = self.attn_layers
        value = self.value_embed_layers
        gated = self.gated_layers if self.mudd_gates < 0 else []
        return {
            "embed": "model.embed_tokens.weight",
            "lm_head": "lm_head.weight",
            "attn_bank": in_layers(attn, *qkvo),
            "attn_gates": in_layers(gated, "self_attn.output_gate.weight"),
            "value_embeds": in_layers(value, "self_attn.value_embed.weight"),
            "value_gates": in_layers(self.value_gate_layers, "self_attn.value_gate.weight"),
            "mlp_bank": in_layers(
                range(self.n_layer), "mlp.up_proj.weight", "mlp.down_proj.weight.T"
            ),
        }

    def hf_config(self, progress):
        """Sizes and parts under Hugging Face's names, for weights of this progress; what
        export/modeling_stopwatch.py builds the model from."""
        stage = self.val_stage(self.stage(progress, 0), 0)
        freqs = rope_frequencies(self.rope_base, self.head_dim // 4, self.long_windows(progress))
        offset = [i for i in self.attn_layers if self.sees_far(i) and i not in self.paired_layers]
        return dict(
            architectures=["StopwatchForCausalLM"],
            model_type="stopwatch",
            auto_map=dict(
                AutoConfig="modeling_stopwatch.StopwatchConfig",
                AutoModelForCausalLM="modeling_stopwatch.StopwatchForCausalLM",
            ),
            hidden_size=self.n_embd,
            num_hidden_layers=self.n_layer,
            num_attention_heads=self.n_head,
            head_dim=self.head_dim,
            intermediate_size=self.mlp_ratio * self.n_embd,
            hidden_act="relu2",
            rope_theta=self.rope_base,
            tie_word_embeddings=progress < self.tied or self.tied == 1,
            # What no other model has
            windows=stage.windows,
            attention_scale=stage.attn_scale,
            rope_frequencies=freqs.tolist(),
            value_embed_layers=self.value_embed_layers,
            key_offset_layers=offset if self.key_offset else [],
            paired_layers=self.paired_layers,
            output_gate_layers=self.gated_layers,
            xsa_layers=self.xsa_layers,
            qkvo_scales=self.qkvo_scales,
            gate_by_value=self.gate_by_value,
            attn_input=self.attn_input,
            sublayer_lambdas=self.sublayer_lambdas,
            inject=self.inject,
            mudd=self.mudd,
            mudd_parts=[mudd.last_parts(self), mudd.behind_parts(self)] if self.mudd else [],
            mudd_gates=self.mudd_gates,
            mudd_gate_parts=mudd.gate_parts(self) if self.mudd_gates >= 0 else [],
            skip=self.skip,
            backout=self.backout,
            smear=self.smear,
            smear_first=self.smear_first,
            n_gram=self.n_gram,
            ngram_rows=self.ngram_rows,
            ngram_signs=self.ngram_signs,
            norm_embedding=self.tied > 0,
            softcap=self.softcap,
            copies=self.copies,
            counts=self.counts,
        )


def left_of_stage(values, progress):
    """How much of a stage is still to come, from 1 to 0."""
    return max(0.0, 1 - (progress * len(values) - stage_number(values, progress)))
