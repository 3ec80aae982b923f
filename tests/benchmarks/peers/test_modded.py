"""benchmarks/peers/modded.py against a double that prints such a log without a GPU: what its source
says, what runs in which order, its shards, its stages, and what is refused."""

import json

import numpy as np
import pytest
import torch
from doubles import STAND_INS, calls, checkout
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from base import InputError
from benchmarks import peers, subject
from benchmarks.__main__ import main
from benchmarks.peers import common, modded

MODDED = (STAND_INS / "modded/train_gpt.py").read_text()
MODDED_TOKENS = 3 * 131072 + 3 * 262144 + 4 * 393216


@pytest.fixture
def hopper(tmp_path, monkeypatch):
    """A checkout of modded-nanogpt's double, ours, two Hopper GPUs and shards that suffice."""
    checkout("modded", tmp_path / "checkout")
    for name in ("records/big.txt", "data/x.py", "data/fineweb10B/fineweb_train_000099.bin"):
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    monkeypatch.setattr(modded, "LAUNCH", ("launch.py",))
    monkeypatch.setattr(modded, "usable_gpus", lambda asked=0: (2, "NVIDIA H100"))
    monkeypatch.setattr(common, "TRAINER", STAND_INS / "ours_modded.py")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    def open_dataset(config, cache):
        assert config.data == "fineweb10B"
        folder = tmp_path / "shards"
        if not folder.exists():
            for split, sizes in (("train", [2_000_000, 1_400_000]), ("val", [1000])):
                with data.ShardWriter(folder, split, shard_tokens=2_000_000) as writer:
                    writer.write(np.zeros(sum(sizes), dtype=np.uint16))
        train, val = (sorted(folder.glob(f"{split}_*.bin")) for split in ("train", "val"))
        return data.Dataset(
            config.data, train[: config.train_shards], val, 50257, 50256, "f", folder
        )

    monkeypatch.setattr(data, "open_dataset", open_dataset)
    return tmp_path


def test_modded_and_ours_in_turns(hopper, capsys):
    out, table = hopper / "out.json", hopper / "out.md"
    before = {p: p.read_bytes() for p in (hopper / "checkout").rglob("*") if p.is_file()}
    assert (
        main(
            [
                "peers",
                "--modded",
                str(hopper / "checkout"),
                "--rounds",
                "2",
                "--muon-lr",
                "0.02",
                "--steps",
                "2600",
                "--extension",
                "0",
                "--json",
                str(out),
                "--table",
                str(table),
            ]
        )
        == 0
    )
    assert {p: p.read_bytes() for p in (hopper / "checkout").rglob("*") if p.is_file()} == before
    result = json.loads(out.read_text())
    assert result["recipe"]["tokens"] == MODDED_TOKENS and result["gpus"] == 2
    assert [(s["start"], s["end"], s["tokens"]) for s in result["recipe"]["stages"]] == [
        (0, 3, 131072),
        (3, 6, 262144),
        (6, 9, 393216),
        (9, 10, 393216),
    ]

    made = calls(hopper)
    assert [line.split()[0] for line in made] == ["modded", "ours", "ours"] * 2
    # exactly our shards, under its names; the GPUs that we were given
    assert all(
        line.endswith("train_gpt.py gpu='0,1' fineweb_train_000000.bin fineweb_train_000001.bin")
        for line in made[::3]
    )
    assert "--gpus 2 --steps 11 --extension 0 --target 0" in made[1] and "--muon-lr 0.02" in made[1]
    assert "--steps 2600 --extension 0 --target 5.000000" in made[2] and made[2].endswith(
        "gpu='0,1'"
    )

    first, second = result["rounds"]
    # 2 us a token in the first stage and the extension, else 1; the second round takes twice as
    # long
    seconds = (2 * 3 * 131072 + 3 * 262144 + 3 * 393216 + 2 * 393216) / 1e6
    assert first["peer"]["train_time_s"] == pytest.approx(seconds, abs=1e-3)
    assert second["peer"]["train_time_s"] == pytest.approx(2 * seconds, abs=2e-3)
    assert (
        first["peer"]["tokens"] == MODDED_TOKENS
        and first["peer"]["loss"] == 5.0
        and first["peer"]["steps"] == 10
    )
    # ours has 4, 4 and 3 steps in its stages, and validates after 3, 6, 9 and 11
    assert first["equal"]["steps"] == 11 and first["equal"]["tokens"] == MODDED_TOKENS
    assert first["equal"]["loss"] == pytest.approx(7.25)
    assert first["to_loss"]["steps"] == 750 and first["to_loss"]["loss"] == 3.75
    # 5.0 lies at step 600, between 500 and 750; all in the first of three stages of 867 steps
    assert first["to_loss"]["time_to_its_loss"] == pytest.approx(600 * 131072 * 5e-7)
    summary = result["summary"]
    assert (
        summary["loss_difference"] == dict(median=2.25, least=2.25, most=2.25)
        and summary["reached"] == 2
    )
    ours = first["to_loss"]["time_to_its_loss"]
    assert summary["to_its_loss"] == pytest.approx(
        dict(median=1.5 * seconds / ours, least=seconds / ours, most=2 * seconds / ours), rel=1e-3
    )
    text = table.read_text()
    assert (
        text in capsys.readouterr().err
        and "+2.2500 from its own" in text
        and "`--muon-lr 0.02 --" in text
    )


