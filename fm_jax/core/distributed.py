"""Start of a run over several processes: read the launcher's environment variables, then join the others.

JAX by itself reads neither torchrun's variables nor a plain "number of processes". Supported launchers:
our own, torchrun, SLURM, Kubernetes indexed jobs, TPU pods.
"""

import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from fm_jax.core.errors import ConfigError

HEARTBEAT_SECONDS = 30  # a dead peer ends the run in about this time; JAX's default takes 100 s
# In the messages of XLA, gloo and NCCL about a process that is gone; each of them has its own exception for it.
_GONE = re.compile(
    r"(?:gloo|nccl).*?(?:connection|closed|reset|timed? ?out|remote)|connection (?:closed|reset) by peer"
    r"|heartbeat|coordination service.*?(?:unavailable|error)|task .* (?:is unhealthy|disconnected)",
    re.IGNORECASE | re.DOTALL,
)
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class Spec:
    """Coordinator, id and devices of one process; None: JAX detects the value itself."""

    source: str
    coordinator: str | None = None  # host:port of process 0
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None  # None: all devices of this machine


def detect(env: Mapping[str, str]) -> Spec | None:
    """Read this process's `Spec` from the environment; None for a run of one process.

    The first that is set wins: FM_* (with JOB_COMPLETION_INDEX as the id in a Kubernetes indexed job),
    torchrun's RANK, a SLURM step, a TPU pod, `FM_DISTRIBUTED=auto` (whatever JAX itself detects).

    Raises:
        ConfigError: a set of variables is incomplete or contradicts itself; the message names the variable.
    """
    for read in (_explicit, _torchrun, _slurm, _tpu, _automatic):
        launched, spec = read(env)
        if launched:
            return None if spec is not None and spec.num_processes == 1 else spec
    if _number(env, "WORLD_SIZE", "0", "torchrun") > 1:
        raise ConfigError(f"torchrun: WORLD_SIZE is {env['WORLD_SIZE']} but RANK is missing")
    return None


def start(env: Mapping[str, str] | None = None) -> Spec | None:
    """Join the other processes, if the environment names any; call before any computation.

    JAX's preemption service is turned off because it swallows SIGTERM; the training loop has its own handler.
    Traffic between processes is not authenticated: on loopback the coordinator listens on loopback only;
    elsewhere use an isolated network.

    Returns:
        The result of `detect`; None for one process.

    Raises:
        ConfigError: the environment contradicts itself, or asks for "auto" where JAX detects nothing.
    """
    spec = detect(os.environ if env is None else env)
    if spec is None or jax.distributed.is_initialized():
        return spec
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    wanted: dict[str, Any] = {"heartbeat_timeout_seconds": HEARTBEAT_SECONDS}
    if spec.coordinator is not None:
        host, _, port = spec.coordinator.rpartition(":")
        wanted |= {
            "coordinator_address": spec.coordinator,
            "num_processes": spec.num_processes,
            "process_id": spec.process_id,
            "local_device_ids": spec.local_device_ids,
            "cluster_detection_method": "deactivate",
        }
        if host in _LOOPBACK:
            wanted["coordinator_bind_address"] = f"{host}:{port}"
    known = inspect.signature(jax.distributed.initialize).parameters
    try:
        jax.distributed.initialize(**{name: value for name, value in wanted.items() if name in known})
    except ValueError as error:
        raise ConfigError(f"{spec.source}: could not connect to the other processes: {error}") from error
    return spec


def lost_peer(error: BaseException) -> str | None:
    """Return what was said of a process that is gone, if that caused the error of a run of several; else None."""
    cause: BaseException | None = error if jax.distributed.is_initialized() else None
    while cause is not None:
        if found := _GONE.search(str(cause)):
            return " ".join(found[0].split())[:120]
        cause = cause.__cause__ or cause.__context__
    return None


def _explicit(env: Mapping[str, str]) -> tuple[bool, Spec | None]:
    names = ("FM_COORDINATOR_ADDRESS", "FM_NUM_PROCESSES", "FM_PROCESS_ID")
    if not any(env.get(name) for name in names):
        return False, None
    source = "FM_*"
    if not env.get("FM_PROCESS_ID") and env.get("JOB_COMPLETION_INDEX"):
        source = "FM_* and JOB_COMPLETION_INDEX"
        env = {**env, "FM_PROCESS_ID": env["JOB_COMPLETION_INDEX"]}
    elif not env.get("FM_NUM_PROCESSES") and not env.get("FM_PROCESS_ID") and _in_slurm_step(env):
        return False, None  # only the address is given: SLURM supplies the ids
    address, number, index = _place(env, *names, source)
    local = env.get("FM_LOCAL_DEVICE_IDS")
    if local and not re.fullmatch(r"\d+(,\d+)*", local):
        raise ConfigError(f"FM_LOCAL_DEVICE_IDS must look like 0,1, not {local!r}")
    return True, Spec(source, address, number, index, tuple(map(int, local.split(","))) if local else None)


