"""records/scaling.py: a form that is known is found again, its interval holds what is true, and
what is too little is refused."""

import json

import numpy as np
import pytest

from base import InputError
from records import scaling

TRUE = (0.55, 40.0, 0.30, 150.0, 0.35)  # E, A, a, B, b


def runs_of(noise, sizes=(4e5, 1.3e6, 2.1e6, 4.2e6), tokens=(2.6e5, 5.2e5, 1e6), seed=0):
    rng = np.random.default_rng(seed)
    runs = []
    for n in sizes:
        for d in tokens:
            runs.append((n, d, scaling.loss(TRUE, n, d) * (1 + noise * rng.standard_normal())))
    return runs


def test_without_noise_the_form_is_found_again():
    fit = scaling.fit(runs_of(0.0))
    assert fit[:5] == pytest.approx(TRUE, rel=0.02)
    assert fit.error == scaling.SEEDS and (fit.runs, fit.sizes) == (12, 4)
    assert fit.largest == (4.2e6, 1e6)
    value, low, high = fit(1e8, 2e9)
    assert value == pytest.approx(scaling.loss(TRUE, 1e8, 2e9), rel=0.1)
    assert low <= value <= high


def test_intervals_hold_the_truth_and_grow_with_the_distance():
    near, far = (2e6, 2e6), (1e8, 2e9)
    held = {near: 0, far: 0}
    widths = {near: [], far: []}
    for seed in range(4):
        fit = scaling.fit(runs_of(0.004, seed=seed))
        for place in held:
            expected = fit(*place)
            held[place] += expected.low <= scaling.loss(TRUE, *place) <= expected.high
            widths[place].append((expected.high - expected.low) / expected.value)
    assert held[near] >= 3 and held[far] >= 3
    assert 3 * np.median(widths[near]) < np.median(widths[far])


def test_draws_are_of_the_runs_and_no_constant_is_negative(monkeypatch):
    """With one pair of exponents only the runs differ between draws."""
    monkeypatch.setattr(scaling, "EXPONENTS", np.array([0.2]))  # too small: E would be negative
    fit = scaling.fit(runs_of(0.01))
    assert len(set(fit.draws)) > scaling.DRAWS / 2
    assert fit.E == 0 and all(min(draw) >= 0 for draw in fit.draws)


def test_larger_models_and_more_tokens_are_never_worse():
    fit = scaling.fit(runs_of(0.02, seed=3))
    values = [fit(n, 1e9).value for n in (1e6, 1e7, 1e8, 1e9)]
    assert values == sorted(values, reverse=True)
    values = [fit(1e8, d).value for d in (1e6, 1e8, 1e10)]
    assert values == sorted(values, reverse=True) and values[-1] > 0


@pytest.mark.parametrize(
    "runs",
    [[], runs_of(0, sizes=(1e6, 2e6, 3e6)), runs_of(0, tokens=(1e6,)), runs_of(0)[:5]],
    ids=["none", "three sizes", "one length", "five runs"],
)
def test_too_few_runs_are_no_fit(runs):
    with pytest.raises(ValueError, match="expected 6 or more, of 4 sizes or more"):
        scaling.fit(runs)


def as_lines(runs):
    lines = []
    for n, d, bpb in runs:
        lines.append(json.dumps(dict(flops_per_token=6 * n, tokens=d, val_bpb=bpb)))
    return "\n".join(lines) + "\n"


def test_files_of_runs(tmp_path):
    (tmp_path / "gpt-stdlib.jsonl").write_text(as_lines(runs_of(0)))
    (tmp_path / "llama-english.jsonl").write_text(as_lines(runs_of(0)[:4]))  # not enough yet
    ladders = scaling.ladders(tmp_path)
    assert list(ladders) == [("gpt", "stdlib")]
    later = scaling.held_out(scaling.read_runs(tmp_path / "gpt-stdlib.jsonl"))
    assert len(later) == 4
    for run, expected in later:
        assert expected.value == pytest.approx(run["val_bpb"], rel=0.01)


@pytest.mark.parametrize("text", ["x", "[]", "{}", '{"flops_per_token": -1, "tokens": 1}'])
def test_files_that_are_none_are_refused(tmp_path, text):
    path = tmp_path / "gpt-x.jsonl"
    path.write_text(as_lines(runs_of(0)[:2]) + text)
    with pytest.raises(InputError, match="line 3: .* expected what ./run.sh plan ladder writes"):
        scaling.read_runs(path)
    with pytest.raises(InputError, match="cannot|No such file"):
        scaling.read_runs(tmp_path / "none.jsonl")


def test_the_committed_runs_can_be_read():
    for path in scaling.FOLDER.glob("*.jsonl"):
        template, corpus = path.stem.split("-", 1)
        for run in scaling.read_runs(path):
            assert (run["template"], run["corpus"]) == (template, corpus)
