"""benchmarks/cluster.py: sums, volumes, the public record's stages, measured costs, limits of
scaling, bad input."""

import json
import types

import pytest
import torch
import torch.distributed as dist
from helpers import model_fields
from hypothesis import given, settings
from hypothesis import strategies as st

from base import InputError
from benchmarks import cluster, subject
from benchmarks.__main__ import main
from benchmarks.cluster import RECORD, TERMS, Cost, step_ms
from models import gpt, outline
from optim import Optimizer, gradient_report, shards
from runtime.collectives import Collective, Links, communication_ms
from runtime.guard import Guard
from runtime.machine import World

GPT2_SMALL = subject.parse(["--track", "gpt2-small"])

# modded-nanogpt: bytes of an Adam step (every second one), then of a Muon step (every one)
RECORD_VOLUMES = [
    *[
        Collective(kind, size, "all", 2)
        for kind, size in (
            ("reduce_scatter", 386e6),
            ("all_gather", 386e6),
            ("all_gather", 580e6),
            *[("all_gather", 77e6)] * 2,
        )
    ],
    Collective("reduce_scatter", 167e6),
    Collective("all_gather", 167e6),
]


@pytest.mark.parametrize(
    "log", [(31.54, 56.57, 82.38), (32.45, 58.06, 83.97), (31.59, 56.90, 82.74)]
)
def test_from_one_gpu_it_predicts_the_records_stages_on_eight(log):
    """ms per step in the logs of records 88, 85 and 89; one-GPU cost from record 88's."""
    predicted = [
        sum(step_ms(rows, 16384, 8, RECORD, RECORD_VOLUMES).values()) for rows in (8, 16, 24)
    ]
    assert predicted == pytest.approx(log, rel=0.03)


def test_on_one_gpu_it_gives_back_what_went_in():
    predicted = [
        sum(step_ms(rows, 16384, 1, RECORD, RECORD_VOLUMES).values()) for rows in (8, 16, 24)
    ]
    assert predicted == pytest.approx(
        (230.99, 429.85, 633.14), rel=0.005
    )  # record 88's log on one H100


