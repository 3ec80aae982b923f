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


def on_fake_cuda(script, tmp_path, timeout):
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
        [sys.executable, str(HERE / script), str(library)],
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
            assert of_stage["ours"] == dict(symmetric_matmul=2 * 3 * 10)
            expected = collections.Counter()
            ranks = int(where.split(" of ")[1])
            tied = tg.stage_at(config, of_stage["step"]).model.tied
            touched = dict.fromkeys(("ngram_embeds", "value_embeds"), result["rows"] * 768 * 2)
            exchanged = cluster.collectives_of(
                subject.Settings(config), parameters, ranks, ranks, tied, touched
            )
            for x in exchanged[:-1] if ranks > 1 else ():  # the last is the guard's report
                expected[x.kind] += x.bytes * 2 / x.every
            assert of_stage["exchanged"] == expected


def test_inductor_generates_the_trainers_code_for_hopper(tmp_path):
    """Of the first stage, forward and backward in FP8, in one graph each and for the GPU alone; all
    its Triton kernels are assembled for an H100, in every configuration that Inductor would try
    there, and none keeps registers in memory. Found were 96 and 91 kernels in 102 and 183 launches,
    and 33 and 98 products by cuBLAS."""
    found = on_fake_cuda("on_fake_hopper.py", tmp_path, timeout=1800)
    assert found["graph_breaks"] == 0 and found["targets"] == ["sm_90a"]
    weights, forward, backward = found["graphs"]
    assert (weights["launches"], weights["products"]) == (4, 0)  # copies in FP8
    assert not forward["backward"] and backward["backward"]
    for graph in found["graphs"]:
        assert graph["elsewhere"] == 0 and graph["assembled"] == graph["kernels"]
    # A part that no longer joins its neighbours shows here: it is there in every layer
    assert 80 <= forward["launches"] <= 106 and forward["products"] <= 35
    assert 150 <= backward["launches"] <= 190 and backward["products"] <= 102
    ops = {name.removeprefix("stopwatch."): n for name, n in forward["ops"].items()}
    assert (ops["flash_attn_4"], ops["qk_norm_rope"], ops["fp8_relu2_mlp"]) == (10, 10, 11)
    assert all(name.startswith("stopwatch.") for name in forward["ops"] | backward["ops"])

    kernels = found["kernels"]
    assert len(kernels) == found["tried"] > 300
    assert max(kernel["spilled"] for kernel in kernels) == 0
    assert max(kernel["registers"] for kernel in kernels) <= 168
