"""One token for each row of logits in C, as inference/sampling.py's process() and draw() do it:

    w = exp((logits - their largest) / temperature)
    only the fewest w that have the share top_p of all together, and of those min_p or more
    the first token whose w, with those before it, is more than the share `at` of their sum

PyTorch reads and writes all of a large vocabulary for each of these, and to find what has top_p it
puts hundreds in order: 21 ms for 32 rows of 50,257, of which a model of 20M parameters takes 9. C
reads each row from a cache of the processor, sums weights by their exponents and first bits, and
puts only those of one kind in order.

native.py compiles drawing.c once; without a compiler PyTorch's forms stay. Where weights are equal
to the last of the fewest, all of them count; sampling.py takes some.
"""

import torch

from . import native
from .native import DOUBLE, FLOAT, INT, LONG, POINTER


class Drawing(native.Library):
    """The compiled library."""

    name = "drawing"
    signatures = dict(
        draw=[LONG, LONG, POINTER, FLOAT, DOUBLE, FLOAT, POINTER, POINTER, INT],
    )

    def draw(self, logits, at, temperature=1.0, top_p=1.0, min_p=0.0):
        """(B,) int64 token ids on the CPU.

        logits: (B, V), taken as fp32, -inf for what is ruled out, but one in each row; at: (B,)
        float64, from 0 to 1, uniform draws.
        """
        logits = logits.float().contiguous()
        tokens = torch.empty(len(logits), dtype=torch.int64)
        self.c.draw(
            *logits.shape,
            logits.data_ptr(),
            temperature,
            top_p,
            min_p,
            at.data_ptr(),
            tokens.data_ptr(),
            torch.get_num_threads(),
        )
        return tokens
