"""gpt2-small-12gb: the same goal on one card of 12 GB (RTX 3060, RTX 4070).

Blocks are recomputed in backward, and tables have one second moment a row instead of Adam's two
moments a number. That was better on `laptop` and on shakespeare-char's easy goals, not on its own,
and by the trainer's estimate spares 3.9 GB: 7.6 GB are left. Not measured yet on a GPU.
"""

from tracks.gpt2_small import TRACK

TRACK = TRACK | dict(
    gpus=1, val_row_len=65536, micro_tokens=16384, recompute="on", row_moments=True
)
