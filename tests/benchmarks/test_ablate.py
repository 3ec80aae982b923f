"""benchmarks/ablate.py: its table, its statistics against scipy's, real runs that are cut short
and gone on with."""

import json
import math
import random

import pytest
import torch
from helpers import options, tiny, write_text
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import train_gpt as tg
from base import InputError
from benchmarks import ablate, subject
from benchmarks.__main__ import main
from benchmarks.ablate import pieces, summary
from runtime import setting_up

LOSSES = st.lists(st.tuples(*2 * [st.floats(0.5, 8)]), min_size=2, max_size=9)


# --- the table


@pytest.mark.parametrize("track", ["laptop", "gpt2-small"])
def test_every_piece_changes_its_track_or_says_why(track):
    base = subject.parse(["--track", track])
    chosen, left_out = pieces.choose(base, ())
    assert list(chosen)[0] == "base" and set(chosen) - {"base"} | set(left_out) == set(
        pieces.PIECES
    )
    assert all(
        reason == "makes no difference to this configuration"
        or "cannot be turned on here: --" in reason
        for reason in left_out.values()
    )
    for name, v in list(chosen.items())[1:]:
        assert v.fields and v.config == subject.change(base, **v.fields) != base
        piece = pieces.PIECES[name]
        assert v.label == (
            f"without {name}" if pieces.apply(base, piece.off) != base else f"with {name}"
        )
        assert v.fields.keys() <= (piece.off if v.label.startswith("without") else piece.on).keys()

        def tokens(c):
            return sum(stage.rows * c.row_len for stage in subject.schedule(c))

        assert tokens(v.config) == tokens(base)  # what makes their losses comparable


def test_a_piece_is_turned_off_where_it_is_on():
    base = subject.configure()
    for name, piece in pieces.PIECES.items():
        if piece.on and pieces.apply(base, piece.on) != pieces.apply(base, piece.off):
            on = pieces.apply(base, piece.on)
            assert pieces.variant(on, name).label == f"without {name}"
            assert pieces.apply(on, piece.off) == pieces.apply(base, piece.off)


def test_names_that_do_not_work_are_refused():
    base = subject.configure()
    with pytest.raises(
        InputError,
        match="--only softcp: no such piece; did you mean softcap[?] expected of softcap, ",
    ):
        pieces.choose(base, ["smear", "softcp"])
    with pytest.raises(InputError, match="--only zz: no such piece; expected of softcap"):
        pieces.choose(base, ["zz"])
    with pytest.raises(
        InputError, match="--only document-growth: makes no difference to this configuration"
    ):
        pieces.choose(base, ["document-growth"])
    odd = subject.configure(n_head=1)
    with pytest.raises(
        InputError, match="--only paired-heads: cannot be turned on here: --paired-layers"
    ):
        pieces.choose(odd, ["paired-heads"])
    assert pieces.choose(odd, ())[1]["paired-heads"].startswith("cannot be turned on here")
    assert list(pieces.choose(base, ["smear", "softcap", "smear"])[0]) == [
        "base",
        "smear",
        "softcap",
    ]


@given(st.integers(1, 7), st.integers(0, 30))
def test_the_order_rotates(n, k):
    names = list("abcdefg"[:n])
    assert sorted(ablate.order(names, k)) == names
    assert {ablate.order(names, k + i)[0] for i in range(n)} == set(names)


# --- statistics


@given(LOSSES)
def test_the_difference_is_scipys_paired_interval(pairs):
    got = summary.difference(pairs)
    a, b = zip(*pairs)
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert got["n"] == len(pairs) and got["mean"] == pytest.approx(
        sum(a) / len(a) - sum(b) / len(b), abs=1e-9
    )
    assert (got["low"], got["high"]) == pytest.approx((expected.low, expected.high), abs=1e-9)


