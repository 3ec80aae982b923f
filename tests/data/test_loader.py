"""data/loader.py: which tokens a step sees depends on (data, seed, step) alone, and each is used
right.

The shards here are made so that every token but end-of-text names its own place.
"""

import itertools
import signal
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from base import InputError
from data.loader import (
    IGNORE,
    MicroBatch,
    Prefetcher,
    TrainLoader,
    ValLoader,
    best_fit,
    default_max_docs,
    document_starts,
    slots_of_pass,
    spread_borders,
)
from data.shards import MAGIC, read_shard

EOT, N_VOCAB = 0, 60_000
FAST = settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)


@contextmanager
def within(seconds):
    """Fail, where it would hang, after so many seconds."""

    def fail(*_):
        raise AssertionError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Corpus:
    """Shards of documents of the given lengths (end-of-text included), in a folder that goes
    with it."""

    def __init__(self, *shards, lead=0, marks=True):
        """lead: tokens before each shard's first document; marks: whether documents start with
        EOT."""
        self.tokens, self.folder = [], tempfile.TemporaryDirectory()
        place = itertools.count(1)
        for lengths in shards:
            starts = lead + np.cumsum([0, *lengths])
            tokens = np.array([next(place) for _ in range(starts[-1])], dtype="<u2")
            if marks:
                tokens[starts[:-1]] = EOT
            self.tokens.append(tokens)
        self.paths = [Path(self.folder.name) / f"{i}.bin" for i in range(len(shards))]
        for path, tokens in zip(self.paths, self.tokens):
            header = np.zeros(256, dtype="<i4")
            header[:3] = MAGIC, 1, len(tokens)
            path.write_bytes(header.tobytes() + tokens.tobytes())
        self._which = {t.tobytes(): i for i, t in enumerate(self.tokens)}

    def __repr__(self):
        return f"Corpus({[t.tolist() for t in self.tokens]})"

    def loader(self, row_len=8, rows=2, max_doc_len=8, **options):
        def schedule(value):
            return value if callable(value) else lambda step: value

        loader = TrainLoader(
            self.paths,
            eot=EOT,
            n_vocab=N_VOCAB,
            row_len=row_len,
            batch_rows=schedule(rows),
            max_doc_len=schedule(max_doc_len),
            **options,
        )
        loader.corpus = self  # the folder lives as long as the loader
        return loader

    def val(self, row_len=8, **options):
        return ValLoader(self.paths, eot=EOT, n_vocab=N_VOCAB, row_len=row_len, **options)

    def places(self, rows):
        """Rows as lists of (shard number, start, length)."""
        return [[(self._which[t.tobytes()], int(s), int(n)) for t, s, n in row] for row in rows]

    def is_start(self, shard, at):
        return self.tokens[shard][at] == EOT or at == 0 and EOT not in self.tokens[shard]


LENGTHS = st.lists(st.one_of(st.integers(1, 4), st.integers(1, 40)), min_size=1, max_size=25).map(
    lambda lengths: [*lengths[:-1], max(2, lengths[-1])]
)  # a last one of 1 token has a test of its own
CORPORA = st.lists(LENGTHS, min_size=1, max_size=3).map(lambda shards: Corpus(*shards))


@st.composite
def setups(draw, **fixed):
    """(corpus, options of TrainLoader) such that every shard fills a batch, so that none is
    passed over."""
    options = (
        dict(
            row_len=draw(st.integers(1, 24)),
            max_doc_len=draw(st.integers(1, 40)),
            long_docs=draw(st.sampled_from(["drop", "split"])),
            shuffle=draw(st.booleans()),
            seed=draw(st.integers(0, 3)),
            max_docs=draw(st.sampled_from([None, 1, 2, 5])),
        )
        | fixed
    )
    corpus = draw(CORPORA)
    least, row_len = min(usable(t, options) for t in corpus.tokens), options["row_len"]
    # what a row leaves out of its last document, at most
    wasted = min(options["max_doc_len"], row_len) - 1 if options["long_docs"] == "drop" else 0
    assume(least >= row_len)
    most = 1 + (least - row_len) // (row_len + wasted)
    return corpus, options | dict(rows=draw(st.integers(1, min(most, 6))))


def usable(tokens, options):
    """Tokens of a shard that rows can hold in an epoch: the last one is only a target."""
    sizes = np.diff(np.append(document_starts(tokens, EOT), len(tokens) - 1))
    cut = min(options["max_doc_len"], options["row_len"])
    return int((sizes if options["long_docs"] == "split" else np.minimum(sizes, cut)).sum())


def stream(corpus, loader, n):
    """The first n rows of training, whatever the batch size."""
    rows, step = [], 1
    while len(rows) < n:
        rows += corpus.places(loader.rows(step))
        step += 1
    return rows[:n]


# rows


@FAST
@given(setups())
def test_rows_are_full_and_hold_parts_of_documents(setup):
    """Exactly row_len tokens of one shard; no segment crosses a document or exceeds max_doc_len."""
    corpus, options = setup
    loader = corpus.loader(**options)
    for step in range(1, 5):
        rows = corpus.places(loader.rows(step))
        assert len(rows) == options["rows"]
        for row in rows:
            assert sum(n for *_, n in row) == options["row_len"]
            assert len({shard for shard, *_ in row}) == 1
            for shard, start, n in row:
                assert 1 <= n <= options["max_doc_len"]
                assert 0 <= start and start + n < len(corpus.tokens[shard])
                assert EOT not in corpus.tokens[shard][start + 1 : start + n]


