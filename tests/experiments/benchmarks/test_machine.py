"""What other processes take of the cores is what the kernel counted, less what the benchmark took itself."""

import os
import time

import pytest

from experiments.benchmarks import _machine
from fm_jax.core.errors import ConfigError
from tests.close import close

STAT = """cpu  9999 0 0 0 0 0 0 0 0 0
cpu0 100 10 20 5000 7 3 2 5 50 0
cpu1 300 0 0 5000 0 0 0 0 0 0
cpu10 7777 0 0 0 0 0 0 0 0 0
intr 1
"""


def test_idle_waiting_and_guests_are_not_counted(tmp_path):
    (tmp_path / "stat").write_text(STAT)
    tick = os.sysconf("SC_CLK_TCK")
    close(_machine.taken((0,), tmp_path / "stat") * tick, 140.0)
    close(_machine.taken((0, 1), tmp_path / "stat") * tick, 440.0)
    with pytest.raises(ConfigError, match="cpu1, cpu4"):
        _machine.taken((1, 4), tmp_path / "stat")
    with pytest.raises(ConfigError, match="Linux"):
        _machine.taken((0,), tmp_path / "nothing")


def test_the_share_of_others_is_over_all_spans():
    others = _machine.Others((0, 1))
    assert others.share == 0
    others.add(10.0, 12.0, own=1.5, wall=1.0)  # 0.5 of 2 CPU seconds
    others.add(12.0, 12.9, own=1.0, wall=1.0)  # a tick of it was counted before
    close(others.share, 0.1)


def test_this_process_at_work_is_seen():
    """Its own time is counted as taken, and taken off again as its own."""
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    before, end, own = _machine.taken(cpus), time.perf_counter() + 0.2, time.process_time()
    while time.perf_counter() < end:
        pass
    assert _machine.taken(cpus) - before > (time.process_time() - own) / 2


def test_more_threads_than_cores_are_refused():
    assert len(_machine.cores(1)) == 1
    with pytest.raises(ConfigError, match="threads 100000"):
        _machine.cores(100_000)


@pytest.mark.parametrize(("shares", "quiet"), [([0.01], True), ([0.5, 0.5, 0.02], True), ([0.5] * 9, False)])
def test_a_busy_machine_is_waited_for_but_not_forever(shares, quiet, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(_machine.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(_machine, "watch", lambda cpus, seconds: shares.pop(0))
    assert _machine.wait_until_quiet((0,), 0.05, 5.0) == quiet
