"""Which patches of an image are kept and which are taken out, by the order of a noise.

Dims: B batch, N patches, K kept of them.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fm_jax.core.errors import ConfigError


class Masking(NamedTuple):
    """A draw of K patches out of N."""

    keep: jax.Array  # [B, K]: numbers of the kept patches, by rising noise
    rank: jax.Array  # [B, N]: each patch's place in the order of the noise; below K where it is kept
    removed: jax.Array  # [B, N] bool


def count_kept(patches: int, ratio: float) -> int:
    """Return how many patches stay when a share `ratio` is taken out, rounded down.

    Raises:
        ConfigError: none or all of them would stay.
    """
    kept = int(patches * (1 - ratio))
    if not 1 <= kept < patches:
        raise ConfigError(f"a mask_ratio of {ratio} keeps {kept} of {patches} patches; at least 1 must stay and 1 go")
    return kept


def mask(noise: jax.Array, kept: int) -> Masking:
    """Keep the `kept` patches of the smallest noise [B, N] in each row (He et al. 2022, section 3)."""
    order = jnp.argsort(noise, axis=1)
    rank = jnp.argsort(order, axis=1)
    return Masking(order[:, :kept], rank, rank >= kept)


def pick(x: jax.Array, keep: jax.Array) -> jax.Array:
    """Return the kept rows: [B, N, D], [B, K] -> [B, K, D]; nothing of the others is read."""
    return jnp.take_along_axis(x, keep[..., None], axis=1)


def restore(kept: jax.Array, masking: Masking, fill: jax.Array) -> jax.Array:
    """Put kept rows [B, K, D] back where they stood, and `fill` [D] where one was taken out: [B, N, D]."""
    place = jnp.minimum(masking.rank, kept.shape[1] - 1)
    return jnp.where(masking.removed[..., None], fill, jnp.take_along_axis(kept, place[..., None], axis=1))


def noise(key: jax.Array, rows: jax.Array, patches: int) -> jax.Array:
    """Draw a noise in [0, 1) for each row: [B, …] -> [B, N].

    It depends on the key and on the row's own numbers, not on the batch the row stands in: an evaluation with a fixed
    key is the same in batches of any size.
    """
    return jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, _fingerprint(row)), (patches,)))(rows)


def _fingerprint(row: jax.Array) -> jax.Array:
    """Return a number [] that differs between rows: their bits times odd numbers, modulo 2³²."""
    bits = jax.lax.bitcast_convert_type(row.astype(jnp.float32), jnp.uint32).reshape(-1)
    odd = jax.lax.iota(jnp.uint32, math.prod(row.shape)) * jnp.uint32(0x9E3779B1) | jnp.uint32(1)
    return (bits * odd).sum(dtype=jnp.uint32)
