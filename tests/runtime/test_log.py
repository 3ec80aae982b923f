"""runtime/log.py: a resumed run's files, and what happens where nothing can be written."""

import contextlib
import json
import math
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from base import to_json
from base.files import aside
from base.json import finite
from records.read import read_runs
from records.source import digest_of, header_line, source_of
from runtime.log import Log

ROOT = Path(__file__).parents[2]
CONFIG = dict(
    track="toy",
    target=3.0,
    target_metric="val_loss",
    steps=20,
    seed=0,
    batch_tokens=[10],
    eval_every=5,
)
ENVIRONMENT = dict(
    date="2026-03-04T05:06:07+00:00", device="Some CPU", world_size=1, probe=dict(copy=1e10)
)
RESULT = dict(
    track="toy",
    target_metric="val_loss",
    target=3.0,
    reached=False,
    val_loss=4.0,
    train_time_s=2.0,
    steps=20,
)
ALL = [
    "config.json",
    "log.txt",
    "metrics.jsonl",
    "model.safetensors",
    "result.json",
    "source.tar.bz2",
]


def test_control_characters_stay_off_the_terminal(tmp_path, capsys):
    """A model says what it has read: sequences that color a screen, too. The file has them."""
    with Log(tmp_path, 1) as log:
        log.say("\x1b[31mred\ttab\r\nline\rover\x9b")
    assert "\\x1b[31mred\ttab\nline\\x0dover\\x9b\n" in capsys.readouterr().err
    assert "\x1b[31mred\ttab\r\nline\rover\x9b" in (tmp_path / "log.txt").read_bytes().decode()


SOURCE = source_of({"train_gpt.py": b"the source\n"})


def header(log, source=SOURCE, config=CONFIG, **environment):
    log.header(source, environment=ENVIRONMENT | environment, config=config, data="f00d")


def train(log, first, last, pace=0.1):
    """Steps as the trainer logs them, with a validation every five and a remark now and then."""
    for step in range(first, last + 1):
        log.step(step, 20, "train", 5 - step / 20, step * pace)
        if step % 5 == 0:
            log.step(step, 20, "val", 6 - step / 10, step * pace, val_bpb=3 - step / 20)
        if step % 7 == 0:
            log.say(f"remark at {step}", quiet=True)


def whole_run(folder, last=20, finish=False):
    with Log(folder, 20) as log:
        header(log)
        train(log, 1, last)
        if finish:
            log.save_weights({"w": torch.ones(3)})
            log.finish(RESULT)
    return folder


def resume(folder, step, last=20, pace=0.1, finish=False, **changed):
    with Log(folder, 20, resume_step=step) as log:
        header(log, **changed)
        train(log, step + 1, last, pace)
        if finish:
            log.save_weights({"w": torch.ones(3)})
            log.finish(RESULT)
    return folder