@given(LOSSES)
def test_the_ratio_is_that_of_the_logarithms(pairs):
    got = summary.ratio(pairs)
    logs = [[math.log(x) for x in side] for side in zip(*pairs)]
    expected = stats.ttest_rel(*logs).confidence_interval(0.95)
    assert got["n"] == len(pairs) and got["mean"] == pytest.approx(
        stats.gmean([a / b for a, b in pairs])
    )
    assert (math.log(got["low"]), math.log(got["high"])) == pytest.approx(
        (expected.low, expected.high), abs=1e-9
    )
    back = summary.ratio([(b, a) for a, b in pairs])  # the other way round it is one over
    assert (back["mean"], back["low"]) == pytest.approx((1 / got["mean"], 1 / got["high"]))


def test_known_numbers():
    # differences 0.1, 0.2, 0.3: mean 0.2, sd 0.1, t(0.975, 2) = 4.302653
    got = summary.difference([(1.1, 1.0), (2.2, 2.0), (3.3, 3.0)])
    assert (got["mean"], got["high"]) == pytest.approx(
        (0.2, 0.2 + 4.302653 * 0.1 / 3**0.5), abs=1e-6
    )
    assert summary.difference([(3.0, 1.0)]) == dict(
        mean=2.0, low=None, high=None, n=1
    )  # one seed has no interval
    assert summary.ratio([(3.0, 1.5)]) == dict(mean=pytest.approx(2.0), low=None, high=None, n=1)
    assert summary.difference([]) is None and summary.ratio([]) is None


def test_intervals_hold_the_truth_as_often_as_they_say():
    r, hit = random.Random(0), 0
    for _ in range(2000):
        base = [r.gauss(3, 1) for _ in range(4)]  # seeds differ by far more than the piece changes
        got = summary.difference([(b + r.gauss(0.01, 0.005), b) for b in base])
        hit += got["low"] <= 0.01 <= got["high"]
    assert 0.935 < hit / 2000 < 0.965


def made(variant, seed, losses, seconds=10.0):
    """A run that validates every 10 steps."""
    n = len(losses)
    val = [
        dict(step=10 * (i + 1), train_time=seconds * (i + 1) / n, val_loss=loss, val_bpb=loss / 2)
        for i, loss in enumerate(losses)
    ]
    return dict(
        variant=variant,
        seed=seed,
        val=val,
        train_time_s=seconds,
        steps=10 * n,
        tokens=100 * n,
        ms_per_step=1e3 * seconds / (10 * n),
    )


def test_summary_pairs_by_seed():
    runs = [
        made("base", 0, [4, 3, 2]),
        made("a", 1, [4, 3.5, 3], 24.0),
        made("a", 0, [4, 3, 2.5], 12.0),
        made("base", 1, [5, 4, 3], 20.0),
        made("base", 2, [9, 9, 9]),
    ]
    got = summary.summarise(runs, ["base", "a", "untried"], "val_loss", 3.5)
    assert (
        list(got) == ["base", "a"]
        and got["base"]["runs"] == 3
        and got["base"]["loss"] == pytest.approx(14 / 3)
    )
    assert got["a"]["difference"] == pytest.approx(
        dict(n=2, mean=0.25, low=0.25 - 12.7062 * 0.25, high=0.25 + 12.7062 * 0.25), abs=1e-3
    )  # seed 2 has no partner
    assert got["a"]["step_ratio"] == pytest.approx(dict(median=1.2, least=1.2, most=1.2))
    # base: halfway between 4 and 3, 5 s of 10, and between 4 and 3, 16.67 of 20; a: 6 of 12, and 16
    # of 24
    assert summary.time_to(runs[0], "val_loss", 3.5) == pytest.approx(5.0)
    assert got["a"]["time_to_target"] == pytest.approx((6 + 16) / 2) and got["a"]["reached"] == 2
    assert got["a"]["target_ratio"]["mean"] == pytest.approx((6 / 5 * 16 / (50 / 3)) ** 0.5)
    assert got["base"]["reached"] == 2 and got["base"]["sd"] == pytest.approx(stats.tstd([2, 3, 9]))
    assert "difference" not in got["base"]
    # the other metric is half of it, and without a target there is none
    other = summary.summarise(runs, ["base", "a"], "val_bpb", None)["a"]
    assert other["difference"]["mean"] == pytest.approx(0.125) and "reached" not in other


