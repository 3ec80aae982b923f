"""Tokenizers: seconds to learn a vocabulary, MB/s of encoding, beside tokenizers, rustbpe and
tiktoken.

Programs take turns, all on the same text and on all cores; the median of the rounds counts. The
split, qwen2's, and the size are the same for all. CPU seconds are beside the seconds, since those
of a machine that has other work to do say little.
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
        rustbpe=lambda: train_rustbpe(texts, size - len(SPECIALS)),
        tokenizers=lambda: train_tokenizers(texts, size - len(SPECIALS)),
    )
    training, training_cpu = in_turns(learn, repeats)

    some = texts[: max(1, len(texts) // 3)]
    their_bpe = tokenizer._bpe
    hf = hf_of(tokenizer)
    encode = dict(
        ours=lambda: tokenizer.encode(some),
        tiktoken=lambda: their_bpe.encode_ordinary_batch(some, num_threads=n_cores()),
        tokenizers=lambda: hf.encode_batch_fast(some, add_special_tokens=False),
    )
    mb = sum(len(text.encode()) for text in some) / 1e6
    encoding, encoding_cpu = in_turns(encode, repeats)
    return dict(
        bytes=n_bytes,
        size=size,
        cores=n_cores(),
        training_s=training,
        training_cpu_s=training_cpu,
        encoding_mb_per_s={name: round(mb / s, 2) for name, s in encoding.items()},
        encoding_mb_per_cpu_s={name: round(mb / s, 2) for name, s in encoding_cpu.items()},
    )


def in_turns(calls, repeats):
    """({name: median seconds}, {name: median CPU seconds}); each round begins with another one."""
    names = [*calls]
    seconds = {name: [] for name in names}
    cpu = {name: [] for name in names}
    for i in range(repeats):
        at = i % len(names)
        for name in names[at:] + names[:at]:
            began = time.perf_counter(), time.process_time()
            calls[name]()
            seconds[name].append(time.perf_counter() - began[0])
            cpu[name].append(time.process_time() - began[1])
            say(f"{name}: {seconds[name][-1]:.2f} s, {cpu[name][-1]:.2f} of CPU")
    median = statistics.median
    return tuple({n: round(median(v), 3) for n, v in of.items()} for of in (seconds, cpu))


def train_rustbpe(texts, size):
    import rustbpe

    rustbpe.Tokenizer().train_from_iterator(iter(texts), size, pattern=QWEN2_PATTERN)


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
        learned = [training.get(name), result["training_cpu_s"].get(name)]
        written = [encoding.get(name), result["encoding_mb_per_cpu_s"].get(name)]
        rows.append([name, *(number(x, ".2f") for x in learned), *map(number, written)])
    head = ["program", "training, s", "CPU s", "encoding, MB/s", "MB/CPU s"]
    return document(
        f"# {result['size']:,} ids from {result['bytes'] / 1e6:.0f} MB on {result['cores']} cores",
        table(head, rows),
    )
