"""gpt2-small: FineWeb with GPT-2's tokens to 3.28, the task of the public record (modded-nanogpt, track 1).

The loss is the mean cross-entropy over the first 10,485,760 tokens of the validation shard. The batch is the same on
any number of GPUs. Schedules follow the record's three stages; without its whole recipe more steps are needed than
its 1,285. Not measured yet on a GPU.
"""

TRACK = dict(
    target=3.28,
    data="fineweb10B", tokenizer="gpt2", train_shards=9, long_docs="drop", shuffle=False, val_tokens=10_485_760,
    n_layer=11, n_embd=768, n_head=6, value_embed_layers=(1, 2, 8, 9, 10), softcap=(23.0, 5.0, 7.5),
    row_len=16384, val_row_len=65536,
    steps=2600, batch_tokens=(131_072, 262_144, 393_216), stage_lr=(1.0, 1.52, 1.73), max_doc_len=(896, 2048, 2048),
    short_window=(128, 384, 640), long_window=(384, 896, 1408), val_windows=(768, 2560), eval_every=250,
)
