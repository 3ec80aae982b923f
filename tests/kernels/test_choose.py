"""kernels/choose.py: who gets which implementation, and what happens to one that does not work."""

import pytest
import torch
from kernel_checks import DEVICE

from kernels import choose, choose_ops, launch
from kernels.fp8_mlp import FP8ReLU2MLP
from kernels.op import OPS
from kernels.rms_norm import rms_norm_reference

CUDA = DEVICE.type == "cuda"


def triton_ops(ops):
    return {name for name, how in ops.named().items() if how == "triton"}


def test_a_cpu_gets_pytorch():
    """The references, and for the head its own form, unless the references are asked for."""
    ops = choose_ops("cpu")
    assert triton_ops(ops) == set() and ops.named()["attention"] == "sdpa"
    assert ops.linear_cross_entropy is OPS["linear_cross_entropy"].on_cpu
    references = choose_ops("cpu", kernels=("reference",))
    assert references.linear_cross_entropy is OPS["linear_cross_entropy"].reference
    assert all(
        getattr(ops, name) is getattr(references, name)
        for name in ("rms_norm", "relu2_mlp", "qk_norm_rope")
    )


@pytest.mark.parametrize(
    "kernels, expected",
    [
        (("reference",), set()),
        (("all",), set(OPS)),
        (("rms_norm", "relu2_mlp"), {"rms_norm", "relu2_mlp"}),
    ],
)
def test_ops_by_name(kernels, expected):
    assert triton_ops(choose_ops(DEVICE, kernels=kernels)) == expected


@pytest.mark.parametrize("kernels", [("fast",), (), ("auto", "rms_norm"), ("reference", "all")])
def test_names_that_do_not_exist_or_contradict_each_other(kernels):
    with pytest.raises(
        ValueError, match="expected auto, reference, all, or names out of .*rms_norm"
    ):
        choose_ops("cpu", kernels=kernels)


def broken(how):
    def raises(x, *rest, **kwargs):
        raise RuntimeError("no such instruction")

    def wrong(x, *rest, **kwargs):
        return rms_norm_reference(x) * 1.2

    def nan(x, *rest, **kwargs):
        return rms_norm_reference(x) * float("nan")

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
    monkeypatch.setitem(OPS, "rms_norm", OPS["rms_norm"]._replace(triton=broken(how)))
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


@pytest.mark.parametrize("here", [80, 89, 90, 100, 120])
def test_auto_takes_triton_where_it_was_measured_to_be_faster(monkeypatch, here):
    """On Hopper, and there all but the norms."""
    monkeypatch.setattr(choose, "chip", lambda x: here)
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    taken = {"qk_norm_rope", "relu2_mlp", "linear_cross_entropy", "symmetric_matmul"}
    found = choose.automatic(torch.device("cuda"), torch.bfloat16)
    assert set(found) == (taken if here == 90 else set())


# --- FP8

BF16 = torch.bfloat16
HAS_FP8 = not CUDA or torch.cuda.get_device_capability() >= (8, 9)
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="this GPU has no FP8")


@needs_fp8
@pytest.mark.parametrize("kernels", [("auto",), ("rms_norm",)])
def test_fp8_in_place_of_the_other_forms(kernels):
    """Of the head and the MLPs, each with scales of its own."""
    ops = choose_ops(DEVICE, BF16, kernels=kernels, fp8="on")
    named = ops.named()
    assert ops.fp8 and named["linear_cross_entropy"] == named["relu2_mlp"] == "fp8"
    assert named["rms_norm"] == ("triton" if kernels == ("rms_norm",) else "pytorch")
    first, second = ops.new_mlp(), ops.new_mlp()
    assert isinstance(first, FP8ReLU2MLP) and first.post is not second.post
    plain = choose_ops(DEVICE, BF16, kernels=kernels)
    assert not plain.fp8 and plain.new_mlp() is plain.relu2_mlp is ops.relu2_mlp
    assert plain.linear_cross_entropy is not ops.linear_cross_entropy


@pytest.mark.parametrize(
    "capability, dtype, there, pays",
    [
        ((8, 0), BF16, False, False),
        ((8, 9), BF16, True, False),
        ((9, 0), BF16, True, True),
        ((9, 0), torch.float32, True, False),
        ((9, 0), torch.float16, True, False),
        ((10, 0), BF16, True, False),
    ],
)
def test_fp8_from_ada_on_and_by_auto_where_it_was_measured(
    monkeypatch, capability, dtype, there, pays
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(choose, "probe", lambda *args, **kwargs: None)
    monkeypatch.setitem(OPS, "relu2_mlp", OPS["relu2_mlp"]._replace(new_fp8=lambda: None))
    gpu = torch.device("cuda", 0)
    assert choose.has_fp8(gpu) == there and choose.has_fp8(torch.device("cpu"))
    assert choose.choose_fp8(gpu, dtype, "auto") == pays
    assert not choose.choose_fp8(gpu, dtype, "off")
    if there and dtype == BF16:
        assert choose.choose_fp8(gpu, dtype, "on")
    else:
        with pytest.raises(ValueError, match=f"fp8 on: expected bfloat16 .* found {dtype} on cuda"):
            choose.choose_fp8(gpu, dtype, "on")


def test_fp8_by_auto_is_off_on_a_cpu():
    assert not choose_ops("cpu", BF16, fp8="auto").fp8
    with pytest.raises(ValueError, match="fp8 on: expected bfloat16 .* found torch.float32 on cpu"):
        choose_ops("cpu", torch.float32, fp8="on")
    with pytest.raises(ValueError, match="fp8 maybe: expected on, off or auto"):
        choose_ops("cpu", BF16, fp8="maybe")


@needs_fp8
@pytest.mark.parametrize(
    "wrong", ["linear_cross_entropy", pytest.param("relu2_mlp", marks=pytest.mark.slow)]
)
def test_fp8_that_does_not_work(monkeypatch, wrong):
    """One form that is off by a third turns all of FP8 off under auto, and is an error under on."""
    right = OPS[wrong].new_fp8

    def make():
        form = right()

        def spoilt(*args, **kwargs):
            return 1.33 * form(*args, **kwargs)

        return spoilt

    monkeypatch.setitem(OPS, wrong, OPS[wrong]._replace(new_fp8=make))
    monkeypatch.setattr(choose, "fp8_pays", lambda device, dtype: True)
    said = []
    assert not choose_ops(DEVICE, BF16, fp8="auto", say=said.append).fp8
    assert len(said) == 1 and said[0].startswith(f"products in {BF16}, since {wrong} in FP8 does")
    with pytest.raises(ValueError, match=f"fp8 on: {wrong} does not work here: differs"):
        choose_ops(DEVICE, BF16, fp8="on")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_heads_pass_their_probe(dtype):
    """Those of 64, and all other ops, have passed it in the tests above."""
    triton = OPS["qk_norm_rope"].triton
    assert choose.probe("qk_norm_rope", triton, DEVICE, dtype, head_dim=128) is None


@pytest.mark.parametrize(
    "here, entry", [(75, "old"), (80, "old"), (89, "old"), (90, "new"), (120, "new")]
)
def test_a_table_of_chips_gives_the_newest_entry_that_is_not_newer(monkeypatch, here, entry):
    """And its oldest to a chip that is older than all."""
    monkeypatch.setattr(launch, "chip", lambda x: here)
    assert launch.for_chip({80: "old", 90: "new"}, None) == entry
