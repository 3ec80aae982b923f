"""Where a run is kept, and whether it can go on from a checkpoint.

RUN_DIR/log.txt, metrics.jsonl, config.json       from the start
RUN_DIR/checkpoints/step-000123/                  see checkpoint.py
RUN_DIR/result.json, model.safetensors            once it has finished
"""

import contextlib
import dataclasses
import datetime
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from base import InputError

from . import checkpoint
from .machine import first_rank_first, share_text
from .options import RunOptions

# what may differ between a run and its continuation; another text is found out by its fingerprint
FREE = {f.name for f in dataclasses.fields(RunOptions)} | {"target", "text", "max_skips"}


@dataclasses.dataclass
class Position:
    """How far a run is: what a checkpoint keeps besides weights and moments."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0
    train_time: float = 0.0  # seconds
    metrics: dict = dataclasses.field(default_factory=dict)  # of the last validation
    validated: int = -1  # its step
    best: float | None = None  # lowest validation loss
    since_best: int = 0  # validations since
    skipped: int = 0  # steps whose update did not count
    resumed_at: list = dataclasses.field(default_factory=list)


def choose_run_dir(c, runs, restarted):
    """(folder, resuming): where the run of Config c goes, and whether it may go on with what is
    there.

    runs: parent of unnamed runs; restarted: by torchrun, after a failure. Raises InputError.
    """
    folder, resume = (
        Path(c.run_dir) if c.run_dir else None,
        c.resume or ("auto" if restarted else ""),
    )
    track = c.track or "run"
    if resume == "auto":
        unfinished = [
            p
            for p in sorted(Path(runs).glob(f"*-{track}"))
            if begun(p, c.repeat) and not all(finished(q) for q in folders(p, c.seed, c.repeat))
        ]
        folder = folder or (unfinished[-1] if unfinished else None)
    elif resume:
        given = Path(resume)
        if not given.is_dir():
            raise InputError(
                f"--resume {resume}: no such folder; give a run's folder, a checkpoint in it, or auto"
            )
        is_checkpoint = (given / "state.json").exists()
        if not is_checkpoint and next(given.rglob("log.txt"), None) is None:
            raise InputError(
                f"--resume {resume}: neither a run nor a checkpoint; give a run's folder, a checkpoint "
                "in it, or auto"
            )
        of_run = given.parent.parent if is_checkpoint else given
        if folder is None:
            folder = of_run
            newest = checkpoint.latest(folder / "checkpoints")
            if given != of_run and newest and newest.resolve() != given.resolve():
                raise InputError(
                    f"--resume {resume}: {newest.name} is newer in this run; give another --run-dir to go "
                    "on from the older one"
                )
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
    folder = folder or Path(runs) / f"{stamp}-{track}"
    if not resume and folder.is_dir() and next(folder.rglob("log.txt"), None):
        raise InputError(
            f"--run-dir {folder}: holds a run already; choose another folder, or --resume auto to go on"
        )
    return folder, bool(resume)


def finished(run_dir):
    """The result of a finished run, else None."""
    try:
        return json.loads((run_dir / "result.json").read_text())
    except (OSError, ValueError):
        return None


def folders(run_dir, seed, repeat):
    """Where the runs of `repeat` successive seeds are."""
    return [run_dir / f"seed{s}" for s in range(seed, seed + repeat)] if repeat > 1 else [run_dir]


def begun(run_dir, repeat):
    """Whether a run, or one of several seeds where that is asked for, has begun there."""
    return next(run_dir.glob("seed*/log.txt" if repeat > 1 else "log.txt"), None) is not None


@contextlib.contextmanager
def alone(run_dir):
    """Hold a run's folder against other processes that would train in it. Raises InputError."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(checkpoint.locked(run_dir, seconds=0))
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


def starting_point(c, run_dir):
    """(tensors, meta) of the checkpoint to go on from, None to start anew. Raises InputError."""
    path = checkpoint.latest(
        run_dir / "checkpoints"
    )  # the run's own come first: it may have been resumed before
    if path is None and c.resume not in ("", "auto"):
        given = Path(c.resume)
        path = (
            given if (given / "state.json").exists() else checkpoint.latest(given / "checkpoints")
        )
        if path is None and c.repeat == 1:
            raise InputError(f"--resume {given}: holds no complete checkpoint")
    return checkpoint.load(path) if path else None


def begin(c, world, run_dir, resuming, fingerprint, closing):
    """(result, tensors, meta): what is in a run's folder to go on from. A result if it has
    finished; else a checkpoint, its tensors on the first rank only; empty dicts where there is
    nothing.

    closing: an ExitStack until whose end the folder is held against other processes. Raises
    InputError.
    """

    def look():
        if world.rank:
            return None, {}, {}
        closing.enter_context(alone(run_dir))
        result = finished(run_dir) if resuming else None
        found = starting_point(c, run_dir) if resuming and not result else None
        if found:
            check_fit(c, fingerprint, found[1])
        return result, *(found or ({}, {}))

    result, tensors, meta = first_rank_first(world, look)
    result, meta = json.loads(share_text(world, json.dumps([result, meta])))
    return result, tensors, meta


def check_fit(c, fingerprint, meta):
    """Refuse a checkpoint of another recipe or other data, naming what differs. c: Config; what
    it has and the checkpoint does not was added since, and had its default then."""
    added = {f.name: f.default for f in dataclasses.fields(c) if f.name not in meta["config"]}
    theirs, ours = (
        {name: value for name, value in fields.items() if name not in FREE}
        for fields in (meta["config"] | added, dataclasses.asdict(c))
    )
    differing = checkpoint.differences(ours, theirs)
    if fingerprint != meta["data_fingerprint"]:
        differing.append(
            f"data: {fingerprint[:16]} here, {meta['data_fingerprint'][:16]} in the checkpoint"
        )
    if differing:
        raise InputError(
            f"the checkpoint does not fit: {'; '.join(differing)}. Give what it was made with, or "
            "--warm-start to take its weights only"
        )


def read_weights(given):
    """{parameter: tensor} of a run or a checkpoint, fp32 masters where there are. Raises
    InputError."""
    path = Path(given)
    if not (path / "model.safetensors").exists() and (path / "checkpoints").is_dir():
        path = checkpoint.latest(path / "checkpoints") or path
    if (path / "state.json").exists():
        return {
            name.removeprefix("weights/"): x
            for name, x in checkpoint.load(path)[0].items()
            if name.startswith("weights/")
        }
    try:
        return {name: x for name, x in load_file(path / "model.safetensors").items() if x.numel()}
    except (OSError, SafetensorError) as e:
        raise InputError(
            f"--warm-start {given}: expected a run's folder with model.safetensors, or a checkpoint "
            f"({' '.join(str(e).split())})"
        ) from None


def copy_weights(given, model):
    """Copy what read_weights gives into a model's parameters, unless they are on meta. Raises
    InputError naming what does not fit."""
    tensors, parameters = read_weights(given), dict(model.named_parameters())
    wanted = {name: list(p.shape) for name, p in parameters.items() if p.numel()}
    differing = checkpoint.differences(wanted, {name: list(x.shape) for name, x in tensors.items()})
    if differing:
        raise InputError(f"--warm-start {given} does not fit this model: {'; '.join(differing)}")
    for name, x in tensors.items():
        if parameters[name].device.type != "meta":
            parameters[name].data.copy_(x)
