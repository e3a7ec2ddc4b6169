"""LayerNorm and RMSNorm, in float32 whatever the compute dtype."""

from dataclasses import dataclass
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class NormConfig:
    """Kind and settings of the normalisation."""

    kind: Literal["layer", "rms"] = "layer"
    epsilon: float = 1e-5
    bias: bool = True  # LayerNorm's offset; RMSNorm has none
    offset: float = 0.0  # added to the stored scale; 1.0 for Gemma, which stores scale - 1


class Norm(nn.Module):
    """Normalise the last axis: [..., D] -> [..., D].

    The variance takes two passes: the fast form E[x²] - E[x]² is off by 0.23 at mean 1000, std 1 in float32.
    Source: Ba et al. 2016 (LayerNorm); Zhang & Sennrich 2019 (RMSNorm).
    """

    cfg: NormConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the normalised, scaled (and shifted) activations [..., D] in the compute dtype."""
        cfg, width = self.cfg, x.shape[-1]
        ones = nn.initializers.constant(1.0 - cfg.offset)
        scale = self.param("scale", nn.with_logical_partitioning(ones, ("norm",)), (width,), jnp.float32)
        x = x.astype(jnp.float32)
        if cfg.kind == "layer":
            x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + cfg.epsilon)
        x = x * (scale + cfg.offset).reshape((1,) * (x.ndim - 1) + (width,))
        if cfg.kind == "layer" and cfg.bias:
            zeros = nn.initializers.zeros_init()
            bias = self.param("bias", nn.with_logical_partitioning(zeros, ("norm",)), (width,), jnp.float32)
            x = x + bias.reshape((1,) * (x.ndim - 1) + (width,))
        return x.astype(self.dtype)
