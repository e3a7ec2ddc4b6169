"""The loop under faults: every promise about stopping, resuming and bad numbers, on real processes."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fm_jax.checkpoint import read
from tests.close import close
from tests.train.trainee import METRIC

ROOT = Path(__file__).parents[2]
STEPS = 12


def command(workdir: Path, *options: str, steps: int = STEPS) -> list[str]:
    return [sys.executable, "-u", "-m", "tests.train.trainee", str(workdir), str(steps), *options]


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    flags, count = re.subn(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    assert count == 1  # the rest of conftest's flags holds here too
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **more}


def run(workdir: Path, *options: str, devices: int = 1, steps: int = STEPS) -> subprocess.CompletedProcess[str]:
    line = command(workdir, *options, steps=steps)
    return subprocess.run(line, env=environment(devices), cwd=ROOT, capture_output=True, text=True, timeout=300)


def losses(text: str) -> dict[int, str]:
    return {int(step): value for step, value in re.findall(r"^loss (\d+) (\S+)$", text, re.MULTILINE)}


def digest(text: str) -> str:
    found = re.search(r"^digest (\w+)$", text, re.MULTILINE)
    assert found, text
    return found[1]


def until(process: subprocess.Popen[str], pattern: str) -> str:
    """Read the process's lines until one matches; return all of them."""
    assert process.stdout
    seen = []
    for line in process.stdout:
        seen.append(line)
        if re.match(pattern, line):
            return "".join(seen)
    raise AssertionError("".join(seen))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The output of a run that nothing disturbed."""
    done = run(tmp_path_factory.mktemp("whole"))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_resume_after_kill_is_bitwise(whole: str, tmp_path: Path) -> None:
    """Kill -9 while a save is in the air, twice; the losses and the final state are those of the undisturbed run."""
    seen: dict[int, str] = {}
    for last in (3, 7):
        options = ("--crawl", "0.05")
        process = subprocess.Popen(
            command(tmp_path, *options), env=environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        text = until(process, rf"loss {last} ")
        process.send_signal(signal.SIGKILL)  # every step saves, asynchronously: one is being written now
        assert process.stdout
        seen |= losses(text + process.stdout.read())
        process.wait()
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    started = int(re.search(r"^start (\d+)$", done.stdout, re.MULTILINE)[1])  # type: ignore[index]
    assert started >= 4, "the checkpoints of the killed runs were not used"
    seen |= losses(done.stdout)
    assert seen == losses(whole)
    assert digest(done.stdout) == digest(whole)


def test_resume_on_another_mesh(whole: str, tmp_path: Path) -> None:
    """Saved on one device, resumed on 8 (4-way fsdp): the losses of the undisturbed run."""
    assert run(tmp_path, steps=5).returncode == 0
    done = run(tmp_path, "--fsdp", "4", devices=8)
    assert done.returncode == 0, done.stderr
    before, after = losses(whole), losses(done.stdout)
    assert sorted(after) == list(range(6, STEPS + 1))
    for step, value in after.items():
        close(float.fromhex(value), float.fromhex(before[step]))


def test_sigterm_saves_and_says_try_again(whole: str, tmp_path: Path) -> None:
    """SIGTERM between saves: exit code 75, the last finished step is saved, and the run goes on exactly."""
    options = ("--crawl", "0.1", "--save-every", "0")
    process = subprocess.Popen(
        command(tmp_path, *options),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(process, r"loss 4 ")
    process.terminate()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 75, errors
    assert "SIGTERM: saved at step" in errors
    done = run(tmp_path, "--save-every", "0")
    assert digest(done.stdout) == digest(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "line", "step"),
    [(("--stalls", "5"), "waits", 5), (("--stalls", "0"), "waits", 0), (("--evaluates", "7"), "evaluates", 7)],
)
def test_sigterm_ends_a_wait_for_data_and_an_evaluation(
    whole: str, tmp_path: Path, options: tuple[str, ...], line: str, step: int
) -> None:
    """Neither is sat out: the last finished step is saved, and the run goes on exactly."""
    process = subprocess.Popen(
        command(tmp_path, "--save-every", "0", *options),
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(process, line)
    process.terminate()
    _, errors = process.communicate(timeout=200)  # the wait and the evaluation take 300 s
    assert process.returncode == 75, errors
    assert f"SIGTERM: {'saved' if step else 'nothing to save'} at step" in errors
    done = run(tmp_path, "--save-every", "0", *(("--evaluates", "7", "--batches", "0") if line == "evaluates" else ()))
    assert f"start {step}\n" in done.stdout or line == "waits"  # batches are read a few steps ahead
    assert digest(done.stdout) == digest(whole)
    if line == "evaluates":  # measured at the next start: step 7 is the best, so it has outlived the others
        assert read.record(tmp_path / "checkpoints" / "7")["metrics"] == {METRIC: 7.0}
        assert read.best(tmp_path / "checkpoints") == 7


def test_poisoned_batches_change_nothing(tmp_path: Path) -> None:
    """Three NaN batches in a row are skipped; a fourth stops the run with code 6 and the parameters still finite."""
    skipped = run(tmp_path / "few", "--poison", "4,5,6")
    assert skipped.returncode == 0, skipped.stderr
    stopped = run(tmp_path / "many", "--poison", "4,5,6,7")
    assert stopped.returncode == 6
    assert "not finite 4 times in a row" in stopped.stderr
    clean = losses(skipped.stdout)
    assert all(float.fromhex(clean[step]) < 6.0 for step in range(8, STEPS + 1))


def pair(workdir: Path, *options: str) -> list[subprocess.Popen[str]]:
    """Start two processes of one run, over loopback, each with half of every batch and half of the parameters."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    return [
        subprocess.Popen(
            command(workdir, "--fsdp", "2", *options),
            env=environment(FM_COORDINATOR_ADDRESS=address, FM_NUM_PROCESSES="2", FM_PROCESS_ID=str(index)),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_ends_an_evaluation(whole: str, tmp_path: Path) -> None:
    """Both stop before the same batch of it, save, and say try again; the next start measures what is missing."""
    processes = pair(tmp_path, "--save-every", "0", "--evaluates", "7")
    for process in processes:
        until(process, "evaluates")
    processes[1].terminate()
    ends = [process.communicate(timeout=200) for process in processes]  # the evaluation takes 300 s
    assert [process.returncode for process in processes] == [75, 75], ends
    assert all("saved at step 7 of" in errors for _, errors in ends)
    done = run(tmp_path, "--save-every", "0", "--evaluates", "7", "--batches", "0", "--fsdp", "2", devices=2)
    for step, value in losses(done.stdout).items():
        close(float.fromhex(value), float.fromhex(losses(whole)[step]))
    assert read.record(tmp_path / "checkpoints" / "7")["metrics"] == {METRIC: 7.0}


def test_two_processes_equal_one(whole: str, tmp_path: Path) -> None:
    """Two processes, each with half of every batch and half of the parameters: the same losses."""
    processes = pair(tmp_path, "--save-every", "5")
    deadline = time.monotonic() + 300  # some 20 s on an idle machine
    outputs = [process.communicate(timeout=max(1.0, deadline - time.monotonic())) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert digest(outputs[0][0]) == digest(outputs[1][0])
    before = losses(whole)
    for step, value in losses(outputs[0][0]).items():
        close(float.fromhex(value), float.fromhex(before[step]))
