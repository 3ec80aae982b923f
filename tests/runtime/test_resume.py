"""A run that goes on from a checkpoint is the run that never stopped."""

import json
import math
import re
import shutil
import signal

import pytest
from helpers import PIECES, options, tiny, write_text
from hypothesis import given
from hypothesis import strategies as st
from processes import remains, rows, same

import train_gpt as tg
from base import InputError
from runtime import checkpoints, resume
from runtime.options import RunConfig, flat
from runtime.resume import differences, leaves

# Everything that has a state or changes on the way: the head is untied after step 6, batches grow
# after 8 and 16, windows (with yarn) and the number of targets change after 12; Adam updates in
# even steps, and stops wait for it. Not the sampled softmax, since each process has a sample of its
# own.
ALL = PIECES | dict(
    steps=24,
    eval_every=4,
    batch_tokens=(128, 192, 256),
    max_doc_len=(16, 24, 32),
    short_window=(8, 16),
    long_window=(16, 32),
    stage_lr=(1.0, 1.2),
    mtp=(2, 1),
    tied=0.25,
    normuon=True,
    weight_decay=0.1,
    adam_every=2,
    spike_sigmas=6.0,
    max_skips=2,
    checkpoint_every="10m",
    sample_tokens=3,
    keep_best=1,
)


class Runner:
    """Runs of one configuration, each in its folder."""

    def __init__(self, nursery, text, tmp, **fields):
        self.nursery = nursery
        self.text = text
        self.tmp = tmp
        self.fields = fields

    def argv(self, name, **fields):
        fields = dict(text=str(self.text), run_dir=str(self.tmp / name)) | self.fields | fields
        return options(tiny(fields.pop("text"), self.tmp, **fields))

    def __call__(self, name, *more, job=(), **fields):
        return self.nursery.run(
            [*self.argv(name, **fields), *more], self.tmp / "output", **dict(job)
        )

    def stop(self, name, step, *more, job=(), **fields):
        """Run until a signal, asking for it before this step, has stopped it; returns the step
        after which it did."""
        done = self(name, *more, job=dict(job) | dict(at=(step - 1, signal.SIGTERM)), **fields)
        assert done.status == 143, done.err
        stopped = int(re.search("stopped at step ([0-9]+) by a signal", done.err)[1])
        assert 0 <= stopped - step < {**self.fields, **fields}.get("adam_every", 1)
        return stopped


@pytest.fixture(scope="module")
def whole(nursery, text, tmp_path_factory):
    """A Runner with everything on, and its uninterrupted run."""
    runner = Runner(nursery, text, tmp_path_factory.mktemp("all"), **ALL)
    done = runner("whole")
    assert done.status == 0, done.err
    return runner


@pytest.fixture
def run(nursery, text, tmp_path):
    """A Runner of a small model."""
    return Runner(
        nursery,
        text,
        tmp_path,
        steps=6,
        eval_every=3,
        n_layer=1,
        value_embed_layers=(),
        row_len=16,
        batch_tokens=(64,),
        checkpoint_every="2",
        sample_tokens=0,
    )


def test_stopped_in_every_kind_of_place(whole):
    """One run, stopped in the middle of a stage, where the head is untied, where a validation is
    due, where batch and window change, and after the last step."""
    places = [whole.stop("stopped", step, "--resume", "auto") for step in (2, 6, 8, 11, 14, 16, 24)]
    assert places == [2, 6, 8, 12, 14, 16, 24]
    done = whole("stopped", "--resume", "auto")
    assert done.status == 0, done.err
    assert done.result["resumed_at"] == places
    same(whole.tmp / "stopped", whole.tmp / "whole")
    assert remains(whole.tmp / "stopped") == []


@pytest.mark.slow
@pytest.mark.parametrize("step", range(2, 25))
def test_stopped_after_any_step(whole, step):
    whole.stop(f"at{step}", step)
    assert whole(f"at{step}", "--resume", "auto").status == 0
    same(whole.tmp / f"at{step}", whole.tmp / "whole")


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_softmax_has_the_same_sample(run, ranks):
    """Stopped before and after the switch to all tokens, which 64 of 320 are not."""
    fields = dict(sampled_softmax=(64, 0), spike_sigmas=6.0, job=dict(ranks=ranks))
    assert run("whole", **fields).status == 0
    for step in (2, 4):
        run.stop("stopped", step, "--resume", "auto", **fields)
    assert run("stopped", "--resume", "auto", **fields).status == 0
    same(run.tmp / "stopped", run.tmp / "whole")
    tensors, _ = checkpoints.load(run.tmp / "whole/checkpoints/step-000006")
    # A loss over all tokens is not compared with one over a sample
    assert tensors["other/recent_losses"][0] == 3
    assert run("all", **fields | dict(sampled_softmax=(0,))).status == 0
    sampled, full = rows(run.tmp / "whole"), rows(run.tmp / "all")
    assert sampled[1]["train_loss"] != full[1]["train_loss"]


