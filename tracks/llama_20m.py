"""llama-20m: the first step of a ladder of models that others load as Llama: 19,960,576 parameters.

GPT-2's tokens of FineWeb, 20 of them a parameter; with --text your own text and a vocabulary made
of it, so that the number is another one. `--optimizer adamw` trains it by the field's recipe with
the values below. docs/llama.md has the whole ladder.
"""

TRACK = dict(
    template="llama",
    target=None,
    # data
    data="fineweb10B",
    tokenizer="gpt2",
    train_shards=5,
    val_tokens=1_048_576,
    row_len=1024,
    val_row_len=1024,
    max_doc_len=(1024,),
    # model
    n_layer=9,
    n_embd=256,
    n_head=4,
    n_kv_head=2,
    head_dim=64,
    ffn_dim=768,
    tied_embeddings=True,
    # schedule and optimizer
    steps=6100,
    batch_tokens=(65_536,),
    normuon=True,
    weight_decay=1.2,
    adamw_lr=3e-4,
    adamw_warmup=200,
    eval_every=250,
    keep_best=1,
    sample_prompts=("The capital of France is", "Once upon a time", "The best way to"),
)
