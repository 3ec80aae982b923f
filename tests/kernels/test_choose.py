"""kernels/choose.py: who gets which implementation, and what happens to one that does not work."""

import pytest
import torch
from kernel_checks import DEVICE

from kernels import choose, choose_ops

CUDA = DEVICE.type == "cuda"


def triton_ops(ops):
    return {name for name, how in ops.named().items() if how == "triton"}


def test_a_cpu_gets_pytorch():
    """The references, and for the head its own form, unless the references are asked for."""
    ops = choose_ops("cpu")
    assert triton_ops(ops) == set() and ops.named()["attention"] == "blockwise"
    assert ops.linear_cross_entropy is choose.linear_cross_entropy_in_pytorch
    references = choose_ops("cpu", kernels=("reference",))
    assert references.linear_cross_entropy is choose.linear_cross_entropy_reference
    assert all(
        getattr(ops, name) is getattr(references, name)
        for name in ("rms_norm", "relu2_mlp", "qkv_norm_rope")
    )


@pytest.mark.parametrize(
    "kernels, expected",
    [
        (("reference",), set()),
        (("all",), set(choose.OPS)),
        (("rms_norm", "relu2_mlp"), {"rms_norm", "relu2_mlp"}),
    ],
)
def test_ops_by_name(kernels, expected):
    assert triton_ops(choose_ops(DEVICE, kernels=kernels)) == expected


@pytest.mark.parametrize("kernels", [("fast",), (), ("auto", "rms_norm"), ("reference", "all")])
def test_names_that_do_not_exist_or_contradict_each_other(kernels):
    with pytest.raises(ValueError, match="expected auto, reference, all, or names out of rms_norm"):
        choose_ops("cpu", kernels=kernels)


def broken(how):
    def raises(x, *rest, **kwargs):
        raise RuntimeError("no such instruction")

    def wrong(x, *rest, **kwargs):
        return choose.rms_norm_reference(x) * 1.2

    def nan(x, *rest, **kwargs):
        return choose.rms_norm_reference(x) * float("nan")

    return dict(raises=raises, wrong=wrong, nan=nan)[how]


@pytest.mark.parametrize(
    "how, message",
    [
        ("raises", "no such instruction"),
        ("wrong", "differs from the reference"),
        ("nan", "differs from the reference"),
    ],
)
def test_a_kernel_that_does_not_work(monkeypatch, how, message):
    """Asked for by name it is an error; chosen by auto its reference takes its place, and says
    so."""
    monkeypatch.setitem(choose.OPS, "rms_norm", (broken(how), choose.rms_norm_reference))
    with pytest.raises(ValueError, match=message):
        choose_ops(DEVICE, kernels=("rms_norm",))
    monkeypatch.setattr(choose, "automatic", lambda device, dtype: ("rms_norm", "add_rms_norm"))
    said = []
    ops = choose_ops(DEVICE, say=said.append)
    assert triton_ops(ops) == {"add_rms_norm"}
    assert (
        len(said) == 1
        and message in said[0]
        and said[0].startswith("rms_norm by its PyTorch reference")
    )


def test_auto_leaves_fp32_to_pytorch():
    assert choose.automatic(torch.device("cuda"), torch.float32) == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_op_passes_its_probe(dtype):
    for name in choose.OPS:
        for head_dim in (64, 128) if name == "qkv_norm_rope" else (64,):
            assert choose.probe(name, DEVICE, dtype, head_dim) is None
