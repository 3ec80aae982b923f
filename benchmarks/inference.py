"""Tokens/s of prefill and decode by batch and context, beside the memory's floor and others.

    ./run.sh benchmarks inference                      llama-100m in float32, bfloat16, int8, int4
    ./run.sh benchmarks inference --quick              llama-20m, fewer lengths, in a minute
    ./run.sh benchmarks inference --llama-cpp          and llama.cpp on the same weights, exported

Weights are random: the time does not depend on them. A decoded token has to read every matrix once
for all rows of the batch, and each row's keys and values. Those bytes over the rate at which this
machine reads memory are the floor; `of floor` is floor / time. Prefill is compared with the rate of
large matrix products in its dtype. Ours are the model's own steps with the likeliest token each
time, transformers is its generate(), llama.cpp what it says of itself. Those of the same numbers,
and a reading of memory, take turns with as many threads, each in a process of its own, since two
sets of OpenMP's threads in one process slow each other down; each number is a median.
On a busy machine, --cpu-time with --threads 1 counts the seconds that the process had instead of
those that passed.
"""

import contextlib
import multiprocessing
import statistics
import time

import torch

from base import InputError
from benchmarks import llama_cpp as rival
from benchmarks.options import COUNT
from benchmarks.report import document, number, say, table
from inference.options import use_decoding
from inference.quantize import KINDS
from models import load_template
from runtime.environment import machine_probe
from tracks import load_track

DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16)
ALL = (*DTYPES, *KINDS)
GGUF = dict(float32="f32", int8="q8_0", int4="q4_0")  # what llama.cpp has of them
PROFILED = 20  # tokens
READ_BYTES = 512 << 20  # of memory that the read rate is measured on


def add_arguments(parser):
    parser.option("--track", str, "llama-100m", "NAME", "whose shape the model has")
    parser.option("--batch", COUNT, (1, 8), "N", "rows that are decoded together", nargs="+")
    parser.option("--context", COUNT, (64, 1024), "N", "tokens that are there before", nargs="+")
    parser.option("--tokens", COUNT, 64, "N", "tokens that are decoded each time")
    parser.option("--repeats", COUNT, 5, "N", "measurements of each number")
    parser.option("--threads", COUNT, None, "N", "of all variants; by default PyTorch's")
    parser.option("--kinds", str, ALL, "KIND", "of weights", nargs="+", choices=ALL)
    parser.flag("--llama-cpp", "llama.cpp beside float32 and int8, by the package xllamacpp")
    parser.flag("--no-transformers", "without transformers")
    parser.flag("--cpu-time", "by the process's own seconds, for one thread on a busy machine")
    parser.flag("--quick", "llama-20m, batch 1, one context, few tokens")
    parser.flag("--profile", "print what a decoded token's time goes into, for each variant")


def run(
    track="llama-100m",
    batch=(1, 8),
    context=(64, 1024),
    tokens=64,
    repeats=5,
    threads=None,
    kinds=ALL,
    llama_cpp=False,
    no_transformers=False,
    cpu_time=False,
    quick=False,
    profile=False,
    save=lambda result: None,
):
    if quick:
        track, batch, context, tokens, repeats = "llama-20m", (1,), (64,), 16, 3
    if threads:
        torch.set_num_threads(threads)
    if cpu_time and torch.get_num_threads() > 1:
        raise InputError("--cpu-time: expected --threads 1, of several the seconds add up")
    clock = time.process_time if cpu_time else time.perf_counter
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    instructions = {"PyTorch": torch.backends.cpu.get_cpu_capability()}
    if llama_cpp:
        instructions["llama.cpp"] = rival.instructions()
    result = dict(
        track=track,
        threads=torch.get_num_threads(),
        seconds="of the process" if cpu_time else "that passed",
        instructions=instructions,
        matmul=machine_probe(device)["matmul"],
        rows=[],
    )
    max_len = max(context) + tokens + PROFILED
    for kind in kinds:
        say(f"{kind} ...")
        shape = track, max_len, device, kind
        makers = [Ours]
        if kind in DTYPES and not no_transformers:
            makers.append(Transformers)
        if llama_cpp and kind in GGUF:
            makers.append(rival_of)
        with side_by_side(makers, shape) as variants:
            for rows in batch:
                for n in context:
                    for variant, measured in measure(variants, rows, n, tokens, repeats, clock):
                        rate = result["matmul"].get(variant.matmul)
                        if rate:
                            flops = measured["prefill_tokens_per_s"] * variant.flops_per_token
                            measured["of_matmul"] = flops / rate
                        about = dict(variant=variant.name, batch=rows, context=n)
                        result["rows"].append(about | measured)
                    save(result)
            if profile:
                say(variants[0].profiled(min(context)))
    return result


