"""compare: speed-ups by hand and against scipy, the command line."""

import json
import re
import sys

import numpy as np
import pytest
from made_logs import log, logs, main
from scipy import stats
from test_read import our_run

import records.__main__
from records.compare import losses_on_the_way, ratio
from records.read import read_runs
from records.runs import Point, Run


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
    monkeypatch.setitem(records.__main__.COMMANDS, "not_there", "a module that is missing")
    monkeypatch.delitem(sys.modules, "records.plot", raising=False)
    assert main(capsys, "compare", log(tmp_path / "a.txt", [5.0, 3.1]))[0] == 0
    assert "records.plot" not in sys.modules
