"""Synchronise the processes of a run: an error on one is raised on all, so none waits for one that has ended."""

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from fm_jax.core import errors

_BYTES = 600
_TIMEOUT_MS = 20 * 60 * 1000


def agree(error: errors.FmError | None) -> None:
    """Raise on every process the error of the first process that has one; call it on all, in the main thread."""
    if jax.process_count() == 1:
        if error is not None:
            raise error
        return
    own = f"{type(error).__name__}:{error}".encode()[:_BYTES] if error is not None else b""
    mine = np.frombuffer(own.ljust(_BYTES, b"\0"), np.uint8)
    for row in np.asarray(multihost_utils.process_allgather(mine)):
        if text := row.tobytes().rstrip(b"\0").decode(errors="ignore"):
            kind, _, message = text.partition(":")
            raise getattr(errors, kind, errors.FmError)(message)


def barrier(key: str) -> None:
    """Wait for every process; safe in a thread because it uses no device. Each `key` may be used once."""
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=_TIMEOUT_MS)
