import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fm_jax.checkpoint.together import agree, barrier
from fm_jax.core.errors import CheckpointError

ROOT = Path(__file__).parents[2]


def test_one_process_agrees_with_itself():
    agree(None)
    barrier("alone")
    with pytest.raises(CheckpointError, match="why"):
        agree(CheckpointError("why"))


@pytest.mark.slow
def test_two_processes_save_restore_and_refuse_as_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.checkpoint.pair", str(rank), port, str(tmp_path / "run")],
            cwd=ROOT,
            env={**os.environ, **flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=300) for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], said
    first, second = ([line for line in out.splitlines() if "Gloo" not in line] for out, _ in said)
    assert first[:2] == second[:2]
    assert first[0].startswith("old CheckpointError: checkpoint 3 is not above the latest, 3")
    assert "is damaged (its sha256 differs)" in first[1]
    assert first[2].startswith("unsealed ResourceError: saving checkpoint 4")
    assert second[2] == "unsealed CheckpointError: process 0 did not seal checkpoint 4; see its error"
    assert first[3] == second[3] == "done"
