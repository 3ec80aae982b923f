"""A second template, tests/templates/ngram_mlp.py, through the programs as they are: what
models/__init__.py lists is all that they ask for."""

import contextlib
import json
import os
import re
import signal

import pytest
import torch
from helpers import write_text
from safetensors.torch import load_file
from templates import ngram_mlp

import models
import train_gpt as tg
from base import InputError
from data import Tokenizer
from export import __main__ as export
from inference.engine import Engine, Request
from inference.sampling import Sampling
from kernels import choose_ops
from models import gpt, load_template, template_names
from optim import OptimConfig
from runtime import checkpoints
from runtime.guard import Guard
from runtime.memory import estimate

NAME = "templates.ngram_mlp"
OWN = dict(look_back=3, width=8, hidden=48)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "words.txt", 4000)


def command(text, run_dir, own=OWN, **options):
    """The command line of a run that trains in a second."""
    values = dict(
        template=NAME,
        text=text,
        tokenizer="bytes",
        cache_dir=run_dir.parent / "cache",
        run_dir=run_dir,
        steps=40,
        eval_every=20,
        batch_tokens=256,
        row_len=32,
        val_row_len=64,
        max_doc_len=32,
        val_tokens=1000,
        dtype="float32",
        checkpoint_every=20,
        sample_tokens=12,
        adam_lr=0.02,
    )
    argv = ["--no-compile"]
    for name, value in (values | own | options).items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    return argv


def run(capsys, argv):
    """(exit status, stdout, stderr) of the trainer."""
    status = tg.main(argv)
    return status, *capsys.readouterr()


@pytest.fixture
def model():
    c = ngram_mlp.Config(**OWN)
    model = ngram_mlp.Model(c, 257, 32, torch.float32, choose_ops("cpu"))
    model.init_weights(0)
    return model


# --- The protocol


def public(template):
    """Names that the two classes of a template define themselves."""
    names = {"dtype", "recompute"}
    for cls in (template.Config, template.Model):
        names |= {name for name in vars(cls) if not name.startswith("_")}
    return names


def test_what_is_listed_is_what_templates_have():
    """And the smallest one has no more, but its options and how it computes."""
    listed = set(re.findall(r"^    (\w+)(?:\(| {3,})", models.__doc__, re.M))
    assert listed <= public(gpt) | {"quantizable", "grad_rooms"}
    optional = {
        "grad_rooms",
        "head_dim",
        "at_the_end",
        "attention",
        "before_step",
        "learn_tokens",
        "log_probs",
        "new_cache",
        "decode",
        "quantizable",
        "tables",
        "touched_rows",
        "train_eval_stage",
    }
    assert listed - optional == public(ngram_mlp) - set(OWN) - {"features"}


def test_templates_are_found_by_name():
    assert template_names() == ["gpt", "llama"]
    assert load_template("gpt").__name__ == "models.gpt"
    assert load_template(NAME) is ngram_mlp
    for wrong, said in (
        ("gtp", "expected one of gpt, llama, or a module's dotted name"),
        ("parts", "expected one of gpt, llama"),
        (".parts.x", "expected one of gpt, llama"),
        ("templates.none", "cannot be imported"),
        ("base.files", "has no Config"),
    ):
        with pytest.raises(InputError, match=f"--template {wrong}: {said}"):
            load_template(wrong)


def test_help_lists_the_templates_options_and_no_others(capsys):
    assert tg.main(["--template", NAME, "--help"]) == 0
    said = capsys.readouterr().out
    for name in OWN:
        assert f"--{name.replace('_', '-')} INT" in said
    assert "tokens that a prediction sees [4]" in said
    assert "--n-layer" not in said
    assert tg.main(["--help"]) == 0
    assert "--look-back" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "more, expected",
    [
        (["--n-layer", "2"], "unknown option --n-layer: "),
        (["--look-back", "0"], "--look-back 0: expected a positive number"),
    ],
)
def test_options_are_the_templates(text, tmp_path, capsys, more, expected):
    status, _, err = run(capsys, command(text, tmp_path / "run") + more)
    assert status == 2
    assert expected in err


# --- A run


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The folder of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert tg.main(command(text, folder)) == 0
    return folder


