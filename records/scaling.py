"""Losses of runs that are not there, from those that are: a fit over several sizes and lengths.

    L(N, D) = E + A / N^a + B / D^b        bits per byte

N: training FLOPs per token over 6, which is the weights a token is multiplied with, attention
counted in; D: tokens trained on. It is the form of Hoffmann et al. (arXiv 2203.15556, approach 3).
For each pair of exponents, from a grid, E, A and B are the best that are not negative, so that the
fit has no starting point to depend on. Small runs alone do not tell the exponents, on which all
depends far away. So a prediction is the middle of many: the runs are drawn again with replacement
(bootstrap), and each time a pair of exponents is drawn as well, by how likely it makes the runs.
The grid reaches from 0.15 to 0.5; published fits have 0.28 to 0.37. The interval is that of the
draws, with the runs' own distance from their fit added.

Runs are lines of JSON in records/scaling/TEMPLATE-CORPUS.jsonl, made by `./run.sh plan ladder`.
"""

import contextlib
import functools
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from base import InputError

FOLDER = Path(__file__).resolve().parent / "scaling"
EXPONENTS = np.arange(0.15, 0.51, 0.025)  # tried for N and for D
SEEDS = 0.003  # a run differs by so much from one of another seed, as a fraction, at least
DRAWS = 200  # of the bootstrap
COVERED = 0.90  # of the draws lie in an interval
LEAST_SIZES = 4
LEAST_RUNS = 6

# nats per token of their tokenizer and text; for comparison only
CHINCHILLA = dict(
    Hoffmann=(1.69, 406.4, 0.34, 410.7, 0.28),  # arXiv 2203.15556
    Besiroglu=(1.8172, 482.01, 0.3478, 2085.43, 0.3658),  # arXiv 2404.10102
)


class Expected(NamedTuple):
    """A loss that a fit expects, and the interval around it."""

    value: float
    low: float
    high: float


class Fit(NamedTuple):
    """The form above, fitted to runs."""

    E: float
    A: float
    a: float
    B: float
    b: float
    error: float  # root mean square of what the runs differ from it, as a fraction
    draws: tuple  # (E, A, a, B, b) of each draw
    runs: int
    sizes: int
    largest: tuple  # (N, D) of the largest ones

    def __call__(self, n, d):
        """The Expected loss of a model of n trained on d tokens."""
        rng = np.random.default_rng(0)
        drawn = np.array([loss(draw, n, d) for draw in self.draws])
        value = np.median(drawn)
        # A new run differs from the fit as these do
        drawn = drawn * (1 + self.error * rng.standard_normal(len(drawn)))
        low, high = np.quantile(drawn, [(1 - COVERED) / 2, (1 + COVERED) / 2])
        return Expected(float(value), min(float(value), float(low)), max(float(value), float(high)))


def loss(constants, n, d):
    E, A, a, B, b = constants
    return E + A / n**a + B / d**b


def fit(runs):
    """A Fit to [(N, D, loss), ...]. Raises ValueError where they are too few."""
    runs = np.array(runs, dtype=float).reshape(-1, 3)
    sizes = len(np.unique(runs[:, 0]))
    if sizes < LEAST_SIZES or len(runs) < LEAST_RUNS or len(np.unique(runs[:, 1])) < 2:
        raise ValueError(
            f"{len(runs)} runs of {sizes} sizes: expected {LEAST_RUNS} or more, of {LEAST_SIZES} "
            "sizes or more, on two or more numbers of tokens"
        )
    rng = np.random.default_rng(0)
    weights = [np.ones(len(runs))]
    while len(weights) <= DRAWS:
        drawn = np.bincount(rng.integers(len(runs), size=len(runs)), minlength=len(runs))
        there = runs[drawn > 0]
        # A draw of one size, or one length, says nothing of what another would do
        if len(np.unique(there[:, 0])) > 2 and len(np.unique(there[:, 1])) > 1:
            weights.append(drawn)
    constants, left = all_constants(runs, np.array(weights))  # (draws, pairs, 5), (draws, pairs)
    first = constants[0, left[0].argmin()]
    freedom = max(1, len(runs) - 5)
    missed = left.min(1) / freedom  # mean square
    chosen = []
    for i in range(1, len(weights)):
        variance = max(missed[i], SEEDS**2)
        chance = np.exp((left[i].min() - left[i]) / (2 * variance))
        pair = rng.choice(len(chance), p=chance / chance.sum())
        chosen.append(tuple(map(float, constants[i, pair])))
    largest = float(runs[:, 0].max()), float(runs[:, 1].max())
    error = max(SEEDS, math.sqrt(missed[0]))
    return Fit(*map(float, first), error, tuple(chosen), len(runs), sizes, largest)


