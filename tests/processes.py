"""Trainers to start, signal and kill by the dozen: forked from a process that has imported
torch, which takes long."""

import contextlib
import ctypes
import getpass
import importlib
import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLONE_NEWNET = 0x40000000


class Nursery:
    """Runs train_gpt.main(argv) in processes of their own, one run at a time. Use as a context
    manager."""

    def __enter__(self):
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "TRITON_INTERPRET": "0",
        }
        self.parent = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=env,
        )
        self.running = None
        return self

    def __exit__(self, *_):
        if self.running:  # a test failed
            self.running.kill(each=True)
        self.parent.stdin.close()
        self.parent.wait(60)

    def start(self, argv, folder, **job):
        """A Run; its stdout and stderr go to files in `folder`. job: see child()."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.running:
            self.running.kill(each=True).wait()
        self.parent.stdin.write(
            json.dumps(dict(argv=[str(a) for a in argv], folder=str(folder), **job)) + "\n"
        )
        self.parent.stdin.flush()
        self.running = Run(self, json.loads(self.parent.stdout.readline()), folder)
        return self.running

    def run(self, argv, folder, **job):
        """The same, ended."""
        return self.start(argv, folder, **job).wait()


class Run:
    """Processes from a Nursery, by rank. statuses, once they have ended: negative for a signal
    that killed one."""

    def __init__(self, nursery, pids, folder):
        self.nursery, self.pids, self.folder, self.statuses = nursery, pids, folder, None

    def wait(self, seconds=200):
        """The same, ended; whoever waits for ever is killed."""
        if self.statuses is None:
            timer = threading.Timer(seconds, self.kill, kwargs=dict(each=True))
            timer.start()
            self.statuses = json.loads(self.nursery.parent.stdout.readline())
            timer.cancel()
            self.nursery.running = None
        return self

    def kill(self, number=signal.SIGKILL, rank=0, each=False):
        for pid in self.pids if each else self.pids[rank : rank + 1]:
            # Not reaped before the parent is told to go on, so the number is still its own
            if self.statuses is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        return self

    def until(self, condition, seconds=60):
        """Wait for condition(), or for one of the processes to end."""
        wait_for(lambda: condition() or not all(map(alive, self.pids)), seconds)
        return self

    @property
    def status(self):
        """Of the first rank."""
        return self.statuses[0]

    @property
    def out(self):
        return (self.folder / "stdout0").read_text()

    @property
    def err(self):
        return "".join(
            (self.folder / f"stderr{rank}").read_text() for rank in range(len(self.pids))
        )

    @property
    def result(self):
        return json.loads(self.out)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s in vain"
        time.sleep(0.002)


def rows(run_dir):
    """metrics.jsonl without the times and what only one process knows, [] while there is none."""
    left_out = "train_time", "grad_norm"
    with contextlib.suppress(FileNotFoundError):
        lines = (Path(run_dir) / "metrics.jsonl").read_text().split("\n")[:-1]
        found = [json.loads(line) for line in lines]
        return [{k: v for k, v in row.items() if k not in left_out} for row in found]
    return []


def same(run_dir, other):
    """Assert that two finished runs are bit for bit the same: losses, weights, moments, what the
    guard knows."""
    assert rows(run_dir) == rows(other)
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (run_dir, other))
    for name in ("steps", "tokens", "val_loss", "val_bpb", "reached", "seed", "data_fingerprint"):
        assert ours[name] == theirs[name], name
    last = f"checkpoints/step-{ours['steps']:06d}/state.safetensors"
    for name in ("model.safetensors", last):
        assert (run_dir / name).read_bytes() == (other / name).read_bytes(), name


def remains(run_dir):
    """Temporary files in a run's folder."""
    return [p.name for p in run_dir.rglob("*") if p.suffix in (".aside", ".old", ".trash", ".tmp")]


def library(name):
    """kernels/fused.py's Fused or decoding.py's Decoding, compiled once for all tests; None where
    it cannot be."""
    folder = Path(tempfile.gettempdir(), f"stopwatch_{getpass.getuser()}")
    return getattr(importlib.import_module(f"kernels.{name.lower()}"), name).build(folder)


def compiled_once(name="Fused"):
    """In place of that class: its library without the two seconds that it takes where a run's
    cache is empty."""
    found = library(name)
    return types.SimpleNamespace(build=lambda folder, say: found)


