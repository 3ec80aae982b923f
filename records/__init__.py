"""What was achieved: committed results, and the code that writes and reads them."""

from .environment import describe_environment, machine_probe, matmul_rate, synchronize
from .log import Log

__all__ = ["Log", "describe_environment", "machine_probe", "matmul_rate", "synchronize"]
