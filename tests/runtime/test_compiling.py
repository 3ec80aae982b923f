"""runtime/compiling.py: who compiles."""

import pytest
import torch

from runtime import compiling, machine
from runtime.machine import World


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """One that works."""
    monkeypatch.setattr(machine, "lacks_for_compiling", lambda: None)
    monkeypatch.setattr(machine, "can_compile", lambda say: True)


def choose(wanted, device="cpu"):
    """(what was chosen, what was said)."""
    said = []
    return compiling.choose(wanted, World(device=torch.device(device)), said.append), said


def test_gpus_compile_and_cpus_have_loops_in_c():
    assert choose(None, "cuda") == (True, [])
    assert choose(None) == (False, [])


def test_who_says_whether_to_compile_is_obeyed():
    for device in "cpu", "cuda":
        assert choose(True, device) == (True, [])
        assert choose(False, device) == (False, [])


def test_a_compiler_that_is_missing_is_missed_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(machine, "can_compile", lambda say: say("no compiler"))
    assert choose(True) == (None, ["no compiler"])
    assert choose(None) == (False, [])


def test_training_takes_a_multiple_of_its_products():
    on_cpu, on_gpu = (compiling.expected_training(2.0, torch.device(d)) for d in ("cpu", "cuda"))
    assert on_cpu == 2 * compiling.OVERHEAD > on_gpu == 2 * compiling.GPU_OVERHEAD
