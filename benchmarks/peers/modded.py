"""modded-nanogpt: same GPUs, same shards, in turns.

It runs as it is, with torchrun; what it offers to be set from outside is DATA_PATH, and that gets
a folder with exactly the shards of our track gpt2-small. It needs Hopper GPUs, 1, 2, 4 or 8 of
them with 52 GB each; CUDA's headers; and in --python torch, triton, numpy, tiktoken and kernels,
of which the last two fetch GPT-2's vocabulary and FlashAttention 3 over the network when they are
first used. Read with commit f411b3d3; steps, stages and validation are taken from its source, and
one that is written otherwise is refused.

A round is two or three trainings, each with its own compilation, which no clock counts: on one
H100 count on 10 minutes for each and as much for its compilation.
    modded         as it is
    equal tokens   ours with as many steps as make its number of tokens, the schedule stretched
    to its loss    ours as the track says, until the validation loss is its final one; where that
                   has as many steps, it is the same run
Both validate on the first 10,485,760 tokens of the same shard. A stage's time is taken between
validations that lie in it, since only those wait for the GPU; the short extension at modded's end
has none. Ratios are modded's number over ours of the same round: above 1, ours is faster.
"""

import ast
import itertools
import json
import operator
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from base import InputError
from benchmarks.report import bracketed, document, say, spread, table

from .common import ROOT, Peer, answer, environment, fail, importable, our_trainer, read_times

COMMIT = "f411b3d3"  # whose source this was written for
LAUNCH = ("-m", "torch.distributed.run", "--standalone")
# tokens of the shards per token trained on: documents are cut at each stage's length, the rest is
# dropped
WASTE = 1.2


# --- in a process of its interpreter


def ready(kernel):
    """importable(), and whether what it downloads is there.

    kernel: the arguments of its get_kernel() as JSON.
    """
    # our folder has a package named kernels, which is not the one that it means
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    found = importable("torch", "triton", "numpy", "tiktoken", "kernels")
    if found["missing"]:
        return found
    import tiktoken

    from kernels import get_kernel

    args, options = json.loads(kernel)
    downloads = {
        "GPT-2's vocabulary": lambda: tiktoken.get_encoding("gpt2"),
        f"FlashAttention 3, {args[0]} on the Hugging Face hub": lambda: get_kernel(
            *args, **options
        ),
    }
    for what, fetch in downloads.items():
        try:
            fetch()
        except Exception as e:  # of the network, the hub, the machine: as many kinds as causes
            said = f"{type(e).__name__}: {' '.join(str(e).split())[:160]}"
            found["missing"].append(
                f"{what} ({said}), which is downloaded when it is first used: "
                "the network is needed once"
            )
    return found


# --- what its source says


class Recipe(NamedTuple):
    stages: list  # of dict(start, end, tokens a step, max_doc_len, windows), to before step end
    steps: int
    val_tokens: int
    eval_every: int
    kernel: tuple  # arguments of get_kernel()

    @property
    def tokens(self):
        return sum((s["end"] - s["start"]) * s["tokens"] for s in self.stages)


OPERATORS = {
    ast.Add: operator.add,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def constant(node):
    """Value of numbers, strings, tuples and arithmetic; ValueError for anything else."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](constant(node.left), constant(node.right))
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(map(constant, node.elts))
    return ast.literal_eval(node)


def keywords(call):
    return {k.arg: constant(k.value) for k in call.keywords}


def read_recipe(source, where):
    """The Recipe in the text of its train_gpt.py. Raises InputError where it is not written as
    in COMMIT."""
    settings = {}
    stages = []
    kernel = None
    try:
        for node in ast.walk(ast.parse(source)):
            called = getattr(getattr(node, "func", None), "id", None)
            if isinstance(node, ast.ClassDef) and node.name == "Hyperparameters":
                fields = [a for a in node.body if isinstance(a, ast.AnnAssign)]
                settings = {a.target.id: a.value for a in fields}
            elif called == "TrainingStage":
                stages.append(keywords(node))
            elif called == "get_kernel":
                kernel = tuple(map(constant, node.args)), keywords(node)
        scheduled = constant(settings["num_scheduled_iterations"])
        steps = scheduled + constant(settings["num_extension_iterations"])

        # the last stage is the extension, and has no duration
        ends = [0]
        for share in itertools.accumulate(stage["duration"] for stage in stages[:-1]):
            ends.append(round(share * scheduled))
        if not kernel or ends[-1] != scheduled:
            raise ValueError
        ends.append(steps)
        found = []
        for start, end, stage in zip(ends, ends[1:], stages):
            found.append(
                dict(
                    start=start,
                    end=end,
                    tokens=stage["batch_size"],
                    max_doc_len=stage["train_max_seq_len"],
                    windows=[128 * w for w in stage["window_sizes"]],  # they are in blocks
                )
            )
        val_tokens = constant(settings["val_tokens"])
        return Recipe(found, steps, val_tokens, constant(settings["val_loss_every"]), kernel)
    except (SyntaxError, KeyError, ValueError, TypeError, ZeroDivisionError):
        fail(
            f"--modded {where}: its steps, stages or kernel are not written as expected: "
            f"take commit {COMMIT}"
        )


def usable_gpus(asked=0):
    """(number, name) of the GPUs to run on. Raises InputError unless they are Hopper's."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = []
    for i in range(count):
        found.append((torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)))
    others = [gpu for gpu in found if gpu[1][0] != 9]
    if others or not found:
        there = ", ".join(sorted({f"{name} ({a}.{b})" for name, (a, b) in found}))
        fail(
            "--modded needs Hopper GPUs, H100 or H200 (compute capability 9.0): "
            f"found {there or 'no CUDA GPU'}"
        )
    if asked and (asked > count or 8 % asked):
        fail(f"--gpus {asked}: modded-nanogpt runs on 1, 2, 4 or 8 GPUs, and here are {count}")
    return asked or max(n for n in (1, 2, 4, 8) if n <= count), found[0][0]


