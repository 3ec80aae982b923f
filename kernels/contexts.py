"""How often contexts were there before and what followed them, for each token of a batch, in C.

    earlier      models/copies.py's, in the same document
    of_targets   Counts.of_targets() of models/counts.py, in the training text

PyTorch sorts hashes of all contexts, and looks all of them up, in 85 operations a batch: 9 ms of a
step of 4,096 tokens that takes 60 (own-text). C goes through each row once, with tables of hashes
for what is of the row, and a binary search among the few tokens that followed a context.

native.py compiles contexts.c once; without a compiler, in torch.compile, and on other devices the
PyTorch forms stay, which these are equal to.
"""

import ctypes

import torch

from . import native
from .native import INT, LONG, POINTER


class Length(ctypes.Structure):
    """contexts.c's struct length."""

    _fields_ = [(name, POINTER) for name in ("first", "follower", "count", "seen")]


class Contexts(native.Library):
    """The compiled library."""

    name = "contexts"
    signatures = dict(
        earlier=[LONG, LONG, LONG, *[POINTER] * 5, INT],
        of_targets=[LONG, LONG, LONG, POINTER, INT, *[POINTER] * 6, INT],
    )

    def earlier(self, inputs, targets, starts, n):
        """(seen, hits), each (B, T, n) int64.

        inputs, targets: (B, T) int64; starts: (B, T) bool, where documents begin.
        """
        given = [x.contiguous() for x in (inputs, targets, starts)]
        found = inputs.new_empty(2, *inputs.shape, n).unbind(0)
        addresses = [x.data_ptr() for x in (*given, *found)]
        self.c.earlier(*inputs.shape, n, *addresses, torch.get_num_threads())
        return found

    def of_targets(self, lengths, inputs, targets, starts, leave_out):
        """(seen, hits, kinds), each (B, T, n) int64; the rest as for earlier().

        lengths: n of (first, follower, count, seen), int32 and at last int64, on a CPU; leave_out:
        0, 1 for the rows' own documents, 2 for those in which nothing is new.
        """
        n = len(lengths)
        tables = (Length * n)(
            *(Length(*(x.data_ptr() for x in of_length)) for of_length in lengths)
        )
        given = [x.contiguous() for x in (inputs, targets, starts)]
        found = inputs.new_empty(3, *inputs.shape, n).unbind(0)
        self.c.of_targets(
            *inputs.shape,
            n,
            ctypes.addressof(tables),
            leave_out,
            *(x.data_ptr() for x in (*given, *found)),
            torch.get_num_threads(),
        )
        return found


def takes(inputs):
    """Whether a batch is for it."""
    return inputs.device.type == "cpu" and inputs.numel() and not torch.compiler.is_compiling()
