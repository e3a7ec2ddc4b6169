"""The rate at which all cores read memory, which bounds decoding."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from experiments.benchmarks._sides import Prepared


def bandwidth(megabytes: int) -> Prepared:
    """Prepare reading an array of this size once, a part in every core."""
    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.full(megabytes * 250_000, 1.0, np.float32), cores)
    pool = ThreadPoolExecutor(cores)

    def turn() -> dict[str, Any]:
        largest = max(pool.map(np.max, parts))  # NumPy lets other threads run meanwhile
        return {"bytes": sum(part.nbytes for part in parts), "largest": float(largest)}

    return turn(), turn
