"""A finished run read back from its folder, for the programs that put its model to use."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from base import InputError, one_line
from base.options import progress_of
from base.places import runs_folder
from data import Tokenizer
from data.tokenizers import load_tokenizer
from kernels import choose_ops
from models import DEFAULT_TEMPLATE, load_template, template_names

from . import warm_start
from .options import as_option

TABLES = "tables.safetensors"  # what the model took from the training text besides weights


class Saved(NamedTuple):
    """What a run left."""

    folder: Path
    options: dict  # of its configuration, by name
    model: torch.nn.Module
    stage: tuple  # the template's, for validation after the last step
    tokenizer: Tokenizer
    max_len: int  # tokens in the longest row, of training or of validation
    result: dict  # of result.json


def newest_run(runs=None):
    """The folder of the run that finished last. Raises InputError where there is none."""
    runs = runs or runs_folder()
    found = [*Path(runs).glob("*/result.json"), *Path(runs).glob("*/seed*/result.json")]
    found = [path for path in found if path.with_name("model.safetensors").exists()]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        if "finishing" not in read_object(path):
            return path.parent
    raise InputError(
        f"{runs}: no finished run yet; train one with ./run.sh, or name a run's folder with --run"
    )


def step_weights(step):
    """Name in a run's folder of the weights that --snapshots keeps after a step."""
    return f"steps/step-{step:06}.safetensors"


def snapshot_steps(folder):
    """The steps of which a run's folder has the weights, in order; more may come while it runs."""
    found = []
    for path in Path(folder).glob("steps/step-*.safetensors"):
        number = path.stem.removeprefix("step-")
        if number.isdecimal():
            found.append(int(number))
    return sorted(found)


def load_run(folder, device="cpu", template=None, step=None):
    """The Saved run of a folder, its model on the device. Raises InputError.

    template: the dotted name of a module that may be imported, besides those in models/; step: take
    the weights that --snapshots kept after it, of a run that may still be going on; None: those of
    the result.
    """
    folder = Path(folder)
    said = read_object(folder / "config.json")
    result = {}  # of a run that may still be going on
    if step is None:
        result = read_object(folder / "result.json")
        if "finishing" in result:
            raise InputError(
                f"{folder}: the run's weights are still being written, or it was ended before; "
                f"./run.sh --resume {folder} goes on with it then"
            )
        steps = result.get("best_step", result.get("steps"))
        path = folder / "model.safetensors"
    else:
        steps = step
        path = folder / step_weights(step)
        there = snapshot_steps(folder)
        if step not in there:
            which = f"one of {' '.join(map(str, there))}" if there else "a run of --snapshots N"
            raise InputError(f"{folder}: no weights of step {step}: expected {which}")
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as e:
        why = one_line(e)
        raise InputError(f"{path}: cannot be read: {why}") from None
    tokenizer = load_tokenizer(folder)

    # What no longer fits is another version's
    try:
        options = said["config"]
        config = template_config(options, template)
        max_len = max(options["row_len"], options["val_row_len"])
        added = options["extension"], options.get("earlier", ())
        progress = progress_of(steps, options["steps"], *added)
        stage = config.val_stage(config.stage(progress, max_len), max_len)
        # Gates and the like are fp32 in every run
        dtypes = {w.dtype for w in weights.values() if w.dtype != torch.float32}
        dtype = dtypes.pop() if dtypes else torch.float32
        ops = choose_ops("cpu")  # plain PyTorch, which starts at once and runs on any device
        module = load_template(options["template"])
        with torch.device(device):
            model = module.Model(config, tokenizer.n_vocab, max_len, dtype, ops)
        with torch.no_grad():
            model.enter(progress)
            fill(model, weights)
        take_tables(model, folder)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise InputError(
            f"{folder}: a run of another version ({type(e).__name__}: {e}); expected one that this "
            "version trained. The one that did is in its source.tar.bz2"
        ) from None
    return Saved(folder, options, model, stage, tokenizer, max_len, result)


def take_tables(model, folder):
    """Give a model that lacks them the counts of its training text, from a run's folder. Raises
    InputError."""
    if not hasattr(model, "wants_tables") or not model.wants_tables():
        return
    model.take_tables(read_tables(folder))


def keep_tables(model, log, given, begins):
    """What a model took from the training text besides weights, into the run's folder; where it is
    taught by another text, from the run that it was trained in. Raises InputError."""
    if not hasattr(model, "tables"):
        return
    take_tables(model, warm_start.run_folder(given) if given and begins else log.folder)
    tables = model.tables()
    if tables and begins:
        log.save_weights(tables, TABLES)


def read_tables(folder):
    """{name: tensor} of what a run counted in its training text. Raises InputError."""
    path = Path(folder) / TABLES
    try:
        return load_file(path)
    except (OSError, SafetensorError) as e:
        why = one_line(e)
        raise InputError(
            f"{path}: cannot be read: {why}; expected what the run counted in its training text"
        ) from None


def weights_of(model):
    """{name: CPU tensor} of a model's parameters: itself where it is on the CPU."""
    return {name: p.detach().cpu() for name, p in model.named_parameters()}


def fill(model, weights):
    """Copy weights by name into a model's parameters. Raises ValueError where they differ in names
    or shapes."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != weights.keys():
        raise ValueError(f"weights of {min(parameters.keys() ^ weights.keys())}")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            found = tuple(weights[name].shape)
            raise ValueError(f"{name} of shape {found}, not {tuple(parameter.shape)}")
        parameter.copy_(weights[name])


def template_config(fields, template=None):
    """The template's Config of a run, from the options in its config.json.

    template: the dotted name of a module that may be imported, besides those in models/: a folder
    from elsewhere must not name one. Raises InputError.
    """
    name = fields.get("template", DEFAULT_TEMPLATE)
    if name not in (*template_names(), template):
        raise InputError(
            f"the run's template is {name}, which is not in models/: if you trust that module, "
            f"allow it with --template {name}"
        )
    template = load_template(name)
    own = {}
    for f in dataclasses.fields(template.Config):
        if f.name in fields:
            own[f.name] = as_option(fields[f.name])
    try:
        return template.Config(**own)
    except InputError as e:
        raise TypeError(f"its options do not fit: {e}") from None


def read_object(path):
    """A file's JSON object. Raises InputError."""
    try:
        said = json.loads(path.read_bytes())
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}; expected the folder of a finished run") from None
    except ValueError as e:
        raise InputError(f"{path}: not JSON: {e}; expected what a run wrote") from None
    if not isinstance(said, dict):
        raise InputError(f"{path}: expected a JSON object, as a run writes it")
    return said
