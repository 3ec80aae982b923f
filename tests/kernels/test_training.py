"""Whole trainings with every op by Triton, in its interpreter where there is no GPU, and with
every op by PyTorch."""

import pytest
import torch
from helpers import EVERYTHING, THREE_LAYERS, tiny, train_losses, write_text
from kernel_checks import DEVICE

import train_gpt as tg
from kernels import choose

ONE_LAYER = dict(n_layer=1, value_embed_layers=(0,))


@pytest.mark.parametrize(
    "dtype, steps, allowed, fields",
    [
        ("float32", 3, 1e-3, ONE_LAYER),
        pytest.param("bfloat16", 2, 0.02, ONE_LAYER, marks=pytest.mark.slow),
        # A step in each of its stages
        pytest.param("float32", 3, 1e-3, EVERYTHING | THREE_LAYERS, marks=pytest.mark.slow),
    ],
    ids=["float32", "bfloat16", "everything"],
)
def test_losses_with_kernels_are_those_without(
    tmp_path, monkeypatch, dtype, steps, allowed, fields
):
    """Pairs bring the kernels rows of twice the length, several next tokens bring them several
    targets."""
    # test_choose.py has the probes; here they would take longer than the steps
    monkeypatch.setattr(choose, "probe", lambda *args, **kwargs: None)
    text = write_text(tmp_path / "words.txt")
    losses = {}
    for kernels in ("reference", "all"):
        run = dict(
            batch_tokens=(32,),
            steps=steps,
            eval_every=steps,
            val_tokens=32,
            val_row_len=32,
            dtype=dtype,
            sample_tokens=0,
            kernels=(kernels,),
            run_dir=str(tmp_path / kernels),
        )
        result = tg.train(tiny(text, tmp_path, **fields | run), tg.World(device=DEVICE))
        losses[kernels] = torch.tensor(train_losses(tmp_path / kernels) + [result["val_loss"]])
    assert losses["reference"][-1] < losses["reference"][0] - 0.05  # it has learnt something
    difference = (losses["all"] - losses["reference"]).abs().max()
    assert difference < allowed, difference
