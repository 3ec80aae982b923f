"""modded-nanogpt, run from its own checkout, beside this trainer: same GPUs, same shards, in turns.

    python -m benchmarks peers --modded ../modded-nanogpt --rounds 3 --json modded.json

It runs as it is, with torchrun, in a copy of the checkout in a temporary folder; what it offers to
be set from outside is DATA_PATH, and that gets a folder with exactly the shards of our track
gpt2-small. It needs Hopper GPUs, 1, 2, 4 or 8 of them with 52 GB each; CUDA's headers; and in
--python torch, triton, numpy, tiktoken and kernels, of which the last two fetch GPT-2's vocabulary
and FlashAttention 3 over the network when they are first used. Read with commit f411b3d3; steps,
stages and validation are taken from its source, and one that is written otherwise is refused.

A round is two or three trainings, each with its own compilation, which no clock counts: on one H100
count on 10 minutes for each and as much for its compilation.
    modded         as it is
    equal tokens   ours with as many steps as make its number of tokens, the schedule stretched over
    them
    to its loss    ours as the track says, until the validation loss is its final one; where that
                   has as many steps, it
                   is the same run
Options that are not the benchmark's own are our trainer's. Both validate on the first 10,485,760
tokens of the same
shard. A stage's time is taken between validations that lie in it, since only those wait for the
GPU; the short
extension at modded's end has none. Ratios are modded's number over ours of the same round: above 1,
ours is faster.
"""

import ast
import dataclasses
import itertools
import json
import operator
import os
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks import peers
from benchmarks.peers import Peer, execute, fail, say

COMMIT = "f411b3d3"  # whose source this was written for
LAUNCH = ("-m", "torch.distributed.run", "--standalone")
# tokens of the shards per token trained on: documents are cut at each stage's length, the rest is
# dropped
WASTE = 1.2


# --- in a process of its interpreter


def ready(kernel):
    """What is missing of what its import needs; kernel: the arguments of its get_kernel() as
    JSON."""
    sys.path[:] = [
        p for p in sys.path if Path(p or ".").resolve() != peers.ROOT
    ]  # which has a package named kernels
    found = peers.peer_modules("torch", "triton", "numpy", "tiktoken", "kernels")
    if not found["missing"]:

        def attempt(what, fetch):
            try:
                fetch()
            except Exception as e:  # of the network, the hub, the machine: as many kinds as causes
                found["missing"].append(
                    f"{what} ({type(e).__name__}: {' '.join(str(e).split())[:160]}), which is "
                    "downloaded when it is first used: the network is needed once"
                )

        import tiktoken

        from kernels import get_kernel

        args, options = json.loads(kernel)
        attempt("GPT-2's vocabulary", lambda: tiktoken.get_encoding("gpt2"))
        attempt(
            f"FlashAttention 3, {args[0]} on the Hugging Face hub",
            lambda: get_kernel(*args, **options),
        )
    return found


# --- what its source says


class Recipe(NamedTuple):
    # dict(start, end, tokens per step, max_doc_len, windows), steps from start to before end
    stages: list
    steps: int
    val_tokens: int
    eval_every: int
    kernel: tuple  # arguments of get_kernel()

    @property
    def tokens(self):
        return sum((s["end"] - s["start"]) * s["tokens"] for s in self.stages)


OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
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


def read_recipe(source, where):
    """The Recipe in the text of its train_gpt.py. Raises InputError where it is not written as
    in COMMIT."""
    settings, stages, kernel = {}, [], None
    try:
        for node in ast.walk(ast.parse(source)):
            name = getattr(getattr(node, "func", None), "id", None)
            if isinstance(node, ast.ClassDef) and node.name == "Hyperparameters":
                settings = {a.target.id: a.value for a in node.body if isinstance(a, ast.AnnAssign)}
            elif name == "TrainingStage":
                stages.append({k.arg: k.value for k in node.keywords})
            elif name == "get_kernel":
                kernel = (
                    tuple(map(constant, node.args)),
                    {k.arg: constant(k.value) for k in node.keywords},
                )
        scheduled, extension, val_tokens, every = (
            constant(settings[key])
            for key in (
                "num_scheduled_iterations",
                "num_extension_iterations",
                "val_tokens",
                "val_loss_every",
            )
        )
        ends = [
            round(s * scheduled)
            for s in itertools.accumulate(constant(s["duration"]) for s in stages[:-1])
        ]
        if not kernel or ends[-1:] != [scheduled]:
            raise ValueError
        ends = [0, *ends, scheduled + extension]
        stages = [
            dict(
                start=a,
                end=b,
                tokens=constant(s["batch_size"]),
                max_doc_len=constant(s["train_max_seq_len"]),
                windows=[128 * w for w in constant(s["window_sizes"])],
            )  # they are in blocks
            for a, b, s in zip(ends, ends[1:], stages)
        ]
        return Recipe(stages, scheduled + extension, val_tokens, every, kernel)
    except (SyntaxError, KeyError, ValueError, TypeError, ZeroDivisionError):
        fail(
            f"--modded {where}: its steps, stages or kernel are not written as expected: take commit {COMMIT}"
        )


