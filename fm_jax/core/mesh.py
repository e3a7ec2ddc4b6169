"""One device mesh for the whole run, with four named axes."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from fm_jax.core.errors import ConfigError

AXES = ("data", "fsdp", "tensor", "sequence")


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one axis may be -1, which takes all remaining devices."""

    data: int = -1  # batch split, parameters replicated
    fsdp: int = 1  # batch and parameters split
    tensor: int = 1  # heads, feed-forward and vocabulary split
    sequence: int = 1  # time split (activations between blocks)


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arrange devices in a mesh with axes data, fsdp, tensor, sequence.

    Axes are of type Auto: the compiler's partitioner places the collectives, and model code stays
    single-device mathematics. (`jax.make_mesh` would make them Explicit.)

    Raises:
        ConfigError: the product of the sizes is not the number of devices; the message shows both.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = asdict(cfg)
    if bad := {name: size for name, size in sizes.items() if size < 1 and size != -1}:
        raise ConfigError(f"mesh sizes must be at least 1, or -1 to fill: {bad}")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"only one mesh axis may be -1, not {' and '.join(free)}")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if len(devices) % fixed:
            raise ConfigError(
                f"mesh.{free[0]} cannot be filled: {len(devices)} devices are not divisible by {fixed} "
                f"({_product(sizes, skip=free[0])})"
            )
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise ConfigError(f"the mesh {_product(sizes)} = {fixed} does not match the {len(devices)} available devices")
    shape = tuple(sizes[name] for name in AXES)
    # An axis of 4 on a torus of 16×16 takes a part of a physical axis, which `jax.make_mesh` refuses.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def platform() -> str:
    """Return what the code in scope is compiled for, "cpu", "gpu" or "tpu": the mesh's devices, else the default ones.

    The devices of a mesh need not be here: see `train/plan/`.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    named = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if named in ("cuda", "rocm") else str(named)


def _product(sizes: dict[str, int], skip: str = "") -> str:
    return " × ".join(f"{name} {size}" for name, size in sizes.items() if name != skip)
