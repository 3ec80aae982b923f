"""A new run that begins with the weights of another one, and with its tokenizer."""

import contextlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from base import InputError, one_line
from data import sources
from data.tokenizers import load_tokenizer
from models import outline

from . import checkpoints
from .machine import first_rank_first, share


def read_weights(given):
    """{parameter: tensor} of a run or a checkpoint, fp32 masters where there are. Raises
    InputError."""
    path = Path(given)
    if not (path / "model.safetensors").exists() and (path / "checkpoints").is_dir():
        path = checkpoints.latest(path / "checkpoints") or path
    if (path / "state.json").exists():
        return {
            name.removeprefix("weights/"): x
            for name, x in checkpoints.load(path)[0].items()
            if name.startswith("weights/")
        }
    return load_weights(path, "--warm-start")


def load_weights(folder, option, name="model.safetensors"):
    """{parameter: tensor} of a finished run. option: how it was given; name: of the file. Raises
    InputError."""
    path = Path(folder) / name
    try:
        return {name: x for name, x in load_file(path).items() if x.numel()}
    except (OSError, SafetensorError) as e:
        raise InputError(
            f"{option} {folder}: expected a run's folder with model.safetensors, or a "
            f"checkpoint ({one_line(e)})"
        ) from None


def check(config, dataset):
    """Raise InputError where the weights of --warm-start, if it is given, are of another model or
    other tokens than these."""
    given = config.run.warm_start
    if given:
        check_vocabulary(given, dataset)
        copy_weights(given, outline(config, dataset.n_vocab))  # only compares them


