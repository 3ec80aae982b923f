"""Where a run is kept, and whether it can go on from a checkpoint.

RUN_DIR/log.txt, metrics.jsonl, config.json       from the start
RUN_DIR/checkpoints/step-000123/                  see checkpoints.py
RUN_DIR/result.json, model.safetensors            once it has finished
"""

import contextlib
import datetime
import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from base import InputError
from base.options import refuse

from . import checkpoints
from .machine import first_rank_first, share_text
from .options import defaults, flat


def choose_run_dir(config, world, runs):
    """(folder, resuming): where a run goes, and whether it may go on with what is there, on the
    first rank; others get no folder.

    config: of parts, with goal and run; runs: parent of unnamed runs. Raises InputError.
    """

    def choose():
        if world.rank:
            return Path(), False
        restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
        return run_dir_of(config.run, config.goal.track, config.goal.seed, runs, restarted)

    return first_rank_first(world, choose)


def run_dir_of(options, track, seed, runs, restarted):
    """The same for a RunConfig and its first seed; restarted: by torchrun, after a failure."""
    folder = Path(options.run_dir) if options.run_dir else None
    resume = options.resume
    if restarted and not resume:
        resume = "auto"
    if folder is None and resume == "auto":
        folder = newest_unfinished(runs, track or "run", seed, options.repeat)
    elif resume and resume != "auto":
        of_run = run_of(Path(resume))
        folder = folder or of_run
        refuse_older_checkpoint(Path(resume), folder, of_run)
    if folder is None:
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
        folder = Path(runs) / f"{stamp}-{track or 'run'}"
    if not resume and folder.is_dir() and next(folder.rglob("log.txt"), None):
        raise InputError(
            f"--run-dir {folder}: holds a run already; choose another folder, or --resume auto to "
            "go on"
        )
    return folder, bool(resume)


def newest_unfinished(runs, track, seed, repeat):
    """The newest folder in `runs` of a run of the track that has begun and not finished, or
    None."""
    for folder in sorted(Path(runs).glob(f"*-{track}"), reverse=True):
        parts = folders(folder, seed, repeat)
        if begun(folder, repeat) and not all(read_result(part) for _, part in parts):
            return folder
    return None


def run_of(given):
    """The run's folder that `--resume given` names, itself or by one of its checkpoints."""
    if not given.is_dir():
        raise InputError(
            f"--resume {given}: no such folder; give a run's folder, a checkpoint in it, or auto"
        )
    if (given / "state.json").exists():
        return given.parent.parent
    if next(given.rglob("log.txt"), None) is None:
        raise InputError(
            f"--resume {given}: neither a run nor a checkpoint; give a run's folder, a checkpoint "
            "in it, or auto"
        )
    return given


def refuse_older_checkpoint(given, folder, of_run):
    """A run goes on in its own folder only from its newest checkpoint."""
    if folder != of_run or given == of_run:
        return
    newest = checkpoints.latest(folder / "checkpoints")
    if newest and newest.resolve() != given.resolve():
        raise InputError(
            f"--resume {given}: {newest.name} is newer in this run; give another --run-dir to go "
            "on from the older one"
        )


def read_result(run_dir):
    """The result of a finished run, else None."""
    try:
        return json.loads((run_dir / "result.json").read_text())
    except (OSError, ValueError):
        return None


def folders(run_dir, seed, repeat):
    """[(seed, folder), ...]: where the runs of `repeat` successive seeds are. Raises InputError."""
    if seed + repeat > 2**63:
        refuse("seed", seed, f"seeds below 2**63, all {repeat} of them")
    if repeat == 1:
        return [(seed, run_dir)]
    return [(s, run_dir / f"seed{s}") for s in range(seed, seed + repeat)]


def begun(run_dir, repeat):
    """Whether a run, or one of several seeds where that is asked for, has begun there."""
    return next(run_dir.glob("seed*/log.txt" if repeat > 1 else "log.txt"), None) is not None


