"""What answers are worth becomes what a model says; runs that were stopped go on as they were."""

import json
import math
import os
import subprocess
import sys
import types

import pytest
import torch
from helpers import ROOT, kill_verb, same_weights, tiny, write_text
from processes import compiled_once
from safetensors.torch import load_file

import train_gpt as tg
from data.chat import prompt_of, read_messages
from data.questions import Answer, answer_batch
from data.questions import rows_of as rows_of_answers
from inference.engine import Engine, Request
from inference.sampling import Sampling
from posttrain import grpo
from runtime.machine import World
from runtime.policy import PolicyConfig, PolicyLoss
from runtime.saved import load_run


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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def taught(base):
    """A run of the base model that knows the tokens of conversations."""
    if not (base / "start" / "result.json").exists():
        teach(base, base, "--steps", "1", "--stage-lr", "1e-9", "--questions", "1", run="start")
    return load_run(base / "start")


@pytest.fixture(autouse=True, scope="module")
def decoding_compiled_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "Decoding", compiled_once("Decoding"))
        yield


@pytest.mark.parametrize("in_c", [False, True])
def test_engine_and_trainer_agree_on_what_was_drawn(in_c, base, taught):
    """The log probabilities of answers, greedy ones and drawn ones, those that ended and those that
    were cut, in packed rows; by the ops of training, and by those that a run decodes with."""
    questions = [q for q in load_prompts(base, taught) for _ in range(3)]
    model = answering_model(taught) if in_c else taught.model
    engine = Engine(model, taught.stage, taught.tokenizer, 96, places=5, part=64)
    end = taught.tokenizer.specials["<|im_end|>"]
    often = Sampling(logit_bias=((end, 4.0),))
    requests = [
        Request(prompt, 9, (Sampling(), Sampling(temperature=0), often)[i % 3], i, alternatives=0)
        for i, prompt in enumerate(questions)
    ]
    written = engine.generate(requests)
    assert {c.finish_reason for c in written} == {"stop", "length"}
    answers = [
        Answer(c.tokens, c.n_prompt, [d.logprob for d in c.drawn], 1.0, 1.0) for c in written
    ]
    assert all(len(c.written) == len(c.drawn) for c in written)
    batch = answer_batch(rows_of_answers(answers, 96), 96)
    with torch.no_grad():
        trainer = PolicyLoss(taught.model, PolicyConfig())
        said = trainer.log_probs(batch.inputs, batch.targets, batch.cu_seqlens, taught.stage)
    own = batch.targets != -100
    assert own.sum() == sum(len(c.written) for c in written)
    torch.testing.assert_close(said[own], batch.old[own], atol=1e-4, rtol=0)


def answering_model(taught):
    """As grpo has it; its parameters are those of the model, whatever becomes of them."""
    fused = compiled_once().build(None, None)
    if fused is None:
        pytest.skip("there is no C compiler")
    model = taught.model
    plain = model.ops
    run = types.SimpleNamespace(cache_dir=None)
    setup = types.SimpleNamespace(model=model, config=types.SimpleNamespace(run=run), world=World())
    session = types.SimpleNamespace(log=types.SimpleNamespace(say=None))
    assert grpo.as_it_answers(setup, session) is model  # in PyTorch alone
    model.ops = plain.replace(fused=fused)
    found = grpo.as_it_answers(setup, session)
    model.ops = plain
    assert found is not model and found.ops.decoding is not None and plain.decoding is None
    for name, p in model.named_parameters():
        assert found.get_parameter(name) is p
    return found


def load_prompts(base, taught):
    for line in (base / "train.jsonl").read_text().splitlines()[:8]:
        messages = read_messages(json.loads(line)["messages"])
        yield tuple(prompt_of(messages, taught.tokenizer))


def test_equal_prompts_are_read_once_and_say_what_each_says_alone(base, taught):
    prompts = list(load_prompts(base, taught))
    engine = Engine(taught.model, taught.stage, taught.tokenizer, 96, places=12, part=64)
    requests = [Request(prompts[i % 3], 5 + i % 4, Sampling(), i) for i in range(20)]
    together = [c.tokens for c in engine.generate(requests)]
    alone = [engine.generate([request])[0].tokens for request in requests]
    assert together == alone


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(base, tmp_path):
    teach(base, tmp_path, "--reuse", "2", run="whole")
    stopped = "--max-time", "0.001s", "--checkpoint-every", "2", "--reuse", "2"
    teach(base, tmp_path, *stopped, run="parts")
    assert result_of(tmp_path, "parts")["steps"] == 2  # the second one of the same answers
    folder = str(tmp_path / "parts")
    assert grpo.main(["--resume", folder, "--max-time", "1h", "--no-compile"]) == 0
    assert result_of(tmp_path, "parts")["resumed_at"] == [2]
    same_weights(tmp_path / "whole", tmp_path / "parts")
    for name in "reward", "kl", "entropy", "answer_tokens":
        series = [
            [r[name] for r in rows_of(tmp_path, run) if name in r] for run in ("whole", "parts")
        ]
        assert series[0] == series[1], name


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_weights(base, tmp_path):
    argv = options(base, tmp_path, "--checkpoint-every", "3", "--steps", "60", "--reuse", "1")
    teach(base, tmp_path, "--steps", "60", run="whole")
    kill_verb(["grpo", *argv], tmp_path / "taught", step=6)
    assert not (tmp_path / "taught" / "result.json").exists()
    assert grpo.main(["--resume", str(tmp_path / "taught"), "--no-compile"]) == 0
    assert 0 < result_of(tmp_path)["resumed_at"][0] < 60
    same_weights(tmp_path / "whole", tmp_path / "taught")


