"""Eight ranks of a machine, and of two, where there is no GPU: gpt2-small's recipe at a tiny shape.
With fake collectives every rank sets up, trains through all stages, validates, saves and resumes;
in eight processes on CPUs the losses are those of one."""

import collections
import functools
import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from fake_ranks import as_rank
from helpers import options, tiny, train_losses, write_text
from processes import alive, rows, wait_for
from safetensors.torch import load_file

import train_gpt as tg
from benchmarks import cluster, subject
from optim import shards
from runtime import memory, warming_up
from runtime.launch import join_world
from runtime.session import Session
from runtime.signals import Interrupted, Requests
from tracks import load_track

# What is smaller than in the track; numbers of layers, of stages and of rows a stage are its own
SHAPE = dict(
    target=None,
    data="text",
    tokenizer="bytes",
    n_embd=48,
    ngram_rows=376,  # whole rows for each of eight ranks
    row_len=32,
    val_row_len=64,
    val_tokens=640,
    batch_tokens=(256, 512, 768),
    max_doc_len=(16, 32, 32),
    short_window=(4, 8, 12),
    long_window=(8, 16, 24),
    val_windows=(16, 48),
    micro_tokens=64,
    steps=6,
    extension=0,
    eval_every=3,
    fp8="off",
    dtype="bfloat16",
    compile=False,
    sample_prompts=(),
    sample_tokens=0,
    checkpoint_every="1000",
)
KINDS = {"all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast"}
SLOW = pytest.mark.slow
RANKS = [(8, 8, rank) for rank in (0, 5)] + [(16, 8, rank) for rank in (0, 11)]
RANKS += [pytest.param(8, 8, rank, marks=SLOW) for rank in (1, 2, 3, 4, 6, 7)]
RANKS += [pytest.param(16, 8, rank, marks=SLOW) for rank in range(1, 16) if rank != 11]
STOP = 2  # the step after which each rank is stopped, and resumes


def recipe(tmp_path, **fields):
    """A Config of gpt2-small's recipe at the tiny shape."""
    text = tmp_path / "words.txt"
    if not text.exists():
        write_text(text, 6000)
        # Documents of 17 tokens or so, in rows of 32
        text.write_text(text.read_text().replace(".\n", "<|endoftext|>"))
    return tiny(text, tmp_path, **load_track("gpt2-small") | SHAPE | fields)


def train_as(rank, size, local, tmp_path, monkeypatch, first=None, **fields):
    """Train on a rank until it is stopped, then resume to the end; returns its Tape."""
    with as_rank(rank, size, local, monkeypatch, first) as tape:
        world = join_world(0)
        assert (world.rank, world.size, world.local_size) == (rank, size, local)
        requests = Requests()

        votes, after_step = Session.votes, Session.after_step

        def marked_votes(session):
            tape.mark("sums")
            requests.stop = signal.SIGTERM if session.at.step == STOP - 1 else 0
            return votes(session)

        def marked_after_step(session, step, *args):
            tape.mark("taken")
            return after_step(session, step, *args)

        monkeypatch.setattr(Session, "votes", marked_votes)
        monkeypatch.setattr(Session, "after_step", marked_after_step)
        config = recipe(tmp_path, **fields)
        with pytest.raises(Interrupted):
            tg.train(config, world, requests)
        tape.mark("resumes")
        result = tg.train(tg.changed(config, resume="auto"), world, Requests())
        assert result["steps"] == config.schedule.steps and result["resumed_at"] == [STOP]
        assert result["world_size"] == size
    monkeypatch.undo()
    return tape