class Checkout(Peer):
    name = "modded"
    about = "checkout of github.com/KellerJordan/modded-nanogpt; on Hopper GPUs, takes no --text"
    needs = ("train_gpt.py", "triton_kernels.py")
    left_behind = ("records", "img", "logs", "fineweb10B")  # gigabytes that it does not need
    own_data = "--modded runs by itself, on GPUs and FineWeb"

    def __init__(self, checkout, python):
        super().__init__(checkout, python)
        source = (self.checkout / "train_gpt.py").read_text(encoding="utf-8")
        self.recipe = read_recipe(source, checkout)
        kernels = (self.checkout / "triton_kernels.py").read_text(encoding="utf-8")
        headers = re.search(r'cuda_include_dirs=\["([^"]+)"', kernels)
        if headers and not Path(headers[1]).is_dir():
            fail(
                f"--modded {checkout}: its kernels are compiled with CUDA's headers in "
                f"{headers[1]}, which is not there: install the CUDA toolkit"
            )

    def environment(self, **more):
        return environment(gpus=True, **more)

    def command(self):
        return (*LAUNCH, f"--nproc_per_node={self.gpus}", "train_gpt.py")

    def available(self):
        with tempfile.TemporaryDirectory(prefix="peers-") as folder:
            self.copy(folder)
            return self.ask("ready", json.dumps(self.recipe.kernel))

    def train(self, data, folder):
        """One run as it is, on the shards in data/data/fineweb10B."""
        self.copy(folder)
        self.env["DATA_PATH"] = str(data)
        process = self.run("training", *self.command())
        logs = sorted((self.copied / "logs").glob("*.txt"))
        run, _ = read_times(logs[-1] if logs else self.folder / "log.txt")
        whole = run.dialect == "modded-nanogpt" and run.val and run.time_s is not None
        if not whole or run.val[-1].step != self.recipe.steps:
            fail(
                f"modded: its log does not end with a validation at step {self.recipe.steps}, "
                "which its source says is the last"
            )
        tokens = []
        labels = []
        for label, stage in enumerate(self.recipe.stages):
            steps = stage["end"] - stage["start"]
            tokens += [stage["tokens"]] * steps
            labels += [label] * steps
        return row_of(run, tokens, labels, process)

    def compare(self, rounds, options, save):
        """dict(modded=True, recipe, rounds=[...], summary); save is given the same as it grows."""
        import torch

        from benchmarks import subject

        given = options
        options = ["--track", "gpt2-small", *options]
        c = subject.parse(options)
        self.gpus, device = usable_gpus(c.gpus)
        options += ["--gpus", self.gpus]
        recipe = self.recipe
        ours = (c.data, c.val_tokens, c.target_metric)
        if ours != ("fineweb10B", recipe.val_tokens, "val_loss"):
            fail(
                "--modded: expected our trainer on fineweb10B with --val-tokens "
                f"{recipe.val_tokens} and --target-metric val_loss, as modded-nanogpt; found "
                f"{c.data}, {c.val_tokens} and {c.target_metric}"
            )
        there = self.available()
        if there["missing"]:
            fail(f"--modded: {self.python} lacks {'; '.join(there['missing'])}")
        result = dict(
            modded=True,
            commit=self.commit(),
            command=" ".join(["python", *self.command()]),
            gpus=self.gpus,
            device=device,
            torch=dict(ours=torch.__version__, modded=there["torch"]),
            options=given,
            recipe=recipe._asdict() | dict(tokens=recipe.tokens),
            rounds=[],
            summary=None,
            stopped=None,
        )
        with tempfile.TemporaryDirectory(prefix="peers-") as folder:
            link_shards(c, recipe, folder)
            for n in range(rounds):
                say(
                    f"--- modded-nanogpt, {recipe.steps} steps on {self.gpus} x {device}, "
                    f"round {n + 1} of {rounds}"
                )
                try:
                    result["rounds"].append(one_round(self, folder, options))
                except InputError as e:
                    if not result["rounds"]:
                        raise
                    say(f"stopped: {e}")
                    result["stopped"] = str(e)
                    break
                result["summary"] = summarise(result["rounds"])
                save(result)
        return result


