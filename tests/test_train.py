"""Whole runs: what they print, write and return, and what they refuse."""

import functools
import json
import math
import re

import numpy as np
import pytest
import torch
from helpers import (
    EVERYTHING,
    PIECES,
    REMEMBERED,
    ROOT,
    SMALL_MODEL,
    THREE_LAYERS,
    options,
    run_trainer,
    tiny,
    train_losses,
    write_text,
)
from safetensors.torch import load_file

import train_gpt as tg
from base import InputError
from base.places import cache_folder
from data import ShardWriter
from data.loader import IGNORE
from data.shards import read_shard
from inference.engine import Engine
from kernels import launch
from kernels.fp8_mlp import FP8MLPs
from kernels.fused import Fused
from models import gpt
from optim import Optimizer
from records import add
from records.source import files_in, header_line, pack_source
from runtime import machine, warming_up
from runtime.evaluation import Split, evaluate, part_of
from runtime.finish import PARTS
from runtime.options import flat
from runtime.saved import load_run
from tracks import load_track, track_names


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


def open_data(c):
    return tg.load_data(c, functools.partial(tg.stage_at, c), tg.World())


def new_model(c):
    """Of 257 tokens: bytes and end-of-text."""
    return gpt.Model(c.model, 257, max(c.data.row_len, c.data.val_row_len))


def validate(c, model, step=None):
    """Metrics of the model behind a step, the last one if none is given."""
    data = open_data(c)
    stage = tg.stage_at(c, step or c.schedule.steps).model
    stage = c.model.val_stage(stage, c.data.val_row_len)
    split = Split(list(data.val.micro_batches()), data.val.n_targets, data.val_bytes)
    return evaluate(model, stage, split, tg.World())


@pytest.fixture(scope="module")
def sixty(text, tmp_path_factory):
    """(result, losses) of 60 steps."""
    tmp = tmp_path_factory.mktemp("sixty")
    return tg.train(tiny(text, tmp, steps=60, eval_every=60)), train_losses(tmp / "run")


@pytest.fixture(scope="module")
def users(text, tmp_path_factory):
    """The folder of a run as a user starts it, and the process, ended; stderr has all that it
    imported."""
    tmp = tmp_path_factory.mktemp("users")
    c = tiny(text, tmp, target=5.5, steps=30, eval_every=5)
    Fused.build(cache_folder())  # as run.sh does when it installs
    return tmp / "run", run_trainer(*options(c), launcher=["-X", "importtime"])


def test_a_run_as_a_user_starts_it(users):
    run, done = users
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1  # one line of JSON, nothing else
    result = json.loads(done.stdout)
    assert {
        "track",
        "target_metric",
        "target",
        "reached",
        "val_loss",
        "val_bpb",
        "train_time_s",
        "cold_start_s",
        "process_s",
        *PARTS,
        "steps",
        "tokens",
        "tokens_per_s",
        "params",
        "device",
        "world_size",
        "run_dir",
        "data_fingerprint",
    } <= set(result)
    assert result["reached"] and result["val_loss"] <= 5.5
    assert result["steps"] < 30 and result["tokens"] == result["steps"] * 256
    assert "a sample" in done.stderr
    # The process's time, most of which has a name
    named = sum(result[name] for name in PARTS)
    assert result["train_s"] > 0 and result["imports_s"] > 0.1 and result["validation_s"] > 0
    assert 0.5 * result["process_s"] < named <= result["process_s"] + 0.05
    assert f"{result['process_s']:.1f} s: imports" in done.stderr
    assert "plan: 30 steps of training on 7,680 tokens, " in done.stderr
    assert json.loads((run / "result.json").read_text()) == result
    assert json.loads((run / "config.json").read_text())["config"]["target"] == 5.5
    log = (run / "log.txt").read_text()
    assert header_line(pack_source(ROOT)) in log and '"git_commit"' in log
    source = files_in(run / "source.tar.bz2")
    assert source["train_gpt.py"] == (ROOT / "train_gpt.py").read_bytes()
    val_line = r"^step:(\d+)/30 val_loss:(\d+\.\d+) train_time:(\d+)ms step_avg:(\d+\.\d+)ms( .*)?$"
    assert float(re.findall(val_line, log, re.M)[-1][1]) == pytest.approx(
        result["val_loss"], abs=1e-4
    )
    assert (
        len(
            re.findall(
                r"^step:\d+/30 train_loss:\d+\.\d+ train_time:\d+ms step_avg:\d+\.\d+ms$", log, re.M
            )
        )
        == result["steps"]
        == len(train_losses(run))
    )


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="probing attention and Triton's ops loads the compiler"
)
def test_an_uncompiled_run_does_not_load_the_compiler(users):
    """Which takes longer than some runs."""
    _, done = users
    imported = set(re.findall(r"^import time: .*\| +([\w.]+)$", done.stderr, re.M))
    assert "torch" in imported and "runtime.session" in imported
    assert "torch._dynamo" not in imported


