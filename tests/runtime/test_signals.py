"""Signals end a run with its work saved, with one process and with several, with and without
torchrun."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, SMALL_MODEL, options, tiny
from processes import alive, remains, rows, same, wait_for

from runtime import checkpoints

SMALL = SMALL_MODEL | dict(steps=12, eval_every=6, checkpoint_every="10m")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
ENV = os.environ | {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


@pytest.fixture(scope="module")
def whole(nursery, text, tmp_path_factory):
    """Folders of the uninterrupted run, with one process and with two."""
    tmp = tmp_path_factory.mktemp("whole")
    for n in (1, 2):
        c = tiny(text, tmp, run_dir=str(tmp / str(n)), **SMALL)
        assert nursery.run(options(c), tmp / "output", ranks=n).status == 0
    return tmp


def steps_logged(run_dir):
    return max((row["step"] for row in rows(run_dir)), default=0)


def goes_on(nursery, argv, name, tmp_path, whole, ranks=1):
    """Resume and compare with the uninterrupted run."""
    done = nursery.run([*argv(name), "--resume", "auto"], tmp_path / "output", ranks=ranks)
    assert done.status == 0, done.err
    same(tmp_path / name, whole / str(ranks))
    assert remains(tmp_path / name) == []


# --------------------------------------------------------------------------------------------------
# One process


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopping_finishes_the_step_and_saves(nursery, argv, tmp_path, whole, number, status):
    """However the signal falls: it is sent by somebody else, in the middle of a step of 0.1 s."""
    run = nursery.start(argv("run"), tmp_path / "output", step=0.1)
    run.until(lambda: steps_logged(tmp_path / "run") >= 2).kill(number).wait()
    assert run.status == status and run.out == ""
    stopped = int(
        re.search(r"stopped at step (\d+) by a signal; --resume \S+ goes on from there", run.err)[1]
    )
    assert steps_logged(tmp_path / "run") == stopped < 12
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step*")] == [f"step-{stopped:06d}"]
    assert (
        "stopping after this step; once more to stop at once" in run.err
        and "Traceback" not in run.err
    )
    goes_on(nursery, argv, "run", tmp_path, whole)


def test_a_second_signal_stops_at_once(nursery, argv, tmp_path, whole):
    """Here amid the step, which takes half a minute; what had been saved before is there."""
    first = nursery.run(argv("run"), tmp_path / "output", at=(2, signal.SIGTERM))
    assert first.status == 143
    run = nursery.start(
        [*argv("run"), "--resume", "auto"], tmp_path / "output", step=30, at=(4, signal.SIGTERM)
    )
    run.until(lambda: "resumed from step 3" in run.err and "training on" in run.err)
    time.sleep(1)
    run.kill(signal.SIGTERM)  # the first one
    run.until(lambda: "stopping after this step" in run.err)
    time.sleep(0.2)
    run.kill(
        signal.SIGINT
    )  # too soon to be meant: a terminal and a launcher may send the same one twice
    time.sleep(1.1)
    assert all(map(alive, run.pids))
    start = time.monotonic()
    run.kill(signal.SIGINT).wait()
    assert run.status == 130 and time.monotonic() - start < 5
    assert [p.name for p in (tmp_path / "run/checkpoints").glob("step*")] == ["step-000003"]
    goes_on(nursery, argv, "run", tmp_path, whole)


def test_a_second_signal_during_the_last_save_loses_that_save_only(nursery, argv, tmp_path, whole):
    run = nursery.start(argv("run"), tmp_path / "output", step=0.05, fsync=[30])
    run.until(lambda: steps_logged(tmp_path / "run") >= 2).kill(signal.SIGTERM)
    run.until(lambda: any((tmp_path / "run/checkpoints").glob("*.aside/state.json")))
    time.sleep(1.2)
    assert run.kill(signal.SIGTERM).wait().status == 143
    assert not any((tmp_path / "run/checkpoints").glob("step-??????"))
    goes_on(nursery, argv, "run", tmp_path, whole)


def test_usr1_saves_and_goes_on(nursery, argv, tmp_path, whole):
    run = nursery.start(argv("run", keep_last=9), tmp_path / "output", step=0.05)
    for n in (1, 2):
        run.until(lambda: steps_logged(tmp_path / "run") >= 3 * n).kill(signal.SIGUSR1)
        run.until(lambda: len(list((tmp_path / "run/checkpoints").glob("step-??????"))) == n)
    assert run.wait().status == 0, run.err
    saved = sorted(int(p.name[-6:]) for p in (tmp_path / "run/checkpoints").glob("step-??????"))
    assert len(saved) == 3 and saved[-1] == 12
    same(tmp_path / "run", whole / "1")


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_before_training_there_is_nothing_to_save(nursery, argv, text, tmp_path, number, status):
    """While data is prepared: a text that takes many seconds."""
    big = tmp_path / "big.txt"
    big.write_text(text.read_text() * 500)
    more = ["--text", str(big), "--tokenizer", "bpe:4096"]
    run = nursery.start([*argv("run"), *more], tmp_path / "output")
    run.until((tmp_path / "cache/data").exists).kill(number).wait()
    assert (run.status, run.out) == (status, "") and "Traceback" not in run.err, run.err
    assert not (tmp_path / "run").exists()


def test_a_signal_when_nobody_reads_stderr_any_more(nursery, argv, tmp_path, whole):
    """Ctrl-C in `./run.sh 2>&1 | tee log.txt` ends tee first."""
    done = nursery.run(argv("run"), tmp_path / "output", at=(4, signal.SIGINT), stderr="broken")
    assert done.status == 130
    assert "stopped at step 5 by a signal" in (tmp_path / "run/log.txt").read_text()
    goes_on(nursery, argv, "run", tmp_path, whole)


def test_a_lost_terminal_stops_like_a_signal_unless_that_is_ignored(nursery, argv, tmp_path, whole):
    """SIGHUP; nohup makes it ignored."""
    done = nursery.run(argv("run"), tmp_path / "output", at=(4, signal.SIGHUP))
    assert done.status == 129 and "stopped at step 5" in done.err
    goes_on(nursery, argv, "run", tmp_path, whole)
    done = nursery.run(argv("nohup"), tmp_path / "output", at=(4, signal.SIGHUP), nohup=True)
    assert done.status == 0
    same(tmp_path / "nohup", whole / "1")


def test_without_checkpoints_nothing_is_promised(nursery, argv, tmp_path):
    done = nursery.run(
        argv("off", checkpoint_every="off"), tmp_path / "output", at=(4, signal.SIGTERM)
    )
    assert (
        done.status == 143
        and "stopped at step 5 by a signal" in done.err
        and "--resume" not in done.err
    )


def test_a_last_save_that_fails_promises_nothing(nursery, argv, tmp_path):
    done = nursery.run(argv("run"), tmp_path / "output", at=(4, signal.SIGTERM), limit=100_000)
    assert done.status == 143 and "could not write the checkpoint of step 5" in done.err
    assert "goes on from there" not in done.err and "still being written" not in done.err


def test_a_finished_run_is_not_undone_by_a_signal(nursery, argv, tmp_path, whole):
    """One that comes while the result is written ends nothing any more."""
    run = nursery.start(argv("run"), tmp_path / "output", fsync=[0.1])
    run.until(lambda: (tmp_path / "run/checkpoints/step-000012").exists()).kill(
        signal.SIGTERM
    ).wait()
    assert run.status in (0, 143)
    goes_on(nursery, argv, "run", tmp_path, whole)


def listens(port):
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_waits_for_others_can_be_stopped(nursery, argv, tmp_path, number):
    """They never come, and it waits in a call that no handler of Python's interrupts."""
    with socket.create_server(("", 0)) as s:
        port = s.getsockname()[1]
    env = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run = nursery.start(argv("run"), tmp_path / "output", env=list(env.items()))
    run.until(lambda: listens(port)).kill(number).until(lambda: False, seconds=20).wait()
    assert run.status == -number and "Traceback" not in run.err


