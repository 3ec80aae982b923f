"""Which loss a configuration is trained with, and what becomes of its best weights."""

import contextlib
import types

import pytest
import torch

import train_gpt as tg
from runtime import finish, steps
from runtime.policy import PolicyLoss
from runtime.preferences import PairLoss
from runtime.setting_up import choose_loss


@pytest.mark.parametrize(
    "fields, kind",
    [({}, None), (dict(preference="dpo"), PairLoss), (dict(reward="exact"), PolicyLoss)],
)
def test_the_loss_is_the_models_or_that_of_its_log_probabilities(fields, kind):
    model = types.SimpleNamespace(log_probs=lambda: None, n_vocab=7)
    eager, forward = choose_loss(tg.configure(**fields), model, compiled=False)
    assert forward is eager  # which says that nothing is compiled
    assert eager is model if kind is None else type(eager) is kind
    assert not steps.is_compiled(types.SimpleNamespace(eager=eager, forward=forward))


@pytest.mark.parametrize(
    "best, rank, written, kept, forgotten",
    [
        (True, 0, True, ["best.safetensors"], 0),
        (True, 0, False, ["best.safetensors"], 1),  # a full disk: the result is the last step's
        (True, 1, True, [], 0),
        (False, 0, True, [], 0),
    ],
)
def test_the_best_weights_are_kept(monkeypatch, best, rank, written, kept, forgotten):
    saved = []
    forgets = []

    def save_weights(weights, name):
        assert weights == dict(x=3)
        saved.append(name)
        return written

    monkeypatch.setattr(finish, "weights_after", lambda setup, step: dict(x=step))
    session = types.SimpleNamespace(
        at=types.SimpleNamespace(step=3),
        is_best=lambda: best,
        forget_best=lambda: forgets.append(1),
        log=types.SimpleNamespace(save_weights=save_weights),
        parts=types.SimpleNamespace(part=lambda name: contextlib.nullcontext()),
    )
    world = tg.World(rank, 2, torch.device("cpu"), 2)
    finish.keep_best(types.SimpleNamespace(world=world), session)
    assert saved == kept and len(forgets) == forgotten
