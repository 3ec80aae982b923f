"""Whole runs: what they print, write and return, and what they refuse."""

import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_gpt as tg
from data import InputError, ShardWriter
from helpers import options, run_trainer, tiny, train_losses, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "words.txt")


def test_a_run_as_a_user_starts_it(text, tmp_path):
    done = run_trainer(*options(tiny(text, tmp_path, target=5.5, steps=30, eval_every=5)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1  # one line of JSON, nothing else
    result = json.loads(done.stdout)
    assert {"track", "target_metric", "target", "reached", "val_loss", "val_bpb", "train_time_s", "cold_start_s",
            "steps", "tokens", "tokens_per_s", "params", "device", "world_size", "run_dir", "data_fingerprint"} <= set(result)
    assert result["reached"] and result["val_loss"] <= 5.5
    assert result["steps"] < 30 and result["tokens"] == result["steps"] * 256
    assert "a sample" in done.stderr
    run = tmp_path / "run"
    assert json.loads((run / "result.json").read_text()) == result
    assert json.loads((run / "config.json").read_text())["config"]["target"] == 5.5
    log = (run / "log.txt").read_text()
    assert (tg.ROOT / "train_gpt.py").read_text() in log and '"git_commit"' in log
    val_line = r"^step:(\d+)/30 val_loss:(\d+\.\d+) train_time:(\d+)ms step_avg:(\d+\.\d+)ms( .*)?$"
    assert float(re.findall(val_line, log, re.M)[-1][1]) == pytest.approx(result["val_loss"], abs=1e-4)
    assert len(re.findall(r"^step:\d+/30 train_loss:\d+\.\d+ train_time:\d+ms step_avg:\d+\.\d+ms$", log, re.M)) \
        == result["steps"] == len(train_losses(run))


def test_out_of_steps_is_status_3(text, tmp_path, capsys):
    assert tg.main(options(tiny(text, tmp_path, target=0.1, steps=2))) == 3
    assert json.loads(capsys.readouterr().out)["reached"] is False


def test_no_target_trains_to_the_last_step(text, tmp_path):
    result = tg.train(tiny(text, tmp_path, steps=12))
    assert result["reached"] is None and result["steps"] == 12


def test_weights_on_disk_are_the_model(text, tmp_path):
    c = tiny(text, tmp_path)
    result = tg.train(c)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    model = tg.GPT(c, 257)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in weights.items()}
    model.load_state_dict(weights, strict=True)
    loader = tg.load_data(c, [tg.stage_at(c, 0)] * c.steps, tg.World()).val
    nats = tg.evaluate(c, model, 257, loader.micro_batches(), tg.World())
    assert nats / loader.n_targets == pytest.approx(result["val_loss"], rel=1e-5)


def test_bits_per_byte_of_bytes_are_the_loss_in_bits(text, tmp_path):
    result = tg.train(tiny(text, tmp_path, val_tokens=0, steps=2))
    n = json.loads(next((tmp_path / "cache/data").glob("*/meta.json")).read_text())
    assert result["val_bpb"] == pytest.approx(result["val_loss"] / math.log(2) * (n["val_tokens"] - 1) / n["val_bytes"])


def test_learns_and_is_deterministic(text, tmp_path):
    runs = [tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / f"r{i}"), seed=s, steps=60, eval_every=60))
            for i, s in enumerate((0, 0, 1))]
    assert runs[0]["val_loss"] == runs[1]["val_loss"] != runs[2]["val_loss"]
    assert train_losses(tmp_path / "r0") == train_losses(tmp_path / "r1")
    assert runs[0]["val_loss"] < 2.2  # ln 257 = 5.55 at the start; the words' own entropy is about 0.7 a byte