@FAST
@given(setups(long_docs="drop"))
def test_drop_takes_documents_from_their_start(setup):
    """And whole, or max_doc_len of them, unless the row ends."""
    corpus, options = setup
    loader = corpus.loader(**options)
    cut = min(options["max_doc_len"], options["row_len"])
    for row in stream(corpus, loader, 8):
        for shard, start, n in row:
            assert corpus.is_start(shard, start)
            if (shard, start, n) != row[-1]:
                end = start + n
                assert (
                    n == cut or end == len(corpus.tokens[shard]) - 1 or corpus.is_start(shard, end)
                )


@FAST
@given(setups(long_docs="drop"))
def test_drop_uses_every_document_before_any_again(setup):
    """When a document comes up again, those not yet seen would not have filled a row in any of
    the shards."""
    corpus, options = setup
    loader, cut = corpus.loader(**options), min(options["max_doc_len"], options["row_len"])
    unseen = {}
    for i, tokens in enumerate(corpus.tokens):
        starts = np.flatnonzero(tokens == EOT)
        sizes = np.minimum(np.diff(np.append(starts, len(tokens) - 1)), cut)
        unseen |= {(i, int(s)): int(n) for s, n in zip(starts, sizes)}
    for row in stream(corpus, loader, 200):
        for shard, start, _ in row:
            if (shard, start) not in unseen:
                left = Counter()
                for (i, _), n in unseen.items():
                    left[i] += n
                assert all(n < options["row_len"] for n in left.values())
                return
            del unseen[shard, start]


