"""records/metrics.py: what each metric is, and that everything else asks there."""

import math

import pytest

from records import metrics
from records.check import t_test, verdict
from records.metrics import METRICS, VAL_LOSS, Evaluation, better, measure, meets, needs_bytes, unit


def test_metrics_of_text_that_is_guessed_at_random():
    """65 characters of a byte each: ln 65 nats per token are log2 65 bits per byte."""
    measured = measure(Evaluation(nats=1000 * math.log(65), targets=1000, n_bytes=1000))
    assert measured == pytest.approx({"val_loss": math.log(65), "val_bpb": math.log2(65)})
    # A token of four bytes carries as many nats in fewer tokens
    measured = measure(Evaluation(nats=1000 * math.log(65), targets=250, n_bytes=1000))
    assert measured == pytest.approx({"val_loss": 4 * math.log(65), "val_bpb": math.log2(65)})


def test_without_bytes_only_metrics_of_tokens_are_known():
    measured = measure(Evaluation(nats=6.0, targets=3, n_bytes=None))
    assert measured == {"val_loss": 2.0, "val_bpb": None}
    assert needs_bytes("val_bpb") and not needs_bytes(VAL_LOSS)


def test_lower_is_better():
    assert meets(1.5, 1.5) and meets(1.4, 1.5) and not meets(1.6, 1.5)
    assert not meets(math.nan, 1.5)
    assert better(3.0, None) and better(2.9, 3.0)
    assert not better(3.0, 3.0) and not better(3.1, 3.0) and not better(math.nan, 3.0)


def test_names_and_units():
    assert list(METRICS)[0] == VAL_LOSS  # step lines begin with it
    assert unit("val_bpb") == "bits per byte" and unit("loss_of_others") == "loss_of_others"


def test_higher_may_be_better(monkeypatch):
    """A metric says so in its line, and targets, the best one and the test of a mean follow."""
    share = metrics.Metric("of targets", lambda e: 0.5, ".3f", lower_is_better=False)
    monkeypatch.setitem(metrics.METRICS, "val_accuracy", share)
    assert meets(0.6, 0.5, "val_accuracy") and meets(0.5, 0.5, "val_accuracy")
    assert not meets(0.4, 0.5, "val_accuracy")
    assert better(0.6, 0.5, "val_accuracy") and not better(0.5, 0.5, "val_accuracy")
    above = t_test([0.61, 0.62, 0.60], 0.5, metric="val_accuracy")
    below = t_test([0.41, 0.42, 0.40], 0.5, metric="val_accuracy")
    assert above.passed and not below.passed
    assert "above 0.5 with p" in verdict(above, 0.5, "val_accuracy", 0, lower=False)
    assert "not above 0.5" in verdict(below, 0.5, "val_accuracy", 0, lower=False)
