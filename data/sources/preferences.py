"""Pairs of answers, one preferred to the other: --conversations says in which files they are."""

from data.sources import Source
from data.sources.conversations import open_source

SOURCE = Source("pairs of answers, one preferred, in files of --conversations", open_source)
