"""Relative position bias: a learned bias of attention scores by distance (Raffel et al. 2020, section 2.1)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.layers.dense import Initializer
from fm_jax.ops.positions import Buckets, bucket


class RelativeBias(nn.Module):
    """Positions of queries [B or 1, T] and keys [B or 1, S] -> bias [B or 1, H, T, S], shared by a stack's layers."""

    cfg: Buckets
    num_heads: int
    bidirectional: bool
    kernel_init: Initializer

    @nn.compact
    def __call__(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Look up each pair's distance in the table [count, H]: bias [B or 1, H, T, S] in float32."""
        table = nn.with_logical_partitioning(self.kernel_init, (None, "heads"))
        table = self.param("table", table, (self.cfg.count, self.num_heads), jnp.float32)
        buckets = bucket(keys[:, None, :] - queries[:, :, None], self.cfg, bidirectional=self.bidirectional)
        return jnp.take(table.T, buckets, axis=1).transpose(1, 0, 2, 3)
