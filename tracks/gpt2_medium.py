"""gpt2-medium: FineWeb with GPT-2's tokens to 2.92, the task of the public record's second track
(modded-nanogpt).

Steps, cool-down and the untied fraction are that track's (4,740 steps, 17.35 minutes on 8 H100);
its twelve stages are four here, each with a graph of its own. Not measured yet on a GPU.
"""

from tracks.gpt2_small import TRACK

TRACK = TRACK | dict(
    target=2.92,
    train_shards=26,
    n_layer=16,
    n_embd=1024,
    n_head=8,
    value_embed_layers=(1, 2, 13, 14, 15),
    paired_layers=(0, 3, 8, 13),
    # Track 2's record has none of these later parts
    attn_gate_layers=(),
    xsa_layers=(),
    attn_input=-1,
    sublayer_lambdas=False,
    inject=False,
    mudd=(),
    mudd_gates=-1,
    skip=(4, 9),
    backout=11,
    long_layers=(4, 7, 11),
    ngram_rows=201_216,
    steps=4740,
    extension=40,
    batch_tokens=(262_144, 524_288, 524_288, 524_288),
    stage_lr=(1.0, 1.4, 1.4, 1.4),
    max_doc_len=(2048, 4096, 4096, 4096),
    short_window=(384, 896, 1280, 1408),
    long_window=(896, 1920, 2560, 2944),
    extension_windows=(),
    val_windows=(1408, 3456),
    mtp=(3, 2, 1, 1),
    prefix_loss=(0.25, 0.25, 0.0, 0.0),
    tied=1 / 6,
    cooldown=0.7,
    eval_every=500,
)