@contextlib.contextmanager
def side_by_side(makers, shape):
    """Variants of a shape, each in a process of its own where there are several; one that needs a
    package that is not here is left out."""
    if len(makers) == 1:
        yield [makers[0](*shape)]
        return
    variants = []
    try:
        for make in makers:
            variants.append(Apart(make, shape))
        yield [v for v in variants if v.there()]
    finally:
        for variant in variants:
            variant.end()


class Apart:
    """A Variant in a process of its own."""

    def __init__(self, make, shape):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        args = theirs, make, shape, torch.get_num_threads()
        self.process = context.Process(target=answer, args=args, daemon=True)
        self.process.start()
        theirs.close()

    def there(self):
        """Whether it could be made; what it says of itself is known then. Raises InputError."""
        said = self.pipe.recv()
        if isinstance(said, ImportError):
            say(f"without transformers: {said}")
            return False
        if isinstance(said, InputError):
            raise said
        vars(self).update(said)
        return True

    def call(self, name, *args):
        self.pipe.send((name, *args))
        return self.pipe.recv()

    def read_rate(self, *args):
        return self.call("read_rate", *args)

    def cache_bytes(self, n):
        return self.call("cache_bytes", n)

    def timed(self, *args):
        return self.call("timed", *args)

    def profiled(self, context):
        return self.call("profiled", context)

    def end(self):
        self.pipe.close()
        self.process.join()


def answer(pipe, make, shape, threads):
    """Be a Variant for another process, until it closes its end of the pipe."""
    torch.set_num_threads(threads)
    try:
        variant = make(*shape)
    except (ImportError, InputError) as e:
        pipe.send(e)
        return
    names = "name", "matmul", "flops_per_token", "weight_bytes"
    pipe.send({name: getattr(variant, name) for name in names})
    while True:
        try:
            name, *args = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(variant, name)(*args))


def rival_of(track, max_len, device, kind):
    """llama.cpp on our weights."""
    ours = Ours(track, max_len, device, kind if kind in DTYPES else "float32")
    return rival.beside(ours, GGUF[kind], max_len, torch.get_num_threads())


class Variant:
    """A model that reads a prompt and then decodes a token at a time."""

    name = ""
    matmul = ""  # the dtype whose rate of products it is compared with
    flops_per_token = 0.0
    weight_bytes = 0  # read for a token

    def prefill(self, rows, n):
        """Read n tokens in each of so many rows. Returns what decode() goes on from."""

    def decode(self, state):
        """One token more in each row."""

    def cache_bytes(self, n):
        """Of the keys and values of a row with n tokens."""

    def timed(self, rows, context, tokens, clock):
        """(seconds of prefill, of a decoded token) by a clock; None where it cannot do that."""
        start = clock()
        state = self.prefill(rows, context)
        prefill = clock() - start
        times = []
        for _ in range(tokens):
            start = clock()
            state = self.decode(state)
            times.append(clock() - start)
        return prefill, statistics.median(times)


class Ours(Variant):
    def __init__(self, track, max_len, device, kind):
        dtype = kind if kind in DTYPES else "bfloat16"
        fields = load_track(track)
        template = load_template(fields["template"])
        known = template.Config.__dataclass_fields__
        c = template.Config(**{k: v for k, v in fields.items() if k in known})
        self.name = kind
        self.matmul = dtype
        self.config = c
        self.n_vocab = vocabulary(fields)
        with torch.device(device):
            self.model = template.Model(c, self.n_vocab, max_len, DTYPES[dtype])
        self.model.init_weights(0)
        matrices = self.model.flops_per_token(c.stage(1.0, 1)) / 6
        self.flops_per_token = 2 * matrices
        self.weight_bytes = matrices * self.model.embed.element_size()
        bits = use_decoding(self.model, say, kind if kind in KINDS else None)
        if bits is not None:
            self.weight_bytes = matrices * bits / 8
        self.stage = c.stage(1.0, max_len)
        self.device = device
        self.large = None  # to be read

    def read_rate(self, clock):
        """Of a large tensor: bytes/s of memory, in large pages where the weights are in such."""
        if self.large is None:
            self.large = torch.ones(READ_BYTES // 4, device=self.device)
            if self.model.ops.decoding:
                self.model.ops.decoding.in_large_pages([self.large])
        start = clock()
        self.large.sum().item()
        return READ_BYTES / (clock() - start)

    def cache_bytes(self, n):
        c = self.config
        return 2 * c.n_layer * c.kv_heads * c.head_dim * n * self.element_size

    @property
    def element_size(self):
        return torch.finfo(self.model.dtype).bits // 8

    @torch.inference_mode()
    def prefill(self, rows, n):
        inputs = torch.randint(self.n_vocab, (rows, n), device=self.device)
        cache = self.model.new_cache(rows)
        return self.step(inputs, cache), cache

    @torch.inference_mode()
    def decode(self, state):
        logits, cache = state
        return self.step(logits.argmax(-1, keepdim=True), cache), cache

    def profiled(self, context):
        """A table of operations for some decoded tokens."""
        state = self.prefill(1, context)
        with torch.profiler.profile() as profile:
            for _ in range(PROFILED):
                state = self.decode(state)
        return profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=16)

    def step(self, inputs, cache):
        logits = self.model.decode(inputs, [inputs.size(1)] * len(inputs), cache, self.stage)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return logits


