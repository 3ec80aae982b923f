"""Hands trained weights over: ./run.sh export.

A folder in the layout of the Hugging Face Hub, which others read without this program:
    model.safetensors      or model-00001-of-0000N.safetensors and model.safetensors.index.json
    config.json            sizes, and the whole configuration the model was trained with
    tokenizer.json         and tokenizer_config.json, for Hugging Face's tokenizers
docs/torchtitan.md shows how torchtitan takes it from there.
"""

import os
import shutil
import sys
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from base import InputError, to_json, whole_file
from base.command import given_path
from base.files import sweep
from base.options import progress_of
from data import Tokenizer, sources
from data.tokenizers import END_OF_TEXT
from records.add import PATHS
from records.read import read_json
from runtime.saved import template_config

SHARD_BYTES = 5_000_000_000  # of a file, as on the Hub; a larger tensor has one to itself
EMBEDDING = "model.embed_tokens.weight"  # what every template calls its tokens' embedding


def add_arguments(parser):
    parser.description = """\
Writes the weights of a finished run, or the fp32 masters of one of its checkpoints, into a new
folder that others can read: safetensors with a matrix for each layer under the field's names, the
configuration, and the tokenizer for Hugging Face's library. Nothing in it is a pickle.
docs/torchtitan.md tells how to train on from there."""
    parser.add_argument(
        "source",
        type=given_path,
        metavar="RUN_OR_CHECKPOINT",
        help="folder of a finished run, or of a checkpoint (RUN/checkpoints/step-000123)",
    )
    parser.add_argument(
        "--to",
        type=given_path,
        required=True,
        metavar="FOLDER",
        help="folder to make; it must not exist",
    )
    parser.add_argument(
        "--tokenizer",
        type=given_path,
        metavar="FILE",
        help="tokenizer.json of a run with the same tokens, where the run itself has none",
    )
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="the run's template, where it is a module from outside models/: a folder does not say "
        "by itself what is imported",
    )


def run(args):
    """Export, print the folder. Returns 0; raises InputError, and then nothing is left behind."""
    if os.path.lexists(args.to):
        raise InputError(f"--to {args.to}: is there already; choose a folder that is not")
    model = load_model(args.source)
    file = args.tokenizer or find_tokenizer(args.source)
    tokenizer = read_tokenizer(file) if file else None
    try:
        config = template_config(model.config, args.template)
        tensors = unstack(model.tensors, config)
        about = describe(model, config, tokenizer)
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise InputError(
            f"{args.source}: not the weights and the configuration of a run of train_gpt.py ({e!r})"
        ) from None
    if tokenizer is None:
        why = "the run has no tokenizer.json; name one with --tokenizer"
        if uses_gpt2(model.config):
            why = "GPT-2's is on the Hub as openai-community/gpt2"
        print(f"no tokenizer is written: {why}", file=sys.stderr)

    try:
        args.to.parent.mkdir(parents=True, exist_ok=True)
        sweep(args.to.parent)
        with whole_file(args.to) as aside:
            aside.mkdir()
            need = sum(t.nbytes for t in tensors.values())
            free = shutil.disk_usage(aside).free
            if need > free:
                raise InputError(
                    f"--to {args.to}: {need / 1e9:.2f} GB are needed there, {free / 1e9:.2f} GB "
                    "are free"
                )
            write_json(aside / "config.json", about)
            if tokenizer is not None:
                save_tokenizer(tokenizer, aside)
            save_weights(tensors, aside)
            for path in aside.iterdir():  # safetensors' files are for their owner alone
                shutil.copymode(aside / "config.json", path)
    except (OSError, SafetensorError) as e:
        raise InputError(
            f"--to {args.to}: cannot be written: {reason(e)}; nothing is left there"
        ) from None
    print(args.to)
    return 0


def reason(e):
    """What an error says, in one line."""
    return getattr(e, "strerror", None) or " ".join(str(e).split())


