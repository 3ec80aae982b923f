"""kernels/contexts.py beside the PyTorch forms of models/copies.py and models/counts.py, which
tests/models compares with their definitions."""

import numpy as np
import pytest
import torch
from helpers import built

from data import ShardWriter
from kernels import contexts
from models import copies, counts

EOT = 0


@pytest.fixture(scope="module")
def in_c(tmp_path_factory):
    return built(contexts.Contexts, tmp_path_factory.mktemp("cache"))[0]


def batch_of(text, rows, T, seed):
    """(inputs, targets, starts): rows of whole documents from a text, one after the other, as they
    are packed, the last one cut; some targets do not count."""
    rng = np.random.default_rng(seed)
    begins = [*np.flatnonzero(text == EOT).tolist(), len(text) - 1]
    documents = list(zip(begins, begins[1:]))
    found = []
    for _ in range(rows):
        inputs, targets, starts = [], [], []
        while len(inputs) < T:
            begin, end = documents[rng.integers(len(documents))]
            inputs += text[begin:end].tolist()
            targets += text[begin + 1 : end + 1].tolist()
            starts += [True] + [False] * (end - begin - 1)
        found.append([inputs[:T], targets[:T], starts[:T]])
    inputs, targets, starts = (torch.tensor(x) for x in zip(*found))
    targets[:, T // 3 : T // 3 + 5] = -100
    return inputs, targets, starts


def text_of(n, n_vocab, seed):
    """Tokens in documents of about 20, which repeat themselves and each other."""
    rng = np.random.default_rng(seed)
    words = rng.integers(1, n_vocab, (8, 5))
    text = words[rng.integers(8, size=n // 5)].flatten()
    text[rng.random(len(text)) < 0.2] = rng.integers(1, n_vocab)
    text[rng.random(len(text)) < 0.05] = EOT
    text[0] = EOT
    return text


SHAPES = [(1, 1), (1, 2), (3, 40), (2, 300), (5, 1025)]


@pytest.mark.parametrize("rows, T", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_what_was_there_earlier(in_c, rows, T, n):
    given = batch_of(text_of(2000, 9, 1), rows, T, 2)
    expected = copies.earlier(*given, n)
    for found, wanted in zip(copies.earlier(*given, n, in_c), expected):
        assert found.dtype == torch.int64 and torch.equal(found, wanted)
    assert T < 40 or expected[1].max() > 1


@pytest.mark.parametrize("rows, T", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("leave_out", [False, True])
@pytest.mark.parametrize("most", [700, 10_000])
def test_what_was_there_in_the_training_text(in_c, tmp_path, rows, T, n, leave_out, most):
    text = text_of(2000, 9, 1)
    with ShardWriter(tmp_path, "train") as writer:
        writer.write(text)
    table = counts.Counts.of_text(writer.paths, EOT, n, most=most)
    assert table.in_part == (most == 700)
    for own in True, False:
        table.own = own
        given = batch_of(text if own else text_of(2000, 12, 3), rows, T, 2)
        expected = table.of_targets(*given, leave_out)
        for found, wanted in zip(table.of_targets(*given, leave_out, in_c), expected):
            assert found.dtype == torch.int64 and torch.equal(found, wanted)
        assert T < 40 or expected[1].max() > 1


def test_rows_that_are_a_part_of_others(in_c):
    whole = [torch.cat([x, x], dim=1) for x in batch_of(text_of(2000, 9, 1), 3, 40, 2)]
    part = [x[:, 40:] for x in whole]
    for found, wanted in zip(copies.earlier(*part, 3, in_c), copies.earlier(*part, 3)):
        assert torch.equal(found, wanted)


def test_without_a_text_nothing_was_there(in_c):
    given = batch_of(text_of(500, 9, 1), 2, 50, 2)
    for found in counts.Counts(3).of_targets(*given, False, in_c):
        assert not found.any()


def test_threads_change_nothing(in_c):
    given = batch_of(text_of(2000, 9, 1), 7, 100, 2)
    before = torch.get_num_threads()
    found = []
    for threads in 1, 3:
        torch.set_num_threads(threads)
        found.append(torch.stack(copies.earlier(*given, 4, in_c)))
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_other_devices_are_not_for_it():
    assert contexts.takes(torch.zeros(2, 2, dtype=torch.long))
    assert not contexts.takes(torch.zeros(2, 2, dtype=torch.long, device="meta"))
    assert not contexts.takes(torch.zeros(0, 2, dtype=torch.long))