def _torchrun(env: Mapping[str, str]) -> tuple[bool, Spec | None]:
    if not env.get("RANK") or (not env.get("WORLD_SIZE") and _in_slurm_step(env)):
        return False, None
    # torchrun's own rendezvous store listens on MASTER_PORT, so we use the next port.
    port = _number(env, "MASTER_PORT", "29500", "torchrun") + 1
    host = env.get("MASTER_ADDR", "")
    address, number, index = _place(
        {**env, "MASTER_ADDR": host and f"{host}:{port}"}, "MASTER_ADDR", "WORLD_SIZE", "RANK", "torchrun"
    )
    several = _number(env, "LOCAL_WORLD_SIZE", "1", "torchrun") > 1
    return True, Spec("torchrun", address, number, index, _own_device(env, "LOCAL_RANK", several))


def _in_slurm_step(env: Mapping[str, str]) -> bool:
    # SLURM_NTASKS is also set in the batch script, outside any step, where only one process runs.
    return bool(env.get("SLURM_STEP_NODELIST")) and _number(env, "SLURM_NTASKS", "1", "SLURM") > 1


def _slurm(env: Mapping[str, str]) -> tuple[bool, Spec | None]:
    if not _in_slurm_step(env):
        return False, None
    address = env.get("FM_COORDINATOR_ADDRESS") or env.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        # First name of node[03-05,09],other or node7,node8; a port that two jobs on a node do not share.
        first = re.match(r"([^,\[]+)(?:\[(\d+))?", env["SLURM_STEP_NODELIST"])
        job = _number(env, "SLURM_JOB_ID", None, "SLURM") * 31 + _number(env, "SLURM_STEP_ID", "0", "SLURM")
        address = f"{first[1]}{first[2] or ''}:{61440 + job % 4096}" if first else ""
    address, number, index = _place(
        {**env, "address": address}, "address", "SLURM_NTASKS", "SLURM_PROCID", "the SLURM step"
    )
    per_node = re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return True, Spec(
        "SLURM", address, number, index, _own_device(env, "SLURM_LOCALID", max(map(int, per_node), default=1) > 1)
    )


def _tpu(env: Mapping[str, str]) -> tuple[bool, Spec | None]:
    hosts = [host for host in env.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    slices = _number(env, "MEGASCALE_NUM_SLICES", "1", "the TPU pod")
    if len(hosts) <= 1 and slices <= 1:
        return False, None
    needed = ["TPU_WORKER_ID"] + (["MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_SLICE_ID"] if slices > 1 else [])
    for name in needed:
        if not env.get(name):
            raise ConfigError(f"the TPU pod: {name} is missing")
    return True, Spec("TPU pod")


def _automatic(env: Mapping[str, str]) -> tuple[bool, Spec | None]:
    if (choice := env.get("FM_DISTRIBUTED", "")) not in ("", "auto"):
        raise ConfigError(f"FM_DISTRIBUTED must be 'auto' or unset, not {choice!r}")
    return choice == "auto", Spec("auto")


def _place(env: Mapping[str, str], address: str, number: str, index: str, source: str) -> tuple[str, int, int]:
    """Return (coordinator address, number of processes, process id), checked against each other."""
    for name in (address, number, index):
        if not env.get(name):
            raise ConfigError(f"{source}: {name} is missing")
    count, own = _number(env, number, None, source), _number(env, index, None, source)
    if count < 1 or not 0 <= own < count:
        raise ConfigError(f"{source}: {index} {own} must be at least 0 and below {number} {count}")
    if not re.fullmatch(r"\S+:\d{1,5}", env[address]):
        raise ConfigError(f"{source}: {address} must look like host:port, not {env[address]!r}")
    return env[address], count, own


def _own_device(env: Mapping[str, str], name: str, several: bool) -> tuple[int, ...] | None:
    """Return this process's accelerator if its machine runs several processes; None if it sees only its own."""
    # JAX itself takes the local rank even for one process a machine, which then leaves all but one GPU idle.
    bound = len(env.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")) == 1 or env.get("JAX_LOCAL_DEVICE_IDS")
    return (_number(env, name, None, "the launcher"),) if several and not bound else None


def _number(env: Mapping[str, str], name: str, default: str | None, source: str) -> int:
    """Return a variable as an integer >= 0; ConfigError names it if it is missing or malformed."""
    text = env.get(name) or default
    if text is None:
        raise ConfigError(f"{source}: {name} is missing")
    if not re.fullmatch(r"\d{1,9}", text):
        raise ConfigError(f"{source}: {name} must be a number, not {text[:40]!r}")
    return int(text)