def test_a_target_that_one_seed_misses_has_no_ratio():
    runs = [
        made(v, s, [4, 3 if (v, s) != ("a", 1) else 3.6]) for v in ("base", "a") for s in (0, 1)
    ]
    got = summary.summarise(runs, ["base", "a"], "val_loss", 3.5)
    assert (
        got["a"]["reached"] == 1
        and got["a"]["target_ratio"] is None
        and got["a"]["difference"]["n"] == 2
    )
    got = summary.summarise(runs, ["base", "a"], "val_loss", 1.0)
    assert got["base"]["reached"] == 0 and got["base"]["time_to_target"] is None


def test_a_run_that_failed_is_counted_and_in_no_mean():
    runs = [
        made("base", 0, [4.0]),
        made("base", 1, [4.0]),
        made("a", 0, [3.0]),
        dict(variant="a", seed=1, error="NaN"),
        dict(variant="b", seed=0, error="NaN"),
        dict(variant="b", seed=1, error="NaN"),
    ]
    got = summary.summarise(runs, ["base", "a", "b"], "val_loss", 5.0)
    assert got["a"] == got["a"] | dict(runs=2, failed=1, loss=3.0, reached=1, target_ratio=None)
    assert got["a"]["difference"] == dict(mean=-1.0, low=None, high=None, n=1)
    assert got["b"] == got["b"] | dict(
        runs=2, failed=2, loss=None, ms_per_step=None, difference=None, step_ratio=None
    )
    result = dict(
        track="t",
        metric="val_loss",
        target=5.0,
        steps=10,
        runs=runs,
        summary=got,
        left_out={"x": "is not"},
        settings=dict(device="d", torch="2", threads=1),
        statement=summary.STATEMENT,
        variants={n: dict(label=f"without {n}", what="w", fields={}) for n in ("base", "a", "b")},
    )
    text = summary.render(result)
    assert (
        "| without b | – (2 of 2 failed) |  | – | – | not reached | – | w |" in text
        and "Left out: x is not." in text
    )
    assert "3.0000 (1 of 2 failed) | -1.0000 |" in text and "Failed: without a, seed 1: NaN" in text
    assert "reached in 1 of 2" in text


