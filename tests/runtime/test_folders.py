"""runtime/folders.py: which folder a run goes to, and which one it goes on in."""

import json
import multiprocessing
import os
import shutil

import pytest

import train_gpt as tg
from base import InputError
from runtime import checkpoints, folders, resume
from runtime.folders import named_run_dir
from runtime.options import RunConfig, flat
from runtime.resume import alone

FINGERPRINT = "f" * 64


def make_run(folder, finished=False, fingerprint=FINGERPRINT, **fields):
    """What a run of the track tiny leaves in a folder: the log, and what says what it is."""
    folder.mkdir(parents=True)
    (folder / "log.txt").touch()
    config = flat(tg.configure(**(dict(track="tiny") | fields)))
    environment = dict(probe=dict(matmul=dict(float32=1e9)), dtype="float32", world_size=1)
    said = dict(config=config, data=fingerprint, environment=environment)
    (folder / "config.json").write_text(json.dumps(said))
    if finished:
        result = dict(steps=config["steps"], tokens=9, peak_share=0.5, train_time_s=20.0)
        result |= dict(val_loss=3.0, val_bpb=2.0, resumed_at=[])
        (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def auto(tmp_path, monkeypatch):
    """Which folder --resume auto takes, for a configuration of the track tiny."""
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)

    def choose(**fields):
        config = tg.configure(**(dict(track="tiny", resume="auto") | fields))
        folder, resuming = folders.choose_run_dir(config, tg.World())
        assert folder is None and resuming
        args = tg.World(), tmp_path / "runs", resuming, FINGERPRINT
        return folders.find_run_dir(config, *args)

    return choose


# --- new folders


