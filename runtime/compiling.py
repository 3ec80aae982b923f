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

from base import InputError, to_json
from base.files import write_text

from . import machine

# Seconds, before there is anything to go by: laptop took 65, own-text-deep 79
FIRST_TIME = 70.0
# With filled caches it takes this share of the first time, until that has been measured: 8 and 14 s
AGAIN = 1 / 7
# Uncompiled, a step takes so many times what its products take at the measured rate: 4.6 times for
# laptop, 128 wide, 2.4 for own-text-deep, 256 wide
OVERHEAD = 3.5
# The compiler saves this share of it: 87 -> 65 ms and 1,180 -> 880 ms
SAVED = 0.25
# All of these on two cores of an AMD EPYC (Zen 4). On an H200 gpt2-small's steps took 1.4 to 1.6
# times what their products would
GPU_OVERHEAD = 1.5


def choose(wanted, config, product_seconds, world, say, for_record=False):
    """Whether to compile, the same on all ranks; says what decided it.

    wanted: True, False, or None for where it pays; config: {option: value}; product_seconds: what
    all products of the training take at the measured rate; for_record: a run against the clock,
    which on a GPU nobody wants to take longer than it must. Raises InputError there, where the
    compiler is missing.
    """
    if wanted is False:
        return False
    if wanted is None and world.device.type == "cpu":
        saves = product_seconds * OVERHEAD * SAVED
        costs = expected_seconds(config)
        if machine.share_text(world, "pays" if saves > costs else "") != "pays":
            say(
                f"not compiled, which would take about {costs:.0f} s and save {saves:.0f} s of "
                "training; --compile does it all the same"
            )
            return False
        say(f"compiling would take about {costs:.0f} s and save {saves:.0f} s of training")
    reason = machine.lacks_for_compiling()
    if reason and for_record and world.device.type == "cuda":
        raise InputError(
            f"torch.compile, without which steps are slower, does not work here: {reason}; "
            "--no-compile trains all the same"
        )
    return machine.can_compile(say)


def expected_training(product_seconds, compiled, device):
    """Seconds that training is expected to take, from those of its products at the measured
    rate."""
    if device.type == "cuda":
        return GPU_OVERHEAD * product_seconds
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
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return {}


def expected_seconds(config):
    """What compiling is expected to take; where no compiled code can be kept, as the first time."""
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
        known["first"] = max(seconds, known.get("first", 0.0))  # some models are small
    with contextlib.suppress(OSError):  # the next run goes by what it knows
        write_text(notes_path(), to_json(known))