def test_the_sample_of_text_is_the_same(whole):
    """It depends on the rotary tables and the windows, which are not in the checkpoint."""
    samples = []
    for name in ("one", "two"):
        if name == "two":
            whole.stop(name, 24)
        err = whole(name, *["--resume", "auto"] * (name == "two"), sample_tokens=20).err
        samples.append(re.search(r"--- a sample after step \d+\n(.*)\n---", err, re.S)[1])
    assert samples[0] == samples[1]


def test_killed_between_the_last_checkpoint_and_the_result(whole):
    name = "killed_late"
    assert whole(name).status == 0
    (whole.tmp / name / "result.json").unlink()
    (whole.tmp / name / "model.safetensors").unlink()
    done = whole(name, "--resume", "auto")
    assert done.status == 0 and done.result["resumed_at"] == [24]
    same(whole.tmp / name, whole.tmp / "whole")


def test_two_processes_go_on_bit_for_bit(whole):
    """Also where the signal comes while gradients wait for Adam, each process having its own."""
    two = dict(ranks=2)
    assert whole("whole2", job=two).status == 0
    for step in (7, 12, 13):
        whole.stop("stopped2", step, "--resume", "auto", job=two)
    assert whole("stopped2", "--resume", "auto", job=two).status == 0
    same(whole.tmp / "stopped2", whole.tmp / "whole2")


def test_two_hosts_of_two_processes_go_on_bit_for_bit(whole):
    fields = dict(job=dict(ranks=4, hosts=2), steps=12)
    assert whole("whole4", **fields).status == 0
    whole.stop("stopped4", 5, **fields)
    assert whole("stopped4", "--resume", "auto", **fields).status == 0
    same(whole.tmp / "stopped4", whole.tmp / "whole4")


def test_another_number_of_processes_goes_on_with_the_same_tokens(whole):
    """1 -> 2 -> 2 hosts of 2 -> 3 -> 1; sums in another order differ in their last bits."""
    whole.stop("moved", 5)
    for step, job in ((9, dict(ranks=2)), (12, dict(ranks=4, hosts=2)), (17, dict(ranks=3))):
        whole.stop("moved", step, "--resume", "auto", job=job)
    done = whole("moved", "--resume", "auto")
    assert done.status == 0, done.err
    ours, theirs = rows(whole.tmp / "moved"), rows(whole.tmp / "whole")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for a, b in zip(ours, theirs):
        assert a == pytest.approx(b, rel=1e-4)
    assert (
        done.result["tokens"] == json.loads((whole.tmp / "whole/result.json").read_text())["tokens"]
    )


@pytest.mark.parametrize("fp8", ["off", "on"])
def test_bf16_weights_go_on_bit_for_bit(run, fp8):
    """Two weights in one: bf16, and what lies below. FP8 has scales from the step before."""
    fields = dict(dtype="bfloat16", fp8=fp8, steps=8)
    assert run("whole", **fields).status == 0
    run.stop("stopped", 3, **fields)
    assert run("stopped", "--resume", "auto", **fields).status == 0
    same(run.tmp / "stopped", run.tmp / "whole")


# --------------------------------------------------------------------------------------------------
# Which run, and from where


def test_auto_with_nothing_there_begins(run):
    done = run("new", "--resume", "auto")
    assert done.status == 0 and done.result["resumed_at"] == []


def test_auto_before_the_first_checkpoint_begins_again(run):
    assert run("whole").status == 0
    run.nursery.start(
        run.argv("killed", checkpoint_every="10m"), run.tmp / "output", step=0.2
    ).until(lambda: len(rows(run.tmp / "killed")) >= 2).kill().wait()
    done = run("killed", "--resume", "auto")
    assert done.status == 0, done.err
    assert done.result["resumed_at"] == []
    same(run.tmp / "killed", run.tmp / "whole")


