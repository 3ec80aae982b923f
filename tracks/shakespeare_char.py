"""shakespeare-char: Tiny Shakespeare, character by character (give the file with --text).

The target, 1.4697 nats per character on the last tenth of the text, is what nanoGPT's README
reaches on an A100.
"""

TRACK = dict(
    target=1.4697,
    # data
    data="text",
    tokenizer="chars",
    row_len=256,
    val_row_len=1024,
    # model
    n_layer=4,
    n_embd=256,
    n_head=4,
    value_embed_layers=(0, 3),
    smear=True,
    attn_gate=True,
    key_offset=True,
    short_window=(128,),
    long_window=(256,),
    # schedule and optimizer
    steps=480,
    batch_tokens=(4096,),
    max_doc_len=(256,),
    weight_decay=1.2,
    normuon=True,
    eval_every=20,
)