def touched_rows(config, size, ranks):
    """For each step {table: [a set of rows for each of these ranks]} that were looked up since its
    turn, by the tokens: what has a gradient."""
    train = subject.open_data(subject.Settings(config)).train
    V = 320  # 257 tokens, padded
    every = config.optim.adam_every
    most = config.run.micro_tokens // config.data.row_len
    found = []
    for step in range(1, config.schedule.steps + 1):
        if step % every == 1:
            seen = {name: [set() for _ in ranks] for name in ("ngram_embeds", "value_embeds")}
        found.append(seen)
        rows = -(-tg.stage_at(config, step).rows // size)
        micro_rows = memory.equal_passes(rows, most)
        for place, rank in enumerate(ranks):
            for micro in train.micro_batches(step, rank, size, micro_rows):
                starts = set(micro.cu_seqlens.tolist())
                before = 0
                for i, token in enumerate(micro.inputs.flatten().tolist()):
                    key = 257 * token + (0 if i in starts else before)
                    seen["ngram_embeds"][place].add(key % config.model.ngram_rows)
                    layers = range(len(config.model.value_embed_layers))
                    seen["value_embeds"][place].update(V * layer + token for layer in layers)
                    before = token
    return found


def compare_bytes(tape, config, size, local, rank=0):
    """What each step exchanges is what the cluster model says: kinds, bytes and groups."""
    steps = tape.between("sums", "taken")
    assert len(steps) == config.schedule.steps
    c = subject.Settings(config)
    parameters = subject.parameters(c, 257)
    first = rank - rank % local
    rows = touched_rows(config, size, range(first, first + local))
    sparse = 0  # sums of touched rows alone
    for step, calls in enumerate(steps, 1):
        tied = tg.stage_at(config, step).model.tied
        touched = {}
        for name, seen in rows[step - 1].items():
            whole = next(p.count for p in parameters if p.name == name) // config.model.n_embd
            if 3 * max(map(len, seen)) <= whole and whole % local == 0:
                touched[name] = 2 * config.model.n_embd * len(seen[rank - first])
        sparse += len(touched) * (step % config.optim.adam_every == 0)
        exchanged = cluster.collectives_of(c, parameters, size, local, tied, touched)
        *gradients, report = exchanged
        expected = collections.Counter()
        due = 0  # gradients that are summed in this step
        for x in gradients:
            if step % x.every == 0:
                group = "all" if x.group == "node" and local == size else x.group
                expected[x.kind, x.bytes, group] += 1
                due += x.kind in ("reduce_scatter", "all_to_all")
                due += group == "all" and x.kind == "all_reduce"
        # The loss, three votes and a number for each of them: at most what the model says
        expected["all_reduce", 4 * (4 + due), "all"] += 1
        assert 4 * (4 + due) <= report.bytes
        assert collections.Counter((x.kind, x.bytes, x.group) for x in calls) == expected, step
    assert sparse >= config.schedule.steps // config.optim.adam_every  # of two tables


def test_eight_ranks_copy_no_gradient_of_the_banks(monkeypatch, tmp_path):
    """What they do not divide is summed from where backward has put it."""
    copied = []
    real = shards.with_room_behind

    def watched(x, n):
        found = real(x, n)
        copied.append((x.dim(), len(x) < n, found.data_ptr() != x.data_ptr()))
        return found

    monkeypatch.setattr(shards, "with_room_behind", watched)
    with as_rank(0, 8, 8, monkeypatch):
        tg.train(recipe(tmp_path, steps=2, eval_every=2), join_world(0), Requests())
    banks = [(padded, copy) for dim, padded, copy in copied if dim == 3]
    assert (True, False) in banks and not any(copy for _, copy in banks)


def test_eight_ranks_connect_for_touched_rows_before_the_clock(monkeypatch, tmp_path):
    """The warm-up exchanges what training will."""
    monkeypatch.setattr(warming_up, "is_compiled", lambda setup: True)
    start = Session.start
    with as_rank(0, 8, 8, monkeypatch) as tape:

        def marked_start(session):
            tape.mark("starts")
            return start(session)

        monkeypatch.setattr(Session, "start", marked_start)
        tg.train(recipe(tmp_path, steps=2, eval_every=2), join_world(0), Requests())
        tape.mark("ended")
    [(_, at), _] = tape.marks
    kinds = [x.kind for x in tape.calls]
    assert set(kinds[at:]) - {"broadcast", "barrier"} <= set(kinds[:at])
    assert kinds[:at].count("all_to_all") >= 2 <= kinds[at:].count("all_to_all")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """(size, local size) -> (the first rank's Tape, the folder of its run)."""

    @functools.cache
    def train(size, local):
        folder = tmp_path_factory.mktemp("first")
        with pytest.MonkeyPatch.context() as patch:
            return train_as(0, size, local, folder, patch), folder

    return train


@pytest.mark.parametrize("size, local, rank", RANKS)
def test_eight_ranks_call_the_same_collectives(first, monkeypatch, size, local, rank):
    """From set-up to the end, through every stage, validations, a stop, a checkpoint and what
    resumes from it: in the order of the first rank, with its shapes and dtypes. Steps exchange
    what the cluster model says they do."""
    expected, folder = first(size, local)
    found = expected
    if rank:
        found = train_as(rank, size, local, folder, monkeypatch, expected)
    assert [x.of_all() for x in found.calls] == [x.of_all() for x in expected.calls]
    assert found.marks == expected.marks
    # What the first rank sends this one is what it expects, and the other way around
    assert len(found.rows) == len(expected.rows) > 0
    if rank < local:
        for (sends, receives), (theirs, from_there) in zip(found.rows, expected.rows):
            assert (sends[0], receives[0]) == (from_there[rank], theirs[rank])
    stages = {tg.stage_at(recipe(folder), step) for step in range(1, SHAPE["steps"] + 1)}
    assert len(stages) >= 3
    compare_bytes(found, recipe(folder), size, local, rank)


def test_eight_ranks_that_differ_are_told_apart(first, monkeypatch):
    """What the test above compares does show another order and another size."""
    expected, folder = first(8, 8)
    assert {x.kind for x in expected.calls} >= KINDS
    with pytest.raises(AssertionError):
        compare_bytes(expected, tg.changed(recipe(folder), ngram_rows=384), 8, 8)


@pytest.mark.slow
def test_eight_ranks_of_eight_processes_have_the_losses_of_one(nursery, tmp_path):
    """Real processes and sums, in float32, through all stages."""
    config = recipe(tmp_path, dtype="float32", checkpoint_every="off")
    result = tg.train(tg.changed(config, run_dir=str(tmp_path / "alone")))
    expected = [*train_losses(tmp_path / "alone"), result["val_loss"]]
    done = nursery.run(options(config), tmp_path / "output", ranks=8)
    assert done.statuses == [0] * 8, done.err
    assert done.result["world_size"] == 8 and done.result["tokens"] == result["tokens"]
    found = [*train_losses(tmp_path / "run"), done.result["val_loss"]]
    assert found == pytest.approx(expected, rel=1e-4)


# The trainer, with rows of tables exchanged where ranks touch at most one in so many
ROWS = """
import sys
import door, train_gpt
from optim import shards, touched
touched.ONE_IN = {one_in}
begin = shards.all_to_all
def all_to_all(*args, **kwargs):
    print("rows", file=sys.stderr)
    return begin(*args, **kwargs)
shards.all_to_all = all_to_all
door.MODULES["train"] = "train_gpt"
sys.exit(door.main(["train", *{argv!r}]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4, 8])
def test_eight_ranks_that_exchange_touched_rows_train_as_with_all_rows(nursery, tmp_path, n):
    """Real processes; with touched rows they are stopped on their way, and resumed. Two ranks add
    up two numbers, in whatever order: their weights are the same to the last bit, in bf16. More
    ranks have another order than Gloo's, so weights differ by float32's rounding."""
    dtype = "bfloat16" if n == 2 else "float32"
    stopped = ([], [3, signal.SIGTERM]), (["--resume", "auto"], [])
    found = []
    for one_in, runs in (3, stopped), (10**9, [([], [])]):
        folder = tmp_path / str(one_in)
        folder.mkdir()
        argv = options(recipe(folder, dtype=dtype))
        says = ""
        for more, at in runs:
            program = ROWS.format(one_in=one_in, argv=[*argv, *more])
            run = nursery.run([], folder / "output", ranks=n, program=program, at=at)
            assert run.statuses == [143 if at else 0] * n, run.err
            says += run.err
        assert run.result["resumed_at"] == ([4] if one_in == 3 else [])
        assert (says.count("rows\n") >= 3) == (one_in == 3)
        losses = [*train_losses(folder / "run"), run.result["val_loss"]]
        found.append((losses, load_file(folder / "run/model.safetensors")))
    (losses, weights), (expected, others) = found
    assert losses == expected if n == 2 else losses == pytest.approx(expected, rel=1e-5)
    assert weights.keys() == others.keys()
    for name, w in weights.items():
        if n == 2:
            assert torch.equal(w, others[name]), name
        else:
            torch.testing.assert_close(w, others[name], atol=1e-4, rtol=1e-3)


# --------------------------------------------------------------------------------------------------
# One of them fails

# The trainer, in which one rank does something in its third step
PROGRAM = """
import os, signal, sys, time
import torch
import door, train_gpt
from base import InputError
from runtime.guard import Guard
judge = Guard.judge
def judge_or_fail(guard, step, *args):
    if step == 3 and os.environ["RANK"] == "{rank}":
        {does}
    return judge(guard, step, *args)
Guard.judge = judge_or_fail
door.MODULES["train"] = "train_gpt"
sys.exit(door.main(["train", *{argv!r}]))
"""
FAULTS = {
    "raises": ("raise ValueError('what is this')", "rank {}: ValueError: what is this", 1),
    "out of memory": (
        "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')",
        "rank {}: out of memory; the estimate was",
        2,
    ),
    "input": ("raise InputError('the shard is gone')", "rank {}: the shard is gone", 2),
}


def start(nursery, tmp_path, n, does, *more):
    argv = [*options(recipe(tmp_path, dtype="float32", checkpoint_every="off")), *more]
    program = PROGRAM.format(rank=n - 1, does=does, argv=argv)
    return nursery.start([], tmp_path / "output", ranks=n, program=program)


@pytest.mark.parametrize(
    "n, fault",
    [(2, "input"), *[pytest.param(2, fault, marks=SLOW) for fault in ("raises", "out of memory")]]
    + [pytest.param(8, fault, marks=SLOW) for fault in FAULTS],
)
def test_eight_ranks_end_with_the_error_of_one(nursery, tmp_path, n, fault):
    """It is on the screen with its rank, once; nobody trains on, or waits."""
    does, says, status = FAULTS[fault]
    run = start(nursery, tmp_path, n, does).wait(100)
    assert run.statuses[-1] == status and 0 not in run.statuses
    assert run.err.count(f"error: {says.format(n - 1)}") == 1, run.err
    assert "Traceback" not in run.err


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 8])
def test_eight_ranks_do_not_wait_for_one_that_is_stopped(nursery, tmp_path, monkeypatch, n):
    """Without a launcher, as torchrun starts them: the collective gives up after a while."""
    run = start(
        nursery, tmp_path, n, "os.kill(os.getpid(), signal.SIGSTOP)", "--hang-timeout", "2s"
    )
    others = run.pids[:-1]
    begin = time.monotonic()
    wait_for(lambda: not any(map(alive, others)), 90)
    assert time.monotonic() - begin < 60
    run.kill(rank=n - 1).wait()
    said = "another process has ended or cannot be reached"
    assert run.err.count(said) == n - 1 and "error: rank 0: another" in run.err, run.err


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("fault", ["stopped", "killed"])
def test_eight_ranks_that_were_launched_end_with_the_name_of_one(nursery, tmp_path, fault, n):
    """As ./run.sh starts them, on eight GPUs."""
    config = recipe(tmp_path, dtype="float32", steps=3000, checkpoint_every="off", eval_every=3000)
    argv = [*options(config), "--hang-timeout", "5s"]
    run = nursery.start(argv, tmp_path / "output", launch=(n, 0))
    run.until(lambda: len(rows(tmp_path / "run")) > 3, 600)
    children = Path(f"/proc/{run.pids[0]}/task/{run.pids[0]}/children").read_text().split()
    number = signal.SIGSTOP if fault == "stopped" else signal.SIGKILL
    os.kill(int(children[-1]), number)
    begin = time.monotonic()
    run.wait(600)
    # Steps of a busy machine may take seconds, of which twenty are allowed
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    times = [json.loads(line)["train_time"] for line in lines]
    longest = max(b - a for a, b in zip([0.0, *times], times))
    assert time.monotonic() - begin < 60 + 25 * longest
    said = dict(
        stopped=f"rank {n - 1} is stopped (SIGSTOP)",
        killed=f"rank {n - 1} of {n} was killed by SIGKILL",
    )
    assert [line for line in run.err.splitlines() if line.startswith("error: ")] == [
        line for line in run.err.splitlines() if line.startswith(f"error: {said[fault]}")
    ]
    assert run.err.count(said[fault]) == 1 and run.status in (1, 137)
