"""Turn SIGTERM and SIGINT into a flag that the loop reads between steps."""

import signal
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopSignal:
    """While entered, the first SIGTERM or SIGINT sets `received`; a second one ends the process at once."""

    def __init__(self) -> None:
        """Start without a received signal."""
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        """Install the handlers (possible in the main thread only; elsewhere signals keep their handlers)."""
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread
            pass
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        # restore the previous handler now, so that a second signal stops the process at once
        signal.signal(number, self._before[number])

    def agreed(self) -> str | None:
        """Return the signal's name if any process has received one; all processes agree whether one has."""
        if jax.process_count() == 1:
            return self.received
        anyone = multihost_utils.process_allgather(np.array(self.received is not None))
        return (self.received or "a signal to another process") if anyone.any() else None