def substitute(source, values):
    """Its source with other values of whole-number settings, each of which must be there exactly
    once."""
    for name, value in values.items():
        source, n = re.subn(rf"(?m)^(    {name}: int = )\d+\b", rf"\g<1>{value}", source)
        if n != 1:
            fail(
                f"--scale: {name} is set {n} times in modded-nanogpt's train_gpt.py, expected once: take commit "
                f"{COMMIT}, or leave --scale out"
            )
    return source


def usable_gpus(asked=0):
    """(number, name) of the GPUs to run on. Raises InputError unless they are Hopper's."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [
        (torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in range(count)
    ]
    if not found or any(major != 9 for _, (major, _) in found):
        there = ", ".join(sorted({f"{name} ({a}.{b})" for name, (a, b) in found})) or "no CUDA GPU"
        fail(f"--modded needs Hopper GPUs, H100 or H200 (compute capability 9.0): found {there}")
    if asked and (asked > count or 8 % asked):
        fail(f"--gpus {asked}: modded-nanogpt runs on 1, 2, 4 or 8 GPUs, and here are {count}")
    return asked or max(n for n in (1, 2, 4, 8) if n <= count), found[0][0]


class Modded(Peer):
    name, module = "modded", "benchmarks.modded"
    needs = ("train_gpt.py", "triton_kernels.py")
    left_behind = ("records", "img", "logs", "fineweb10B")  # gigabytes that it does not need

    def __init__(self, checkout, python, scale, gpus):
        super().__init__(checkout, python, scale)
        self.gpus = gpus
        source = (self.checkout / "train_gpt.py").read_text(encoding="utf-8")
        recipe = read_recipe(source, checkout)
        self.patched = None
        if scale > 1:
            scheduled = recipe.stages[-1]["start"]
            self.patched = substitute(
                source,
                dict(
                    num_scheduled_iterations=max(9, scheduled // scale),
                    val_loss_every=max(1, recipe.eval_every // scale),
                    num_extension_iterations=max(1, (recipe.steps - scheduled) // scale),
                ),
            )
            recipe = read_recipe(self.patched, checkout)
        self.recipe, self.steps = recipe, recipe.steps
        headers = re.search(
            r'cuda_include_dirs=\["([^"]+)"',
            (self.checkout / "triton_kernels.py").read_text("utf-8"),
        )
        if headers and not Path(headers[1]).is_dir():
            fail(
                f"--modded {checkout}: its kernels are compiled with CUDA's headers in {headers[1]}, which is not "
                "there: install the CUDA toolkit"
            )

    def copy(self, folder):
        super().copy(folder)
        self.env = gpu_environment(TORCHINDUCTOR_CACHE_DIR=str(self.folder / "inductor"))
        if self.patched:
            (self.copied / "train_gpt.py").write_text(self.patched, encoding="utf-8")

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
        run = peers.read_times(logs[-1] if logs else self.folder / "log.txt")[0]
        if (
            run.dialect != "modded-nanogpt"
            or not run.val
            or run.val[-1].step != self.steps
            or run.time_s is None
        ):
            fail(
                f"modded: its log does not end with a validation at step {self.steps}, which its source says is the "
                "last"
            )
        at = [s["tokens"] for s in self.recipe.stages for _ in range(s["start"], s["end"])]
        labels = [i for i, s in enumerate(self.recipe.stages) for _ in range(s["start"], s["end"])]
        return row_of(run, at, labels, process)


# --- both


def gpu_environment(**more):
    env = peers.environment(**more)
    env.pop("CUDA_VISIBLE_DEVICES")
    return env | {k: v for k, v in os.environ.items() if k == "CUDA_VISIBLE_DEVICES"}


def row_of(run, tokens, labels, process):
    """What a run did. tokens: of each step; labels: the stage of each step."""
    seen = [0, *itertools.accumulate(tokens)]
    curve = [(seen[p.step], p.seconds, p.loss) for p in run.val]
    return dict(
        loss=run.final_loss,
        steps=run.steps,
        tokens=seen[run.steps],
        train_time_s=run.time_s,
        process_s=process,
        val=curve,
        stages=stage_times(run.val, tokens, labels),
    )


def stage_times(val, tokens, labels):
    """[dict(tokens a step, us_per_token, ms_per_step)] by stage, in order, from the clock
    between validations that lie in one stage; None where there are none."""
    points = [(0, 0.0)] * (not val or val[0].step > 0) + [(p.step, p.seconds) for p in val]
    found = {label: [0.0, 0, 0] for label in labels}
    for (a, began), (b, ended) in zip(points, points[1:]):
        if a < b and None not in (began, ended) and len(set(labels[a:b])) == 1:
            for i, x in enumerate((ended - began, sum(tokens[a:b]), b - a)):
                found[labels[a]][i] += x
    return [
        dict(
            tokens=tokens[labels.index(label)],
            us_per_token=1e6 * s / n if n else None,
            ms_per_step=1e3 * s / steps if steps else None,
        )
        for label, (s, n, steps) in found.items()
    ]


def loss_at(curve, tokens):
    """Loss of a run at a number of tokens, by a line between its validations; None outside them."""
    for (a, _, before), (b, _, after) in zip(curve, curve[1:]):
        if a <= tokens <= b:
            return before + (after - before) * (tokens - a) / (b - a)
    return next((loss for n, _, loss in curve if n == tokens), None)


def step_tokens(c):
    """(tokens, stage) of each step of one of our runs."""
    import train_gpt as tg

    stages = [tg.stage_at(c, tg.progress_at(c, step)) for step in range(c.steps)]
    return [s.rows * c.row_len for s in stages], stages


def of_length(c, steps):
    """The same schedule over another number of steps, as options and as a Config."""
    extension = round(c.extension * steps / c.steps)
    return ["--steps", steps, "--extension", extension], dataclasses.replace(
        c, steps=steps, extension=extension
    )


def steps_for(c, tokens):
    """The number of steps with which our schedule comes closest to so many tokens."""
    guess = max(1, round(tokens / (sum(step_tokens(c)[0]) / c.steps)))
    return min(
        range(max(1, guess - 3), guess + 4),
        key=lambda n: abs(sum(step_tokens(of_length(c, n)[1])[0]) - tokens),
    )


def our_config(options):
    import train_gpt as tg

    return tg.parse_args([str(o) for o in options])


def ours(what, options, folder):
    """Our trainer in a process of its own: (its Run, row_of() that)."""
    from records.read import read_runs

    run_dir = Path(folder) / "run"
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [sys.executable, peers.TRAINER, *options, "--run-dir", run_dir, "--repeat", 1]
    process = execute(
        f"our trainer, {what}",
        command,
        folder,
        Path(folder) / "log.txt",
        gpu_environment(),
        ok=(0, 3),
    )
    run = read_runs(run_dir)[-1]
    return run, row_of(run, *step_tokens(our_config(options)), process)


def one_round(peer, data, options, scale):
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        row = dict(peer=peer.train(data, folder))
    loss = row["peer"]["loss"]
    say(
        f"modded: loss {loss:.4f} after {row['peer']['tokens']:,} tokens and {row['peer']['train_time_s']:.2f} s"
    )
    c = our_config(options)
    equal, own = steps_for(c, row["peer"]["tokens"]), max(1, c.steps // scale)
    every = ["--eval-every", max(1, c.eval_every // scale)]
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        for side, steps, target in (("equal", equal, 0), ("to_loss", own, f"{loss:.6f}")):
            if side == "to_loss" and equal == own:
                row[side] = row["equal"]
                continue
            say(f"--- ours, {'its number of tokens' if side == 'equal' else f'to {loss:.4f}'}")
            run, row[side] = ours(
                side, [*options, *of_length(c, steps)[0], *every, "--target", target], folder
            )
            row[side]["time_to_its_loss"] = run.time_to(loss)
            say(
                f"ours: loss {row[side]['loss']:.4f} after {row[side]['tokens']:,} tokens and "
                f"{row[side]['train_time_s']:.2f} s"
            )
    return row


def summarise(rounds):
    """Medians and ratios over the rounds; a ratio is dict(median, least, most), None where a
    round of ours did not get there."""

    def spread(values):
        return (
            None
            if None in values or not values
            else dict(median=statistics.median(values), least=min(values), most=max(values))
        )

    def over(a, b):
        return None if a is None or b is None else a / b

    stages = []
    for i, stage in enumerate(rounds[0]["peer"]["stages"]):
        pairs = []
        for r in rounds:
            same = [
                s["us_per_token"]
                for s in r["equal"]["stages"]
                if s["tokens"] == stage["tokens"] and s["us_per_token"] is not None
            ]
            pairs.append(
                (r["peer"]["stages"][i]["us_per_token"], statistics.fmean(same) if same else None)
            )
        stages.append(
            dict(
                tokens=stage["tokens"],
                peer=spread([a for a, _ in pairs]),
                ours=spread([b for _, b in pairs]),
                ratio=spread([over(a, b) for a, b in pairs]),
            )
        )
    return dict(
        stages=stages,
        loss_difference=spread([r["equal"]["loss"] - r["peer"]["loss"] for r in rounds]),
        equal_tokens_time=spread(
            [over(r["peer"]["train_time_s"], r["equal"]["train_time_s"]) for r in rounds]
        ),
        to_its_loss=spread(
            [over(r["peer"]["train_time_s"], r["to_loss"]["time_to_its_loss"]) for r in rounds]
        ),
        reached=sum(r["to_loss"]["time_to_its_loss"] is not None for r in rounds),
        process=spread([over(r["peer"]["process_s"], r["to_loss"]["process_s"]) for r in rounds])
        if all(r["to_loss"]["time_to_its_loss"] is not None for r in rounds)
        else None,
    )


def shards_folder(dataset, folder):
    """A folder for DATA_PATH, with links to these shards."""
    there = Path(folder) / "data/fineweb10B"
    there.mkdir(parents=True)
    for kind, paths in (("train", dataset.train), ("val", dataset.val)):
        for i, path in enumerate(paths):
            (there / f"fineweb_{kind}_{i:06d}.bin").symlink_to(Path(path).resolve())
    return folder


def run(
    checkout, python=sys.executable, rounds=1, scale=1, trainer_options=(), save=lambda result: None
):
    """dict(peer="modded", recipe, rounds=[...], summary); save is given the same as it grows."""
    options = ["--track", "gpt2-small", *trainer_options]
    c = our_config(options)
    gpus, device = usable_gpus(c.gpus)
    options += ["--gpus", gpus]
    peer = Modded(checkout, python, scale, gpus)
    recipe = peer.recipe
    if c.data != "fineweb10B" or c.val_tokens != recipe.val_tokens or c.target_metric != "val_loss":
        fail(
            f"--modded: expected our trainer on fineweb10B with --val-tokens {recipe.val_tokens} and --target-metric "
            f"val_loss, as modded-nanogpt; found {c.data}, {c.val_tokens} and {c.target_metric}"
        )
    there = peer.available()
    if there["missing"]:
        fail(f"--modded: {python} lacks {'; '.join(there['missing'])}")
    from base import InputError
    from data import DataConfig, open_dataset, read_shard

    config = DataConfig(data=c.data, train_shards=c.train_shards)
    dataset = open_dataset(config, Path(c.cache_dir) / "data")
    tokens = sum(len(read_shard(p)) for p in dataset.train)
    if len(dataset.train) < 2 or tokens < WASTE * recipe.tokens:
        fail(
            f"--train-shards {len(dataset.train)}: {tokens:,} tokens; modded-nanogpt needs 2 shards or more, and "
            f"about {WASTE * recipe.tokens:,.0f} tokens for its {recipe.tokens:,}"
        )
    import torch

    result = dict(
        modded=True,
        commit=peer.commit(),
        command=" ".join(["python", *peer.command()]),
        gpus=gpus,
        scale=scale,
        device=device,
        torch=dict(ours=torch.__version__, modded=there["torch"]),
        options=list(map(str, trainer_options)),
        recipe=recipe._asdict() | dict(tokens=recipe.tokens),
        rounds=[],
        summary=None,
        stopped=None,
    )
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        data = shards_folder(dataset, folder)
        for n in range(rounds):
            say(
                f"--- modded-nanogpt, {recipe.steps} steps on {gpus} x {result['device']}, round {n + 1} of {rounds}"
            )
            try:
                result["rounds"].append(one_round(peer, data, options, scale))
            except InputError as e:
                if not result["rounds"]:
                    raise
                say(f"stopped: {e}")
                result["stopped"] = str(e)
                break
            result["summary"] = summarise(result["rounds"])
            save(result)
    say(f"\n{render(result)}")
    return result


def render(result):
    def ratio(x, form=".2f"):
        return (
            "–"
            if x is None
            else f"{x['median']:{form}}"
            + (f" [{x['least']:{form}}, {x['most']:{form}}]" if x["least"] != x["most"] else "")
        )

    rounds, summary, recipe = result["rounds"], result["summary"], result["recipe"]

    def median(side, key):
        return statistics.median(r[side][key] for r in rounds)

    lines = [
        f"# modded-nanogpt and this trainer on {result['gpus']} x {result['device']}",
        "",
        (f"Commit {result['commit'][:12]}: " if result["commit"] else "")
        + f"`{result['command']}`, torch "
        f"{result['torch']['modded']}; ours with torch {result['torch']['ours']}"
        + (f", `{' '.join(result['options'])}`" if result["options"] else "")
        + f". Rounds: {len(rounds)}; medians, in brackets the least and the most.",
    ]
    if result["scale"] > 1:
        lines += [
            "",
            f"**Tried out with the steps divided by {result['scale']}: not a measurement.**",
        ]
    lines += [
        "",
        "| | steps | tokens | val_loss | training s | process s |",
        "|---|---|---|---|---|---|",
    ]
    for side, label in dict(
        peer="modded", equal="ours, its number of tokens", to_loss="ours, to its loss"
    ).items():
        missed = side == "to_loss" and summary["reached"] < len(rounds)
        lines.append(
            f"| {label} | {median(side, 'steps'):,.0f} | {median(side, 'tokens'):,.0f} | "
            f"{median(side, 'loss'):.4f}{' (not reached)' if missed else ''} | "
            f"{median(side, 'train_time_s'):,.2f} | {median(side, 'process_s'):,.1f} |"
        )
    reached = (
        ""
        if summary["reached"] == len(rounds)
        else f" (reached in {summary['reached']} of {len(rounds)} rounds)"
    )
    lines += [
        "",
        f"At its {recipe['tokens']:,} tokens our loss is {ratio(summary['loss_difference'], '+.4f')} from "
        f"its own, and it takes {ratio(summary['equal_tokens_time'])} times our time. To its own final loss it "
        f"takes {ratio(summary['to_its_loss'])} times our training time{reached}, "
        f"{ratio(summary['process'])} times our process.",
        "",
        "| stage | steps | tokens a step | modded us/token | ours | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for i, (stage, s) in enumerate(zip(recipe["stages"], summary["stages"]), start=1):
        lines.append(
            f"| {i} | {stage['start']:,}–{stage['end']:,} | {stage['tokens']:,} | {ratio(s['peer'], '.3f')} | "
            f"{ratio(s['ours'], '.3f')} | {ratio(s['ratio'])} |"
        )
    lines += [
        "",
        "Ours are the stages with as many tokens a step of the run with its number of tokens. Loss by "
        "tokens, first round:",
        "",
        "| tokens | modded | ours |",
        "|---|---|---|",
    ]
    for tokens, _, loss in rounds[0]["peer"]["val"]:
        mine = loss_at(rounds[0]["equal"]["val"], tokens)
        lines.append(f"| {tokens:,} | {loss:.4f} | {'–' if mine is None else f'{mine:.4f}'} |")
    if result["stopped"]:
        lines += ["", f"Stopped: {result['stopped']}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":  # a process of its interpreter
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
