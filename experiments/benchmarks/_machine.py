"""How busy other processes keep the cores that a benchmark measures on, as the kernel counts it."""

import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from fm_jax.core.errors import ConfigError

_STAT = Path("/proc/stat")
_TICK = os.sysconf("SC_CLK_TCK")  # the kernel counts in hundredths of a second
_TAKEN = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal: all but idle, iowait and the guests in user


def cores(count: int) -> tuple[int, ...]:
    """Return the first `count` cores that this process may use.

    Raises:
        ConfigError: it may use fewer.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < count:
        raise ConfigError(f"threads {count} is more than the {len(allowed)} cores of this process; lower threads")
    return tuple(allowed[:count])


def taken(cpus: Collection[int], file: Path = _STAT) -> float:
    """Return the seconds for which these cores were not idle since the start, by whatever process or guest.

    Raises:
        ConfigError: the system does not tell, so a busy machine could not be seen.
    """
    names, ticks, cores_read = {f"cpu{number}" for number in cpus}, 0, 0
    try:
        lines = file.read_text("ascii").splitlines()
    except OSError:
        raise ConfigError(f"{file} cannot be read: benchmarks run on Linux only, where load can be seen") from None
    for line in lines:
        name, *counts = line.split()
        if name in names:
            ticks += sum(int(counts[place]) for place in _TAKEN)
            cores_read += 1
    if cores_read != len(names):
        raise ConfigError(f"{file} has {cores_read} of the cores {', '.join(sorted(names))}")
    return ticks / _TICK


@dataclass
class Others:
    """The share of some cores that other processes took, over the spans that were added."""

    cpus: tuple[int, ...]
    seconds: float = 0.0  # of their CPU time
    possible: float = 0.0  # of CPU time in all

    def add(self, taken_before: float, taken_after: float, own: float, wall: float) -> None:
        """Add a span of `wall` seconds in which the benchmark itself took `own` CPU seconds.

        A span may count below 0: a tick that belongs to one span may be counted in the next.
        """
        self.seconds += taken_after - taken_before - own
        self.possible += wall * len(self.cpus)

    @property
    def share(self) -> float:
        """Return the share; 0 before the first span."""
        return min(1.0, max(0.0, self.seconds / self.possible)) if self.possible else 0.0


def watch(cpus: tuple[int, ...], seconds: float) -> float:
    """Return the share of the cores that all processes take while this one sleeps."""
    others, before, started, own = Others(cpus), taken(cpus), time.perf_counter(), time.process_time()
    time.sleep(seconds)
    wall = time.perf_counter() - started
    others.add(before, taken(cpus), time.process_time() - own, wall)
    return others.share


def wait_until_quiet(cpus: tuple[int, ...], most: float, seconds: float) -> bool:
    """Wait until others take at most a share `most` of the cores for one second; False if that takes too long."""
    end = time.monotonic() + seconds
    while watch(cpus, 1.0) > most:
        if time.monotonic() >= end:
            return False
    return True
