"""Conversations to learn to answer from: --conversations says in which files they are."""

from data.sources import Source


def open_source(config, cache):
    from data.conversations import open_conversations  # late: it needs torch

    return open_conversations(config, cache)


SOURCE = Source("conversations to learn to answer from, in files of --conversations", open_source)
