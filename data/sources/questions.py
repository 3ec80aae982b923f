"""Questions whose answers a reward judges, of ./run.sh grpo, in files of --conversations."""

from data.sources import Source


def open_source(config, cache):
    from data.questions import open_questions  # late: it needs torch

    return open_questions(config, cache)


SOURCE = Source("questions whose answers a reward judges, in files of --conversations", open_source)
