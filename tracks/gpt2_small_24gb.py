"""gpt2-small-24gb: the same goal and recipe on one card of 24 GB (RTX 3090, RTX 4090, L4).

One row of 16,384 tokens in a forward pass, which by the trainer's estimate takes 21.0 GB. Not
measured yet on a GPU.
"""

from tracks.gpt2_small import TRACK

TRACK = TRACK | dict(gpus=1, val_row_len=65536, micro_tokens=16384)