def test_the_reference_is_the_model_that_it_began_with(base, tmp_path):
    teach(base, tmp_path)
    begun = load_file(tmp_path / "taught" / "reference.safetensors")
    ended = (
        load_file(tmp_path / "taught" / "last.safetensors")
        if (tmp_path / "taught" / "last.safetensors").exists()
        else load_file(tmp_path / "taught" / "model.safetensors")
    )
    before = load_file(base / "run" / "model.safetensors")
    assert torch.equal(begun["attn_bank"], before["attn_bank"])
    assert not torch.equal(begun["attn_bank"], ended["attn_bank"])
    (tmp_path / "taught" / "reference.safetensors").unlink()
    assert grpo.main(["--resume", str(tmp_path / "taught"), "--steps", "9", "--no-compile"]) == 2


def test_equal_rewards_and_no_kl_change_nothing(base, tmp_path):
    teach(base, tmp_path, "--kl", "0", "--steps", "4", reward="regex:^")
    a = load_file(tmp_path / "taught" / "model.safetensors")
    b = load_file(base / "run" / "model.safetensors")
    assert torch.equal(a["lm_head"][:256], b["lm_head"][:256])
    steps = [row for row in rows_of(tmp_path) if "reward" in row]
    assert all(r["alike"] == 1 and r["grad_norm"] == 0 and r["reward"] == 1 for r in steps)
    assert not (tmp_path / "taught" / "reference.safetensors").exists()


@pytest.mark.parametrize(
    "more",
    [
        ("--average", "answers"),
        ("--advantage", "mean", "--average", "constant"),
        ("--drop-cut", "--drop-alike", "--clip-high", "0.28"),
    ],
)
def test_the_variants_learn_as_well(more, base, tmp_path):
    assert teach(base, tmp_path, "--steps", "3", *more) == 0
    assert all(math.isfinite(r["train_loss"]) for r in rows_of(tmp_path) if "reward" in r)


def test_micro_batches_of_any_size_give_the_same_losses(base, tmp_path):
    losses = []
    for run, micro in (("a", "768"), ("b", "96")):
        teach(base, tmp_path, "--steps", "3", "--micro-tokens", micro, run=run)
        losses.append([r["train_loss"] for r in rows_of(tmp_path, run) if "reward" in r])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


FAILING = """
import os
def f(answer, question):
    if len(os.environ.get("STOP", "")) and question["number"] > 36: raise ValueError("no")
    return float("a" in answer)
"""


def test_a_reward_that_fails_ends_the_run_and_loses_nothing(base, tmp_path, capsys, monkeypatch):
    path = tmp_path / "mine.py"
    path.write_text(FAILING)
    reward = f"{path}:f"
    teach(base, tmp_path, run="whole", reward=reward)
    monkeypatch.setenv("STOP", "1")
    capsys.readouterr()
    assert teach(base, tmp_path, "--checkpoint-every", "1h", reward=reward) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "raised ValueError: no, for the answer" in said and "train.jsonl:" in said
    monkeypatch.delenv("STOP")
    path.write_text(FAILING.replace("os.environ", "{}"))
    assert grpo.main(["--resume", str(tmp_path / "taught"), "--no-compile"]) == 0
    same_weights(tmp_path / "whole", tmp_path / "taught")


@pytest.mark.parametrize(
    "line, said",
    [
        ("nothing", ":1: expected a line of JSON"),
        ('{"prompt": "1"}', ':1: expected {"messages": [...]}'),
        ('{"messages": []}', ":1: messages: expected a list"),
        (
            '{"messages": [{"role": "user", "content": "1"}, '
            '{"role": "assistant", "content": "2"}]}',
            ":1: expected the user's message last",
        ),
        ('{"messages": [{"role": "assistant", "content": "1"}]}', ":1: messages[0].role: expected"),
        ('{"messages": [{"role": "user", "content": " "}]}', ":1: messages[0].content: expected"),
        ('{"messages": [{"role": "user", "content": "1"}]}', ":1: pattern: expected a regular"),
        (
            '{"messages": [{"role": "user", "content": "' + 90 * "1" + '"}], "pattern": "1"}',
            ":1: the question has 110 tokens: expected 90 or fewer",
        ),
    ],
)
def test_bad_questions_are_one_line_before_anything_is_trained(line, said, base, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    argv = options(base, tmp_path)
    argv[argv.index("--data") + 1] = str(path)
    assert grpo.main(argv) == 2
    error = capsys.readouterr().err
    assert f"{path}{said}" in error and error.count("\n") == 1
    assert not (tmp_path / "taught").exists()


@pytest.mark.parametrize(
    "more, said",
    [
        (["--reward", "nowhere.py:f"], "nowhere.py is no file"),
        (["--reward", "best"], "--reward best: expected exact, number"),
        (["--answers", "1"], "--answers 1: expected 2 or more"),
        (["--time", "1m"], "--time 1m: expected nothing with grpo"),
        (["--reuse", "3"], "--eval-every 4: expected a multiple of reuse (3)"),
    ],
)
def test_bad_options_are_one_line_before_anything_is_trained(more, said, base, tmp_path, capsys):
    assert teach(base, tmp_path, *more) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "taught").exists()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(base, tmp_path):
    """Each answers its own questions of a step; means and gradients are of all."""
    more = "--steps", "4", "--drop-alike", "--average", "answers", "--questions", "5"
    teach(base, tmp_path, *more, run="one")
    argv = [*options(base, tmp_path, *more, run="two")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([*command, str(ROOT / "door.py"), "grpo", *argv], env=env, check=True)
    for name in "reward", "entropy", "train_loss", "kl", "alike":
        one, two = (
            [row[name] for row in rows_of(tmp_path, run) if "reward" in row]
            for run in ("one", "two")
        )
        assert one == pytest.approx(two, abs=1e-5), name
