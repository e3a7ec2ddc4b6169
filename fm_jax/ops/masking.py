"""Boolean attention masks, True where a query may look; all broadcast to [B, T, S]."""

import jax
import jax.numpy as jnp


def causal(query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
    """Let a query see keys at its own position and before: [..., T], [..., S] -> [..., T, S]."""
    return key_positions[..., None, :] <= query_positions[..., :, None]


def window(query_positions: jax.Array, key_positions: jax.Array, size: jax.Array | int) -> jax.Array:
    """Let a query see the last `size` keys, itself included; a size of 0 sees all.

    [..., T], [..., S] -> [..., T, S]. Source: Child et al. 2019 (banded attention); the count includes the
    query itself, as GPT-Neo and Mistral have it.
    """
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    return (distance < size) | (jnp.asarray(size) == 0)


def same_segment(query_segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """Let a query see keys of its own packed document: [B, T], [B, S] -> [B, T, S]."""
    return query_segments[:, :, None] == key_segments[:, None, :]
