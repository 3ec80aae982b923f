"""./run.sh sft: a base model learns to answer, and stops and goes on as training does."""

import json

import pytest
import torch
from helpers import tiny, write_text

import train_gpt as tg
from data.chat import Message, prompt_of
from inference.completion import Request
from inference.engine import Engine
from inference.sampling import Sampling
from posttrain import sft
from posttrain.command import at_the_end, make_parser, options_of_training
from runtime import warm_start
from runtime.saved import load_run

GERMAN = dict(red="rot", blue="blau", green="gruen")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a small base run, and conversations for it."""
    folder = tmp_path_factory.mktemp("base")
    text = write_text(folder / "words.txt")
    result = tg.train(tiny(text, folder, steps=4, eval_every=4, sample_tokens=0))
    lines = []
    for i in range(120):
        word = list(GERMAN)[i % 3]
        ask = f"{word}?"
        messages = [dict(role="user", content=ask), dict(role="assistant", content=GERMAN[word])]
        lines.append(json.dumps(dict(messages=messages)))
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "val.jsonl").write_text("\n".join(lines[:6]))
    return folder, result["run_dir"]


def teach(base, tmp_path, *options, run="taught"):
    folder, run_dir = base
    argv = ["--from", run_dir, "--data", str(folder / "train.jsonl")]
    argv += ["--val-data", str(folder / "val.jsonl"), "--cache-dir", str(tmp_path / "cache")]
    argv += "--row-len 64 --val-row-len 64 --max-doc-len 64 --batch-tokens 512".split()
    argv += "--dtype float32 --no-compile --sample-tokens 0 --stage-lr 1 --eval-every 10".split()
    return sft.main([*argv, "--run-dir", str(tmp_path / run), *options])


def test_it_learns_to_answer_and_to_stop(base, tmp_path, capsys):
    assert teach(base, tmp_path, "--steps", "120", "--patience", "0") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["val_loss"] < 0.4
    saved = load_run(tmp_path / "taught")
    engine = Engine(saved.model, saved.stage, saved.tokenizer, saved.max_len)
    for word, answer in GERMAN.items():
        prompt = tuple(prompt_of([Message("user", f"{word}?")], saved.tokenizer))
        completion = engine.begin(Request(prompt, 12, Sampling(temperature=0)))
        for _ in engine.run([completion]):
            pass
        assert (completion.text, completion.finish_reason) == (answer, "stop")


def test_counts_of_the_base_runs_text_go_along(base, tmp_path, capsys):
    """Also where teaching is stopped and goes on."""
    folder, _ = base
    fields = dict(steps=2, eval_every=2, sample_tokens=0, counts=3)
    fields |= dict(run_dir=str(tmp_path / "counted"))
    tg.train(tiny(folder / "words.txt", tmp_path, **fields))
    counted = folder, str(tmp_path / "counted")
    stop = "--max-time", "0.000001s", "--checkpoint-every", "1"
    assert teach(counted, tmp_path, "--steps", "3", *stop) in (0, 3)
    resume = "--resume", "auto", "--checkpoint-every", "1"
    (tmp_path / "taught" / "result.json").unlink()
    assert teach(counted, tmp_path, "--steps", "3", *resume) == 0
    tables = [load_run(tmp_path / run).model.counts.tables() for run in ("counted", "taught")]
    assert tables[0].keys() == tables[1].keys()
    assert all(torch.equal(x, tables[1][name]) for name, x in tables[0].items())


def test_new_tokens_begin_as_the_mean_of_the_others(base, tmp_path):
    """And the others as they were."""
    _, run_dir = base
    before = load_run(run_dir)
    args = make_parser("sft", "", "").parse_args(["--from", run_dir, "--data", "x"])
    config = tg.parse_args(options_of_training("sft", args, []), at_the_end(run_dir))
    model = before.model.__class__(config.model, 264, 64, torch.float32)
    warm_start.copy_weights(run_dir, model)
    assert torch.equal(model.embed[:257], before.model.embed[:257])
    mean = before.model.embed[:257].mean(0)
    torch.testing.assert_close(model.lm_head[257:264].mean(0), before.model.lm_head[:257].mean(0))
    torch.testing.assert_close(model.embed[260], mean)


STAGES = dict(
    long_window=(8, 16, 24),
    short_window=(4, 8, 12),
    long_layers=(1,),
    mtp=(2, 1, 1),
    tied=0.5,
    eval_every=3,
)
YARN = {
    "to the end": dict(yarn=True, steps=6),
    "with an extension": dict(yarn=True, steps=8, extension=2, extension_windows=(14, 40)),
    "until the target": dict(yarn=True, steps=9, target=9.0),  # in the first stage
    "with windows of validation": dict(yarn=True, steps=6, val_windows=(20, 48)),
    "without yarn": dict(steps=6),
}


@pytest.mark.parametrize("fields", YARN.values(), ids=YARN)
def test_a_model_begins_to_be_taught_as_it_ended(fields, tmp_path):
    """The same numbers for the same text: windows, attention's scale and rotary frequencies are
    those of its last validation, whatever stages training went through."""
    text = write_text(tmp_path / "words.txt", 6000)
    run_dir = tg.train(tiny(text, tmp_path, sample_tokens=0, **STAGES | fields))["run_dir"]
    before = load_run(run_dir)
    args = make_parser("sft", "", "").parse_args(["--from", run_dir, "--data", "x"])
    more = ["--row-len", "64", "--val-row-len", "64", "--max-doc-len", "64"]
    config = tg.parse_args(options_of_training("sft", args, more), at_the_end(run_dir))
    model = before.model.__class__(config.model, 264, 64, torch.float32)
    warm_start.copy_weights(run_dir, model)
    inputs, targets = torch.randint(250, (2, 1, 64), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, 64], dtype=torch.int32)
    expected = before.model.log_probs(inputs, targets, cu_seqlens, before.stage, 257)
    for step in 1, config.schedule.steps:
        model.enter(config.schedule.progress(step))
        stage = config.model.val_stage(tg.stage_at(config, step).model, 64)
        found = model.log_probs(inputs, targets, cu_seqlens, stage, 257)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_loss_is_the_mean_over_what_counts(base, tmp_path):
    """Whatever it is divided into, and however much does not count."""
    losses = set()
    for name, micro in (("a", "512"), ("b", "64")):
        teach(base, tmp_path, "--steps", "2", "--micro-tokens", micro, run=name)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        losses.add(round(next(x["train_loss"] for x in steps if x.get("step") == 1), 4))
    assert len(losses) == 1
    assert 3 < losses.pop() < 8  # of 264 tokens: a guess is 5.6


def test_lora_moves_the_blocks_matrices_by_few_ranks(base, tmp_path):
    """And is merged into the run's weights, which any program loads."""
    teach(base, tmp_path, "--steps", "20", "--lora-rank", "2", "--lora-lr", "0.02")
    first, taught = load_run(base[1]).model, load_run(tmp_path / "taught").model
    n = first.embed.size(0)
    assert torch.equal(taught.embed[:257], first.embed[:257]) and n <= taught.embed.size(0)
    assert torch.equal(taught.lambdas, first.lambdas)
    for name in "attn_bank", "mlp_bank":
        moved = (taught.get_parameter(name) - first.get_parameter(name)).detach()
        singular = torch.linalg.svdvals(moved)
        assert (singular[:, 1] > 1e-3).any() and (singular[:, 2] < 1e-5).all()


@pytest.mark.parametrize(
    "argv, problem",
    [
        ([], "expected --from RUN and --data FILE"),
        (["--from", "nowhere", "--data", "x"], "--from nowhere: expected a run's folder"),
    ],
)
def test_bad_input_is_one_line(argv, problem, capsys):
    assert sft.main(argv) == 2
    said = capsys.readouterr().err
    assert problem in said and said.count("\n") == 1
