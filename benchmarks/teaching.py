"""Teaching: tokens/s of SFT beside trl's SFTTrainer and nanochat's chat_sft, and seconds of GRPO's
updates beside trl's GRPOTrainer.

    ./run.sh benchmarks teaching --python trl/bin/python --nanochat ../nanochat --json teaching.json
    ./run.sh benchmarks teaching --quick --python trl/bin/python

On the CPU, each in processes of its own, in turns; the median of all steps of all rounds counts.
A model of track llama-1m, or one of --track, is trained a little and taught a little, so that it
answers; all go on from it, trl from what ./run.sh export makes of it. nanochat has no program for
others' models: it has one of its own of that width, depth and vocabulary. All see the
conversations of ./run.sh teach-demo in rows of 256 tokens, 8,192 a step.

Tokens are those of conversations, not padding, and beside them those of answers, which count in the
loss. trl is measured with its packing as it comes ("bfd", whole conversations), with the one that
cuts and lets them see each other ("wrapped"), and without any; the best counts. Its GRPOTrainer has
the same questions, so many answers to each of at most so many tokens, and the same reward; learning
rates are so low that a model answers as it did before. Nothing is installed: --python is an
interpreter that has trl and what nanochat needs; what it has not is left out, with a line.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

from base import InputError, to_json, write_text
from benchmarks.options import COUNT
from benchmarks.peers.common import environment
from benchmarks.peers.nanochat import SPECIAL_TOKENS
from benchmarks.peers.nanochat import Checkout as Nanochat
from benchmarks.process import ROOT, execute
from benchmarks.report import document, number, say, table

ROW_LEN = 256
BATCH = 8192
ROWS = ["--row-len", ROW_LEN, "--val-row-len", ROW_LEN, "--max-doc-len", ROW_LEN]
QUIET = ["--sample-tokens", 0, "--patience", 0]
VOCAB = 1024
QUESTIONS, ANSWERS, ANSWER_TOKENS, KL = 32, 8, 48, 0.02
WARM = 2  # first steps that do not count
BARS = {"sft / trl": 2.0, "sft / nanochat": 1.0, "grpo / trl": 3.0}
PACKINGS = dict(bfd=(1, 32), wrapped=(32, 1), none=(0, 1))  # rows of a pass, passes of a step
TRL = "trl, {}".format


def add_arguments(parser):
    parser.option(
        "--track", str, "llama-1m", "NAME", "of the model; one of the template llama, for export"
    )
    parser.option("--steps", COUNT, 20, "N", "of SFT that are timed in a round")
    parser.option("--updates", COUNT, 8, "N", "of GRPO that are timed in a round")
    parser.option("--rounds", COUNT, 3, "N", "turns")
    parser.flag("--quick", "one round of 6 steps and 3 updates, after less training")
    parser.option("--nanochat", str, None, "PATH", Nanochat.about)
    parser.option("--python", str, sys.executable, "PATH", "interpreter with trl, for the others")


def run(
    track="llama-1m",
    steps=20,
    updates=8,
    rounds=3,
    quick=False,
    nanochat=None,
    python=sys.executable,
    save=lambda result: None,
):
    """dict(model, threads, sft, grpo={who: medians}, ratios, reached); save is given the same as it
    grows."""
    if quick:
        steps, updates, rounds = 6, 3, 1
    peer = ChatSft(nanochat, python) if nanochat else None
    with tempfile.TemporaryDirectory(prefix="teaching-") as folder:
        there = Subject(Path(folder), track, python, 30 if quick else 200)
        result = dict(track=track, model=there.about, dtype=there.dtype, threads=there.threads)
        result |= dict(rounds=rounds, steps=steps, updates=updates, sft={}, grpo={}, skipped={})
        turns = turns_of(there, peer, steps, updates)
        found = {key: [] for key in turns}
        for n in range(rounds):
            for key, measure in turns.items():
                kind, who = key
                if who in result["skipped"]:
                    continue
                say(f"--- {kind}, {who}, round {n + 1} of {rounds}")
                try:
                    found[key].append(measure())
                except InputError as e:
                    if who == "ours":
                        raise
                    say(f"{who}: {e}")
                    result["skipped"][who] = str(e)
                    continue
                result[kind][who] = (sft_of if kind == "sft" else grpo_of)(found[key])
                result |= compared(result)
                save(result)
    say(f"\n{render(result)}")
    return result


def turns_of(there, peer, steps, updates):
    """{(kind, who): function that measures once}, in the order of a round."""
    turns = {("sft", "ours"): lambda: there.our_sft(steps)}
    for packing in PACKINGS:
        turns["sft", TRL(packing)] = lambda packing=packing: there.trl_sft(steps, packing)
    if peer:
        turns["sft", "nanochat"] = lambda: peer.measure(there, steps)
    turns["grpo", "ours"] = lambda: there.our_grpo(updates)
    turns["grpo", "trl"] = lambda: there.trl_grpo(updates)
    return turns


# --------------------------------------------------------------------------------------------------
# Numbers


def sft_of(rounds):
    """Medians over the steps of all rounds: each a dict(seconds, tokens, counted) by step."""
    seconds = [s for r in rounds for s in r["seconds"][WARM:]]
    tokens = statistics.mean(n for r in rounds for n in r["tokens"][WARM:])
    counted = statistics.mean(n for r in rounds for n in r["counted"][WARM:])
    step = statistics.median(seconds)
    return dict(
        step_s=step,
        tokens=tokens,
        counted=counted,
        tokens_per_s=tokens / step,
        counted_per_s=counted / step,
        by_round=[statistics.median(r["seconds"][WARM:]) for r in rounds],
        versions=rounds[0].get("versions"),
    )


def grpo_of(rounds):
    """The same of updates; answer_tokens: mean of an answer."""
    medians = sft_of(rounds)
    return dict(
        update_s=medians["step_s"],
        answer_tokens=medians["counted"] / (QUESTIONS * ANSWERS),
        by_round=medians["by_round"],
        versions=medians["versions"],
    )


def compared(result):
    """dict(ratios={what: how many times as fast}, reached={what: bool}) of what is there."""
    ratios = {}
    sft, grpo = result["sft"], result["grpo"]
    mine = sft.get("ours")
    theirs = [x["tokens_per_s"] for who, x in sft.items() if who.startswith("trl")]
    if mine and theirs:
        ratios["sft / trl"] = mine["tokens_per_s"] / max(theirs)
    if mine and "nanochat" in sft:
        ratios["sft / nanochat"] = mine["tokens_per_s"] / sft["nanochat"]["tokens_per_s"]
    if "ours" in grpo and "trl" in grpo:
        ratios["grpo / trl"] = grpo["trl"]["update_s"] / grpo["ours"]["update_s"]
    return dict(ratios=ratios, reached={what: x >= BARS[what] for what, x in ratios.items()})


def render(result):
    rows = []
    for who, m in result["sft"].items():
        per_s = f"{m['tokens_per_s']:,.0f}", f"{m['counted_per_s']:,.0f}"
        rows.append([who, number(1e3 * m["step_s"]), f"{m['tokens']:,.0f}", *per_s])
    updates = []
    for who, m in result["grpo"].items():
        updates.append([who, number(m["update_s"], ".2f"), number(m["answer_tokens"])])
    ratios = []
    for what, x in result.get("ratios", {}).items():
        ratios.append(f"- {what}: {x:.2f} times as fast; the goal is {BARS[what]:g}")
    skipped = [f"- {who}: left out, since {why}" for who, why in result["skipped"].items()]
    return document(
        f"# Teaching {result['track']}, {result['model']['params']:,} parameters, "
        f"{result['dtype']}, {result['threads']} CPU threads, {result['rounds']} rounds",
        table(["SFT", "ms/step", "tokens/step", "tokens/s", "of answers/s"], rows),
        table(["GRPO", "s/update", "tokens/answer"], updates) if updates else None,
        ratios,
        skipped,
    )


# --------------------------------------------------------------------------------------------------
# Ours, and trl's


class Subject:
    """A model that answers, and what it is taught."""

    def __init__(self, folder, track, python, steps):
        from posttrain.lessons import documented, write_conversations, write_questions
        from runtime.saved import load_run

        self.folder = folder
        self.python = python
        self.data = folder / "conversations.jsonl"
        self.questions = folder / "questions.jsonl"
        functions = documented()
        write_conversations(self.data, 0, 12_000, 2_000, functions)
        write_questions(self.questions, 0, 2_000)
        self.val = folder / "val.jsonl"
        lines = self.data.read_text(encoding="utf-8").splitlines()
        write_text(self.val, "\n".join(lines[:40]) + "\n")
        write_text(folder / "val-questions.jsonl", self.first(self.questions, 8))

        base = ["--track", track, "--data", "stdlib", "--tokenizer", f"qwen2:{VOCAB}", *ROWS]
        base += ["--batch-tokens", BATCH, "--steps", steps, "--eval-every", steps, *QUIET]
        self.ours("train", "base", base)
        self.base = folder / "base"
        self.ours("sft", "taught", ["--from", self.base, *self.sft_options(steps)])
        self.taught = folder / "taught"
        self.exported = folder / "exported"
        command = [sys.executable, ROOT / "door.py", "export", "--run", self.taught]
        command += ["--to", "hf", self.exported]
        execute("export", command, folder, folder / "export.txt", self.env())

        said = json.loads((self.taught / "result.json").read_text(encoding="utf-8"))
        saved = load_run(self.taught)
        config = json.loads((self.taught / "config.json").read_text(encoding="utf-8"))
        self.dtype = config["environment"]["dtype"]
        self.threads = config["environment"]["threads"]
        self.about = dict(
            params=sum(p.numel() for p in saved.model.parameters()),
            val_loss=said["val_loss"],
            tokenizer=saved.tokenizer.n_vocab,
            config=json.loads((self.exported / "config.json").read_text(encoding="utf-8")),
        )
        self.count_rows()

    @staticmethod
    def first(path, n):
        return "\n".join(path.read_text(encoding="utf-8").splitlines()[:n]) + "\n"

    def env(self):
        return environment(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

    def ours(self, verb, name, options):
        """A run of ours, in folder/name, from its beginning."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        command = [sys.executable, ROOT / "door.py", verb, *options]
        command += ["--run-dir", self.folder / name, "--cache-dir", self.folder / "cache"]
        log = self.folder / f"{name}.txt"
        execute(f"our {verb}", command, self.folder, log, self.env(), ok=(0, 3))

    def sft_options(self, steps):
        options = ["--data", self.data, "--val-data", self.val, *ROWS, "--batch-tokens", BATCH]
        return [*options, "--steps", steps, "--eval-every", steps, *QUIET]

    def count_rows(self):
        """What a row of ours holds on average: tokens of conversations, and those that count."""
        from data.config import DataConfig
        from data.dataset import open_data

        config = DataConfig(
            data="conversations",
            conversations=(str(self.data),),
            val_text=str(self.val),
            tokenizer=f"qwen2:{VOCAB}",
            vocabulary=str(self.taught / "tokenizer.json"),
            row_len=ROW_LEN,
            val_row_len=ROW_LEN,
        )
        rows = dict(batch_rows=lambda step: BATCH // ROW_LEN, max_doc_len=lambda step: ROW_LEN)
        train = open_data(config, self.folder / "cache", **rows).train
        n = train.rows_in_epoch()
        self.row = float(train.of.lengths.sum()) / n, float(train.of.counts.sum()) / n
        self.conversations_a_row = len(train.of) / n

    def steps_of(self, name, key):
        """(seconds of each step, its metrics) of a run of ours."""
        lines = (self.folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [row for row in map(json.loads, lines) if key in row]
        times = [0.0, *(row["train_time"] for row in rows)]
        return [b - a for a, b in zip(times, times[1:])], rows

    def our_sft(self, steps):
        options = ["--from", self.taught, *self.sft_options(steps + WARM), "--stage-lr", 1e-6]
        self.ours("sft", "sft", options)
        seconds, _ = self.steps_of("sft", "train_loss")
        tokens, counted = (BATCH // ROW_LEN * x for x in self.row)
        return dict(
            seconds=seconds, tokens=[tokens] * len(seconds), counted=[counted] * len(seconds)
        )

    def our_grpo(self, updates):
        n = updates + WARM
        options = ["--from", self.taught, "--data", self.questions, *ROWS, "--batch-tokens", BATCH]
        options += ["--val-data", self.folder / "val-questions.jsonl", "--reward", "number"]
        options += ["--questions", QUESTIONS, "--answers", ANSWERS, "--kl", KL]
        options += ["--answer-tokens", ANSWER_TOKENS, "--steps", n, "--eval-every", n, *QUIET]
        self.ours("grpo", "grpo", [*options, "--stage-lr", 1e-6])
        seconds, rows = self.steps_of("grpo", "reward")
        counted = [row["answer_tokens"] * QUESTIONS * ANSWERS for row in rows]
        return dict(seconds=seconds, tokens=counted, counted=counted)

    def trl(self, what, **spec):
        """teaching_trl.py's numbers of this."""
        out = self.folder / "trl.json"
        path = self.folder / "spec.json"
        spec |= dict(model=str(self.exported), row_len=ROW_LEN, threads=self.threads)
        write_text(path, to_json(spec | dict(bf16=self.dtype == "bfloat16")))
        # -P: what lies beside the file, such as kernels.py, is no package of theirs
        command = [self.python, "-P", Path(__file__).with_name("teaching_trl.py"), path, out]
        execute(f"trl's {what}", command, self.folder, self.folder / "trl.txt", self.env())
        return json.loads(out.read_text(encoding="utf-8"))

    def trl_sft(self, steps, packing):
        rows, accumulate = PACKINGS[packing]
        rows = rows or round(self.conversations_a_row * BATCH / ROW_LEN)
        return self.trl(
            f"SFTTrainer, packing {packing}",
            kind="sft",
            data=str(self.data),
            steps=steps + WARM,
            packing=None if packing == "none" else packing,
            rows=rows,
            accumulate=accumulate,
        )

    def trl_grpo(self, updates):
        return self.trl(
            "GRPOTrainer",
            kind="grpo",
            data=str(self.questions),
            steps=updates + WARM,
            questions=QUESTIONS,
            answers=ANSWERS,
            answer_tokens=ANSWER_TOKENS,
            kl=KL,
        )


# --------------------------------------------------------------------------------------------------
# nanochat's


class ChatSft(Nanochat):
    """A checkout of nanochat whose chat_sft is run."""

    __module__ = Nanochat.__module__  # whose functions it asks for in its interpreter
    needs = (*Nanochat.needs, "scripts/chat_sft.py", "tasks/smoltalk.py")
    compiles = True  # model and optimizer, as it comes; not where PyTorch's compiler fails

    def measure(self, there, steps):
        with tempfile.TemporaryDirectory(prefix="teaching-") as folder:
            self.copy(folder)
            self.env |= dict(NANOCHAT_DTYPE=there.dtype, OMP_NUM_THREADS=str(there.threads))
            texts = []
            for line in there.data.read_text(encoding="utf-8").splitlines():
                texts.append("\n".join(m["content"] for m in json.loads(line)["messages"]))
            self.prepare(
                SimpleNamespace(train=texts, val=texts[:100], tokens=VOCAB - SPECIAL_TOKENS)
            )
            shape = there.about["config"]
            fields = dict(
                sequence_len=ROW_LEN,
                n_layer=shape["num_hidden_layers"],
                n_head=shape["num_attention_heads"],
                n_kv_head=shape["num_key_value_heads"],
                n_embd=shape["hidden_size"],
                window_pattern="L",
            )
            spec = self.folder / "spec.json"
            write_text(spec, to_json(dict(data=str(there.data), tag="peer", model=fields)))
            driver = Path(__file__).with_name("teaching_nanochat.py")
            self.run("its model", "-P", driver, "prepare", spec, log="model.txt")
            n = steps + WARM
            options = {"device-type": "cpu", "model-tag": "peer", "load-optimizer": 0}
            options |= {"num-iterations": n + 1, "max-seq-len": ROW_LEN, "eval-tokens": BATCH}
            options |= {"device-batch-size": BATCH // ROW_LEN, "total-batch-size": BATCH}
            options |= {"eval-every": -1, "chatcore-every": -1}
            flags = [f"--{name}={value}" for name, value in options.items()]
            command = "chat_sft", "-P", driver, "train", spec, *flags
            if self.compiles:
                try:
                    self.run(*command)
                    return self.numbers() | dict(versions=dict(compiled=True))
                except InputError as e:
                    if "inductor" not in str(e):
                        raise
                    say(f"{e}; once more without the compiler")
                    self.compiles = False
            self.env["TORCHDYNAMO_DISABLE"] = "1"
            self.run(*command)
            return self.numbers() | dict(versions=dict(compiled=False))

    def numbers(self):
        """What its log says, a step a line."""
        seconds, tokens, counted = [], [], []
        for line in (self.folder / "log.txt").read_text(encoding="utf-8").splitlines():
            if line.startswith("counted "):
                real, answers = map(int, line.split()[1:])
                tokens.append(real)
                counted.append(answers)
            elif line.startswith("step ") and "dt: " in line:
                seconds.append(float(line.split("dt: ")[1].split("ms")[0]) / 1e3)
        if not seconds:
            raise InputError("nanochat: its log has no steps")
        n = len(seconds)
        return dict(seconds=seconds, tokens=tokens[:n], counted=counted[:n])

    def environment(self, **more):
        path = os.pathsep.join(filter(None, [str(self.copied), os.environ.get("PYTHONPATH")]))
        return super().environment(PYTHONPATH=path, **more)
