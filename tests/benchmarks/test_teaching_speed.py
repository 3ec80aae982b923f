"""benchmarks teaching: medians, ratios and what is left out; with trl where it is installed."""

import json

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import teaching


def steps(seconds, tokens=100, counted=40):
    n = len(seconds)
    return dict(seconds=seconds, tokens=[tokens] * n, counted=[counted] * n)


def test_the_median_of_all_steps_but_the_first():
    found = teaching.sft_of([steps([9, 9, 1.0, 2.0]), steps([9, 9, 4.0])])
    assert found["step_s"] == 2 and found["by_round"] == [1.5, 4.0]
    assert found["tokens_per_s"] == 50 and found["counted_per_s"] == 20


def test_the_best_of_trls_counts():
    def rate(x):
        return dict(tokens_per_s=x)

    sft = {"ours": rate(100), "trl, bfd": rate(10), "trl, none": rate(40), "nanochat": rate(101)}
    result = dict(sft=sft, grpo=dict(ours=dict(update_s=2.0), trl=dict(update_s=6.2)))
    found = teaching.compared(result)
    assert found["ratios"] == {
        "sft / trl": 2.5,
        "sft / nanochat": pytest.approx(0.990, abs=1e-3),
        "grpo / trl": 3.1,
    }
    assert list(found["reached"].values()) == [True, False, True]
    assert teaching.compared(dict(sft=dict(ours=rate(1)), grpo={})) == dict(ratios={}, reached={})


def test_nanochats_log(tmp_path):
    peer = teaching.ChatSft.__new__(teaching.ChatSft)
    peer.folder = tmp_path
    lines = [
        "counted 240 90",
        "step 00001 (5%) | loss: 3.1 | lrm: 1.00 | dt: 1500.00ms | tok/sec: 5",
    ]
    lines += [
        "counted 250 80",
        "step 00002 (9%) | loss: 3.0 | lrm: 1.00 | dt: 500.00ms | tok/sec: 5",
    ]
    (peer.folder / "log.txt").write_text("\n".join([*lines, "counted 10 1"]))
    assert peer.numbers() == dict(seconds=[1.5, 0.5], tokens=[240, 250], counted=[90, 80])
    (peer.folder / "log.txt").write_text("nothing")
    with pytest.raises(teaching.InputError, match="its log has no steps"):
        peer.numbers()


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, capsys):
    assert benchmarks.main(["teaching", "--nanochat", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "expected a checkout of nanochat" in said and said.count("\n") == 1


@pytest.mark.slow
def test_beside_trl(tmp_path, capsys):
    """Everything in few steps; where trl is not there, that is a line of the result."""
    out = tmp_path / "teaching.json"
    assert benchmarks.main(["teaching", "--quick", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    mine = result["sft"]["ours"]
    assert 7000 < mine["tokens"] <= 8192 and 0.2 < mine["counted"] / mine["tokens"] < 0.8
    assert 5 < result["grpo"]["ours"]["answer_tokens"] <= teaching.ANSWER_TOKENS
    try:
        import trl  # noqa: F401
    except ImportError:
        assert "trl" in result["skipped"]
        return
    plain = result["sft"]["trl, none"]
    assert plain["tokens"] == pytest.approx(mine["tokens"], rel=0.1)  # as much to learn from
    assert plain["counted"] == pytest.approx(mine["counted"], rel=0.1)
    assert result["ratios"].keys() == {"sft / trl", "grpo / trl"}
