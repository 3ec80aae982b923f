"""laptop-counts: what a CPU trains by default: laptop's text and model, with what the training text
was counted to say.

Most of what laptop's network learns in its 42 steps to 1.5 bits per byte is how often tokens follow
one another. The text is counted when training is prepared, in about a second; then three steps
would do, and the network goes on from there to a lower target.
"""

from tracks.laptop import TRACK

TRACK = TRACK | dict(target=1.45, counts=3, steps=28, eval_every=4, sample_tokens=64)
