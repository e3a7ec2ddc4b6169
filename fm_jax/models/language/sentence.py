"""One vector a text, on any backbone that has `hidden(tokens) -> [B, T, D]`.

Reimers & Gurevych 2019: the mean over the tokens serves best; the cosine of two vectors says how near two texts are.

Dims: B batch, T time, D d_model.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.layers.readout import Pool, pool, states
from fm_jax.layers.tap import Tap


class SentenceEncoder(nn.Module):
    """Tokens [B, T] and their lengths [B] -> vectors [B, D]; parameters "backbone/…"."""

    backbone: nn.Module
    pool: Pool = "mean"
    normalise: bool = False  # to length 1

    @property
    def sites(self) -> tuple[str, ...]:
        """Name the backbone's sites: pooling adds none."""
        return self.backbone.sites

    @nn.compact
    def __call__(
        self, tokens: jax.Array, length: jax.Array, types: jax.Array | None = None, *, tap: Tap | None = None
    ) -> jax.Array:
        """Pool the hidden states of the first `length` tokens of each row, in float32."""
        pooled = pool(states(self.backbone, tokens, length, types, tap), length, self.pool)
        if not self.normalise:
            return pooled
        # the floor stands inside the root, where a row of zeros has a finite gradient
        return pooled * jax.lax.rsqrt(jnp.maximum(jnp.square(pooled).sum(axis=-1, keepdims=True), 1e-24))
