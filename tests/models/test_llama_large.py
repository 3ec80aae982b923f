"""The ladder's large models at their true shapes without their numbers: a step is traced, its
memory estimated for each rank."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train_gpt as tg
from kernels import choose_ops
from models import llama, parts
from optim import Optimizer
from runtime.machine import World
from runtime.memory import estimate
from tracks import load_track

pytestmark = pytest.mark.slow

# Track, tokens of its vocabulary
LARGE = [("llama-286m", 50_257), ("llama-1b", 65_536)]


def config_of(track, **fields):
    text = "some.txt" if track == "llama-1b" else ""
    return tg.configure(**(load_track(track) | dict(text=text) | fields))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize(["track", "n_vocab"], LARGE)
def test_a_step_at_the_true_shape_is_traced(track, n_vocab, optimizer, monkeypatch):
    """Forward, backward and update of one row; the largest with blocks recomputed."""
    for module in llama, parts:  # how many targets count is not known without their numbers
        monkeypatch.setattr(module, "counted", lambda targets: None)
    c = config_of(track, optimizer=optimizer)
    T = c.data.row_len
    ops = choose_ops("cpu", torch.bfloat16)
    with FakeTensorMode():
        model = llama.Model(c.model, n_vocab, T, torch.bfloat16, ops)
        model.init_weights(0)
        model.recompute = track == "llama-1b"
        tokens = torch.randint(n_vocab, (1, T + 1))
        cu_seqlens = torch.tensor([0, T // 3, T], dtype=torch.int32)
        stage = c.model.stage(0.0, T)
        loss = model(tokens[:, :-1], tokens[:, 1:], cu_seqlens, stage)
        loss.backward()
        assert loss.shape == () and loss.dtype == torch.float32
        for name, p in model.named_parameters():
            if p.numel():
                assert p.grad.shape == p.shape and p.grad.dtype == p.dtype, name
        rules = model.update_rules(c.optim)
        Optimizer(model, rules, World(), clip=c.optim.clip).step(1.0, 0.9)


@pytest.mark.parametrize(
    ["track", "n_vocab", "ranks", "recompute", "most"],
    [
        ("llama-286m", 50_257, 1, False, 24e9),
        ("llama-1b", 65_536, 1, True, 24e9),
        ("llama-1b", 65_536, 8, False, 80e9),
    ],
)
def test_memory_of_a_rank(track, n_vocab, ranks, recompute, most):
    """In bf16 with the kernels of a GPU, by the estimate that training goes by: what it takes of
    weights is exact, and a row or more fits."""
    c = config_of(track)
    ops = choose_ops("cpu", torch.bfloat16)
    ops = ops.replace(forms=ops.forms | dict(linear_cross_entropy="triton"))
    ops.attention.keywords["backend"] = "flash_attn_3"
    with torch.device("meta"):
        model = llama.Model(c.model, n_vocab, 1, torch.bfloat16, ops)
    for optimizer in ("muon", "adamw"):
        optim = config_of(track, optimizer=optimizer).optim
        rules = model.update_rules(optim)
        parts = estimate(model, rules, 1, c.data.row_len, recompute, ranks, cuda=True)
        n = sum(p.numel() for p in model.parameters())
        assert parts["weights"] == parts["gradients"] == 2 * n
        assert sum(parts.values()) < most
        said = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        print(f"{track}, {ranks} ranks, {optimizer}: {sum(parts.values()) / 1e9:.2f} GB ({said})")
