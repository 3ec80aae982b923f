"""modded-nanogpt: same GPUs, same shards, in turns.

It runs as it is, with torchrun; what it offers to be set from outside is DATA_PATH, and that gets
a folder with exactly the shards of our track gpt2-small. It needs Hopper GPUs, 1, 2, 4 or 8 of
them with 52 GB each; CUDA's headers; and in --python torch, triton, numpy, tiktoken and kernels,
of which the last two fetch GPT-2's vocabulary and FlashAttention 3 over the network when they are
first used. Read with commit f411b3d3; steps, batches and validation are taken from its source, and
one that is written otherwise is refused.

A round is two or three trainings, each with its own compilation, which no clock counts: on one
H100 count on 10 minutes for each and as much for its compilation.
    modded         as it is
    equal tokens   ours with as many steps as make its number of tokens, the schedule stretched
    to its loss    ours as the track says, until the validation loss is its final one; where that
                   has as many steps, it is the same run
Both validate on the first 10,485,760 tokens of the same shard. Ratios are modded's number over ours
of the same round: above 1, ours is faster.
"""

import ast
import itertools
import operator
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


def ready(*modules):
    """importable() without our folder, which has a package named kernels as well."""
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    return importable(*modules)


# --- what its source says


class Recipe(NamedTuple):
    stages: list  # of dict(start, end, tokens a step), to before step end
    steps: int
    val_tokens: int

    def step_tokens(self):
        """Tokens of every step."""
        found = []
        for stage in self.stages:
            found += [stage["tokens"]] * (stage["end"] - stage["start"])
        return found


OPERATORS = {
    ast.Add: operator.add,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def constant(node):
    """Value of numbers, strings and arithmetic; ValueError for anything else."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](constant(node.left), constant(node.right))
    return ast.literal_eval(node)


def read_recipe(source, where):
    """The Recipe in the text of its train_gpt.py. Raises InputError where it is not written as
    in COMMIT."""
    settings = {}
    stages = []
    try:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef) and node.name == "Hyperparameters":
                fields = [a for a in node.body if isinstance(a, ast.AnnAssign)]
                settings = {a.target.id: a.value for a in fields}
            elif getattr(getattr(node, "func", None), "id", None) == "TrainingStage":
                stages.append({k.arg: k.value for k in node.keywords})
        scheduled = constant(settings["num_scheduled_iterations"])
        steps = scheduled + constant(settings["num_extension_iterations"])

        # the last stage is the extension, and has no duration
        shares = [constant(stage["duration"]) for stage in stages[:-1]]
        ends = [round(share * scheduled) for share in itertools.accumulate(shares)]
        if ends[-1] != scheduled:
            raise ValueError
        found = []
        for start, end, stage in zip([0, *ends], [*ends, steps], stages):
            found.append(dict(start=start, end=end, tokens=constant(stage["batch_size"])))
        return Recipe(found, steps, constant(settings["val_tokens"]))
    except (SyntaxError, LookupError, ValueError, TypeError, ZeroDivisionError):
        fail(
            f"--modded {where}: its steps or stages are not written as expected: "
            f"take commit {COMMIT}"
        )


def usable_gpus(asked=0):
    """(number, name) of the GPUs to run on. Raises InputError unless they are Hopper's."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = {torch.cuda.get_device_name(i) for i in range(count)}
    others = [i for i in range(count) if torch.cuda.get_device_capability(i)[0] != 9]
    if others or not count:
        fail(
            "--modded needs Hopper GPUs, H100 or H200 (compute capability 9.0): "
            f"found {', '.join(sorted(names)) or 'no CUDA GPU'}"
        )
    if asked and (asked > count or 8 % asked):
        fail(f"--gpus {asked}: modded-nanogpt runs on 1, 2, 4 or 8 GPUs, and here are {count}")
    return asked or max(n for n in (1, 2, 4, 8) if n <= count), min(names)


class Checkout(Peer):
    name = "modded"
    about = "checkout of github.com/KellerJordan/modded-nanogpt; on Hopper GPUs, takes no --text"
    needs = ("train_gpt.py", "triton_kernels.py")
    modules = ("torch", "triton", "numpy", "tiktoken", "kernels")
    left_behind = ("records", "img", "logs", "fineweb10B")  # gigabytes that it does not need
    own_data = "--modded runs by itself, on GPUs and FineWeb"

    def __init__(self, checkout, python):
        super().__init__(checkout, python)
        source = (self.checkout / "train_gpt.py").read_text(encoding="utf-8")
        self.recipe = read_recipe(source, checkout)

    def environment(self, **more):
        return environment(gpus=True, **more)

    def command(self):
        return (*LAUNCH, f"--nproc_per_node={self.gpus}", "train_gpt.py")

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
        return row_of(run, self.recipe.step_tokens(), process)

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
            recipe=recipe._asdict() | dict(tokens=sum(recipe.step_tokens())),
            rounds=[],
            summary=None,
            stopped=None,
        )
        with tempfile.TemporaryDirectory(prefix="peers-") as folder:
            link_shards(c, sum(recipe.step_tokens()), folder)
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


