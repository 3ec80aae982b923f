"""benchmarks/peers/modded.py against a double that prints such a log without a GPU: what runs in
which order, its shards, and what is refused."""

import json

import numpy as np
import pytest
import torch
from doubles import STAND_INS, calls, checkout

import data
from base import InputError
from benchmarks import peers, process
from benchmarks.__main__ import main
from benchmarks.peers import common, modded


@pytest.fixture
def hopper(tmp_path, monkeypatch):
    """A checkout of modded-nanogpt's double, ours, two Hopper GPUs and two shards."""
    checkout("modded", tmp_path / "checkout")
    for name in ("records/big.txt", "data/x.py", "data/fineweb10B/fineweb_train_000099.bin"):
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    monkeypatch.setattr(modded, "LAUNCH", ("launch.py",))
    monkeypatch.setattr(modded, "usable_gpus", lambda asked=0: (2, "NVIDIA H100"))
    monkeypatch.setattr(process, "TRAINER", [STAND_INS / "ours.py"])
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")

    def open_dataset(config, cache):
        assert config.data == "fineweb10B"
        folder = tmp_path / "shards"
        if not folder.exists():
            for split, sizes in (("train", [20_000, 14_000]), ("val", [1000])):
                with data.ShardWriter(folder, split, shard_tokens=20_000) as writer:
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
    command = ["peers", "--modded", str(hopper / "checkout"), "--rounds", "2"]
    command += ["--cache-dir", str(hopper / "prepared"), "--muon-lr", "0.02"]
    assert main([*command, "--json", str(out), "--table", str(table)]) == 0
    assert {p: p.read_bytes() for p in (hopper / "checkout").rglob("*") if p.is_file()} == before
    result = json.loads(out.read_text())
    assert result["device"] == "2 x NVIDIA H100"
    assert result["text"] == dict(
        name="FineWeb", unit="token", train=34_000, val=10_485_760, bits=None
    )

    made = calls(hopper)
    assert [line.split()[0] for line in made] == ["modded", "ours", "ours"] * 2
    # exactly our shards, under its names; the GPUs that we were given
    for line in made[::3]:
        assert line.endswith(
            "train_gpt.py gpu='0,1' fineweb_train_000000.bin fineweb_train_000001.bin"
        )
    assert "--muon-lr 0.02 --track gpt2-small --gpus 2 --target 5.000000" in made[1]
    assert made[1].endswith("gpu='0,1'")

    # 2 us a token in the first stage and the extension, else 1; the second round takes twice as
    # long
    seconds = (2 * 3 * 131072 + 3 * 262144 + 3 * 393216 + 2 * 393216) / 1e6
    there = result["peers"]["modded"]
    for n, row in enumerate(there["rounds"], start=1):
        assert row["peer"]["train_time_s"] == pytest.approx(n * seconds, abs=2e-3)
        assert row["peer"]["loss"] == 5.0 and row["peer"]["steps"] == 10
        assert row["first"]["target"] == 5.0 and row["again"]["reached"]
    assert there["ratios"]["training"] == pytest.approx(1.5 * seconds / 2.0, abs=2e-3)
    assert there["ratios"]["again"] > 0 and there["compiles"]
    text = table.read_text()
    assert text in capsys.readouterr().err
    assert "| 5.0000 | 10 | – |" in text and "| nats/token | steps |" in text
    assert "- modded compiles, with empty caches always; a later start is not timed" in text


def test_our_trainer_finds_the_shards_prepared(hopper):
    (hopper / "prepared/data").mkdir(parents=True)
    task = modded.FineWeb(["--cache-dir", str(hopper / "prepared")], hopper / "task")
    for _ in range(2):
        task.fill(hopper / "cache")
    assert (hopper / "cache/data").resolve() == (hopper / "prepared/data").resolve()


def test_rounds_that_fail(hopper, monkeypatch):
    monkeypatch.setenv("MODDED_FAILS", "2")
    result = peers.run(modded=hopper / "checkout", rounds=3)
    there = result["peers"]["modded"]
    said = "modded: training ended with status 1: RuntimeError: CUDA error: out of luck"
    assert len(there["rounds"]) == 1 and there["skipped"] == said
    monkeypatch.setenv("MODDED_FAILS", "3")  # in the first round of all
    with pytest.raises(InputError, match="out of luck"):
        peers.run(modded=hopper / "checkout")


@pytest.mark.parametrize(
    "options, breaks, message",
    [
        ("--text x", {}, "--modded runs by itself, on GPUs and FineWeb: leave out --text"),
        ("--python no-such-python", {}, "--python no-such-python: no such program"),
        ("--rounds 0", {}, "--rounds 0: expected 1 or more"),
        ("--data stdlib", {}, "expected our trainer on fineweb10B with --val-tokens 10485760"),
        (
            "--val-tokens 1048576",
            {},
            "expected our trainer on fineweb10B with --val-tokens 10485760",
        ),
        ("--train-shards 1", {}, "--train-shards 1: modded-nanogpt needs 2 shards or more"),
        ("", {"train_gpt.py": None}, "has no train_gpt.py: expected a checkout of modded"),
        (
            "",
            {"kernels.py": "raise ImportError('none here')", "torch.py": "raise OSError('cudart')"},
            "cannot import torch (OSError: cudart), kernels (ImportError: none here)",
        ),
    ],
)
def test_modded_is_refused_before_it_trains(hopper, capsys, options, breaks, message):
    for name, content in breaks.items():
        if content is None:
            (hopper / "checkout" / name).unlink()
        else:
            (hopper / "checkout" / name).write_text(content)
    assert main(["peers", "--modded", str(hopper / "checkout"), *options.split()]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last and not calls(hopper)


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


def test_a_peer_on_gpus_sees_them(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in common.environment(gpus=True)  # empty would hide all
