"""End a run that hangs: a reading process that stopped, a peer that is alive but stuck, a device that never answers."""

import faulthandler
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from fm_jax.core.errors import Preempted


class Watchdog:
    """While entered, a thread ends the process if one watched wait takes longer than `seconds`; 0: never.

    It prints the stack of every thread and one line, kills the reading processes and exits with `Preempted.code`, as
    nothing is wrong with the last checkpoint. No exception could do that: the main thread may wait in C++.

    Time in which the whole process was suspended (Ctrl-Z, a paused container) does not count.
    """

    def __init__(self, seconds: float, *, leave: Callable[[str], object] | None = None) -> None:
        """Take the limit; `leave` is called with the line instead of ending the process (for tests)."""
        self._seconds, self._leave = seconds, leave or _leave
        self._wait: list[str] | None = None  # what is waited for; another list for each wait
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        """Start watching."""
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._done.set()
        if self._seconds:
            self._thread.join()

    @contextmanager
    def over(self, what: str) -> Iterator[None]:
        """Watch a block that waits for `what`, such as "a batch"."""
        self._wait = [what]
        try:
            yield
        finally:
            self._wait = None

    def _run(self) -> None:
        pause = min(self._seconds / 4, 5.0)
        seen, before, waited = self._wait, time.monotonic(), 0.0
        while not self._done.wait(pause):
            wait, now = self._wait, time.monotonic()
            if wait is not seen:
                seen, waited = wait, 0.0
            waited += min(now - before, 2 * pause)  # a longer gap: this thread was suspended too
            before = now
            if wait is not None and waited > self._seconds:
                self._leave(
                    f"stopped: no {wait[0]} for {self._seconds:g} s (fit.stall_after); the stacks above show where it "
                    "waits; run the same command again to continue from the last checkpoint"
                )
                return


def _leave(line: str) -> NoReturn:
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    for child in multiprocessing.active_children():  # a stopped one hears nothing but KILL
        child.kill()
    print(line, file=sys.stderr, flush=True)
    os._exit(Preempted.code)
