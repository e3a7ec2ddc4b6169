"""Move host batches to the devices as global arrays, a few ahead of the step that needs them."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Sharding

from fm_jax.core.types import Batch


def prefetch(
    batches: Iterator[Mapping[str, np.ndarray]],
    sharding: Sharding | Callable[[str, np.ndarray], Sharding],
    *,
    depth: int = 2,
) -> Generator[Batch, None, None]:
    """Yield each batch as global arrays [B, …] while `depth` more are being transferred.

    Transfers are asynchronous, so they overlap the running step. Each process passes its own rows [B / processes, …];
    together they form the global batch. An error in `batches` is raised up to `depth` batches early. Closing this
    iterator closes `batches`.

    Args:
        batches: this process's rows as numpy arrays.
        sharding: the sharding of every field, or a function from a field's name and host array to its sharding.
        depth: batches transferred ahead; 0 transfers each batch when it is requested.
    """
    if depth < 0:
        raise ValueError(f"depth must be 0 or more, not {depth}")
    waiting: deque[Batch] = deque()
    try:
        for batch in batches:
            waiting.append(put(batch, sharding))
            if len(waiting) > depth:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        if (close := getattr(batches, "close", None)) is not None:
            close()


def put(batch: Mapping[str, np.ndarray], sharding: Sharding | Callable[[str, np.ndarray], Sharding]) -> Batch:
    """Return one host batch [B / processes, …] as global arrays [B, …]."""
    where = {name: sharding(name, value) if callable(sharding) else sharding for name, value in batch.items()}
    if jax.process_count() == 1:  # one call for all fields, and no bookkeeping of processes
        return jax.device_put(dict(batch), where)
    return {name: jax.make_array_from_process_local_data(where[name], value) for name, value in batch.items()}
