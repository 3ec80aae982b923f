"""A GGUF file, which llama.cpp and what is built on it load.

One file holds sizes, tokenizer, template of a conversation and weights: version 3, little-endian.
It is written by the package `gguf`; what stands in it is decided here.

Of the architectures that llama.cpp knows, `llama` turns neighbouring dimensions of queries and keys
with their positions, `qwen3` dimension j with j + D / 2, as we do. So rows of q and k change places
for `llama`, head by head, and nothing would notice if they did not: the model would only be worse.

Source: the format as in gguf's constants.py and llama.cpp's src/llama-model.cpp; blocks of q8_0 and
q4_0 as in gguf's quants.py.
"""

import dataclasses
import re

from tqdm import tqdm

from base import InputError
from data.chat import END
from data.tokenizers import GPT2_PATTERN, QWEN2_PATTERN, Tokenizer, trained_merges
from models.llama import rope_frequencies

from .hf import FAMILIES, TABLES
from .tokenizer import CHAT_TEMPLATE, PADDING, can_chat, special_tokens

# Of the numbers: the field's names of files that have them
FILE_TYPES = dict(f32="ALL_F32", f16="MOSTLY_F16", q8_0="MOSTLY_Q8_0", q4_0="MOSTLY_Q4_0")
TYPES = tuple(FILE_TYPES)
BLOCK = 32  # numbers that share a scale in q8_0 and q4_0
# What llama.cpp splits text by before it merges, under its names
SPLITS = {QWEN2_PATTERN: "qwen2", GPT2_PATTERN: "gpt-2"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # types of tokens

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
IN_LAYERS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def check(exported, args):
    """Raises InputError for what llama.cpp has no words for."""
    kind = kind_of(args)
    if kind not in TYPES:
        raise InputError(f"--type {kind}: expected {', '.join(TYPES[:-1])} or {TYPES[-1]}")
    model = exported.model
    config = exported.config
    if config["model_type"] not in FAMILIES:
        raise InputError(
            f"{model.source}: its template {model.fields.get('template')} has parts that llama.cpp "
            f"cannot compute ({', '.join(own_parts(config)) or config['model_type']}); --to hf "
            "writes a folder that transformers loads, and --template llama trains a model for GGUF"
        )
    if exported.tokenizer is None:
        raise InputError(f"{model.run}: has no tokenizer.json; name one with --tokenizer")
    check_tokenizer(exported)


def kind_of(args):
    return args.type or "f16"


def own_parts(config):
    """The parts of a speedrun's model, in words."""
    names = dict(
        value_embed_layers="value embeddings",
        output_gate_layers="gates on heads",
        key_offset_layers="key offset",
        smear="smear",
        paired_layers="paired heads",
        skip="skip",
        softcap="softcap",
        copies="copies",
        counts="counts of the training text",
    )
    found = [words for name, words in names.items() if config.get(name)]
    if config.get("n_gram", 1) > 1:
        found.append("n-grams")
    if config.get("hidden_act") == "relu2":
        found.append("ReLU squared")
    return found


def check_tokenizer(exported):
    """Raises InputError for a tokenizer that llama.cpp would read otherwise."""
    said = exported.tokenizer_json
    model = exported.model
    where = f"{model.run}: its tokenizer ({model.fields.get('tokenizer')})"
    advice = "it reads those of training with --tokenizer qwen2:N or gpt2"
    if said["model"]["type"] != "BPE":
        raise InputError(
            f"{where} has a token for each character, which llama.cpp has no form for; {advice}"
        )
    patterns = patterns_of(said["pre_tokenizer"])
    if len(patterns) != 1 or patterns[0] not in SPLITS:
        how = ", then ".join(p or "not by a pattern" for p in patterns) or "not at all"
        raise InputError(
            f"{where} splits text in a way that llama.cpp does not have ({how}); {advice}"
        )
    if said["normalizer"]:
        raise InputError(f"{where} normalizes text, which llama.cpp never does; {advice}")
    if added := words_only(said):
        raise InputError(
            f"{where} looks for {added[0]!r} as a word, or with the spaces beside it, which "
            f"llama.cpp does not; {advice}"
        )
    if lost := unmerged(exported):
        raise InputError(
            f"{where} has {len(lost)} tokens that no merges lead to, such as {lost[0]!r}, which "
            f"llama.cpp would never write; {advice}"
        )


def patterns_of(pre_tokenizer):
    """What a pre-tokenizer splits text by, one after the other, before it writes bytes as
    characters; None for each step that does something else, such as to split off digits."""
    *splits, last = (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}]
    found = []
    for step in splits:
        # Matches, and what is between them, as pieces; these patterns leave nothing between them
        how = step.get("behavior"), step.get("invert")
        plain = step["type"] == "Split" and how in (("Isolated", False), ("Removed", True))
        found.append(step["pattern"].get("Regex") if plain else None)
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        found.append(None)
    elif last.get("use_regex", True):
        found.append(GPT2_PATTERN)
    return found


