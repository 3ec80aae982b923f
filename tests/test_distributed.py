"""Any number of processes, on any number of machines, trains on the same tokens and gets the
same losses."""

import functools
import json
import os
import socket
import subprocess
import sys

import pytest
from helpers import EVERYTHING, ROOT, options, run_trainer, tiny, train_losses, write_text

import train_gpt as tg

TORCHRUN = ("-m", "torch.distributed.run")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_machines(machines, processes, *args, timeout=300):
    """torchrun once for each of so many machines, with so many processes each; returns them
    finished, the one with the result on its stdout first."""
    command = [
        sys.executable,
        *TORCHRUN,
        f"--nnodes={machines}",
        f"--nproc_per_node={processes}",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{free_port()}",
        "--rdzv_id=test",
        "--local_addr=127.0.0.1",
        str(ROOT / "train_gpt.py"),
        *map(str, args),
    ]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    started = []
    for _ in range(machines):
        started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env))
    done = []
    try:
        for p in started:
            out, err = p.communicate(timeout=timeout)
            done.append(subprocess.CompletedProcess(command, p.returncode, out, err))
    finally:
        for p in started:
            p.kill()
    return sorted(done, key=lambda d: -len(d.stdout))


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
    return functools.cache(lambda case: run(case, tmp_path_factory.mktemp("alone"), 1, 0))


def run(case, tmp_path, machines, processes):
    """(losses by step and at the end, tokens) of a run; with no processes, in this one."""
    text = write_text(tmp_path / "words.txt")
    if CASES[case]:  # many documents, so that cutting them leaves something
        text.write_text(text.read_text().replace(".\n", "<|endoftext|>"))
    c = tiny(text, tmp_path, **CASES[case])
    if not processes:
        result = tg.train(c)
        return train_losses(tmp_path / "run") + [result["val_loss"]], result["tokens"]
    if machines == 1:
        launcher = [*TORCHRUN, "--standalone", f"--nproc_per_node={processes}"]
        done = run_trainer(*options(c), launcher=launcher)
    else:
        done, *others = run_machines(machines, processes, *options(c))
        assert all(other.returncode == 0 and other.stdout == "" for other in others), others
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # one line, from the first rank only
    assert result["world_size"] == machines * processes
    losses = train_losses(tmp_path / "run") + [result["val_loss"]]
    assert len(losses) == 21
    return losses, result["tokens"]


@pytest.mark.parametrize(
    "case, processes",
    [
        ("one batch", 1),
        ("one batch", 2),
        ("everything", 2),
        ("stages, accumulation, nothing divides", 3),
        pytest.param("one batch", 3, marks=pytest.mark.slow),
        pytest.param("everything", 3, marks=pytest.mark.slow),
        pytest.param("stages, accumulation, nothing divides", 2, marks=pytest.mark.slow),
    ],
)
def test_losses_of_several_processes_are_those_of_one(tmp_path, alone, case, processes):
    losses, tokens = run(case, tmp_path, 1, processes)
    expected, same = alone(case)
    assert losses == pytest.approx(expected, rel=1e-4) and tokens == same


@pytest.mark.parametrize("case", ["everything", pytest.param("one batch", marks=pytest.mark.slow)])
def test_losses_of_two_machines_are_those_of_one_process(tmp_path, alone, case):
    """Two machines with two processes each: parts are shared out on each, and summed between
    them."""
    losses, tokens = run(case, tmp_path, 2, 2)
    expected, same = alone(case)
    assert losses == pytest.approx(expected, rel=1e-4) and tokens == same


def test_bad_input_ends_every_process(tmp_path):
    c = tiny(tmp_path / "missing.txt", tmp_path)
    done = run_trainer(*options(c), launcher=[*TORCHRUN, "--standalone", "--nproc_per_node=2"])
    assert done.returncode != 0
    assert done.stderr.count("missing.txt: no such file or folder") == 1
    assert done.stdout == ""


def test_launching_several_processes_keeps_the_exit_status(tmp_path):
    """What --gpus N does: torchrun itself would turn every failure into status 1."""
    text = write_text(tmp_path / "words.txt")
    for target, status in ((9.0, 0), (0.1, 3)):
        c = tiny(text, tmp_path, run_dir=str(tmp_path / f"run{status}"), steps=4, target=target)
        program = (
            "import sys\n"
            "from runtime.launch import launch\n"
            f"sys.exit(launch('train_gpt.py', {options(c)!r}, 2))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT
        )
        assert done.returncode == status, done.stderr
        assert json.loads(done.stdout)["world_size"] == 2
        assert "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_ends_every_process_at_its_step(tmp_path):
    """All ranks judge by the same sum, so none goes on."""
    text = write_text(tmp_path / "words.txt")
    c = tiny(text, tmp_path, muon_lr=1e30, adam_lr=1e30)
    done = run_trainer(*options(c), launcher=[*TORCHRUN, "--standalone", "--nproc_per_node=2"])
    assert done.returncode != 0 and done.stdout == ""
    said = "so the run stopped there, with the weights as they were before"
    assert done.stderr.count(said) == 1, done.stderr