def test_with_as_many_steps_one_run_of_ours_serves_for_both(hopper):
    result = peers.run(
        modded=hopper / "checkout", trainer_options=["--steps", "11", "--extension", "0"]
    )
    assert [line.split()[0] for line in calls(hopper)] == [
        "modded",
        "ours",
    ] and "--target 0" in calls(hopper)[1]
    assert result["rounds"][0]["equal"] == result["rounds"][0]["to_loss"]
    assert result["summary"]["to_its_loss"] is None  # 7.25 is not 5


def test_modded_losses_that_we_miss_and_rounds_that_fail(hopper, monkeypatch):
    monkeypatch.setenv("OURS_MISSES", "1")
    monkeypatch.setenv("MODDED_FAILS", "2")
    saved = []
    result = peers.run(
        modded=hopper / "checkout", rounds=3, save=lambda r: saved.append(json.dumps(r))
    )
    assert len(result["rounds"]) == len(saved) == 1 and result["summary"]["to_its_loss"] is None
    assert (
        result["stopped"]
        == "modded: training ended with status 1: RuntimeError: CUDA error: out of luck"
    )
    text = peers.render(result)
    assert "it takes – times our training time (reached in 0 of 1 rounds)" in text
    assert "Stopped: modded: training" in text
    monkeypatch.setenv("MODDED_FAILS", "3")  # in the first round of all
    with pytest.raises(InputError, match="out of luck"):
        peers.run(modded=hopper / "checkout")


