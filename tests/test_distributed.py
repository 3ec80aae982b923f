"""Any number of processes, on any number of machines, trains on the same tokens and gets the
same losses."""

import functools
import json
import os
import socket
import subprocess
import sys

import pytest
from helpers import EVERYTHING, ROOT, options, tiny, train_losses, write_text

import train_gpt as tg


def run_torchrun(machines, processes, argv, timeout=300):
    """torchrun once for each of so many machines, with so many processes each; returns the
    stdout of the one with the result."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    command = [
        sys.executable,
        *("-m", "torch.distributed.run"),
        f"--nnodes={machines}",
        f"--nproc_per_node={processes}",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
        "--rdzv_id=test",
        "--local_addr=127.0.0.1",
        str(ROOT / "train_gpt.py"),
        *argv,
    ]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    started = []
    for _ in range(machines):
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env))
    said = []
    try:
        for p in started:
            out, err = p.communicate(timeout=timeout)
            assert p.returncode == 0, err
            said.append(out)
    finally:
        for p in started:
            p.kill()
    *others, one = sorted(said, key=len)
    assert set(others) <= {""}
    return one


CASES = {
    "one batch": dict(),
    "stages, accumulation, nothing divides": dict(
        micro_tokens=32,
        n_layer=3,
        stage_lr=(1.0, 1.5),
        batch_tokens=(160, 320),
        max_doc_len=(16, 32),
        long_docs="drop",
    ),
    "everything": EVERYTHING | dict(batch_tokens=(224,), micro_tokens=64),
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """case -> (losses of one process, tokens)."""
    return functools.cache(lambda case: run(case, tmp_path_factory.mktemp("alone")))


def run(case, tmp_path, start=None):
    """(losses by step and at the end, tokens) of a run; start(command line) starts its processes
    and returns its result, else it is in this one."""
    text = write_text(tmp_path / "words.txt", 4000)
    if CASES[case]:  # many documents, so that cutting them leaves something
        text.write_text(text.read_text().replace(".\n", "<|endoftext|>"))
    c = tiny(text, tmp_path, **CASES[case])
    result = start(options(c)) if start else tg.train(c)
    losses = train_losses(tmp_path / "run") + [result["val_loss"]]
    assert len(losses) == 21
    return losses, result["tokens"]


@pytest.mark.parametrize(
    "case, processes, hosts",
    [
        ("one batch", 1, 1),
        ("one batch", 2, 1),
        pytest.param("everything", 2, 1, marks=pytest.mark.slow),
        ("stages, accumulation, nothing divides", 3, 1),
        ("everything", 4, 2),  # parts are shared out on each host, and summed between them
        pytest.param("one batch", 3, 1, marks=pytest.mark.slow),
        pytest.param("everything", 3, 1, marks=pytest.mark.slow),
        pytest.param("stages, accumulation, nothing divides", 2, 1, marks=pytest.mark.slow),
        pytest.param("one batch", 4, 2, marks=pytest.mark.slow),
    ],
)
def test_losses_of_several_processes_are_those_of_one(
    nursery, tmp_path, alone, case, processes, hosts
):
    def start(argv):
        done = nursery.run(argv, tmp_path / "output", ranks=processes, hosts=hosts)
        assert set(done.statuses) == {0}, done.err
        for rank in range(1, processes):  # the first one alone tells the result
            assert (tmp_path / f"output/stdout{rank}").read_text() == ""
        assert done.result["world_size"] == processes
        return done.result

    losses, tokens = run(case, tmp_path, start)
    expected, same = alone(case)
    assert losses == pytest.approx(expected, rel=1e-4) and tokens == same


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_what_torchrun_starts_has_the_losses_of_one_process(tmp_path, alone, machines):
    def start(argv):
        result = json.loads(run_torchrun(machines, 2, argv))
        assert result["world_size"] == 2 * machines
        return result

    losses, tokens = run("everything", tmp_path, start)
    expected, same = alone("everything")
    assert losses == pytest.approx(expected, rel=1e-4) and tokens == same


def test_bad_input_ends_every_process(nursery, tmp_path):
    argv = options(tiny(tmp_path / "missing.txt", tmp_path))
    done = nursery.run(argv, tmp_path / "output", ranks=2)
    assert done.statuses == [2, 2]
    assert "missing.txt: no such file or folder" in done.err and done.err.count("\n") == 1
    assert done.out == ""


def test_launching_several_processes_keeps_the_exit_status(nursery, tmp_path):
    """What --gpus N does: torchrun itself would turn every failure into status 1."""
    text = write_text(tmp_path / "words.txt", 4000)
    argv = options(tiny(text, tmp_path, steps=4, target=0.1))
    done = nursery.run(argv, tmp_path / "output", launch=(2, 0))
    assert done.status == 3, done.err
    assert done.result["world_size"] == 2
    assert "Traceback" not in done.err


@pytest.mark.parametrize("statuses, status", [((0, 0), 0), ((0, 7), 7)])
def test_the_status_of_what_was_launched_is_that_of_the_first_that_failed(
    nursery, tmp_path, statuses, status
):
    worker = tmp_path / "worker.py"
    worker.write_text(f"import os, sys; sys.exit({statuses}[int(os.environ['RANK'])])")
    program = (
        f"import sys\nfrom runtime.launch import launch\nsys.exit(launch({str(worker)!r}, [], 2))"
    )
    assert nursery.run([], tmp_path / "output", program=program).status == status


def test_a_loss_that_is_not_finite_ends_every_process_at_its_step(nursery, tmp_path):
    """All ranks judge by the same sum, so none goes on."""
    text = write_text(tmp_path / "words.txt", 4000)
    argv = options(tiny(text, tmp_path, muon_lr=1e30, adam_lr=1e30))
    done = nursery.run(argv, tmp_path / "output", ranks=2)
    assert done.statuses == [2, 2] and done.out == ""
    said = "so the run stopped there, with the weights as they were before"
    assert done.err.count(said) == 1, done.err
