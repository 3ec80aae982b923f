"""gpt2-small-1gpu: the same goal and recipe on one data-centre GPU (A100, H100, H200, B200).

The global batch is gpt2-small's: what reaches the target with the fewest tokens is what counts, and
with micro-batches as large as memory allows a step's fixed cost is small beside its tokens. The
public record's code takes 595 s on one H100 for 1,375 steps, 633 ms of them for one of 393,216
tokens; on an H200 ours takes 558 ms for that. Not run to the end yet.
"""

from tracks.gpt2_small import TRACK

TRACK = TRACK | dict(gpus=1)