def link_shards(c, needed, folder):
    """Make `folder` one for DATA_PATH, with links to our shards. Raises InputError for too few
    tokens in them."""
    from data import DataConfig, open_dataset, read_shard

    config = DataConfig(data=c.data, train_shards=c.train_shards)
    dataset = open_dataset(config, Path(c.cache_dir) / "data")
    tokens = sum(len(read_shard(path)) for path in dataset.train)
    if len(dataset.train) < 2 or tokens < WASTE * needed:
        fail(
            f"--train-shards {len(dataset.train)}: {tokens:,} tokens; modded-nanogpt needs 2 "
            f"shards or more, and about {WASTE * needed:,.0f} tokens for its {needed:,}"
        )
    there = Path(folder) / "data/fineweb10B"
    there.mkdir(parents=True)
    for kind, paths in (("train", dataset.train), ("val", dataset.val)):
        for i, path in enumerate(paths):
            (there / f"fineweb_{kind}_{i:06d}.bin").symlink_to(Path(path).resolve())


# --- both


def row_of(run, tokens, process):
    """What a run did. tokens: of each step."""
    seen = [0, *itertools.accumulate(tokens)]
    return dict(
        loss=run.final_loss,
        steps=run.steps,
        tokens=seen[run.steps],
        train_time_s=run.time_s,
        process_s=process,
        val=[(seen[p.step], p.seconds, p.loss) for p in run.val],
    )


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


def one_round(peer, data, options):
    """modded, then ours with its number of tokens, then ours to its loss."""
    from benchmarks import subject

    def show(who, row):
        say(
            f"{who}: loss {row['loss']:.4f} after {row['tokens']:,} tokens and "
            f"{row['train_time_s']:.2f} s"
        )

    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        theirs = peer.train(data, folder)
    show("modded", theirs)
    row = dict(peer=theirs)
    c = subject.parse(options)
    equal = steps_for(c, theirs["tokens"])
    sides = [("equal", equal, 0)]
    if equal != c.steps:
        sides.append(("to_loss", c.steps, f"{theirs['loss']:.6f}"))
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        for side, steps, target in sides:
            say(f"--- ours, {steps:,} steps, to {target or 'its number of tokens'}")
            length, stretched = of_length(c, steps)
            given = [*options, *length, "--target", target]
            run_dir, process = our_trainer(side, given, folder, gpus=True)
            run, _ = read_times(run_dir)
            mine = row_of(run, subject.step_tokens(stretched), process)
            row[side] = mine | dict(time_to_its_loss=run.time_to(theirs["loss"]))
            show("ours", mine)
    row.setdefault("to_loss", row["equal"])
    return row


def summarise(rounds):
    """Medians and ratios over the rounds; a ratio is dict(median, least, most), None where a
    round of ours did not get there."""

    def ratio(side, ours, theirs="train_time_s"):
        if any(r[side][ours] is None for r in rounds):
            return None
        return spread(r["peer"][theirs] / r[side][ours] for r in rounds)

    reached = sum(r["to_loss"]["time_to_its_loss"] is not None for r in rounds)
    process = ratio("to_loss", "process_s", "process_s")
    return dict(
        loss_difference=spread(r["equal"]["loss"] - r["peer"]["loss"] for r in rounds),
        equal_tokens_time=ratio("equal", "train_time_s"),
        to_its_loss=ratio("to_loss", "time_to_its_loss"),
        reached=reached,
        process=process if reached == len(rounds) else None,
    )


def render(result):
    rounds = result["rounds"]
    summary = result["summary"]
    commit = f"Commit {result['commit'][:12]}: " if result["commit"] else ""
    options = f", `{' '.join(result['options'])}`" if result["options"] else ""
    missed = summary["reached"] < len(rounds)
    reached = f" (reached in {summary['reached']} of {len(rounds)} rounds)" if missed else ""
    sides = dict(peer="modded", equal="ours, its number of tokens", to_loss="ours, to its loss")
    forms = dict(steps=",.0f", tokens=",.0f", loss=".4f", train_time_s=",.2f", process_s=",.1f")
    runs = []
    for side, label in sides.items():
        cells = [label]
        for key, form in forms.items():
            cells.append(format(statistics.median(r[side][key] for r in rounds), form))
        runs.append(cells)
    return document(
        f"# modded-nanogpt and this trainer on {result['gpus']} x {result['device']}",
        f"{commit}`{result['command']}`, torch {result['torch']['modded']}; ours with torch "
        f"{result['torch']['ours']}{options}. Rounds: {len(rounds)}; medians, in brackets the "
        "least and the most.",
        table(["", "steps", "tokens", "val_loss", "training s", "process s"], runs),
        f"At its {result['recipe']['tokens']:,} tokens our loss is "
        f"{bracketed(summary['loss_difference'], '+.4f')} from its own, and it takes "
        f"{bracketed(summary['equal_tokens_time'], '.2f')} times our time. To its own final loss "
        f"it takes {bracketed(summary['to_its_loss'], '.2f')} times our training time{reached}, "
        f"{bracketed(summary['process'], '.2f')} times our process.",
        f"Stopped: {result['stopped']}" if result["stopped"] else "",
    )


if __name__ == "__main__":
    answer(dict(importable=ready))
