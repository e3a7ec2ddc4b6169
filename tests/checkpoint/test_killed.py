"""Checkpoints under kill -9: what was called sealed stays readable and right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _killed(directory: Path, kills: int, seed: int) -> None:
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    command = [sys.executable, "-m", "tests.checkpoint.killed", str(directory), str(kills), str(seed)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **flags}, capture_output=True, text=True, timeout=300 + 10 * kills
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert (seen["kills"], seen["status"]) == (kills, 0), done.stderr
    assert seen["cut"] > kills / 4, "the kills missed the saves, so nothing was tried"
    assert seen["final"] >= seen["announced"] + 3
    assert list((directory / "unsealed").iterdir()) == []


def test_a_killed_run_loses_no_sealed_step(tmp_path):
    _killed(tmp_path, kills=3, seed=0)


@pytest.mark.slow
def test_a_run_killed_forty_times_loses_no_sealed_step(tmp_path):
    _killed(tmp_path, kills=40, seed=1)
