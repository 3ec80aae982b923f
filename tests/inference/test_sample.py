"""./run.sh sample: text from a run's folder, and one line for everything that is missing there."""

import dataclasses
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_gpt as tg
from base import InputError
from inference import sample, show
from inference.engine import Engine
from inference.options import fixed_prompts
from runtime import saved as saved_runs
from runtime.machine import World
from runtime.saved import load_run, newest_run


def run(capsys, *argv):
    """(exit status, stdout, stderr)."""
    status = sample.main([*map(str, argv)])
    return status, *capsys.readouterr()


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


# --- The run


def test_the_model_that_is_read_has_the_runs_validation_loss(trained):
    """Its weights, its rotary tables and its windows are those of the end of training."""
    config, result = trained
    saved = load_run(config.run.run_dir)
    data = tg.load_data(config, lambda step: tg.stage_at(config, step), World())
    with torch.no_grad():
        losses = [saved.model(*batch, saved.stage) for batch in data.val.micro_batches(0, 1, 4)]
    loss = sum(losses).item() / data.val.n_targets
    assert loss == pytest.approx(result["val_loss"], rel=1e-6)
    assert saved.max_len == 64


def test_a_run_without_its_last_weights_is_refused(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained[0].run.run_dir, folder)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | dict(finishing=True)))
    with pytest.raises(InputError, match="still being written.*--resume"):
        load_run(folder)


def test_the_newest_run_is_the_one_that_finished_last(tmp_path):
    for i, name in enumerate(["a/seed3", "b", "c", "d"]):
        (tmp_path / name).mkdir(parents=True)
        for file in ("result.json", "model.safetensors"):
            if name != "c" or file != "result.json":  # c is not done, d lost its weights
                (tmp_path / name / file).write_text("{}")
        if name != "c":
            os.utime(tmp_path / name / "result.json", (i, i))
    (tmp_path / "d" / "model.safetensors").unlink()
    assert newest_run(tmp_path) == tmp_path / "b"
    os.utime(tmp_path / "a/seed3/result.json", (9, 9))
    assert newest_run(tmp_path) == tmp_path / "a/seed3"
    (tmp_path / "a/seed3/result.json").write_text('{"finishing": true}')  # its weights are to come
    assert newest_run(tmp_path) == tmp_path / "b"


def test_where_there_is_no_run_yet_it_says_how_to_get_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(saved_runs, "runs_folder", lambda: tmp_path / "runs")
    status, out, err = run(capsys)
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and "train one with ./run.sh" in err


# --- What it writes


def test_one_sample_is_shown_with_its_prompt(folder, capsys):
    status, out, err = run(capsys, "--run", folder, "--prompt", "the cat ", "-n", 30)
    assert status == 0
    assert out.startswith("the cat ") and len(out) > len("the cat \n")
    assert "30 tokens" in err and str(folder) in err
    assert run(capsys, "--run", folder, "--prompt", "the cat ", "-n", 30)[1] == out
    other = run(capsys, "--run", folder, "--prompt", "the cat ", "-n", 30, "--seed", 1)[1]
    assert other != out