# --- real runs


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(
        setting_up,
        "machine_probe",
        lambda device: dict(matmul=dict(float32=1e12, bfloat16=1e12), copy=1e10),
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Options of a run of three steps."""
    folder = tmp_path_factory.mktemp("ablate")
    torch.set_num_threads(1)
    c = tiny(write_text(folder / "text.txt"), folder, steps=3, eval_every=1, target=9.0)
    args, drop = [], False
    for arg in options(c):
        drop = arg in ablate.REFUSED if arg.startswith("--") else drop
        args += [] if drop else [arg]
    return folder, c, args


@pytest.mark.slow
def test_runs_interrupted_and_gone_on_with(small, tmp_path, monkeypatch, capsys):
    folder, c, args = small
    out, table = tmp_path / "out.json", tmp_path / "out.md"
    command = [
        "ablate",
        "--only",
        "softcap",
        "smear",
        "--seeds",
        "2",
        "--json",
        str(out),
        "--table",
        str(table),
        *args,
    ]
    real, made_runs = ablate.Bench.run, []

    def cut_short(bench, name, seed):
        if len(made_runs) == 4:
            raise KeyboardInterrupt
        made_runs.append((name, seed))
        return real(bench, name, seed)

    monkeypatch.setattr(ablate.Bench, "run", cut_short)
    assert main(command) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted; {out} has what was measured"
    # all of seed 0, then seed 1, another one first
    assert made_runs == [("base", 0), ("softcap", 0), ("smear", 0), ("softcap", 1)]
    first = json.loads(out.read_text())["runs"]
    assert [(r["variant"], r["seed"]) for r in first] == made_runs

    monkeypatch.setattr(ablate.Bench, "run", lambda *a: (made_runs.append(a[1:]), real(*a))[1])
    assert main(command) == 0
    assert made_runs[4:] == [("smear", 1), ("base", 1)]
    result = json.loads(out.read_text())
    assert result["runs"][:4] == first and "0:00:00 left" in capsys.readouterr().err
    by = {(r["variant"], r["seed"]): r for r in result["runs"]}
    for r in by.values():
        assert (
            r["steps"] == 3 and r["tokens"] == 768 and len(r["val"]) == 3
        )  # to the end, though 9 is met at once
        assert r["ms_per_step"] == pytest.approx(1e3 * r["train_time_s"] / 3)
    softcap = result["summary"]["softcap"]
    losses = [
        [by[name, seed]["val"][-1]["val_loss"] for seed in (0, 1)] for name in ("softcap", "base")
    ]
    interval = stats.ttest_rel(*losses).confidence_interval(0.95)
    assert (softcap["difference"]["low"], softcap["difference"]["high"]) == pytest.approx(
        (interval.low, interval.high)
    )
    assert softcap["reached"] == 2 and softcap["target_ratio"]["n"] == 2
    assert result["variants"]["softcap"] == dict(
        label="without softcap", what=subject.help_of("softcap"), fields=dict(softcap=[])
    )
    text = table.read_text()
    assert "| with smear |" in text and "| without softcap |" in text and "(smear=True) |" in text
    assert "95% t-interval" in text and "768 tokens in every run" in text and "(sd " in text

    # seeds and pieces may be added; what is there is neither done again nor lost
    more = command[:]
    more[2:4], more[more.index("--seeds") + 1] = ["value-embeds"], "1"
    made_runs.clear()
    assert main(more) == 0 and made_runs == [("value-embeds", 0)]
    grown = json.loads(out.read_text())
    assert grown["runs"][:6] == result["runs"] and set(grown["summary"]) == {
        "base",
        "softcap",
        "smear",
        "value-embeds",
    }
    made_runs.clear()
    assert main(more) == 0 and not made_runs  # nothing to do
    assert json.loads(out.read_text())["runs"] == grown["runs"]

    # other settings are refused, and cost nothing
    before = out.read_bytes()
    assert main([*command, "--muon-lr", "0.01"]) == 2
    assert (
        "--json: the file's runs were made with muon_lr 0.03, not 0.01" in capsys.readouterr().err
    )
    assert (
        main([*command, "--micro-tokens", "128"]) == 2
        and "micro_tokens 0, not 128" in capsys.readouterr().err
    )
    other = write_text(tmp_path / "other.txt", seed=1)
    assert (
        main([*command, "--text", str(other)]) == 2
        and "were made with fingerprint" in capsys.readouterr().err
    )
    monkeypatch.setattr(subject, "source_hash", lambda: "another")
    assert main(command) == 2 and "were made with other source" in capsys.readouterr().err
    assert out.read_bytes() == before and not made_runs


def test_a_run_here_is_the_trainers_own(small, tmp_path):
    """Kept trainers, other variants in between and other seeds before leave no trace in the
    losses."""
    folder, c, args = small
    result = ablate.run(only=["softcap"], seeds=2, trainer_options=args)
    for name, fields in (("base", {}), ("softcap", dict(softcap=()))):
        rows = []
        tg.train(
            tg.changed(c, seed=1, target=None, run_dir=str(tmp_path / name), **fields),
            report=rows.append,
        )
        mine = next(r for r in result["runs"] if (r["variant"], r["seed"]) == (name, 1))
        assert mine["val"][-1]["val_loss"] == rows[0]["val_loss"]


def test_a_variant_that_fails_is_reported_and_the_others_go_on(small, monkeypatch, capsys):
    folder, c, args = small
    real = tg.run_once

    def run_once(setup, *rest):
        if not setup.config.model.softcap:
            raise InputError("step 2: the training loss is nan")
        return real(setup, *rest)

    monkeypatch.setattr(tg, "run_once", run_once)
    result = ablate.run(only=["softcap"], seeds=2, trainer_options=args)
    assert result["runs"][1]["error"] == "step 2: the training loss is nan"
    assert result["summary"]["softcap"]["failed"] == 2
    assert "Failed: without softcap, seed 0: step 2" in summary.render(result)
    assert [r["variant"] for r in ablate.resume(result, result["settings"], {})] == [
        "base"
    ] * 2  # it is tried again
    monkeypatch.setattr(
        tg, "run_once", lambda *a, **k: (_ for _ in ()).throw(InputError("no luck"))
    )
    with pytest.raises(InputError, match="every run failed, the first one with: no luck"):
        ablate.run(only=["softcap"], seeds=1, trainer_options=args)


@pytest.mark.slow
def test_trainers_that_do_not_fit_are_built_anew(small, monkeypatch):
    folder, c, args = small
    built, real = [], ablate.Bench.build
    monkeypatch.setattr(
        ablate.Bench, "build", lambda b, c, log: (built.append(c), real(b, c, log))[1]
    )
    kept = ablate.run(only=["softcap"], seeds=2, trainer_options=args)
    assert len(built) == 3  # one more for what all share
    assert all(c.micro_tokens == 256 and c.recompute == "off" for c in built[1:])
    assert kept["passes"] == dict(micro_tokens=256, recompute="off")
    monkeypatch.setattr(ablate, "free_memory", lambda device: 1)
    anew = ablate.run(only=["softcap"], seeds=2, trainer_options=args)
    assert len(built) == 3 + 5
    for a, b in zip(kept["runs"], anew["runs"]):
        assert a["val"][-1]["val_loss"] == b["val"][-1]["val_loss"]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--seeds", "0"], "--seeds 0: expected 1 or more"),
        (["--only", "softcup"], "--only softcup: no such piece; did you mean softcap?"),
        (["--repeat", "3"], "--repeat is not for ablate: leave it out; --seeds N repeats"),
        (["--run-dir=x"], "--run-dir is not for ablate: leave it out"),
        (["--step", "3"], "unknown option --step: did you mean --steps?"),
        (["--json", "BAD"], "not JSON; give another file"),
        (["--json", "OTHER"], "holds something else than a result of ablate; give another file"),
        (["--json", "EMPTY"], "--json: the file holds no ablation; give another file"),
    ],
)
def test_bad_input_is_refused_before_anything_is_built(
    small, tmp_path, monkeypatch, capsys, more, message
):
    folder, c, args = small
    monkeypatch.setattr(ablate.Bench, "build", lambda *_: pytest.fail("built something"))
    (tmp_path / "BAD").write_text("{")
    (tmp_path / "OTHER").write_text('{"benchmark": "trainer"}')
    (tmp_path / "EMPTY").write_text('{"benchmark": "ablate"}')
    monkeypatch.chdir(tmp_path)
    before = {p: p.read_text() for p in tmp_path.iterdir()}
    assert main(["ablate", *args, *more]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert {p: p.read_text() for p in tmp_path.iterdir()} == before


def test_one_process_only(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="without torchrun"):
        ablate.run()


@pytest.mark.slow
def test_many_compiled_variants_in_one_process(small):
    """More than torch.compile takes of one function, and the same losses as uncompiled up to
    rounding."""
    folder, c, args = small
    only = ["softcap", "value-embeds", "ngrams", "smear", "backout", "short-windows"]
    eager = ablate.run(only=only, seeds=1, trainer_options=args)
    compiled = ablate.run(only=only, seeds=1, trainer_options=[*args, "--compile"])
    assert not any("error" in r for r in compiled["runs"])
    for a, b in zip(eager["runs"], compiled["runs"]):
        assert a["val"][-1]["val_loss"] == pytest.approx(b["val"][-1]["val_loss"], rel=1e-4)


def test_adamw_is_a_rival_with_twice_the_steps_and_only_by_name():
    base = subject.configure(template="llama", steps=100, adamw_lr=2e-3)
    assert "adamw" not in pieces.choose(subject.configure(), ())[0]
    found = pieces.choose(base, ["adamw"])[0]["adamw"].config
    assert found.steps == 200 and found.optimizer == "adamw"
    assert found.adamw_lr == 2e-3 and found.adamw_warmup == 10
    # What is another template's is left out
    chosen, left_out = pieces.choose(base, ())
    assert {"normuon", "weight-decay", "cooldown"} < chosen.keys()
    assert left_out["smear"] == "cannot be turned off here: this template has no smear"
    warm = subject.change(base, adamw_warmup=30)
    assert pieces.choose(warm, ["adamw"])[0]["adamw"].config.adamw_warmup == 30
