"""benchmarks/peers/minimind.py against a double: what it is given, how it is timed and judged."""

import json
import math
import sys

import pytest
from doubles import STAND_INS, calls, checkout
from helpers import write_text

from base import InputError
from benchmarks import peers, process
from benchmarks.__main__ import main
from benchmarks.peers import common, minimind


@pytest.fixture
def around(tmp_path, monkeypatch):
    """A text whose validation has letters of two bytes, our trainer's double, a record of calls."""
    text = write_text(tmp_path / "text.txt")
    text.write_text(text.read_text() + "Wörter, größer, über; " * 50)
    monkeypatch.setattr(process, "TRAINER", [STAND_INS / "ours.py"])
    monkeypatch.setattr(minimind.Checkout, "modules", ("torch", "tokenizers"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    checkout("minimind", tmp_path / "checkout")
    return tmp_path


def nats_of(text, length):
    """Summed nats of the double on this text, a target a byte, in windows of this length with the
    two tokens around them."""
    logits = {}
    total = 0.0
    ids = [3 + i for i in byte_ids(text)]
    at = 0
    for part in common.pieces(text, Bytes(), length - minimind.AROUND):
        n = len(part.encode())
        for x, y in zip([1, *ids[at : at + n - 1]], ids[at : at + n]):
            if x not in logits:
                scores = [(3 * x + 5 * k) % 7 for k in range(300)]
                logits[x] = scores, math.log(sum(map(math.exp, scores)))
            total += logits[x][1] - logits[x][0][y]
        at += n
    return total


ALPHABET = json.loads((STAND_INS / "minimind/model/tokenizer.json").read_text())["model"]["vocab"]


def byte_ids(text):
    """The double's ids, less its special tokens: bytes in the order of their printable letters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in printable}
    others = (b for b in range(256) if b not in letters)
    letters |= {b: chr(256 + i) for i, b in enumerate(others)}
    return [ALPHABET[letters[b]] - 3 for b in text.encode()]


class Bytes:
    """A token is a byte."""

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


@pytest.mark.slow
def test_minimind_and_ours(around):
    out = around / "out.json"
    table = around / "out.md"
    command = ["peers", "--minimind", str(around / "checkout"), "--text", str(around / "text.txt")]
    command += ["--minimind-options", "epochs=3", "hidden_size=64"]
    assert main([*command, "--json", str(out), "--table", str(table)]) == 0
    result = json.loads(out.read_text())
    there = result["peers"]["minimind"]
    row = there["rounds"][0]["peer"]
    text = (around / "text.txt").read_text()
    train, val = common.split(text)

    # All of the text, in lines that its loop neither cuts off nor fills with more than it has to
    made = calls(around)
    assert [line.split()[0] for line in made] == ["minimind", "ours", "ours"]
    assert "--device=cpu --hidden_size=64 " in made[0] and " --epochs=3 " in made[0]
    lines = json.loads((around / "calls.fed").read_text())
    assert "".join(lines) == train
    assert all(335 <= len(line.encode()) <= 338 for line in lines[:-1])

    # Its 12 steps are timed by their lines, 11 of them; nats per character, in the better windows
    assert row["steps"] == 12 and 0.2 < row["train_time_s"] < row["process_s"]
    assert 20 <= row["ms_per_step"] < 1e3 * row["train_time_s"]
    losses = {str(length): nats_of(val, length) / len(val) for length in (340, 4 * 340)}
    assert row["loss_by_window"] == pytest.approx(losses, rel=1e-5)
    assert row["loss"] == min(row["loss_by_window"].values())
    assert row["val_units"] == len(val) < row["val_targets"] == len(val.encode())
    assert f"--target {row['loss']:.6f}" in made[1]
    bits = row["loss"] * len(val) / len(val.encode()) / math.log(2)
    assert f"| {row['loss']:.4f} | {bits:.4f} | 12 |" in table.read_text()
    assert there["ratios"]["training"] == pytest.approx(row["train_time_s"] / 2.0)


def test_what_is_missing_is_one_line(around, monkeypatch, capsys):
    monkeypatch.setattr(minimind.Checkout, "modules", ("no_such_datasets",))
    with pytest.raises(InputError) as e:
        peers.run(around / "text.txt", minimind=around / "checkout")
    assert str(e.value).startswith(f"minimind: skipped, because {sys.executable} cannot import no_")
    assert not calls(around)


@pytest.mark.parametrize(
    "options, message",
    [
        ("width=3", "--minimind-options width=3: expected NAME=VALUE with an option of its"),
        ("max_seq_len=3", "--minimind-options max_seq_len=3: expected a number of 4 or more"),
    ],
)
def test_its_options(around, options, message):
    with pytest.raises(InputError) as e:
        peers.run(
            around / "text.txt", minimind=around / "checkout", minimind_options=options.split()
        )
    assert message in str(e.value) and not calls(around)


def test_steps_are_timed_by_their_lines():
    peer = object.__new__(minimind.Checkout)
    peer.lines = [(7.0, "Model Params: 3M"), (9.0, "Epoch:[1/2](1/2), loss: 2.0")]
    with pytest.raises(InputError, match="minimind: its log has no two steps"):
        peer.clock({})
    peer.lines += [(9.5, "Epoch:[1/2](2/2), loss: 2.0"), (9.9, "saved")]
    peer.lines += [(11.5, "Epoch:[2/2](1/2), loss: 2.0"), (12.0, "Epoch:[2/2](2/2), loss: 2.0")]
    assert peer.clock({}) == dict(steps=4, train_time_s=3.0, ms_per_step=500.0)
