"""runtime/workers.py: eight processes that do what a rank may do, none of which needs torch. What
began the end is on the screen, with its rank, and all others end with it."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from runtime import workers

# What a worker may do; `does` is a list of lines by rank
WORKER = """
import os, pathlib, signal, struct, sys, time
rank, n = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
folder = pathlib.Path(os.environ["STOPWATCH_WATCH"])
file = os.open(folder / "beats", os.O_WRONLY)
def beat(count, seconds):
    until = time.monotonic() + seconds if seconds else 0.0
    os.pwrite(file, struct.pack("qd", count, until), 16 * rank)
def wait(seconds=60):
    time.sleep(seconds)
def kill(number):
    os.kill(os.getpid(), number)
does = {does!r}
exec(does.get(rank, does["others"]))
"""
LATE = 0.6  # seconds after which a worker of these tests is late


@pytest.fixture
def launch(tmp_path, capfd, monkeypatch):
    """(n, what each does, restarts) -> (status, stderr, seconds)."""
    monkeypatch.setattr(workers, "TO_DIE", 1.0)
    before = signal.getsignal(signal.SIGUSR1)

    def run(n, others, restarts=0, **ranks):
        does = {int(name[4:]): lines for name, lines in ranks.items()} | dict(others=others)
        program = tmp_path / "worker.py"
        program.write_text(WORKER.replace("{does!r}", repr(does)))
        begin = time.monotonic()
        status = workers.launch(program, [], n, restarts)
        return status, capfd.readouterr().err, time.monotonic() - begin

    yield run
    signal.signal(signal.SIGUSR1, before)


def test_eight_ranks_that_end_well_end_without_a_word(launch):
    """They meet at this machine's own address, since its name need not lead anywhere."""
    check = "assert n == 8 and os.environ['LOCAL_RANK'] == str(rank)\n"
    check += "assert os.environ['MASTER_ADDR'] == '127.0.0.1' and int(os.environ['MASTER_PORT'])"
    assert launch(8, check)[:2] == (0, "")


def test_eight_ranks_end_with_one_that_is_killed(launch):
    """Those who lose it leave its name to the launcher, also if they are gone before it is seen."""
    lose = "while not (folder / 'gone').exists(): wait(0.02)\n"
    lose += "(folder / f'lost.{rank}').write_text('reset by peer'); sys.exit(1)"
    dies = "(folder / 'gone').touch(); kill(signal.SIGKILL)"
    status, said, _ = launch(8, lose, rank3=dies)
    assert status in (1, 137)
    assert said.startswith("error: rank 3 of 8 was killed by SIGKILL: ") and said.count("\n") == 1


def test_eight_ranks_end_with_one_that_is_stopped(launch):
    """Nobody but the launcher can say so: it is alive, and the others wait in a collective."""
    status, said, seconds = launch(
        8, f"beat(1, {LATE}); wait()", rank5=f"beat(1, {LATE}); kill(signal.SIGSTOP)"
    )
    assert status == 1 and said.count("\n") == 1
    assert said.startswith("error: rank 5 is stopped (SIGSTOP), and") and seconds < 30


def test_eight_ranks_end_with_one_that_hangs(launch):
    """It has gone on less often than those who wait for it."""
    status, said, _ = launch(8, f"beat(7, {LATE}); wait()", rank6=f"beat(6, {LATE}); wait()")
    assert status == 1
    assert said.startswith("error: rank 6 is hanging") and said.count("\n") == 1
    _, said, _ = launch(2, f"beat(7, {LATE}); wait()")
    assert said.startswith("error: none of the 2 processes goes on")


def test_eight_ranks_wait_for_one_that_has_something_else_to_do(launch):
    """One that fetches data, or saves, has set no time."""
    waits = f"beat(5, {LATE / 4})\nwhile not (folder / 'there').exists(): wait(0.02)"
    fetches = f"beat(1, 0); wait({LATE * 2}); (folder / 'there').touch(); wait({LATE})"
    assert launch(8, waits, rank0=fetches)[:2] == (0, "")


