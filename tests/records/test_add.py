"""records/add.py: what may become a record does, whole; anything else is refused and leaves
nothing behind."""

import bz2
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import ROOT
from scipy.stats import ttest_1samp

import records.__main__
from records.add import load_run, slugify
from records.check import losses_to_test, t_test
from records.read import read_runs
from records.source import ARCHIVE, header_line, pack_source, source_of
from runtime.log import Log

ENVIRONMENT = dict(
    date="2026-03-04T05:06:07+00:00",
    device="Some CPU",
    cpu_cores=2,
    threads=2,
    python="3.11.7",
    torch="2.13.0",
    cuda=None,
    platform="Linux",
    git_commit="0123456789" * 4,
    git_dirty=False,
    dtype="bfloat16",
    world_size=1,
    probe=dict(matmul=dict(bfloat16=1e12), copy=1e10),
)


FILES = ("log.txt", "metrics.jsonl", "config.json", "result.json")  # of a run
KEPT = ("log.txt", "metrics.jsonl.bz2", "result.json")  # of a record's seed
SOURCE = source_of({"train_gpt.py": b"the source\n"})
ANOTHER = source_of({"train_gpt.py": b"another source\n"})


def make_run(
    folder,
    seed=0,
    losses=(5.0, 4.0, 3.2),
    target=3.28,
    steps=30,
    every=10,
    ms=100,
    environment=None,
    resumed=(),
    again=None,
    torn=7,
    finish=True,
    source=SOURCE,
    **config,
):
    """A finished run's folder, written by Log: a validation with each of these losses, `every`
    steps apart.

    resumed: at these steps it went on from a checkpoint, having come three steps further and lost
    the last `torn` bytes of both files; again: what header() is given then, besides the usual.
    """
    c = (
        dict(
            track="toy",
            target=target,
            target_metric="val_loss",
            steps=steps,
            seed=seed,
            eval_every=every,
            batch_tokens=[1000],
            run_dir=str(folder),
            cache_dir="/home/someone/.cache",
            text="",
        )
        | config
    )
    environment = ENVIRONMENT | (environment or {})
    header = dict(source=source, environment=environment, config=c, data="f00d")

    def train(log, first, last):
        for step in range(first, min(last, len(losses) * every) + 1):
            loss = losses[(step - 1) // every]
            log.step(step, steps, "train", loss + 1 / step, step * ms / 1000)
            if step % every == 0:
                log.step(
                    step, steps, "val", loss, step * ms / 1000 + 0.0001 * seed, val_bpb=loss / 2
                )

    begin = None
    for at in resumed:
        with Log(folder, steps, resume_step=begin) as log:
            log.header(**header)
            train(log, (begin or 0) + 1, at + 3)
        for name in ("log.txt", "metrics.jsonl"):
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(content[:-torn] if torn else content)
        header |= again or {}
        begin = at
    with Log(folder, steps, resume_step=begin) as log:
        log.header(**header)
        log.say(f"log in {folder}", quiet=True)
        train(log, (begin or 0) + 1, steps)
        step, loss = len(losses) * every, losses[-1]
        loss = dict(val_loss=loss, val_bpb=loss / 2)
        if finish:
            log.save_weights({"w": torch.zeros(3)})
            log.finish(
                dict(
                    track=c["track"],
                    target_metric=c["target_metric"],
                    target=target,
                    reached=None if target is None else loss[c["target_metric"]] <= target,
                    **loss,
                    train_time_s=round(step * ms / 1000 + 0.0001 * seed, 3),
                    cold_start_s=1.5,
                    steps=step,
                    tokens=1000 * step,
                    params=12,
                    device=ENVIRONMENT["device"],
                    world_size=1,
                    seed=seed,
                    data="stdlib",
                    data_fingerprint="f00d",
                    run_dir=str(folder),
                    resumed_at=list(resumed),
                ),
            )
    return folder


def main(capsys, *args):
    """(exit status, stdout, stderr) of ./run.sh records."""
    capsys.readouterr()
    status = records.__main__.main([str(a) for a in args])
    return status, *capsys.readouterr()


@pytest.fixture
def add(tmp_path, capsys):
    """add(run, ..., option, ...) -> (exit status, stdout, stderr), with records in
    tmp_path/records."""

    def call(*args, name="a name"):
        return main(capsys, "add", *args, "--name", name, "--records", tmp_path / "records")

    return call


def refused(result, records, *said):
    """Exit status 2, one line with each of `said` in it, and nothing in the records' folder."""
    status, out, err = result
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, result
    for words in said:
        assert str(words) in err
    assert not records.exists() or not any(records.rglob("*"))


# --- what is taken


def test_record_of_three_seeds(add, tmp_path):
    losses = [3.25, 3.26, 3.27]
    runs = [
        make_run(tmp_path / f"r{i}", seed, (5.0, 4.0, losses[i]), ms=100 + i)
        for i, seed in enumerate((2, 0, 1))
    ]
    status, out, err = add(*runs, name="What's new: ReLU²")
    folder = tmp_path / "records/toy/2026-03-04_what-s-new-relu2"
    assert (status, out, err) == (0, f"{folder}\n", "")
    expected = {"summary.json", ARCHIVE}  # and no weights
    for seed in range(3):
        expected |= {f"seed{seed}/{name}" for name in KEPT}
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == expected
    assert (folder / ARCHIVE).read_bytes() == SOURCE.archive
    s = json.loads((folder / "summary.json").read_text())
    assert (s["name"], s["track"], s["n"], s["reached"], s["git_dirty"]) == (
        "What's new: ReLU²",
        "toy",
        3,
        3,
        False,
    )
    assert (
        s["seeds"] == [0, 1, 2]
        and s["losses"] == [3.26, 3.27, 3.25]
        and s["times_s"] == [3.03, 3.06, 3.0]
    )
    assert s["loss_mean"] == pytest.approx(3.26) and s["loss_sd"] == pytest.approx(0.01)
    assert s["time_mean_s"] == pytest.approx(3.03) and s["time_sd_s"] == pytest.approx(0.03)
    assert (
        s["p_value"] == pytest.approx(ttest_1samp(losses, 3.28, alternative="less").pvalue)
        and s["p_step"] is None
    )
    assert s["machine_probe"] == ENVIRONMENT["probe"] and s["data_fingerprint"] == "f00d"
    assert s["environment"]["device"] == "Some CPU" and s["git_commit"] == ENVIRONMENT["git_commit"]
    assert s["source"] == SOURCE.digest
    for run, seed in zip(runs, (2, 0, 1)):
        kept = folder / f"seed{seed}"
        metrics = bz2.decompress((kept / "metrics.jsonl.bz2").read_bytes())
        assert metrics == (run / "metrics.jsonl").read_bytes()
        a = read_runs(run)[0]
        b = read_runs(kept)[0]
        assert (a.val, a.train, a.sources) == (b.val, b.train, b.sources)
        assert a.config | dict(run_dir="", cache_dir="") == b.config | dict(
            run_dir="", cache_dir=""
        )


def test_a_record_has_the_date_of_its_last_run(add, tmp_path):
    dates = ("2026-03-05T00:00:00+00:00", "2026-03-07T00:00:00+00:00", "2026-03-06T00:00:00+00:00")
    runs = [
        make_run(tmp_path / f"r{i}", i, environment=dict(date=date)) for i, date in enumerate(dates)
    ]
    assert add(*runs)[1] == f"{tmp_path / 'records/toy/2026-03-07_a-name'}\n"
    summary = json.loads((tmp_path / "records/toy/2026-03-07_a-name/summary.json").read_text())
    assert summary["date"] == "2026-03-07"


def test_what_a_machine_was_measured_to_do_may_differ(add, tmp_path, capsys):
    runs = []
    for seed, rate in enumerate((1e12, 1.1e12)):
        environment = dict(probe=dict(matmul=dict(bfloat16=rate), copy=rate / 100))
        runs.append(make_run(tmp_path / f"r{seed}", seed, environment=environment))
    assert add(*runs)[0] == 0
    folder = tmp_path / "records/toy/2026-03-04_a-name"
    assert json.loads((folder / "summary.json").read_text())["machine_probe"]["copy"] == 1e10
    assert main(capsys, "plot", *runs, "-o", tmp_path / "x.svg")[0] == 0
    assert "(n=2)" in (tmp_path / "x.svg").read_text()  # one line, of two runs


def test_one_seed_has_no_spread(add, tmp_path):
    assert add(make_run(tmp_path / "r"))[0] == 0
    s = json.loads((tmp_path / "records/toy/2026-03-04_a-name/summary.json").read_text())
    assert (s["n"], s["loss_sd"], s["time_sd_s"], s["p_value"]) == (1, None, None, None)


def test_runs_that_stop_at_the_target_are_tested_where_the_first_stopped(add, tmp_path):
    runs = [make_run(tmp_path / "r0", 0, (5.0, 3.2)), make_run(tmp_path / "r1", 1, (5.0, 4.0, 3.1))]
    assert add(*runs)[0] == 0
    s = json.loads((tmp_path / "records/toy/2026-03-04_a-name/summary.json").read_text())
    losses, step, looks = losses_to_test([r for path in runs for r in read_runs(path)])
    assert (s["p_value"], s["p_step"]) == (t_test(losses, 3.28, looks).p, step) and step == 20
    assert s["p_value"] > 0.5 and s["steps"] == [20, 30]


def test_a_folder_of_seeds_is_all_of_them(add, tmp_path):
    for seed in range(3):
        make_run(tmp_path / f"runs/seed{seed}", seed)
    assert add(tmp_path / "runs")[0] == 0
    assert len(list((tmp_path / "records/toy/2026-03-04_a-name").glob("seed*"))) == 3
    (tmp_path / "runs/seed1/result.json").unlink()
    assert "has no result.json" in add(tmp_path / "runs", name="another")[2]


def test_paths_of_the_machine_are_not_published(add, tmp_path):
    run = make_run(tmp_path / "r", text='/home/someone/my "texts"/novel.txt')
    before = {name: (run / name).read_text() for name in FILES}
    assert add(run)[0] == 0
    kept = tmp_path / "records/toy/2026-03-04_a-name/seed0"
    c = read_runs(kept)[0].config
    assert (c["text"], c["cache_dir"], c["run_dir"]) == ("novel.txt", ".cache", "r")
    for name in ("log.txt", "result.json"):
        text = (kept / name).read_text()
        assert "someone" not in text and str(tmp_path) not in text
    assert {name: (run / name).read_text() for name in FILES} == before
    load_run(kept)


def old_run(folder, source="import torch\n", **fields):
    """A run of before 2026-12, whose log begins with the text of its source."""
    run = make_run(folder, **fields)
    edit(run, "log.txt", header_line(SOURCE), source)
    for name in ("log.txt", "config.json"):
        edit(run, name, f',\n "source": "{SOURCE.digest}"', "")
    (run / ARCHIVE).unlink()
    return run


def test_runs_whose_logs_hold_their_source(add, tmp_path, capsys):
    source = 'cache = "/home/someone/.cache"\n'
    runs = [old_run(tmp_path / f"r{i}", source, seed=i) for i in range(2)]
    assert add(*runs)[0] == 0
    folder = tmp_path / "records/toy/2026-03-04_a-name"
    assert not (folder / ARCHIVE).exists()
    assert "source" not in json.loads((folder / "summary.json").read_text())
    log = (folder / "seed1/log.txt").read_text()
    assert log.startswith(source) and log.count("someone") == 1  # the source stays as it was
    load_run(folder / "seed1")
    out = main(capsys, "check", folder)[1]
    assert out.count("names no archive of its source") == 2 and "proves" not in out
    other = old_run(tmp_path / "other", "import numpy\n", seed=2)
    refused(add(runs[0], other), tmp_path / "nothing", "source differs")


def test_a_run_without_a_named_folder_does_not_publish_it(add, tmp_path):
    """Then its path is in the result and in the log, but not in the configuration."""
    run = make_run(tmp_path / "runs/20260304-toy", run_dir="")
    assert str(tmp_path) in (run / "log.txt").read_text() and add(run)[0] == 0
    kept = tmp_path / "records/toy/2026-03-04_a-name/seed0"
    assert not any(str(tmp_path).encode() in (kept / name).read_bytes() for name in KEPT)
    assert "log in 20260304-toy\n" in (kept / "log.txt").read_text()


def test_a_run_of_the_trainer(add, tmp_path):
    """What train_gpt.py writes is what is expected here."""
    from helpers import tiny, write_text

    import train_gpt as tg

    tg.train(tiny(write_text(tmp_path / "text.txt"), tmp_path, target=9.0, steps=8, eval_every=4))
    status, out, err = add(tmp_path / "run", "--allow-dirty")
    assert status == 0, err
    s = json.loads((Path(out.strip()) / "summary.json").read_text())
    assert s["steps"] == [4] and s["machine_probe"]["copy"] > 0
    assert s["source"] == pack_source(ROOT).digest


# --- runs that were killed and resumed


@pytest.mark.parametrize("torn", [0, 1, 7, 70])
def test_a_resumed_run_makes_the_record_of_one_that_was_not(add, tmp_path, torn):
    whole, run = make_run(tmp_path / "whole"), make_run(tmp_path / "r", resumed=(10, 15), torn=torn)
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert add(whole, name="whole")[0] == 0
    status, out, err = add(run, name="resumed")
    assert (status, err) == (0, "")
    a, b = (
        json.loads((tmp_path / f"records/toy/2026-03-04_{name}/summary.json").read_text())
        for name in ("whole", "resumed")
    )
    assert "resumed_at" not in a and b.pop("resumed_at") == [[10, 15]]
    assert a | dict(name="resumed") == b
    kept = json.loads((tmp_path / "records/toy/2026-03-04_resumed/seed0/result.json").read_text())
    assert kept["resumed_at"] == [10, 15]


def test_resumed_runs_in_the_other_commands(tmp_path, capsys):
    runs = [
        make_run(tmp_path / f"r{i}", i, losses=(5.0, 4.0, 3.20 + i / 100), resumed=resumed)
        for i, resumed in enumerate([(), (10,), (10, 20)])
    ]
    status, out, _ = main(capsys, "check", *runs)
    assert status == 0 and "mean 3.21000" in out
    assert "note: resumed from a checkpoint at step 10\n" in out
    assert "note: resumed from a checkpoint at step 10, 20\n" in out
    status, out, _ = main(capsys, "compare", *runs)
    assert status == 0 and out.count("warning: resumed from a checkpoint") == 2 and "3.000" in out
    status, out, _ = main(capsys, "compare", "--json", *runs)
    assert [r["resumed_at"] for r in json.loads(out)["runs"]] == [[], [10], [10, 20]]
    assert main(capsys, "plot", *runs, "-o", tmp_path / "p.svg")[0] == 0
    assert "resumed from" not in main(capsys, "compare", runs[0])[1]


def test_unfinished_and_torn_runs(add, tmp_path, capsys):
    run = make_run(tmp_path / "r", losses=(5.0, 4.0), resumed=(10,), finish=False)
    for name in ("log.txt", "metrics.jsonl"):
        (run / name).write_bytes((run / name).read_bytes()[:-5])
    refused(
        add(run),
        tmp_path / "records",
        run,
        "has no result.json: the run has not finished, --resume may go on",
    )
    status, _, err = main(capsys, "check", run)
    assert status == 2 and "did not end (last step 20 of 30)" in err and err.count("\n") == 1
    status, out, _ = main(capsys, "compare", run)
    assert (
        status == 0 and "did not end" in out and "metrics.jsonl:22: no JSON object, skipped" in out
    )


def test_resumed_as_something_else(add, tmp_path):
    """A record is one source on one machine from its first step."""
    home = tmp_path / "records"
    other = make_run(tmp_path / "r0", resumed=(10,), again=dict(source=ANOTHER))
    refused(add(other), home, other, "resumed with another source", "run it anew")
    newer = ENVIRONMENT | dict(torch="2.14.0", threads=1)
    other = make_run(tmp_path / "r1", resumed=(10,), again=dict(environment=newer))
    refused(
        add(other), home, other, "resumed with another environment.t", "'2.14.0' (was '2.13.0')"
    )
    log = other / "log.txt"
    for changed in (
        "config.steps 60 (was 30)",
        "config.keep_last 3 (was 2), config.target 3 (was 4)",
    ):
        log.write_text(
            re.sub("^resumed with .*$", f"resumed with {changed}", log.read_text(), flags=re.M)
        )
        refused(
            add(other), home, other, f"it was resumed with {changed.split(', ')[-1]}", "run it anew"
        )
    other = make_run(tmp_path / "r2", resumed=(10,))
    edit(other, "result.json", "resumed_at", "was_at")
    refused(add(other), home, "log.txt says it was resumed from steps [10], result.json []")
    other = make_run(tmp_path / "r3")
    edit(other, "result.json", '"resumed_at": []', '"resumed_at": "yes"')
    refused(add(other), home, "result.json yes")
    other = make_run(tmp_path / "r4", warm_start="/somewhere/else")
    refused(add(other), home, "began with the weights of /somewhere/else")
    other = make_run(tmp_path / "r5", resumed=(10,))
    for name in ("log.txt", "metrics.jsonl"):
        lines = (other / name).read_text().splitlines(keepends=True)
        (other / name).write_text(
            "".join(
                line
                for line in lines
                if not line.startswith(
                    tuple(f"step:{i}/" for i in range(1, 11))
                    + tuple(f'{{"step": {i},' for i in range(1, 11))
                )
            )
        )
    refused(
        add(other), home, "its log begins at step 11, resumed from a checkpoint in another folder"
    )


def test_settings_that_are_free_may_change_where_it_was_resumed(add, tmp_path):
    config = dict(
        track="toy",
        target=3.28,
        target_metric="val_loss",
        steps=30,
        seed=0,
        eval_every=10,
        batch_tokens=[1000],
        run_dir=str(tmp_path / "r"),
        cache_dir="/home/someone/.cache",
        text="",
        resume="auto",
    )
    run = make_run(
        tmp_path / "r",
        resumed=(10,),
        again=dict(config=config | dict(cache_dir="/home/else/.cache")),
    )
    said = "resumed with config.cache_dir '/home/else/.cache' (was '/home/someone/.cache')"
    assert said in (run / "log.txt").read_text()
    assert add(run)[0] == 0


def test_how_a_run_was_kept_alive_is_not_its_recipe(add, tmp_path, capsys):
    runs = [
        make_run(
            tmp_path / f"r{i}",
            i,
            losses=(5.0, 4.0, 3.2 + i / 100),
            resume=["", "auto"][i],
            keep_last=i,
            checkpoint_every=["10m", "5"][i],
            keep_best=i,
            max_restarts=i,
            recompute=["on", "off"][i],
        )
        for i in range(2)
    ]
    assert add(*runs)[0] == 0
    assert "differs" not in main(capsys, "check", *runs)[2]


def test_steps_that_did_not_count_have_no_loss(add, tmp_path):
    """NaN in log.txt, as the field writes it, is null in JSON."""
    run = make_run(tmp_path / "r")
    for value in ("nan", "inf", "-inf"):
        edit(run, "log.txt", "step:7/30 train_loss:5.1429", f"step:7/30 train_loss:{value}")
        if value == "nan":
            edit(run, "metrics.jsonl", '"train_loss": 5.142857142857143', '"train_loss": null')
        assert add(run, name=f"with {value}".replace("-", "minus "))[0] == 0
        edit(run, "log.txt", f"train_loss:{value}", "train_loss:5.1429")
    refused(add(run), tmp_path / "nothing", "train_loss:nan")


# --- what is refused: unfinished, cut or altered runs


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl", "result.json", ARCHIVE])
def test_missing_file(add, tmp_path, name):
    run = make_run(tmp_path / "r")
    (run / name).unlink()
    refused(add(run), tmp_path / "records", run, f"has no {name}")


def test_the_configuration_is_in_the_log_as_well(add, tmp_path):
    run = make_run(tmp_path / "r")
    (run / "config.json").unlink()
    assert add(run)[0] == 0


def test_a_source_that_the_run_did_not_have(add, tmp_path, capsys):
    """The archive of another run, here and in a record."""
    run = make_run(tmp_path / "r")
    assert add(run)[0] == 0
    folder = tmp_path / "records/toy/2026-03-04_a-name"
    for place, seed in ((run, run), (folder, folder / "seed0")):
        (place / ARCHIVE).write_bytes(ANOTHER.archive)
        for command in (("check", seed), ("add", seed, "--name", "x", "--records", tmp_path / "x")):
            status, out, err = main(capsys, *command)
            assert (status, out, err.count("\n")) == (2, "", 1)
            assert "is not the source that the run was made from" in err and ARCHIVE in err
    assert main(capsys, "leaderboard", "--records", tmp_path / "records")[0] == 2
    assert main(capsys, "compare", run)[0] == 0  # only reads losses


def test_check_says_whether_logs_belong_to_their_source(add, tmp_path, capsys):
    runs = [make_run(tmp_path / f"r{i}", i, (5.0, 4.0, 3.2 + i / 100)) for i in range(3)]
    assert add(*runs)[0] == 0
    folder = tmp_path / "records/toy/2026-03-04_a-name"
    out = main(capsys, "check", folder)[1]
    said = f"the logs of 3 runs name sha256 {SOURCE.digest[:16]}..., and that is {folder / ARCHIVE}"
    assert f"\nsource: {said}\n" in out
    (folder / ARCHIVE).unlink()
    out = main(capsys, "check", folder)[1]
    assert out.count(f"names {ARCHIVE}, which is not beside it") == 3 and "source:" not in out


def test_two_digests_in_one_log(add, tmp_path):
    run = make_run(tmp_path / "r")
    for name in ("log.txt", "config.json"):
        edit(run, name, f'"source": "{SOURCE.digest}"', f'"source": "{ANOTHER.digest}"')
    refused(add(run), tmp_path / "records", run, "and describes another")


def test_no_such_folder(add, tmp_path):
    refused(
        add(tmp_path / "nowhere"), tmp_path / "records", "nowhere", "expected the folder of a run"
    )


def edit(run, name, old, new):
    text = (run / name).read_text()
    assert old in text
    (run / name).write_text(text.replace(old, new))


ALTERED = {
    "loss in the result": ("result.json", '"val_loss": 3.2,', '"val_loss": 3.1,'),
    "bits per byte in the result": ("result.json", '"val_bpb": 1.6,', '"val_bpb": 1.5,'),
    "time in the result": ("result.json", '"train_time_s": 3.0,', '"train_time_s": 2.0,'),
    "steps in the result": ("result.json", '"steps": 30,', '"steps": 20,'),
    "reached in the result": ("result.json", '"reached": true', '"reached": false'),
    "target in the result": ("result.json", '"target": 3.28', '"target": 3.38'),
    "seed in the result": ("result.json", '"seed": 0', '"seed": 1'),
    "data in the result": (
        "result.json",
        '"data_fingerprint": "f00d"',
        '"data_fingerprint": "f00e"',
    ),
    "last validation in the log": (
        "log.txt",
        "step:30/30 val_loss:3.2000",
        "step:30/30 val_loss:3.1000",
    ),
    "a time in the log": ("log.txt", "train_time:1500ms", "train_time:1400ms"),
    "a step less in the log": (
        "log.txt",
        "step:30/30 val_loss:3.2000",
        "# step:30/30 val_loss:3.2000",
    ),
    "last validation in the metrics": ("metrics.jsonl", '"val_loss": 3.2,', '"val_loss": 3.1,'),
    "a time in the metrics": ("metrics.jsonl", '"train_time": 1.5}', '"train_time": 1.4}'),
    "configuration": ("config.json", '"eval_every": 10', '"eval_every": 5'),
    "steps in the configuration": ("config.json", '"steps": 30', '"steps": 31'),
    "no number": ("result.json", '"val_loss": 3.2,', '"val_loss": "low",'),
    "no JSON": ("metrics.jsonl", '{"step": 15,', '{"step": 15'),
    "a field less": ("result.json", '"params": 12,', ""),
}


@pytest.mark.parametrize("what", ALTERED)
def test_files_that_contradict_each_other(add, tmp_path, what):
    run = make_run(tmp_path / "r")
    edit(run, *ALTERED[what])
    refused(add(run), tmp_path / "records", run)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_cut_file(add, tmp_path, name, share):
    run = make_run(tmp_path / "r")
    content = (run / name).read_bytes().rstrip()
    (run / name).write_bytes(content[: int(share * len(content)) - 1 if share else 0])
    if (name, share) != (
        "log.txt",
        0.999,
    ):  # then only the last line's bits per byte are short of digits
        refused(add(run), tmp_path / "records", run)


def test_not_text_and_too_large(add, tmp_path):
    run = make_run(tmp_path / "r")
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    refused(add(run), tmp_path / "records", run)
    (run / "metrics.jsonl").write_bytes(b" " * 10_000_001)
    refused(add(run), tmp_path / "records", run, "at most 10,000,000 bytes")


def test_no_target_and_no_track(add, tmp_path):
    refused(add(make_run(tmp_path / "r0", target=None)), tmp_path / "records", "has no target")
    refused(add(make_run(tmp_path / "r1", track="")), tmp_path / "records", "has no track")
    refused(
        add(make_run(tmp_path / "r2", track="../../elsewhere")),
        tmp_path / "records",
        "expected a track's name",
    )


# --- what is refused: runs that are not one record


@pytest.mark.parametrize(
    "what, fields",
    [
        ("config.muon_lr", dict(muon_lr=0.5)),
        ("config.track", dict(track="toy2")),
        ("config.steps", dict(steps=40)),
        ("config.target", dict(target=3.29)),
        ("environment.device", dict(environment=dict(device="Another CPU"))),
        ("environment.torch", dict(environment=dict(torch="2.14.0"))),
        ("environment.git_commit", dict(environment=dict(git_commit="f" * 40))),
    ],
)
def test_runs_that_differ_in_more_than_the_seed(add, tmp_path, what, fields):
    runs = (
        make_run(tmp_path / "r0", muon_lr=0.1),
        make_run(tmp_path / "r1", seed=1, **(dict(muon_lr=0.1) | fields)),
    )
    if "device" in what:
        edit(runs[1], "result.json", "Some CPU", "Another CPU")
    refused(add(*runs), tmp_path / "records", *runs, what)


def test_other_data_and_other_source(add, tmp_path):
    runs = make_run(tmp_path / "r0"), make_run(tmp_path / "r1", seed=1)
    other = make_run(tmp_path / "other", seed=1, source=ANOTHER)
    refused(add(runs[0], other), tmp_path / "records", "source differs; runs of one record")
    for name in ("log.txt", "config.json", "result.json"):
        edit(runs[1], name, "f00d", "beef")
    refused(add(*runs), tmp_path / "records", "data differs ('f00d' and 'beef')")


def test_a_seed_twice(add, tmp_path):
    run = make_run(tmp_path / "r0")
    refused(add(run, run), tmp_path / "records", "expected different seeds, found 0 twice")


# --- what is refused: source that is no commit


@pytest.mark.parametrize(
    "dirty, said", [(True, "uncommitted changes"), (None, "no git repository")]
)
def test_run_without_a_commit(add, tmp_path, dirty, said):
    run = make_run(tmp_path / "r", environment=dict(git_dirty=dirty))
    refused(add(run), tmp_path / "records", run, said, "--allow-dirty")
    assert add(run, "--allow-dirty")[0] == 0
    assert (
        json.loads((tmp_path / "records/toy/2026-03-04_a-name/summary.json").read_text())[
            "git_dirty"
        ]
        is True
    )


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_this_repository(tmp_path, capsys):
    """The commit has to be here, and nothing but records may be uncommitted."""
    home = tmp_path / "records"

    def git(*args):
        identity = [
            "-c",
            "user.name=x",
            "-c",
            "user.email=x@example.org",
            "-c",
            "commit.gpgsign=false",
        ]
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *args], check=True, capture_output=True, text=True
        ).stdout.strip()

    def add(name):
        return main(capsys, "add", run, "--name", name, "--records", home)

    home.mkdir()
    (home / "code.py").write_text("1")
    (tmp_path / ".gitignore").write_text("run\n")
    git("init", "-q")
    git("add", "."), git("commit", "-q", "-m", "first")
    run = make_run(tmp_path / "run", environment=dict(git_commit="f" * 40))
    assert "is not in this repository" in add("a name")[2]
    shutil.rmtree(run)
    make_run(run, environment=dict(git_commit=git("rev-parse", "HEAD")))
    assert add("a name")[0] == 0
    (home / "README.md").write_text("made from records")
    assert add("a second record")[0] == 0  # the first one, uncommitted, does not stand in the way
    for file in (tmp_path / "new.py", home / "code.py"):
        file.write_text("2")
        status, _, err = add("a third")
        assert status == 2 and file.name in err and "uncommitted changes here" in err
        git("add", file), git("commit", "-q", "-m", "next")
    assert add("a third")[0] == 0


