"""benchmarks ablate --at parity: the parts of gpt2-small, each measured alone."""

import dataclasses
import json
import math
import statistics

import pytest
import torch
from parity_at_small import SHAPE, made_up_source
from scipy import stats

from base import InputError
from benchmarks import ablate, subject
from benchmarks.__main__ import main
from benchmarks.ablate import pieces, summary
from benchmarks.parity import QUICK, parts, task
from models import gpt
from models.parts import IGNORE
from runtime import setting_up


def scaled():
    return task.scaled(subject.parse(["--track", "gpt2-small"]), SHAPE)


def test_every_part_is_one_of_the_track():
    chosen, left_out = pieces.choose(scaled(), (), parts.PARTS, parts.CODE)
    assert list(chosen) == ["base", *parts.PARTS] and not left_out
    for name, v in chosen.items():
        turned_on = name == "row-moments"  # the one that the track goes without
        assert v.label == ("base" if name == "base" else f"with{'out' * (not turned_on)} {name}")
        assert bool(v.fields) == (name not in ("base", *parts.CODE))
    steps = [subject.schedule(v.config) for v in chosen.values()]
    tokens = {sum(stage.rows for stage in schedule) for schedule in steps}
    assert len(tokens) == 1  # what makes their losses comparable


def test_steps_are_shortened_with_their_rows():
    c = scaled()
    shorter = parts.shortened(c, 512)
    assert shorter.row_len == 512 and shorter.batch_tokens == (512, 1024, 1536)
    rows = [[stage.rows for stage in subject.schedule(x)] for x in (c, shorter)]
    assert rows[0] == rows[1] and set(rows[0]) == {1, 2, 3}
    assert shorter.max_doc_len == c.max_doc_len and shorter.long_window == c.long_window
    for n in 128, 300:
        with pytest.raises(InputError, match=f"--step-tokens {n}: expected 256 or more, and a di"):
            parts.shortened(c, n)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--step-tokens", "512"], "--step-tokens: only with --at parity"),
        (["--at", "parity", "--steps", "6"], "--steps: is set by --at parity; leave it out"),
        (["--at", "parity", "--n-embd=48"], "--n-embd: is set by --at parity; leave it out"),
        (["--at", "here"], "--at"),
    ],
)
def test_options_that_are_refused(options, said, capsys):
    assert main(["ablate", *options]) == 2
    assert said in capsys.readouterr().err


def test_pooled_intervals_are_of_all_pieces_seeds():
    losses = dict(base=[3.0, 3.1, 3.3], a=[3.1, 3.15, 3.5], b=[2.9, 3.0, 3.1], once=[3.2])
    runs = [
        dict(variant=name, seed=seed, val=[dict(val_loss=loss)], ms_per_step=1.0)
        for name, made in losses.items()
        for seed, loss in enumerate(made)
    ]
    got = summary.summarise(runs, list(losses), "val_loss", None)
    a, b = [0.1, 0.05, 0.2], [-0.1, -0.1, -0.2]
    assert got["a"]["by_seed"] == pytest.approx(a)
    sd = math.sqrt((statistics.variance(a) + statistics.variance(b)) / 2)
    half = stats.t.ppf(0.975, 4) * sd
    assert got["a"]["pooled"] == pytest.approx(half / math.sqrt(3))
    assert got["once"]["pooled"] == pytest.approx(half)  # one seed is told as well
    alone = summary.summarise(runs[:1] + runs[-1:], ["base", "once"], "val_loss", None)
    assert alone["once"]["pooled"] is None


