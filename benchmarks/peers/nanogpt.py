"""nanoGPT: its README's command for CPUs on the text, as its shakespeare_char data.

4 layers, 128 wide, 4 heads, 12 windows of 64 characters a step, 2,000 steps. It keeps the
checkpoint that its own estimate liked best; that one is evaluated, and its steps and clock count.
"""

from .common import Peer, answer, fail, importable, total_loss, windows

STEPS = 2000
EVAL_EVERY = 250
CONTEXT = 64
BATCH = 12

COMMAND = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    f"--log_interval=1 --block_size={CONTEXT} --batch_size={BATCH} --n_layer=4 --n_head=4 "
    "--n_embd=128"
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

    def command(self):
        """Its README's for CPUs."""
        steps = [f"--max_iters={self.steps}", f"--lr_decay_iters={self.steps}"]
        return [*COMMAND, *steps, f"--eval_interval={EVAL_EVERY}", "--dropout=0.0"]

    def evaluate(self, task):
        checkpoint = self.copied / "out-shakespeare-char/ckpt.pt"
        if not checkpoint.exists():
            fail(
                "nanogpt: training left no checkpoint: "
                "its estimate of the validation loss never fell"
            )
        return self.ask("evaluate", checkpoint, self.copied / "data/shakespeare_char/val.bin")


if __name__ == "__main__":
    answer(dict(importable=importable, evaluate=evaluate))