# --- names and interruptions


@pytest.mark.parametrize("name", ["A  NAME!", "a/name", "../a name"])
def test_a_name_that_is_taken(add, tmp_path, name):
    run = make_run(tmp_path / "r")
    assert add(run)[0] == 0
    before = sorted(tmp_path.rglob("*"))
    status, _, err = add(
        make_run(tmp_path / "r1", environment=dict(date="2026-03-05T00:00:00+00:00")), name=name
    )
    assert status == 2 and "2026-03-04_a-name is there already" in err
    assert [p for p in sorted(tmp_path.rglob("*")) if "r1" not in str(p)] == before


@pytest.mark.parametrize("name", ["", "..", "/", "...", "²¾"[1:], "名前"])
def test_a_name_without_letters(add, tmp_path, name):
    result = add(make_run(tmp_path / "r"), name=name)
    if slugify(name):
        assert result[0] == 0
    else:
        refused(result, tmp_path / "records", "expected some letters or digits")


@settings(max_examples=50)
@given(st.text(max_size=200))
def test_slugs_are_safe_folder_names(name):
    slug = slugify(name)
    assert set(slug) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") and len(slug) <= 60
    assert not slug.startswith("-") and not slug.endswith("-") and slugify(slug) == slug


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("at", range(8))
def test_an_interrupted_add_leaves_nothing(add, tmp_path, monkeypatch, error, at):
    """Whichever of the eight files of two runs is being written."""
    runs, writes, write = [make_run(tmp_path / f"r{s}", s) for s in range(2)], [], Path.write_bytes

    def fail(path, *args, **kwargs):
        writes.append(path)
        if len(writes) > at:
            raise error
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_bytes", fail)
    status, out, err = add(*runs)
    assert (status, out) == ((130, "") if error is KeyboardInterrupt else (2, ""))
    assert not (tmp_path / "records/toy").exists()
    if status == 2:
        assert "No space left on device; nothing was added" in err
    monkeypatch.undo()
    assert add(*runs)[0] == 0


def test_a_record_appears_at_once(add, tmp_path, monkeypatch):
    """Renamed when it is whole: without a rename there is no record."""

    def fail(*_):
        raise OSError(18, "Invalid cross-device link")

    run = make_run(tmp_path / "r")
    monkeypatch.setattr(os, "replace", fail)
    refused(add(run), tmp_path / "records", "Invalid cross-device link; nothing was added")


def test_what_a_killed_add_left_is_cleared_away_a_day_later(add, tmp_path):
    stale = tmp_path / "records/toy/2026-03-04_a-name.0123abcd.tmp/seed7"
    stale.mkdir(parents=True)
    assert add(make_run(tmp_path / "r0"), name="first")[0] == 0
    assert stale.is_dir()  # it may be somebody's who is still writing
    os.utime(stale.parent, (0, 0))
    assert add(make_run(tmp_path / "r1"))[0] == 0
    names = ["2026-03-04_a-name", "2026-03-04_first"]
    assert sorted(os.listdir(tmp_path / "records/toy")) == names
    kept = sorted(os.listdir(tmp_path / "records/toy/2026-03-04_a-name"))
    assert kept == ["seed0", ARCHIVE, "summary.json"]
