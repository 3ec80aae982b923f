"""Other people's trainers, each run from its own checkout, beside this one: same data, same loss.

    ./run.sh benchmarks peers --nanogpt ../nanoGPT --nanochat ../nanochat --text ts.txt --rounds 3
    ./run.sh benchmarks peers --nanochat ../nanochat --laptop --rounds 3
    ./run.sh benchmarks peers --modded ../modded-nanogpt --rounds 3

nanoGPT and nanochat run on the CPU, GPUs are hidden; modded-nanogpt needs Hopper GPUs. Checkouts
are only read: each run works in a copy in a temporary folder. Nothing is installed: a peer whose
packages --python cannot import is left out, with a line that says what is missing. Options other
than those below are our trainer's.

A round trains a peer, then this trainer (track laptop, gpt2-small, or one for text) until its
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
        text=dict(name=task.name, unit=task.unit, train=size_of(task.train, task.unit), val=theirs),
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
            result["peers"][peer.name] = dict(commit=peer.commit(), command=command, rounds=[])

    for n in range(rounds):
        for peer in peers:
            there = result["peers"][peer.name]
            if "skipped" in there:
                continue
            say(f"--- {peer.name}, round {n + 1} of {rounds}")
            try:
                there["rounds"].append(one_round(peer, task, options))
                there |= summarise(there["rounds"], peer.compiled)
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
                f"ours: loss {mine['loss']:.4f}, training {mine['train_time_s']:.2f} s, "
                f"process {mine['process_s']:.1f} s"
            )
    return row


def summarise(rounds, compiled):
    """Medians over the rounds of what is a number, and how many times as long the peer takes.

    A ratio is None where one of our runs missed its loss, and that of our later starts where the
    peer's would be faster, too.
    """

    def median(key, *sides):
        values = [r[side][key] for r in rounds for side in sides]
        return statistics.median(value for value in values if value is not None)

    medians = {}
    for side in ("peer", "first", "again"):
        first = rounds[0][side]
        keys = [key for key, value in first.items() if type(value) in (int, float)]
        medians[side] = {key: median(key, side) for key in keys}

    ratios = dict.fromkeys(("training", "interpolated", "first", "again"))
    if all(r["first"]["reached"] and r["again"]["reached"] for r in rounds):
        clock = median("train_time_s", "peer")
        process = median("process_s", "peer")
        ratios["training"] = clock / median("train_time_s", "first", "again")
        ratios["interpolated"] = clock / median("time_to_loss_s", "first", "again")
        ratios["first"] = process / median("process_s", "first")
        if not compiled:
            ratios["again"] = process / median("process_s", "again")
    return dict(medians=medians, ratios=ratios)


def render(result):
    """A table for each peer, ours below it."""
    text = result["text"]
    parts = result["split"]
    same = "the same in all trainers"
    if not parts["same"]:
        same = f"{parts['ours']:,} others in ours"
    versions = ", ".join(f"{version} ({who})" for who, version in result["torch"].items())
    options = ""
    if result["options"]:
        options = f"Our options: `{' '.join(result['options'])}`"
    blocks = [
        f"# Peers on {text['name']}, {result['device']}, {result['threads']} CPU threads",
        f"{text['train']:,} {text['unit']}s to train on, {parts['peers']:,} for validation "
        f"({same}). torch {versions}.",
        options,
    ]
    for name, there in result["peers"].items():
        blocks += [f"## {name}", *blocks_of(name, there, result)]
    return document(*blocks)


def blocks_of(name, there, result):
    """What render() says of one peer."""
    blocks = []
    if there.get("commit"):
        blocks.append(f"Commit {there['commit'][:12]}: `{there['command']}`")
    if there.get("medians"):
        head = UNITS[result["text"]["unit"]]
        header = ["", head, "steps", "parameters", "ms/step", "training s"]
        header += ["all steps s", "process s"]
        rows = []
        for side, label in dict(peer=name, first="ours, first start", again="ours, again").items():
            m = there["medians"][side]
            loss = f"{m['loss']:.4f}"
            if side != "peer" and not all(r[side]["reached"] for r in there["rounds"]):
                loss += " (not reached)"
            cells = [label, loss, f"{m['steps']:,.0f}", number(m.get("params"), ",.0f")]
            times = ("ms_per_step", "train_time_s", "all_steps_s", "process_s")
            rows.append(cells + [number(m.get(key)) for key in times])
        blocks += [table(header, rows), times_as_long(name, there)]
        if result["target"] is not None:
            blocks.append(end_of(name, there["medians"]["peer"]["loss"], result["target"]))
    blocks.append(there.get("skipped"))
    return blocks


def times_as_long(name, there):
    """The ratios in words."""
    row = there["rounds"][0]
    dtypes = f"Ours in {row['first']['dtype']}."
    if row["peer"].get("dtype"):
        dtypes = f"{name} in {row['peer']['dtype']}, ours in {row['first']['dtype']}."
    ratios = {key: number(ratio) for key, ratio in there["ratios"].items()}
    return (
        f"Rounds: {len(there['rounds'])}, medians. {dtypes} {name} takes this many times as long: "
        f"training {ratios['training']} ({ratios['interpolated']} by a line between our "
        f"validations), process {ratios['first']} against our first start, {ratios['again']} "
        "against later ones."
    )


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