def write_json(path, value):
    path.write_text(to_json(value, indent=1) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# The model


class Model(NamedTuple):
    """What a run or a checkpoint says about itself."""

    tensors: dict  # parameter name -> CPU tensor
    config: dict  # Config's fields
    step: int | None  # after which the weights were such
    data: str | None  # fingerprint
    commit: str | None
    masters: bool  # whether these are the fp32 masters


def load_model(source):
    """The Model in a run's or a checkpoint's folder. Raises InputError."""
    checkpoint = (source / "state.json").exists()
    if not checkpoint and not (source / "model.safetensors").exists():
        inside = sorted(source.glob("checkpoints/step-*[0-9]/state.json"))
        hint = f"; its last checkpoint is {inside[-1].parent}" if inside else ""
        raise InputError(
            f"{source}: has no model.safetensors; expected a finished run or a checkpoint{hint}"
        )
    if checkpoint:
        from runtime.checkpoints import load  # compares checksums

        try:
            stored, meta = load(source)
        except ValueError as e:
            raise InputError(str(e)) from None
        tensors = {}
        for name, tensor in stored.items():
            if name.startswith("weights/"):
                tensors[name.removeprefix("weights/")] = tensor
        step = read_json(source / "state.json")["step"]
        said = read_json(source.absolute().parent.parent / "config.json")
        said |= dict(config=meta.get("config"), data=meta.get("data_fingerprint"))
    else:
        step = read_json(source / "result.json").get("steps")
        said = read_json(source / "config.json")
        file = source / "model.safetensors"
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as e:
            raise InputError(f"{file}: cannot be read: {reason(e)}") from None
    if not isinstance(said.get("config"), dict) or not tensors:
        raise InputError(
            f"{source}: expected weights and the run's configuration, found only one of them"
        )
    environment = said.get("environment")
    commit = environment.get("git_commit") if isinstance(environment, dict) else None
    return Model(tensors, said["config"], step, said.get("data"), commit, checkpoint)


def unstack(tensors, config):
    """{exported name: view} of every element of the parameters; config: the template's.

    Raises InputError where a bank does not have the matrices that the configuration promises:
    names would be wrong.
    """
    elsewhere = config.hf_names()
    out = {}
    for name, tensor in tensors.items():
        if not tensor.numel():  # a part that is switched off
            continue
        names = elsewhere.get(name, name)
        parts = tensor
        if isinstance(names, str):
            names = [names]
            parts = [tensor]
        if len(names) != len(parts):
            raise InputError(
                f"{name} has {len(parts)} matrices, expected {len(names)} by the configuration: "
                f"{', '.join(names)}"
            )
        for matrix, part in zip(names, parts):
            out[matrix.removesuffix(".T")] = part.T if matrix.endswith(".T") else part
    elements = sum(t.numel() for t in tensors.values())
    assert sum(t.numel() for t in out.values()) == elements, "two of one name"
    return out


def describe(model, config, tokenizer):
    """config.json: sizes under the field's names, and everything else that the model is a
    function of. config: the template's."""
    fields = model.config
    [name] = [name for name, field in config.hf_names().items() if field == EMBEDDING]
    embed = model.tensors[name]
    n_vocab = None
    if tokenizer:
        n_vocab = tokenizer.n_vocab
    elif uses_gpt2(fields):
        n_vocab = 50257
    progress = 0.0
    if model.step:
        added = fields.get("extension", 0), fields.get("earlier", ())
        progress = progress_of(model.step, fields["steps"], *added)
    return dict(
        config.hf_config(progress),
        torch_dtype=str(embed.dtype).removeprefix("torch."),
        vocab_size=len(embed),
        n_vocab=n_vocab,
        bos_token_id=n_vocab and n_vocab - 1,
        max_position_embeddings=max(fields["row_len"], fields["val_row_len"]),
        weights="fp32 masters of a checkpoint" if model.masters else "of a finished run",
        step=model.step,
        git_commit=model.commit,
        data_fingerprint=model.data,
        training={name: value for name, value in fields.items() if name not in PATHS},
    )


def save_weights(tensors, folder):
    """Write safetensors of at most SHARD_BYTES, and the Hub's index if there are several."""
    shards = [[]]
    size = 0  # of the last shard
    for name in sorted(tensors):
        if shards[-1] and size + tensors[name].nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensors[name].nbytes

    total = sum(t.nbytes for t in tensors.values())
    where = {}  # name -> file
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="exporting", delay=2, disable=None)
    with bar:
        for i, names in enumerate(shards, start=1):
            file = "model.safetensors"
            if len(shards) > 1:
                file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            contiguous = {name: tensors[name].contiguous() for name in names}
            save_file(contiguous, folder / file, {"format": "pt"})
            where |= dict.fromkeys(names, file)
            bar.update(sum(tensors[name].nbytes for name in names))
    if len(shards) > 1:
        index = dict(metadata=dict(total_size=total), weight_map=where)
        write_json(folder / "model.safetensors.index.json", index)


# --------------------------------------------------------------------------------------------------
# The tokenizer


def uses_gpt2(config):
    """Whether a run's tokens are GPT-2's: its source says so, or its --tokenizer."""
    source = config.get("data")
    own = ""
    # Of this program's sources only: a folder from elsewhere must not name a module to import
    if source in sources.names():
        own = sources.find(source).tokenizer
    return (own or config.get("tokenizer")) == "gpt2"


def find_tokenizer(source):
    """The tokenizer.json of a run or of the run that a checkpoint is of; None if it has none."""
    run = source
    if (source / "state.json").exists():
        run = source.absolute().parent.parent
    file = run / "tokenizer.json"
    return file if file.exists() else None


def read_tokenizer(file):
    """The Tokenizer in a tokenizer.json. Raises InputError."""
    try:
        return Tokenizer.from_json(file.read_bytes(), file)
    except OSError as e:
        raise InputError(f"{file}: {reason(e)}; expected a run's tokenizer.json") from None


def save_tokenizer(tokenizer, folder):
    """Write what Hugging Face's library reads: the file itself, and how it is used."""
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    about = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        add_bos_token=True,
    )
    write_json(folder / "tokenizer_config.json", about)
