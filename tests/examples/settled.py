"""What a process of examples/compare_vit.py tells of itself, for its tests.

By itself, since each process loads the file: the tests' own loads much more.
"""

import os
import time
from pathlib import Path


def gpu(folder: Path, processes: int) -> str | None:
    """The GPU that this one has; it waits for the others, lest one process answers for all."""
    (folder / str(os.getpid())).touch()
    until = time.monotonic() + 60
    while len(list(folder.iterdir())) < processes and time.monotonic() < until:
        time.sleep(0.01)
    return os.environ.get("CUDA_VISIBLE_DEVICES")