def test_eight_ranks_end_with_one_that_raises(launch):
    """Its own line, and the launcher's; a worker that takes no notice of SIGTERM is killed."""
    raises = "print('error: rank 2: ValueError', file=sys.stderr); sys.exit(1)"
    status, said, _ = launch(8, "wait()", rank2=raises)
    assert status == 1
    assert said == "error: rank 2: ValueError\nerror: rank 2 of 8 ended with status 1\n"


def test_a_worker_that_takes_no_notice_is_killed(launch, monkeypatch):
    monkeypatch.setattr(workers, "TO_END", 0.3)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); wait()"
    fails = "wait(0.5); sys.exit(7)"
    status, said, seconds = launch(2, deaf, rank1=fails)
    assert status == 7 and seconds < 30 and said == "error: rank 1 of 2 ended with status 7\n"


def test_an_error_that_was_said_needs_no_more_words_and_no_restart(launch, tmp_path):
    count = f"open({str(tmp_path / 'count')!r}, 'a').write('x'); sys.exit(2)"
    assert launch(2, count, restarts=3)[:2] == (2, "")
    assert (tmp_path / "count").read_text() == "xx"


def test_all_lost_each_other(launch):
    lose = "(folder / f'lost.{rank}').write_text('link down'); sys.exit(1)"
    status, said, _ = launch(2, lose)
    assert status == 1
    assert said.endswith("of 2 has lost the others: link down\n") and said.count("\n") == 1


def test_workers_begin_again(launch):
    fails = "sys.exit(9 if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' else 0)"
    status, said, _ = launch(2, fails, restarts=1)
    assert status == 0 and "ended with status 9" in said
    assert launch(2, "sys.exit(9)", restarts=1)[0] == 9


def test_signals_are_passed_on(launch):
    """Workers have time to save; what they end with is not what counts."""
    saves = "signal.signal(signal.SIGTERM, lambda *args: sys.exit(143)); wait()"
    timer = threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGTERM])
    timer.start()
    assert launch(2, saves, restarts=3)[:2] == (143, "")


def test_a_launcher_that_was_suspended_is_patient(launch, monkeypatch):
    """After Ctrl-Z and fg every worker is late, and none hangs."""
    monkeypatch.setattr(workers, "PAUSE", -1.0)
    status, said, _ = launch(2, f"beat(1, {LATE / 4}); wait({LATE * 2})")
    assert (status, said) == (0, "")


# --------------------------------------------------------------------------------------------------
# Which GPUs there are, before torch is there to be asked


@pytest.mark.parametrize(
    "visible, n",
    [(None, 8), ("", 0), ("0,1", 2), ("3, 9, 1", 1), ("GPU-aa,GPU-bb,", 2), ("-1", 0), ("7", 1)],
)
def test_gpus_that_cuda_would_find(monkeypatch, visible, n):
    monkeypatch.setattr(workers, "gpus_of_driver", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert workers.count_gpus() == n


def test_gpus_of_the_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert workers.gpus_of_driver() == 0
    fake = tmp_path / "nvidia-smi"
    fake.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H100'\n"
    )
    fake.chmod(0o755)
    assert workers.gpus_of_driver() == 2
    fake.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert workers.gpus_of_driver() == 0


@pytest.mark.parametrize(
    "gpus, argv, expected",
    [
        (8, [], (8, 0)),
        (8, ["--gpus", "4", "--max-restarts=2"], (4, 2)),
        (8, ["--gpus", "1"], None),
        (1, [], None),
        (0, [], None),
        (8, ["--help"], None),
        (8, ["--gpus", "many"], None),  # the program says what is wrong
        (8, ["--gpus", "9"], None),
    ],
)
def test_processes_are_started_for_all_gpus(monkeypatch, gpus, argv, expected):
    started = []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(workers, "count_gpus", lambda: gpus)
    monkeypatch.setattr(
        workers, "launch", lambda program, argv, n, again: started.append((n, again))
    )
    workers.start_on_all_gpus("train_gpt.py", argv)
    assert started == ([expected] if expected else [])
    monkeypatch.setenv("RANK", "3")
    assert workers.start_on_all_gpus("train_gpt.py", argv) is None


def test_the_launcher_does_without_torch():
    """Eight processes begin at once, and not after the launcher's own imports."""
    check = (
        "import runtime.workers, door, sys; assert 'torch' not in sys.modules, sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)
