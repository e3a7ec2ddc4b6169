import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fm_jax.core.distributed import Spec, detect
from fm_jax.core.errors import ConfigError

FM = {"FM_COORDINATOR_ADDRESS": "h:1", "FM_NUM_PROCESSES": "4", "FM_PROCESS_ID": "2"}
TORCH = {"MASTER_ADDR": "m", "MASTER_PORT": "29500", "WORLD_SIZE": "8", "RANK": "3"}
SLURM = {
    "SLURM_STEP_NODELIST": "n[007-009,12]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "5",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
TPU = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}
PORT = 61440 + (5 * 31) % 4096


@pytest.mark.parametrize(
    ("env", "spec"),
    [
        ({}, None),
        (FM, Spec("FM_*", "h:1", 4, 2)),
        (FM | {"FM_LOCAL_DEVICE_IDS": "2,3"}, Spec("FM_*", "h:1", 4, 2, (2, 3))),
        (FM | TORCH | SLURM | TPU, Spec("FM_*", "h:1", 4, 2)),
        ({"FM_COORDINATOR_ADDRESS": "h:1", "FM_NUM_PROCESSES": "1", "FM_PROCESS_ID": "0"}, None),
        (
            {"FM_COORDINATOR_ADDRESS": "h:1", "FM_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"},
            Spec("FM_* and JOB_COMPLETION_INDEX", "h:1", 2, 1),
        ),
        ({"JOB_COMPLETION_INDEX": "1", "KUBERNETES_SERVICE_HOST": "k"}, None),  # independent runs of one job
        (TORCH, Spec("torchrun", "m:29501", 8, 3)),
        (TORCH | SLURM | TPU, Spec("torchrun", "m:29501", 8, 3)),
        (TORCH | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, Spec("torchrun", "m:29501", 8, 3, (1,))),
        (
            TORCH | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "1"},
            Spec("torchrun", "m:29501", 8, 3),
        ),
        (TORCH | {"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"MASTER_ADDR": "m"}, None),
        ({"WORLD_SIZE": "1"}, None),
        (SLURM, Spec("SLURM", f"n007:{PORT}", 4, 1)),
        (SLURM | {"SLURM_STEP_NODELIST": "gpu-a,gpu-b"}, Spec("SLURM", f"gpu-a:{PORT}", 4, 1)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)"}, Spec("SLURM", f"n007:{PORT}", 4, 1, (1,))),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1,2(x1),1"}, Spec("SLURM", f"n007:{PORT}", 4, 1, (1,))),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:7"}, Spec("SLURM", "127.0.0.1:7", 4, 1)),
        (SLURM | {"FM_COORDINATOR_ADDRESS": "127.0.0.1:7"}, Spec("SLURM", "127.0.0.1:7", 4, 1)),
        (SLURM | {"WORLD_SIZE": "4", "MASTER_ADDR": "m"}, Spec("SLURM", f"n007:{PORT}", 4, 1)),  # torch habits
        (SLURM | TPU, Spec("SLURM", f"n007:{PORT}", 4, 1)),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "5"}, None),  # the batch script itself
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (TPU, Spec("TPU pod")),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        ({"FM_DISTRIBUTED": "auto"}, Spec("auto")),
    ],
)
def test_detects(env: dict[str, str], spec: Spec | None) -> None:
    assert detect(env) == spec


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (FM | {"FM_NUM_PROCESSES": ""}, r"FM_\*: FM_NUM_PROCESSES is missing"),
        ({"FM_PROCESS_ID": "0"}, "FM_COORDINATOR_ADDRESS is missing"),
        ({"FM_COORDINATOR_ADDRESS": "h:1", "FM_NUM_PROCESSES": "2"}, "FM_PROCESS_ID is missing"),
        (FM | {"FM_PROCESS_ID": "4"}, "FM_PROCESS_ID 4 must be at least 0 and below FM_NUM_PROCESSES 4"),
        (FM | {"FM_PROCESS_ID": "-1"}, "FM_PROCESS_ID must be a number, not '-1'"),
        (FM | {"FM_NUM_PROCESSES": "0"}, "below FM_NUM_PROCESSES 0"),
        (FM | {"FM_COORDINATOR_ADDRESS": "host"}, "must look like host:port, not 'host'"),
        (FM | {"FM_LOCAL_DEVICE_IDS": "all"}, "FM_LOCAL_DEVICE_IDS must look like 0,1"),
        ({"RANK": "0"}, "torchrun: MASTER_ADDR is missing"),
        ({"RANK": "0", "MASTER_ADDR": "m"}, "torchrun: WORLD_SIZE is missing"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun: MASTER_ADDR is missing"),
        ({"WORLD_SIZE": "2"}, "RANK is missing"),
        (TORCH | {"LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is missing"),
        (TORCH | {"MASTER_PORT": "x"}, "MASTER_PORT must be a number"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_PROCID"}, "SLURM_PROCID is missing"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_JOB_ID"}, "SLURM_JOB_ID is missing"),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_ID is missing"),
        (TPU | {"MEGASCALE_NUM_SLICES": "2"}, "MEGASCALE_COORDINATOR_ADDRESS is missing"),
        ({"FM_DISTRIBUTED": "yes"}, "FM_DISTRIBUTED must be 'auto'"),
    ],
)
def test_names_the_variable_that_is_wrong(env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        detect(env)


def test_auto_where_nothing_can_be_detected_is_said_in_one_line() -> None:
    code = "from fm_jax.core.distributed import start\nstart({'FM_DISTRIBUTED': 'auto'})"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert "ConfigError: auto: could not connect to the other processes" in done.stderr.splitlines()[-1]


WORKER = """
import os, sys, time
from fm_jax.core.distributed import start
spec = start()
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = NamedSharding(mesh, P("data"))
x = jax.make_array_from_process_local_data(rows, np.full((1, 3), spec.process_id + 1, np.float32))
psum = jax.jit(jax.shard_map(lambda v: jax.lax.psum(v, "data"), mesh=mesh, in_specs=P("data"), out_specs=P()))(x)
total = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, P()))(x)
line = f"{jax.process_index()} of {jax.process_count()}, {len(jax.devices())} devices, {psum[0, 0]:g} {total:g}"
with open(sys.argv[1] + ".tmp", "w") as file:
    file.write(line)
os.replace(sys.argv[1] + ".tmp", sys.argv[1])
time.sleep(60)
"""


def test_two_processes_sum_over_loopback_and_die_of_sigterm(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",  # two local devices a process may deadlock gloo
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "FM_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "FM_NUM_PROCESSES": "2",
    }
    results = [tmp_path / "0", tmp_path / "1"]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(result)],
            env=env | {"FM_PROCESS_ID": result.name},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for result in results
    ]
    try:
        deadline = time.monotonic() + 300  # 3 s on an idle machine
        while not all(result.exists() for result in results):
            assert time.monotonic() < deadline, "not finished in time"
            assert all(worker.poll() is None for worker in workers), "a process died"
            time.sleep(0.05)
        assert [r.read_text() for r in results] == [f"{i} of 2, 2 devices, 3 9" for i in range(2)]
        for worker in workers:
            worker.send_signal(signal.SIGTERM)
        # One dies of the signal, the other of it too or of the loss of its peer; nobody waits for a heartbeat.
        codes = [worker.wait(timeout=15) for worker in workers]
        assert -signal.SIGTERM in codes
    finally:
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):
                worker.kill()
            worker.wait()
