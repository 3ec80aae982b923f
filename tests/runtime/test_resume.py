"""A run that goes on from a checkpoint is the run that never stopped."""

import json
import re
import shutil
import signal

import pytest
import torch
from helpers import PIECES, Runner, tiny, write_text
from processes import remains, rows, same

import train_gpt as tg
from base import InputError
from optim import Optimizer
from runtime import checkpoints, resume, saved
from runtime.guard import Guard
from runtime.options import flat
from runtime.session import is_snapshot

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


@pytest.fixture(scope="module")
def whole(nursery, text, tmp_path_factory):
    """A Runner with everything on, and its uninterrupted run."""
    runner = Runner(nursery, text, tmp_path_factory.mktemp("all"), **ALL)
    done = runner("whole")
    assert done.status == 0, done.err
    return runner


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


@pytest.mark.slow
def test_two_processes_go_on_bit_for_bit(whole):
    """Also where the signal comes while gradients wait for Adam, each process having its own."""
    two = dict(ranks=2)
    assert whole("whole2", job=two).status == 0
    for step in (7, 12, 13):
        whole.stop("stopped2", step, "--resume", "auto", job=two)
    assert whole("stopped2", "--resume", "auto", job=two).status == 0
    same(whole.tmp / "stopped2", whole.tmp / "whole2")


@pytest.mark.slow
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


@pytest.mark.parametrize("fp8", ["off", pytest.param("on", marks=pytest.mark.slow)])
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
# More steps, another target, more time


def test_more_steps_go_on_from_the_end(run):
    assert run("run").status == 0
    done = run("run", "--resume", "auto", steps=10)
    assert done.status == 0, done.err
    assert done.result["steps"] == 10 and done.result["resumed_at"] == [6]
    # Of the process there is only what it trained itself
    before = json.loads((run.tmp / "run/metrics.jsonl").read_text().split("\n")[5])["train_time"]
    assert 0 < done.result["train_s"] <= done.result["train_time_s"] - before + 0.02
    assert "4 steps more than the 6 planned: the learning rate is that of a run of 10" in done.err
    losses = [row["step"] for row in rows(run.tmp / "run") if "train_loss" in row]
    assert losses == [*range(1, 11)]
    config = json.loads((run.tmp / "run/config.json").read_text())["config"]
    assert config["steps"] == 10 and config["earlier"] == [[6, 6, "replan"]]

    # Now that is what was asked for, and less cannot be
    again = run("run", "--resume", "auto", steps=10)
    assert again.status == 0 and again.result == done.result
    assert "run had finished before: it took all 10 steps. This is its result again" in again.err
    fewer = run("run", "--resume", "auto", steps=9)
    assert fewer.status == 2 and "steps: 9 here, 10 in the run: they can only grow" in fewer.err
    other = run("run", "--resume", "auto", steps=10, extend="cooldown")
    assert other.status == 2 and 'extend: "cooldown" here, "replan" in the run' in other.err


@pytest.mark.parametrize("extend", ["replan", "cooldown"])
def test_added_steps_have_the_rate_of_their_schedule(run, monkeypatch, extend):
    """Learning rate and momentum that reach the optimizer, before and after."""
    given = []
    step = Optimizer.step
    monkeypatch.setattr(
        Optimizer,
        "step",
        lambda self, lr, momentum, ok: given.append((lr, momentum)) or step(self, lr, momentum, ok),
    )
    config = tiny(run.text, run.tmp, **run.fields)
    tg.train(config)
    tg.train(tg.changed(config, steps=12, extend=extend, resume="auto"))
    first, longer = config.schedule, tg.Schedule(steps=12, earlier=((6, 6, extend),))
    expected = []
    for schedule, steps in ((first, range(1, 7)), (longer, range(7, 13))):
        for i in steps:
            lr = tg.lr_scale(schedule, schedule.progress(i), schedule.annealing(i))
            expected.append((lr, tg.muon_momentum(schedule.annealing(i))))
    assert given == expected and given[6][0] > 1.5 * given[5][0]


@pytest.mark.slow
def test_added_steps_that_are_stopped_are_those_that_were_not(whole):
    """Of a run with everything on, which gets steps in the middle and, after its end, again."""
    for name in ("longer", "longer_stopped"):
        whole.stop(name, 11)
    more = ("--resume", "auto")
    assert whole("longer", *more, steps=32).status == 0
    places = [whole.stop("longer_stopped", step, *more, steps=32) for step in (16, 20)]
    assert whole("longer_stopped", *more, steps=32).status == 0
    same(whole.tmp / "longer_stopped", whole.tmp / "longer")
    # A result counts until there is a checkpoint of a later step
    again = dict(steps=40, extend="cooldown")
    places.append(whole.stop("longer_stopped", 36, *more, **again))
    done = whole("longer_stopped", *more, **again)
    assert done.status == 0 and done.result["resumed_at"] == [12, *places[:2], 32, places[2]]
    assert whole("longer", *more, **again).status == 0
    same(whole.tmp / "longer_stopped", whole.tmp / "longer")


