"""runtime/environment.py: what the machine is measured to do, and which commit this is."""

import math
import shutil
import subprocess
import sys
import time

import pytest
import torch

from runtime import environment
from runtime.environment import best_seconds, copy_rate, machine_probe, matmul_rate

CPU = torch.device("cpu")


def test_probe():
    start = time.process_time()
    probe = machine_probe(CPU)
    seconds = time.process_time() - start
    assert set(probe) == {"matmul", "copy"} and set(probe["matmul"]) == {"float32", "bfloat16"}
    assert all(
        math.isfinite(rate) and rate > 1e8 for rate in [*probe["matmul"].values(), probe["copy"]]
    )
    assert seconds < 10  # under one where nothing else runs and bfloat16 is native


def test_rates_are_work_over_time(monkeypatch):
    """If everything takes two seconds: a product of n x n matrices is 2 n^3 FLOP, a copy reads
    and writes."""
    done = []
    monkeypatch.setattr(
        environment, "best_seconds", lambda device, work: done.append(work()) or 2.0
    )
    assert matmul_rate(CPU, torch.float32) == 1024**3 and done[0].shape == (1024, 1024)
    assert copy_rate(CPU) == 2**24 == done[1].numel()


def test_no_large_products_where_they_are_emulated(monkeypatch):
    """By the rate of small ones."""
    done = []
    took = {256: 0.001, 1024: 0.01}
    monkeypatch.setattr(
        environment, "best_seconds", lambda device, work: took[done.append(len(work())) or done[-1]]
    )
    assert matmul_rate(CPU, torch.bfloat16) == 2 * 1024**3 / 0.01 and done == [256, 1024]
    done.clear()
    took[256] = 0.02
    assert matmul_rate(CPU, torch.bfloat16) == 2 * 256**3 / 0.02 and done == [256]


@pytest.mark.parametrize("seconds, calls", [(0.0, 8), (0.02, 4), (0.3, 2)])
def test_best_seconds(monkeypatch, seconds, calls):
    """The fastest of eight, of fewer where they are slow; the first does not count towards what
    is too slow."""
    clock, took = [0.0], []

    def work():
        took.append(seconds + (5.0 if not took else 0.001 * len(took)))
        clock[0] += took[-1]

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert best_seconds(CPU, work) == pytest.approx(seconds + 0.001) and len(took) == calls


def test_packages_of_flash_attention(tmp_path, monkeypatch):
    names = [("flash-attn-4", "4.0.0b1"), ("flash_attn", "2.8"), ("torch", "9")]
    for name, version in names:
        about = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "nowhere"), ""])
    environment.flash_attention.cache_clear()
    assert environment.flash_attention() == "flash-attn-4 4.0.0b1, flash_attn 2.8"
    monkeypatch.setattr(sys, "path", [])
    environment.flash_attention.cache_clear()
    assert environment.flash_attention() is None
    environment.flash_attention.cache_clear()


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_is_of_this_checkout(tmp_path, monkeypatch):
    """Not of a repository that a hook or a shell has named, nor of one around a copied folder."""

    def repository(folder):
        commit = ["-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "--allow-empty"]
        for args in ["init", "-q"], [*commit, "-m", str(folder)]:  # no two commits are the same
            subprocess.run(["git", "-C", folder, *args], check=True)
        return subprocess.check_output(["git", "-C", folder, "rev-parse", "HEAD"], text=True)

    outer = repository(tmp_path)
    checkout = tmp_path / "checkout"
    (checkout / "runtime").mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(checkout / "runtime" / "environment.py"))
    assert environment.git("rev-parse", "HEAD") is None

    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    assert environment.git("rev-parse", "HEAD") is None
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.delenv("GIT_WORK_TREE")

    inner = repository(checkout)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert environment.git("rev-parse", "HEAD") == inner.strip() != outer.strip()
