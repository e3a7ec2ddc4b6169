"""Matrix products in the form that each backend runs fastest."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def flat_dot_general(
    lhs: jax.Array,
    rhs: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    **_: Any,
) -> jax.Array:
    """Contract the last axis of `lhs` [..., D] with the first of `rhs` [D, F] -> [..., F].

    A replacement for `nn.Dense(dot_general=...)` that flattens the leading axes: XLA on CPU runs the gradient of
    [8, 256, 256] @ [256, 1024] in 73 ms, of [2048, 256] @ [256, 1024] in 25 ms; on an accelerator the reshape costs
    nothing. If a mesh splits time over its sequence axis, flattening would merge two split axes, so nothing is
    flattened.
    """
    contract, batch = dimension_numbers
    plain = tuple(map(tuple, contract)) == ((lhs.ndim - 1,), (0,)) and not any(map(tuple, batch))
    mesh = jax.sharding.get_abstract_mesh()
    if not plain or lhs.ndim == 2 or (not mesh.empty and mesh.shape.get("sequence", 1) > 1):
        return jax.lax.dot_general(
            lhs, rhs, dimension_numbers, precision=precision, preferred_element_type=preferred_element_type
        )
    flat = lhs.reshape(math.prod(lhs.shape[:-1]), lhs.shape[-1])
    out = jnp.matmul(flat, rhs, precision=precision, preferred_element_type=preferred_element_type)
    return out.reshape(*lhs.shape[:-1], rhs.shape[-1])
