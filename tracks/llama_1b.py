"""llama-1b: exactly 1,055,231,744 parameters, the shape, context and length of MyLLM-1B.

28 layers of 1,792, 14 heads of 128 with 2 for keys and values, SwiGLU of 4,864, 65,536 tokens whose
embedding is the head as well, contexts of 8,192, 27.5 billion tokens in steps of 262,144. The text
is given with --text; the vocabulary is made of it, and llama.cpp knows its kind.
"""

TRACK = dict(
    template="llama",
    target=None,
    # data
    data="text",
    tokenizer="qwen2:65536",
    row_len=8192,
    val_row_len=8192,
    max_doc_len=(8192,),
    # model
    n_layer=28,
    n_embd=1792,
    n_head=14,
    n_kv_head=2,
    head_dim=128,
    ffn_dim=4864,
    tied_embeddings=True,
    norm_eps=1e-5,
    rope_theta=500_000.0,
    # schedule and optimizer
    steps=105_058,
    batch_tokens=(262_144,),
    normuon=True,
    weight_decay=1.2,
    adamw_lr=3e-4,
    adamw_warmup=2000,
    eval_every=1000,
    keep_best=1,
)
