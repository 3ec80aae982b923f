"""Every Triton kernel compiles for every chip, spills nothing on Hopper, fits, and takes no more
than it did.

Compiling needs Triton outside its interpreter, hence the processes. It takes half a minute a chip,
so that chips other than Hopper are for those who change a kernel: ./run.sh test -m slow.
"""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT

from benchmarks.resources import ARCH, CASES, COMMITTED, SHARED_LIMIT, render, worse

MATRIX_KERNELS = ("linear_relu2", "symmetric_matmul")  # kernels whose time is matrix products


CHIPS = [
    pytest.param(chip, id=name, marks=[] if chip == 90 else pytest.mark.slow)
    for chip, name in ARCH.items()
]


@pytest.fixture(scope="module", params=CHIPS)
def rows(request):
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "resources", "--chip", str(request.param)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},  # compiled code in Triton's own cache
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return request.param, json.loads(done.stdout)


def test_shared_memory_fits(rows):
    chip, result = rows
    for r in result["rows"]:
        assert r["shared"] <= SHARED_LIMIT[chip], r


def test_nothing_is_spilled_on_hopper(rows):
    chip, result = rows
    if chip == 90:
        assert not [r for r in result["rows"] if r["spilled"]]


def test_matrix_kernels_use_the_tensor_cores_of_their_chip(rows):
    chip, result = rows
    matrix = [r for r in result["rows"] if r["kernel"].startswith(MATRIX_KERNELS)]
    assert {m for m in MATRIX_KERNELS for r in matrix if r["kernel"].startswith(m)} == set(
        MATRIX_KERNELS
    )
    for r in matrix:
        assert r["wgmma"] if chip == 90 else r["tcgen05"] if chip == 100 else True, r


def test_nothing_got_worse(rows):
    """If a change is worth it, run `./run.sh benchmarks resources --write` and commit it
    with it."""
    _, result = rows
    committed = json.loads(COMMITTED.read_text())
    if committed["triton"] != result["triton"]:
        pytest.skip(f"the table is of Triton {committed['triton']}")
    assert not worse(result["rows"], committed["rows"])


def test_the_committed_table_is_whole_and_readable():
    committed = json.loads(COMMITTED.read_text())
    assert {r["case"] for r in committed["rows"]} == set(CASES)
    assert COMMITTED.with_suffix(".md").read_text() == render(committed)


def test_a_kernel_that_needs_more_is_noticed():
    row = dict(case="c", kernel="k", arch="sm_90a", registers=64, spilled=0, shared=100)
    assert worse([row], [row]) == []
    assert worse([row | dict(registers=65)], [row]) == [
        "c: k on sm_90a: 65 registers, 64 in the table"
    ]
    assert worse([row | dict(spilled=4)], [row]) == ["c: k on sm_90a: 4 spilled, 0 in the table"]
    assert worse([row | dict(kernel="new")], [row]) == ["c: new on sm_90a: not in the table"]
