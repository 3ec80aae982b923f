"""laptop-deep: the same text with four layers of 256, to a lower target."""

from tracks.laptop import TRACK

TRACK = TRACK | dict(
    target=1.4,
    n_layer=4,
    n_embd=256,
    n_head=4,
    mlp_ratio=4,
    value_embed_layers=(0, 1, 2, 3),
    sampled_softmax=(0,),
    steps=240,
    batch_tokens=(8192,),
    adam_lr=0.008,
)
