"""runtime/compiling.py: when compiling pays, and what is remembered of what it took."""

import pytest
import torch

from runtime import compiling, machine
from runtime.machine import World

CONFIG = dict(n_layer=2, steps=10)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A compiler that works, with nothing in its cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(machine, "can_compile", lambda say: True)
    return tmp_path


def choose(wanted, product_seconds, device="cpu", config=CONFIG):
    """(what was chosen, what was said)."""
    said = []
    world = World(device=torch.device(device))
    return compiling.choose(wanted, config, product_seconds, world, said.append), said


def saved(product_seconds):
    return product_seconds * compiling.OVERHEAD * compiling.SAVED


def test_a_short_run_is_not_compiled_and_a_long_one_is():
    short = 1.0
    long = 10 * compiling.FIRST_TIME
    chosen, said = choose(None, short)
    assert not chosen and "not compiled" in said[0] and "about 70 s" in said[0]
    chosen, said = choose(None, long)
    assert chosen and said == [
        f"compiling would take about 70 s and save {saved(long):.0f} s of training"
    ]


def test_who_says_whether_to_compile_is_obeyed():
    assert choose(True, 0.0) == (True, [])
    assert choose(False, 1e9) == (False, [])


def test_gpus_always_compile():
    assert choose(None, 0.0, device="cuda") == (True, [])


def test_a_compiler_is_missed_where_it_would_pay(monkeypatch):
    monkeypatch.setattr(machine, "can_compile", lambda say: say("no compiler"))
    chosen, said = choose(None, 1e9)
    assert not chosen and said[-1] == "no compiler"
    assert choose(True, 1e9) == (None, ["no compiler"])
    chosen, said = choose(None, 0.0)
    assert not chosen and said[0].startswith("not compiled") and len(said) == 1


def test_without_a_place_for_compiled_code_the_first_time_counts(monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert compiling.expected_seconds(CONFIG) == compiling.FIRST_TIME


def test_what_it_took_decides_the_next_time():
    work = 0.5 * compiling.FIRST_TIME / (compiling.OVERHEAD * compiling.SAVED)  # saves 35 s
    assert not choose(None, work)[0]
    compiling.remember(CONFIG, 40.0)
    assert compiling.expected_seconds(CONFIG) == pytest.approx(40.0 * compiling.AGAIN)
    assert choose(None, work)[0]  # with filled caches it takes 6 s
    other = CONFIG | dict(n_layer=3)
    assert compiling.expected_seconds(other) == 40.0  # nothing of it is in the caches
    assert not choose(None, work, config=other)[0]
    compiling.remember(CONFIG | dict(n_layer=1), 20.0)
    assert compiling.expected_seconds(other) == 40.0  # the longest of the first times
    compiling.remember(CONFIG, 31.0)  # measured with filled caches
    assert compiling.expected_seconds(CONFIG) == 31.0
    assert compiling.expected_seconds(other) == 40.0


@pytest.mark.parametrize("text", ["", "[1]", '{"first": "soon"}', '{"first": null}', "\0"])
def test_notes_that_cannot_be_read_are_no_notes(cache, text):
    (cache / "stopwatch-seconds.json").write_text(text)
    assert compiling.expected_seconds(CONFIG) == compiling.FIRST_TIME
    compiling.remember(CONFIG, 50.0)
    assert compiling.read_notes()["first"] == 50.0


def test_a_cache_that_cannot_be_written_is_no_error(cache, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache / "file" / "below"))
    (cache / "file").write_text("")
    compiling.remember(CONFIG, 50.0)
    assert compiling.expected_seconds(CONFIG) == compiling.FIRST_TIME
