"""base/places.py: where things go that are not told where to go."""

import os

import pytest

from base import places


@pytest.fixture
def readonly(tmp_path, monkeypatch):
    """A checkout that cannot be written, a home that can, and a current folder."""
    refused = {tmp_path / "checkout"}
    access = os.access
    monkeypatch.setattr(
        places.os, "access", lambda path, mode: path not in refused and access(path, mode)
    )
    for name in "checkout", "home", "here":
        (tmp_path / name).mkdir()
    monkeypatch.setattr(places, "ROOT", tmp_path / "checkout")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(tmp_path / "here")
    return refused


def test_a_checkout_that_can_be_written_has_all(readonly, tmp_path):
    readonly.clear()
    assert places.cache_folder() == tmp_path / "checkout/.cache"
    assert places.runs_folder() == tmp_path / "checkout/runs"
    assert places.elsewhere() is None


def test_a_folder_in_it_that_can_be_written_is_taken(readonly, tmp_path):
    (tmp_path / "checkout/runs").mkdir()
    assert places.runs_folder() == tmp_path / "checkout/runs"
    assert places.cache_folder() == tmp_path / "home/.cache/stopwatch"
    assert "cannot be written" in places.elsewhere()


def test_else_the_users_cache_and_the_folder_where_one_is(readonly, tmp_path, monkeypatch):
    assert places.cache_folder() == tmp_path / "home/.cache/stopwatch"
    assert places.runs_folder() == tmp_path / "here/runs"
    line = places.elsewhere()
    assert f"code are in {tmp_path}/home/.cache/stopwatch, and runs in {tmp_path}/here/runs" in line
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert places.cache_folder() == tmp_path / "xdg/stopwatch"
    readonly |= {tmp_path, tmp_path / "home"}  # without a home that can be written
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert places.cache_folder() == tmp_path / "here/.cache"
    assert not list((tmp_path / "home").iterdir())  # nothing is made by asking


def test_without_a_home_nothing_is_called_tilde(readonly, tmp_path, monkeypatch):
    monkeypatch.setattr(places.os.path, "expanduser", lambda path: path)
    assert places.cache_folder() == tmp_path / "here/.cache"
