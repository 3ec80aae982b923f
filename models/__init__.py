"""What is trained: a template is a file.

A template is a module, here or given by its dotted name (`--template NAME`), with two classes. The
trainer, the memory estimate, checkpoints, sampling and export use what is listed here and nothing
else, so a new template is one new file.

`Config`: a frozen dataclass; its fields are made by base.options.option() and become command-line
options. It offers

    stage(progress, max_doc_len)   a NamedTuple of what the model's compiled graph depends on at
                                   this progress (0 to 1): hashable, sortable, equal while nothing
                                   changes; it has the field max_doc_len
    val_stage(stage, max_doc_len)  the same for validation during or after that stage
    train_eval_stage(stage, max_doc_len)
                                   the same for measuring on the training text itself; without it
                                   that is val_stage()
    at_the_end(progress)           {option: value} of its options that change in the course of
                                   training, as they are when it ends at this progress, for
                                   teaching; without it they stay as they are
    target_weights(progress)       a list of numbers that may change with every step and compile
                                   nothing, handed to forward(), or None
    is_new_loss(before, after)     whether training losses of two stages cannot be compared
    hf_names()                     {parameter: Hugging Face's name, or a list of names of its
                                   matrices along dim 0; ".T" behind one: stored transposed}; one
                                   is model.embed_tokens.weight, the embedding
    hf_config(progress)            Hugging Face's words for the configuration, a dict
    head_dim                       only if it has attention: for choosing kernels
    attention(stage)               [(n, window), ...]: what attention it asks for in this stage, the
                                   least and the widest, over n times a row's length; without it
                                   (1, stage.max_doc_len) alone

`Model`: an nn.Module, built by Model(config, n_vocab, max_len, dtype, ops). max_len: the longest
row in tokens; ops: kernels.Ops. It may be built on the meta device. It offers

    dtype                          attribute: of large parameters and activations
    recompute                      attribute: compute blocks again in backward (set by the trainer)
    grad_rooms                     attribute: {parameter: rows of memory that its gradient is to
                                   have behind it} (set by the trainer, where ranks do not divide
                                   it); a gradient without is copied. Only if it makes use of it
    init_weights(seed)             new weights, the same on every rank and CPU; models/parts.py has
                                   draw(), which makes them where the parameter is
    learn_tokens(dataset)          take from a data.Dataset what the loss needs to know of its
                                   tokens' bytes. Raises InputError; only if it needs anything
    tables()                       {name: CPU tensor} of what else it takes from a training text in
                                   learn_tokens(), {} for nothing, which a run's folder keeps;
                                   wants_tables(): whether it lacks them; take_tables(tables). Only
                                   if it takes anything
    enter(progress)                fill buffers for the stage that this progress is in
    forward(inputs, targets, cu_seqlens, stage, target_weights=None)
                                   summed cross-entropy, an fp32 scalar, over targets that are not
                                   IGNORE; inputs, targets: (B, T) int64; cu_seqlens: (n,) int32
                                   document starts in the flattened rows
    logits(inputs, cu_seqlens, stage, last_only=False)
                                   (B, T, n_vocab) fp32, for sampling; or of the last tokens only
    log_probs(inputs, targets, cu_seqlens, stage, n_vocab=None)
                                   (B, T) fp32, of each target, 0 where it is IGNORE; targets are
                                   what really follows; n_vocab: among so many tokens. For
                                   evaluation, which does by logits() without it, and teaching
    new_cache(rows)                what decode() keeps of earlier tokens: none yet. It has lengths,
                                   how many each row holds, keep(rows), to forget all rows but
                                   these, and join(other), to take over another one's rows;
                                   models/cache.py has one for attention
    decode(inputs, counts, cache, stage, every=False)
                                   (B, n_vocab) fp32, what follows the new tokens of each row, which
                                   is a document; inputs: (B, S) int64, padded on the right; counts:
                                   how many are no padding, 1 or more. every: (B, S, n_vocab), what
                                   follows each of them, and cache.end(counts) has to be called.
                                   Without these two, sampling calls logits() with all tokens each
                                   time
    quantizable                    attribute: dict(layer={field of a Layer: whether it is stored
                                   transposed}, tables=names, banks=names) of matrices that may be
                                   replaced, for inference/quantize.py. Without it it rounds them
    update_rules(optim)            {parameter name: optim.Rule}, from an OptimConfig, in the order
                                   in which they are updated
    successors(before, after)      {parameter: the parameter whose weights and moments it takes over
                                   when training passes from one stage to the next, or ends (None)}
    touched_rows(inputs, cu_seqlens)
                                   {table: (n,) int64 numbers of the rows, of all of it as (-1,
                                   width), that a batch can give a gradient to}, by its tokens
                                   alone, on their device: ranks then exchange only these rows
                                   (optim/touched.py). Only if there are tables worth it
    before_step()                  what a step's forward passes need to have made; only if anything
    after_step()                   what the model keeps up to date besides parameters
    state()                        {name: tensor} of that, for checkpoints
    reset_state()                  the same as in a new run
    flops_per_token(stage)         training FLOPs
    activation_bytes(rows, row_len, recompute)
                                   {part: bytes} that a forward pass keeps for backward

tests/templates/ngram_mlp.py is the smallest one. Steps and stages: training is divided into stages;
a step's stage is what its compiled graph and its batch depend on.
"""

import dataclasses
import importlib
from pathlib import Path

import torch

from base import InputError
from kernels import choose_ops

DEFAULT_TEMPLATE = "gpt"  # where none is named


def template_names():
    """Names of the templates in this folder: files with a Model."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [p.stem for p in files if "\nclass Model(" in p.read_text(encoding="utf-8")]


def load_template(name):
    """The template's module: a name out of template_names(), or a module's dotted name. Raises
    InputError."""
    if name in template_names():
        return importlib.import_module(f"models.{name}")
    if "." not in name.strip(".") or name.startswith("."):
        raise InputError(
            f"--template {name}: expected one of {', '.join(template_names())}, or a module's "
            "dotted name"
        )
    try:
        module = importlib.import_module(name)
    except ImportError as e:
        raise InputError(f"--template {name}: cannot be imported: {e}") from None
    for part in ("Config", "Model"):
        if not hasattr(module, part):
            raise InputError(
                f"--template {name}: has no {part}; models/__init__.py says what a template offers"
            )
    return module


def option_names(name):
    """Options of a template. Raises InputError."""
    return {f.name for f in dataclasses.fields(load_template(name).Config)}


def outline(config, n_vocab):
    """The model of a trainer's configuration without its weights, on the meta device."""
    template = load_template(config.goal.template)
    ops = choose_ops("cpu")  # outside: they are tried on numbers
    with torch.device("meta"):
        return template.Model(config.model, n_vocab, 1, torch.float32, ops)
