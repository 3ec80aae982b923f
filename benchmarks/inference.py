"""Tokens/s of prefill and decode by batch and context, beside the memory's floor and others.

    ./run.sh benchmarks inference                      llama-100m in float32, bfloat16, int8, int4
    ./run.sh benchmarks inference --quick              llama-20m, fewer lengths, in a minute
    ./run.sh benchmarks inference --gguf f32.gguf q8_0.gguf   llama.cpp by xllamacpp, if installed

Weights are random: the time does not depend on them. A decoded token has to read every matrix once
for all rows of the batch, and each row's keys and values. Those bytes over the rate at which this
machine reads memory, measured in the same run, are the floor; `of floor` is floor / time. Prefill
is compared with the rate of large matrix products in its dtype. All variants take turns in one
process, with the same threads; each number is a median.
"""

import json
import statistics
import time

import torch

from benchmarks.options import COUNT
from benchmarks.report import document, number, say, table
from inference.options import use_decoding
from inference.quantize import KINDS, quantize
from models import load_template
from runtime.environment import machine_probe
from tracks import load_track

DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16)
PROFILED = 20  # tokens
READ_BYTES = 512 << 20  # of memory that the read rate is measured on


def add_arguments(parser):
    parser.option("--track", str, "llama-100m", "NAME", "whose shape the model has")
    parser.option("--batch", COUNT, (1, 8), "N", "rows that are decoded together", nargs="+")
    parser.option("--context", COUNT, (64, 1024), "N", "tokens that are there before", nargs="+")
    parser.option("--tokens", COUNT, 64, "N", "tokens that are decoded each time")
    parser.option("--repeats", COUNT, 5, "N", "measurements of each number")
    parser.option("--threads", COUNT, None, "N", "of all variants; by default PyTorch's")
    parser.option("--gguf", str, (), "FILE", "exported files for llama.cpp", nargs="+")
    parser.flag("--quick", "llama-20m, batch 1, one context, few tokens")
    parser.flag("--profile", "print what a decoded token's time goes into, for each variant")


def run(
    track="llama-100m",
    batch=(1, 8),
    context=(64, 1024),
    tokens=64,
    repeats=5,
    threads=None,
    gguf=(),
    quick=False,
    profile=False,
    save=lambda result: None,
):
    if quick:
        track, batch, context, tokens, repeats = "llama-20m", (1,), (64,), 16, 3
    if threads:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    read_rate = measure_read_rate(device)
    result = dict(
        track=track,
        threads=torch.get_num_threads(),
        instructions=torch.backends.cpu.get_cpu_capability(),
        read_bytes_per_s=read_rate,
        matmul=machine_probe(device)["matmul"],
        rows=[],
    )
    for variant in variants(track, max(context) + tokens + PROFILED, device):
        say(f"{variant.name} ...")
        for rows in batch:
            for n in context:
                measured = measure(variant, rows, n, tokens, repeats, read_rate)
                rate = result["matmul"].get(variant.matmul)
                if rate:
                    flops = measured["prefill_tokens_per_s"] * variant.flops_per_token
                    measured["of_matmul"] = flops / rate
                result["rows"].append(dict(variant=variant.name, batch=rows, context=n, **measured))
                save(result)
        if profile:
            say(profiled(variant, min(context)))
        del variant
    for path in gguf:
        result["rows"] += llama_cpp(path, context, tokens, repeats, torch.get_num_threads())
        save(result)
    return result


