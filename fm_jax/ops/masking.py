"""Boolean attention masks, True where a query may attend; all broadcast to [B, T, S]."""

import jax
import jax.numpy as jnp


def causal(query_positions: jax.Array, key_positions: jax.Array) -> jax.Array:
    """Let a query attend to keys at its own position and before: [..., T], [..., S] -> [..., T, S]."""
    return key_positions[..., None, :] <= query_positions[..., :, None]


def window(query_positions: jax.Array, key_positions: jax.Array, size: jax.Array | int) -> jax.Array:
    """Let a query attend to the last `size` keys, its own included: [..., T], [..., S] -> [..., T, S].

    Size 0 means no limit. Source: Child et al. 2019 (banded attention); counting the query's own key follows GPT-Neo
    and Mistral.
    """
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    return (distance < size) | (jnp.asarray(size) == 0)


def same_segment(query_segments: jax.Array, key_segments: jax.Array) -> jax.Array:
    """Let a query attend to keys of its own packed document: [B, T], [B, S] -> [B, T, S]."""
    return query_segments[:, :, None] == key_segments[:, None, :]
