"""Where runs and caches are kept: in the checkout, or, where nothing can be written there, outside
of it."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def can_write(folder):
    """Whether files can be made in a folder, which may have to be made itself."""
    folder = Path(folder).absolute()
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


def cache_folder():
    """.cache of the checkout, else stopwatch in the user's cache, else .cache where one is."""
    own = ROOT / ".cache"
    if can_write(own):
        return own
    home = os.path.expanduser("~")
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path(home, ".cache"), "stopwatch")
    if users.is_absolute() and can_write(users):  # a user without a home has none
        return users
    return Path.cwd() / ".cache"


def runs_folder():
    """runs of the checkout, else the one where one is."""
    own = ROOT / "runs"
    return own if can_write(own) else Path.cwd() / "runs"


def elsewhere():
    """Where a run keeps things that do not go into the checkout, in words; None if they do."""
    if can_write(ROOT / ".cache") and can_write(ROOT / "runs"):
        return None
    return (
        "this checkout cannot be written: unless options say otherwise, prepared data and "
        f"compiled code are in {cache_folder()}, and runs in {runs_folder()}"
    )
