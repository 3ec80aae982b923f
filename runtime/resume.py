"""What a run has left in its folder, and whether it can go on from there.

RUN_DIR/log.txt, metrics.jsonl, config.json       from the start
RUN_DIR/checkpoints/step-000123/                  see checkpoints.py
RUN_DIR/model.safetensors, result.json            once it has finished; result.json is there a
                                                  little before, with `finishing` in it

A result counts until there is a checkpoint of a later step: then the run has gone on since.
"""

import contextlib
import dataclasses
import json
import os
import socket
import typing
from pathlib import Path

from base import InputError, RankError
from base.options import seconds
from records.metrics import METRICS, VAL_LOSS, meets

from . import checkpoints
from .log import show
from .machine import first_rank_first, share
from .options import RunConfig, as_option, defaults, flat
from .warm_start import differences, load_weights, other_tokens

# What may differ between a run and its continuation; another text is found by its fingerprint
FREE = {f.name for f in dataclasses.fields(RunConfig)}
FREE |= set(
    "target target_metric text val_text conversations encoding vocabulary max_skips".split()
)
# Options that say when a run ends: they may differ from the finished run's, and then it may go on
ENDS = ("target", "target_metric", "steps", "max_time", "patience")
# What has a check of its own besides
APART = {"steps", "earlier", "extend", "warm_start"}
# Options that belong to a command and its machine, and not to the run it goes on with
OF_A_COMMAND = {"run_dir", "cache_dir", "resume", "repeat", "gpus", "max_restarts"}
OF_A_COMMAND |= {"micro_tokens", "recompute", "kernels", "compile", "earlier"}


class Left(typing.NamedTuple):
    """What a run has left in its folder."""

    folder: Path
    result: dict | None  # of a run that has finished and not gone on since
    checkpoint: Path | None  # the newest complete one
    # config, data_fingerprint and progress, of the checkpoint, or of the result where there is no
    # checkpoint; None if nothing says what the run is
    meta: dict | None


def left_by(folder):
    """What a run has Left in a folder. Raises InputError for a checkpoint that cannot be read."""
    result = read_result(folder)
    checkpoint = checkpoints.latest(folder / "checkpoints")
    if checkpoint is None:
        return Left(folder, result, None, described(folder, result))
    meta = checkpoints.load_meta(checkpoint)
    if result and meta["progress"]["step"] > result["steps"]:
        result = None
    return Left(folder, result, checkpoint, meta)


def read_result(folder):
    """The result of a finished run, else None: also of one that ended before it had written its
    last checkpoint and weights."""
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return None
    whole = isinstance(result, dict) and "steps" in result and "finishing" not in result
    return result if whole else None


def described(folder, result):
    """What a checkpoint's meta would say, from a run's config.json and result; None without them.

    Without a result there is no progress in it.
    """
    try:
        said = json.loads((folder / "config.json").read_text())
        meta = dict(
            config=said["config"],
            data_fingerprint=said["data"],
            environment=said["environment"],
        )
        if result:
            meta["progress"] = progress_at(result, said["environment"])
        return meta
    except (OSError, ValueError, LookupError, TypeError):
        return None


def progress_at(result, environment):
    """The fields of a session's Position at the end of a run, from its result."""
    rate = environment["probe"]["matmul"][environment["dtype"]] * environment["world_size"]
    return dict(
        step=result["steps"],
        tokens=result["tokens"],
        flops=result["peak_share"] * result["train_time_s"] * rate,
        train_time=result["train_time_s"],
        metrics={name: result[name] for name in METRICS if name in result},
        validated=result.get("best_step", result["steps"]),
        best=result[VAL_LOSS],
        best_step=result.get("best_step", result["steps"]),
        best_metrics={name: result[name] for name in METRICS if name in result},
        resumed_at=result["resumed_at"],
    )


# --------------------------------------------------------------------------------------------------
# Whether it fits


def misfits(config, fingerprint, meta, free=FREE):
    """What keeps a configuration from going on with a run, a readable line for each; [] if it fits.

    fingerprint: of the data; meta: of the run; free: options that may differ. What the
    configuration has and the run does not was added since, and had its default then.
    """
    ours = flat(config)
    theirs = defaults(config) | meta["config"]
    apart = free | APART
    # How steps were added before is part of the recipe, until some are added again
    if ours["steps"] == theirs["steps"] and theirs["earlier"]:
        theirs["extend"] = theirs["earlier"][-1][2]
        apart = apart - {"extend"}
    # Weights to begin with are not for a run that has begun with others
    if ours["warm_start"]:
        apart = apart - {"warm_start"}
    lines = []
    if fingerprint != meta["data_fingerprint"]:
        here = f"{ours['text'] or ours['data']}, {fingerprint[:16]}"
        there = f"{theirs['text'] or theirs['data']}, {meta['data_fingerprint'][:16]}"
        lines.append(f"data: {here} here, {there} in the run")
    lines += differences(
        {name: value for name, value in ours.items() if name not in apart},
        {name: value for name, value in theirs.items() if name not in apart},
    )
    if ours["steps"] < theirs["steps"]:
        lines.append(
            f"steps: {ours['steps']} here, {theirs['steps']} in the run: they can only grow"
        )
    return lines


