"""laptop-long: the same text for a minute, until what the model writes has whole functions.

One layer of 256 needs a third of the steps that one of 128 needs for the same loss.
"""

from tracks.laptop import TRACK

TRACK = TRACK | dict(
    target=1.05,
    n_embd=256,
    n_head=4,
    mlp_ratio=4,
    counts=4,
    steps=320,
    batch_tokens=(8192,),
    adam_lr=0.007,
    eval_every=20,
    sample_tokens=200,
)
