"""runtime/machine.py and launch.py: processes and their groups, devices, what is missing, the
clock."""

import contextlib
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from base import InputError
from runtime import machine
from runtime.launch import join_world
from runtime.machine import (
    Clock,
    World,
    can_compile,
    first_rank_first,
    keep_freed_memory,
    lost_another,
    native_dtype,
    share_text,
    to_device,
)

CPU = torch.device("cpu")


# --- processes


def test_a_process_alone_needs_no_group(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert join_world(0) == World() == (0, 1, CPU, 1, None, None)
    assert not torch.distributed.is_initialized()
    assert share_text(World(), "text") == "text" and first_rank_first(World(), lambda: 5) == 5


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        InputError, match="^process 2 has no GPU: this machine has 2, lower --nproc_per_node$"
    ):
        join_world(2)


TEXTS = ["", "é" * 1000, '{"a": [1, null]}']
PROGRAM = f"""
import json, torch, torch.distributed as dist
from base import InputError
from runtime.launch import join_world
from runtime.machine import first_rank_first, share_text
world = join_world(0)

def total(group):
    x = torch.tensor(10 ** world.rank)
    dist.all_reduce(x, group=group)
    return x.item()

found = dict(rank=world.rank, size=world.size, local_size=world.local_size)
found["node"] = total(world.node)
found["across"] = world.across and total(world.across)
found["first"] = first_rank_first(world, lambda: world.rank)
found["texts"] = [share_text(world, text if world.rank == 0 else "other") for text in {TEXTS!r}]
found["failures"] = []
for failing in range(world.size):
    def fail():
        if world.rank == failing:
            raise InputError("rank %d cannot" % failing)
    try:
        first_rank_first(world, fail)
    except InputError as e:
        found["failures"].append(str(e))
print(json.dumps(found))
dist.destroy_process_group()
"""


