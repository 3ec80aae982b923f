"""Tokenizers: seconds to learn a vocabulary, MB/s of encoding, beside tokenizers, rustbpe and
tiktoken.

Programs take turns, all on the same text and on all cores; the median of the rounds counts. The
split, qwen2's, and the size are the same for all. rustbpe is beside them where it is installed.
"""

import statistics
import time

from base import InputError
from benchmarks.dedup import documents
from benchmarks.report import document, number, say, table
from data.tokenizers import QWEN2_PATTERN, SPECIALS, n_cores, train_qwen2


def add_arguments(parser):
    parser.option("--megabytes", int, 60, "N", "text, of Python's library and installed packages")
    parser.option("--size", int, 32768, "N", "ids")
    parser.option("--repeats", int, 3, "N", "rounds")


def run(megabytes=60, size=32768, repeats=3):
    """Seconds of training by program, and MB/s of encoding by program."""
    for name, value in (("megabytes", megabytes), ("repeats", repeats)):
        if value < 1:
            raise InputError(f"--{name} {value}: expected 1 or more")
    texts = list(documents(megabytes * 1_000_000))
    n_bytes = sum(len(text.encode()) for text in texts)
    say(f"{n_bytes / 1e6:.1f} MB in {len(texts):,} texts, {n_cores()} cores")
    tokenizer = train_qwen2(iter(texts), size)
    if tokenizer.n_vocab != size:
        raise InputError(f"--size {size}: this text has pairs for {tokenizer.n_vocab} ids only")
    learn = dict(
        ours=lambda: train_qwen2(iter(texts), size),
        tokenizers=lambda: train_tokenizers(texts, size - len(SPECIALS)),
    )
    try:
        import rustbpe
    except ImportError:
        say("rustbpe is not installed: pip install rustbpe")
    else:

        def train_rustbpe():
            rustbpe.Tokenizer().train_from_iterator(
                iter(texts), size - len(SPECIALS), pattern=QWEN2_PATTERN
            )

        learn["rustbpe"] = train_rustbpe
    training = in_turns(learn, repeats)

    some = texts[: max(1, len(texts) // 3)]
    their_bpe = tokenizer._bpe
    hf = hf_of(tokenizer)
    encode = dict(
        ours=lambda: tokenizer.encode(some),
        tiktoken=lambda: their_bpe.encode_ordinary_batch(some, num_threads=n_cores()),
        tokenizers=lambda: hf.encode_batch_fast(some, add_special_tokens=False),
    )
    size_of_some = sum(len(text.encode()) for text in some)
    encoding = in_turns(encode, repeats)
    return dict(
        bytes=n_bytes,
        size=size,
        cores=n_cores(),
        training_s=training,
        encoding_mb_per_s={n: round(size_of_some / 1e6 / s, 2) for n, s in encoding.items()},
    )


def in_turns(calls, repeats):
    """{name: median seconds}; each round begins with another one."""
    seconds = {name: [] for name in calls}
    names = [*calls]
    for i in range(repeats):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            began = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - began)
            say(f"{name}: {seconds[name][-1]:.2f} s")
    return {name: round(statistics.median(values), 3) for name, values in seconds.items()}


def train_tokenizers(texts, size):
    """What someone who uses Hugging Face's library by itself would write."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    hf = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated")
    hf.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    alphabet = byte_level.alphabet()
    hf.train_from_iterator(
        iter(texts),
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False),
    )


def hf_of(tokenizer):
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer.to_json())


def render(result):
    """The result in Markdown."""
    training = result["training_s"]
    encoding = result["encoding_mb_per_s"]
    rows = []
    for name in training | encoding:
        seconds = training.get(name)
        rate = encoding.get(name)
        rows.append(
            [
                name,
                number(seconds, ".2f"),
                number(training["ours"] / seconds if seconds else None, ".2f"),
                number(rate),
                number(encoding["ours"] / rate if rate else None, ".2f"),
            ]
        )
    head = ["program", "training, s", "ours to it", "encoding, MB/s", "ours to it"]
    return document(
        f"# {result['size']:,} ids from {result['bytes'] / 1e6:.0f} MB on {result['cores']} cores",
        table(head, rows),
    )
