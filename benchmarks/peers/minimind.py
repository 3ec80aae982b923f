"""minimind: its pre-training loop on the text, with its own tokenizer, scaled to minutes on a CPU.

It names no settings for CPUs: these are its defaults with less of each. 4 layers, 256 wide, and 8
rows of 340 tokens a step without accumulation, where its 8 layers, 768 wide, and 32 rows times 8
would take hours. Two epochs, float32 (on CPUs it has no mixed precision), two workers that load.
Read with commit d65ef2c0.

A line of its data is cut off behind --max_seq_len and padded up to it, so it is given pieces of the
text that fill one. It has no validation and no clock: its last weights are evaluated, and its steps
are timed by when their lines come, which leaves out the first. It is evaluated in windows as long
as those it was trained with and as many times longer as ours; the better loss counts.
"""

import json
import re
from pathlib import Path

from .common import Peer, answer, fail, importable, median_step, pieces, total_loss, whole

FLAGS = {
    "device": "cpu",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "max_seq_len": 340,
    "batch_size": 8,
    "accumulation_steps": 1,
    "epochs": 2,
    "num_workers": 2,
    "log_interval": 1,
    "data_path": "../dataset/peer.jsonl",
}
AROUND = 2  # tokens that it puts before and after the text of a line
STEP = re.compile(r"Epoch:\[\d+/\d+\]\((\d+)/\d+\)")


# --- in its interpreter, in the copy of its checkout


class ByItsTokenizer:
    """Its tokenizer as `pieces` wants one."""

    def __init__(self):
        from tokenizers import Tokenizer

        self.inner = Tokenizer.from_file("model/tokenizer.json")

    def encode(self, text):
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.inner.decode(ids, skip_special_tokens=False)


def write_corpus(train, size):
    """A text file as its lines of JSON, each with at most `size` tokens."""
    text = Path(train).read_text(encoding="utf-8")
    parts = [json.dumps(dict(text=part)) for part in pieces(text, ByItsTokenizer(), int(size))]
    Path("dataset/peer.jsonl").write_text("\n".join(parts) + "\n", encoding="utf-8")
    return dict(lines=len(parts))


def evaluate(val, flags, longer):
    """Nats per character of its last weights on all of a text file, in windows that begin with its
    token for that."""
    import torch
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
    from torch.nn.utils.rnn import pad_sequence

    flags = json.loads(flags)
    shape = {name: flags[name] for name in ("hidden_size", "num_hidden_layers")}
    config = MiniMindConfig(**shape)
    model = MiniMindForCausalLM(config)
    weights = torch.load(f"out/pretrain_{config.hidden_size}.pth", map_location="cpu")
    model.load_state_dict({name: p.float() for name, p in weights.items()})
    model.eval()

    def mean_loss(inputs, targets):
        # It shifts labels itself, and leaves out those of -100
        labels = torch.cat([inputs[:, :1], targets], 1)
        return model(inputs, labels=labels.masked_fill(labels < 0, -100)).loss

    text = Path(val).read_text(encoding="utf-8")
    tokenizer = ByItsTokenizer()
    losses = {}
    for times in (1, int(longer)):
        length = times * flags["max_seq_len"]
        rows = []
        for part in pieces(text, tokenizer, length - AROUND):
            rows.append(torch.tensor([config.bos_token_id, *tokenizer.encode(part)]))
        rows = pad_sequence(rows, batch_first=True, padding_value=-1)
        nats = total_loss(mean_loss, rows.clamp(min=0), rows[:, 1:])
        losses[length] = nats / len(text)
    return dict(
        loss=min(losses.values()),
        loss_by_window=losses,
        params=sum(p.numel() for p in model.parameters()),
        val_units=len(text),
        val_targets=(rows[:, 1:] >= 0).sum().item(),
        dtype="float32",
    )


# --- here


class Checkout(Peer):
    name = "minimind"
    about = "checkout of github.com/jingyaogong/minimind"
    needs = (
        "trainer/train_pretrain.py",
        "trainer/trainer_utils.py",
        "dataset/lm_dataset.py",
        "model/model_minimind.py",
        "model/tokenizer.json",
    )
    modules = ("torch", "numpy", "transformers", "tokenizers", "datasets")
    left_behind = ("images",)
    own_options = ("minimind_options",)
    program = "trainer"

    def __init__(self, checkout, python, minimind_options=()):
        """minimind_options: NAME=VALUE of its train_pretrain.py, more or others than ours."""
        super().__init__(checkout, python)
        self.flags = FLAGS | dict(self.options(self.needs[0], minimind_options))
        for name in ("hidden_size", "num_hidden_layers", "max_seq_len"):
            least = 2 * AROUND if name == "max_seq_len" else 1
            value = whole(f"--minimind-options {name}", self.flags[name], least)
            self.flags[name] = value

    @staticmethod
    def add_arguments(parser):
        parser.option(
            "--minimind-options",
            str,
            (),
            "NAME=VALUE",
            "of its train_pretrain.py, such as epochs=4 num_hidden_layers=2",
            nargs="+",
        )

    def command(self):
        return ["train_pretrain.py", *(f"--{name}={value}" for name, value in self.flags.items())]

    def prepare(self, task):
        for name, texts in dict(train=task.train, val=task.val).items():
            path = self.folder / f"{name}.txt"
            path.write_text("".join(texts), encoding="utf-8", newline="\n")
        size = self.flags["max_seq_len"] - AROUND
        self.ask("write_corpus", self.folder / "train.txt", size)

    def evaluate(self, task):
        flags = json.dumps(self.flags)
        return self.ask("evaluate", self.folder / "val.txt", flags, task.longer)

    def clock(self, found):
        """By the lines of its steps."""
        times = [seconds for seconds, line in self.lines if STEP.match(line)]
        if len(times) < 2:
            fail("minimind: its log has no two steps")
        return dict(
            steps=len(times),
            train_time_s=times[-1] - times[0],
            ms_per_step=median_step(times),
        )


if __name__ == "__main__":
    answer(dict(importable=importable, write_corpus=write_corpus, evaluate=evaluate))
