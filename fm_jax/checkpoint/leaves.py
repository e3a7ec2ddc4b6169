"""The named leaves of a state, their dtypes and shapes, and the differences between two such lists."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

Signature = tuple[str, tuple[int, ...]]
"""Name of the dtype, and shape."""


def named(state: Any) -> dict[str, Any]:
    """Return {"opt_state/0/mu/head/kernel": leaf} for any tree, in the order of `jax.tree.leaves`.

    Raises:
        ValueError: two leaves share a name, or a leaf is not an array of plain numbers.
    """
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise ValueError(f"{name} is a {type(leaf).__name__}; a checkpoint can hold arrays only")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise ValueError(f"{name} is a typed random key; store its jax.random.key_data instead")
        if name in flat:
            raise ValueError(f"two leaves have the name {name}")
        flat[name] = leaf
    return flat


def signature(leaf: Any) -> Signature:
    """Return dtype and shape of an array or of an abstract array."""
    return np.dtype(leaf.dtype).name, tuple(leaf.shape)


def is_signature(data: Any) -> bool:
    """Say whether JSON data are a signature, as `signature` returns it."""
    if not isinstance(data, list) or list(map(type, data)) != [str, list]:
        return False
    try:
        np.dtype(data[0])
    except (TypeError, ValueError):
        return False
    return all(type(size) is int and 0 <= size < 1 << 48 for size in data[1])


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return shape, dtype and sharding of a leaf; without a sharding it is put on the first local device."""
    where = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def size(leaves: Iterable[Any]) -> int:
    """Return the bytes of the leaves; a leaf on several devices counts once."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def amount(count: int) -> str:
    """Return a number of bytes as text, such as 1.5 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def show(signature: Signature) -> str:
    """Return a signature as text, such as float32[3,4]."""
    return f"{signature[0]}[{','.join(map(str, signature[1]))}]"


def differences(stored: Mapping[str, Signature], wanted: Mapping[str, Signature]) -> list[str]:
    """Return one line for every leaf that is missing, superfluous, or has another dtype or shape."""
    changed = [
        f"{name}: stored {show(stored[name])}, wanted {show(wanted[name])}"
        for name in wanted
        if name in stored and stored[name] != wanted[name]
    ]
    missing = [f"{name}: wanted, not stored" for name in wanted if name not in stored]
    return changed + missing + [f"{name}: stored, not wanted" for name in stored if name not in wanted]


def listing(problems: list[str], limit: int) -> str:
    """Return the first problems in one line, and the number of further ones."""
    more = f"; and {len(problems) - limit} more" if len(problems) > limit else ""
    return "; ".join(problems[:limit]) + more
