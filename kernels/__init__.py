"""The operations a training step spends its time in: one file per op, the maths in PyTorch first.

A trainer takes them from choose_ops(), which knows what is fast on which machine, and the optimizer's from here.
"""

from .choose import Ops, choose_ops
from .polar_express import polar_express
from .updates import adam_update, descend, muon_update, nesterov, new_companion

__all__ = ["Ops", "adam_update", "choose_ops", "descend", "muon_update", "nesterov", "new_companion", "polar_express"]
