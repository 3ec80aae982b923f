"""llama.cpp, by the xllamacpp wheel, on a model of ours that our own exporter wrote for it.

It times itself: what its server says of reading a prompt and of generating, without HTTP. Tokens
are the likeliest ones and no other sampler is on. Which instructions its build uses is what it says
itself; the wheel's go no further than AVX2.
"""

import json
import tempfile
import time
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

from base import InputError, to_json
from data.tokenizers import QWEN2_PATTERN, Tokenizer
from export import gguf, source


def instructions():
    """Those that llama.cpp's build uses, as it prints them. Raises InputError without xllamacpp."""
    try:
        import xllamacpp
    except ImportError as e:
        raise InputError(
            f"--llama-cpp: {e}; install it with .venv/bin/python -m pip install xllamacpp gguf"
        ) from None
    said = xllamacpp.get_system_info().partition(":")[2]
    return " ".join(part.split("=")[0].strip() for part in said.split("|") if "= 1" in part)


def export(ours, max_len, kind, folder):
    """Write a benchmark's model as a GGUF of a kind. Returns its path."""
    run = Path(folder, "run")
    if not run.exists():
        run.mkdir()
        n_vocab = ours.n_vocab
        fields = {name: value for name, value in vars(ours.config).items()}
        fields |= dict(template="llama", row_len=max_len, val_row_len=max_len, steps=1, extension=0)
        (run / "config.json").write_text(to_json(dict(config=fields, n_vocab=n_vocab)))
        (run / "result.json").write_text(to_json(dict(steps=1)))
        (run / "tokenizer.json").write_text(made_up(n_vocab).to_json())
        weights = {name: p.detach().contiguous() for name, p in ours.model.named_parameters()}
        save_file(weights, run / "model.safetensors")
    path = Path(folder, f"{kind}.gguf")
    exported = source.open_source(run)
    args = types.SimpleNamespace(type=kind)
    gguf.check(exported, args)
    gguf.write(exported, path, args)
    return path


def made_up(n_vocab):
    """A Tokenizer of so many tokens: bytes and pairs of bytes, for llama.cpp wants to see one."""
    one = [bytes([i]) for i in range(256)]
    two = [a + b for a in one for b in one]
    return Tokenizer("bpe", [*one, *two][: n_vocab - 1], QWEN2_PATTERN)


class LlamaCpp:
    """A Variant of inference.py."""

    matmul = ""
    flops_per_token = 0.0

    def __init__(self, path, name, ours, max_len, threads):
        import xllamacpp

        self.name = name
        self.n_vocab = ours.n_vocab
        self.weight_bytes = Path(path).stat().st_size
        self.ours = ours
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = max_len
        params.verbosity = 0
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(params)

    def cache_bytes(self, n):
        c = self.ours.config
        return 2 * c.n_layer * c.kv_heads * c.head_dim * n * 2  # its keys and values are fp16

    def timed(self, rows, context, tokens, clock):
        """(seconds of prefill, of a decoded token); None for more than one row."""
        if rows > 1:
            return None
        prompt = torch.randint(1, self.n_vocab - 1, (context,)).tolist()
        if clock is time.perf_counter:
            timings = self.answer(prompt, tokens)["timings"]
            return 1 / timings["prompt_per_second"] * context, 1 / timings["predicted_per_second"]
        seconds = []
        for n in 1, tokens + 1:
            start = clock()
            self.answer(prompt, n)
            seconds.append(clock() - start)
        return seconds[0], (seconds[1] - seconds[0]) / tokens

    def answer(self, prompt, tokens):
        """What its server says of so many of the likeliest tokens."""
        request = dict(
            prompt=prompt,
            n_predict=tokens,
            temperature=0,
            samplers=["top_k"],
            top_k=1,
            ignore_eos=True,
            cache_prompt=False,
        )
        said = self.server.handle_completions(request)
        return json.loads(said) if isinstance(said, str) else said


def beside(ours, kind, max_len, threads):
    """A LlamaCpp of the same weights, in a kind of GGUF."""
    with tempfile.TemporaryDirectory() as aside:
        path = export(ours, max_len, kind, aside)
        return LlamaCpp(path, f"llama.cpp {kind}", ours, max_len, threads)