def serve():
    """Fork for each job from stdin: a line with the process ids goes to stdout, and one with the
    exit statuses."""
    import torch

    sys.path.insert(0, str(ROOT))
    import torch.distributed.run  # what starts several

    import train_gpt as tg
    from runtime import log, setting_up

    torch.set_num_threads(1)
    rates = dict(float32=1e9, bfloat16=1e9)
    # The real one takes a second
    setting_up.machine_probe = lambda device: dict(matmul=rates, copy=1e9)
    tg.expected_training = lambda setup: setup.expected_seconds  # and trying steps
    setting_up.Fused = compiled_once()
    log.tqdm.monitor_interval = 0  # which is a thread
    # Its own lock is shared with forks, and one that is killed may never give it back
    log.tqdm.set_lock(threading.RLock())
    import_the_rest(tg)
    for line in sys.stdin:
        job = json.loads(line)
        pids = []
        ranks = job.pop("ranks", None)  # without a number there is no group
        hosts = job.pop("hosts", 1)
        machines = job.pop("machines", [(ranks or 1) // hosts] * hosts)  # processes of each
        places = []  # (host, rank there, processes there)
        for host, n in enumerate(machines):
            places += [(host, local, n) for local in range(n)]
        with socket.create_server(("", 0)) as s:
            port = s.getsockname()[1]
        for rank, (host, local, n) in enumerate(places):
            pids.append(os.fork())
            if not pids[-1]:
                if ranks or len(places) > 1:  # what torchrun would set
                    os.environ.update(
                        RANK=str(rank),
                        LOCAL_RANK=str(local),
                        WORLD_SIZE=str(len(places)),
                        LOCAL_WORLD_SIZE=str(n),
                        MASTER_PORT=str(port),
                    )
                    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
                child(tg, rank=rank, host=host, **job)
        print(json.dumps(pids), flush=True)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps(statuses), flush=True)


def import_the_rest(tg):
    """Train a step: half of what torch consists of is imported when it is first used."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        text = Path(folder, "text")
        text.write_text("to be or not to be " * 200)
        config = tg.configure(
            data="text",
            text=str(text),
            tokenizer="bytes",
            cache_dir=folder,
            run_dir=f"{folder}/run",
            n_layer=1,
            n_embd=16,
            n_head=1,
            value_embed_layers=(),
            row_len=16,
            batch_tokens=(16,),
            steps=1,
            compile=False,
            checkpoint_every="off",
            dtype="float32",
        )
        tg.train(config)
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"


def child(
    tg,
    argv,
    folder,
    rank,
    host,
    fsync=(),
    step=0,
    at=(),
    limit=None,
    clock=None,
    networks=(),
    env=(),
    launch=(),
    stderr=None,
    nohup=False,
    program=None,
):
    """One process of a job.

    fsync: seconds that each os.fsync in a checkpoint takes more, by rank; step: the same for a
    training step; at: (step, signal) the first rank sends itself in that step, or in its first one
    if that is later; limit: bytes a file may have; clock: what time.time() gives, as a function of
    the true time t; networks: network namespace for each host; env: more of the environment, [name,
    value] pairs; launch: (processes, restarts), to start train_gpt.py with torchrun from here
    instead; stderr: "broken" for a pipe that nobody reads any more; nohup: as that does;
    program: Python to run in place of the trainer.
    """
    from runtime.launch import launch as start_with_torchrun

    status = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(f"{folder}/{name}{rank}", flags, 0o644), number)
        if stderr == "broken":
            nobody, end = os.pipe()
            os.close(nobody)
            os.dup2(end, 2)
        # However the tests were started
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
        os.environ.update(env)
        if networks:
            enter_network(networks[host])
        if rank < len(fsync):
            slow_down_fsync(fsync[rank])
        from base import clock as base_clock
        from runtime.guard import Guard

        judge = Guard.judge

        def slow_judge(guard, now, *args, **kwargs):
            time.sleep(step)
            if at and now >= at[0] and rank == 0:
                at[0] = math.inf
                os.kill(os.getpid(), at[1])
            return judge(guard, now, *args, **kwargs)

        Guard.judge = slow_judge
        if limit:
            import resource

            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if clock:
            real_time = time.time
            time.time = lambda: eval(clock, dict(t=real_time()))
        base_clock.START = time.perf_counter()
        base_clock._taken.clear()  # by what the parent has trained
        if program:
            exec(program, {})
            status = 0
        elif launch:
            status = start_with_torchrun(f"{ROOT}/train_gpt.py", argv, *launch)
        else:
            status = tg.main(argv)
        sys.stdout.flush()
    except SystemExit as e:
        status = e.code
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stderr.flush()
        os._exit(status)


def enter_network(name):
    """Move this process into a network namespace."""
    with open(f"/run/netns/{name}") as f:
        failed = ctypes.CDLL(None, use_errno=True).setns(f.fileno(), CLONE_NEWNET)
        assert not failed, ctypes.get_errno()


def slow_down_fsync(seconds):
    """From now on os.fsync of what is in a folder of checkpoints takes so much longer."""
    real_fsync = os.fsync

    def slow_fsync(fd):
        if "/checkpoints" in os.readlink(f"/proc/self/fd/{fd}"):
            time.sleep(seconds)
        real_fsync(fd)

    os.fsync = slow_fsync


if __name__ == "__main__":
    serve()
