"""nanoGPT: its README's command for CPUs on the text, as its shakespeare_char data.

4 layers, 128 wide, 4 heads, 12 windows of 64 characters a step, 2,000 steps. It keeps the
checkpoint that its own estimate liked best; that one is evaluated, and its steps and clock count.
At equal shape, both trainers take 60 steps of nanoGPT's shape in turns: nanoGPT as in its README
and with --compile=True, ours as it comes and in float32, nanoGPT's only precision on a CPU.
"""

import statistics

from base import InputError
from benchmarks.report import say

from .common import Peer, answer, fail, importable, ours, read_times, total_loss, windows

STEPS = 2000
EVAL_EVERY = 250
CONTEXT = 64
BATCH = 12
SHAPE_STEPS = 60
SHAPE_TURNS = 2  # in a round

COMMAND = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    f"--log_interval=1 --block_size={CONTEXT} --batch_size={BATCH} --n_layer=4 --n_head=4 "
    "--n_embd=128"
).split()
OUR_SHAPE = (
    "--track shakespeare-char --n-layer 4 --n-embd 128 --n-head 4 --mlp-ratio 4 "
    f"--value-embed-layers --n-gram 1 --row-len {CONTEXT} --max-doc-len {CONTEXT} "
    f"--short-window {CONTEXT} --long-window {CONTEXT} --batch-tokens {CONTEXT * BATCH} "
    f"--val-row-len {CONTEXT} --val-tokens {CONTEXT * BATCH} --eval-every {SHAPE_STEPS} "
    f"--steps {SHAPE_STEPS} --sample-tokens 0"
).split()


def evaluate(checkpoint, val):
    """Loss of its checkpoint on all of val.bin; every character but the first is a target."""
    import numpy as np
    import torch
    from model import GPT, GPTConfig

    saved = torch.load(checkpoint, map_location="cpu")
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    length = saved["model_args"]["block_size"]
    ids = np.fromfile(val, dtype=np.uint16).astype(np.int64)
    targets = windows(ids[1:], length)
    n = (targets >= 0).sum().item()
    return dict(
        loss=total_loss(model.eval(), windows(ids[:-1], length).clamp(min=0), targets) / n,
        steps=saved["iter_num"],
        params=sum(p.numel() for p in model.parameters()),
        val_units=len(ids),
        val_targets=n,
    )


class Checkout(Peer):
    name = "nanogpt"
    about = "checkout of github.com/karpathy/nanoGPT"
    needs = (
        "train.py",
        "model.py",
        "configurator.py",
        "config/train_shakespeare_char.py",
        "data/shakespeare_char/prepare.py",
    )
    modules = ("torch", "numpy", "requests")
    steps = STEPS

    def prepare(self, task):
        (self.copied / "data/shakespeare_char/input.txt").write_text(task.text, encoding="utf-8")
        self.run("prepare.py", "data/shakespeare_char/prepare.py", log="prepare.txt")

    def command(self, *more):
        """Its README's for CPUs; what comes later overrides."""
        steps = [f"--max_iters={self.steps}", f"--lr_decay_iters={self.steps}"]
        return [*COMMAND, *steps, f"--eval_interval={EVAL_EVERY}", "--dropout=0.0", *more]

    def evaluate(self, task):
        checkpoint = self.copied / "out-shakespeare-char/ckpt.pt"
        if not checkpoint.exists():
            fail(
                "nanogpt: training left no checkpoint: "
                "its estimate of the validation loss never fell"
            )
        return self.ask("evaluate", checkpoint, self.copied / "data/shakespeare_char/val.bin")

    def shape_ms(self, compiled):
        """ms of a step, in a short run without validation."""
        more = [f"--max_iters={SHAPE_STEPS - 1}", "--eval_interval=1000000", "--eval_iters=1"]
        command = self.command(*more, f"--compile={compiled}")
        self.run("equal shape", *command, log="shape.txt")
        return read_times(self.folder / "shape.txt")[1]

    def equal_shape(self, task, options):
        peer = Checkout(self.checkout, self.python)
        return EqualShape(peer, task, options)


class EqualShape:
    """Step times of nanoGPT's shape, from short runs in turns; what fails once is left out."""

    def __init__(self, peer, task, options):
        """peer: a Checkout of its own; task: a TextFile, in whose folder to work."""
        self.ms = {}
        self.errors = {}
        folder = task.path.parent
        peer.copy(folder / "shape")
        peer.prepare(task)

        def our_ms(*more):
            given = our_shape(task.path, options, *more)
            return ours("equal shape", given, folder)["ms_per_step"]

        self.ways = {
            "nanoGPT": lambda: peer.shape_ms(False),
            "ours": our_ms,
            "nanoGPT, --compile=True": lambda: peer.shape_ms(True),
            "ours, float32": lambda: our_ms("--dtype", "float32"),
        }

    def round(self):
        """Every way of running in turn, SHAPE_TURNS times; returns the result so far."""
        for _ in range(SHAPE_TURNS):
            for way in self.ways:
                if way not in self.errors:
                    self.measure(way)
        tokens = CONTEXT * BATCH
        medians = {way: statistics.median(ms) for way, ms in self.ms.items()}
        return dict(
            tokens=tokens,
            steps=SHAPE_STEPS,
            warm=10,
            ms=self.ms,
            errors=self.errors,
            median_ms=medians,
            us_per_token={way: 1e3 * ms / tokens for way, ms in medians.items()},
        )

    def measure(self, way):
        say(f"--- equal shape: {way}")
        try:
            ms = self.ways[way]()
        except InputError as e:
            self.errors[way] = str(e)
            say(f"{way}: {e}")
            return
        self.ms.setdefault(way, []).append(ms)
        say(f"{way}: {ms:.2f} ms a step")


def our_shape(text, trainer_options, *more):
    """What train_gpt.py is given to be of nanoGPT's shape."""
    return [*trainer_options, *OUR_SHAPE, "--text", text, *more]


if __name__ == "__main__":
    answer(dict(importable=importable, evaluate=evaluate))
