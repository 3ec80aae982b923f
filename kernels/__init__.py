"""The operations a training step spends its time in: one file per op, the maths in PyTorch first.

A trainer takes them from choose_ops(), which knows what is fast on which machine, and the rest from
their files.
"""

from .choose import Ops, choose_ops
from .embedding import embedding
from .polar_express import polar_express

__all__ = ["Ops", "choose_ops", "embedding", "polar_express"]