@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.floats(0.01, 10),
    *[st.floats(0, 50)] * 2,
)
@settings(deadline=None)
def test_terms_are_not_negative_and_no_rank_works_less_than_its_rows(rows, n, us, shared, fixed):
    terms = step_ms(rows, 1024, n, Cost(us, shared, fixed), RECORD_VOLUMES, Links())
    assert tuple(terms) == TERMS and all(v > -1e-9 for v in terms.values())
    assert terms["compute"] + terms["idle"] == pytest.approx(us * -(-rows // n) * 1.024)


def test_beyond_a_row_for_each_rank_more_gpus_compute_nothing_faster():
    busy = [
        sum(step_ms(8, 1024, n, Cost(1.0, 0.0, 0.0), []).values()) for n in (1, 2, 4, 8, 16, 1024)
    ]
    assert busy == pytest.approx([8.192, 4.096, 2.048, 1.024, 1.024, 1.024])


def test_communication_by_hand():
    links = Links(link=100.0, network=5.0, node=8)
    assert communication_ms([Collective("all_gather", 1e9)], 1, links) == 0
    # 7/8 of 1 GB at 100 GB/s is 8.75 ms; 7 hops of 3.4 us and 8.4 us
    assert communication_ms([Collective("all_gather", 1e9)], 8, links) == pytest.approx(
        8.75 + 0.0322
    )
    assert communication_ms([Collective("all_reduce", 1e9)], 8, links) == pytest.approx(
        17.5 + 0.056
    )
    # two nodes: 15/16 at 8 * 5 GB/s; 14 hops inside, 1 between
    assert communication_ms([Collective("reduce_scatter", 1e9)], 16, links) == pytest.approx(
        23.4375 + 0.0656
    )
    # inside each of them as on one; from each rank to its like twice 1/2 of a part, by a card of
    # its own
    assert communication_ms(
        [Collective("reduce_scatter", 1e9, "node")], 16, links
    ) == pytest.approx(8.75 + 0.0322)
    assert communication_ms(
        [Collective("all_reduce", 1e9 / 8, "across")], 16, links
    ) == pytest.approx(25 + 0.0276)
    assert communication_ms(
        [Collective("all_reduce", 1e9 / 8, "across", 4)], 16, links
    ) == pytest.approx(25.0276 / 4)
    assert communication_ms([Collective("all_reduce", 1e9 / 8, "across")], 8, links) == 0
    assert (
        cluster.sent_bytes([Collective("all_reduce", 8e6, "across", 4)], 16, 8)
        == 2 * 1 / 2 * 8e6 / 4
    )
    # one rank a node: everything crosses, over one card; where nodes are not full, one ring over
    # all ranks
    assert communication_ms(
        [Collective("all_reduce", 1e9)], 4, links._replace(node=1)
    ) == pytest.approx(300 + 0.066)
    assert communication_ms([Collective("all_gather", 1e9, "node")], 12, links) == pytest.approx(
        11 / 12 * 1000 / 30 + 0.052
    )
    assert step_ms(8, 1024, 16, Cost(1.0, 24.0, 0.0), [], links)["shared"] == 3.0
    assert step_ms(8, 1024, 12, Cost(1.0, 24.0, 0.0), [], links)["shared"] == 2.0


@pytest.fixture
def exchanged(monkeypatch):
    """What is handed to torch.distributed, [(kind, bytes, group), ...], with a group for a node
    and one across them."""
    seen = []

    def record(kind, whole):
        def call(*tensors, group=None, async_op=False):
            seen.append((kind, tensors[whole].nbytes, group or "all"))
            return types.SimpleNamespace(wait=lambda: None)

        return call

    monkeypatch.setattr(shards, "reduce_scatter", record("reduce_scatter", 1))
    monkeypatch.setattr(shards, "all_gather", record("all_gather", 0))
    monkeypatch.setattr(dist, "all_reduce", record("all_reduce", 0))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    return seen


@pytest.mark.parametrize("n, node", [(3, 8), (6, 2), (15, 3), (3, 1), (5, 3)])
@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(tied=1.0, adam_every=3, skip=(0, 1), attn_gate=True),
        dict(smear=True, n_gram=2, adam_every=2),
        dict(backout=0, value_embed_layers=()),
    ],
)
def test_volumes_are_those_of_the_trainer(n, node, fields, exchanged):
    """All that a rank exchanges in as many steps as there are between Adam's updates, counted."""
    fields = model_fields(value_embed_layers=(0,), n_gram=1) | fields
    c = subject.configure(
        row_len=24, val_row_len=24, batch_tokens=(24,), max_doc_len=(24,), **fields
    )
    model = gpt.Model(c.config.model, 70, 24, torch.bfloat16)
    model.init_weights(0)
    local, groups = (
        (node, ("node", "across")) if n % node == 0 else (n, (None, None))
    )  # as join_world() has it
    world = World(n - 1, n, torch.device("cpu"), local, *groups)
    optimizer = Optimizer(model, model.update_rules(c.config.optim), world)
    guard = Guard(world.device, gradient_report)
    stage = subject.schedule(c)[0].model
    x, cu = torch.randint(70, (1, c.row_len)), torch.tensor([0, c.row_len], dtype=torch.int32)
    for step in range(c.adam_every):
        model(x, x, cu, stage).backward()
        guard.judge(
            step, torch.zeros(()), {name: p.grad for name, p in model.named_parameters()}, (0, 0, 0)
        )
        optimizer.step(0.0, 0.9)  # whatever it judges: nothing is summed here
    expected = cluster.collectives_of(c, subject.parameters(c, 70), n, node, stage.tied)
    for x in expected:
        count = c.adam_every // x.every
        group = x.group if n % node == 0 or x.group != "node" else "all"
        assert exchanged.count((x.kind, x.bytes, group)) >= count, x
        for _ in range(count):
            exchanged.remove((x.kind, x.bytes, group))
    assert exchanged == []