def run_processes(machines):
    """What PROGRAM says on so many machines, given as their numbers of processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    places = []  # (local rank, processes on its machine)
    for n in machines:
        places += [(local, n) for local in range(n)]
    started = []
    for rank, (local, n) in enumerate(places):
        env = os.environ | dict(
            RANK=str(rank),
            LOCAL_RANK=str(local),
            WORLD_SIZE=str(len(places)),
            LOCAL_WORLD_SIZE=str(n),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
    try:
        ended = [p.communicate(timeout=240) for p in started]
    finally:
        for p in started:
            p.kill()
    found = []
    for p, (out, err) in zip(started, ended):
        assert p.returncode == 0, err
        found.append(json.loads(out))
    return found


@pytest.mark.parametrize(
    "machines, nodes, across",
    [
        ((2, 2), [11, 11, 1100, 1100], [101, 1010, 101, 1010]),
        ((1, 2), [111] * 3, [None] * 3),  # of different sizes: as if they were one
        ((1, 1), [1, 10], [11, 11]),
        ((3,), [111] * 3, [None] * 3),
    ],
    ids=str,
)
def test_processes_of_a_machine_and_those_in_one_place_are_groups(machines, nodes, across):
    found = run_processes(machines)
    size = sum(machines)
    assert [f["rank"] for f in found] == list(range(size))
    assert {f["size"] for f in found} == {size}
    assert [f["node"] for f in found] == nodes
    assert [f["across"] for f in found] == across
    assert {f["local_size"] for f in found} == {machines[0] if len(set(machines)) == 1 else size}
    for f in found:
        assert f["first"] == f["rank"]  # each has its own result
        assert f["texts"] == TEXTS
        # Whoever fails ends all; those that did not are told
        expected = ["another process could not go on; its own line says why"] * size
        expected[f["rank"]] = f"rank {f['rank']} cannot"
        assert f["failures"] == expected


# --- device


@pytest.mark.parametrize(
    "flags, dtype",
    [
        ("flags : fpu avx2", torch.float32),
        ("flags : fpu avx512_bf16 sse", torch.bfloat16),
        ("flags: amx_bf16", torch.bfloat16),
        ("Features : fp asimd bf16 i8mm", torch.bfloat16),
        ("flags : not_bf16x", torch.float32),
    ],
)
def test_native_dtype_of_a_cpu(flags, dtype, monkeypatch):
    monkeypatch.setattr(machine.Path, "exists", lambda path: True)
    monkeypatch.setattr(machine.Path, "read_text", lambda path: flags)
    assert native_dtype(CPU) == dtype


@pytest.mark.parametrize(
    "capability, dtype",
    [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_native_dtype_of_a_gpu(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert native_dtype(torch.device("cuda", 0)) == dtype


def test_without_cpuinfo_it_is_float32(monkeypatch):
    monkeypatch.setattr(machine.Path, "exists", lambda path: False)
    assert native_dtype(CPU) == torch.float32


@pytest.mark.parametrize(
    "error, passes", [("[gloo/pair.cc:534] Connection closed by peer", True), ("bug", False)]
)
def test_at_the_end_others_may_have_left_already(error, passes, monkeypatch):
    def barrier():
        raise RuntimeError(error)

    monkeypatch.setattr(machine.dist, "barrier", barrier)
    machine.wait_for_first_rank(World())  # alone it does not wait
    with contextlib.nullcontext() if passes else pytest.raises(RuntimeError, match="bug"):
        machine.wait_for_first_rank(World(1, 2))


@pytest.mark.parametrize(
    "error, lost",
    [
        (torch.distributed.DistNetworkError("connection refused"), True),
        (RuntimeError("[/pytorch/third_party/gloo/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("NCCL communicator was aborted"), True),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_which_errors_mean_that_another_process_is_gone(error, lost):
    assert lost_another(error) == lost


def test_what_compiling_lacks(tmp_path, monkeypatch):
    def lacks_for_compile():
        said = []
        assert can_compile(said.append) == (not said)
        if not said:
            return None
        (line,) = said
        before, missing = line.split(": ")
        assert before == "running without torch.compile, which is slower"
        assert missing.endswith(" would have to be installed for it")
        return missing.removesuffix(" would have to be installed for it")

    headers = tmp_path / "include"
    headers.mkdir()
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(headers))
    monkeypatch.delenv("CXX", raising=False)
    there = set()
    monkeypatch.setattr(machine.shutil, "which", lambda name: name if name in there else None)
    assert lacks_for_compile() == "a C++ compiler (g++)"
    there.add("clang++")
    assert lacks_for_compile() == "Python's headers (python3-dev)"
    (headers / "Python.h").write_text("")
    assert lacks_for_compile() is None
    there.clear()
    monkeypatch.setenv("CXX", "/opt/own-c++")
    assert lacks_for_compile() == "a C++ compiler (g++)"
    there.add("/opt/own-c++")
    assert lacks_for_compile() is None


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_keep_freed_memory_is_harmless_everywhere(platform, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    keep_freed_memory()
    x = torch.ones(2**20)
    del x
    assert torch.ones(2**20).sum() == 2**20


def test_to_device_makes_fp32_of_any_numbers():
    x = to_device([True, False, 3, 0.5], CPU)
    assert x.dtype == torch.float32 and x.tolist() == [1.0, 0.0, 3.0, 0.5]
    assert to_device((), CPU).shape == (0,)


# --- time


def test_clock_runs_between_start_and_stop_and_goes_on_from_a_total(monkeypatch):
    at, waited = [100.0], []
    monkeypatch.setattr(machine.time, "perf_counter", lambda: at[0])
    monkeypatch.setattr(machine, "synchronize", waited.append)
    clock = Clock(CPU, 5.0)
    assert clock.now() == 5
    at[0] = 110.0
    clock.start()
    at[0] = 112.5
    assert clock.now() == 7.5
    assert clock.total == 5
    assert len(waited) == 1  # looking at it waits for nothing
    clock.stop()
    at[0] = 200.0
    assert clock.now() == clock.total == 7.5
    clock.start()
    at[0] = 201.0
    clock.stop()
    assert clock.total == 8.5 and waited == [CPU] * 4


@pytest.mark.parametrize("name", ["a b", "it's", 'say "so"', "a$b", "a;b", "(1)"])
def test_paths_that_a_compiler_cannot_take(name, tmp_path, monkeypatch):
    """Compiled code goes where the path is plain; with PyTorch itself in such a path the run goes
    on uncompiled and says so."""
    assert machine.is_plain(tmp_path) and not machine.is_plain(tmp_path / name)
    assert machine.compile_cache(tmp_path) == str(tmp_path / "inductor")
    elsewhere = machine.compile_cache(tmp_path / name)
    assert machine.is_plain(elsewhere) and elsewhere.endswith("inductor")
    said = []
    monkeypatch.setattr(machine.torch, "__file__", str(tmp_path / name / "torch/__init__.py"))
    assert not machine.can_compile(said.append)
    assert str(tmp_path / name) in said[0] and "running without torch.compile" in said[0]
