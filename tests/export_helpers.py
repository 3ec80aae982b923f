"""Runs to export, and what their own models say, for tests/export."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from helpers import ROOT, model_fields
from safetensors.torch import load_file, save_file

import train_gpt as tg
from data import ShardWriter
from data.tokenizers import train_qwen2
from export.__main__ import main as export_main
from kernels import choose_ops
from models import gpt, llama
from models.counts import Counts
from records.source import source_of
from runtime.checkpoints import Checkpoints
from runtime.log import Log
from runtime.options import flat
from runtime.saved import TABLES, load_run

LLAMA = dict(
    template="llama",
    n_layer=2,
    n_embd=64,
    n_head=4,
    n_kv_head=2,
    head_dim=16,
    ffn_dim=96,
    row_len=64,
    val_row_len=64,
    batch_tokens=(64,),
)


def qwen2(n_vocab):
    """A Tokenizer that others have words for, learned from some source of ours; its last 8 tokens
    are special."""
    return train_qwen2([(ROOT / "train_gpt.py").read_text()], n_vocab)


def random_model(config, n_vocab, size=0.1, dtype=torch.float32):
    """A template's Model with every parameter random, so that nothing is hidden behind a zero."""
    template = llama if config.goal.template == "llama" else gpt
    model = template.Model(config.model, n_vocab, 64, dtype, choose_ops("cpu"))
    model.init_weights(0)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * torch.randn(p.shape, generator=g))
    return model


def make_run(folder, config, model, step=7, checkpoint=None, tokenizer=None):
    """A finished run's folder, and with `checkpoint` a folder with one, of random masters."""
    options = flat(config)
    tokens = dict(n_vocab=tokenizer.n_vocab) if tokenizer else {}
    with Log(folder, 20) as log:
        source = source_of({"train_gpt.py": b"the source"})
        environment = dict(git_commit="abc")
        log.header(source, environment=environment, config=options, data="f00d", **tokens)
        log.save_weights({name: p.detach() for name, p in model.named_parameters()})
        log.finish(dict(steps=step))
    if tokenizer:
        (folder / "tokenizer.json").write_text(tokenizer.to_json())
    if checkpoint is not None:
        tensors = {
            f"{kind}/{name}": t for kind in ("weights", "m", "v") for name, t in checkpoint.items()
        }
        meta = dict(config=options, data_fingerprint="f00d", progress=dict(step=step))
        assert Checkpoints(folder / "checkpoints").save(step, tensors, meta, wait=True)
    return folder


def gpt_run(folder, tokenizer, dtype=torch.float32, **fields):
    rows = dict(row_len=64, val_row_len=64, batch_tokens=(64,))
    config = tg.configure(**(model_fields() | rows | fields))
    run = make_run(
        folder, config, random_model(config, tokenizer.n_vocab, dtype=dtype), tokenizer=tokenizer
    )
    if config.model.counts:
        save_file(some_counts(tokenizer, config.model.counts).tables(), run / TABLES)
    return run


def some_counts(tokenizer, n):
    """Counts of a text that repeats itself."""
    parts = (ROOT / "train_gpt.py").read_text().split("\n\n")[:60]
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(folder, "train") as writer:
            for ids in tokenizer.encode(parts):
                writer.write(np.array([tokenizer.eot, *ids]))
        return Counts.of_text(writer.paths, tokenizer.eot, n)


def llama_run(folder, tokenizer, dtype=torch.float32, **fields):
    config = tg.configure(**(LLAMA | fields))
    return make_run(
        folder, config, random_model(config, tokenizer.n_vocab, dtype=dtype), tokenizer=tokenizer
    )


def export(capsys, run, form, out, *more):
    """(exit status, stdout, stderr) of ./run.sh export."""
    capsys.readouterr()
    status = export_main(["--run", *map(str, (run, "--to", form, *more, out))])
    return status, *capsys.readouterr()


def refused(result, out, *said):
    """One line on stderr with these words, status 2, and nothing left of `out`."""
    status, stdout, err = result
    assert (status, stdout) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, (
        result
    )
    assert all(str(words) in err for words in said), err
    assert not out.exists()
    assert not list(out.parent.glob("*.tmp"))


class Ours:
    """A run's model in fp32."""

    def __init__(self, run, tmp_path):
        run = Path(run)
        copy = tmp_path / f"{run.name}-fp32"
        copy.mkdir()
        for name in "config.json", "result.json", "tokenizer.json":
            shutil.copy(run / name, copy / name)
        if (run / TABLES).exists():
            shutil.copy(run / TABLES, copy / TABLES)
        weights = load_file(run / "model.safetensors")
        save_file({name: w.float() for name, w in weights.items()}, copy / "model.safetensors")
        self.saved = load_run(copy)
        self.tokenizer = self.saved.tokenizer

    def ids(self, text):
        return [self.tokenizer.eot, *map(int, self.tokenizer.encode([text])[0])]

    @torch.inference_mode()
    def logits(self, inputs):
        """(B, T, n_vocab) of rows that are a document each."""
        B, T = inputs.shape
        starts = torch.arange(0, (B + 1) * T, T, dtype=torch.int32)
        return self.saved.model.logits(inputs, starts, self.saved.stage)

    @torch.inference_mode()
    def greedy(self, prompt, n_tokens, never=None):
        """The likeliest tokens that follow, whatever ends a text; never: tokens to leave out."""
        model = self.saved.model
        cache = model.new_cache(1)
        new = prompt
        written = []
        while len(written) < n_tokens:
            logits = model.decode(torch.tensor([new]), [len(new)], cache, self.saved.stage)
            if never is not None:
                logits[0, never] = -torch.inf
            new = [int(logits[0].argmax())]
            written += new
        return written

    def reference(self, file, n_tokens, n_prompts, length=48, **more):
        """Write what in_transformers.py compares with; returns it."""
        text = (ROOT / "door.py").read_text()
        ids = self.ids(text)
        inputs = torch.tensor([ids[:length], [ids[0], *ids[99 : 99 + length - 1]]])
        prompts = [[ids[0], *ids[1 + 7 * i : 4 + 8 * i]] for i in range(n_prompts)]
        said = dict(
            text=text[:500],
            ids=self.ids(text[:500]),
            inputs=inputs.tolist(),
            logits=self.logits(inputs).tolist(),
            prompts=prompts,
            written=[self.greedy(prompt, n_tokens) for prompt in prompts],
            n_tokens=n_tokens,
            **more,
        )
        file.write_text(json.dumps(said))
        return said
