"""What answers are worth becomes what a model says; runs that were stopped go on as they were."""

import json
import math

import pytest
from helpers import tiny, write_text

import train_gpt as tg
from posttrain import grpo


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a small base run, and questions for it."""
    folder = tmp_path_factory.mktemp("base")
    text = write_text(folder / "words.txt")
    tg.train(tiny(text, folder, steps=4, eval_every=4))
    lines = []
    for i in range(40):
        messages = [dict(role="user", content=f"{'abcdefgh'[i % 8]}?")]
        lines.append(json.dumps(dict(messages=messages, answer="a", pattern="a", number=i)))
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "val.jsonl").write_text("\n".join(lines[:4]))
    return folder


def options(base, tmp_path, *more, run="taught", reward="regex"):
    argv = ["--from", str(base / "run"), "--data", str(base / "train.jsonl")]
    argv += ["--val-data", str(base / "val.jsonl"), "--cache-dir", str(tmp_path / "cache")]
    argv += "--row-len 96 --val-row-len 96 --max-doc-len 96 --batch-tokens 768".split()
    argv += "--dtype float32 --no-compile --sample-tokens 0 --eval-every 4 --steps 8".split()
    argv += "--questions 4 --answers 4 --answer-tokens 6 --stage-lr 0.3".split()
    return [*argv, "--reward", reward, "--run-dir", str(tmp_path / run), *more]


def teach(base, tmp_path, *more, **where):
    return grpo.main(options(base, tmp_path, *more, **where))


def result_of(tmp_path, run="taught"):
    return json.loads((tmp_path / run / "result.json").read_text())


def rows_of(tmp_path, run="taught"):
    lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_answers_that_are_worth_more_become_likelier(base, tmp_path):
    assert teach(base, tmp_path, "--steps", "30", "--answers", "8", "--stage-lr", "1") == 0
    steps = [row for row in rows_of(tmp_path) if "reward" in row]
    first = sum(row["reward"] for row in steps[:5])
    last = sum(row["reward"] for row in steps[-5:])
    assert last > first + 1
    for name in "kl", "entropy", "answer_tokens", "cut", "alike", "clipped", "grad_norm":
        assert all(math.isfinite(row[name]) for row in steps), name
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[-1]["kl"] > 0
    assert steps[0]["entropy"] == pytest.approx(math.log(264), rel=0.4)
    result = result_of(tmp_path)
    assert result["val_reward"] == 1 - result["val_loss"]
