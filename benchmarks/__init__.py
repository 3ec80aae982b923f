"""How fast: ./run.sh benchmarks."""
