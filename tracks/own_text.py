"""own-text: what `--text FILE_OR_FOLDER` trains, laptop's model, until it no longer gets better.

One layer of 128 reaches 1.54 bits per byte on 2.4 MB of English in 320 steps, where four of 256
took as long for 30 steps and 1.70; own-text-deep has those, for more text and more time.
"""

from tracks.laptop import TRACK

TRACK = TRACK | dict(
    data="text",
    target=None,
    steps=400,
    eval_every=25,
    quick_val=0,
    patience=4,
    sample_prompts=(),
)
