"""llama-126m: 125,946,624 parameters on the 655 million tokens of llama-286m."""

from tracks.llama_20m import TRACK

TRACK = TRACK | dict(
    train_shards=7,
    row_len=2048,
    val_row_len=2048,
    max_doc_len=(2048,),
    n_layer=12,
    n_embd=768,
    n_head=12,
    n_kv_head=2,
    ffn_dim=2560,
    steps=10_000,
    batch_tokens=(65_536,),
    adamw_lr=6e-4,
    adamw_warmup=500,
)
