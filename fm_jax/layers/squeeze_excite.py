"""Squeeze-and-excitation: channels gated by statistics of the whole image (Hu et al. 2018)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.layers.conv import conv


class SqueezeExcite(nn.Module):
    """Multiply each channel by a gate in (0, 1) computed from all channels' means: [B, H, W, C] -> [B, H, W, C]."""

    width: int  # channels of the bottleneck
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the gated channels [B, H, W, C]; the means are computed in float32."""
        means = x.astype(jnp.float32).mean(axis=(1, 2), keepdims=True)
        # The bottleneck may have one channel, which no mesh axis divides, so it is not split.
        narrow = conv(self.width, 1, ("mlp", None), bias=True, dtype=self.dtype, name="reduce")(means)
        gate = conv(x.shape[-1], 1, (None, "mlp"), bias=True, dtype=self.dtype, name="expand")(jax.nn.silu(narrow))
        return x * jax.nn.sigmoid(gate)
