"""llama-50m: the ladder's second step, 49,881,600 parameters, 20 tokens of FineWeb for each."""

from tracks.llama_20m import TRACK

TRACK = TRACK | dict(
    train_shards=11,
    n_layer=8,
    n_embd=512,
    n_head=8,
    n_kv_head=2,
    ffn_dim=1536,
    steps=7620,
    batch_tokens=(131_072,),
    adamw_lr=2e-4,
    adamw_warmup=500,
)
