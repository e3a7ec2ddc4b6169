"""Stochastic depth: drop whole updates to the residual stream, row by row (Huang et al. 2016)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.errors import ConfigError


class DropPath(nn.Module):
    """Zero a row's update with probability `rate` and divide the others by 1 - rate: [B, …] -> [B, …].

    The expectation is the update itself. Without a key "dropout" (evaluation) it returns `x`.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, part: jax.Array | float = 1.0) -> jax.Array:
        """Return the updates [B, …]; the rate is multiplied by `part` [] (a scanned stack gives each layer its own)."""
        if not 0 <= self.rate < 1:
            raise ConfigError(f"the rate of drop path must be in [0, 1), not {self.rate}")
        if not self.rate or not self.has_rng("dropout"):
            return x
        stay = 1 - self.rate * part
        stays = jax.random.bernoulli(self.make_rng("dropout"), stay, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(stays, x / stay, jnp.zeros((), x.dtype)).astype(x.dtype)
