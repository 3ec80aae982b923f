"""./run.sh import: a Hugging Face folder becomes a run from which training goes on.

What ./run.sh export --to hf has written comes back bit for bit; so does any Llama or Qwen3 whose
parts models/llama.py has. The run has weights, configuration and tokenizer, and is what
--warm-start, sft, sample, eval, serve and export take; how it was trained it does not say.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from base import InputError, whole_file
from base.command import Parser, given_path, refuse
from base.files import sweep
from base.places import runs_folder
from data import Tokenizer
from data.config import DataConfig
from kernels import choose_ops
from models import llama
from optim import OptimConfig
from runtime.options import RunConfig

from .source import reason
from .weights import write_json

FAMILIES = ("llama", "qwen3")
EMBEDDINGS = ("embed", "lm_head")
# In files of older versions: numbers that follow from the configuration
FOLLOWS = "rotary_emb.inv_freq"


def parse(argv):
    parser = Parser(
        prog="./run.sh import",
        description="Makes a run of a Llama- or Qwen3-shaped folder as Hugging Face's transformers "
        "writes it, from which training goes on.",
        epilog="example:\n  ./run.sh import --from exported --out runs/theirs\n"
        "  ./run.sh sample --run runs/theirs",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=100),
    )
    parser.add_argument(
        "--from",
        dest="folder",
        type=given_path,
        required=True,
        metavar="FOLDER",
        help="with config.json, *.safetensors and tokenizer.json",
    )
    parser.add_argument(
        "--out",
        type=given_path,
        metavar="RUN",
        help="the run's folder, which is not there yet [runs/ and FOLDER's name]",
    )
    parser.add_argument(
        "--tokenizer",
        type=given_path,
        metavar="FILE",
        help="its tokenizer.json, where the folder has none",
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Parse, import. Returns the exit status."""
    try:
        return run(parse(argv))
    except InputError as e:
        return refuse(e)


def run(args):
    """Import, print the run's folder. Returns 0; raises InputError, and then nothing is left."""
    folder = args.folder
    out = args.out or runs_folder() / folder.absolute().name
    if os.path.lexists(out):
        raise InputError(f"{out}: is there already; choose another --out")
    said = read(folder / "config.json", "a folder as transformers writes it")
    config = config_of(folder, said)
    tokenizer = tokenizer_of(args.tokenizer or folder / "tokenizer.json")
    weights = parameters(folder, config, tokenizer)
    max_len = said.get("max_position_embeddings", 2048)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sweep(out.parent)
        with whole_file(out) as aside:
            aside.mkdir()
            save_file(weights, aside / "model.safetensors")
            (aside / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
            about = dict(environment={}, config=options(config, max_len), data=None)
            write_json(aside / "config.json", about | dict(n_vocab=tokenizer.n_vocab))
            write_json(aside / "result.json", dict(steps=1, imported=folder.absolute().name))
    except (OSError, SafetensorError) as e:
        raise InputError(f"{out}: cannot be written: {reason(e)}; nothing is left there") from None
    print(out)
    print(f"more: {go_on(config, out)}", file=sys.stderr)
    return 0


def read(path, expected):
    """A file's JSON object. Raises InputError."""
    try:
        said = json.loads(path.read_bytes())
    except OSError as e:
        raise InputError(f"{path}: {e.strerror}; expected {expected}") from None
    except ValueError as e:
        raise InputError(f"{path}: not JSON: {e}") from None
    if not isinstance(said, dict):
        raise InputError(f"{path}: expected a JSON object")
    return said


def config_of(folder, said):
    """The template's Config. Raises InputError for another family, or parts that it lacks."""
    path = folder / "config.json"
    family = said.get("model_type")
    if family not in FAMILIES:
        raise InputError(
            f"{path}: model_type {family}: expected {' or '.join(FAMILIES)}, which "
            "models/llama.py is"
        )
    try:
        return llama.Config.from_hf(said)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path}: not the configuration of a {family} ({e!r})") from None


def tokenizer_of(file):
    """The Tokenizer of a file. Raises InputError."""
    try:
        return Tokenizer.from_json(file.read_bytes(), file)
    except OSError as e:
        raise InputError(
            f"{file}: {e.strerror}; expected the model's tokenizer.json, which --tokenizer names "
            "where it lies elsewhere"
        ) from None


# --------------------------------------------------------------------------------------------------
# Weights


