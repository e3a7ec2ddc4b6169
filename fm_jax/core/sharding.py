"""Logical axis names -> mesh axes: the only place that decides how arrays are split.

Parameters carry their names where they are made (`nn.with_logical_partitioning`); activations are
constrained at block boundaries (`constrain`). Model code holds names, this table holds decisions.
"""

import math
import sys
from functools import cache
from typing import Any

import flax.linen as nn
import jax
from flax.core import meta
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fm_jax.core import tree
from fm_jax.core.errors import ConfigError
from fm_jax.core.mesh import AXES
from fm_jax.core.types import Params

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": ("data", "fsdp"),
    "replica": "data",  # a batch whose width takes fsdp
    "time": "sequence",
    "width": None,
    "logits": "tensor",
    # parameters
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "mlp": "tensor",
    "classes": None,
    "norm": None,
}
# A vocabulary is what the tokenizer made it, 50,257 say, so a mesh axis that does not divide it leaves it whole; the
# other sizes are chosen by whoever chooses the mesh, and are refused.
_WHOLE_IF_UNEVEN = ("vocab",)


def spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """Translate logical names, one per dimension (None: not split), into a partition spec."""
    unknown = [name for name in names if name is not None and name not in RULES]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown}; known are {', '.join(RULES)}")
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain the layout of `x` (same shape); does nothing without a mesh, or inside `pmap` and `shard_map`.

    A dimension that its mesh axes do not divide (a last short batch, one decoded token) is not split.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not set(AXES) <= set(mesh.auto_axes):  # inside `pmap` and `shard_map` x is one device's part already
        return x
    axes = [axis if size % _ways(mesh, axis) == 0 else None for size, axis in zip(x.shape, spec(names), strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def shardings(boxed: Any, mesh: Mesh) -> Params:
    """Return a NamedSharding for every leaf of an abstract tree as `jax.eval_shape(model.init)` gives it.

    Leaves boxed by `nn.with_logical_partitioning` are split by `RULES`; others are replicated. A vocabulary that its
    mesh axis does not divide is replicated along that axis, with a printed line.

    Raises:
        ConfigError: a mesh axis does not divide another dimension; the message names parameter, dimension and axis.
    """

    def place(path: str, leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, PartitionSpec())
        axes = list(spec(leaf.names))
        for number, (size, name, axis) in enumerate(zip(leaf.value.shape, leaf.names, axes, strict=True)):
            if not size % _ways(mesh, axis):
                continue
            if name not in _WHOLE_IF_UNEVEN:
                raise ConfigError(
                    f"{path}: dimension {name!r} of size {size} is not divisible by "
                    f"mesh axis {axis} of size {_ways(mesh, axis)}"
                )
            _say_whole(path, size, axis, _ways(mesh, axis))
            axes[number] = None
        return NamedSharding(mesh, PartitionSpec(*axes))

    flat = {
        "/".join(str(getattr(key, "key", key)) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata))
    }
    return tree.unflatten({path: place(path, leaf) for path, leaf in flat.items()})


@cache
def _say_whole(path: str, size: int, axis: str, ways: int) -> None:
    """Say once that a vocabulary is not split."""
    print(
        f"{path}: its {size} rows are not divisible by mesh axis {axis} of size {ways}, so each device keeps them all",
        file=sys.stderr,
    )


def ways(name: str) -> int:
    """Return into how many parts the mesh in scope splits a logical axis; 1 without a mesh, or inside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return _ways(mesh, RULES[name]) if set(AXES) <= set(mesh.auto_axes) else 1


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a value that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch's first axis; fields may have any further axes."""
    return NamedSharding(mesh, spec(("batch",)))


def batch_ways(mesh: Mesh) -> int:
    """Return the number of shards that a batch is split into."""
    return _ways(mesh, RULES["batch"])


def _ways(mesh: Any, axis: str | tuple[str, ...] | None) -> int:
    axes = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return math.prod(mesh.shape[name] for name in axes)
