"""Which room may import which: one direction, from the base to the programs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Each room with the rooms that it may import, besides itself
KITS = {
    "base": set(),
    "kernels": set(),  # usable by someone who copies that folder alone
    "data": {"base"},
    "records": {"base"},
    "tracks": {"base"},
}
KITS["optim"] = {"base", "kernels"}
KITS["models"] = {"base", "kernels", "data", "optim"}
KITS["runtime"] = {"base", "kernels", "data", "records", "tracks", "optim", "models"}
KITS["door"] = {"base"}  # which imports the program it starts by its name
PROGRAMS = ("train_gpt", "inference", "evals", "export")
PROGRAMS = {room: KITS.keys() | {"inference"} for room in PROGRAMS}
# Of a training
PLAN = {room: KITS.keys() | {"train_gpt", "inference"} for room in ("plan", "posttrain")}
PLAN["posttrain"] |= {"door"}  # which starts each of several processes
ROOMS = KITS | PROGRAMS | PLAN | {"benchmarks": KITS.keys() | PROGRAMS.keys() | {"posttrain"}}


def files_of(room):
    if (ROOT / f"{room}.py").exists():
        return [ROOT / f"{room}.py"]
    return sorted((ROOT / room).rglob("*.py"))


def imported(path):
    """Top-level names that a file imports anywhere in it, with their lines."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name.split(".")[0], node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0], node.lineno


def test_every_folder_of_code_is_a_room():
    folders = {path.parent.name for path in ROOT.glob("[a-z]*/*.py")} - {"tests", "docs"}
    assert folders | {"door", "train_gpt"} == ROOMS.keys()


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room):
    wrong = []
    for path in files_of(room):
        for name, line in imported(path):
            if name in ROOMS and name != room and name not in ROOMS[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


@pytest.mark.parametrize("room", ["base", "door", "records", "tracks"])
def test_rooms_that_do_without_torch(room):
    for path in files_of(room):
        assert "torch" not in dict(imported(path)), path


def test_importing_does_nothing():
    """No output, no process group, no device touched, no argument parsed."""
    program = (
        "import sys; sys.argv = ['x', '--nonsense']; "
        "import optim, models.gpt, runtime.session, train_gpt, torch; "
        "assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
