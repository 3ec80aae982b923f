"""./run.sh plan: sums by hand, both templates, what does not fit, published runs, bad input."""

import json

import pytest
import torch

import train_gpt
from base import InputError
from models import outline, template_names
from plan import chart, estimate, ladder, published, report
from plan.__main__ import main
from records import scaling
from runtime import memory
from tracks import track_names


def planned(*options, on="8xh100", **more):
    return estimate.make_plan(estimate.configured(options), estimate.place_of(on), **more)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A ladder of 12 runs of a known form, for template gpt on English."""
    lines = []
    for n in (4e5, 1.3e6, 2.1e6, 4.2e6):
        for d in (2.6e5, 5.2e5, 1e6):
            bpb = scaling.loss((0.5, 40.0, 0.3, 150.0, 0.35), n, d)
            lines.append(json.dumps(dict(flops_per_token=6 * n, tokens=d, val_bpb=bpb)))
    (tmp_path / "gpt-english.jsonl").write_text("\n".join(lines))
    found = scaling.ladders(tmp_path)
    monkeypatch.setattr(scaling, "ladders", lambda folder: found)


def test_sums_by_hand(runs):
    plan = planned("--track", "gpt2-small", rule="1B")
    config = train_gpt.parse_args(["--track", "gpt2-small"])
    model = outline(config, 50257)
    assert plan["params"] == sum(p.numel() for p in model.parameters())
    assert plan["params"] == sum(plan["params_by_part"].values())
    stages = train_gpt.stages_of(config).values()
    flops = sum(s.rows * model.flops_per_token(s.model) for s in stages)
    assert plan["flops_per_token"] == pytest.approx(flops / sum(s.rows for s in stages))
    assert plan["flops"] == 1e9 * plan["flops_per_token"] and plan["tokens"] == 10**9
    # H100, FP8: the share that was measured on an H200; exchange on top
    share = 393_216 * 0.7332e9 / 0.558 / 989.4e12
    seconds = plan["flops"] / (8 * 989.4e12 * share) + plan["steps"] * plan["exchange_ms"] / 1e3
    assert plan["hours"] == pytest.approx(seconds / 3600, rel=1e-3)
    assert 2 < plan["exchange_ms"] < 8
    assert plan["usd"] == pytest.approx(plan["hours"] * 8 * 3)
    assert plan["kwh"] == pytest.approx(plan["hours"] * 8 * 0.97)
    assert not plan["speed_measured"] and "measured on h200" in plan["speed_from"]
    true = scaling.loss((0.5, 40.0, 0.3, 150.0, 0.35), plan["flops_per_token"] / 6, 1e9)
    assert plan["val_bpb"] == pytest.approx(true, rel=0.02)
    assert plan["val_bpb_low"] <= plan["val_bpb"] <= plan["val_bpb_high"]


def test_what_was_measured_is_said_to_be():
    plan = planned("--track", "gpt2-small-1gpu", on="h200")
    assert plan["speed_measured"] and plan["usd"] is None and plan["exchange_ms"] == 0
    # 393,216 tokens a step at 0.558 s in the last stage
    assert plan["tokens_per_s"] == pytest.approx(393_216 / 0.558, rel=0.05)
    assert not planned("--track", "laptop", on="h200")["speed_measured"]  # far smaller


def test_tokens_by_rule():
    # Rows of tables that are only looked up do not count
    plan = planned("--track", "gpt2-small", rule="20:1")
    assert plan["tokens"] == round(20 * plan["flops_per_token"] / 6) < 20 * plan["params"]
    plan = planned("--track", "gpt2-small", rule="track")
    assert plan["steps"] == 1345
    config = train_gpt.parse_args(["--track", "laptop"])
    for rule, tokens in (("655M", 655e6), ("2.5b", 2.5e9), ("1e6", 1e6), ("4096", 4096)):
        assert estimate.tokens_of(rule, config, 1.0) == tokens
    assert estimate.tokens_of("100:1", config, 1e6) == 1e8
    for wrong in ("", "0", "20:2", "-5", "x", "5G", "0:1", "1e30"):
        with pytest.raises(InputError, match="expected track, a ratio"):
            estimate.tokens_of(wrong, config, 1.0)


@pytest.mark.parametrize("template", template_names())
def test_every_template_has_a_plan(template):
    """By the template's protocol alone; memory is runtime/memory.py's own."""
    options = ["--track", "laptop", "--template", template]
    place = estimate.place_of("a100")
    config = estimate.configured(options)
    plan = estimate.make_plan(config, place)
    model = estimate.build(config, 4096, place)
    parts = memory.estimate(
        model,
        model.update_rules(config.optim),
        plan["rows"],
        config.data.row_len,
        plan["recompute"],
        1,
        True,
    )
    assert plan["memory_gb"] == pytest.approx(sum(parts.values()) / 1e9, abs=0.01)
    assert plan["fits"] and plan["advice"] == []
    assert report.in_words(plan)[0] == "laptop on a100"


@pytest.mark.slow
def test_every_track_can_be_planned():
    for name in track_names():
        plan = planned("--track", name)
        assert plan["params"] > 0 and plan["hours"] > 0


def test_what_would_make_it_fit():
    options = ["--track", "gpt2-small", "--micro-tokens", "65536", "--recompute", "off"]
    plan = planned(*options, on="rtx4090")
    assert not plan["fits"] and plan["memory_gb"] > plan["memory_free_gb"]
    words = "\n".join(report.in_words(plan))
    assert "does NOT fit" in words and "would fit: --micro-tokens 16384 --recompute on" in words
    # What is said to fit does
    small = planned(*options[:2], "--micro-tokens", "16384", "--recompute", "on", on="rtx4090")
    assert small["fits"]
    assert f"--recompute on: {small['memory_gb']:.1f} GB" in words


def test_more_gpus_share_the_optimizer():
    one = planned("--track", "gpt2-small", "--micro-tokens", "16384", on="h100")
    eight = planned("--track", "gpt2-small", "--micro-tokens", "16384", on="8xh100")
    ours, theirs = (p["memory_by_part"]["optimizer"] for p in (eight, one))
    assert ours == pytest.approx(theirs / 8, rel=0.01)
    assert eight["hours"] > one["hours"] / 8  # what they exchange


def test_this_machine(tmp_path, monkeypatch):
    """A processor: its own rate, its own runs if there are any, no price and no watts."""
    place = estimate.place_of()
    assert place.here and place.count == 1
    config = estimate.configured(["--track", "laptop"])
    monkeypatch.setattr(estimate, "runs_folder", lambda: tmp_path)
    plan = estimate.make_plan(config, place)
    if not torch.cuda.is_available():
        assert not plan["speed_measured"] and "predicted from 22% of peak" in plan["speed_from"]
        assert plan["usd"] is None and plan["kwh"] is None
    for name, device, share in (("a", place.hardware.name, 0.31), ("b", "another", 0.9)):
        run = tmp_path / name
        run.mkdir()
        said = dict(device=device, peak_share=share, track="laptop")
        (run / "result.json").write_text(json.dumps(said))
        (run / "config.json").write_text(json.dumps(dict(config=dict(template="gpt"))))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "result.json").write_text("[]")
    plan = estimate.make_plan(config, place, usd=0.5, watts=30)
    assert plan["peak_share"] == 0.31 and plan["speed_measured"]
    assert plan["usd"] == pytest.approx(plan["hours"] * 0.5)
    assert plan["kwh"] == pytest.approx(plan["hours"] * 0.03)


def test_data_that_is_prepared(tmp_path):
    said = dict(n_vocab=9000, splits=dict(train=dict(tokens=10**6)))
    (tmp_path / "manifest.json").write_text(json.dumps(said))
    plan = planned("--track", "laptop", data=estimate.read_data(tmp_path), rule="5M")
    assert plan["n_vocab"] == 9000 and plan["passes"] == 5
    assert any("5 passes" in caveat for caveat in plan["caveats"])
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(InputError, match="expected the manifest of prepared data"):
        estimate.read_data(tmp_path)
    with pytest.raises(InputError, match="manifest.json or data.json"):
        estimate.read_data(tmp_path / "none")


def test_published_runs_are_near_where_the_hardware_is_known():
    """What docs/planning.md says of them; nothing here was fitted to them."""
    rows = {row["name"]: row for row in published.compare()}
    for name in ("nanochat d24, bf16", "nanochat d24, FP8", "minimind 64M, pre-training"):
        assert abs(rows[name]["error"]["hours"]) < 0.25
    # A GPU without a name: between the two it may be
    h100, a100 = (rows[f"1.055B on 8 GPUs, as {gpu}"] for gpu in ("H100", "A100"))
    assert h100["planned"]["hours"] < 35.4 < a100["planned"]["hours"]
    assert h100["planned"]["params"] == 1_055_231_744
    assert rows["286M on one H100"]["planned"]["hours"] < 1
    lines = published.table(list(rows.values()))
    assert all(any(name in line for line in lines) for name in rows)


def test_the_command_line(capsys, runs):
    assert main(["--track", "gpt2-small", "--hardware", "8xh100", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    keys = {"params", "tokens", "flops", "memory_gb", "hours", "usd", "kwh", "val_bpb"}
    assert keys | {"val_bpb_low", "val_bpb_high"} <= plan.keys()
    assert all(isinstance(plan[key], int | float) for key in keys)
    assert main(["--track", "gpt2-small", "--hardware", "8xh100", "--usd-per-hour", "2"]) == 0
    said = capsys.readouterr().out
    assert "tokens/s (predicted)" in said and "at $2.00 an hour each (given)" in said
    assert "bits per byte, between" in said and "an extrapolation" in said


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--hardware", "8xh1000"], "--hardware 8xh1000: expected one of h100"),
        (["--track", "nothing"], "unknown track 'nothing'"),
        (["--tokens", "many"], "--tokens many: expected track, a ratio"),
        (["--track", "laptop", "--usd-per-hour", "-1"], "expected a number above 0"),
        (["--track", "laptop", "--chart", "x.gif"], "--chart x.gif: expected a name that ends in"),
        (["--track", "laptop", "--n-embd", "130"], "--n-embd 130: expected a multiple"),
        (["--track", "laptop", "--nonsense"], "unknown option --nonsense"),
        (["ladder", "--tokens", "7"], "--tokens 7: expected multiples of 4096"),
    ],
)
def test_bad_input_is_one_line(argv, said, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and said in err


def test_a_chart(tmp_path, runs, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(chart, "ladder_tracks", lambda: ["laptop", "gpt2-small"])
    path = tmp_path / "ladder.svg"
    chart.draw(path, estimate.place_of("8xh100"), "20:1", [])
    assert "<svg" in path.read_text()[:400]


def test_a_ladder_goes_on_where_it_was(tmp_path, monkeypatch):
    trained = []

    def train(template, size, tokens, data, corpus):
        trained.append((size, tokens))
        return dict(size=list(size), tokens=tokens)

    monkeypatch.setattr(ladder, "train", train)
    argv = ["--to", str(tmp_path), "--tokens", "262144", "1048576"]
    assert ladder.main(argv) == 0
    assert sorted(trained) == sorted((s, n) for s in ladder.SIZES for n in (262144, 1048576))
    costs = [ladder.cost(run) for run in trained]
    assert costs == sorted(costs)
    assert ladder.main(argv) == 0 and len(trained) == 10  # nothing is missing
    assert ladder.main(["--to", str(tmp_path), "--minutes", "-1"]) == 0 and len(trained) == 10


def test_a_run_of_the_ladder_is_what_its_line_says():
    config = ladder.configuration("gpt", (4, 128), 2**20, dict(data="stdlib"))
    assert config.schedule.steps * config.schedule.batch_tokens[0] == 2**20
    assert (config.model.n_layer, config.model.n_embd, config.model.n_head) == (4, 128, 4)
    # 12 C^2 a block and the head, and windows of 256
    flops = ladder.flops_of(config, 4096)
    assert flops == 6 * (4 * 12 * 128**2 + 4096 * 128) + 12 * 128 * 4 * 256 / 2
