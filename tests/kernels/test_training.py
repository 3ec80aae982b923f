"""Whole trainings with every op by Triton, in its interpreter where there is no GPU, and with
every op by PyTorch."""

import dataclasses

import pytest
import torch
from helpers import EVERYTHING, tiny, train_losses, write_text
from kernel_checks import DEVICE

import train_gpt as tg


@pytest.mark.parametrize(
    "dtype, steps, allowed, fields",
    [("float32", 50, 1e-3, {}), ("bfloat16", 10, 0.02, {}), ("float32", 6, 1e-3, EVERYTHING)],
    ids=["float32", "bfloat16", "everything"],
)
def test_losses_with_kernels_are_those_without(tmp_path, dtype, steps, allowed, fields):
    """Pairs bring the kernels rows of twice the length, several next tokens bring them several
    targets."""
    c = tiny(
        write_text(tmp_path / "words.txt"),
        tmp_path,
        **dict(n_layer=1, value_embed_layers=(0,))
        | fields
        | dict(
            batch_tokens=(64,),
            steps=steps,
            eval_every=steps,
            val_tokens=64,
            dtype=dtype,
            sample_tokens=0,
        ),
    )
    losses = {}
    for kernels in ("reference", "all"):
        c = dataclasses.replace(c, kernels=(kernels,), run_dir=str(tmp_path / kernels))
        result = tg.train(c, tg.World(device=DEVICE))
        losses[kernels] = torch.tensor(train_losses(tmp_path / kernels) + [result["val_loss"]])
    if not fields:
        assert losses["reference"][-1] < losses["reference"][0] - 1  # it has learnt something
    difference = (losses["all"] - losses["reference"]).abs().max()
    assert difference < allowed, difference
