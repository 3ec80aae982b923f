"""A folder from which torchtitan trains on: docs/torchtitan.md.

model.safetensors      or model-00001-of-0000N.safetensors and model.safetensors.index.json,
                       which PyTorch's distributed checkpoints read
config.json            sizes, and the whole configuration the model was trained with
tokenizer.json         and tokenizer_config.json, for Hugging Face's tokenizers
"""

import sys

from records.add import PATHS

from .source import uses_gpt2
from .tokenizer import save_tokenizer
from .weights import save_weights, write_json


def check(exported, args):
    """Nothing is refused: what torchtitan has no model for can be written for it."""
    if exported.tokenizer is None:
        why = "the run has no tokenizer.json; name one with --tokenizer"
        if uses_gpt2(exported.model.fields):
            why = "GPT-2's is on the Hub as openai-community/gpt2"
        print(f"no tokenizer is written: {why}", file=sys.stderr)


def n_bytes(exported, args):
    return sum(t.nbytes for t in exported.tensors.values())


def write(exported, folder, args):
    """Write the folder's files."""
    folder.mkdir()
    write_json(folder / "config.json", describe(exported))
    if exported.tokenizer is not None:
        save_tokenizer(exported.tokenizer, exported.tokenizer_json, exported.model.max_len, folder)
    save_weights(exported.tensors, folder)


def describe(exported):
    """config.json: sizes under the field's names, and everything else that the model is a
    function of."""
    model = exported.model
    config = {name: value for name, value in exported.config.items() if name != "auto_map"}
    return config | dict(
        n_vocab=model.n_vocab,
        weights="fp32 masters of a checkpoint" if model.masters else "of a finished run",
        step=model.step,
        git_commit=model.commit,
        data_fingerprint=model.data,
        training={name: value for name, value in model.fields.items() if name not in PATHS},
    )
