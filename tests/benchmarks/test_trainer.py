"""benchmarks/trainer.py and breakdown.py: division of time, traces of a GPU, real runs on one
and two processes."""

import json
import math
import random
import time

import numpy as np
import pytest
from helpers import options, tiny, write_text
from hypothesis import given
from hypothesis import strategies as st

from base import InputError
from benchmarks import subject, trainer
from benchmarks.__main__ import main
from benchmarks.breakdown import MARK, PARTS, backward_spans, covered, divide, trace_parts
from benchmarks.synthetic import synthetic, vocabulary
from data import DataConfig, TrainLoader, read_shard
from models.gpt import Model
from optim import Optimizer
from optim.shards import Shard
from runtime.guard import Guard

SPAN = st.tuples(st.integers(-5, 60), st.integers(0, 30)).map(lambda s: (s[0], s[0] + s[1]))


# --- dividing time


@given(st.lists(SPAN, max_size=12), st.integers(0, 20), st.integers(20, 50))
def test_covered_is_the_number_of_instants_in_any(intervals, start, end):
    assert covered(intervals, start, end) == sum(
        any(a <= t < b for a, b in intervals) for t in range(start, end)
    )


@given(st.dictionaries(st.sampled_from(PARTS), st.lists(SPAN, max_size=5)), st.integers(20, 50))
def test_every_instant_goes_to_the_first_that_has_it(layers, end):
    lengths, rest = divide(layers, 0, end)
    first = [
        next((p for p, spans in layers.items() if any(a <= t < b for a, b in spans)), None)
        for t in range(end)
    ]
    assert lengths == {p: first.count(p) for p in layers} and rest == first.count(None)


# --- a GPU's trace


def host(name, start, end, category="user_annotation"):
    return dict(ph="X", cat=category, name=name, ts=start, dur=end - start, tid=1)


def kernel(name, launched, start, end, category="kernel", launcher="cuda_runtime", tid=1):
    id = random.getrandbits(40)
    return [
        dict(
            ph="X",
            cat=launcher,
            name="launch",
            ts=launched,
            dur=1,
            tid=tid,
            args=dict(correlation=id),
        ),
        dict(
            ph="X",
            cat=category,
            name=name,
            ts=start,
            dur=end - start,
            tid=7,
            args=dict(correlation=id),
        ),
    ]


def one_step():
    """A step from 0 to 200: what runs on the GPU lags behind what launches it."""
    return [
        host(MARK + "profiled", 0, 200),
        host(MARK + "data", 0, 20),
        host(MARK + "forward", 20, 30),
        host(MARK + "guard", 45, 46),
        host(MARK + "optimizer", 50, 60),
        host("Torch-Compiled Region", 0, 200),
        host(MARK + "forward", 0, 200, "gpu_user_annotation"),
        *kernel("Memcpy HtoD", 15, 18, 26, "gpu_memcpy"),
        *kernel("gemm", 21, 30, 60),
        *kernel("triton", 22, 60, 70, launcher="cuda_driver"),
        *kernel("gemm", 35, 75, 110, tid=99),  # backward's own thread launches it
        *kernel("norm", 45, 108, 118),
        *kernel("ncclDevKernel_AllReduce", 45, 118, 120),
        *kernel("ncclDevKernel_ReduceScatter", 47, 105, 130),
        *kernel("fill", 48, 130, 135),
        *kernel("adam", 52, 130, 160),
        *kernel("ncclDevKernel_AllGather", 53, 150, 180),
        dict(ph="M", name="process_name"),
        dict(ph="f", cat="ac2g", name="ac2g", ts=3),
    ]


def test_a_gpus_time_goes_to_what_launched_its_kernels():
    parts = trace_parts(one_step(), cuda=True)
    assert parts == dict(
        forward=40,
        backward=35,
        guard=8,
        optimizer=30,
        communication=32,  # 118-130 and 160-180: elsewhere a kernel of ours runs as well
        data=26,  # 0-18 waiting for the batch, 18-26 its copy
        gaps=29,  # 26-30, 70-75, 180-200
        other=0,
    )  # 130-135 is the optimizer's already
    assert sum(parts.values()) == 200 and tuple(parts) == PARTS