def test_a_port_of_another_program(nursery, argv, tmp_path):
    with socket.create_server(("", 0)) as s:
        port = s.getsockname()[1]
        env = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        run = nursery.run(argv("run"), tmp_path / "output", env=list(env.items()))
    assert run.status == 2
    line = f"error: rank 0: the 2 processes cannot meet at 127.0.0.1:{port}: "
    assert run.err.splitlines()[-1].startswith(line) and "Traceback" not in run.err


def test_stopping_one_of_several_seeds(nursery, argv, tmp_path):
    seeds = dict(repeat=3, steps=4, checkpoint_every="1")
    whole = nursery.run(argv("whole", **seeds), tmp_path / "output")
    run = nursery.start(argv("run", **seeds), tmp_path / "output", step=0.1)
    run.until(lambda: steps_logged(tmp_path / "run/seed1") >= 1).kill(signal.SIGTERM).wait()
    assert run.status == 143 and run.out.count("\n") == 1  # the first one's result
    done = nursery.run([*argv("run", **seeds), "--resume", "auto"], tmp_path / "output")
    assert done.status == whole.status == 0 and done.out.count("\n") == 3
    for seed in (0, 1, 2):
        same(tmp_path / f"run/seed{seed}", tmp_path / f"whole/seed{seed}")


