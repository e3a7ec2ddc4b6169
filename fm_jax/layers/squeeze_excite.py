"""Squeeze-and-excitation: channels weighed by what the whole image holds (Hu et al. 2018)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fm_jax.layers.conv import conv


class SqueezeExcite(nn.Module):
    """Multiply each channel by a gate in (0, 1) made from all channels' means: [B, H, W, C] -> [B, H, W, C]."""

    width: int  # channels of the narrow layer
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the gated channels; the means are taken in float32."""
        means = x.astype(jnp.float32).mean(axis=(1, 2), keepdims=True)
        # the narrow layer may be one channel wide, which no mesh divides
        narrow = conv(self.width, 1, ("mlp", None), bias=True, dtype=self.dtype, name="reduce")(means)
        gate = conv(x.shape[-1], 1, (None, "mlp"), bias=True, dtype=self.dtype, name="expand")(jax.nn.silu(narrow))
        return x * jax.nn.sigmoid(gate)
