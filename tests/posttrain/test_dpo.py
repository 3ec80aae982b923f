"""./run.sh dpo and orpo: a model comes to prefer one of two answers, and keeps its reference."""

import json

import pytest
from helpers import kill_verb, same_weights, tiny, write_text
from safetensors.torch import load_file

import train_gpt as tg
from posttrain import dpo, orpo

WORDS = "red green blue black white grey".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a small base run, and pairs for it: short answers are better."""
    folder = tmp_path_factory.mktemp("base")
    text = write_text(folder / "words.txt")
    tg.train(tiny(text, folder, steps=10, eval_every=10, sample_tokens=0))
    lines = []
    for i in range(120):
        word = WORDS[i % 6]
        lines.append(json.dumps(dict(prompt=f"{word}?", chosen="yes", rejected=f"{word} no no")))
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "val.jsonl").write_text("\n".join(lines[:12]))
    return folder


def options_of(base, tmp_path, *options, run="taught"):
    argv = ["--from", str(base / "run"), "--data", str(base / "train.jsonl")]
    argv += ["--val-data", str(base / "val.jsonl"), "--cache-dir", str(tmp_path / "cache")]
    argv += "--row-len 96 --val-row-len 96 --max-doc-len 96 --batch-tokens 384".split()
    argv += "--dtype float32 --no-compile --sample-tokens 0 --eval-every 10 --steps 20".split()
    return [*argv, "--run-dir", str(tmp_path / run), *options]


def teach(program, base, tmp_path, *options, run="taught"):
    return program.main(options_of(base, tmp_path, *options, run=run))


def result_of(tmp_path, run="taught"):
    return json.loads((tmp_path / run / "result.json").read_text())


@pytest.mark.parametrize("kind", ["dpo", "simpo", "kto"])
def test_the_chosen_answers_become_likelier(kind, base, tmp_path):
    assert teach(dpo, base, tmp_path, "--stage-lr", "0.3", "--preference", kind) == 0
    result = result_of(tmp_path)
    assert result["val_accuracy"] == 1.0 and result["val_margin"] > 0
    assert result["val_chosen"] > result["val_rejected"] and result["val_bpb"] is None


def test_it_begins_at_ln_2_with_a_reference_that_stays(base, tmp_path):
    long = "--row-len 256 --val-row-len 256 --max-doc-len 256 --batch-tokens 512".split()
    teach(dpo, base, tmp_path, "--steps", "1", "--stage-lr", "1e-9", *long)  # rows of many pairs
    result = result_of(tmp_path)
    assert result["val_loss"] == pytest.approx(0.693147, abs=1e-4)
    reference = load_file(tmp_path / "taught" / "reference.safetensors")
    assert reference["train"].shape == (120, 2) and (reference["train"] < -5).all()


def test_orpo_learns_the_chosen_answers_without_a_reference(base, tmp_path):
    teach(orpo, base, tmp_path, "--steps", "40", "--stage-lr", "1")
    result = result_of(tmp_path)
    assert result["val_accuracy"] == 1.0 and result["val_loss"] < 1.3
    assert not (tmp_path / "taught" / "reference.safetensors").exists()


def test_a_run_that_was_stopped_goes_on_to_the_same_weights(base, tmp_path):
    """With the reference that it began with."""
    teach(dpo, base, tmp_path, run="whole")
    stopped = "--max-time", "0.001s", "--checkpoint-every", "5"
    teach(dpo, base, tmp_path, *stopped, run="parts")
    assert result_of(tmp_path, "parts")["steps"] < 20
    folder = str(tmp_path / "parts")
    assert dpo.main(["--resume", folder, "--max-time", "1h", "--no-compile"]) == 0
    assert result_of(tmp_path, "parts")["steps"] == 20
    same_weights(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_weights(base, tmp_path):
    many = "--steps", "400", "--eval-every", "200", "--checkpoint-every", "5", "--patience", "0"
    teach(dpo, base, tmp_path, *many, run="whole")
    kill_verb(["dpo", *options_of(base, tmp_path, *many)], tmp_path / "taught", step=10)
    assert not (tmp_path / "taught" / "result.json").exists()
    assert dpo.main(["--resume", str(tmp_path / "taught"), "--no-compile"]) == 0
    assert 0 < result_of(tmp_path)["resumed_at"][0] < 400
    same_weights(tmp_path / "whole", tmp_path / "taught")


def test_a_likelihood_beside_it_keeps_the_chosen_answers_likely(base, tmp_path):
    """The chosen reward ends higher with --sft-weight."""
    chosen = []
    for run, weight in (("without", "0"), ("with", "3")):
        more = "--stage-lr", "0.3", "--sft-weight", weight
        teach(dpo, base, tmp_path, *more, run=run)
        chosen.append(result_of(tmp_path, run)["val_chosen"])
    assert chosen[1] > chosen[0] + 0.1


def test_passes_of_any_size_give_the_same_losses(base, tmp_path):
    losses = []
    for run, micro in (("a", "384"), ("b", "96")):
        teach(dpo, base, tmp_path, "--steps", "3", "--micro-tokens", micro, run=run)
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        losses.append([x["train_loss"] for x in steps if "train_loss" in x])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
