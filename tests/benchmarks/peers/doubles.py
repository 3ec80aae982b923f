"""Programs of a few lines that behave like the peers and like our trainer, and what they wrote."""

import shutil
from pathlib import Path

STAND_INS = Path(__file__).parent / "stand_ins"


def checkout(name, folder):
    """A checkout of a peer's double; returns its folder."""
    return Path(shutil.copytree(STAND_INS / name, folder))


def calls(folder):
    """The command line of each double that was called, in order."""
    path = folder / "calls"
    return path.read_text().splitlines() if path.exists() else []