def all_constants(runs, weights):
    """((draws, pairs, 5) E, A, a, B, b, (draws, pairs) sum of squares of relative differences) with
    the least such sum for each row of weights (draws, runs) and each pair of exponents."""
    n, d, seen = runs.T
    # Relative to the geometric mean, so that columns are of one size
    n0 = np.exp(np.log(n).mean())
    d0 = np.exp(np.log(d).mean())
    everything = []
    squares_left = []
    for a, b in itertools.product(EXPONENTS, EXPONENTS):
        X = np.stack([np.ones(len(n)), (n / n0) ** -a, (d / d0) ** -b], 1) / seen[:, None]
        squares = np.einsum("wr,ri,rj->wij", weights, X, X)  # (draws, 3, 3)
        sums = weights @ X  # (draws, 3)
        constant = weights.sum(1)
        best = np.full(len(weights), np.inf)
        found = np.zeros((len(weights), 3))
        # Whatever is not negative with all three, or else without one of them
        for columns in ([0, 1, 2], [1, 2], [0, 1], [0, 2]):
            part = squares[:, columns][:, :, columns] + 1e-12 * np.eye(len(columns))
            x = np.linalg.solve(part, sums[:, columns][:, :, None])[:, :, 0]
            left = np.maximum(constant - (x * sums[:, columns]).sum(1), 0)
            better = (left < best) & (x >= 0).all(1)
            best[better] = left[better]
            whole = np.zeros((len(weights), 3))
            whole[:, columns] = x
            found[better] = whole[better]
        E, A, B = found.T
        same = np.ones(len(weights))
        everything.append(np.stack([E, A * n0**a, a * same, B * d0**b, b * same], 1))
        squares_left.append(best)
    return np.stack(everything, 1), np.stack(squares_left, 1)


# --------------------------------------------------------------------------------------------------
# The runs


def read_runs(path):
    """[{key: value}, ...] of a file of results. Raises InputError."""
    runs = []
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            run = json.loads(line)
            n = run["flops_per_token"] / 6
            if not min(n, run["tokens"], run["val_bpb"]) > 0:
                raise ValueError("numbers above 0")
            runs.append(run)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(
            f"{path}: line {len(runs) + 1}: {e}; expected what ./run.sh plan ladder writes"
        ) from None
    return runs


def points(runs):
    """[(N, D, bits per byte), ...]"""
    return [(run["flops_per_token"] / 6, run["tokens"], run["val_bpb"]) for run in runs]


@functools.cache
def ladders(folder=FOLDER):
    """{(template, corpus): Fit} of every file of runs that there are enough of."""
    found = {}
    for path in sorted(Path(folder).glob("*-*.jsonl")):
        template, corpus = path.stem.split("-", 1)
        runs = points(read_runs(path))
        with contextlib.suppress(ValueError):  # not enough of them yet
            found[template, corpus] = fit(runs)
    return found


def held_out(runs):
    """[(run, Expected), ...]: the third of the runs with the most FLOPs, as a fit to the others
    expects them. Raises ValueError where those are too few."""
    ordered = sorted(runs, key=lambda run: run["flops_per_token"] * run["tokens"])
    known = ordered[: -(len(ordered) // 3)]
    expected = fit(points(known))
    later = ordered[len(known) :]
    return [(run, expected(run["flops_per_token"] / 6, run["tokens"])) for run in later]
