"""benchmarks/peers: nanoGPT and nanochat against doubles of a few lines, on a text and on track
laptop: what runs in which order, what is read from it, and what happens when it cannot run."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
from doubles import STAND_INS, calls, checkout
from helpers import write_text
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import runtime.corpus
from base import InputError
from benchmarks import peers, process, subject
from benchmarks.__main__ import main
from benchmarks.peers import common
from benchmarks.peers import nanochat as chat
from benchmarks.peers import nanogpt as gpt


@pytest.fixture
def around(tmp_path, monkeypatch):
    """A folder with a text, our trainer's double and a record of what was called."""
    write_text(tmp_path / "text.txt")
    monkeypatch.setattr(process, "TRAINER", [STAND_INS / "ours.py"])
    monkeypatch.setattr(gpt.Checkout, "modules", ("numpy",))
    monkeypatch.setattr(gpt.Checkout, "steps", 40)
    monkeypatch.setattr(gpt, "EVAL_EVERY", 5)
    fewer = {"num-iterations": 200, "eval-every": 25}
    monkeypatch.setattr(chat, "SHAKESPEARE", chat.SHAKESPEARE | fewer)
    monkeypatch.setattr(chat, "LAPTOP", chat.LAPTOP | {"num-iterations": 40, "eval-every": 10})
    monkeypatch.setattr(chat.Checkout, "modules", ("torch", "pyarrow", "rustbpe", "wandb"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path


@pytest.fixture
def quick(around, monkeypatch):
    """The same without starting torch: nanoGPT's loss is 5."""
    found = dict(loss=5.0, steps=35, params=804096, val_units=9726, val_targets=9725)
    monkeypatch.setattr(gpt.Checkout, "evaluate", lambda self, task: found)
    monkeypatch.setattr(gpt.Checkout, "modules", ())
    monkeypatch.setattr(chat.Checkout, "modules", ("pyarrow", "rustbpe", "wandb"))
    monkeypatch.setenv("NO_TORCH", "1")
    return around


def bigram_loss(inputs, targets, n):
    """Mean nats of the fakes' model, one by one."""

    def nats(x, y):
        logits = [(3 * x + 5 * k) % 7 for k in range(n)]
        return math.log(sum(map(math.exp, logits))) - logits[y]

    pairs = list(zip(inputs, targets))
    known = {pair: nats(*pair) for pair in set(pairs)}
    return sum(known[pair] for pair in pairs) / len(pairs)


def test_nanogpt_and_ours_in_turns(around, capsys):
    there = checkout("nanogpt", around / "checkout")
    out = around / "out.json"
    table = around / "table.md"
    before = {p: p.read_bytes() for p in there.rglob("*") if p.is_file()}
    text = (around / "text.txt").read_text()
    (around / "text.txt").write_bytes(
        text.replace("\n", "\r\n").encode()
    )  # nanoGPT reads line ends as one character
    assert (
        main(
            [
                "peers",
                "--nanogpt",
                str(there),
                "--text",
                str(around / "text.txt"),
                "--n-layer",
                "3",
                "--json",
                str(out),
                "--table",
                str(table),
            ]
        )
        == 0
    )
    result = json.loads(out.read_text())
    assert {
        p: p.read_bytes() for p in there.rglob("*") if p.is_file()
    } == before  # the checkout is only read

    # everything in the order of the rounds, without GPUs
    made = calls(around)
    assert [line.split()[0] for line in made] == ["nanogpt", "ours", "ours"]
    assert all(line.endswith("gpu=''") for line in made)
    assert (
        "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=40 "
        "--lr_decay_iters=40"
        in made[0]
        and "--eval_interval=5" in made[0]
    )

    # its loss on every character but the first, and that loss for us
    there, ids = result["peers"]["nanogpt"], list(map(sorted(set(text)).index, text))
    val = ids[int(len(ids) * 0.9) :]
    loss = bigram_loss(val[:-1], val[1:], 30)
    for row in there["rounds"]:
        assert (
            row["peer"]["loss"] == pytest.approx(loss, rel=1e-5)
            and row["peer"]["val_targets"] == len(val) - 1
        )
        assert row["peer"]["val_units"] == len(val)
        assert (
            row["first"]["cold_start_s"] == 60 and row["again"]["cold_start_s"] == 5
        )  # caches empty, then filled
        # In bits per byte, a byte being a character
        assert row["first"]["target"] == pytest.approx(loss / math.log(2), abs=1e-5)
        assert row["first"]["loss"] == pytest.approx(loss - 0.01 * math.log(2), abs=1e-5)
        assert row["again"]["dtype"] == "bfloat16"
        # of its 40 steps the clock takes the 35 up to the checkpoint, less the first
        assert row["peer"]["steps"] == 35 and row["peer"]["train_time_s"] == pytest.approx(
            34 * 0.040
        )
        assert (
            row["peer"]["ms_per_step"] == pytest.approx(40) and row["peer"]["own_estimate"] == 2.65
        )
    assert result["split"] == dict(peers=len(val), ours=len(val), same=True)
    assert there["ratios"]["training"] == pytest.approx(
        34 * 0.040 / 2.0
    )  # 20 of our steps take 2 s
    assert there["ratios"]["interpolated"] == pytest.approx(34 * 0.040 / 1.75)
    assert there["ratios"]["again"] == pytest.approx(
        sum(r["peer"]["process_s"] for r in there["rounds"])
        / sum(r["again"]["process_s"] for r in there["rounds"])
    )

    err = capsys.readouterr().err
    said = table.read_text()
    assert said in err and "by a line between our validations 0.8 times" in err
    # one table: processes first, then training
    medians = there["medians"]
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("|")]
    assert len(rows) == 5 and rows[0][1::2][:2] == ["process s", "training s"]
    for row, side in zip(rows[2:], ("peer", "first", "again")):
        assert row[1] == f"{medians[side]['process_s']:,.1f}"
        assert row[2] == ("" if side == "peer" else f"{there['ratios'][side]:,.1f}")
        assert row[3:5] == (["1.4", ""] if side == "peer" else ["2.0", "0.7"])
        assert row[5] == f"{medians[side]['loss']:.4f}"
        assert row[6] == f"{medians[side]['loss'] / math.log(2):.4f}"  # a byte is a character
    assert "`--n-layer 3`" in err and "round 1 of 1" in err


def fed(folder):
    """What nanochat was given last: pieces by split."""
    return json.loads((folder / "calls.fed").read_text())


def byte_loss(texts, length, pairs=False):
    """Summed nats of nanochat's double on these documents in windows of this length, and the
    number of targets."""
    nats = n = 0
    for text in texts:
        ids = tokenizer(pairs).encode(text)
        inputs = [0 if i % length == 0 else ids[i - 1] for i in range(len(ids))]
        nats, n = nats + bigram_loss(inputs, ids, 600) * len(ids), n + len(ids)
    return nats, n


def tokenizer(pairs):
    namespace = {}
    source = (STAND_INS / "nanochat/nanochat/tokenizer.py").read_text()
    exec(source, namespace)
    return namespace["Tokenizer"](pairs)


@pytest.mark.slow
def test_nanochat_and_ours(around):
    text = (
        around / "text.txt"
    ).read_text() + "Wörter, größer, über; " * 50  # in the validation split
    (around / "text.txt").write_text(text)
    result = peers.run(around / "text.txt", nanochat=checkout("nanochat", around / "checkout"))
    there, val = result["peers"]["nanochat"], text[int(len(text) * 0.9) :]
    row, size = there["rounds"][0]["peer"], len(val.encode())
    losses = {str(length): byte_loss([val], length)[0] / len(val) for length in (64, 256)}
    assert row["loss_by_window"] == pytest.approx(losses, rel=1e-5)
    assert row["loss"] == min(row["loss_by_window"].values())
    assert row["val_units"] == len(val) < row["val_targets"] == size
    assert row["steps"] == 200 and row["train_time_s"] == pytest.approx(189 * 0.050, abs=1e-6)
    assert row["dtype"] is None
    assert (
        row["own_metric"] == "val_bpb" and row["own_estimate"] == row["own_estimates"][200] == 2.0
    )
    assert there["ratios"]["training"] == pytest.approx(189 * 0.050 / 2.0)
    assert there["ratios"]["first"] > 0 and there["ratios"]["again"] > 0
    assert "nanochat compiles, with empty caches always" in peers.render(result)
    assert result["text"]["bits"] == pytest.approx(len(val) / size / math.log(2))
    made = calls(around)
    assert [line.split()[0] for line in made] == ["tok_train", "nanochat", "ours", "ours"]
    assert "--vocab-size=265" in made[0] and all(
        f" {flag} " in made[1]
        for flag in (
            "--depth=4",
            "--aspect-ratio=32",
            "--head-dim=32",
            "--max-seq-len=64",
            "--device-batch-size=12",
            "--total-batch-size=768",
            "--num-iterations=200",
            "--eval-every=25",
        )
    )
    assert result["torch"] == dict(ours=torch.__version__, nanochat=torch.__version__)
    # all of the text in full rows; what it trains on, not as neighbours
    train = list(common.pieces(text[: -len(val)], tokenizer(False), 64))
    assert "".join(fed(around)["val"]) == val and fed(around)["train"] != train
    assert sorted(fed(around)["train"]) == sorted(train)
    places = list(map(train.index, fed(around)["train"]))
    assert sum(b == a + 1 for a, b in zip(places, places[1:])) < len(train) / 20
    # ours divides by bytes, theirs by characters
    assert not result["split"]["same"] and "others in ours" in peers.render(result)


@pytest.fixture
def stdlib(around, monkeypatch):
    """A library of 6 files instead of Python's."""
    library = around / "library"
    library.mkdir()
    for i in range(6):
        write_text(library / f"{i}.py", 4000, seed=i)
    monkeypatch.setattr(chat.Checkout, "modules", ("pyarrow", "rustbpe", "wandb"))
    real = data.open_dataset
    monkeypatch.setattr(
        runtime.corpus,
        "open_dataset",
        lambda config, cache: real(
            dataclasses.replace(config, data="text", text=str(library)), cache
        ),
    )
    return library


SMALL = "--tokenizer bpe:300 --batch-tokens 256 --val-tokens 1000".split()  # of our trainer


def test_laptop(around, stdlib, monkeypatch, capsys):
    there = checkout("nanochat", around / "checkout")
    out = around / "out.json"
    table = around / "table.md"
    monkeypatch.setenv("NANOCHAT_DTYPE", "bfloat16")
    monkeypatch.setenv("UNIFORM_AT", "2048")  # which is better than what its double predicts
    assert (
        main(
            [
                "peers",
                "--nanochat",
                str(there),
                "--laptop",
                "--nanochat-options",
                "num-iterations=30",
                "matrix-lr=0.04",
                *SMALL,
                "--json",
                str(out),
                "--table",
                str(table),
            ]
        )
        == 0
    )
    result = json.loads(out.read_text())
    there = result["peers"]["nanochat"]
    row, first = there["rounds"][0]["peer"], there["rounds"][0]["first"]

    # its tokenizer has as many tokens as ours, and its special ones; the options given win
    made = calls(around)
    assert [line.split()[0] for line in made] == ["tok_train", "nanochat", "ours", "ours"]
    assert "--vocab-size=309 --doc-cap=1000000000" in made[0] and all(
        f" {flag} " in made[1]
        for flag in (
            "--aspect-ratio=64",
            "--head-dim=64",
            "--max-seq-len=256",
            "--total-batch-size=8192",
            "--num-iterations=30",
            "--eval-every=10",
            "--matrix-lr=0.04",
        )
    )
    assert "--num-iterations=30 " in there["command"] and "--matrix-lr=0.04" in there["command"]
    assert f"{' '.join(SMALL)} --track laptop --target {row['loss']:.6f}" in made[2]

    # the documents that we train on, and the text that we validate on
    with tempfile.TemporaryDirectory() as cache:
        config = data.DataConfig(data="text", text=str(stdlib), tokenizer="bpe:300")
        dataset = data.open_dataset(config, cache)
        ids = data.read_shard(dataset.val[0])[1:1001].tolist()
        texts = [dataset.tokenizer.decode(part) for part in split_at(ids, dataset.eot)]
        n_bytes = int(dataset.tokenizer.token_bytes[ids].sum())
        train = [
            part
            for path in dataset.train
            for part in split_at(data.read_shard(path).tolist(), dataset.eot)
        ]
        train = [dataset.tokenizer.decode(part) for part in train]
    assert len(train) == 6 and all(
        any(p.read_text().startswith(text) for p in stdlib.iterdir()) for text in train
    )
    assert "".join(fed(around)["val"]) == "".join(texts) and len("".join(texts).encode()) == n_bytes
    expected = [piece for text in train for piece in common.pieces(text, tokenizer(True), 256)]
    assert sorted(fed(around)["train"]) == sorted(expected) and fed(around)["train"] != expected
    assert result["text"] == dict(
        name="Python's standard library",
        unit="byte",
        val=n_bytes,
        train=sum(len(text.encode()) for text in train),
        bits=None,
    )
    assert result["split"] == dict(peers=n_bytes, ours=n_bytes, same=True)

    # bits per byte, in the windows that are better
    nats, targets = byte_loss(texts, 256, pairs=True)
    assert row["loss_by_window"] == pytest.approx(
        {"256": nats / math.log(2) / n_bytes, "2048": math.log2(600) * targets / n_bytes}, rel=1e-5
    )
    assert row["loss"] == row["loss_by_window"]["2048"] < row["loss_by_window"]["256"]
    assert row["val_units"] == n_bytes > row["val_targets"] == targets
    assert row["train_time_s"] == pytest.approx(19 * 0.050) and row["own_estimates"]["10"] == 3.9
    assert row["dtype"] == "bfloat16" and there["ratios"]["training"] == pytest.approx(
        19 * 0.050 / 2
    )
    assert first["loss"] == pytest.approx(row["loss"] - 0.01, abs=1e-5)
    assert first["time_to_loss_s"] == pytest.approx(1.75)
    assert result["target"] == 1.5 and result["metric"] == "val_bpb"
    text = table.read_text()
    assert text in capsys.readouterr().err and "| bits/byte | steps |" in text
    assert "nanochat in bfloat16, ours in bfloat16; rounds: 1; training by" in text
    assert f"The track's target is 1.5: nanochat ended {row['loss'] - 1.5:.4f} above it." in text


def split_at(ids, eot):
    """Documents in ids, without the token before each."""
    return [list(group) for mark, group in itertools.groupby(ids, lambda i: i == eot) if not mark]


def test_laptop_says_where_nanochat_ended(around, stdlib, monkeypatch):
    monkeypatch.setattr(common.Peer, "available", lambda self: dict(missing=[], torch="2"))
    found = dict(loss=1.53, steps=40, params=1, val_units=1, val_targets=1)
    monkeypatch.setattr(chat.Checkout, "evaluate", lambda self, task: found)
    monkeypatch.setenv("OURS_MISSES", "1")
    result = peers.run(
        laptop=True,
        nanochat=checkout("nanochat", around / "checkout"),
        trainer_options=SMALL,
    )
    assert "--target 1.530000" in calls(around)[-1] and "(not reached)" in peers.render(result)
    assert set(result["peers"]["nanochat"]["ratios"].values()) == {None}
    for loss, said in (
        (1.53, "nanochat ended 0.0300 above it. The times are to its loss."),
        (1.5, "nanochat ended 0.0000 below it."),
        (1.48, "nanochat ended 0.0200 below it."),
    ):
        result["peers"]["nanochat"]["medians"]["peer"]["loss"] = loss
        assert f"The track's target is 1.5: {said}" in peers.render(result)


def test_laptop_is_the_tracks_shape():
    c = subject.parse(["--track", "laptop-deep"])
    flags = chat.LAPTOP
    assert (c.n_layer, c.n_embd, c.n_embd // c.n_head, c.row_len, c.batch_tokens, c.val_tokens) == (
        flags["depth"],
        flags["depth"] * flags["aspect-ratio"],
        flags["head-dim"],
        flags["max-seq-len"],
        (flags["total-batch-size"],),
        flags["eval-tokens"],
    )
    assert flags["device-batch-size"] * flags["max-seq-len"] == flags["total-batch-size"]
    own = subject.parse(["--text", "x"])
    for track, task in ((c, chat.Laptop), (own, common.TextFile)):
        assert track.val_row_len == task.longer * track.row_len


def test_a_missing_package_skips_that_peer_only(quick, monkeypatch, capsys):
    # whether or not it is installed here
    missing = "raise ModuleNotFoundError(\"No module named 'rustbpe'\")\n"
    (checkout("nanochat", quick / "chat") / "rustbpe.py").write_text(missing)
    result = peers.run(
        quick / "text.txt",
        nanogpt=checkout("nanogpt", quick / "gpt"),
        nanochat=quick / "chat",
    )
    reason = result["peers"]["nanochat"]["skipped"]
    assert reason == (
        f"skipped, because {sys.executable} cannot import rustbpe (ModuleNotFoundError: "
        "No module named 'rustbpe')"
    )
    assert result["peers"]["nanogpt"]["ratios"]["training"] and reason in peers.render(result)

    assert (
        main(["peers", "--nanochat", str(quick / "chat"), "--text", str(quick / "text.txt")]) == 2
    )
    assert capsys.readouterr().err.splitlines()[-1] == f"error: nanochat: {reason}"


@pytest.mark.parametrize(
    "break_it, message",
    [
        (
            lambda checkout, env: (checkout / "train.py").write_text(
                "print(1)\nraise ValueError('too deep')\n"
            ),
            "nanogpt: training ended with status 1: ValueError: too deep",
        ),
        (
            lambda checkout, env: (checkout / "train.py").write_text(
                "print('step 0: train loss 2.0, val loss 9.0')"
            ),
            "nanogpt: its log has no validation with a time at step 35",
        ),
        (
            lambda checkout, env: (checkout / "train.py").write_text("print('hello')"),
            "it begins with 'hello'",
        ),
        (
            lambda checkout, env: (checkout / "data/shakespeare_char/prepare.py").write_text(
                "import sys; sys.exit(5)"
            ),
            "nanogpt: prepare.py ended with status 5: it said nothing",
        ),
        (
            lambda checkout, env: env("OURS_FAILS", "1"),
            "our trainer, to nanogpt's loss ended with status 2: --text FILE: has no text in it",
        ),
    ],
)
def test_what_fails_says_why(quick, monkeypatch, capsys, break_it, message):
    break_it(checkout("nanogpt", quick / "checkout"), monkeypatch.setenv)
    assert (
        main(
            [
                "peers",
                "--nanogpt",
                str(quick / "checkout"),
                "--text",
                str(quick / "text.txt"),
            ]
        )
        == 2
    )
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: nanogpt: ") and message in last


def test_a_loss_that_we_miss_has_no_ratio(quick, monkeypatch):
    monkeypatch.setenv("OURS_MISSES", "1")
    result = peers.run(quick / "text.txt", nanogpt=checkout("nanogpt", quick / "checkout"))
    assert result["peers"]["nanogpt"]["ratios"] == dict.fromkeys(
        ("training", "interpolated", "first", "again")
    )
    assert "6.2383 (not reached)" in peers.render(result) and "validations – times" in peers.render(
        result
    )


def test_ratios_of_medians():
    def side(process, training=1.0, reached=True):
        return dict(
            process_s=process,
            train_time_s=training,
            reached=reached,
            ms_per_step=None,
            time_to_loss_s=training / 2,
        )

    rounds = [
        dict(peer=side(p, 10.0), first=side(f, 2.0), again=side(a, 4.0))
        for p, f, a in ((10, 5, 1), (30, 6, 2), (20, 1, 90))
    ]
    got = peers.summarise(rounds)
    assert got["ratios"] == dict(training=10 / 3, interpolated=20 / 3, first=4.0, again=10.0)
    assert got["medians"]["again"] == dict(process_s=2, train_time_s=4.0, time_to_loss_s=2.0)
    rounds[1]["again"]["reached"] = False  # one is enough
    assert set(peers.summarise(rounds)["ratios"].values()) == {None}


def test_a_training_that_never_improves_has_no_checkpoint(around, monkeypatch):
    monkeypatch.setenv("NO_TORCH", "1")
    peer = gpt.Checkout(checkout("nanogpt", around / "checkout"), sys.executable)
    with pytest.raises(InputError, match="nanogpt: training left no checkpoint"):
        peer.train(common.TextFile(around / "text.txt", around), around / "work")


def test_a_failure_keeps_the_rounds_before_it(quick, monkeypatch):
    saved, one_round = [], peers.one_round

    def once(peer, *args):
        if saved:
            raise InputError("out of luck")
        return one_round(peer, *args)

    monkeypatch.setattr(peers, "one_round", once)
    result = peers.run(
        quick / "text.txt",
        nanogpt=checkout("nanogpt", quick / "checkout"),
        rounds=3,
        save=saved.append,
    )
    there = result["peers"]["nanogpt"]
    assert (
        len(there["rounds"]) == 1
        and there["ratios"]["training"]
        and there["skipped"] == "out of luck"
    )
    assert len(saved) == 1 and "out of luck" in peers.render(result)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("", "nothing to run: give the checkout of a peer"),
        ("--nanogpt .", "--nanogpt .: has no train.py: expected a checkout of nanogpt"),
        ("--nanochat CHECKOUT", "has no scripts/base_train.py: expected a checkout of nanochat"),
        ("--nanogpt CHECKOUT --rounds 0", "--rounds 0: expected 1 or more"),
        ("--nanogpt CHECKOUT --python no-such-python", "--python no-such-python: no such program"),
        (
            "--nanogpt CHECKOUT --text missing.txt",
            "--text missing.txt: No such file or directory; expected a file of text",
        ),
        ("--modded . --laptop", "--modded .: has no train_gpt.py"),
        (
            "--nanochat CHAT --laptop",
            "--laptop compares with nanochat, on Python's standard library: leave out --text and",
        ),
        (
            "--nanogpt CHECKOUT --nanochat-options depth=3",
            "--nanochat-options: expected --nanochat PATH, too",
        ),
        ("--nanogpt CHECKOUT --laptop", "--laptop: expected --nanochat PATH, too"),
        (
            "--nanochat CHAT --nanochat-options width=3",
            "--nanochat-options width=3: expected NAME=VALUE with an option of",
        ),
        (
            "--nanochat CHAT --nanochat-options depth",
            "--nanochat-options depth: expected NAME=VALUE",
        ),
        (
            "--nanochat CHAT --nanochat-options max-seq-len=x",
            "max-seq-len=x: expected a number of 8 or more",
        ),
        (
            "--nanochat CHAT --nanochat-options max-seq-len=7",
            "max-seq-len=7: expected a number of 8 or more",
        ),
        (
            "--nanochat CHAT --nanochat-options num-iterations=0",
            "num-iterations=0: expected a number of 1 or more",
        ),
        ("--nanogpt CHECKOUT --text SHORT", "19,999 characters; expected 20,000 or more"),
        ("--nanogpt CHECKOUT --text LATIN", "not UTF-8; expected a file of text"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(around, monkeypatch, capsys, wrong, message):
    monkeypatch.setattr(common, "execute", lambda *_, **__: pytest.fail("ran something"))
    monkeypatch.chdir(around)
    (around / "short.txt").write_text("x" * 19_999)
    (around / "latin.txt").write_bytes("ä".encode("latin-1") * 30_000)
    for name, path in (
        ("CHECKOUT", checkout("nanogpt", around / "checkout")),
        ("CHAT", checkout("nanochat", around / "chat")),
        ("SHORT", around / "short.txt"),
        ("LATIN", around / "latin.txt"),
    ):
        wrong = wrong.replace(name, str(path))
    assert main(["peers", "--text", str(around / "text.txt"), *wrong.split()]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not calls(around)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ("--laptop", "nothing to run: give the checkout of a peer"),
        (
            "--nanochat CHAT",
            "--text FILE is missing: expected what all are to train on, or --laptop",
        ),
        ("--nanochat CHAT --laptop --nanogpt GPT", "leave out --text and other peers"),
        (
            "--nanochat CHAT --laptop --tokenizer bytes",
            "expected our trainer on stdlib with --tokenizer bpe:N and "
            "--target-metric val_bpb; found stdlib, bytes and val_bpb",
        ),
        (
            "--nanochat CHAT --laptop --target-metric val_loss",
            "found stdlib, bpe:4096 and val_loss",
        ),
        ("--nanochat CHAT --laptop --data fineweb10B", "found fineweb10B, bpe:4096"),
        ("--nanochat CHAT --laptop --no-such-option 1", "--no-such-option"),
    ],
)
def test_bad_input_for_laptop(around, monkeypatch, capsys, wrong, message):
    monkeypatch.setattr(common, "execute", lambda *_, **__: pytest.fail("ran something"))
    wrong = wrong.replace("CHAT", str(checkout("nanochat", around / "chat"))).replace(
        "GPT", str(checkout("nanogpt", around / "gpt"))
    )
    assert main(["peers", *wrong.split()]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1] and not calls(around)


@settings(max_examples=40)
@given(
    st.text(alphabet="aabbé ñ中\U0001f642\n", max_size=300) | st.text(max_size=300),
    st.integers(4, 70),
    st.booleans(),
)
def test_pieces_are_whole_characters_and_all_of_the_text(text, size, pairs):
    text = text.encode(errors="replace").decode()
    parts = list(common.pieces(text, tokenizer(pairs), size))
    lengths = [len(tokenizer(pairs).encode(part)) for part in parts]
    assert "".join(parts) == text and all(0 < n <= size for n in lengths)
    assert all(
        n > size - 4 for n in lengths[:-1]
    )  # no more is missing than what a character may take


@given(st.integers(1, 200), st.integers(1, 70))
def test_windows_lose_nothing(n, length):
    rows = common.windows(range(n), length)
    assert rows.shape == (math.ceil(n / length), length)
    assert rows.flatten().tolist() == [*range(n)] + [-1] * (-n % length)


def test_the_split_is_nanogpts(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(30_007))
    (tmp_path / "text.txt").write_text(text)
    assert common.our_split(tmp_path / "text.txt") == common.split(text)[1] == text[27_006:]


def test_our_trainer_takes_the_options(tmp_path):
    """Ours is in bits per byte: of a text of two bytes a character, a nat is 1 / (2 ln 2) bits."""
    (tmp_path / "in.txt").write_text("é" * common.LEAST_TEXT, encoding="utf-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    task = common.TextFile(tmp_path / "in.txt", folder)
    c = subject.parse(common.our_options(task, 1.9, ["--n-head", "2", "--no-compile"]))
    assert (c.track, c.text, c.target_metric, c.n_head, c.compile) == (
        "own-text",
        str(folder / "in.txt"),
        "val_bpb",
        2,
        False,
    )
    assert c.target == pytest.approx(1.9 / (2 * math.log(2)), abs=1e-6)


def test_commit(tmp_path):
    peer = gpt.Checkout(checkout("nanogpt", tmp_path / "checkout"), sys.executable)
    assert peer.commit() is None
    if shutil.which("git"):
        git = ["git", "-C", str(tmp_path / "checkout"), "-c", "user.name=n", "-c", "user.email=e"]
        for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "m"]):
            subprocess.run(git + command, check=True)
        assert re.fullmatch(r"[0-9a-f]{40}", peer.commit())
    assert peer.steps == 2000 and "--eval_interval=250" in peer.command()  # as in its README
    with pytest.raises(InputError, match="has no train.py"):
        gpt.Checkout(tmp_path, sys.executable)


def test_what_others_start_knows_nothing_of_us(monkeypatch):
    """A process of torchrun's, a cache of ours or a GPU would be another comparison."""
    for name in ("RANK", "GOMP_SPINCOUNT", "TORCHINDUCTOR_CACHE_DIR", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "1")
    env = common.environment(X="2")
    assert env["CUDA_VISIBLE_DEVICES"] == "" and env["X"] == "2"
    assert not {"RANK", "GOMP_SPINCOUNT", "TORCHINDUCTOR_CACHE_DIR"} & env.keys()


def test_a_peer_is_found_by_its_file():
    assert {"minimind", "modded", "nanochat", "nanogpt"} <= set(peers.names())
    for name in peers.names():
        assert peers.module_of(name).Checkout.name == name
