"""Tokens where there is no data: random ones, in documents as long as web pages."""

import re
import sys
from pathlib import Path

import numpy as np

from base import InputError
from data import Dataset, ShardWriter, sources


class Synthetic(Dataset):
    """Token ids without a text."""

    @property
    def tokenizer(self):
        raise InputError("synthetic tokens have no text: expected --target-metric val_loss")

    def prefixes(self):
        """Made up: there are as many as in a real vocabulary."""
        tokens = np.arange(self.n_vocab)
        return np.where(tokens < min(256, self.n_vocab - 1), -1, tokens // 2)


def vocabulary(source, tokenizer):
    """How many tokens there are, without the data; of characters, those of Tiny Shakespeare."""
    tokenizer = sources.find(source).tokenizer or tokenizer
    bpe = re.fullmatch(r"bpe:(\d+)", tokenizer)
    if bpe:
        return int(bpe[1])
    return dict(chars=66, bytes=257, gpt2=50257)[tokenizer]


def synthetic(config, cache, n_tokens=12_000_000):
    """In place of open_dataset(): tokens that are Zipf's by rank, in a shard below `cache`."""
    n_vocab = vocabulary(config.data, config.tokenizer)
    folder = Path(cache) / f"synthetic-{n_vocab}-{n_tokens}"
    shard = folder / "train_000000.bin"
    if not shard.exists():
        r = np.random.default_rng(0)
        share = np.cumsum(1 / np.arange(3, n_vocab + 2))
        tokens = np.searchsorted(share / share[-1], r.random(n_tokens)).astype(np.uint16)
        # Lengths in GPT-2's tokens: mean 690, median 403; log-normal, whose
        # sigma^2 = 2 ln(mean / median)
        sigma = np.sqrt(2 * np.log(690 / 403))
        lengths = np.maximum(32, r.lognormal(np.log(403), sigma, n_tokens // 100)).astype(int)
        starts = np.cumsum(lengths) - lengths
        tokens[starts[starts < n_tokens]] = n_vocab - 1
        with ShardWriter(folder, "train") as writer:
            writer.write(tokens)
    return Synthetic("synthetic", [shard], [shard], n_vocab, n_vocab - 1, "synthetic", folder)


def main():
    """The trainer's door, on such tokens. Returns the exit status."""
    import train_gpt
    from runtime import corpus

    corpus.open_dataset = synthetic
    return train_gpt.main()


if __name__ == "__main__":
    sys.exit(main())