def check_fit(config, dataset, left):
    """Refuse to go on with a run of another recipe or other data, naming what differs. Raises
    InputError."""
    lines = misfits(config, dataset.fingerprint, left.meta)
    # The same name and text, but not what learns a vocabulary from them
    if not lines and (other := other_tokens(left.folder, dataset)):
        lines.append(other)
    if lines:
        raise InputError(
            f"{left.folder}: the run does not fit: {'; '.join(lines)}. Give what it was made with, "
            "or --warm-start to take its weights only"
        )


def why_ended(config, left):
    """Why a finished run has nothing left to do under these options, in words; None if it has."""
    result = left.result
    goal = config.goal
    value = result.get(goal.target_metric)
    if goal.target is not None and value is not None:
        if meets(value, goal.target, goal.target_metric):
            return f"its {goal.target_metric} of {value:.4f} meets the target of {goal.target}"
    if result["steps"] >= config.schedule.steps:
        return f"it took all {result['steps']} steps"
    trained = result["train_time_s"]
    if config.run.max_time and trained >= seconds(config.run.max_time):
        return f"it trained for {trained:.1f} s of at most {config.run.max_time}"

    # Without a checkpoint of its end nobody knows how patient it was
    since_best = left.meta["progress"].get("since_best", 0)
    if config.run.patience and since_best >= config.run.patience:
        return f"its last {since_best} validations brought no better one"
    ours = flat(config)
    theirs = defaults(config) | left.meta["config"]
    if all(ours[name] == theirs[name] for name in ENDS):
        return "it ended as these options say"
    return None


# --------------------------------------------------------------------------------------------------
# Going on


def begin(config, world, run_dir, resuming, dataset, closing):
    """(result, found): what is in a run's folder to go on from, None where there is nothing.

    A result if it has finished and has nothing left to do; else (tensors, meta) of a checkpoint,
    the tensors on the first rank only. config: of parts, with goal, schedule and a RunConfig `run`;
    dataset: a Dataset; closing: an ExitStack until whose end the folder is held against other
    processes. Raises InputError.
    """

    def look():
        if world.rank:
            return None, None
        if resuming:
            # Only read: the folder may be of somebody else
            result = finished(config, dataset, run_dir)
            if result:
                return result, None
        closing.enter_context(alone(run_dir))
        if not resuming:
            refuse_run_in_the_way(run_dir)
            return None, None
        return None, starting_point(config, dataset, run_dir)

    result, found = first_rank_first(world, look)
    tensors, meta = found or ({}, None)
    result, meta = share(world, [result, meta])
    return result, (tensors, meta) if meta else None


def finished(config, dataset, run_dir):
    """The result of a run that has nothing left to do, having said so; else None. Raises
    InputError."""
    left = left_by(run_dir)
    if not left.result:
        return None
    if not left.meta:
        raise InputError(
            f"{run_dir}: holds a result, and neither a checkpoint nor the config.json that says of "
            "what; restore one of them, or choose another --run-dir"
        )
    check_fit(config, dataset, left)
    why = why_ended(config, left)
    if not why:
        return None
    show(
        f"{run_dir} had finished before: {why}. This is its result again; more --steps, another "
        "--target or more --max-time go on from there"
    )
    # The target may be another one by now, which it meets or not as it is
    goal = config.goal
    reached = None
    if goal.target is not None:
        value = left.result.get(goal.target_metric)
        reached = value is not None and meets(value, goal.target, goal.target_metric)
    asked = dict(target_metric=goal.target_metric, target=goal.target, reached=reached)
    return left.result | asked


def starting_point(config, dataset, run_dir):
    """(tensors, meta) to go on from, None to start anew. Raises InputError."""
    # The run's own come first: it may have been resumed before
    left = left_by(run_dir)
    given = config.run.resume
    if not (left.checkpoint or left.result) and given not in ("", "auto"):
        left = left_by_given(Path(given))
        if not (left.checkpoint or left.result):
            if config.run.repeat > 1:
                return None  # not begun with this seed
            raise InputError(f"--resume {given}: holds no complete checkpoint")
    if not (left.checkpoint or left.result):
        return None
    check_fit(config, dataset, left)
    if left.checkpoint:
        return checkpoints.load(left.checkpoint)
    return weights_alone(left)


def left_by_given(given):
    """What there is to go on from in the folder of a run or of a checkpoint."""
    if (given / "state.json").exists():
        return Left(given, None, given, checkpoints.load_meta(given))
    return left_by(given)