# --------------------------------------------------------------------------------------------------
# Several


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all(nursery, argv, tmp_path, whole, rank):
    run = nursery.start(argv("run"), tmp_path / "output", ranks=2, step=0.05)
    run.until(lambda: steps_logged(tmp_path / "run") >= 2).kill(signal.SIGTERM, rank).wait()
    assert run.statuses == [143, 143], run.err
    goes_on(nursery, argv, "run", tmp_path, whole, ranks=2)


def test_nobody_leaves_while_the_first_one_saves(nursery, argv, tmp_path, whole):
    """torchrun would send those left a second signal, which ends them at once. The first one's
    disk is slow here."""
    run = nursery.start(argv("run"), tmp_path / "output", ranks=2, step=0.05, fsync=[0.5])
    run.until(lambda: steps_logged(tmp_path / "run") >= 2).kill(signal.SIGTERM, rank=0)
    run.until(lambda: any((tmp_path / "run/checkpoints").glob("*.aside/state.json")))
    time.sleep(1)
    assert not any((tmp_path / "run/checkpoints").glob("step-??????")) and all(map(alive, run.pids))
    assert run.wait().statuses == [143, 143], run.err
    goes_on(nursery, argv, "run", tmp_path, whole, ranks=2)


def workers(pid):
    """Process ids of the children."""
    return [
        int(n)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for n in (task / "children").read_text().split()
    ]


