"""The pieces of a recipe that can be turned off, or on where a track goes without, and the variants
of a configuration that they make."""

import contextlib
import difflib
from typing import NamedTuple

from base import InputError
from benchmarks import subject

BASE = "base"  # the variant that has every piece as it comes


class Piece(NamedTuple):
    """Fields of a configuration without and with a piece: values, or functions of the one that is
    to be changed. on is empty where there is nothing sensible to turn on."""

    off: dict
    on: dict

    @property
    def what(self):
        """The help of its option."""
        return subject.help_of(next(iter(self.off)))


def of(field, off, on):
    return Piece({field: off}, {field: on})


def switches():
    """The options that are on or off, each a piece."""
    names = "smear attn_gate key_offset qkvo_scales gate_by_value paired_near shuffle".split()
    names += ["normuon", "row_moments"]
    return {name.replace("_", "-"): of(name, False, True) for name in names}


def halves(c):
    """Windows half as long as the long ones."""
    return tuple(max(1, w // 2) for w in c.long_window)


def thirds(windows):
    """Windows that grow from stage to stage, to the last of these."""
    return tuple(max(1, windows[-1] * k // 3) for k in (1, 2, 3))


def free_layers(c):
    """Every other layer that has attention."""
    return tuple(i for i in range(0, c.n_layer - 1, 2) if i not in c.skip[1:])


def unpaired_layers(c):
    """Layers that have attention without pairs."""
    return tuple(i for i in range(c.n_layer) if i not in (*c.skip[1:], *c.paired_layers))


def mixed_layers(c):
    """For MUDD, where it can be."""
    return (c.n_layer // 3, two_thirds(c)) if c.inject else ()


def without_mudd(c):
    """The layer that MUDD takes out, as backout does."""
    return c.mudd[1] if c.mudd else c.backout


def two_thirds(c):
    """The layer behind which a third of them is left."""
    return min(2 * c.n_layer // 3, c.n_layer - 2)


PIECES = {
    "softcap": of("softcap", (), (23.0, 5.0, 7.5)),
    "value-embeds": of(
        "value_embed_layers", (), lambda c: tuple(dict.fromkeys((0, c.n_layer - 1)))
    ),
    "ngrams": Piece(dict(n_gram=1, ngram_signs=False), dict(n_gram=2)),
    "ngram-signs": of("ngram_signs", False, lambda c: c.n_gram > 1),
    "smear-first": of("smear_first", False, lambda c: c.smear),
    "gate-layers": of("attn_gate_layers", (), lambda c: (c.n_layer - 1,) * c.attn_gate),
    "paired-heads": of("paired_layers", (), free_layers),
    "xsa": of("xsa_layers", (), unpaired_layers),
    # Each takes along what cannot be without it, and is turned on only where what it needs is there
    "sublayer-lambdas": Piece(
        dict(sublayer_lambdas=False, inject=False, mudd=(), mudd_gates=-1, backout=without_mudd),
        dict(sublayer_lambdas=True),
    ),
    "inject": Piece(
        dict(inject=False, mudd=(), mudd_gates=-1, backout=without_mudd),
        dict(inject=lambda c: c.sublayer_lambdas),
    ),
    "mudd": Piece(
        dict(mudd=(), backout=without_mudd),
        dict(mudd=mixed_layers, backout=lambda c: -1 if c.inject else c.backout),
    ),
    "mudd-gates": of("mudd_gates", -1, lambda c: max(1, c.n_layer // 3) if c.inject else -1),
    "attn-input": of("attn_input", -1, two_thirds),
    "skip": of("skip", (), lambda c: ((c.n_layer + 1) // 4, (c.n_layer + 1) // 2)),
    "backout": of("backout", -1, two_thirds),
    "mtp": of("mtp", (1,), (2, 1)),
    "sampled-softmax": of(
        "sampled_softmax", (0,), lambda c: (min(16384, -(-min(c.batch_tokens) // 128) * 64),)
    ),
    "tied": of("tied", 0.0, 2 / 3),
    "yarn": of("yarn", False, lambda c: len(set(c.long_window)) > 1),
    "short-windows": of("short_window", lambda c: c.long_window, halves),
    "window-growth": Piece(
        dict(short_window=lambda c: c.short_window[-1:], long_window=lambda c: c.long_window[-1:]),
        dict(
            short_window=lambda c: thirds(c.short_window),
            long_window=lambda c: thirds(c.long_window),
        ),
    ),
    "document-growth": Piece(dict(max_doc_len=lambda c: c.max_doc_len[-1:]), {}),
    "weight-decay": of("weight_decay", 0.0, 1.2),
    "adam-every": of("adam_every", 1, 2),
    "cooldown": of("cooldown", 0.0, 0.6),
    "grow-gradients": of("grow_gradients", False, lambda c: len(c.batch_tokens) > 1),
    "prefix-loss": of("prefix_loss", (0.0,), (0.25, 0.0)),
    "extension-windows": Piece(dict(extension_windows=()), {}),
    "head-betas": of("head_betas", (0.75, 0.95), (0.5, 0.95)),
    "muon-head-pairs": of("muon_head_pairs", False, lambda c: c.n_head % 2 == 0),
    "mlp-down-lr": of("mlp_down_lr", 1.0, 2.0),
    "decay-by-shape": of("decay_by_shape", False, lambda c: c.weight_decay > 0),
    **switches(),
}


def warmup(c):
    """As the configuration says, or else a twentieth of twice its steps."""
    return c.adamw_warmup or c.steps // 10


# What the whole recipe is compared with, only where --only names it
RIVALS = {
    # The field's optimizer, with its own learning rate (--adamw-lr), gets twice the steps
    "adamw": Piece(
        dict(optimizer="muon"),
        dict(optimizer="adamw", adamw_warmup=warmup, steps=lambda c: 2 * c.steps),
    ),
}


# --- variants


class Code(NamedTuple):
    """A piece that is no option: what it is without, while around(trainer) lasts."""

    what: str
    around: object  # a context manager


class Variant(NamedTuple):
    label: str
    what: str
    fields: dict  # of the configuration, where it differs from the base
    config: subject.Settings
    around: object = contextlib.nullcontext  # function of a trainer, entered for each run


def apply(c, fields):
    """The configuration with these values, or what functions make of it. Raises InputError."""
    for name in fields:
        if name not in c.fields:
            raise InputError(f"this template has no {name}")
    values = {name: value(c) if callable(value) else value for name, value in fields.items()}
    return subject.change(c, **values)


def differences(c, base):
    return {name: x for name, x in c.fields.items() if x != base.fields[name]}


def variant(base, name):
    """The piece turned off, or on where base goes without. Raises InputError, saying why, where
    neither can be done."""
    piece = (PIECES | RIVALS)[name]
    for word, turned, fields in (("without", "off", piece.off), ("with", "on", piece.on)):
        try:
            changed = apply(base, fields)
        except InputError as e:
            raise InputError(f"{name}: cannot be turned {turned} here: {e}") from None
        if changed != base:
            return Variant(f"{word} {name}", piece.what, differences(changed, base), changed)
    raise InputError(f"{name}: makes no difference to this configuration")


def choose(base, only, preset=PIECES, code=None):
    """({name: Variant}, the base first, {name: why it is left out}). Names that were asked for
    are not left out: an InputError says what is wrong with them.

    preset: names to take where none is asked for; code: {name: Code} of more pieces.
    """
    code = code or {}
    known = PIECES | RIVALS | code
    for name in only:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            expected = ", ".join(known)
            raise InputError(f"--only {name}: no such piece; {hint}expected of {expected}")
    chosen = {BASE: Variant(BASE, "the recipe as it comes", {}, base)}
    left_out = {}
    for name in dict.fromkeys(only or preset):
        if name in code:
            what, around = code[name]
            chosen[name] = Variant(f"without {name}", what, {}, base, around)
            continue
        try:
            chosen[name] = variant(base, name)
        except InputError as e:
            if only:
                raise InputError(f"--only {e}") from None
            left_out[name] = str(e).split(": ", 1)[1]
    return chosen, left_out