class Transformers(Variant):
    """transformers' class for the same configuration, by its generate() with its cache."""

    def __init__(self, *shape):
        import transformers

        ours = Ours(*shape)
        c = ours.config
        config = transformers.AutoConfig.for_model(
            **dict(c.hf_config(1.0), vocab_size=ours.n_vocab, max_position_embeddings=8192)
        )
        self.name = f"transformers {ours.name}"
        self.matmul = ours.matmul
        self.ours = ours
        self.flops_per_token = ours.flops_per_token
        self.weight_bytes = ours.weight_bytes
        self.model = transformers.AutoModelForCausalLM.from_config(config)
        self.model = self.model.to(ours.device, DTYPES[ours.matmul]).eval()

    def cache_bytes(self, n):
        return self.ours.cache_bytes(n)

    @torch.inference_mode()
    def timed(self, rows, context, tokens, clock):
        inputs = torch.randint(self.ours.n_vocab, (rows, context), device=self.ours.device)
        seconds = []
        for n in 1, tokens + 1:
            start = clock()
            self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=n,
                min_new_tokens=n,
                do_sample=False,
                pad_token_id=0,
            )
            seconds.append(clock() - start)
        return seconds[0], (seconds[1] - seconds[0]) / tokens


def vocabulary(fields):
    """Tokens of a track's tokenizer."""
    name = fields.get("tokenizer", "gpt2")
    return int(name.partition(":")[2]) if ":" in name else 50257


def measure(variants, rows, context, tokens, repeats, clock):
    """(variant, medians of its prefill and decode and how near the floor decoding is) of each that
    can do so many rows."""
    rates = []
    found = [[] for _ in variants]
    for _ in range(repeats + 1):  # the first one warms up
        for times, variant in zip(found, variants):
            times.append(variant.timed(rows, context, tokens, clock))
            rates.append(variants[0].read_rate(clock))
    read_rate = statistics.median(rates)
    for times, variant in zip(found, variants):
        if times[0] is None:
            continue
        prefill, decode = (statistics.median(part) for part in zip(*times[1:]))
        n_bytes = variant.weight_bytes + rows * variant.cache_bytes(context + tokens // 2)
        measured = dict(
            prefill_tokens_per_s=rows * context / prefill,
            first_token_ms=1e3 * prefill,
            decode_tokens_per_s=rows / decode,
            bytes_per_step=n_bytes,
            read_bytes_per_s=read_rate,
            of_floor=n_bytes / read_rate / decode,
        )
        yield variant, measured


def render(result):
    head = ["variant", "batch", "context", "prefill tokens/s", "of matmul", "first token ms"]
    head += ["decode tokens/s", "MB a step", "of floor"]
    rows = []
    for r in result["rows"]:
        rows.append(
            [r["variant"], r["batch"], r["context"], number(r["prefill_tokens_per_s"], ",.0f")]
            + [number(r.get("of_matmul"), ".0%"), number(r.get("first_token_ms"), ",.1f")]
            + [number(r["decode_tokens_per_s"], ",.1f")]
            + [number(r["bytes_per_step"] / 1e6 if "bytes_per_step" in r else None, ",.1f")]
            + [number(r.get("of_floor"), ".0%")]
        )
    uses = "; ".join(f"{who}: {what}" for who, what in result["instructions"].items())
    rates = [r["read_bytes_per_s"] / 1e9 for r in result["rows"]]
    about = (
        f"{result['track']}, {result['threads']} threads, seconds {result['seconds']}; {uses}; "
        f"memory read at {min(rates):.1f} to {max(rates):.1f} GB/s"
    )
    return document(about, table(head, rows))