def test_a_run_in_the_way_is_not_written_over(run):
    assert run("there").status == 0
    before = {p: p.read_bytes() for p in (run.tmp / "there").rglob("*") if p.is_file()}
    done = run("there")
    assert done.status == 2 and "holds a run already" in done.err and "--resume auto" in done.err
    assert before == {p: p.read_bytes() for p in before}


def test_by_the_folder_of_the_run_or_its_checkpoint(run):
    assert run("whole").status == 0
    for name, path in (("a", "a"), ("b", "b/checkpoints/step-000003")):
        run.stop(name, 3)
        done = run("", "--resume", run.tmp / path, run_dir="")
        assert done.status == 0, done.err
        assert done.result["run_dir"] == str(run.tmp / name) and done.result["resumed_at"] == [3]
        same(run.tmp / name, run.tmp / "whole")


def test_an_older_checkpoint_needs_a_folder_of_its_own(run):
    assert run("whole").status == 0
    run.stop("run", 5)
    older, newest = sorted((run.tmp / "run/checkpoints").glob("step-*"))
    step = int(older.name[-6:])
    done = run("", "--resume", older, run_dir="")
    assert (
        done.status == 2
        and f"{newest.name} is newer in this run; give another --run-dir" in done.err
    )
    done = run("branch", "--resume", older)
    assert done.status == 0 and done.result["resumed_at"] == [step]
    assert rows(run.tmp / "branch") == [r for r in rows(run.tmp / "whole") if r["step"] > step]
    assert (run.tmp / "branch/model.safetensors").read_bytes() == (
        run.tmp / "whole/model.safetensors"
    ).read_bytes()
    assert rows(run.tmp / "run")[-1]["step"] == 5  # the other one is as it was


def test_a_branch_that_was_stopped_goes_on_with_its_own_work(run):
    run.stop("run", 3)
    from_there = ("--resume", run.tmp / "run")
    run.stop("branch", 5, *from_there)
    done = run("branch", *from_there)  # the same command again, as a cluster gives it
    assert done.status == 0 and done.result["resumed_at"] == [3, 5]


@pytest.mark.parametrize("how", ["auto", "folder", "checkpoint"])
def test_a_finished_run_reports_its_result_again(run, how):
    first = run("run").result
    files = {p: p.stat().st_mtime_ns for p in (run.tmp / "run").rglob("*") if p.is_file()}
    path = dict(
        auto="auto", folder=run.tmp / "run", checkpoint=run.tmp / "run/checkpoints/step-000006"
    )[how]
    done = run("run", "--resume", path)
    assert done.status == 0 and done.result == first
    assert files == {p: p.stat().st_mtime_ns for p in files}


def test_the_status_of_a_finished_run_is_its_own(run):
    assert run("run", target=0.1).status == 3
    assert run("run", "--resume", "auto", target=0.1).status == 3


def test_auto_without_a_folder_takes_the_newest_unfinished_run_of_the_track(tmp_path):
    def of(name, finished=False, seeds=()):
        folder = tmp_path / "runs" / name
        for inner in [folder / seed for seed in seeds] or [folder]:
            inner.mkdir(parents=True)
            (inner / "log.txt").touch()
            if finished:
                (inner / "result.json").write_text('{"steps": 3}')
        return folder

    def auto(restarted=False, how="auto", repeat=1):
        options = RunConfig(resume=how, repeat=repeat)
        return resume.run_dir_of(options, "tiny", 0, tmp_path / "runs", restarted)

    older = of("20260101T000000-tiny")
    newer = of("20260102T000000-tiny")
    of("20260103T000000-tiny", finished=True)
    of("20260104T000000-other")
    of("20260105T000000-tiny", finished=True, seeds=("seed0", "seed1"))
    seeds = of("20260106T000000-tiny", seeds=("seed0", "seed1"))
    of("20260107T000000-tiny", finished=True, seeds=("seed0", "seed1"))
    assert auto() == auto(how="", restarted=True) == (newer, True)
    (newer / "result.json").write_text('{"steps": 3}')
    assert auto() == (older, True)
    assert auto(repeat=2) == (seeds, True)
    (older / "result.json").write_text('{"steps": 3}')
    folder, resuming = auto()
    assert not folder.exists() and folder.parent == tmp_path / "runs" and resuming
    assert auto(how="")[1] is False