class Tensors:
    """The tensors of a folder by their names, read when they are asked for."""

    def __init__(self, folder):
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            self.where = read(index, "an index").get("weight_map")
            files = sorted({*(self.where or {}).values()})
            if not all(isinstance(name, str) and os.path.basename(name) == name for name in files):
                raise InputError(f"{index}: expected names of files beside it")
        else:
            files = ["model.safetensors"]
        self.files = {}
        self.where = {}
        for name in files:
            try:
                self.files[name] = safe_open(folder / name, "pt")
            except (OSError, SafetensorError) as e:
                raise InputError(
                    f"{folder / name}: cannot be read: {reason(e)}; expected safetensors (pickles "
                    "are not read)"
                ) from None
            self.where |= dict.fromkeys(self.files[name].keys(), name)
        self.asked = set()

    def take(self, name):
        """Raises InputError where it is not there."""
        if name not in self.where:
            raise InputError(f"{self.folder}: has no {name}, which its config.json promises")
        self.asked.add(name)
        return self.files[self.where[name]].get_tensor(name)

    def left(self):
        """Names that nobody asked for."""
        return sorted(self.where.keys() - self.asked)


def parameters(folder, config, tokenizer):
    """{parameter: tensor} of the template. Raises InputError for what does not fit."""
    n_vocab = tokenizer.n_vocab
    with torch.device("meta"):
        model = llama.Model(config, n_vocab, 1, torch.float32, choose_ops("cpu"))
    tensors = Tensors(folder)
    names = config.hf_names()
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.numel():  # a part that is switched off
            found[name] = torch.zeros(parameter.shape)
            continue
        theirs = names[name]
        if isinstance(theirs, str):
            tensor = tensors.take(theirs)
        else:
            parts = []
            for part in theirs:
                tensor = tensors.take(part.removesuffix(".T"))
                parts.append(tensor.T if part.endswith(".T") else tensor)
            shapes = {tuple(part.shape) for part in parts}
            if len(shapes) > 1:
                raise InputError(f"{folder}: {theirs[0]} and others like it differ in shape")
            tensor = torch.stack(parts)
        if name in EMBEDDINGS:
            tensor = rows(tensor, n_vocab, len(parameter), f"{folder}: {theirs}")
        if tensor.shape != parameter.shape:
            raise InputError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, where its config.json promises "
                f"{tuple(parameter.shape)}"
            )
        if not tensor.is_floating_point():
            raise InputError(f"{folder}: {name} is {tensor.dtype}; expected floating point")
        found[name] = tensor
    same_dtype(found, model)
    refuse_more(folder, tensors, config)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def rows(table, n_vocab, n_rows, where):
    """A table with the rows of ours: those beyond the tokens may be more or fewer. Raises
    InputError where there are fewer than tokens."""
    if len(table) < n_vocab:
        raise InputError(
            f"{where} has {len(table)} rows, the tokenizer {n_vocab} tokens; expected the "
            "tokenizer that the model was trained with"
        )
    if len(table) >= n_rows:
        return table[:n_rows]
    more = torch.zeros(n_rows - len(table), table.size(1), dtype=table.dtype)
    return torch.cat([table, more])


def same_dtype(found, model):
    """Large parameters in one dtype, small ones in fp32, as in a run."""
    large = found["embed"].dtype
    small = {"attn_norms", "mlp_norms", "final_norm", "q_norms", "k_norms"}
    for name, tensor in found.items():
        found[name] = tensor.to(torch.float32 if name in small else large)


def refuse_more(folder, tensors, config):
    """Raises InputError for weights that the template has no place for."""
    left = [name for name in tensors.left() if not name.endswith(FOLLOWS)]
    if config.tied_embeddings and left == ["lm_head.weight"]:
        head = tensors.take("lm_head.weight")
        if torch.equal(head, tensors.take("model.embed_tokens.weight")):
            return
        raise InputError(
            f"{folder}: lm_head.weight differs from the embedding, though config.json says that "
            "they are tied (tie_word_embeddings)"
        )
    if left:
        raise InputError(
            f"{folder}: {left[0]} and {len(left) - 1} other tensors have no place in "
            "models/llama.py"
        )


# --------------------------------------------------------------------------------------------------
# The run


def options(config, max_len):
    """config.json's options: the model's, and what a run has besides."""
    fields = {}
    for cls in DataConfig, OptimConfig, RunConfig:
        fields |= {f.name: f.default for f in dataclasses.fields(cls)}
    for name in "data", "tokenizer", "run_dir", "cache_dir":  # which nothing says
        del fields[name]
    fields |= dataclasses.asdict(config)
    return fields | dict(
        track="",
        template="llama",
        seed=0,
        steps=1,
        extension=0,
        earlier=(),
        row_len=max_len,
        val_row_len=max_len,
        max_doc_len=(max_len,),
    )


def go_on(config, out):
    """A command that trains on."""
    words = ["./run.sh", "--warm-start", str(out), "--template", "llama"]
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        dashed = f"--{f.name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(dashed if value else f"--no-{dashed[2:]}")
        else:
            words += [dashed, str(value)]
    return shlex.join([*words, "--text", "FILE"])