def words_only(said):
    """Added tokens that are looked for in text, but not everywhere, or with the spaces beside
    them."""
    where = "single_word", "lstrip", "rstrip"
    added = (token for token in said["added_tokens"] if not token["special"])
    return [token["content"] for token in added if any(token.get(key) for key in where)]


def unmerged(exported):
    """Tokens that merging their own bytes does not give."""
    from tokenizers import models

    said = exported.tokenizer_json
    vocabulary = said["model"]["vocab"]
    plain = models.BPE(vocabulary, merges(exported))
    special = special_tokens(said)
    return [
        token
        for token, i in vocabulary.items()
        if token not in special and [t.id for t in plain.tokenize(token)] != [i]
    ]


def merges(exported):
    """[(left, right), ...]. Our own tokenizer.json has all pairs that make a token, in the order of
    tokens, as tiktoken merges; llama.cpp needs those of training."""
    said = exported.tokenizer_json["model"]
    if said.get("ignore_merges") and isinstance(exported.tokenizer, Tokenizer):
        return trained_merges(exported.tokenizer.tokens)
    return [tuple(m.split(" ") if isinstance(m, str) else m) for m in said["merges"]]


# --------------------------------------------------------------------------------------------------
# Writing


def n_bytes(exported, args):
    kind = kind_of(args)
    return sum(size_of(t.shape, type_of(name, t.shape, kind)) for name, t in tables(exported))


def tables(exported):
    """(name, tensor) of each that is written: of a table only the rows that are tokens, so that no
    other is ever chosen."""
    n_vocab = exported.tokenizer.n_vocab
    for name, tensor in exported.tensors.items():
        yield name, tensor[:n_vocab] if name.endswith(TABLES) else tensor


def write(exported, path, args):
    """Write the file."""
    import gguf  # of requirements-export.txt

    kind = kind_of(args)
    writer = gguf.GGUFWriter(path, exported.config["model_type"])
    describe(writer, exported, kind, gguf)
    describe_tokenizer(writer, exported)
    tensors = dict(tables(exported))
    factors = rope_factors(exported.template)
    if factors is not None:
        tensors["rope_freqs"] = factors

    # Header first, then each tensor is turned into its type while it is written
    for name, tensor in tensors.items():
        own = type_of(name, tensor.shape, kind)
        writer.add_tensor_info(
            gguf_name(name),
            tensor.shape,
            "float32",  # which says nothing where raw_dtype does
            size_of(tensor.shape, own),
            raw_dtype=gguf.GGMLQuantizationType[own.upper()],
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    total = sum(t.numel() for t in tensors.values())
    with tqdm(total=total, unit="", unit_scale=True, desc=kind, delay=2, disable=None) as bar:
        for name, tensor in tensors.items():
            numbers = arranged(name, tensor, exported.config).float().contiguous().numpy()
            own = gguf.GGMLQuantizationType[type_of(name, tensor.shape, kind).upper()]
            writer.write_tensor_data(gguf.quants.quantize(numbers, own))
            bar.update(tensor.numel())
    writer.close()


def describe(writer, exported, kind, gguf):
    """Sizes: every key whose default could be another one is written."""
    config = exported.config
    writer.add_type("model")
    writer.add_name(exported.model.run.absolute().name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(exported.tokenizer.n_vocab)
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling["rope_type"]))
        writer.add_rope_scaling_factor(scaling["factor"])
        if "original_max_position_embeddings" in scaling:
            writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])


