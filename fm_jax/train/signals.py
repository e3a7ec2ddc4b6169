"""Turn SIGTERM and SIGINT into a flag that the loop reads between steps, or into the end of what can be repeated.

Several processes compute every step, and every batch of an evaluation, together. So all must stop at the same one: they
ask each other about every two seconds, at a step or a batch that they all know.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, TypeVar

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
        self._interrupts, self._stopping = False, False
        self._steps = _Poll()

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

        Several processes end an evaluation together, between two batches of `interruptible`; a wait for data only sets
        `received`.

        Raises:
            Interrupted: a signal came, in the block or before it.
        """
        if jax.process_count() > 1:
            token = _evaluation.set((self, _Poll()))
            try:
                yield
            finally:
                _evaluation.reset(token)
            return
        self._interrupts = True
        try:
            if self.received:
                raise Interrupted
            yield
        finally:
            self._interrupts = False

    def agreed(self, step: int) -> str | None:
        """Return the signal's name if any process has received one; call it after each step, with the step's number."""
        if jax.process_count() == 1:
            return self.received
        self._stopping = self._stopping or self._steps.ask(step, self.received is not None)
        return (self.received or "a signal to another process") if self._stopping else None

    def between(self, poll: "_Poll", batch: int) -> None:
        """Raise `Interrupted` on every process before the same batch of an evaluation if any has received a signal."""
        self._stopping = self._stopping or poll.ask(batch, self.received is not None)
        if self._stopping:
            raise Interrupted


class _Poll:
    """Questions to all processes, at numbers which they all know: the slowest one's pace sets the next number."""

    def __init__(self) -> None:
        self._asked: int | None = None  # number of the last question
        self._next, self._since = 0, 0.0  # number of the next one, and the time of the last

    def ask(self, number: int, received: bool) -> bool:
        """Return whether any process has received a signal; False at once where no question is due.

        Args:
            number: of a step or batch, the same on all processes.
            received: whether this process has received one.
        """
        if number < self._next:
            return False
        now = time.monotonic()
        mine = np.array([received, now - self._since], np.float32)
        signals, seconds = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, 2).T
        if self._asked is None:  # how long the numbers before this one took is not known
            gap = 1
        else:
            passed = number - self._asked
            gap = int(POLL_SECONDS * passed / max(float(seconds.max()), 1e-6))
            gap = min(max(gap, 1), 4 * passed)  # a few fast numbers say little about the next
        self._asked, self._since, self._next = number, now, number + gap
        return bool(signals.any())


_evaluation: ContextVar[tuple[StopSignal, _Poll] | None] = ContextVar("evaluation", default=None)
Item = TypeVar("Item")


def interruptible(batches: Iterator[Item]) -> Iterator[Item]:
    """Yield the batches of an evaluation that all processes compute together.

    Raises:
        Interrupted: inside `StopSignal.interrupting`, if a process has received a signal.
    """
    for number, batch in enumerate(batches):
        if (asking := _evaluation.get()) is not None:
            stop, poll = asking
            stop.between(poll, number)
        yield batch


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
