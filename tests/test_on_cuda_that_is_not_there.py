"""gpt2-small's stages traced on fake CUDA tensors, at full shape, where there is no GPU: passes and
the optimizer's steps."""

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


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="a C++ compiler makes PyTorch believe in CUDA")
@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch has CUDA of its own")
def test_every_stage_takes_its_steps_on_fake_cuda_tensors(tmp_path):
    """With an H100's kernels: nothing of a step is computed on the CPU in between, every layer has
    its kernels, and each parameter in use gets a gradient of its shape. The optimizer's step as
    well, alone and on ranks of eight, which exchange what the cluster model says."""
    package = Path(torch.__file__).parent
    library = tmp_path / "fake_cuda.so"
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{package / 'include'}"]
    command += [str(HERE / "fake_cuda.cpp"), "-o", str(library), f"-L{package / 'lib'}"]
    command += ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{package / 'lib'}"]
    subprocess.run(command, check=True, timeout=300)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (HERE.parent, HERE)))
    done = subprocess.run(
        [sys.executable, str(HERE / "on_fake_cuda.py"), str(library)],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
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
            exchanged = cluster.collectives_of(
                subject.Settings(config), parameters, ranks, ranks, tied
            )
            for x in exchanged[:-1] if ranks > 1 else ():  # the last is the guard's report
                expected[x.kind] += x.bytes * 2 / x.every
            assert of_stage["exchanged"] == expected
