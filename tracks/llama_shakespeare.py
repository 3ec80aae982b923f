"""llama-shakespeare: nanoGPT's Shakespeare model, 6 layers of 384, in the field's shape.

10,670,976 parameters with the characters of Tiny Shakespeare (give the file with --text). Steps,
batch, dropout and AdamW's values are those of nanoGPT's configuration.
"""

TRACK = dict(
    template="llama",
    target=None,
    # data
    data="text",
    tokenizer="chars",
    row_len=256,
    val_row_len=256,
    max_doc_len=(256,),
    # model
    n_layer=6,
    n_embd=384,
    n_head=6,
    head_dim=64,
    ffn_dim=1024,
    dropout=0.2,
    # schedule and optimizer
    steps=5000,
    batch_tokens=(16_384,),
    normuon=True,
    weight_decay=1.2,
    adamw_lr=1e-3,
    adamw_warmup=100,
    adamw_betas=(0.9, 0.99),
    eval_every=250,
    keep_best=1,
)
