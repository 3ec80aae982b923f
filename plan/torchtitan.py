"""A configuration of torchtitan for a track of the llama template: for more GPUs than one machine
has, where torchtitan shards what ours would keep whole.

    ./run.sh plan --track llama-1b --hardware 32xh100 --torchtitan big/titan_1b.py
    PYTHONPATH=big torchrun --nnodes=4 --nproc_per_node=8 -m torchtitan.train \\
        --module titan_1b --config run

Written for torchtitan 0.3.0, whose model this is, parameter by parameter: a test counts them there.
"""

from base import InputError, write_text

VERSION = "0.3.0"

# Between double braces: what is Python's own; the rest comes from the plan
TEXT = '''"""{track} for torchtitan {version}: written by Stopwatch's ./run.sh plan --torchtitan.

    torchrun --nnodes=N --nproc_per_node=8 -m torchtitan.train --module {module} --config run

{params:,} parameters, {tokens:,} tokens in {steps:,} steps of {batch_tokens:,}. To fill in: what
stands in capitals below. The optimizer is torchtitan's AdamW, at the learning rate of ours.
"""

from functools import partial

import torch.nn as nn
from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import SelectiveAC
from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.models.common import {rope} as RoPE
from torchtitan.models.common import Embedding, Linear, RMSNorm
from torchtitan.models.common.config_utils import (
    decoder_vocab_size,
    get_attention_config,
    make_ffn_config,
    make_gqa_config,
)
from torchtitan.models.{family} import {parallelize} as parallelize
from torchtitan.models.{family}.model import {name}Model as Model
from torchtitan.models.{family}.model import {name}TransformerBlock as Block
from torchtitan.models.{family}.state_dict_adapter import {name}StateDictAdapter as Adapter
from torchtitan.protocols.model_spec import ModelSpec
from torchtitan.trainer import Trainer

# A folder of ./run.sh export --to torchtitan or --to hf: tokenizer and weights
ASSETS = "/path/to/exported"
WEIGHTS = ""  # the same folder, to go on from its weights; empty begins anew
DATASET = "c4"  # one that torchtitan knows

LINEAR = {{"weight": partial(nn.init.trunc_normal_, std=0.02), "bias": nn.init.zeros_}}
ONES = {{"weight": nn.init.ones_}}


def norm(width):
    return RMSNorm.Config(normalized_shape=width, eps={norm_eps}, param_init=ONES)


def model(attention="flex"):
    width = {n_embd}
    vocabulary = {n_vocab}
    layers = []
    for _ in range({n_layer}):
        block = Block.Config(
            attention_norm=norm(width),
            ffn_norm=norm(width),
            attention=make_gqa_config(
                dim=width,
                n_heads={n_head},
                n_kv_heads={n_kv_head},
                head_dim={head_dim},
                wqkv_param_init=LINEAR,
                wo_param_init=LINEAR,
                inner_attention=get_attention_config(attention),
                fuse_qkv=True,
                rope=RoPE.Config(dim={head_dim}, max_seq_len={row_len}, theta={rope_theta}),
                qk_norm={qk_norm},
            ),
            feed_forward=make_ffn_config(
                dim=width, hidden_dim={ffn}, w1_param_init=LINEAR, w2w3_param_init=LINEAR
            ),
        )
        layers.append(block)
    return Model.Config(
        dim=width,
        vocab_size=vocabulary,
        enable_weight_tying={tied},
        tok_embeddings=Embedding.Config(
            num_embeddings=vocabulary,
            embedding_dim=width,
            param_init={{"weight": partial(nn.init.normal_, std=0.02)}},
        ),
        norm=norm(width),
        lm_head=Linear.Config(in_features=width, out_features=vocabulary, param_init=LINEAR),
        layers=layers,
    )


def run() -> Trainer.Config:
    spec = ModelSpec(
        name="{family}",
        flavor="{track}",
        model=model(),
        parallelize_fn=parallelize,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=Adapter,
    )
    loss = CrossEntropyLoss.Config(global_vocab_size=decoder_vocab_size(spec))
    return Trainer.Config(
        loss=ChunkedLossWrapper.Config(loss_fn=loss),
        hf_assets_path=ASSETS,
        model_spec=spec,
        optimizer=default_adamw(lr={lr}),
        lr_scheduler=LRSchedulersContainer.Config(
            warmup_steps={warmup}, decay_ratio=0.9, decay_type="cosine", min_lr_factor=0.1
        ),
        training=TrainingConfig(
            local_batch_size={local_batch},
            global_batch_size={global_batch},
            seq_len={row_len},
            steps={steps},
        ),
        # Weights, gradients and moments are divided inside a machine, copies across machines
        parallelism=ParallelismConfig(
            data_parallel_shard_degree={shard}, data_parallel_replicate_degree={replicate}
        ),
        dataloader=HuggingFaceTextDataLoader.Config(dataset=DATASET),
        metrics=MetricsProcessor.Config(log_freq=10),
        activation_checkpoint=SelectiveAC.Config(),
        checkpoint=CheckpointManager.Config(
            enable=True,
            interval=1000,
            initial_load_path=WEIGHTS or None,
            initial_load_in_hf=bool(WEIGHTS),
        ),
    )
'''


