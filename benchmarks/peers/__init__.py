"""Other people's trainers, each run from its own checkout, beside this one: same data, same loss.

    ./run.sh benchmarks peers --nanogpt ../nanoGPT --nanochat ../nanochat --text ts.txt --rounds 3
    ./run.sh benchmarks peers --minimind ../minimind --text ts.txt --minimind-options epochs=4
    ./run.sh benchmarks peers --nanochat ../nanochat --laptop --rounds 3
    ./run.sh benchmarks peers --modded ../modded-nanogpt --rounds 3

nanoGPT, nanochat and minimind run on the CPU, GPUs are hidden; modded-nanogpt needs Hopper GPUs.
Checkouts are only read: each run works in a copy in a temporary folder. Nothing is installed: a
peer whose packages --python cannot import is left out, with a line that says what is missing.
Options other than those below are our trainer's.

A round trains a peer, then this trainer (track own-text, laptop or gpt2-small) until its
validation loss is the peer's, once with an empty cache folder (first start) and once with that one
filled (again). docs/benchmarks.md says what each time and loss includes, and each file of
benchmarks/peers/ what its peer is given.
"""

import importlib
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from base import InputError
from benchmarks.options import COUNT
from benchmarks.report import document, number, say, table

from .common import fail, our_options, ours, size_of

UNITS = dict(character="nats/char", byte="bits/byte", token="nats/token")  # of losses


def names():
    """Peers by the names of their files."""
    files = Path(__file__).parent.glob("[a-z]*.py")
    return sorted(path.stem for path in files if path.stem != "common")


def module_of(name):
    return importlib.import_module(f"{__name__}.{name}")


def checkouts(given, python):
    """A Checkout for each peer whose folder is in given = {option: value}. Raises InputError."""
    found = []
    if not any(given.get(name) for name in names()):
        options = ", ".join(f"--{name} PATH" for name in names())
        fail(f"nothing to run: give the checkout of a peer, {options}")
    for name in names():
        kind = module_of(name).Checkout
        own = {key: given.get(key) for key in kind.own_options}
        own = {key: value for key, value in own.items() if value}
        if given.get(name):
            found.append(kind(given[name], python, **own))
        elif own:
            option = next(iter(own)).replace("_", "-")
            fail(f"--{option}: expected --{name} PATH, too")
    return found


def run(
    text=None,
    python=sys.executable,
    rounds=1,
    trainer_options=(),
    save=lambda result: None,
    **given,
):
    """dict(text, split, ..., peers={name: dict(rounds=[...], medians, ratios) or dict(skipped)});
    save is given the same as it grows.

    given: folders of checkouts by the peer's name, and peers' own options.
    """
    if not shutil.which(python):
        fail(f"--python {python}: no such program; expected the interpreter for the peers")
    peers = checkouts(given, python)
    for peer in peers:
        if peer.own_data and (text or len(peers) > 1):
            fail(f"{peer.own_data}: leave out --text and other peers")
    first = peers[0]
    if not text and not first.own_data:
        fail("--text FILE is missing: expected what all are to train on, or --laptop for our track")
    options = list(map(str, trainer_options))
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        task = first.task(text, options, folder)
        result = compare(peers, task, rounds, options, save)
    say(f"\n{render(result)}")
    return result


def compare(peers, task, rounds, options, save):
    """run()'s result of peers that share a task."""
    import torch

    theirs = size_of(task.val, task.unit)
    own, same = task.our_validation()
    how = "the same" if same else f"not the same as our {own:,}: losses compare roughly"
    say(f"validation: {theirs:,} {task.unit}s, {how}")
    result = dict(
        text=dict(
            name=task.name,
            unit=task.unit,
            train=size_of(task.train, task.unit),
            val=theirs,
            bits=task.scale if task.unit == "character" else None,
        ),
        metric=task.metric,
        target=task.target,
        device=task.device,
        threads=torch.get_num_threads(),
        split=dict(peers=theirs, ours=own, same=same),
        rounds=rounds,
        options=options,
        torch=dict(ours=torch.__version__),
        peers={},
    )

    def give_up(name, reason):
        say(f"{name}: {reason}")
        result["peers"].setdefault(name, {})["skipped"] = reason

    for peer in peers:
        try:
            there = peer.available()
        except InputError as e:
            there = dict(missing=[str(e)])
        if there["missing"]:
            missing = ", ".join(there["missing"])
            give_up(peer.name, f"skipped, because {peer.python} cannot import {missing}")
        else:
            command = " ".join(["python", *peer.command()])
            result["torch"][peer.name] = there["torch"]
            result["peers"][peer.name] = dict(
                commit=peer.commit(), command=command, compiles=peer.compiles, rounds=[]
            )

    for n in range(rounds):
        for peer in peers:
            there = result["peers"][peer.name]
            if "skipped" in there:
                continue
            say(f"--- {peer.name}, round {n + 1} of {rounds}")
            try:
                there["rounds"].append(one_round(peer, task, options))
                there |= summarise(there["rounds"])
                save(result)
            except InputError as e:
                give_up(peer.name, str(e))
    if not any(there.get("rounds") for there in result["peers"].values()):
        fail("; ".join(f"{name}: {there['skipped']}" for name, there in result["peers"].items()))
    return result