@contextlib.contextmanager
def alone(run_dir):
    """Hold a run's folder against other processes that would train in it. Raises InputError."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(checkpoints.locked(run_dir, seconds=0))
        except BlockingIOError:
            raise InputError(
                f"{run_dir}: another process is training there; wait for it, or choose another "
                "--run-dir"
            ) from None
        except OSError as e:
            raise InputError(
                f"--run-dir {run_dir}: {e.strerror}; choose a folder that can be written"
            ) from None
        yield


def starting_point(options, run_dir):
    """(tensors, meta) of the checkpoint to go on from, None to start anew. Raises InputError."""
    # The run's own come first: it may have been resumed before
    path = checkpoints.latest(run_dir / "checkpoints")
    if path is None and options.resume not in ("", "auto"):
        given = Path(options.resume)
        is_checkpoint = (given / "state.json").exists()
        path = given if is_checkpoint else checkpoints.latest(given / "checkpoints")
        if path is None and options.repeat == 1:
            raise InputError(f"--resume {given}: holds no complete checkpoint")
    return checkpoints.load(path) if path else None


def begin(config, free, world, run_dir, resuming, fingerprint, closing):
    """(result, found): what is in a run's folder to go on from, None where there is nothing.

    A result if it has finished; else (tensors, meta) of a checkpoint, the tensors on the first rank
    only. config: of parts, with a RunConfig `run`; free: options that
    may differ from the checkpoint's; fingerprint: of the data; closing: an ExitStack until whose
    end the folder is held against other processes. Raises InputError.
    """

    def look():
        if world.rank:
            return None, None
        closing.enter_context(alone(run_dir))
        result = read_result(run_dir) if resuming else None
        found = None
        if resuming and not result:
            found = starting_point(config.run, run_dir)
        if not found:
            return result, None
        check_fit(config, free, fingerprint, found[1])
        return result, found

    result, found = first_rank_first(world, look)
    tensors, meta = found or ({}, None)
    result, meta = json.loads(share_text(world, json.dumps([result, meta])))
    return result, (tensors, meta) if meta else None


def check_fit(config, free, fingerprint, meta):
    """Refuse a checkpoint of another recipe or other data, naming what differs.

    What the configuration has and the checkpoint does not was added since, and had its default
    then.
    """
    ours = {k: v for k, v in flat(config).items() if k not in free}
    theirs = {k: v for k, v in (defaults(config) | meta["config"]).items() if k not in free}
    differing = differences(ours, theirs)
    if fingerprint != meta["data_fingerprint"]:
        differing.append(
            f"data: {fingerprint[:16]} here, {meta['data_fingerprint'][:16]} in the checkpoint"
        )
    if differing:
        raise InputError(
            f"the checkpoint does not fit: {'; '.join(differing)}. Give what it was made with, or "
            "--warm-start to take its weights only"
        )


def differences(ours, theirs):
    """What differs between two dicts of JSON-able fields, a readable line for each.

    ours: of this run; theirs: the checkpoint's. A tuple is a list; a field of an inner dict is
    named outer.inner.
    """
    ours = dict(leaves(json.loads(json.dumps(ours))))
    theirs = dict(leaves(json.loads(json.dumps(theirs))))
    lines = []
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        a = json.dumps(ours[name]) if name in ours else "nothing"
        b = json.dumps(theirs[name]) if name in theirs else "nothing"
        if a == b:
            continue  # NaN is not equal to itself, but its text is
        if name in ours and name in theirs and ours[name] == theirs[name]:
            continue  # 1 and 1.0 have other texts, but are equal
        if max(len(a), len(b)) > 80:
            start = max(0, len(os.path.commonprefix([a, b])) - 20)
            a = excerpt(a, start)
            b = excerpt(b, start)
        lines.append(f"{name}: {a} here, {b} in the checkpoint")
    return lines


def excerpt(text, start):
    """60 characters of it, from where two texts part."""
    before = "..." if start else ""
    after = "..." if len(text) > start + 60 else ""
    return before + text[start : start + 60] + after


def leaves(tree, prefix=""):
    """(dotted name, value) for each leaf of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def read_weights(given):
    """{parameter: tensor} of a run or a checkpoint, fp32 masters where there are. Raises
    InputError."""
    path = Path(given)
    if not (path / "model.safetensors").exists() and (path / "checkpoints").is_dir():
        path = checkpoints.latest(path / "checkpoints") or path
    if (path / "state.json").exists():
        return {
            name.removeprefix("weights/"): x
            for name, x in checkpoints.load(path)[0].items()
            if name.startswith("weights/")
        }
    try:
        return {name: x for name, x in load_file(path / "model.safetensors").items() if x.numel()}
    except (OSError, SafetensorError) as e:
        raise InputError(
            f"--warm-start {given}: expected a run's folder with model.safetensors, or a "
            f"checkpoint ({' '.join(str(e).split())})"
        ) from None


def copy_weights(given, model):
    """Copy what read_weights gives into a model's parameters, unless they are on meta. Raises
    InputError naming what does not fit."""
    tensors, parameters = read_weights(given), dict(model.named_parameters())
    wanted = {name: list(p.shape) for name, p in parameters.items() if p.numel()}
    differing = differences(wanted, {name: list(x.shape) for name, x in tensors.items()})
    if differing:
        raise InputError(f"--warm-start {given} does not fit this model: {'; '.join(differing)}")
    for name, x in tensors.items():
        if parameters[name].device.type != "meta":
            parameters[name].data.copy_(x)
