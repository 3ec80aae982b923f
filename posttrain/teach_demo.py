"""./run.sh teach-demo: the whole path on one small machine, from text to a model that does sums.

    base   Python's library and sums    a model that continues text
    sft    conversations                it answers; sums mostly at once, and so mostly wrong
    dpo    pairs of answers             it answers shortly where there is nothing to work out
    grpo   sums it has not seen         it finds out that working them out digit by digit pays

Each stage is a verb with options that docs/teaching.md has as well, a run in a folder of its own,
and goes on where it was stopped. lessons.py makes what is learned and judges the answers.
"""

import argparse
import contextlib
import io
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import train_gpt
from base import InputError, streams, to_json, write_text
from base.command import Parser, given_path, refuse
from base.places import runs_folder
from data.chat import Message, prompt_of
from data.loader import pack
from inference.engine import Engine, Request
from inference.sampling import Sampling
from runtime.log import show
from runtime.saved import load_run

from . import dpo, grpo, sft
from .lessons import (
    KINDS,
    documented,
    is_in_form,
    is_short,
    lessons,
    result_of,
    write_base,
    write_conversations,
    write_pairs,
    write_questions,
)

DESCRIPTION = """\
Teach a model of a million parameters on this machine, without a network, in minutes: it is trained
on text that every machine has, then by ./run.sh sft, dpo and grpo, and is asked the same questions,
which it has not seen, after each of them. The table shows how it answers: how many answers have
the form that was taught, how many sums are right, how many other answers are short as preferred,
and bits per byte on held-out text. A demo that was stopped goes on where it was. docs/teaching.md
has the stages by hand."""

EXAMPLES = """\
examples:
  ./run.sh teach-demo
  ./run.sh teach-demo --seed 1 --json
  ./run.sh chat --run runs/teach-demo/grpo          # afterwards: What is 347+85?"""

# What the stages have in common, and each one's own
ROWS = dict(row_len=256, max_doc_len=256)
BASE = ROWS | dict(
    track="own-text",
    tokenizer="qwen2:1024",
    val_row_len=256,
    n_layer=3,
    n_head=4,
    mlp_ratio=4,
    value_embed_layers=(0, 2),
    copies=0,
    sampled_softmax=0,
    batch_tokens=8192,
    steps=440,
    eval_every=220,
    patience=0,
    train_eval=0,
    sample_tokens=0,
)
TAUGHT = ROWS | dict(val_row_len=256, patience=0, sample_tokens=0)
# Every fourth row is text, so that the model does not forget it
SFT = TAUGHT | dict(batch_tokens=8192, steps=250, eval_every=125, mix=(3, 1))
# Short steps and the likelihood of the short answer keep it near to what it was: without them
# sentences break up or do not end
DPO = TAUGHT | dict(
    batch_tokens=4096, steps=60, eval_every=15, beta=0.5, sft_weight=1.0, stage_lr=0.03
)
GRPO = TAUGHT | dict(
    reward="number",
    questions=32,
    answers=8,
    answer_tokens=48,
    val_questions=128,
    steps=96,
    eval_every=24,
)
MOST_KL = 0.1  # nats a token that the model may have gone from where GRPO began

ASKED = dict(sum=240, order=40, letters=40, docs=40)  # questions that are asked in the end
MOST_TOKENS = 64  # of an answer


class Measured(NamedTuple):
    """How a model does; None for what a base model cannot do."""

    stage: str
    form: float | None  # of all answers, how many have the form that was taught
    sums: float | None  # of the sums, how many are right
    short: float | None  # of the other answers, how many are short
    bpb: float  # bits per byte on held-out text of the base model's kind


