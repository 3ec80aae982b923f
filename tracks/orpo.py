"""orpo: the same pairs without a reference, which learns the chosen answers as well."""

from tracks.dpo import TRACK

TRACK = TRACK | dict(preference="orpo", stage_lr=(0.3,), steps=200)