@pytest.mark.parametrize(
    "options, breaks, message",
    [
        ("", dict(), None),
        ("--text x", {}, "--modded runs by itself, on GPUs and FineWeb: leave out --text"),
        ("--python no-such-python", {}, "--python no-such-python: no such program"),
        ("--rounds 0", {}, "--rounds 0: expected 1 or more"),
        ("--data stdlib", {}, "expected our trainer on fineweb10B with --val-tokens 10485760"),
        (
            "--val-tokens 1048576",
            {},
            "expected our trainer on fineweb10B with --val-tokens 10485760",
        ),
        (
            "--train-shards 1",
            {},
            "--train-shards 1: 2,000,000 tokens; modded-nanogpt needs 2 shards or more",
        ),
        ("", {"train_gpt.py": None}, "has no train_gpt.py: expected a checkout of modded"),
        (
            "",
            {"train_gpt.py": "x ="},
            "its steps or stages are not written as expected: take commit f411b3d3",
        ),
        (
            "",
            {"train_gpt.py": MODDED.replace("duration=1 / 3", "duration=1 / 2")},
            "are not written as expected",
        ),
        (
            "",
            {"train_gpt.py": MODDED.replace("8 * 2048", "open('x')")},
            "are not written as expected",
        ),
        (
            "",
            {"kernels.py": "raise ImportError('none here')", "torch.py": "raise OSError('cudart')"},
            "lacks torch (OSError: cudart); kernels (ImportError: none here)",
        ),
    ],
)
def test_modded_is_refused_before_it_trains(hopper, capsys, options, breaks, message):
    for name, content in breaks.items():
        if content is None:
            (hopper / "checkout" / name).unlink()
        else:
            (hopper / "checkout" / name).write_text(content)
    status = main(["peers", "--modded", str(hopper / "checkout"), *options.split()])
    last = capsys.readouterr().err.splitlines()[-1]
    if message:
        assert (
            status == 2 and last.startswith("error: --") and message in last and not calls(hopper)
        )
    else:
        assert status == 0


@pytest.mark.parametrize(
    "gpus, asked, expected",
    [
        ([], 0, "found no CUDA GPU"),
        ([("NVIDIA GeForce RTX 4090", (8, 9))], 0, "found NVIDIA GeForce RTX 4090"),
        (
            [("NVIDIA H100", (9, 0)), ("NVIDIA B200", (10, 0))],
            0,
            "found NVIDIA B200, NVIDIA H100",
        ),
        (
            [("NVIDIA H100", (9, 0))] * 4,
            3,
            "--gpus 3: modded-nanogpt runs on 1, 2, 4 or 8 GPUs, and here are 4",
        ),
        ([("NVIDIA H100", (9, 0))] * 4, 8, "and here are 4"),
        ([("NVIDIA H100", (9, 0))] * 4, 2, (2, "NVIDIA H100")),
        ([("NVIDIA H200", (9, 0))] * 7, 0, (4, "NVIDIA H200")),
    ],
)
def test_modded_needs_hopper(monkeypatch, gpus, asked, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: gpus[i][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i][1])
    if isinstance(expected, tuple):
        assert modded.usable_gpus(asked) == expected
    else:
        with pytest.raises(InputError) as e:
            modded.usable_gpus(asked)
        assert expected in str(e.value)


def test_a_round_that_misses_the_loss_leaves_no_ratio():
    def side(**more):
        return dict(loss=3.0, train_time_s=4.0, process_s=8.0, time_to_its_loss=2.0) | more

    rounds = [
        dict(peer=side(train_time_s=8.0), equal=side(loss=3.5), to_loss=side(time_to_its_loss=t))
        for t in (2.0, 4.0)
    ]
    got = modded.summarise(rounds)
    assert (
        got["to_its_loss"] == dict(median=3.0, least=2.0, most=4.0)
        and got["reached"] == 2
        and got["process"]
    )
    assert got["equal_tokens_time"]["median"] == 2.0 and got["loss_difference"]["median"] == 0.5
    rounds[1]["to_loss"]["time_to_its_loss"] = None
    got = modded.summarise(rounds)
    assert got["to_its_loss"] is None and got["process"] is None and got["reached"] == 1


def test_gpus_are_those_we_were_given(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert (
        common.environment(gpus=True, X="1")["CUDA_VISIBLE_DEVICES"] == "3"
        and common.environment(gpus=True, X="1")["X"] == "1"
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "CUDA_VISIBLE_DEVICES" not in common.environment(gpus=True)  # empty would hide all


@settings(deadline=None, max_examples=8)
@given(st.integers(10**6, 10**9))
def test_as_many_tokens_as_steps_can_make(tokens):
    c = subject.parse(["--track", "gpt2-small"])
    mine = sum(subject.step_tokens(modded.of_length(c, modded.steps_for(c, tokens))[1]))
    assert abs(mine - tokens) <= max(131_072, 0.5 * 393_216 + 262_144)
