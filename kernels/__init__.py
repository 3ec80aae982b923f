"""The operations a training step spends its time in: one file per op, the maths in PyTorch first.

This folder can be copied and used alone; it needs PyTorch, and Triton for the kernels. Import what
you need from here, or take from choose_ops() the forms that are fast on a machine.
"""

from .attention import attention
from .choose import Ops, choose_ops
from .cross_entropy import softcap_cross_entropy
from .embedding import embedding
from .fp8_linear import fp8_linear
from .linear_cross_entropy import linear_cross_entropy
from .linear_log_prob import linear_log_prob
from .mlp import linear_relu2, relu2_mlp
from .polar_express import polar_express
from .qk_norm_rope import qk_norm_rope
from .rms_norm import add_rms_norm, rms_norm
from .swiglu import swiglu
from .symmetric_matmul import symmetric_matmul

__all__ = [
    "Ops",
    "add_rms_norm",
    "attention",
    "choose_ops",
    "embedding",
    "fp8_linear",
    "linear_cross_entropy",
    "linear_log_prob",
    "linear_relu2",
    "polar_express",
    "qk_norm_rope",
    "relu2_mlp",
    "rms_norm",
    "softcap_cross_entropy",
    "swiglu",
    "symmetric_matmul",
]