def one_round(peer, task, options):
    """Train the peer, then ours twice to its loss."""
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        found = peer.train(task, folder)
    row = dict(peer=found)
    say(
        f"{peer.name}: loss {found['loss']:.4f} on its {found['val_units']:,} {task.unit}s of "
        f"validation, process {found['process_s']:.1f} s"
    )
    given = our_options(task, found["loss"], options)
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        for side, caches in dict(first="empty caches", again="again").items():
            say(f"--- ours, {caches}, to {found['loss']:.4f}")
            mine = ours(f"to {peer.name}'s loss", task, given, folder)
            row[side] = mine
            say(
                f"ours: loss {mine['loss']:.4f}, process {mine['process_s']:.1f} s, "
                f"training {mine['train_time_s']:.2f} s"
            )
    return row


def summarise(rounds):
    """Medians over the rounds of what is a number, and how many times as long the peer takes.

    A ratio is None where one of our runs missed its loss.
    """

    def median(key, *sides):
        values = [r[side].get(key) for r in rounds for side in sides]
        return statistics.median(value for value in values if value is not None)

    medians = {}
    for side in ("peer", "first", "again"):
        first = rounds[0][side]
        keys = [key for key, value in first.items() if type(value) in (int, float)]
        medians[side] = {key: median(key, side) for key in keys}

    ratios = dict.fromkeys(("first", "again", "training", "interpolated"))
    if all(r["first"]["reached"] and r["again"]["reached"] for r in rounds):
        process = median("process_s", "peer")
        clock = median("train_time_s", "peer")
        ratios["first"] = process / median("process_s", "first")
        ratios["again"] = process / median("process_s", "again")
        ratios["training"] = clock / median("train_time_s", "first", "again")
        ratios["interpolated"] = clock / median("time_to_loss_s", "first", "again")
    return dict(medians=medians, ratios=ratios)


def render(result):
    """One table of all peers, ours below each; then what each was given."""
    text = result["text"]
    parts = result["split"]
    same = "the same in all trainers"
    if not parts["same"]:
        same = f"{parts['ours']:,} others in ours"
    versions = ", ".join(f"{version} ({who})" for who, version in result["torch"].items())
    rows = []
    notes = []
    for name, there in result["peers"].items():
        if there.get("medians"):
            rows += rows_of(name, there, result)
        notes += notes_of(name, there, result)
    options = ""
    if result["options"]:
        options = f"Our options: `{' '.join(result['options'])}`"
    header = ["", "process s", "peer's / ours", "training s", "peer's / ours"]
    header += [UNITS[text["unit"]], "steps", "parameters", "ms/step"]
    if text.get("bits"):
        header.insert(6, UNITS["byte"])
    return document(
        f"# Peers on {text['name']}, {result['device']}, {result['threads']} CPU threads",
        f"{text['train']:,} {text['unit']}s to train on, {parts['peers']:,} for validation "
        f"({same}). torch {versions}. Medians of rounds; a process is timed from start to exit.",
        table(header, rows) if rows else None,
        options,
        [f"- {note}" for note in notes],
    )


def rows_of(name, there, result):
    """The peer's row of the table and our two."""
    ratios = there["ratios"]
    bits = result["text"].get("bits")
    rows = []
    for side, label in dict(peer=name, first="ours, first start", again="ours, again").items():
        m = there["medians"][side]
        loss = f"{m['loss']:.4f}"
        if side != "peer" and not all(r[side]["reached"] for r in there["rounds"]):
            loss += " (not reached)"
        compared = ["", ""]
        if side != "peer":
            compared = [number(ratios[side]), number(ratios["training"])]
        row = [label, number(m["process_s"]), compared[0], number(m["train_time_s"]), compared[1]]
        row.append(loss)
        if bits:
            row.append(f"{m['loss'] * bits:.4f}")
        row += [f"{m['steps']:,.0f}", number(m.get("params"), ",.0f")]
        rows.append([*row, number(m.get("ms_per_step"))])
    return rows


def notes_of(name, there, result):
    """What else is to be said of one peer, a line each."""
    notes = []
    if there.get("commit"):
        notes.append(f"{name}, commit {there['commit'][:12]}: `{there['command']}`")
    if there.get("medians"):
        row = there["rounds"][0]
        dtypes = f"ours in {row['first']['dtype']}"
        if row["peer"].get("dtype"):
            dtypes = f"{name} in {row['peer']['dtype']}, {dtypes}"
        interpolated = number(there["ratios"]["interpolated"])
        notes.append(
            f"{name}: {dtypes}; rounds: {len(there['rounds'])}; training by a line between our "
            f"validations {interpolated} times"
        )
        if there.get("compiles"):
            notes.append(f"{name} compiles, with empty caches always; a later start is not timed")
        if result["target"] is not None:
            notes.append(end_of(name, there["medians"]["peer"]["loss"], result["target"]))
    if there.get("skipped"):
        notes.append(f"{name}: {there['skipped']}")
    return notes


def end_of(name, loss, target):
    """Where the peer ended, beside the track's target."""
    where = f"{target - loss:.4f} below it"
    if loss > target:
        where = f"{loss - target:.4f} above it"
    return f"The track's target is {target:g}: {name} ended {where}. The times are to its loss."


def add_arguments(parser):
    parser.option("--text", str, None, "FILE", "what all train on, such as Tiny Shakespeare")
    for name in names():
        kind = module_of(name).Checkout
        parser.option(f"--{name}", str, None, "PATH", kind.about)
        kind.add_arguments(parser)
    parser.add_argument(
        "--python",
        default=sys.executable,
        metavar="PATH",
        help="interpreter for the peers, with their packages [this one]",
    )
    parser.option("--rounds", COUNT, 1, "N", "repeat everything, for medians")