def content(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def without(folder, *lines):
    """log.txt without these lines."""
    return [line for line in (folder / "log.txt").read_text().splitlines() if line not in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never killed."""
    return whole_run(tmp_path_factory.mktemp("never killed") / "run")


# --- resuming


@pytest.mark.parametrize(
    "killed_at, step", [(12, 10), (9, 7), (10, 10), (20, 10), (19, 5), (3, 0), (9, 9)]
)
def test_a_resumed_run_reads_like_one_that_was_never_killed(tmp_path, capsys, killed_at, step):
    whole = whole_run(tmp_path / "whole")
    folder = resume(whole_run(tmp_path / "run", killed_at), step)
    for name in ("metrics.jsonl", "config.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    said = f"resumed from step {step}"
    assert (
        without(folder, said) == without(whole)
        and (folder / "log.txt").read_text().count(f"\n{said}\n") == 1
    )
    assert sorted(os.listdir(folder)) == sorted(os.listdir(whole))
    assert said in capsys.readouterr().err
    (run,) = read_runs(folder)
    assert [p.step for p in run.train] == list(range(1, 21)) and [p.step for p in run.val] == [
        5,
        10,
        15,
        20,
    ]
    assert (run.steps, run.time_s, run.finished, run.notes) == (20, 2.0, True, [])
    assert read_runs(folder / "log.txt") == read_runs(folder)


def test_only_times_differ_on_a_slower_machine(tmp_path):
    whole, folder = (
        whole_run(tmp_path / "whole"),
        resume(whole_run(tmp_path / "run", 12), 10, pace=0.2),
    )

    def rows(folder):
        return [
            {k: v for k, v in json.loads(line).items() if k != "train_time"}
            for line in open(folder / "metrics.jsonl")
        ]

    assert rows(folder) == rows(whole)
    assert read_runs(folder)[0].time_s == 4.0


@given(cut=st.tuples(st.integers(0, 200), st.integers(0, 200)), step=st.integers(0, 12))
@settings(max_examples=25, deadline=None)
def test_wherever_the_kill_cut_the_files(whole, tmp_path_factory, cut, step):
    """Each file ends anywhere after what was there at the checkpoint."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    whole_run(folder, step)
    least = {name: len((folder / name).read_bytes()) for name in ("log.txt", "metrics.jsonl")}
    shutil.rmtree(folder)
    whole_run(folder, 14)
    for (name, size), more in zip(least.items(), cut):
        (folder / name).write_bytes((folder / name).read_bytes()[: size + more])
    resume(folder, step)
    assert (folder / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert without(folder, f"resumed from step {step}") == without(whole)


@pytest.mark.parametrize(
    "name, size", [("log.txt", 5), ("log.txt", 150), ("log.txt", 300), ("log.txt", 0)]
)
def test_killed_in_the_header(tmp_path, name, size):
    """Before the first step there is no checkpoint: from step 0 on everything is written again."""
    folder = whole_run(tmp_path / "run", 0)
    (folder / name).write_bytes((folder / name).read_bytes()[:size])
    resume(folder, 0)
    assert without(folder, "resumed from step 0") == without(whole_run(tmp_path / "whole"))
    assert read_runs(folder)[0].config == CONFIG


def test_resumed_twice(tmp_path):
    """From a later step: both are told; from the same or an earlier one: what came of the first
    attempt is gone."""
    whole = (whole_run(tmp_path / "whole") / "metrics.jsonl").read_bytes()
    folder = resume(resume(whole_run(tmp_path / "run", 7), 5, 13), 10)
    assert [line for line in without(folder) if "resumed" in line] == [
        "resumed from step 5",
        "resumed from step 10",
    ]
    for step in (10, 5, 3):
        resume(folder, step)
        said = [line for line in without(folder) if "resumed" in line]
        assert said == [f"resumed from step {s}" for s in (5, 10) if s < step] + [
            f"resumed from step {step}"
        ]
        assert (folder / "metrics.jsonl").read_bytes() == whole


def test_what_a_killed_process_left_aside_is_deleted(tmp_path):
    folder = whole_run(tmp_path / "run", 7)
    aside(folder / "source.tar.bz2").write_text("half")
    (folder / "mine.tmp").touch()
    resume(folder, 5)
    assert [name for name in os.listdir(folder) if name.endswith(".tmp")] == ["mine.tmp"]


def test_losses_that_come_in_after_a_validation_beyond_are_kept(tmp_path):
    """On a GPU the host runs ahead: step 10 is validated before the losses of steps 8 to 10 have
    arrived."""
    folder = tmp_path / "run"
    with Log(folder, 20) as log:
        header(log)
        train(log, 1, 7)
        log.step(10, 20, "val", 5.0, 1.0)
        log.say("a remark at 10", quiet=True)
        train(log, 8, 9)
    resume(folder, 9, 9)
    steps = [json.loads(line)["step"] for line in open(folder / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9]
    log = without(folder)
    assert sum(line.startswith("step:") for line in log) == 10 and "a remark at 10" not in log


def test_a_resumed_run_whose_source_is_another(tmp_path, capsys):
    folder = whole_run(tmp_path / "run", 12)
    before = (folder / "config.json").read_bytes()
    other = source_of({"train_gpt.py": b"another source\n"})
    resume(folder, 10, source=other, date="2027-01-01T00:00:00+00:00")
    log = (folder / "log.txt").read_text()
    name = f"source-{other.digest[:8]}.tar.bz2"
    assert log.startswith(header_line(SOURCE) + "\n")
    assert log.count(header_line(other, name) + "\n") == 1
    assert digest_of(folder / "source.tar.bz2") == SOURCE.digest
    assert digest_of(folder / name) == other.digest
    assert "the source is not the one this run began with" in capsys.readouterr().err
    assert (folder / "config.json").read_bytes() == before
    (run,) = read_runs(folder / "log.txt")
    assert run.steps == 20 and run.tokens == 200


def test_a_resumed_run_on_another_machine(tmp_path, capsys):
    folder = whole_run(tmp_path / "run", 12)
    before = content(folder)
    resume(folder, 10, device="Another CPU", date="2027-01-01T00:00:00+00:00", probe=dict(copy=1.0))
    said = "resumed with environment.device 'Another CPU' (was 'Some CPU')"
    assert capsys.readouterr().err.count(said) == without(folder).count(said) == 1
    assert (folder / "config.json").read_bytes() == before["config.json"]


def test_what_was_said_before_the_first_header_is_not_another_source(tmp_path):
    folder = tmp_path / "run"
    with Log(folder, 20) as log:
        log.say("running without torch.compile", quiet=True)
        header(log)
        train(log, 1, 10)
    resume(folder, 10)
    assert (folder / "log.txt").read_text().count("source: ") == 1


def test_a_run_whose_log_holds_its_source_goes_on_with_another(tmp_path, capsys):
    """Runs of before 2026-12 have the text of their source where ours have its digest."""
    folder = whole_run(tmp_path / "run", 12)
    log = (folder / "log.txt").read_text()
    (folder / "log.txt").write_text(log.replace(header_line(SOURCE), "import torch\n\n"))
    (folder / "source.tar.bz2").unlink()
    resume(folder, 10)
    assert "the source is not the one this run began with" in capsys.readouterr().err
    assert digest_of(folder / f"source-{SOURCE.digest[:8]}.tar.bz2") == SOURCE.digest
    assert read_runs(folder)[0].steps == 20


def test_config_json_comes_back_from_the_log(tmp_path):
    folder = whole_run(tmp_path / "run", 12)
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").unlink()
    resume(folder, 10, device="Another CPU")
    assert (folder / "config.json").read_bytes() == config


def test_a_run_is_not_written_over(tmp_path):
    folder = whole_run(tmp_path / "run", finish=True)
    before = content(folder)
    with pytest.raises(FileExistsError, match="holds a run already"):
        Log(folder, 20)
    assert content(folder) == before


def test_resuming_on_a_full_disk_changes_nothing(tmp_path, monkeypatch):
    folder = whole_run(tmp_path / "run", 12)
    before = content(folder)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Log(folder, 20, resume_step=10)
    assert content(folder) == before
    with Log(folder, 20, resume_step=12):  # nothing to drop, nothing to write
        pass


def test_other_ranks_write_nothing(tmp_path):
    with Log(tmp_path / "run", 20, active=False, resume_step=3) as log:
        header(log)
        train(log, 1, 20)
        log.progress(3, "x")
        log.save_weights({})
        log.finish(RESULT)
    assert not (tmp_path / "run").exists()


# --- disks that are full, folders that are gone


def one_complaint(err, name):
    said = [line for line in err.splitlines() if "cannot be written" in line]
    assert (
        len(said) == 1
        and name in said[0]
        and said[0].endswith("training goes on, and writing is tried again")
    ), err
    return said[0]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True
    )
    if done.returncode:
        pytest.skip("needs root, to mount a small file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_and_is_emptied(small_disk, tmp_path, capfd):
    filler = small_disk / "filler"
    with Log(small_disk / "run", 20) as log:
        header(log)
        train(log, 1, 3)
        with pytest.raises(OSError), open(filler, "wb", buffering=0) as f:
            while True:
                f.write(bytes(512))
        for _ in range(3):
            log.say("x" * 3000, quiet=True)  # what is left of the last page
        train(log, 4, 12)
        assert "No space left on device" in one_complaint(capfd.readouterr().err, "log.txt")
        filler.unlink()
        train(log, 13, 20)
        log.save_weights({"w": torch.ones(3)})
        log.finish(RESULT)
    whole = whole_run(tmp_path / "whole", finish=True)
    assert without(small_disk / "run", "x" * 3000) == without(whole)
    for name in ALL[2:]:
        assert (small_disk / "run" / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(os.listdir(small_disk / "run")) == ALL and "cannot" not in capfd.readouterr().err


def test_a_disk_that_stays_full(small_disk, capfd):
    with Log(small_disk / "run", 20) as log:
        header(log)
        train(log, 1, 5)
        (small_disk / "run/result.json").write_text("of before")
        before = content(small_disk / "run")
        with pytest.raises(OSError), open(small_disk / "filler", "wb", buffering=0) as f:
            while True:
                f.write(bytes(512))
        log.say("x" * 5000, quiet=True)
        train(log, 6, 20)
        log.save_weights({"w": torch.ones(10**6)})
        log.finish(RESULT)
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("step:")]
    assert len(said) == 3 and "training goes on" in said[0]
    assert (
        "model.safetensors could not be written" in said[1]
        and "result.json could not be written" in said[2]
    )
    after = content(small_disk / "run")
    assert after.keys() == before.keys()
    assert all(after[name].startswith(before[name]) for name in before)


def test_a_limit_on_the_size_of_files(tmp_path, capsys):
    """RLIMIT_FSIZE: what fits is there, the run goes on to its end."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "run"
    with Log(folder, 20) as log:
        header(log)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
            train(log, 1, 20)
            log.save_weights(dict(w=torch.ones(1000)))
            log.finish(RESULT)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        left = content(folder)
        # As if the process ended here: with room again, what waits would be written
        log.text.waiting = b""
        log.metrics.waiting = b""
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if not line.startswith("step:")]
    assert len(said) == 2 and "log.txt cannot be written: File too large" in said[0]
    assert "model.safetensors could not be written" in said[1]
    assert json.loads(left["result.json"]) == RESULT
    whole = content(whole_run(tmp_path / "whole"))
    for name in ("log.txt", "metrics.jsonl"):
        assert len(left[name]) <= 1500 and whole[name].startswith(left[name])
    assert sorted(left) == [name for name in ALL if name != "model.safetensors"]


def test_a_folder_that_is_removed_comes_back_with_the_result(tmp_path, capsys):
    folder, whole = tmp_path / "run", whole_run(tmp_path / "whole", finish=True)
    with Log(folder, 20) as log:
        header(log)
        train(log, 1, 8)
        shutil.rmtree(folder)
        train(log, 9, 20)
        assert not folder.exists()  # whoever removed it meant to
        assert "No such file or directory" in one_complaint(capsys.readouterr().err, "log.txt")
        log.save_weights({"w": torch.ones(3)})
        log.finish(RESULT)
    assert content(folder) == content(whole)


def test_files_that_are_removed(tmp_path, capsys):
    folder, whole = tmp_path / "run", whole_run(tmp_path / "whole", finish=True)
    with Log(folder, 20) as log:
        header(log)
        train(log, 1, 8)
        for name in ALL[:3]:
            (folder / name).unlink()
        train(log, 9, 20)
        log.save_weights({"w": torch.ones(3)})
        log.finish(RESULT)
    assert content(folder) == content(whole) and "cannot" not in capsys.readouterr().err


def test_a_folder_that_became_a_file(tmp_path, capsys):
    folder = tmp_path / "run"
    with Log(folder, 20) as log:
        header(log)
        shutil.rmtree(folder)
        folder.write_text("mine")
        train(log, 1, 20)
        log.save_weights({"w": torch.ones(3)})
        log.finish(RESULT)
    assert folder.read_text() == "mine"
    err = capsys.readouterr().err
    one_complaint(err, "log.txt")
    # config.json, source.tar.bz2, result.json and model.safetensors
    assert err.count("could not be written") == 4


@pytest.mark.skipif(not os.geteuid(), reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path, capsys):
    folder = tmp_path / "run"
    with Log(folder, 20) as log:
        header(log)
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
        train(log, 1, 20)
        log.save_weights({"w": torch.ones(3)})
        log.finish(RESULT)
        folder.chmod(stat.S_IRWXU)
    assert capsys.readouterr().err.count("could not be written") == 2
    assert sorted(os.listdir(folder)) == [*ALL[:3], ALL[-1]]


def test_a_read_only_file_system(small_disk, capfd):
    with Log(small_disk / "run", 20) as log:
        header(log)
        train(log, 1, 5)
        before = content(small_disk / "run")
        log.text.drop()
        log.metrics.drop()
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        train(log, 6, 20)
        log.save_weights({"w": torch.ones(3)})
        log.finish(RESULT)
        assert content(small_disk / "run") == before
    err = capfd.readouterr().err
    assert (
        "Read-only file system" in one_complaint(err, "log.txt")
        and err.count("could not be written") == 2
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("how", ["full", "closed"])
def test_stderr_that_is_full_or_closed(tmp_path, monkeypatch, how):
    """As with 2> on the disk that is full."""
    stderr = open("/dev/full", "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", stderr)
    with Log(tmp_path / "run", 20) as log:
        header(log)
        if how == "closed":
            stderr.close()
        train(log, 1, 20)
        log.shown -= 60
        log.progress(20, "x")
        log.save_weights(dict(w=torch.ones(3)))
        log.finish(RESULT)
    with contextlib.suppress(OSError):
        stderr.close()
    monkeypatch.undo()
    assert content(tmp_path / "run") == content(whole_run(tmp_path / "whole", finish=True))


# --- what is in the files


def strict(text):
    """JSON as parsers without Python's extensions read it."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_lines_are_the_fields(tmp_path, capsys):
    """step_avg is the training clock over the steps done; other metrics stand behind it."""
    with Log(tmp_path / "run", 20) as log:
        log.step(4, 20, "train", 4.25, 0.5)
        log.validation(4, 20, {"val_loss": 4.12345, "val_bpb": 1.5}, 0.5)
        log.validation(0, 20, {"val_loss": 10.5, "val_bpb": None}, 0.0)
    lines = [
        "step:4/20 train_loss:4.2500 train_time:500ms step_avg:125.00ms",
        "step:4/20 val_loss:4.1235 train_time:500ms step_avg:125.00ms val_bpb:1.5000",
        "step:0/20 val_loss:10.5000 train_time:0ms step_avg:0.00ms",
    ]
    assert (tmp_path / "run/log.txt").read_text().splitlines() == lines
    assert [strict(line) for line in open(tmp_path / "run/metrics.jsonl")] == [
        {"step": 4, "train_loss": 4.25, "train_time": 0.5},
        {"step": 4, "val_loss": 4.12345, "val_bpb": 1.5, "train_time": 0.5},
        {"step": 0, "val_loss": 10.5, "train_time": 0.0},
    ]
    assert capsys.readouterr().err.splitlines() == lines[1:]  # training steps are quiet


def test_where_nobody_watches_progress_is_a_line_now_and_then(tmp_path, capsys):
    with Log(tmp_path / "run", 20) as log:
        log.progress(3, "loss 4.0")
        assert capsys.readouterr().err == ""
        log.shown -= 16  # seconds later
        log.progress(4, "loss 3.9")
        log.progress(5, "loss 3.8")
    assert capsys.readouterr().err == "step 4/20  loss 3.9\n"


def test_no_nan_in_any_json(tmp_path):
    folder = tmp_path / "run"
    with Log(folder, 20) as log:
        header(log, probe=dict(copy=math.inf))
        log.step(1, 20, "train", math.nan, 0.1)
        log.step(1, 20, "val", math.inf, 0.1, val_bpb=-math.inf)
        log.save_weights({"w": torch.ones(3)})
        log.finish(RESULT | dict(val_loss=math.nan))
    assert strict((folder / "config.json").read_text())["environment"]["probe"] == {"copy": None}
    assert [strict(line) for line in open(folder / "metrics.jsonl")] == [
        {"step": 1, "train_loss": None, "train_time": 0.1},
        {"step": 1, "val_loss": None, "val_bpb": None, "train_time": 0.1},
    ]
    assert strict((folder / "result.json").read_text())["val_loss"] is None
    assert "train_loss:nan" in (folder / "log.txt").read_text()  # there the field writes nan


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
        max_leaves=10,
    )
)
def test_any_value_becomes_json(value):
    assert strict(to_json(value)) == finite(value)


def test_names_that_are_no_unicode(tmp_path):
    """A folder may have any bytes for a name."""
    with Log(tmp_path / "run", 20) as log:
        log.say("log in " + os.fsdecode(b"/runs/\xff"), quiet=True)
    assert (tmp_path / "run/log.txt").read_text() == "log in /runs/\\udcff\n"


def test_every_line_is_in_the_file_at_once(tmp_path):
    """What a kill leaves is what was said before it."""
    log = Log(tmp_path / "run", 20)
    header(log)
    train(log, 1, 3)
    assert content(tmp_path / "run") == content(whole_run(tmp_path / "whole", 3))
    log.__exit__(None, None, None)


def test_two_threads_have_a_line_each(tmp_path):
    log = Log(tmp_path / "run", 20)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(
                target=lambda i=i: [log.say(f"{i} {n}", quiet=True) for n in range(500)]
            )
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    log.__exit__(None, None, None)
    assert sorted((tmp_path / "run/log.txt").read_text().split("\n")[:-1]) == sorted(
        f"{i} {n}" for i in range(4) for n in range(500)
    )
