"""nanochat: on a text at nanoGPT's shape, batch and steps, or on our track laptop.

On a text, its tokenizer has no merges, so that a token is a byte. With --laptop it trains on the
documents of Python's standard library that our trainer trains on, and is validated on the text
that the track validates on, in bits per byte; its tokenizer, trained by its tok_train on the same
documents, has as many tokens as the track's and 9 special ones. Its schedule ends with its last
step, so its time to a loss is that of the shortest run that ends there.

It is given what its loader likes: pieces of the documents that fill a row, since the rest of what
is longer is dropped, and in random order, as its own data is; in the order of the text each batch
would be neighbours (1.77 instead of 1.66 nats on Tiny Shakespeare). It is evaluated in windows of
the length it was trained with and in windows as many times as long as ours; the better loss counts.
"""

import json
import math
import os
import random
import re
from pathlib import Path

from .common import (
    Peer,
    TextFile,
    answer,
    fail,
    importable,
    pieces,
    size_of,
    total_loss,
    whole,
    windows,
)

# Flags of its base_train. No sliding windows: on a CPU they are masks, and it warns against them
BOTH = {
    "device-type": "cpu",
    "depth": 4,
    "window-pattern": "L",
    "core-metric-every": -1,
    "sample-every": -1,
    "model-tag": "peer",
}
SHAKESPEARE = BOTH | {
    "aspect-ratio": 32,
    "head-dim": 32,
    "max-seq-len": 64,
    "device-batch-size": 12,
    "total-batch-size": 768,
    "num-iterations": 2000,
    "eval-every": 250,
    "eval-tokens": 15_360,
}
LAPTOP = BOTH | {
    "aspect-ratio": 64,
    "head-dim": 64,
    "max-seq-len": 256,
    "device-batch-size": 32,
    "total-batch-size": 8192,
    "num-iterations": 400,
    "eval-every": 100,
    "eval-tokens": 131_072,
}
SPECIAL_TOKENS = 9


# --- in its interpreter


def write_corpus(corpus, size=None):
    """A corpus, a JSON file of documents by split, as the parquet files that nanochat expects.

    The last file is validation. With a size, which needs its tokenizer, documents are cut into
    pieces that fill a row, and those to train on come in random order.
    """
    import pyarrow
    from nanochat.dataset import DATA_DIR
    from pyarrow import parquet

    parts = json.loads(Path(corpus).read_text(encoding="utf-8"))
    if size:
        from nanochat.tokenizer import get_tokenizer

        tokenizer = get_tokenizer()
        for split, texts in parts.items():
            parts[split] = []
            for text in texts:
                parts[split] += pieces(text, tokenizer, int(size))
        random.Random(0).shuffle(parts["train"])
    os.makedirs(DATA_DIR, exist_ok=True)
    for name, split in (("shard_00000", "train"), ("shard_00001", "val")):
        table = pyarrow.Table.from_pydict(dict(text=parts[split]))
        parquet.write_table(table, Path(DATA_DIR, f"{name}.parquet"), row_group_size=1000)
    return {split: len(texts) for split, texts in parts.items()}


def evaluate(folder, step, corpus, metric, longer):
    """Loss of its checkpoint on all of the corpus's validation documents.

    In nats per character (val_loss) or bits per byte (val_bpb). longer: times its training
    windows, for the longer ones. A window begins with nanochat's own token for that, and ends where
    the document does.
    """
    import torch
    from nanochat.checkpoint_manager import build_model

    model, tokenizer, meta = build_model(folder, int(step), torch.device("cpu"), phase="eval")
    texts = json.loads(Path(corpus).read_text(encoding="utf-8"))["val"]
    documents = [tokenizer.encode(text) for text in texts]
    if metric == "val_bpb":
        units = size_of(texts, "byte")
        nats_per_unit = units * math.log(2)
    else:
        units = size_of(texts, "character")
        nats_per_unit = units

    losses = {}
    for times in (1, int(longer)):
        length = times * meta["model_config"]["sequence_len"]
        targets = torch.cat([windows(ids, length) for ids in documents])
        first = torch.full((len(targets), 1), tokenizer.get_bos_token_id())
        inputs = torch.cat([first, targets[:, :-1].clamp(min=0)], 1)
        losses[length] = total_loss(model, inputs, targets) / nats_per_unit
    return dict(
        loss=min(losses.values()),
        loss_by_window=losses,
        steps=int(step),
        val_units=units,
        params=sum(p.numel() for p in model.parameters()),
        val_targets=sum(map(len, documents)),
    )


# --- here