@FAST
@given(setups(long_docs="split"))
def test_split_uses_every_token_once_an_epoch(setup):
    """Of each shard all but less than a row, in each of three epochs."""
    corpus, options = setup
    loader, row_len = corpus.loader(**options), options["row_len"]
    rows_of = [usable(t, options) // row_len for t in corpus.tokens]
    rows = stream(corpus, loader, 3 * sum(rows_of))
    for epoch in range(3):
        used = Counter()
        for row in rows[epoch * sum(rows_of) : (epoch + 1) * sum(rows_of)]:
            used.update((shard, at) for shard, start, n in row for at in range(start, start + n))
        assert max(used.values()) == 1
        assert Counter(shard for shard, _ in used) == {
            i: n * row_len for i, n in enumerate(rows_of)
        }


@pytest.mark.parametrize("lengths", [[100, 20], [120]])
def test_split_keeps_what_comes_before_the_first_end_of_text(lengths):
    """The second shard of a long document begins with the rest of it; "split" keeps every token."""
    corpus = Corpus(lengths, lead=80)
    loader = corpus.loader(row_len=20, rows=1, long_docs="split", shuffle=False)
    used = {
        at
        for row in stream(corpus, loader, 9)
        for _, start, n in row
        for at in range(start, start + n)
    }
    assert used >= set(range(180))


def test_drop_leaves_out_what_comes_before_the_first_end_of_text():
    corpus = Corpus([5] * 20, lead=30)
    assert all(start >= 30 for row in stream(corpus, corpus.loader(), 40) for _, start, _ in row)


@pytest.mark.parametrize("long_docs", ["drop", "split"])
def test_file_order_without_shuffle_in_the_first_epoch_only(long_docs):
    corpus = Corpus(
        [5, 3] * 10, [8] * 10
    )  # 20 rows of 8, the last of each shard lacking its last target
    rows = stream(corpus, corpus.loader(shuffle=False, long_docs=long_docs), 36)
    first, second = rows[:18], rows[18:]
    starts = [(shard, start) for row in first for shard, start, _ in row]
    assert starts == sorted(starts) and starts[0] == (0, 0)
    assert sum((row[:1] for row in first), []) == [
        (s, at, n) for s in (0, 1) for at, n in zip(range(0, 72, 8), [5, 8][s : s + 1] * 9)
    ]
    starts = [(shard, start) for row in second for shard, start, _ in row]
    assert starts != sorted(starts)


@pytest.mark.parametrize("long_docs", ["drop", "split"])
def test_epochs_and_seeds_shuffle_differently(long_docs):
    """Documents and shards both."""
    corpus = Corpus(*[[8] * 12] * 5)
    orders, shard_orders = set(), set()
    for seed in range(3):
        rows = stream(corpus, corpus.loader(seed=seed, long_docs=long_docs), 55 * 3)
        for epoch in range(3):
            part = rows[55 * epoch : 55 * (epoch + 1)]
            orders.add(tuple(start for row in part[:11] for _, start, _ in row))
            shard_orders.add(tuple(row[0][0] for row in part[::11]))
            assert len({row[0][0] for row in part[::11]}) == 5
    assert len(orders) == 9 and len(shard_orders) > 5


def test_shards_of_one_epoch_are_not_in_the_same_order_inside():
    corpus = Corpus(*[[8] * 12] * 2)
    rows = stream(corpus, corpus.loader(), 22)
    assert [row[0][1] for row in rows[:11]] != [row[0][1] for row in rows[11:]]


def test_split_cuts_at_another_phase_each_epoch():
    """Not reshuffled only: the places where a long document is cut move."""
    corpus = Corpus([20_000])
    loader = corpus.loader(row_len=256, rows=1, max_doc_len=16, long_docs="split", shuffle=False)
    rows, per_epoch, phases = stream(corpus, loader, 78 * 6), 78, []
    for epoch in range(6):
        part = rows[epoch * per_epoch : (epoch + 1) * per_epoch]
        cuts = Counter(start % 16 for row in part for _, start, _ in row)
        ((phase, n),) = cuts.most_common(1)
        assert n > 0.9 * cuts.total()
        phases.append(phase)
    assert phases[0] == 0 and len(set(phases)) > 2


def test_split_pieces_of_a_long_document_are_shuffled():
    corpus = Corpus([4000])
    rows = stream(corpus, corpus.loader(row_len=80, max_doc_len=8, long_docs="split"), 40)
    starts = [start for row in rows for _, start, _ in row]
    assert np.abs(np.diff(starts)).mean() > 500


@FAST
@given(setups(), st.lists(st.integers(1, 8), min_size=1, max_size=6))
def test_rows_are_a_function_of_the_step(setup, steps):
    """Whatever was asked before: any order, again, or by a loader that resumes there."""
    corpus, options = setup
    one = corpus.loader(**options)
    inorder = {step: corpus.places(one.rows(step)) for step in range(1, 9)}
    two = corpus.loader(**options)
    for step in steps:
        assert corpus.places(two.rows(step)) == inorder[step]
        assert corpus.places(corpus.loader(**options).rows(step)) == inorder[step]


@FAST
@given(
    setups(),
    st.lists(st.integers(1, 40), min_size=3, max_size=3),
    st.lists(st.integers(1, 8), min_size=2, max_size=2),
    st.integers(1, 20),
    st.integers(0, 3),
    st.integers(1, 3),
)
def test_a_run_that_is_taken_up_again_sees_what_it_would_have_seen(
    setup, limits, changes, step, ahead, world_size
):
    """A new loader's first step is the last run's next one: over changes of batch and document
    length, and epochs.

    A prefetcher asked the last run's loader for some steps more than were trained on.
    """
    corpus, options = setup

    def stage(step):
        return sum(step > change for change in np.cumsum(changes))

    options |= dict(
        max_doc_len=lambda step: limits[stage(step)], rows=lambda step: [1, 3, 2][stage(step)]
    )

    def outcome(loader, step):
        """Places and tensors of a step, or the error, where the text no longer fills a row."""
        try:
            places = corpus.places(loader.rows(step))
            return places, [
                [t.tolist() for t in micro]
                for rank in range(world_size)
                for micro in loader.micro_batches(step, rank, world_size)
            ]
        except InputError as e:
            return str(e)

    try:
        one, two = corpus.loader(**options), corpus.loader(**options)
    except InputError:
        assume(False)
    for s in range(1, step + ahead):
        if isinstance(outcome(one, s), str):
            break
    for s in range(step, step + 3):
        assert outcome(two, s) == outcome(one, s)
    for loader, before in (
        (one, 5),
        (two, None),
    ):  # --repeat: another seed, however far the first run came
        loader.reseed(99)
        if before is not None:
            outcome(loader, before)
    fresh = corpus.loader(**options | dict(seed=99))
    assert outcome(two, step + 5) == outcome(one, step + 5) == outcome(fresh, step + 5)


@FAST
@given(setups(), st.data())
def test_batch_size_does_not_change_the_stream(setup, data):
    corpus, options = setup
    sizes = data.draw(st.lists(st.integers(1, options["rows"]), min_size=4, max_size=4))
    varied = corpus.loader(**options | dict(rows=lambda step: sizes[min(step, 4) - 1]))
    assert [len(varied.rows(step)) for step in range(1, 6)] == [*sizes, sizes[3]]
    assert stream(corpus, varied, 12) == stream(corpus, corpus.loader(**options), 12)


@FAST
@given(setups(), st.integers(1, 40), st.integers(2, 6), st.integers(1, 8))
def test_max_doc_len_may_change_on_the_way(setup, longer, change, step):
    """Segments obey the step's own limit, and a loader starting after the change sees the same."""
    corpus, options = setup
    limits = [options["max_doc_len"], options["max_doc_len"] + longer]
    options |= dict(max_doc_len=lambda step: limits[step >= change])
    loader = corpus.loader(**options)
    inorder = {step: corpus.places(loader.rows(step)) for step in range(1, 9)}
    for s, rows in inorder.items():
        assert all(sum(n for *_, n in row) == options["row_len"] for row in rows)
        assert max(n for row in rows for *_, n in row) <= limits[s >= change]
    assert corpus.places(corpus.loader(**options).rows(step)) == inorder[step]


def test_longer_documents_are_used_from_the_change_on():
    """In "drop" mode the epoch goes on with documents not yet seen; in "split" mode a new one
    begins."""
    corpus, limit = Corpus([40] * 50), lambda step: 4 if step <= 5 else 16
    loader = corpus.loader(row_len=16, rows=1, max_doc_len=limit)
    rows = [corpus.places(loader.rows(step))[0] for step in range(1, 31)]
    assert all([n for *_, n in row] == [4] * 4 for row in rows[:5])
    assert all([n for *_, n in row] == [16] for row in rows[5:])
    assert max(Counter(start for row in rows for _, start, _ in row).values()) == 1

    loader = corpus.loader(row_len=16, rows=1, max_doc_len=limit, long_docs="split")
    rows = [corpus.places(loader.rows(step))[0] for step in range(1, 6 + 124)]
    used = Counter(at for row in rows[5:] for _, start, n in row for at in range(start, start + n))
    assert len(used) == 124 * 16 and max(n for row in rows[5:] for *_, n in row) == 16


@pytest.mark.parametrize("long_docs", ["drop", "split"])
def test_max_doc_len_beyond_the_row_means_the_row(long_docs):
    """So raising it further changes nothing and begins no new epoch."""
    corpus = Corpus([100, 3, 30, 17, 90] * 3)
    one, two = (
        corpus.loader(row_len=16, max_doc_len=limit, long_docs=long_docs)
        for limit in (16, lambda step: 50 * step - 30)
    )
    assert all(
        corpus.places(one.rows(step)) == corpus.places(two.rows(step)) for step in range(1, 13)
    )


# edges of the data


@pytest.mark.parametrize("long_docs", ["drop", "split"])
def test_too_little_text(long_docs):
    """3 rows of 8 need 24 inputs and a target more."""
    assert len(Corpus([8, 8, 9]).loader(rows=3, long_docs=long_docs).rows(1)) == 3
    with pytest.raises(InputError, match="batch") as e:
        Corpus([8, 8, 8]).loader(rows=3, long_docs=long_docs)
    assert "\n" not in str(e.value)
    with pytest.raises(InputError):
        Corpus([1]).loader(rows=1, row_len=1, long_docs=long_docs)


def test_too_little_of_every_document():
    """Three documents of 100 are plenty for "split", not for "drop" at 4 tokens each."""
    assert Corpus([100] * 3).loader(max_doc_len=4, long_docs="split").rows(1)
    with pytest.raises(InputError, match="batch"):
        Corpus([100] * 3).loader(max_doc_len=4)


def test_too_little_when_rows_drop_the_rest_of_documents():
    """Twenty documents of 5 make ten rows of 8: an eleventh would repeat some."""
    corpus = Corpus([5] * 20)
    starts = [at for row in corpus.places(corpus.loader(rows=10).rows(1)) for _, at, _ in row]
    assert len(starts) == len(set(starts)) == 20
    with pytest.raises(InputError, match="batch"):
        corpus.loader(rows=11)


@pytest.mark.parametrize("long_docs", ["drop", "split"])
def test_several_shards_none_of_which_fills_a_row(long_docs):
    """An error and not an endless search."""
    with within(1.5), pytest.raises(InputError, match="batch|row"):
        Corpus([5], [5], [5]).loader(row_len=8, rows=1, long_docs=long_docs).rows(1)


@pytest.mark.parametrize("long_docs", ["drop", "split"])
def test_several_shards_that_do_not_fill_a_batch(long_docs):
    """Three rows in all: a batch of four would hold one of them twice."""
    corpus = Corpus([9], [9], [9])
    assert len(corpus.loader(row_len=8, rows=3, long_docs=long_docs).rows(1)) == 3
    with pytest.raises(InputError, match="batch"):
        corpus.loader(row_len=8, rows=4, long_docs=long_docs)


def test_max_doc_len_that_leaves_too_little():
    """Documents cut to 1 token no longer fill a row: an error and not an endless search."""
    loader = Corpus([20] * 3).loader(
        row_len=16, rows=1, max_doc_len=lambda step: 16 if step == 1 else 1
    )
    with within(1.5), pytest.raises(InputError):
        loader.rows(2)


@pytest.mark.parametrize("long_docs", ["drop", "split"])
@pytest.mark.parametrize("shards", [[[3], [8] * 5], [[8] * 5, [3]], [[8] * 5, [1], [9, 9]]])
def test_a_shard_that_does_not_fill_a_row_is_passed_over(shards, long_docs):
    corpus = Corpus(*shards)
    with within(5):
        rows = stream(corpus, corpus.loader(rows=1, long_docs=long_docs), 20)
    assert {row[0][0] for row in rows} == {i for i, s in enumerate(shards) if sum(s) > 8}


@pytest.mark.parametrize("long_docs", ["drop", "split"])
def test_no_end_of_text_at_all(long_docs):
    """The shard is one document."""
    corpus = Corpus([41], marks=False)
    loader = corpus.loader(rows=1, long_docs=long_docs, shuffle=False)
    rows = stream(corpus, loader, 5)
    assert rows == [[(0, at if long_docs == "split" else 0, 8)] for at in range(0, 40, 8)]


@pytest.mark.parametrize("long_docs", ["drop", "split"])
def test_last_document_of_one_token(long_docs):
    """It is a target only, and makes no empty segment."""
    corpus = Corpus([5, 5, 7, 1])
    rows = stream(corpus, corpus.loader(row_len=5, rows=1, max_doc_len=5, long_docs=long_docs), 30)
    assert all(n > 0 and start + n <= 17 for row in rows for _, start, n in row)


@pytest.mark.parametrize("long_docs", ["drop", "split"])
def test_documents_of_one_token(long_docs):
    corpus = Corpus([1] * 41)
    rows = stream(corpus, corpus.loader(rows=5, long_docs=long_docs), 5)
    assert sorted(at for row in rows for _, at, n in row if n) == list(range(40))


def test_wrong_vocabulary_is_refused():
    corpus = Corpus([8] * 4)
    for make in (TrainLoader, ValLoader):
        with pytest.raises(InputError, match="below 10"):
            train = (
                dict(batch_rows=lambda s: 1, max_doc_len=lambda s: 8) if make is TrainLoader else {}
            )
            make(corpus.paths, eot=EOT, n_vocab=10, row_len=8, **train)


@pytest.mark.parametrize("step", [0, -1])
def test_steps_are_numbered_from_1(step):
    with pytest.raises(ValueError, match="from 1"):
        Corpus([8] * 10).loader().rows(step)


def test_document_starts():
    assert document_starts(np.array([1, 7, 1, 1, 3]), 1).tolist() == [0, 2, 3]
    assert document_starts(np.array([5, 7]), 1).tolist() == [0]


def test_only_the_shards_that_are_reached_are_read():
    """A run's second shard is not gone through before its turn; then it is checked like the
    first."""
    corpus = Corpus([8] * 10, [8] * 10)
    content = corpus.paths[1].read_bytes()
    corpus.paths[1].write_bytes(content[:-2] + b"\xff\xff")
    loader = corpus.loader(shuffle=False)
    assert loader.rows(4)
    with pytest.raises(InputError, match="1.bin.*below 60000"):
        loader.rows(7)


# micro-batches


def expected_rows(corpus, places, row_len):
    """Inputs and targets of rows given by their places, straight from the shards."""
    inputs = [np.concatenate([corpus.tokens[i][s : s + n] for i, s, n in row]) for row in places]
    targets = [
        np.concatenate([corpus.tokens[i][s + 1 : s + n + 1] for i, s, n in row]) for row in places
    ]
    return np.array(inputs).reshape(-1, row_len), np.array(targets).reshape(-1, row_len)


def check_borders(micro, rows, max_docs, max_len):
    """cu_seqlens of a micro-batch whose rows are lists of segment lengths (empty for padding)."""
    (n_rows, row_len), cu = micro.inputs.shape, micro.cu_seqlens
    assert cu.dtype == torch.int32 and cu.ndim == 1 and cu[0] == 0 and cu[-1] == n_rows * row_len
    steps = cu.diff()
    assert (steps >= 0).all() and steps.max() <= max_len
    assert (steps[: cu.tolist().index(n_rows * row_len)] > 0).all(), "an empty document"
    borders = set(cu.tolist())
    for r, lengths in enumerate(rows):
        own = sorted(b - r * row_len for b in borders if r * row_len <= b < (r + 1) * row_len)
        ends = [0, *np.cumsum(lengths).tolist()]
        first = [e for e in ends[:max_docs] if e < row_len]
        assert own[: len(first)] == first
        if lengths and len(lengths) <= max_docs and ends[-1] == row_len:
            assert own == first


WORLDS = st.sampled_from([1, 2, 3, 5])


@FAST
@given(setups(), WORLDS, st.sampled_from([None, 1, 2, 3, 7]), st.integers(1, 4))
def test_ranks_share_the_batch_between_them(setup, world_size, micro_rows, step):
    """The rows in order, once each; as many and as large micro-batches on every rank; padding is
    ignored."""
    corpus, options = setup
    row_len = options["row_len"]
    places = corpus.places(corpus.loader(**options).rows(step))
    ranks = [
        list(corpus.loader(**options).micro_batches(step, rank, world_size, micro_rows))
        for rank in range(world_size)
    ]
    n = micro_rows or -(-len(places) // world_size)
    assert {len(micros) for micros in ranks} == {-(-len(places) // (n * world_size))}
    micros = [
        micro for together in zip(*ranks) for micro in together
    ]  # the order of the global batch
    assert {m.inputs.shape for m in micros} == {m.targets.shape for m in micros} == {(n, row_len)}
    assert {m.inputs.dtype for m in micros} | {m.targets.dtype for m in micros} == {torch.int64}
    assert len({len(m.cu_seqlens) for m in micros}) == 1

    inputs, targets = (torch.cat([m[i] for m in micros]).numpy() for i in (0, 1))
    real_inputs, real_targets = expected_rows(corpus, places, row_len)
    assert (inputs[: len(places)] == real_inputs).all() and (
        targets[: len(places)] == real_targets
    ).all()
    assert (targets[len(places) :] == IGNORE).all() and IGNORE == -100
    assert ((inputs >= 0) & (inputs < N_VOCAB)).all()  # padding too can be looked up

    lengths = [[k for *_, k in row] for row in places] + [[]] * (len(inputs) - len(places))
    for i, micro in enumerate(micros):
        check_borders(
            micro,
            lengths[i * n : (i + 1) * n],
            options["max_docs"] or default_max_docs(row_len),
            min(options["max_doc_len"], row_len),
        )


@FAST
@given(setups(max_docs=None), st.integers(1, 3))
def test_targets_follow_their_inputs_in_the_data(setup, micro_rows):
    """Tokens name their place, so this needs no knowledge of rows."""
    corpus, options = setup
    follows = {}
    for tokens in corpus.tokens:
        follows |= {int(a): int(b) for a, b in zip(tokens, tokens[1:]) if a != EOT}
    for step in range(1, 4):
        for micro in corpus.loader(**options).micro_batches(step, micro_rows=micro_rows):
            for a, b in zip(micro.inputs.flatten().tolist(), micro.targets.flatten().tolist()):
                assert b == IGNORE or a == EOT or follows[a] == b


def test_borders_of_a_row_with_more_documents_than_slots():
    """The first max_docs keep their borders; the rest is divided every max_doc_len."""
    corpus = Corpus([3] * 20, [40])
    loader = corpus.loader(row_len=20, rows=1, max_doc_len=6, shuffle=False, max_docs=2)
    (many,) = loader.micro_batches(1)
    assert many.cu_seqlens.tolist() == [0, 3, 6, 12, 18, 20, 20]
    (few,) = corpus.loader(
        row_len=20, rows=1, max_doc_len=6, shuffle=False, max_docs=9
    ).micro_batches(1)
    assert sorted(set(few.cu_seqlens.tolist())) == [0, 3, 6, 9, 12, 15, 18, 20]


def test_the_next_shard_is_read_in_a_thread_before_it_is_reached(monkeypatch):
    """Begun with the first micro-batch, not with the loader; the tokens are those of a loader that
    waits for it."""
    readers = {}  # path -> threads that read all of it
    there = threading.Event()

    def read(path, n_vocab=None):
        if n_vocab is not None:
            readers.setdefault(path, []).append(threading.current_thread())
            if len(readers) == 2:
                there.set()
        return read_shard(path, n_vocab)

    monkeypatch.setattr("data.loader.read_shard", read)
    corpus = Corpus([8] * 12, [8] * 12, [8] * 12)
    options = dict(row_len=8, rows=5, max_doc_len=8, shuffle=False)
    loader = corpus.loader(**options)
    assert list(readers) == [corpus.paths[0]]
    list(loader.micro_batches(1))
    assert there.wait(timeout=60)
    found = [list(loader.micro_batches(step)) for step in range(2, 8)]
    for path in corpus.paths[1:]:
        (thread,) = readers[path]
        assert thread is not threading.main_thread()
    assert readers[corpus.paths[0]] == [threading.main_thread()]
    plain = corpus.loader(**options)
    plain._open_ahead = lambda: None
    for step, micros in enumerate(found, start=2):
        for a, b in zip(micros, plain.micro_batches(step), strict=True):
            assert torch.equal(a.inputs, b.inputs)


def test_what_is_wrong_with_the_next_shard_is_told_when_it_is_reached():
    corpus = Corpus([8] * 12, [8] * 12)
    loader = corpus.loader(row_len=8, rows=5, max_doc_len=8, shuffle=False)
    path = Path(corpus.paths[1])
    path.write_bytes(path.read_bytes()[:-2])
    list(loader.micro_batches(1))
    list(loader.micro_batches(2))
    with pytest.raises(InputError, match="1.bin: expected .* truncated"):
        for step in range(3, 6):
            list(loader.micro_batches(step))


# Rows of segments that fill them, and of padding
ROWS = st.lists(st.one_of(st.just([]), st.lists(st.integers(1, 5), min_size=1)), min_size=1)


@FAST
@given(ROWS, st.integers(5, 9), st.integers(0, 30))
def test_borders_that_are_counted_in_a_pass(rows, max_len, spare):
    """As many documents as there are slots for keep theirs, no piece is longer than max_len, and
    only where slots run out is anything divided that is one document."""
    row_len = max([1, *map(sum, rows)])
    rows = [[*row, *[1] * (row_len - sum(row))] if row else [] for row in rows]
    least = len(rows) * -(-row_len // max_len)
    found = spread_borders(rows, row_len, least + spare, max_len)
    assert len(found) <= least + spare
    assert found == sorted(set(found))
    assert set(range(0, len(rows) * row_len, row_len)) <= set(found)
    assert np.diff([*found, len(rows) * row_len]).max() <= max_len
    wanted = []
    for r, row in enumerate(rows):
        wanted += (r * row_len + np.cumsum([0, *row[:-1]])).tolist() if row else []
    if len(wanted) + sum(-(-row_len // max_len) for row in rows if not row) <= spare:
        assert set(wanted) <= set(found)
    # The first row is served first, as far as it goes
    first = [at for at in found if at < row_len]
    own = np.cumsum([0, *rows[0][:-1]]).tolist() if rows[0] else [0]
    alike = [a == b for a, b in zip(first, own)]
    assert all(alike[: min(len(own), spare)])


def test_slots_are_as_many_as_the_record_has():
    """64, 96 and 128 for one, two and three rows of 16,384; on one GPU 12 rows have 416, not
    865."""
    for rows, max_len, slots in ((1, 896, 64), (2, 2048, 96), (3, 2048, 128), (12, 2048, 416)):
        assert slots_of_pass(rows, 16384, max_len) == slots
    assert slots_of_pass(3, 16, 16) == 24
    assert slots_of_pass(2, 1000, 10) == 200


@pytest.mark.parametrize("micro_rows", [1, 3])
def test_documents_counted_in_a_pass(micro_rows):
    """The same tokens, one length for all passes, and the borders of all documents; in validation
    as well, where every row has as many slots as the fullest needs."""
    corpus = Corpus([5, 3, 1, 7, 2, 8, 6] * 12)
    options = dict(row_len=16, rows=6, max_doc_len=16)
    plain = list(corpus.loader(**options).micro_batches(1, micro_rows=micro_rows))
    loader = corpus.loader(**options, docs_by_pass=True)
    counted = list(loader.micro_batches(1, micro_rows=micro_rows))
    for a, b in zip(plain, counted, strict=True):
        assert torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets)
        assert set(a.cu_seqlens.tolist()) == set(b.cu_seqlens.tolist())
        assert len(b.cu_seqlens) == 8 * micro_rows + 1
    assert len(loader.padding(1, micro_rows).cu_seqlens) == 8 * micro_rows + 1
    val = corpus.val(row_len=300, docs_by_pass=True, n_tokens=370)
    many = Corpus([2] * 100).val(row_len=200, docs_by_pass=True)
    for loader, slots in ((val, 128), (many, 128)):
        for micro in loader.micro_batches(micro_rows=micro_rows):
            assert len(micro.cu_seqlens) == slots * micro_rows + 1
            starts = (micro.inputs == EOT) & (micro.targets != IGNORE)
            starts = starts.flatten().nonzero()[:, 0].tolist()
            assert set(starts) <= set(micro.cu_seqlens.tolist())


def test_borders_are_those_of_the_steps_own_limit():
    loader = Corpus([40] * 20).loader(
        row_len=16, rows=1, max_doc_len=lambda step: [16, 4, 8][step - 1], max_docs=1
    )
    for step, borders in (1, [0, 16]), (2, [0, 4, 8, 12, 16]), (3, [0, 8, 16]):
        (micro,) = loader.micro_batches(step)
        assert sorted(set(micro.cu_seqlens.tolist())) == borders


def test_padding_rows_are_divided_too():
    """No document longer than max_doc_len reaches the attention, not even one of padding."""
    corpus = Corpus([10] * 4)
    (micro,) = corpus.loader(
        row_len=10, rows=1, max_doc_len=4, long_docs="split", shuffle=False
    ).micro_batches(1, micro_rows=2)
    assert (micro.targets[1] == IGNORE).all()
    assert sorted(set(micro.cu_seqlens.tolist())) == [0, 4, 8, 10, 14, 18, 20]


@FAST
@given(setups())
def test_cu_seqlens_has_one_length_for_one_shape(setup):
    """So that a compiled step is compiled once, whatever the documents."""
    corpus, options = setup
    loader = corpus.loader(**options)
    micros = [m for step in range(1, 7) for m in loader.micro_batches(step, micro_rows=1)]
    assert len({len(m.cu_seqlens) for m in micros}) == 1


def test_borders_agree_with_end_of_text_in_the_inputs():
    corpus = Corpus([5, 3, 1, 7, 2, 8, 6] * 3)
    for micro in corpus.loader(row_len=16, rows=4, max_doc_len=16).micro_batches(1, micro_rows=2):
        starts = torch.nonzero(micro.inputs.flatten() == EOT).flatten().tolist()
        assert sorted(set(micro.cu_seqlens.tolist())) == [*starts, 32]


@pytest.mark.parametrize("row_len, n", [(8, 8), (1024, 8), (2048, 8), (65536, 256)])
def test_default_max_docs(row_len, n):
    assert default_max_docs(row_len) == n


# validation


@FAST
@given(
    CORPORA, st.integers(1, 24), WORLDS, st.integers(1, 4), st.sampled_from([None, 1, 2]), st.data()
)
def test_val_counts_every_target_once(corpus, row_len, world_size, micro_rows, max_docs, data):
    """In order over ranks and rows; only the end of the last row and whole rows after it are
    padding."""
    tokens = np.concatenate(corpus.tokens).astype(np.int64)
    n_tokens = data.draw(st.one_of(st.none(), st.integers(1, len(tokens) - 1)))
    loader = corpus.val(row_len, n_tokens=n_tokens, max_docs=max_docs)
    n = n_tokens or len(tokens) - 1
    assert loader.n_targets == n
    assert loader.targets.dtype == np.uint16 and (loader.targets == tokens[1 : n + 1]).all()

    ranks = [list(loader.micro_batches(rank, world_size, micro_rows)) for rank in range(world_size)]
    n_rows = -(-n // row_len)
    assert {len(micros) for micros in ranks} == {-(-n_rows // (micro_rows * world_size))}
    micros = [micro for together in zip(*ranks) for micro in together]
    assert (
        {m.inputs.shape for m in micros}
        == {m.targets.shape for m in micros}
        == {(micro_rows, row_len)}
    )
    assert len({len(m.cu_seqlens) for m in micros}) == 1
    inputs, targets = (torch.cat([m[i] for m in micros]).flatten().numpy() for i in (0, 1))
    assert (inputs[:n] == tokens[:n]).all() and (targets[:n] == tokens[1 : n + 1]).all()
    assert (targets[n:] == IGNORE).all() and ((inputs >= 0) & (inputs < N_VOCAB)).all()

    rows = []
    for at in range(0, len(inputs), row_len):
        part = tokens[at : min(at + row_len, n)] if at < n else tokens[:0]
        inner = [i for i in np.flatnonzero(part == EOT) if i > 0]
        rows.append(np.diff([0, *inner, len(part)]).tolist() if len(part) else [])
    for i, micro in enumerate(micros):
        check_borders(
            micro,
            rows[i * micro_rows : (i + 1) * micro_rows],
            max_docs or default_max_docs(row_len),
            row_len,
        )


def test_val_pads_the_last_row():
    corpus = Corpus([6, 5], [4])
    (micro,) = corpus.val(row_len=8).micro_batches(micro_rows=2)
    a, b = corpus.tokens
    assert micro.targets.tolist() == [[*a[1:9]], [*a[9:], *b[:4], *[IGNORE] * 2]]
    assert sorted(set(micro.cu_seqlens.tolist())) == [0, 6, 8, 11, 14, 16]  # 8: a row, 14: padding


@pytest.mark.parametrize("n_tokens", [11, 12, 1000])
def test_val_with_too_few_tokens(n_tokens):
    corpus = Corpus([6, 5])
    assert corpus.val(n_tokens=10).n_targets == 10
    with pytest.raises(InputError) as e:
        corpus.val(n_tokens=n_tokens)
    line = str(e.value)
    assert str(corpus.paths[0]) in line and "\n" not in line
    assert f"expected {n_tokens}" in line and "found 11" in line


def test_val_of_a_single_token():
    with pytest.raises(InputError):
        Corpus([1]).val()
    assert Corpus([2]).val().n_targets == 1


def test_val_can_be_gone_through_again():
    loader = Corpus([9] * 9).val()
    once, twice = ([m.inputs.tolist() for m in loader.micro_batches(1, 2)] for _ in range(2))
    assert once == twice and len(once) == 5


# prefetching


def batch(i):
    return [MicroBatch(*(torch.tensor([i, j]) for _ in range(3))) for j in range(2)]


def flat(batches):
    return [[t.tolist() for micro in micros for t in micro] for micros in batches]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(2)
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("n", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_prefetcher_gives_the_same_batches_in_order(n, depth):
    with within(10):
        got = list(Prefetcher(map(batch, range(n)), "cpu", depth))
    assert flat(got) == flat(map(batch, range(n)))
    assert all(isinstance(micro, MicroBatch) for micros in got for micro in micros)


@pytest.mark.parametrize("error", [InputError("x"), ValueError("y"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 3])
def test_prefetcher_raises_here_what_was_raised_there(error, after):
    """After the batches made before it, and the thread is gone."""

    def fails():
        yield from map(batch, range(after))
        raise error

    got = []
    with within(10), pytest.raises(type(error)) as e:
        for micros in Prefetcher(fails(), "cpu"):
            got.append(micros)
    assert e.value is error and flat(got) == flat(map(batch, range(after)))


def test_prefetcher_works_ahead_but_only_a_little():
    made = []

    def batches():
        for i in itertools.count():
            made.append(i)
            yield batch(i)

    prefetcher = Prefetcher(batches(), "cpu", depth=2)
    try:
        deadline = time.monotonic() + 5
        while len(made) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert 2 <= len(made) <= 3  # two in the queue, one in hand
    finally:
        with within(5):
            prefetcher.close()


@pytest.mark.parametrize("taken", [0, 1, 7])
def test_close_ends_the_thread_though_the_queue_is_full(taken):
    before = set(threading.enumerate())
    prefetcher = Prefetcher(map(batch, itertools.count()), "cpu", depth=1)
    with within(10):
        assert flat(itertools.islice(prefetcher, taken)) == flat(map(batch, range(taken)))
        time.sleep(0.05)
        prefetcher.close()
    assert set(threading.enumerate()) == before


def test_close_after_the_end_and_twice():
    prefetcher = Prefetcher(map(batch, range(2)), "cpu")
    with within(10):
        assert len(list(prefetcher)) == 2
        prefetcher.close()
        prefetcher.close()


def test_close_with_an_unread_error():
    """An error nobody came to see does not keep the thread."""

    def fails():
        yield batch(0)
        raise ValueError

    prefetcher = Prefetcher(fails(), "cpu", depth=1)
    with within(10):
        time.sleep(0.05)
        prefetcher.close()


@settings(FAST, max_examples=10)
@given(setups())
def test_prefetched_training_is_training(setup):
    """As the trainer uses it: a list of micro-batches a step."""
    corpus, options = setup
    one, two = corpus.loader(**options), corpus.loader(**options)
    prefetcher = Prefetcher((list(one.micro_batches(step, 0, 2)) for step in range(1, 6)), "cpu")
    with within(10):
        assert flat(prefetcher) == flat(list(two.micro_batches(step, 0, 2)) for step in range(1, 6))


# --- Rows of whole items


@settings(FAST, max_examples=30)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(40, 60), st.integers(1, 9))
def test_best_fit_puts_every_item_where_the_least_room_is_left(sizes, row_len, most):
    rows = best_fit(sizes, row_len, most)
    assert sorted(sum(rows, [])) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= row_len and len(row) <= most for row in rows)
    # By hand, looking at every row
    found = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rooms = [row_len - sum(sizes[j] for j in row) - sizes[i] for row in found]
        fits = [r for r, row in zip(rooms, found) if r >= 0 and len(row) < most]
        if not fits:
            found.append([i])
            continue
        there = [r for r, row in enumerate(found) if rooms[r] == min(fits) and len(row) < most]
        # Of several, the one that came to have that room last: any of them leaves as much
        taken = next(r for r in there if i in next(row for row in rows if row[0] == found[r][0]))
        found[taken].append(i)
    assert rows == sorted(found)


def test_best_fit_leaves_little_room():
    sizes = np.random.default_rng(0).integers(20, 100, size=4000).tolist()
    rows = best_fit(sizes, 256, 16)
    assert sum(sizes) > 0.98 * 256 * len(rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