def test_out_of_steps_is_status_3(text, tmp_path, capsys):
    assert tg.main(options(tiny(text, tmp_path, target=0.1, steps=2))) == 3
    assert json.loads(capsys.readouterr().out)["reached"] is False


def test_no_target_trains_to_the_last_step(text, tmp_path):
    result = tg.train(tiny(text, tmp_path, steps=12))
    assert result["reached"] is None and result["steps"] == 12


def test_samples_in_the_course_of_training_change_nothing(text, tmp_path, capsys):
    """They are shown after every so many steps and at the end, while the clock stands still."""
    plain = tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "plain"), steps=7))
    clock = tmp_path / "a clock"
    capsys.readouterr()
    result = tg.train(tiny(text, tmp_path, run_dir=str(clock), steps=7, sample_every=3))
    err = capsys.readouterr().err
    assert f"more: ./run.sh sample --run '{clock}' --prompt" in err  # as a shell takes it
    shown = re.findall(r"^--- a sample after step (\d+)$", err, re.M)
    assert [*dict.fromkeys(shown)] == ["3", "6", "7"]
    assert result["val_loss"] == plain["val_loss"]
    assert train_losses(clock) == train_losses(tmp_path / "plain")


@pytest.mark.parametrize("sample_every", [0, 1])
def test_samples_that_fail_do_not_cost_the_result(
    text, tmp_path, monkeypatch, capsys, sample_every
):
    """Whatever it is that nobody expected: one line says where the report is."""
    monkeypatch.setattr(Engine, "generate", lambda *args: 1 / 0)
    argv = options(tiny(text, tmp_path, steps=2, sample_every=sample_every))
    assert tg.main(argv) == 0
    out, err = capsys.readouterr()
    run = tmp_path / "run"
    assert json.loads(out) == json.loads((run / "result.json").read_text())
    assert json.loads(out)["steps"] == 2
    assert "no samples: ZeroDivisionError: division by zero (" in err
    assert f"the full report is in {run / 'error.txt'}" in err and "Traceback" not in err
    assert "Traceback" in (run / "error.txt").read_text()


def test_weights_on_disk_are_the_model(text, tmp_path):
    c = tiny(text, tmp_path)
    result = tg.train(c)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    model = new_model(c)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert shapes == {name: p.shape for name, p in weights.items()}
    model.load_state_dict(weights, strict=True)
    assert validate(c, model)["val_loss"] == pytest.approx(result["val_loss"], rel=1e-5)


def test_bits_per_byte_of_bytes_are_the_loss_in_bits(text, tmp_path):
    result = tg.train(tiny(text, tmp_path, val_tokens=0, steps=2))
    n = json.loads(next((tmp_path / "cache/data").glob("*/meta.json")).read_text())
    assert result["val_bpb"] == pytest.approx(
        result["val_loss"] / math.log(2) * (n["val_tokens"] - 1) / n["val_bytes"]
    )


def test_learns_and_is_deterministic(text, tmp_path, sixty):
    """From ln 257 = 5.55; the words' own entropy is about 0.7 a byte."""
    result, losses = sixty
    fields = dict(steps=60, eval_every=60)
    again = tg.train(tiny(text, tmp_path, **fields))
    other = tg.train(tiny(text, tmp_path, seed=1, run_dir=str(tmp_path / "other"), **fields))
    assert again["val_loss"] == result["val_loss"] != other["val_loss"]
    assert train_losses(tmp_path / "run") == losses
    assert result["val_loss"] < 2.2