def test_repeat_with_one_seed_finished_and_one_begun(run):
    seeds = dict(repeat=2, steps=5)
    whole = run("whole", **seeds)
    assert whole.status == 0 and whole.out.count("\n") == 2
    for how in ("auto", run.tmp / "again"):
        shutil.rmtree(run.tmp / "again", ignore_errors=True)
        shutil.copytree(run.tmp / "whole", run.tmp / "again")
        second = run.tmp / "again/seed1"
        (second / "result.json").unlink()
        shutil.rmtree(second / "checkpoints/step-000005")
        step = int(max((second / "checkpoints").glob("step-*")).name[-6:])
        done = run("again", "--resume", how, **seeds)
        assert done.status == 0, done.err
        results = list(map(json.loads, done.out.splitlines()))
        assert [r["resumed_at"] for r in results] == [[], [step]]
        for seed in ("seed0", "seed1"):
            same(run.tmp / "again" / seed, run.tmp / "whole" / seed)


# --------------------------------------------------------------------------------------------------
# What does not fit is refused with what differs, before anything is written


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(n_embd=48), "n_embd: 48 here, 32 in the checkpoint"),
        (
            dict(n_layer=2, steps=7),
            "n_layer: 2 here, 1 in the checkpoint; steps: 7 here, 6 in the checkpoint",
        ),
        (dict(batch_tokens=(64, 128)), "batch_tokens: [64, 128] here, [64] in the checkpoint"),
        (dict(seed=1), "seed: 1 here, 0 in the checkpoint"),
        (dict(dtype="bfloat16"), 'dtype: "bfloat16" here, "float32" in the checkpoint'),
    ],
)
def test_another_recipe(run, fields, said):
    run.stop("run", 3)
    before = {p: p.read_bytes() for p in (run.tmp / "run").rglob("*") if p.is_file()}
    done = run("run", "--resume", "auto", **fields)
    assert done.status == 2 and said in done.err and "--warm-start" in done.err
    assert done.err.count("\n") == 1 and "Traceback" not in done.err
    assert before == {p: p.read_bytes() for p in (run.tmp / "run").rglob("*") if p.is_file()}


def test_what_is_no_part_of_the_recipe_may_change(run):
    run.stop("run", 3)
    done = run(
        "run",
        "--resume",
        "auto",
        eval_every=2,
        keep_last=5,
        micro_tokens=32,
        sample_tokens=1,
        target=0.5,
        checkpoint_every="1",
        recompute="on",
    )
    assert done.status == 3, done.err


def test_an_option_younger_than_the_checkpoint_had_its_default():
    fields = flat(tg.configure())
    del fields["sampled_softmax"]
    meta = dict(config=json.loads(json.dumps(fields)), data_fingerprint="x")
    resume.check_fit(tg.configure(), tg.FREE, "x", meta)
    said = re.escape("sampled_softmax: [64] here, [0] in the checkpoint")
    with pytest.raises(InputError, match=said):
        resume.check_fit(tg.configure(sampled_softmax=(64,)), tg.FREE, "x", meta)


def test_another_text(run, tmp_path):
    run.stop("run", 3)
    other = write_text(tmp_path / "other.txt", 4000, seed=1)
    done = run("run", "--resume", "auto", text=str(other))
    assert done.status == 2 and re.search(r"data: [0-9a-f]{16} here, [0-9a-f]{16} ", done.err), (
        done.err
    )
    same_text = shutil.copy(run.text, tmp_path / "copy.txt")
    assert run("run", "--resume", "auto", text=str(same_text)).status == 0


def test_another_format_version(run, monkeypatch):
    run.stop("run", 3)
    monkeypatch.setattr(checkpoints, "VERSION", 99)
    with pytest.raises(InputError, match="expected format version 99, found 1"):
        tg.train(tiny(run.text, run.tmp, run_dir=str(run.tmp / "run"), resume="auto", **run.fields))


