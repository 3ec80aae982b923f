"""laptop: a GPT on Python's own source in half a minute on two CPU cores, with no network.

The target is in bits per byte, so that another tokenizer or another version of Python's library is comparable.
"""

TRACK = dict(
    target=1.5, target_metric="val_bpb",
    data="stdlib", tokenizer="bpe:4096", val_tokens=131_072,
    smear=True, attn_gate=True, key_offset=True,
    steps=80, batch_tokens=(8192,), short_window=(128,), long_window=(256,), weight_decay=1.2, normuon=True, eval_every=8,
)