@pytest.mark.parametrize("fields", [{}, EVERYTHING], ids=["nothing", "everything"])
def test_accumulation_does_not_change_the_losses(text, tmp_path, fields):
    whole = tg.train(tiny(text, tmp_path, **fields))
    c = tiny(
        text, tmp_path, run_dir=str(tmp_path / "parts"), micro_tokens=96, **fields
    )  # 3 rows, 3, 2 + padding
    parts = tg.train(c)
    assert parts["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-4)
    assert train_losses(tmp_path / "parts") == pytest.approx(
        train_losses(tmp_path / "run"), rel=1e-4
    )


def test_the_models_pieces_learn(text, tmp_path):
    """They beat the model without them, 1.49; the optimizer's and the schedule's are for longer
    runs."""
    result = tg.train(tiny(text, tmp_path, steps=60, eval_every=60, **PIECES))
    assert result["val_loss"] < 1.35


def test_every_piece_together_learns_and_is_deterministic(text, tmp_path):
    runs = []
    for name in ("one", "two"):
        fields = dict(run_dir=str(tmp_path / name), steps=60, eval_every=60)
        runs.append(tg.train(tiny(text, tmp_path, **EVERYTHING | fields)))
    assert runs[0]["val_loss"] == runs[1]["val_loss"] < 2.9
    assert train_losses(tmp_path / "one") == train_losses(tmp_path / "two")


@pytest.mark.parametrize("ended", [4, 10, 14, 20])
def test_saved_weights_do_not_depend_on_where_training_ended(text, tmp_path, ended):
    """Tied or not, with the first stage's rotary frequencies or the last one's: they are those
    of an untied model."""
    target = 1000.0 if ended < 20 else 0.0
    c = tiny(text, tmp_path, eval_every=ended, target=target, **EVERYTHING)
    result = tg.train(c)
    assert result["steps"] == ended
    tied = ended <= 9
    assert tg.stage_at(c, ended).model.tied == tied

    model = new_model(c)
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"), strict=True)
    model.enter(c.schedule.progress(ended))
    untied = tg.changed(c, tied=1e-9)  # the embedding is normalised as in a model that was tied
    again = validate(untied, model, ended)
    assert not tg.stage_at(untied, ended).model.tied
    assert again["val_loss"] == pytest.approx(result["val_loss"], rel=1e-5)
    assert torch.equal(model.embed, model.lm_head) == tied


def test_the_split_is_between_two_steps(text, tmp_path, monkeypatch):
    """Until then the embedding keeps its first weights and no moments; at the split it is the
    head."""
    at, update = [], Optimizer.step

    def listen(self, *args):
        before = self.params["embed"].detach().clone(), self.params["lm_head"].detach().clone()
        update(self, *args)
        at.append(
            (*before, self.params["embed"].detach().clone(), self.state["embed"]["m"].any().item())
        )

    monkeypatch.setattr(Optimizer, "step", listen)
    tg.train(tiny(text, tmp_path, tied=0.3, steps=10))
    for step, (embed, head, after, moments) in enumerate(at):
        assert torch.equal(embed, at[0][0]) == (step < 3), step  # steps 0, 1, 2 are tied
        assert torch.equal(embed, head) == (step == 3) and moments == (step >= 3)
        assert torch.equal(embed, after) == (step < 3)


def test_bfloat16_weights_with_fp32_masters_follow_float32(text, tmp_path, sixty):
    half = tg.train(tiny(text, tmp_path, steps=60, eval_every=60, dtype="bfloat16"))
    assert half["val_loss"] == pytest.approx(sixty[0]["val_loss"], rel=0.03)


@pytest.fixture
def without_interpreter(monkeypatch):
    """The ops as a CPU's run has them."""
    monkeypatch.setattr(launch, "INTERPRETED", False)


@pytest.mark.slow
def test_fp8_follows_bf16(text, tmp_path, monkeypatch, without_interpreter):
    """Products in 8 bits, emulated on a CPU: other losses, near by; compiled without a break,
    they are the same."""
    fields = dict(n_layer=1, value_embed_layers=(0,), steps=6, eval_every=6, dtype="bfloat16")
    half = tg.train(tiny(text, tmp_path, **fields))
    eight = tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "eight"), fp8="on", **fields))
    a, b = train_losses(tmp_path / "run"), train_losses(tmp_path / "eight")
    assert (
        a != b
        and b == pytest.approx(a, rel=0.02)
        and eight["val_loss"] == pytest.approx(half["val_loss"], rel=0.02)
    )

    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **kwargs: compile(f, **kwargs, backend="aot_eager")
    )
    torch._dynamo.reset()
    tg.train(
        tiny(text, tmp_path, run_dir=str(tmp_path / "compiled"), fp8="on", compile=True, **fields)
    )
    assert train_losses(tmp_path / "compiled") == pytest.approx(b, rel=1e-3)


def test_fp8_scales_follow_each_steps_largest_activation(
    text, tmp_path, monkeypatch, without_interpreter
):
    """Once a step, whatever was validated in between, and warming up leaves none behind."""
    seen = []
    after_step = gpt.Model.after_step

    def watched(model):
        before = [float(x) for x in model.state().values()]
        after_step(model)
        after = [float(x) for x in model.state().values()]
        seen.append((before, after, model.fp8_mlps.post.amax[:, 0].tolist()))

    monkeypatch.setattr(gpt.Model, "after_step", watched)
    tg.train(tiny(text, tmp_path, steps=4, eval_every=1, dtype="bfloat16", fp8="on"))
    first = FP8MLPs(1, 16, 16).post.scale[0, 0].item()
    assert len(seen) == 4 and seen[0][0] == [first] * 2
    for (_, after, amax), (before, _, _) in zip(seen, seen[1:]):
        assert after == before and amax == [0, 0]
    assert all(len({scales[i] for _, scales, _ in seen}) == 4 for i in range(2))


