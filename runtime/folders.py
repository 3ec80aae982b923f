"""Which folder a run is kept in: the one that is named, the one it began in, or a new one."""

import contextlib
import datetime
import itertools
import os
import re
from pathlib import Path

from base import InputError
from base.options import refuse

from . import checkpoints, resume
from .log import show
from .machine import first_rank_first, share

NAMED = 3  # so many runs that were passed over are named


def choose_run_dir(config, world):
    """(folder, resuming): the folder that the options name, None if they leave it open, and whether
    the run may go on with what is there; on the first rank, others get no folder.

    config: of parts, with a RunConfig `run`. Raises InputError.
    """

    by_seed(Path(), config.goal.seed, config.run.repeat)  # are there so many seeds?

    def choose():
        if world.rank:
            return Path(), False
        return named_run_dir(config.run, was_restarted())

    folder, resuming = first_rank_first(world, choose)
    # What comes next depends on it, on all ranks
    is_named, resuming = share(world, [folder is not None, resuming])
    return folder if is_named else None, resuming


def was_restarted():
    """Whether torchrun has started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def named_run_dir(options, restarted):
    """The same for a RunConfig; restarted: by torchrun, after a failure."""
    folder = Path(options.run_dir) if options.run_dir else None
    given = options.resume
    if restarted and not given:
        given = "auto"
    if given and given != "auto":
        of_run = run_of(Path(given))
        folder = folder or of_run
        if folder:
            refuse_older_checkpoint(Path(given), folder, of_run)
    if folder and given:
        refuse_other_seeds(folder, options.repeat)
    elif folder:
        resume.refuse_run_in_the_way(folder)
    return folder, bool(given)


def find_run_dir(config, world, runs, resuming, fingerprint):
    """The folder of a run whose options name none: that of a run with something left to do where
    it may go on, else a new one; on the first rank, others get no folder.

    config, fingerprint: see resume.misfits; runs: parent of unnamed runs. Raises InputError.
    """

    def find():
        if world.rank:
            return Path()
        folder = None
        if resuming and config.run.resume in ("", "auto"):
            folder = newest_unfinished(config, runs, fingerprint, was_restarted())
        return folder or new_run_dir(runs, config.goal.track)

    return first_rank_first(world, find)


def new_run_dir(runs, track):
    """Make the folder of a new run, which no other process gets as well. Raises InputError."""
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S")
    try:
        Path(runs).mkdir(parents=True, exist_ok=True)
        for n in itertools.count(1):
            number = f"_{n}" if n > 1 else ""  # another run began in the same second
            folder = Path(runs) / f"{stamp}{number}-{track or 'run'}"
            # If it is there, somebody else was faster
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as e:
        raise InputError(
            f"{runs}: {e.strerror}; choose a folder that can be written with --run-dir"
        ) from None


# --------------------------------------------------------------------------------------------------
# Runs of before


def newest_unfinished(config, runs, fingerprint, restarted):
    """The newest folder in `runs` of a run that fits and has something left to do, or None; says
    which newer ones of the track were passed over, and why."""
    chosen = None
    passed = []  # a line for each
    track = config.goal.track or "run"
    for folder in sorted(Path(runs).glob(f"*-{track}"), key=age, reverse=True):
        parts = [part for _, part in by_seed(folder, config.goal.seed, config.run.repeat)]
        if not any((part / "log.txt").exists() for part in parts):
            continue
        why = why_not(config, fingerprint, parts)
        if not why and restarted and resume.is_held(folder):
            why = "another process is training there"
        if not why:
            chosen = folder
            break
        passed.append(f"{folder} ({why})")
    if passed:
        more = f" and {len(passed) - NAMED} older" if len(passed) > NAMED else ""
        goes_on = f"goes on with {chosen}" if chosen else "begins a new run"
        show(f"--resume auto {goes_on}; passed over {', '.join(passed[:NAMED])}{more}")
    return chosen


def age(folder):
    """What sorts new_run_dir's names by when they were made."""
    match = re.match(r"(\d{8}T\d{6})(?:_(\d+))?-", folder.name)
    return (match[1], int(match[2] or 1)) if match else ("", 0)


def why_not(config, fingerprint, parts):
    """Why not to go on with a run in these folders, one for each seed; None if nothing is against
    it and one of them has something left to do."""
    free = resume.FREE
    if config.run.repeat > 1:
        free = free | {"seed"}  # the folders' names say it
    ended = None
    unfinished = False
    for part in parts:
        try:
            left = resume.left_by(part)
        except InputError as e:
            return str(e)
        lines = resume.misfits(config, fingerprint, left.meta, free) if left.meta else []
        if lines:
            more = f" and {len(lines) - 2} more" if len(lines) > 2 else ""
            return f"{'; '.join(lines[:2])}{more}"
        if left.result and left.meta:
            ended = resume.why_ended(config, left)
        elif left.result:
            ended = "nothing says of what"
        unfinished |= not (left.result and ended)
    return None if unfinished else f"finished: {ended}"


def run_of(given):
    """The run's folder that `--resume given` names, itself or by one of its checkpoints; None for a
    checkpoint that lies elsewhere. Raises InputError."""
    if not given.is_dir():
        raise InputError(
            f"--resume {given}: no such folder; give a run's folder, a checkpoint in it, or auto"
        )
    if (given / "state.json").exists():
        # A link's own place says nothing, nor does "."
        path = given if given.parent.name == "checkpoints" else given.resolve()
        if path.is_symlink():
            path = path.resolve()
        return path.parent.parent if path.parent.name == "checkpoints" else None
    if given.name == "checkpoints" and resume.is_run(given.parent):
        return given.parent
    if not (resume.is_run(given) or seeds_in(given)):
        raise InputError(
            f"--resume {given}: neither a run nor a checkpoint; give a run's folder, a checkpoint "
            "in it, or auto"
        )
    return given


def refuse_older_checkpoint(given, folder, of_run):
    """A run goes on in its own folder only from its newest checkpoint."""
    if folder != of_run or not (given / "state.json").exists():
        return
    newest = checkpoints.latest(folder / "checkpoints")
    if newest and newest.resolve() != given.resolve():
        raise InputError(
            f"--resume {given}: {newest.name} is newer in this run; give another --run-dir to go "
            "on from the older one"
        )


# --------------------------------------------------------------------------------------------------
# Several seeds


def by_seed(run_dir, seed, repeat):
    """[(seed, folder), ...]: where the runs of `repeat` successive seeds are. Raises InputError."""
    if seed + repeat > 2**63:
        refuse("seed", seed, f"seeds below 2**63, all {repeat} of them")
    if repeat == 1:
        return [(seed, run_dir)]
    return [(s, run_dir / f"seed{s}") for s in range(seed, seed + repeat)]


def seeds_in(folder):
    """Names of the folders of single seeds in a folder."""
    return sorted(path.parent.name for path in folder.glob("seed*/log.txt"))


def refuse_other_seeds(folder, repeat):
    """One run does not go on in a folder of several, nor several in that of one."""
    seeds = seeds_in(folder)
    if repeat == 1 and seeds and not resume.is_run(folder):
        raise InputError(
            f"{folder}: holds the runs of several seeds ({', '.join(seeds)}); give --repeat, or "
            "the folder of one of them"
        )
    if repeat > 1 and resume.is_run(folder):
        raise InputError(
            f"{folder}: holds a single run; leave out --repeat {repeat}, or choose another "
            "--run-dir"
        )
