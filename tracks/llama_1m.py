"""llama-1m: the ladder's smallest, 1,049,728 parameters, for two CPU cores and no network.

Python's standard library in 2,048 tokens, which llama.cpp can tell apart as well. It is what the
recipe is compared with AdamW on: `./run.sh benchmarks ablate --track llama-1m --only adamw`.
"""

TRACK = dict(
    template="llama",
    target=None,
    target_metric="val_bpb",
    # data
    data="stdlib",
    tokenizer="qwen2:2048",
    val_tokens=32_768,
    row_len=256,
    val_row_len=256,
    max_doc_len=(256,),
    # model
    n_layer=4,
    n_embd=128,
    n_head=2,
    n_kv_head=1,
    head_dim=64,
    ffn_dim=384,
    # schedule and optimizer
    steps=100,
    batch_tokens=(2048,),
    adam_lr=0.04,
    weight_decay=1.2,
    normuon=True,
    adamw_lr=2e-3,
    adamw_warmup=10,
    eval_every=25,
    sample_prompts=("def ", "class ", "import "),
)