def test_accumulation_does_not_change_the_losses(text, tmp_path):
    whole = tg.train(tiny(text, tmp_path))
    parts = tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "parts"), micro_tokens=96))  # 3 rows, 3, 2 + padding
    assert parts["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-4)
    assert train_losses(tmp_path / "parts") == pytest.approx(train_losses(tmp_path / "run"), rel=1e-4)


def test_bfloat16_weights_with_fp32_masters_follow_float32(text, tmp_path):
    whole = tg.train(tiny(text, tmp_path, steps=60))
    half = tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "half"), steps=60, dtype="bfloat16"))
    assert half["val_loss"] == pytest.approx(whole["val_loss"], rel=0.03)


def test_compiled_run_agrees_with_eager(text, tmp_path):
    """The one run through Inductor: forward, backward, both optimizers, validation, two stages."""
    fields = dict(n_layer=1, value_embed_layers=(0,), short_window=(8, 16), steps=6, eval_every=3)
    eager = tg.train(tiny(text, tmp_path, **fields))
    compiled = tg.train(tiny(text, tmp_path, run_dir=str(tmp_path / "compiled"), compile=True, **fields))
    assert train_losses(tmp_path / "compiled") == pytest.approx(train_losses(tmp_path / "run"), rel=1e-4)
    assert compiled["val_loss"] == pytest.approx(eager["val_loss"], rel=1e-4)


def test_non_finite_loss_stops_at_its_step_and_says_so(text, tmp_path, monkeypatch, capsys):
    update, steps = tg.Optimizer.step, []

    def poison(self, *args):
        update(self, *args)
        steps.append(1)
        if len(steps) == 5:
            with torch.no_grad():
                self.params["lm_head"][3, 0] = math.nan
    monkeypatch.setattr(tg.Optimizer, "step", poison)
    assert tg.main(options(tiny(text, tmp_path))) == 2
    out, err = capsys.readouterr()
    assert out == "" and "error: step 6: the training loss is nan" in err
    assert len(steps) == 5  # the sixth update never happened
    assert len(train_losses(tmp_path / "run")) == 5


def refused(argv, capsys):
    """The error line of a command that must end with status 2."""
    status = tg.main(list(map(str, argv)))
    out, err = capsys.readouterr()
    assert status == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("argv, said", [
    (["--track", "nope"], "unknown track 'nope': expected one of gpt2-small, laptop, shakespeare-char"),
    (["--step", "5"], "unknown option --step: did you mean --steps? valid are --adam-lr"),
    (["--frobnicate"], "unknown option --frobnicate: valid are --adam-lr"),
    (["stray"], "unknown option stray"),
    (["--steps", "many"], "--steps: invalid int value: 'many'"),
    (["--steps", "0"], "--steps 0: expected a positive number"),
    (["--seed", "-1"], "--seed -1: expected zero or more"),
    (["--batch-tokens", "1000"], "--batch-tokens (1000,): expected multiples of row_len"),
    (["--n-head", "3"], "expected a multiple of 4 * n_head"),
    (["--target-metric", "accuracy"], "expected val_loss or val_bpb"),
    (["--dtype", "int8"], "expected auto, bfloat16 or float32"),
    (["--value-embed-layers", "9"], "expected layers from 0 to"),
    (["--softcap", "15"], "expected three numbers, or none"),
    (["--softcap", "1", "1", "0"], "expected three numbers, or none"),
    (["--muon-lr", "nan"], "--muon-lr nan: expected zero or more"),
    (["--rope-base", "0"], "--rope-base 0.0: expected a positive number"),
    (["--lr-floor", "2"], "--lr-floor 2.0: expected a fraction"),
    (["--val-windows", "5", "-1"], "expected a short and a long window, or none"),
    (["--track", "shakespeare-char"], "track shakespeare-char needs a text"),
    (["--text", "missing.txt"], "missing.txt: no such file or folder"),
    (["--tokenizer", "words", "--text", __file__], "unknown tokenizer 'words'"),
    (["--tokenizer", "bpe:12", "--text", __file__], "expected a size from 257 to 65536"),
    (["--gpus", "4"], f"--gpus 4: this machine has {torch.cuda.device_count()}"),
])
def test_bad_options_are_refused_in_one_line(argv, said, capsys, tmp_path):
    assert said in refused([*argv, "--cache-dir", tmp_path], capsys)


