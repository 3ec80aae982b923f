"""Two hosts: network namespaces with a cable between them, a run folder that both see, a data
cache for each."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, options, tiny
from processes import alive, remains, rows, same, wait_for

FIELDS = dict(
    steps=40,
    eval_every=20,
    n_layer=2,
    row_len=16,
    batch_tokens=(128,),
    checkpoint_every="3",
    sample_tokens=0,
    keep_last=3,
)
ADDRESSES = "10.99.73.1", "10.99.73.2"
PORT = 29477


def ip(*args):
    return subprocess.run(["ip", *args], capture_output=True, text=True).returncode == 0


@pytest.fixture(scope="module")
def hosts():
    """Names of two namespaces, connected."""
    if not shutil.which("ip") or os.geteuid():
        pytest.skip("network namespaces need root and iproute2")
    names = [f"sw{os.getpid()}{end}" for end in "ab"]
    try:
        if not all(ip("netns", "add", name) for name in names):
            pytest.skip("no network namespaces here")
        assert ip(
            "link",
            "add",
            "cable",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            names[1],
        )
        for name, address in zip(names, ADDRESSES):
            inside = "-n", name
            assert ip(*inside, "addr", "add", f"{address}/24", "dev", "cable")
            assert ip(*inside, "link", "set", "cable", "up") and ip(
                *inside, "link", "set", "lo", "up"
            )
        yield names
    finally:
        for name in names:
            ip("netns", "delete", name)


@pytest.fixture(scope="module")
def alone(nursery, text, tmp_path_factory):
    """Rows and tokens of a run of one process."""
    tmp = tmp_path_factory.mktemp("alone")
    done = nursery.run(options(tiny(text, tmp, run_dir=str(tmp / "run"), **FIELDS)), tmp / "output")
    assert done.status == 0, done.err
    return rows(tmp / "run"), done.result["tokens"]


def agrees(run_dir, alone):
    """Losses as those of one process; sums in another order differ in their last bits."""
    ours, (theirs, tokens) = rows(run_dir), alone
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs):
        assert a == pytest.approx(b, rel=1e-4)
    result = json.loads((run_dir / "result.json").read_text())
    assert result["tokens"] == tokens and remains(run_dir) == []
    return result


@pytest.mark.parametrize("local", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_processes_of_two_hosts(nursery, hosts, text, tmp_path, alone, local):
    """What torchrun starts on each, in short: stopped by a signal to one of them, and gone on
    with."""
    argv = options(tiny(text, tmp_path, **FIELDS))
    job = dict(
        ranks=2 * local,
        hosts=2,
        networks=hosts,
        env=[("MASTER_ADDR", ADDRESSES[0]), ("GLOO_SOCKET_IFNAME", "cable")],
    )
    run = nursery.start(argv, tmp_path / "output", step=0.02, **job)
    run.until(lambda: len(rows(tmp_path / "run")) >= 5).kill(signal.SIGTERM, rank=local).wait()
    assert run.statuses == [143] * 2 * local, run.err
    done = nursery.run([*argv, "--resume", "auto"], tmp_path / "output", **job)
    assert done.status == 0, done.err
    result = agrees(tmp_path / "run", alone)
    assert result["world_size"] == 2 * local and len(result["resumed_at"]) == 1


class Host:
    """torchrun in a namespace, with the command that is the same on every host."""

    def __init__(self, hosts, i, argv, nnodes, local, tmp_path):
        self.err = tmp_path / f"host{i}.err"
        env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "GLOO_SOCKET_IFNAME": "cable",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        command = [
            "ip",
            "netns",
            "exec",
            hosts[i],
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nnodes={nnodes}",
            f"--nproc_per_node={local}",
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint={ADDRESSES[0]}:{PORT}",
            f"--rdzv_id={tmp_path.name}",
            f"--local_addr={ADDRESSES[i]}",
            "--max_restarts=5",
            # torchrun tells by the host's name whose address that is; namespaces have none of their
            # own
            f"--rdzv_conf=last_call_timeout=5,is_host={i == 0}",
            ROOT / "train_gpt.py",
            *argv,
            "--cache-dir",
            tmp_path / f"cache{i}",
            "--resume",
            "auto",
        ]
        with open(self.err, "a") as err:
            self.process = subprocess.Popen(
                [str(x) for x in command], stdout=subprocess.PIPE, stderr=err, text=True, env=env
            )

    def tree(self):
        """All its processes, the first one first."""
        found = [self.process.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    found += map(int, (task / "children").read_text().split())
        return found

    def lose(self):
        """The host is gone: all its processes at once."""
        pids = self.tree()
        for number in (signal.SIGSTOP, signal.SIGKILL):  # nobody notices anybody else's end
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        self.process.wait(60)
        wait_for(lambda: not any(map(alive, pids)))

    def end(self, seconds=400):
        out, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, out


@pytest.fixture
def start(hosts, text, tmp_path):
    """start(i, nnodes, local): torchrun on host i."""
    started = []

    def start(i, nnodes=2, local=1, **fields):
        argv = options(tiny(text, tmp_path, **(FIELDS | fields)))
        argv = [x for j, x in enumerate(argv) if "--cache-dir" not in argv[max(0, j - 1) : j + 1]]
        started.append(Host(hosts, i, argv, nnodes, local, tmp_path))
        return started[-1]

    yield start
    for host in started:
        if host.process.poll() is None:
            host.lose()


@pytest.mark.slow
@pytest.mark.parametrize("local", [1, 2])
def test_torchrun_on_two_hosts(start, tmp_path, alone, local):
    running = [start(i, 2, local) for i in (0, 1)]
    ended = [host.end() for host in running]
    assert [status for status, _ in ended] == [0, 0], (
        running[0].err.read_text() + running[1].err.read_text()
    )
    assert [out.count("\n") for _, out in ended] in ([1, 0], [0, 1])  # one line in all
    assert agrees(tmp_path / "run", alone)["world_size"] == 2 * local


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_is_lost_and_comes_back(start, tmp_path, lost, nursery, text):
    """The first one has the rendezvous, so that without it the other ends as well and both are
    started again; without the second one, the first waits for it. In both cases the same
    commands go on from the last checkpoint."""
    long = dict(steps=400, eval_every=200, checkpoint_every="20")
    running = [start(i, **long) for i in (0, 1)]
    wait_for(lambda: any((tmp_path / "run/checkpoints").glob("step-??????")), 300)
    at = max(row["step"] for row in rows(tmp_path / "run"))
    running[lost].lose()
    other = running[1 - lost]
    if lost == 0:
        assert other.end()[0] != 0
        other = start(1, **long)
    running = [other, start(lost, **long)]
    ended = [host.end() for host in running]
    assert [status for status, _ in ended] == [0, 0], "".join(
        host.err.read_text() for host in running
    )
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["steps"] == 400 and result["world_size"] == 2 and len(result["resumed_at"]) >= 1
    assert 0 < result["resumed_at"][0] <= at + 20
    whole = tiny(text, tmp_path, run_dir=str(tmp_path / "whole"), **(FIELDS | long))
    assert nursery.run(options(whole), tmp_path / "output", ranks=2, hosts=2).status == 0
    same(tmp_path / "run", tmp_path / "whole")
    assert remains(tmp_path / "run") == []


@pytest.mark.slow
def test_one_or_two_hosts(start, tmp_path, nursery, text):
    """--nnodes 1:2: one begins alone, another joins, leaves without a word, and the first ends
    alone. In so long a run the last bits, which one and two processes add up differently, grow
    unless it learns slowly."""
    long = dict(steps=600, eval_every=300, checkpoint_every="20", muon_lr=0.001, adam_lr=0.0002)
    first = start(0, "1:2", **long)
    wait_for(lambda: any((tmp_path / "run/checkpoints").glob("step-??????")), 300)
    second = start(1, "1:2", **long)
    wait_for(lambda: re.search(", 2 x ", first.err.read_text() + second.err.read_text()), 300)
    at = max(row["step"] for row in rows(tmp_path / "run"))
    wait_for(lambda: max(row["step"] for row in rows(tmp_path / "run")) > at, 120)
    second.lose()
    status, out = first.end()
    assert status == 0, first.err.read_text()
    result = json.loads(out)
    assert result["steps"] == 600 and result["world_size"] == 1
    worlds = re.findall(", ([12]) x ", first.err.read_text() + second.err.read_text())
    assert worlds == ["1", "2", "1"]  # as the first rank said each time
    whole = tiny(text, tmp_path, run_dir=str(tmp_path / "whole"), **(FIELDS | long))
    assert nursery.run(options(whole), tmp_path / "output").status == 0
    agrees(tmp_path / "run", (rows(tmp_path / "whole"), result["tokens"]))
