"""Named sets of values for the options of training. A track is exactly what its file says.

To add one, write a file with a dict TRACK; `--track file-name` finds it.
"""

import importlib
from pathlib import Path

from base import InputError


def track_names():
    files = Path(__file__).parent.glob("[a-z]*.py")
    return sorted(p.stem.replace("_", "-") for p in files)


def load_track(name):
    """{option: value} of a track, with its name. Raises InputError."""
    if name not in track_names():
        raise InputError(f"unknown track {name!r}: expected one of {', '.join(track_names())}")
    module = importlib.import_module(f"tracks.{name.replace('-', '_')}")
    return dict(module.TRACK, track=name)
