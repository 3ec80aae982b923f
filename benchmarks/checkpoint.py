"""What a checkpoint costs: its size, seconds to copy it aside, to write it and to load it, beside
the disk's own floor.

    python -m benchmarks checkpoint --megabytes 1600     about gpt2-small's

The tensors are made up: matrices in the trainer's three parts (bf16 weights, their 16 lower bits,
fp32 momentum) and small vectors. In each round, one after the other:
    copy       into memory that is there already, which is all that training itself waits for
    floor      write and fsync as many bytes to one file on the same disk, in one os.write loop
    write      save(wait=True): hash, write, fsync, rename, delete the one before
    read       read as many bytes from the disk, in one loop
    load       load(): hash, compare, and touch every tensor
Then what they cost training: a track's first 40 steps without checkpoints and with one every 10
(three within the
training clock), in turns, by one compiled trainer; the difference over three is the price of one,
and over 600 s that
of the default, one every 10 minutes.
What the system keeps of a file in memory is dropped before it is read, where the system lets us.
Medians of the rounds; the ratios are medians of each round's own.
"""

import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from base import InputError
from runtime.checkpoint import TENSORS, Checkpoints, latest, load

RUNS = Path(__file__).resolve().parent.parent / "runs"
CHUNK = 1 << 24
STEPS, EVERY = 40, 10  # of the training runs


