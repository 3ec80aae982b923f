"""own-text-deep: laptop-deep's model on a text of your own, until it no longer gets better."""

from tracks.laptop_deep import TRACK
from tracks.own_text import OWN

TRACK = TRACK | OWN | dict(steps=300)