@pytest.mark.slow
def test_gpus_n_restarts_after_a_kill_and_stops_for_a_signal(nursery, argv, tmp_path):
    """What --gpus 2 --max-restarts 1 does: a worker is killed, both begin again by themselves
    from the last checkpoint; then the launcher gets SIGUSR1, which is not for it, and SIGTERM,
    which is for all."""
    long = dict(steps=60, eval_every=20, checkpoint_every="5")
    assert nursery.run(argv("whole", **long), tmp_path / "output", ranks=2).status == 0
    slow = tmp_path / "slow"  # Python imports it when it starts; nothing in the program knows of it
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import os, time\nreal = os.fsync\nos.fsync = lambda fd: (time.sleep(0.02), real(fd))[1]\n"
    )
    run_dir = tmp_path / "run"
    run = nursery.start(
        argv("run", **long), tmp_path / "output", launch=(2, 1), env=[("PYTHONPATH", str(slow))]
    )
    run.until(lambda: any((run_dir / "checkpoints").glob("step-??????")), 240)
    os.kill(workers(run.pids[0])[-1], signal.SIGKILL)
    run.until(
        lambda: (
            "resumed from step" in run.err and "training on" in run.err.rsplit("resumed from", 1)[1]
        ),
        240,
    )
    at = steps_logged(run_dir)
    run.until(lambda: steps_logged(run_dir) > at).kill(signal.SIGUSR1)
    time.sleep(0.05)
    run.kill(signal.SIGTERM).wait()
    assert run.status in (143, 0), run.err  # 0: all 60 steps were through by then
    if run.status == 143:
        assert len(re.findall("stopped at step", run.err)) == 1
        done = nursery.run([*argv("run", **long), "--resume", "auto"], tmp_path / "output", ranks=2)
        assert done.status == 0, done.err
    same(run_dir, tmp_path / "whole")
    result = json.loads((run_dir / "result.json").read_text())
    assert len(result["resumed_at"]) == 1 + (run.status == 143)


@pytest.mark.slow
def test_a_launcher_that_is_killed_takes_its_workers_along(nursery, argv, tmp_path):
    """They save and end, rather than hold the run's folder and the GPUs as nobody's processes."""
    run = nursery.start(
        argv("run", steps=1000, eval_every=1000), tmp_path / "output", launch=(2, 0)
    )
    run.until(lambda: steps_logged(tmp_path / "run") >= 2, 240)
    orphans = workers(run.pids[0])
    run.kill().wait()
    wait_for(lambda: not any(map(alive, orphans)))
    assert "stopped at step" in (tmp_path / "run/log.txt").read_text().rsplit("training on", 1)[1]
    assert checkpoints.latest(tmp_path / "run/checkpoints")


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torchrun", "first", "second"])
def test_torchrun_and_a_signal(argv, nursery, tmp_path, to):
    """As a cluster does it."""
    long = dict(steps=300, eval_every=100)
    assert nursery.run(argv("whole", **long), tmp_path / "output", ranks=2).status == 0
    run = subprocess.Popen(
        [sys.executable, *TORCHRUN, ROOT / "train_gpt.py", *argv("run", **long)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    wait_for(lambda: steps_logged(tmp_path / "run") >= 3 or run.poll() is not None, 240)
    pids = dict(zip(("first", "second"), workers(run.pid)), torchrun=run.pid)
    os.kill(pids[to], signal.SIGTERM)
    out, err = run.communicate(timeout=120)
    assert run.returncode != 0 and out == ""
    assert len(re.findall("stopped at step", err)) == 1, err
    done = nursery.run([*argv("run", **long), "--resume", "auto"], tmp_path / "output", ranks=2)
    assert done.status == 0, done.err
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_torchrun_restarts_until_it_may_not(argv, tmp_path):
    """Killed as often as it may begin again and once more; the next start of the same command
    goes on."""
    long = dict(steps=60, eval_every=20, checkpoint_every="5")
    command = [
        sys.executable,
        *TORCHRUN,
        "--max-restarts=1",
        ROOT / "train_gpt.py",
        *argv("run", **long),
        "--resume",
        "auto",
    ]
    for kills in (2, 0):
        run = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV
        )
        for _ in range(kills):
            before = len(list((tmp_path / "run").rglob("complete")))
            at, known = steps_logged(tmp_path / "run"), set(workers(run.pid))
            wait_for(
                lambda: set(workers(run.pid)) - known and steps_logged(tmp_path / "run") > at, 240
            )
            assert before >= 0 and run.poll() is None
            os.kill(workers(run.pid)[-1], signal.SIGKILL)
        out, err = run.communicate(timeout=240)
        assert (run.returncode == 0) == (kills == 0), err
    assert json.loads(out)["steps"] == 60
