"""laptop-counts: laptop's text, model and target, with what the training text was counted to say.

Three steps will do, where laptop takes 42: most of what its network learns in those is how often
tokens follow one another. The text is counted when training is prepared, in about a second.
"""

from tracks.laptop import TRACK

TRACK = TRACK | dict(counts=3, steps=24, eval_every=3)
