"""Make an array directly in its shards from a function that reads parts of it.

Neither a device nor a host ever holds more than its share and one layer of a stacked leaf.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from fm_jax.core.errors import CheckpointError

_ALIGNED = 64  # bytes
_BLOCK = 1 << 20  # bytes that are read at once
_WHOLE = 1 << 25  # bytes of a stacked leaf up to which the host assembles it at once


def fill(piece: Callable[..., np.ndarray], leaf: Any, *, path: str, stacked: bool, axis: int) -> jax.Array:
    """Make one leaf directly in its shards.

    Args:
        piece: (shape, layer, index, out) -> a part of a layer; in `out` if that is given and fits.
        leaf: shape, dtype and sharding of the leaf; without a sharding it is put on the first local device.
        path: path of the leaf, for messages.
        stacked: whether the first axis of the leaf is the layer.
        axis: our axis that is the first axis in the file; blocks are read along it.
    """
    where = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    dtype = np.dtype(leaf.dtype)

    def read_in(shape: tuple[int, ...], layer: int, index: Any, out: np.ndarray | None = None) -> np.ndarray:
        # not made contiguous here: jax transposes three times faster than numpy
        return _cast(piece(shape, layer, index, out), dtype, path)

    def read_into(place: np.ndarray, shape: tuple[int, ...], layer: int, index: Any) -> None:
        """Read in blocks of the file's rows: large temporary arrays would cost more than the reading."""
        if not shape:
            place[...] = read_in(shape, layer, index)
            return
        start, stop, _ = index[axis].indices(shape[axis])
        height = max(1, _BLOCK * place.shape[axis] // max(1, place.nbytes))
        for top in range(start, stop, height):
            rows = slice(top, min(top + height, stop))
            block = place[(*(slice(None),) * axis, slice(rows.start - start, rows.stop - start))]
            part = read_in(shape, layer, (*index[:axis], rows, *index[axis + 1 :]), block)
            if part is not block:
                block[...] = part

    def assemble(index: Any) -> np.ndarray:
        assembled = aligned(
            tuple(len(range(*cut.indices(size))) for cut, size in zip(index, leaf.shape, strict=True)), dtype
        )
        if not stacked:
            read_into(assembled, leaf.shape, 0, index)
            return assembled
        for number, layer in enumerate(range(leaf.shape[0])[index[0]]):
            read_into(assembled[number, ...], leaf.shape[1:], layer, index[1:])
        return assembled

    layers, shape = leaf.shape[0] if stacked else 1, leaf.shape[1:]
    if layers == 1 or _in_host_memory(where) or leaf.size * dtype.itemsize <= _WHOLE:
        return _array(leaf.shape, where, assemble)
    start, put = _layer_writer(leaf.shape, dtype.name, where)
    made, inner = start(), _below(where)
    for layer in range(layers):
        # wait, or a fast disk would fill the host with layers faster than the device takes them
        made = jax.block_until_ready(put(made, _array(shape, inner, partial(read_in, shape, layer)), layer))
    return made


def _in_host_memory(where: Sharding) -> bool:
    """Say whether the devices use the host's memory."""
    devices: set[Any] = where.device_set
    return {device.platform for device in devices} == {"cpu"}


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an empty array of this shape, aligned so that a CPU device takes it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNED, np.uint8)
    start = -memory.ctypes.data % _ALIGNED
    return memory[start : start + size].view(dtype).reshape(shape)


def _array(shape: tuple[int, ...], where: Sharding, read: Callable[[Any], np.ndarray]) -> jax.Array:
    """Make an array from what `read(index)` returns; a part held by several devices is read once."""
    seen: dict[Any, np.ndarray] = {}

    def part(index: Any) -> np.ndarray:
        key = tuple((cut.start, cut.stop) for cut in index)
        if key not in seen:
            seen[key] = read(index)
        return seen[key]

    return jax.make_array_from_callback(shape, where, part)


def _cast(array: np.ndarray, dtype: np.dtype, path: str) -> np.ndarray:
    """Return an array in another dtype with its memory order kept; a value too large for float16 is an error."""
    with np.errstate(over="ignore"):
        converted = array.astype(dtype, copy=False)
    if dtype == np.float16 and array.dtype != dtype and (np.isinf(converted) & ~np.isinf(array)).any():
        raise CheckpointError(f"{path} holds a number too large for float16; load it as bfloat16 or float32")
    return converted


@lru_cache(maxsize=64)
def _layer_writer(shape: tuple[int, ...], dtype: str, where: Sharding) -> tuple[Any, Any]:
    """Return two compiled functions: () -> zeros in their shards; (array, layer, number) -> array, in place."""
    start = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=where)

    def put(array: jax.Array, layer: jax.Array, number: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(array, layer, number, 0)

    return start, jax.jit(put, donate_argnums=0, out_shardings=where)


def _below(where: Sharding) -> Sharding:
    """Return the sharding of one layer of a stacked leaf."""
    if isinstance(where, NamedSharding):
        return NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))
    return where
