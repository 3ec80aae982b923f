"""benchmarks/cluster.py: sums, volumes, the public record's stages, measured costs, limits of scaling, bad input."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings, strategies as st

import train_gpt as tg
from benchmarks import cluster
from benchmarks.__main__ import main
from benchmarks.cluster import RECORD, TERMS, Collective, Cost, Links, communication_ms, step_ms
from data import InputError

GPT2_SMALL = tg.parse_args(["--track", "gpt2-small"])

# modded-nanogpt: bytes of an Adam step (every second one), then of a Muon step (every one)
EVERY_SECOND = [Collective("reduce_scatter", 386e6), Collective("all_gather", 386e6), Collective("all_gather", 580e6),
                *[Collective("all_gather", 77e6)] * 2]
EVERY = [Collective("reduce_scatter", 167e6), Collective("all_gather", 167e6)]
RECORD_VOLUMES = [c._replace(bytes=c.bytes / 2) for c in EVERY_SECOND] + EVERY


@pytest.mark.parametrize("log", [(31.54, 56.57, 82.38), (32.45, 58.06, 83.97), (31.59, 56.90, 82.74)])
def test_from_one_gpu_it_predicts_the_records_stages_on_eight(log):
    """ms per step in the logs of records 88, 85 and 89; one-GPU cost from record 88's."""
    predicted = [sum(step_ms(rows, 16384, 8, RECORD, RECORD_VOLUMES).values()) for rows in (8, 16, 24)]
    assert predicted == pytest.approx(log, rel=0.03)


def test_on_one_gpu_it_gives_back_what_went_in():
    predicted = [sum(step_ms(rows, 16384, 1, RECORD, RECORD_VOLUMES).values()) for rows in (8, 16, 24)]
    assert predicted == pytest.approx((230.99, 429.85, 633.14), rel=0.005)  # record 88's log on one H100


