import signal
import subprocess
import sys
import time
from pathlib import Path

from fm_jax.train.watchdog import Watchdog

ROOT = Path(__file__).parents[2]


def test_a_wait_that_is_too_long_is_named_once() -> None:
    lines: list[str] = []
    with Watchdog(0.05, leave=lines.append) as watch:
        with watch.over("batch"):
            time.sleep(0.5)
        time.sleep(0.1)
    assert len(lines) == 1
    assert lines[0].startswith("stopped: no batch for 0.05 s (fit.stall_after)")


def test_short_waits_and_what_is_not_watched_take_any_time() -> None:
    lines: list[str] = []
    with Watchdog(0.2, leave=lines.append) as watch:
        for _ in range(5):
            with watch.over("batch"):
                time.sleep(0.06)
        time.sleep(0.5)
    assert lines == []


def test_0_never_ends_a_run() -> None:
    lines: list[str] = []
    with Watchdog(0.0, leave=lines.append) as watch, watch.over("batch"):
        time.sleep(0.1)
    assert lines == []


SUSPENDED = """
import time
from fm_jax.train.watchdog import Watchdog
with Watchdog(2.0) as watch, watch.over("batch"):
    print("waits", flush=True)
    time.sleep(0.3)
    time.sleep(0.3)
print("done")
"""


def test_time_in_which_the_process_was_suspended_does_not_count() -> None:
    with subprocess.Popen([sys.executable, "-c", SUSPENDED], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(3.0)
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=60)[0] == "done\n"
        assert process.returncode == 0


HANGS = """
import multiprocessing, os, signal, sys, time
from fm_jax.train.watchdog import Watchdog

def read(): time.sleep(300)

if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=read, daemon=True)
    child.start()
    os.kill(child.pid, signal.SIGSTOP)
    print(child.pid, flush=True)
    with Watchdog(0.3) as watch, watch.over("batch"):
        child.join()
"""


def test_the_process_ends_with_75_its_stacks_and_its_readers() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 75
    assert "Thread" in done.stderr and "in <module>" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("stopped: no batch for 0.3 s")
    status = Path(f"/proc/{done.stdout.strip()}/status")
    limit = time.monotonic() + 60
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < limit:
        time.sleep(0.05)
    assert not status.exists() or "State:\tZ" in status.read_text()
