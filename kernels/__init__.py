"""The operations a training step spends its time in: one file per op, the maths in PyTorch first."""

from .attention import attention, choose_backend
from .cross_entropy import softcap_cross_entropy
from .polar_express import polar_express

__all__ = ["attention", "choose_backend", "polar_express", "softcap_cross_entropy"]