def test_several_nodes_send_the_same_inside_and_a_part_between():
    """Per rank: what one node would send, and twice (N - 1) / N of its eighth to its like on the
    others."""
    model, one = subject.parameters(GPT2_SMALL, 50257), {}
    for n in (8, 16, 64):
        volumes = cluster.collectives_of(GPT2_SMALL, model, n, 8)
        one[n] = {
            group: cluster.sent_bytes([v for v in volumes if v.group == group], n, 8)
            for group in ("node", "across", "all")
        }
    assert one[8]["node"] == one[16]["node"] == one[64]["node"] and one[8]["across"] == 0
    # gradients in, weights out: each 7/8 of it; an eighth of the gradients across
    whole = one[8]["node"] / 2 * 8 / 7
    assert one[16]["across"] == pytest.approx(2 * 1 / 2 * whole / 8)
    assert one[64]["across"] == pytest.approx(2 * 7 / 8 * whole / 8)
    assert one[64]["all"] < 1e6  # small parameters, the largest are those of MUDD


def test_stages_with_a_tied_head_exchange_less():
    # A batch of one size touches as many rows
    c = subject.change(GPT2_SMALL, tied=0.5, adam_every=1, batch_tokens=(131_072,))
    line = cluster.predict(c, subject.parameters(c, 50257), 8, RECORD, Links())
    tied, untied = line["stages"][0], line["stages"][-1]
    assert untied["bytes"] - tied["bytes"] == pytest.approx(2 * 7 / 8 * 50304 * 768 * 2)
    assert tied["terms"]["communication"] < untied["terms"]["communication"]
    assert line["bytes"] == pytest.approx((tied["bytes"] + untied["bytes"]) / 2, rel=1e-3)


def test_tables_exchange_the_rows_that_a_text_touches():
    """Fewer bytes in as many collectives, where parts are whole rows and rows are few."""
    parameters = subject.parameters(GPT2_SMALL, 50257)
    whole = {p.name: p.bytes for p in parameters}
    tables = {"ngram_embeds", "value_embeds"}

    def touched(rows, n):
        return cluster.touched_bytes(GPT2_SMALL, parameters, rows, n, 8)

    for rows, share in (8, 0.11), (24, 0.25):
        found = touched(rows, 8)
        assert found.keys() == tables
        assert all(0.03 < found[name] / whole[name] < share for name in tables)
        dense = cluster.collectives_of(GPT2_SMALL, parameters, 8, 8)
        sparse = cluster.collectives_of(GPT2_SMALL, parameters, 8, 8, touched=found)
        changed = [(a, b) for a, b in zip(dense, sparse, strict=True) if a != b]
        assert [(a.kind, a.bytes) for a, _ in changed] == [
            ("reduce_scatter", whole[p.name]) for p in parameters if p.name in tables
        ]
        assert {(b.kind, b.group, b.every) for _, b in changed} == {("all_to_all", "node", 2)}
    assert touched(24, 1) == {}
    assert touched(24, 7) == {}  # parts of a seventh are no whole rows
    assert touched(24, 2).keys() < tables  # value embeddings are touched too much


def test_the_tracks_table(capsys, tmp_path):
    out, table = tmp_path / "out.json", tmp_path / "table.md"
    assert (
        main(
            [
                "cluster",
                "--gpus",
                "8",
                "--nodes",
                "2",
                "--dollars-per-gpu-hour",
                "3",
                "--json",
                str(out),
                "--table",
                str(table),
            ]
        )
        == 0
    )
    result = json.loads(out.read_text())
    p = result["predicted"]
    assert (
        p["gpus"] == 16
        and p["nodes"] == 2
        and result["cost"]["source"].startswith("the public record")
    )
    assert [t["gpus"] for t in result["table"]] == [2**i for i in range(11)]
    assert sum(s["steps"] for s in p["stages"]) == result["steps"] == GPT2_SMALL.steps
    assert p["seconds"] == pytest.approx(sum(s["steps"] * s["ms"] for s in p["stages"]) / 1e3)
    assert p["dollars"] == pytest.approx(p["seconds"] * 16 * 3 / 3600)
    assert p["seconds_by_term"][p["dominates"]] == max(p["seconds_by_term"].values())
    names = [part["name"] for part in result["parts"]]
    assert names[0] == "mlp_bank" and "attention" in names
    assert "Part by part, ms of a step on average, predicted:" in table.read_text()
    for text in (table.read_text(), capsys.readouterr().err):
        assert "| 1,024 | 128 |" in text and "the public record on one H100" in text


