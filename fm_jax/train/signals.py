"""Turn SIGTERM and SIGINT into a flag that the loop reads between steps, or into the end of what can be repeated."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fm_jax.core.errors import Preempted

POLL_SECONDS = 2.0  # several processes ask each other for signals about this often


class Interrupted(BaseException):
    """A signal ended an evaluation or a wait for data. No `except Exception` on the way may swallow it."""


class StopSignal:
    """While entered, the first SIGTERM or SIGINT sets `received`; a second one ends the process at once."""

    def __init__(self) -> None:
        """Start without a received signal."""
        self.received: str | None = None
        self._before: dict[int, Any] = {}
        self._interrupts = False
        self._asked, self._next, self._since = 0, 0, time.monotonic()  # steps, and the time, of the last question

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
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        if self._interrupts:
            raise Interrupted

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a signal end the block with `Interrupted`: a wait for data, or an evaluation, which changes no state.

        With several processes a signal only sets `received`: one process must not leave a computation of them all.

        Raises:
            Interrupted: a signal came, in the block or before it.
        """
        if jax.process_count() > 1:
            yield
            return
        self._interrupts = True
        try:
            if self.received:
                raise Interrupted
            yield
        finally:
            self._interrupts = False

    def agreed(self, step: int) -> str | None:
        """Return the signal's name if any process has received one; call it after each step, with the step's number.

        Several processes must stop at the same step. They ask each other at steps which they all know: the slowest
        one's pace since the last question sets the next, about `POLL_SECONDS` later.
        """
        if jax.process_count() == 1:
            return self.received
        if step < self._next:
            return None
        now = time.monotonic()
        mine = np.array([self.received is not None, now - self._since], np.float32)
        signals, seconds = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, 2).T
        steps = step - self._asked if self._next else 1  # a resumed run begins at any step
        self._asked, self._since = step, now
        self._next = step + max(int(POLL_SECONDS * steps / max(float(seconds.max()), 1e-6)), 1)
        return (self.received or "a signal to another process") if signals.any() else None


@contextmanager
def preemptible() -> Iterator[None]:
    """Let SIGTERM end the block with `Preempted`, once: before and after training there is nothing to save.

    `fit` has a `StopSignal` of its own while it trains. A second SIGTERM ends the process at once.

    Raises:
        Preempted: SIGTERM was received.
    """

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Preempted(
            f"{signal.Signals(number).name}: stopped outside of training, where there is nothing to save; "
            "run the same command again to continue"
        )

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