def test_another_target_goes_on_as_if_it_had_never_stopped(run):
    fields = dict(eval_every=1)
    assert run("whole", target=0.1, **fields).status == 3
    assert run("run", target=100.0, **fields).result["steps"] == 1
    done = run("run", "--resume", "auto", target=0.1, **fields)
    assert done.status == 3 and done.result["resumed_at"] == [1] and done.result["target"] == 0.1
    same(run.tmp / "run", run.tmp / "whole")
    # One that it meets as it is
    done = run("run", "--resume", "auto", target=50.0, **fields)
    assert done.status == 0 and done.result["reached"] and done.result["target"] == 50.0
    assert "meets the target of 50.0. This is its result again" in done.err


def test_more_time_goes_on(run):
    assert run("whole").status == 0
    first = run("run", max_time="0.0001s")
    assert first.result["steps"] == 1
    same_again = run("run", "--resume", "auto", max_time="0.0001s")
    assert same_again.result == first.result and "s of at most 0.0001s" in same_again.err
    done = run("run", "--resume", "auto", max_time="1h")
    assert done.status == 0 and done.result["steps"] == 6
    ours, theirs = (run.tmp / name / "model.safetensors" for name in ("run", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_finished_run_without_checkpoints_goes_on_with_its_weights(run):
    assert run("run", checkpoint_every="off").status == 0
    done = run("run", "--resume", "auto", checkpoint_every="off")
    assert done.status == 0 and "had finished before" in done.err
    done = run("run", "--resume", "auto", checkpoint_every="off", steps=9)
    assert done.status == 0 and done.result["resumed_at"] == [6], done.err
    assert "run has no checkpoint: it goes on with the weights of model.safetensors" in done.err
    assert done.result["tokens"] == 9 * 64
    losses = [row["train_loss"] for row in rows(run.tmp / "run") if "train_loss" in row]
    assert len(losses) == 9 and losses[6] < losses[0] - 0.3


def test_what_a_finished_run_was_not_made_with_is_refused(run, tmp_path):
    """Not answered with its result."""
    assert run("run").status == 0
    other = write_text(tmp_path / "other.txt", 4000, seed=1)
    before = {p: p.read_bytes() for p in (run.tmp / "run").rglob("*") if p.is_file()}
    done = run(
        "run", "--resume", run.tmp / "run", text=str(other), tokenizer="chars", seed=7, steps=9
    )
    assert done.status == 2 and done.out == "" and done.err.count("\n") == 1, done.err
    assert "seed: 7 here, 0 in the run" in done.err
    assert 'tokenizer: "chars" here, "bytes" in the run' in done.err
    assert "other.txt, " in done.err and "words.txt, " in done.err and "steps" not in done.err
    assert before == {p: p.read_bytes() for p in before}
    done = run("run", "--resume", "auto", warm_start="elsewhere")
    assert 'warm_start: "elsewhere" here, "" in the run' in done.err


def test_a_result_of_which_nothing_is_known_is_not_shown(run):
    assert run("run", checkpoint_every="off").status == 0
    (run.tmp / "run/config.json").unlink()
    done = run("run", "--resume", "auto", checkpoint_every="off")
    assert done.status == 2 and done.out == "" and "nor the config.json" not in done.out
    assert "holds a result, and neither a checkpoint nor the config.json" in done.err


def test_a_run_that_is_named_brings_its_options(run):
    """What is not given is the run's, what is given is compared; a machine's are the command's."""
    assert run("run").status == 0
    short = ["--resume", f"{run.tmp / 'run'}/", "--no-compile", "--cache-dir", run.tmp / "cache"]
    done = run.nursery.run([*short, "--steps", 8], run.tmp / "output")
    assert done.status == 0, done.err
    assert done.result["steps"] == 8 and done.result["resumed_at"] == [6]
    done = run.nursery.run([*short, "--n-embd", 48], run.tmp / "output")
    assert done.status == 2 and ": the run does not fit: n_embd: 48 here, 32 in" in done.err


def test_options_of_a_run_with_an_option_that_is_gone(tmp_path):
    """It is left to the comparison to say so."""
    fields = flat(tg.configure()) | dict(gone=1, steps=77, track="laptop")
    said = dict(config=fields, data="x", environment={})
    (tmp_path / "config.json").write_text(json.dumps(said))
    config = tg.parse_args(["--resume", str(tmp_path)])
    assert config.schedule.steps == 77 and config.run.resume == str(tmp_path)
    meta = resume.left_by(tmp_path).meta
    assert resume.misfits(config, "x", meta) == ["gone: nothing here, 1 in the run"]


@pytest.mark.parametrize("given", ["nowhere", "x" * 5000, "\0", "auto", "", None])
def test_what_names_no_run_brings_no_options(given):
    """It is refused later, where all options are read."""
    assert resume.options_of(given) == {}


def test_all_ranks_train_the_same(monkeypatch):
    """One that does not see the folder to go on from would take other options."""

    def share(world, ours):
        assert "n_head" in ours and "run_dir" not in ours  # where it is kept may differ
        return ours | dict(n_layer=7)

    monkeypatch.setattr(resume, "share", share)
    with pytest.raises(InputError, match="other options: n_layer: 4 here, 7 on the first rank$"):
        resume.refuse_other_options(tg.configure(n_layer=4), tg.World())


# --------------------------------------------------------------------------------------------------
# What does not fit is refused with what differs, before anything is written


@pytest.mark.parametrize(
    "fields, said",
    [
        (dict(n_embd=48), "n_embd: 48 here, 32 in the run"),
        (
            dict(n_layer=2, steps=5),
            "n_layer: 2 here, 1 in the run; steps: 5 here, 6 in the run: they can only grow",
        ),
        (dict(batch_tokens=(64, 128)), "batch_tokens: [64, 128] here, [64] in the run"),
        (dict(seed=1), "seed: 1 here, 0 in the run"),
        (dict(dtype="bfloat16"), 'dtype: "bfloat16" here, "float32" in the run'),
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
    assert resume.misfits(tg.configure(), "x", meta) == []
    lines = resume.misfits(tg.configure(sampled_softmax=(64,)), "x", meta)
    assert lines == ["sampled_softmax: [64] here, [0] in the run"]


def test_another_text(run, tmp_path):
    run.stop("run", 3)
    other = write_text(tmp_path / "other.txt", 4000, seed=1)
    done = run("run", "--resume", "auto", text=str(other))
    assert done.status == 2 and re.search(
        r"data: \S+other.txt, [0-9a-f]{16} here, \S+words.txt, [0-9a-f]{16} ", done.err
    ), done.err
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


# --------------------------------------------------------------------------------------------------
# The log


def test_a_checkpoint_is_never_ahead_of_the_log(run, monkeypatch):
    """On a GPU losses arrive two steps late; a run killed after a checkpoint must not lose their
    lines."""
    ahead = []
    save = checkpoints.Checkpoints.save

    def look(self, step, *args, **kwargs):
        logged = [row["step"] for row in rows(self.folder.parent) if "train_loss" in row]
        ahead.append(step - max(logged, default=0))
        return save(self, step, *args, **kwargs)

    init = Guard.__init__

    def late(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.lag = 2

    monkeypatch.setattr(Guard, "__init__", late)
    monkeypatch.setattr(checkpoints.Checkpoints, "save", look)
    tg.train(tiny(run.text, run.tmp, **run.fields, run_dir=str(run.tmp / "run")))
    assert len(ahead) >= 3 and set(ahead) == {0}


def test_a_killed_run_keeps_the_weights_of_the_same_steps(whole):
    """Killed in step 21: the weights of step 20 are newer than any checkpoint."""
    fields = dict(snapshots=5, checkpoint_every="8")
    assert whole("kept", **fields).status == 0
    steps = saved.snapshot_steps(whole.tmp / "kept")
    assert steps == [1, 2, 4, 5, 10, 15, 20]
    died = whole("killed", job=dict(at=(20, signal.SIGKILL)), **fields)
    assert died.status == -signal.SIGKILL
    done = whole("killed", "--resume", "auto", **fields)
    assert done.status == 0
    assert done.result["resumed_at"][0] < 20
    assert saved.snapshot_steps(whole.tmp / "killed") == steps
    for step in steps:
        name = saved.step_weights(step)
        ours, theirs = ((whole.tmp / run / name).read_bytes() for run in ("killed", "kept"))
        assert ours == theirs, step
    assert remains(whole.tmp / "killed") == []

    # They are weights of their step: of the last one, what a run of so many steps would leave
    run = whole.tmp / "kept"
    first, last = (saved.load_run(run, step=step) for step in (steps[0], steps[-1]))
    assert not torch.equal(first.model.embed, last.model.embed)
    assert first.options == last.options
    with pytest.raises(InputError, match="no weights of step 3: expected one of 1 2 4 5 10 15 20"):
        saved.load_run(run, step=3)


def test_which_steps_are_kept():
    steps = [step for step in range(1, 41) if is_snapshot(step, 10)]
    assert steps == [1, 2, 4, 8, 10, 20, 30, 40]
    assert not any(is_snapshot(step, 0) for step in range(1, 41))
    assert [step for step in range(1, 10) if is_snapshot(step, 8)] == [1, 2, 4, 8]
