"""benchmarks/gpu_day.py: parts are kept and gone on with, tests that fail are named; slowly, all of
it at its tiny shape."""

import json
import sys

import pytest

from base import InputError
from benchmarks import gpu_day
from benchmarks.__main__ import main

ALONE = """\
1 worker [3 items]
tests/kernels/test_mlp.py::test_a[1-2] PASSED                    [ 10%]
tests/kernels/test_mlp.py::test_b[a b] FAILED                    [ 20%]
tests/kernels/test_mlp.py::test_c SKIPPED (no GPU)               [ 30%]
noise tests/kernels/test_mlp.py::test_d
"""
WORKERS = """\
[gw0] [  1%] PASSED tests/kernels/test_mlp.py::test_a[1-2]
[gw1] [ 99%] FAILED tests/kernels/test_mlp.py::test_b[a b]
[gw1] [100%] SKIPPED tests/kernels/test_mlp.py::test_c
"""
SUMMARY = "FAILED tests/kernels/test_mlp.py::test_b[a b] - assert 1 == 2 - but not\n"


@pytest.mark.parametrize("lines", [ALONE, WORKERS])
def test_outcomes_of_tests(lines):
    found = gpu_day.outcomes((lines + SUMMARY).splitlines())
    prefix = "tests/kernels/test_mlp.py::"
    assert found == {
        f"{prefix}test_a[1-2]": ("passed", ""),
        f"{prefix}test_b[a b]": ("failed", "assert 1 == 2 - but not"),
        f"{prefix}test_c": ("skipped", ""),
    }


@pytest.fixture
def parts(monkeypatch):
    """Parts that take no time: their calls, and what they return or raise."""
    calls = []
    does = {}

    def part(name):
        def call(day, part, limit):
            calls.append((part, limit))
            found = does.get(part, dict(text=part))
            if isinstance(found, Exception):
                raise found
            return found

        return call

    monkeypatch.setattr(gpu_day, "PARTS", {name: (part(name), 30) for name in ("a", "b", "c")})
    return calls, does


def test_parts_are_kept_and_the_rest_is_done_again(tmp_path, parts, capsys):
    calls, does = parts
    does["b"] = InputError("no such\nkernel")
    file = tmp_path / "r.json"
    command = ["gpu-day", "--tiny", "--out", str(tmp_path / "out"), "--json", str(file)]
    assert main(command) == 0
    result = json.loads(file.read_text())["parts"]
    assert {name: part["status"] for name, part in result.items()} == dict(
        a="done", b="failed", c="done"
    )
    assert result["b"]["error"] == "no such kernel"
    assert json.loads((tmp_path / "out/a.json").read_text())["text"] == "a"
    assert "| b | failed | 0.0 | no such kernel |" in capsys.readouterr().err

    del does["b"]
    calls.clear()
    assert main(command) == 0
    assert [name for name, _ in calls] == ["b"]  # only what failed
    assert json.loads(file.read_text())["parts"]["a"]["text"] == "a"
    calls.clear()
    assert main([*command, "--muon-lr", "0.02"]) == 0  # of other options, nothing is kept
    assert [name for name, _ in calls] == ["a", "b", "c"]
    calls.clear()
    (tmp_path / "out/c.json").write_text("{broken")
    assert main([*command, "--muon-lr", "0.02", "--only", "c"]) == 0
    assert [name for name, _ in calls] == ["c"]


