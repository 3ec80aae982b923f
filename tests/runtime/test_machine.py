"""runtime/machine.py and launch.py: processes and their groups, devices, what is missing, the
clock."""

import contextlib
import json
import math
import os
import stat
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from helpers import ROOT, tiny, write_text

import train_gpt as tg
from base import InputError, RankError
from runtime import launch, machine, warming_up
from runtime.launch import exit_status, join_world
from runtime.machine import (
    Clock,
    World,
    can_compile,
    first_rank_first,
    lost_another,
    native_dtype,
    share,
    to_device,
)

CPU = torch.device("cpu")
PLACE = "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"


# --- processes


def test_a_process_alone_needs_no_group(monkeypatch):
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)
    assert join_world(0) == World() == (0, 1, CPU, 1, None, None)
    assert not torch.distributed.is_initialized()
    assert share(World(), "text") == "text" and first_rank_first(World(), lambda: 5) == 5


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        InputError, match="^process 2 has no GPU: this machine has 2, lower --nproc_per_node$"
    ):
        join_world(2)


@pytest.mark.parametrize(
    "env, what",
    [
        (dict(RANK="x"), "^RANK=x in the environment: expected a number; start with torchrun"),
        (dict(WORLD_SIZE="-2"), "^WORLD_SIZE=-2 in the environment: expected a number"),
        (dict(RANK="1"), "^RANK=1 in the environment: expected less than 1"),
        (dict(RANK="0", WORLD_SIZE="2"), "^WORLD_SIZE=2 in the environment, but no MASTER_ADDR"),
        (
            dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1"),
            "^WORLD_SIZE=2 in the environment, but no MASTER_PORT",
        ),
    ],
)
def test_an_environment_that_torchrun_did_not_make(monkeypatch, env, what):
    for name in (*PLACE, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match=what):
        join_world(0)
    # Whoever is not the first to speak still does
    assert exit_status(lambda: join_world(0)) == 2


def test_empty_variables_say_nothing(monkeypatch):
    for name in PLACE:
        monkeypatch.setenv(name, "")
    assert join_world(0) == World()


def test_an_error_is_one_line_that_hides_nothing(capsys):
    """Such as a name that ends in a carriage return, from a script with Windows' line ends."""

    def fail():
        raise InputError("a.txt\r: no such file;\nnothing was done")

    assert exit_status(fail) == 2
    assert capsys.readouterr().err == "error: a.txt\\x0d: no such file; nothing was done\n"


