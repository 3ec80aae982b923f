"""shakespeare-char-cpu: the same text to where nanoGPT's CPU settings end, about 1.89.

One layer with 4-grams. Uncompiled: compiling would take longer than training.
"""

from tracks.shakespeare_char import TRACK

TRACK = TRACK | dict(
    target=1.89,
    row_len=64,
    val_row_len=256,
    n_layer=1,
    n_embd=128,
    value_embed_layers=(0,),
    n_gram=4,
    smear=False,
    attn_gate=False,
    key_offset=False,
    short_window=(64,),
    long_window=(64,),
    steps=20,
    max_doc_len=(64,),
    muon_lr=0.02,
    weight_decay=0.0,
    normuon=False,
    row_moments=True,
    eval_every=10,
    quick_val=8192,
    compile=False,
)
