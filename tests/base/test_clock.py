"""base/clock.py: when the process began, and what its time went into."""

import time

import pytest

from base import clock
from base.clock import Parts


def test_the_process_began_before_its_imports():
    assert 0 < time.perf_counter() - clock.START < 3600


def test_what_the_door_has_installed_does_not_count(monkeypatch):
    monkeypatch.delenv("STOPWATCH_INSTALLED", raising=False)  # it may have for these tests
    assert clock.process_age() > 0.01
    monkeypatch.setenv("STOPWATCH_INSTALLED", "1")
    assert clock.process_age() == 0


def test_a_part_inside_another_counts_for_itself_alone(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    parts = Parts(90.0, imports_s=4.0)
    with parts.part("outer"):
        now[0] += 1
        with parts.part("inner"):
            now[0] += 2
            with parts.part("innermost"):
                now[0] += 4
        now[0] += 8
        with parts.part("inner"):
            now[0] += 16
    assert parts.seconds == dict(imports_s=4.0, innermost=4.0, inner=18.0, outer=9.0)
    assert parts.elapsed() == pytest.approx(41.0)


def test_a_part_that_fails_counts():
    parts = Parts()
    with pytest.raises(KeyError), parts.part("data_s"):
        raise KeyError
    assert parts.seconds["data_s"] >= 0


def test_start_up_is_counted_once(monkeypatch):
    monkeypatch.setattr(clock, "_taken", [])
    first = clock.parts_so_far()
    assert first.elapsed() >= first.seconds["imports_s"] > 0
    second = clock.parts_so_far()
    assert second.seconds == {} and second.elapsed() < 1
