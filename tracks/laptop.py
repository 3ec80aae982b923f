"""laptop: two CPU cores, no network, the standard library's own source. Target in bits per byte."""

TRACK = dict(
    target=1.6,
    target_metric="val_bpb",
    data="stdlib",
    tokenizer="bpe:4096",
    val_tokens=131072,
)
