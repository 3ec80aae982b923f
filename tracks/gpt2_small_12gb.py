"""gpt2-small-12gb: the same goal on one card of 12 GB (RTX 3060, RTX 4070).

Blocks are recomputed in backward and the n-gram table is smaller, since each of its rows costs 14 bytes a dimension with
its gradient and moments: 8.8 GB by the trainer's estimate. Not measured yet on a GPU.
"""

from tracks.gpt2_small import TRACK

TRACK = TRACK | dict(gpus=1, micro_tokens=16384, recompute="on", ngram_rows=150_912)