def begin(runs, start, found):
    start.wait()
    found.put([str(folders.new_run_dir(runs, "tiny")) for _ in range(5)])


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(tmp_path):
    """Across processes; and the newest is still the one that sorts last."""
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    found = context.Queue()
    workers = [
        context.Process(target=begin, args=(tmp_path / "runs", start, found)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    names = sum((found.get(timeout=20) for _ in workers), [])
    for worker in workers:
        worker.join()
    assert len(set(names)) == 20 and all(os.path.isdir(name) for name in names)


def test_the_newest_of_one_second_is_known(tmp_path):
    names = [f"20260101T000000{n}-tiny" for n in ("", "_2", "_9", "_10")]
    names = ["20251231T235959_3-tiny", *names, "20260101T000001-tiny"]
    for name in names:
        (tmp_path / name).mkdir()
    assert [path.name for path in sorted(tmp_path.iterdir(), key=folders.age)] == names


def test_where_no_folder_can_be_made(tmp_path):
    (tmp_path / "runs").touch()
    with pytest.raises(InputError, match="runs: File exists; choose a folder that can be written"):
        folders.new_run_dir(tmp_path / "runs", "tiny")


@pytest.mark.parametrize("name", ["log.txt", "seed1/log.txt", "checkpoints/step-000001/complete"])
def test_a_new_run_does_not_begin_where_one_is(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(InputError, match="holds a run already"):
        named_run_dir(RunConfig(run_dir=str(tmp_path)), False)
    assert named_run_dir(RunConfig(run_dir=str(tmp_path / "new")), False)[0] == tmp_path / "new"


@pytest.mark.parametrize("named", [True, False])
def test_all_ranks_know_whether_a_folder_is_named(monkeypatch, named):
    """They look for one together."""
    monkeypatch.setattr(folders, "first_rank_first", lambda world, prepare: prepare())
    monkeypatch.setattr(folders, "share", lambda world, value: [named, True])
    folder, resuming = folders.choose_run_dir(tg.configure(), tg.World(rank=1, size=2))
    assert (folder is not None) == named and resuming


# --- the run to go on with


def test_auto_takes_the_newest_that_has_something_left_to_do(tmp_path, auto, capsys):
    runs = tmp_path / "runs"
    older = make_run(runs / "20260101T000000-tiny")
    newer = make_run(runs / "20260102T000000-tiny")
    make_run(runs / "20260104T000000-other")
    assert auto() == newer and capsys.readouterr().err == ""
    (newer / "result.json").write_text('{"steps": 500}')
    shutil.rmtree(newer)
    make_run(newer, finished=True)
    assert auto() == older
    assert (
        f"--resume auto goes on with {older}; passed over {newer} (finished: it took all 500 "
        in (capsys.readouterr().err)
    )
    # More steps than it took: then it is the newer one that is not done
    assert auto(steps=501) == newer and capsys.readouterr().err == ""


def test_auto_passes_over_runs_of_another_kind_and_names_them(tmp_path, auto, capsys):
    runs = tmp_path / "runs"
    ours = make_run(runs / "20260101T000000-tiny")
    make_run(runs / "20260102T000000-tiny", seed=3)
    make_run(runs / "20260103T000000-tiny", fingerprint="e" * 64, text="other.txt", data="text")
    make_run(runs / "20260104T000000-tiny", n_embd=64, n_layer=9, n_head=1, seed=3)
    assert auto() == ours
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"goes on with {ours}" in said
    assert "20260102T000000-tiny (seed: 0 here, 3 in the run)" in said
    assert "20260103T000000-tiny (data: " in said and "other.txt, eeee" in said
    assert "20260104T000000-tiny (" in said and " and 2 more)" in said


def test_auto_begins_a_run_where_none_is_left(tmp_path, auto, capsys):
    for day in range(1, 7):
        make_run(tmp_path / f"runs/2026010{day}T000000-tiny", finished=True)
    folder = auto()
    assert folder.is_dir() and not any(folder.iterdir())
    said = capsys.readouterr().err
    assert "begins a new run; passed over" in said and "20260104" in said and "and 3 older" in said
    assert "20260103" not in said


def test_auto_of_several_seeds(tmp_path, auto):
    runs = tmp_path / "runs"
    make_run(runs / "20260101T000000-tiny")  # of one seed
    both = runs / "20260102T000000-tiny"
    make_run(both / "seed0", finished=True)
    make_run(both / "seed1", seed=1)
    make_run(runs / "20260103T000000-tiny/seed5", seed=5)
    assert auto(repeat=2) == both
    assert auto() == runs / "20260101T000000-tiny"
    shutil.rmtree(both / "seed1")
    assert auto(repeat=2) == both  # the second has not begun


def test_auto_passes_over_what_cannot_be_read(tmp_path, auto, capsys):
    older = make_run(tmp_path / "runs/20260101T000000-tiny")
    broken = make_run(tmp_path / "runs/20260102T000000-tiny")
    writer = checkpoints.Checkpoints(broken / "checkpoints")
    writer.save(3, {}, dict(config={}, data_fingerprint="", progress=dict(step=3)), wait=True)
    state = broken / "checkpoints/step-000003/state.json"
    state.write_bytes(state.read_bytes().replace(b"3", b"4"))
    assert auto() == older
    assert "altered since it was written" in capsys.readouterr().err


def test_a_restart_does_not_take_the_folder_of_another_run(tmp_path, auto, monkeypatch):
    """Two runs of the same kind, and torchrun starts one of them again."""
    ours = make_run(tmp_path / "runs/20260101T000000_2-tiny")
    theirs = make_run(tmp_path / "runs/20260101T000000_10-tiny")
    with alone(theirs):
        assert auto() == theirs  # and then it is refused, with the other's pid
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert auto(resume="") == ours


def test_a_folder_in_which_somebody_trains_says_who(tmp_path):
    with alone(tmp_path / "run"):
        assert resume.is_held(tmp_path / "run")
        with pytest.raises(InputError, match=f"training there .pid {os.getpid()} on "):
            with alone(tmp_path / "run"):
                pass
    assert not resume.is_held(tmp_path / "run")


# --- what --resume names


def test_a_run_or_a_checkpoint_however_it_is_named(tmp_path, monkeypatch):
    run = make_run(tmp_path / "runs/a")
    checkpoint = run / "checkpoints/step-000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").touch()
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "latest").symlink_to(checkpoint)
    for given in (run, f"{run}/", run / "checkpoints", checkpoint, f"{checkpoint}/"):
        assert folders.run_of(tg.Path(given)) == run
    assert folders.run_of(tmp_path / "link") == tmp_path / "link"
    assert folders.run_of(tmp_path / "latest") == run.resolve()
    monkeypatch.chdir(checkpoint)
    assert folders.run_of(tg.Path(".")) == run.resolve()


def test_a_checkpoint_without_its_run_goes_to_a_new_folder(tmp_path):
    """Not to whatever lies around it."""
    (tmp_path / "step-000003").mkdir()
    (tmp_path / "step-000003/state.json").touch()
    options = RunConfig(resume=str(tmp_path / "step-000003"))
    assert named_run_dir(options, False) == (None, True)


@pytest.mark.parametrize("what", ["missing", "empty", "a file", "a folder of runs"])
def test_what_is_neither_a_run_nor_a_checkpoint(tmp_path, what):
    path = tmp_path / "x"
    if what == "a file":
        path.touch()
    elif what == "a folder of runs":
        make_run(path / "one")
    elif what == "empty":
        path.mkdir()
    with pytest.raises(InputError, match=f"--resume {path}: (no such folder|neither a run)"):
        named_run_dir(RunConfig(resume=str(path)), False)


def test_one_run_and_several_do_not_share_a_folder(tmp_path):
    make_run(tmp_path / "one")
    make_run(tmp_path / "two/seed0")
    make_run(tmp_path / "two/seed1")

    def resumed(name, repeat, given="auto"):
        options = RunConfig(run_dir=str(tmp_path / name), resume=given, repeat=repeat)
        return named_run_dir(options, False)

    assert resumed("one", 1) == (tmp_path / "one", True)
    assert resumed("two", 2) == (tmp_path / "two", True)
    with pytest.raises(InputError, match="several seeds .seed0, seed1.; give --repeat"):
        resumed("two", 1)
    with pytest.raises(InputError, match="holds a single run; leave out --repeat 2"):
        resumed("one", 2)
    own = resume.options_of(str(tmp_path / "two"))
    assert own["repeat"] == 2 and own["seed"] == 0
