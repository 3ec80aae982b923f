"""What a run stands on: its command line, the machine and its processes, checkpoints, signals."""