def test_a_steps_cpu_time_leaves_out_validations(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(ablate.time, "process_time", lambda: now[0])
    with ablate.Points(tmp_path, 4) as log:
        for step, seconds in enumerate((9.0, 1.0, 2.0, 4.0), start=1):
            now[0] += seconds
            log.step(step, 4, "train", 3.0, 0.0)
            if step == 2:
                now[0] += 100
                log.validation(step, 4, dict(val_loss=3.0), 0.0)
    assert log.cpu_seconds == [1.0, 2.0, 4.0]  # from the first step's end on


# --- real runs, in six steps


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Parity's place at a tiny shape, on made-up tokens in which each follows from the last."""
    source = made_up_source(tmp_path / "source", every=100, stride=5)
    monkeypatch.setattr(task, "open_dataset", lambda *ignored: source)
    small = dict(width=24, steps=6, val_tokens=512, val_row_len=256)
    monkeypatch.setattr(parts, "QUICK", dataclasses.replace(QUICK, **small))
    monkeypatch.setattr(
        setting_up,
        "machine_probe",
        lambda device: dict(matmul=dict(float32=1e12, bfloat16=1e12), copy=1e10),
    )


def test_parts_are_measured_by_the_door_and_gone_on_with(here, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PARTS", ("xsa",))
    out, table = tmp_path / "parts.json", tmp_path / "parts.md"
    command = ["ablate", "--at", "parity", "--step-tokens", "256", "--json", str(out)]
    command += ["--table", str(table), "--seeds"]
    assert main([*command, "1"]) == 0
    first = json.loads(out.read_text())
    assert [(r["variant"], r["seed"]) for r in first["runs"]] == [("base", 0), ("xsa", 0)]
    assert main([*command, "2"]) == 0  # goes on with the second seed
    result = json.loads(out.read_text())
    assert result["runs"][:2] == first["runs"] and len(result["runs"]) == 4
    runs = {(r["variant"], r["seed"]): r for r in result["runs"]}
    losses = {key: r["val"][-1]["val_loss"] for key, r in runs.items()}
    assert len(set(losses.values())) == 4  # each piece makes a difference, and each seed
    assert [len(r["val"]) for r in runs.values()] == 4 * [1]
    assert all(r["tokens"] == 3 * 2 * 512 for r in runs.values())
    row = result["summary"]["xsa"]
    apart = [losses["xsa", seed] - losses["base", seed] for seed in (0, 1)]
    assert row["by_seed"] == apart and row["difference"]["n"] == 2
    ratios = [
        runs["xsa", n]["cpu_ms_per_step"] / runs["base", n]["cpu_ms_per_step"] for n in (0, 1)
    ]
    assert (row["cpu_ratio"]["least"], row["cpu_ratio"]["most"]) == (min(ratios), max(ratios))
    assert row["params"] < result["summary"]["base"]["params"]
    text = table.read_text()
    assert "| without xsa | " in text and "11 layers, width 24, 64 tokens" in text
    assert format(apart[0], "+.4f") in text and "256 to 768 tokens a step" in text


def test_code_that_is_no_option_is_as_it_was_behind_its_run(here, tmp_path):
    with parts.at_parity(step_tokens=256, trainer_options=()) as place:
        variants, _ = pieces.choose(place.base, ["masters"], place.preset, place.code)
        bench = ablate.Bench(variants, subject.alone(), tmp_path, place.open_data)
        assert "error" not in bench.run("masters", 0)
        trainer = bench.kept["masters"]
        model = trainer.model
        for name in "value_embeds", "ngram_embeds", "lm_head", "embed":
            p = model.get_parameter(name)
            assert (p == p.bfloat16()).all() and p.any(), name
        for name in "attn_bank", "mlp_bank", "post_lambdas":
            p = model.get_parameter(name)
            assert (p != p.bfloat16()).any(), name
        with ablate.Points(tmp_path / "log", 6) as log:
            trainer.run(log, 0)
        p = model.get_parameter("value_embeds")
        assert (p != p.bfloat16()).any()

        f = [trainer.flops(stage) for stage in subject.schedule(place.base)]
        of_rows = f[0] + f[1] + 2 * f[2] + 2 * f[3] + 3 * f[4] + 3 * f[5]
        assert trainer.mean_flops() == pytest.approx(of_rows / 12) and f[0] < f[-1]

    later = gpt.later_targets
    targets = torch.tensor([[1, 2, 63, 4]])
    starts = torch.tensor([[True, False, False, True]])
    with parts.CODE["document-ends"].around(None):
        crossing = gpt.later_targets(targets, starts, 2)[0, :, 1].tolist()
    assert crossing == [2, 63, 4, IGNORE]
    assert gpt.later_targets is later
    assert gpt.later_targets(targets, starts, 2)[0, :, 1].tolist() == [2, 63, IGNORE, IGNORE]
