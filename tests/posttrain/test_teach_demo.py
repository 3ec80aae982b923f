"""./run.sh teach-demo: its stages follow each other, go on where they were, and are measured."""

import json

import pytest

from posttrain import teach_demo


@pytest.mark.slow
def test_all_stages_in_two_steps_each(tmp_path, capsys):
    """Too few to learn anything: a goal is missed, and said so."""
    argv = ["--fraction", "0.01", "--run-dir", str(tmp_path / "demo"), "--json"]
    assert teach_demo.main(argv) == 3
    said = json.loads(capsys.readouterr().out)
    assert said["fraction"] == 0.01 and not said["reached"] and not said["goals"]["format_sft"]
    assert [stage["stage"] for stage in said["stages"]] == ["base", "sft", "dpo", "grpo"]
    assert all(2 < stage["bpb"] < 10 for stage in said["stages"])
    assert json.loads((tmp_path / "demo" / "result.json").read_text()) == said
    first = (tmp_path / "demo" / "dpo" / "model.safetensors").stat().st_mtime

    # Again: what is there is measured, not trained
    assert teach_demo.main(argv) == 3
    again = json.loads(capsys.readouterr().out)
    assert {**again, "seconds": 0} == {**said, "seconds": 0}
    assert (tmp_path / "demo" / "dpo" / "model.safetensors").stat().st_mtime == first


@pytest.mark.parametrize(
    "argv, problem",
    [
        (["--fraction", "0"], "--fraction 0.0: expected a number above 0"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--steps", "3"], "unrecognized arguments: --steps"),
    ],
)
def test_bad_input_is_one_line(argv, problem, capsys):
    assert teach_demo.main(argv) == 2
    said = capsys.readouterr().err
    assert problem in said and said.count("\n") == 1


def test_the_goals_are_the_issue_s():
    """A table and a result of what was measured."""
    Measured = teach_demo.Measured
    measured = [
        Measured("base", None, None, None, 1.2),
        Measured("sft", 0.95, 0.1, 0.0, 2.0),
        Measured("dpo", 0.95, 0.2, 0.9, 2.06),
        Measured("grpo", 0.95, 0.96, 0.9, 2.06),
    ]
    args = teach_demo.parse([])
    result = teach_demo.result_of_demo(measured, 0.02, args, 1.0)
    assert result["reached"] and result["bpb_before"] == 2.0 and result["preferred_dpo"] == 0.9
    assert result["accuracy_sft"] == 0.1 and result["accuracy_grpo"] == 0.96
    worse = [*measured[:2], measured[2]._replace(bpb=2.07, short=0.89), measured[3]]
    goals = teach_demo.result_of_demo(worse, 0.2, args, 1.0)["goals"]
    assert [name for name, met in goals.items() if not met] == [
        "kl_grpo",
        "preferred_dpo",
        "bpb_after",
    ]
    assert len(teach_demo.table(measured).splitlines()) == 5