def copy_weights(given, model):
    """Copy what read_weights gives into a model's parameters, unless they are on meta. Raises
    InputError naming what does not fit."""
    tensors, parameters = read_weights(given), dict(model.named_parameters())
    wanted = {name: list(p.shape) for name, p in parameters.items() if p.numel()}
    n_known = known_tokens(given)
    if n_known and n_known < model.n_vocab:
        n_padded = -(-n_known // 64) * 64
        tensors = {
            name: with_new_tokens(x, wanted.get(name), n_known, n_padded)
            for name, x in tensors.items()
        }
    differing = differences(wanted, {name: list(x.shape) for name, x in tensors.items()})
    if differing:
        raise InputError(f"--warm-start {given} does not fit this model: {'; '.join(differing)}")
    for name, x in tensors.items():
        if parameters[name].device.type != "meta":
            parameters[name].data.copy_(x)


def known_tokens(given):
    """How many tokens the vocabulary of that run has; None if nothing says."""
    folder = run_folder(given)
    if not (folder / "tokenizer.json").is_file():
        return None
    return load_tokenizer(folder).n_vocab


def with_new_tokens(x, shape, n_known, n_padded):
    """A table of a smaller vocabulary, as it is for one with more tokens: those that are new begin
    as the mean of all others. A tensor that is no table stays as it is.

    shape: that is wanted, None for any; n_known: tokens of x's vocabulary; n_padded: its rows.
    """
    if shape is None or x.dim() < 2 or x.size(-2) != n_padded or x.size(-1) != shape[-1]:
        return x
    known = x.narrow(-2, 0, n_known)
    mean = known.mean(-2, keepdim=True)
    more = shape[-2] - n_known
    return torch.cat([known, mean.expand(*mean.shape[:-2], more, -1)], dim=-2)


# --------------------------------------------------------------------------------------------------
# The tokenizer: an id has to mean what it meant to the weights


def run_folder(given):
    """The folder of the run that `--warm-start given` names, itself or by one of its
    checkpoints."""
    path = Path(given).resolve()
    return path.parent.parent if path.parent.name == "checkpoints" else path


def configuration(given):
    """{option: value} of that run, as its config.json has them; {} where it has none."""
    try:
        return dict(json.loads((run_folder(given) / "config.json").read_text())["config"])
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def tokenizer_name(given):
    """What that run's --tokenizer was, or what its source brought along; None if nothing says."""
    said = configuration(given)
    own = ""
    with contextlib.suppress(InputError):  # a source that is not installed here
        own = sources.find(said.get("data", "")).tokenizer
    return own or said.get("tokenizer")


def choose_vocabulary(config, world, folder, resuming):
    """The file of the tokenizer to use instead of --tokenizer's own, "" for none, on all ranks.

    folder: where the run is to be, None if that is not known yet. Raises InputError where
    --tokenizer asks for another one than the weights were trained with.
    """

    def choose():
        return "" if world.rank else vocabulary(config, folder, resuming)

    return share(world, first_rank_first(world, choose))


def vocabulary(config, folder, resuming):
    """The same, on the first rank."""
    given = config.run.warm_start
    if not given:
        return ""
    name = tokenizer_name(given)
    if name and name != config.data.tokenizer and not sources.find(config.data.data).tokenizer:
        raise InputError(
            f"--warm-start {given}: tokenizer: {config.data.tokenizer!r} here, {name!r} in the "
            "run; its weights stand for its own tokens: leave --tokenizer out"
        )
    # A run that has begun has the file too, and may have outlived the one it began with
    places = [run_folder(given)]
    if resuming and folder:
        places.insert(0, Path(folder))
    for place in places:
        if (place / "tokenizer.json").is_file():
            return str(place / "tokenizer.json")
    return ""


def other_tokens(given, dataset):
    """How the tokenizer that a run keeps differs from a Dataset's, in words; None if it does not,
    or there is none to compare. Raises InputError."""
    folder = run_folder(given)
    if not (folder / "tokenizer.json").is_file():
        return None
    theirs = load_tokenizer(folder)
    try:
        ours = dataset.tokenizer
    except InputError:
        return None  # out of reach
    if (ours.tokens, ours.pattern) == (theirs.tokens, theirs.pattern):
        return None
    return f"vocabulary: {ours.n_vocab} tokens here, {theirs.n_vocab} others in the run"


def check_vocabulary(given, dataset):
    """Refuse weights that were trained on other tokens than a Dataset's. Raises InputError."""
    folder = run_folder(given)
    advice = "so its weights stand for other tokens; train anew, or give it its own text"
    if (folder / "tokenizer.json").is_file():
        if other := other_tokens(given, dataset):
            raise InputError(f"--warm-start {given}: {other}, {advice}")
        return
    # From before runs kept their tokenizer: some are the same for every text
    if tokenizer_name(given) in (None, "bytes", "gpt2"):
        return
    try:
        data = json.loads((folder / "config.json").read_text())["data"]
    except (OSError, ValueError, LookupError, TypeError):
        return
    if data != dataset.fingerprint:
        raise InputError(
            f"--warm-start {given}: has no tokenizer.json, and its vocabulary is of another text, "
            f"{advice}"
        )


# --------------------------------------------------------------------------------------------------
# Differences in words


def differences(ours, theirs, where="in the run"):
    """What differs between two dicts of JSON-able fields, a readable line for each.

    ours: of this run; theirs: of what is there already, `where`. A tuple is a list; a field of an
    inner dict is named outer.inner.
    """
    ours = dict(leaves(json.loads(json.dumps(ours))))
    theirs = dict(leaves(json.loads(json.dumps(theirs))))
    lines = []
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        a = json.dumps(ours[name]) if name in ours else "nothing"
        b = json.dumps(theirs[name]) if name in theirs else "nothing"
        if a == b:
            continue  # NaN is not equal to itself, but its text is
        if name in ours and name in theirs and ours[name] == theirs[name]:
            continue  # 1 and 1.0 have other texts, but are equal
        if max(len(a), len(b)) > 80:
            start = max(0, len(os.path.commonprefix([a, b])) - 20)
            a = excerpt(a, start)
            b = excerpt(b, start)
        lines.append(f"{name}: {a} here, {b} {where}")
    return lines


def excerpt(text, start):
    """60 characters of it, from where two texts part."""
    before = "..." if start else ""
    after = "..." if len(text) > start + 60 else ""
    return before + text[start : start + 60] + after


def leaves(tree, prefix=""):
    """(dotted name, value) for each leaf of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
