"""What a checkpoint costs: its size, seconds to copy it aside, to write it and to load it, beside
the disk's own floor.

    ./run.sh benchmarks checkpoint --megabytes 1600     about gpt2-small's

The tensors are made up: matrices in the trainer's three parts (bf16 weights, their 16 lower bits,
fp32 momentum) and small vectors. In each round, one after the other:
    copy    into memory that is there already, which is all that training itself waits for
    floor   write and fsync as many bytes to one file on the same disk, in one os.write loop
    write   save(wait=True): hash, write, fsync, rename, delete the one before
    read    read as many bytes from the disk, in one loop
    load    load(): hash, compare, and touch every tensor
Then what they cost training: a track's first 40 steps without checkpoints and with one every 10
(three within the training clock), in turns, by one compiled trainer; the difference over three is
the price of one, and over 600 s that of the default, one every 10 minutes. What the system keeps
of a file in memory is dropped before it is read, where the system lets us. Medians of the rounds;
the ratios are medians of each round's own.
"""

import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from base import InputError
from base.command import given_path
from benchmarks import subject
from benchmarks.options import COUNT
from benchmarks.report import document, say, table
from runtime.checkpoints import TENSORS, Checkpoints, latest, load
from runtime.log import Log

RUNS = Path(__file__).resolve().parent.parent / "runs"
CHUNK = 1 << 24
STEPS = 40  # of the training runs
EVERY = 10  # steps between their checkpoints
ABOUT = dict(
    copy="copy aside (training waits)",
    floor="floor: write and fsync",
    write="write a checkpoint (a thread)",
    read="floor: read",
    load="load a checkpoint",
)


def tensors_of(megabytes):
    """{name: CPU tensor} of about so many MB in random bits, which no file system can compress."""
    rows = 256
    columns = 1024
    tensors = {}
    for i in range(max(1, round(megabytes * 1e6 / 8 / (rows * columns)))):  # 8 bytes an element
        bits = [torch.randint(-(2**15), 2**15, (rows, columns), dtype=torch.int16) for _ in "12"]
        tensors[f"weights/{i}"] = bits[0].view(torch.bfloat16)
        tensors[f"low/{i}"] = bits[1]
        tensors[f"momentum/{i}"] = torch.randn(rows, columns)
        tensors[f"scale/{i}"] = torch.randn(columns)
    return tensors


def seconds(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def copy_all(tensors, aside):
    for name, t in tensors.items():
        aside[name].copy_(t)


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
    """Have the system drop what it keeps of a written file in memory; whether it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with open(path, "rb") as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def touch(path):
    """Load, and have every page of every tensor in memory."""
    for t in load(path)[0].values():
        t.reshape(-1).view(torch.uint8)[::4096].sum()


def store(megabytes, folder, repeats):
    """The store alone: medians in seconds, MB/s and ratios to the floors."""
    say(f"making {megabytes:,} MB of tensors ...")
    live = tensors_of(megabytes)
    aside = {name: t.clone() for name, t in live.items()}
    size = sum(t.nbytes for t in live.values())
    part = os.urandom(CHUNK)
    buffer = bytearray(CHUNK)
    rounds = []
    with tempfile.TemporaryDirectory(dir=folder, prefix="checkpoint-") as here:
        checkpoints = Checkpoints(Path(here) / "checkpoints", keep_last=1, say=say)
        plain = Path(here) / "plain"

        def save(step):
            if not checkpoints.save(step, aside, dict(step=step), wait=True):
                raise InputError("the checkpoint could not be written, see above")

        for step in range(repeats + 1):  # the first one warms up: nothing to delete yet
            row = dict(copy=seconds(copy_all, live, aside))
            row["floor"] = seconds(write_plainly, plain, part, size)
            row["write"] = seconds(save, step)
            written = latest(checkpoints.folder)
            dropped = [forget(plain), forget(written / TENSORS)]
            row["read"] = seconds(read_plainly, plain, buffer)
            row["load"] = seconds(touch, written)
            plain.unlink()
            if step:
                rounds.append(row)
                shown = ", ".join(f"{name} {s:.3f} s" for name, s in row.items())
                say(f"round {step}/{repeats}: {shown}")
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
    c = subject.parse([*options, "--sample-tokens", "0"])
    c = subject.change(c, target=None, steps=STEPS, eval_every=STEPS, val_tokens=c.val_row_len)
    pairs = []
    with tempfile.TemporaryDirectory(dir=folder, prefix="checkpoint-") as here:
        with Log(Path(here) / "log", STEPS) as log:
            trainer = subject.Subject(c, subject.World(), log)
            trainer.warm_up(log)

        def run(name, every):
            """(seconds of the training clock, bytes of one checkpoint) of a run."""
            run_dir = Path(here) / name
            with Log(run_dir, STEPS) as log:
                checkpoints = Checkpoints(run_dir / "checkpoints", say=log.say)
                with contextlib.closing(checkpoints):
                    result = trainer.run(log, checkpoints=checkpoints, every=every)
            size = sum(p.stat().st_size for p in run_dir.rglob("state.safetensors"))
            return result["train_time_s"], size / 2  # two are kept

        for i in range(repeats + 1):
            without, _ = run(f"{i}-without", "off")
            seconds, size = run(f"{i}-with", str(EVERY))
            if i:  # the first pair warms up
                pairs.append(dict(without=without, with_checkpoints=seconds))
                say(
                    f"pair {i}/{repeats}: {STEPS} steps {without:.2f} s, with checkpoints "
                    f"{seconds:.2f} s"
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


def run(megabytes=100, folder=RUNS, repeats=5, trainer_options=()):
    """dict(store, training): each part of the benchmark has a key here and a table in render()."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return dict(
            store=store(megabytes, folder, repeats),
            training=training(folder, repeats, trainer_options or ["--track", "laptop"]),
        )
    except OSError as e:
        raise InputError(
            f"--folder {folder}: {e.strerror or e}; choose one on a disk with space for three "
            f"times {megabytes} MB"
        ) from None


def render(result):
    """The result in Markdown."""
    r = result["store"]
    t = result["training"]
    from_memory = "" if r["read_from_disk"] else ", both from memory"
    rows = []
    for name, label in ABOUT.items():
        rows.append([label, f"{r['seconds'][name]:.3f}", f"{r['megabytes_per_s'][name]:,.0f}"])
    prices = t["seconds_per_checkpoint"]
    return document(
        "# Checkpoints",
        f"{r['tensor_bytes'] / 1e6:,.1f} MB in {r['tensors']:,} tensors, "
        f"{r['bytes_on_disk'] / 1e6:,.1f} MB on disk. Writing takes {r['write_over_floor']:.2f} "
        f"times its floor, loading {r['load_over_read']:.2f} times reading alone{from_memory}; "
        f"medians of {r['rounds']} rounds.",
        table(["", "s", "MB/s"], rows),
        f"In training, track {t['track']}: one checkpoint of {t['bytes'] / 1e6:,.1f} MB takes "
        f"{statistics.median(prices):.2f} s of the training clock (median of {len(t['pairs'])} "
        f"pairs of {t['steps']} steps; {', '.join(f'{s:.2f}' for s in prices)}): at the default "
        f"interval of 10 minutes {t['share_at_default']:.2%} of the time.",
    )


def add_arguments(parser):
    parser.option("--megabytes", COUNT, 100, "N", "size of the checkpoint")
    about = "write here, then delete it [runs]"
    parser.add_argument("--folder", type=given_path, default=RUNS, metavar="DIR", help=about)
    parser.option("--repeats", COUNT, 5, "N", "rounds, for medians")