def measure_read_rate(device):
    """Bytes/s at which large tensors are read."""
    x = torch.ones(READ_BYTES // 4, device=device)

    def read():
        start = time.perf_counter()
        x.sum().item()
        return time.perf_counter() - start

    read()
    return READ_BYTES / min(read() for _ in range(7))


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


class Ours(Variant):
    def __init__(self, track, max_len, device, dtype, kind=None):
        fields = load_track(track)
        template = load_template(fields["template"])
        known = template.Config.__dataclass_fields__
        c = template.Config(**{k: v for k, v in fields.items() if k in known})
        self.name = kind or dtype
        self.matmul = dtype
        self.config = c
        self.n_vocab = vocabulary(fields)
        with torch.device(device):
            self.model = template.Model(c, self.n_vocab, max_len, DTYPES[dtype])
        self.model.init_weights(0)
        use_decoding(self.model, say)
        matrices = self.model.flops_per_token(c.stage(1.0, 1)) / 6
        self.flops_per_token = 2 * matrices
        self.weight_bytes = matrices * self.model.embed.element_size()
        if kind:
            self.weight_bytes = matrices * quantize(self.model, kind) / 8
        self.stage = c.stage(1.0, max_len)
        self.device = device

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

    def step(self, inputs, cache):
        logits = self.model.decode(inputs, [inputs.size(1)] * len(inputs), cache, self.stage)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return logits


class Transformers(Variant):
    """transformers' class for the same configuration: its forward() with its cache, which is what
    generate() calls for each token."""

    def __init__(self, ours):
        import transformers

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
    def prefill(self, rows, n):
        inputs = torch.randint(self.ours.n_vocab, (rows, n), device=self.ours.device)
        return self.model(inputs, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def decode(self, state):
        token = state.logits[:, -1].argmax(-1, keepdim=True)
        return self.model(token, past_key_values=state.past_key_values, use_cache=True)


def vocabulary(fields):
    """Tokens of a track's tokenizer."""
    name = fields.get("tokenizer", "gpt2")
    return int(name.partition(":")[2]) if ":" in name else 50257


def variants(track, max_len, device):
    """Yield Variants; one exists at a time, but for those that are compared."""
    for dtype in DTYPES:
        ours = Ours(track, max_len, device, dtype)
        yield ours
        try:
            yield Transformers(ours)
        except ImportError as e:
            say(f"without transformers: {e}")
    for kind in KINDS:
        yield Ours(track, max_len, device, "bfloat16", kind)


def measure(variant, rows, context, tokens, repeats, read_rate):
    """Medians of prefill and decode, and how near the floor decoding is."""
    prefills, decodes = [], []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        state = variant.prefill(rows, context)
        prefills.append(time.perf_counter() - start)
        times = []
        for _ in range(tokens):
            start = time.perf_counter()
            state = variant.decode(state)
            times.append(time.perf_counter() - start)
        decodes.append(statistics.median(times))
    prefill = statistics.median(prefills[1:])
    decode = statistics.median(decodes[1:])
    n_bytes = variant.weight_bytes + rows * variant.cache_bytes(context + tokens // 2)
    return dict(
        prefill_tokens_per_s=rows * context / prefill,
        first_token_ms=1e3 * prefill,
        decode_tokens_per_s=rows / decode,
        bytes_per_step=n_bytes,
        of_floor=n_bytes / read_rate / decode,
    )


def profiled(variant, context):
    """A table of operations for some decoded tokens."""
    state = variant.prefill(1, context)
    with torch.profiler.profile() as profile:
        for _ in range(PROFILED):
            state = variant.decode(state)
    return profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=16)


def llama_cpp(path, context, tokens, repeats, threads):
    """Rows of llama.cpp, which times itself; none where xllamacpp is not installed."""
    try:
        import xllamacpp
    except ImportError as e:
        say(f"without llama.cpp: {e}")
        return []
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = max(context) + tokens + 8
    params.cpuparams.n_threads = threads
    params.warmup = True
    server = xllamacpp.Server(params)
    rows = []
    for n in context:
        found = []
        for i in range(repeats + 1):
            prompt = [(7 * j + i) % 200 + 3 for j in range(n)]
            request = dict(prompt=prompt, n_predict=tokens, ignore_eos=True, cache_prompt=False)
            answer = server.handle_completions(request)
            answer = json.loads(answer) if isinstance(answer, str) else answer
            found.append(answer["timings"])
        rows.append(
            dict(
                variant=f"llama.cpp {path}",
                batch=1,
                context=n,
                prefill_tokens_per_s=statistics.median(t["prompt_per_second"] for t in found[1:]),
                decode_tokens_per_s=statistics.median(t["predicted_per_second"] for t in found[1:]),
            )
        )
    return rows


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
    about = (
        f"{result['track']}, {result['threads']} threads, {result['instructions']}; memory read at "
        f"{result['read_bytes_per_s'] / 1e9:.1f} GB/s"
    )
    return document(about, table(head, rows))
