"""own-text-deep: laptop-deep's model on a text of your own, until it no longer gets better."""

from tracks.laptop_deep import TRACK

TRACK = TRACK | dict(
    data="text",
    target=None,
    steps=300,
    eval_every=25,
    quick_val=0,
    patience=4,
    sample_prompts=(),
)