def test_fp8_that_cannot_be_is_refused(text, tmp_path):
    expected = "fp8 on: expected bfloat16 on .*, found torch.float32 on cpu"
    with pytest.raises(InputError, match=expected):
        tg.train(tiny(text, tmp_path, fp8="on", dtype="float32"))


@pytest.mark.slow
def test_compiled_run_agrees_with_eager(text, tmp_path):
    """The one run through Inductor: forward, backward, both optimizers, validation. Rows do not
    fill attention's blocks: a padding query that sees nothing would make gradients NaN."""
    rows = dict(row_len=40, batch_tokens=(240,), long_window=(8,))
    fields = dict(n_layer=1, value_embed_layers=(), steps=6, eval_every=3) | rows
    eager = tg.train(tiny(text, tmp_path, **fields))
    compiled = tg.train(
        tiny(text, tmp_path, run_dir=str(tmp_path / "compiled"), compile=True, **fields)
    )
    assert train_losses(tmp_path / "compiled") == pytest.approx(
        train_losses(tmp_path / "run"), rel=1e-4
    )
    assert compiled["val_loss"] == pytest.approx(eager["val_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend, recompute", [("aot_eager", "on"), ("inductor", "off"), ("inductor", "on")]
)
def test_a_compiled_run_of_every_piece_agrees_with_eager_and_compiles_nothing_inside_the_clock(
    text, tmp_path, monkeypatch, backend, recompute
):
    # Two stages, with a graph each for training and validation
    stages = dict(mtp=(2, 1), sampled_softmax=(64, 0), steps=8, eval_every=3, recompute=recompute)
    fields = EVERYTHING | THREE_LAYERS | stages
    eager = tg.train(tiny(text, tmp_path, **fields))
    run = tg.train_to_the_end
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compile(f, **kwargs, backend=backend))

    def strictly(*args):
        with torch._dynamo.config.patch(error_on_recompile=True):
            return run(*args)

    torch._dynamo.reset()
    monkeypatch.setattr(tg, "train_to_the_end", strictly)
    compiled = tg.train(
        tiny(text, tmp_path, run_dir=str(tmp_path / "compiled"), compile=True, **fields)
    )
    assert train_losses(tmp_path / "compiled") == pytest.approx(
        train_losses(tmp_path / "run"), rel=1e-3
    )
    assert compiled["val_loss"] == pytest.approx(eager["val_loss"], rel=1e-3)


def test_non_finite_loss_stops_at_its_step_and_says_so(text, tmp_path, monkeypatch, capsys):
    update, after = Optimizer.step, []

    def poison(self, *args):
        update(self, *args)
        if len(after) == 4:
            with torch.no_grad():
                self.params["lm_head"][3, 0] = math.nan
        after.append({n: p.detach().clone() for n, p in self.params.items()})

    monkeypatch.setattr(Optimizer, "step", poison)
    assert tg.main(options(tiny(text, tmp_path))) == 2
    out, err = capsys.readouterr()
    assert out == "" and "error: step 6: the training loss is nan" in err
    assert len(after) == 6
    assert all(
        p.equal(after[4][n]) or n == "lm_head" for n, p in after[5].items()
    )  # nothing happened
    assert len(train_losses(tmp_path / "run")) == 5


