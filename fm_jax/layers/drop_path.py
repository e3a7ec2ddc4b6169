"""Stochastic depth: whole updates to the residual stream left out, row by row (Huang et al. 2016)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.core.errors import ConfigError


class DropPath(nn.Module):
    """Leave an update out of a row with probability `rate`, and divide those that stay by 1 - rate: [B, …] -> [B, …].

    The expectation is the update itself, so nothing is left to do in evaluation: without a key "dropout" it is `x`.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, part: jax.Array | float = 1.0) -> jax.Array:
        """Return the updates that survive; `part` [] of the rate is used (a scanned stack gives each layer its own)."""
        if not 0 <= self.rate < 1:
            raise ConfigError(f"a drop path's rate must be in [0, 1), not {self.rate}")
        if not self.rate or not self.has_rng("dropout"):
            return x
        stay = 1 - self.rate * part
        stays = jax.random.bernoulli(self.make_rng("dropout"), stay, (x.shape[0],) + (1,) * (x.ndim - 1))
        return jnp.where(stays, x / stay, jnp.zeros((), x.dtype)).astype(x.dtype)