def parse(argv):
    parser = Parser(
        prog="./run.sh teach-demo",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of what is asked")
    parser.add_argument(
        "--run-dir", type=given_path, metavar="DIR", help="for the stages [runs/teach-demo]"
    )
    parser.add_argument(
        "--fraction",
        type=float,
        default=1.0,
        metavar="X",
        help="of the steps and of the questions, for a look at the stages without their result [1]",
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of a table")
    return parser.parse_args(argv)


def main(argv=None):
    """Parse, train and teach, show what became of it. Returns the exit status: 3 where a goal was
    not reached."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if not 0 < args.fraction <= 1:
            raise InputError(f"--fraction {args.fraction}: expected a number above 0, at most 1")
        if args.seed < 0:
            raise InputError(f"--seed {args.seed}: expected 0 or more")
        return demo(args)
    except Stopped as e:
        show("teach-demo: the same command goes on from there with all of it")
        return e.status
    except InputError as e:
        return refuse(e)


class Stopped(Exception):
    """A stage ended before its last step."""

    def __init__(self, status):
        self.status = status


def demo(args):
    """All stages. Returns the exit status."""
    begin = time.perf_counter()
    folder = args.run_dir or Path(runs_folder(), "teach-demo")
    files = write_files(folder / "data", args)
    questions = asked(args)
    measured = []

    def stage(name, program, argv, options):
        """Train a stage, unless it has been; ask and measure."""
        show(f"teach-demo: {name}")
        run = folder / name
        status = train(program, [*argv, "--run-dir", str(run)], scaled(options, args), args.seed)
        if not (run / "result.json").exists():
            raise Stopped(status or 1)
        found, answers = measure(run, name, questions, files["held_out"])
        measured.append(found)
        show_answers(name, answers)
        return run

    text = ["--text", files["base"], "--val-text", files["held_out"]]
    base = stage("base", train_gpt.main, text, BASE)
    learned = ["--data", files["conversations"], files["base"]]
    taught = stage("sft", sft.main, ["--from", base, *learned], SFT)
    short = stage("dpo", dpo.main, ["--from", taught, "--data", files["pairs"]], DPO)
    good = stage("grpo", grpo.main, ["--from", short, "--data", files["questions"]], GRPO)

    result = result_of_demo(measured, last_kl(good), args, time.perf_counter() - begin)
    write_text(folder / "result.json", to_json(result) + "\n")
    streams.put(to_json(result) if args.json else table(measured))
    return 0 if result["reached"] else 3


def scaled(options, args):
    """The options of a stage, with a fraction of its steps."""
    if args.fraction == 1:
        return options
    steps = max(2, round(options["steps"] * args.fraction))
    return options | dict(steps=steps, eval_every=steps)


def train(program, argv, options, seed):
    """Call a verb, its result of one line put aside. Returns the exit status. Raises Stopped."""
    argv = [str(x) for x in argv] + ["--resume", "auto", "--seed", str(seed)]
    for name, value in options.items():
        values = value if isinstance(value, tuple) else (value,)
        argv += ["--" + name.replace("_", "-"), *map(str, values)]
    with contextlib.redirect_stdout(io.StringIO()):
        status = program(argv)
    if status not in (0, 3):
        raise Stopped(status)
    return status


def write_files(folder, args):
    """{what: path} of texts, conversations and pairs; the same bytes for the same seed."""
    functions = documented()
    n = args.fraction
    files = dict(
        base=folder / "base.txt",
        held_out=folder / "held-out.txt",
        conversations=folder / "conversations.jsonl",
        pairs=folder / "pairs.jsonl",
        questions=folder / "sums.jsonl",
    )
    show(f"teach-demo: writing texts and conversations into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    write_base(files["base"], files["held_out"], args.seed, megabytes=1.5, sums=40_000)
    write_conversations(
        files["conversations"], args.seed, math.ceil(15_000 * n), math.ceil(2_500 * n), functions
    )
    write_pairs(files["pairs"], args.seed, math.ceil(300 * n), functions)
    write_questions(files["questions"], args.seed, math.ceil(3_000 * n))
    return files


# --------------------------------------------------------------------------------------------------
# How good it is


def asked(args):
    """Questions that no stage has seen: [Lesson, ...]."""
    functions = documented()
    found = []
    for kind, n in ASKED.items():
        found += lessons(kind, math.ceil(n * args.fraction), "test", args.seed, functions)
    return found


def measure(run, stage, questions, held_out):
    """(Measured, [(Lesson, answer), ...]) of a run's model; without answers where it knows no
    conversations."""
    saved = load_run(run)
    bpb = bits_per_byte(saved, held_out.read_text(encoding="utf-8"))
    if stage == "base":
        return Measured(stage, None, None, None, bpb), []
    answers = list(zip(questions, answer(saved, questions)))
    # An answer that does not end has no form
    formed = [done.finish_reason == "stop" and is_in_form(q, done.text) for q, done in answers]
    right = [result_of(done.text) == q.result for q, done in answers if q.kind == "sum"]
    short = [is_short(q, done.text) for q, done in answers if q.kind in KINDS]
    return Measured(stage, mean(formed), mean(right), mean(short), bpb), answers


def mean(said):
    return sum(said) / len(said)


def answer(saved, questions):
    """The likeliest answer to each question, as Completions."""
    engine = Engine(saved.model, saved.stage, saved.tokenizer, saved.max_len, places=128, part=4096)
    requests = []
    for lesson in questions:
        prompt = prompt_of([Message("user", lesson.question)], saved.tokenizer)
        requests.append(Request(tuple(prompt), MOST_TOKENS, Sampling(temperature=0)))
    return engine.generate(requests)


@torch.no_grad()
def bits_per_byte(saved, text, rows=64):
    """Of a text, by rows of the model's length; of its first so many rows."""
    tokenizer = saved.tokenizer
    (ids,) = tokenizer.encode([text])
    n = min(len(ids) - 1, rows * saved.max_len)
    segments = []
    for at in range(0, n, saved.max_len):
        segments.append([(ids, at, min(saved.max_len, n - at))])
    batch = pack(segments, saved.max_len, 1, saved.max_len)
    nats = saved.model(*batch, saved.stage).item()
    return nats / math.log(2) / int(tokenizer.token_bytes[ids[1 : n + 1]].sum())


def last_kl(run):
    """Nats a token that the policy is from its reference: the median of the last quarter of the
    steps. In the mean one token that hardly any draw would give counts for thousands."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [row["kl"] for row in map(json.loads, lines) if "kl" in row]
    return statistics.median(found[-max(1, len(found) // 4) :])


# --------------------------------------------------------------------------------------------------
# What is shown


def show_answers(stage, answers):
    """Two questions of each kind with their answers, on the screen."""
    shown = dict.fromkeys(ASKED, 2)
    for lesson, done in answers:
        if shown[lesson.kind]:
            shown[lesson.kind] -= 1
            show(f"  {stage}: {lesson.question} -> {done.text}")


def table(measured):
    """Lines for the screen: a row for each stage."""
    lines = ["stage   in form   sums right   short answers   bits per byte"]
    for m in measured:
        shares = [" " * 6 if x is None else f"{x:6.1%}" for x in (m.form, m.sums, m.short)]
        lines.append(
            f"{m.stage:6}  {shares[0]}    {shares[1]}       {shares[2]}          {m.bpb:.4f}"
        )
    return "\n".join(lines)


def result_of_demo(measured, kl, args, seconds):
    """The JSON of a demo, and whether every goal was reached."""
    by_name = {m.stage: m for m in measured}
    before, after, last = by_name["sft"], by_name["dpo"], by_name["grpo"]
    result = dict(
        format_sft=before.form,
        accuracy_sft=before.sums,
        accuracy_grpo=last.sums,
        kl_grpo=kl,
        preferred_sft=before.short,
        preferred_dpo=after.short,
        bpb_before=before.bpb,
        bpb_after=after.bpb,
    )
    goals = dict(
        format_sft=before.form >= 0.9,
        accuracy_sft=before.sums <= 0.6,
        accuracy_grpo=last.sums >= 0.95,
        kl_grpo=kl <= MOST_KL,
        preferred_dpo=after.short >= 0.9,
        bpb_after=after.bpb <= 1.03 * before.bpb,
    )
    return dict(
        **result,
        goals=goals,
        reached=all(goals.values()),
        stages=[m._asdict() for m in measured],
        seed=args.seed,
        fraction=args.fraction,
        seconds=round(seconds, 1),
    )
