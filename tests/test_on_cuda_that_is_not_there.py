"""gpt2-small's stages traced on fake CUDA tensors, at full shape, where there is no GPU: passes and
the optimizer's steps; and what Inductor generates for them."""

import collections
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_gpt as tg
from benchmarks import cluster, subject
from tracks import load_track

HERE = Path(__file__).resolve().parent


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="PyTorch believes in CUDA by C++"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA of its own"),
]


def on_fake_cuda(script, tmp_path, timeout, *argv):
    """What a script prints, which is JSON, in a process that has a CUDA device to trace for."""
    package = Path(torch.__file__).parent
    library = tmp_path / "fake_cuda.so"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{package / 'include'}"]
    command += [str(HERE / "fake_cuda.cpp"), "-o", str(library), f"-L{package / 'lib'}"]
    command += ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{package / 'lib'}"]
    subprocess.run(command, check=True, timeout=300)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (HERE.parent, HERE)))
    env["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / "inductor")  # not for PyTorch as it is
    done = subprocess.run(
        [sys.executable, str(HERE / script), str(library), *argv],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_stage_takes_its_steps_on_fake_cuda_tensors(tmp_path):
    """With an H100's kernels: nothing of a step is computed on the CPU in between, every layer has
    its kernels, and each parameter in use gets a gradient of its shape. The optimizer's step as
    well, alone and on ranks of eight, which exchange what the cluster model says, of tables the
    rows that are touched, and ask the device for no number."""
    result = on_fake_cuda("on_fake_cuda.py", tmp_path, timeout=600)
    *stages, validation = result["passes"]
    assert len(stages) >= 3
    for found in stages:
        ours = found["ours"]
        for name, layers in dict(flash_attn_4=10, qk_norm_rope=10, relu2_mlp=11).items():
            assert ours[name] == ours[f"{name}_backward"] == layers
        assert ours["linear_cross_entropy"] == ours["linear_cross_entropy_backward"] == 1
        assert found["elsewhere"] == [], found["step"]
        assert set(found["without"]) <= {"embed"}
    assert stages[0]["without"] == ["embed"] and stages[-1]["without"] == []  # tied, then not
    assert validation["ours"]["flash_attn_4"] == 10 and validation["elsewhere"] == []

    assert len(result["steps"]) == 3
    config = tg.configure(**load_track("gpt2-small"))
    parameters = subject.parameters(subject.Settings(config), 50257)
    for where, steps in result["steps"].items():
        assert len(steps) == len(stages)
        for of_stage in steps:
            assert of_stage["elsewhere"] == []
            # Of pairs of heads, of values and outputs, of MLPs: ten a step, in two steps
            tied = tg.stage_at(config, of_stage["step"]).model.tied
            # In one of them Adam's gradients wait, if the step counts
            waiting = [p for p in parameters if p.count and p.every == 2]
            waiting = [p for p in waiting if subject.has_gradient(p.name, config.model, tied)]
            calls = dict(symmetric_matmul=2 * 3 * 10, clear_unless=len(waiting))
            assert of_stage["ours"] == calls
            expected = collections.Counter()
            ranks = int(where.split(" of ")[1])
            touched = dict.fromkeys(("ngram_embeds", "value_embeds"), result["rows"] * 768 * 2)
            exchanged = cluster.collectives_of(
                subject.Settings(config), parameters, ranks, ranks, tied, touched
            )
            for x in exchanged[:-1] if ranks > 1 else ():  # the last is the guard's report
                expected[x.kind] += x.bytes * 2 / x.every
            assert of_stage["exchanged"] == expected


# --- What Inductor generates


def check_kernels(found):
    """All for the GPU alone, in whole graphs; every configuration that Inductor would try there is
    assembled for an H100, and none keeps registers in memory."""
    assert found["graph_breaks"] == 0 and found["targets"] == ["sm_90a"]
    assert found["timed"] == []  # products, with padding and without
    for graph in found["graphs"]:
        assert graph["elsewhere"] == 0 and graph["assembled"] == graph["kernels"]
    kernels = found["kernels"]
    assert len(kernels) == found["tried"]
    assert max(kernel["spilled"] for kernel in kernels) == 0
    assert max(kernel["registers"] for kernel in kernels) <= 168
    assert max(kernel["shared"] for kernel in kernels) <= 232_448


def ours(graph):
    assert all(name.startswith("stopwatch.") for name in graph["ops"])
    return {name.removeprefix("stopwatch."): n for name, n in graph["ops"].items()}


@pytest.mark.parametrize("step", [1, 445, 888])
def test_inductor_generates_the_trainers_code_for_hopper(step, tmp_path):
    """Of each stage, forward and backward in FP8, in one graph each, with the rows of one of eight
    GPUs. The extension differs from the last stage in nothing but windows."""
    found = on_fake_cuda("on_fake_hopper.py", tmp_path, 1800, str(step))
    check_kernels(found)
    assert len(found["kernels"]) > 300
    weights, forward, backward = found["graphs"]
    assert (weights["launches"], weights["products"]) == (4, 0)  # copies in FP8
    assert not forward["backward"] and backward["backward"]
    # A part that no longer joins its neighbours shows here: it is there in every layer
    assert 80 <= forward["launches"] <= 106 and forward["products"] <= 35
    assert 150 <= backward["launches"] <= 198 and backward["products"] <= 102
    layers = dict(flash_attn_4=10, qk_norm_rope=10, fp8_relu2_mlp=11)
    # Activations are quantised by the kernels that make them
    assert ours(forward) == layers | dict(amax=1, linear_cross_entropy=1)
    assert "linear_cross_entropy_backward" in ours(backward)
    # No sums in fp32 for all of the n-grams' rows
    for kernel in backward["most_bytes"]:
        assert not [x for x in kernel["out"] if "float32" in x and "[377280, 768]" in x]


def test_validations_code_for_hopper(tmp_path):
    """A row of 262,144 tokens, in bf16."""
    found = on_fake_cuda("on_fake_hopper.py", tmp_path, 1800, "validation")
    check_kernels(found)
    [graph] = found["graphs"]
    assert graph["launches"] <= 132 and graph["products"] <= 35
    # The head takes 8,192 tokens at a time
    expected = dict(flash_attn_4=10, qk_norm_rope=10, relu2_mlp=11, linear_cross_entropy=32)
    assert ours(graph) == expected


@pytest.mark.parametrize("rank, ranks", [(0, 1), (0, 8)])
def test_the_optimizers_code_for_hopper(rank, ranks, tmp_path):
    """What updates and the guard's report have compiled, and all else that two steps launch; Adam
    takes its turn in one of them."""
    found = on_fake_cuda("on_fake_hopper.py", tmp_path, 1800, f"step-{rank}-of-{ranks}")
    check_kernels(found)
    graphs = found["graphs"]
    assert len(graphs) <= 24 and sum(graph["launches"] for graph in graphs) <= 70
    for graph in graphs:
        assert graph["products"] == 0 and not graph["ops"]
    calls = found["eager"]
    assert calls["stopwatch.symmetric_matmul.default"] == 2 * 3 * 10
    assert calls["aten.bmm.default"] == 2 * 3 * 5
    assert calls["stopwatch.clear_unless.default"] == found["compiled"]["adam_update"]
    assert "aten.masked_fill_.Scalar" not in calls  # which would pass over all that waits


def test_stages_compile_a_graph_each_and_validation_one(tmp_path):
    """Traced in turn, each stage brings a forward and a backward graph, and the first one
    validation's; those of the MLPs' FP8 weights as well. When they come again, there is nothing to
    compile."""
    found = on_fake_cuda("on_fake_hopper.py", tmp_path, 1800, "stages")
    assert found["graph_breaks"] == 0
    n = len(found["stages"]) // 2
    assert n == 4
    brought = [stage["backward"] for stage in found["stages"]]
    assert brought == [[False, False, True, False], *[[False, True]] * (n - 1), *[[]] * n]