def link_shards(c, recipe, folder):
    """Make `folder` one for DATA_PATH, with links to our shards. Raises InputError for too few."""
    from data import DataConfig, open_dataset, read_shard

    config = DataConfig(data=c.data, train_shards=c.train_shards)
    dataset = open_dataset(config, Path(c.cache_dir) / "data")
    tokens = sum(len(read_shard(path)) for path in dataset.train)
    if len(dataset.train) < 2 or tokens < WASTE * recipe.tokens:
        fail(
            f"--train-shards {len(dataset.train)}: {tokens:,} tokens; modded-nanogpt needs 2 "
            f"shards or more, and about {WASTE * recipe.tokens:,.0f} tokens for its "
            f"{recipe.tokens:,}"
        )
    there = Path(folder) / "data/fineweb10B"
    there.mkdir(parents=True)
    for kind, paths in (("train", dataset.train), ("val", dataset.val)):
        for i, path in enumerate(paths):
            (there / f"fineweb_{kind}_{i:06d}.bin").symlink_to(Path(path).resolve())


# --- both


def row_of(run, tokens, labels, process):
    """What a run did. tokens: of each step; labels: the stage of each step."""
    seen = [0, *itertools.accumulate(tokens)]
    return dict(
        loss=run.final_loss,
        steps=run.steps,
        tokens=seen[run.steps],
        train_time_s=run.time_s,
        process_s=process,
        val=[(seen[p.step], p.seconds, p.loss) for p in run.val],
        stages=stage_times(run.val, tokens, labels),
    )


def stage_times(val, tokens, labels):
    """[dict(tokens a step, us_per_token, ms_per_step)] by stage, in order.

    From the clock between validations that lie in one stage; None where there are none.
    """
    points = [(p.step, p.seconds) for p in val]
    if not points or points[0][0] > 0:
        points.insert(0, (0, 0.0))
    found = {label: [0.0, 0, 0] for label in labels}  # seconds, tokens, steps
    for (a, began), (b, ended) in zip(points, points[1:]):
        inside = a < b and len(set(labels[a:b])) == 1
        if inside and began is not None and ended is not None:
            sums = found[labels[a]]
            sums[0] += ended - began
            sums[1] += sum(tokens[a:b])
            sums[2] += b - a
    rows = []
    for label, (seconds, n, steps) in found.items():
        rows.append(
            dict(
                tokens=tokens[labels.index(label)],
                us_per_token=1e6 * seconds / n if n else None,
                ms_per_step=1e3 * seconds / steps if steps else None,
            )
        )
    return rows


def of_length(c, steps):
    """(options, configuration) of the same schedule over another number of steps."""
    from benchmarks import subject

    extension = round(c.extension * steps / c.steps)
    options = ["--steps", steps, "--extension", extension]
    return options, subject.change(c, steps=steps, extension=extension)


def steps_for(c, tokens):
    """The number of steps with which our schedule comes closest to so many tokens."""
    from benchmarks import subject

    def off(steps):
        return abs(sum(subject.step_tokens(of_length(c, steps)[1])) - tokens)

    guess = max(1, round(tokens / (sum(subject.step_tokens(c)) / c.steps)))
    return min(range(max(1, guess - 3), guess + 4), key=off)


def ours(what, options, folder):
    """Our trainer in a process of its own: (its Run, row_of() that)."""
    from benchmarks import subject

    run_dir, process = our_trainer(what, options, folder, gpus=True)
    run, _ = read_times(run_dir)
    c = subject.parse(options)
    return run, row_of(run, subject.step_tokens(c), subject.schedule(c), process)


def one_round(peer, data, options):
    """modded, then ours with its number of tokens, then ours to its loss."""
    from benchmarks import subject

    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        theirs = peer.train(data, folder)
    row = dict(peer=theirs)
    loss = theirs["loss"]
    say(
        f"modded: loss {loss:.4f} after {theirs['tokens']:,} tokens and "
        f"{theirs['train_time_s']:.2f} s"
    )
    c = subject.parse(options)
    equal = steps_for(c, theirs["tokens"])
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        for side, steps, target in (("equal", equal, 0), ("to_loss", c.steps, f"{loss:.6f}")):
            if side == "to_loss" and equal == c.steps:
                row[side] = row["equal"]
                continue
            say(f"--- ours, {steps:,} steps, to {target or 'its number of tokens'}")
            given = [*options, *of_length(c, steps)[0], "--target", target]
            run, mine = ours(side, given, folder)
            row[side] = mine | dict(time_to_its_loss=run.time_to(loss))
            say(
                f"ours: loss {mine['loss']:.4f} after {mine['tokens']:,} tokens and "
                f"{mine['train_time_s']:.2f} s"
            )
    return row