def refused(argv, capsys):
    """The error line of a command that must end with status 2."""
    status = tg.main(list(map(str, argv)))
    out, err = capsys.readouterr()
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize(
    "argv, said",
    [
        (
            ["--track", "nope"],
            f"unknown track 'nope': expected one of {', '.join(track_names())}\n",
        ),
        (
            ["--step", "5"],
            "unknown option --step: did you mean --steps? valid are --adam-every --adam-lr",
        ),
        (["--frobnicate"], "unknown option --frobnicate: valid are --adam-every --adam-lr"),
        (["stray"], "unexpected stray: options begin with --"),
        (["--steps", "many"], "--steps: many: expected a whole number"),
        (["--steps", "0"], "--steps 0: expected a positive number"),
        (["--seed", "-1"], "--seed -1: expected zero or more"),
        (
            ["--seed", str(2**63 - 1), "--repeat", "2"],
            f"--seed {2**63 - 1}: expected seeds below 2**63, all 2 of them",
        ),
        (
            ["--sampled-softmax", "64", "100"],
            "--sampled-softmax 64 100: expected multiples of 64, or 0",
        ),
        (["--batch-tokens", "1000"], "--batch-tokens 1000: expected multiples of 256"),
        (["--n-head", "3"], "expected a multiple of 4 * n_head"),
        (["--target-metric", "accuracy"], "expected val_loss, val_bpb, "),
        (["--dtype", "int8"], "expected auto, bfloat16 or float32"),
        (["--value-embed-layers", "9"], "expected layers from 0 to"),
        (["--softcap", "15"], "expected three numbers, or none"),
        (["--softcap", "1", "1", "0"], "expected three numbers, or none"),
        (["--muon-lr", "nan"], "--muon-lr nan: expected zero or more"),
        (["--rope-base", "0"], "--rope-base 0.0: expected a positive number"),
        (["--lr-floor", "2"], "--lr-floor 2.0: expected a fraction"),
        (["--val-windows", "5", "-1"], "--val-windows 5 -1: expected two"),
        (
            ["--track", "laptop-deep", "--paired-layers", "4"],
            "--paired-layers 4: expected layers from 0 to 3",
        ),
        (
            ["--track", "laptop-deep", "--paired-layers", "0", "--n-head", "1"],
            "expected layers from 0 to 3, and an even n_head",
        ),
        (
            ["--track", "laptop-deep", "--skip", "1"],
            "--skip 1: expected an earlier and a later layer",
        ),
        (
            ["--track", "laptop-deep", "--skip", "2", "1"],
            "--skip 2 1: expected an earlier and a later layer",
        ),
        (
            ["--track", "laptop-deep", "--skip", "1", "3"],
            "--skip 1 3: expected an earlier and a later layer",
        ),  # it has value embeddings
        (
            ["--track", "laptop-deep", "--skip", "1", "2", "--paired-layers", "2"],
            "the later one without pairs",
        ),
        (["--backout", "3"], "--backout 3: expected a layer before the last, or -1"),
        (["--mtp", "2", "0"], "--mtp 2 0: expected one positive number per stage"),
        (["--adam-every", "0"], "--adam-every 0: expected a positive number"),
        (["--tied", "1.5"], "--tied 1.5: expected a fraction"),
        (["--max-skips", "-1"], "--max-skips -1: expected zero or more"),
        (["--recompute", "yes"], "--recompute yes: expected auto, on or off"),
        (
            ["--checkpoint-every", "0"],
            "--checkpoint-every 0: expected a number of steps, a time such as 10m, or off",
        ),
        (["--max-time", "10"], "--max-time 10: expected a time such as 90s, 10m or 1.5h"),
        (["--micro-tokens", "100"], "--micro-tokens 100: expected a multiple of row_len (256)"),
        ([""], "unexpected '': options begin with --"),
        (
            ["--track", "shakespeare-char"],
            "--text : expected a file or folder, which track shakespeare-char needs",
        ),
        (["--text", "missing.txt"], "missing.txt: no such file or folder"),
        (["--tokenizer", "words", "--text", __file__], "unknown tokenizer 'words'"),
        (["--tokenizer", "bpe:12", "--text", __file__], "expected a size from 257 to 65536"),
        (["--gpus", "4"], f"--gpus 4: this machine has {torch.cuda.device_count()}"),
    ],
)
def test_bad_options_are_refused_in_one_line(argv, said, capsys, tmp_path):
    assert said in refused([*argv, "--cache-dir", tmp_path], capsys)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "the file is empty"),
        (b"a\0b" * 1000, "a file that is binary"),
        (b"short", "is too short for a row of 256 tokens"),
        (b"many words " * 300, "one batch needs"),
        (b"x", "too little text"),
    ],
)
def test_bad_texts_are_refused_and_leave_nothing(content, said, capsys, tmp_path):
    (tmp_path / "t.txt").write_bytes(content)
    run = tmp_path / "run"
    assert said in refused(
        [
            "--text",
            tmp_path / "t.txt",
            "--tokenizer",
            "bytes",
            "--cache-dir",
            tmp_path / "cache",
            "--run-dir",
            run,
        ],
        capsys,
    )
    assert not run.exists()
    assert not list(tmp_path.glob("cache/**/*.tmp"))


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda b: b[:-2], "train_000000.bin: "),
        (lambda b: b"\1" + b[1:], "not what was written"),
        (
            lambda b: b[:2000] + b"\xff\xff" + b[2002:],
            "and start again, which makes it anew from the text",
        ),
    ],
)
def test_damaged_shards_are_refused(damage, said, capsys, text, tmp_path):
    c = tiny(text, tmp_path)
    open_data(c)
    shard = next((tmp_path / "cache/data").glob("*/train_000000.bin"))
    shard.write_bytes(damage(shard.read_bytes()))
    assert said in refused(options(c), capsys)