def tensors_of(megabytes):
    """{name: CPU tensor} of about so many MB in random bits, which no file system can compress."""
    shape, tensors = (256, 1024), {}  # 8 bytes for each element: 2.1 MB
    for i in range(max(1, round(megabytes * 1e6 / 8 / (shape[0] * shape[1])))):
        tensors[f"weights/{i}"] = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(
            torch.bfloat16
        )
        tensors[f"low/{i}"] = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
        tensors[f"momentum/{i}"] = torch.randn(shape)
        tensors[f"scale/{i}"] = torch.randn(shape[1])
    return tensors


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def write_plainly(path, part, size):
    """size bytes from `part`, again and again, with nothing but the system's calls."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    while size:
        size -= os.write(fd, part[:size])
    os.fsync(fd)
    os.close(fd)


def read_plainly(path, buffer):
    with open(path, "rb", buffering=0) as f:
        while f.readinto(buffer):
            pass


def forget(path):
    """Have the system drop what it keeps of a written file in memory; whether it can be asked
    to."""
    if hasattr(os, "posix_fadvise"):
        with open(path, "rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return hasattr(os, "posix_fadvise")


def touch(path):
    """Load, and have every page of every tensor in memory."""
    for t in load(path)[0].values():
        t.reshape(-1).view(torch.uint8)[::4096].sum()


def store(megabytes, folder, repeats):
    """The store alone: medians in seconds, MB/s and ratios to the floors."""
    print(f"making {megabytes:,} MB of tensors ...", file=sys.stderr)
    live = tensors_of(megabytes)
    aside = {name: t.clone() for name, t in live.items()}
    size = sum(t.nbytes for t in live.values())
    part, buffer = os.urandom(CHUNK), bytearray(CHUNK)
    rounds, written, said = [], [], lambda line: print(line, file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder, prefix="checkpoint-") as here:
        checkpoints, plain = (
            Checkpoints(Path(here) / "checkpoints", keep_last=1, say=said),
            Path(here) / "plain",
        )
        for step in range(repeats + 1):  # the first one warms up: nothing to delete yet
            row = dict(copy=seconds(lambda: [aside[name].copy_(t) for name, t in live.items()]))
            row["floor"] = seconds(write_plainly, plain, part, size)
            row["write"] = seconds(
                lambda: written.append(checkpoints.save(step, aside, dict(step=step), wait=True))
            )
            if not written[-1]:
                raise InputError("the checkpoint could not be written, see above")
            dropped = forget(plain), forget(latest(checkpoints.folder) / TENSORS)
            row["read"] = seconds(read_plainly, plain, buffer)
            row["load"] = seconds(touch, latest(checkpoints.folder))
            plain.unlink()
            if step:
                rounds.append(row)
                print(
                    f"round {step}/{repeats}: "
                    + ", ".join(f"{k} {v:.3f} s" for k, v in row.items()),
                    file=sys.stderr,
                )
        on_disk = sum(path.stat().st_size for path in latest(checkpoints.folder).iterdir())
    median = {name: statistics.median(row[name] for row in rounds) for name in rounds[0]}
    return dict(
        tensors=len(live),
        tensor_bytes=size,
        bytes_on_disk=on_disk,
        rounds=repeats,
        read_from_disk=all(dropped),
        seconds=median,
        megabytes_per_s={name: size / 1e6 / s for name, s in median.items()},
        write_over_floor=statistics.median(row["write"] / row["floor"] for row in rounds),
        load_over_read=statistics.median(row["load"] / row["read"] for row in rounds),
    )


def training(folder, repeats, options):
    """What a checkpoint costs a training run: seconds of the training clock, by pairs of runs
    with and without."""
    import train_gpt as tg

    given = tg.parse_args([*options, "--sample-tokens", "0"])
    c = dataclasses.replace(
        given, target=None, steps=STEPS, eval_every=STEPS, val_tokens=given.val_row_len
    )
    stages = [tg.stage_at(c, tg.progress_at(c, step)) for step in range(STEPS)]
    pairs = []
    with tempfile.TemporaryDirectory(dir=folder, prefix="checkpoint-") as here:
        trainer = None
        for i in range(repeats + 1):  # the first one warms up
            pair = {}
            for every in ("off", str(EVERY)):
                run_dir = Path(here) / f"{i}-{every}"
                with (
                    tg.Log(run_dir, STEPS) as log,
                    contextlib.closing(
                        Checkpoints(run_dir / "checkpoints", say=log.say)
                    ) as checkpoints,
                ):
                    if trainer is None:
                        trainer = tg.Trainer(
                            c, tg.World(), tg.load_data(c, stages, tg.World()), stages, log
                        )
                        if trainer.compiled:
                            trainer.warm_up(log)
                    trainer.c = dataclasses.replace(c, checkpoint_every=every)
                    pair[every] = trainer.run(log, 0.0, tg.Requests(), checkpoints)["train_time_s"]
                size = (
                    sum(path.stat().st_size for path in run_dir.rglob("state.safetensors")) / 2
                )  # two are kept
            if i:
                pairs.append(dict(without=pair["off"], with_checkpoints=pair[str(EVERY)]))
                print(
                    f"pair {i}/{repeats}: {STEPS} steps {pair['off']:.2f} s, with checkpoints {pair[str(EVERY)]:.2f} s",
                    file=sys.stderr,
                )
    prices = sorted((p["with_checkpoints"] - p["without"]) / (STEPS // EVERY - 1) for p in pairs)
    return dict(
        track=c.track,
        steps=STEPS,
        every=EVERY,
        pairs=pairs,
        bytes=size,
        seconds_per_checkpoint=prices,
        share_at_default=statistics.median(prices) / 600,
    )


def run(megabytes=100, folder=RUNS, repeats=5, trainer_options=("--track", "laptop")):
    """dict(store=..., training=...): each part of the benchmark has a key here and a table in
    render()."""
    if megabytes < 1 or repeats < 1:
        raise InputError(f"--megabytes {megabytes} --repeats {repeats}: expected 1 or more of each")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return dict(
            store=store(megabytes, folder, repeats),
            training=training(
                folder, repeats, [*map(str, trainer_options)] or ["--track", "laptop"]
            ),
        )
    except OSError as e:
        raise InputError(
            f"--folder {folder}: {e.strerror or e}; choose one on a disk with space for three times "
            f"{megabytes} MB"
        ) from None


def render(result):
    """The result in Markdown."""
    r = result["store"]
    lines = [
        "# Checkpoints",
        "",
        f"{r['tensor_bytes'] / 1e6:,.1f} MB in {r['tensors']:,} tensors, "
        f"{r['bytes_on_disk'] / 1e6:,.1f} MB on disk. Writing takes {r['write_over_floor']:.2f} times its floor, "
        f"loading {r['load_over_read']:.2f} times reading alone"
        f"{'' if r['read_from_disk'] else ', both from memory'}; medians of {r['rounds']} rounds.",
        "",
        "| | s | MB/s |",
        "|---|---|---|",
    ]
    about = dict(
        copy="copy aside (training waits)",
        floor="floor: write and fsync",
        write="write a checkpoint (a thread)",
        read="floor: read",
        load="load a checkpoint",
    )
    lines += [
        f"| {about[name]} | {r['seconds'][name]:.3f} | {r['megabytes_per_s'][name]:,.0f} |"
        for name in about
    ]
    t = result["training"]
    lines += [
        "",
        f"In training, track {t['track']}: one checkpoint of {t['bytes'] / 1e6:,.1f} MB takes "
        f"{statistics.median(t['seconds_per_checkpoint']):.2f} s of the training clock (median of {len(t['pairs'])} "
        f"pairs of {t['steps']} steps; {', '.join(f'{s:.2f}' for s in t['seconds_per_checkpoint'])}): at the default "
        f"interval of 10 minutes {t['share_at_default']:.2%} of the time.",
    ]
    return "\n".join(lines) + "\n"


def add_arguments(parser):
    parser.add_argument(
        "--megabytes", type=int, default=100, metavar="N", help="size of the checkpoint [100]"
    )
    parser.add_argument(
        "--folder", type=Path, default=RUNS, metavar="DIR", help="write here, then delete it [runs]"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="rounds, for medians [5]"
    )
