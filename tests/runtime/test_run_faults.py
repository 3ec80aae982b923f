"""What goes wrong on real machines: processes that are killed, disks that fill up or lie, clocks
that jump."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
from helpers import ROOT, SMALL_MODEL, options, tiny
from processes import alive, remains, rows, same, wait_for

import train_gpt as tg
from runtime import checkpoints

SMALL = SMALL_MODEL | dict(steps=12, eval_every=4, checkpoint_every="2", adam_every=2)


@pytest.fixture(scope="module")
def whole(nursery, text, tmp_path_factory):
    """The uninterrupted run, and how long it took."""
    tmp = tmp_path_factory.mktemp("whole")
    argv = options(tiny(text, tmp, run_dir=str(tmp / "run"), **SMALL))
    nursery.run(
        [*argv, "--steps", 2, "--run-dir", tmp / "first"], tmp / "output"
    )  # prepares the data
    start = time.monotonic()
    done = nursery.run(argv, tmp / "output")
    assert done.status == 0, done.err
    return tmp / "run", time.monotonic() - start


# --------------------------------------------------------------------------------------------------
# Killed


def kill_until_done(nursery, argv, tmp_path, whole, seed, jobs):
    """Kill a run after random times, until it is through. Returns what each kill hit ("start",
    "training", "write") and the steps from which it has gone on."""
    reference, seconds = whole
    r, name, hit = random.Random(seed), f"run{seed}", []
    folder = tmp_path / name
    while True:
        options = argv(name, keep_best=seed % 2, checkpoint_every=r.choice(["1", "2", "3"]))
        run = nursery.start([*options, "--resume", "auto"], tmp_path / "output", **r.choice(jobs))
        until = (
            time.monotonic() + r.uniform(0, 1.5 + len(hit) / 4) * seconds
        )  # ever later: slow disks take long
        while alive(run.pids[0]) and time.monotonic() < until:
            time.sleep(0.001)
        run.kill().wait()
        if run.status == 0:
            break
        assert run.status == -signal.SIGKILL, run.err
        hit.append(
            "write"
            if any("aside" in x or x.endswith(".tmp") for x in remains(folder))
            else "training"
            if rows(folder)
            else "start"
        )
        assert len(hit) < 60, f"no progress: {hit}"
    same(folder, reference)
    assert remains(folder) == []
    resumed_at = run.result["resumed_at"]
    assert resumed_at == sorted(resumed_at)
    return hit, resumed_at


SLOW_DISK = dict(fsync=[0.03])


def test_killed_again_and_again(nursery, argv, tmp_path, whole):
    hits, resumed, seed = [], [], 0
    while len(hits) < 12 or not resumed:
        hit, resumed_at = kill_until_done(nursery, argv, tmp_path, whole, seed, [{}, SLOW_DISK])
        hits, resumed, seed = hits + hit, resumed + resumed_at, seed + 1
        assert seed < 40, hits  # how many a slow disk needs is chance


@pytest.mark.slow
def test_a_hundred_runs_killed_at_random(nursery, argv, tmp_path, whole, capfd):
    """Each at least once: until there have been a hundred of them that were."""
    hits, resumed, seed, killed = [], [], 1000, 0
    while killed < 100:
        hit, resumed_at = kill_until_done(
            nursery, argv, tmp_path, whole, seed, [{}, SLOW_DISK, dict(fsync=[0.1])]
        )
        shutil.rmtree(tmp_path / f"run{seed}")
        hits, resumed, seed, killed = hits + hit, resumed + resumed_at, seed + 1, killed + bool(hit)
    with capfd.disabled():
        print(
            f"\n{killed} runs, {len(hits)} kills:",
            {where: hits.count(where) for where in sorted(set(hits))},
            f"gone on from {len(resumed)} checkpoints",
        )
    assert hits.count("write") > 20 and len(resumed) > 50


def test_killed_between_the_weights_and_the_result(nursery, argv, tmp_path, whole, monkeypatch):
    """The result is what says that a run has finished, so it comes last."""
    import safetensors.torch

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(safetensors.torch, "save_file", killed)
        tg.main(argv("run"))
    assert not (tmp_path / "run/result.json").exists()
    done = nursery.run([*argv("run"), "--resume", "auto"], tmp_path / "output")
    assert done.status == 0, done.err
    same(tmp_path / "run", whole[0])
    assert remains(tmp_path / "run") == []


@pytest.mark.slow
def test_several_processes_killed_together_again_and_again(nursery, argv, tmp_path):
    job = dict(ranks=2)
    assert nursery.run(argv("whole"), tmp_path / "output", **job).status == 0
    r, kills = random.Random(0), 0
    while kills < 5:
        run = nursery.start(
            [*argv("run"), "--resume", "auto"], tmp_path / "output", step=0.03, **job
        )
        n = len(rows(tmp_path / "run"))
        run.until(lambda: len(rows(tmp_path / "run")) > n)
        time.sleep(r.uniform(0, 0.15))
        kills += 1
        if run.kill(each=True).wait().statuses != [-9, -9]:
            break
    assert kills >= 2
    done = nursery.run([*argv("run"), "--resume", "auto"], tmp_path / "output", **job)
    assert done.status == 0, done.err
    same(tmp_path / "run", tmp_path / "whole")
    assert remains(tmp_path / "run") == []


def test_one_of_two_processes_killed_ends_the_other(nursery, argv, tmp_path):
    """Without torchrun, which would end it as well: nobody trains on alone, or waits for ever."""
    run = nursery.start(argv("run"), tmp_path / "output", ranks=2, step=0.05)
    run.until(lambda: len(rows(tmp_path / "run")) >= 3).kill(rank=1).wait()
    assert run.statuses[1] == -9 and run.statuses[0] not in (0, 3)
    assert nursery.run([*argv("run"), "--resume", "auto"], tmp_path / "output", ranks=2).status == 0


def test_a_folder_in_which_somebody_trains(nursery, argv, tmp_path, whole, capsys):
    """A job that is started twice, or again before the first is gone."""
    run = nursery.start(argv("run"), tmp_path / "output", step=0.2)
    run.until(lambda: len(rows(tmp_path / "run")) >= 2)
    assert tg.main([*argv("run"), "--resume", "auto"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"another process is training there (pid {run.pids[0]} on " in err
    assert run.wait().status == 0
    same(tmp_path / "run", whole[0])


# --------------------------------------------------------------------------------------------------
# Disks


def test_a_checkpoint_that_may_not_be_as_large(nursery, argv, tmp_path, whole):
    """A quota: the losses are logged, checkpoints are not written, and training goes on to its
    result."""
    run = nursery.run(argv("run"), tmp_path / "output", limit=100_000)
    assert run.status == 0, run.err
    assert re.search(
        r"could not write the checkpoint of step \d+ \([0-9.]+ MB\): File too large; training",
        run.err,
    )
    assert run.err.count("model.safetensors could not be written") == 1
    assert rows(tmp_path / "run") == rows(whole[0]) and remains(tmp_path / "run") == []


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def fill_up(disk):
    """Leave no block free; returns the file to remove."""
    path = disk / "fill"
    with open(path, "wb", buffering=0) as f, contextlib.suppress(OSError):
        while True:
            f.write(bytes(4096))
    return path


def test_a_disk_that_is_full_from_the_start_to_the_end(nursery, argv, tmp_path, whole, small_disk):
    """Neither log nor checkpoint nor result fit. What was asked for, the result, is on stdout."""
    fill_up(small_disk)
    run = nursery.run(argv("disk/run"), tmp_path / "output")
    assert run.status == 0, run.err
    assert "cannot be written: No space left on device; training goes on" in run.err
    assert "could not write the checkpoint of step" in run.err and "Traceback" not in run.err
    assert run.result["val_loss"] == json.loads((whole[0] / "result.json").read_text())["val_loss"]


def test_a_disk_that_is_full_for_a_while(nursery, argv, tmp_path, whole, small_disk):
    """What could not be written is written later, and the checkpoint there was stays."""
    run_dir = small_disk / "run"
    run = nursery.start(argv("disk/run"), tmp_path / "output", step=0.1)
    run.until(lambda: any((run_dir / "checkpoints").glob("step-??????")))
    fill = fill_up(small_disk)
    before = list((run_dir / "checkpoints").glob("step-??????/complete"))
    run.until(lambda: "could not write the checkpoint" in run.err)
    assert before and all(path.exists() for path in before)
    fill.unlink()
    assert run.wait().status == 0, run.err
    same(run_dir, whole[0])
    assert remains(run_dir) == []


def test_a_read_only_disk_is_refused_before_work(nursery, argv, tmp_path, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    done = nursery.run(argv("disk/run"), tmp_path / "output")
    assert (
        done.status == 2
        and "Read-only file system; choose a folder that can be written" in done.err
    )
    assert done.err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_refused_before_work(nursery, argv, tmp_path):
    (tmp_path / "file").touch()
    done = nursery.run(argv("file/run"), tmp_path / "output")
    assert (
        done.status == 2 and "Not a directory; choose a folder that can be written" in done.err
    ), done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("what", ["checkpoints", "run"])
def test_a_folder_that_vanishes(nursery, argv, tmp_path, whole, what):
    """Somebody cleans up: it is made again with the next checkpoint, log and all."""
    folder = tmp_path / "run" if what == "run" else tmp_path / "run/checkpoints"
    run = nursery.start(argv("run"), tmp_path / "output", step=0.1)
    run.until(lambda: any((tmp_path / "run/checkpoints").glob("step-??????")))
    shutil.rmtree(folder)
    assert run.wait().status == 0, run.err
    same(tmp_path / "run", whole[0])


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "complete"])
def test_an_altered_checkpoint_is_refused_and_what_to_do_is_said(
    nursery, argv, tmp_path, whole, name
):
    """What is said works: the earlier one is taken, and the end is the same."""
    nursery.run(argv("run"), tmp_path / "output", at=(7, signal.SIGTERM))
    older, newest = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    path = newest / name
    data = bytearray(path.read_bytes())
    # In `complete` a digit of a checksum, which stays one
    at = 0 if name == "complete" else len(data) // 2
    data[at] = ord("0") if data[at] == ord("1") else ord("1")
    path.write_bytes(data)
    done = nursery.run([*argv("run"), "--resume", "auto"], tmp_path / "output")
    assert done.status == 2 and done.err.count("\n") == 1, done.err
    assert f"error: {newest}: state." in done.err and f"choose an earlier one: {older}" in done.err
    shutil.rmtree(newest)
    assert nursery.run([*argv("run"), "--resume", "auto"], tmp_path / "output").status == 0
    same(tmp_path / "run", whole[0])


def test_a_checkpoint_copied_in_part_is_passed_over(nursery, argv, tmp_path, whole):
    nursery.run(argv("run"), tmp_path / "output", at=(7, signal.SIGTERM))
    older, newest = sorted((tmp_path / "run/checkpoints").glob("step-*"))
    with open(newest / "state.safetensors", "rb+") as f:
        f.truncate(1000)
    done = nursery.run([*argv("run"), "--resume", "auto"], tmp_path / "output")
    assert done.status == 0 and done.result["resumed_at"] == [int(older.name[-6:])]
    same(tmp_path / "run", whole[0])


def test_a_run_moved_to_another_place_goes_on(nursery, argv, tmp_path, whole):
    """Nothing in it holds an absolute path: copied to another machine, it goes on there."""
    nursery.run(argv("run"), tmp_path / "output", at=(5, signal.SIGTERM))
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere/run")
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "cache")
    done = nursery.run([*argv("elsewhere/run"), "--resume", "auto"], tmp_path / "output")
    assert done.status == 0, done.err
    same(tmp_path / "elsewhere/run", whole[0])


# --------------------------------------------------------------------------------------------------
# Time, numbers


@pytest.mark.parametrize(
    "clock", ["t + 1e9", "0", "t - 1e8 * (int(t * 100) % 2)"], ids=["future", "1970", "jumping"]
)
def test_only_monotonic_clocks_matter(nursery, argv, tmp_path, whole, clock):
    fields = dict(checkpoint_every="600s", max_time="1h")
    run = nursery.run(argv("run", **fields), tmp_path / "output", clock=clock)
    assert run.status == 0, run.err
    assert 0 < run.result["train_time_s"] < 60 and 0 <= run.result["cold_start_s"] < 60
    assert all(
        0 < json.loads(line)["train_time"] < 60
        for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    )
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step*")] == [
        "step-000012"
    ]  # none was due by time
    same(tmp_path / "run", whole[0])


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(nursery, argv, tmp_path):
    """One line that says what to try; the checkpoints are from before, and the run can go on
    with other options."""
    fields = dict(muon_lr=1e30, adam_lr=1e30)
    done = nursery.run(argv("run", **fields), tmp_path / "output")
    assert done.status == 2 and re.search(
        r"error: step \d+: the .* so the run stopped there", done.err
    ), done.err
    assert "Traceback" not in done.err and not (tmp_path / "run/result.json").exists()
    stopped = int(re.search(r"step (\d+):", done.err)[1])
    for path in (tmp_path / "run/checkpoints").glob("step-??????"):
        tensors, meta = checkpoints.load(path)
        assert meta["progress"]["step"] < stopped
        assert all(x.isfinite().all() for name, x in tensors.items() if name.startswith("weights/"))


# --------------------------------------------------------------------------------------------------
# The table


@pytest.mark.parametrize("page, least", [("reliability.md", 25), ("field.md", 30)])
def test_every_test_in_the_table_exists(page, least):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if re.match(r"\| .*::test_", line)]
    assert len(table) >= least
    for line in table:
        for path, name in re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", line):
            assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.M), f"{path}::{name}"
        assert re.search(r"`tests/[\w/]+\.py::test_\w+` \|$", line), (
            f"no test at the end of: {line}"
        )


@pytest.mark.parametrize("end", ["signal", "done", "failed"])
def test_the_slurm_script_passes_signals_on_and_queues_again(tmp_path, end):
    """With stand-ins for Slurm's commands and for Python, which waits for a signal unless it is
    to end by itself."""
    ends = dict(signal="while :; do sleep 0.05; done", done="exit 0", failed="exit 1")[end]
    show = 'if [ "$1" = show ]; then echo first; echo second; '
    scripts = {
        "bin/scontrol": show + 'else echo "$@" > requeued; fi',
        "bin/srun": 'exec "$@"',
        ".venv/bin/python": f'echo "$@" > command; trap "exit 143" TERM; {ends}',
    }
    for path, script in scripts.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / path).chmod(0o755)
    env = os.environ | dict(
        PATH=f"{tmp_path}/bin:{os.environ['PATH']}",
        SLURM_SUBMIT_DIR=str(tmp_path),
        SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="n[1-2]",
        SLURM_NNODES="2",
        SLURM_GPUS_ON_NODE="8",
    )
    job = subprocess.Popen(
        ["bash", ROOT / "docs/slurm.sh", "--track", "gpt2-small"], env=env, cwd="/"
    )
    wait_for(lambda: (tmp_path / "command").exists() or job.poll() is not None)
    if end == "signal":
        time.sleep(0.2)
        job.send_signal(signal.SIGTERM)
    assert job.wait(20) == dict(signal=143, done=0, failed=1)[end]
    assert (tmp_path / "requeued").exists() == (end == "signal")
    command = (tmp_path / "command").read_text()
    for part in (
        "--nnodes=2",
        "--nproc_per_node=8",
        "--rdzv_endpoint=first:29500",
        "--rdzv_id=7.0",
        "train_gpt.py --track gpt2-small --run-dir runs/slurm-7 --resume auto",
    ):
        assert part in command


def test_scripts_for_clusters_are_well_formed():
    import yaml

    script = ROOT / "docs/slurm.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", script]).returncode == 0
    sky = yaml.safe_load((ROOT / "docs/skypilot.yaml").read_text())
    assert {"resources", "setup", "run", "file_mounts"} <= set(sky)
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=sky[part], text=True).returncode == 0