@pytest.mark.parametrize("content, said", [
    (b"", "the file is empty"), (b"a\0b" * 1000, "binary file"), (b"short", "fills a row"),
    (b"many words " * 300, "one batch needs"),
    (b"x", "too little text")])
def test_bad_texts_are_refused_and_leave_nothing(content, said, capsys, tmp_path):
    (tmp_path / "t.txt").write_bytes(content)
    run = tmp_path / "run"
    assert said in refused(["--text", tmp_path / "t.txt", "--tokenizer", "bytes", "--cache-dir", tmp_path / "cache",
                            "--run-dir", run], capsys)
    assert not run.exists()
    assert not list(tmp_path.glob("cache/**/*.tmp"))


@pytest.mark.parametrize("damage, said", [
    (lambda b: b[:-2], "truncated or altered"),
    (lambda b: b"\1" + b[1:], "expected magic 20240520"),
    (lambda b: b[:2000] + b"\xff\xff" + b[2002:], "expected tokens below 257, found 65535 at position 488"),
])
def test_damaged_shards_are_refused(damage, said, capsys, text, tmp_path):
    c = tiny(text, tmp_path)
    tg.load_data(c, [tg.stage_at(c, 0)] * c.steps, tg.World())
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
    assert own.target is None and own.data == "text"
    assert tg.parse_args(["--track", "laptop", "--text", str(text), "--target", "2"]).target == 2
    assert tg.parse_args(["--track", "shakespeare-char", "--text", str(text)]).target == 1.4697


def test_easier_targets_choose_a_smaller_model(text):
    at = lambda target: tg.parse_args(["--track", "shakespeare-char", "--text", str(text), "--target", str(target)])
    assert at(1.898).n_embd == at(2.5).n_embd < at(1.8).n_embd == at(1.4).n_embd
    assert at(1.898).target == 1.898


@pytest.mark.parametrize("name", tg.track_names())
def test_every_track_is_a_valid_config(name, text):
    c = tg.Config(**(tg.load_track(name) | dict(text=str(text))))
    assert c.track == name and c.target and all(isinstance(c.__getattribute__(f), tuple) for f in (
        "batch_tokens", "max_doc_len", "short_window", "long_window", "stage_lr", "softcap", "value_embed_layers"))


