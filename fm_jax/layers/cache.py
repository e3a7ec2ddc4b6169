"""The key-value cache: a Flax collection in, a Flax collection out.

A slot's index is its position. A row's new keys are written at positions[b, 0], positions[b, 0] + 1, … and a query
at position p attends to the slots up to p. So no length is stored, and right-padded prompts of different lengths are
correct: slots written by padding are overwritten before any query of that row attends to them.

The inputs of a model beside its tokens, such as an encoder's source, are its context: a mapping from argument names to
arrays with the batch first. It is given with the prompt; the cache stores the keys and values computed from it.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.types import Params

Context = Mapping[str, Any] | None


def init_cache(model: nn.Module, params: Params, batch_size: int, length: int, context: Context = None) -> Any:
    """Return an empty cache for `length` positions and a context of these shapes.

    Every leaf is [L, B, …]: keys and values [L, B, S, G, K] of tokens and of an encoder's states, and the latter's
    length [L, B].
    """
    tokens = jax.ShapeDtypeStruct((batch_size, length), jnp.int32)

    def prefill(params: Params, tokens: jax.Array, context: Mapping[str, Any]) -> Any:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), tokens.shape)
        return model.apply({"params": params}, tokens, positions=positions, **context, mutable=["cache"])[1]["cache"]

    shapes = jax.eval_shape(prefill, params, tokens, dict(context or {}))
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def write(stored: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """Write `new` [B, T, G, K] into `stored` [B, S, G, K], row b from slot positions[b, 0] on.

    XLA silently shifts a write past the end back: callers check prompt + new ≤ S first.
    """
    update = jax.vmap(lambda row, rows, start: jax.lax.dynamic_update_slice(row, rows, (start, 0, 0)))
    return update(stored, new.astype(stored.dtype), jnp.broadcast_to(positions[:, 0], new.shape[:1]))
