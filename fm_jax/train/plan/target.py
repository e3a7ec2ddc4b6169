"""The chips that a plan compiles for: none of them has to be here."""

import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from fm_jax.core.errors import ConfigError, ResourceError
from fm_jax.train.chips import CHIPS, Chip

_TPUS = ("v5e", "v5p", "v6e")
_GPUS = ("h100", "h200")
_HOST = 8  # GPUs of one host, joined by NVLink
_CUDNN = 90700  # the version a plan assumes: 9.7
# Nothing is run, so no TPU of this machine is needed, waited for or complained of; but what the partitioner warns of is
# to be heard.
_LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at once, or one beside a run
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "1",
    "TPU_STDERR_LOG_LEVEL": "1",
}
_AIMED: ContextVar["Target | None"] = ContextVar("target", default=None)


@dataclass(frozen=True)
class Target:
    """A number of chips of one kind, as devices that can only be compiled for."""

    name: str  # CHIP:TOPOLOGY, as given
    chip: Chip
    devices: tuple[Any, ...]
    missing: str = ""  # the command that installs this chip's compiler; if set, the devices are virtual CPUs

    @property
    def is_gpu(self) -> bool:
        """Say whether the chip is a GPU."""
        return self.name.partition(":")[0] in _GPUS

    @property
    def usable(self) -> float:
        """Return the bytes of HBM that a program may take: of a GPU's, the nine tenths that launch.sh gives to XLA."""
        return self.chip.memory * (0.9 if self.is_gpu else 1.0)

    @property
    def options(self) -> dict[str, str]:
        """Return options of the compiler: kernels of a GPU that is not here cannot be timed."""
        return {"xla_gpu_autotune_level": "0"} if self.is_gpu and not self.missing else {}

    def link(self, ways: int) -> float:
        """Return the bytes a second that a chip sends in a group of `ways`: by NVLink only within one host."""
        return self.chip.network if self.is_gpu and ways > _HOST else self.chip.link


def resolve(text: str) -> Target:
    """Return the chips of CHIP:TOPOLOGY, such as v5e:2x4 or h200:8.

    Raises:
        ConfigError: the chip or the topology is unknown.
        ResourceError: this process's devices are made already, and too few of them to stand for the chips.
    """
    known = ", ".join((*_TPUS, *_GPUS))
    shape = re.fullmatch(r"([a-z0-9]+):([1-9]\d{0,4}(?:x[1-9]\d{0,4}){0,2})", text)
    if shape is None or shape[1] not in (*_TPUS, *_GPUS):
        raise ConfigError(f"--plan: {text[:80]!r} is not CHIP:TOPOLOGY, such as v5e:2x4 or h200:8; chips are {known}")
    name, sizes = shape[1], [int(size) for size in shape[2].split("x")]
    count = math.prod(sizes)
    dimensions = 1 if name in _GPUS else 3 if name == "v5p" else 2
    if len(sizes) != dimensions:
        wanted = {1: "a number of GPUs, such as 8", 2: "ROWSxCOLUMNS, such as 2x4", 3: "XxYxZ, such as 2x2x1"}
        raise ConfigError(f"--plan: a topology of {name} is {wanted[dimensions]}, not {shape[2]}")
    if name in _GPUS:
        if importlib.util.find_spec("jax_plugins") is None or not importlib.util.find_spec("jax_plugins.xla_cuda12"):
            wheels = " ".join(f"jax-cuda12-{part}=={jax.__version__}" for part in ("pjrt", "plugin"))
            return Target(text, CHIPS[name], _virtual(count), f"{sys.executable} -m pip install {wheels}")
        return Target(text, CHIPS[name], _gpus(name, count))
    found = importlib.util.find_spec("libtpu")
    if found is None:
        wheel = f"{sys.executable} -m pip install 'jax[tpu]=={jax.__version__}'"
        return Target(text, CHIPS[name], _virtual(count), wheel)
    folder = next(iter(found.submodule_search_locations or ()), "")
    for variable, value in _LIBTPU.items():
        os.environ.setdefault(variable, value)
    os.environ.setdefault("TPU_LIBRARY_PATH", str(Path(folder) / "libtpu.so"))
    alone = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
    return Target(text, CHIPS[name], _described("tpu", text, **alone))


def current() -> Target | None:
    """Return the chips that are planned for; None in a run that trains."""
    return _AIMED.get()


@contextmanager
def aimed(target: Target) -> Iterator[None]:
    """Let `stage` compile for these chips instead of training."""
    token = _AIMED.set(target)
    try:
        yield
    finally:
        _AIMED.reset(token)


@contextmanager
def with_cudnn(target: Target) -> Iterator[None]:
    """Answer what JAX asks the installed cuDNN and GPU while it traces fused attention, for GPUs that are not here."""
    if not target.is_gpu or target.missing:
        yield
        return
    module = "jax._src.cudnn.fused_attention_stablehlo"  # JAX has no public way to say which GPU is compiled for
    answers = {
        "check_cudnn_version": lambda: _CUDNN,
        "check_compute_capability": lambda least: tuple(map(int, least.split("."))) <= (9, 0),
        "is_cuda_compute_capability_equal": lambda exactly: exactly == "9.0",
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            try:
                stack.enter_context(mock.patch(f"{module}.{name}", answer))
            except (AttributeError, ImportError) as error:
                raise ResourceError(f"--plan: this jax asks cuDNN in another way ({error}); use jax 0.10.2") from error
        yield


def _virtual(count: int) -> tuple[Any, ...]:
    """Return virtual CPU devices, on which the step is partitioned as on the chips."""
    try:
        # one plan of a process must not leave too few for the next
        if (wanted := max(count, _HOST)) > jax.config.jax_num_cpu_devices:  # type: ignore[attr-defined]
            jax.config.update("jax_num_cpu_devices", wanted)
    except RuntimeError:  # the devices are made already
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ResourceError(
            f"--plan: {count} chips need as many virtual CPU devices, but this process has {len(devices)}"
        )
    return tuple(devices[:count])


def _described(platform: str, name: str, **more: Any) -> tuple[Any, ...]:
    from jax.experimental import topologies

    try:
        return tuple(topologies.get_topology_desc(name, platform, **more).devices)
    except Exception as error:  # of the plugin: it has no type of its own for a shape that no pod has
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"--plan: the compiler refuses the topology {name}: {said}") from error


def _gpus(name: str, count: int) -> tuple[Any, ...]:
    hosts = -(-count // _HOST)
    if count % hosts:
        raise ConfigError(f"--plan: {count} GPUs are not hosts of {_HOST}")
    facts = CHIPS[name]
    # Facts of the Hopper SXM boards, as XLA's GpuTargetConfigProto names them.
    config = f"""
      platform_name: "CUDA" device_description_str: "NVIDIA {name.upper()}"
      runtime_version {{ major: 12 minor: 8 }} dnn_version_info {{ major: 9 minor: 7 }}
      gpu_device_info {{
        cuda_compute_capability {{ major: 9 minor: 0 }} core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
        threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
        registers_per_core_limit: 65536 registers_per_block_limit: 65536 l2_cache_size: 52428800
        memory_bandwidth: {int(facts.bandwidth)} device_memory_size: {int(facts.memory)}
      }}"""
    return _described("cuda", name, topology=f"1x{hosts}x{count // hosts}", target_config=config)
