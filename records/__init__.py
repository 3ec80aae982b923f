"""What was achieved: committed results, and the code that writes and reads them.

Names are imported when they are first used: reading logs needs no torch, which takes a second to
load.
"""

import importlib

MODULES = dict(
    Log="log",
    describe_environment="environment",
    machine_probe="environment",
    matmul_rate="environment",
    synchronize="environment",
    to_json="log",
)
__all__ = list(MODULES)


def __getattr__(name):
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{MODULES[name]}", __name__), name)