def test_time_is_shared_out(tmp_path, parts):
    calls, _ = parts
    result = gpu_day.run(tmp_path, tiny=True, minutes=20 / 60)
    assert [name for name, _ in calls] == ["a", "b", "c"]
    assert all(limit <= 20 for _, limit in calls)
    calls.clear()
    result = gpu_day.run(tmp_path / "other", tiny=True, minutes=10 / 60)
    assert not calls
    assert {part["status"] for part in result["parts"].values()} == {"no time left"}
    assert "the same command" not in gpu_day.render(result)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--only", "d"], "--only d: expected of a, b, c"),
        (["--no-such"], "--no-such"),
        (["--minutes", "0"], "--minutes 0: expected a number above 0"),
    ],
)
def test_bad_options(tmp_path, parts, capsys, options, said):
    assert main(["gpu-day", "--tiny", "--out", str(tmp_path), *options]) == 2
    assert said in capsys.readouterr().err
    assert not parts[0]


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_day.torch.cuda, "is_available", lambda: False)
    assert main(["gpu-day", "--out", str(tmp_path / "out")]) == 2
    assert "no CUDA GPU here; --tiny" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tests_that_fail_are_named_and_a_cut_keeps_what_was_seen(tmp_path, monkeypatch):
    day = gpu_day.Day(tmp_path, True, [], workers=1)

    def execute(what, command, folder, log, env, ok, every, lines, limit):
        assert command[:3] == [sys.executable, "-m", "pytest"]
        assert limit == 7
        lines += [(0.0, line + "\n") for line in (ALONE + SUMMARY).splitlines()]
        raise InputError("it was ended after 7 s")

    monkeypatch.setattr(gpu_day, "execute", execute)
    found = gpu_day.kernels(day, "kernels", 7)
    assert found["counts"] == dict(passed=1, failed=1, skipped=1)
    assert found["failed"] == {"tests/kernels/test_mlp.py::test_b[a b]": "assert 1 == 2 - but not"}
    assert found["cut"] == "it was ended after 7 s"
    text = gpu_day.render(dict(tiny=True, parts=dict(kernels=dict(found, status="done"))))
    assert "1 failed, 1 passed, 1 skipped; cut short: it was ended" in text
    assert "- tests/kernels/test_mlp.py::test_b[a b]: assert 1 == 2" in text

    def nothing(*args):
        raise InputError("no module named pytest")

    monkeypatch.setattr(gpu_day, "execute", nothing)
    with pytest.raises(InputError, match="no module"):
        gpu_day.kernels(day, "kernels", 7)


def test_stages_measured_before_a_cut_are_kept(tmp_path, monkeypatch):
    day = gpu_day.Day(tmp_path, True, [], workers=1)
    stage = dict(tokens=128, ms=1.0, p20=0.9, p80=1.1, tokens_per_s=128_000, peak_share=0.4)

    def execute(what, command, folder, log, env, limit):
        file = command[command.index("--json") + 1]
        if limit > 1:
            file.write_text(json.dumps(dict(stages=[stage], fit=None)))
        raise InputError("it was ended")

    monkeypatch.setattr(gpu_day, "execute", execute)
    found = gpu_day.steps(day, "steps", 5)
    assert (found["stages"], found["cut"]) == ([stage], "it was ended")
    text = gpu_day.render(dict(tiny=False, parts=dict(steps=dict(found, status="done"))))
    assert "| 128 | 1.00 (0.90–1.10) | 128,000 | 40.0% |" in text and "cut short" in text
    with pytest.raises(InputError, match="it was ended"):
        gpu_day.steps(day, "steps", 1)


@pytest.mark.slow
def test_a_tiny_day(tmp_path):
    result = gpu_day.run(tmp_path, tiny=True, workers=1, minutes=60)
    parts = result["parts"]
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(parts, "done")
    assert list(parts) == list(gpu_day.PARTS)
    cold, resume, warm = parts["cold"], parts["resume"], parts["warm"]
    assert [step for step, _ in cold["curve"]] == [4, 8, 9]
    assert cold["checkpoints"]
    assert resume["before"] == 9 and resume["steps"] == 13
    assert resume["curve"][:3] == cold["curve"] and resume["curve"][-1][0] == 13
    assert warm["curve"] == cold["curve"]  # the same training
    assert [s["tokens"] for s in parts["steps"]["stages"]] >= [128, 256, 384]
    assert "def " in parts["sample"]["text"]
    for name in ("kernels", "trainer"):
        assert parts[name]["counts"]["passed"] and not parts[name]["failed"]
    # What is there is not done again, what is missing is
    (tmp_path / "sample.json").unlink()
    again = gpu_day.run(tmp_path, tiny=True, workers=1, minutes=60)["parts"]
    assert again.pop("sample")["text"] == parts.pop("sample")["text"]
    assert again == parts
