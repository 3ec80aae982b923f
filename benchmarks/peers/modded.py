"""modded-nanogpt: as it is, with torchrun, on the GPUs and shards that our track gpt2-small gets.

What it offers to be set from outside is DATA_PATH, and that gets a folder with exactly our shards.
It needs Hopper GPUs, 1, 2, 4 or 8 of them with 52 GB each; CUDA's headers; and in --python torch,
triton, numpy, tiktoken and kernels, of which the last two fetch GPT-2's vocabulary and
FlashAttention 3 over the network when they are first used. Read with commit f411b3d3.

Both validate on the first 10,485,760 tokens of the same shard, and neither's clock counts
compiling: on one H100 count on 10 minutes for each training and as much for its compilation. Ours
finds its data prepared.
"""

import sys
from pathlib import Path

from .common import ROOT, Peer, answer, environment, fail, importable, read_times

LAUNCH = ("-m", "torch.distributed.run", "--standalone")
VAL_TOKENS = 10_485_760


def ready(*modules):
    """importable() without our folder, which has a package named kernels as well."""
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    return importable(*modules)


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
    compiles = True

    def environment(self, **more):
        return environment(gpus=True, **more)

    def task(self, text, trainer_options, folder):
        task = FineWeb(trainer_options, folder)
        self.gpus = task.gpus
        return task

    def command(self):
        return [*LAUNCH, f"--nproc_per_node={self.gpus}", "train_gpt.py"]

    def train(self, task, folder):
        """One run as it is."""
        self.copy(folder)
        self.env["DATA_PATH"] = str(task.folder)
        process = self.run("training", *self.command())
        logs = sorted((self.copied / "logs").glob("*.txt"))
        run, ms = read_times(logs[-1] if logs else self.folder / "log.txt")
        if not run.val or run.time_s is None or run.val[-1].step != run.total_steps:
            fail("modded: its log does not end with a validation with a time at its last step")
        return dict(
            loss=run.final_loss,
            steps=run.steps,
            val_units=VAL_TOKENS,
            train_time_s=run.time_s,
            process_s=process,
            ms_per_step=ms,
            own_estimates={p.step: p.loss for p in run.val},
        )


class FineWeb:
    """The task of track gpt2-small: nats per token, on the shards of FineWeb."""

    name = "FineWeb"
    metric = "val_loss"
    unit = "token"
    scale = 1.0
    target = None

    def __init__(self, trainer_options, folder):
        """Prepares the shards as our trainer does, and makes `folder` one for DATA_PATH. Raises
        InputError."""
        from benchmarks import subject
        from data import DataConfig, open_dataset, read_shard

        c = subject.parse(["--track", "gpt2-small", *trainer_options])
        self.gpus, device = usable_gpus(c.gpus)
        self.device = f"{self.gpus} x {device}"
        ours = (c.data, c.val_tokens, c.target_metric)
        if ours != ("fineweb10B", VAL_TOKENS, self.metric):
            fail(
                f"--modded: expected our trainer on fineweb10B with --val-tokens {VAL_TOKENS} and "
                f"--target-metric val_loss, as modded-nanogpt; found {c.data}, {c.val_tokens} and "
                f"{c.target_metric}"
            )
        self.data = Path(c.cache_dir) / "data"
        config = DataConfig(data=c.data, train_shards=c.train_shards)
        dataset = open_dataset(config, self.data)
        if len(dataset.train) < 2:
            fail(f"--train-shards {len(dataset.train)}: modded-nanogpt needs 2 shards or more")
        self.train = [read_shard(path) for path in dataset.train]
        self.val = [range(VAL_TOKENS)]
        self.folder = Path(folder)
        there = self.folder / "data/fineweb10B"
        there.mkdir(parents=True)
        for kind, paths in (("train", dataset.train), ("val", dataset.val)):
            for i, path in enumerate(paths):
                (there / f"fineweb_{kind}_{i:06d}.bin").symlink_to(Path(path).resolve())

    def options_for(self):
        return ["--track", "gpt2-small", "--gpus", self.gpus]

    def our_validation(self):
        """(tokens our trainer validates on, whether they are those of the peer)"""
        return VAL_TOKENS, True

    def fill(self, cache):
        """Put the prepared shards into a cache folder of our trainer's."""
        cache.mkdir(exist_ok=True)
        if not (cache / "data").is_symlink():
            (cache / "data").symlink_to(self.data.resolve())


if __name__ == "__main__":
    answer(dict(importable=ready))