def rope_factors(template):
    """(D / 2,) by which llama.cpp divides frequencies, for the scaling that it has no name for;
    else None. template: the template's configuration."""
    if template.rope_scaling != "llama3":
        return None
    plain, _ = rope_frequencies(dataclasses.replace(template, rope_scaling="none"))
    scaled, _ = rope_frequencies(template)
    return plain / scaled


def describe_tokenizer(writer, exported):
    """Tokens, their types, merges, and which ones begin and end a text."""
    said = exported.tokenizer_json
    special = special_tokens(said)
    tokens = {i: token for token, i in said["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for added in said["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    # An id that nothing has is a row of the table all the same, and has to be named
    for i in range(exported.tokenizer.n_vocab):
        if i not in tokens:
            tokens[i] = f"[PAD{i}]"
            types[i] = UNUSED
    order = range(len(tokens))
    [pattern] = patterns_of(said["pre_tokenizer"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(SPLITS[pattern])
    writer.add_token_list([tokens[i] for i in order])
    writer.add_token_types([types[i] for i in order])
    writer.add_token_merges([" ".join(pair) for pair in merges(exported)])
    eot = exported.tokenizer.eot
    writer.add_bos_token_id(eot)
    writer.add_eos_token_id(eot)
    writer.add_pad_token_id(special.get(PADDING, eot))
    writer.add_add_bos_token(True)  # every document begins with it
    if can_chat(said):
        writer.add_eot_token_id(special[END])
        writer.add_chat_template(plain_template())


def plain_template():
    """The chat template without the marks for those who train."""
    return re.sub(r"\{%-? *(end)?generation *-?%\}", "", CHAT_TEMPLATE)


# --------------------------------------------------------------------------------------------------
# Tensors


def gguf_name(name):
    """llama.cpp's name of a tensor."""
    if name == "rope_freqs":
        return "rope_freqs.weight"
    if name in NAMES:
        return NAMES[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{IN_LAYERS[part]}.weight"


def type_of(name, shape, kind):
    """The type of one tensor in a file of this kind.

    Vectors are fp32 in every file. In q4_0 embeddings and head have 8 bits: they are a large part
    of a small model, and the part that feels it. Where a row is no multiple of a block, it is f16.
    """
    if len(shape) < 2 or kind == "f32":
        return "f32"
    if kind.startswith("q") and shape[-1] % BLOCK:
        return "f16"
    if kind == "q4_0" and name in NAMES:
        return "q8_0"
    return kind


def size_of(shape, kind):
    """Bytes of a tensor."""
    n = shape.numel()
    return dict(f32=4 * n, f16=2 * n, q8_0=n // BLOCK * 34, q4_0=n // BLOCK * 18)[kind]


def arranged(name, tensor, config):
    """Rows of q and k of a Llama in the order in which llama.cpp turns them; else the tensor."""
    if config["model_type"] != "llama":
        return tensor
    if name.endswith("q_proj.weight"):
        return neighbours(tensor, config["num_attention_heads"])
    if name.endswith("k_proj.weight"):
        return neighbours(tensor, config["num_key_value_heads"])
    return tensor


def neighbours(w, n_heads):
    """(heads D, C): row j of a head and row j + D / 2 become neighbours."""
    return w.view(n_heads, 2, -1, w.size(-1)).transpose(1, 2).reshape(w.shape)
