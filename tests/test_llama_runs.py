"""models/llama.py through the trainer as it is: trained, stopped and resumed, sampled."""

import json
import math
import os
import signal

import pytest
from helpers import write_text

import train_gpt as tg
from runtime.guard import Guard

SHAPE = dict(n_layer=2, n_embd=32, n_head=2, n_kv_head=1, head_dim=16, ffn_dim=64, dropout=0.1)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "words.txt", 4000)


def command(text, run_dir, **options):
    """The command line of a run that trains in a second."""
    values = dict(
        template="llama",
        text=text,
        tokenizer="bytes",
        cache_dir=run_dir.parent / "cache",
        run_dir=run_dir,
        steps=30,
        eval_every=15,
        batch_tokens=512,
        row_len=32,
        val_row_len=64,
        max_doc_len=32,
        val_tokens=1000,
        dtype="float32",
        checkpoint_every=15,
        sample_tokens=12,
        adam_lr=0.02,
    )
    argv = ["--no-compile", "--qk-norm"]
    for name, value in (values | SHAPE | options).items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    return argv


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert tg.main(command(text, folder)) == 0
    return folder


def losses(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["train_loss"] for row in rows if "train_loss" in row]


def test_it_learns(whole):
    found = losses(whole)
    assert found[0] == pytest.approx(math.log(320), abs=0.1)  # 257 tokens, padded
    assert found[-1] < 3.0
    assert json.loads((whole / "config.json").read_text())["config"]["ffn_dim"] == 64


def test_stopped_and_resumed_it_is_the_same_bit_for_bit(whole, text, tmp_path, capsys, monkeypatch):
    """Dropout included."""
    folder = tmp_path / "run"
    judge = Guard.judge

    def stopping(guard, step, *args):
        if step == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return judge(guard, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Guard, "judge", stopping)
        assert tg.main(command(text, folder)) == 128 + signal.SIGTERM
    assert tg.main(command(text, folder, resume="auto")) == 0
    capsys.readouterr()
    assert losses(folder) == losses(whole)
    for name in ("model.safetensors", "checkpoints/step-000030/state.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
