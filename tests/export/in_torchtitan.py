"""What torchtitan makes of an exported folder, by its own models, adapters and storage reader, as a
program of its own: python in_torchtitan.py FOLDER REFERENCE.json

One line of JSON has the largest difference of its logits to those in REFERENCE.json.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torchtitan.models import llama3, qwen3
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm


def model_config(said):
    """The configuration of torchtitan's model, by its own builders."""
    dim = said["hidden_size"]
    family = llama3 if said["model_type"] == "llama" else qwen3
    build = llama3._build_llama3_layers if family is llama3 else qwen3._build_qwen3_layers
    rope = (ComplexRoPE if family is llama3 else CosSinRoPE).Config(
        dim=said["head_dim"],
        max_seq_len=said["max_position_embeddings"],
        theta=said["rope_theta"],
    )
    shape = dict(
        n_layers=said["num_hidden_layers"],
        dim=dim,
        n_heads=said["num_attention_heads"],
        n_kv_heads=said["num_key_value_heads"],
        hidden_dim=said["intermediate_size"],
        fuse_qkv=False,
        rope=rope,
        attn_backend="flex",
    )
    if family is qwen3:
        shape["head_dim"] = said["head_dim"]
    cls = llama3.Llama3Model if family is llama3 else qwen3.Qwen3Model
    rows = said["vocab_size"]
    none = {"weight": torch.nn.init.ones_}
    return cls.Config(
        dim=dim,
        vocab_size=rows,
        enable_weight_tying=said["tie_word_embeddings"],
        tok_embeddings=Embedding.Config(num_embeddings=rows, embedding_dim=dim, param_init=none),
        norm=RMSNorm.Config(normalized_shape=dim, eps=said["rms_norm_eps"], param_init=none),
        lm_head=Linear.Config(in_features=dim, out_features=rows, param_init=none),
        layers=build(**shape),
    )


def main(folder, reference):
    said = json.loads(Path(folder, "config.json").read_text())
    config = model_config(said)
    for layer in config.layers:
        for norm in layer.attention_norm, layer.ffn_norm:
            norm.eps = said["rms_norm_eps"]
    model = config.build()
    model.init_states(buffer_device=torch.device("cpu"))

    # As its checkpointer does with initial_load_in_hf
    family = llama3 if said["model_type"] == "llama" else qwen3
    adapters = dict(llama3="Llama3StateDictAdapter", qwen3="Qwen3StateDictAdapter")
    adapter = getattr(family, adapters[family.__name__.split(".")[-1]])(config, folder)
    state = adapter.to_hf(model.state_dict())
    dcp.load(state, storage_reader=adapter.get_hf_storage_reader(folder), no_dist=True)
    model.load_state_dict(adapter.from_hf(state))

    expected = json.loads(Path(reference).read_text())
    with torch.no_grad():
        inputs = torch.tensor(expected["inputs"])
        positions = torch.arange(inputs.size(1)).expand_as(inputs)
        masks = model.get_attention_masks(positions)
        logits = model.eval()(inputs, positions, masks)
    n = len(expected["logits"][0][0])
    difference = (logits[..., :n].float() - torch.tensor(expected["logits"])).abs().max()
    print(json.dumps(dict(difference=difference.item(), tensors=len(state))))


if __name__ == "__main__":
    main(*sys.argv[1:])
