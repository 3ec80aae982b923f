"""One thread per test process: pytest-xdist already uses every core, and small matrices lose to thread barriers."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
