"""records/ starts fast: no command imports what it does not need."""

import subprocess
import sys

from processes import ROOT


def test_reading_logs_needs_no_torch():
    for command in ("check", "compare", "plot", "leaderboard", "add"):
        script = f"""
import sys
import records.__main__
try:
    records.__main__.main([{command!r}, "--help"])
except SystemExit:
    pass
loaded = {{"torch", "numpy", "scipy", "matplotlib", "safetensors"}} & sys.modules.keys()
assert not loaded, f"loaded for nothing: {{loaded}}"
"""
        subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