def test_json_has_what_was_written_and_why_it_ended(folder, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("the dog \na red ")
    options = ["--prompt", "", "--prompts", file, "--samples", 2, "-n", 9, "--json"]
    status, out, _ = run(capsys, "--run", folder, *options)
    said = lines(out)
    assert status == 0
    assert [x["prompt"] for x in said] == [""] * 2 + ["the dog "] * 2 + ["a red "] * 2
    assert [x["seed"] for x in said] == [*range(6)]
    assert all(x["tokens"] == 9 or x["finish_reason"] == "stop" for x in said)
    assert all(x["run"] == str(folder) and x["prompt_tokens_cut"] == 0 for x in said)
    # Several at a time are what each is alone
    options = ["--prompt", "the dog ", "--seed", 3, "-n", 9, "--json"]
    assert lines(run(capsys, "--run", folder, *options)[1]) == said[3:4]


def test_the_fixed_prompts(folder, trained, capsys, monkeypatch):
    """The same for every run; during and after training, too, among those of a track."""
    said = lines(run(capsys, "--run", folder, "--prompts", "fixed", "-n", 1, "--json")[1])
    prompts = [x["prompt"] for x in said]
    assert prompts == fixed_prompts() and prompts[0] == "The capital of France is"
    assert any("\n" in prompt for prompt in prompts) and len(prompts) >= 8

    shown = []
    config = dataclasses.replace(trained[0].run, sample_prompts=("the ", "fixed"), sample_tokens=1)
    saved = load_run(folder)
    setup = SimpleNamespace(
        config=SimpleNamespace(run=config, goal=trained[0].goal, data=trained[0].data),
        world=World(),
        model=saved.model,
        data=SimpleNamespace(val_bytes=1, dataset=SimpleNamespace(tokenizer=saved.tokenizer)),
    )
    monkeypatch.setattr(show, "val_stage", lambda setup, step: saved.stage)
    log = SimpleNamespace(say=shown.append, folder=folder)
    assert show.show_samples(setup, 3, log)
    assert len(shown) == 1 + len(prompts)
    assert "\nthe " in shown[0] and prompts[-1] in shown[-1]


def test_knobs_reach_the_draw(folder, capsys):
    options = ["--prompt", "the ", "-n", 40, "--json", "--repetition-penalty", 1]
    greedy = []
    for extra in (["--temperature", 0], ["--top-k", 1], ["--top-p", 0.0001]):
        [said] = lines(run(capsys, "--run", folder, *options, *extra, "--seed", 5)[1])
        greedy.append(said["text"])
    assert len(set(greedy)) == 1
    letter = greedy[0][3]
    [said] = lines(run(capsys, "--run", folder, *options, "--top-k", 1, "--stop", letter)[1])
    assert said["text"] == greedy[0][: greedy[0].index(letter)]
    assert said["finish_reason"] == "stop"


def test_the_tracks_prompts_are_taken_without_one(folder, capsys):
    said = json.loads((folder / "config.json").read_text())
    said["config"]["sample_prompts"] = ["a small ", "who "]
    (folder / "config.json").write_text(json.dumps(said))
    _, out, _ = run(capsys, "--run", folder, "-n", 5)
    assert "a small " in out and "who " in out


def test_what_is_cut_of_a_long_prompt_is_said(folder, capsys):
    _, out, err = run(capsys, "--run", folder, "--prompt", "the cat " * 20, "-n", 5, "--json")
    # End-of-text and 160 bytes, of which the model looks back at 64
    assert lines(out)[0]["prompt_tokens_cut"] == 1 + 160 - 64
    assert "looks back at 64 tokens" in err and "first 97" in err


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_terminal_would_obey_is_shown(terminal, folder, capsys, monkeypatch):
    """Colors, titles, what is written over: of the model's text and of prompts. A file has it."""
    pieces = ["\x1b[31mred\r", "\nnew line\r", "over\x07\tend"]

    def run_engine(engine, batch):
        for text in pieces:
            for completion in batch:
                completion.text += text
                yield completion, text

    monkeypatch.setattr(Engine, "run", run_engine)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    raw = "the \x9b" + "".join(pieces)
    shown = "the \\x9b\\x1b[31mred\nnew line\\x0dover\\x07\tend"
    expected = shown if terminal else raw
    for several in 1, 2:
        argv = ["--run", folder, "--prompt", "the \x9b", "--samples", several]
        status, out, _ = run(capsys, *argv)
        assert status == 0 and out.count(expected) == several
        assert out.endswith(f"{expected}\n" if several == 1 else f"{expected}\n\n")
    assert lines(run(capsys, *argv, "--json")[1])[0]["text"] == "".join(pieces)


# --- What is wrong


@pytest.mark.parametrize(
    ["argv", "message"],
    [
        (["-n", "0"], "--tokens 0: expected a positive number"),
        (["--samples", "-1"], "--samples -1: expected"),
        (["--temperature", "-1"], "--temperature -1.0: expected a number from 0 to 100"),
        (["--top-p", "x"], "--top-p: x: expected a number"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--prompt", "a\udcff"], "expected UTF-8"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--run", "nowhere"], "expected the folder of a finished run"),
    ],
    ids=str,
)
def test_options_that_are_wrong(folder, capsys, argv, message):
    status, out, err = run(capsys, "--run", folder, *argv)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def without_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


def without_result(folder):
    (folder / "result.json").unlink()


def without_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def with_other_options(folder, **options):
    said = json.loads((folder / "config.json").read_text())
    said["config"] |= options
    (folder / "config.json").write_text(json.dumps(said))


def with_another_layer(folder):
    with_other_options(folder, n_layer=6)


def with_an_option_that_is_none(folder):
    with_other_options(folder, skip=[1])


def with_a_module_of_its_own(folder):
    with_other_options(folder, template="os.path")


def with_other_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["extra"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ["change", "message"],
    [
        (without_weights, "model.safetensors: cannot be read"),
        (without_result, "result.json: No such file"),
        (without_tokenizer, "tokenizer.json: No such file"),
        (with_another_layer, "another version"),
        (with_an_option_that_is_none, "another version"),
        (with_other_weights, "another version"),
        (with_a_module_of_its_own, "allow it with --template os.path"),
    ],
)
def test_a_folder_that_is_no_run_of_ours(folder, capsys, change, message):
    change(folder)
    status, out, err = run(capsys, "--run", folder)
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