class Checkout(Peer):
    name = "nanochat"
    about = "checkout of github.com/karpathy/nanochat"
    needs = (
        "scripts/base_train.py",
        "scripts/tok_train.py",
        "nanochat/checkpoint_manager.py",
        "nanochat/dataset.py",
    )
    # wandb is imported and not used
    modules = tuple(
        "torch numpy pyarrow rustbpe tiktoken filelock requests psutil wandb yaml jinja2".split()
    )
    own_options = ("laptop", "nanochat_options")
    compiles = True

    def __init__(self, checkout, python, laptop=False, nanochat_options=()):
        """nanochat_options: NAME=VALUE of its base_train, more or others than ours."""
        super().__init__(checkout, python)
        self.laptop = laptop
        if laptop:
            self.own_data = "--laptop compares with nanochat, on Python's standard library"
        given = dict(LAPTOP if laptop else SHAKESPEARE)
        given |= dict(self.options(self.needs[0], nanochat_options))
        for name, least in {"num-iterations": 1, "eval-every": 1, "max-seq-len": 8}.items():
            given[name] = whole(f"--nanochat-options {name}", given[name], least)
        self.steps = given["num-iterations"]
        self.flags = given

    @staticmethod
    def add_arguments(parser):
        parser.flag("--laptop", "nanochat on our track laptop; takes no --text")
        parser.option(
            "--nanochat-options",
            str,
            (),
            "NAME=VALUE",
            "of its base_train, such as num-iterations=300 matrix-lr=0.04",
            nargs="+",
        )

    def environment(self, **more):
        return super().environment(NANOCHAT_BASE_DIR=str(self.folder / "base"), **more)

    def task(self, text, trainer_options, folder):
        if self.laptop:
            return Laptop(trainer_options, folder)
        return TextFile(text, folder)

    def prepare(self, task):
        """Its tokenizer learns from whole documents, then they are cut."""
        self.corpus = self.folder / "corpus.json"
        self.corpus.write_text(json.dumps(dict(train=task.train, val=task.val)), encoding="utf-8")
        self.ask("write_corpus", self.corpus)
        options = [f"--vocab-size={task.tokens + SPECIAL_TOKENS}", f"--doc-cap={10**9}"]
        self.run("tok_train", "-m", "scripts.tok_train", *options, log="prepare.txt")
        self.ask("write_corpus", self.corpus, self.flags["max-seq-len"])

    def command(self):
        flags = [f"--{name}={value}" for name, value in self.flags.items()]
        return ["-m", "scripts.base_train", *flags]

    def evaluate(self, task):
        folder = self.folder / "base/base_checkpoints" / self.flags["model-tag"]
        found = self.ask("evaluate", folder, self.steps, self.corpus, task.metric, task.longer)
        log = (self.folder / "log.txt").read_text(encoding="utf-8")
        dtype = re.search(r"^COMPUTE_DTYPE: torch\.(\w+)", log, re.M)
        return found | dict(dtype=dtype and dtype[1])


class Laptop(TextFile):
    """The task of track laptop: bits per byte, on the documents of Python's standard library."""

    name = "Python's standard library"
    metric = "val_bpb"
    unit = "byte"
    longer = 8
    options = ["--track", "laptop"]
    scale = 1.0

    def __init__(self, trainer_options, folder):
        """Prepares the corpus as our trainer does. Raises InputError; folder: to work in."""
        from benchmarks import subject

        c = subject.parse([*trainer_options, *self.options, "--cache-dir", folder])
        bpe = re.fullmatch(r"bpe:(\d+)", c.tokenizer)
        if c.data != "stdlib" or c.target_metric != self.metric or not bpe:
            fail(
                "--laptop: expected our trainer on stdlib with --tokenizer bpe:N and "
                f"--target-metric {self.metric}; found {c.data}, {c.tokenizer} and "
                f"{c.target_metric}"
            )
        self.tokens = int(bpe[1])
        self.target = c.target
        data = subject.open_data(c)
        self.own = data.val_bytes
        self.train = []
        for path in data.dataset.train:
            self.train += documents(path, data.dataset)
        self.val = documents(data.val.targets, data.dataset)

    def options_for(self):
        return self.options

    def our_validation(self):
        """(bytes our trainer validates on, whether they are those of the peer)

        A character cut at the end is more bytes to the peer.
        """
        return self.own, self.own == size_of(self.val, self.unit)


def documents(ids, dataset):
    """The texts of a shard, or of ids (n,)."""
    import numpy as np

    from data import read_shard

    if isinstance(ids, Path):
        ids = read_shard(ids)
    parts = np.split(ids, np.flatnonzero(ids == dataset.eot))
    texts = [dataset.tokenizer.decode(part.tolist()) for part in parts]
    return [text for text in texts if text]


if __name__ == "__main__":
    answer(dict(importable=importable, write_corpus=write_corpus, evaluate=evaluate))