def test_an_earlier_run_is_never_overwritten(text, tmp_path, capsys):
    c = tiny(text, tmp_path, steps=2)
    tg.train(c)
    capsys.readouterr()
    before = (tmp_path / "run" / "log.txt").read_text()
    assert "holds a run already" in refused(options(c), capsys)
    assert (tmp_path / "run" / "log.txt").read_text() == before


def test_own_text_drops_the_tracks_target_unless_given(text):
    own = tg.parse_args(["--track", "laptop", "--text", str(text)])
    assert own.goal.target is None and own.data.data == "text"
    asked = tg.parse_args(["--track", "laptop", "--text", str(text), "--target", "2"])
    assert asked.goal.target == 2
    shakespeare = tg.parse_args(["--track", "shakespeare-char", "--text", str(text)])
    assert shakespeare.goal.target == 1.4697


def test_a_track_is_exactly_what_its_file_says(text):
    """Whatever the target, and for own text, only what was asked for differs."""
    for name in track_names():
        given = ["--track", name, "--text", str(text)]
        there = flat(tg.parse_args(given))
        for target in ("0.5", "1.5", "9"):
            here = flat(tg.parse_args([*given, "--target", target]))
            assert here | dict(target=None) == there | dict(target=None)
        fields = load_track(name)
        swapped = {"data", "text", "target", "tokenizer", "long_docs", "shuffle", "sample_prompts"}
        for field in fields.keys() - swapped:
            assert there[field] == fields[field], field


@pytest.mark.parametrize("name", track_names())
def test_every_track_is_a_valid_config(name, text):
    fields = load_track(name)
    c = tg.configure(**(fields | dict(text=str(text))))
    assert c.goal.track == name
    without = ("own-text", "llama", "sft", "dpo", "orpo", "grpo")  # they train to the end
    assert c.goal.target or name.startswith(without)
    for field, value in fields.items():
        assert type(flat(c)[field]) is type(value), field


def test_help_names_every_field_and_track(capsys):
    assert tg.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in flat(tg.configure()).keys() - REMEMBERED:
        assert f"--{name.replace('_', '-')}" in text
    for name in track_names():
        assert name in text


def test_gpt2_small_reads_its_shards_and_trains(tmp_path, monkeypatch):
    """The real track on shards in FineWeb's form, with a small model and no vocabulary to be
    had, so that the prefix loss has to be given up in so many words."""
    monkeypatch.setattr(
        "data.sources.fineweb10B.gpt2_tokenizer",
        lambda: (_ for _ in ()).throw(InputError("no network")),
    )
    monkeypatch.setattr("data.sources.fineweb10B.KNOWN_SHA256", {})
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    r = np.random.default_rng(0)
    folder = tmp_path / "cache/data/fineweb10B"
    for split, index in (("val", 0), ("train", 1), ("train", 2)):
        tokens = r.integers(0, 300, 60_000)
        tokens[r.integers(0, 60_000, 100)] = 50256
        with ShardWriter(folder, f"fineweb_{split}") as w:
            w.paths = [None] * index  # so that the number is the index
            w.write(tokens)
    changes = dict(
        cache_dir=str(tmp_path / "cache"),
        run_dir=str(tmp_path / "run"),
        train_shards=2,
        n_embd=48,
        ngram_rows=500,
        row_len=128,
        val_row_len=512,
        batch_tokens=(128, 256, 384),
        steps=7,
        extension=1,
        eval_every=7,
        val_tokens=1000,
        compile=False,
        dtype="float32",
        target=10.5,
    )
    c = tg.configure(**(load_track("gpt2-small") | changes))
    with pytest.raises(InputError, match="prefix loss needs .* no network; --prefix-loss 0 trains"):
        tg.train(c)
    result = tg.train(tg.changed(c, prefix_loss=(0.0,), run_dir=str(tmp_path / "again")))
    assert result["reached"] and result["val_bpb"] is None
    assert math.isfinite(result["val_loss"])