def over(a, b):
    """a / b; None where one is missing."""
    if a is None or b is None:
        return None
    return a / b


def summarise(rounds):
    """Medians and ratios over the rounds; a ratio is dict(median, least, most), None where a
    round of ours did not get there."""

    def ratio(side, ours, theirs="train_time_s"):
        return spread(over(r["peer"][theirs], r[side][ours]) for r in rounds)

    stages = []
    for i, stage in enumerate(rounds[0]["peer"]["stages"]):
        theirs = [r["peer"]["stages"][i]["us_per_token"] for r in rounds]
        mine = [us_with(stage["tokens"], r["equal"]["stages"]) for r in rounds]
        stages.append(
            dict(
                tokens=stage["tokens"],
                peer=spread(theirs),
                ours=spread(mine),
                ratio=spread(map(over, theirs, mine)),
            )
        )
    reached = sum(r["to_loss"]["time_to_its_loss"] is not None for r in rounds)
    process = ratio("to_loss", "process_s", "process_s")
    return dict(
        stages=stages,
        loss_difference=spread(r["equal"]["loss"] - r["peer"]["loss"] for r in rounds),
        equal_tokens_time=ratio("equal", "train_time_s"),
        to_its_loss=ratio("to_loss", "time_to_its_loss"),
        reached=reached,
        process=process if reached == len(rounds) else None,
    )


def us_with(tokens, stages):
    """Mean us per token of the stages with so many tokens a step; None where none was timed."""
    same = [s["us_per_token"] for s in stages if s["tokens"] == tokens]
    same = [us for us in same if us is not None]
    return statistics.fmean(same) if same else None


def render(result):
    rounds = result["rounds"]
    summary = result["summary"]
    recipe = result["recipe"]
    commit = f"Commit {result['commit'][:12]}: " if result["commit"] else ""
    options = f", `{' '.join(result['options'])}`" if result["options"] else ""
    missed = summary["reached"] < len(rounds)
    reached = f" (reached in {summary['reached']} of {len(rounds)} rounds)" if missed else ""
    sides = dict(peer="modded", equal="ours, its number of tokens", to_loss="ours, to its loss")
    runs = []
    for side, label in sides.items():
        m = {}
        for key in ("steps", "tokens", "loss", "train_time_s", "process_s"):
            m[key] = statistics.median(r[side][key] for r in rounds)
        loss = f"{m['loss']:.4f}"
        if side == "to_loss" and missed:
            loss += " (not reached)"
        times = [f"{m['train_time_s']:,.2f}", f"{m['process_s']:,.1f}"]
        runs.append([label, f"{m['steps']:,.0f}", f"{m['tokens']:,.0f}", loss, *times])
    stages = []
    for i, (stage, s) in enumerate(zip(recipe["stages"], summary["stages"]), start=1):
        us = [
            bracketed(s["peer"], ".3f"),
            bracketed(s["ours"], ".3f"),
            bracketed(s["ratio"], ".2f"),
        ]
        stages.append([i, f"{stage['start']:,}–{stage['end']:,}", f"{stage['tokens']:,}", *us])
    return document(
        f"# modded-nanogpt and this trainer on {result['gpus']} x {result['device']}",
        f"{commit}`{result['command']}`, torch {result['torch']['modded']}; ours with torch "
        f"{result['torch']['ours']}{options}. Rounds: {len(rounds)}; medians, in brackets the "
        "least and the most.",
        table(["", "steps", "tokens", "val_loss", "training s", "process s"], runs),
        f"At its {recipe['tokens']:,} tokens our loss is "
        f"{bracketed(summary['loss_difference'], '+.4f')} from its own, and it takes "
        f"{bracketed(summary['equal_tokens_time'], '.2f')} times our time. To its own final loss "
        f"it takes {bracketed(summary['to_its_loss'], '.2f')} times our training time{reached}, "
        f"{bracketed(summary['process'], '.2f')} times our process.",
        table(["stage", "steps", "tokens a step", "modded us/token", "ours", "ratio"], stages),
        "Ours are the stages with as many tokens a step of the run with its number of tokens.",
        f"Stopped: {result['stopped']}" if result["stopped"] else "",
    )


if __name__ == "__main__":
    answer(dict(importable=importable, ready=ready))
