"""laptop-counts: what a CPU trains by default: laptop's text and model, with what the training text
was counted to say.

Most of what laptop's network learns in its 36 steps to 1.5 bits per byte is how often tokens follow
one another. The text is counted when training is prepared, in half a second, and four steps bring
that to 1.27; to a lower --target the network goes on from there.
"""

from tracks.laptop import TRACK

TRACK = TRACK | dict(
    target=1.27,
    counts=4,
    steps=28,
    adam_lr=0.004,
    eval_every=6,
    sample_tokens=64,
)
