"""llama-100m: the ladder's third step, 99,598,080 parameters, 20 tokens of FineWeb for each."""

from tracks.llama_20m import TRACK

TRACK = TRACK | dict(
    train_shards=20,
    n_layer=10,
    n_embd=768,
    n_head=12,
    n_kv_head=2,
    ffn_dim=2048,
    steps=7600,
    batch_tokens=(262_144,),
    adamw_lr=1.5e-4,
    adamw_warmup=1000,
)