@pytest.mark.parametrize(
    "env, n",
    [
        ({}, 8),
        (dict(RANK="0", WORLD_SIZE="1"), 8),  # as some clusters set them for a whole machine
        (dict(RANK="0", WORLD_SIZE="1", TORCHELASTIC_RUN_ID="none"), None),
        (dict(RANK="0", WORLD_SIZE="2"), None),
    ],
)
def test_all_gpus_are_used_unless_torchrun_has_started_this(monkeypatch, env, n):
    for name in (*PLACE, "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    launched = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(launch, "launch", lambda program, argv, n, restarts: launched.append(n))
    monkeypatch.setattr(launch, "join_world", lambda gpus: None)
    launch.run_on_all_gpus("p", [], lambda world, requests: launched.append(None))
    assert launched == [n]
    if n:
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
        with pytest.raises(InputError, match="^8 GPUs: expected NCCL .* give --gpus 1$"):
            launch.run_on_all_gpus("p", [], None)


def test_a_long_wait_for_other_processes_is_said(monkeypatch, capsys):
    monkeypatch.setenv("MASTER_ADDR", "somewhere")
    monkeypatch.setenv("MASTER_PORT", "1234")
    with launch.waiting_for(2):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(launch, "PATIENCE", 0.01)
    with launch.waiting_for(2):
        time.sleep(0.2)
    said = "note: waiting for all 2 processes to come to somewhere:1234 ...\n"
    assert capsys.readouterr().err == said


TEXTS = ["", "é" * 1000, '{"a": [1, null]}']
PROGRAM = f"""
import json, torch, torch.distributed as dist
from base import InputError
from runtime.launch import join_world
from runtime.machine import first_rank_first, share
world = join_world(0)

def total(group):
    x = torch.tensor(10 ** world.rank)
    dist.all_reduce(x, group=group)
    return x.item()

found = dict(rank=world.rank, size=world.size, local_size=world.local_size)
found["node"] = total(world.node)
found["across"] = world.across and total(world.across)
found["first"] = first_rank_first(world, lambda: world.rank)
found["texts"] = [share(world, text if world.rank == 0 else "other") for text in {TEXTS!r}]
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
def test_processes_of_a_machine_and_those_in_one_place_are_groups(
    nursery, tmp_path, machines, nodes, across
):
    run = nursery.run([], tmp_path / "output", machines=machines, program=PROGRAM)
    assert set(run.statuses) == {0}, run.err
    found = [json.loads(path.read_text()) for path in sorted((tmp_path / "output").glob("stdout*"))]
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
    monkeypatch.setattr(machine.Path, "read_text", lambda path: flags)
    assert native_dtype(CPU) == dtype


@pytest.mark.parametrize(
    "capability, dtype",
    [((7, 5), torch.float32), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_native_dtype_of_a_gpu(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert native_dtype(torch.device("cuda", 0)) == dtype


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_without_cpuinfo_it_is_float32(error, monkeypatch):
    def read_text(path):
        raise error(0, "cannot")

    monkeypatch.setattr(machine.Path, "read_text", read_text)
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


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The folder of compiled code, wherever that was chosen; TMPDIR is a folder of the test's."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    return lambda: os.environ.get("TORCHINDUCTOR_CACHE_DIR")


@pytest.mark.compiles
def test_what_compiling_lacks(tmp_path, monkeypatch, cache):
    def lacks():
        said = []
        assert can_compile(said.append) == (not said)
        if not said:
            return None
        (line,) = said
        before, missing = line.split(": ")
        assert before == "running without torch.compile, which is slower"
        return missing.removesuffix(" would have to be installed for it")

    machine.choose_compile_cache(tmp_path)
    headers = tmp_path / "include"
    headers.mkdir()
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(headers))
    monkeypatch.delenv("CXX", raising=False)
    there = set()
    monkeypatch.setattr(machine.shutil, "which", lambda name: name if name in there else None)
    assert lacks() == "a C++ compiler (g++)"
    there.add("clang++")
    assert lacks() == "Python's headers (python3-dev)"
    (headers / "Python.h").write_text("")
    assert lacks() is None
    there.clear()
    monkeypatch.setenv("CXX", "/opt/own-c++")
    assert lacks() == "a C++ compiler (g++)"
    there.add("/opt/own-c++")
    assert lacks() is None
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert lacks().startswith("no folder can be written for compiled code")
    with_a_space = tmp_path / "my python"
    with_a_space.mkdir()
    (with_a_space / "Python.h").write_text("")
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda name: str(with_a_space))
    assert lacks().startswith(f"its compiler cannot take the path {with_a_space}; a checkout in")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert lacks() == "TORCH_COMPILE_DISABLE in the environment turns it off"


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_keep_freed_memory_is_harmless_everywhere(platform):
    """In a process of its own, whose memory it is."""
    script = (
        f"import sys, torch; sys.platform = {platform!r}; "
        "from runtime.machine import keep_freed_memory as keep; keep(); x = torch.ones(2**20); "
        "del x; assert torch.ones(2**20).sum() == 2**20"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


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


# --- what the compiler sees


@pytest.mark.parametrize("name", ["a b", "it's", 'say "so"', "a$b", "a;b", "(1)"])
def test_paths_that_a_compiler_cannot_take(name, tmp_path, monkeypatch, cache):
    """Compiled code goes where the path is plain, whoever chose the other one; with PyTorch itself
    in such a path the run goes on uncompiled and says so."""
    assert machine.is_plain(tmp_path) and not machine.is_plain(tmp_path / name)
    machine.choose_compile_cache(tmp_path)
    assert cache() == str(tmp_path / "inductor")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    elsewhere = str(tmp_path / f"tmp/stopwatch-{os.getuid()}")
    machine.choose_compile_cache(tmp_path / name)
    assert cache() == elsewhere
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name / "mine"))
    machine.choose_compile_cache(tmp_path)
    assert cache() == elsewhere
    said = []
    monkeypatch.setattr(machine.torch, "__file__", str(tmp_path / name / "torch/__init__.py"))
    assert not machine.can_compile(said.append)
    assert str(tmp_path / name) in said[0] and "running without torch.compile" in said[0]


def test_a_cache_of_the_users_choice(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    machine.choose_compile_cache(tmp_path)
    assert cache() == str(tmp_path / "mine") and (tmp_path / "mine").is_dir()


def test_no_product_is_timed_while_it_is_compiled(tmp_path, monkeypatch, cache):
    from torch._inductor import config

    name = "TORCHINDUCTOR_SHAPE_PADDING"
    monkeypatch.setattr(config, "shape_padding", True)
    monkeypatch.setenv(name, "")  # so that it is put back
    monkeypatch.delenv(name)
    machine.choose_compile_cache(tmp_path)
    assert os.environ[name] == "0" and not config.shape_padding
    monkeypatch.setenv(name, "1")  # by the user
    machine.choose_compile_cache(tmp_path)
    assert os.environ[name] == "1" and config.shape_padding


def test_without_a_home_triton_keeps_its_kernels_in_the_cache(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("TRITON_HOME", "")  # so that it is put back
    monkeypatch.delenv("TRITON_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    machine.choose_compile_cache(tmp_path / "cache")
    assert "TRITON_HOME" not in os.environ
    monkeypatch.setenv("HOME", str(tmp_path / "nowhere"))
    machine.choose_compile_cache(tmp_path / "cache")
    assert os.environ["TRITON_HOME"] == str(tmp_path / "cache")


def test_a_cache_that_cannot_be_written(tmp_path, cache, monkeypatch):
    (tmp_path / "file").write_text("")
    machine.choose_compile_cache(tmp_path / "file")
    ours = tmp_path / f"tmp/stopwatch-{os.getuid()}"
    assert cache() == str(ours) and stat.S_IMODE(ours.stat().st_mode) == 0o700
    # Nor can anything else: then nothing is compiled
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path / "file"))
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    machine.choose_compile_cache(tmp_path / "file")
    assert cache() is None


def test_code_is_not_run_from_a_folder_that_somebody_else_made(tmp_path, cache):
    """In a temporary folder that all users share, somebody may take the name first."""
    elsewhere = tmp_path / "theirs"
    elsewhere.mkdir()
    (tmp_path / f"tmp/stopwatch-{os.getuid()}").symlink_to(elsewhere)
    machine.choose_compile_cache(tmp_path / "a b")
    assert cache().startswith(str(tmp_path / "tmp/stopwatch-")) and not any(elsewhere.iterdir())
    assert stat.S_IMODE(os.stat(cache()).st_mode) == 0o700


def test_code_is_not_run_from_a_folder_of_another_user(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(machine.os, "getuid", lambda: 4242)
    (tmp_path / "tmp/stopwatch-4242").mkdir()
    machine.choose_compile_cache(tmp_path / "a b")
    assert Path(cache()).parent == tmp_path / "tmp" and not cache().endswith("stopwatch-4242")


def test_a_temporary_folder_with_a_space_in_its_path(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(machine.tempfile, "gettempdir", lambda: str(tmp_path / "t m p"))
    assert str(machine.temporary_folder()) == f"/tmp/stopwatch-{os.getuid()}"


@pytest.fixture
def backend_error():
    """backend_error(output): how Inductor reports what g++ said."""
    from torch._inductor.exc import CppCompileError, InductorError

    def make(output):
        return InductorError(CppCompileError(["g++", "x.cpp"], output), None)

    return make


def test_whose_fault_an_error_of_compiling_is(backend_error):
    from torch._dynamo.exc import Unsupported

    for error in (
        backend_error("fatal"),
        OSError(28, "No space left on device"),
        FileNotFoundError(2, "No usable temporary directory found"),
        ImportError("x.so: failed to map segment from shared object"),
        subprocess.CalledProcessError(1, "g++"),
    ):
        assert machine.compiler_failed(error), error
    for error in Unsupported("graph break", "x"), ValueError("shape"), RuntimeError("size"):
        assert not machine.compiler_failed(error), error


@pytest.mark.parametrize(
    "output, said",
    [
        (
            "In file x.h:3:\nx.h:4:9: fatal error: omp.h: No such file\n",
            "error: omp.h: No such file",
        ),
        ("Killed", "CppCompileError: C++ compile error"),
    ],
)
def test_what_a_compiler_said_is_one_line(output, said, backend_error):
    assert machine.compiler_said(backend_error(output)) == said


@pytest.mark.parametrize("failing", ["compiler", "program"])
def test_a_compiler_that_does_not_work(failing, tmp_path, monkeypatch, capsys, backend_error):
    """The run goes on uncompiled, says so in one line, and keeps the report; that tracing does not
    support the program is no such thing."""
    from torch._dynamo.exc import Unsupported

    def warm_up(setup):
        raise (
            backend_error("a.cpp:1: error: no omp")
            if failing == "compiler"
            else Unsupported("x", "y")
        )

    monkeypatch.setattr(warming_up, "warm_up", warm_up)
    monkeypatch.setattr(machine, "lacks_for_compiling", lambda: None)
    config = tiny(write_text(tmp_path / "text", 2000), tmp_path, compile=True, steps=2, repeat=2)
    if failing == "program":
        with pytest.raises(Unsupported):
            tg.train(config)
        return
    results = []
    tg.train(config, report=results.append)
    assert [r["steps"] for r in results] == [2, 2]
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if "torch.compile" in line]
    assert len(said) == 1 and "Traceback" not in err
    report = tmp_path / "run/seed0/error.txt"
    assert said[0] == (
        "running without torch.compile, which is slower: torch.compile failed (error: no omp); "
        f"the report is in {report}"
    )
    assert "CppCompileError" in report.read_text()


def test_one_rank_whose_compiler_does_not_work_ends_all(backend_error, monkeypatch, tmp_path):
    """The others may have compiled, and would wait for it for ever."""

    def fail(setup):
        raise backend_error("a.cpp:1: error: no omp")

    monkeypatch.setattr(warming_up, "warm_up", fail)
    setup = types.SimpleNamespace(world=World(1, 2))
    with pytest.raises(RankError, match=r"failed \(error: no omp\); --no-compile trains without"):
        warming_up.warm_up_or_go_without(setup, log=None)


# --- threads and devices


@pytest.mark.parametrize(
    "allowed, threads", [(math.inf, 8), (16.0, 8), (3.0, 3), (1.5, 2), (0.2, 1)]
)
def test_threads_follow_the_quota_and_the_user(allowed, threads, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(machine.limits, "processors", lambda: allowed)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    machine.use_threads()
    expected = [threads] if threads < 8 else []
    assert given == expected
    assert os.environ.get("TORCHINDUCTOR_COMPILE_THREADS") == (str(threads) if expected else None)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    machine.use_threads()
    assert given == expected


def test_accelerators_that_are_not_used_are_mentioned(monkeypatch, tmp_path):
    def said(device=CPU):
        lines = []
        machine.mention_unused(device, lines.append)
        return lines

    found = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: (found or [None])[0])
    monkeypatch.setattr(machine, "NVIDIA", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert said() == []
    found.append(torch.device("mps"))
    assert said()[0].startswith("Apple's GPU (MPS) is left alone: training runs on")
    found[0] = torch.device("xpu")
    assert said()[0].startswith("the xpu device is left alone")
    found[0] = torch.device("cuda")
    assert said(torch.device("cuda", 0)) == said() == []
    # A driver that is too old for this PyTorch, say
    found.clear()
    (tmp_path / "0000:01:00.0").mkdir()
    assert said()[0].startswith("there is an NVIDIA GPU, but PyTorch cannot use it")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert said() == []
