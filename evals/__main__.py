"""./run.sh eval: how good a run's model is."""

import argparse
import os
import sys

import torch

from base import InputError, to_json, write_text
from base.command import Parser, given_path, refuse
from base.files import sha256_of
from base.places import cache_folder
from base.terminal import on_screen
from inference.quantize import KINDS, quantize
from kernels import choose_ops
from kernels.fused import Fused
from records.read import read_json
from runtime.saved import load_run, newest_run

from . import core, generated, loss, prompts
from .items import measure_task, read_task
from .results import changed_prompts, comparison, table, verdict
from .scoring import Scorer

DESCRIPTION = """\
Measures the model of a finished run, the newest one or the one that is named: bits per byte on the
text it was validated and trained on, tasks that are made from held-out text, and tasks from files.
A table goes to stdout, or one line of JSON; eval.json in the run's folder keeps the numbers.
± is a standard error. docs/evaluation.md says how each number is made."""

EXAMPLES = """\
tasks:
  val, train     the run's own texts; val in the rows of training's validation
  continuation   generated: which of four texts goes on with a held-out one
  order          generated: which of four orders of the same tokens is the true one
  repeat         generated: how does a passage end that stood there before
  arithmetic     generated: sums of numbers below 100
  prompts        grammar, facts and coherence, of a file of prompts with simple checks
  FILE.jsonl     multiple choice or completion in HellaSwag's form or CORE's
  FOLDER         CORE's bundle: 22 tasks and their mean
  core, hellaswag  the same from the network, once

examples:
  ./run.sh eval
  ./run.sh eval --run runs/a --against runs/b
  ./run.sh eval --text novel.txt --overlap 512 --tasks hellaswag_val.jsonl --json
  ./run.sh eval --harness --model_args run=runs/a --tasks lambada_openai    (lm-eval's options)"""

DEFAULT = ["val", "train", "continuation", "order", "repeat", "prompts"]
FETCHED = ("core", "hellaswag")
TRAIN_TOKENS = 131_072  # of the training text, at most
HELD_OUT = 1_000_000  # tokens of the validation split that tasks are made of, at most


