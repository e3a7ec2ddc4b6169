"""The rate at which all cores read memory, which bounds decoding."""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from experiments.benchmarks._sides import Prepared


def bandwidth(megabytes: int) -> Prepared:
    """Prepare reading two arrays, together of this size, once: a dot product of a part in every core."""
    cores = len(os.sched_getaffinity(0))
    left, right = (np.array_split(np.full(megabytes * 125_000, value, np.float32), cores) for value in (1.0, 0.5))
    pool = ThreadPoolExecutor(cores)

    def turn() -> dict[str, Any]:
        sums = pool.map(np.dot, left, right)  # NumPy lets other threads run meanwhile
        return {"bytes": sum(part.nbytes for part in (*left, *right)), "sum": float(sum(sums))}

    return turn(), turn