def test_a_bad_attention_backend_is_one_line(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ATTENTION_BACKEND", "nope")
    assert "unknown attention backend 'nope'" in refused(options(tiny(text, tmp_path)), capsys)


def test_own_text_on_the_big_track_keeps_every_token(text):
    c = tg.parse_args(["--track", "gpt2-small", "--text", str(text)])
    assert c.goal.target is None and c.data.tokenizer == "bpe:4096"
    assert c.data.long_docs == "split" and c.data.shuffle


def test_own_text_without_a_track_is_small_on_every_machine(text, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert tg.parse_args(["--text", str(text)]).goal.track == "own-text"
    assert tg.parse_args([]).goal.track == "gpt2-small"


def test_validation_on_own_text_is_as_long_as_the_tracks_or_the_text(text, tmp_path):
    for limit, n in ((500, 500), (10**6, None)):
        c = tiny(text, tmp_path, val_tokens=limit)
        val = open_data(c).val
        assert val.n_targets == (n or len(val.tokens) - 1)


def test_a_run_dir_that_cannot_be_is_refused(text, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for bad in ("file", "file/run"):
        assert "--run-dir" in refused(
            options(tiny(text, tmp_path, run_dir=str(tmp_path / bad))), capsys
        )


def test_weights_that_cannot_be_written_do_not_cost_the_result(text, tmp_path, monkeypatch):
    def full(weights, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    result = tg.train(tiny(text, tmp_path, steps=2))
    names = {p.name for p in (tmp_path / "run").iterdir()}
    expected = {"log.txt", "metrics.jsonl", "config.json", "result.json", "source.tar.bz2"}
    expected |= {"data.json", "tokenizer.json"}
    assert names - {".lock"} == expected
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert "model.safetensors could not be written" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize(
    "missing, said", [("compiler", "C++ compiler"), ("headers", "python3-dev")]
)
def test_without_what_compiling_needs_the_run_goes_on(
    missing, said, text, tmp_path, monkeypatch, capsys
):
    if missing == "compiler":
        monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(tmp_path))
    assert tg.train(tiny(text, tmp_path, steps=2, compile=True))["steps"] == 2
    assert said in capsys.readouterr().err


# --- several seeds in one process


@pytest.mark.parametrize("compile", [False, True])
def test_repeated_runs_are_those_of_their_seeds_alone(text, tmp_path, compile, monkeypatch):
    """The second run of --repeat reuses the model, the optimizer and the compiled step, and must
    not notice."""
    real = torch.compile  # without a backend that takes long: what is reused is the same
    monkeypatch.setattr(
        torch, "compile", lambda f, **kwargs: real(f, **kwargs, backend="aot_eager")
    )
    fields = dict(n_layer=1, value_embed_layers=(0,), steps=6, eval_every=6, compile=compile)
    results = []
    c = tiny(text, tmp_path, repeat=2, seed=3, run_dir=str(tmp_path / "both"), **fields)
    last = tg.train(c, report=results.append)
    assert [r["seed"] for r in results] == [3, 4] and last == results[1]
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == ["seed3", "seed4"]
    for r in results[compile:]:  # compiling takes long, and the first is like any other run
        alone = tg.train(
            tiny(
                text,
                tmp_path,
                seed=r["seed"],
                run_dir=str(tmp_path / f"alone{r['seed']}"),
                **fields,
            )
        )
        assert train_losses(r["run_dir"]) == train_losses(alone["run_dir"])
        assert r["val_loss"] == alone["val_loss"]
    assert results[0]["val_loss"] != results[1]["val_loss"]


def test_repeated_runs_are_a_line_of_json_each(text, tmp_path, capsys):
    c = tiny(text, tmp_path, repeat=2, steps=2, eval_every=2, target=0.1)
    assert tg.main(options(c)) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1]


def test_passes_of_stages_that_differ_are_timed_beforehand(text, tmp_path, monkeypatch):
    """Nothing of that is left in the gradients: weights are those of a run without it."""
    fields = dict(steps=6, batch_tokens=(32, 256))
    timed = []
    time_passes = warming_up.time_passes

    def keep(setup):
        time_passes(setup)
        timed.append(setup)

    monkeypatch.setattr(warming_up, "time_passes", keep)
    tg.train(tiny(text, tmp_path, **fields))
    tg.train(tiny(text, tmp_path, steps=2, run_dir=str(tmp_path / "alike")))
    assert sorted(stage.rows for stage in timed[0].pass_seconds) == [1, 8]
    assert all(0 < seconds < 60 for seconds in timed[0].pass_seconds.values())
    assert timed[1].pass_seconds == {}  # the first steps show it
    monkeypatch.setattr(warming_up, "time_passes", lambda setup: None)
    tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "without"), **fields))
    assert train_losses(tmp_path / "without") == train_losses(tmp_path / "run")


def test_runs_and_cache_inside_the_text_folder_are_no_text(tmp_path):
    """So the next run, or a resumed one, has the same data."""
    book = tmp_path / "book"
    book.mkdir()
    for name in "ab":
        write_text(book / f"{name}.txt", 3000, seed=ord(name))
    fingerprints = set()
    for name in ("run1", "run2"):
        fields = dict(run_dir=str(book / name), cache_dir=str(book / "cache"), sample_tokens=0)
        result = tg.train(tiny(book, tmp_path, steps=2, **fields))
        fingerprints.add(result["data_fingerprint"])
    assert len(fingerprints) == 1
    said = (book / "run2" / "log.txt").read_text()
    assert "left out 2 folders: cache/ (a cache), run1/ (a run)" in said


