"""Whether a run is compiled, and how long its training is expected to take.

On a GPU it always is. On a CPU the compiler works for a minute or two before the first step, and a
step is no faster for it than by kernels/fused.c: of laptop 118 ms compiled and 95 by the loops in
C, of laptop-deep 1.05 to 1.43 s and 1.03 to 1.07 (CPU time of one thread of an Intel Xeon).
"""

from base import InputError

from . import machine

# A step on a CPU takes so many times what its products take at the measured rate: from 2.5 times in
# float32 to 4, 256 wide, and 9, 128 wide, where bf16 is multiplied by AMX
OVERHEAD = 4.0
# On an H200 gpt2-small's steps took 1.4 to 1.6 times what their products would
GPU_OVERHEAD = 1.5


def choose(wanted, world, say, for_record=False):
    """Whether to compile; where it does not work say(message) is told.

    wanted: True, False, or None for where it pays; for_record: a run against the clock, which on a
    GPU nobody wants to take longer than it must. Raises InputError there, where the compiler is
    missing.
    """
    if wanted is False or wanted is None and world.device.type == "cpu":
        return False
    reason = machine.lacks_for_compiling()
    if reason and for_record and world.device.type == "cuda":
        raise InputError(
            f"torch.compile, without which steps are slower, does not work here: {reason}; "
            "--no-compile trains all the same"
        )
    return machine.can_compile(say)


def expected_training(product_seconds, device):
    """Seconds that training is expected to take, from those of its products at the measured
    rate."""
    overhead = GPU_OVERHEAD if device.type == "cuda" else OVERHEAD
    return overhead * product_seconds
