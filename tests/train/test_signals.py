import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fm_jax.core.errors import Preempted
from fm_jax.train import signals
from fm_jax.train.signals import Interrupted, StopSignal, preemptible

ROOT = Path(__file__).parents[2]


def tell(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.agreed(1) is None
        tell(number)
        assert stop.received == stop.agreed(2) == number.name
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL  # now: at once
    assert signal.getsignal(number) == before


def test_a_signal_ends_what_may_be_interrupted() -> None:
    with StopSignal() as stop:
        with pytest.raises(Interrupted), stop.interrupting():
            tell()
            time.sleep(60)
        with pytest.raises(Interrupted), stop.interrupting():  # it came before
            raise AssertionError("the block must not start")


def test_several_processes_are_not_interrupted_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals.jax, "process_count", lambda: 2)
    with StopSignal() as stop, stop.interrupting():
        tell()
    assert stop.received == "SIGTERM"


@pytest.mark.parametrize(("pace", "asked"), [(0.5, [1, 2, 6, 10]), (30.0, list(range(1, 11))), (1e-3, [1, 2, 6])])
def test_several_processes_ask_by_the_clock(monkeypatch: pytest.MonkeyPatch, pace: float, asked: list[int]) -> None:
    """They ask every two seconds at the slowest one's pace; the first step, which compiles, takes long."""
    now, questions = 0.0, []

    def gather(mine: np.ndarray) -> np.ndarray:
        questions.append(step)
        return np.stack([mine, [float(step == 10), 0.0]])

    monkeypatch.setattr(signals.jax, "process_count", lambda: 2)
    monkeypatch.setattr(signals.multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    stop = StopSignal()
    for step in range(1, 11):
        now += 60.0 if step == 1 else pace
        answer = stop.agreed(step)
    assert questions == asked
    assert answer == ("a signal to another process" if asked[-1] == 10 else None)


def test_several_processes_end_an_evaluation_before_the_same_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process receives the signal while batch 5 runs; both learn of it at their next question."""
    now, questions = 0.0, list[int]()

    def gather(mine: np.ndarray) -> np.ndarray:
        questions.append(len(seen))
        return np.stack([mine, [float(len(seen) > 5), 0.0]])

    def batches() -> Iterator[int]:
        nonlocal now
        for number in range(20):
            now += 0.5
            yield number

    monkeypatch.setattr(signals.jax, "process_count", lambda: 2)
    monkeypatch.setattr(signals.multihost_utils, "process_allgather", gather)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    stop, seen = StopSignal(), list[int]()
    with pytest.raises(Interrupted), stop.interrupting():
        seen.extend(signals.interruptible(batches()))
    assert questions == [0, 1, 5, 9]
    assert seen == list(range(9))
    assert stop.agreed(1) == "a signal to another process"  # without another question
    assert list(signals.interruptible(batches())) == list(range(20))  # outside of an evaluation
    assert len(questions) == 4


def test_outside_of_training_a_signal_ends_the_run_as_preempted() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="SIGTERM: stopped outside of training"), preemptible():
        tell()
    assert signal.getsignal(signal.SIGTERM) == before


TRAINS = """
import signal, time
from fm_jax.train.signals import StopSignal
with StopSignal() as stop:
    print("ready", flush=True)
    while not stop.received:
        time.sleep(0.01)
    print("told", flush=True)
    time.sleep(300)
"""


def test_the_second_signal_ends_the_process_at_once() -> None:
    with subprocess.Popen([sys.executable, "-c", TRAINS], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in ("ready\n", "told\n"):
            assert process.stdout.readline() == line
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