def test_a_part_of_the_split_has_bytes_and_targets_of_its_own(text, tmp_path):
    """The part's metrics are those of its batches alone, the whole's of all."""
    c = tiny(text, tmp_path)
    data = open_data(c)
    whole = Split(list(data.val.micro_batches(micro_rows=1)), data.val.n_targets, data.val_bytes)
    part = part_of(whole, len(whole.batches) * c.data.val_row_len // 2, data, tg.World())
    assert 1 < len(part.batches) < len(whole.batches)
    targets = torch.cat([micro.targets.flatten() for micro in part.batches])
    targets = targets[targets != IGNORE]
    assert part.n_targets == len(targets)
    assert part.n_bytes == int((targets < 256).sum())  # bytes are tokens; end-of-text has none
    assert part_of(whole, 10**9, data, tg.World()) == whole


def test_a_run_that_looks_at_a_part_first_ends_with_the_whole_splits_loss(text, tmp_path):
    fields = dict(steps=12, eval_every=2, target=5.0, target_metric="val_loss")
    plain = tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "plain"), **fields))
    looks = tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "looks"), quick_val=128, **fields))
    assert looks["val_loss"] == plain["val_loss"] and looks["steps"] == plain["steps"]
    rows = [json.loads(x) for x in (tmp_path / "looks/metrics.jsonl").read_text().splitlines()]
    assert any("part_val_loss" in row for row in rows)
    assert add.load_run(tmp_path / "looks").result["steps"] == looks["steps"]  # as for a record


def test_training_text_is_measured_as_the_validation_split_is(tmp_path):
    """In rows of the same length, all of it if so much is asked for."""
    text = write_text(tmp_path / "words.txt", n_words=2000)
    fields = dict(steps=4, eval_every=2, train_eval=10**9, val_tokens=0, **SMALL_MODEL)
    result = tg.train(tiny(text, tmp_path, **fields))
    none = tg.train(
        tiny(text, tmp_path, run_dir=str(tmp_path / "b"), **fields | dict(train_eval=0))
    )
    assert none["train_bpb"] is None and none["val_bpb"] == result["val_bpb"]

    run = load_run(tmp_path / "run")
    (shard,) = open_data(tiny(text, tmp_path)).dataset.train
    tokens = read_shard(shard).astype(int)
    total = 0.0
    for at in range(0, len(tokens) - 1, 64):
        row = torch.tensor(tokens[at : at + 65])[None]
        ends = (row[0, :-1] == 256).nonzero().flatten().tolist()
        borders = sorted({0, *ends, row.shape[1] - 1})
        cu_seqlens = torch.tensor(borders, dtype=torch.int32)
        total += run.model(row[:, :-1], row[:, 1:], cu_seqlens, run.stage).item()
    bpb = total / math.log(2) / (tokens[1:] < 256).sum()
    assert result["train_bpb"] == pytest.approx(bpb, rel=1e-5)


def test_prompts_are_texts_and_no_paths():
    prompts = ("~ about home", "x" * 5000)
    assert tg.parse_args(["--sample-prompts", *prompts]).run.sample_prompts == prompts


def test_gradients_grow_with_the_batch_where_they_shall(text, tmp_path):
    """Those of a stage with three times the first one's tokens are three times as large; the loss
    that is logged is a mean all the same."""
    batches = dict(steps=4, batch_tokens=(64, 192), row_len=32)
    found = {}
    for grows in False, True:
        config = tiny(text, tmp_path, grow_gradients=grows, **batches)
        world = tg.World()
        data = tg.load_data(config, lambda step, c=config: tg.stage_at(c, step), world)
        with tg.Log(tmp_path / f"grows {grows}", 4, False) as log:
            setup = tg.set_up(config, tg.stages_of(config), world, data, log)
        setup.model.init_weights(0)
        for step in 1, 3:
            setup.model.zero_grad()
            batch = list(
                data.train.micro_batches(step, micro_rows=setup.micro_rows[setup.stages[step]])
            )
            loss = tg.backward(setup, step, batch)
            found[grows, step] = loss.item(), setup.model.lm_head.grad.norm().item()
    assert found[True, 1] == found[False, 1]
    assert found[True, 3][0] == found[False, 3][0]
    assert found[True, 3][1] == pytest.approx(3 * found[False, 3][1], rel=1e-4)