def text_of(config, plan, place, module):
    """The module's text. Raises InputError for a template that torchtitan has no model for."""
    if config.goal.template != "llama":
        raise InputError(
            f"--torchtitan: track {config.goal.track} is of template {config.goal.template}, which "
            "torchtitan has no model for; docs/torchtitan.md says what would have to be written"
        )
    c = config.model
    if c.rope_scaling != "none":
        raise InputError(f"--torchtitan: --rope-scaling {c.rope_scaling}: expected none there")
    node = min(place.count, place.hardware.node)
    if place.count % node:
        raise InputError(
            f"--hardware {place.count}x{place.hardware.name}: expected whole machines of {node}"
        )
    rows = max(config.schedule.batch_tokens) // config.data.row_len
    if rows % place.count:
        raise InputError(
            f"--hardware {place.count}x{place.hardware.name}: expected a number of GPUs that "
            f"divides the {rows} rows of a batch; --batch-tokens makes it larger"
        )
    qwen = c.qk_norm
    return TEXT.format(
        version=VERSION,
        module=module,
        track=plan["track"],
        params=plan["params"],
        tokens=plan["tokens"],
        batch_tokens=plan["batch_tokens"],
        rope="CosSinRoPE" if qwen else "ComplexRoPE",
        family="qwen3" if qwen else "llama3",
        name="Qwen3" if qwen else "Llama3",
        parallelize="parallelize_qwen3" if qwen else "parallelize_llama",
        n_embd=c.n_embd,
        n_vocab=-(-plan["n_vocab"] // 64) * 64,  # as the template pads it
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_kv_head=c.kv_heads,
        head_dim=c.head_dim,
        ffn=c.ffn,
        tied=c.tied_embeddings,
        norm_eps=c.norm_eps,
        rope_theta=c.rope_theta,
        qk_norm=f"norm({c.head_dim})" if qwen else "None",
        row_len=config.data.row_len,
        local_batch=rows // place.count,
        global_batch=rows,
        steps=plan["steps"],
        lr=getattr(config.optim, "adamw_lr", 3e-4),
        warmup=getattr(config.optim, "adamw_warmup", 1000),
        shard=node,
        replicate=place.count // node,
    )


def write(path, config, plan, place):
    """Write the module. Raises InputError."""
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise InputError(f"--torchtitan {path}: expected a module's name that ends in .py")
    text = text_of(config, plan, place, path.stem)
    try:
        write_text(path, text)
    except OSError as e:
        raise InputError(f"--torchtitan {path}: {e.strerror}") from None