def test_kernels_from_elsewhere_are_other_and_nothing_counts_outside():
    events = one_step() + kernel("early", -60, -50, -10) + kernel("late", 62, 190, 250)
    parts = trace_parts(events, cuda=True)
    assert parts["other"] == 10 and parts["gaps"] == 19 and sum(parts.values()) == 200
    events += [dict(ph="X", cat="kernel", name="unlaunched", ts=182, dur=3, args={})]
    assert trace_parts(events, cuda=True)["other"] == 13


def test_on_a_cpu_the_host_is_the_device():
    events = [
        host(MARK + "profiled", 0, 100),
        host(MARK + "data", 0, 10),
        host(MARK + "forward", 10, 40),
        host(MARK + "guard", 70, 74),
        host(MARK + "optimizer", 75, 95),
        host("aten::mm", 12, 30, "cpu_op"),
    ]
    assert trace_parts(events, cuda=False) == dict(
        forward=30, backward=30, guard=4, optimizer=20, communication=0, data=10, gaps=0, other=6
    )


def test_backward_is_between_a_forward_pass_and_what_comes_next():
    forward = [(0, 10), (30, 40), (100, 110)]
    guard = [(70, 75), (150, 160)]
    assert backward_spans(forward, guard) == [(10, 30), (40, 70), (110, 150)]
    assert backward_spans(forward, []) == [(10, 30), (40, 100)]  # cut at the end of the trace


# --- fit and data


def test_fit_finds_the_line():
    stages = [
        dict(tokens_per_rank=n, ms=7 + 0.0015 * n, parts=dict(optimizer=o))
        for n, o in ((16384, 2.0), (32768, 3.0), (49152, 4.0))
    ]
    assert trainer.fit(stages) == pytest.approx(
        dict(fixed_ms=7.0, us_per_token=1.5, optimizer_ms=3.0)
    )
    assert trainer.fit(stages[:1]) is None and trainer.fit([stages[0], stages[0]]) is None


def test_synthetic_tokens(tmp_path):
    config = DataConfig(data="fineweb10B")
    dataset = synthetic(config, tmp_path, n_tokens=500_000)
    tokens = read_shard(dataset.train[0], dataset.n_vocab)
    assert (dataset.n_vocab, dataset.eot, len(tokens), tokens[0]) == (50257, 50256, 500_000, 50256)
    lengths = np.diff(np.flatnonzero(tokens == dataset.eot))
    assert 600 < lengths.mean() < 780 and 350 < np.median(lengths) < 450
    counts = np.sort(np.bincount(tokens[tokens != dataset.eot]))[::-1] / len(tokens)
    assert counts[0] < 0.1 and counts[:1000].sum() > 0.4
    before = dataset.train[0].stat().st_mtime_ns
    again = synthetic(config, tmp_path, n_tokens=500_000)
    assert again.train[0].stat().st_mtime_ns == before
    assert vocabulary("stdlib", "bpe:4096") == 4096 and vocabulary("text", "bytes") == 257
    with pytest.raises(InputError, match="val_loss"):
        _ = dataset.tokenizer


# --- real steps


