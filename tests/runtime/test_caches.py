"""What is compiled once is not compiled again: a second process finds every graph in the cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import THREE_LAYERS, options, tiny

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, os, sys
import train_gpt
from torch._dynamo.utils import counters
assert train_gpt.main(sys.argv[1:]) == 0
found = {}
for room, words in dict(aot_autograd="autograd_cache", inductor="fxgraph_cache").items():
    for word in "hit", "miss", "bypass":
        found[f"{room}_{word}"] = counters[room][f"{words}_{word}"]
print(json.dumps(found))
"""
# What has a place of its own unless it is told
CACHES = (
    "TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR FLASH_ATTENTION_CUTE_DSL_CACHE_DIR "
    "TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD"
).split()


SMALL = """
import json, sys, torch
from kernels import embedding
from runtime import machine
machine.choose_compile_cache(sys.argv[1])
w = torch.randn(64, 16, requires_grad=True)
f = torch.compile(lambda i: embedding(i, w).square().sum(), fullgraph=True)
f(torch.arange(32).view(2, 16)).backward()
""" + PROGRAM[PROGRAM.index("from torch._dynamo") :].replace(
    "assert train_gpt.main(sys.argv[1:]) == 0\n", ""
)


def run(program, *argv):
    env = {name: value for name, value in os.environ.items() if name not in CACHES}
    command = [sys.executable, "-c", program, *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.compiles
def test_a_graph_with_an_autograd_function_of_ours_is_found_again(tmp_path):
    first = run(SMALL, tmp_path)
    assert first["aot_autograd_miss"] == 1 and first["aot_autograd_bypass"] == 0
    second = run(SMALL, tmp_path)
    assert second["aot_autograd_hit"] == 1
    assert not any(n for name, n in second.items() if not name.endswith("hit"))


@pytest.mark.slow
@pytest.mark.compiles
def test_a_second_start_compiles_nothing(text, tmp_path):
    """Graphs with autograd functions of ours (embedding, head) in training, validation, optimizer:
    0 misses and 0 bypasses in AOTAutograd's cache and in Inductor's."""

    def start(name):
        fields = THREE_LAYERS | dict(n_head=4, n_gram=2, ngram_rows=64, smear=True, steps=4)
        config = tiny(text, tmp_path, run_dir=str(tmp_path / name), compile=True, **fields)
        return run(PROGRAM, *options(config))

    first = start("first")
    assert first["aot_autograd_miss"] >= 2 and first["aot_autograd_bypass"] == 0
    second = start("second")
    assert second == dict.fromkeys(second, 0) | dict(
        aot_autograd_hit=first["aot_autograd_hit"] + first["aot_autograd_miss"],
        inductor_hit=second["inductor_hit"],
    )
