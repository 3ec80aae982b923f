"""check: the statistics against scipy and by hand, the verdicts."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_logs import log, logs, main
from scipy import stats
from test_read import our_run

from records.check import ALPHA, losses_to_test, t_test, validations
from records.runs import Point, Run

# --- the t-test


def test_t_by_hand():
    """Four losses with mean 3.27 and sd 0.01 * sqrt(2/3): t = -sqrt(6); for 3 degrees of freedom
    t's distribution is 1/2 + (x / (1 + x^2) + atan(x)) / pi with x = t / sqrt(3), here
    -sqrt(2)."""
    test = t_test([3.27, 3.28, 3.26, 3.27], 3.28)
    p = 0.5 + (-math.sqrt(2) / 3 + math.atan(-math.sqrt(2))) / math.pi
    assert (test.n, test.mean, test.sd) == pytest.approx((4, 3.27, 0.01 * math.sqrt(2 / 3)))
    assert (test.t, test.p) == pytest.approx((-math.sqrt(6), p)) and p == pytest.approx(
        0.0459, abs=1e-4
    )
    assert not test.passed


LOSSES = st.lists(st.integers(32700, 32900).map(lambda x: x / 10000), min_size=2, max_size=20)


@settings(deadline=None, max_examples=60)
@given(LOSSES, st.integers(1, 20))
def test_t_agrees_with_scipy_and_more_is_enough_but_not_too_much(losses, looks):
    test = t_test(losses, 3.28, looks)
    if len(set(losses)) == 1:
        assert test.p is None and test.more is None and not test.passed
        return
    expected = stats.ttest_1samp(losses, 3.28, alternative="less")
    assert (test.t, test.p) == pytest.approx((expected.statistic, min(1, looks * expected.pvalue)))
    assert test.passed == (test.p < ALPHA)
    if test.mean >= 3.28:
        assert test.more is None and not test.passed
    elif test.more is not None:

        def p(n):
            return looks * stats.t.cdf((test.mean - 3.28) / (test.sd / math.sqrt(n)), n - 1)

        assert p(test.n + test.more) < ALPHA
        assert test.more == 0 or p(test.n + test.more - 1) >= ALPHA
        assert (test.more == 0) == test.passed


@pytest.mark.parametrize("losses", [[3.2], [3.2, 3.2, 3.2], [3.2, math.nan, 3.1], [3.2, math.inf]])
def test_no_test_without_spread_or_numbers(losses):
    test = t_test(losses, 3.28)
    assert test.p is None and test.t is None and not test.passed


# --- early stops


def simulated(rng, n, mean, sd=0.001, planned=8):
    """n runs that stop at their first validation at or below 3.28; mean: true loss at each
    validation."""
    runs = []
    for i in range(n):
        val = []
        for k in range(planned):
            val.append(Point(10 * (k + 1), None, k + 1.0, float(rng.normal(mean[k], sd))))
            if val[-1].loss <= 3.28:
                break
        runs.append(
            Run(
                str(i),
                "modded-nanogpt",
                target=3.28,
                steps=val[-1].step,
                total_steps=10 * planned,
                val=val,
                finished=len(val) == planned,
                final_loss=val[-1].loss,
            )
        )
    return runs


def test_last_losses_of_early_stops_fool_a_t_test_and_ours_not():
    """Runs whose true loss is the target at every validation: whoever tests last losses 'shows'
    it to be lower."""
    rng = np.random.default_rng(0)
    naive = ours = 0
    for _ in range(300):
        runs = simulated(rng, 6, [3.28] * 8)
        naive += t_test([r.final_loss for r in runs], 3.28).passed
        losses, step, looks = losses_to_test(runs)
        assert len(losses) == 6 and looks in (1, 8) and (step is None) == (looks == 1)
        ours += t_test(losses, 3.28, looks).passed
    assert naive > 150 and ours <= 3  # 1 in 100 is what the test allows itself


def test_early_stops_of_a_good_recipe_pass():
    rng = np.random.default_rng(0)
    runs = simulated(rng, 6, [3.5, 3.45, 3.4, 3.35, 3.3, 3.27, 3.26, 3.25])
    losses, step, looks = losses_to_test(runs)
    assert (step, looks) == (60, 8) and t_test(losses, 3.28, looks).passed


def test_planned_validations():
    def run(steps, total, **config):
        return Run(
            "",
            "",
            steps=steps[-1],
            total_steps=total,
            config=config,
            val=[Point(s, None, 0, 4) for s in steps],
        )

    assert validations([run([0, 125, 250], 1000)]) == 8
    assert validations([run([250], 1100)]) == 5
    assert validations([run([100, 200], 1000), run([100, 200, 300], 1000)]) == 10
    assert validations([run([100, 200, 300, 310], 310, eval_every=100)]) == 4
    assert validations([run([100, 200], 310, eval_every=100)]) == 4


# --- check


def test_check_passes(tmp_path, capsys):
    folder = logs(tmp_path / "runs", [3.2785, 3.2772, 3.2791, 3.2780, 3.2776, 3.2788])
    status, out, err = main(capsys, "check", folder, "--target", 3.28)
    expected = stats.ttest_1samp(
        [3.2785, 3.2772, 3.2791, 3.2780, 3.2776, 3.2788], 3.28, alternative="less"
    )
    lines = out.splitlines()
    assert status == 0 and not err
    assert f"t {expected.statistic:.3f}, p {expected.pvalue:.2g}" in lines[-3]
    assert lines[-2] == "training time 3.000 s"
    assert lines[-1] == (
        "pass: the mean val_loss of 6 runs, 3.27820, is below 3.28 with p = "
        f"{expected.pvalue:.2g} < 0.01"
    )


def test_check_takes_the_records_of_a_tracks_folder_one_by_one(tmp_path, capsys):
    """They are recipes of their own; one that fails is the status of all."""
    for name, lasts in dict(good=[3.27, 3.271, 3.272], better=[3.25, 3.251, 3.252]).items():
        folder = tmp_path / "track" / name
        logs(folder, lasts)
        (folder / "summary.json").write_text("{}")
    status, out, _ = main(capsys, "check", tmp_path / "track", "--target", 3.28)
    verdicts = [line for line in out.splitlines() if line.startswith(("pass", "fail"))]
    assert status == 0
    assert ["3.25100" in verdicts[0], "3.27100" in verdicts[1]] == [True, True]
    assert main(capsys, "check", tmp_path / "track", "--target", 3.26)[0] == 1


@pytest.mark.parametrize(
    "lasts, verdict",
    [
        (
            [3.2785, 3.2799, 3.2805],
            r"is below 3.28 with p = 0.3, not < 0.01; at this mean and sd \d+ more would do",
        ),
        ([3.2785, 3.2872, 3.2851], "3.28360, is not below 3.28"),
        ([3.27, "nan", 3.26], "nan, is not below 3.28"),
        ([3.27], "of 1 run, 3.27000, is below 3.28, but one run shows no spread"),
    ],
)
def test_check_fails(tmp_path, capsys, lasts, verdict):
    status, out, err = main(capsys, "check", logs(tmp_path / "runs", lasts), "--target", 3.28)
    assert status == 1 and not err
    last = out.splitlines()[-1]
    assert last.startswith("fail: the mean val_loss of ") and re.search(verdict, last)


def test_check_takes_the_public_tracks_target(tmp_path, capsys):
    folder = logs(tmp_path / "track_2_medium" / "new", [2.917, 2.918, 2.9175, 2.9172])
    status, out, _ = main(capsys, "check", *sorted(folder.iterdir()))
    assert status == 0 and "below 2.92 with" in out


def test_check_of_runs_that_stopped_early(tmp_path, capsys):
    """Ours stop at the target: the losses at the step where the first stopped are tested, the
    last ones are not."""
    for seed, bpb in enumerate((1.40, 1.41, 1.405)):
        our_run(tmp_path / f"{seed}", losses=[(0.5, 3.0, bpb)], seed=seed)
    our_run(tmp_path / "3", losses=[(0.5, 3.0, 1.501), (1.0, 3.0, 1.2)], seed=3)
    status, out, _ = main(capsys, "check", tmp_path)
    expected = stats.ttest_1samp([1.40, 1.41, 1.405, 1.501], 1.5, alternative="less").pvalue
    assert status == 1
    assert (
        "note: 3 of 4 runs stopped before their last step" in out
        and "the 2 validations planned" in out
    )
    said = "mean val_bpb at step 10 of 4 runs, 1.42900, is below 1.5 with p = "
    assert f"{said}{2 * expected:.2g}, not < 0.01" in out
    assert out.count("stopped early") == 3 and "--steps N --eval-every N" in out


def test_check_leaves_out_what_did_not_end_and_says_so(tmp_path, capsys):
    for seed, bpb in enumerate((1.40, 1.41, 1.405)):
        our_run(tmp_path / f"{seed}", losses=[(1.0, 3.0, bpb)], seed=seed)
    our_run(tmp_path / "killed", losses=[(0.5, 3.0, 1.6)], seed=9, finish=False)
    status, out, _ = main(capsys, "check", tmp_path)
    assert (
        status == 0 and f"left out: {tmp_path / 'killed'} did not end (last step 10 of 20)" in out
    )
    assert "pass: the mean val_bpb of 3 runs (1 that did not end left out)" in out
    status, _, err = main(capsys, "check", tmp_path / "killed")
    assert status == 2 and "did not end (last step 10 of 20), and there is no other" in err


def test_check_refuses_what_it_cannot_answer(tmp_path, capsys):
    a = logs(tmp_path / "a", [3.27, 3.26])
    b = log(tmp_path / "b.txt", [5.0, 3.27])
    copy = tmp_path / "copy.txt"
    copy.write_bytes((a / "0.txt").read_bytes())
    for seed, folder in ((1, "x"), (1, "y"), (2, "z")):
        our_run(
            tmp_path / folder,
            losses=[(1.0, 3.0, 1.4 + ord(folder) / 9999)],
            seed=seed,
            stop=(1.5, 1.6)[seed - 1],
        )
    x, y, z = (tmp_path / folder for folder in "xyz")
    for args, why in (
        ([a], "names no target; give one with --target"),
        ([x, z], "has target 1.5"),
        ([a, b, "--target", 3.28], "total_steps differs (30 and 20)"),
        ([x, y], "both have seed 1"),
        ([a, copy, "--target", 3.28], "the same losses and times"),
        ([a, "--target", "x"], "invalid float value"),
        ([x, z, "--target", 1.5], "target differs (1.5 and 1.6)"),
        ([a, "--target", "nan"], "a finite number"),
        ([tmp_path / "nowhere"], "no such file"),
        ([], "required: RUN"),
    ):
        status, out, err = main(capsys, "check", *args)
        assert (
            status == 2
            and why in err
            and err.startswith("error: ")
            and err.count("\n") == 1
            and not out
        ), args


def test_check_counts_a_run_once(tmp_path, capsys):
    a = logs(tmp_path / "a", [3.27, 3.26, 3.265])
    _, out, _ = main(capsys, "check", a, a / "0.txt", "--target", 3.28)
    assert "\nn 3, " in out