@pytest.fixture
def tiny_options(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "TORCHINDUCTOR_CACHE_DIR", str(tmp_path)
    )  # run() sets it; back to what it was
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")
    monkeypatch.setattr(subject, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(trainer, "WARM", 1)
    monkeypatch.setattr(trainer, "PROFILED", 1)
    return options(
        tiny(write_text(tmp_path / "text.txt"), tmp_path, batch_tokens=(256, 512), sample_tokens=0)
    )


def test_a_schedules_stages(tiny_options, capsys):
    saved = []
    c = subject.parse(tiny_options)
    stages = subject.schedule(c)
    model = Model(c.config.model, 257, 64)
    result = trainer.run(
        steps=2, trainer_options=tiny_options, save=lambda r: saved.append(len(r["stages"]))
    )
    assert saved == [1, 2] and [s["tokens"] for s in result["stages"]] == [256, 512]
    for s in result["stages"]:
        assert s["p20"] <= s["ms"] <= s["p80"] and s["tokens_per_s"] == pytest.approx(
            1e3 * s["tokens"] / s["ms"]
        )
        assert tuple(s["parts"]) == PARTS and sum(s["parts"].values()) == pytest.approx(
            s["profiled_ms"]
        )
        assert (
            min(
                s["parts"][p]
                for p in ("forward", "backward", "guard", "optimizer", "data", "other")
            )
            > 0
        )
        assert s["parts"]["communication"] == s["parts"]["gaps"] == 0 and s["passes"] == 1
        stage = next(x for x in stages if x.rows * 32 == s["tokens"])
        done = s["tokens_per_s"] * model.flops_per_token(stage.model)
        assert s["peak_share"] == pytest.approx(done / result["peak_flops"])
        assert 0 < s["peak_share"] < 1 and s["peak_memory_bytes"] > 1e8
    assert result["fit"]["us_per_token"] is not None and json.loads(json.dumps(result)) == result
    text = trainer.render(result)
    assert "| 512 | 8, 32 | 32 | 1 | 1 |" in text and text in capsys.readouterr().err


def test_every_kind_of_stage_is_entered_and_run(tiny_options, monkeypatch):
    """Targets, windows and the tied head change at different steps, Adam updates at every third
    step: each stage runs its own weights, graph and rotary tables, in whole groups of steps."""
    seen, events, data = [], [], []

    def spy(owner, name, note):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            note(*args, *kwargs.values())
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    spy(
        Model,
        "forward",
        lambda model, x, y, cu, stage, weights=None: seen.append(
            (
                stage.tied,
                stage.n_targets,
                weights is not None and weights.tolist(),
                max(stage.windows),
                x.numel(),
            )
        ),
    )
    spy(Model, "enter", lambda model, progress: events.append(progress))
    spy(Optimizer, "copy", lambda optimizer, successors: events.append(successors))
    after = []
    spy(Model, "after_step", lambda model: after.append(len(data)))
    spy(
        Optimizer,
        "step",
        lambda optimizer, lr, momentum, ok: data.append((optimizer.step_count, ok.item())),
    )
    result = trainer.run(
        steps=4,
        trainer_options=[
            *tiny_options,
            "--mtp",
            "2",
            "1",
            "--tied",
            "0.25",
            "--yarn",
            "--long-window",
            "16",
            "32",
            "--adam-every",
            "3",
            "--batch-tokens",
            "256",
            "512",
        ],
    )
    # 4 steps are 2 groups of 3; with one group to warm up, one before and one in the profile
    n = 3 * (1 + 2 + 1 + 1)
    assert (
        seen
        == [(True, 2, [1.0, 0.5], 16, 256)] * n
        + [(False, 2, [1.0, 0.25], 16, 256)] * n
        + [(False, 1, False, 32, 512)] * n
    )
    assert events[-5:] == [0.0, 5 / 20, dict(embed="lm_head"), 10 / 20, {}]
    assert data == [(step, True) for step in range(3 * n)]
    assert after == list(range(1, 3 * n + 1))
    assert [(s["n_targets"], s["tied"], s["steps"], s["tokens"]) for s in result["stages"]] == [
        (2, True, 6, 256),
        (2, False, 6, 256),
        (1, False, 6, 512),
    ]
    assert "| 256 | 8, 16 | 32 | 1 | 2, tied |" in trainer.render(result)


def test_given_tokens_are_run_as_at_the_end_of_the_track(tiny_options, monkeypatch):
    given, last = (
        [
            *tiny_options,
            "--mtp",
            "2",
            "1",
            "--tied",
            "0.5",
            "--long-window",
            "8",
            "16",
            "32",
            "--max-doc-len",
            "16",
            "32",
            "--short-window",
            "4",
            "8",
            "--stage-lr",
            "1",
            "2",
            "--batch-tokens",
            "256",
            "512",
        ],
        [],
    )
    monkeypatch.setattr(
        trainer,
        "measure",
        lambda t, b, stage, *args, measure=trainer.measure: (
            last.append(stage) or measure(t, b, stage, *args)
        ),
    )
    result = trainer.run(steps=1, tokens=[64, 128, 64], trainer_options=given)
    assert [s["tokens"] for s in result["stages"]] == [64, 128] and result["fit"]
    end = subject.schedule(subject.parse(given))[-1]
    assert last == [end._replace(rows=2), end._replace(rows=4)]
    trainer.run(steps=1, tokens=[64], trainer_options=[*given, "--tied", "1"])
    assert last[2] == end._replace(rows=2, model=end.model._replace(tied=True))


def test_a_step_is_the_mean_of_those_with_and_without_adam(tiny_options, monkeypatch):
    step = Optimizer.step

    def slow_every_second(optimizer, *args):
        time.sleep(0.2 * (optimizer.step_count % 2))
        step(optimizer, *args)

    monkeypatch.setattr(Optimizer, "step", slow_every_second)
    (stage,) = trainer.run(
        steps=3, tokens=[64], trainer_options=[*tiny_options, "--adam-every", "2"]
    )["stages"]
    assert (
        100 < stage["p20"] <= stage["p80"] < 180
        and 100 < stage["parts"]["optimizer"] < 180
        and stage["steps"] == 4
    )


def test_a_loss_that_is_not_finite_ends_it(tiny_options, monkeypatch):
    forward = Model.forward
    monkeypatch.setattr(
        Model, "forward", lambda *args, **kwargs: forward(*args, **kwargs) * math.inf
    )
    with pytest.raises(InputError, match="the training loss is inf.*lower --muon-lr"):
        trainer.run(steps=1, tokens=[64], trainer_options=tiny_options)


def test_time_is_booked_where_it_is_spent(tiny_options, monkeypatch):
    """Sleep in each part; what is slow then is that part."""

    def slower(owner, name, ms):
        function = getattr(owner, name)

        def call(*args, **kwargs):
            time.sleep(ms / 1e3)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    slower(Model, "hidden", 100)
    slower(Shard, "reduce", 20)  # for each of 7 parameters
    slower(Guard, "send", 60)
    slower(TrainLoader, "rows", 600)  # of which the loader's thread hides what the rest takes
    parts = trainer.run(steps=1, tokens=[64], trainer_options=tiny_options)["stages"][0]["parts"]
    assert 100 < parts["forward"] < 290 and parts["optimizer"] > 140 and parts["data"] > 30
    assert 60 < parts["guard"] < 120
    assert sum(parts[p] for p in ("forward", "guard", "optimizer", "data")) > 0.7 * sum(
        parts.values()
    )


@pytest.mark.slow
def test_of_two_processes_one_reports(nursery, tiny_options, tmp_path):
    out = tmp_path / "out.json"
    argv = ["trainer", *tiny_options, "--steps", "2", "--tokens", "64", "128", "--json", str(out)]
    program = f"import sys\nfrom benchmarks.__main__ import main\nsys.exit(main({argv!r}))"
    done = nursery.run([], tmp_path / "output", ranks=2, program=program)
    assert done.statuses == [0, 0], done.err
    result = json.loads(out.read_text())
    assert result["world_size"] == 2 and [s["tokens"] for s in result["stages"]] == [128, 256]
    assert done.err.count("Where the time goes") == done.err.count("preparing the data") == 1
    assert math.isfinite(result["fit"]["fixed_ms"])


@pytest.mark.parametrize(
    "given, says",
    [
        (["--tokens", "100"], "--tokens 100: expected a multiple of row_len (32)"),
        (["--steps", "0"], "--steps 0: expected 1 or more"),
        (["--n-layr", "2"], "unknown option --n-layr: did you mean --n-layer?"),
    ],
)
def test_bad_input_is_one_line(given, says, tiny_options, capsys):
    assert main(["trainer", *tiny_options, *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {says}") and error.count("\n") == 1
