"""gpt2-small: FineWeb with GPT-2's tokens to 3.28, the task of the public record (modded-nanogpt,
track 1).

The loss is the mean cross-entropy over the first 10,485,760 tokens of the validation shard. The
batch is the same on any number of GPUs. Batch sizes, learning rates and windows follow the record's
stages, stretched from its 1,285 steps to 1,600: its model has parts that this one lacks (one saved
activation for late layers, MUDD, XSA, prefix loss and others), and counted part by part this recipe
needs 1,550 to 1,680 steps for 3.28. That is an estimate: it has not been run to the end yet.
"""

TRACK = dict(
    target=3.28,
    data="fineweb10B",
    tokenizer="gpt2",
    train_shards=9,
    long_docs="drop",
    shuffle=False,
    val_tokens=10_485_760,
    n_layer=11,
    n_embd=768,
    n_head=6,
    softcap=(23.0, 5.0, 7.5),
    attn_scale=1.13,
    value_embed_layers=(1, 2, 8, 9, 10),
    n_gram=2,
    ngram_rows=377_280,
    ngram_signs=True,
    smear=True,
    attn_gate=True,
    key_offset=True,
    paired_layers=(0, 2, 5, 9),
    skip=(3, 6),
    backout=7,
    row_len=16384,
    # As long as the record's: each row's start cuts a document's context, which would cost 0.001
    val_row_len=262_144,
    long_layers=(3,),
    steps=1600,
    extension=15,
    batch_tokens=(131_072, 262_144, 393_216),
    stage_lr=(1.0, 1.52, 1.73),
    max_doc_len=(896, 2048, 2048),
    short_window=(128, 384, 640),
    long_window=(384, 896, 1408),
    extension_windows=(768, 1664),
    val_windows=(768, 2560),
    yarn=True,
    mtp=(3, 2, 1),
    prefix_loss=(0.25, 0.25, 0.0),
    tied=2 / 3,
    momentum_warmup=0.2333,
    muon_lr=0.023,
    weight_decay=1.2,
    normuon=True,
    muon_head_pairs=True,
    mlp_down_lr=2.0,
    decay_by_shape=True,
    head_betas=(0.5, 0.95),
    adam_every=2,
    fp8="auto",
    eval_every=250,
    sample_prompts=("The capital of France is", "Once upon a time", "The best way to"),
)