@pytest.mark.parametrize("n", [1, 8, 16])
def test_parts_sum_to_the_step(n):
    c = subject.change(GPT2_SMALL, steps=90, extension=1)
    parameters = subject.parameters(c, 50257)
    model = outline(c.config, 50257)
    line = cluster.predict(c, parameters, n, RECORD, Links())
    parts = cluster.parts_of(c, parameters, model, n, RECORD, Links())
    for term in "compute", "shared":
        of_steps = sum(s["steps"] * s["terms"][term] for s in line["stages"]) / c.steps
        assert sum(part[term] for part in parts) == pytest.approx(of_steps)
    exchanged = sum(s["steps"] * s["terms"]["communication"] for s in line["stages"]) / c.steps
    found = sum(part["communication"] for part in parts)
    assert 0 <= exchanged - found < 0.2  # the guard's report
    by_name = {part["name"]: part for part in parts}
    tokens = sum(s.rows for s in subject.schedule(c)) * c.row_len / c.steps / n
    mlp = by_name["mlp_bank"]
    assert mlp["gflops"] == pytest.approx(6 * mlp["params"] * tokens / 1e9)
    total = sum(s.rows * c.row_len * model.flops_per_token(s.model) for s in subject.schedule(c))
    assert sum(part["gflops"] for part in parts) == pytest.approx(
        total / c.steps / n / 1e9, rel=0.01
    )
    assert by_name["attention"]["gflops"] > 0
    tables = by_name["ngram_embeds"]
    assert tables["compute"] == 0 < tables["shared"]
    assert (tables["communication"] > 0) == (n > 1)
    # The embedding is the head for two thirds of the steps
    assert by_name["embed"]["shared"] == pytest.approx(by_name["lm_head"]["shared"] / 3, rel=0.05)


def measured(tmp_path, **fields):
    model = subject.parameters(GPT2_SMALL, 50257)
    result = (
        dict(
            world_size=1,
            params=sum(p.count for p in model),
            device="a GPU",
            stages=[1, 2],
            fit=dict(fixed_ms=10.0, us_per_token=2.0, optimizer_ms=6.0),
        )
        | fields
    )
    path = tmp_path / "trainer.json"
    path.write_text(json.dumps(result))
    return path


def test_cost_from_the_trainers_benchmark(tmp_path):
    path = measured(tmp_path)
    assert cluster.run(results=path)["cost"] | dict(source=None) == dict(
        us_per_token=2.0, shared_ms=6.0, fixed_ms=4.0, source=None
    )
    path.write_text(
        json.dumps(dict(results=dict(trainer=json.loads(path.read_text()))))
    )  # `all` holds it
    assert cluster.run(results=path)["cost"]["fixed_ms"] == 4.0
    noisy = measured(
        tmp_path, params=7, fit=dict(fixed_ms=-1.0, us_per_token=2.0, optimizer_ms=6.0)
    )
    assert cluster.cost_from(noisy, 7)[:3] == (2.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(world_size=2), "one rank"),
        (dict(fit=None), "two or more sizes"),
        (dict(params=7), "measured with 7 parameters"),
    ],
)
def test_measurements_of_something_else_are_refused(tmp_path, fields, says):
    with pytest.raises(InputError, match=says):
        cluster.run(results=measured(tmp_path, **fields))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"fit": 1}', "null"])
def test_files_that_are_no_result_are_refused(tmp_path, text, capsys):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert main(["cluster", "--from", str(path)]) == 2
    assert (
        capsys.readouterr().err
        == f"error: --from {path}: expected the JSON of ./run.sh benchmarks trainer\n"
    )
    with pytest.raises(InputError, match="No such file"):
        cluster.run(results=tmp_path / "missing.json")


def test_no_numbers_are_made_up():
    with pytest.raises(InputError, match="no measurement of laptop"):
        cluster.run(trainer_options=["--track", "laptop"])


@pytest.mark.parametrize(
    "option",
    [
        ["--gpus", "0"],
        ["--nodes", "x"],
        ["--link", "-1"],
        ["--network", "nan"],
        ["--dollars-per-gpu-hour", "inf"],
    ],
)
def test_numbers_that_are_none_are_refused(option, capsys):
    assert main(["cluster", *option]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {' '.join(option)}: expected ") and said.count("\n") == 1