def test_help_names_every_field_and_track(capsys):
    with pytest.raises(SystemExit) as e:
        tg.main(["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    for name in [f"--{f.replace('_', '-')}" for f in tg.Config.__dataclass_fields__] + tg.track_names():
        assert name in text


def test_gpt2_small_reads_its_shards_and_trains(tmp_path, monkeypatch):
    """The real track on shards in FineWeb's form, with a small model and no vocabulary to be had."""
    monkeypatch.setattr("data.gpt2_tokenizer", lambda: (_ for _ in ()).throw(InputError("no network")))
    monkeypatch.setattr("data.fineweb.KNOWN_SHA256", {})
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    r = np.random.default_rng(0)
    folder = tmp_path / "cache/data/fineweb10B"
    for split, index in (("val", 0), ("train", 1), ("train", 2)):
        tokens = r.integers(0, 300, 60_000)
        tokens[r.integers(0, 60_000, 100)] = 50256
        with ShardWriter(folder, f"fineweb_{split}") as w:
            w.paths = [None] * index  # so that the number is the index
            w.write(tokens)
    c = tg.Config(**(tg.load_track("gpt2-small") | dict(
        cache_dir=str(tmp_path / "cache"), run_dir=str(tmp_path / "run"), train_shards=2, n_layer=2,
        n_embd=32, n_head=2, value_embed_layers=(1,), row_len=256, val_row_len=1024, batch_tokens=(512, 1024, 1536), steps=6, eval_every=3,
        val_tokens=5000, compile=False, dtype="float32", target=10.0)))
    result = tg.train(c)
    assert result["reached"] and result["val_bpb"] is None
    assert math.isfinite(result["val_loss"])


def test_a_bad_attention_backend_is_one_line(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ATTENTION_BACKEND", "nope")
    assert "unknown attention backend 'nope'" in refused(options(tiny(text, tmp_path)), capsys)


def test_own_text_on_the_big_track_keeps_every_token(text):
    c = tg.parse_args(["--track", "gpt2-small", "--text", str(text)])
    assert (c.long_docs, c.shuffle, c.tokenizer, c.target) == ("split", True, "bpe:4096", None)


def test_own_text_without_a_track_is_small_on_every_machine(text, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert tg.parse_args(["--text", str(text)]).track == "laptop"
    assert tg.parse_args([]).track == "gpt2-small"


def test_validation_on_own_text_is_as_long_as_the_tracks_or_the_text(text, tmp_path):
    for limit, n in ((500, 500), (10**6, None)):
        c = tiny(text, tmp_path, val_tokens=limit)
        val = tg.load_data(c, [tg.stage_at(c, 0)] * c.steps, tg.World()).val
        assert val.n_targets == (n or len(val.tokens) - 1)


@pytest.mark.parametrize("rows, most, expected", [(24, 16, 12), (24, 24, 24), (24, 1, 1), (3, 5, 3), (8, 5, 4), (7, 3, 3)])
def test_passes_are_few_and_equal(rows, most, expected):
    assert tg.equal_passes(rows, most) == expected


def test_a_run_dir_that_cannot_be_is_refused(text, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for bad in ("file", "file/run"):
        assert "--run-dir" in refused(options(tiny(text, tmp_path, run_dir=str(tmp_path / bad))), capsys)


def test_weights_that_cannot_be_written_do_not_cost_the_result(text, tmp_path, monkeypatch):
    def full(weights, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("records.log.save_file", full)
    result = tg.train(tiny(text, tmp_path, steps=2))
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"log.txt", "metrics.jsonl", "config.json", "result.json"}
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == result
    assert "model.safetensors could not be written" in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.parametrize("missing, said", [("compiler", "C++ compiler"), ("headers", "python3-dev")])
def test_without_what_compiling_needs_the_run_goes_on(missing, said, text, tmp_path, monkeypatch, capsys):
    if missing == "compiler":
        monkeypatch.setattr(tg.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(tg.sysconfig, "get_path", lambda name: str(tmp_path))
    assert tg.train(tiny(text, tmp_path, steps=2, compile=True))["steps"] == 2
    assert said in capsys.readouterr().err


# --- several seeds in one process


@pytest.mark.parametrize("compile", [False, True])
def test_repeated_runs_are_those_of_their_seeds_alone(text, tmp_path, compile):
    """The second run of --repeat reuses the model, the optimizer and the compiled step, and must not notice."""
    fields = dict(steps=6, eval_every=6, compile=compile)
    results = []
    last = tg.train(tiny(text, tmp_path, repeat=2, seed=3, run_dir=str(tmp_path / "both"), **fields), report=results.append)
    assert [r["seed"] for r in results] == [3, 4] and last == results[1]
    assert sorted(p.name for p in (tmp_path / "both").iterdir()) == ["seed3", "seed4"]
    for r in results:
        alone = tg.train(tiny(text, tmp_path, seed=r["seed"], run_dir=str(tmp_path / f"alone{r['seed']}"), **fields))
        assert train_losses(r["run_dir"]) == train_losses(alone["run_dir"])
        assert r["val_loss"] == alone["val_loss"]
    assert results[0]["val_loss"] != results[1]["val_loss"]


def test_repeated_runs_are_a_line_of_json_each(text, tmp_path, capsys):
    c = tiny(text, tmp_path, repeat=2, steps=2, eval_every=2, target=0.1)
    assert tg.main(options(c)) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1]
