"""A folder as on the Hugging Face Hub, which transformers loads, versions 4 and 5.

    config.json            model-00001-of-0000N.safetensors, or model.safetensors
    tokenizer.json         tokenizer_config.json, generation_config.json
    README.md              the model card
    modeling_stopwatch.py  of models that transformers has no class for

docs/export.md says what is in them.
"""

import shutil
from pathlib import Path

from base import InputError
from data.chat import END
from runtime.saved import read_tables

from .card import model_card
from .source import EMBEDDING
from .tokenizer import PADDING, can_chat, save_tokenizer, special_tokens
from .weights import save_weights, write_json

HERE = Path(__file__).parent
FAMILIES = ("llama", "qwen3")  # that transformers and llama.cpp have classes for
# Of the speedrun's template: what modeling_stopwatch.py has, besides model.* and the head
PARTS = {
    "lambdas",
    "residual_lambdas",
    "post_lambdas",
    "inject_lambdas",
    "scalars",
    "qkvo_scales",
    "smear_gate",
    "xsa_strengths",
    "mudd_in",
    "mudd_out",
    "mudd_gate_in",
    "mudd_gate_out",
    "mudd_gate_scale",
    "ngram_embeds",
    "mix_gates",
    "mix_counts",
}
TABLES = ("embed_tokens.weight", "value_embed.weight", "lm_head.weight")  # a row for each token


def check(exported, args):
    """Raises InputError for what cannot be written so that it loads elsewhere."""
    model = exported.model
    if exported.tokenizer is None:
        raise InputError(
            f"{model.run}: has no tokenizer.json, without which nobody can use the model; name "
            "one with --tokenizer"
        )
    if "auto_map" in exported.config:
        known = (*PARTS, "lm_head.weight")
        for name in exported.tensors:
            if name not in known and not name.startswith("model."):
                raise InputError(
                    f"{model.source}: its part {name} is not in modeling_stopwatch.py; expected a "
                    "run of this version. --to torchtitan writes all tensors as they are"
                )
    elif exported.config["model_type"] not in FAMILIES:
        raise InputError(
            f"{model.source}: a template of the family {exported.config['model_type']}, which "
            f"transformers has no class for; expected {' or '.join(FAMILIES)}, or a template whose "
            "hf_config() names a modelling file. --to torchtitan writes its tensors as they are"
        )


def n_bytes(exported, args):
    return sum(t.nbytes for t in exported.tensors.values())


def write(exported, folder, args):
    """Write the folder's files."""
    folder.mkdir()
    tensors, config = whole_model(exported)
    for name in modules(config):
        shutil.copyfile(HERE / f"{name}.py", folder / f"{name}.py")
    eot = exported.tokenizer.eot
    write_json(folder / "config.json", config | dict(eos_token_id=eot))
    write_json(folder / "generation_config.json", generation_config(exported, config))
    save_tokenizer(exported.tokenizer, exported.tokenizer_json, exported.model.max_len, folder)
    card = model_card(exported, config, args.licence)
    (folder / "README.md").write_text(card, encoding="utf-8")
    save_weights(tensors, folder)


def modules(config):
    """Names of the modelling files that a configuration asks for."""
    return sorted({place.split(".")[0] for place in config.get("auto_map", {}).values()})


def whole_model(exported):
    """(tensors, configuration) as transformers has them.

    Llama and Qwen3 keep the rows that pad the table, so that training goes on with the same
    numbers; the speedrun's model has no such rows elsewhere, and two tables also where it uses one.
    """
    config = dict(exported.config)
    tensors = dict(exported.tensors)
    if not modules(config):
        return tensors, config
    if config["tie_word_embeddings"]:
        tensors[EMBEDDING] = tensors["lm_head.weight"].clone()
        config["tie_word_embeddings"] = False
    if config["counts"]:
        config["counts_sizes"] = add_counts(tensors, exported.model.run, config["counts"])
    n_vocab = exported.tokenizer.n_vocab
    for name in tensors:
        if name.endswith(TABLES):
            tensors[name] = tensors[name][:n_vocab]
    return tensors, config | dict(vocab_size=n_vocab)


def add_counts(tensors, run, n):
    """Add the counts of the training text to the tensors, under the names that
    modeling_stopwatch.py has; returns the sizes of the tables. Raises InputError."""
    counts = read_tables(run)
    sizes = []
    for i in range(n):
        sizes.append([len(counts[f"first.{i}"]) - 1, len(counts[f"follower.{i}"])])
        for name in "first", "follower", "count":
            tensors[f"counts.{i}.{name}"] = counts[f"{name}.{i}"]
    return sizes


def generation_config(exported, config):
    """How text is drawn where nobody says it."""
    eot = exported.tokenizer.eot
    special = special_tokens(exported.tokenizer_json)
    ends = [eot]
    if can_chat(exported.tokenizer_json):
        ends.append(special[END])
    said = dict(
        bos_token_id=eot,
        eos_token_id=ends if len(ends) > 1 else eot,
        pad_token_id=special.get(PADDING, eot),
    )
    padding = range(exported.tokenizer.n_vocab, config["vocab_size"])
    if padding:
        said["suppress_tokens"] = list(padding)
    return said
