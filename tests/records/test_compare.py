"""check and compare: the statistics against scipy and by hand, the verdicts, the command line."""

import json
import math
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_read import our_run

import records.__main__
from records.compare import ALPHA, losses_on_the_way, losses_to_test, ratio, t_test, validations
from records.read import read_runs
from records.runs import Point, Run


def main(capsys, *args):
    """(exit status, stdout, stderr) of ./run.sh records."""
    capsys.readouterr()  # what setting up the test had to say
    status = records.__main__.main([str(a) for a in args])
    return status, *capsys.readouterr()


def log(path, losses, total=None, times=None, every=10):
    """A log in modded-nanogpt's form: validations every so many steps with these losses, at
    these times (seconds)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    times = times or [every * (i + 1) / 10 for i in range(len(losses))]
    total = total or every * len(losses)
    lines = []
    for i, (loss, t) in enumerate(zip(losses, times), start=1):
        line = f"step:{every * i}/{total} val_loss:{loss} train_time:{1000 * t:.0f}ms"
        lines.append(f"{line} step_avg:1.00ms\n")
    path.write_text("".join(lines))
    return path


def logs(folder, lasts, **kwargs):
    """A folder of logs, one for each last loss."""
    for i, last in enumerate(lasts):
        log(folder / f"{i}.txt", [5.0, 4.0, last], **kwargs)
    return folder


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


# --- compare


def test_ratio_is_welchs():
    a, b = [10.0, 10.2, 9.9], [8.0, 8.4, 8.1, 7.9]
    r = ratio(a, b)
    expected = stats.ttest_ind(np.log(a), np.log(b), equal_var=False).confidence_interval(0.95)
    assert r["ratio"] == pytest.approx(stats.gmean(a) / stats.gmean(b))
    assert (r["low"], r["high"]) == pytest.approx(tuple(np.exp(expected)))
    assert ratio(a, [8.0])["low"] is None and ratio(a, []) is None and ratio([0.0], a) is None
    assert ratio([10.0, 10.0], [8.0, 8.0]) == dict(ratio=pytest.approx(1.25), low=None, high=None)


def test_interval_covers_the_true_ratio():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(400):
        r = ratio(list(rng.normal(100, 1, 4)), list(rng.normal(80, 2, 6)))
        inside += r["low"] <= 1.25 <= r["high"]
    assert 0.92 < inside / 400 < 0.98


def test_losses_on_the_way():
    def run(*losses):
        return Run("", "", val=[Point(i, None, 1.0 * i, x) for i, x in enumerate(losses)])

    assert losses_on_the_way([run(10.8, 4.43, 3.8, 3.28)], 3.28) == [4.4, 4.2, 4.0, 3.8, 3.6, 3.4]
    assert losses_on_the_way([run(10.8, 4.43, 3.2), run(11, 3.5, 3.3)], 3.3) == [
        3.5,
        3.45,
        3.4,
        3.35,
    ]
    assert losses_on_the_way([run(10.8, 3.28)], 3.28) == []


def test_compare_side_by_side(tmp_path, capsys):
    for name, speed in (("slow", 10.0), ("fast", 8.0)):
        for i in range(3):
            log(
                tmp_path / name / f"{i}.txt",
                [5.0, 4.0, 3.2],
                times=[speed * t * (1 + i / 100) for t in (1, 2, 3)],
            )
    status, out, err = main(capsys, "compare", tmp_path / "slow", tmp_path / "fast")
    assert status == 0 and not err
    assert f"B  {tmp_path / 'fast'}  3 runs" in out
    rows = dict(re.split("  +", line, maxsplit=1) for line in out.split("\n\n")[1].splitlines()[1:])
    expected = ratio([30, 30.3, 30.6], [24, 24.24, 24.48])
    assert rows["training time, s"].split("  ") == ["30.300 +- 0.300", "24.240 +- 0.240"]
    assert rows["steps"].split() == ["30", "30"] and rows["time to 4, s"].split()[0] == "20.200"
    assert (
        rows["speed-up to 3.2"].split(maxsplit=1)[1]
        == f"1.250 ({expected['low']:.3f} to {expected['high']:.3f})"
    )
    assert "warning" not in out


def test_compare_reads_times_to_losses_between_validations(tmp_path, capsys):
    a, b = log(tmp_path / "a.txt", [5.0, 4.0, 3.0]), log(tmp_path / "b.txt", [5.0, 3.4, 3.2])
    status, out, _ = main(capsys, "compare", a, b, "--json")
    result = json.loads(out)
    assert status == 0 and [r["group"] for r in result["runs"]] == [str(a), str(b)]
    assert (
        result["loss"] == 3.2
    )  # what both reached: a at 2.8 s on the way from 4 to 3, b with its last validation
    first, second = result["groups"]
    assert first["times_to_loss_s"] == pytest.approx([2.8]) and second["times_to_loss_s"] == [3.0]
    assert second["speedup"] == dict(ratio=pytest.approx(2.8 / 3), low=None, high=None)
    assert second["time_ratio"]["ratio"] == 1
    at = {to["loss"]: to["times_s"] for to in second["time_to"]}
    assert at[4.0] == pytest.approx([1 + 1 / 1.6])


def test_compare_goes_to_the_target_if_all_reached_it(tmp_path, capsys):
    folder = tmp_path / "track_1_short"
    a, b = log(folder / "a.txt", [5.0, 3.1]), log(folder / "b.txt", [5.0, 3.2])
    assert json.loads(main(capsys, "compare", a, b, "--json")[1])["loss"] == 3.28
    c = log(folder / "c.txt", [5.0, 3.3])
    assert json.loads(main(capsys, "compare", a, c, "--json")[1])["loss"] == 3.3


def test_compare_without_a_clock_in_every_run_claims_no_speed_up(tmp_path, capsys):
    a = logs(tmp_path / "a", [3.2, 3.1])
    (a / "main.log").write_text("s:10 tel:5.0\ns:30 tel:3.0\n")
    result = json.loads(main(capsys, "compare", a, logs(tmp_path / "b", [3.2, 3.1]), "--json")[1])
    assert [g["speedup"] for g in result["groups"]] == [None, None] and result["loss"] == 3.2
    assert [len(g["time_to"][-1]["times_s"]) for g in result["groups"]] == [2, 2]


def test_compare_single_runs_have_no_interval(tmp_path, capsys):
    a, b = log(tmp_path / "a.txt", [5.0, 3.1]), log(tmp_path / "b.txt", [5.0, 3.2], times=[2, 4])
    _, out, _ = main(capsys, "compare", a, b)
    assert (
        "no interval where a side has a single run" in out
        and " to 3.2 " in out
        and "0.500\n" in out
    )


def test_compare_per_unit_of_matmul_rate(tmp_path, capsys):
    """The same training time on a machine half as fast is twice the speed per unit."""
    for name, rate in (("a", 2e12), ("b", 1e12)):
        for seed in range(2):
            folder = our_run(
                tmp_path / name / str(seed),
                seed=seed,
                probe=dict(matmul=dict(bfloat16=rate), copy=1e10),
            )
            if name == "b":
                for file in ("config.json", "result.json"):
                    (folder / file).write_text(
                        (folder / file).read_text().replace("AMD EPYC", "Other")
                    )
    status, out, _ = main(capsys, "compare", tmp_path / "a", tmp_path / "b")
    assert (
        status == 0 and f"warning: hardware differs: AMD EPYC in {tmp_path / 'a'}, Other in" in out
    )
    assert out.split("speed-up per unit of matmul rate")[1].split()[:2] == ["1", "2.000"]
    assert (
        out.split("time to it x matmul rate, PFLOP")[1].split()[0]
        == f"{2 * 2e12 * (1.25 + 1.25 * 0.8) / 1e15:.4g}"
    )


def test_compare_warns(tmp_path, capsys):
    ours = our_run(tmp_path / "ours")
    killed = our_run(tmp_path / "killed", losses=[(0.5, 3.0, 1.6)], finish=False, seed=4)
    other = log(tmp_path / "other.txt", [5.0, 3.1])
    status, out, _ = main(capsys, "compare", ours, other, killed)
    assert status == 0
    for line in (
        f"metric differs: val_bpb in {ours}, val_loss in {other}",
        f"target differs: 1.5 in {ours}, unknown in",
        f"data differs: fp in {ours}, unknown in {other}",
        f"hardware differs: AMD EPYC in {ours}, unknown in",
        f"{other} has no measured matmul rate",
        f"{killed} did not end (last step 10 of 20)",
    ):
        assert f"warning: {line}" in out
    assert "speed-up to" not in out  # bits per byte and nats per token are different things


def test_compare_json_is_json(tmp_path, capsys):
    a = log(tmp_path / "a.txt", ["nan", "inf", 3.0])
    status, out, _ = main(capsys, "compare", a, "--json")
    (run,) = json.loads(out, parse_constant=pytest.fail)["runs"]
    assert (
        status == 0 and [p["loss"] for p in run["val"]] == [None, None, 3.0] and "train" not in run
    )
    assert (
        run["final_loss"] == 3.0
        and run["time_s"] == 3.0
        and run["steps"] == 30
        and run["path"] == str(a)
    )


def test_compare_every_run_found_is_an_entry(tmp_path, capsys):
    folder = logs(tmp_path / "runs", [3.1, 3.2, 3.3])
    our_run(folder / "ours")
    runs = json.loads(main(capsys, "compare", folder, "--json")[1])["runs"]
    assert len(runs) == len(read_runs(folder)) == 4


def test_compare_refuses(tmp_path, capsys):
    a = log(tmp_path / "a.txt", [5.0, 3.1])
    assert main(capsys, "compare", a, a)[::2] == (
        2,
        f"error: {a}: given twice; expected each group of runs once\n",
    )
    assert main(capsys, "compare", tmp_path / "b")[0] == 2


# --- the command line


@pytest.mark.parametrize("command", ["check", "compare"])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as e:
        main(capsys, command, "--help")
    assert e.value.code == 0 and "RUN" in capsys.readouterr().out


@pytest.mark.parametrize(
    "args, why",
    [
        ([], "required: COMMAND"),
        (["chek"], "invalid choice: 'chek'"),
        (["check", "--nope"], "check --help"),
    ],
)
def test_bad_commands_get_one_line(capsys, args, why):
    status, out, err = main(capsys, *args)
    assert status == 2 and why in err and err.count("\n") == 1 and not out


def test_commands_load_only_what_they_need(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        records.__main__.COMMANDS, "add", ("not_there", "", "a module that is missing")
    )
    monkeypatch.delitem(sys.modules, "records.plot", raising=False)
    assert main(capsys, "compare", log(tmp_path / "a.txt", [5.0, 3.1]))[0] == 0
    assert "records.plot" not in sys.modules