def weights_alone(left):
    """(tensors, meta) of a finished run whose checkpoints are gone. Raises InputError."""
    # Those of the last step, where the best ones are of another
    names = [path.name for path in left.folder.glob("last.safetensors")] or ["model.safetensors"]
    weights = load_weights(left.folder, "--resume", names[0])
    kinds = sorted({str(x.dtype).removeprefix("torch.") for x in weights.values()})
    show(
        f"{left.folder} has no checkpoint: it goes on with the weights of {names[0]} "
        f"({', '.join(kinds)}), and the optimizer's moments begin at zero"
    )
    return {f"weights/{name}": x for name, x in weights.items()}, left.meta


def refuse_other_options(config, world):
    """All ranks have to train the same: where the folder to go on from is not on every machine,
    its options are not either. Raises InputError."""
    ours = {name: value for name, value in flat(config).items() if name not in FREE}
    theirs = share(world, ours)

    def compare():
        if lines := differences(ours, theirs, "on the first rank"):
            raise RankError(f"it has other options: {'; '.join(lines)}")

    first_rank_first(world, compare)


def step_of(found):
    """After which step a run goes on; found: (tensors, meta) of a checkpoint, None if it begins."""
    return found[1]["progress"]["step"] if found else 0


def added_steps(config, found):
    """Schedule.earlier of a run that goes on: as it was, and the steps that are added now."""
    if not found:
        return ()
    meta = found[1]
    earlier = tuple(tuple(entry) for entry in meta["config"].get("earlier", ()))
    planned = meta["config"]["steps"]
    if config.schedule.steps != planned:
        earlier += ((step_of(found), planned, config.run.extend),)
    return earlier


def options_of(given):
    """{option: value} of the run that `--resume given` names, but for what is of a command and its
    machine; {} where it names none. Raises InputError for a checkpoint that cannot be read."""
    if not given or given == "auto" or not os.path.isdir(given):
        return {}
    folder = Path(given)
    left = left_by_given(folder)
    own = {}
    if not left.meta:
        # The folders of several seeds: the first one speaks for all
        seeds = sorted(folder.glob("seed*/config.json"), key=lambda path: seed_of(path.parent))
        left = left_by(seeds[0].parent) if seeds else left
        own = dict(repeat=len(seeds)) if seeds else {}
    if not left.meta:
        return {}
    for name, value in left.meta["config"].items():
        if name not in OF_A_COMMAND:
            own[name] = as_option(value)
    return own


def seed_of(folder):
    """What sorts the folders of several seeds."""
    digits = folder.name.removeprefix("seed")
    return int(digits) if digits.isdecimal() else -1


# --------------------------------------------------------------------------------------------------
# A folder for one process


@contextlib.contextmanager
def alone(run_dir):
    """Hold a run's folder against other processes that would train in it. Raises InputError."""
    with contextlib.ExitStack() as held:
        lock = run_dir / ".lock"
        try:
            held.enter_context(checkpoints.locked(run_dir, seconds=0))
        except BlockingIOError:
            raise InputError(
                f"{run_dir}: another process is training there{holder(lock)}; wait for it, or "
                "choose another --run-dir"
            ) from None
        except OSError as e:
            raise InputError(
                f"--run-dir {run_dir}: {e.strerror}; choose a folder that can be written"
            ) from None
        with contextlib.suppress(OSError):  # on a full disk others do not learn who it is
            lock.write_text(f"{os.getpid()} {socket.gethostname()}")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.truncate(lock, 0)


def holder(lock):
    """Who holds a lock, in words, as it has written there itself."""
    try:
        pid, host = lock.read_text().split()
    except (OSError, ValueError):
        return ""
    return f" (pid {pid} on {host})"


def is_held(run_dir):
    """Whether another process trains in a folder."""
    try:
        with checkpoints.locked(run_dir, seconds=0):
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False  # nobody can train there


def is_run(folder):
    """Whether there is anything of a run in a folder."""
    names = ("log.txt", "config.json", "result.json", "checkpoints")
    return any((folder / name).exists() for name in names)


def refuse_run_in_the_way(folder):
    """A new run needs a folder without one, also without those of several seeds."""
    if folder.is_dir() and (is_run(folder) or next(folder.rglob("log.txt"), None)):
        raise InputError(
            f"--run-dir {folder}: holds a run already; choose another folder, or --resume auto to "
            "go on"
        )


def added_steps_in_words(config, at, lr_at):
    """What happens to the learning rate of a run that goes on after step `at`, if it is there that
    steps were added to it; else None. lr_at(config, step): its factor."""
    schedule = config.schedule
    if not schedule.earlier or schedule.earlier[-1][0] != at:
        return None
    _, planned, extend = schedule.earlier[-1]
    before = lr_at(config, max(at, 1))
    after = lr_at(config, at + 1)
    how = dict(
        replan=f"the learning rate is that of a run of {schedule.steps} steps from here on",
        cooldown="the learning rate falls from its peak over the added steps",
    )
    others = dict(replan="cooldown", cooldown="replan")
    return (
        f"{schedule.steps - planned} steps more than the {planned} planned: {how[extend]}, "
        f"{before:.2f} of its peak in step {at}, {after:.2f} in the next (--extend {extend}; the "
        f"other choice is {others[extend]})"
    )
