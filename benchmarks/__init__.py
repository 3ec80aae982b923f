"""How fast: `python -m benchmarks NAME`."""
