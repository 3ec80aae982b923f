"""benchmarks/: statistics, rotation, what goes wrong, tables, commands; every case of
benchmarks/cases.py once, tiny."""

import contextlib
import gc
import json
import math
import os
import types
import weakref

import pytest
import torch
from kernel_checks import DEVICE

import benchmarks.__main__ as command
from benchmarks import cases, kernels, measure, timing
from benchmarks.cases import (
    BACKWARD,
    BOTH,
    CASES,
    FORWARD,
    GPT2_SMALL,
    INFERENCE,
    Case,
    Draw,
    Size,
    Variant,
)
from benchmarks.measure import Machine

TINY = Size(
    tokens=32,
    width=64,
    hidden=128,
    vocab=320,
    heads=2,
    head_dim=32,
    layers=1,
    row_len=16,
    max_doc_len=12,
    windows=(4, 8),
)


def machine(**fields):
    defaults = dict(
        device=DEVICE, clock=timing.HostClock(), seconds=0.0, rates=dict(copy=1e9, bf16=1e12)
    )
    return Machine(**(defaults | fields))


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(cases, "compiled", lambda fn: fn)


@pytest.fixture(autouse=True, scope="module")
def quick_collections():
    """Measuring collects garbage for each variant; what was there before need not be looked at."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class FakeClock(timing.HostClock):
    """Time passes when told to; between(a, b) in the unit it was told in."""

    def __init__(self):
        self.now = 0.0

    def mark(self):
        return self.now

    def between(self, start, end):
        return end - start


class FakeSampler:
    def __init__(self, clock, name, cost, log, calls=10):
        self.clock, self.name, self.cost, self.log, self.calls = clock, name, cost, log, calls

    def run(self):
        self.log.append(self.name)
        self.clock.now += self.cost(len(self.log))


# --- timing


def test_summary_is_the_median_between_percentiles():
    assert timing.summary([5, 1, 2, 4, 3, 100]) == dict(
        median_us=3.5, p20_us=2, p80_us=5, samples=6
    )
    assert timing.summary([7.0]) == dict(median_us=7.0, p20_us=7.0, p80_us=7.0, samples=1)


def test_sets_of_inputs_are_three_times_the_cache():
    assert timing.sets_needed(75_000_000, 60_000_000) == 3
    assert timing.sets_needed(180_000_000, 60_000_000) == 1
    assert timing.sets_needed(179_999_999, 60_000_000) == 2
    assert timing.sets_needed(1, 60_000_000) == 16 and timing.sets_needed(0, 0) == 1


def test_samples_are_whole_walks_over_the_sets():
    assert timing.calls_needed(us_per_call=100, sets=1) == 30
    assert timing.calls_needed(us_per_call=100, sets=4) == 32
    assert timing.calls_needed(us_per_call=50_000, sets=3) == 3
    assert timing.calls_needed(us_per_call=0, sets=1) == 64


def test_results_are_held_until_their_set_is_next_in_turn():
    class Result:
        pass

    made, order = [], []

    def call(i):
        order.append(i)
        alive = [r() is not None for r in made]
        assert sum(alive) == min(len(made), 3) and all(alive[-3:])
        made.append(weakref.ref(result := Result()))
        return result

    timing.rotate(call, 3, 7)
    assert order == [0, 1, 2, 0, 1, 2, 0]


def test_variants_take_turns_and_another_one_is_first_each_time():
    clock, log = FakeClock(), []
    samplers = {
        n: FakeSampler(clock, n, lambda _, c=c: c, log) for n, c in dict(a=10, b=20, c=30).items()
    }
    samples, failed = timing.interleaved(samplers, clock, seconds=0, least=4)
    assert (
        samples == dict(a=[1] * 4, b=[2] * 4, c=[3] * 4) and not failed
    )  # per call; the first round does not count
    rounds = ["".join(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert rounds == ["cab", "abc", "bca", "cab", "abc"]


def test_a_drifting_clock_hits_all_alike():
    clock, log = FakeClock(), []
    samplers = {n: FakeSampler(clock, n, lambda at: 100 * 1.01**at, log) for n in "abc"}
    samples, _ = timing.interleaved(samplers, clock, seconds=0, least=30)
    medians = [timing.summary(s)["median_us"] for s in samples.values()]
    assert max(medians) / min(medians) < 1.02 and samples["a"][-1] / samples["a"][0] > 2


def test_rounds_fill_the_time_given():
    for cost, rounds in ((1000, 10), (1e6, 5), (1, 30)):  # microseconds a round
        clock = FakeClock()
        samples, _ = timing.interleaved(
            {"a": FakeSampler(clock, "a", lambda _: cost, [])}, clock, seconds=0.01
        )
        assert len(samples["a"]) == rounds


def test_a_variant_that_raises_leaves_the_others_alone():
    clock = FakeClock()

    def breaks(at):
        if at > 4:
            raise RuntimeError("no more")
        return 10

    samplers = dict(
        a=FakeSampler(clock, "a", breaks, []), b=FakeSampler(clock, "b", lambda _: 10, [])
    )
    samples, failed = timing.interleaved(samplers, clock, seconds=0)
    assert list(samples) == ["b"] and len(samples["b"]) == 5 and str(failed["a"]) == "no more"
    assert failed["a"].__traceback__ is None  # it would hold memory
    assert timing.interleaved({}, clock) == ({}, {})


def test_sampler_on_a_host_clock():
    calls = []
    s = timing.Sampler(calls.append, 3, timing.HostClock())
    assert s.method == "launches" and s.calls % 3 == 0 and calls == [0] * 4
    s.run()
    assert calls[4:] == [0, 1, 2] * (s.calls // 3)


def test_relative_error():
    x = torch.randn(1000)
    assert timing.relative_error(x, x) == 0
    assert timing.relative_error(1.01 * x, x, chunk=7) == pytest.approx(0.01, rel=1e-3)
    assert math.isnan(timing.relative_error(torch.where(x > 2, math.nan, x), x, chunk=7))
    assert timing.relative_error(torch.ones(2), torch.zeros(2)) == math.inf
    assert timing.relative_error(torch.zeros(2), torch.zeros(2)) == 0
    with pytest.raises(ValueError, match="shape"):
        timing.relative_error(x, x[:5])


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_graphs_on_a_gpu():
    with torch.cuda.stream(torch.cuda.Stream()):
        x, clock = torch.zeros(4, device=DEVICE), timing.CudaClock()
        s = timing.Sampler(lambda i: x[i].add_(1), 4, clock)
        assert not timing.synchronizes(lambda i: x + 1) and timing.synchronizes(
            lambda i: x.sum().item()
        )
        s.capture(torch.cuda.graph_pool_handle())
        x.zero_()
        samples, failed = timing.interleaved(dict(a=s), clock, seconds=0)
        assert s.method == "graph" and not failed and min(samples["a"]) > 0
        assert x.tolist() == [6 * s.calls / 4] * 4


# --- measuring


def toy(variants, **fields):
    """y = 2 x, where variants say otherwise."""
    return Case(
        **(
            dict(
                inputs=lambda draw: (draw(4, 8, dtype=torch.float32),),
                variants={"right": Variant(lambda *_: lambda x: 2 * x)} | variants,
                work=cases.three(64, 128),
                leaves=(0,),
            )
            | fields
        )
    )


def by(rows, *keys):
    return {tuple(r[k] for k in keys) if len(keys) > 1 else r[keys[0]]: r for r in rows}


def test_rows_of_a_case():
    clock = FakeClock()

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            clock.now += 10
            return 2 * x

        @staticmethod
        def backward(ctx, g):
            clock.now += 20
            return 2 * g

    def make(*_):
        return Double.apply

    case = toy(dict(right=Variant(make), other=Variant(make, rate="fp8")))
    rows = measure.measure("toy", lambda: case, 4, machine(clock=clock, rates=dict(copy=3.2e7)))
    assert [(r["variant"], r["direction"]) for r in rows] == [
        (v, d) for d in (FORWARD, BACKWARD, BOTH) for v in ("right", "other")
    ]
    r = by(rows, "variant", "direction")["other", FORWARD]
    assert (r["median_us"], r["work"], r["unit"], r["method"]) == (10, 64, "bytes", "launches")
    assert r["per_second"] == pytest.approx(6.4e6) and r["difference"] == 0
    assert r["shape"] == "(4, 8) float32"
    assert r["rate"] == "fp8" and r["share"] is None  # that rate was not measured
    assert by(rows, "variant", "direction")["right", FORWARD]["share"] == pytest.approx(0.2)
    r = by(rows, "variant", "direction")["other", BOTH]
    assert r["median_us"] == 30 and r["work"] == 192 and r["per_second"] == pytest.approx(6.4e6)
    json.dumps(rows)


def test_what_goes_wrong_is_one_line_and_not_timed():
    def raises(*_):
        raise RuntimeError("out of\n luck")

    def only_forward(x):
        return (2 * x).detach()

    def doubles_with_gradient(factor):
        return type(
            "Double",
            (torch.autograd.Function,),
            dict(
                forward=staticmethod(lambda ctx, x: 2 * x),
                backward=staticmethod(lambda ctx, g: factor * g),
            ),
        )

    def missing(*_):
        __import__("a_package_nobody_has")

    variants = dict(
        raises=Variant(raises),
        raises_later=Variant(lambda *_: raises),
        missing=Variant(missing),
        nan=Variant(lambda *_: lambda x: x * math.nan),
        off=Variant(lambda *_: lambda x: 2.1 * x),
        close=Variant(lambda *_: lambda x: 2.001 * x),
        gradient=Variant(lambda *_: doubles_with_gradient(3).apply),
        nan_gradient=Variant(lambda *_: doubles_with_gradient(math.nan).apply),
        detached=Variant(lambda *_: only_forward),
    )
    rows = measure.measure("toy", lambda: toy(variants), 4, machine())
    errors = {r["variant"]: r["error"] for r in rows if "error" in r}
    assert errors.keys() == {
        "raises",
        "raises_later",
        "missing",
        "nan",
        "off",
        "gradient",
        "nan_gradient",
        "detached",
    }
    assert errors["raises"] == errors["raises_later"] == "RuntimeError: out of luck"
    assert errors["missing"] == "ModuleNotFoundError: No module named 'a_package_nobody_has'"
    assert (
        "wrong: result 0 is nan off" in errors["nan"]
        and "0.05 off the reference, 0.02 allowed" in errors["off"]
    )
    assert (
        "wrong: result 1 is 0.5 off" in errors["gradient"]
        and "result 1 is nan off" in errors["nan_gradient"]
    )
    assert {r["variant"] for r in rows if "median_us" in r} == {"right", "close"}
    assert all("\n" not in e and len(e) <= 240 for e in errors.values())


def test_without_a_reference_the_others_are_timed_uncompared():
    def raises(*_):
        raise torch.OutOfMemoryError("too much")

    case = toy({})
    case.variants = {"right": Variant(raises), "other": Variant(lambda *_: lambda x: 2 * x)}
    rows = measure.measure("toy", lambda: case, 4, machine())
    assert rows[0]["error"] == "OutOfMemoryError: too much"
    assert [r["difference"] for r in rows[1:]] == [None] * 3


def test_upstream_gradients_are_random_and_1_for_losses():
    draw = Draw(DEVICE)
    dy, again = (
        draw.like(torch.empty(1000, device=DEVICE)),
        draw.like(torch.empty(1000, device=DEVICE)),
    )
    assert not torch.equal(dy, again) and dy.std() > 0.9
    assert draw.like(torch.zeros((), device=DEVICE)) == 1


def test_inputs_beyond_the_cache_come_in_several_sets():
    seen = []

    def make(*_):
        return lambda x: seen.append(x.data_ptr()) or 2 * x

    case = toy(dict(other=Variant(make)))
    measure.measure("toy", lambda: case, 4, machine(cache_bytes=128))  # 128 bytes an input
    assert len(set(seen)) == 3


def test_what_waits_for_the_host_is_launched_and_the_rest_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(timing, "synchronizes", lambda call: call(0).grad_fn is None)
    monkeypatch.setattr(
        timing.Sampler, "capture", lambda self, pool: setattr(self, "method", f"graph in {pool}")
    )

    def waits(x):
        return (2 * x).detach()

    variants = dict(
        waits=Variant(lambda *_: waits),
    )
    case = toy(variants, work={FORWARD: 1})
    m = measure.Measurement("toy", case, 4, machine(graphs=True), [])
    m.fns = {v: made.make() for v, made in case.variants.items()}
    m.time(FORWARD)
    assert {r["variant"]: r["method"] for r in m.rows} == dict(
        right="graph in (0, 1)", waits="launches"
    )

    def fails(self, pool):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(timing.Sampler, "capture", fails)
    m.rows.clear()
    m.time(FORWARD)
    assert m.rows[0]["variant"] == "right" and "not permitted" in m.rows[0]["error"]


def test_what_ends_a_case_is_its_row():
    class Dead(timing.HostClock):
        def wait(self):
            raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    def missing():
        raise ModuleNotFoundError("No module named 'kernels.gone'")

    *_, row = measure.measure("toy", lambda: toy({}), 4, machine(clock=Dead()))
    assert row["error"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    (row,) = measure.measure("gone", missing, 512, machine())
    assert row["error"] == "ModuleNotFoundError: No module named 'kernels.gone'"
    assert (row["case"], row["tokens"]) == ("gone", 512)


def test_rates():
    rates = measure.measured_rates(machine(), n=64, elements=1024)
    assert list(rates) == ["copy", "bf16", "fp8"] and rates["copy"] > 0 and rates["bf16"] > 0


# --- cases


@pytest.mark.parametrize("name", CASES)
def test_every_case_agrees_with_its_reference_on_tiny_inputs(name):
    pytest.importorskip("triton")
    case = CASES[name](TINY)
    m = measure.Measurement(name, case, TINY.tokens, machine(), [])
    m.compare()
    for row in m.rows:  # what others offer may be absent
        assert not row["variant"].startswith("stopwatch"), row
        assert row["error"].startswith(
            "ModuleNotFoundError"
            if DEVICE.type == "cuda"
            else ("ModuleNotFoundError", "NotImplementedError")
        ), row
        assert "named 'kernels" not in row["error"], row
    assert next(iter(case.variants)) in m.fns
    for direction in case.work:  # the reference in each direction
        first = next(iter(case.variants))
        call = measure.call_of(case, m.fns[first], m.sets, m.upstream, direction)
        with torch.set_grad_enabled(bool(case.leaves) and direction != INFERENCE):
            call(0)


def test_token_ids_of_the_embedding_are_zipfs():
    index, table = CASES["embedding"](GPT2_SMALL._replace(tokens=200_000, width=1)).inputs(
        Draw(DEVICE)
    )
    counts = index.bincount(minlength=len(table))
    assert index.min() == 0 and index.max() < len(table) and 0.06 < counts[0] / len(index) < 0.068
    assert counts[9] / counts[99] == pytest.approx(10, rel=0.2)


@pytest.mark.parametrize("name", CASES)
def test_work_is_counted_for_the_sizes_measured(name):
    """Each direction's least work at gpt2-small's size takes an H200 more than 10 us and less
    than 50 ms."""
    case = CASES[name](GPT2_SMALL)
    for direction, work in case.work.items():
        assert 10e-6 < work / (4.3e12 if case.unit == "bytes" else 790e12) < 50e-3, (
            direction,
            work,
        )
    if {FORWARD, BACKWARD, BOTH} <= case.work.keys():
        assert case.work[BOTH] == case.work[FORWARD] + case.work[BACKWARD]


def test_work_against_counts_by_hand():
    """The roofline of the survey: MB at 49,152 tokens."""

    def work(name):
        return {d: round(w / 1e6) for d, w in CASES[name](GPT2_SMALL).work.items()}

    assert work("rms_norm")[FORWARD] == 151 and work("rms_norm")[BACKWARD] == 226
    assert work("add_rms_norm, weight")[FORWARD] == work("add_rms_norm, weight")[BACKWARD] == 302
    assert work("softcap_cross_entropy")[BOTH] == 9890
    assert work("qk_norm_rope")[FORWARD] == 302 and work("qk_norm_rope")[BACKWARD] == 604
    assert work("transpose_copy")[FORWARD] == 4945
    assert work("linear_cross_entropy")[BOTH] == 11_393_474  # MFLOP
    assert work("polar_express")[FORWARD] == 1_046_395


def test_documents_fill_the_rows():
    lengths = cases.documents(GPT2_SMALL)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    assert (
        sum(lengths) == 49152
        and {0, 16384, 32768} <= set(starts)
        and max(lengths) <= 2048
        and len(lengths) > 60
    )


# --- tables


def a_row(case, variant, direction, us, tokens=49152, share=0.5, unit="bytes", **fields):
    return (
        dict(
            case=case,
            shape=f"({tokens:,}, 768) bf16",
            tokens=tokens,
            direction=direction,
            variant=variant,
            median_us=us,
            p20_us=us - 1,
            p80_us=us + 1,
            samples=20,
            calls=10,
            method="graph",
            difference=0.0,
            unit=unit,
            work=151e6,
            per_second=151e6 / us * 1e6,
            rate="copy",
            share=share,
        )
        | fields
    )


def a_result(rows):
    return dict(device="NVIDIA H200", rates=[dict(copy=4.3e12, bf16=790e12, fp8=None)], rows=rows)


def test_a_table_with_gaps():
    text = kernels.render(
        a_result(
            [
                a_row("rms_norm", "eager", FORWARD, 88.0),
                a_row("rms_norm", "stopwatch", FORWARD, 40.0, share=0.878),
                a_row(
                    "rms_norm",
                    "eager",
                    BACKWARD,
                    1234.5,
                    share=None,
                    method="launches",
                    difference=None,
                ),
                a_row("rms_norm", "eager", FORWARD, 30.0, tokens=16384),
                dict(
                    case="rms_norm",
                    tokens=49152,
                    direction=None,
                    variant="Liger",
                    error="ModuleNotFoundError: none",
                ),
                dict(
                    case="qk_norm_rope",
                    tokens=49152,
                    direction=None,
                    variant=None,
                    error="not run: out of time",
                ),
                a_row(
                    "linear_relu2",
                    "stopwatch",
                    FORWARD,
                    300.0,
                    unit="FLOPs",
                    work=0.232e12,
                    per_second=773e12,
                    rate="fp8",
                ),
            ]
        )
    )
    lines = text.splitlines()
    assert (
        "# Kernels on NVIDIA H200" == lines[0]
        and "copy 4,300 GB/s, bf16 790 TFLOP/s, fp8 not measured" in text
    )
    at = lines.index("## rms_norm")
    assert lines[at + 2 : at + 12] == [
        "| (49,152, 768) bf16 | forward, 151 MB | backward, 151 MB |",
        "|---|---|---|",
        "| stopwatch | **40.0** (39.0–41.0), 3,775 GB/s, 88% | not measured |",
        "| eager | 88.0 (87.0–89.0), 1,716 GB/s, 50% | **1,234** (1,234–1,236) † ‡, 122 GB/s |",
        "| Liger | not measured | not measured |",
        "",
        "| (16,384, 768) bf16 | forward, 151 MB |",
        "|---|---|",
        "| stopwatch | not measured |",
        "| eager | **30.0** (29.0–31.0), 5,033 GB/s, 50% |",
    ]
    assert "- Liger, 49,152 tokens: ModuleNotFoundError: none" in lines
    at = lines.index("## qk_norm_rope")
    assert lines[at + 2 : at + 5] == ["not measured", "", "- 49,152 tokens: not run: out of time"]
    assert "forward, 0.232 TFLOP" in text and "773 TFLOP/s, 50% of fp8" in text


def test_a_table_of_nothing():
    text = kernels.render(dict(a_result([]), rates=[]))
    assert "Rates: not measured." in text


# --- commands


def test_kernels_refuses_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["kernels"]) == 2
    out, err = capsys.readouterr()
    assert (
        out == ""
        and err.count("\n") == 1
        and err.startswith("error: benchmark kernels needs a CUDA GPU")
    )
    assert "./run.sh benchmarks loader" in err


@pytest.mark.parametrize(
    "options,said",
    [
        (
            ["kernels", "--only", "rms_nrom"],
            "--only rms_nrom: expected some of add_rms_norm, attention",
        ),
        (["kernels", "--tokens", "100"], "--tokens 100: expected a multiple of 128"),
        (["nonsense"], "invalid choice"),
        ([], "NAME"),
        (["loader", "--only", "x"], "--only"),
    ],
)
def test_bad_options_end_with_2(options, said, capsys):
    assert command.main(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_help_lists_the_options_of_the_benchmark(capsys):
    with pytest.raises(SystemExit):
        command.main(["kernels", "--help"])
    text = capsys.readouterr().out
    assert "--only" in text and "rms_norm" in text and "--table" in text and "49152" in text


def test_plan_of_a_run():
    assert kernels.plan_of(("rms_norm", "polar_express"), (256, 128)) == [
        ("rms_norm", 256),
        ("rms_norm, weight", 256),
        ("polar_express", 256),
        ("rms_norm", 128),
        ("rms_norm, weight", 128),
    ]
    assert {name for name, _ in kernels.plan_of((), kernels.TOKENS)} == set(CASES)


def test_a_run_is_saved_case_by_case(monkeypatch):
    """With a GPU's names played; what is measured is another test's matter."""
    properties = types.SimpleNamespace(
        name="G", major=9, minor=0, L2_cache_size=1, total_memory=2, multi_processor_count=3
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(kernels, "measured_rates", lambda machine: dict(copy=machine.cache_bytes))
    monkeypatch.setattr(kernels, "measure", lambda name, make, n, machine: [(name, n, make().unit)])
    saved = []
    result = kernels.run(("polar_express",), (256, 128), lambda r: saved.append(list(r["rows"])))
    assert saved == [[("polar_express", 256, "FLOPs")]] and result["rows"] == saved[0]
    assert result["device"] == "G" and result["rates"] == [dict(copy=1)]


@pytest.fixture
def stand_ins(monkeypatch):
    """Benchmarks `a` (grows, renders, has an option), `b` (raises) and `c` (needs what is not
    there)."""

    def grows(n=2, save=lambda result: None):
        for i in range(n):
            save(dict(rows=list(range(i))))
        return dict(rows=list(range(n)))

    def breaks():
        raise RuntimeError("broken\nbenchmark")

    modules = dict(
        a=types.SimpleNamespace(
            __doc__="About a.",
            run=grows,
            render=lambda r: f"# a\n\n{r['rows']}\n",
            add_arguments=lambda p: p.add_argument("--n", type=int, default=2),
        ),
        b=types.SimpleNamespace(__doc__="", run=breaks),
        c=types.SimpleNamespace(__doc__="", run=breaks, unavailable=lambda: "no such machine"),
    )
    monkeypatch.setattr(command, "BENCHMARKS", dict.fromkeys(modules, "about"))
    monkeypatch.setattr(command, "ALL", tuple(modules))
    monkeypatch.setattr(command, "module_of", modules.get)


def test_one_benchmark(stand_ins, tmp_path, capsys):
    assert command.main(["a", "--n", "3"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (
        printed["benchmark"] == "a"
        and printed["rows"] == [0, 1, 2]
        and printed["environment"]["torch"]
    )
    assert (
        command.main(
            ["a", "--json", str(tmp_path / "new/r.json"), "--table", str(tmp_path / "t.md")]
        )
        == 0
    )
    assert (
        json.loads((tmp_path / "new/r.json").read_text())["rows"] == [0, 1]
        and capsys.readouterr().out == ""
    )
    assert (tmp_path / "t.md").read_text() == "# a\n\n[0, 1]\n"
    assert sorted(os.listdir(tmp_path)) == ["new", "t.md"] and os.listdir(tmp_path / "new") == [
        "r.json"
    ]


def test_options_beyond_the_benchmarks_own(stand_ins, monkeypatch, capsys):
    assert command.main(["a", "--m", "3"]) == 2
    assert "error: unrecognized arguments: --m 3" in capsys.readouterr().err

    def run(n, trainer_options=()):
        if "--bad" in trainer_options:
            raise command.InputError("--bad: no such option")
        return dict(options=trainer_options)

    monkeypatch.setattr(command.module_of("a"), "run", run)
    assert command.main(["a", "--m", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["options"] == ["--m", "3"]
    assert command.main(["a", "--bad"]) == 2
    assert capsys.readouterr().err == "error: --bad: no such option\n"


def test_a_result_is_saved_as_it_grows(stand_ins, tmp_path, monkeypatch):
    def killed(save):
        save(dict(rows=[1]))
        raise KeyboardInterrupt

    monkeypatch.setattr(command.module_of("a"), "run", killed)
    monkeypatch.setattr(command.module_of("a"), "add_arguments", lambda parser: None)
    assert command.main(["a", "--json", str(tmp_path / "r.json")]) == 130
    assert json.loads((tmp_path / "r.json").read_text())["rows"] == [1]


def test_all_runs_what_it_can(stand_ins, tmp_path):
    assert (
        command.main(["all", "--json", str(tmp_path / "r.json"), "--table", str(tmp_path / "t.md")])
        == 0
    )
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert results["a"]["rows"] == [0, 1] and results["b"] == dict(
        error="RuntimeError: broken benchmark"
    )
    assert results["c"] == dict(skipped="no such machine")
    text = (tmp_path / "t.md").read_text()
    assert (
        "# a\n\n[0, 1]" in text
        and "RuntimeError: broken benchmark" in text
        and "no such machine" in text
    )


def test_every_benchmark_has_what_the_command_expects():
    for name in command.BENCHMARKS:
        module = command.module_of(name)
        assert callable(module.run) and module.__doc__
