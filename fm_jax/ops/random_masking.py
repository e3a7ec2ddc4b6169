"""Random masking of an image's patches by sorting random noise, as in masked autoencoders.

Dims: B batch, N patches, K kept patches.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fm_jax.core.errors import ConfigError


class Masking(NamedTuple):
    """A random choice of K patches out of N."""

    keep: jax.Array  # [B, K]: indices of the kept patches, by ascending noise
    rank: jax.Array  # [B, N]: rank of each patch's noise; kept patches have a rank below K
    removed: jax.Array  # [B, N] bool: the masked patches


def count_kept(patches: int, ratio: float) -> int:
    """Return the number of kept patches when a share `ratio` is masked, rounded down.

    Raises:
        ConfigError: no patch or all patches would be kept.
    """
    kept = int(patches * (1 - ratio))
    if not 1 <= kept < patches:
        raise ConfigError(f"mask_ratio {ratio} keeps {kept} of {patches} patches; at least 1 must be kept and 1 masked")
    return kept


def mask(noise: jax.Array, kept: int) -> Masking:
    """Keep the `kept` patches with the smallest noise [B, N] in each row (He et al. 2022, section 3)."""
    order = jnp.argsort(noise, axis=1)
    rank = jnp.argsort(order, axis=1)
    return Masking(order[:, :kept], rank, rank >= kept)


def pick(x: jax.Array, keep: jax.Array) -> jax.Array:
    """Gather the kept patches: [B, N, D], [B, K] -> [B, K, D]."""
    return jnp.take_along_axis(x, keep[..., None], axis=1)


def restore(kept: jax.Array, masking: Masking, fill: jax.Array) -> jax.Array:
    """Put kept patches [B, K, D] back in place and `fill` [D] in place of masked ones: [B, N, D]."""
    place = jnp.minimum(masking.rank, kept.shape[1] - 1)
    return jnp.where(masking.removed[..., None], fill, jnp.take_along_axis(kept, place[..., None], axis=1))


def noise(key: jax.Array, rows: jax.Array, patches: int) -> jax.Array:
    """Draw noise in [0, 1) for each patch of each row: [B, …] -> [B, N].

    It depends on the key and the row's own values, not on its batch, so an evaluation with a fixed key gives the same
    result at any batch size.
    """
    return jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, _fingerprint(row)), (patches,)))(rows)


def _fingerprint(row: jax.Array) -> jax.Array:
    """Hash a row to a uint32 []: its bits times odd numbers, summed modulo 2³²."""
    bits = jax.lax.bitcast_convert_type(row.astype(jnp.float32), jnp.uint32).reshape(-1)
    odd = jax.lax.iota(jnp.uint32, math.prod(row.shape)) * jnp.uint32(0x9E3779B1) | jnp.uint32(1)
    return (bits * odd).sum(dtype=jnp.uint32)