def parse(argv):
    parser = Parser(
        prog="./run.sh eval",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
            prog, max_help_position=28, width=100
        ),
    )
    parser.add_argument(
        "--run", type=given_path, metavar="RUN", help="a run's folder [the newest in runs/]"
    )
    parser.add_argument(
        "--against", type=given_path, metavar="RUN", help="another run, to be compared with"
    )
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="the run's template, where it is a module from outside models/",
    )
    parser.add_argument(
        "--quantize", choices=KINDS, help="measure the run's weights in so many bits"
    )
    parser.add_argument(
        "--text",
        type=given_path,
        action="append",
        default=[],
        metavar="FILE",
        help="a text of your own, or a folder of it, to be measured; may be given again",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help=f"what to measure [{' '.join(DEFAULT)}, with --text that alone]",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="prompts with checks: a file, english or python [python for runs on Python's library, "
        "else english]",
    )
    parser.add_argument(
        "--limit",
        type=int,
        default=200,
        metavar="N",
        help="items of a task at most, 0 for all [200]",
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=0,
        metavar="N",
        help="solved items before each, of files [0]",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=0,
        metavar="N",
        help="tokens of each text at most, 0 for all; of the training text "
        f"{TRAIN_TOKENS:,} without it",
    )
    parser.add_argument(
        "--overlap",
        type=int,
        default=0,
        metavar="N",
        help="tokens that each row of a text repeats of the one before, for context [0, as in "
        "training's validation]",
    )
    parser.add_argument("--seed", type=int, default=0, help="of generated tasks [0]")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    parser.add_argument(
        "--harness",
        nargs=argparse.REMAINDER,
        metavar="ARGS",
        help="start lm-eval with the run's model; what follows are its options",
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Parse, measure, print. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        args = parse(argv)
        if args.harness is not None:
            from . import harness  # imports lm-eval, which takes long

            return harness.main(args.harness)
        run(args)
    except InputError as e:
        return refuse(e)
    return 0


def run(args):
    """Measure what the options ask for. Raises InputError."""
    names = check(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    saved = load(args.run or newest_run(), device, args)
    if args.overlap >= row_len(saved):
        raise InputError(f"--overlap {args.overlap}: expected less than a row, {row_len(saved)}")
    plan = make_plan(names, args, saved)
    say(f"{saved.folder}: {', '.join(name for name, _ in plan)}")
    bits = quantize(saved.model, args.quantize) if args.quantize else None
    if bits:
        say(f"{args.quantize}: {bits:.2f} bits a weight over all parameters")

    measures = measure(plan, saved, args)
    said = summary(saved, measures, args, bits)
    if not args.quantize:  # the numbers of the run itself
        keep(saved, said)
    lines = table(measures)
    if args.against:
        other = load(args.against, device, args)
        say(f"{other.folder}: the same")
        others = measure(plan, other, args)
        measures, others = both(measures, others)
        said["against"] = dict(run=str(other.folder), results=compared(measures, others))
        lines = comparison(measures, others, [saved.folder.name, other.folder.name])
        lines += changed_prompts(measures, others)
    if args.json:
        print(to_json(said), flush=True)
        return
    print(*on_screen(["\n".join(lines) + "\n"]), sep="", end="", flush=True)
    for note in dict.fromkeys(f"{m.task}: {m.note}" for m in measures if m.note):
        say(note)


def load(folder, device, args):
    """A Saved whose model computes as in training, on a CPU in C; codes are for PyTorch alone."""
    saved = load_run(folder, device, args.template)
    if device == "cpu" and not args.quantize and hasattr(saved.model, "ops"):
        dtype = next(saved.model.parameters()).dtype
        saved.model.ops = choose_ops("cpu", dtype, fused=Fused.build(cache_folder(), say), say=say)
    return saved


def check(args):
    """Names of what is to be measured. Raises InputError."""
    for name, least in ("limit", 0), ("examples", 0), ("tokens", 0), ("overlap", 0), ("seed", 0):
        if getattr(args, name) < least:
            raise InputError(f"--{name} {getattr(args, name)}: expected {least} or more")
    names = args.tasks
    if names is None:
        names = [] if args.text else DEFAULT
    known = ["val", "train", "prompts", *generated.TASKS, *FETCHED]
    for name in names:
        if name not in known and not os.path.exists(name):
            raise InputError(f"--tasks {name}: expected {', '.join(known)} or a file of JSON lines")
    return list(dict.fromkeys(names))


def row_len(saved):
    """Tokens in a row of training's validation."""
    return saved.options["val_row_len"]


# --------------------------------------------------------------------------------------------------
# What is measured: a plan of (name, function of a Scorer that returns Measures)


def make_plan(names, args, saved):
    """[(name, function of (Scorer, Saved) -> Measures), ...]. Raises InputError."""
    plan = []
    given = {str(path): loss.read_documents(path) for path in args.text}
    for name, documents in given.items():
        plan.append((name, measure_given(name, documents, args)))
    own = [name for name in names if name in ("val", "train")]
    made = [name for name in names if name in generated.TASKS]
    asked = [name for name in names if name == "prompts"]
    for name in own:
        plan.append((name, measure_own(name, args)))

    # Items are made once, of the first run's text, so that another run is asked the same
    documents = []
    if asked or [name for name in made if name != "arithmetic"]:
        documents = [text for texts in given.values() for text in texts] or held_out(saved)
    for name in made:
        task = generated.TASKS[name](documents, args.limit or 1000, args.seed)
        if len(task.items) < generated.MANY:
            say(
                f"note: {name} is left out: the held-out text has {len(task.items)} passages for it"
            )
        else:
            plan.append((name, measure_items(task)))
    for name in asked:
        own_set = "python" if saved.options.get("data") == "stdlib" else "english"
        rows = prompts.read_prompts(args.prompts or own_set)
        plan.append((name, measure_prompts(rows, prompts.known_words(documents), args.seed)))
    for name in names:
        path = core.fetched(name) if name in FETCHED and not os.path.exists(name) else name
        if os.path.isdir(path):
            tasks = core.read_bundle(path, args.limit)
            plan.append(
                ("CORE", lambda scorer, saved, tasks=tasks: core.measure_bundle(scorer, tasks))
            )
        elif name not in own + made + asked:
            task = read_task(path, args.limit, args.examples)
            plan.append((task.name, measure_items(task)))
    if not plan:
        raise InputError("nothing is left to measure; name a text with --text, or other --tasks")
    return plan


def held_out(saved):
    """Documents that the run was not trained on: of its validation split."""
    text = loss.validation(loss.open_corpus(saved), HELD_OUT)
    return loss.as_documents(text.streams[0], saved.tokenizer)


def measure_given(name, documents, args):
    def work(scorer, saved):
        text = loss.as_text(name, documents, scorer.tokenizer, args.tokens)
        return loss.measure_text(scorer, text, row_len(saved), args.overlap)

    return work


def measure_own(name, args):
    def work(scorer, saved):
        dataset = loss.open_corpus(saved)
        text = loss.validation(dataset, saved.options["val_tokens"], args.tokens)
        if name == "train":
            n = args.tokens or min(TRAIN_TOKENS, len(text.streams[0]))
            text = loss.training(dataset, row_len(saved), n)
        return loss.measure_text(scorer, text, row_len(saved), args.overlap)

    return work


def measure_items(task):
    return lambda scorer, saved: measure_task(scorer, task)


def measure_prompts(rows, known, seed):
    return lambda scorer, saved: prompts.measure_prompts(scorer, saved, rows, known, seed)


def measure(plan, saved, args):
    """Measures of a run, in the order of the plan."""
    scorer = Scorer(saved)
    return [measure for _, work in plan for measure in work(scorer, saved)]


def both(measures, others):
    """The measures that both runs have, in the same order."""
    found = {(m.task, m.metric): m for m in others}
    pairs = [(m, found[m.task, m.metric]) for m in measures if (m.task, m.metric) in found]
    return [one for one, _ in pairs], [other for _, other in pairs]


# --------------------------------------------------------------------------------------------------
# What is said of it


def summary(saved, measures, args, bits):
    """The JSON of an evaluation; bits: of a weight, where they are quantized."""
    result = saved.result
    quantized = dict(quantize=args.quantize, bits_per_weight=bits) if bits else {}
    return dict(
        **quantized,
        run=str(saved.folder),
        step=result.get("best_step", result.get("steps")),
        weights=sha256_of(saved.folder / "model.safetensors"),
        overlap=args.overlap,
        seed=args.seed,
        results=[m.as_row() for m in measures],
    )


def compared(measures, others):
    """Rows of a comparison, as JSON has them."""
    rows = []
    for one, other in zip(measures, others):
        row = other.as_row()
        rows.append(row | dict(verdict=verdict(one, other)))
    return rows


def keep(saved, said):
    """eval.json beside the run: the last number of each kind, as long as the weights are the
    same."""
    path = saved.folder / "eval.json"
    try:
        before = read_json(path)
    except InputError:
        before = {}
    rows = []
    if before.get("weights") == said["weights"]:
        new = {(row["task"], row["metric"]) for row in said["results"]}
        rows = [row for row in before["results"] if (row["task"], row["metric"]) not in new]
    try:
        write_text(path, to_json(said | dict(results=rows + said["results"]), indent=1) + "\n")
    except OSError as e:
        say(f"note: {path} could not be written: {e.strerror}")


def say(line):
    print(line, file=sys.stderr, flush=True)