@pytest.mark.parametrize("what", ["missing", "empty", "a file"])
def test_nothing_to_resume(run, what):
    path = run.tmp / "nothing"
    if what == "empty":
        path.mkdir()
    elif what == "a file":
        path.touch()
    done = run("new", "--resume", path)
    assert done.status == 2 and f"--resume {path}" in done.err and done.err.count("\n") == 1, (
        done.err
    )
    assert not (run.tmp / "new").exists()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.mark.parametrize(
    "ours, theirs, lines",
    [
        ({}, {}, []),
        (dict(a=(1, 2.5)), dict(a=[1, 2.5]), []),
        (dict(a=1), dict(a=1.0), []),
        (dict(a=math.nan, b=math.inf), dict(a=math.nan, b=math.inf), []),
        (
            dict(n_layer=4, lr=0.1),
            dict(lr=0.1, n_layer=6),
            ["n_layer: 4 here, 6 in the checkpoint"],
        ),
        (
            dict(a="x"),
            dict(b=None),
            ['a: "x" here, nothing in the checkpoint', "b: nothing here, null in the checkpoint"],
        ),
        (dict(a="nothing"), {}, ['a: "nothing" here, nothing in the checkpoint']),
        (
            dict(a=dict(b=1, c=dict(d=2))),
            dict(a=dict(b=1, c=dict(d=3))),
            ["a.c.d: 2 here, 3 in the checkpoint"],
        ),
        (
            dict(a={}),
            dict(a=dict(b=1)),
            ["a: {} here, nothing in the checkpoint", "a.b: nothing here, 1 in the checkpoint"],
        ),
    ],
)
def test_differences(ours, theirs, lines):
    assert differences(ours, theirs) == lines


def test_differences_of_long_values_are_shown_where_they_part():
    (line,) = differences(dict(a=[0] * 500 + [1]), dict(a=[0] * 500 + [2] * 200))
    assert " 1] here, " in line and " 2, 2" in line and len(line) < 180


@given(
    st.dictionaries(st.text(max_size=3), JSON, max_size=3),
    st.dictionaries(st.text(max_size=3), JSON, max_size=3),
)
def test_differences_name_what_differs(ours, theirs):
    assert differences(ours, ours) == []
    assert bool(differences(ours, theirs)) == bool(differences(theirs, ours))
    names = [name for name, _ in [*leaves(ours), *leaves(theirs)]]
    if "" not in names and not any("." in name for name in names):
        assert bool(differences(ours, theirs)) == (ours != theirs)


# --------------------------------------------------------------------------------------------------
# Weights only


def test_warm_start_takes_the_weights_and_nothing_else(run):
    run("first")
    checkpoint = run.tmp / "first/checkpoints/step-000006"
    for name, path in (("by_run", run.tmp / "first"), ("by_checkpoint", checkpoint)):
        done = run(name, "--warm-start", path, seed=5, muon_lr=0.01, steps=4)
        assert done.status == 0, done.err
    assert rows(run.tmp / "by_run") == rows(run.tmp / "by_checkpoint")  # fp32: both have the same
    first, second = rows(run.tmp / "first"), rows(run.tmp / "by_run")
    assert [row["step"] for row in second] == [1, 2, 3, 3, 4, 4]
    assert second[0]["train_loss"] < first[0]["train_loss"] - 0.3  # where the other ended


def test_a_warm_started_run_resumes_from_its_own_work(run):
    run("first")
    start = ("--warm-start", run.tmp / "first")
    assert run("whole", *start, seed=5).status == 0
    run.stop("stopped", 3, *start, seed=5)
    assert run("stopped", "--resume", "auto", *start, seed=5).status == 0
    same(run.tmp / "stopped", run.tmp / "whole")


def test_what_a_warm_start_refuses(run):
    """In one line, and before anything is written."""
    run("first")

    def refused(path, **fields):
        done = run("other", "--warm-start", path, **fields)
        assert done.status == 2 and done.err.count("\n") == 1, done.err
        assert rows(run.tmp / "other") == [] and not (run.tmp / "other/log.txt").exists()
        return done.err

    said = refused(run.tmp / "first", n_embd=48)
    assert "does not fit this model: embed: [320, 48] here, [320, 32] in" in said
    said = refused(run.tmp / "missing")
    assert "expected a run's folder with model.safetensors, or a checkpoint" in said
    weights = run.tmp / "first/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    assert "model.safetensors" in refused(run.tmp / "first")


def test_a_checkpoint_is_never_ahead_of_the_log(run, monkeypatch):
    """On a GPU losses arrive two steps late; a run killed after a checkpoint must not lose their
    lines."""
    ahead = []
    save = tg.Checkpoints.save

    def look(self, step, *args, **kwargs):
        logged = [row["step"] for row in rows(self.folder.parent) if "train_loss" in row]
        ahead.append(step - max(logged, default=0))
        return save(self, step, *args, **kwargs)

    init = tg.Guard.__init__

    def late(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.lag = 2

    monkeypatch.setattr(tg.Guard, "__init__", late)
    monkeypatch.setattr(tg.Checkpoints, "save", look)
    tg.train(tiny(run.text, run.tmp, **run.fields, run_dir=str(run.tmp / "run")))
    assert len(ahead) >= 3 and set(ahead) == {0}
