"""Whether compiling a run is worth the time it takes, and what compiling took before.

On a GPU it always is. On a CPU the compiler works for a minute or two before the first step, and
for seconds when its caches are filled, while many runs train for seconds only.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch

from base import to_json
from base.files import write_text

from . import machine

FIRST_TIME = 60.0  # seconds, before there is anything to go by: two cores took 45 to 90
# A step without the compiler takes so many times what its products take at the measured rate, and
# the compiler saves this share of it: laptop on two cores of an AMD EPYC
OVERHEAD = 3.5
SAVED = 0.35
# What compiling takes with filled caches, as a share of the first time, until it has been measured
AGAIN = 1 / 8


def choose(wanted, config, product_seconds, world, say):
    """Whether to compile, the same on all ranks; says what decided it.

    wanted: True, False, or None for where it pays; config: {option: value}; product_seconds: what
    all products of the training take at the measured rate.
    """
    if wanted is False or not machine.can_compile(say):
        return False
    if wanted or world.device.type == "cuda":
        return True
    saves = product_seconds * OVERHEAD * SAVED
    costs = expected_seconds(config)
    pays = machine.share_text(world, "pays" if saves > costs else "") == "pays"
    if pays:
        say(f"compiling: about {costs:.0f} s now for {saves:.0f} s less of training")
    else:
        say(
            f"not compiled, which would take about {costs:.0f} s and save {saves:.0f} s of "
            "training; --compile does it all the same"
        )
    return pays


def expected_training(product_seconds, compiled, device):
    """Seconds that training is expected to take, from those of its products at the measured rate.

    On GPUs a step takes two to three times as long as its products.
    """
    if device.type == "cuda":
        return 2.5 * product_seconds
    return product_seconds * OVERHEAD * (1 - SAVED if compiled else 1)


# --------------------------------------------------------------------------------------------------
# What compiling took: a file beside the compiled code


def notes_path():
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"], "stopwatch-seconds.json")


def key_of(config):
    """What code is compiled from, as a name: when it changes, all is compiled anew."""
    return hashlib.sha256(to_json([config, torch.__version__]).encode()).hexdigest()[:16]


def read_notes():
    """{key: seconds}; it is a cache, so whatever is wrong with it, nothing is known then."""
    try:
        seconds = json.loads(notes_path().read_text(encoding="utf-8"))
        return {key: float(value) for key, value in seconds.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def expected_seconds(config):
    known = read_notes()
    return known.get(key_of(config), known.get("first", FIRST_TIME))


def remember(config, seconds):
    """Write down what compiling took."""
    known = read_notes()
    key = key_of(config)
    if key in known:
        known[key] = seconds
    else:
        known[key] = seconds * AGAIN
        known["first"] = seconds
    with contextlib.suppress(OSError):  # the next run goes by what it knows
        write_text(notes_path(), to_json(known))
