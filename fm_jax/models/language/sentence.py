"""A sentence encoder on any backbone that has `hidden(tokens) -> [B, T, D]`: one vector per text.

Reimers & Gurevych 2019: the mean over the tokens works best; two texts are compared by the cosine of their vectors.

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
    normalise: bool = False  # scale vectors to length 1

    @property
    def sites(self) -> tuple[str, ...]:
        """Return the backbone's sites: pooling adds none."""
        return self.backbone.sites

    @nn.compact
    def __call__(
        self, tokens: jax.Array, length: jax.Array, types: jax.Array | None = None, *, tap: Tap | None = None
    ) -> jax.Array:
        """Encode tokens [B, T] of lengths [B], with token types [B, T]: vectors [B, D] in float32."""
        pooled = pool(states(self.backbone, tokens, length, types, tap), length, self.pool)
        if not self.normalise:
            return pooled
        # The lower bound is inside the root, so that a row of zeros has a finite gradient.
        return pooled * jax.lax.rsqrt(jnp.maximum(jnp.square(pooled).sum(axis=-1, keepdims=True), 1e-24))