@given(st.integers(1, 40), st.integers(1, 300), st.floats(0.01, 10), *[st.floats(0, 50)] * 2, st.floats(0, 1))
@settings(deadline=None)
def test_terms_are_not_negative_and_no_rank_works_less_than_its_rows(rows, n, us, shared, fixed, overlap):
    terms = step_ms(rows, 1024, n, Cost(us, shared, fixed), RECORD_VOLUMES, Links(), overlap)
    assert tuple(terms) == TERMS and all(v > -1e-9 for v in terms.values())
    assert terms["compute"] + terms["idle"] == pytest.approx(us * -(-rows // n) * 1.024)


def test_beyond_a_row_for_each_rank_more_gpus_compute_nothing_faster():
    busy = [sum(step_ms(8, 1024, n, Cost(1.0, 0.0, 0.0), []).values()) for n in (1, 2, 4, 8, 16, 1024)]
    assert busy == pytest.approx([8.192, 4.096, 2.048, 1.024, 1.024, 1.024])


def test_communication_by_hand():
    links = Links(link=100.0, network=5.0, node=8)
    assert communication_ms([Collective("all_gather", 1e9)], 1, links) == 0
    # 7/8 of 1 GB at 100 GB/s is 8.75 ms; 7 hops of 3.4 us and 8.4 us
    assert communication_ms([Collective("all_gather", 1e9)], 8, links) == pytest.approx(8.75 + 0.0322)
    assert communication_ms([Collective("all_reduce", 1e9)], 8, links) == pytest.approx(17.5 + 0.056)
    # two nodes: 15/16 at 8 * 5 GB/s; 14 hops inside, 1 between
    assert communication_ms([Collective("reduce_scatter", 1e9)], 16, links) == pytest.approx(23.4375 + 0.0656)


def test_overlap_hides_no_more_than_the_updates_take():
    def wire(overlap, shared):
        return step_ms(8, 1024, 8, Cost(1.0, shared, 0.0), RECORD_VOLUMES, Links(), overlap)["communication"]
    assert wire(0.5, 1e3) == pytest.approx(wire(0.0, 0.0) / 2)
    assert wire(1.0, 8.0) == pytest.approx(wire(0.0, 0.0) - 1.0)


def test_volumes_are_those_of_the_optimizer(monkeypatch):
    """What Optimizer.step() hands to torch.distributed on 3 ranks, counted."""
    c = dataclasses.replace(tg.Config(), n_layer=1, n_embd=16, n_head=2, value_embed_layers=(0,), mlp_ratio=2)
    model = tg.GPT(c, 70, torch.bfloat16)
    model.init_weights(0)
    seen = []

    class Done:
        def wait(self):
            pass

    def record(kind, whole):
        def call(*tensors, **_):
            seen.append((kind, tensors[whole].nbytes))
            return Done()
        return call
    monkeypatch.setattr(tg, "reduce_scatter", record("reduce_scatter", 1))
    monkeypatch.setattr(tg, "all_gather", record("all_gather", 0))
    monkeypatch.setattr(tg.dist, "all_reduce", record("all_reduce", 0))
    optimizer = tg.Optimizer(model, tg.parameter_table(c), rank=1, world_size=3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step(0.0, 0.9)
    expected = cluster.collectives_of(c, cluster.model_of(c, 70), 3)
    assert sorted(seen) + [("all_reduce", 4)] == sorted(map(tuple, expected[:-1])) + [tuple(expected[-1])]


def test_the_tracks_table(capsys, tmp_path):
    out, table = tmp_path / "out.json", tmp_path / "table.md"
    assert main(["cluster", "--gpus", "8", "--nodes", "2", "--dollars-per-gpu-hour", "3", "--json", str(out),
                 "--table", str(table)]) == 0
    result = json.loads(out.read_text())
    p = result["predicted"]
    assert p["gpus"] == 16 and p["nodes"] == 2 and result["cost"]["source"].startswith("the public record")
    assert [t["gpus"] for t in result["table"]] == [2**i for i in range(11)]
    assert sum(s["steps"] for s in p["stages"]) == result["steps"] == GPT2_SMALL.steps
    assert p["seconds"] == pytest.approx(sum(s["steps"] * s["ms"] for s in p["stages"]) / 1e3)
    assert p["dollars"] == pytest.approx(p["seconds"] * 16 * 3 / 3600)
    assert p["seconds_by_term"][p["dominates"]] == max(p["seconds_by_term"].values())
    for text in (table.read_text(), capsys.readouterr().err):
        assert "| 1,024 | 128 |" in text and "the public record on one H100" in text


def measured(tmp_path, **fields):
    model = cluster.model_of(GPT2_SMALL, 50257)
    result = dict(world_size=1, params=sum(p.numel() for p in model.parameters()), device="a GPU", stages=[1, 2],
                  fit=dict(fixed_ms=10.0, us_per_token=2.0, optimizer_ms=6.0)) | fields
    path = tmp_path / "trainer.json"
    path.write_text(json.dumps(result))
    return path


def test_cost_from_the_trainers_benchmark(tmp_path):
    path = measured(tmp_path)
    assert cluster.run(results=path)["cost"] | dict(source=None) == dict(
        us_per_token=2.0, shared_ms=6.0, fixed_ms=4.0, source=None)
    path.write_text(json.dumps(dict(results=dict(trainer=json.loads(path.read_text())))))  # `all` holds it
    assert cluster.run(results=path, fixed_ms=1.0)["cost"]["fixed_ms"] == 1.0
    noisy = measured(tmp_path, params=7, fit=dict(fixed_ms=-1.0, us_per_token=2.0, optimizer_ms=6.0))
    assert cluster.cost_from(noisy, 7)[:3] == (2.0, 0.0, 0.0)


@pytest.mark.parametrize("fields, says", [(dict(world_size=2), "one rank"), (dict(fit=None), "two or more sizes"),
                                          (dict(params=7), "measured with 7 parameters")])
def test_measurements_of_something_else_are_refused(tmp_path, fields, says):
    with pytest.raises(InputError, match=says):
        cluster.run(results=measured(tmp_path, **fields))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fit": 1}', "null"])
def test_files_that_are_no_result_are_refused(tmp_path, text, capsys):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert main(["cluster", "--from", str(path)]) == 2
    assert capsys.readouterr().err == f"error: --from {path}: expected the JSON of `python -m benchmarks trainer`\n"
    with pytest.raises(InputError, match="No such file"):
        cluster.run(results=tmp_path / "missing.json")


def test_no_numbers_are_made_up():
    with pytest.raises(InputError, match="no measurement of laptop"):
        cluster.run(trainer_options=["--track", "laptop"])
    assert cluster.run(us_per_token=3.0, trainer_options=["--track", "laptop"])["cost"]["source"] == "given"


@pytest.mark.parametrize("option", [["--gpus", "0"], ["--nodes", "x"], ["--overlap", "1.1"], ["--link", "-1"],
                                    ["--us-per-token", "nan"], ["--fixed-ms", "inf"]])
def test_numbers_that_are_none_are_refused(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["cluster", *option])
    assert "expected" in capsys.readouterr().err