def rows(folder):
    """metrics.jsonl without the times."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        row.pop("train_time")
        found.append(row)
    return found


def test_it_learns(whole):
    losses = [row["train_loss"] for row in rows(whole) if "train_loss" in row]
    assert len(losses) == 40
    assert losses[0] == pytest.approx(torch.tensor(257.0).log().item(), abs=1e-3)  # uniform
    assert losses[-1] < 3.0
    result = json.loads((whole / "result.json").read_text())
    assert result["val_loss"] == pytest.approx(losses[-1], abs=0.3)
    assert result["params"] == 258 * 8 + 48 * 24 + 48 + 257 * 48
    assert json.loads((whole / "config.json").read_text())["config"]["look_back"] == 3


def test_it_says_what_memory_it_needs_and_samples(text, tmp_path, capsys):
    options = dict(steps=2, eval_every=2, recompute="on", checkpoint_every="off")
    status, _, err = run(capsys, command(text, tmp_path / "run", **options))
    assert status == 0, err
    assert "memory by estimate: " in err
    assert "blocks recomputed" in err
    assert re.search(r"--- a sample after step 2\n.+\n---", err, re.S)


@pytest.mark.parametrize("stop", [7, 20, 27])
def test_stopped_and_resumed_it_is_the_same_bit_for_bit(
    whole, text, tmp_path, capsys, monkeypatch, stop
):
    """Before, at and behind a change of stages; with what the model itself keeps up to date."""
    folder = tmp_path / "run"
    judge = Guard.judge

    def stopping(guard, step, *args):
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return judge(guard, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Guard, "judge", stopping)
        status, _, err = run(capsys, command(text, folder))
    assert status == 128 + signal.SIGTERM, err
    status, out, err = run(capsys, command(text, folder, resume="auto"))
    assert status == 0, err
    [at] = json.loads(out)["resumed_at"]
    assert stop <= at <= stop + 1

    assert rows(folder) == rows(whole)
    for name in ("model.safetensors", "checkpoints/step-000040/state.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    tensors, _ = checkpoints.load(folder / "checkpoints/step-000040")
    assert tensors["other/steps"] == 40


def test_options_of_its_own_must_be_those_of_the_checkpoint(whole, text, tmp_path, capsys):
    argv = command(text, tmp_path / "run", look_back=2, resume=whole / "checkpoints/step-000020")
    status, _, err = run(capsys, argv)
    assert status == 2
    assert "look_back" in err


def test_compiled_it_is_one_graph(model):
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    tokens = torch.randint(257, (2, 33), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, 5, 32, 64], dtype=torch.int32)
    stage = model.c.stage(0.0, 32)
    args = tokens[:, :-1], tokens[:, 1:], cu_seqlens, stage
    torch.testing.assert_close(compiled(*args), model(*args))


# --- The estimate, sampling, export


def test_the_estimate_is_the_sum_of_its_parts(model):
    rules = model.update_rules(OptimConfig())
    parts = estimate(model, rules, rows=4, row_len=32, recompute=False)
    n = {name: p.numel() for name, p in model.named_parameters()}
    moments = 8 * (n["bias"] + n["head"] + n["matrix"]) + 4 * 258
    tokens = 4 * 32
    assert parts == dict(
        weights=4 * sum(n.values()),
        gradients=4 * sum(n.values()),
        optimizer=moments,
        activations=tokens * 4 * (24 + 2 * 48) * 3 // 2,  # as much again by half on a CPU
        logits=tokens * 257 * 12 * 3 // 2,
    )


def test_it_continues_a_text_by_what_it_looks_back_at(model):
    with torch.no_grad():
        model.head.normal_(generator=torch.Generator().manual_seed(0))
    tokenizer = Tokenizer("bytes", [bytes([i]) for i in range(256)])
    engine = Engine(model, model.c.stage(1.0, 32), tokenizer, 32)
    endless = Sampling(logit_bias=((tokenizer.eot, -100.0),))
    one, other = engine.generate([Request(text, 40, endless) for text in ("abcd", "zbcd")])
    assert one.text == other.text  # three tokens are seen
    assert len(one.tokens) == 1 + 4 + 40  # more than the model has room for


def test_it_is_exported_under_the_fields_names(whole, tmp_path):
    to = tmp_path / "folder"
    with contextlib.redirect_stdout(None):
        # A folder does not say by itself what is imported
        assert export.main(["--run", str(whole), "--to", "torchtitan", str(to)]) == 2
        given = ["--run", str(whole), "--to", "torchtitan", str(to), "--template", NAME]
        assert export.main(given) == 0
    tensors = load_file(to / "model.safetensors")
    weights = load_file(whole / "model.safetensors")
    names = ngram_mlp.Config(**OWN).hf_names() | {"bias": "bias"}
    assert tensors.keys() == set(names.values())
    for name, field in names.items():
        assert torch.equal(tensors[field], weights[name]), name
    said = json.loads((to / "config.json").read_text())
    assert said["model_type"] == "ngram_mlp"
    assert said["vocab_size"] == 258
    assert said["training"]["look_back"] == 3


def test_weights_of_another_template_are_refused(whole, text, tmp_path, capsys):
    argv = command(text, tmp_path / "run", template="gpt", warm_start=whole, own={})
    status, _, err = run(capsys, argv)
    assert status == 2
    assert f"--warm-start {whole} does not fit this model: " in err
