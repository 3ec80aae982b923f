"""own-text: what `--text FILE_OR_FOLDER` trains, laptop's model, until it no longer gets better.

With counts of the text: on 2.4 MB of English it trained for 24 s to 1.46 bits per byte, without
them to 1.53. own-text-deep has four layers of 256, for more text and more time. Vocabulary and
steps follow the size of the text: docs/experiments.md has the runs.
"""

from tracks.laptop import TRACK

OWN = dict(
    data="text",
    target=None,
    tokenizer="bpe",
    eval_every=25,
    train_eval=16384,
    patience=4,
    sample_prompts=(),
)

TRACK = TRACK | OWN | dict(counts=4, adam_lr=0.007, steps=400, max_epochs=3.0)
