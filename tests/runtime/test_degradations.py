"""What a machine lacks that a record needs is refused or said before the clock, with what is lost
and what to do."""

import types

import pytest
import torch

import train_gpt as tg
from base import InputError
from data.loader import default_max_docs, pack
from runtime import compiling, launch, machine, workers
from runtime.machine import World
from runtime.setting_up import attention_shapes
from runtime.steps import refuse_other_weights
from tracks import load_track

SMALL = dict(steps=2)
CUDA = World(device=torch.device("cuda", 0))


@pytest.fixture
def no_cuda(monkeypatch):
    """nvidia-smi shows GPUs, and PyTorch sees none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(workers, "gpus_of_driver", lambda: 8)
    monkeypatch.setattr(workers, "driver_version", lambda: "535.1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in "RANK", "WORLD_SIZE":
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_gpus_that_pytorch_cannot_use_are_an_error_and_never_the_cpu(no_cuda, monkeypatch, cuda):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    why = "needs a driver for CUDA 13.0 .this one is 535.1.; update it" if cuda else "without CUDA"
    with pytest.raises(
        InputError, match=f"^nvidia-smi shows 8 GPUs, and .*{why}.* on the CPU with"
    ):
        launch.run_on_all_gpus("p", [], lambda world, requests: pytest.fail("it trains"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # whoever says so gets the CPU
    trained = []
    launch.run_on_all_gpus("p", [], lambda world, requests: trained.append(world.device.type))
    assert trained == ["cpu"]


def test_each_of_eight_ranks_without_its_gpu_is_refused(no_cuda, monkeypatch):
    """Also where the launcher has started them for GPUs that it has counted."""
    for name, value in dict(RANK="3", LOCAL_RANK="3", WORLD_SIZE="8", MASTER_ADDR="x").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="^nvidia-smi shows 8 GPUs"):
        launch.run_on_all_gpus("p", [], lambda world, requests: pytest.fail("it trains"))


def test_no_compiler_is_an_error_for_a_record_on_a_gpu(monkeypatch):
    """Elsewhere, or where nobody counts the seconds, it is a line."""
    reason = "a C++ compiler (g++) would have to be installed for it"
    monkeypatch.setattr(machine, "lacks_for_compiling", lambda: reason)
    said = []

    def choose(wanted, world, for_record):
        return compiling.choose(wanted, world, said.append, for_record)

    with pytest.raises(InputError, match=r"g\+\+.* --no-compile trains all the same"):
        choose(None, CUDA, True)
    assert said == []
    assert not choose(None, CUDA, False) and len(said) == 1 and reason in said[0]
    assert not choose(True, World(), True) and len(said) == 2
    assert not choose(False, CUDA, True) and len(said) == 2  # asked for


def test_attention_is_tried_as_training_and_validation_use_it():
    """gpt2-small on eight GPUs and on one: windows of first and last stage, twice as wide where
    heads are paired, and the places for documents that a pass has."""
    config = tg.configure(**load_track("gpt2-small"))
    stages = tg.stages_of(config)
    row_len, val_row_len = config.data.row_len, config.data.val_row_len

    def padding(step, rows):
        length = stages[step].model.max_doc_len
        return pack([None] * rows, row_len, default_max_docs(row_len), length)

    def micro_batches(rank, size, rows):
        yield pack([None] * rows, val_row_len, default_max_docs(val_row_len), val_row_len)

    train = types.SimpleNamespace(padding=padding)
    val = types.SimpleNamespace(micro_batches=micro_batches)
    data = types.SimpleNamespace(train=train, val=val)
    windows = [w for stage in stages.values() for w in stage.model.windows]
    last = config.model.val_stage(stages[max(stages)].model, val_row_len).windows
    for size in (8, 1):
        shapes = attention_shapes(config, stages, World(size=size), data)
        assert [shape.window for shape in shapes] == [
            min(windows),
            2 * max(windows),
            min(last),
            2 * max(last),
        ]
        assert {shape.row for shape in shapes} <= {
            n * r for n in (1, 2) for r in (row_len, val_row_len)
        }
        assert shapes[-1].places > 1024 and shapes[-1].max_seqlen == 2 * val_row_len
        most = max(shape.places for shape in shapes[:2])
        assert (most > 256) == (size == 1)


DIFFERENT = """
import os, sys
from runtime import setting_up
from kernels import choose_ops
def other_ops(*args, **kwargs):
    args[5]("attention by varlen, since flash_attn_4 is broken")
    ops = choose_ops("cpu")
    ops.forms["rms_norm"] = "triton"
    return ops
if os.environ["RANK"] == "1":
    setting_up.choose_ops = other_ops
import train_gpt
sys.exit(train_gpt.main({argv!r}))
"""


def test_ranks_that_chose_other_kernels_are_refused(nursery, argv, tmp_path):
    run = nursery.run([], tmp_path / "output", ranks=2, program=DIFFERENT.format(argv=argv("run")))
    assert run.statuses == [2, 2]
    [line] = [line for line in run.err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: rank 1: it has other kernels than the first rank: ")
    assert line.endswith("; attention by varlen, since flash_attn_4 is broken")


def test_ranks_that_drew_other_weights_are_refused(monkeypatch):
    """GPUs draw by themselves, and two kinds of them may draw other numbers."""
    said = []
    monkeypatch.setattr(machine, "refuse_difference", lambda world, *words: said.append(words))
    model = torch.nn.Linear(8, 8)
    setup = types.SimpleNamespace(model=model, world=CUDA._replace(size=2))
    refuse_other_weights(setup)
    refuse_other_weights(setup)
    with torch.no_grad():
        model.bias[3] += 1e-3
    refuse_other_weights(setup)
    first, again, other = said
    assert first == again != other and first[0] == "initial weights"
    for world in World(), CUDA, World(size=2):  # nobody to differ from, or all draw on CPUs
        refuse_other_weights(types.SimpleNamespace(model=model, world=world))
    assert len(said) == 3
